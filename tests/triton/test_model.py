"""The whole model on the kernels: logits, greedy text, launches of a layer. On a card the same, natively.

Under the interpreter tensors stay on the CPU and every op of `ops` goes to what CUDA's table has for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

import ascend
from ascend.config import BailingMoeV2Config
from ascend.generation import Decoder
from ascend.model import BailingMoeV2ForCausalLM
from ascend.random_weights import random_model
from ascend.weights_quantised import ExpertsW4A16
from ops import cuda, layout, reference
from tests.op_cases import BF16, FP32

CONFIG = BailingMoeV2Config(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    num_shared_experts=1,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
    partial_rotary_factor=0.5,
    use_qk_norm=True,
    initializer_range=0.08,  # so that logits are far apart
)
pytestmark = pytest.mark.slow

VIEWS = {"view", "view_as", "reshape", "flatten", "unflatten", "transpose", "t", "slice", "select", "split", "expand",
         "unsqueeze", "squeeze", "detach", "permute", "chunk", "contiguous"}  # fmt: skip
NO_WORK = VIEWS | {"empty", "empty_like", "new_empty"}


class OnKernels(TorchDispatchMode):
    """Send the ops of `ops` to CUDA's table, and count what a card would be given to do."""

    def __init__(self) -> None:
        super().__init__()
        self.work: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, name = func._schema.name.split("::")
        if library == "ascend":  # what the table lacks is torch's library's
            with self:
                return cuda.KERNELS.get(name, getattr(reference, name, None))(*args, **(kwargs or {}))
        if name not in NO_WORK:
            self.work[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def on_kernels(device: str) -> Iterator[Counter[str]]:
    """Yield what was given to do since the counter was last cleared; on a card nothing is counted."""
    if device != "cpu":
        yield Counter()
        return
    mode, run = OnKernels(), GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        mode.work[self.fn.__name__] += 1
        with _disable_current_modes():  # what the interpreter does with tensors is no work of a card
            run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(GridExecutor, "__call__", launch)
        patch.setattr(layout, "interleaves", lambda _: True)
        yield mode.work


def model_on(device: str, dtype: torch.dtype, quantise: str | None = None) -> BailingMoeV2ForCausalLM:
    """The same weights wherever it is, laid out as CUDA wants them."""
    model = random_model(CONFIG, "cpu", dtype, quantise=quantise, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "interleaves", lambda _: True)
        for module in model.modules():
            if isinstance(module, ExpertsW4A16):
                module.lay_out()
    return model.to(device)


def prompts(rows: int, length: int) -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dtype", "quantise", "limit"), [
    (FP32, None, 2e-5), (BF16, None, 3e-2), (FP32, "fp8", 2e-2), (FP32, "w8a8", 2e-2), (FP32, "w4a16", 2e-5),
])  # fmt: skip
def test_logits(device: str, dtype: torch.dtype, quantise: str | None, limit: float) -> None:
    ids = prompts(2, 7)
    wanted = random_model(CONFIG, "cpu", dtype, quantise=quantise, seed=5)(ids)
    with on_kernels(device):
        found = model_on(device, dtype, quantise)(ids.to(device))
    assert (found.cpu() - wanted).norm() <= limit * wanted.norm()


def greedy(model: BailingMoeV2ForCausalLM, ids: Tensor, steps: int, capture: bool = False) -> Tensor:
    decoder = Decoder(model, ids, None, steps, capture)
    logits = [decoder.prefill()]
    for _ in range(steps - 1):
        logits.append(decoder.step(logits[-1].argmax(-1)).clone())
    return torch.stack(logits, 1)


def test_decoding_in_a_cache(device: str) -> None:
    ids = prompts(3, 5)
    wanted = greedy(random_model(CONFIG, "cpu", FP32, seed=5), ids, 4)
    with on_kernels(device):
        found = greedy(model_on(device, FP32), ids.to(device), 4).cpu()
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantise", [None, "fp8", "w8a8", "w4a16"])
def test_a_captured_step_gives_the_bits_of_an_eager_one(device: str, quantise: str | None) -> None:
    if device == "cpu":
        pytest.skip("nothing is captured under the interpreter: needs an NVIDIA GPU")
    model, ids = model_on(device, BF16, quantise), prompts(3, 5).to(device)
    assert torch.equal(greedy(model, ids, 6, capture=True), greedy(model, ids, 6))


def test_drafted_text_is_plain_text(device: str) -> None:
    config = BailingMoeV2Config(**CONFIG.to_dict() | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1})
    ids = prompts(2, 4)
    wanted = ascend.generate(random_model(config, "cpu", FP32, seed=5), ids, 3)
    with on_kernels(device):
        model = random_model(config, "cpu", FP32, seed=5).to(device)
        found = ascend.generate(model, ids.to(device), 3, drafts=2, capture=device != "cpu")
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("quantise", [None, "fp8", "w8a8", "w4a16"])
def test_a_layer_of_a_decode_step_is_seven_launches(device: str, quantise: str | None) -> None:
    if device != "cpu":
        pytest.skip("launches are counted under the interpreter; on a card the profiler of `perf decode` counts them")
    model, ids = model_on(device, BF16, quantise), prompts(2, 3)
    decoder, every = Decoder(model, ids, None, 4), model.model.layers
    with on_kernels(device) as work:
        token_B = decoder.prefill().argmax(-1)
        found = []
        for layers in (3, 2):  # the difference is one MoE layer
            model.model.layers, model.config.num_hidden_layers = every[:layers], layers
            work.clear()
            decoder.step(token_B)
            found.append(Counter(work))
        model.config.num_hidden_layers = len(every)
    layer = found[0] - found[1]
    assert layer.total() == 7, layer
