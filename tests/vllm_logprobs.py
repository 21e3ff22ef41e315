"""Run by `test_vllm_parity.py` in a process of its own: prompt logprobs of several checkpoints from the real vLLM.

`python tests/vllm_logprobs.py PROMPTS.json OUT.json DIR…`: PROMPTS is a list of lists of token ids; OUT gets, per
directory and prompt, one ``{token: logprob}`` per position (None for the first). In float32, or TESTED_DTYPE.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

# In this process, so that one import serves all checkpoints; the plugin is found by its entry point, as in the server.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
TOP = 5


def main() -> None:
    from vllm import LLM, SamplingParams

    prompts, out, *directories = sys.argv[1:]
    token_ids = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    dtype = os.environ.get("TESTED_DTYPE", "float32")
    result = []
    for directory in directories:
        llm = LLM(
            directory, dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4, trust_remote_code=False
        )
        outputs = llm.generate(token_ids, SamplingParams(max_tokens=1, prompt_logprobs=TOP), use_tqdm=False)
        result.append([[named(position) for position in output.prompt_logprobs] for output in outputs])
        del llm
        gc.collect()
    Path(out).write_text(json.dumps(result))


def named(position: dict | None) -> dict[int, float] | None:
    return None if position is None else {token: entry.logprob for token, entry in position.items()}


if __name__ == "__main__":
    main()
