"""The single ops that `perf ops` times: what each is run on, who can run it, and the fewest bytes and FLOPs of a call.

Shapes: T tokens, H hidden_size, O outputs, I intermediate width, E experts, K experts per token, B rows, S cache slots,
N query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from ascend.model_shape import ModelShape
from ascend.weights import MLP, Experts, Weight
from ascend.weights_quantised import quantised
from ops import layout, reference, reference_quantised
from ops.quantise import INT4_GROUP

OURS = "ours"
ROUTINGS = 32  # different choices of experts that the calls go through
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

    def filled(self, module: nn.Module) -> Any:
        """Put a module on the device, with weights of the usual spread made there."""
        module.to(self.dtype).to_empty(device=self.device)
        for parameter in module.parameters():
            parameter.requires_grad_(False).normal_(0, 0.02)
        return module


def cases(shape: ModelShape, place: Place, tokens: int, context: int, quantise: str | None) -> Iterator[Case]:
    """Yield the ops of one decode step of ``tokens`` rows with ``context`` tokens each in the cache."""
    H, D = shape.hidden_size, shape.head_dim
    qkv = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * D
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[place.dtype]
    int8 = quantise == "w8a8"
    yield _norm(place, precision, tokens, H)
    yield _linear(place, "w8a8" if int8 else precision, tokens, H, qkv, int8)
    yield _attention(place, precision, shape, tokens, context)
    yield _gate(place, shape, tokens)
    yield _experts(place, quantise or precision, shape, tokens, quantise)
    if shape.shared_intermediate_size:
        yield _mlp(place, "w8a8" if int8 else precision, tokens, H, shape.shared_intermediate_size, int8)
    yield _linear(place, precision, tokens, H, shape.vocab_size, False)


def _norm(place: Place, precision: str, T: int, H: int) -> Case:
    def make() -> tuple[Tensor, Tensor, Tensor]:  # rows are most of what it reads: each copy has its own
        return place.random(H), place.random(T, H), place.random(T, H)

    calls: dict[str, Call] = {
        OURS: lambda copy, _: ops.add_rms_norm(copy[1], copy[2], copy[0], 1e-6)[0],
        "reference": lambda copy, _: reference.add_rms_norm(copy[1], copy[2], copy[0], 1e-6)[0],
        "torch": lambda copy, _: F.rms_norm(copy[1] + copy[2], (H,), copy[0], 1e-6),
    }
    width = place.dtype.itemsize
    nbytes, copy_bytes = (4 * T * H + H) * width, (2 * T * H + H) * width
    return Case("add_rms_norm", precision, {"T": T, "H": H}, make, calls, nbytes, 0, copy_bytes)


def _linear(place: Place, precision: str, T: int, H: int, outputs: int, int8: bool) -> Case:
    x = place.random(T, H)
    calls: dict[str, Call] = {OURS: lambda weight, _: weight(x)}
    if not layout.is_own(place.device):
        calls["reference"] = lambda weight, _: (
            reference_quantised.linear_w8a8(x, weight.weight, weight.scale, None)
            if int8
            else reference.linear(x, weight.weight, None)
        )
    if not int8:
        calls["torch"] = lambda weight, _: F.linear(x, weight.weight)
    weights = outputs * H * (1 if int8 else x.element_size())
    nbytes = weights + T * (H + outputs) * x.element_size()
    sizes = {"T": T, "H": H, "O": outputs}
    name = "linear_w8a8" if int8 else "linear"
    make = _maker(place, lambda: Weight(outputs, H), "w8a8" if int8 else None)
    return Case(name, precision, sizes, make, calls, nbytes, 2 * T * H * outputs, weights)


def _mlp(place: Place, precision: str, T: int, H: int, width: int, int8: bool) -> Case:
    x = place.random(T, H)

    def by_definition(mlp: Any, _: int) -> Tensor:
        if int8:
            return reference_quantised.swiglu_mlp_w8a8(x, mlp.gate_up, mlp.gate_up_scale, mlp.down, mlp.down_scale)
        return reference.swiglu_mlp(x, mlp.gate_up, mlp.down)

    calls: dict[str, Call] = {OURS: lambda mlp, _: mlp(x)}
    if not layout.is_own(place.device):
        calls["reference"] = by_definition
    weights = 3 * H * width * (1 if int8 else x.element_size())
    nbytes = weights + 2 * T * H * x.element_size()
    make = _maker(place, lambda: MLP(H, width), "w8a8" if int8 else None)
    name = "swiglu_mlp_w8a8" if int8 else "swiglu_mlp"
    return Case(name, precision, {"T": T, "H": H, "I": width}, make, calls, nbytes, 6 * T * H * width, weights)


def _gate(place: Place, shape: ModelShape, T: int) -> Case:
    x, E = place.random(T, shape.hidden_size), shape.num_experts
    bias = torch.zeros(E, device=place.device)
    settings = (shape.num_experts_per_tok, shape.n_group, shape.topk_group, True, 2.5)
    calls: dict[str, Call] = {
        OURS: lambda weight, _: ops.moe_gate(x, weight, bias, *settings),
        "reference": lambda weight, _: reference.moe_gate(x, weight, bias, *settings),
    }

    def by_expert(result: tuple[Tensor, Tensor]) -> Tensor:
        return torch.zeros(T, E, device=place.device).scatter_(1, result[1].long(), result[0])

    weights = 4 * E * shape.hidden_size
    nbytes = weights + T * shape.hidden_size * x.element_size()
    flops = 2 * T * E * shape.hidden_size
    sizes = {"T": T, "H": shape.hidden_size, "E": E, "K": shape.num_experts_per_tok}
    make: Callable[[], Any] = lambda: 0.02 * place.random(E, x.shape[1]).float()  # noqa: E731
    return Case("moe_gate", "fp32", sizes, make, calls, nbytes, flops, weights, by_expert)


def _experts(place: Place, precision: str, shape: ModelShape, T: int, quantise: str | None) -> Case:
    E, K, H, width = shape.num_experts, shape.num_experts_per_tok, shape.hidden_size, shape.moe_intermediate_size
    x, chosen = place.random(T, H), routings(place, E, K, T)
    hit = sum(len(expert.unique()) for _, expert in chosen) / ROUTINGS
    calls: dict[str, Call] = {OURS: lambda experts, i: experts(x, *chosen[i % ROUTINGS])}
    if quantise is not None and not layout.is_own(place.device):
        by_definition = getattr(reference_quantised, f"moe_experts_{quantise}")
        parts = ("gate_up", "gate_up_scale", "down", "down_scale")
        calls["reference"] = lambda one, i: by_definition(
            x, *chosen[i % ROUTINGS], *(getattr(one, part) for part in parts)
        )
    elif not layout.is_own(place.device):
        calls["reference"] = lambda one, i: reference.moe_experts(x, *chosen[i % ROUTINGS], one.gate_up, one.down)
        if place.dtype is torch.bfloat16:
            calls["torch"] = lambda one, i: grouped_mm(x, *chosen[i % ROUTINGS], one.gate_up, one.down)
    width_bytes = {None: float(x.element_size()), "w8a8": 1.0, "w4a16": 0.5 + 2 / min(INT4_GROUP, H)}[quantise]
    weights = 3 * H * width * width_bytes
    nbytes = hit * weights + 2 * T * H * x.element_size()
    make = _maker(place, lambda: Experts(E, H, width, 0, E), quantise)
    name = f"moe_experts_{quantise}" if quantise else "moe_experts"
    sizes = {"T": T, "H": H, "I": width, "E": E, "K": K, "hit": round(hit)}
    return Case(name, precision, sizes, make, calls, nbytes, 6 * T * K * H * width, E * weights)


def _attention(place: Place, precision: str, shape: ModelShape, B: int, S: int) -> Case:
    N, G, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    q, scale = place.random(B, 1, N, D), D**-0.5
    start, length = (torch.full((B,), value, device=place.device) for value in (0, S))

    def caches() -> tuple[Tensor, Tensor]:
        pair = tuple(layout.cache((B, G, S, D), place.dtype, place.device) for _ in range(2))
        for cache in pair:
            cache.normal_()
        return pair  # type: ignore[return-value]

    calls: dict[str, Call] = {
        OURS: lambda kv, _: ops.attention(q, *kv, start, length, scale, None, [S] * B),
        "torch": lambda kv, _: _sdpa(q, *kv),
    }
    nbytes = 2.0 * B * G * S * D * q.element_size()
    return Case(
        "attention",
        precision,
        {"B": B, "S": S, "N": N, "G": G, "D": D},
        caches,
        calls,
        nbytes,
        4 * B * S * N * D,
        nbytes,
    )


def _sdpa(q_BTND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BTND.transpose(1, 2), k_BGSD, v_BGSD, enable_gqa=True).transpose(1, 2)


def _maker(place: Place, build: Callable[[], Any], quantise: str | None) -> Callable[[], Any]:
    def make() -> Any:
        with torch.device("meta"):
            empty = build()
        module = place.filled(empty)
        if quantise is not None:
            module = quantised(module, quantise)
        if layout.is_own(place.device) and hasattr(module, "lay_out"):
            module.lay_out()
        return module

    return make


def routings(place: Place, E: int, K: int, T: int) -> list[tuple[Tensor, Tensor]]:
    """Return weights ``[T, K]`` fp32 and experts ``[T, K]`` int64 of `ROUTINGS` steps, the same for everyone."""
    made = []
    popularity_E = place.skew * torch.randn(E, generator=place.generator)
    for _ in range(ROUTINGS):
        # The K largest of log popularity plus Gumbel noise: K draws without replacement.
        noise_TE = -torch.log(-torch.log(torch.rand(T, E, generator=place.generator)))
        expert_TK = (popularity_E + noise_TE).topk(K).indices
        weight_TK = torch.rand(T, K, generator=place.generator)
        made.append((weight_TK.to(place.device), expert_TK.to(place.device)))
    return made


def grouped_mm(x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, gate_up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Do what `ops.moe_experts` does with torch's own grouped matmul: rows sorted by expert, nothing padded."""
    T, K = expert_TK.shape
    order = expert_TK.flatten().argsort()
    experts_E = torch.arange(len(down_EHI), device=x_TH.device)
    # Not `bincount`: the host waits for it, which no graph can hold.
    ends = torch.searchsorted(expert_TK.flatten()[order], experts_E, right=True).to(torch.int32)
    gate, up = F.grouped_mm(x_TH[order // K], gate_up_EIH.transpose(1, 2), offs=ends).chunk(2, -1)
    rows = F.grouped_mm(F.silu(gate) * up, down_EHI.transpose(1, 2), offs=ends)
    weighted = rows.float() * weight_TK.flatten()[order, None]
    out_TH = torch.zeros(T, x_TH.shape[1], dtype=torch.float32, device=x_TH.device)
    return out_TH.index_add_(0, order // K, weighted).to(x_TH.dtype)
