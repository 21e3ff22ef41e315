"""Two sides' tensors in, the numbers that `perf.parity.judge` judges out. All arithmetic in fp32 or better, on the CPU.

Shapes: N tokens (padding left out, row by row), H hidden_size, E experts, K experts per token, L layers with a router,
V vocabulary, R rows, D decode steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from perf.parity.judge import Comparison, LayerNumbers, LogitNumbers
from perf.parity.limits import Limits
from perf.parity.whole import differ, divergences, drift

# The router's scores are computed again here from its input, in another order of addition: fp32's rounding over some
# thousand terms, 2^-24 · sqrt(4096) of a logit of about ten, through a sigmoid whose slope is at most 1/4.
SCORE_ROUNDING = 1e-5

Tensors = Mapping[str, Tensor]


def compare(a: Tensors, b: Tensors, limits: Limits, n_group: int, topk_group: int) -> Comparison:
    """Compare two sides; ``limits.scores`` says how near a tie must be to explain a flip."""
    names = sorted({int(name.split(".")[1]) for name in a if name.startswith("layer.")})
    decoder_layers = sum(name.startswith("stream.") for name in a) - 1
    layers = []
    for index in names:
        name = f"layer {index}" if index < decoder_layers else f"MTP {index - decoder_layers}"
        one, other = (_under(side, f"layer.{index}.") for side in (a, b))
        layers.append(_layer(name, one, other, a["position"] == 0, limits, n_group, topk_group))
    flip_N, prefill_flip_N, flip_RD = (
        differ(a[name], b[name]).any(-1) for name in ("experts", "prefill.experts", "decode.experts")
    )
    clean_N = _before_flips(flip_N, a["row"])
    rows = a["decode.logits"].shape[0]
    flip_R = torch.stack([prefill_flip_N[a["row"] == row].any() for row in range(rows)])
    clean_RD = ~torch.cat([flip_R[:, None], flip_RD], dim=1).cummax(dim=1).values
    return Comparison(
        embedding=float((a["stream.0"].float() - b["stream.0"].float()).abs().max()),
        layers=layers,
        drift=drift(a, b, clean_N),
        divergences=divergences(a, b),
        head=_logits(a["head"], b["head"]),
        whole=_logits(a["logits"], b["logits"]),
        whole_clean=_logits(a["logits"][clean_N], b["logits"][clean_N]),
        decode=_logits(a["decode.logits"].flatten(0, 1), b["decode.logits"].flatten(0, 1)),
        decode_clean=_logits(a["decode.logits"][clean_RD], b["decode.logits"][clean_RD]),
        forced=_logits(a["logits"], b.get("forced.logits", b["logits"])),
        forced_decode=_logits(
            a["decode.logits"].flatten(0, 1), b.get("forced.decode.logits", b["decode.logits"]).flatten(0, 1)
        ),
    )


def follows(score_NE: Tensor, expert_NK: Tensor, n_group: int, topk_group: int, tolerance: float) -> Tensor:
    """Say per token, bool ``[N]``, whether group-limited routing may choose these experts.

    May: for some scores within ``tolerance`` of the given ones. A group's score is the sum of its two best, so two
    groups may each move by twice the tolerance against each other, two experts once each.
    """
    chosen_NE = torch.zeros_like(score_NE, dtype=torch.bool).scatter_(1, expert_NK, True)
    lowest_N1 = score_NE.masked_fill(~chosen_NE, torch.inf).amin(-1, keepdim=True)
    passed_over_NE = ~chosen_NE & (score_NE > lowest_N1 + 2 * tolerance)
    chosen_NGE, passed_over_NGE, score_NGE = (
        one.unflatten(-1, (n_group, -1)) for one in (chosen_NE, passed_over_NE, score_NE)
    )
    kept_NG = possible_NG = torch.ones_like(chosen_NGE[..., 0])
    if topk_group < n_group:
        group_NG = score_NGE.topk(min(2, score_NGE.shape[-1]), dim=-1).values.sum(-1)
        best = group_NG.topk(topk_group + 1, dim=-1).values
        possible_NG = group_NG >= best[:, -2, None] - 4 * tolerance
        kept_NG = chosen_NGE.any(-1) | (group_NG > best[:, -1, None] + 4 * tolerance)
    # As many groups must be there to keep as are kept, and of none of them a better expert may be passed over.
    keepable_NG = possible_NG & ~passed_over_NGE.any(-1)
    enough_N = (kept_NG.sum(-1) <= topk_group) & (keepable_NG.sum(-1) >= topk_group)
    return enough_N & (keepable_NG | ~kept_NG).all(-1) & score_NE.isfinite().all(-1)


def _under(side: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in side.items() if name.startswith(prefix)}


def _layer(
    name: str, a: Tensors, b: Tensors, first_N: Tensor, limits: Limits, n_group: int, topk_group: int
) -> LayerNumbers:
    mlp_a, mlp_b = _under(a, "mlp."), _under(b, "mlp.")
    same_N = same_mlp_N = torch.ones_like(first_N)
    routing: dict[str, float] = {}
    if "experts" in a:
        groups = (n_group, topk_group)
        same_N, same_mlp_N = ~differ(a["experts"], b["experts"]), ~differ(mlp_a["experts"], mlp_b["experts"])
        tie_N = follows(a["scores"], b["experts"], *groups, limits.scores)
        tie_mlp_N = follows(mlp_a["scores"], mlp_b["experts"], *groups, SCORE_ROUNDING)
        weight_a, weight_b = (
            one["weights"].gather(-1, one["experts"].argsort(-1))[same_mlp_N] for one in (mlp_a, mlp_b)
        )
        routing = {
            "router": _max((mlp_a["scores"] - mlp_b["scores"]).abs()),
            "scores": _max((a["scores"] - b["scores"]).abs()),
            "weights": _max((weight_a - weight_b).abs() / weight_a.abs()),
            "flips": int((~same_N).sum()),
            "unexplained": int(((~same_N & ~tie_N) | (~same_mlp_N & ~tie_mlp_N)).sum()),
            "misrouted": int((~follows(b["scores"], b["experts"], *groups, SCORE_ROUNDING)).sum()),
        }
    attention_N = _relative(a["attention"], b["attention"])
    return LayerNumbers(
        name,
        attention=_max(attention_N),
        attention_gain=_gain(a["attention"], b["attention"]),
        first=_max(attention_N[first_N]),
        first_gain=_gain(a["attention"][first_N], b["attention"][first_N]),
        norm=_max(_relative(a["mlp_input"], b["mlp_input"])),
        norm_gain=_gain(a["mlp_input"], b["mlp_input"]),
        mlp=_max(_relative(mlp_a["mlp"], mlp_b["mlp"])[same_mlp_N]),
        mlp_gain=_gain(mlp_a["mlp"][same_mlp_N], mlp_b["mlp"][same_mlp_N]),
        stream=_max(_relative(a["stream"], b["stream"])[same_N]),
        **routing,  # type: ignore[arg-type]
    )


def _relative(a_NH: Tensor, b_NH: Tensor) -> Tensor:
    """Largest |Δ| / (|a| + root mean square of the token), per token.

    Beside the root mean square, an element that is far larger than its token's others may round as coarsely as it is.
    """
    a, b = a_NH.double(), b_NH.double()
    scale = a.abs() + a.square().mean(-1, keepdim=True).sqrt()
    return ((a - b).abs() / scale.clamp(min=1e-30)).amax(-1)


def _gain(a_NH: Tensor, b_NH: Tensor) -> float:
    a, b = a_NH.double(), b_NH.double()
    return float(((b - a) * a).sum() / a.square().sum().clamp(min=1e-30))


def _max(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _before_flips(flip_N: Tensor, row_N: Tensor) -> Tensor:
    seen = torch.zeros_like(flip_N)
    for row in row_N.unique():
        seen[row_N == row] = flip_N[row_N == row].cummax(dim=0).values
    return ~seen


def _logits(a_NV: Tensor, b_NV: Tensor) -> LogitNumbers:
    if not len(a_NV):
        return LogitNumbers(0)
    delta, margin, kl, top1, top5 = [], [0.0], [], [], []
    for a, b in zip(a_NV, b_NV, strict=True):  # one position at a time: a vocabulary of 157 184 in fp64 is 1.3 MB
        a, b = a.double(), b.double()
        deviation = a.std()
        best_a, best_b = (one.topk(min(5, len(one))) for one in (a, b))
        delta.append((a - b).abs().max() / deviation)
        log_a = a.log_softmax(-1)
        kl.append((log_a.exp() * (log_a - b.log_softmax(-1))).sum())
        top1.append(float(best_a.indices[0] == best_b.indices[0]))
        top5.append(float(torch.isin(best_a.indices, best_b.indices).double().mean()))
        if not top1[-1]:
            margin.append(float((best_a.values[0] - a[best_b.indices[0]]) / deviation))
    kl_N = torch.stack(kl)
    return LogitNumbers(
        positions=len(a_NV),
        delta=float(torch.stack(delta).max()),
        kl_mean=float(kl_N.mean()),
        kl_max=float(kl_N.max()),
        top1=sum(top1) / len(top1),
        top5=sum(top5) / len(top5),
        margin=max(margin),
    )
