"""`python -m serve COMMAND …`: one module per command, imported only when it is called."""

from __future__ import annotations

import sys

from ascend.commands import run_package

COMMANDS = {
    "doctor": "look for every reason a launch would fail on this machine",
    "plan": "settings for a model and cards, with their reasons",
    "launch": "start vLLM on a model, wait until it answers, and stay until it is told to stop",
}

if __name__ == "__main__":
    sys.exit(run_package("serve", COMMANDS))
