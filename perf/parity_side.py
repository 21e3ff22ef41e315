"""One side of `perf parity`: what a model computes on one device, as tensors in a file.

`python -m perf.parity_side …` is the worker. Every layer is run alone, on the residual streams of the file ``--like``
(without it on the model's own), so that two sides compute each layer from the same input. The whole pass and a few
decode steps on given tokens are recorded beside that.

Shapes: B rows of a batch, T its padded length, N its real tokens, row by row, H hidden_size, E experts, K experts per
token, L layers with a router, V vocabulary, D decode steps. The tensors of a side, padding left out:

- ``row``, ``position``, ``token`` int64 ``[N]``; ``stream.I`` ``[N, H]`` before layer I; ``hidden`` after the norm;
- ``layer.I.attention``, ``.mlp``, ``.stream`` ``[N, H]``; with a router ``.experts`` and ``.weights`` ``[N, K]`` as it
  chose, ``.scores`` fp32 ``[N, E]`` computed again from its input; MTP layers follow, their draft as ``.stream``;
- ``head`` ``[N, V]`` from the last stream; ``logits`` and ``experts`` ``[N, L, K]`` of the whole pass;
- ``decode.tokens`` ``[B, D]``, ``decode.logits`` ``[B, D + 1, V]``, ``decode.experts`` ``[B, D, L, K]``,
  ``prefill.experts``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ascend
import ops
from ascend.cache import TransientCache
from ascend.devices import get_device
from ascend.emulator import active
from ascend.errors import UserError, run_command
from ascend.generation import Decoder
from ascend.model import BailingMoeV2ForCausalLM, DecoderLayer, Gate, MTPLayer, Step

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together: int64 ``[B, T]``, the first ``start_B`` of each row being padding."""

    ids_BT: Tensor
    start_B: Tensor

    @property
    def real_BT(self) -> Tensor:
        """Where there is a token, bool ``[B, T]``."""
        return torch.arange(self.ids_BT.shape[1]) >= self.start_B[:, None]

    @property
    def position_BT(self) -> Tensor:
        """Positions ``[B, T]``; 0 in the padding."""
        return (torch.arange(self.ids_BT.shape[1]) - self.start_B[:, None]).clamp(min=0)


def random_batches(vocab_size: int, rows: int, length: int, seed: int) -> list[Batch]:
    """Random prompts: so many full rows, and one row alone that is padded on the left for a third of its length.

    Two batches, since a device attends with a mask where a row is padded, and without one where none is.
    """
    ids = torch.randint(vocab_size, (rows + 1, length), generator=torch.Generator().manual_seed(seed))
    padding = length // 3
    ids[rows, :padding] = 0
    full = Batch(ids[:rows], torch.zeros(rows, dtype=torch.int64))
    return [full, Batch(ids[rows:], torch.tensor([padding]))]


@torch.inference_mode()
def compute(
    model: BailingMoeV2ForCausalLM, batches: Sequence[Batch], decode: int, like: Tensors | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a side (see the head of this file) for all rows, batch after batch.

    ``like`` is another side of the same tokens, however batched: its streams are what the layers get, its tokens what
    is decoded.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    rows, tokens = 0, 0
    for batch in batches:
        real = batch.real_BT
        theirs = None
        if like is not None:
            wanted = slice(tokens, tokens + int(real.sum()))
            theirs = {name: like[name][wanted] for name in like if name.startswith("stream.") or name == "hidden"}
            theirs["decode.tokens"] = like["decode.tokens"][rows : rows + len(real)]
        row_BT = (rows + torch.arange(len(real)))[:, None].expand_as(real)
        made = {"row": row_BT[real], "position": batch.position_BT[real], "token": batch.ids_BT[real]}
        made |= _whole(model, batch)
        made |= _layers(model, batch, theirs or made)
        made |= _decode(model, batch, decode, None if theirs is None else theirs["decode.tokens"])
        for name, tensor in made.items():
            parts[name].append(tensor)
        rows, tokens = rows + len(real), tokens + int(real.sum())
    return {name: torch.cat(one) for name, one in parts.items()}


def _whole(model: BailingMoeV2ForCausalLM, batch: Batch) -> dict[str, Tensor]:
    taps: list[Tensor] = []
    layers = list(model.model.layers)[: model.config.num_hidden_layers]
    with _tapped(layers) as seen:
        embedding = model.model.word_embeddings(batch.ids_BT.to(model.device))
        hidden = model.model(embedding, _step(model, batch), taps)
    made = {f"stream.{index}": _host(stream)[batch.real_BT] for index, stream in enumerate(taps)}
    made |= {"hidden": _host(hidden)[batch.real_BT], "logits": _host(model.logits(hidden))[batch.real_BT]}
    return made | {"experts": _experts(seen, batch.real_BT)}


def _layers(model: BailingMoeV2ForCausalLM, batch: Batch, like: Tensors) -> dict[str, Tensor]:
    real, step = batch.real_BT, _step(model, batch)
    made: dict[str, Tensor] = {}

    def placed(name: str) -> Tensor:
        stream = torch.zeros((*real.shape, like[name].shape[-1]), dtype=model.dtype)
        stream[real] = like[name].to(model.dtype)
        return stream.to(model.device)

    depth = model.config.num_hidden_layers
    ids_BT, hidden = batch.ids_BT, placed("hidden")
    for index, layer in enumerate(model.model.layers):
        with _tapped([layer]) as (seen,):
            if isinstance(layer, MTPLayer):
                ids_BT = F.pad(ids_BT[:, 1:], (0, 1))  # as `mtp_logits` does
                stream = layer.draft(model.model.word_embeddings(ids_BT.to(model.device)), hidden, step)
            else:
                out, residual = layer(placed(f"stream.{index}"), None, step)
                stream = out + residual
        seen["stream"] = _host(stream)
        made |= {f"layer.{index}.{name}": tensor.view(*real.shape, -1)[real] for name, tensor in seen.items()}
    last = ops.rms_norm(placed(f"stream.{depth}"), model.model.norm.weight, model.model.eps)
    return made | {"head": _host(model.logits(last))[real]}


def _decode(model: BailingMoeV2ForCausalLM, batch: Batch, steps: int, given_BD: Tensor | None) -> dict[str, Tensor]:
    mask = batch.real_BT.to(model.device) if bool(batch.start_B.any()) else None
    layers = list(model.model.layers)[: model.config.num_hidden_layers]
    decoder = Decoder(model, batch.ids_BT.to(model.device), mask, max(steps, 1))
    with _tapped(layers) as seen:
        logits = [_host(decoder.prefill())]
    prefill = _experts(seen, batch.real_BT)
    tokens, experts = [], []
    for done in range(steps):
        tokens.append(logits[-1].argmax(-1) if given_BD is None else given_BD[:, done])
        with _tapped(layers) as seen:
            logits.append(_host(decoder.step(tokens[-1].to(model.device))))
        experts.append(_experts(seen, torch.ones(len(mask_free(batch)), 1, dtype=torch.bool)))
    rows = len(batch.ids_BT)
    return {
        "prefill.experts": prefill,
        "decode.tokens": torch.stack(tokens, 1) if steps else torch.zeros((rows, 0), dtype=torch.int64),
        "decode.experts": torch.stack(experts, 1) if steps else prefill.new_zeros((rows, 0, *prefill.shape[1:])),
        "decode.logits": torch.stack(logits, 1),
    }
