"""vLLM's own BailingMoeV2, completed: checkpoints with MTP layers, routing in fp32, what draft models need of it.

MTP layers: vLLM 0.32 and 0.33 refuse a checkpoint with a tensor they have no parameter for, and these layers, stored
as ``model.layers.{num_hidden_layers + i}``, have none (``There is no module or parameter named 'layers.32'``); 0.23
passes over them in silence. As drafts they are loaded by `mtp.py`.
Routing: vLLM computes the router's logits in fp32, as the model's configuration says, and then rounds them to the
model's dtype (``bailing_moe.py``); vllm-ascend rounds the experts' bias too (``fused_moe_0_23_0.py:209``).
Drafts: EAGLE3 wants the streams between some layers, and both it and MTP look for the embedding as ``embed_tokens``.
Quantised weights on the CPU: see `widened.py`; sampling with drafts there: see `cpu_sampling.py`.
No issue or pull request of vLLM's is known to us on the others. Each part is to be dropped when vLLM has it.

T tokens of the step, H hidden_size, E experts.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models import bailing_moe
from vllm.model_executor.models.interfaces import EagleModelMixin, SupportsEagle3
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from ascend.eagle3_config import default_taps, tapped_layers

_built: list[weakref.ref[BailingMoeV2ForCausalLM]] = []  # in this process: one, before its draft model
LAYER = re.compile(r"model\.layers\.(\d+)\.")


class BailingMoE(bailing_moe.BailingMoE):
    """The experts' block, routed in ``config.router_dtype`` to the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.gate.expert_bias is not None:
            self.gate.expert_bias.data = self.gate.expert_bias.data.float()  # one parameter, which the experts have too

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` to ``[T, H]``."""
        x_TH = hidden_states
        gate: Any = self.gate
        if isinstance(gate, nn.Linear):  # 0.23
            logits_TE = gate(x_TH.to(gate.weight.dtype))
        else:  # vLLM's own linear layer, which picks a kernel by the dtypes and returns a bias beside
            logits_TE, _ = gate(x_TH)
        out_TH: torch.Tensor = self.experts(hidden_states=x_TH, router_logits=logits_TE)
        return out_TH.view_as(x_TH)


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "position_ids": 0, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class BailingMoeModel(bailing_moe.BailingMoeModel, EagleModelMixin):
    """The decoder, which also returns the streams before the layers that were set, and there none by default."""

    def forward(  # type: ignore[override]  # the taps
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """Hidden states ``[T, H]`` after the last norm, and with taps a list of as many ``[T, H]`` beside."""
        residual_TH: torch.Tensor | None = None
        if get_pp_group().is_first_rank:
            given: Any = input_ids
            x_TH = self.embed_input_ids(given) if inputs_embeds is None else inputs_embeds
        else:
            assert intermediate_tensors is not None, "vLLM gives every later rank what the one before sent"
            x_TH, residual_TH = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        taps: list[torch.Tensor] = []
        for number, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), self.start_layer):
            self._maybe_add_hidden_state(taps, number, x_TH, residual_TH)
            x_TH, residual_TH = layer(x_TH, position_ids, residual_TH)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x_TH, "residual": residual_TH})  # type: ignore[dict-item]
        hidden_TH, _ = self.norm(x_TH, residual_TH)
        return (hidden_TH, taps) if taps else hidden_TH


# vLLM's classes make one another by these names.
for completed in (BailingMoE, BailingMoeModel):
    setattr(bailing_moe, completed.__name__, completed)

if current_platform.is_cpu():
    import serve.plugin.cpu_sampling  # noqa: F401, mends vLLM's


class BailingMoeV2ForCausalLM(bailing_moe.BailingMoeV2ForCausalLM, SupportsEagle3):
    """The main model: everything but the MTP layers; quantised weights are widened where vLLM's layers are plain."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._speculative = vllm_config.speculative_config
        # Not as a submodule, which would be a second name of every parameter in it.
        object.__setattr__(self.model, "embed_tokens", self.model.word_embeddings)
        _built.append(weakref.ref(self))

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        """Tap the streams before ``layers``; the ids in a draft head's own configuration may mean those after them."""
        draft = getattr(self._speculative, "draft_model_config", None)
        eagle = getattr(draft.hf_config, "eagle_config", None) if draft else None
        named = eagle.get("eagle_aux_hidden_state_layer_ids") if isinstance(eagle, dict) else None
        super().set_aux_hidden_state_layers(tapped_layers(named) if named else layers)

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, ...]:
        """For a head whose configuration names none."""
        return default_taps(self.config.num_hidden_layers)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load what belongs to the first ``num_hidden_layers`` layers and to no layer. Returns the names loaded."""
        own = (one for one in weights if not is_mtp(one[0], self.config.num_hidden_layers))
        loaded: set[str] = super().load_weights(plain(self, own))
        return loaded


def main_head() -> nn.Module:
    """The head of this process's main model."""
    model = _built[-1]()
    assert model is not None, "a draft model lives no longer than the main one"
    return model.lm_head


def is_mtp(name: str, num_hidden_layers: int) -> bool:
    """Whether a tensor of a checkpoint belongs to an MTP layer."""
    layer = LAYER.match(name)
    return layer is not None and int(layer[1]) >= num_hidden_layers


def plain(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
    """On the CPU the weights widened to what vLLM's plain layers take, elsewhere as they are."""
    if not current_platform.is_cpu():
        return weights
    from serve.plugin.widened import WidenedConfig  # here, as its import registers the method
    from serve.plugin.widening import widened

    is_plain = model.quant_config is None or isinstance(model.quant_config, WidenedConfig)  # None: or ModelSlim's
    return widened(weights, next(model.parameters()).dtype) if is_plain else weights
