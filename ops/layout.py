"""How a device wants tensors laid out: weights once at load, and what a forward pass shares once per step.

The ops take weights "in the device's layout": as `ops.reference` defines them on CPU and CUDA (there but for int4
words, which hold other inputs), and as this file leaves them on an NPU. There the rows of each query and key head are
reordered so that full-width rotary kernels, which every CANN has, do this model's partial rotation; expert weights are
stored ``[E, in, out]`` in FRACTAL_NZ, the cube's own blocked format; and a step's flat cache slots and its mask are
made once, not in each layer.

Shapes as in `ops.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ops.quantise import int4_values

NZ = 29  # FRACTAL_NZ of aclFormat


@dataclass(frozen=True)
class StepLayout:
    """What the layers of one pass share, as the ops of the device take it.

    cos, sin: `rope_to_cache`'s tables. slots: its flat cache slots, int64 ``[B·T]``, where the device wants them.
    mask: `attention`'s mask, bool ``[B, 1, T, S]``, true where a query must not look, where the device wants one.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor | None = None
    mask: Tensor | None = None


def is_own(device: torch.device) -> bool:
    """Whether weights on this device have a layout of their own."""
    return device.type == "npu"


def step(
    cos_BTR: Tensor,
    sin_BTR: Tensor,
    written_B: Tensor,
    cache_slots: int,
    masked: tuple[Tensor, Tensor] | None,
    head_dim: int,
    dtype: torch.dtype,
) -> StepLayout:
    """Lay out a step: the T new tokens of row b go to the slots before ``written_B[b]`` of a cache of so many slots.

    ``masked`` has ``(start_B, length_B)`` where attention is to be told by a mask what is seen: where the lengths are
    not known on the host, or a row has padding.
    """
    if not is_own(cos_BTR.device):
        return StepLayout(cos_BTR, sin_BTR)
    B, T, _ = cos_BTR.shape
    slot_BT = written_B[:, None] - T + torch.arange(T, device=written_B.device)
    flat_T = (slot_BT + torch.arange(B, device=written_B.device)[:, None] * cache_slots).flatten()
    cos, sin = _full_width(cos_BTR, head_dim, 1.0), _full_width(sin_BTR, head_dim, 0.0)
    mask = None if masked is None else unseen(*masked, T, cache_slots)
    return StepLayout(cos.to(dtype), sin.to(dtype), flat_T, mask)


def unseen(start_B: Tensor, length_B: Tensor, T: int, slots: int) -> Tensor:
    """Where a query must not look, bool ``[B, 1, T, S]``: before its row's start and after its own slot."""
    slot_S = torch.arange(slots, device=start_B.device)
    last_BT = length_B[:, None] - T + torch.arange(T, device=start_B.device)
    return ((slot_S < start_B[:, None, None]) | (slot_S > last_BT[:, :, None])).unsqueeze(1)


def _full_width(table_BTR: Tensor, head_dim: int, rest: float) -> Tensor:
    """``[B, T, 1, D]``: the angles, then nothing to rotate, in each half of a head."""
    B, T, R = table_BTR.shape
    still = table_BTR.new_full((B, T, head_dim // 2 - R), rest)
    return torch.cat([table_BTR, still, table_BTR, still], dim=-1).unsqueeze(2)


def cache(shape_BGSD: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A key or value cache ``[B, G, S, D]``; on an NPU slots are the outer dimension in memory, and hold zeros."""
    if device.type != "npu":
        return torch.empty(shape_BGSD, dtype=dtype, device=device)
    B, G, S, D = shape_BGSD
    # Zeros, since a mask weighs an unseen slot with 0 and 0 times what memory held before may be NaN.
    return torch.zeros((B, S, G, D), dtype=dtype, device=device).transpose(1, 2)


def heads(weight: Tensor, head_dim: int, rotary_dim: int) -> Tensor:
    """Reorder the rows of a projection (or norm, or bias) of query or key heads: ``[heads·D, …]``.

    Half-style kernels rotate dimension i with i + D/2; this model i with i + rotary/2 for i < rotary/2 and leaves the
    rest. So each half gets its part of the rotated pairs first, then half of the rest: scores do not change, since
    queries and keys are reordered alike.
    """
    if weight.device.type != "npu":
        return weight
    R, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    order = [*range(R), *range(2 * R, 2 * R + rest), *range(R, 2 * R), *range(2 * R + rest, head_dim)]
    index = torch.tensor(order, device=weight.device)
    return weight.unflatten(0, (-1, head_dim)).index_select(1, index).flatten(0, 1)


def experts(*weights_EOI: Tensor) -> tuple[Tensor, ...]:
    """Expert weights ``[E, O, I]`` (bf16, fp16, fp32 or int8) for grouped matmuls: on an NPU ``[E, I, O]`` in NZ."""
    return tuple(_nz(one.transpose(1, 2)) if one.device.type == "npu" else one for one in weights_EOI)


def matrix_int8(weight_OI: Tensor, scale_O: Tensor) -> tuple[Tensor, Tensor]:
    """An int8 weight and its scales for `linear_w8a8`: on an NPU ``[I, O]`` in NZ, and fp32, fit for every output."""
    if not is_own(weight_OI.device):
        return weight_OI, scale_O
    return _nz(weight_OI.transpose(0, 1)), scale_O.float()


def experts_int8(
    gate_up_EIH: Tensor, gate_up_scale_EI: Tensor, down_EHI: Tensor, down_scale_EH: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Int8 expert weights and their scales: on an NPU ``[E, in, out]`` in NZ, and scales as the ops there take them."""
    if not is_own(gate_up_EIH.device):
        return gate_up_EIH, gate_up_scale_EI, down_EHI, down_scale_EH
    gate_up, down = experts(gate_up_EIH, down_EHI)
    # The first are used by the op that dequantises (fp32), the second by the matmul: bf16 for bf16, fp32 for fp16.
    return gate_up, gate_up_scale_EI.float(), down, _scale_of_output(down_scale_EH)


def _scale_of_output(scale: Tensor) -> Tensor:
    return scale if scale.dtype is torch.bfloat16 else scale.float()


def experts_int4(packed_EOI: Tensor, scale_EOS: Tensor) -> tuple[Tensor, Tensor]:
    """Packed int4 expert weights and their scales: on an NPU ``[E, I, O/8]`` as its own op packs, and ``[E, S, O]``.

    On CUDA the words of a group hold other inputs (`interleaved_int4`).
    """
    if interleaves(packed_EOI.device):
        for expert, packed_OI in enumerate(packed_EOI):  # one by one: in between a value takes 32 bits
            packed_EOI[expert] = interleaved_int4(packed_OI, scale_EOS.shape[-1])
        return packed_EOI, scale_EOS
    if packed_EOI.device.type != "npu":
        return packed_EOI, scale_EOS
    value_EIO = int4_values(packed_EOI).transpose(1, 2)
    pack = _npu().npu_convert_weight_to_int4pack
    packed = torch.stack([pack(one.contiguous(), 0) for one in value_EIO])
    return packed, scale_EOS.transpose(1, 2).contiguous()


def interleaves(device: torch.device) -> bool:
    """Whether int4 words hold other inputs there than as they are stored."""
    return device.type == "cuda"


def interleaved_int4(packed: Tensor, groups: int) -> Tensor:
    """Words ``[..., O, I/8]`` whose bits 4·s … 4·s + 3 belong to input ``s·W + j`` of the group, for word j of its W.

    As stored they belong to input ``8·j + s``. So a kernel that takes one nibble of all words of a group has the
    weights of inputs that lie beside one another.
    """
    W = packed.shape[-1] // groups
    value = int4_values(packed).unflatten(-1, (groups, 8, W)) + 8
    shift = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)[:, None]
    return (value << shift).sum(-2, dtype=torch.int32).flatten(-2)


def _nz(weight: Tensor) -> Tensor:
    block = 32 if weight.dtype is torch.int8 else 16
    # The ops that read the format have no fp32 in it; a matrix that is not in whole blocks would be padded.
    if weight.dtype is torch.float32 or weight.shape[-2] % 16 or weight.shape[-1] % block:
        return weight.contiguous()
    import torch_npu

    torch_npu.npu.config.allow_internal_format = True
    result: Tensor = _npu().npu_format_cast(weight.contiguous(), NZ)
    return result


def _npu() -> Any:
    return torch.ops.npu
