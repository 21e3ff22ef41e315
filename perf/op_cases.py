"""The single ops that `perf ops` times: what each is run on, who can run it, and the fewest bytes and FLOPs of a call.

The mixture of experts is in `moe_cases`. Shapes: T tokens, H hidden_size, O outputs, I intermediate width, B rows, S
cache slots, N query heads, G key/value heads, D head_dim, R rotated pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from ascend.model_shape import ModelShape
from ascend.weights import MLP, Weight
from ascend.weights_quantised import quantised
from ops import layout, reference, reference_quantised
from ops.quantise import FP8, INT4_GROUP, fp8_values

OURS = "ours"
EPS = 1e-6
PRECISION = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PROJECTIONS = ("w8a8", "fp8")  # formats that have all projections, not the experts alone
Call = Callable[[Any, int], Any]


def _as_it_is(result: Tensor) -> Tensor:
    return result


@dataclass(frozen=True)
class Case:
    """One op at one size.

    make: a new copy of the weights (caches, of a norm also the rows) it reads. calls: by implementation, ``(copy,
    number of the call)`` to the result. nbytes, flops: the fewest of one call, mean over the routings. copy_bytes: of
    one copy. values: a result as one tensor, to be compared.
    """

    op: str
    precision: str
    sizes: dict[str, int]
    make: Callable[[], Any]
    calls: Mapping[str, Call]
    nbytes: float
    flops: float
    copy_bytes: float
    values: Callable[[Any], Tensor] = _as_it_is


@dataclass(frozen=True)
class Place:
    """Where and in what the ops run, and how experts are chosen: skew 0 is uniform, 1 a usual log-normal popularity."""

    device: torch.device
    dtype: torch.dtype
    skew: float = 0.0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def random(self, *shape: int) -> Tensor:
        """Normal numbers with the spread of activations."""
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def made(self, build: Callable[[], nn.Module], quantise: str | None) -> Any:
        """Make a module on the device with weights of the usual spread, in a format and in the device's layout."""
        with torch.device("meta"):
            module: Any = build()
        module.to(self.dtype).to_empty(device=self.device)
        for parameter in module.parameters():
            parameter.requires_grad_(False).normal_(0, 0.02)
        if quantise is not None:
            module = quantised(module, quantise)
        if hasattr(module, "lay_out"):
            module.lay_out()
        return module

    def weight_bytes(self, quantise: str | None, inputs: int) -> float:
        """Bytes of a weight with as many inputs; scales are counted where they are more than a thousandth."""
        return {None: float(self.dtype.itemsize), "w4a16": 0.5 + 2 / min(INT4_GROUP, inputs)}.get(quantise, 1.0)


def cases(
    shape: ModelShape, place: Place, tokens: int, contexts: Sequence[int], quantise: str | None, kv: str | None = None
) -> Iterator[Case]:
    """Yield the ops of a decode step of ``tokens`` rows; attention with each of ``contexts`` tokens a row in the cache.

    ``kv`` "fp8": a cache of FP8 values.
    """
    from perf.moe_cases import moe_cases  # it imports this file

    H, D = shape.hidden_size, shape.head_dim
    qkv = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * D
    to = quantise if quantise in PROJECTIONS else None
    yield _norm(place, tokens, H)
    yield _linear(place, tokens, H, qkv, to)
    for context in contexts:
        yield from _attention(place, shape, tokens, context, kv)
    yield _linear(place, tokens, shape.num_attention_heads * D, H, to)
    if shape.is_moe_layer(shape.num_hidden_layers - 1):
        yield from moe_cases(shape, place, tokens, quantise)
    width = shape.shared_intermediate_size or shape.intermediate_size
    yield _mlp(place, tokens, H, width, to)
    yield _linear(place, tokens, H, shape.vocab_size, None)


def _norm(place: Place, T: int, H: int) -> Case:
    def make() -> tuple[Tensor, Tensor, Tensor]:  # rows are most of what it reads: each copy has its own
        return place.random(H), place.random(T, H), place.random(T, H)

    calls: dict[str, Call] = {
        OURS: lambda copy, _: ops.add_rms_norm(copy[1], copy[2], copy[0], EPS)[0],
        "reference": lambda copy, _: reference.add_rms_norm(copy[1], copy[2], copy[0], EPS)[0],
        "torch": lambda copy, _: F.rms_norm(copy[1] + copy[2], (H,), copy[0], EPS),
    }
    width = place.dtype.itemsize
    nbytes, copy_bytes = (4 * T * H + H) * width, (2 * T * H + H) * width
    return Case("add_rms_norm", PRECISION[place.dtype], {"T": T, "H": H}, make, calls, nbytes, 0, copy_bytes)


def _linear(place: Place, T: int, inputs: int, outputs: int, to: str | None) -> Case:
    x = place.random(T, inputs)
    calls: dict[str, Call] = {OURS: lambda weight, _: weight(x)}
    if not layout.is_own(place.device):
        calls["reference"] = lambda weight, _: (
            getattr(reference_quantised, f"linear_{to}")(x, weight.weight, weight.scale, None)
            if to
            else reference.linear(x, weight.weight, None)
        )
    if to is None:
        calls["torch"] = lambda weight, _: F.linear(x, weight.weight)
    weights = outputs * inputs * place.weight_bytes(to, inputs)
    nbytes = weights + T * (inputs + outputs) * x.element_size()
    name, sizes = f"linear_{to}" if to else "linear", {"T": T, "H": inputs, "O": outputs}
    make: Callable[[], Any] = lambda: place.made(lambda: Weight(outputs, inputs), to)  # noqa: E731
    return Case(name, to or PRECISION[place.dtype], sizes, make, calls, nbytes, 2 * T * inputs * outputs, weights)


def mlp_by_definition(x: Tensor, mlp: Any, to: str | None) -> Tensor:
    """Run a dense or shared MLP in a format as `ops.reference` and its like define it."""
    if to is None:
        return reference.swiglu_mlp(x, mlp.gate_up, mlp.down)
    defined: Tensor = getattr(reference_quantised, f"swiglu_mlp_{to}")(x, *mlp.weights())
    return defined


def _mlp(place: Place, T: int, H: int, width: int, to: str | None) -> Case:
    x = place.random(T, H)
    calls: dict[str, Call] = {OURS: lambda mlp, _: mlp(x)}
    if not layout.is_own(place.device):
        calls["reference"] = lambda mlp, _: mlp_by_definition(x, mlp, to)
    weights = 3 * H * width * place.weight_bytes(to, H)
    nbytes = weights + 2 * T * H * x.element_size()
    make: Callable[[], Any] = lambda: place.made(lambda: MLP(H, width), to)  # noqa: E731
    name, sizes = f"swiglu_mlp_{to}" if to else "swiglu_mlp", {"T": T, "H": H, "I": width}
    return Case(name, to or PRECISION[place.dtype], sizes, make, calls, nbytes, 6 * T * H * width, weights)


def _attention(place: Place, shape: ModelShape, B: int, S: int, kv: str | None) -> Iterator[Case]:
    """Attention alone, and with all that comes between the projection and it."""
    N, G, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    q, scale, lengths = place.random(B, 1, N, D), D**-0.5, [S] * B
    start, length = (torch.full((B,), value, device=place.device) for value in (0, S))

    def caches() -> tuple[Tensor, ...]:
        pair = (layout.cache((B, G, S, D), place.dtype, place.device) for _ in range(2))
        return tuple(fp8_values(one.normal_()) if kv == "fp8" else one.normal_() for one in pair)

    width = FP8.itemsize if kv == "fp8" else q.element_size()
    nbytes, flops, precision = 2.0 * B * G * S * D * width, 4 * B * S * N * D, kv or PRECISION[place.dtype]
    sizes = {"B": B, "S": S, "N": N, "G": G, "D": D}
    calls: dict[str, Call] = {OURS: lambda cache, _: ops.attention(q, *cache, start, length, scale, None, lengths)}
    if kv is None:
        calls["torch"] = lambda cache, _: _sdpa(q, *cache)
    else:
        calls["reference"] = lambda cache, _: reference.attention(q, cache[0], cache[1], start, length, scale)
    yield Case("attention", precision, sizes, caches, calls, nbytes, flops, nbytes)

    qkv, norms = place.random(B, 1, (N + 2 * G) * D), (place.random(D), place.random(D))
    angle = torch.rand(B, 1, D // 4, generator=place.generator).to(place.device)
    step = layout.step(angle.cos(), angle.sin(), length, S, None, D, place.dtype)
    seen = (start, length, EPS, scale)

    def by_definition(cache: Any, _: int) -> Tensor:
        k, v = cache
        q = reference.rope_to_cache(qkv, norms[0], norms[1], step.cos, step.sin, k, v, length, EPS)
        return reference.attention(q, k, v, start, length, scale)

    calls = {
        OURS: lambda cache, _: ops.cached_attention(
            qkv, *norms, step.cos, step.sin, *cache, *seen, step.slots, step.mask, lengths
        )
    }
    if not layout.is_own(place.device):
        calls["reference"] = by_definition
    nbytes += 2 * B * (N + G) * D * q.element_size()
    yield Case("cached_attention", precision, sizes, caches, calls, nbytes, flops, 2.0 * B * G * S * D * width)


def _sdpa(q_BTND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BTND.transpose(1, 2), k_BGSD, v_BGSD, enable_gqa=True).transpose(1, 2)
