"""`--check FILE`: the logits of source and target on the same prompts, through `ascend`, for models that fit in memory.

Prompts may be patients' data: their text goes nowhere, only figures come out.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend.checkpoint import Checkpoint
from ascend.devices import get_device
from ascend.errors import UserError
from convert.quality import digits, gigabytes

MOST_BYTES = 2 << 30  # of the source's logits, kept until the target has spoken


def check_fits(checkpoint: Checkpoint, texts: Sequence[Sequence[int]]) -> None:
    """Raise `UserError` if source and logits do not fit in this machine's memory, before anything is converted."""
    wanted, free = checkpoint.nbytes, get_device("cpu").memory().free
    if wanted > free:
        raise UserError(
            f"--check loads the whole model, {gigabytes(wanted)}, and {gigabytes(free)} of memory are free: "
            "leave it out here, and compare on the card with `python -m perf parity`"
        )
    logits = sum(map(len, texts)) * int(checkpoint.config["vocab_size"]) * 4
    if logits > MOST_BYTES:
        raise UserError(
            f"--check: the logits of {sum(map(len, texts))} tokens are {gigabytes(logits)}; give fewer prompts"
        )


def compare_logits(source: Path, target: Path, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Run both models, one after the other, on token ids; returns figures over all positions.

    cosine: of the logits' vectors, mean and least. kl: ``KL(source ‖ target)`` of the next token's distribution in
    nats, mean and largest. top1: share of positions where both prefer the same token.
    """
    wanted = _logits(source, texts)
    found = _logits(target, texts)
    cosine, kl, top1 = [], [], []
    for a, b in zip(wanted, found, strict=True):
        cosine.append(F.cosine_similarity(a, b, dim=-1))
        kl.append(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1))
        top1.append((a.argmax(-1) == b.argmax(-1)).float())
    cosines, kls = torch.cat(cosine), torch.cat(kl)
    return {
        "positions": len(cosines),
        "cosine_mean": digits(float(cosines.mean())),
        "cosine_min": digits(float(cosines.min())),
        "kl_mean": digits(float(kls.mean())),
        "kl_max": digits(float(kls.max())),
        "top1_agreement": digits(float(torch.cat(top1).mean())),
    }


def _logits(path: Path, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    import ascend

    model = ascend.load_model(path)
    with torch.inference_mode():
        logits = [model(torch.tensor([list(text)]))[0] for text in texts]
    del model
    gc.collect()
    return logits
