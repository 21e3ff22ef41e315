"""`python -m perf parity`: whether two platforms compute the same model, layer by layer and end to end, with a verdict.

In: a checkpoint directory and two sides, each a device, a recorded file or (the second) an OpenAI endpoint. Out: a
table, one HTML page, one JSON document, an exit code. Read `command.py` for the verbs, then `trace.py` for what is
recorded, `numbers.py` and `whole.py` for what is compared, `judge.py` and `limits.py` for the verdict.
`endpoint.py` and `served.py` are the same for a server, of which nothing but log-probabilities is seen.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run one of the verbs; see `perf.parity.command`. Imported here, so that a worker does not load it."""
    from perf.parity import command

    return command.main(argv)
