"""`python -m perf roofline`: the most that cards can do with a model, and what share of it a measured figure reaches.

Everything follows from a `config.json` and the cards' figures in `ascend.devices.facts`; nothing is run and no torch is
needed. `ascend.cost` says what is counted, `ascend.roofline` how it becomes a limit. A figure that nobody has published
is unknown, and so is every limit that would need it, unless it is given on the command line. Read `question.py` (what
can be asked), `answer.py` (the JSON document), `table.py` (how it is printed).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from perf.roofline.answer import answer
from perf.roofline.question import read
from perf.roofline.table import print_tables


def main(argv: Sequence[str]) -> int:
    """Print the limits; with ``--json`` the last line is one JSON document. Raises `UserError`."""
    question, as_json = read(argv)
    document = answer(question)
    print_tables(document, question.figures)
    if as_json:
        print(json.dumps(document))
    return 0
