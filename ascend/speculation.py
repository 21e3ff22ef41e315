"""Speculative decoding, greedy: a chain of drafts, one pass that verifies it, and what agrees is kept.

A speculative step runs the newest token and k drafts of what follows it through the model at once. The drafts up to the
first that is not the model's own choice are kept, and the model's choice after them: 1 to k + 1 tokens, the very ones
of plain greedy decoding. Then the draft layers are given the true hidden states of these positions, whose last output
is the first new draft, and go on from their own output for the others. Everything that decides stays on the device, so
a step is one graph.

Shapes: B rows, J = k + 1 tokens of a verification, K drafts, T tokens, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ascend.cache import StaticCache
from ascend.errors import UserError
from ascend.generation import Decoder, positions
from ascend.model import BailingMoeV2ForCausalLM
from ascend.sampling import Sampling, new_state, random_bits

MOST_DRAFTS = 15  # a verification of 16 tokens; the peers measure up to 7


class Drafter(Protocol):
    """What drafts: ``layers`` layers with caches of their own, each of which takes (next token, hidden state) pairs.

    Layer 0 at slot t takes the model's state there and token t + 1 and drafts token t + 2; layer i the output of layer
    i - 1 at slot t and token t + 1 + i, and drafts token t + 2 + i. tapped: the layers of the model whose input streams
    `source` wants.
    """

    layers: int
    tapped: tuple[int, ...]

    def caches(self, batch: int, slots: int, dtype: torch.dtype, device: torch.device) -> list[StaticCache]:
        """Return a cache for each layer."""
        ...

    def source(self, hidden_BTH: Tensor, taps: list[Tensor]) -> Tensor:
        """Return what layer 0 takes for hidden states, from the model's after its final norm and the tapped streams."""
        ...

    def run(self, layer: int, token_BT: Tensor, hidden_BTH: Tensor, start_B: Tensor, cache: StaticCache) -> Tensor:
        """Run a layer on the slots before ``cache.written_B``; its output ``[B, T, H]``."""
        ...

    def choose(self, hidden_BH: Tensor) -> Tensor:
        """Return the likeliest token after an output, int64 ``[B]``."""
        ...


class MTPDrafter:
    """The model's own MTP layers. Raises `UserError` for a model that has none."""

    tapped: tuple[int, ...] = ()

    def __init__(self, model: BailingMoeV2ForCausalLM) -> None:
        self.model, self.layers = model, model.config.num_nextn_predict_layers
        if not self.layers:
            raise UserError("this model has no MTP layer to draft with: give a draft_head, or drafts=0")

    def caches(self, batch: int, slots: int, dtype: torch.dtype, device: torch.device) -> list[StaticCache]:
        """See `Drafter`."""
        config, heads = self.model.config, self.model.model.kv_heads
        shape = (batch, heads, slots, config.head_dim)
        return [_LayerCache(1, *shape, dtype, device) for _ in range(self.layers)]

    def source(self, hidden_BTH: Tensor, taps: list[Tensor]) -> Tensor:
        """See `Drafter`: the hidden states."""
        return hidden_BTH

    def run(self, layer: int, token_BT: Tensor, hidden_BTH: Tensor, start_B: Tensor, cache: StaticCache) -> Tensor:
        """See `Drafter`."""
        model = self.model.model
        position_BT = positions(cache.written_B, start_B, token_BT.shape[1])
        step = model.step(position_BT, start_B, cache.written_B, cache)
        mtp: Any = model.layers[self.model.config.num_hidden_layers + layer]
        out_BTH: Tensor = mtp.draft(model.word_embeddings(token_BT), hidden_BTH, step)
        return out_BTH

    def choose(self, hidden_BH: Tensor) -> Tensor:
        """See `Drafter`."""
        return self.model.logits(hidden_BH).argmax(-1)


class _LayerCache(StaticCache):
    """The cache of a single layer, whatever its number."""

    def buffers(self, layer: int, like_BTC: Tensor) -> tuple[Tensor, Tensor]:
        return super().buffers(0, like_BTC)


@dataclass(frozen=True)
class Acceptance:
    """How many tokens a speculative step keeps: those that agree, or ``forced`` ones, to measure with random weights.

    forced: tokens kept per step on average, the model's own included, from 1 to drafts + 1. Each row draws one of the
    two whole numbers around it, so that its expectation is exact (to 2**-32), from ``seed``; what is kept then has no
    meaning.
    """

    forced: float | None = None
    seed: int = 0

    def check(self, drafts: int) -> None:
        """Raise `UserError` if no step with so many drafts can keep as many tokens."""
        if self.forced is not None and not 1 <= self.forced <= drafts + 1:
            raise UserError(
                f"acceptance is {self.forced}, with {drafts} drafts a step keeps 1 to {drafts + 1} tokens; give that"
            )

    def of(self, draft_BK: Tensor, choice_BJ: Tensor, state: Tensor) -> Tensor:
        """Tokens to keep of each row, int64 ``[B]``: the drafts against the model's choices at the same places."""
        if self.forced is None:
            return 1 + (draft_BK == choice_BJ[:, :-1]).cumprod(1).sum(1)
        whole = int(self.forced)
        return whole + (random_bits(len(draft_BK), 1, state)[:, 0] < round((self.forced - whole) * 2**32)).long()


class SpeculativeDecoder(Decoder):
    """A `Decoder` whose step gains each row 1 to ``drafts`` + 1 tokens; rows get ahead of one another.

    What is over (a stop token, an answer of full length) gains nothing more. Greedy only: `UserError` for a temperature
    above 0, for 0 or too many drafts, and for data-parallel ranks with prompts of their own.
    """

    def __init__(
        self,
        model: BailingMoeV2ForCausalLM,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        capture: bool = False,
        *,
        drafts: int,
        drafter: Drafter | None = None,
        acceptance: Acceptance | None = None,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] = (),
        kv_dtype: str | None = None,
    ) -> None:
        if not 1 <= drafts <= MOST_DRAFTS:
            raise UserError(f"drafts is {drafts}, a speculative step takes 1 to {MOST_DRAFTS}")
        _check_greedy(sampling)
        if not model.parallel.replicated:
            raise UserError("data-parallel ranks take their steps together, drafts would part them; give drafts=0")
        self.drafts, self.acceptance = drafts, acceptance or Acceptance()
        self.acceptance.check(drafts)
        self.drafter: Drafter = drafter or MTPDrafter(model)
        self.layers = min(self.drafter.layers, drafts)
        self.most, self.overshoot, self.tapped = drafts + 1, drafts + self.layers, self.drafter.tapped
        options: dict[str, Any] = {"stop_token_ids": stop_token_ids, "kv_dtype": kv_dtype}
        super().__init__(model, input_ids, attention_mask, max_new_tokens, capture, **options)

    def _allocate(self, rows: int, slots: int, device: torch.device) -> None:
        super()._allocate(rows, slots, device)
        hidden = torch.zeros(rows, self.model.config.hidden_size, dtype=self.model.dtype, device=device)
        self.draft_caches = self.drafter.caches(rows, slots, self.kv_dtype, device)
        self.draft_BK = torch.zeros(rows, self.drafts, dtype=torch.int64, device=device)
        # Of each draft layer the output at its last true slot: the next layer, one slot behind, begins with it.
        self.carried = [torch.zeros_like(hidden) for _ in range(self.layers)]

    def restart(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """See `Decoder.restart`."""
        if input_ids.shape[1] < self.layers:
            raise UserError(f"{self.layers} draft layers need prompts of {self.layers} tokens or more; pad on the left")
        super().restart(input_ids, attention_mask)

    def prefill(self) -> Tensor:
        """Run the prompts, choose the first token and make the first drafts; logits of that token, fp32 ``[B, V]``."""
        taps: list[Tensor] = []
        hidden_BTH = self._hidden(self.input_ids, self.length, taps)
        logits_BV = self.model.logits(hidden_BTH[:, -1])
        self._choose(logits_BV)
        next_BT = torch.cat([self.input_ids[:, 1:], self.token_B[:, None]], dim=1)
        out_BTH = self.drafter.source(hidden_BTH, taps)
        T = next_BT.shape[1]
        for layer in range(self.layers):
            # Layer i has nothing to begin with yet: it begins at slot 0 with token i + 1.
            out_BTH = out_BTH[:, : T - layer]
            out_BTH = self._draft_layer(layer, next_BT[:, layer:], out_BTH, self.cache.written_B - layer)
            self.carried[layer].copy_(out_BTH[:, -1])
        self._draft()
        return logits_BV[: self.batch]

    def step(self, token_B: Tensor) -> Tensor:
        """Refused: the drafts follow the tokens that the decoder chose itself."""
        raise UserError("a speculative decoder takes no tokens: it runs its own; use run")

    def _advance(self, length: int | None) -> Tensor:
        taps: list[Tensor] = []
        slot_B = self.cache.written_B.clone()
        token_BJ = torch.cat([self.token_B[:, None], self.draft_BK], dim=1)
        hidden_BJH = self._hidden(token_BJ, None, taps)
        logits_BJV = self.model.logits(hidden_BJH)
        choice_BJ = logits_BJV.argmax(-1)
        kept_B = self.acceptance.of(self.draft_BK, choice_BJ, self.random)
        if self.captured:
            kept_B = kept_B[self.row_B]
        taken_B = self.answer.append(choice_BJ, kept_B)
        assert taken_B is not None, "offered by row, taken by row"
        last_B = (taken_B - 1).clamp(min=0)
        newest_B = choice_BJ.gather(1, last_B[:, None])[:, 0]
        self.token_B.copy_(torch.where(taken_B > 0, newest_B, self.token_B))
        self.cache.written_B.copy_(slot_B + taken_B)
        self._catch_up(choice_BJ, self.drafter.source(hidden_BJH, taps), slot_B, last_B)
        self._draft()
        return logits_BJV

    def verified(self, drafts: int) -> Tensor:
        """Run the newest tokens and some of their drafts, and forget it; for timing, as `drafted`."""
        token_BJ = torch.cat([self.token_B[:, None], self.draft_BK[:, :drafts]], dim=1)
        choice_BJ = self.model.logits(self._hidden(token_BJ, None, [])).argmax(-1)
        self.cache.written_B -= drafts + 1
        return choice_BJ

    def drafted(self) -> Tensor:
        """Run the last draft layer once."""
        hidden_B1H, written_B = self.carried[-1][:, None], self.cache.written_B + 1
        out_B1H = self._draft_layer(self.layers - 1, self.token_B[:, None], hidden_B1H, written_B)
        return self.drafter.choose(out_B1H[:, 0])

    def _catch_up(self, next_BJ: Tensor, hidden_BJH: Tensor, slot_B: Tensor, last_B: Tensor) -> None:
        """Give the draft layers what the model said of the slots from ``slot_B`` on; those after ``last_B`` are void.

        Layer i begins i slots earlier, which makes the tokens it takes the same for all: one that it had to take from
        a draft the last time, it takes again.
        """
        J, out_BJH, last = next_BJ.shape[1], hidden_BJH, last_B[:, None, None]
        carried = []
        for layer in range(self.layers):
            if layer:
                out_BJH = torch.cat([self.carried[layer - 1][:, None], out_BJH[:, :-1]], dim=1)
            out_BJH = self._draft_layer(layer, next_BJ, out_BJH, slot_B - layer + J)
            carried.append(out_BJH.gather(1, last.expand(-1, 1, out_BJH.shape[-1]))[:, 0])
        for kept_BH, new_BH in zip(self.carried, carried, strict=True):
            kept_BH.copy_(new_BH)

    def _draft(self) -> None:
        """Make the drafts that follow `token_B`: one by each layer, the rest by the last."""
        hidden_BH = self.carried[0]
        token_B = self.drafter.choose(hidden_BH)
        made = [token_B]
        for n in range(1, self.drafts):
            layer = min(n, self.layers - 1)
            written_B = self.cache.written_B + (n - layer)
            hidden_BH = self._draft_layer(layer, token_B[:, None], hidden_BH[:, None], written_B)[:, 0]
            token_B = self.drafter.choose(hidden_BH)
            made.append(token_B)
        self.draft_BK.copy_(torch.stack(made, dim=1))

    def _draft_layer(self, layer: int, token_BT: Tensor, hidden_BTH: Tensor, written_B: Tensor) -> Tensor:
        cache = self.draft_caches[layer]
        cache.written_B.copy_(written_B)
        return self.drafter.run(layer, token_BT, hidden_BTH, self.start_B, cache)

    def _reset(self) -> None:
        super()._reset()
        self.random.copy_(new_state(self.acceptance.seed, self.random.device))

    def _capture(self) -> Callable[[], Tensor]:
        # It steps before there is a prompt: layer i writes i slots earlier, and none may be before the first.
        self.cache.written_B.fill_(self.layers)
        return super()._capture()


def drafting_decoder(
    model: BailingMoeV2ForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    capture: bool,
    drafts: int | str,
    draft_head: Drafter | None = None,
    **options: Any,
) -> SpeculativeDecoder | None:
    """Make the decoder that `ascend.generate` asks for with ``drafts``; None if "auto" finds that none pay."""
    from ascend.draft_length import choose_drafts, measure_costs

    if drafts != "auto" and (not isinstance(drafts, int) or drafts < 0):
        raise UserError(f"drafts is {drafts!r}, it must be 0 to {MOST_DRAFTS} or 'auto'")
    batch = (model, input_ids, attention_mask)
    _check_greedy(options.get("sampling"))
    if draft_head is not None and not hasattr(draft_head, "tapped"):
        raise UserError(
            f"draft_head is a {type(draft_head).__name__}, expected what `ascend.eagle3.load_eagle3` returns"
        )
    drafter: Drafter = draft_head or MTPDrafter(model)
    if isinstance(drafts, str):
        costs = measure_costs(*batch, capture, drafter, kv_dtype=options.get("kv_dtype"))
        # Each rank has timed for itself; with other numbers of drafts they would wait for one another for ever.
        drafts = model.parallel.agreed(choose_drafts(costs))
        if not drafts:
            return None
    return SpeculativeDecoder(*batch, max_new_tokens, capture, drafts=drafts, drafter=drafter, **options)


def _check_greedy(sampling: Sampling | None) -> None:
    if sampling is not None and sampling.temperature:
        raise UserError(f"drafts go with greedy decoding alone, temperature is {sampling.temperature}; drop one")
