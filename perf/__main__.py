"""`python -m perf COMMAND …`: one module per command, imported only when it is called."""

from __future__ import annotations

import sys

from ascend.commands import run_package

COMMANDS = {
    "roofline": "the most that cards can do with a model, from its config alone, and the share a measurement reaches",
    "decode": "decode tokens per second of this engine and its peers, interleaved, on any device",
    "ops": "each op of a decode step alone, against the memory's and the matrix units' measured rates",
    "tune": "tile sizes of the experts' Triton kernels, tried on this card",
    "serve": "latency and throughput of a running OpenAI endpoint, under fixed workloads and rising load",
    "compare": "result files of several sites side by side: ratios with bounds, plots, one HTML page",
    "parity": "whether two platforms compute the same model, layer by layer, with a verdict and exit code",
    "schema": "the result files' fields, as JSON Schema",
}

if __name__ == "__main__":
    sys.exit(run_package("perf", COMMANDS))
