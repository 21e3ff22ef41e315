"""`w4a16 --calibrate`: factors that make INT4 experts err less where it counts, after AWQ (arXiv 2306.00978).

A channel that texts excite more than others deserves finer steps. So its weights are multiplied by a factor before they
are rounded, and what feeds it is divided by that (which factors: `calibration_search`):

- **down_proj** of each expert, channel j: column j times ``s_j``, row j of up_proj divided by it. SwiGLU is linear in
  up_proj, so nothing changes; a row's steps are relative to the row, so neither does up_proj's own relative error.
- **gate_proj and up_proj** of all experts of a layer, channel i: column i times ``t_i``, and also the columns of the
  router and of the shared experts, which read the same input; the norm that makes this input is divided by ``t_i``.
  ``t_i`` is a power of two: what stays in the model's dtype is multiplied without loss, and routing is the same bit by
  bit.

MTP layers are not scaled: they only draft, and what they draft is checked.

Shapes: H hidden_size, T tokens of all texts, N tokens of one expert, I intermediate width.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ascend.checkpoint import Checkpoint
from ascend.errors import UserError
from ascend.loader import CONFIGS, check_tensors
from ascend.model import BailingMoeV2ForCausalLM
from ascend.stored import StoredWeight, stored_weights
from convert.calibration_forward import (
    TOKENS_AT_ONCE,
    Chosen,
    Observer,
    Threads,
    expert_name,
    hidden_states,
    read_weight,
)
from convert.calibration_report import CalibrationReport, LayerReport
from convert.calibration_search import Candidate, Found, Weighted, candidates, cross_validated
from convert.plan import Item, Plan
from convert.scaling import COLUMNS, ROWS
from convert.source import TORCH_DTYPES
from convert.staging import FILE_MODE, sync

# A root mean square of so few is uncertain by an eighth and more. On the demos' experts, factors from 32 tokens lower
# the error on other texts by 12 % (heavy-tailed weights) or leave it as it is (normal ones); from 4 it may get worse.
MIN_TOKENS = 32
SAMPLED_EXPERTS = 32  # of a layer: one α is for all of them, the rest would only take time
READERS = ("gate", "shared_experts.gate_proj", "shared_experts.up_proj")  # of the experts' input; the latter may lack
FP32_PER_TOKEN = 5  # hidden states held at the same time


def calibrate(
    checkpoint: Checkpoint,
    texts: Sequence[Sequence[int]],
    plan: Plan,
    file: Path,
    said: Callable[[str], None] = lambda line: None,
) -> CalibrationReport:
    """Run the model on ``texts`` (token ids) and write the factors that `convert.scaling.Scales` reads to ``file``.

    The same texts and weights give the same bytes, whatever the number of cores. ``said`` is told a line per layer.
    Raises `UserError` for a source that is damaged or has INT4 experts already, `OSError` if the file cannot be
    written.
    """
    stored = stored_weights(checkpoint.tensors)
    with torch.device("meta"):
        model = BailingMoeV2ForCausalLM(CONFIGS[checkpoint.config["model_type"]](**checkpoint.config)).float()
    check_tensors(checkpoint.path, stored, model)
    items = {item.source.name: item for item in plan.items()}
    check_calibration(checkpoint, plan)
    config, tokens = model.config, sum(map(len, texts))
    depth = config.num_hidden_layers
    held = FP32_PER_TOKEN * 4 * tokens * config.hidden_size
    said(f"calibrating on {len(texts)} texts, {tokens} tokens: {held / 1e9:.2f} GB of memory for their hidden states")
    with Threads() as threads:
        scale_dtype = TORCH_DTYPES[checkpoint.tensors["model.word_embeddings.weight"].dtype]
        calibration = _Calibration(stored, items, config.num_experts, scale_dtype, threads)
        begun = last = time.monotonic()
        for done, _ in enumerate(hidden_states(model, stored, texts, calibration, threads), 1):
            now = time.monotonic()
            took, left = now - last, (now - begun) / done * (depth - done)
            said(f"calibrated {done} of {depth} layers, {took:.1f} s, {tokens / took:.0f} tokens/s, {left:.0f} s left")
            last = now
    _write(file, calibration.factors)
    drafting = [layer for layer in range(depth, len(model.model.layers)) if _is_int4(items, layer)]
    return CalibrationReport(len(texts), tokens, MIN_TOKENS, tuple(calibration.reports), tuple(drafting))


def check_calibration(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise `UserError` if a plan has nothing to calibrate."""
    experts = [item for item in plan.items() if item.to == "w4a16"]
    if not experts:
        raise UserError("--calibrate: no expert is rounded to INT4 here; leave it out")
    before = next((item.source.name for item in experts if item.source.format == "w4a16"), None)
    if before is not None:
        raise UserError(
            f"{checkpoint.path}: {before} is INT4 already, too late for --calibrate: convert what it was made from"
        )


def _is_int4(items: Mapping[str, Item], layer: int) -> bool:
    """Whether the experts of a layer (all or none of them: the plan sees to that) are rounded to INT4."""
    item = items.get(expert_name(layer, 0, "down_proj"))
    return item is not None and item.to == "w4a16"


def _write(file: Path, factors: Mapping[str, Tensor]) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        # The library shares no memory between tensors, and reports a full disk by an error of its own.
        partial.write_bytes(save({name: factors[name].clone() for name in sorted(factors)}))
        partial.chmod(FILE_MODE)
        sync(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


class _Calibration(Observer[Found]):
    """Finds factors, layer by layer, while the model runs."""

    def __init__(
        self,
        stored: Mapping[str, StoredWeight],
        items: Mapping[str, Item],
        experts: int,
        scale_dtype: torch.dtype,
        threads: Threads,
    ) -> None:
        self.stored, self.items, self.experts = stored, items, experts
        self.scale_dtype, self.threads = scale_dtype, threads
        self.factors: dict[str, Tensor] = {}
        self.reports: list[LayerReport] = []

    def layer(self, layer: int, x_TH: Tensor, chosen: Chosen) -> None:
        """Find the factors of the input of a layer's experts."""
        if not _is_int4(self.items, layer):
            return
        tokens = {expert: len(token_N) for expert, token_N in chosen.token_N.items()}
        found = self._input_factors(layer, x_TH, chosen)
        if found is not None and found.is_scaled:
            self._keep_input_factors(layer, found.candidate.factor_I)
        per_expert = tuple(tokens.get(expert, 0) for expert in range(self.experts))
        self.reports.append(LayerReport(layer, per_expert, found, {}))

    def _input_factors(self, layer: int, x_TH: Tensor, chosen: Chosen) -> Found | None:
        """Find t by some experts; None where none saw enough tokens."""
        seen = [expert for expert, token_N in chosen.token_N.items() if len(token_N) >= MIN_TOKENS]
        if not seen:
            return None
        moments = [part.square().sum(0) for part in x_TH.split(TOKENS_AT_ONCE)]
        tried = self._exact(layer, candidates(reduce(add, moments), powers_of_two=True))

        def weighted(expert: int) -> Weighted:
            moment_H = x_TH[chosen.token_N[expert]].square().sum(0)
            names = [expert_name(layer, expert, one) for one in ("gate_proj", "up_proj")]
            gate, up = (
                Weighted.of(read_weight(self.stored[name]), moment_H, tried, self._group(name), self.scale_dtype)
                for name in names
            )
            return gate + up

        sample = seen[:: -(-len(seen) // SAMPLED_EXPERTS)]
        return reduce(add, self.threads.map(weighted, sample)).best(tried)

    def _exact(self, layer: int, tried: list[Candidate]) -> list[Candidate]:
        """Those that what keeps its dtype is multiplied with without loss: nothing runs over or under its range."""
        for name, end in _readers_of_norm(layer, self.stored):
            dtype, weight = TORCH_DTYPES[self.items[name].outputs[0].dtype], read_weight(self.stored[name])
            tried = [one for one in tried if _is_exact(weight, _by(end, one.factor_I), dtype)]
        return tried

    def _keep_input_factors(self, layer: int, factor_H: Tensor) -> None:
        for name, end in _readers_of_norm(layer, self.stored):
            self.factors[name + end] = _by(end, factor_H)
        for expert in range(self.experts):
            for projection in ("gate_proj", "up_proj"):
                self.factors[expert_name(layer, expert, projection) + COLUMNS] = factor_H

    def expert(self, layer: int, expert: int, inner_NI: Tensor, down_HI: Tensor) -> Found | None:
        """Find the factors of one expert's inner channels."""
        if not _is_int4(self.items, layer) or len(inner_NI) < MIN_TOKENS:
            return None
        return cross_validated(
            down_HI, inner_NI, self._group(expert_name(layer, expert, "down_proj")), self.scale_dtype
        )

    def seen(self, layer: int, expert: int, seen: Found) -> None:
        """Keep them."""
        self.reports[-1].down[expert] = seen
        if seen.is_scaled:
            factor_I = seen.candidate.factor_I
            self.factors[expert_name(layer, expert, "down_proj") + COLUMNS] = factor_I
            self.factors[expert_name(layer, expert, "up_proj") + ROWS] = 1 / factor_I

    def _group(self, name: str) -> int:
        """Inputs that share a scale."""
        item = self.items[name]
        scale = next(output for output in item.outputs if output.part == "scale")
        return item.source.shape[1] // scale.shape[1]


def _readers_of_norm(layer: int, stored: Mapping[str, StoredWeight]) -> list[tuple[str, str]]:
    """The norm before a layer's experts and what reads it besides them, each with the end of its factors' name."""
    path = f"model.layers.{layer}."
    readers = [(f"{path}mlp.{one}.weight", COLUMNS) for one in READERS]
    return [(f"{path}post_attention_layernorm.weight", ROWS), *(one for one in readers if one[0] in stored)]


def _by(end: str, factor_H: Tensor) -> Tensor:
    """What the norm, or what reads it, is multiplied with."""
    return factor_H if end == COLUMNS else 1 / factor_H


def _is_exact(weight: Tensor, factor_H: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal((weight * factor_H).to(dtype).float(), weight.to(dtype).float() * factor_H)
