"""The lean engine: prefill, then decode over a static KV cache. For measuring, parity and one fast stream; no server.

A decode step, the choice of the next token included, reads and writes nothing but tensors that stay where they are: on
devices with graphs it is one graph, replayed once per token with nothing on the host in between. `ascend.speculation`
does the same with drafts.

Shapes: B rows, T prompt tokens (padded on the left), J tokens offered at once, N new tokens at most, V vocabulary.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ascend.answer import Answer
from ascend.cache import StaticCache
from ascend.devices import get_device
from ascend.devices.base import WARM_UPS
from ascend.errors import UserError, suggest
from ascend.model import BailingMoeV2ForCausalLM, left_padding
from ascend.sampling import Sampling, new_state
from ops.quantise import FP8

if TYPE_CHECKING:
    from ascend.eagle3 import Eagle3Head

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
KV_DTYPES = {"fp8": FP8}


@torch.inference_mode()
def generate(
    model: BailingMoeV2ForCausalLM,
    input_ids: Tensor,
    max_new_tokens: int = 32,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_token_ids: Sequence[int] = (),
    on_token: Callable[[Tensor], None] | None = None,
    capture: bool = False,
    kv_dtype: str | None = None,
    drafts: int | str = 0,
    draft_head: Eagle3Head | None = None,
) -> Tensor:
    """Continue each row of ``input_ids`` (int64 ``[B, T]``); returns int64 ``[B, T + new]``, prompts included.

    Prompts of different lengths are padded on the left, with zeros in ``attention_mask`` ``[B, T]`` there. Greedy
    unless ``temperature`` is above 0; then `ascend.sampling.Sampling` says what ``top_k``, ``top_p`` and ``seed`` do.
    A row that has produced one of ``stop_token_ids`` is filled up with that token, and generation ends early once all
    rows have; without stop tokens it always makes ``max_new_tokens``. ``on_token`` receives each step's new tokens,
    int64 ``[B]``, as they come. ``capture`` replays the decode step as a graph where the device has graphs.
    ``kv_dtype`` "fp8" halves the key/value cache. ``drafts`` tokens are drafted before each step and verified in it,
    greedy only and with the same result, by ``draft_head`` or else the model's MTP layers; "auto" measures how many
    pay at this batch, see `ascend.speculation`. Raises `UserError` for arguments that make no sense.
    """
    _check(model, input_ids, max_new_tokens, stop_token_ids)
    sampling = Sampling(temperature, top_k, top_p, seed)
    batch = (model, input_ids, attention_mask, max_new_tokens, capture)
    options: dict[str, Any] = {"sampling": sampling, "stop_token_ids": stop_token_ids, "kv_dtype": kv_dtype}
    decoder: Decoder | None = None
    if draft_head is not None and drafts == 0:
        raise UserError("a draft_head drafts nothing with drafts=0; give drafts, a number or 'auto'")
    if drafts != 0:
        from ascend.speculation import drafting_decoder

        decoder = drafting_decoder(*batch, drafts, draft_head, **options)
    decoder = decoder or Decoder(*batch, **options)
    return torch.cat([input_ids, decoder.generate(on_token)], dim=1)


def bucket(batch: int) -> int:
    """How many rows a captured decoder has for so many prompts: a power of two up to 128, then whole 128s."""
    return next((rows for rows in BUCKETS if rows >= batch), -(-batch // BUCKETS[-1]) * BUCKETS[-1])


class Decoder:
    """One batch in flight: its prompts, its cache, its answer, and a step that touches nothing but fixed tensors.

    With ``capture`` the step is recorded as a graph, where the device records graphs, and the batch is filled up to a
    `bucket`: `restart` then takes other prompts, fewer or longer ones too. What fills it up are copies of the last row:
    they choose that row's experts, so at small batches, where reading experts is what a step costs, they cost little;
    their prefill and attention are paid in full.
    """

    most = 1  # tokens that a row gains in a step, at most
    overshoot = 0  # slots that a step may write beyond the tokens it keeps
    tapped: tuple[int, ...] = ()  # layers whose input is wanted beside the hidden states

    def __init__(
        self,
        model: BailingMoeV2ForCausalLM,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        capture: bool = False,
        *,
        sampling: Sampling | None = None,
        stop_token_ids: Sequence[int] = (),
        kv_dtype: str | None = None,
    ) -> None:
        (B, T), device = input_ids.shape, input_ids.device
        rows = bucket(B) if capture else B
        slots = T + max_new_tokens + self.overshoot
        if capture:  # runs the step a few times
            slots = max(slots, self.overshoot + (WARM_UPS + 1) * self.most)
        self.model, self.sampling, self.captured = model, sampling or Sampling(), capture
        self.kv_dtype = model.dtype if kv_dtype is None else _kv_dtype(kv_dtype)
        self.answer = Answer(rows, max_new_tokens, stop_token_ids, device)
        self.token_B = torch.zeros(rows, dtype=torch.int64, device=device)  # the newest of each row, not yet run
        self.start_B, self.row_B = torch.zeros_like(self.token_B), torch.zeros_like(self.token_B)
        self.random = torch.zeros(1, dtype=torch.int64, device=device)
        self._allocate(rows, slots, device)
        self.restart(input_ids, attention_mask)
        self.replay = self._capture() if capture else None

    def _allocate(self, rows: int, slots: int, device: torch.device) -> None:
        config, heads = self.model.config, self.model.model.kv_heads
        shape = (config.num_hidden_layers, rows, heads, slots, config.head_dim)
        self.cache = StaticCache(*shape, self.kv_dtype, device)

    def restart(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Begin again with other prompts, ``[B, T]``; the cache and a captured step stay.

        Raises `UserError` for more rows or longer prompts than this decoder was made for.
        """
        (batch, T), rows = input_ids.shape, len(self.token_B)
        fits = self.cache.slots - self.answer.longest - self.overshoot
        if batch > rows or fits < T or (batch < rows and not self.captured):
            raise UserError(f"prompts of shape [{batch}, {T}] do not fit a decoder made for [{rows}, {fits}]")
        self.batch = batch
        self.row_B.copy_(torch.arange(rows, device=input_ids.device).clamp_(max=batch - 1))
        padding_B = None
        if attention_mask is not None:
            padding_B = left_padding(attention_mask, batch, T, may_end_in_padding=False)
        self.input_ids = input_ids if batch == rows else input_ids[self.row_B]
        # Filled slots of all rows, on the host; None where rows are padded or a graph counts.
        self.length: int | None = 0 if padding_B is None else None
        self.start_B.zero_()
        if padding_B is not None:
            self.start_B.copy_(padding_B[self.row_B])
        self.counts = {length: self.model.parallel.counts(rows * length) for length in (T, 1)}
        self._reset()

    def prefill(self) -> Tensor:
        """Run the prompts and choose the first token; logits of it, fp32 ``[B, V]``."""
        logits_BV = self._forward(self.input_ids, self.length)
        self._choose(logits_BV)
        return logits_BV[: self.batch]

    def step(self, token_B: Tensor) -> Tensor:
        """Run one given token per row; logits of the next, fp32 ``[B, V]``: read them before another step."""
        self.token_B.copy_(token_B if self.batch == len(self.token_B) else token_B[self.row_B])
        return self._next()[: self.batch]

    def run(self, steps: int) -> None:
        """Take so many steps, each with the token that the one before chose; the host waits for none of them."""
        for _ in range(steps):
            self._next()

    def generate(self, on_token: Callable[[Tensor], None] | None = None) -> Tensor:
        """Run the prompts and the whole answer, int64 ``[B, new]``, filled up where a row stopped; see `generate`.

        The host looks at what there is only where it must: for ``on_token``, for stop tokens, and with drafts, at
        times when the answer may be whole.
        """
        answer, told = self.answer, 0
        if not answer.longest:
            return self.input_ids[: self.batch, :0]
        watched = on_token is not None or answer.stop is not None
        self.prefill()
        left = answer.longest - 1
        while True:
            if watched or self.most > 1:
                left = answer.left()
            if on_token is not None:
                ready = answer.tokens(answer.longest - left if left else answer.length())[: self.batch]
                for column in range(told, ready.shape[1]):
                    on_token(ready[:, column])
                told = ready.shape[1]
            if not left:
                length = answer.longest if answer.stop is None else answer.length()
                return answer.tokens(length)[: self.batch]
            steps = 1 if watched else -(-left // self.most)
            self.run(steps)
            left = max(0, left - steps)

    def _next(self) -> Tensor:
        return self._advance(self.length) if self.replay is None else self.replay()

    def _advance(self, length: int | None) -> Tensor:
        logits_BV = self._forward(self.token_B[:, None], length)
        self._choose(logits_BV)
        return logits_BV

    def _choose(self, logits_BV: Tensor) -> None:
        token_B = self.sampling.pick(logits_BV, self.random)
        if self.captured:
            token_B = token_B[self.row_B]  # a copy goes on as its row does, whatever it drew
        taken_B = self.answer.append(token_B[:, None])
        self.token_B.copy_(token_B if taken_B is None else torch.where(taken_B > 0, token_B, self.token_B))

    def _capture(self) -> Callable[[], Tensor]:
        # Before there is anything in the cache that the runs could spoil; prefill begins at slot 0 again.
        device = get_device(str(self.input_ids.device))
        replay = device.capture(lambda: self._advance(None))
        self._reset()
        return replay

    def _reset(self) -> None:
        self.cache.written_B.zero_()
        self.answer.clear()
        if self.sampling.temperature:
            parallel, seed = self.model.parallel, self.sampling.seed
            if seed is None:
                seed = secrets.randbits(31)
                seed = parallel.agreed(seed) if parallel.tensor.size > 1 else seed
            self.random.copy_(new_state(seed, self.random.device))

    def _forward(self, token_BT: Tensor, length: int | None) -> Tensor:
        return self.model.logits(self._hidden(token_BT, length)[:, -1])

    def _hidden(self, token_BT: Tensor, length: int | None, taps: list[Tensor] | None = None) -> Tensor:
        """Hidden states ``[B, T, H]`` of new tokens, whose keys and values go behind those in the cache.

        ``taps`` collects the residual streams before the `tapped` layers.
        """
        model, cache, (B, T) = self.model, self.cache, token_BT.shape
        cache.written_B += T
        lengths = None
        if length is not None:
            self.length = length + T
            lengths = [self.length] * B
        position_BT = positions(cache.written_B, self.start_B, T)
        counts = self.counts.get(T)
        step = model.model.step(position_BT, self.start_B, cache.written_B, cache, lengths, counts)
        return model.model(model.model.word_embeddings(token_BT), step, taps, self.tapped)


def positions(written_B: Tensor, start_B: Tensor, T: int) -> Tensor:
    """Positions, int64 ``[B, T]``, of the last T tokens of rows with so many filled slots, counted from ``start_B``."""
    slot_BT = (written_B - T)[:, None] + torch.arange(T, device=written_B.device)
    return (slot_BT - start_B[:, None]).clamp_(min=0)


def _kv_dtype(name: str) -> torch.dtype:
    if name not in KV_DTYPES:
        raise UserError(f"kv_dtype is {name!r}, it must be {' or '.join(KV_DTYPES)}{suggest(str(name), KV_DTYPES)}")
    return KV_DTYPES[name]


def _check(
    model: BailingMoeV2ForCausalLM, input_ids: Tensor, max_new_tokens: int, stop_token_ids: Sequence[int]
) -> None:
    vocab_size = model.config.vocab_size
    if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
        raise UserError(
            f"input_ids is {input_ids.dtype} {list(input_ids.shape)}, expected int64 [batch, prompt length]"
        )
    if int(input_ids.min()) < 0 or int(input_ids.max()) >= vocab_size:
        raise UserError(f"input_ids holds a token outside the vocabulary of {vocab_size}")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}, it cannot be negative")
    if not model.parallel.replicated:
        # Ranks with tokens of their own meet in every MoE layer: all must take as many steps.
        if stop_token_ids:
            raise UserError("stop_token_ids would have data-parallel ranks end at different steps; leave them out")
        if len(set(map(tuple, model.parallel.world.all_gather_ints([max_new_tokens])))) > 1:
            raise UserError("max_new_tokens differs between data-parallel ranks; they take their steps together")
    if any(not 0 <= token < vocab_size for token in stop_token_ids):
        raise UserError(f"stop_token_ids {list(stop_token_ids)} holds a token outside the vocabulary of {vocab_size}")
    rope = model.model.rope
    reach = max(model.config.max_position_embeddings, int((rope.factor or 0) * rope.original_max_position))
    length = input_ids.shape[1] + max_new_tokens
    if length > reach:
        warnings.warn(
            f"{length} tokens, prompt and answer, go beyond the {reach} positions that this model knows; "
            "a YaRN rope_scaling in config.json extends them",
            stacklevel=4,  # the caller of `generate`, past torch's decorator
        )
