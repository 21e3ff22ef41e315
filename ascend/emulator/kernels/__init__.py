"""CPU kernels that stand in for the `torch.ops.npu` ops of an Ascend 910B (Atlas A2).

In: CPU tensors (aliases of the emulated device's memory; one in FRACTAL_NZ carries the attribute ``acl_format`` 29,
its data stays row-major) and the other arguments under the names and defaults of torch_npu 2.13.0's schemas. Out:
fresh CPU tensors of the shapes and dtypes of the real meta kernels; a kernel that writes an argument in place says so.
What the device leaves unwritten holds NaN or garbage; what it refuses, or gets silently wrong, or a kernel here does
not cover, raises `ascend.emulator.limits.Refused`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ascend.emulator.kernels.activation import npu_swiglu
from ascend.emulator.kernels.attention import npu_fused_infer_attention_score
from ascend.emulator.kernels.cache import npu_scatter_pa_kv_cache
from ascend.emulator.kernels.combination import npu_moe_finalize_routing, npu_moe_token_unpermute
from ascend.emulator.kernels.int4 import npu_convert_weight_to_int4pack
from ascend.emulator.kernels.matmul import npu_grouped_matmul
from ascend.emulator.kernels.mc2 import npu_moe_distribute_combine_v2, npu_moe_distribute_dispatch_v2
from ascend.emulator.kernels.norm import npu_add_rms_norm, npu_rms_norm
from ascend.emulator.kernels.permutation import npu_moe_init_routing_v2, npu_moe_re_routing
from ascend.emulator.kernels.quant import npu_dequant_swiglu_quant, npu_dynamic_quant, npu_quantize
from ascend.emulator.kernels.quant_matmul import (
    npu_grouped_matmul_swiglu_quant,
    npu_grouped_matmul_swiglu_quant_v2,
    npu_quant_matmul,
)
from ascend.emulator.kernels.rotary import npu_apply_rotary_pos_emb, npu_rotary_mul
from ascend.emulator.kernels.routing import npu_moe_gating_top_k

KERNELS: dict[str, Callable[..., Any]] = {
    f"npu::{kernel.__name__}": kernel
    for kernel in (
        npu_add_rms_norm,
        npu_apply_rotary_pos_emb,
        npu_convert_weight_to_int4pack,
        npu_dequant_swiglu_quant,
        npu_dynamic_quant,
        npu_fused_infer_attention_score,
        npu_grouped_matmul,
        npu_grouped_matmul_swiglu_quant,
        npu_grouped_matmul_swiglu_quant_v2,
        npu_moe_distribute_combine_v2,
        npu_moe_distribute_dispatch_v2,
        npu_moe_finalize_routing,
        npu_moe_gating_top_k,
        npu_moe_init_routing_v2,
        npu_moe_re_routing,
        npu_moe_token_unpermute,
        npu_quant_matmul,
        npu_quantize,
        npu_rms_norm,
        npu_rotary_mul,
        npu_scatter_pa_kv_cache,
        npu_swiglu,
    )
}
"""The kernels by the name of their op."""
