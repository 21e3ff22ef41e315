"""BailingMoeV2, written once: cached or not, quantised or not, on one device or a rank of many, over the ops of `ops`.

Read from the bottom: `BailingMoeV2ForCausalLM` → `BailingMoeV2Model` → `DecoderLayer` → `Attention` and `MoE`. The
modules that hold weights are in `ascend.weights`; `ascend.loader` has the table that maps the checkpoint's names to
them; what is this rank's share is said by `ascend.parallel`.

Shapes: B rows, T new tokens per row, S cache slots, H hidden_size, V vocabulary, N query heads, G key/value heads,
D head_dim, C = (N + 2G)·D, R = rotary dimensions / 2, E experts, I intermediate width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import ops
from ascend.cache import LayerCache, TransientCache
from ascend.config import BailingMoeV2AliasConfig, BailingMoeV2Config
from ascend.errors import UserError
from ascend.parallel import Parallel
from ascend.rope import Rope, cos_sin
from ascend.weights import MLP, Experts, Weight
from ops import layout
from ops.layout import StepLayout
from ops.placement import Placement, physical

# Arguments of `from_pretrained` that would change the model; all others that transformers knows change how it loads.
NOT_IGNORED = {"quantization_config", "load_in_8bit", "load_in_4bit", "state_dict", "key_mapping", "tp_plan"}


@dataclass(frozen=True)
class Step:
    """What all layers of one forward pass share.

    Per row the first and the end of the seen slots, the end also on the host (``lengths``) where it is known there and
    no row is padded; rotary tables, slots and mask in the device's layout.
    """

    layout: StepLayout
    start_B: Tensor
    length_B: Tensor
    lengths: list[int] | None
    cache: LayerCache
    counts: list[int] | None  # tokens that each rank brings to an MoE layer, where they differ


class Attention(nn.Module):
    """Grouped-query attention with optional RMSNorm of each query and key head before RoPE; this rank's heads."""

    def __init__(self, config: BailingMoeV2Config, layer: int, parallel: Parallel) -> None:
        super().__init__()
        self.layer, self.eps, self.scale = layer, config.rms_norm_eps, config.head_dim**-0.5
        self.tensor, self.head_dim, self.rotary_dim = (
            parallel.tensor,
            config.head_dim,
            Rope.from_config(config).rotary_dim,
        )
        query, key = map(len, parallel.heads(config))
        self.rotated = (query + key) * config.head_dim
        self.query_key_value = Weight((query + 2 * key) * config.head_dim, config.hidden_size, bias=config.use_qkv_bias)
        self.dense = Weight(config.hidden_size, query * config.head_dim, bias=config.use_bias)
        self.query_layernorm = Weight(config.head_dim) if config.use_qk_norm else None
        self.key_layernorm = Weight(config.head_dim) if config.use_qk_norm else None

    def forward(self, x_BTH: Tensor, step: Step) -> Tensor:
        """``[B, T, H]`` → ``[B, T, H]``; writes the new keys and values to the step's cache."""
        qkv_BTC = self.query_key_value(x_BTH)
        q_norm = self.query_layernorm.weight if self.query_layernorm is not None else None
        k_norm = self.key_layernorm.weight if self.key_layernorm is not None else None
        out_BTND = self._attend(qkv_BTC, q_norm, k_norm, step)
        return self.tensor.all_reduce(self.dense(out_BTND.flatten(2)))

    def _attend(self, qkv_BTC: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, step: Step) -> Tensor:
        cache, shared, eps = step.cache, step.layout, self.eps
        k, v = cache.buffers(self.layer, qkv_BTC)
        new = (qkv_BTC, q_norm, k_norm, shared.cos, shared.sin, k, v)
        seen = (step.start_B, step.length_B)
        if cache.in_place:
            return ops.cached_attention(*new, *seen, eps, self.scale, shared.slots, shared.mask, step.lengths)
        q = ops.rope_to_cache(*new, cache.written_B, eps, shared.slots)
        return ops.attention(q, *cache.commit(self.layer, k, v), *seen, self.scale, shared.mask, step.lengths)

    def lay_out(self) -> None:
        """Bring the rows of query and key heads into the order that the device's rotary kernel takes."""
        self.query_key_value.reorder_heads(self.rotated, self.head_dim, self.rotary_dim)
        for norm in (self.query_layernorm, self.key_layernorm):
            if norm is not None:
                norm.reorder_heads(self.head_dim, self.head_dim, self.rotary_dim)


class Gate(nn.Module):
    """The router: its weight and its choosing bias stay fp32 whatever the model's dtype."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))
        self.expert_bias = nn.Parameter(torch.empty(config.num_experts, dtype=torch.float32), requires_grad=False)
        self.top_k, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalise, self.scaling = config.norm_topk_prob, float(config.routed_scaling_factor)

    def forward(
        self, x_TH: Tensor, norm: tuple[Tensor, Tensor, float] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return ``(weight_TK, expert_TK, x_TH, None)`` of the chosen experts; see `ops.reference.moe_gate`.

        With ``norm``, ``(residual_TH, norm_H, eps)``, what is routed is the normalised sum of ``x_TH`` and the
        residual stream: it and the sum are the last two.
        """
        routing = (self.top_k, self.n_group, self.topk_group, self.normalise, self.scaling)
        if norm is None:
            return *ops.moe_gate(x_TH, self.weight, self.expert_bias, *routing), x_TH, None
        return ops.add_rms_norm_gate(x_TH, *norm, self.weight, self.expert_bias, *routing)


class MoE(nn.Module):
    """Routed experts plus, where there are any, the shared ones that see every token."""

    def __init__(self, config: BailingMoeV2Config, layer: int, parallel: Parallel) -> None:
        super().__init__()
        slots, total = parallel.local_slots(config.num_experts), parallel.numbers(config.num_experts)
        width = len(parallel.expert_width(config.moe_intermediate_size))
        shared_width = len(parallel.share(config.shared_intermediate_size))
        self.parallel, self.mixture = parallel, parallel.mixture(config.num_experts)
        self.placement = parallel.placed(layer)
        self.copies: tuple[Tensor, Tensor] | None = None  # where each expert's slots are, if not simply in order
        self.gate = Gate(config)
        self.experts = Experts(len(slots), config.hidden_size, width, slots.start, total)
        self.shared_experts = MLP(config.hidden_size, shared_width) if shared_width else None

    def forward(
        self, x_BTH: Tensor, counts: list[int] | None = None, chosen: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """``[B, T, H]`` → ``[B, T, H]``; ``counts`` as in `Step`, ``chosen`` what the gate said of these tokens."""
        x_TH = x_BTH.flatten(0, -2)
        weight_TK, expert_TK = chosen or self.gate(x_TH)[:2]
        if self.placement is not None:
            expert_TK = self._slots_of(self.placement, expert_TK)
        out_TH = self.parallel.mix(self.mixture, x_TH, weight_TK, expert_TK, self.experts, self.shared_experts, counts)
        return out_TH.view_as(x_BTH)

    def _slots_of(self, placement: Placement, expert_TK: Tensor) -> Tensor:
        """Turn experts into slots: which copy a token goes to depends on its place in the step."""
        if self.copies is None or self.copies[0].device != expert_TK.device:
            self.copies = placement.table(expert_TK.device)
        return physical(expert_TK, *self.copies, 0 if self.parallel.replicated else self.parallel.world.rank)


class DecoderLayer(nn.Module):
    """Attention and MLP, each on the normalised residual stream and added back to it."""

    def __init__(self, config: BailingMoeV2Config, layer: int, parallel: Parallel) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = Weight(config.hidden_size)
        self.attention = Attention(config, layer, parallel)
        self.post_attention_layernorm = Weight(config.hidden_size)
        if config.is_moe_layer(layer):
            self.mlp: MoE | MLP = MoE(config, layer, parallel)
        else:
            self.mlp = MLP(config.hidden_size, len(parallel.share(config.intermediate_size)), parallel.tensor)

    def forward(self, x_BTH: Tensor, residual_BTH: Tensor | None, step: Step) -> tuple[Tensor, Tensor]:
        """Return the MLP's output and the stream it is yet to be added to: the next norm does both at once."""
        if residual_BTH is None:
            x, residual = ops.rms_norm(x_BTH, self.input_layernorm.weight, self.eps), x_BTH
        else:
            x, residual = ops.add_rms_norm(x_BTH, residual_BTH, self.input_layernorm.weight, self.eps)
        x = self.attention(x, step)
        norm_H = self.post_attention_layernorm.weight
        if isinstance(self.mlp, MoE):
            norm = (residual.flatten(0, -2), norm_H, self.eps)
            weight_TK, expert_TK, x_TH, residual_TH = self.mlp.gate(x.flatten(0, -2), norm)
            return self.mlp(x_TH.view_as(x), step.counts, (weight_TK, expert_TK)), residual_TH.view_as(x)
        x, residual = ops.add_rms_norm(x, residual, norm_H, self.eps)
        return self.mlp(x), residual


class MTPLayer(DecoderLayer):
    """Multi-token prediction: one more decoder layer on the normalised pair (next token's embedding, hidden state)."""

    def __init__(self, config: BailingMoeV2Config, layer: int, parallel: Parallel) -> None:
        super().__init__(config, layer, parallel)
        self.enorm = Weight(config.hidden_size)
        self.hnorm = Weight(config.hidden_size)
        self.eh_proj = Weight(config.hidden_size, 2 * config.hidden_size)
        self.final_layernorm = Weight(config.hidden_size)

    def draft(self, embedding_BTH: Tensor, hidden_BTH: Tensor, step: Step) -> Tensor:
        """Hidden states ``[B, T, H]`` to put through the head, after the layer's own final norm."""
        embedding = ops.rms_norm(embedding_BTH, self.enorm.weight, self.eps)
        hidden = ops.rms_norm(hidden_BTH, self.hnorm.weight, self.eps)
        x, residual = self(self.eh_proj(torch.cat([embedding, hidden], dim=-1)), None, step)
        return ops.add_rms_norm(x, residual, self.final_layernorm.weight, self.eps)[0]


class BailingMoeV2Model(nn.Module):
    """Embedding, decoder layers and final norm; the MTP layers follow the decoder layers in the same list."""

    def __init__(self, config: BailingMoeV2Config, parallel: Parallel) -> None:
        super().__init__()
        self.config, self.eps, self.parallel = config, config.rms_norm_eps, parallel
        self.rope = Rope.from_config(config)
        self.laid_out = False  # whether the weights are in the layout of a device that wants one of its own
        self.frequencies: Tensor | None = (
            None  # made at first use: a model that is built on the meta device has no data
        )
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList([DecoderLayer(config, layer, parallel) for layer in range(depth)])
        self.layers.extend([MTPLayer(config, depth + i, parallel) for i in range(config.num_nextn_predict_layers)])
        self.norm = Weight(config.hidden_size)

    @property
    def kv_heads(self) -> int:
        """Key/value heads on this rank."""
        return len(self.parallel.heads(self.config)[1])

    def lay_out(self) -> None:
        """Bring all weights into the layout of the device they are on; the loader calls it once."""
        device = self.norm.weight.device
        if device.type != "cpu" and not self.laid_out:
            for module in self.layers.modules():
                lay_out = getattr(module, "lay_out", None)
                if lay_out is not None:
                    lay_out()
            self.laid_out = layout.is_own(device)

    def step(
        self,
        position_BT: Tensor,
        start_B: Tensor,
        length_B: Tensor,
        cache: LayerCache,
        lengths: list[int] | None = None,
        counts: list[int] | None = None,
    ) -> Step:
        """Make what the layers share in a pass over the tokens at these positions; see `Step`."""
        device = position_BT.device
        if layout.is_own(device) and not self.laid_out:
            raise UserError(f"the weights were moved to {device}, where they need another layout: load the model there")
        if self.frequencies is None or self.frequencies.device != device:
            self.frequencies = self.rope.inverse_frequencies().to(device)
        cos, sin = cos_sin(self.frequencies, self.rope.attention_factor, position_BT)
        # Where the cache attends to more than what it has written to, the op makes the mask itself.
        masked = (start_B, length_B) if lengths is None and length_B is cache.written_B else None
        shared = layout.step(
            cos, sin, cache.written_B, cache.slots, masked, self.config.head_dim, self.norm.weight.dtype
        )
        return Step(shared, start_B, length_B, lengths, cache, counts)

    def forward(
        self,
        embedding_BTH: Tensor,
        step: Step,
        taps: list[Tensor] | None = None,
        tapped: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Return the hidden states after the final norm, ``[B, T, H]``.

        ``taps`` collects the residual stream before the first layer and after each one; with ``tapped``, before those
        layers alone.
        """
        x: Tensor = embedding_BTH
        residual: Tensor | None = None
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            if taps is not None and (tapped is None or index in tapped):
                taps.append(x if residual is None else x + residual)
            x, residual = layer(x, residual, step)
        assert residual is not None, "a model has at least one layer"
        if taps is not None and tapped is None:
            taps.append(x + residual)
        return ops.add_rms_norm(x, residual, self.norm.weight, self.eps)[0]


class BailingMoeV2ForCausalLM(PreTrainedModel, GenerationMixin):
    """The model with its head; a transformers model in every respect but training (the ops define no gradient)."""

    config: BailingMoeV2Config
    config_class: type[BailingMoeV2Config] = BailingMoeV2Config
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True  # transformers asks; attention is `ops.attention` whatever it is told
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer", "MTPLayer"]  # type: ignore[misc]

    def __init__(self, config: BailingMoeV2Config, parallel: Parallel | None = None) -> None:
        super().__init__(config)
        self.parallel = parallel or Parallel()
        self.parallel.check(config)
        self.model = BailingMoeV2Model(config, self.parallel)
        rows = len(self.parallel.vocabulary(config.vocab_size))
        self.lm_head = None if config.tie_word_embeddings else Weight(rows, config.hidden_size)
        # `ascend.load_model` turns this on: a call then returns the logits themselves, not a transformers output.
        self.plain_logits = False
        self.quantised: str | None = None  # the format, after `ascend.quantisation`
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Tensor | CausalLMOutputWithPast:
        """Logits of every position (of the last ``logits_to_keep``, if given): fp32 ``[B, T, V]``.

        ``input_ids`` is int64 ``[B, T]``; ``attention_mask`` ``[B, past + T]`` marks padding on the left with zeros (on
        the right too, where nothing is cached). ``past_key_values`` is a transformers cache. Returns the tensor alone
        after `ascend.load_model`, a `CausalLMOutputWithPast` after `from_pretrained` or with ``return_dict=True``.
        """
        if ignored.get("labels") is not None:
            raise UserError("this model computes no loss: its ops are for inference and define no gradient")
        embedding = self.model.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        as_output = return_dict if return_dict is not None else not self.plain_logits
        if past_key_values is None and (use_cache if use_cache is not None else self.config.use_cache and as_output):
            past_key_values = DynamicCache()
        step = self._step(embedding, attention_mask, position_ids, past_key_values)
        taps: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.model(embedding, step, taps)
        kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        logits = self.logits(kept)
        if not as_output:
            return logits
        states = None if taps is None else (*taps[:-1], hidden)
        return CausalLMOutputWithPast(None, logits, past_key_values, states)  # type: ignore[arg-type]

    def mtp_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """One fp32 ``[B, T, V]`` per MTP layer: ``drafts[i][:, t]`` predicts token ``t + 2 + i``.

        Position ``t`` of layer ``i`` sees the embedding of token ``t + 1 + i``, so the last ``i + 1`` positions have
        none (they get token 0's, as in the authors' code) and predict nothing of use.
        """
        embedding = self.model.word_embeddings(input_ids)
        step = self._step(embedding, attention_mask, None, None)
        hidden = self.model(embedding, step)
        drafts = []
        for layer in self.model.layers[self.config.num_hidden_layers :]:
            input_ids = F.pad(input_ids[:, 1:], (0, 1))
            hidden = layer.draft(self.model.word_embeddings(input_ids), hidden, step)
            drafts.append(self.logits(hidden))
        return drafts

    def logits(self, hidden_BTH: Tensor) -> Tensor:
        """Put normalised hidden states through the head: fp32 ``[..., V]``."""
        if self.lm_head is None:
            return ops.linear(hidden_BTH, self.model.word_embeddings.weight, None).float()
        return self.parallel.whole_vocabulary(self.lm_head(hidden_BTH), self.config.vocab_size).float()

    def _step(
        self, embedding_BTH: Tensor, mask: Tensor | None, position_BT: Tensor | None, transformers_cache: Any
    ) -> Step:
        B, T, _ = embedding_BTH.shape
        device = embedding_BTH.device
        past = 0 if transformers_cache is None else int(transformers_cache.get_seq_length())
        start_B = torch.zeros(B, dtype=torch.int64, device=device)
        padding_B = None
        if mask is not None:
            padding_B = left_padding(mask, B, past + T, may_end_in_padding=past == 0 and transformers_cache is None)
        if padding_B is not None:
            start_B = padding_B
        slot_T = torch.arange(past, past + T, device=device)
        if position_BT is None:
            position_BT = (slot_T - start_B[:, None]).clamp(min=0)
        cache = TransientCache(self.model.kv_heads, self.config.head_dim, B, slot_T, transformers_cache)
        length_B = torch.full((B,), past + T, dtype=torch.int64, device=device) if past else cache.written_B
        lengths = [past + T] * B if padding_B is None else None
        counts = self.parallel.counts(B * T)
        return self.model.step(position_BT.expand(B, T), start_B, length_B, cache, lengths, counts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                parameter.normal_(0.0, self.config.initializer_range)
            else:
                parameter.fill_(1.0 if name == "weight" else 0.0)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: a tied head has no weight of its own."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table's module."""
        return self.model.word_embeddings

    def get_output_embeddings(self) -> nn.Module | None:
        """The head's module; None where it is the embedding table."""
        return self.lm_head

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Keep the two-dimensional mask that transformers would blow up to ``[B, 1, T, S]`` for a static cache."""
        return attention_mask

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: BailingMoeV2Config | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **ignored: Any,
    ) -> BailingMoeV2ForCausalLM:
        """Load a local directory as transformers would, by this project's loader: strict, in place, no remote code.

        ``dtype`` is a torch dtype, its name, or ``"auto"`` (as stored, the default); ``device_map`` one device or
        ``"auto"``. Raises `UserError` for a directory that `ascend.load_model` refuses.
        """
        from ascend.loader import load

        for key in NOT_IGNORED & ignored.keys():
            if ignored[key]:
                raise UserError(f"from_pretrained: {key} is not supported by this model")
        return load(pretrained_model_name_or_path, config, device_map or "cpu", dtype or torch_dtype)

    def save_pretrained(self, save_directory: str | Path, max_shard_size: int | str = "5GB", **ignored: Any) -> None:  # type: ignore[override]
        """Write ``config.json`` and safetensors under the checkpoint's original tensor names."""
        from ascend.loader import save

        save(self, Path(save_directory), max_shard_size)


class BailingMoeV2AliasForCausalLM(BailingMoeV2ForCausalLM):
    """The same model for configurations of the other `model_type`."""

    config_class = BailingMoeV2AliasConfig


def left_padding(mask: Tensor, batch: int, length: int, may_end_in_padding: bool) -> Tensor | None:
    """Return each row's number of padded slots on the left, int64 ``[B]``, from a mask ``[B, S]`` of ones and zeros.

    None if no row has any: then attention need not be told.

    Raises `UserError` for a mask of another shape, with padding between tokens, or (unless ``may_end_in_padding``) with
    padding on the right, where new tokens would go.
    """
    if mask.shape != (batch, length):
        raise UserError(
            f"attention_mask has shape {list(mask.shape)}, expected [{batch}, {length}]: a zero per padded slot"
        )
    real = mask.to(torch.int8)
    if not bool(real.any(-1).all()):
        raise UserError("attention_mask has a row of padding alone; every prompt needs a token")
    start_B = real.argmax(-1)
    end_B = start_B + real.sum(-1)
    slot_S = torch.arange(length, device=mask.device)
    filled = (slot_S >= start_B[:, None]) & (slot_S < end_B[:, None])
    if not torch.equal(filled, real.bool()):
        raise UserError("attention_mask has padding between tokens; pad on the left only")
    if not may_end_in_padding and bool((end_B < length).any()):
        raise UserError("attention_mask pads on the right; pad prompts on the left (tokenizer.padding_side = 'left')")
    return start_B if bool(start_B.any()) else None
