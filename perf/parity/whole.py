"""What two sides' own whole passes add up to: drift of the residual stream, routing agreement, greedy divergence.

Nothing of side a is given to side b here, so everything accumulates, and after another choice of experts the rest of a
row differs by more than rounding. All arithmetic in fp32 or better, on the CPU.

Shapes: N tokens, row by row, H hidden_size, L layers with a router, K experts per token, R rows, D decode steps, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from perf.parity.judge import Divergence, DriftNumbers

Tensors = Mapping[str, Tensor]


def differ(a: Tensor, b: Tensor) -> Tensor:
    """Where the set of experts differs: ``[…, K]`` to bool ``[…]``."""
    return (a.sort(-1).values != b.sort(-1).values).any(-1)


def drift(a: Tensors, b: Tensors, clean_N: Tensor) -> list[DriftNumbers]:
    """One entry per decoder layer: how far the streams after it are apart; ``clean_N`` before any flip of the row."""
    depth = sum(name.startswith("stream.") for name in a) - 1
    same_NL = ~differ(a["experts"], b["experts"])
    routers = [layer for layer in range(depth) if f"layer.{layer}.experts" in a]
    found = []
    for layer in range(depth):
        one_NH, other_NH = (side[f"stream.{layer + 1}"].double() for side in (a, b))
        same = float(same_NL[:, routers.index(layer)].double().mean()) if layer in routers else None
        found.append(
            DriftNumbers(
                f"layer {layer}",
                clean=distance(one_NH[clean_N], other_NH[clean_N]),
                everything=distance(one_NH, other_NH),
                worst=float((one_NH - other_NH).norm(dim=-1).div(one_NH.norm(dim=-1).clamp(min=1e-30)).max()),
                same_experts=same,
            )
        )
    return found


def distance(a_NH: Tensor, b_NH: Tensor) -> float:
    """Norm of the difference over the norm of a, of all tokens together."""
    return float((a_NH - b_NH).norm() / a_NH.norm().clamp(min=1e-30)) if len(a_NH) else 0.0


def divergences(a: Tensors, b: Tensors) -> list[Divergence]:
    """Return every position whose best token is another one on side b, with what may explain it."""
    rows = a["decode.logits"].shape[0]
    flip_NL, prefill_NL, flip_RDL = (
        differ(a[name], b[name]) for name in ("experts", "prefill.experts", "decode.experts")
    )
    found = []
    for row in range(rows):
        mine_N = a["row"] == row
        whole = (a["logits"][mine_N], b["logits"][mine_N])
        found += _diverged("whole pass", row, *whole, flip_NL[mine_N].any(-1))
        decoded = torch.cat([prefill_NL[mine_N].any()[None], flip_RDL[row].any(-1)])
        found += _diverged("decode", row, a["decode.logits"][row], b["decode.logits"][row], decoded)
    return found


def _diverged(where: str, row: int, a_TV: Tensor, b_TV: Tensor, flip_T: Tensor) -> list[Divergence]:
    best_a, best_b, after = a_TV.argmax(-1), b_TV.argmax(-1), flip_T.cummax(dim=0).values
    return [
        divergence(where, row, t, a_TV[t], b_TV[t], bool(after[t])) for t in (best_a != best_b).nonzero()[:, 0].tolist()
    ]


def divergence(where: str, row: int, position: int, a_V: Tensor, b_V: Tensor, after_flip: bool) -> Divergence:
    """Explain one position: a's lead of its own best token over b's, and how far those two logits moved."""
    a_V, b_V = a_V.double(), b_V.double()
    deviation, best_a, best_b = a_V.std(), int(a_V.argmax()), int(b_V.argmax())
    pair = torch.tensor([best_a, best_b])
    return Divergence(
        where,
        row,
        position,
        lead=float((a_V[best_a] - a_V[best_b]) / deviation),
        moved=float((a_V - b_V)[pair].abs().sum() / deviation),
        after_flip=after_flip,
    )
