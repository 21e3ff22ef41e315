"""The lean engine: prefill, then decode over a static KV cache. For measuring, parity and one fast stream; no server.

Shapes: B rows, T prompt tokens (padded on the left), V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ascend.cache import StaticCache
from ascend.devices import get_device
from ascend.devices.base import WARM_UPS
from ascend.errors import UserError
from ascend.model import BailingMoeV2ForCausalLM, left_padding
from ascend.sampling import Sampling


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
) -> Tensor:
    """Continue each row of ``input_ids`` (int64 ``[B, T]``); returns int64 ``[B, T + new]``, prompts included.

    Prompts of different lengths are padded on the left, with zeros in ``attention_mask`` ``[B, T]`` there. Greedy
    unless ``temperature`` is above 0; then `ascend.sampling.Sampling` says what ``top_k``, ``top_p`` and ``seed`` do.
    A row that has produced one of ``stop_token_ids`` is filled up with that token, and generation ends early once all
    rows have; without stop tokens it always makes ``max_new_tokens``. ``on_token`` receives each step's new tokens,
    int64 ``[B]``, as they come. ``capture`` replays the decode step as a graph where the device has graphs. Raises
    `UserError` for arguments that make no sense.
    """
    _check(model, input_ids, max_new_tokens, stop_token_ids)
    if seed is None and temperature > 0 and model.parallel.tensor.size > 1:
        seed = model.parallel.agreed(int(torch.randint(2**31, (1,))))
    sampling = Sampling(temperature, top_k, top_p, seed)
    decoder = Decoder(model, input_ids, attention_mask, max_new_tokens, capture)
    generator = sampling.generator(input_ids.device)
    stop = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=input_ids.device)
    tokens = [input_ids]
    stopped_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for done in range(max_new_tokens):
        logits_BV = decoder.step(tokens[-1][:, 0]) if done else decoder.prefill()
        token_B = sampling.pick(logits_BV, generator)
        if len(stop):
            token_B = torch.where(stopped_B, tokens[-1][:, -1], token_B)
            stopped_B |= torch.isin(token_B, stop)
        tokens.append(token_B[:, None])
        if on_token is not None:
            on_token(token_B)
        if len(stop) and bool(stopped_B.all()):
            break
    return torch.cat(tokens, dim=1)


class Decoder:
    """One batch in flight: its prompts, its cache, and a step that reads and writes nothing but fixed tensors.

    With ``capture`` the step is recorded as a graph at the first prefill, where the device records graphs.
    """

    def __init__(
        self,
        model: BailingMoeV2ForCausalLM,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        capture: bool = False,
    ) -> None:
        (B, T), device = input_ids.shape, input_ids.device
        self.model, self.input_ids = model, input_ids
        self.start_B = torch.zeros(B, dtype=torch.int64, device=device)
        self.length: int | None = 0  # of all rows, on the host; None where rows are padded or a graph counts
        padding_B = None if attention_mask is None else left_padding(attention_mask, B, T, may_end_in_padding=False)
        if padding_B is not None:
            self.start_B, self.length = padding_B, None
        self.counts = {length: model.parallel.counts(B * length) for length in (T, 1)}
        depth, heads, head_dim = model.config.num_hidden_layers, model.model.kv_heads, model.config.head_dim
        slots = T + max_new_tokens
        if capture:  # runs the step a few times
            slots = max(slots, WARM_UPS + 1)
        self.cache = StaticCache(depth, B, heads, slots, head_dim, model.dtype, device)
        self.token_B = torch.zeros(B, dtype=torch.int64, device=device)
        self.replay = self._capture() if capture else None

    def restart(self, input_ids: Tensor) -> None:
        """Begin again with other prompts of the same shape, unpadded; the cache and a captured step stay."""
        self.input_ids, self.length = input_ids, 0
        self.start_B.zero_()
        self.cache.written_B.zero_()

    def prefill(self) -> Tensor:
        """Run the prompts; logits of the token after each, fp32 ``[B, V]``."""
        return self._forward(self.input_ids, self.length)

    def step(self, token_B: Tensor) -> Tensor:
        """Run one new token per row; logits of the token after it, fp32 ``[B, V]``: read them before the next step."""
        if self.replay is None:
            return self._forward(token_B[:, None], self.length)
        self.token_B.copy_(token_B)
        return self.replay()

    def _capture(self) -> Callable[[], Tensor]:
        # Before there is anything in the cache that the runs could spoil; prefill begins at slot 0 again.
        device = get_device(str(self.input_ids.device))
        replay = device.capture(lambda: self._forward(self.token_B[:, None], None))
        self.cache.written_B.zero_()
        return replay

    def _forward(self, token_BT: Tensor, length: int | None) -> Tensor:
        model, cache, (B, T) = self.model, self.cache, token_BT.shape
        cache.written_B += T
        slot_BT = (cache.written_B - T)[:, None] + torch.arange(T, device=token_BT.device)
        position_BT = (slot_BT - self.start_B[:, None]).clamp_(min=0)
        lengths = None
        if length is not None:
            self.length = length + T
            lengths = [self.length] * B
        step = model.model.step(position_BT, self.start_B, cache.written_B, cache, lengths, self.counts[T])
        hidden_BTH = model.model(model.model.word_embeddings(token_BT), step)
        return model.logits(hidden_BTH[:, -1])


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
