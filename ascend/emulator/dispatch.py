"""Every op on an `npu` tensor, computed on the CPU over the same memory.

`overrides.py` puts a `Kernel` in the place of each of torch_npu's: an ``aten`` op runs PyTorch's own CPU kernel on
aliases of its tensors (`memory.alias`), an ``npu`` op the kernel of that name in `kernels/`. An op that has neither
fails by name. What the card would refuse is refused too: a host tensor among the arguments, tensors of two cards, FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ascend.emulator import graphs, log, memory
from ascend.emulator.kernels import KERNELS, atb, attention, vllm_ascend
from ascend.emulator.limits import FP8, Refused

# Ops whose result's shape or Python value depends on what the tensors hold: the host waits for the device.
SYNCHRONISING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
BETWEEN_DEVICES = {"copy_", "_copy_from", "_copy_from_and_resize", "_to_copy"}
OFFSET = 4  # by which an op moves a generator on: offsets are multiples of it

COMPUTED: dict[str, Callable[..., Any]] = {
    **KERNELS,
    **atb.KERNELS,
    **vllm_ascend.KERNELS,
    "npu::npu_format_cast": memory.npu_format_cast,
    f"npu::{attention.OP}.out": attention.into,
}
# Not recorded in a graph: what it returns is only handed on. No kernel here needs the memory.
WORKSPACE = f"npu::_{attention.OP}_get_max_workspace"


class Kernel:
    """One op: checks its arguments as the card would, computes on aliases, and returns tensors of the card."""

    def __init__(self, full_name: str, overload: Any) -> None:
        namespace, name = full_name.split("::")
        schema = overload._schema
        self.name, self.base = full_name, name.partition(".")[0]
        self.compute: Callable[..., Any] | None = overload if namespace == "aten" else COMPUTED.get(full_name)
        self.synchronises = self.base in SYNCHRONISING
        self.between_devices = self.base in BETWEEN_DEVICES
        self.takes_host_scalars = namespace == "aten"
        self.overload = overload
        self.written = [i for i, one in enumerate(schema.arguments) if one.alias_info and one.alias_info.is_write]
        self.arguments = [one.name for one in schema.arguments]
        # Per result: the position of the argument it is, if it is one.
        self.returned = [
            next((i for i in self.written if _same_alias(schema.arguments[i], one)), None) for one in schema.returns
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op, or record it while a graph is captured. Raises `Refused` for what the card would not take."""
        if self.name == WORKSPACE:
            return torch.empty(0, dtype=torch.uint8, device=args[0].device)
        if self.compute is None:
            raise Refused(f"{self.name}: the emulator has no kernel for it (ascend/emulator/kernels)")
        tensors = memory.tensors(args) + memory.tensors(kwargs)
        device = self._device(tensors, kwargs.get("device"))
        graphs.behind_a_wait(self.name)
        log.op(self.name)
        for what in self._syncs(tensors, args, kwargs):
            graphs.refuse_while_capturing(what)
            log.sync(what)
        if graphs.capturing():
            return graphs.record(self, args, kwargs, device)
        host_args, host_kwargs = self.on_host(args, kwargs)
        computed = self.compute(*host_args, **host_kwargs)
        for index in self.written:
            self._resize(self._argument(index, args, kwargs), self._argument(index, host_args, host_kwargs))
        return self.results(computed, args, kwargs, device)

    def on_host(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments with aliases in the place of `npu` tensors and the CPU in the place of the card."""
        host_args, host_kwargs = memory.replaced(args, _alias), memory.replaced(kwargs, _alias)
        if (device := host_kwargs.get("device")) is not None and torch.device(device).type == "npu":
            host_kwargs["device"] = torch.device("cpu")
        if host_kwargs.get("pin_memory"):
            host_kwargs["pin_memory"] = False
        if isinstance(generator := host_kwargs.get("generator"), torch.Generator):
            host_kwargs["generator"] = _on_host(generator)
        return host_args, host_kwargs

    def _argument(self, index: int, args: Any, kwargs: Any) -> Any:
        return args[index] if index < len(args) else kwargs.get(self.arguments[index])

    @staticmethod
    def _resize(given: Any, host: Any) -> None:
        """Give an ``out`` argument the shape that the CPU's kernel gave its alias."""
        if isinstance(given, Tensor) and given.device.type == "npu" and given.shape != host.shape:
            given.resize_(host.shape)
            memory.alias(given).copy_(host)

    def results(self, computed: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        """Return what was computed as tensors of the card; an argument that was written to is returned itself."""
        if isinstance(computed, (tuple, list)) and (len(self.returned) > 1 or isinstance(computed, tuple)):
            found = [self._result(i, one, args, kwargs, device) for i, one in enumerate(computed)]
            return tuple(found) if isinstance(computed, tuple) else found
        return self._result(0, computed, args, kwargs, device)

    def _result(self, index: int, computed: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
        position = self.returned[index] if index < len(self.returned) else None
        if position is not None:
            return self._argument(position, args, kwargs)
        if device.type == "cpu":
            return computed
        acl_format = getattr(computed, "acl_format", None)
        if acl_format is not None:
            return memory.in_format(computed, acl_format, device)
        return memory.replaced(computed, lambda host: memory.to_device(host, device))

    def _device(self, tensors: list[Tensor], asked: Any) -> torch.device:
        """Return where the results go; refuse what the card would."""
        devices = {one.device for one in tensors if one.device.type == "npu"}
        if any(one.dtype in FP8 for one in tensors):
            raise Refused(f"{self.name}: no op of the 910B computes in FP8")
        if not self.between_devices:
            if any(one.dtype is torch.float64 and one.dim() and one.device.type == "npu" for one in tensors):
                raise Refused(
                    f"{self.name}: the card has no float64 in most ops, and computes in float32 without a word"
                )
            host = [
                one for one in tensors if one.device.type == "cpu" and not (self.takes_host_scalars and one.dim() == 0)
            ]
            if devices and host:
                shapes = ", ".join(str(list(one.shape)) for one in host)
                raise Refused(
                    f"{self.name}: expected all tensors on {min(map(str, devices))}, found host memory: {shapes}"
                )
            if len(devices) > 1:
                raise Refused(f"{self.name}: tensors of {' and '.join(sorted(map(str, devices)))} in one op")
        if asked is not None:
            device = torch.device(asked)
            if device.type == "npu" and device.index is None:
                return torch.device("npu", torch.npu.current_device())
            return device
        return next((one.device for one in tensors if one.device.type == "npu"), torch.device("cpu"))

    def _syncs(self, tensors: list[Tensor], args: Any, kwargs: Any) -> Iterator[str]:
        if self.synchronises:
            yield self.name
        elif self.between_devices:
            kinds = {one.device.type for one in tensors}
            if kwargs.get("device") is not None:
                kinds.add(torch.device(kwargs["device"]).type)
            if len(kinds) > 1:
                yield f"{self.name} between host and device"
        elif self.base.startswith(("index", "_index_put")) and any(one.dtype is torch.bool for one in tensors[1:]):
            yield f"{self.name} by a mask"
        elif self.base == "repeat_interleave" and kwargs.get("output_size") is None:
            yield self.name


def _on_host(generator: torch.Generator) -> torch.Generator:
    """A generator of the CPU for one op: it depends on the card's seed and offset, and moves the offset on."""
    if generator.device.type != "npu":
        return generator
    offset = generator.get_offset()
    generator.set_offset(offset + OFFSET)
    return torch.Generator().manual_seed((generator.initial_seed() * 1_000_003 + offset) % 2**63)


def _same_alias(argument: Any, result: Any) -> bool:
    if argument.alias_info is None or result.alias_info is None:
        return False
    return bool(argument.alias_info.before_set & result.alias_info.before_set)


def _alias(tensor: Tensor) -> Tensor:
    return memory.alias(tensor) if tensor.device.type == "npu" else tensor
