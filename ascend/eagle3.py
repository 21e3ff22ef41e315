"""An EAGLE3 draft head (Li et al., arXiv 2503.01840): one decoder layer on three tapped streams of the model.

Names, shapes and order of work as SpecForge trains them (``configs/ling-flash-2.0-eagle3.json``,
``specforge/modeling/draft/llama3_eagle.py``) and as SGLang and vLLM run them (``models/llama_eagle3.py`` of both): at
slot t it takes the streams before layers 2, n // 2 and n - 3, projected to one, and the embedding of token t + 1; what
it feeds on to itself is its stream before the last norm.

Shapes: B rows, T tokens, H hidden_size, C = heads · D of queries, keys and values, D head_dim, V' draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

import ops
from ascend.cache import StaticCache
from ascend.checkpoint import SINGLE
from ascend.eagle3_config import EMBEDDING, TAPS, Eagle3Config, check_fits, open_head
from ascend.errors import UserError
from ascend.generation import positions
from ascend.model import BailingMoeV2ForCausalLM
from ascend.rope import Rope, cos_sin
from ascend.weights import MLP, Weight
from ops import layout

# Per parameter of the head: the checkpoint's tensors that form it, in the order of its rows.
PARTS = {
    "fc.weight": ("fc.weight",),
    "input_layernorm.weight": ("midlayer.input_layernorm.weight",),
    "hidden_norm.weight": ("midlayer.hidden_norm.weight",),
    "query_key_value.weight": tuple(f"midlayer.self_attn.{part}_proj.weight" for part in "qkv"),
    "dense.weight": ("midlayer.self_attn.o_proj.weight",),
    "post_attention_layernorm.weight": ("midlayer.post_attention_layernorm.weight",),
    "mlp.gate_up": ("midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight"),
    "mlp.down": ("midlayer.mlp.down_proj.weight",),
    "norm.weight": ("norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}


class Eagle3Head(nn.Module):
    """The head and the embedding table it looks tokens up in; an `ascend.speculation.Drafter`."""

    layers = 1

    def __init__(self, config: Eagle3Config, embed_tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        H, D = config.hidden_size, config.head_dim
        query, key = config.num_attention_heads * D, config.num_key_value_heads * D
        self.config, self.tapped, self.eps, self.scale = config, config.tapped, config.rms_norm_eps, D**-0.5
        self.rope = Rope(D, config.rope_theta)
        self.fc = Weight(H, TAPS * H)
        self.input_layernorm, self.hidden_norm = Weight(H), Weight(H)
        self.query_key_value = Weight(query + 2 * key, 2 * H)
        self.dense = Weight(H, query)
        self.post_attention_layernorm = Weight(H)
        self.mlp = MLP(H, config.intermediate_size)
        self.norm = Weight(H)
        self.lm_head = Weight(config.draft_vocab_size, H)
        # The model's token of each draft token.
        self.target = nn.Parameter(torch.empty(config.draft_vocab_size, dtype=torch.int64), requires_grad=False)
        self.frequencies: Tensor | None = None
        self.embed_tokens = embed_tokens

    def caches(self, batch: int, slots: int, dtype: torch.dtype, device: torch.device) -> list[StaticCache]:
        """See `ascend.speculation.Drafter`."""
        heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        return [StaticCache(1, batch, heads, slots, head_dim, dtype, device)]

    def source(self, hidden_BTH: Tensor, taps: list[Tensor]) -> Tensor:
        """See `ascend.speculation.Drafter`: the tapped streams, projected."""
        projected: Tensor = self.fc(torch.cat(taps, dim=-1))
        return projected

    def run(self, layer: int, token_BT: Tensor, hidden_BTH: Tensor, start_B: Tensor, cache: StaticCache) -> Tensor:
        """See `ascend.speculation.Drafter`: the stream before the last norm."""
        assert self.embed_tokens is not None, "a head is made with an embedding, or is a plan of one"
        embedding_BTH = ops.rms_norm(self.embed_tokens(token_BT), self.input_layernorm.weight, self.eps)
        normed_BTH = ops.rms_norm(hidden_BTH, self.hidden_norm.weight, self.eps)
        out_BTH = self._attention(torch.cat([embedding_BTH, normed_BTH], dim=-1), start_B, cache)
        norm_H = self.post_attention_layernorm.weight
        x_BTH, residual_BTH = ops.add_rms_norm(out_BTH, hidden_BTH, norm_H, self.eps)
        return self.mlp(x_BTH) + residual_BTH

    def choose(self, hidden_BH: Tensor) -> Tensor:
        """See `ascend.speculation.Drafter`."""
        return self.target[self.logits(hidden_BH).argmax(-1)]

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Of the draft vocabulary, fp32 ``[..., V']``."""
        return self.lm_head(ops.rms_norm(hidden_BTH, self.norm.weight, self.eps)).float()

    def _attention(self, x_BTI: Tensor, start_B: Tensor, cache: StaticCache) -> Tensor:
        position_BT = positions(cache.written_B, start_B, x_BTI.shape[1])
        if self.frequencies is None or self.frequencies.device != x_BTI.device:
            self.frequencies = self.rope.inverse_frequencies().to(x_BTI.device)
        seen = (start_B, cache.written_B)
        tables = cos_sin(self.frequencies, 1.0, position_BT)
        step = layout.step(*tables, cache.written_B, cache.slots, seen, self.config.head_dim, x_BTI.dtype)
        new = (self.query_key_value(x_BTI), None, None, step.cos, step.sin, *cache.buffers(0, x_BTI))
        out_BTND = ops.cached_attention(*new, *seen, self.eps, self.scale, step.slots, step.mask, None)
        return self.dense(out_BTND.flatten(2))


def random_head(model: BailingMoeV2ForCausalLM, config: Eagle3Config | None = None, *, seed: int = 0) -> Eagle3Head:
    """A head with random weights for measuring, on the model's device, in its dtype and with its embedding."""
    head = _empty(config or Eagle3Config.published(model.config), model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name in PARTS and parameter.ndim > 1:
                parameter.normal_(0.0, 0.02)
            elif name in PARTS:
                parameter.fill_(1.0)
        # Spread over the vocabulary.
        drafted = torch.arange(head.config.draft_vocab_size, device=model.device)
        head.target.copy_(drafted * head.config.vocab_size // head.config.draft_vocab_size)
    return head


def load_eagle3(path: str | Path, model: BailingMoeV2ForCausalLM) -> Eagle3Head:
    """Load a head for ``model`` from a directory with ``config.json`` and ``model.safetensors``, in the model's dtype.

    Raises `UserError` for a pickle, a head of another form or for another model, and tensors missing, extra or wrong.
    """
    path = Path(path)
    config, names = open_head(path, model.config)
    head = _empty(config, model)
    wanted = dict(_places(head))
    if EMBEDDING in names:  # trained along: then not shared
        head.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device=model.device, dtype=model.dtype)
        wanted[EMBEDDING] = head.embed_tokens.requires_grad_(False).weight
    file = path / SINGLE
    with safe_open(file, framework="pt") as stored, torch.no_grad():
        for name, place in wanted.items():
            place.copy_(stored.get_tensor(names[name]))
        drafted = torch.arange(config.draft_vocab_size)
        target = drafted + stored.get_tensor(names["d2t"]) if "d2t" in names else drafted
        if int(target.min()) < 0 or int(target.max()) >= config.vocab_size:
            raise UserError(f"{file}: d2t leads outside the vocabulary of {config.vocab_size}; the file is damaged")
        if "t2d" in names and not torch.equal(stored.get_tensor(names["t2d"]).nonzero()[:, 0], target.sort().values):
            raise UserError(f"{file}: t2d and d2t name different tokens; the file is damaged")
        head.target.copy_(target)
    return head


def _empty(config: Eagle3Config, model: BailingMoeV2ForCausalLM) -> Eagle3Head:
    """A head for ``model`` whose weights are yet to be filled. Raises `UserError` if it does not go with the model."""
    check_fits(config, model.config)
    with torch.device("meta"):
        head = Eagle3Head(config)
    dtypes = {name: model.dtype for name in PARTS}
    head = head.to_empty(device=model.device).requires_grad_(False).eval()
    for name, parameter in head.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    head.embed_tokens = model.model.word_embeddings
    return head


def _places(head: Eagle3Head) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor that a checkpoint must have, with its place."""
    config = head.config
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    sizes = {"query_key_value.weight": [query, key, key], "mlp.gate_up": [config.intermediate_size] * 2}
    for name, parts in PARTS.items():
        parameter = head.get_parameter(name).data
        yield from zip(parts, parameter.split(sizes.get(name, len(parameter))), strict=True)
