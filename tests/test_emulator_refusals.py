"""What a 910B refuses, the emulated ops refuse: one good call of each op, and what may not be changed in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend.emulator.kernels import KERNELS
from ascend.emulator.limits import Refused
from tests.emulator_calls import (
    BF16,
    FP16,
    GOOD,
    bf16,
    call,
    grouped_int4,
    grouped_int8,
    int8,
    int32,
    nz,
    padded_attention,
)

FP8 = torch.zeros(3, 64).to(torch.float8_e4m3fn)
IN_PLACE = {"npu_apply_rotary_pos_emb": {"query", "key"}, "npu_scatter_pa_kv_cache": {"key_cache", "value_cache"}}


def copied(value: Any) -> Any:
    return [v.clone() for v in value] if isinstance(value, list) and torch.is_tensor(value[0]) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and torch.is_tensor(a[0]):
        return all(map(torch.equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("op", sorted(GOOD))
def test_good_call_is_taken_and_leaves_its_inputs(op: str) -> None:
    arguments = GOOD[op]()
    before = {name: v.clone() if torch.is_tensor(v) else copied(v) for name, v in arguments.items()}
    call(op, **arguments)
    changed = {name for name, value in arguments.items() if not same(value, before[name])}
    assert changed == IN_PLACE.get(op, set())


def test_every_kernel_has_a_good_call() -> None:
    multi_rank = {"npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2"}
    assert {name.removeprefix("npu::") for name in KERNELS} == set(GOOD) | multi_rank


# Changes to the good call, and words of the refusal.
BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "npu_rms_norm": [
        ({"input": FP8}, "input is float8_e4m3fn; the 910B has no FP8"),
        ({"gamma": torch.ones(64, dtype=FP16)}, "gamma is torch.float16"),
        ({"gamma": torch.ones(32, dtype=BF16)}, "gamma has shape"),
        ({"gamma": nz(bf16(64))}, "gamma is in format 29"),
    ],
    "npu_add_rms_norm": [
        ({"gamma": torch.ones(64)}, "different dtypes"),
        ({"x2": bf16(1, 64)}, "the same is needed"),
        ({"x1": bf16(0, 64), "x2": bf16(0, 64)}, "empty"),
    ],
    "npu_swiglu": [
        ({"input": bf16(64, 3).T}, "not contiguous"),
        ({"input": bf16(3, 63)}, "must be even"),
        ({"input": bf16(0, 64)}, "empty"),
        ({"dim": 2}, "out of range"),
        ({"input": int8(3, 64)}, "input is int8"),
    ],
    "npu_moe_gating_top_k": [
        ({"bias": torch.randn(32).to(BF16)}, "bias is torch.bfloat16, x torch.float32"),
        ({"k": 17}, "k is 17"),
        ({"k": 0}, "k is 0"),
        ({"k_group": 5}, "k_group is 5"),
        ({"group_count": 5}, "does not divide"),
        ({"group_count": 32, "k_group": 32, "group_select_mode": 1}, "one expert per group"),
        ({"x": torch.randn(2, 4096), "bias": None}, "at most 2048"),
        ({"x": torch.randn(2, 2048), "bias": None, "group_count": 128}, "aligned to 32 experts"),
        ({"norm_type": 2}, "norm_type is 2"),
        ({"input_ids": int32(1), "tid2eid": int32(1)}, "input_ids is given"),
    ],
    "npu_moe_init_routing_v2": [
        ({"expert_num": -1}, "expert_num is -1; it must be given"),
        ({"expert_idx": torch.zeros(6, 3, dtype=torch.int64)}, "expert_idx is int64; the device takes int32"),
        ({"expert_idx": torch.full((6, 3), 8).int()}, "an expert is not in"),
        ({"active_expert_range": [4, 9]}, "active_expert_range"),
        ({"active_num": -2}, "active_num is -2"),
        ({"quant_mode": 2}, "quant_mode is 2"),
        ({"drop_pad_mode": 1}, "drop_pad_mode is 1"),
        ({"x": int8(6, 32), "quant_mode": 1}, "x is int8"),
        ({"scale": torch.ones(5)}, "scale has shape"),
        ({"row_idx_type": 2}, "row_idx_type is 2"),
    ],
    "npu_moe_re_routing": [
        ({"tokens": torch.randn(5, 32)}, "tokens is float32"),
        ({"expert_token_num_per_rank": torch.tensor([[2, 0], [1, 1]])}, "adds up to 4, not to 5"),
        ({"idx_type": 1}, "idx_type is 1"),
    ],
    "npu_moe_token_unpermute": [
        ({"sorted_indices": int32(0, 1, -1, 3, 4, 5)}, "a negative index has a probability"),
        ({"padded_mode": True}, "padded_mode is True"),
        ({"probs": torch.rand(2, 2)}, "differ in length"),
        ({"permuted_tokens": int8(6, 32)}, "permuted_tokens is int8"),
    ],
    "npu_moe_finalize_routing": [
        ({"expanded_src_to_dst_row": int32(0, 1, -1, 3, 4, 5)}, "-1: a partial expert range"),
        ({"drop_pad_mode": 3}, "drop_pad_mode is 3"),
        ({"skip2": bf16(3, 32)}, "skip2 is given without skip1"),
        ({"expanded_permuted_rows": torch.randn(6, 32).half()}, "scales is float32"),
        ({"bias": bf16(4, 32)}, "without export_for_source_row"),
    ],
    "npu_grouped_matmul": [
        ({"group_type": None}, "group_type is None"),
        ({"group_type": 2}, "group_type is 2"),
        ({"split_item": 0}, "split_item is 0"),
        ({"group_list": None}, "group_list is None"),
        ({"group_list": int32(3, 0, 2, 4)}, "group_list is int32; the device takes int64"),
        ({"group_list": torch.tensor([3, 0, 2, 5])}, "covers 10 rows of 9"),
        ({"group_list": torch.tensor([3, 0, 2])}, "group_list has shape"),
        ({"group_list_type": 0}, "decreases (is it counts?"),
        ({"group_list": torch.tensor([[0, 9]] * 4), "group_list_type": 2}, "for int8"),
        ({"bias": [bf16(4, 64)]}, "bias is bfloat16; the device takes float32"),
        ({"weight": [torch.randn(4, 32, 64)]}, "weight is float32; the device takes bfloat16"),
        ({"weight": [bf16(64, 32, 4).permute(2, 1, 0)]}, "neither contiguous nor the transpose"),
        ({"weight": [nz(bf16(4, 32, 40))]}, "not in whole blocks"),
        ({"x": [torch.randn(9, 32)], "weight": [nz(torch.randn(4, 32, 64))]}, "fp32 weights are taken in ND only"),
        ({"x": [bf16(32, 9).T]}, "x is not contiguous"),
        ({"x": [FP8]}, "no FP8"),
        ({"weight": [bf16(1, 1, 65536)], "x": [bf16(9, 1)], "group_list": torch.tensor([9])}, "below 65536"),
        ({"weight": [bf16(32, 64)] * 129}, "lists of at most 128"),
        ({"act_type": 1}, "act_type is 1"),
        ({"output_dtype": 6}, "output_dtype is torch.float32"),
        ({"output_dtype": 24}, "output_dtype 24 is no type of the 910B"),
        ({"x_dtype": 290}, "x_dtype is given"),
        ({"scale": [torch.rand(4, 64)]}, "scale is given"),
        ({**grouped_int8(), "output_dtype": None}, "None means int8"),
        ({**grouped_int8(), "output_dtype": 5}, "output_dtype is torch.float16"),
        ({**grouped_int8(), "scale": [torch.rand(4, 64)]}, "output_dtype is torch.bfloat16"),
        ({**grouped_int8(), "scale": None, "per_token_scale": None}, "output_dtype is torch.bfloat16"),
        ({**grouped_int8(), "per_token_scale": [bf16(9)]}, "per_token_scale is bfloat16"),
        ({**grouped_int8(), "weight": [int8(32, 64)] * 4}, "one tensor [E, K, N]"),
        ({**grouped_int4(), "weight": [nz(grouped_int4()["weight"][0])]}, "weight-only quantisation takes ND only"),
        ({**grouped_int4(), "antiquant_scale": None}, "antiquant_scale is missing"),
        ({**grouped_int4(), "antiquant_scale": [torch.rand(4, 3, 32).to(BF16)]}, "do not divide K"),
        ({**grouped_int4(), "antiquant_scale": [torch.rand(4, 2, 32)]}, "antiquant_scale is float32"),
        ({**grouped_int4(), "antiquant_offset": [torch.ones(4, 2, 32).to(BF16)]}, "the device is symmetric"),
        ({"weight": [int8(4, 32, 64)], "antiquant_scale": [bf16(4, 64)]}, "antiquant_offset is missing"),
        ({"weight": [int8(4, 32, 64)], "antiquant_scale": [bf16(4, 2, 64)]}, "for int4 weights only"),
    ],
    "npu_grouped_matmul_swiglu_quant": [
        ({"weight": int8(2, 32, 64)}, "weight is in ND"),
        ({"group_list": torch.tensor([5, 2])}, "decreases"),
        ({"weight": nz(int8(2, 24, 64)), "x": int8(7, 24)}, "not in whole blocks"),
        ({"weight": nz(int8(2, 16, 10272)), "x": int8(7, 16)}, "N is 10272"),
        ({"x_scale": bf16(7)}, "x_scale is bfloat16"),
    ],
    "npu_grouped_matmul_swiglu_quant_v2": [
        ({"weight": [int8(2, 32, 64)]}, "weight is in ND"),
        ({"dequant_dtype": 15}, "dequant_dtype is 15"),
        ({"smooth_scale": torch.ones(2)}, "smooth_scale is given"),
        ({"group_list_type": 2}, "group_list_type is 2"),
    ],
    "npu_dequant_swiglu_quant": [
        ({"quant_mode": 0}, "0, static, is the default"),
        ({"group_index": int32(2, 3)}, "group_list is int32"),
        ({"group_index": torch.tensor([2, 5])}, "covers 7 rows of 6"),
        ({"weight_scale": None}, "without weight_scale"),
        ({"x": bf16(6, 128)}, "activation_scale is given"),
        ({"x": torch.zeros(6, 96).int(), "weight_scale": torch.ones(2, 96)}, "a multiple of 64"),
    ],
    "npu_dynamic_quant": [
        ({"input": torch.randn(3, 64)}, "input is float32; the device takes float16, bfloat16"),
        ({"input": bf16(64)}, "2-D or more"),
        ({"dst_type": 23}, "no type of the 910B"),
        ({"quant_mode": "perchannel"}, "quant_mode is 'perchannel'"),
        ({"smooth_scales": torch.ones(64)}, "smooth_scales is float32"),
        ({"smooth_scales": bf16(2, 64), "group_index": torch.tensor([1, 3])}, "group_index is int64"),
        ({"smooth_scales": bf16(2, 64), "group_index": int32(2, 1)}, "not cumulative up to 3"),
    ],
    "npu_quantize": [
        ({"div_mode": True}, "div_mode is True"),
        ({"axis": 0}, "axis is 0"),
        ({"dtype": 1}, "dtype is 1"),
        ({"scales": torch.rand(32)}, "scales has shape"),
        ({"zero_points": torch.rand(1)}, "zero_points has shape"),
    ],
    "npu_quant_matmul": [
        ({"output_dtype": None}, "output_dtype is None, which is int8 out"),
        ({"output_dtype": 3}, "pertoken_scale is given"),
        ({"output_dtype": 3, "pertoken_scale": None, "bias": torch.zeros(64)}, "a bias of int32 sums is int32"),
        ({"output_dtype": 5, "pertoken_scale": None}, "pertoken_scale is missing"),
        ({"output_dtype": 5, "scale": torch.rand(64).to(BF16)}, "scale is bfloat16"),
        ({"bias": torch.rand(64).half()}, "bias is float16"),
        ({"offset": torch.rand(64)}, "offset is given"),
        ({"x2": int8(32, 128)[:, ::2]}, "a view the device cannot read"),
    ],
    "npu_convert_weight_to_int4pack": [
        ({"weight": torch.full((4, 16), 8).int()}, "outside -8..7"),
        ({"weight": torch.zeros(4, 12).int()}, "multiple of 8"),
        ({"weight": torch.zeros(4, 16)}, "weight is float32"),
    ],
    "npu_rotary_mul": [
        ({"rotary_mode": "interleave"}, "rotary_mode is 'interleave'"),
        ({"input": bf16(2, 3, 4, 63)}, "must be even"),
        ({"r1": bf16(2, 3, 1, 32), "r2": bf16(2, 3, 1, 32)}, "not of input's width"),
        ({"input": bf16(1, 1, 1000, 2), "r1": bf16(1, 1, 1, 2), "r2": bf16(1, 1, 1, 2)}, "below 1000"),
        ({"rotate": bf16(64, 64)}, "rotate is given"),
    ],
    "npu_apply_rotary_pos_emb": [
        ({"layout": "BNSD"}, "layout is 'BNSD'"),
        ({"layout": "BSH"}, "layout is 'BSH'"),
        ({"rotary_mode": "interleave"}, "rotary_mode is 'interleave'"),
        ({"query": bf16(3, 4, 96), "key": bf16(3, 2, 96)}, "head_dim is 96"),
        ({"cos": bf16(3, 1, 32), "sin": bf16(3, 1, 32)}, "cos is 32 wide"),
        ({"cos": torch.ones(3, 1, 64), "sin": torch.ones(3, 1, 64)}, "one dtype is needed"),
        ({"cos": bf16(3, 2, 64), "sin": bf16(3, 2, 64)}, "cos has shape"),
        ({"query": bf16(3, 256, 128)}, "too many heads"),
    ],
    "npu_scatter_pa_kv_cache": [
        ({"cache_mode": "PA_NZ"}, "cache_mode is 'PA_NZ'"),
        ({"slot_mapping": int32(5, 32, 1)}, "past the 32"),
        ({"slot_mapping": int32(5, 5, 1)}, "occurs twice"),
        ({"slot_mapping": torch.ones(3)}, "slot_mapping is float32"),
        ({"key": torch.randn(3, 2, 32)}, "key is float32"),
        ({"key": bf16(2, 3, 32).transpose(0, 1)}, "key is not contiguous"),
        ({"value": bf16(3, 2, 16)}, "value has shape"),
        ({"key_cache": nz(bf16(2, 16, 2, 32))}, "in format 29"),
    ],
    "npu_fused_infer_attention_score": [
        ({"query": torch.randn(8, 4, 128)}, "query is float32; the device takes float16, bfloat16"),
        ({"actual_seq_lengths": [3, 5]}, "in layout TND it is T"),
        ({"actual_seq_lengths": [8, 3]}, "cumulative"),
        ({"actual_seq_lengths": None}, "actual_seq_lengths is missing"),
        ({"actual_seq_lengths_kv": None}, "actual_seq_lengths_kv is missing"),
        ({"actual_seq_lengths_kv": [130, 257]}, "not within 0..256"),
        ({"block_table": torch.tensor([[4, 5], [1, 0]]).int()}, "outside the 5 blocks"),
        ({"block_table": torch.tensor([[4, 2], [1, 0]])}, "block_table is int64"),
        ({"block_size": 8}, "block_size is 8"),
        ({"key": bf16(5, 128, 2, 128), "value": bf16(5, 128, 2, 128)}, "key has shape"),
        ({"atten_mask": None}, "atten_mask is None"),
        ({"atten_mask": torch.ones(8, 8, dtype=torch.bool)}, "2048 by 2048"),
        ({"atten_mask": torch.ones(2048, 2048, dtype=torch.bool).tril()}, "1 above the diagonal"),
        ({"num_key_value_heads": 3}, "num_heads 4 by 3"),
        ({"num_heads": 128, "num_key_value_heads": 1}, "num_heads 128 by 1"),
        ({"sparse_mode": 4}, "sparse_mode is 4"),
        ({"input_layout": "TND_NTD"}, "input_layout is 'TND_NTD'"),
        ({"query_rope": bf16(8, 4, 64)}, "query_rope is given"),
        ({"query": bf16(8, 4, 64)}, "layout TND takes 128 or 192"),
        ({"value": bf16(5, 2, 128, 128).transpose(1, 2)}, "value is not contiguous"),
        ({"antiquant_mode": 1}, "antiquant modes"),
        ({**padded_attention(), "actual_seq_lengths": [3, 5]}, "not within 0..4"),
        ({**padded_attention(), "actual_seq_lengths": []}, "has 0 for 2"),
        ({**padded_attention(), "query": bf16(2, 4, 4, 24)}, "a multiple of 16"),
        ({**padded_attention(), "inner_precise": 4}, "inner_precise is 4"),
        ({**padded_attention(), "key": bf16(2, 9, 4, 16), "value": bf16(2, 9, 4, 16)}, "key (as BSND) has shape"),
        ({**padded_attention(), "atten_mask": torch.zeros(3, 9, dtype=torch.bool)}, "atten_mask has shape"),
        ({**padded_attention(), "atten_mask": torch.zeros(4, 9)}, "atten_mask is float32"),
        ({**padded_attention(), "atten_mask": torch.zeros(4, 9).bool(), "pre_tokens": 2}, "cut"),
    ],
}
CASES = [(op, change, words) for op, changes in BAD.items() for change, words in changes]


@pytest.mark.parametrize(("op", "change", "words"), CASES, ids=[f"{op}-{words}" for op, _, words in CASES])
def test_bad_call_is_refused_by_name(op: str, change: dict[str, Any], words: str) -> None:
    arguments = {**GOOD[op](), **change}
    with pytest.raises(Refused) as refusal:
        call(op, **arguments)
    assert words in str(refusal.value)
    assert str(refusal.value).startswith(op)


@pytest.mark.parametrize("op", sorted(GOOD.keys() - {"npu_convert_weight_to_int4pack"}))
def test_fp8_is_refused_everywhere(op: str) -> None:
    def as_fp8(value: Any) -> Any:
        if torch.is_tensor(value):
            return value.to(torch.float8_e4m3fn) if value.is_floating_point() else value
        return [as_fp8(v) for v in value] if isinstance(value, list) else value

    arguments = {name: as_fp8(value) for name, value in GOOD[op]().items()}
    with pytest.raises(Refused, match="FP8"):
        call(op, **arguments)
