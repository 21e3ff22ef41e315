"""Each torch_npu op that `ops` calls, as it calls it, against the real package: schemas of two releases, meta kernels.

The calls are recorded from the probes of `tests/npu/test_mutations.py` and, for MC2, from a step of two ranks; the
older release's schemas are read from its wheel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import ops
from ascend.devices.npu import TORCH_NPU
from ascend.emulator import package, schemas
from ascend.emulator.dispatch import COMPUTED
from ops import layout, npu, npu_mc2
from ops.process_group import Group
from tests.npu.test_mutations import PROBES
from tests.npu.test_parallel import _error
from tests.ranks import Ranks
from tests.test_expert_parallel import Case

ROOT = Path(ops.__file__).parents[1]
OLDER = TORCH_NPU["2.10.0"]
# Where ops of torch_npu are called: `_npu().name(`, `torch.ops.npu.name`, `torch_npu.npu_name`.
CALLED = re.compile(r"(?:_npu\(\)|torch\.ops\.npu|torch_npu)\.(npu_\w+)")
# Ops of which torch_npu has no meta kernel: what they return is held against the documentation alone.
WITHOUT_META = {"npu_format_cast", "npu_convert_weight_to_int4pack"}


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class Recorder:
    """``torch.ops.npu`` that keeps what goes in and comes out."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = {}

    def __getattr__(self, name: str) -> Any:
        real = getattr(torch.ops.npu, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            self.calls.setdefault(name, []).append(Call(args, kwargs, result))
            return result

        return call


def used() -> set[str]:
    """The ops that stand in the sources of `ops`."""
    return {name for file in (ROOT / "ops").glob("*.py") for name in CALLED.findall(file.read_text())}


@dataclass(frozen=True)
class Shape:
    """A tensor that crossed from another process: nothing but its shape and dtype."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Shape:
        return cls(tuple(tensor.shape), tensor.dtype)

    def tensor(self) -> Tensor:
        return torch.empty(self.size, dtype=self.dtype, device="meta")


def _calls_of_mc2(group: Group) -> dict[str, list[Call]]:
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npu_mc2, "_npu", lambda: recorder)
        _error(group, Case(3, torch.bfloat16, "mc2", False, (4, 2), True, 3, 2, 6))
    return {
        op: [Call(*tree_map_only(Tensor, Shape.of, (one.args, one.kwargs, one.result))) for one in made]
        for op, made in recorder.calls.items()
    }


@pytest.fixture(scope="module")
def calls() -> dict[str, list[Call]]:
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(npu, "_npu", lambda: recorder)
        patch.setattr(layout, "_npu", lambda: recorder)
        for probe in PROBES.values():
            probe()
    with Ranks(2, 60.0, "hccl") as two:
        elsewhere = two.call(_calls_of_mc2)[0]
    there = {
        op: [Call(*tree_map_only(Shape, Shape.tensor, (one.args, one.kwargs, one.result))) for one in made]
        for op, made in elsewhere.items()
    }
    return recorder.calls | there


@pytest.fixture(scope="module")
def older() -> dict[str, Any]:
    return schemas.read(package.wheel(OLDER), used())


def newer(op: str) -> Any:
    return getattr(torch.ops.npu, op).default._schema


def arguments(schema: Any) -> dict[str, Any]:
    return {one.name: one for one in schema.arguments}


def test_every_op_that_is_used_is_executed_here(calls: dict[str, list[Call]]) -> None:
    assert len(used()) >= 17
    assert used() == set(calls)
    assert {f"npu::{op}" for op in used()} <= set(COMPUTED)


def test_the_status_table_counts_them() -> None:
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if "ops of torch-npu" in line)
    count = len(used())
    assert f"{count} used, {count} checked against the real schemas, {count} executed" in row


@pytest.mark.parametrize("op", sorted(used()))
def test_calls_fit_the_schemas_of_both_releases(op: str, calls: dict[str, list[Call]], older: dict[str, Any]) -> None:
    assert op in older, f"torch-npu {OLDER} has no {op}"
    old, new = arguments(older[op]), arguments(newer(op))
    for call in calls[op]:
        for schema in (old, new):
            positional = [name for name, one in schema.items() if not one.kwarg_only]
            assert len(call.args) <= len(positional), "too many positional arguments"
            given = {*positional[: len(call.args)], *call.kwargs}
            assert given <= set(schema), f"unknown arguments {given - set(schema)}"
            needed = {name for name, one in schema.items() if not one.has_default_value()}
            assert needed <= given, f"missing arguments {needed - given}"
        both = old.keys() & new.keys()
        differing = {
            name
            for name in both
            if old[name].has_default_value() and repr(old[name].default_value) != repr(new[name].default_value)
        }
        assert differing <= given, f"defaults that differ between the releases are relied on: {differing - given}"


@pytest.mark.parametrize("op", sorted(used()))
def test_types_and_results_of_both_releases_agree(op: str, older: dict[str, Any]) -> None:
    old, new = older[op], newer(op)
    assert [str(one.type) for one in old.returns] == [str(one.type) for one in new.returns]
    for name in arguments(old).keys() & arguments(new).keys():
        assert str(arguments(old)[name].type) == str(arguments(new)[name].type), name


@pytest.mark.parametrize("op", sorted(used() - WITHOUT_META))
def test_shapes_and_dtypes_are_those_of_the_real_meta_kernels(op: str, calls: dict[str, list[Call]]) -> None:
    for call in calls[op]:
        args, kwargs = tree_map_only(Tensor, lambda one: one.to("meta"), (call.args, call.kwargs))
        expected = getattr(torch.ops.npu, op)(*args, **kwargs)
        assert shapes(call.result, op) == shapes(expected, op)


def shapes(result: Any, op: str) -> list[tuple[torch.Size, torch.dtype]]:
    results = [result] if isinstance(result, Tensor) else list(result or ())
    if op == "npu_fused_infer_attention_score":
        results = results[:1]  # the second, not asked for, holds nothing
    return [(one.shape, one.dtype) for one in results]


@pytest.mark.parametrize("op", sorted(WITHOUT_META))
def test_ops_said_to_have_no_meta_kernel_have_none(op: str) -> None:
    with pytest.raises((NotImplementedError, RuntimeError)):
        getattr(torch.ops.npu, op)(torch.empty(16, 16, dtype=torch.int32, device="meta"), 29)
