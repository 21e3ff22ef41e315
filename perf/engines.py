"""The engines that `perf decode` compares: this project's, and its peers on the same shapes. `perf.worker` runs one.

A model directory that holds only a ``config.json`` means random weights, made where they are used.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend.checkpoint import read_config
from ascend.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ascend.generation import Decoder


@dataclass(frozen=True)
class Setting:
    """What an engine is started with. ``device`` is torch's name; ``capture``: decode as a graph, if it has any."""

    model: Path
    device: str
    dtype: str
    quantise: str | None
    threads: int
    max_batch: int
    max_length: int
    capture: bool
    seed: int

    @property
    def random(self) -> bool:
        """Whether the weights are made up."""
        return not any(self.model.glob("*.safetensors"))


class Engine(ABC):
    """One engine with one model, and how it generates."""

    version: str
    captured: bool | None = None  # whether its decode step is a replayed graph; None: it does not tell
    random_weights = False

    @abstractmethod
    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """Generate exactly ``new_tokens`` for each prompt; return how many tokens came out in all, all of them done."""

    def distinct_experts(self, prompts: list[list[int]]) -> float | None:
        """Return how many experts of a layer a decode step of these prompts hits, mean of the layers; None: unknown."""
        return None


class Lean(Engine):
    """This project's lean engine. Batches keep their cache and graph, so that a generation captures nothing anew."""

    def __init__(self, setting: Setting) -> None:
        import torch

        import ascend
        from ascend.config import BailingMoeV2Config
        from ascend.devices import get_device

        self.version, self.setting = f"ascend {ascend.__version__}", setting
        self.device = get_device(setting.device)
        self.device.activate()
        self.captured = setting.capture and self.device.captures_graphs
        self.random_weights = setting.random
        if setting.random:
            from ascend.random_weights import random_model

            config, dtype = BailingMoeV2Config(**read_config(setting.model)), getattr(torch, setting.dtype)
            quantise, seed = setting.quantise, setting.seed
            self.model = random_model(config, setting.device, dtype, quantise=quantise, seed=seed)
        else:
            self.model = ascend.load_model(setting.model, setting.device, setting.dtype, quantise=setting.quantise)
        self.decoders: dict[tuple[int, int], Decoder] = {}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """See `Engine.generate`. Greedy; the host waits for nothing until the end."""
        import torch

        with torch.inference_mode():
            decoder = self._prefilled(prompts)
            token_B = self._logits.argmax(-1)
            made = [token_B]
            for _ in range(new_tokens - 1):
                token_B = decoder.step(token_B).argmax(-1)
                made.append(token_B)
            return torch.stack(made).cpu().numel()

    def distinct_experts(self, prompts: list[list[int]]) -> float | None:
        """See `Engine.distinct_experts`. Counted in one step that is not a graph's."""
        import torch

        from ascend.expert_loads import recording
        from ascend.generation import Decoder

        ids = torch.tensor(prompts, device=self.model.device)
        with torch.inference_mode():
            decoder = Decoder(self.model, ids, None, 1)
            token_B = decoder.prefill().argmax(-1)
            with recording(self.model) as loads:
                decoder.step(token_B)
        hit = [int((count > 0).sum()) for count in loads.values()]
        return sum(hit) / len(hit) if hit else None

    def _prefilled(self, prompts: list[list[int]]) -> Decoder:
        import torch

        ids = torch.tensor(prompts, device=self.model.device)
        shape = (len(prompts), len(prompts[0]))
        decoder = self.decoders.get(shape)
        if decoder is None:
            self.decoders.clear()  # one batch in memory at a time
            longest = self.setting.max_length - shape[1]
            decoder = self.decoders[shape] = self._decoder(ids, longest)
        else:
            decoder.restart(ids)
        self._logits: Tensor = decoder.prefill()
        return decoder

    def _decoder(self, ids: Tensor, longest: int) -> Decoder:
        import torch

        from ascend.generation import Decoder

        try:
            return Decoder(self.model, ids, None, longest, bool(self.captured))
        except RuntimeError as error:
            if not self.captured or isinstance(error, torch.OutOfMemoryError):
                raise
            said = str(error).splitlines()[0][:80]
            raise UserError(f"the decode step cannot be captured on this device ({said}): give --eager") from error


class Vllm(Engine):
    """The real vLLM, prefix cache off, otherwise as it comes; random weights are its own "dummy" ones."""

    def __init__(self, setting: Setting) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if setting.device == "cpu":
            # Without the second it leaves a core idle on small machines.
            bound = ",".join(map(str, sorted(os.sched_getaffinity(0))[: setting.threads]))
            os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": bound}
        if setting.quantise is not None:
            raise UserError("engine vllm: it quantises no model in memory; give it a converted checkpoint")
        import vllm

        self.random_weights = setting.random
        self.version = f"vllm {vllm.__version__}"
        self.llm = vllm.LLM(
            str(setting.model),
            dtype=setting.dtype,  # type: ignore[arg-type]
            max_model_len=max(1024, setting.max_length),
            max_num_seqs=setting.max_batch,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            load_format="dummy" if setting.random else "auto",
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """See `Engine.generate`."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


class Transformers(Engine):
    """transformers' `Glm4MoeForCausalLM`: the same architecture under other names, same shapes, random weights."""

    def __init__(self, setting: Setting) -> None:
        import torch
        import transformers

        if setting.quantise is not None:
            raise UserError("engine transformers: it runs unquantised only")
        self.version, self.random_weights = f"transformers {transformers.__version__}", True
        torch.manual_seed(setting.seed)
        torch.set_default_dtype(getattr(torch, setting.dtype))  # never twice the memory
        with torch.device(setting.device):
            self.model = transformers.Glm4MoeForCausalLM(glm4_moe_config(setting.model)).eval()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """See `Engine.generate`."""
        import torch

        ids = torch.tensor(prompts, device=self.model.device)
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
        return (out.shape[1] - ids.shape[1]) * len(prompts)


def glm4_moe_config(path: Path) -> Any:
    """Return the `Glm4MoeConfig` of the same shapes as the model directory's."""
    from transformers import Glm4MoeConfig

    config = json.loads((path / "config.json").read_text())
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "moe_intermediate_size",
        "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace", "norm_topk_prob",
        "routed_scaling_factor", "use_qk_norm", "tie_word_embeddings",
    )  # fmt: skip
    rope = {key: config[key] for key in ("rope_theta", "partial_rotary_factor")}
    return Glm4MoeConfig(
        **{key: config[key] for key in same},
        n_routed_experts=config["num_experts"],
        n_shared_experts=config["num_shared_experts"],
        rope_parameters={"rope_type": "default"} | rope,
        num_mtp_layers=0,
        eos_token_id=None,
    )


ENGINES: dict[str, Callable[[Setting], Engine]] = {
    "lean": Lean,
    "vllm": Vllm,
    "transformers": Transformers,
    "llama.cpp": lambda setting: import_module("perf.llama_cpp").LlamaCpp(setting),  # it imports this file
}
