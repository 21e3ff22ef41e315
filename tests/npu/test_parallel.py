"""Expert parallelism on emulated NPUs: torch_npu's own process group and HCCL's interface, through gloo.

All strategies against one process that has all experts, MC2 among them, and the whole model.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import ascend
from ascend.emulator import log
from ascend.weights import Experts
from ops import expert_parallel, reference
from ops.expert_parallel import STRATEGIES, ExpertParallel
from ops.process_group import Group
from tests import tiny
from tests.ranks import RankError, Ranks
from tests.test_expert_parallel import TOLERANCE, Case, cases
from tests.test_parallel import COPIES, Mesh, parallel_of

H, I = 32, 16  # noqa: E741
SHAPE = {"head_dim": 64, "hidden_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2, 60.0, "hccl") as ranks:
        yield ranks


def tensors(case: Case, ranks: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
    """Tokens, weights and choices of each rank, and all experts; the case says how many and what kind."""
    new = torch.Generator().manual_seed(case.seed)
    slots = ranks * case.slots
    counts = [case.counts[0]] if case.replicated else case.counts
    top_k = min(case.top_k, slots)
    x = [torch.randn(count, H, generator=new).to(case.dtype) for count in counts]
    weight = [torch.rand(count, top_k, generator=new) for count in counts]
    chosen = [torch.rand(count, slots, generator=new).argsort(1)[:, :top_k] for count in counts]
    gate_up = (torch.randn(slots, 2 * I, H, generator=new) * 0.3).to(case.dtype)
    down = torch.randn(slots, H, I, generator=new).to(case.dtype)
    times = ranks if case.replicated else 1
    return x * times, weight * times, chosen * times, gate_up, down


def experts_of(group: Group, case: Case, gate_up: Tensor, down: Tensor) -> Experts:
    """This card's experts, laid out as the loader does."""
    module = Experts(case.slots, H, I, group.rank * case.slots, group.size * case.slots)
    mine = slice(group.rank * case.slots, (group.rank + 1) * case.slots)
    module.requires_grad_(False)
    module.gate_up.data, module.down.data = gate_up[mine].npu(), down[mine].npu()
    module.lay_out()
    return module


_twins: dict[int, Group] = {}


def mc2_group(group: Group) -> Group:
    """A communicator for MC2 alone, made once on each rank."""
    if id(group) not in _twins:
        _twins[id(group)] = group.twin()
    return _twins[id(group)]


def _error(group: Group, case: Case) -> float:
    x, weight, chosen, gate_up, down = tensors(case, group.size)
    r = group.rank
    expected = reference.moe_experts(x[r].float(), weight[r], chosen[r], gate_up.float(), down.float())
    parallel = ExpertParallel(group, case.slots, 1, case.strategy, None, mc2_group(group))
    there = (x[r].npu(), weight[r].npu(), chosen[r].int().npu())
    counts = list(case.counts) if case.told and not case.replicated else None
    out = parallel(*there, experts_of(group, case, gate_up, down), case.replicated, counts)
    assert (out.shape, out.dtype, out.device.type) == (x[r].shape, case.dtype, "npu")
    if not out.numel():
        return 0.0
    return float((out.cpu().float() - expected).abs().max() / expected.abs().max().clamp(min=1.0))


@settings(max_examples=25, deadline=None)
@given(case=cases(2))
def test_two_cards(two: Ranks, case: Case) -> None:
    case = replace(case, width_shards=1, shared=False, outside=False)
    for strategy in STRATEGIES:
        errors = two.call(_error, replace(case, strategy=strategy))
        assert max(errors) <= TOLERANCE[case.dtype], f"{strategy}: {errors}"


@pytest.mark.slow
def test_eight_cards() -> None:
    counts = (5, 0, 3, 8, 1, 1, 0, 7)
    with Ranks(8, 120.0, "hccl") as eight:
        for strategy in STRATEGIES:
            for dtype in TOLERANCE:
                for replicated in (True, False):
                    case = Case(7, dtype, strategy, replicated, counts, True, 2, 4, 16)
                    errors = eight.call(_error, case)
                    assert max(errors) <= TOLERANCE[dtype], f"{case}: {errors}"


def _ops_of_mc2(group: Group) -> tuple[list[str], list[str], bool]:
    """The ops of two steps by MC2: the first checks it against all_to_all, the second does not."""
    case = Case(3, torch.bfloat16, "mc2", False, (4, 2), True, 3, 2, 6)
    x, weight, chosen, gate_up, down = tensors(case, group.size)
    experts, r = experts_of(group, case, gate_up, down), group.rank
    parallel = ExpertParallel(group, case.slots, 1, "mc2", None, mc2_group(group))
    seen = []
    for _ in range(2):
        with log.recording() as step:
            parallel(x[r].npu(), weight[r].npu(), chosen[r].int().npu(), experts, False, [4, 2])
        seen.append(step)
    waited = [one for one in seen[1].syncs if "between host and device" not in one]  # the tokens are carried over here
    return seen[0].of("npu"), seen[1].of("npu"), bool(waited)


def test_mc2_is_checked_once_and_then_does_not_wait(two: Ranks) -> None:
    pair = ["npu_moe_distribute_dispatch_v2", "npu_grouped_matmul", "npu_swiglu", "npu_grouped_matmul"]
    pair += ["npu_moe_distribute_combine_v2"]
    for first, second, waited in two.call(_ops_of_mc2):
        assert second == pair
        assert first[-5:] == pair
        assert "npu_moe_init_routing_v2" in first  # all_to_all, which it is held against
        assert not waited


def _distrust(group: Group) -> None:
    """A combine that forgets the weights on one card."""
    combine = expert_parallel.mc2

    def wrong(*args: Any) -> Tensor:
        out = combine(*args)
        return out * 1.1 if group.rank == 1 else out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel, "mc2", wrong)
        _error(group, Case(3, torch.bfloat16, "mc2", False, (4, 2), True, 3, 2, 6))


def test_an_mc2_that_computes_something_else_is_refused_on_all_ranks(two: Ranks) -> None:
    with pytest.raises(RankError, match="mc2 gives other sums than all_to_all on rank 1 of 2"):
        two.call(_distrust)


def _too_many(group: Group) -> str:
    with log.recording() as seen:
        _error(group, Case(3, torch.bfloat16, "mc2", False, (300, 2), True, 3, 2, 6))
    return "mc2" if any("distribute" in op for op in seen.ops) else "all_to_all"


def test_steps_beyond_mc2s_limits_go_by_all_to_all(two: Ranks) -> None:
    assert two.call(_too_many) == ["all_to_all"] * 2


def _reduce(group: Group) -> list[float]:
    return group.all_reduce(torch.ones(2, device="npu")).tolist()


def test_a_card_that_is_lost_is_named() -> None:
    with Ranks(2, 8.0, "hccl") as pair:
        assert pair.call(_reduce) == [[2.0, 2.0]] * 2
        pair.signal(1, signal.SIGKILL)
        pair.send(_reduce, [()] * 2, [0])
        failure = pair.receive(0)
    assert failure.kind == "RankLost"
    assert "rank 1 of 2 is gone" in failure.message


MESHES = [
    Mesh(2, 2, 2, "auto", COPIES),
    Mesh(2, 1, 1),
    Mesh(2, 2, 1, "all_gather"),
    Mesh(2, 2, 2),
    Mesh(2, 1, 2),
    Mesh(2, 2, 1),
    Mesh(2, 1, 2, "mc2"),
    Mesh(2, 2, 2, "all_to_all"),
]


def _model(group: Group, path: Path, mesh: Mesh, dtype: str) -> tuple[Tensor, Tensor, list[str]]:
    parallel = parallel_of(group, mesh)
    model = ascend.load_model(path, f"npu:{group.rank}", dtype, parallel=parallel)
    # Streams of tokens of their own have different lengths.
    ids = prompt(group.rank if mesh.tensor == 1 else 0).npu()
    with log.recording() as seen:
        logits = model(ids)
    return logits.cpu(), ascend.generate(model, ids, 5, capture=mesh.strategy == "all_reduce").cpu(), seen.ops


def prompt(stream: int) -> Tensor:
    return torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(1))[:, 2 * stream :]


@pytest.mark.parametrize("mesh", [*MESHES, Mesh(2, 2, 2, "all_reduce")], ids=str)
def test_the_whole_model_on_two_cards(two: Ranks, mesh: Mesh, tmp_path: Path) -> None:
    dtype = "bfloat16" if mesh.strategy == "mc2" else "float32"
    path = tiny.checkpoint(tmp_path, **SHAPE)
    whole = ascend.load_model(path, dtype=dtype)
    for rank, (logits, generated, seen) in enumerate(two.call(_model, path, mesh, dtype)):
        ids = prompt(rank if mesh.tensor == 1 else 0)
        expected, tokens = whole(ids), ascend.generate(whole, ids, 5)
        if dtype == "float32":
            assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
            assert torch.equal(generated, tokens)
        else:
            assert ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.05
            assert "npu::npu_moe_distribute_dispatch_v2" in seen


@pytest.mark.slow
def test_the_whole_model_at_tp2_ep2_on_four_cards(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path, **SHAPE)
    whole = ascend.load_model(path)
    ids = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(1))
    with Ranks(4, 120.0, "hccl") as four:
        for mesh in (Mesh(4, 2, 2), Mesh(4, 4, 2), Mesh(4, 2, 4), Mesh(4, 4, 4, "all_reduce")):
            for logits, generated, _ in four.call(_model, path, mesh, "float32"):
                assert (logits - whole(ids)).abs().max() <= 1e-4 * whole(ids).abs().max()
                assert torch.equal(generated, ascend.generate(whole, ids, 5))
