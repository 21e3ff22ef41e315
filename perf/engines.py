"""The engines that `perf decode` compares, each in a process of its own: `python -m perf.engines NAME …` is a worker.

A worker loads the model, prints one JSON line when it is ready, and answers every request line (``batch``,
``prompt_length``, ``new_tokens``) with the seconds that one whole generation took. Greedy, no stop token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Engine(ABC):
    """One engine with one model, and how it generates."""

    version: str

    @abstractmethod
    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """Generate exactly ``new_tokens`` for each prompt; return how many tokens came out in all."""


class Lean(Engine):
    """`ascend.generate` on the checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        import ascend

        self.version = f"ascend {ascend.__version__}"
        self.model = ascend.load_model(args.model, args.device, args.dtype)

    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """See `Engine.generate`."""
        import torch

        import ascend

        ids = torch.tensor(prompts, device=self.model.device)
        return (ascend.generate(self.model, ids, new_tokens).shape[1] - ids.shape[1]) * len(prompts)


class Vllm(Engine):
    """The real vLLM on the checkpoint, prefix cache off, otherwise as it comes."""

    def __init__(self, args: argparse.Namespace) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            # Without it the engine leaves a core idle on small machines.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}",
        }
        import vllm

        self.version = f"vllm {vllm.__version__}"
        self.llm = vllm.LLM(
            args.model,
            dtype=args.dtype,
            max_model_len=1024,
            max_num_seqs=args.max_batch,
            enable_prefix_caching=False,
        )

    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """See `Engine.generate`."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


class Transformers(Engine):
    """transformers' `Glm4MoeForCausalLM`: the nearest architecture in the library, same shapes, random weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        import transformers

        self.version = f"transformers {transformers.__version__}"
        torch.manual_seed(0)
        with torch.device(args.device):
            model = transformers.Glm4MoeForCausalLM(glm4_moe_config(Path(args.model)))
        self.model = model.to(getattr(torch, args.dtype)).eval()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """See `Engine.generate`."""
        import torch

        ids = torch.tensor(prompts, device=self.model.device)
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
        return (out.shape[1] - ids.shape[1]) * len(prompts)


def glm4_moe_config(path: Path) -> Any:
    """Return the `Glm4MoeConfig` of the same shapes as the checkpoint's."""
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


ENGINES: dict[str, Callable[[argparse.Namespace], Engine]] = {
    "lean": Lean,
    "vllm": Vllm,
    "transformers": Transformers,
}


def main() -> None:
    """Serve requests from standard input until it closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=ENGINES)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-batch", type=int, required=True)
    args = parser.parse_args()
    # Engines print to standard output as they like; the answers get a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    engine = ENGINES[args.name](args)
    import torch

    if args.name != "vllm":
        torch.set_num_threads(args.threads)
    print(json.dumps({"engine": args.name, "version": engine.version, "torch": torch.__version__}), file=answers)
    vocabulary = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    for line in sys.stdin:
        request = json.loads(line)
        generator = torch.Generator().manual_seed(request["seed"])
        shape = (request["batch"], request["prompt_length"])
        prompts = torch.randint(vocabulary, shape, generator=generator).tolist()
        start = time.perf_counter()
        made = engine.generate(prompts, request["new_tokens"])
        seconds = time.perf_counter() - start
        if made != request["batch"] * request["new_tokens"]:
            raise RuntimeError(f"{args.name} made {made} tokens for {request}")
        print(json.dumps({"seconds": seconds}), file=answers)


if __name__ == "__main__":
    main()
