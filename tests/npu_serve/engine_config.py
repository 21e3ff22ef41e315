"""What the real engine makes of a command line: its configuration, after all checks of vLLM's and vllm-ascend's own.

`python -m tests.npu_serve.engine_config` reads questions, a line of JSON each, and answers so. It imports the engine
once and forks for each question: a configuration leaves its mark on the process (patches, caches, environment).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ENGINES = ("vllm_ascend", "vllm")


def main() -> None:
    """Answer until the input ends. What the engine prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    parser = _parser()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        question = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                answers.write(json.dumps(_answer(parser, question["flags"], question["environment"])) + "\n")
                answers.flush()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)


def _parser() -> ArgumentParser:
    """The parser of the server that the launcher starts, with all that the engine's process has loaded by then."""
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from serve.plugin.register import register

    register()
    assert type(current_platform).__module__ == "vllm_ascend.platform"
    return make_arg_parser(FlexibleArgumentParser())


def _answer(parser: ArgumentParser, flags: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.openai.cli_args import validate_parsed_serve_args
    from vllm.usage.usage_lib import UsageContext

    os.environ.update(environment)
    try:
        parsed = parser.parse_args(list(flags))
        validate_parsed_serve_args(parsed)
        config = AsyncEngineArgs.from_cli_args(parsed).create_engine_config(
            UsageContext.OPENAI_API_SERVER, headless=parsed.headless
        )
    except BaseException as error:
        return {"error": str(error), "where": sorted({where for one in _causes(error) for where in _frames(one)})}
    return {"config": _facts(config)}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those inside it: pydantic's holds what a check raised."""
    yield error
    for detail in error.errors() if hasattr(error, "errors") else ():
        if isinstance(cause := detail.get("ctx", {}).get("error"), BaseException):
            yield cause


def _frames(error: BaseException) -> Iterator[str]:
    """The engine's files and lines that an error came through, as in "vllm_ascend/platform.py:651"."""
    for frame in traceback.extract_tb(error.__traceback__):
        inside = Path(frame.filename).parts
        package = next((name for name in ENGINES if name in inside), None)
        if package:
            yield f"{Path(*inside[inside.index(package) :])}:{frame.lineno}"


def _facts(config: Any) -> dict[str, Any]:
    """What of a configuration a plan decides, by the names of the flags, and what the platform made of the rest."""
    model, parallel, scheduler = config.model_config, config.parallel_config, config.scheduler_config
    graphs, drafts = config.compilation_config, config.speculative_config
    return {
        "worker": parallel.worker_cls,
        "architecture": model.architectures[0],
        "quantization": model.quantization,
        "rope": dict(model.hf_config.rope_parameters),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max-model-len": model.max_model_len,
        "max-num-seqs": scheduler.max_num_seqs,
        "max-num-batched-tokens": scheduler.max_num_batched_tokens,
        "tensor-parallel-size": parallel.tensor_parallel_size,
        "data-parallel-size": parallel.data_parallel_size,
        "pipeline-parallel-size": parallel.pipeline_parallel_size,
        "enable-expert-parallel": parallel.enable_expert_parallel,
        "gpu-memory-utilization": config.cache_config.gpu_memory_utilization,
        "block-size": config.cache_config.block_size,
        "enable-prefix-caching": config.cache_config.enable_prefix_caching,
        "graph-mode": graphs.cudagraph_mode.name,
        "graph-sizes": graphs.cudagraph_capture_sizes,
        "drafts": drafts and [drafts.method, drafts.num_speculative_tokens, drafts.draft_model_config.architectures[0]],
        "compiled-under": config.compute_hash(),
    }


if __name__ == "__main__":
    main()
