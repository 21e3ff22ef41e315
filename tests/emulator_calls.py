"""One call of every emulated NPU op that a 910B would take, as keyword arguments: what the tests vary."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ascend.emulator.kernels import KERNELS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def call(op: str, **arguments: Any) -> Any:
    """Run the kernel of ``npu::op``."""
    return KERNELS[f"npu::{op}"](**arguments)


def nz(tensor: Tensor) -> Tensor:
    """A tensor that `npu_format_cast(tensor, 29)` is said to have made."""
    tensor = tensor.clone()
    tensor.acl_format = 29  # type: ignore[attr-defined]
    return tensor


def int8(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


@cache
def causal_mask() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def routing() -> dict[str, Any]:
    return {"x": torch.randn(5, 32), "k": 4, "bias": torch.randn(32), "k_group": 2, "group_count": 4}


def init_routing() -> dict[str, Any]:
    expert = torch.stack([torch.randperm(8)[:3] for _ in range(6)]).int()
    return {"x": bf16(6, 32), "expert_idx": expert, "expert_num": 8}


def grouped() -> dict[str, Any]:
    count = torch.tensor([3, 0, 2, 4])
    flags = {"group_list": count, "group_list_type": 1, "group_type": 0, "split_item": 2}
    return {"x": [bf16(9, 32)], "weight": [bf16(4, 32, 64)], **flags}


def grouped_int8() -> dict[str, Any]:
    scales = {"scale": [torch.rand(4, 64).to(BF16)], "per_token_scale": [torch.rand(9)]}
    return {**grouped(), "x": [int8(9, 32)], "weight": [int8(4, 32, 64)], **scales, "output_dtype": 15}


def grouped_int4() -> dict[str, Any]:
    """Weight-only: 32 columns packed into 4 int32, one scale per 16 of the 32 rows."""
    packed = torch.randint(-(2**31), 2**31, (4, 32, 4)).int()
    return {**grouped(), "weight": [packed], "antiquant_scale": [torch.rand(4, 2, 32).to(BF16)]}


def attention() -> dict[str, Any]:
    lengths = {"actual_seq_lengths": [3, 8], "actual_seq_lengths_kv": [130, 5]}
    blocks = {"block_table": torch.tensor([[4, 2], [1, 0]], dtype=torch.int32), "block_size": 128}
    heads = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.125, "input_layout": "TND"}
    cache = {"key": bf16(5, 2, 128, 128), "value": bf16(5, 2, 128, 128)}
    return {
        "query": bf16(8, 4, 128),
        **cache,
        **lengths,
        **blocks,
        **heads,
        "sparse_mode": 3,
        "atten_mask": causal_mask(),
    }


def padded_attention() -> dict[str, Any]:
    """Two sequences in layout BSND: 3 of 4 new tokens and 6 of 9 keys, all 4 and all 9."""
    lengths = {"actual_seq_lengths": [3, 4], "actual_seq_lengths_kv": [6, 9]}
    heads = {"num_heads": 4, "num_key_value_heads": 2, "scale": 0.25, "input_layout": "BSND"}
    plain = {"block_table": None, "block_size": 0, "sparse_mode": 0, "atten_mask": None}
    tensors = {"query": bf16(2, 4, 4, 16), "key": bf16(2, 9, 2, 16), "value": bf16(2, 9, 2, 16)}
    return {**tensors, **lengths, **heads, **plain}


def swiglu_quant() -> dict[str, Any]:
    scales = {"weight_scale": torch.rand(2, 128), "activation_scale": torch.rand(6, 1)}
    groups = {"group_index": torch.tensor([2, 3]), "activate_left": True, "quant_mode": 1}
    return {"x": torch.randint(-999, 999, (6, 128)).int(), **scales, **groups}


def grouped_swiglu_quant() -> dict[str, Any]:
    weights = {"weight": nz(int8(2, 32, 64)), "weight_scale": torch.rand(2, 64) / 99}
    return {"x": int8(7, 32), **weights, "x_scale": torch.rand(7), "group_list": torch.tensor([2, 5])}


def grouped_swiglu_quant_v2() -> dict[str, Any]:
    arguments = grouped_swiglu_quant()
    return {
        **arguments,
        "weight": [arguments["weight"]],
        "weight_scale": [arguments["weight_scale"]],
        "dequant_dtype": 0,
    }


def scatter() -> dict[str, Any]:
    caches = {"key_cache": bf16(2, 16, 2, 32), "value_cache": bf16(2, 16, 2, 32)}
    slots = {"slot_mapping": int32(5, -1, 17), "cache_mode": "Norm"}
    return {"key": bf16(3, 2, 32), "value": bf16(3, 2, 32), **caches, **slots}


def rotary() -> dict[str, Any]:
    angle = torch.rand(3, 1, 64).to(BF16)
    return {"query": bf16(3, 4, 128), "key": bf16(3, 2, 128), "cos": angle.cos(), "sin": angle.sin(), "layout": "TND"}


def quant_matmul() -> dict[str, Any]:
    scales = {"scale": torch.rand(64), "pertoken_scale": torch.rand(5), "output_dtype": 15}
    return {"x1": int8(5, 32), "x2": int8(32, 64), **scales}


def finalize() -> dict[str, Any]:
    arguments: dict[str, Any] = dict.fromkeys(["skip1", "skip2", "bias", "export_for_source_row"])
    rows = {"expanded_permuted_rows": bf16(6, 32), "expanded_src_to_dst_row": torch.randperm(6).int()}
    return {**arguments, **rows, "scales": torch.rand(3, 2), "drop_pad_mode": 2}


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "npu_add_rms_norm": lambda: {"x1": bf16(3, 64), "x2": bf16(3, 64), "gamma": bf16(64)},
    "npu_apply_rotary_pos_emb": rotary,
    "npu_convert_weight_to_int4pack": lambda: {"weight": torch.randint(-8, 8, (4, 16)).int()},
    "npu_dequant_swiglu_quant": swiglu_quant,
    "npu_dynamic_quant": lambda: {"input": bf16(3, 64)},
    "npu_fused_infer_attention_score": attention,
    "npu_grouped_matmul": grouped,
    "npu_grouped_matmul_swiglu_quant": grouped_swiglu_quant,
    "npu_grouped_matmul_swiglu_quant_v2": grouped_swiglu_quant_v2,
    "npu_moe_finalize_routing": finalize,
    "npu_moe_gating_top_k": routing,
    "npu_moe_init_routing_v2": init_routing,
    "npu_moe_re_routing": lambda: {"tokens": bf16(5, 32), "expert_token_num_per_rank": torch.tensor([[2, 0], [1, 2]])},
    "npu_moe_token_unpermute": lambda: {"permuted_tokens": bf16(6, 32), "sorted_indices": torch.arange(6).int()},
    "npu_quant_matmul": quant_matmul,
    "npu_quantize": lambda: {
        "input": bf16(3, 64),
        "scales": torch.rand(64),
        "zero_points": None,
        "dtype": 12,
        "axis": -1,
        "div_mode": False,
    },
    "npu_rms_norm": lambda: {"input": bf16(3, 64), "gamma": bf16(64)},
    "npu_rotary_mul": lambda: {"input": bf16(2, 3, 4, 64), "r1": bf16(2, 3, 1, 64), "r2": bf16(2, 3, 1, 64)},
    "npu_scatter_pa_kv_cache": scatter,
    "npu_swiglu": lambda: {"input": bf16(3, 64)},
}
"""A call per op; MC2, which takes several ranks, has tests of its own."""
