"""The whole model over several ranks (gloo, CPU): its logits are those of one process, however it is divided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ascend
from ascend import expert_loads
from ascend.config import BailingMoeV2Config
from ascend.model import BailingMoeV2ForCausalLM
from ascend.parallel import Parallel
from ascend.pieces import checkpoint_pieces
from ops.placement import Placement, balance, contiguous, read_loads, write_loads
from ops.process_group import Group
from tests import tiny
from tests.ranks import Ranks

pytestmark = pytest.mark.beside

TOLERANCE = 1e-5  # of the largest logit, in fp32
# Two key/value heads: four ranks share them.
SHAPE = {"use_qkv_bias": True, "use_bias": True, "norm_head": True}
# Expert 5 twice and expert 0 twice: ten slots for eight experts.
COPIES = Placement((5, 0, 1, 2, 3, 5, 4, 6, 7, 0), 8, 2)
# Another one for each layer with experts: the model's second and third, and the MTP layer.
BY_LAYER = {
    1: COPIES,
    2: Placement((7, 6, 5, 4, 3, 2, 1, 0, 0, 1), 8, 2),
    3: Placement((0, 1, 2, 3, 3, 4, 5, 6, 7, 7), 8, 2),
}


@dataclass(frozen=True)
class Mesh:
    """How a test divides the model; ``ranks`` over ``tensor`` gives the streams of tokens."""

    ranks: int
    tensor: int
    experts: int
    strategy: str = "auto"
    placement: Placement | dict[int, Placement] | None = None

    def __str__(self) -> str:
        copies = "" if self.placement is None else ", copies by layer" if self.placement is BY_LAYER else ", copies"
        return f"{self.ranks} ranks, tensor {self.tensor}, experts {self.experts}, {self.strategy}{copies}"


STRATEGIES = ("all_reduce", "all_gather", "all_to_all")
TWO = [Mesh(2, *shape) for shape in ((2, 1), (2, 2), (1, 2))]
TWO += [Mesh(2, tensor, 2, strategy) for tensor in (1, 2) for strategy in STRATEGIES]
TWO += [Mesh(2, tensor, 2, "auto", placement) for tensor in (1, 2) for placement in (COPIES, BY_LAYER)]
FOUR = [Mesh(4, tensor, experts) for tensor in (1, 2, 4) for experts in (1, 2, 4)]
FOUR += [Mesh(4, 2, 2, strategy) for strategy in STRATEGIES] + [Mesh(4, 4, 2, "all_to_all", COPIES)]
EIGHT = [Mesh(8, 4, 8), Mesh(8, 2, 4, "all_to_all"), Mesh(8, 4, 4, "all_gather")]


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("parallel"), **SHAPE)


def prompts(rows: int) -> Tensor:
    return torch.randint(0, tiny.SHAPE["vocab_size"], (rows, 11), generator=torch.Generator().manual_seed(4))


def parallel_of(group: Group, mesh: Mesh) -> Parallel:
    return Parallel.mesh(group, mesh.tensor, mesh.experts, mesh.placement, mesh.strategy)


def _logits(group: Group, path: Path, mesh: Mesh, dtype: str) -> tuple[Any, ...]:
    """On a rank: logits of its stream's prompts, MTP logits, greedy tokens, and how many weights it holds."""
    parallel = parallel_of(group, mesh)
    model = ascend.load_model(path, dtype=dtype, parallel=parallel)
    streams = mesh.ranks // mesh.tensor
    # Streams of different lengths: uneven tokens meet in every MoE layer.
    stream = group.rank // mesh.tensor
    ids = prompts(streams)[stream : stream + 1, stream:]
    tokens = ascend.generate(model, ids, 4)
    return stream, model(ids), model.mtp_logits(ids)[0], tokens, sum(p.numel() for p in model.parameters())


def check(ranks: Ranks, checkpoint: Path, mesh: Mesh, dtype: str = "float32", tolerance: float = TOLERANCE) -> None:
    whole = ascend.load_model(checkpoint, dtype=dtype)
    with torch.inference_mode():
        expected = [
            (whole(ids), whole.mtp_logits(ids)[0], ascend.generate(whole, ids, 4))
            for ids in (prompts(mesh.ranks // mesh.tensor)[s : s + 1, s:] for s in range(mesh.ranks // mesh.tensor))
        ]
    for stream, logits, drafts, tokens, size in ranks.call(_logits, checkpoint, mesh, dtype):
        for ours, theirs in ((logits, expected[stream][0]), (drafts, expected[stream][1])):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
        if dtype == "float32":
            assert torch.equal(tokens, expected[stream][2])
        if mesh.placement is None:
            assert size < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("mesh", TWO, ids=str)
def test_two_ranks(two: Ranks, checkpoint: Path, mesh: Mesh) -> None:
    check(two, checkpoint, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", FOUR, ids=str)
def test_four_ranks(four: Ranks, checkpoint: Path, mesh: Mesh) -> None:
    check(four, checkpoint, mesh)


@pytest.mark.slow
def test_eight_ranks(tmp_path: Path) -> None:
    # More heads, so that there are some for every rank.
    path = tiny.checkpoint(tmp_path, num_attention_heads=8, num_key_value_heads=4)
    with Ranks(8) as ranks:
        for mesh in EIGHT:
            check(ranks, path, mesh)


def _median(group: Group, path: Path, mesh: Mesh) -> float:
    model = ascend.load_model(path, dtype="bfloat16", parallel=parallel_of(group, mesh))
    exact = ascend.load_model(path, dtype="bfloat16")(prompts(1))
    return float(((model(prompts(1)) - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


@pytest.mark.parametrize("mesh", [Mesh(4, 4, 2), Mesh(4, 4, 4, "all_to_all")], ids=str)
def test_bf16_is_near(four: Ranks, checkpoint: Path, mesh: Mesh) -> None:
    """Sums in another order are rounded otherwise, and a token may take another expert: the middle token is judged."""
    assert max(four.call(_median, checkpoint, mesh)) < 0.05


def _sampled(group: Group, path: Path) -> list[int]:
    model = ascend.load_model(path, parallel=Parallel.mesh(group, 2, 2))
    torch.manual_seed(group.rank)  # whatever each process would draw by itself
    return ascend.generate(model, prompts(1), 8, temperature=2.0)[0].tolist()


def test_ranks_that_hold_the_same_tokens_draw_the_same(two: Ranks, checkpoint: Path) -> None:
    first, second = two.call(_sampled, checkpoint)
    assert first == second


def _auto(group: Group, path: Path) -> list[int]:
    from ascend import draft_length

    # As if each rank's clock had said something else.
    draft_length.choose_drafts = lambda costs, acceptance=(): group.rank  # type: ignore[assignment]
    model = ascend.load_model(path, parallel=Parallel.mesh(group, 2, 2))
    return ascend.generate(model, prompts(1), 8, drafts="auto")[0].tolist()


def test_ranks_that_measure_other_costs_take_as_many_drafts(two: Ranks, checkpoint: Path) -> None:
    answers = two.call(_auto, checkpoint)
    assert answers[0] == answers[1] == ascend.generate(ascend.load_model(checkpoint), prompts(1), 8)[0].tolist()


def _generate_error(group: Group, path: Path, how: dict[str, Any]) -> str:
    model = ascend.load_model(path, parallel=Parallel.mesh(group, 1, 2))
    try:
        ascend.generate(model, prompts(1), **{key: value[group.rank] for key, value in how.items()})
    except ascend.errors.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"stop_token_ids": [[3], [3]]}, "end at different steps"),
        ({"max_new_tokens": [3, 4]}, "max_new_tokens differs between data-parallel ranks"),
    ],
)
def test_data_parallel_ranks_that_would_part_are_refused(
    two: Ranks, checkpoint: Path, how: dict[str, Any], words: str
) -> None:
    assert all(words in answer for answer in two.call(_generate_error, checkpoint, how))


def _quantised(group: Group, path: Path, mesh: Mesh) -> float:
    model = ascend.load_model(path, quantise="w8a8", parallel=parallel_of(group, mesh))
    exact = ascend.load_model(path)(prompts(1))
    return float(((model(prompts(1)) - exact).norm(dim=-1) / exact.norm(dim=-1)).median())


@pytest.mark.parametrize("mesh", [Mesh(2, 2, 2), Mesh(2, 2, 1)], ids=str)
def test_quantised_parts_are_as_near_as_the_quantised_whole(two: Ranks, checkpoint: Path, mesh: Mesh) -> None:
    exact, whole = ascend.load_model(checkpoint)(prompts(1)), ascend.load_model(checkpoint, quantise="w8a8")(prompts(1))
    alone = float(((whole - exact).norm(dim=-1) / exact.norm(dim=-1)).median())
    assert max(two.call(_quantised, checkpoint, mesh)) < 1.5 * alone


def test_strategies_that_cannot_be_are_refused_with_a_suggestion(checkpoint: Path) -> None:
    def load(strategy: str, **how: Any) -> None:
        parallel = Parallel.mesh(Imagined(0, 2), 2, 2, strategy=strategy)
        ascend.load_model(checkpoint, parallel=parallel, **how)

    assert "did you mean 'all_reduce'" in tiny.user_error(load, "allreduce")
    assert "mc2 cannot be used here: it is for ranks on NPUs" in tiny.user_error(load, "mc2")


def _refusal(group: Group, path: Path, tensor: int, experts: int, placement: Any) -> str:
    try:
        ascend.load_model(path, parallel=Parallel.mesh(group, tensor, experts, placement))
    except ascend.errors.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("tensor", "experts", "placement", "words"),
    [
        (3, 4, None, "tensor=3 does not divide the 4 ranks"),
        (4, 3, None, "experts=3 does not divide the 4 ranks"),
        (4, 4, COPIES, "the placement is of 8 experts on 2 ranks, not 8 on 4"),
        (4, 2, {1: COPIES, 2: COPIES}, "the placement has layers [1, 2], and none for the experts of 3"),
        (4, 2, BY_LAYER | {2: contiguous(8, 2)}, "the placement of layer 2 has 8 slots, that of others has not"),
    ],
)
def test_what_does_not_divide_is_refused(
    four: Ranks, checkpoint: Path, tensor: int, experts: int, placement: Any, words: str
) -> None:
    assert all(words in answer for answer in four.call(_refusal, checkpoint, tensor, experts, placement))


class Imagined(Group):
    """A rank of a group that is never talked to."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.ranks, self.size = rank, tuple(range(size)), size

    def twin(self) -> Group:
        return self

    def split(self, parts: Any) -> Group:
        own = next(part for part in parts if self.rank in part)
        return Imagined(own.index(self.rank), len(own))


@pytest.mark.parametrize("mesh", [*TWO, *FOUR, Mesh(8, 8, 8), Mesh(8, 4, 8), Mesh(8, 1, 8)], ids=str)
def test_the_ranks_parts_are_the_whole(mesh: Mesh) -> None:
    config = BailingMoeV2Config(**tiny.SHAPE | SHAPE | {"num_attention_heads": 8})
    with torch.device("meta"):
        whole = {piece.name: piece.place.shape for piece in checkpoint_pieces(BailingMoeV2ForCausalLM(config))}
        held = {name: torch.zeros(shape, dtype=torch.int64, device="cpu") for name, shape in whole.items()}
        for rank in range(mesh.ranks):
            model = BailingMoeV2ForCausalLM(config, parallel_of(Imagined(rank, mesh.ranks), mesh))
            for piece in checkpoint_pieces(model):
                part = piece.of(held[piece.name])
                assert part.shape == piece.place.shape
                if not piece.is_zero:
                    part += 1
    for name, times in held.items():
        assert (times > 0).all(), f"no rank holds all of {name}"
        if ".experts." in name and mesh.placement is None:
            assert (times == 1).all(), f"two ranks hold a part of {name}"
        if name.endswith("attention.dense.weight"):
            assert (times == mesh.ranks // mesh.tensor).all(), f"{name} would be added more than once"


def test_a_placement_of_measured_loads_divides_them() -> None:
    loads = [100.0, 1, 1, 1, 1, 50, 1, 1]
    placement = balance(loads, ranks=2, slots_per_rank=5)
    config = BailingMoeV2Config(**tiny.SHAPE)
    for rank in range(2):
        parallel = Parallel.mesh(Imagined(rank, 2), 2, 2, placement)
        parallel.check(config)
        assert parallel.local_experts(8, 1) == list(placement.on_rank(rank))
    assert placement.imbalance(loads) < 1.1


def test_recorded_loads_become_a_placement(checkpoint: Path, tmp_path: Path) -> None:
    model = ascend.load_model(checkpoint)
    chosen: dict[int, list[Tensor]] = {}
    for layer in (1, 2, 3):
        gate = model.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda _, __, out, layer=layer: chosen.setdefault(layer, []).append(out[1]))
    with torch.inference_mode(), expert_loads.recording(model) as loads:
        model.mtp_logits(prompts(3))
        model(prompts(2))
    model(prompts(1))  # no longer counted
    assert set(loads) == {1, 2, 3}
    for layer, counts in loads.items():
        seen = torch.cat([one.flatten() for one in chosen[layer]][: 2 if layer < 3 else 1])
        assert counts.tolist() == [int((seen == expert).sum()) for expert in range(8)]
    write_loads(tmp_path / "loads.json", {layer: counts.tolist() for layer, counts in loads.items()})
    read = read_loads(tmp_path / "loads.json", 8)
    placement = {layer: balance(load, ranks=2, slots_per_rank=5) for layer, load in read.items()}
    parallel = Parallel.mesh(Imagined(0, 2), 2, 2, placement)
    parallel.check(model.config)
    assert all(
        one.imbalance(read[layer]) <= contiguous(8, 2).imbalance(read[layer]) for layer, one in placement.items()
    )
