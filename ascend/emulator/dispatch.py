"""Every op on an `npu` tensor, computed on the CPU over the same memory.

`install` puts a Python kernel in the place of each of torch_npu's: an ``aten`` op runs PyTorch's own CPU kernel on
aliases of its tensors (`memory.alias`), an ``npu`` op the kernel of that name in `kernels/`. An op that has neither
fails by name. What the card would refuse is refused too: a host tensor among the arguments, tensors of two cards, FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ascend.emulator import graphs, log, memory
from ascend.emulator.kernels import KERNELS, atb, attention, vllm_ascend
from ascend.emulator.limits import FP8, Refused

# Metadata alone, or memory: torch_npu's own kernels do these.
NATIVE = {
    "_reshape_alias",
    "alias",
    "as_strided",
    "detach",
    "is_pinned",
    "is_set_to",
    "lift",
    "_pin_memory",
    "record_stream",
    "resize_",
    "set_",
    "unfold",
    "view",
    "view_as_real",
    "view_as_complex",
}
NATIVE_NPU = {
    "empty_with_format",
    "unsafe_empty_with_format",
    "get_npu_format",
    "get_storage_size",
    f"_{attention.OP}_infer_output",
}
ALLOCATING = ("empty.memory_format", "empty_strided")
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
COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")

COMPUTED: dict[str, Callable[..., Any]] = {
    **KERNELS,
    **atb.KERNELS,
    **vllm_ascend.KERNELS,
    "npu::npu_format_cast": memory.npu_format_cast,
    f"npu::{attention.OP}.out": attention.into,
}
# Not recorded in a graph: what it returns is only handed on. No kernel here needs the memory.
WORKSPACE = f"npu::_{attention.OP}_get_max_workspace"

_libraries: dict[str, torch.library.Library] = {}


def install(_: ModuleType | None = None) -> None:
    """Override torch_npu's kernels; once per process, right after torch_npu is imported."""
    if "aten" in _libraries:
        return
    for namespace in ("aten", "npu"):
        _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    allocators = {name: torch.library.get_kernel(f"aten::{name}", "PrivateUse1") for name in ALLOCATING}
    with_autograd = set(torch._C._dispatch_get_registrations_for_dispatch_key("AutogradPrivateUse1"))
    registered = set(torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"))
    for full_name in sorted(registered):
        namespace, name = full_name.split("::")
        if namespace in _libraries and (overload := _overload(namespace, name)) and not _stays(namespace, overload):
            kernel = _Kernel(full_name, overload)
            _libraries[namespace].impl(name, kernel, "PrivateUse1", allow_override=True)
            if full_name in with_autograd:
                _libraries[namespace].impl(name, _below_autograd(overload), "AutogradPrivateUse1", allow_override=True)
    for name, native in allocators.items():
        _libraries["aten"].impl(name, _allocator(native), "PrivateUse1", with_keyset=True, allow_override=True)
    for name in sorted(_fallbacks(registered)):
        _libraries["aten"].impl(name, _no_kernel(f"aten::{name}"), "PrivateUse1")
    graphs.install()


def install_atb(_: ModuleType) -> None:
    """Override the ops of Ascend Transformer Boost, which torch_npu registers when they are first asked for."""
    install_namespace("atb")


def install_namespace(namespace: str) -> torch.library.Library:
    """Put kernels under every op of a namespace that an extension has just registered; once per namespace."""
    library = _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    for full_name in torch._C._dispatch_get_all_op_names():
        name = full_name.removeprefix(f"{namespace}::")
        if name != full_name and (overload := _overload(namespace, name)):
            library.impl(name, _Kernel(full_name, overload), "PrivateUse1", allow_override=True)
    return library


def _below_autograd(overload: Any) -> Callable[..., Any]:
    """A kernel for autograd's key, of which there is none here: what lies below has its turn, such as fake tensors."""

    def redispatch(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args, **kwargs)

    return redispatch


def _overload(namespace: str, name: str) -> Any:
    base, _, overload = name.partition(".")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    return getattr(packet, overload or "default", None)


def _stays(namespace: str, overload: Any) -> bool:
    schema = overload._schema
    base = schema.name.split("::")[1]
    if namespace == "npu":
        return base in NATIVE_NPU
    if base in NATIVE or f"{base}.{schema.overload_name}".rstrip(".") in ALLOCATING:
        return True
    # A pure view is metadata.
    return any(one.alias_info is not None and not one.alias_info.is_write for one in schema.returns)


def _fallbacks(registered: set[str]) -> Iterator[str]:
    """Ops for which the card would copy everything to the host, compute there, and copy back."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for full_name in torch._C._dispatch_get_all_op_names():
        if not full_name.startswith("aten::") or full_name in registered or not has(full_name, "CPU"):
            continue
        if not any(has(full_name, key) for key in COMPOSITE):
            yield full_name.removeprefix("aten::")


def _no_kernel(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Refused(f"{name}: torch_npu has no kernel for it; the card would copy its tensors to the host and back")

    return refuse


def _allocator(native: Any) -> Callable[..., Tensor]:
    def allocate(keyset: Any, *args: Any, **kwargs: Any) -> Tensor:
        return memory.poison(native.call_boxed(keyset, *args, **kwargs))

    return allocate


class _Kernel:
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
