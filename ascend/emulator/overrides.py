"""The emulator's kernels in the place of torch_npu's and of the extensions that register ops of their own.

``aten`` and ``npu`` when torch_npu is imported, ``atb`` and vllm-ascend's when their libraries are. What is metadata
alone stays torch_npu's; what the card would leave to the host fails by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ascend.emulator import graphs, memory
from ascend.emulator.dispatch import Kernel
from ascend.emulator.kernels import attention
from ascend.emulator.limits import Refused

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
COMPOSITE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")

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
            kernel = Kernel(full_name, overload)
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
            library.impl(name, Kernel(full_name, overload), "PrivateUse1", allow_override=True)
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
