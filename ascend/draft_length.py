"""How many drafts pay at a batch: from what steps cost there, measured on the spot, and how often drafts are right.

With a mixture of experts a verification of few rows reads the experts of every draft, so a step with 3 drafts costs
1.6 to 2.8 plain ones up to batch 8, and hardly more than one from batch 64 on: no fixed number suits all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend.devices import get_device
from ascend.generation import bucket
from ascend.model import BailingMoeV2ForCausalLM
from ascend.roofline import TYPICAL_ACCEPTANCE, tokens_per_step
from ascend.speculation import Drafter, SpeculativeDecoder

CANDIDATES = (1, 2, 3, 5, 7)
REPEATS = 5


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a plain step, of verifying k drafts by k, and of running the draft layer once."""

    plain: float
    verify: Mapping[int, float]
    draft: float

    def seconds(self, drafts: int) -> float:
        """Seconds of a step with so many drafts; 0 is a plain one."""
        return self.verify[drafts] + drafts * self.draft if drafts else self.plain


def choose_drafts(costs: StepCosts, acceptance: Sequence[float] = TYPICAL_ACCEPTANCE) -> int:
    """The number of drafts, of those measured, that makes the most tokens per second; 0 where none pays."""
    numbers = (0, *sorted(costs.verify))
    rate = {drafts: tokens_per_step(drafts, acceptance) / costs.seconds(drafts) for drafts in numbers}
    return max(rate, key=lambda drafts: rate[drafts])


@torch.inference_mode()
def measure_costs(
    model: BailingMoeV2ForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    capture: bool,
    drafter: Drafter,
    *,
    kv_dtype: str | None = None,
    candidates: Sequence[int] = CANDIDATES,
) -> StepCosts:
    """Time the parts of a step behind these prompts, as graphs with ``capture``: each the median of a few runs."""
    rows = bucket(len(input_ids)) if capture else len(input_ids)
    row_B = torch.arange(rows, device=input_ids.device).clamp_(max=len(input_ids) - 1)
    mask = None if attention_mask is None else attention_mask[row_B]
    most = max(candidates)
    decoder = SpeculativeDecoder(model, input_ids[row_B], mask, 1, drafts=most, drafter=drafter, kv_dtype=kv_dtype)
    device = get_device(str(input_ids.device))
    decoder.prefill()

    def seconds(run: Callable[[], Tensor]) -> float:
        again, taken = device.capture(run) if capture else run, []
        again()
        for _ in range(REPEATS):
            device.synchronize()
            begin = time.perf_counter()
            again()
            device.synchronize()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    verify = {drafts: seconds(lambda drafts=drafts: decoder.verified(drafts)) for drafts in (0, *candidates)}  # type: ignore[misc]
    return StepCosts(verify.pop(0), verify, seconds(decoder.drafted))
