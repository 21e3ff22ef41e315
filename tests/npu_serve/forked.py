"""Runs scripts, each in a fork of one process that has imported the engine: `python -m tests.npu_serve.forked FILE…`.

Prints one JSON object: by file, [whether it ended well, its standard output].
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback


def main(files: list[str]) -> None:
    """Import what all of them take seconds to import, and nothing that changes the engine."""
    import torch_npu  # noqa: F401
    import vllm.engine.arg_utils
    import vllm.model_executor.models.registry  # noqa: F401

    print(json.dumps({file: _run(file) for file in files}))


def _run(file: str) -> tuple[bool, str]:
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            status = 1
            try:
                runpy.run_path(file, run_name="__main__")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        return status == 0, output.read()


if __name__ == "__main__":
    main(sys.argv[1:])
