"""vllm-ascend gives an MTP draft the main model's embedding, but its head only to models with latent attention (MLA).

vLLM's own proposer gives both. Calls the method of each that shares the head, on a draft and a main model of one layer.
Without a card: `python -m ascend.emulator -- python serve/upstream/mtp_head.py`.
"""

from types import SimpleNamespace

import vllm_ascend.ops  # noqa: F401, first: the proposer's module alone is a circular import
from torch import nn
from vllm.config import CUDAGraphMode
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm_ascend.spec_decode.llm_base_proposer import AscendSpecDecodeBaseProposer


class Model(nn.Module):
    """As much of a model as is looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = nn.Module(), nn.Linear(8, 32)


for name, proposer in (("vLLM", SpecDecodeBaseProposer), ("vllm-ascend", AscendSpecDecodeBaseProposer)):
    draft, main = Model(), Model()
    config = SimpleNamespace(
        model_config=SimpleNamespace(is_deepseek_mla=False),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        speculative_config=None,
    )
    itself = SimpleNamespace(method="mtp", model=draft, vllm_config=config, use_local_argmax_reduction=False)
    proposer._maybe_share_lm_head(itself, main)
    print(f"{name}: the draft's head is the main model's: {draft.lm_head is main.lm_head}")
