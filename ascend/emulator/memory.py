"""The memory behind an `npu` tensor, seen from the host: CPU tensors over the same bytes.

A tensor made by `npu_format_cast` keeps its rows in order here; that it is in FRACTAL_NZ is only noted, on the real
storage by torch_npu's allocator and on the alias as the attribute ``acl_format``, so that ops can refuse it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend.emulator.limits import FRACTAL_NZ as NZ
from ascend.emulator.limits import ND, Refused

NZ_DTYPES = (torch.float16, torch.bfloat16, torch.int8)
CONTAINERS = (Tensor, list, tuple)
_MOST_ALIASES = 50_000

_storages: dict[tuple[int, int], torch.UntypedStorage] = {}
_nz: set[int] = set()  # addresses that were given to NZ tensors; the storage itself says whether one still is


def alias(tensor: Tensor) -> Tensor:
    """Return a CPU tensor of the same shape, strides and bytes as an `npu` one. It does not keep the memory alive."""
    storage = tensor.untyped_storage()
    size, address = storage.nbytes(), storage.data_ptr()
    if not size or not address:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    host = torch.empty(0, dtype=tensor.dtype)
    host.set_(_host_storage(address, size), tensor.storage_offset(), tensor.size(), tensor.stride())
    if address in _nz and _format(tensor) == NZ:
        host.acl_format = NZ  # type: ignore[attr-defined]
    return host


def _host_storage(address: int, size: int) -> torch.UntypedStorage:
    found = _storages.get((address, size))
    if found is None:
        if len(_storages) >= _MOST_ALIASES:
            _storages.clear()
        buffer = (ctypes.c_char * size).from_address(address)
        found = _storages[address, size] = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    return found


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors among an op's arguments or results; lists may hold them, dictionaries only at the top."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif type(value) not in (list, tuple):
        return []
    return [tensor for one in value if isinstance(one, CONTAINERS) for tensor in tensors(one)]


def replaced(value: Any, by: Callable[[Tensor], Any]) -> Any:
    """Return arguments or results with each tensor ``t`` replaced by ``by(t)``."""
    if isinstance(value, Tensor):
        return by(value)
    if type(value) in (list, tuple):
        return type(value)(replaced(one, by) if isinstance(one, CONTAINERS) else one for one in value)
    if isinstance(value, dict):
        return {name: replaced(one, by) if isinstance(one, CONTAINERS) else one for name, one in value.items()}
    return value


def empty_like(shape_of: Tensor, device: torch.device) -> Tensor:
    """Return a new `npu` tensor with the shape, strides and dtype of a tensor on any device."""
    return torch.empty_strided(shape_of.size(), shape_of.stride(), dtype=shape_of.dtype, device=device)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a new `npu` tensor with what ``host`` holds."""
    tensor = empty_like(host, device)
    if host.numel():
        alias(tensor).copy_(host)
    return tensor


def poison(tensor: Tensor) -> Tensor:
    """Fill the memory of a new `npu` tensor with ones: NaN as a number, -1 as an index."""
    storage = tensor.untyped_storage()
    if storage.nbytes() and storage.data_ptr():
        ctypes.memset(storage.data_ptr(), 0xFF, storage.nbytes())
    return tensor


def in_format(host: Tensor, acl_format: int, device: torch.device) -> Tensor:
    """Return a new `npu` tensor whose storage torch_npu's own allocator made for ``acl_format``."""
    make: Any = torch.ops.npu.empty_with_format
    tensor: Tensor = make(list(host.shape), dtype=host.dtype, device=device, acl_format=acl_format)
    alias(tensor).copy_(host)
    if acl_format == NZ:
        _nz.add(tensor.untyped_storage().data_ptr())
    return tensor


def npu_format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """The op of that name: a copy, marked with its format, for `in_format` to allocate."""
    if acl_format not in (ND, NZ) or customize_dtype is not None or input_dtype is not None:
        raise Refused(f"npu_format_cast: the emulator knows formats {ND} (ND) and {NZ} (FRACTAL_NZ), no custom dtypes")
    if acl_format == NZ and (input.dim() < 2 or input.dtype not in NZ_DTYPES):
        raise Refused(f"npu_format_cast: FRACTAL_NZ is for matrices of {NZ_DTYPES}, not {input.dtype} {input.dim()}-D")
    host = input.clone(memory_format=torch.contiguous_format)
    host.acl_format = acl_format  # type: ignore[attr-defined]
    return host


def _format(tensor: Tensor) -> int:
    return int(torch.ops.npu.get_npu_format(tensor))
