"""The ops on an NVIDIA GPU: Triton kernels of our own where they pay, torch's libraries elsewhere.

In: the tensors of an op as `ops.reference` defines it, int4 words as `ops.layout` leaves them. Out: the same result.
Nothing waits for the device, so that a decode step can be captured; a layer of it is 7 launches:

1. ``add_rms_norm``
2. ``linear``, the query, key and value projection (bf16: cuBLAS)
3. ``cached_attention``: norms, rotation, cache and attention over all splits
4. ``linear``, the output projection
5. ``add_rms_norm_gate``: norm, router and choice
6. and 7. ``moe``: the hit and the shared experts' first product, and their second with the weighted sum.

An op that this table lacks runs its definition: torch's own kernels, as `linear` does. Triton is imported when a kernel
first runs.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

FILES = {
    "norm": ("rms_norm", "add_rms_norm"),
    "rope": ("rope_to_cache",),
    "attention": ("attention", "cached_attention"),
    "gate": ("moe_gate", "add_rms_norm_gate"),
    "linear": ("linear_w8a8", "linear_fp8"),
    "grouped": ("expert_rows",),
    "experts": (
        "swiglu_mlp", "swiglu_mlp_w8a8", "swiglu_mlp_fp8",
        "moe_experts", "moe_experts_w8a8", "moe_experts_w4a16", "moe_experts_fp8",
        "moe", "moe_w8a8", "moe_w4a16", "moe_fp8",
    ),
}  # fmt: skip


def _at_first_call(file: str, name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(f"ops.triton_kernels.{file}"), name)(*args, **kwargs)

    return run


KERNELS = {name: _at_first_call(file, name) for file, names in FILES.items() for name in names}
