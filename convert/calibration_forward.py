"""The model run on some texts layer by layer, straight from a checkpoint that need not fit in memory.

The layers are those of `ascend.model`, in fp32. Three of their modules are wrapped, so that at any time the memory
holds the tokens' hidden states, one layer's attention, router and shared experts, and as many routed experts as there
are threads: attention goes text by text, MLPs that see all tokens take some at a time, routed experts are read one by
one. Work is divided among threads, each with operations of one thread, and put together in order: the same bits on any
number of cores.

Shapes: T tokens of all texts, H hidden_size, K experts per token, N tokens of one expert, I intermediate width.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from ascend.cache import TransientCache
from ascend.model import BailingMoeV2ForCausalLM, MoE, Step
from ascend.pieces import module_pieces
from ascend.stored import StoredWeight
from convert.rounding import check_beside, check_finite, decoded, steps
from convert.source import Reader

TOKENS_AT_ONCE = 1024  # through an MLP: of a dense layer 9216 wide, 75 MB
A = TypeVar("A")
B = TypeVar("B")


class Threads:
    """Threads to divide work among; a context manager, in which a torch operation takes one."""

    def __init__(self) -> None:
        self.count = len(os.sched_getaffinity(0))
        self.before = torch.get_num_threads()

    def __enter__(self) -> Threads:
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.before)

    def map(self, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
        """Yield what the function gives for each item, in order, and run ahead by no more than the threads."""
        waiting: deque[Future[B]] = deque()
        for item in items:
            waiting.append(self.pool.submit(function, item))
            if len(waiting) > self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@dataclass(frozen=True)
class Chosen:
    """What the router said: which tokens an expert sees and how each counts, for the experts that see any."""

    token_N: dict[int, Tensor]
    weight_N: dict[int, Tensor]

    @classmethod
    def of(cls, weight_TK: Tensor, expert_TK: Tensor) -> Chosen:
        """Sort the tokens by expert."""
        expert_A, order_A = expert_TK.flatten().sort(stable=True)
        experts, counts = expert_A.unique_consecutive(return_counts=True)
        token, weight = order_A // expert_TK.shape[1], weight_TK.flatten()[order_A]
        names, sizes = experts.tolist(), counts.tolist()
        return cls(
            dict(zip(names, token.split(sizes), strict=True)), dict(zip(names, weight.split(sizes), strict=True))
        )


class Observer(Generic[A]):
    """Who looks on; this one looks away."""

    def layer(self, layer: int, x_TH: Tensor, chosen: Chosen) -> None:
        """Look at what a layer's experts are about to see."""

    def expert(self, layer: int, expert: int, inner_NI: Tensor, down_HI: Tensor) -> A | None:
        """Look at one expert: what its down_proj sees, and its weight; called from any thread."""
        return None

    def seen(self, layer: int, expert: int, seen: A) -> None:
        """Take what `expert` returned, expert by expert."""


class _EachText(nn.Module):
    """Attention over texts that lie one behind the other in a single row: each sees itself alone."""

    def __init__(self, attention: nn.Module, steps: Sequence[Step], threads: Threads) -> None:
        super().__init__()
        self.attention, self.steps, self.threads = attention, steps, threads

    def forward(self, x_BTH: Tensor, _: Step) -> Tensor:
        texts = zip(x_BTH.split([step.cache.slots for step in self.steps], dim=1), self.steps, strict=True)
        return torch.cat(list(self.threads.map(lambda text: self.attention(*text), texts)), dim=1)


class _InParts(nn.Module):
    """An MLP that takes some tokens at a time."""

    def __init__(self, mlp: nn.Module, threads: Threads) -> None:
        super().__init__()
        self.mlp, self.threads = mlp, threads

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(list(self.threads.map(self.mlp, x.split(TOKENS_AT_ONCE, dim=-2))), dim=-2)


class _StreamedExperts(nn.Module):
    """Stands where a layer's `Experts` would, and reads each when its turn comes."""

    def __init__(
        self, layer: int, stored: Mapping[str, StoredWeight], observer: Observer[Any], threads: Threads
    ) -> None:
        super().__init__()
        self.layer, self.stored, self.observer, self.threads = layer, stored, observer, threads

    def forward(self, x_TH: Tensor, weight_TK: Tensor, expert_TK: Tensor, shared: nn.Module | None = None) -> Tensor:
        chosen = Chosen.of(weight_TK, expert_TK)
        self.observer.layer(self.layer, x_TH, chosen)

        def run(expert: int) -> tuple[Tensor, Any]:
            gate, up, down_HI = (read_weight(self.stored[expert_name(self.layer, expert, one)]) for one in PROJECTIONS)
            x_NH = x_TH[chosen.token_N[expert]]
            inner_NI = F.silu(ops.linear(x_NH, gate, None)) * ops.linear(x_NH, up, None)
            return ops.linear(inner_NI, down_HI, None), self.observer.expert(self.layer, expert, inner_NI, down_HI)

        out_TH = torch.zeros_like(x_TH)
        for expert, (out_NH, seen) in zip(chosen.token_N, self.threads.map(run, chosen.token_N), strict=True):
            out_TH.index_add_(0, chosen.token_N[expert], out_NH.mul_(chosen.weight_N[expert][:, None]))
            if seen is not None:
                self.observer.seen(self.layer, expert, seen)
        return out_TH if shared is None else out_TH.add_(shared(x_TH))


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def expert_name(layer: int, expert: int, projection: str) -> str:
    """Return the checkpoint's name of one of `PROJECTIONS` of a routed expert."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"


def read_weight(stored: StoredWeight) -> Tensor:
    """Read all of a weight, whatever it is stored as: fp32. Raises `UserError` for one that is damaged."""
    place = torch.empty(stored.shape)
    _fill(place, stored)
    return place


def _fill(place: Tensor, stored: StoredWeight) -> None:
    with Reader() as reader:
        check_beside(stored, reader)
        for begin, end in steps(stored.shape[0], stored.shape[1] if len(stored.shape) > 1 else 1):
            rows = decoded(stored, reader, begin, end)
            check_finite(stored.name, rows)
            place[begin:end].copy_(rows)


def hidden_states(
    model: BailingMoeV2ForCausalLM,
    stored: Mapping[str, StoredWeight],
    texts: Sequence[Sequence[int]],
    observer: Observer[A],
    threads: Threads,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield after each layer ``(x, residual)``, the sum of which is its hidden states: fp32 ``[1, T, H]``.

    ``model`` has no weights (device ``meta``, fp32); each layer gets them when its turn comes and is dropped then.
    """
    shared = [_step(model, len(text)) for text in texts]
    x, residual = _embedded(stored["model.word_embeddings.weight"], texts), None
    for number in range(model.config.num_hidden_layers):
        with _layer(model, number, stored, observer, shared, threads) as layer:
            x, residual = layer(x, residual, shared[0])
        yield x, residual


@contextmanager
def _layer(
    model: BailingMoeV2ForCausalLM,
    number: int,
    stored: Mapping[str, StoredWeight],
    observer: Observer[A],
    shared: Sequence[Step],
    threads: Threads,
) -> Iterator[nn.Module]:
    layer, path = model.model.layers[number], f"model.layers.{number}"
    if isinstance(layer.mlp, MoE):
        layer.mlp.register_module("experts", _StreamedExperts(number, stored, observer, threads))
    layer.to_empty(device="cpu").requires_grad_(False)
    for name, _ in layer.named_modules(prefix=path):
        for piece in module_pieces(model, name):
            if piece.name in stored:
                _fill(piece.place, stored[piece.name])
            else:  # the loader's check has passed: a bias that this model does not use
                piece.place.zero_()
    layer.register_module("attention", _EachText(layer.attention, shared, threads))
    if not isinstance(layer.mlp, MoE):
        layer.register_module("mlp", _InParts(layer.mlp, threads))
    elif layer.mlp.shared_experts is not None:
        layer.mlp.register_module("shared_experts", _InParts(layer.mlp.shared_experts, threads))
    yield layer
    model.model.layers[number] = nn.Identity()


def _step(model: BailingMoeV2ForCausalLM, tokens: int) -> Step:
    """What the layers share for one text."""
    slot_T = torch.arange(tokens)
    cache = TransientCache(model.model.kv_heads, model.config.head_dim, 1, slot_T)
    return model.model.step(slot_T[None], torch.zeros(1, dtype=torch.int64), cache.written_B, cache, [tokens])


def _embedded(stored: StoredWeight, texts: Sequence[Sequence[int]]) -> Tensor:
    """Rows of the embedding table, of which only these are read: fp32 ``[1, T, H]``."""
    ids = torch.tensor([token for text in texts for token in text])
    used, index_T = ids.unique(return_inverse=True)
    with Reader() as reader:
        table = torch.cat([decoded(stored, reader, token, token + 1) for token in used.tolist()])
    check_finite(stored.name, table)
    return table.float()[index_T][None]
