"""Whether drafts pay on a card, by the roofline.

They do where a step waits for weights to be read anyway: with many sequences all experts are read, and a draft costs
little more than its computing; with few, each draft reads experts of its own. H hidden_size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ascend.cost import Sharding
from ascend.model_shape import ModelShape
from ascend.precision import PRECISIONS
from ascend.roofline import TYPICAL_ACCEPTANCE, Chip, decode_step, tokens_per_step
from serve.planning.drafter import Drafter
from serve.planning.limits import CONTEXT, Steps


@dataclass(frozen=True)
class Gain:
    """Tokens a second at the limit with drafts against without, for one sequence and for all; and those of all."""

    single: float
    full: float
    tokens_per_second: float


def gain(
    drafter: Drafter, shape: ModelShape, precision: str, chip: Chip, sharding: Sharding, sequences: int, kv_bytes: float
) -> Gain | None:
    """Return what drafts gain; None for those found in the text, of which nobody knows how often they are right.

    That a draft is right if those before it are is taken for `ascend.roofline.TYPICAL_ACCEPTANCE`, which fits EAGLE3
    heads of Ling-flash-2.0; for MTP layers of this family nothing is published, and the same is assumed.
    """
    if drafter.method not in ("mtp", "eagle3"):
        return None
    single, _ = _gain(drafter, shape, precision, chip, sharding, 1, kv_bytes)
    return Gain(single, *_gain(drafter, shape, precision, chip, sharding, sequences, kv_bytes))


def _gain(
    drafter: Drafter, shape: ModelShape, precision: str, chip: Chip, sharding: Sharding, batch: int, kv_bytes: float
) -> tuple[float, float]:
    def seconds(model: ModelShape, drafts: int = 0) -> float:
        limit = decode_step(
            model, PRECISIONS[precision], batch, CONTEXT, chip, sharding, kv_bytes, Steps(), drafts=drafts
        )
        return limit.seconds

    if drafter.method == "mtp":  # a layer with experts and the head; all of them are read for all of the cards' tokens
        draft = seconds(replace(shape, num_hidden_layers=1, first_k_dense_replace=0))
        draft += 2 * shape.hidden_size**2 * 2 / chip.bandwidth
    else:
        read = drafter.divided / sharding.tensor + drafter.whole
        draft = max(read / chip.bandwidth, read * batch / sharding.data / chip.peak["bf16"])
    gained, step = tokens_per_step(drafter.tokens, TYPICAL_ACCEPTANCE), seconds(shape)
    with_drafts = seconds(shape, drafter.tokens) + drafter.tokens * draft
    return gained * step / with_drafts, batch * gained / with_drafts
