"""The mixture of experts for `perf ops`: router, routed experts, with the shared ones, and all of it; and the peers.

Peers: torch's own grouped matmul (bf16), and on CUDA the Triton kernels of an installed vLLM (bf16 and FP8). Shapes: T
tokens, H hidden_size, I width of an expert, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from ascend.model_shape import ModelShape
from ascend.weights import MLP, Experts
from ops import layout, reference, reference_quantised
from ops.quantise import FP8_BLOCK, int4_values
from perf.op_cases import EPS, OURS, PRECISION, PROJECTIONS, Call, Case, Place, mlp_by_definition

ROUTINGS = 32  # different choices of experts that the calls go through
SCALING = 2.5
VLLM_FILES = "vllm.model_executor.layers.fused_moe"


@dataclass(frozen=True)
class Layer:
    """A copy of what an MoE layer reads: the experts' modules, and the router's weight ``[E, H]`` in fp32."""

    routed: Any
    shared: Any
    router: Tensor


Step = tuple[Tensor, Tensor, Tensor]  # x_TH, weight_TK, expert_TK


def moe_cases(shape: ModelShape, place: Place, T: int, quantise: str | None) -> Iterator[Case]:
    """Yield the router after its norm, routed experts alone, with the shared ones, and the layer: router and both."""
    E, K, H, I = shape.num_experts, shape.num_experts_per_tok, shape.hidden_size, shape.moe_intermediate_size  # noqa: E741
    width, settings = shape.shared_intermediate_size, (K, shape.n_group, shape.topk_group, True, SCALING)
    shared_format = quantise if quantise in PROJECTIONS else None
    router, bias = 0.02 * place.random(E, H).float(), torch.zeros(E, device=place.device)
    # The norm of these is exact however it is rounded on the way: or a near-tie would go to another expert.
    half, norm = 0.5 * place.random(T, H).sign(), 2.0 ** place.random(H).sign()
    x = place.random(T, H)
    rows = 2 * T * H * x.element_size()
    sizes = {"T": T, "H": H, "E": E, "K": K}
    gate_bytes, gate_flops = 4.0 * E * H, 2.0 * T * E * H

    def by_expert(result: tuple[Tensor, ...]) -> Tensor:
        return torch.zeros(T, E, device=place.device).scatter_(1, result[1].long(), result[0])

    gates: dict[str, Call] = {
        OURS: lambda weight, _: ops.add_rms_norm_gate(half, half, norm, EPS, weight, bias, *settings),
        "reference": lambda weight, _: reference.moe_gate(
            reference.add_rms_norm(half, half, norm, EPS)[0], weight, bias, *settings
        ),
    }
    copied: Callable[[], Any] = router.clone
    nbytes = gate_bytes + 2 * rows
    yield Case("add_rms_norm_gate", "fp32", sizes, copied, gates, nbytes, gate_flops, gate_bytes, by_expert)

    def make(with_shared: bool) -> Layer:
        routed = place.made(lambda: Experts(E, H, I, 0, E), quantise)
        shared = place.made(lambda: MLP(H, width), shared_format) if with_shared else None
        return Layer(routed, shared, router.clone())

    steps = [(x, *chosen) for chosen in routings(place, E, K, T)]
    # A router of random weights chooses; each call has other tokens.
    others = [place.random(T, H) for _ in range(ROUTINGS)]
    peers = _peers(place, quantise)
    routed_bytes = 3 * H * I * place.weight_bytes(quantise, H)
    shared_bytes = 3 * H * width * place.weight_bytes(shared_format, H)
    sizes |= {"I": I}

    def case(name: str, with_shared: bool, with_router: bool) -> Case:
        def run(choose: Callable[..., Any], go: Callable[..., Tensor]) -> Call:
            def call(copy: Layer, i: int) -> Tensor:
                if not with_router:
                    return go(copy, *steps[i % ROUTINGS])
                one = others[i % ROUTINGS]
                return go(copy, one, *choose(one, copy.router, bias, *settings))

            return call

        def ours(copy: Layer, *step: Any) -> Tensor:
            out: Tensor = copy.routed(*step, copy.shared)
            return out

        def peer(copy: Layer, *step: Any, go: Callable[..., Tensor]) -> Tensor:
            out = go(copy.routed, *step)
            return out if copy.shared is None else out + mlp_by_definition(step[0], copy.shared, shared_format)

        calls: dict[str, Call] = {OURS: run(ops.moe_gate, ours)}
        for who, (choose, go) in peers.items():
            calls[who] = run(choose, lambda copy, *step, go=go: peer(copy, *step, go=go))
        chosen = [expert for _, _, expert in steps]
        if with_router:
            chosen = [reference.moe_gate(one, router, bias, *settings)[1] for one in others]
        hit = sum(len(expert.unique()) for expert in chosen) / ROUTINGS
        extra, more = (shared_bytes, 6.0 * T * H * width) if with_shared else (0.0, 0.0)
        nbytes, held, flops = hit * routed_bytes + rows + extra, E * routed_bytes + extra, 6.0 * T * K * H * I + more
        if with_router:
            nbytes, flops = nbytes + gate_bytes, flops + gate_flops
        precision, at = quantise or PRECISION[place.dtype], sizes | {"hit": round(hit)}
        return Case(name, precision, at, lambda: make(with_shared), calls, nbytes, flops, held + gate_bytes)

    suffix = f"_{quantise}" if quantise else ""
    yield case(f"moe_experts{suffix}", False, False)
    if width:
        yield case(f"moe{suffix}", True, False)
    yield case(f"moe_layer{suffix}", bool(width), True)


def _peers(place: Place, quantise: str | None) -> dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]]:
    """By name: how experts are chosen, and how a module of routed experts is run."""
    peers: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {}
    if layout.is_own(place.device):
        return peers
    peers["reference"] = (
        reference.moe_gate,
        lambda one, x, weight, expert: routed_by_definition(one, x, weight, expert, quantise),
    )
    if quantise is None and place.dtype is torch.bfloat16:
        peers["torch"] = (
            reference.moe_gate,
            lambda one, x, weight, expert: grouped_mm(x, weight, expert, one.gate_up, one.down),
        )
    if why_no_vllm(place.device, quantise) is None:
        peers["vllm"] = (_vllm_gate, partial(_vllm, to=quantise))
    return peers


def routed_by_definition(one: Any, x: Tensor, weight_TK: Tensor, expert_TK: Tensor, to: str | None) -> Tensor:
    """Run routed experts, in the device's layout, as `ops.reference` and its like define it."""
    if to is None:
        return reference.moe_experts(x, weight_TK, expert_TK, one.gate_up, one.down)
    parts = (one.gate_up, one.gate_up_scale, one.down, one.down_scale)
    if to == "w4a16" and layout.interleaves(x.device):

        def run(expert: int, rows: Tensor) -> Tensor:
            gate_up, down = (whole_int4(parts[i][expert], parts[i + 1][expert]) for i in (0, 2))
            return reference.swiglu_mlp(rows, gate_up, down)

        return reference.weighted_sum(x, weight_TK, expert_TK, len(one.down), run)
    defined: Tensor = getattr(reference_quantised, f"moe_experts_{to}")(x, weight_TK, expert_TK, *parts)
    return defined


def whole_int4(words: Tensor, scale_OS: Tensor) -> Tensor:
    """The weight ``[O, I]`` that words as `layout.interleaved_int4` leaves them stand for."""
    groups = scale_OS.shape[-1]
    value = int4_values(words).unflatten(-1, (groups, -1, 8)).transpose(-1, -2).flatten(-2)
    return (value.to(scale_OS.dtype) * scale_OS.unsqueeze(-1)).flatten(-2)


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


def _grouped_mm(one: Any, x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor) -> Tensor:
    return grouped_mm(x_TH, weight_TK, expert_TK, one.gate_up, one.down)


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


def why_no_vllm(device: torch.device, quantise: str | None) -> str | None:
    """Say why vLLM's kernels are no peer here; None if they are."""
    if device.type != "cuda":
        return "its Triton kernels for experts run on CUDA alone"
    if quantise not in (None, "fp8"):
        return f"its {quantise} weights have a layout of their own"
    return None if find_spec("vllm") is not None else "it is not installed"


def _vllm(one: Any, x: Tensor, weight_TK: Tensor, expert_TK: Tensor, to: str | None) -> Tensor:
    """vLLM's Triton `fused_experts`, with its own alignment; its index type is int32."""
    config = None
    if to == "fp8":
        made = import_module(f"{VLLM_FILES}.config").fp8_w8a8_moe_quant_config
        config = made(w1_scale=one.gate_up_scale, w2_scale=one.down_scale, block_shape=[FP8_BLOCK, FP8_BLOCK])
    run = import_module(f"{VLLM_FILES}.fused_moe").fused_experts
    out: Tensor = run(x, one.gate_up, one.down, weight_TK, expert_TK.to(torch.int32), quant_config=config)
    return out


def _vllm_gate(
    x: Tensor, router: Tensor, bias: Tensor, K: int, groups: int, kept: int, normalise: bool, scaling: float
) -> Any:
    """vLLM's `grouped_topk` after a matmul in fp32; where it lies differs between versions."""
    for file in ("router.grouped_topk_router", "fused_moe"):
        try:
            choose = import_module(f"{VLLM_FILES}.{file}").grouped_topk
            break
        except (ImportError, AttributeError):
            continue
    else:
        raise NotImplementedError("this vLLM has no grouped_topk where it is looked for")
    logits = F.linear(x.float(), router)
    options = {"scoring_func": "sigmoid", "routed_scaling_factor": scaling, "e_score_correction_bias": bias}
    return choose(x, logits, K, normalise, groups, kept, **options)
