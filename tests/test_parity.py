"""`perf parity`: what is right passes, on any batch and any kernels; each kind of mistake fails with its cause."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ascend
import ops
from ascend.generation import Decoder
from ascend.model import BailingMoeV2ForCausalLM
from ops import cpu, reference
from perf.parity.judge import Verdict, all_checks, judge
from perf.parity.limits import LIMITS
from perf.parity.numbers import compare, follows
from perf.parity.prompts import Batch, random_batches, restored_batches
from perf.parity.trace import trace
from tests.tiny import checkpoint, edit_config, user_error

# What the kernels of an NPU take: heads of 64, expert widths in blocks of 64.
SHAPE = {"head_dim": 64, "hidden_size": 128, "moe_intermediate_size": 64}


# Near-ties


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, int]:
    """Biased scores, what the reference chooses of them, groups, kept groups, experts per token."""
    n_group = draw(st.sampled_from((1, 2, 4, 8)))
    topk_group = draw(st.integers(1, n_group))
    experts = n_group * draw(st.integers(2, 4))
    top_k = draw(st.integers(1, topk_group * experts // n_group))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    logit, bias = torch.randn(16, experts, generator=generator), torch.randn(experts, generator=generator)
    _, chosen = reference.moe_gate(logit, torch.eye(experts), bias, top_k, n_group, topk_group, True, 1.0)
    return torch.sigmoid(logit) + bias, chosen, n_group, topk_group, top_k


@settings(deadline=None)
@given(routings(), st.floats(0, 0.1), st.integers(0, 2**20))
def test_a_router_follows_its_scores_and_near_ones(
    routing: tuple[Tensor, Tensor, int, int, int], tolerance: float, seed: int
) -> None:
    score, chosen, n_group, topk_group, _ = routing
    assert follows(score, chosen, n_group, topk_group, 1e-6).all()
    noise = (2 * torch.rand(score.shape, generator=torch.Generator().manual_seed(seed)) - 1) * tolerance
    assert follows(score + noise, chosen, n_group, topk_group, tolerance + 1e-6).all()


@settings(deadline=None)
@given(routings())
def test_a_clearly_worse_expert_is_no_near_tie(routing: tuple[Tensor, Tensor, int, int, int]) -> None:
    score, chosen, n_group, topk_group, top_k = routing
    if top_k == score.shape[1]:
        return
    left_out = torch.ones_like(score).scatter_(1, chosen, 0).argmax(-1)
    worse = chosen.clone()
    worse[:, 0] = left_out
    lowered = score.scatter(1, left_out[:, None], -9.0)
    assert not follows(lowered, worse, n_group, topk_group, 0.1).any()
    assert not follows(torch.full_like(score, torch.nan), chosen, n_group, topk_group, 0.1).any()


# Real models, in this process


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    return {dtype: checkpoint(folder / dtype, dtype=dtype, **SHAPE) for dtype in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return random_batches(300, 2, 48, 0)


@pytest.fixture(scope="module")
def trusted(paths: dict[str, Path], batches: list[Batch]) -> dict[str, dict[str, Tensor]]:
    return {dtype: trace(ascend.load_model(path), batches, 2) for dtype, path in paths.items()}


def verdict_of(a: dict[str, Tensor], model: BailingMoeV2ForCausalLM, batches: list[Batch], precision: str) -> Verdict:
    limits = LIMITS[precision]
    b = trace(model, batches, 2, a)
    return judge(all_checks(compare(a, b, limits, model.config.n_group, model.config.topk_group), limits))


def rows_alone(batches: list[Batch]) -> list[Batch]:
    return [
        Batch(batch.ids_BT[row : row + 1], batch.start_B[row : row + 1])
        for batch in batches
        for row in range(len(batch.ids_BT))
    ]


def all_in_one(batches: list[Batch]) -> list[Batch]:
    return [Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("ids_BT", "start_B")))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batched", [list, rows_alone, all_in_one])
def test_the_same_model_passes_however_its_rows_are_batched(
    paths: dict[str, Path],
    trusted: dict[str, dict[str, Tensor]],
    batches: list[Batch],
    precision: str,
    batched: Callable[[list[Batch]], list[Batch]],
) -> None:
    verdict = verdict_of(trusted[precision], ascend.load_model(paths[precision]), batched(batches), precision)
    assert verdict == Verdict()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "w8a8", "w4a16"])
def test_other_kernels_pass(
    paths: dict[str, Path], batches: list[Batch], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise = precision if precision.startswith("w") else None
    model = ascend.load_model(paths["fp32" if precision == "fp32" else "bf16"], quantise=quantise)
    a = trace(model, batches, 2)
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(cpu._table, dtype, None)
    b = trace(model, batches, 2, a)
    assert not torch.equal(a["logits"], b["logits"]), "the reference ran in place of the kernels"
    limits = LIMITS[precision]
    assert judge(all_checks(compare(a, b, limits, model.config.n_group, model.config.topk_group), limits)) == Verdict()


def scale(name: str, factor: float) -> Callable[[BailingMoeV2ForCausalLM], None]:
    def change(model: BailingMoeV2ForCausalLM) -> None:
        model.get_parameter(name).data.mul_(factor)

    return change


def permute_experts(model: BailingMoeV2ForCausalLM) -> None:
    experts: Any = model.model.layers[1].mlp.experts
    experts.down.data = experts.down.data.roll(1, 0)


def reroute(gate: Any, choose: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Have ``choose`` give the router's weights and experts; the norm before it, where it is asked for, stays."""

    def forward(x_TH: Tensor, norm: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        residual_TH = None
        if norm is not None:
            x_TH, residual_TH = ops.add_rms_norm(x_TH, *norm)
        return *choose(x_TH), x_TH, residual_TH

    gate.forward = forward


def forget_the_bias(model: BailingMoeV2ForCausalLM) -> None:
    gate: Any = model.model.layers[1].mlp.gate
    options = (gate.top_k, gate.n_group, gate.topk_group, gate.normalise, gate.scaling)
    reroute(gate, lambda x_TH: reference.moe_gate(x_TH, gate.weight, None, *options))


def ignore_padding(model: BailingMoeV2ForCausalLM) -> None:
    make = model.model.step
    model.model.step = lambda position, start, *rest: make(position, torch.zeros_like(start), *rest)  # type: ignore[method-assign]


def skip_a_layer_in_the_chain(model: BailingMoeV2ForCausalLM) -> None:
    forward = model.model.forward

    def changed(*arguments: Any) -> Tensor:
        return forward(*arguments) * 1.5

    model.model.forward = changed  # type: ignore[method-assign]


BROKEN: dict[str, tuple[Callable[[BailingMoeV2ForCausalLM], None], str, str]] = {
    "one projection 1 % larger": (
        scale("model.layers.2.attention.dense.weight", 1.01),
        "layer 2: attention",
        "attention",
    ),
    "the experts 1 % smaller": (scale("model.layers.1.mlp.experts.down", 0.99), "layer 1: MLP", "experts"),
    "the dense MLP 1 % larger": (scale("model.layers.0.mlp.down", 1.01), "layer 0: MLP", "MLP"),
    "experts permuted": (permute_experts, "layer 1: MLP", "experts"),
    "the router's weight 5 % larger": (
        scale("model.layers.2.mlp.gate.weight", 1.05),
        "layer 2: router ",
        "router",
    ),
    "the router's bias forgotten": (forget_the_bias, "layer 1: misrouted", "how the router chooses"),
    "the final norm 5 % larger in part": (
        lambda model: model.model.norm.weight.data[:8].mul_(1.5),  # type: ignore[func-returns-value]
        "head: ",
        "final norm",
    ),
    "one embedding": (lambda model: model.model.word_embeddings.weight.data.mul_(1.01), "embedding", "embedding"),
    "padding seen": (ignore_padding, "layer 0: attention", "attention"),
    "the draft's projection": (scale("model.layers.3.eh_proj.weight", 1.05), "MTP 0", ""),
    "only the whole pass": (skip_a_layer_in_the_chain, "whole pass", "only the whole pass"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_fails_and_the_verdict_says_where(
    paths: dict[str, Path], trusted: dict[str, dict[str, Tensor]], batches: list[Batch], what: str, precision: str
) -> None:
    change, place, cause = BROKEN[what]
    model = ascend.load_model(paths[precision])
    with torch.no_grad():
        change(model)
    verdict = verdict_of(trusted[precision], model, batches, precision)
    assert not verdict.passed
    assert verdict.reasons[0].startswith(place), verdict.reasons
    assert cause in str(verdict.cause)


@pytest.mark.parametrize("name", ["attention.dense.weight", "attention.query_key_value.weight", "mlp.experts.down"])
def test_in_fp32_one_element_of_a_matrix_is_enough(
    paths: dict[str, Path], trusted: dict[str, dict[str, Tensor]], batches: list[Batch], name: str
) -> None:
    model = ascend.load_model(paths["fp32"])
    weight = model.get_parameter(f"model.layers.1.{name}").data.flatten()
    largest = weight[-weight.numel() // 4 :].abs().argmax() - weight.numel() // 4  # among the values, not the queries
    weight[largest] *= 1.01
    verdict = verdict_of(trusted["fp32"], model, batches, "fp32")
    assert verdict.reasons[0].startswith("layer 1: MLP" if "experts" in name else "layer 1: attention"), verdict.reasons


def test_what_comes_after_a_flip_in_its_row_is_not_counted_as_before_it(
    trusted: dict[str, dict[str, Tensor]],
) -> None:
    a = trusted["bf16"]
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["experts"][48 + 10, 1, 0] += 100  # row 1 of 48 tokens, position 10
    b["decode.experts"][0, 1, 0, 0] += 100  # row 0, the second of two steps
    b["prefill.experts"][-1, 0, 0] += 100  # the padded row
    numbers = compare(a, b, LIMITS["bf16"], 4, 2)
    assert (numbers.whole.positions, numbers.whole_clean.positions) == (128, 128 - 38)
    assert (numbers.decode.positions, numbers.decode_clean.positions) == (9, 2 + 3)
    assert sum(layer.flips for layer in numbers.layers) == 0


def test_a_flip_at_a_near_tie_is_counted_and_one_without_is_unexplained(trusted: dict[str, dict[str, Tensor]]) -> None:
    a = {name: tensor.clone() for name, tensor in trusted["bf16"].items()}
    scores, chosen = a["layer.1.scores"], a["layer.1.experts"]
    score_E = torch.tensor([0.9, 0.8, 0.505, 0.5, 0.1, 0.1, 0.1, 0.1])  # groups of two: the first two are kept
    scores[:], chosen[:] = score_E, torch.tensor([0, 1, 2])
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["layer.1.scores"][5, 3], b["layer.1.experts"][5] = 0.51, torch.tensor([0, 1, 3])
    near = compare(a, b, LIMITS["bf16"], 4, 2).layers[1]
    assert (near.flips, near.unexplained, near.misrouted) == (1, 0, 0)
    b["layer.1.experts"][6] = torch.tensor([0, 2, 3])
    far = compare(a, b, LIMITS["bf16"], 4, 2).layers[1]
    assert (far.flips, far.unexplained, far.misrouted) == (2, 1, 1)


def test_drift_is_what_the_streams_of_the_whole_passes_differ_by(trusted: dict[str, dict[str, Tensor]]) -> None:
    a = {name: tensor.clone() for name, tensor in trusted["fp32"].items()}
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["stream.2"] *= 1.1  # after layer 1
    b["stream.3"][48 + 20 :] *= 1.5  # after the flip in row 1, and in the padded row
    b["stream.3"][96:] = a["stream.3"][96:]
    b["experts"][48 + 20, 1, 0] += 100  # layer 2, the second with a router
    numbers = compare(a, b, LIMITS["fp32"], 4, 2)
    assert [layer.name for layer in numbers.drift] == ["layer 0", "layer 1", "layer 2"]
    assert [layer.clean for layer in numbers.drift] == pytest.approx([0, 0.1, 0], abs=1e-6)
    later = a["stream.3"][48 + 20 : 96].norm() * 0.5 / a["stream.3"].norm()
    assert [layer.everything for layer in numbers.drift] == pytest.approx([0, 0.1, float(later)], abs=1e-6)
    assert [layer.worst for layer in numbers.drift] == pytest.approx([0, 0.1, 0.5], abs=1e-6)
    assert [layer.same_experts for layer in numbers.drift] == [None, 1.0, pytest.approx(127 / 128)]
    verdict = judge(all_checks(numbers, LIMITS["fp32"]))
    assert [reason.partition(":")[0] for reason in verdict.reasons] == ["whole pass after layer 1"]
    assert "up to layer 1" in str(verdict.cause)


def test_a_fault_of_the_chain_alone_is_named_by_the_layer_where_it_begins(
    paths: dict[str, Path], trusted: dict[str, dict[str, Tensor]], batches: list[Batch]
) -> None:
    model = ascend.load_model(paths["bf16"])
    layers: Any = model.model.layers
    forward = layers[2].forward
    # Alone a layer gets its stream as one tensor; in the chain it gets the MLP's output and the stream before it.
    layers[2].forward = lambda x, residual, step: forward(x if residual is None else 0.9 * x, residual, step)
    verdict = verdict_of(trusted["bf16"], model, batches, "bf16")
    assert verdict.reasons[0].startswith("whole pass after layer 2: drift"), verdict.reasons


def test_another_best_token_is_listed_with_a_lead_that_its_logits_have_moved(
    trusted: dict[str, dict[str, Tensor]],
) -> None:
    a = {name: tensor.clone() for name, tensor in trusted["fp32"].items()}
    b = {name: tensor.clone() for name, tensor in a.items()}
    best, second = a["logits"][48 + 7].topk(2).indices.tolist()
    gap = float(a["logits"][48 + 7, best] - a["logits"][48 + 7, second])
    b["logits"][48 + 7, second] += gap + 0.25
    step, other = a["decode.logits"][2, 1].topk(2).indices.tolist()
    b["decode.logits"][2, 1, other] = b["decode.logits"][2, 1, step] + 0.5
    b["prefill.experts"][-1, 0, 0] += 100
    whole, decode = compare(a, b, LIMITS["fp32"], 4, 2).divergences
    deviation = float(a["logits"][48 + 7].double().std())
    assert (whole.where, whole.row, whole.position, whole.after_flip) == ("whole pass", 1, 7, False)
    assert (whole.lead, whole.moved) == pytest.approx((gap / deviation, (gap + 0.25) / deviation), rel=1e-4)
    assert (decode.where, decode.row, decode.position, decode.after_flip) == ("decode", 2, 1, True)
    assert 0 < decode.lead <= decode.moved
    assert not whole.explained(LIMITS["fp32"])
    assert decode.explained(LIMITS["fp32"])


@pytest.mark.parametrize(
    ("changed", "place", "cause"),
    [
        ({"rope_theta": 10000.0}, "layer 0: attention", "positions"),
        ({"partial_rotary_factor": 1.0, "rotary_dim": 64}, "layer 0: attention", "positions"),
        ({"routed_scaling_factor": 2.4}, "layer 1: routing weights", "routed_scaling_factor"),
        ({"norm_topk_prob": False}, "layer 1: routing weights", "norm_topk_prob"),
        ({"topk_group": 3}, "layer 1: ", "how the router chooses"),
        ({"rms_norm_eps": 0.1}, "layer 0: attention", "attention"),
    ],
)
def test_another_configuration_fails_and_the_verdict_names_what(
    trusted: dict[str, dict[str, Tensor]],
    paths: dict[str, Path],
    batches: list[Batch],
    tmp_path: Path,
    changed: dict[str, Any],
    place: str,
    cause: str,
) -> None:
    shutil.copytree(paths["bf16"], tmp_path / "other")
    limits = LIMITS["bf16"]
    b = trace(ascend.load_model(edit_config(tmp_path / "other", **changed)), batches, 2, trusted["bf16"])
    verdict = judge(all_checks(compare(trusted["bf16"], b, limits, 4, 2), limits))  # side a says which groups there are
    assert not verdict.passed
    assert verdict.reasons[0].startswith(place), verdict.reasons
    assert cause in str(verdict.cause)


def test_the_tokens_of_a_file_make_the_same_batches(batches: list[Batch]) -> None:
    tokens = torch.cat([batch.ids_BT[batch.real] for batch in batches])
    again = restored_batches(tokens, [[2, 48, 0], [1, 48, 16]])
    for one, other in zip(batches, again, strict=True):
        assert torch.equal(one.ids_BT, other.ids_BT)
        assert torch.equal(one.start_B, other.start_B)
    assert "damaged" in user_error(restored_batches, tokens, [[2, 48, 0]])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fault_of_decode_alone_is_found_though_a_flip_came_before_in_every_row(
    paths: dict[str, Path],
    trusted: dict[str, dict[str, Tensor]],
    batches: list[Batch],
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = Decoder._forward

    def without_the_prompt(self: Decoder, token_BT: Tensor, length: int | None) -> Tensor:
        for values in self.cache.values if token_BT.shape[1] == 1 else ():
            values.zero_()
        return forward(self, token_BT, length)

    a, limits, model = trusted[precision], LIMITS[precision], ascend.load_model(paths[precision])
    monkeypatch.setattr(Decoder, "_forward", without_the_prompt)
    b = trace(model, batches, 2, a)
    b["prefill.experts"] = b["prefill.experts"].roll(1, dims=0)  # as if every row had flipped
    numbers = compare(a, b, limits, model.config.n_group, model.config.topk_group)
    assert numbers.decode_clean.positions == 0
    verdict = judge(all_checks(numbers, limits))
    assert verdict.reasons[0].startswith("decode on a's experts")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_another_sides_experts_are_taken_in_every_pass(
    paths: dict[str, Path], trusted: dict[str, dict[str, Tensor]], batches: list[Batch], precision: str
) -> None:
    """A side whose own router is wrong computes what side a does once it is made to take a's experts."""
    a, model = trusted[precision], ascend.load_model(paths[precision])
    for layer in model.model.layers[1 : model.config.num_hidden_layers]:
        layer.mlp.gate.expert_bias.copy_(layer.mlp.gate.expert_bias.flip(0) + torch.arange(8) % 3)
    b = trace(model, batches, 2, a)
    numbers = compare(a, b, LIMITS[precision], model.config.n_group, model.config.topk_group)
    assert numbers.whole.kl_mean > 100 * numbers.forced.kl_mean
    assert numbers.decode.kl_mean > 100 * numbers.forced_decode.kl_mean
    assert numbers.forced.delta <= LIMITS[precision].logits
    assert (numbers.forced.positions, numbers.forced_decode.positions) == (128, 9)
