"""What a model computes of a few prompts, recorded as named tensors: the whole pass, each layer alone, decode steps.

Each layer is run alone on given residual streams (another side's, or the model's own), and each MLP alone on given
inputs, so that two sides compute every part from the same input.

Shapes: B rows of a batch, T its padded length, N real tokens of all batches, row by row, H hidden_size, E experts,
K experts per token, L decoder layers with a router, V vocabulary, R rows of all batches, D decode steps. The tensors:

- ``row``, ``position``, ``token`` int64 ``[N]``; ``stream.I`` ``[N, H]`` before layer I; ``hidden`` after the norm;
- ``layer.I.attention`` and ``.stream`` ``[N, H]`` of layer I alone, ``.mlp_input`` of its MLP, ``.mlp.mlp`` of the MLP
  alone on the other side's ``.mlp_input``; with a router, of both runs (``layer.I.`` and ``layer.I.mlp.``) ``experts``
  and ``weights`` ``[N, K]`` as it chose, ``scores`` fp32 ``[N, E]`` computed again from its input. MTP layers come
  after the decoder layers, with the draft as ``.stream``; ``head`` ``[N, V]`` are norm and head alone;
- ``logits`` ``[N, V]`` and ``experts`` ``[N, L, K]`` of the whole pass; on side a also ``twins`` fp64 ``[N, twins]``,
  how far noise of the size of rounding moves them (see `perf.parity.twin`);
- ``forced.logits`` and ``forced.decode.logits``: the same with the other side's experts, where there is one;
- ``prefill.experts`` as ``experts``, ``decode.tokens`` ``[R, D]``, ``decode.logits`` ``[R, D + 1, V]`` and
  ``decode.experts`` ``[R, D, L, K]`` of the lean engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ops
from ascend.cache import TransientCache
from ascend.generation import Decoder
from ascend.model import BailingMoeV2ForCausalLM, Gate, MTPLayer, Step
from perf.parity.prompts import Batch
from perf.parity.twin import TWINS, best_distance, noisy
from perf.parity.whole import differ

Tensors = Mapping[str, Tensor]


@torch.inference_mode()
def trace(
    model: BailingMoeV2ForCausalLM, batches: Sequence[Batch], decode: int, like: Tensors | None = None
) -> dict[str, Tensor]:
    """Return all tensors of the head of this file, on the CPU.

    ``like`` is a trace of the same tokens, however batched: the layers get its streams, the decode steps its tokens.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    rows, tokens = 0, 0
    for batch in batches:
        real = batch.real
        row_BT = (rows + torch.arange(len(real)))[:, None].expand_as(real)
        made = {"row": row_BT[real], "position": batch.position[real], "token": batch.ids_BT[real]}
        made |= _whole_pass(model, batch)
        given: Tensors = made
        if like is None:
            made |= _twins(model, batch, made["logits"])
        else:
            mine = slice(tokens, tokens + len(made["row"]))
            given = {name: tensor[mine] for name, tensor in like.items() if not name.startswith("decode.")}
            made["forced.logits"] = _forced_pass(model, batch, given["experts"])
        made |= _each_layer(model, batch, given)
        made |= _decode(model, batch, decode, None if like is None else like["decode.tokens"][rows : rows + len(real)])
        if like is not None:
            steps = {name: like[f"decode.{name}"][rows : rows + len(real)] for name in ("tokens", "experts")}
            made["forced.decode.logits"] = _forced_decode(model, batch, given["prefill.experts"], **steps)
        for name, tensor in made.items():
            parts[name].append(tensor)
        rows, tokens = rows + len(real), tokens + len(made["row"])
    return {name: torch.cat(one) for name, one in parts.items()}


def _whole_pass(model: BailingMoeV2ForCausalLM, batch: Batch) -> dict[str, Tensor]:
    real, streams = batch.real, list[Tensor]()
    with _tapped(_decoder_layers(model)) as seen:
        embedding_BTH = model.model.word_embeddings(batch.ids_BT.to(model.device))
        hidden_BTH = model.model(embedding_BTH, _step(model, batch), streams)
    made = {f"stream.{index}": _host(stream_BTH)[real] for index, stream_BTH in enumerate(streams)}
    made |= {"hidden": _host(hidden_BTH)[real], "logits": _host(model.logits(hidden_BTH))[real]}
    return made | {"experts": _experts(seen, real)}


def _twins(model: BailingMoeV2ForCausalLM, batch: Batch, logits_NV: Tensor) -> dict[str, Tensor]:
    embedding_BTH = model.model.word_embeddings(batch.ids_BT.to(model.device))
    far = []
    for seed in range(TWINS):
        run = partial(model.model, embedding_BTH, _step(model, batch))
        twin_NV = _host(model.logits(noisy(_decoder_layers(model), model.dtype, seed, run)))[batch.real]
        far.append(torch.tensor(list(map(best_distance, logits_NV, twin_NV)), dtype=torch.float64))
    return {"twins": torch.stack(far, 1)}


def _each_layer(model: BailingMoeV2ForCausalLM, batch: Batch, given: Tensors) -> dict[str, Tensor]:
    real, step, depth = batch.real, _step(model, batch), model.config.num_hidden_layers
    made: dict[str, Tensor] = {}

    def placed(x_NH: Tensor) -> Tensor:
        x_BTH = torch.zeros((*real.shape, x_NH.shape[-1]), dtype=model.dtype)
        x_BTH[real] = x_NH.to(model.dtype)
        return x_BTH.to(model.device)

    ids_BT, hidden_NH = batch.ids_BT, given["hidden"]
    for index, layer in enumerate(model.model.layers):
        with _tapped([layer]) as (seen,):
            if isinstance(layer, MTPLayer):
                ids_BT = F.pad(ids_BT[:, 1:], (0, 1))  # as `mtp_logits` does
                embedding_BTH = model.model.word_embeddings(ids_BT.to(model.device))
                stream_BTH = layer.draft(embedding_BTH, placed(hidden_NH), step)
            else:
                out_BTH, residual_BTH = layer(placed(given[f"stream.{index}"]), None, step)
                stream_BTH = out_BTH + residual_BTH
        del seen["mlp"]
        seen["stream"] = _host(stream_BTH)
        own = {f"layer.{index}.{name}": x.view(*real.shape, -1)[real] for name, x in seen.items()}
        input_NH = given.get(f"layer.{index}.mlp_input", own[f"layer.{index}.mlp_input"])
        with _tapped([layer]) as (seen,):
            layer.mlp(placed(input_NH))
        del seen["mlp_input"]
        made |= own | {f"layer.{index}.mlp.{name}": x.view(*real.shape, -1)[real] for name, x in seen.items()}
        if isinstance(layer, MTPLayer):
            hidden_NH = given.get(f"layer.{index}.stream", made[f"layer.{index}.stream"])
    last_BTH = ops.rms_norm(placed(given[f"stream.{depth}"]), model.model.norm.weight, model.model.eps)
    return made | {"head": _host(model.logits(last_BTH))[real]}


def _decode(model: BailingMoeV2ForCausalLM, batch: Batch, steps: int, given_BD: Tensor | None) -> dict[str, Tensor]:
    B = len(batch.ids_BT)
    mask = batch.real.to(model.device) if bool(batch.start_B.any()) else None
    decoder = Decoder(model, batch.ids_BT.to(model.device), mask, steps)
    with _tapped(_decoder_layers(model)) as seen:
        logits = [_host(decoder.prefill())]
        prefill = _experts(seen, batch.real)
        tokens, experts = [], []
        for done in range(steps):
            tokens.append(logits[-1].argmax(-1) if given_BD is None else given_BD[:, done])
            logits.append(_host(decoder.step(tokens[-1].to(model.device))))
            experts.append(_experts(seen, torch.ones(B, 1, dtype=torch.bool)))
    return {
        "prefill.experts": prefill,
        "decode.tokens": torch.stack(tokens, 1) if steps else torch.zeros((B, 0), dtype=torch.int64),
        "decode.logits": torch.stack(logits, 1),
        "decode.experts": torch.stack(experts, 1) if steps else prefill.new_zeros((B, 0, *prefill.shape[1:])),
    }


def _forced_pass(model: BailingMoeV2ForCausalLM, batch: Batch, expert_NLK: Tensor) -> Tensor:
    """Logits ``[N, V]`` of the whole pass with these experts, so that no near-tie hides what else differs."""
    with _forced(model) as force:
        force(expert_NLK, batch.real)
        embedding_BTH = model.model.word_embeddings(batch.ids_BT.to(model.device))
        return _host(model.logits(model.model(embedding_BTH, _step(model, batch))))[batch.real]


def _forced_decode(
    model: BailingMoeV2ForCausalLM, batch: Batch, prefill_NLK: Tensor, tokens: Tensor, experts: Tensor
) -> Tensor:
    """Logits ``[R, D + 1, V]`` of prefill and decode with these experts, ``[N, L, K]`` and ``[R, D, L, K]``."""
    mask = batch.real.to(model.device) if bool(batch.start_B.any()) else None
    decoder = Decoder(model, batch.ids_BT.to(model.device), mask, tokens.shape[1])
    with _forced(model) as force:
        force(prefill_NLK, batch.real)
        logits = [_host(decoder.prefill())]
        for step in range(tokens.shape[1]):
            force(experts[:, step], torch.ones(len(tokens), 1, dtype=torch.bool))
            logits.append(_host(decoder.step(tokens[:, step].to(model.device))))
    return torch.stack(logits, 1)


@contextmanager
def _forced(model: BailingMoeV2ForCausalLM) -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Yield a function that sets the experts of the next pass, ``[tokens, L, K]``, where ``real`` ``[B, T]``.

    A token that chooses them by itself keeps the weights that its router gave; the others' are computed here.
    """
    now: dict[str, Tensor] = {}

    def force(expert_NLK: Tensor, real_BT: Tensor) -> None:
        full = torch.zeros((real_BT.numel(), *expert_NLK.shape[1:]), dtype=torch.int64)
        full[real_BT.flatten()] = expert_NLK
        now["experts"], now["real"] = full.to(model.device), real_BT.flatten().to(model.device)

    def hook_of(index: int) -> Any:
        def hook(gate: Gate, inputs: Any, output: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            (weight_TK, own_TK, x_TH, residual_TH), given_TK = output, now["experts"][:, index]
            keep_T1 = (~now["real"] | ~differ(given_TK, own_TK.to(torch.int64)))[:, None]
            score_TE = torch.sigmoid(F.linear(x_TH.float(), gate.weight.float()))
            given_weight_TK = score_TE.gather(-1, given_TK)
            if gate.normalise and gate.top_k > 1:
                given_weight_TK = given_weight_TK / (given_weight_TK.sum(-1, keepdim=True) + 1e-20)
            weight = torch.where(keep_T1, weight_TK, (given_weight_TK * gate.scaling).to(weight_TK.dtype))
            return weight, torch.where(keep_T1, own_TK, given_TK.to(own_TK.dtype)), x_TH, residual_TH

        return hook

    gates = [one for layer in _decoder_layers(model) for one in layer.modules() if isinstance(one, Gate)]
    handles = [gate.register_forward_hook(hook_of(index)) for index, gate in enumerate(gates)]
    try:
        yield force
    finally:
        for handle in handles:
            handle.remove()


def _decoder_layers(model: BailingMoeV2ForCausalLM) -> Iterable[nn.Module]:
    return list(model.model.layers)[: model.config.num_hidden_layers]


def _step(model: BailingMoeV2ForCausalLM, batch: Batch) -> Step:
    """Make what the model makes of the ids and a mask when it is called."""
    device, (B, T) = model.device, batch.ids_BT.shape
    cache = TransientCache(model.model.kv_heads, model.config.head_dim, B, torch.arange(T, device=device))
    lengths = None if bool(batch.start_B.any()) else [T] * B
    return model.model.step(batch.position.to(device), batch.start_B.to(device), cache.written_B, cache, lengths)


@contextmanager
def _tapped(layers: Iterable[nn.Module]) -> Iterator[list[dict[str, Tensor]]]:
    """Per layer, what its modules gave in their last call; tokens are not yet sorted out of the padding."""
    seen: list[dict[str, Tensor]] = []
    handles = []
    for layer in layers:
        tensors: dict[str, Tensor] = {}
        seen.append(tensors)
        for name, module in layer.named_modules():
            if isinstance(module, Gate):
                handles.append(module.register_forward_hook(_gate_hook(tensors)))
            elif name in ("attention", "mlp"):
                handles.append(module.register_forward_hook(_output_hook(tensors, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(tensors: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        tensors[name] = _host(output)
        if name == "mlp":
            tensors["mlp_input"] = _host(inputs[0])

    return hook


def _gate_hook(tensors: dict[str, Tensor]) -> Any:
    def hook(gate: Gate, inputs: Any, output: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
        logit_TE = F.linear(_host(output[2]).float(), _host(gate.weight).float())
        tensors["scores"] = torch.sigmoid(logit_TE) + _host(gate.expert_bias).float()
        tensors["weights"], tensors["experts"] = _host(output[0]), _host(output[1]).to(torch.int64)

    return hook


def _experts(seen: Iterable[dict[str, Tensor]], real_BT: Tensor) -> Tensor:
    """``[tokens, L, K]``; L is 0 in a model without routers."""
    chosen = [tensors["experts"][real_BT.flatten()] for tensors in seen if "experts" in tensors]
    return torch.stack(chosen, 1) if chosen else torch.zeros((int(real_BT.sum()), 0, 1), dtype=torch.int64)


def _host(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)
