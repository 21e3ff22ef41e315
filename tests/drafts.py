"""Draft heads fitted to a small model's own greedy text, in seconds, and an EAGLE3 head in plain torch.

T tokens of one sequence, H hidden_size, N heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import ascend
from ascend import BailingMoeV2ForCausalLM
from ascend.eagle3_config import tapped_layers
from tests.tiny import read_config, read_tensors, write_tensors


def plain_head(w: dict[str, Tensor], embedding_TH: Tensor, hidden_TH: Tensor, D: int) -> tuple[Tensor, Tensor]:
    """The head on one sequence from its first slot on, as its papers and trainers have it: stream and logits."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def rotated(x_NTD: Tensor) -> Tensor:
        T = x_NTD.shape[1]
        angle = torch.arange(T)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)
        cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
        half = torch.cat([-x_NTD[..., D // 2 :], x_NTD[..., : D // 2]], -1)
        return x_NTD * cos + half * sin

    x = torch.cat(
        [norm(embedding_TH, "midlayer.input_layernorm.weight"), norm(hidden_TH, "midlayer.hidden_norm.weight")], -1
    )
    q, k, v = (
        (x @ w[f"midlayer.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, D)).transpose(0, 1) for name in "qkv"
    )
    k, v = (one.repeat_interleave(len(q) // len(k), 0) for one in (k, v))
    out = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
    stream = hidden_TH + out.transpose(0, 1).flatten(1) @ w["midlayer.self_attn.o_proj.weight"].T
    x = norm(stream, "midlayer.post_attention_layernorm.weight")
    gate, up = x @ w["midlayer.mlp.gate_proj.weight"].T, x @ w["midlayer.mlp.up_proj.weight"].T
    stream = stream + (F.silu(gate) * up) @ w["midlayer.mlp.down_proj.weight"].T
    return stream, norm(stream, "norm.weight") @ w["lm_head.weight"].T


def texts(model: BailingMoeV2ForCausalLM, prompts: list[list[int]], new_tokens: int) -> list[Tensor]:
    """Each prompt with the model's greedy text, int64 ``[T]``."""
    return [ascend.generate(model, torch.tensor([ids]), new_tokens)[0] for ids in prompts]


@torch.no_grad()
def fit_mtp(path: Path, prompts: list[list[int]], new_tokens: int) -> None:
    """Fit the MTP layers of a checkpoint, in place, by least squares: their `eh_proj`, with all behind it left out.

    From the embedding of token t + 1 and the hidden state at t the first then gives about the hidden state at t + 1,
    whose logits are those of token t + 2; the second, from that and token t + 2, about the one at t + 2.
    """
    model, tensors = ascend.load_model(path), read_tensors(path)
    norm_H, config = tensors["model.norm.weight"], model.config

    def scaled(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    sequences = texts(model, prompts, new_tokens)
    states = [model(one[None], output_hidden_states=True, return_dict=True).hidden_states[-1][0] for one in sequences]
    given = states
    for number in range(1, config.num_nextn_predict_layers + 1):
        layer = f"model.layers.{config.num_hidden_layers + number - 1}."
        for name in tensors:  # what is added to the stream becomes zero
            if name.startswith(layer) and name.endswith(("attention.dense.weight", "down_proj.weight")):
                tensors[name].zero_()
        for name in ("enorm", "hnorm"):
            tensors[f"{layer}{name}.weight"].fill_(1.0)
        tensors[f"{layer}final_layernorm.weight"] = norm_H.clone()
        inputs = [
            torch.cat([scaled(model.model.word_embeddings(ids_T[number:])), scaled(hidden_TH[:-1])], -1)
            for ids_T, hidden_TH in zip(sequences, given, strict=True)
        ]
        x = torch.cat(inputs).double()
        y = torch.cat([hidden_TH[number:] / norm_H for hidden_TH in states]).double()
        inverse = torch.linalg.inv(x.T @ x + 1e-3 * torch.eye(x.shape[1], dtype=torch.float64))
        projection = (inverse @ x.T @ y).float()
        tensors[f"{layer}eh_proj.weight"] = projection.T.contiguous()
        given = [scaled(one @ projection) * norm_H for one in inputs]
    write_tensors(path, tensors)


def fit_eagle3(path: Path, model_path: Path, prompts: list[list[int]], new_tokens: int, steps: int) -> float:
    """Fit a head, in place, by gradient descent on all its weights; the share of its first drafts that are right."""
    model = ascend.load_model(model_path)
    config, file = read_config(path), path / "model.safetensors"
    tapped = tapped_layers(config["eagle_config"]["eagle_aux_hidden_state_layer_ids"])
    stored = load_file(file)
    own = torch.arange(config["vocab_size"])
    if "d2t" in stored:
        target = stored["d2t"] + torch.arange(config["draft_vocab_size"])
        own = torch.full_like(own, -100).index_put((target,), torch.arange(len(target)))  # -100: none of the head's
    w = {name: one.requires_grad_() for name, one in stored.items() if one.is_floating_point()}
    optimiser = torch.optim.Adam(w.values(), lr=2e-3)
    sequences = []
    for ids_T in texts(model, prompts, new_tokens):
        with torch.no_grad():
            streams = model(ids_T[None, :-2], output_hidden_states=True, return_dict=True).hidden_states
            tap_TH = torch.cat([streams[layer] for layer in tapped], -1)[0]
            sequences.append((model.model.word_embeddings(ids_T[1:-1]), tap_TH, own[ids_T[2:]]))
    for _ in range(steps):
        optimiser.zero_grad()
        drafts = [
            plain_head(w, e_TH, tap_TH @ w["fc.weight"].T, config["head_dim"])[1] for e_TH, tap_TH, _ in sequences
        ]
        logits_TV, wanted_T = torch.cat(drafts), torch.cat([wanted_T for *_, wanted_T in sequences])
        F.cross_entropy(logits_TV, wanted_T).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    known = wanted_T >= 0
    save_file({name: one.detach() for name, one in stored.items()}, file)
    (path / "config.json").write_text(json.dumps(config))
    return float((logits_TV.argmax(-1) == wanted_T)[known].float().mean())
