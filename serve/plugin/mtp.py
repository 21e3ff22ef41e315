"""The MTP layers of a BailingMoeV2 checkpoint as a draft model of vLLM's.

A layer takes the embedding of the next token and the main model's hidden state, each normalised, side by side through
``eh_proj`` to one state, and that through a decoder layer like all others and ``final_layernorm``; embedding table and
head are the main model's (`ascend.model.MTPLayer`, the same arithmetic). Other than vLLM's own MTP models it does not
zero the embedding at position 0: the authors' code does not. Of several layers the newer model runner (of CUDA, in
0.32) runs each for its draft; the older one, which vllm-ascend 0.23 has too, the first for all of them.

T tokens of the step, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models import bailing_moe
from vllm.model_executor.models.utils import maybe_prefix

from serve.plugin.model import BailingMoeModel, BailingMoeV2ForCausalLM, is_mtp, main_head, plain


class _Layer(bailing_moe.BailingMoeBlock):
    def __init__(self, config: Any, cache_config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__(config, cache_config, quant_config, prefix=prefix)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm, self.final_layernorm = (RMSNorm(size, eps=eps) for _ in range(3))
        # Not quantised: the published checkpoints and `convert` leave it as it is.
        self.eh_proj = ReplicatedLinear(2 * size, size, bias=False, return_bias=False, prefix=f"{prefix}.eh_proj")

    def draft(self, embedding_TH: torch.Tensor, hidden_TH: torch.Tensor, position_T: torch.Tensor) -> torch.Tensor:
        pair = torch.cat([self.enorm(embedding_TH), self.hnorm(hidden_TH)], dim=-1)
        x_TH, residual_TH = self(self.eh_proj(pair), position_T, None)
        out_TH: torch.Tensor = self.final_layernorm(x_TH, residual_TH)[0]
        return out_TH


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "hidden_states": 0, "inputs_embeds": 0})
class _Layers(BailingMoeModel):
    """The MTP layers alone, under the numbers that the checkpoint gives them, loaded as vLLM loads the main model's."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        self.config = config = vllm_config.model_config.hf_config
        self.first, self.count = config.num_hidden_layers, config.num_nextn_predict_layers
        parts = (config, vllm_config.cache_config, vllm_config.quant_config)
        numbers = range(self.first, self.first + self.count)
        layers: Any = nn.ModuleDict({str(i): _Layer(*parts, prefix=f"{prefix}.layers.{i}") for i in numbers})
        self.layers = layers
        self.embed_tokens = nn.Identity()  # its place: vLLM puts the main model's here

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedding_TH: torch.Tensor = self.embed_tokens(input_ids)
        return embedding_TH

    def forward(  # type: ignore[override]  # a draft model's
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            assert input_ids is not None, "vLLM gives one of the two"
            inputs_embeds = self.embed_input_ids(input_ids)
        layers: Any = self.layers
        layer: _Layer = layers[str(self.first + spec_step_idx % self.count)]
        return layer.draft(inputs_embeds, hidden_states, positions)


class BailingMoeV2MTPModel(nn.Module):
    """What vLLM's ``EagleProposer`` runs with ``method: mtp``: drafts one token a pass."""

    packed_modules_mapping = BailingMoeV2ForCausalLM.packed_modules_mapping

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        speculative = vllm_config.speculative_config
        assert speculative is not None, "vLLM makes a draft model only with it"
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.model = _Layers(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module | None = None  # its place: vLLM puts the main model's here; vllm-ascend does not
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[T, H]``."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        """Hidden states ``[T, H]`` of layer ``spec_step_idx``, for the head and for the next draft."""
        out_TH: torch.Tensor = self.model(input_ids, positions, hidden_states, inputs_embeds, spec_step_idx)
        return out_TH

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor | None:
        """Logits ``[T, V]``; the final norm is the layer's own and done."""
        logits_TV: torch.Tensor | None = self.logits_processor(self.lm_head or main_head(), hidden_states)
        return logits_TV

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the MTP layers; the rest of the checkpoint is the main model's. Returns the names loaded."""
        own = (one for one in weights if is_mtp(one[0], self.config.num_hidden_layers))
        stripped = ((name.removeprefix("model."), tensor) for name, tensor in plain(self, own))
        return {f"model.{name}" for name in self.model.load_weights(stripped)}
