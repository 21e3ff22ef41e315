"""What a conversion costs in logits, on weights with the tails, row sizes and outlier channels of trained ones.

`convert/demo_heavy.py` says how the weights are made. Two figures per format: with routing *free*, and with the experts
that the BF16 model chose *replayed*. Random weights route at random: many tokens choose between experts that score the
same to three digits, and any rounding, BF16's own against FP32 included, sends some of them elsewhere. What is left
with routing replayed is what the format does to numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ascend
from ascend.model import Gate
from convert.check import compare_logits
from convert.demo import write_demo
from convert.engine import Steps, convert, prepare
from convert.plan import Request

IDS = torch.randint(300, 2000, (2, 128), generator=torch.Generator().manual_seed(2))
# Least mean cosine of the logits, replayed and free. INT8 keeps 0.999 and INT4 0.99 where routing is replayed. FP8 has
# three bits of mantissa, for weights and for tokens: an error of 3.7 % in every product of both, and 0.998.
LEAST = {"w8a8": (0.999, 0.985), "fp8": (0.997, 0.975), "w4a16": (0.99, 0.96)}


@contextmanager
def routing(recorded: list[tuple[Tensor, Tensor]], replay: bool) -> Iterator[None]:
    """Record what each gate chooses, or make it choose what was recorded."""
    original, waiting = Gate.forward, iter(list(recorded))

    def forward(self: Gate, *args: Any) -> Any:
        chosen = original(self, *args)
        if replay:
            return *next(waiting), *chosen[2:]
        recorded.append(chosen[:2])
        return chosen

    Gate.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Gate.forward = original  # type: ignore[method-assign]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean())


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quality") / "heavy"
    write_demo(path, weights="heavy")
    return path


@pytest.mark.parametrize("to", LEAST)
def test_logits_stay_near_on_heavy_tailed_weights(to: str, heavy: Path, tmp_path: Path) -> None:
    convert(prepare(heavy, tmp_path / to, Request(to)), 1)
    chosen: list[tuple[Tensor, Tensor]] = []
    with torch.inference_mode(), routing(chosen, replay=False):
        wanted = ascend.load_model(heavy)(IDS)
    model = ascend.load_model(tmp_path / to)
    with torch.inference_mode():
        free = model(IDS)
        with routing(chosen, replay=True):
            replayed = model(IDS)
    least_replayed, least_free = LEAST[to]
    print(f"{to}: cosine {cosine(wanted, replayed):.5f} replayed, {cosine(wanted, free):.5f} free")
    assert cosine(wanted, replayed) >= least_replayed
    assert cosine(wanted, free) >= least_free


@pytest.mark.slow
def test_check_says_what_came_of_it(heavy: Path, tmp_path: Path) -> None:
    """The figures of ``--check`` against a second calculation."""
    texts = [row[:n].tolist() for row, n in zip(IDS, (40, 9), strict=True)]
    steps = Steps(check=lambda directory: compare_logits(heavy, directory, texts))
    done = convert(prepare(heavy, tmp_path / "fp8", Request("fp8")), 1, steps=steps)
    assert done.report is not None
    said = done.report["logits"]
    one, other = ascend.load_model(heavy), ascend.load_model(tmp_path / "fp8")
    pairs = [(one(torch.tensor([text]))[0].double(), other(torch.tensor([text]))[0].double()) for text in texts]
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    p, q = a.softmax(-1), b.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    cosines = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
    expected = {
        "positions": 49,
        "cosine_mean": cosines.mean(),
        "cosine_min": cosines.min(),
        "kl_mean": kl.mean(),
        "kl_max": kl.max(),
        "top1_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean(),
    }
    assert said.keys() == expected.keys()
    for key, value in expected.items():
        assert said[key] == pytest.approx(float(value), rel=2e-3), key
