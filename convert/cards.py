"""Which cards a checkpoint fits on: for each card of the table the fewest that hold it, from its bytes by class.

Light: no torch. The arithmetic of dividing is `ascend.cost`'s; no card has been asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from ascend.cost import ByPart, Sharding, kv_bytes_per_card, parameters, weight_bytes_per_card
from ascend.devices.facts import TABLE, DeviceFacts, GiB
from ascend.errors import UserError
from ascend.model_shape import ModelShape
from ascend.precision import Format, Precision
from ascend.roofline import USABLE_MEMORY

COUNTS = (1, 2, 4, 8, 16)  # of cards: what one or two servers hold
ACTIVATIONS = 2 * GiB  # an estimate: what activations, workspaces and graphs take of the engine's share
SEQUENCES, SEQUENCE_LENGTH = 8, 8192  # the other load that must fit, beside one sequence of the whole context
RESERVE_TEXT = (
    f"A card fits if {USABLE_MEMORY:.0%} of its memory hold weights, {ACTIVATIONS / GiB:g} GiB for activations and the "
    f"KV in BF16 of\none full context, or of {SEQUENCES} x {SEQUENCE_LENGTH} tokens. Computed from sizes, not tried on "
    "cards."
)


@dataclass(frozen=True)
class Fit:
    """What one kind of card needs to hold a checkpoint; bytes are those of one card.

    cards: the fewest that do, None if not even the most of `COUNTS`, or if ``why`` says what forbids it. weights and kv
    are then those of the last division tried, and short what is lacking there; 0 where nothing divides at all.
    """

    card: str
    memory: float
    cards: int | None
    division: str = ""
    weights: float = 0.0
    kv: float = 0.0
    short: float = 0.0
    why: str = ""

    @property
    def free(self) -> float:
        """Bytes of a card that are left once weights, KV and the reserve are in it."""
        return self.memory * USABLE_MEMORY - ACTIVATIONS - self.weights - self.kv


def fits(shape: ModelShape, bytes_by_part: Mapping[str, float] | ByPart, formats: set[str], context: int) -> list[Fit]:
    """Return a `Fit` for each card whose memory is known, in the order of the table.

    Args:
        shape: the model's sizes.
        bytes_by_part: bytes as stored by class of tensor (`convert.classes.CLASSES`), those of MTP layers among them.
        formats: of its weights, by the names of `ascend.stored`.
        context: tokens of the longest sequence.
    """
    nbytes = dict(vars(bytes_by_part) if isinstance(bytes_by_part, ByPart) else bytes_by_part)
    whole = sum(nbytes.pop(name, 0.0) for name in ("mtp", "other"))  # small, and on every card
    stored = as_precision(shape, nbytes)
    return [
        _fit(card, shape, stored, whole, formats, context) for card in TABLE.values() if card.memory.value is not None
    ]


def table(found: Sequence[Fit]) -> str:
    """Return the fits as lines of text; cards with the same answer share one."""
    rows: dict[tuple[object, ...], list[str]] = {}
    for fit in found:
        key = tuple(getattr(fit, field.name) for field in fields(fit) if field.name != "card")
        rows.setdefault(key, []).append(fit.card)
    by_card = {fit.card: fit for fit in found}
    lines = [
        f"{'card':<24}{'memory':>9}  {'fewest':<8}{'division':<12}{'weights':>10}{'KV':>10}{'left':>10}  GiB a card"
    ]
    for names in rows.values():
        fit = by_card[names[0]]
        start = f"{_names(names):<24}{fit.memory / GiB:>9.1f}  "
        if fit.why:
            lines.append(f"{start}no: {fit.why}")
        elif fit.cards is None:
            lines.append(f"{start}no: {_gib(fit.short)} GiB short on each of {COUNTS[-1]} ({fit.division})")
        else:
            amounts = "".join(f"{_gib(value):>10}" for value in (fit.weights, fit.kv, fit.free))
            lines.append(f"{start}{fit.cards:<8}{fit.division:<12}{amounts}")
    return "\n".join(lines)


def _fit(card: DeviceFacts, shape: ModelShape, stored: Precision, whole: float, formats: set[str], context: int) -> Fit:
    memory = card.memory.value or 0.0
    if any(name.startswith("fp8") for name in formats) and "fp8" not in card.peak:
        return Fit(card.name, memory, None, why="it has no FP8; convert to w8a8 first")
    fit = Fit(card.name, memory, None, why=f"the model does not divide into {', '.join(map(str, COUNTS))} cards")
    for cards in COUNTS:
        sharding = _division_over(shape, cards)
        if sharding is None:
            continue
        weights = weight_bytes_per_card(shape, stored, sharding) + whole
        kv = max(
            kv_bytes_per_card(shape, 1, context, sharding),
            kv_bytes_per_card(shape, SEQUENCES, min(SEQUENCE_LENGTH, context), sharding),
        )
        fit = Fit(card.name, memory, cards, _in_words(sharding), weights, kv)
        if fit.free >= 0:
            return fit
    return fit if fit.why else replace(fit, cards=None, short=-fit.free)


def _division_over(shape: ModelShape, cards: int) -> Sharding | None:
    """Divide over so many cards: as much tensor parallelism as goes, which takes least of each, and whole experts."""
    for tensor in (count for count in reversed(COUNTS) if count <= cards):
        for experts in (cards, 1):
            sharding = Sharding(tensor, experts, cards // tensor)
            try:
                sharding.check(shape)
            except UserError:
                continue
            return sharding
    return None


def as_precision(shape: ModelShape, nbytes: Mapping[str, float]) -> Precision:
    """Describe stored bytes in the terms of `ascend.cost`: bytes per weight of each kind.

    What the main model's weights share includes the MTP layers' bytes of that class. Attention and the plain MLPs are
    one kind, as are embedding, head and norms: where a checkpoint keeps only some of a kind at a higher precision, the
    average is taken.
    """
    counted = vars(parameters(shape))

    def bytes_per_weight(*names: str) -> Format:
        weights = sum(counted[name] for name in names)
        return Format(sum(nbytes.get(name, 0.0) for name in names) / weights if weights else 0.0, "bf16")

    return Precision(
        "stored",
        "as stored",
        experts=bytes_per_weight("routed_experts"),
        matmuls=bytes_per_weight("attention", "dense_mlp", "shared_experts"),
        plain=bytes_per_weight("embedding", "head", "norms"),
        router=bytes_per_weight("router"),
    )


def _in_words(sharding: Sharding) -> str:
    parts = (("TP", sharding.tensor), ("EP", sharding.experts), ("DP", sharding.data))
    return " ".join(f"{name}{count}" for name, count in parts if count > 1) or "whole"


def _names(names: Sequence[str]) -> str:
    """The names; of one family its name once: 910B1/2/3."""
    common = names[0][:4]  # "910B", "H200"
    if len(names) > 1 and all(name.startswith(common) for name in names):
        return common + "/".join(name[4:] for name in names)
    return ", ".join(names)


def _gib(value: float) -> str:
    return f"{value / GiB:,.1f}" if value >= GiB / 10 or not value else f"{value / GiB:.4f}"
