"""`python -m perf COMMAND …`: one module per command, imported only when it is called."""

from __future__ import annotations

import sys

from ascend.commands import run_package

COMMANDS = {
    "decode": "decode tokens per second of this engine and its peers, interleaved, on one checkpoint",
    "parity": "whether two platforms compute the same model, layer by layer, with a verdict and exit code",
}

if __name__ == "__main__":
    sys.exit(run_package("perf", COMMANDS))
