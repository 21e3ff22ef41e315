"""The engines that `perf decode` compares: this project's, and its peers on the same shapes. `perf.worker` runs one.

A model directory that holds only a ``config.json`` means random weights, made where they are used.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend.checkpoint import read_config
from ascend.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ascend.eagle3 import Eagle3Head
    from ascend.generation import Decoder


@dataclass(frozen=True)
class Setting:
    """What an engine is started with. ``device`` is torch's name; ``capture``: decode as a graph, if it has any.

    max_length: tokens of prompt and answer. kv: the cache's format. fill: random values in the cache in place of the
    prompts'. drafts: of a speculative step, or "auto"; acceptance: tokens that such a step is made to keep on average.
    """

    model: Path
    device: str
    dtype: str
    quantise: str | None
    threads: int
    max_batch: int
    max_length: int
    capture: bool
    seed: int
    kv: str | None = None
    fill: bool = False
    drafts: int | str = 0
    acceptance: float | None = None

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

    def distinct_experts(self, prompts: list[list[int]], speculative: bool = False) -> float | None:
        """Return how many experts of a layer a decode step of these prompts hits, mean of the layers; None: unknown.

        ``speculative``: a verification of drafts, where the engine has any.
        """
        return None

    def kernels_per_layer(self, prompts: list[list[int]]) -> float | None:
        """Return what a decode step gives the device to do, kernels and copies, by decoder layer; None: unknown."""
        return None


class Lean(Engine):
    """This project's lean engine. Batches keep their cache and graph, so that a generation captures nothing anew.

    ``setting.drafts``: `speculate` drafts with an EAGLE3 head of random weights, in the published shape.
    """

    draft_bytes = 0  # that one run of the draft head reads

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
        self.decoders: dict[tuple[int, int, bool], Decoder] = {}
        self.paying: dict[int, int] = {}  # drafts that pay, by batch
        if setting.drafts:
            self.head = draft_head(self.model, setting.seed)
            own = (weight for name, weight in self.head.named_parameters() if not name.startswith("embed_tokens"))
            self.draft_bytes = sum(weight.nbytes for weight in own if weight.ndim > 1)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """See `Engine.generate`. Greedy; the host waits for nothing until the end."""
        import torch

        with torch.inference_mode():
            decoder = self._started(prompts, False)
            decoder.run(new_tokens - 1)
            return decoder.answer.tokens(new_tokens)[: decoder.batch].cpu().numel()

    def speculate(self, prompts: list[list[int]], steps: int) -> tuple[int, float]:
        """Run the prompts and so many steps with drafts; how many drafts, and what a step gained a row on average."""
        import torch

        with torch.inference_mode():
            decoder = self._started(prompts, True)
            before = 0 if self.setting.fill else 1
            decoder.run(steps)
            gained = (decoder.answer.count_B[: decoder.batch].cpu() - before).float().mean()
            return decoder.most - 1, float(gained) / steps

    def distinct_experts(self, prompts: list[list[int]], speculative: bool = False) -> float | None:
        """See `Engine.distinct_experts`. Counted in one step that is not a graph's."""
        import torch

        from ascend.expert_loads import recording

        with torch.inference_mode():
            ids = torch.tensor(prompts, device=self.model.device)[:, -1024:]  # a step of the same newest tokens
            decoder = self._new(ids, 2 * (self._drafts(ids) + 1) if speculative else 2, speculative, False)
            decoder.prefill()
            with recording(self.model) as loads:
                decoder.run(1)
        hit = [int((count > 0).sum()) for count in loads.values()]
        return sum(hit) / len(hit) if hit else None

    def kernels_per_layer(self, prompts: list[list[int]]) -> float | None:
        """See `Engine.kernels_per_layer`. By torch's profiler on CUDA, embedding and head shared out to the layers."""
        import torch

        if self.device.type != "cuda":
            return None
        with torch.inference_mode():
            decoder = self._started(prompts, False)
            decoder.run(1)
            self.device.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                decoder.run(1)
                self.device.synchronize()
        kernels = [one for one in profile.events() or () if one.device_type is torch.autograd.DeviceType.CUDA]
        return len(kernels) / self.model.config.num_hidden_layers if kernels else None

    def _started(self, prompts: list[list[int]], speculative: bool) -> Decoder:
        """The decoder of this shape, new or used before, its prompts run (or its cache filled)."""
        import torch

        ids = torch.tensor(prompts, device=self.model.device)
        key = (*ids.shape, speculative)
        if key not in self.decoders:
            if any(known[:2] != key[:2] for known in self.decoders):
                self.decoders.clear()  # one batch in memory at a time
            self.decoders[key] = self._decoder(ids, self.setting.max_length - ids.shape[1], speculative)
        decoder = self.decoders[key]
        decoder.restart(ids)
        if self.setting.fill:
            _fill(decoder, ids)
        else:
            decoder.prefill()
        return decoder

    def _decoder(self, ids: Tensor, longest: int, speculative: bool) -> Decoder:
        import torch

        try:
            return self._new(ids, longest, speculative, bool(self.captured))
        except RuntimeError as error:
            if not self.captured or isinstance(error, torch.OutOfMemoryError):
                raise
            said = str(error).splitlines()[0][:80]
            raise UserError(f"the decode step cannot be captured on this device ({said}): give --eager") from error

    def _new(self, ids: Tensor, longest: int, speculative: bool, capture: bool) -> Decoder:
        from ascend.generation import Decoder
        from ascend.roofline import TYPICAL_ACCEPTANCE, tokens_per_step
        from ascend.speculation import Acceptance, SpeculativeDecoder

        kv, forced = self.setting.kv, self.setting.acceptance
        drafts = self._drafts(ids) if speculative else 0
        if not drafts:
            return Decoder(self.model, ids, None, longest, capture, kv_dtype=kv)
        if self.setting.drafts == "auto" and forced is None:
            forced = tokens_per_step(drafts, TYPICAL_ACCEPTANCE)
        options: dict[str, Any] = {"drafter": self.head, "acceptance": Acceptance(forced, self.setting.seed)}
        return SpeculativeDecoder(self.model, ids, None, longest, capture, drafts=drafts, kv_dtype=kv, **options)

    def _drafts(self, ids: Tensor) -> int:
        """How many drafts at this batch: as set, or as many as pay."""
        from ascend.draft_length import choose_drafts, measure_costs

        if isinstance(self.setting.drafts, int):
            return self.setting.drafts
        if len(ids) not in self.paying:
            costs = measure_costs(self.model, ids, None, bool(self.captured), self.head, kv_dtype=self.setting.kv)
            self.paying[len(ids)] = choose_drafts(costs)
        return self.paying[len(ids)]


def draft_head(model: Any, seed: int) -> Eagle3Head:
    """An EAGLE3 head of random weights for a model; one of few layers is tapped where it has any."""
    from ascend.eagle3 import random_head
    from ascend.eagle3_config import Eagle3Config

    config, layers = Eagle3Config.published(model.config), model.config.num_hidden_layers
    if len(set(config.tapped)) < len(config.tapped) or min(config.tapped) < 0:
        config = replace(config, tapped=(0, layers // 2, layers - 1))
    return random_head(model, config, seed=seed)


def _fill(decoder: Decoder, ids: Tensor) -> None:
    """Stand where a decoder stands after these prompts, with random values in its caches."""
    import torch

    caches = [decoder.cache, *getattr(decoder, "draft_caches", [])]
    for cache in caches:
        for tensor in (*cache.keys, *cache.values):
            filled = torch.empty(tensor.shape[1:], dtype=decoder.model.dtype, device=tensor.device)
            for row in tensor:  # row by row: normal numbers are not made in FP8
                row.copy_(filled.normal_())
        cache.written_B.fill_(ids.shape[1])
    if decoder.length is not None:
        decoder.length = ids.shape[1]
    decoder.token_B.copy_(ids[:, -1][decoder.row_B])
    for name in ("draft_BK", "carried"):
        for tensor in getattr(decoder, name, ()):
            tensor.zero_()


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
        if setting.quantise is not None or setting.kv is not None or setting.fill:
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

        if setting.quantise is not None or setting.kv is not None or setting.fill:
            raise UserError("engine transformers: it runs unquantised only, after prompts")
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
