"""Sampled answers with drafts on the CPU: vLLM's own are drawn from another distribution.

vLLM 0.32 expands temperature, top_k and top_p of each request to its drafted tokens by a C++ kernel that takes int64
alone; what it writes goes into a copy that is thrown away, and memory that nobody wrote to is taken for the temperature
(vLLM's issue 55005, open; greedy answers are right). In torch it is one line. To be dropped with vLLM's repair.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """Each of ``x [batch]`` as often as it has tokens, ``[num_tokens]``; ``cu_num_tokens [batch]`` sums them up."""
    count = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(count, output_size=num_tokens)


rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
