"""The engine of a server that is not the first: vLLM's `--headless`, with no API server of its own.

`python -m serve.nodes.headless FLAG…` is `vllm serve FLAG…`, of which `python -m vllm.entrypoints.openai.api_server`
leaves out this mode, and which does not start with the CPU build up to 0.32: it asks for the version of a distribution
"vllm".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Parse the flags as `vllm serve` does, and run until told to stop."""
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's own command sets it
    from vllm.entrypoints.cli import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # Not as a subcommand "serve", which on 0.23 pays no heed to --model.
    parsed = serve.make_arg_parser(FlexibleArgumentParser()).parse_args(list(arguments))
    serve.validate_parsed_serve_args(parsed)
    serve.ServeSubcommand.cmd(parsed)


if __name__ == "__main__":
    main(sys.argv[1:])
