"""Mistakes that are easily made in a call of a torch_npu op, each made on purpose: a check has to notice.

A mistake changes what `ops.npu` passes to one op (or takes from it); a probe is a comparison with the reference that
holds without the mistake. It must fail with it: by a wrong result, or refused as the card would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from ascend.emulator.limits import Refused
from ops import layout, npu, reference
from tests.npu import test_ops as checks
from tests.op_cases import BF16, FP32, make

# The probes


def attention(by_lengths: bool, tokens: int, head_dim: int = 64) -> None:
    case = checks.attention_case(3, BF16, tokens, head_dim, [(0, 9), (0, 14)])
    checks.close(checks.run_there(case, True, by_lengths), checks.run_here(case, True), roundings=6)


def experts(form: str, first: int) -> None:
    checks.test_experts.hypothesis.inner_test(3, BF16, 7, form, False, first)  # type: ignore[attr-defined]


def dense_w8a8() -> None:
    checks.test_w8a8_dense.hypothesis.inner_test(3, 5, BF16)  # type: ignore[attr-defined]


def gate() -> None:
    checks.test_gate.hypothesis.inner_test(3, BF16, 33, (256, 8, 4, 8), True, True)  # type: ignore[attr-defined]


def norms() -> None:
    checks.test_norms.hypothesis.inner_test(3, BF16, 5, 64)  # type: ignore[attr-defined]


def mlp() -> None:
    checks.test_dense.hypothesis.inner_test(3, BF16, 5)  # type: ignore[attr-defined]


def no_local_token() -> None:
    checks.test_no_token_and_no_local_token("whole")


PROBES: dict[str, Callable[[], None]] = {
    "prefill": lambda: attention(True, 5),
    "prefill by a mask": lambda: attention(False, 5),
    "decode": lambda: attention(True, 1),
    "decode, heads of 32": lambda: attention(True, 1, 32),
    "experts": lambda: experts("whole", 3),
    "experts w8a8": lambda: experts("w8a8", 3),
    "experts w4a16": lambda: experts("w4a16", 3),
    "no local token": no_local_token,
    "dense w8a8": dense_w8a8,
    "gate": gate,
    "norms": norms,
    "mlp": mlp,
}

# The mistakes: probe, op, what becomes of its arguments, and of its results


def drop(*names: str) -> Callable[[list[Any], dict[str, Any]], None]:
    return lambda args, kwargs: [kwargs.pop(name) for name in names] and None


def put(**values: Any) -> Callable[[list[Any], dict[str, Any]], None]:
    return lambda args, kwargs: kwargs.update(values)


def change(position: int, to: Callable[[Any], Any]) -> Callable[[list[Any], dict[str, Any]], None]:
    return lambda args, kwargs: args.__setitem__(position, to(args[position]))


def column_major(row_M: Tensor) -> Tensor:
    return row_M.view(-1, 4).T.flatten().contiguous()


def halves_swapped(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, -1)[::-1], -1)


ROUTING, GROUPED, UNPERMUTE = "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_moe_token_unpermute"
GATING, ATTENTION = "npu_moe_gating_top_k", "npu_fused_infer_attention_score"
DEQUANT = "npu_dequant_swiglu_quant"

MISTAKES: dict[str, tuple[str, str, Any]] = {
    "counts taken for running sums": ("experts", GROUPED, put(group_list_type=0)),
    "running sums where counts are meant": ("experts", ROUTING, put(expert_tokens_num_type=0)),
    "no group_type": ("experts", GROUPED, drop("group_type")),
    "no count of tokens": ("experts", ROUTING, drop("expert_tokens_num_flag")),
    "rows by scatter, not gather": ("experts", ROUTING, put(row_idx_type=1)),
    "rows column-major": ("experts", UNPERMUTE, change(1, column_major)),
    "the range of experts forgotten": ("experts", ROUTING, drop("active_expert_range")),
    "the number of experts forgotten": ("experts", ROUTING, drop("expert_num")),
    "int64 experts": ("experts", ROUTING, change(1, Tensor.long)),
    "too few rows": ("experts", ROUTING, put(active_num=7)),
    "weights of slots forgotten": ("experts", UNPERMUTE, drop("probs")),
    "SwiGLU of the other half": ("mlp", "npu_swiglu", change(0, halves_swapped)),
    "SwiGLU over tokens": ("mlp", "npu_swiglu", put(dim=0)),
    "the activated half forgotten": ("experts w8a8", DEQUANT, drop("activate_left")),
    "dequantised by running sums": ("experts w8a8", DEQUANT, put(group_index=None)),
    "the tokens' scales forgotten": ("experts w8a8", DEQUANT, put(activation_scale=None)),
    "the rows' scales forgotten": ("experts w8a8", GROUPED, lambda args, kwargs: kwargs.pop("per_token_scale", None)),
    "int8 out by default": ("dense w8a8", "npu_quant_matmul", drop("output_dtype")),
    "no scale per token": ("dense w8a8", "npu_quant_matmul", put(pertoken_scale=None)),
    "an int8 weight untransposed": (
        "dense w8a8",
        "npu_quant_matmul",
        change(1, lambda w: w.cpu().T.contiguous().npu()),
    ),
    "int4 scales of the other expert": (
        "experts w4a16",
        GROUPED,
        lambda args, kwargs: kwargs.update(antiquant_scale=[kwargs["antiquant_scale"][0].flip(0)]),
    ),
    "a weight [out, in]": (
        "experts",
        GROUPED,
        change(1, lambda weights: [weights[0].cpu().transpose(1, 2).contiguous().npu()]),
    ),
    "groups scored by their best expert": ("gate", GATING, put(group_select_mode=0)),
    "softmax routing": ("gate", GATING, put(norm_type=0)),
    "no scaling factor": ("gate", GATING, drop("routed_scaling_factor")),
    "all groups kept": ("gate", GATING, drop("k_group")),
    "the bias in bf16": ("gate", GATING, lambda args, kwargs: kwargs.update(bias=kwargs["bias"].bfloat16())),
    "logits in bf16": (
        "gate",
        GATING,
        lambda args, kwargs: (change(0, Tensor.bfloat16)(args, kwargs), kwargs.update(bias=kwargs["bias"].bfloat16())),
    ),
    "no scale in attention": ("decode", ATTENTION, drop("scale")),
    "as many key heads as queries": ("decode", ATTENTION, drop("num_key_value_heads")),
    "running sums of lengths": (
        "decode",
        ATTENTION,
        lambda args, kwargs: kwargs.update(actual_seq_lengths_kv=[9, 23]),
    ),
    "no lengths": ("decode", ATTENTION, drop("actual_seq_lengths_kv")),
    "prefill that sees ahead": ("prefill", ATTENTION, put(sparse_mode=0, atten_mask=None)),
    "a mask turned round": (
        "prefill by a mask",
        ATTENTION,
        lambda args, kwargs: kwargs.update(atten_mask=~kwargs["atten_mask"]),
    ),
    "the layout BSH by default": ("decode", ATTENTION, drop("input_layout")),
    "cache_mode PA_NZ by default": ("decode", "npu_scatter_pa_kv_cache", drop("cache_mode")),
    "slots of the first row": (
        "decode",
        "npu_scatter_pa_kv_cache",
        change(4, lambda slots: slots % 17),
    ),
    "cos and sin exchanged": (
        "decode",
        "npu_apply_rotary_pos_emb",
        lambda args, kwargs: args.__setitem__(slice(2, 4), args[3:1:-1]),
    ),
    "cos and sin exchanged for narrow heads": (
        "decode, heads of 32",
        "npu_rotary_mul",
        lambda args, kwargs: args.__setitem__(slice(1, 3), args[2:0:-1]),
    ),
    "the epsilon forgotten": ("norms", "npu_rms_norm", change(2, lambda eps: 1e-2)),
}


class Mistaken:
    """``torch.ops.npu`` with one op that is called wrongly."""

    def __init__(self, op: str, mistake: Callable[[list[Any], dict[str, Any]], Any]) -> None:
        self.op, self.mistake, self.made = op, mistake, 0

    def __getattr__(self, name: str) -> Any:
        right = getattr(torch.ops.npu, name)
        if name != self.op:
            return right

        def wrong(*args: Any, **kwargs: Any) -> Any:
            changed = list(args)
            self.mistake(changed, kwargs)
            self.made += 1
            return right(*changed, **kwargs)

        return wrong


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_holds_without_a_mistake(probe: str) -> None:
    PROBES[probe]()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probe, op, mistake = MISTAKES[name]
    mistaken = Mistaken(op, mistake)
    monkeypatch.setattr(npu, "_npu", lambda: mistaken)
    with pytest.raises((AssertionError, Refused, RuntimeError)):
        PROBES[probe]()
    assert mistaken.made, f"the probe '{probe}' does not call {op}"


# Mistakes beside the calls


def test_heads_left_in_the_checkpoints_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "heads", lambda weight, head_dim, rotary_dim: weight)
    with pytest.raises(AssertionError):
        attention(True, 5)


def test_a_half_rotated_as_neighbours_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    full_width = layout._full_width
    monkeypatch.setattr(
        layout, "_full_width", lambda table, head_dim, rest: full_width(table, head_dim, rest).roll(1, -1)
    )
    with pytest.raises(AssertionError):
        attention(True, 5)


@pytest.mark.parametrize("probe", ["experts", "no local token"])
def test_rows_of_other_ranks_that_are_not_left_out_are_noticed(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    combine_rows = npu.combine_rows
    monkeypatch.setattr(npu, "combine_rows", lambda rows, row, weight, all_here: combine_rows(rows, row, weight, True))
    with pytest.raises((AssertionError, Refused)):
        PROBES[probe]()


def test_results_of_add_rms_norm_in_vllms_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reordered:
        def __getattr__(self, name: str) -> Any:
            right = getattr(torch.ops.npu, name)
            return (lambda *args: (lambda y, rstd, x: (y, x, rstd))(*right(*args))) if "add_rms" in name else right

    monkeypatch.setattr(npu, "_npu", Reordered)
    with pytest.raises((AssertionError, RuntimeError)):
        norms()


def test_an_expert_weight_that_was_not_laid_out_is_refused() -> None:
    new = make(3, BF16)
    x, gate_up, down = new(5, 64), new(6, 2 * 32, 64), new(6, 64, 32)
    weight, chosen = reference.moe_gate(new(5, 64), make(1, FP32)(6, 64), None, 2, 1, 1, True, 1.0)
    with pytest.raises(RuntimeError):
        ops.moe_experts(*(one.to(checks.CARD) for one in (x, weight, chosen.int(), gate_up, down)))
