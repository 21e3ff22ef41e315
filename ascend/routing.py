"""How tokens spread over the routed experts: distinct experts per layer, and how unevenly they lie on the cards.

Three kinds of routing: uniform (a formula, the worst case), skewed by an assumption, and measured on a site's own text.
What has no formula is sampled, with a stated seed: a token takes K experts without replacement, with probabilities in
proportion to their popularity (the K largest of log popularity + Gumbel noise). Tokens are independent of one another;
those of one text share experts, so real steps read fewer still.

Letters: E experts, K experts per token, P patterns of popularity, S samples, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ascend.cost import distinct_experts
from ascend.errors import UserError

if TYPE_CHECKING:
    from ascend.cost import Model

TOKENS = 20_000  # sampled for one figure, which takes a quarter of a second
PIECE = 64  # samples that are drawn at once, and the fewest


@dataclass(frozen=True)
class Routing:
    """Uniform routing, and the interface of the others.

    grouped: whether a token's experts come from ``topk_group`` of the ``n_group`` groups, all equally likely. That
    keeps the expected number of distinct experts and makes cards more uneven. The architecture keeps the groups with
    the best two experts; with independent scores that is milder (one token, 8 cards: 3.0 instead of 3.5 of 8).
    """

    seed: int = 0
    grouped: bool = True

    @property
    def label(self) -> str:
        """What it is, for people."""
        return "uniform, the worst case: real routing is skewed, reads fewer experts, and may pass these limits"

    def distinct(self, config: Model, tokens: int) -> float:
        """Experts of one layer that ``tokens`` tokens are expected to hit."""
        return distinct_experts(config, tokens)

    def imbalance(self, config: Model, tokens: int, blocks: int) -> float:
        """Expected most distinct experts of a block over the mean, experts lying in order in ``blocks`` blocks."""
        if blocks == 1:
            return 1.0
        hit_SE = _hits(self, _numbers(config), tokens)
        per_block = hit_SE.reshape(len(hit_SE), blocks, -1).sum(2)
        return float(per_block.max(1).mean() / per_block.mean())

    def popularity(self, num_experts: int, samples: int, rng: Any) -> Any:
        """Log popularity ``[P, E]`` that the samples take in turn, P at most ``samples``."""
        import numpy as np

        return np.zeros((1, num_experts))


@dataclass(frozen=True)
class SkewedRouting(Routing):
    """Log popularity of the experts normally distributed with deviation ``sigma``; an assumption, not a measurement.

    sigma 1: the most popular of 256 experts has about 16 times the weight of the median one. Groups are left out.
    """

    sigma: float = 1.0
    grouped: bool = False

    @property
    def label(self) -> str:
        """What it is, for people."""
        return f"skewed, log popularity normal with sigma {self.sigma:g}, seed {self.seed}; assumed, not measured"

    def distinct(self, config: Model, tokens: int) -> float:
        """Sampled: the standard error is about 0.3 % at sigma 1 and below 1 % at sigma 2."""
        return float(_hits(self, _numbers(config), tokens).sum(1).mean())

    def popularity(self, num_experts: int, samples: int, rng: Any) -> Any:
        """Another one for each sample."""
        return self.sigma * rng.normal(size=(samples, num_experts))


@dataclass(frozen=True)
class MeasuredRouting(Routing):
    """Loads recorded on a running model (`ascend.expert_loads`): by layer, how many tokens chose each expert.

    Groups are left out: what they do to single experts is in the loads.
    """

    loads: tuple[tuple[float, ...], ...] = ()
    grouped: bool = False

    @classmethod
    def of(cls, loads: Mapping[int, Sequence[float]], top_k: int) -> MeasuredRouting:
        """From `ops.placement.read_loads`. Raises `UserError` where a layer's tokens chose fewer than top_k experts."""
        for layer, load in loads.items():
            if sum(count > 0 for count in load) < top_k:
                raise UserError(f"the loads of layer {layer} name fewer than {top_k} experts; record more text")
        if not loads:
            raise UserError("the file has loads of no layer; record them again")
        return cls(loads=tuple(tuple(load) for load in loads.values()))

    @property
    def label(self) -> str:
        """What it is, for people."""
        return f"as recorded in {len(self.loads)} layers"

    def distinct(self, config: Model, tokens: int) -> float:
        """``Σ_e 1 - (1 - p_e)^tokens``, the mean of the layers; p_e = K · e's share of the load, 1 at most."""
        K = config.num_experts_per_tok
        hit = [1 - (1 - min(1.0, K * one / sum(load))) ** tokens for load in self.loads for one in load]
        return sum(hit) / len(self.loads)

    def popularity(self, num_experts: int, samples: int, rng: Any) -> Any:
        """One pattern for each layer."""
        import numpy as np

        with np.errstate(divide="ignore"):
            return np.log(np.array(self.loads))


def _numbers(config: Model) -> tuple[int, int, int, int]:
    return config.num_experts, config.num_experts_per_tok, config.n_group, config.topk_group


@lru_cache(maxsize=32)
def _hits(routing: Routing, numbers: tuple[int, int, int, int], tokens: int) -> Any:
    """Which experts steps of ``tokens`` tokens hit: bool ``[S, E]``. Raises `UserError` where numpy is missing."""
    try:
        import numpy as np
    except ImportError:
        raise UserError("numpy is not installed: pip install numpy, or take .venv/bin/python") from None

    E, K, n_group, topk_group = numbers
    samples = max(1, TOKENS // tokens // PIECE) * PIECE
    rng = np.random.default_rng(routing.seed)
    popularity_PE = routing.popularity(E, samples, rng)
    hit_SE = np.zeros((samples, E), bool)
    for first in range(0, samples, PIECE):  # in pieces, for the memory's sake
        pattern_S = np.arange(first, first + PIECE) % len(popularity_PE)
        key_STE = popularity_PE[pattern_S, None] + rng.gumbel(size=(PIECE, tokens, E))
        if routing.grouped and topk_group < n_group:
            kept_STG = rng.random((PIECE, tokens, n_group)).argsort(-1) < topk_group
            key_STE[~kept_STG.repeat(E // n_group, -1)] = -np.inf
        chosen = np.argpartition(-key_STE, K - 1, -1)[..., :K].reshape(PIECE, -1)
        np.put_along_axis(hit_SE[first : first + PIECE], chosen, True, 1)
    return hit_SE
