"""`python -m perf compare A.json B.json …`: what was measured at several sites, side by side.

In: result files of `perf decode` and `perf serve`, or those of `vllm bench serve`, guidellm and aiperf. Out: a table,
JSON, one self-contained HTML page, plots as SVG and PNG. Read `systems.py` for what is taken from a file, `rules.py`
for when two may be compared, `intervals.py` for how sure a ratio is, `figures.py` and `page.py` for the report.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the command; see `perf.compare.command`."""
    from perf.compare.command import main as run

    return run(argv)
