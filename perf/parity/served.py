"""A recorded side against a server: its log-probabilities against side a's logits, position by position.

A position's distance is the root mean square difference of the log-probabilities of the server's best tokens, in
standard deviations of side a's logits. Its yardstick is how far side a's twins (`perf.parity.twin`) are from itself.
The two are compared by the quantiles of their distributions over the positions, so that it does not matter which
position another choice of experts has moved. Where side a's router is nowhere near a tie, as in fp32, only positions
before any near-tie of their row count.

Shapes: N positions, row by row, R rows, D decode steps, V vocabulary, K tokens that a server names, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ascend.errors import UserError
from perf.parity.endpoint import Answer, Logprobs, Server
from perf.parity.judge import Divergence
from perf.parity.judge_served import QuantileNumbers, ServedNumbers
from perf.parity.limits import Limits
from perf.parity.twin import TOP, distance

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
ENOUGH = 300  # positions; the limits rest on 9 rows of 48, and 128 positions were seen to be too few

Tensors = Mapping[str, Tensor]


def check_record(a: Tensors) -> None:
    """Refuse a record that no server can be judged by, with a `UserError`."""
    if "twins" not in a:
        raise UserError("the file was recorded with --like, as a side b: give the one of side a")
    if len(a["row"]) < ENOUGH:
        raise UserError(f"{len(a['row'])} tokens are too few to judge a server by: record at least {ENOUGH} (--rows)")


def ask(server: Server, a: Tensors, steps: int) -> list[Answer]:
    """Have the server compute all of side a's rows, and ``steps`` decode steps after each."""
    rows = range(a["decode.logits"].shape[0])
    return [server.answer(a["token"][a["row"] == row].tolist(), steps + 1) for row in rows]


def compare_served(
    a: Tensors, answers: Sequence[Answer], limits: Limits, n_group: int, topk_group: int
) -> ServedNumbers:
    """Compare side a with what a server answered to its rows, in their order. Raises `UserError` if they do not fit."""
    made = _Positions()
    steady_N = ~near_ties(a, n_group, topk_group, limits.scores)
    steady = []
    for row, answer in enumerate(answers):
        mine = (a["row"] == row).nonzero()[:, 0]
        tokens, logits_TV = a["token"][mine], a["logits"][mine]
        after_T = ~steady_N[mine].cummin(dim=0).values
        for t, named in enumerate([*answer.prompt, answer.decoded[0]]):
            given = int(tokens[t + 1]) if t + 1 < len(tokens) else None
            made.add("prompt", row, t, logits_TV[t], named, given, bool(after_T[t]))
        steady.append(~after_T)
        decoded_DV = a["decode.logits"][row]
        for step, named in enumerate(answer.decoded[: len(decoded_DV)]):
            if step and answer.tokens[step - 1] != int(a["decode.tokens"][row, step - 1]):
                break  # from here on the server goes on from another token
            made.add("decode", row, step, decoded_DV[step], named, None, bool(after_T[-1]))
    settled_N = torch.cat(steady)
    judged_N = settled_N if int(settled_N.sum()) >= ENOUGH / 2 else torch.ones_like(settled_N)
    near, far = (one.double()[judged_N].flatten() for one in (torch.tensor(made.prompt), a["twins"]))
    return made.numbers(near, far, torch.tensor(made.prompt).double()[settled_N])


class _Positions:
    """What is gathered, position by position."""

    def __init__(self) -> None:
        self.prompt: list[float] = []
        self.begin: list[float] = []
        self.decode: list[float] = []
        self.kl: list[float] = []
        self.given: list[float] = []
        self.top1: list[bool] = []
        self.top5: list[float] = []
        self.diverged: list[Divergence] = []

    def add(
        self, where: str, row: int, position: int, a_V: Tensor, named: Logprobs, given: int | None, after: bool
    ) -> None:
        """Compare one position."""
        if not named or max(named) >= len(a_V) or min(named) < 0 or (given is not None and given not in named):
            raise UserError("the server answers for other tokens than the record's: it serves another model")
        best = sorted(named, key=lambda token: -named[token])[:TOP]
        log_a, deviation = a_V.double().log_softmax(-1), float(a_V.double().std())
        b_K = torch.tensor([named[token] for token in best], dtype=torch.float64)
        far = distance(a_V, torch.tensor(best), b_K)
        top = int(log_a.argmax())
        lead = float(log_a[top] - log_a[best[0]]) / deviation
        if lead > 0:
            moved = None
            if top in named:
                moved = sum(abs(float(log_a[token]) - named[token]) for token in (top, best[0])) / deviation
            self.diverged.append(Divergence(where, row, position, lead, moved, after))
        if where == "decode":
            self.decode.append(far)
            return
        self.prompt.append(far)
        if position == 0:
            self.begin.append(far)
        self.kl.append(_coarse_kl(log_a[best], b_K))
        self.top1.append(lead <= 0)
        fives = min(5, len(best))
        self.top5.append(len({*log_a.topk(fives).indices.tolist()} & {*best[:fives]}) / fives)
        if given is not None:
            self.given.append(abs(float(log_a[given]) - named[given]))

    def numbers(self, near: Tensor, far: Tensor, settled: Tensor) -> ServedNumbers:
        """Sum it up; ``near`` are the server's judged distances, ``far`` those of side a's twins."""
        shares = torch.tensor(QUANTILES, dtype=torch.float64)
        rows = zip(QUANTILES, near.quantile(shares).tolist(), far.quantile(shares).tolist(), strict=True)
        given = torch.tensor(self.given, dtype=torch.float64)
        return ServedNumbers(
            positions=len(self.prompt),
            settled=len(settled),
            settled_max=float(settled.max()) if len(settled) else 0.0,
            judged=len(near),
            quantiles=[QuantileNumbers(*row) for row in rows],
            begin_median=float(torch.tensor(self.begin, dtype=torch.float64).median()),
            decode_positions=len(self.decode),
            decode_median=float(torch.tensor(self.decode, dtype=torch.float64).median()) if self.decode else 0.0,
            given_median=float(given.median()),
            given_max=float(given.max()),
            kl_mean=sum(self.kl) / len(self.kl),
            top1=sum(self.top1) / len(self.top1),
            top5=sum(self.top5) / len(self.top5),
            divergences=self.diverged,
        )


def near_ties(side: Tensors, n_group: int, topk_group: int, tolerance: float) -> Tensor:
    """Say per token, bool ``[N]``, whether scores that differ by ``tolerance`` could choose other experts anywhere."""
    near_N = torch.zeros_like(side["row"], dtype=torch.bool)
    depth = sum(name.startswith("stream.") for name in side) - 1
    for layer in range(depth):
        if f"layer.{layer}.scores" not in side:
            continue
        score_NE, expert_NK = side[f"layer.{layer}.scores"], side[f"layer.{layer}.experts"]
        chosen_NE = torch.zeros_like(score_NE, dtype=torch.bool).scatter_(1, expert_NK, True)
        score_NGE = score_NE.unflatten(-1, (n_group, -1))
        if topk_group < n_group:
            group_NG = score_NGE.topk(min(2, score_NGE.shape[-1]), dim=-1).values.sum(-1)
            best = group_NG.topk(topk_group + 1, dim=-1).values
            near_N |= best[:, -2] - best[:, -1] <= 4 * tolerance
            kept_NG1 = (group_NG >= best[:, -2, None]).unsqueeze(-1)
            score_NGE = score_NGE.masked_fill(~kept_NG1, -torch.inf)
        passed_over_N = score_NGE.flatten(1).masked_fill(chosen_NE, -torch.inf).amax(-1)
        near_N |= score_NE.masked_fill(~chosen_NE, torch.inf).amin(-1) - passed_over_N <= 2 * tolerance
    return near_N


def _coarse_kl(log_a_K: Tensor, log_b_K: Tensor) -> float:
    """KL(a‖b) of the server's tokens and of all others as one: never more than over the whole vocabulary."""
    rest_a, rest_b = ((1 - one.exp().sum()).clamp(min=1e-12) for one in (log_a_K, log_b_K))
    return float((log_a_K.exp() * (log_a_K - log_b_K)).sum() + rest_a * (rest_a / rest_b).log())
