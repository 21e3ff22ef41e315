"""`python -m perf schema`: the result files' fields, as JSON Schema; `perf/result.py` says what they mean."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ascend.arguments import Parser
from perf.result import json_schema


def main(argv: Sequence[str]) -> int:
    """Print the schema of every kind of result file."""
    Parser("perf schema", "Prints the result files' fields, by kind, as JSON Schema.").read(argv)
    print(json.dumps(json_schema(), indent=1))
    return 0
