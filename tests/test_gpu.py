"""What only a card can show of the whole engine: a replayed graph gives what eager steps give; `perf/gpu.sh` runs it.

Four rows are a whole bucket, so that both run the same shapes. On a CPU a captured decoder runs eagerly.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ascend.config import BailingMoeV2Config
from ascend.devices import get_device
from ascend.errors import UserError
from ascend.generation import Decoder
from ascend.random_weights import random_model
from ascend.speculation import SpeculativeDecoder
from convert.demo_config import demo_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def decoded(device: str, quantise: str | None, kv: str | None, drafts: int, capture: bool) -> Tensor:
    config = demo_config("tiny", 0, "bf16", None, {})[0]
    model = random_model(BailingMoeV2Config(**config), device, torch.bfloat16, quantise=quantise)
    ids = torch.randint(300, (4, 7), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.inference_mode():
        if drafts:
            decoder: Decoder = SpeculativeDecoder(model, ids, None, 12, capture, drafts=drafts, kv_dtype=kv)
        else:
            decoder = Decoder(model, ids, None, 12, capture, kv_dtype=kv)
        first = decoder.generate().clone()
        decoder.restart(ids)  # a graph is replayed on other contents of the same tensors
        assert torch.equal(decoder.generate(), first)
        return first.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("quantise", "kv", "drafts"),
    [
        (None, None, 0),
        (None, None, 2),
        pytest.param("fp8", "fp8", 0, marks=pytest.mark.slow),
        pytest.param("w4a16", None, 0, marks=pytest.mark.slow),
    ],
)
def test_a_replayed_graph_gives_what_eager_steps_give(
    device: str, quantise: str | None, kv: str | None, drafts: int
) -> None:
    try:
        get_device(device)
    except UserError as error:
        pytest.skip(f"no such device here: {error}")
    eager, replayed = (decoded(device, quantise, kv, drafts, capture) for capture in (False, True))
    assert torch.equal(eager, replayed)
