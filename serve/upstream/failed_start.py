"""An engine core of vllm-ascend that fails after it has started its workers does not end: it waits for them.

Starts a process that makes one worker, as the executors of vLLM and of vllm-ascend do, and then fails as a core does
whose cards have too little memory. In place of the worker's work something stands that waits for its core, as workers
do. Without a card: `python -m ascend.emulator -- python serve/upstream/failed_start.py`.
"""

import multiprocessing
import os
import time
from typing import Any

os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "fork"  # so that the stand-in below is the worker's work

import vllm_ascend.patch.platform.patch_multiproc_executor as theirs
from vllm.config import VllmConfig
from vllm.v1.executor import multiproc_executor as vllm

WAITED_S = 5


def wait(*_: Any, **__: Any) -> None:
    """What a worker does whose core asks nothing of it."""
    time.sleep(60)


def fail(worker: type[vllm.WorkerProc]) -> None:
    """What a core does that finds too little memory."""
    os.setpgrp()
    vllm.WorkerProc.worker_main = staticmethod(wait)
    worker.make_worker_process(VllmConfig(), 0, 0, "", None, None, True)
    assert multiprocessing.active_children()
    os.close(2)  # the traceback
    raise RuntimeError("NPU out of memory")


for name, worker in (("vLLM", vllm.WorkerProc), ("vllm-ascend", theirs.AscendWorkerProc)):
    core = multiprocessing.get_context("fork").Process(target=fail, args=(worker,))
    core.start()
    core.join(WAITED_S)
    print(f"{name}: {f'waits, {WAITED_S} s after it failed' if core.is_alive() else 'ended'}")
    if core.is_alive():
        os.killpg(core.pid or 0, 9)
