"""Captured graphs on the emulated cards, through the real `torch.npu.NPUGraph`."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ascend
from ascend.devices import get_device
from ascend.devices.base import Replay
from ascend.emulator import log
from ascend.generation import Decoder
from ascend.sampling import Sampling
from ascend.speculation import SpeculativeDecoder
from tests import tiny

CARD = "npu:0"


def captured(function: object) -> Replay[Tensor]:
    replay = get_device("npu").capture(function)  # type: ignore[arg-type,type-var]
    assert isinstance(replay, Replay)
    return replay


def test_a_replay_does_again_what_was_captured_with_what_is_there_now() -> None:
    x, total = torch.ones(3, device=CARD), torch.zeros(3, device=CARD)

    def step() -> Tensor:
        total.add_(x)
        return total * 2

    replay = captured(step)
    total.zero_()  # warm-ups ran
    for i in range(1, 4):
        x.fill_(float(i))
        with log.recording() as seen:
            result = replay()
        assert seen.ops == ["graph::replay", "aten::add_.Tensor", "aten::mul.Tensor"]
        assert result.tolist() == [2.0 * sum(range(1, i + 1))] * 3


def test_a_captured_op_does_not_run() -> None:
    x, graph = torch.ones(2, device=CARD), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = x + 1
        x.mul_(5)
    assert x.tolist() == [1.0, 1.0]
    assert y.isnan().all()
    graph.replay()
    assert (x.tolist(), y.tolist()) == ([5.0, 5.0], [2.0, 2.0])


def test_results_stay_where_they_are_and_keep_their_memory() -> None:
    x = torch.ones(4, device=CARD)
    replay = captured(lambda: (x + 1) * 3)
    first = replay()
    address = first.data_ptr()
    others = [torch.full((4,), float(i), device=CARD) for i in range(50)]
    x.fill_(2.0)
    assert replay().data_ptr() == address
    assert first.tolist() == [9.0] * 4
    assert [other[0].item() for other in others] == list(range(50))


@pytest.mark.parametrize("wait", ["item", "nonzero", "copy", "synchronize"])
def test_nothing_may_wait_for_the_device_while_capturing(wait: str) -> None:
    x, graph = torch.ones(2, device=CARD), torch.npu.NPUGraph()
    call = {
        "item": lambda: x[0].item(),
        "nonzero": lambda: x.nonzero(),
        "copy": lambda: x.cpu(),
        "synchronize": lambda: torch.npu.synchronize(),
    }[wait]
    with pytest.raises(RuntimeError, match="while a graph is captured"), torch.npu.graph(graph):
        call()
    assert (x + 1).tolist() == [2.0, 2.0]  # the capture is over


def test_another_card_has_no_place_in_a_capture() -> None:
    x, other, graph = torch.ones(2, device=CARD), torch.ones(2, device="npu:2"), torch.npu.NPUGraph()
    with pytest.raises(RuntimeError, match="on npu:2 while a graph is captured on npu:0"), torch.npu.graph(graph):
        _ = (x + 1, other + 1)


def test_out_arguments_are_captured() -> None:
    x, out, graph = torch.ones(2, device=CARD), torch.zeros(2, device=CARD), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        torch.add(x, x, out=out)
    assert out.tolist() == [0.0, 0.0]
    graph.replay()
    assert out.tolist() == [2.0, 2.0]


def attention(q: Tensor, k: Tensor, lengths: list[int]) -> Tensor:
    return torch.ops.npu.npu_fused_infer_attention_score(
        q, k, k, num_heads=2, num_key_value_heads=1, scale=0.1, input_layout="BSND", actual_seq_lengths_kv=lengths
    )[0]


def test_lengths_of_a_captured_attention_can_be_replaced() -> None:
    """torch_npu records attention as a task group, whose host lengths `update` replaces before a replay."""
    q = torch.randn(1, 1, 2, 64, device=CARD).bfloat16()
    k = torch.randn(1, 9, 1, 64, device=CARD).bfloat16()
    attention(q, k, [9])
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        out = attention(q, k, [3]) * 2
    for length in (3, 7, 9):
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [length]}])
        graph.replay()
        assert torch.equal(out.cpu(), (attention(q, k, [length]) * 2).cpu())


def attention_graph(q: Tensor, k: Tensor) -> tuple[torch.npu.NPUGraph, Tensor]:
    """A graph that stops before its attention until its lengths are given."""
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        out = attention(q + 0, k, [3]) * 2
    return graph, out


def test_a_replay_waits_for_lengths_that_are_replaced_after_it_started() -> None:
    """vLLM-Ascend's order: without the wait on the tape the attention of the last step's lengths is computed."""
    q = torch.randn(1, 1, 2, 64, device=CARD).bfloat16()
    k = torch.randn(1, 9, 1, 64, device=CARD).bfloat16()
    graph, out = attention_graph(q, k)
    for length in (7, 2, 9):
        with log.recording() as seen:
            graph.replay()
        assert seen.ops == ["graph::replay", "aten::add.Tensor"]
        with log.recording() as seen:
            graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [length]}])
        assert seen.ops[-1] == "aten::mul.Tensor"
        assert torch.equal(out.cpu(), (attention(q, k, [length]) * 2).cpu())


@pytest.mark.parametrize("what", ["op", "synchronize"])
def test_nothing_is_computed_behind_a_graph_that_waits(what: str) -> None:
    """On the card it would be queued or hang; here it is told, and another stream is free."""
    q, k = torch.ones(1, 1, 2, 64, device=CARD).bfloat16(), torch.ones(1, 9, 1, 64, device=CARD).bfloat16()
    graph, out = attention_graph(q, k)
    graph.replay()
    with pytest.raises(RuntimeError, match="still waits for an external event"):
        _ = torch.npu.synchronize() if what == "synchronize" else out + 1
    with torch.npu.stream(torch.npu.Stream()):
        assert (q + 1).shape == q.shape
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [9]}])
    assert out.tolist() == [[[[2.0] * 64] * 2]]


def test_another_thread_waits_with_a_graph_that_waits() -> None:
    """As vLLM's thread that copies results does: it must see them, and must not be refused."""
    q, k = torch.ones(1, 1, 2, 64, device=CARD).bfloat16(), torch.ones(1, 9, 1, 64, device=CARD).bfloat16()
    graph, out = attention_graph(q, k)
    before, seen = torch.npu.Event(), []
    before.record()
    graph.replay()

    def look() -> None:
        before.synchronize()
        seen.append(out.sum().item())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(0.3)
    assert (thread.is_alive(), seen) == (True, [])
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [9]}])
    thread.join()
    assert seen == [256.0]


SHAPE = {"head_dim": 64, "hidden_size": 128, "moe_intermediate_size": 64}


def prompts() -> tuple[Tensor, Tensor]:
    """Three rows, the last one padded."""
    ids = torch.randint(0, tiny.SHAPE["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    return ids, mask


@torch.inference_mode()
def test_decoding_waits_for_nothing_and_one_token_is_one_replay(tmp_path: Path) -> None:
    path, (ids, mask) = tiny.checkpoint(tmp_path, **SHAPE), prompts()
    cpu, model, there = ascend.load_model(path), ascend.load_model(path, CARD), (ids.to(CARD), mask.to(CARD))
    for how in ({}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 1}, {"temperature": 0.9, "seed": 2}):
        expected = ascend.generate(cpu, ids, 8, attention_mask=mask, **how)
        decoder = Decoder(model, *there, 8, True, sampling=Sampling(**how))
        decoder.prefill()
        with log.recording() as seen:
            decoder.run(7)
        assert (seen.syncs, seen.ops.count("graph::replay")) == ([], 7)
        assert torch.equal(decoder.answer.tokens(8)[:3].cpu(), expected[:, 9:])


@torch.inference_mode()
@pytest.mark.parametrize("layers", [1, 2])
def test_a_speculative_step_is_one_replay_and_changes_nothing(layers: int, tmp_path: Path) -> None:
    path, (ids, mask) = tiny.checkpoint(tmp_path, **SHAPE, num_nextn_predict_layers=layers), prompts()
    expected = ascend.generate(ascend.load_model(path), ids, 8, attention_mask=mask)
    model, there = ascend.load_model(path, CARD), (ids.to(CARD), mask.to(CARD))
    decoder = SpeculativeDecoder(model, *there, 8, True, drafts=3)
    decoder.prefill()
    with log.recording() as seen:
        decoder.run(7)
    assert (seen.syncs, seen.ops.count("graph::replay")) == ([], 7)
    assert torch.equal(decoder.answer.tokens(8)[:3].cpu(), expected[:, 9:])
