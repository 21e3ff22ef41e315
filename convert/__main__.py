"""`python -m convert COMMAND …`: one module per command, imported only when it is called."""

from __future__ import annotations

import sys

from ascend.commands import run_package

COMMANDS = {
    "demo": "write a demo checkpoint: the full architecture in miniature, with random weights",
}

if __name__ == "__main__":
    sys.exit(run_package("convert", COMMANDS))
