"""The operations of the model, as ``torch.library`` ops: one name, one definition, one implementation per device.

What comes in and goes out of each op is defined by the plain-torch function of the same name in `ops.reference` (on
quantised weights: `ops.reference_quantised`; several ops in one: `ops.fused`); read that file first. Weights come as
`ops.layout` lays them out for the device. A device that has nothing faster runs the reference. The model calls the
functions below and never asks where it runs; shapes can be followed on the ``meta`` device. The ops are for inference:
none defines a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ops import cpu, cuda, fused, npu, reference, reference_quantised

_LIBRARY = torch.library.Library("ascend", "DEF")

SCHEMAS = {
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "linear": "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "swiglu_mlp": "(Tensor x_TH, Tensor gate_up_IH, Tensor down_HI) -> Tensor",
    "moe_gate": "(Tensor x_TH, Tensor weight_EH, Tensor? bias_E, int top_k, int n_group, int topk_group, "
    "bool normalise, float scaling) -> (Tensor, Tensor)",
    "moe_experts": "(Tensor x_TH, Tensor weight_TK, Tensor expert_TK, Tensor gate_up_EIH, Tensor down_EHI, "
    "int first=0, int total=0) -> Tensor",
    "expert_rows": "(Tensor x_MH, Tensor count_E, Tensor gate_up_EIH, Tensor down_EHI) -> Tensor",
    "rope_to_cache": "(Tensor qkv_BTC, Tensor? q_norm_D, Tensor? k_norm_D, Tensor cos_BTR, Tensor sin_BTR, "
    "Tensor(a!) k_BGSD, Tensor(b!) v_BGSD, Tensor length_B, float eps, Tensor? slots=None) -> Tensor",
    "attention": "(Tensor q_BTND, Tensor k_BGSD, Tensor v_BGSD, Tensor start_B, Tensor length_B, float scale, "
    "Tensor? mask=None, int[]? lengths=None) -> Tensor",
    "linear_w8a8": "(Tensor x, Tensor weight, Tensor scale_O, Tensor? bias) -> Tensor",
    "swiglu_mlp_w8a8": "(Tensor x_TH, Tensor gate_up_IH, Tensor gate_up_scale_I, Tensor down_HI, Tensor down_scale_H) "
    "-> Tensor",
    "moe_experts_w8a8": "(Tensor x_TH, Tensor weight_TK, Tensor expert_TK, Tensor gate_up_EIH, "
    "Tensor gate_up_scale_EI, Tensor down_EHI, Tensor down_scale_EH, int first=0, int total=0) -> Tensor",
    "moe_experts_w4a16": "(Tensor x_TH, Tensor weight_TK, Tensor expert_TK, Tensor gate_up_EIH, "
    "Tensor gate_up_scale_EIS, Tensor down_EHI, Tensor down_scale_EHS, int first=0, int total=0) -> Tensor",
    "linear_fp8": "(Tensor x, Tensor weight_OI, Tensor scale_PS, Tensor? bias) -> Tensor",
    "swiglu_mlp_fp8": "(Tensor x_TH, Tensor gate_up_IH, Tensor gate_up_scale_PS, Tensor down_HI, Tensor down_scale_PS) "
    "-> Tensor",
    "moe_experts_fp8": "(Tensor x_TH, Tensor weight_TK, Tensor expert_TK, Tensor gate_up_EIH, "
    "Tensor gate_up_scale_EPS, Tensor down_EHI, Tensor down_scale_EPS, int first=0, int total=0) -> Tensor",
    # Several of the above in one, for the devices that gain by it.
    "add_rms_norm_gate": "(Tensor x_TH, Tensor residual_TH, Tensor norm_H, float eps, Tensor weight_EH, "
    "Tensor? bias_E, int top_k, int n_group, int topk_group, bool normalise, float scaling) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "cached_attention": "(Tensor qkv_BTC, Tensor? q_norm_D, Tensor? k_norm_D, Tensor cos_BTR, Tensor sin_BTR, "
    "Tensor(a!) k_BGSD, Tensor(b!) v_BGSD, Tensor start_B, Tensor length_B, float eps, float scale, "
    "Tensor? slots=None, Tensor? mask=None, int[]? lengths=None) -> Tensor",
    "moe": "(Tensor x_TH, Tensor weight_TK, Tensor expert_TK, Tensor gate_up_EIH, Tensor down_EHI, "
    "Tensor shared_gate_up_IH, Tensor shared_down_HI, int first=0, int total=0) -> Tensor",
    "moe_w8a8": "(Tensor x_TH, Tensor weight_TK, Tensor expert_TK, Tensor gate_up_EIH, Tensor gate_up_scale_EI, "
    "Tensor down_EHI, Tensor down_scale_EH, Tensor shared_gate_up_IH, Tensor shared_gate_up_scale_I, "
    "Tensor shared_down_HI, Tensor shared_down_scale_H, int first=0, int total=0) -> Tensor",
    "moe_w4a16": "(Tensor x_TH, Tensor weight_TK, Tensor expert_TK, Tensor gate_up_EIH, Tensor gate_up_scale_EIS, "
    "Tensor down_EHI, Tensor down_scale_EHS, Tensor shared_gate_up_IH, Tensor shared_down_HI, "
    "int first=0, int total=0) -> Tensor",
    "moe_fp8": "(Tensor x_TH, Tensor weight_TK, Tensor expert_TK, Tensor gate_up_EIH, Tensor gate_up_scale_EPS, "
    "Tensor down_EHI, Tensor down_scale_EPS, Tensor shared_gate_up_IH, Tensor shared_gate_up_scale_PS, "
    "Tensor shared_down_HI, Tensor shared_down_scale_PS, int first=0, int total=0) -> Tensor",
}

# Implementations by dispatch key; what a table lacks runs the reference.
# Torch calls an NPU "PrivateUse1".
KERNELS = {"CPU": cpu.KERNELS, "CUDA": cuda.KERNELS, "PrivateUse1": npu.KERNELS}


def _register() -> None:
    for name, schema in SCHEMAS.items():
        definition = next(file for file in (reference, reference_quantised, fused) if hasattr(file, name))
        function = getattr(definition, name)
        # What is fused has the shapes that its parts have.
        meta = getattr(definition, f"{name}_meta", function)
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, meta, "Meta")
    for key, kernels in KERNELS.items():
        for name, kernel in kernels.items():
            _LIBRARY.impl(name, kernel, key)


_register()

rms_norm = torch.ops.ascend.rms_norm.default
add_rms_norm = torch.ops.ascend.add_rms_norm.default
linear = torch.ops.ascend.linear.default
swiglu_mlp = torch.ops.ascend.swiglu_mlp.default
moe_gate = torch.ops.ascend.moe_gate.default
moe_experts = torch.ops.ascend.moe_experts.default
expert_rows = torch.ops.ascend.expert_rows.default
rope_to_cache = torch.ops.ascend.rope_to_cache.default
attention = torch.ops.ascend.attention.default
linear_w8a8 = torch.ops.ascend.linear_w8a8.default
swiglu_mlp_w8a8 = torch.ops.ascend.swiglu_mlp_w8a8.default
moe_experts_w8a8 = torch.ops.ascend.moe_experts_w8a8.default
moe_experts_w4a16 = torch.ops.ascend.moe_experts_w4a16.default
linear_fp8 = torch.ops.ascend.linear_fp8.default
swiglu_mlp_fp8 = torch.ops.ascend.swiglu_mlp_fp8.default
moe_experts_fp8 = torch.ops.ascend.moe_experts_fp8.default
add_rms_norm_gate = torch.ops.ascend.add_rms_norm_gate.default
cached_attention = torch.ops.ascend.cached_attention.default
moe = torch.ops.ascend.moe.default
moe_w8a8 = torch.ops.ascend.moe_w8a8.default
moe_w4a16 = torch.ops.ascend.moe_w4a16.default
moe_fp8 = torch.ops.ascend.moe_fp8.default

__all__ = [*SCHEMAS, "KERNELS", "SCHEMAS", "Tensor"]
