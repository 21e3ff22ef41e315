"""The engines of `perf decode` and the process that each runs in."""

from __future__ import annotations

import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ascend
from ascend.errors import UserError
from perf.engines import Engine, Lean, Setting, Vllm
from perf.worker import Worker
from tests import tiny
from tests.tiny import user_error


def setting(model: Path, **changes: Any) -> Setting:
    made = Setting(model, "cpu", "float32", None, 1, 2, 40, False, 0)
    return replace(made, **changes)


def test_a_step_that_cannot_be_captured_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Lean(setting(path))
    engine.captured = True  # as on a card

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr("ascend.generation.Decoder._capture", refuse)
    said = "the decode step cannot be captured on this device (operation not permitted when stream is capturing)"
    assert user_error(engine.generate, [[1, 2]], 2) == f"{said}: give --eager"
    engine.captured = False
    assert engine.generate([[1, 2]], 2) == 2


def test_vllm_is_bound_to_cores_that_it_may_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 4, 6})
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(UserError, match="quantises no model"):
        Vllm(setting(path, threads=2, quantise="w8a8"))
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "4,6"


# Workers.


def living(worker: Worker) -> Worker:
    worker.answer()
    return worker


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny.checkpoint(tmp_path / "demo")


@pytest.mark.slow
@pytest.mark.beside
def test_a_worker_answers_and_then_dies(path: Path) -> None:
    worker = living(Worker("lean", setting(path), os.environ, verbose=False))
    try:
        request = {"batch": 2, "prompt_length": 3, "new_tokens": 4, "seed": 1}
        answer = worker.answer(**request)
        assert answer["seconds"] > 0
        assert answer["memory_bytes"] is None or answer["memory_bytes"] > 0
        worker.process.send_signal(signal.SIGKILL)
        worker.process.wait()
        line = "engine lean ended with code -9; run again with --verbose to see why"
        # A pipe that broke must not pass for a reader who went away, which ends a command quietly and well.
        assert user_error(worker.answer, **request) == line
    finally:
        worker.stop()


@pytest.mark.slow
@pytest.mark.beside
def test_a_worker_that_cannot_start_says_why(path: Path, tmp_path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"no tensors")
    worker = Worker("lean", setting(path), os.environ, verbose=False)
    line = user_error(worker.answer)
    worker.stop()
    assert "model.safetensors" in line
    worker = Worker("no such engine", setting(path), os.environ, verbose=False)
    line = "engine no such engine ended with code 1; run again with --verbose to see why"
    assert user_error(worker.answer) == line
    worker.stop()


def test_distinct_experts_are_those_that_a_step_hits(path: Path) -> None:
    engine = Lean(setting(path))
    prompts = torch.randint(0, 300, (5, 6), generator=torch.Generator().manual_seed(3)).tolist()
    model = ascend.load_model(path, dtype="float32")
    # By hand: the experts that the last token of each longer sequence takes.
    ids = torch.tensor(prompts)
    sequence = ascend.generate(model, ids, 1)
    chosen: list[torch.Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for gate in gates:
        gate.register_forward_hook(lambda gate, args, out: chosen.append(out[1].view(5, 7, -1)[:, -1]))
    model(sequence)
    main_layers = len(chosen)
    assert main_layers == 2
    expected = statistics.mean(len(experts.unique()) for experts in chosen)
    assert engine.distinct_experts(prompts) == expected
    assert engine.distinct_experts([prompts[0]]) == 3
    assert Engine.distinct_experts(engine, prompts) is None


def test_lean_generates_the_same_each_time_from_what_it_keeps(path: Path) -> None:
    """Batches take turns; the second generation of one restarts its decoder."""
    engine = Lean(setting(path))
    prompts = {
        "a": torch.randint(0, 300, (2, 6), generator=torch.Generator().manual_seed(1)),
        "b": torch.randint(0, 300, (2, 6), generator=torch.Generator().manual_seed(2)),
        "c": torch.randint(0, 300, (3, 6), generator=torch.Generator().manual_seed(3)),
    }
    for which in "aabcab":
        ids = prompts[which]
        assert engine.generate(ids.tolist(), 7) == 7 * len(ids)
        (decoder,) = engine.decoders.values()
        expected = ascend.generate(engine.model, ids, 7)[:, 6:]
        assert torch.equal(decoder.answer.tokens(7), expected), which


@pytest.mark.parametrize("fill", [False, True])
def test_lean_keeps_as_many_tokens_as_it_is_told(path: Path, fill: bool) -> None:
    engine = Lean(setting(path, drafts=2, acceptance=2.0, fill=fill, max_length=100))
    prompts = torch.randint(0, 300, (3, 6), generator=torch.Generator().manual_seed(1)).tolist()
    assert engine.speculate(prompts, 8) == (2, 2.0)
    assert engine.generate(prompts, 5) == 15
    assert len(engine.decoders) == 2, "plain and speculative ones of a batch take turns"
    assert engine.speculate(prompts, 4) == (2, 2.0)
    assert engine.draft_bytes > 1e4
    plain, drafted = engine.distinct_experts(prompts), engine.distinct_experts(prompts, True)
    assert plain is not None
    assert drafted is not None
    assert 3 <= plain <= drafted


def test_a_filled_cache_is_read(path: Path) -> None:
    engine = Lean(setting(path, fill=True, kv="fp8"))
    prompts = torch.randint(0, 300, (2, 6), generator=torch.Generator().manual_seed(1)).tolist()
    assert engine.generate(prompts, 5) == 10
    (decoder,) = engine.decoders.values()
    assert decoder.cache.written_B.tolist() == [10, 10]
    for tensor in (*decoder.cache.keys, *decoder.cache.values):
        assert tensor.dtype == torch.float8_e4m3fn
        assert 0.5 < tensor[:, :, :6].float().std() < 1.5
