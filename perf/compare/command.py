"""The command line of `perf compare`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ascend.arguments import Parser
from ascend.errors import UserError
from perf.arguments import names, out_file
from perf.compare.comparison import compare
from perf.compare.rules import ACROSS
from perf.compare.systems import System, read_systems
from perf.compare.table import as_document, show
from perf.result import write_text

EXIT_NOT_COMPARABLE = 1


def main(argv: Sequence[str]) -> int:
    """Compare files; returns 0, or 1 if two of them are not comparable (and says why)."""
    args = _parse(argv)
    labels: list[str | None] = args.label or [None] * len(args.files)
    systems: list[System] = []
    for file, label in zip(args.files, labels, strict=True):
        systems += read_systems(file, label)
    comparison = compare(systems, args.across)
    show(comparison)
    if args.html is not None or args.plots is not None:
        import perf.compare.page as page  # matplotlib takes a second

        if args.html is not None:
            write_text(args.html, page.render(comparison, argv))
        if args.plots is not None:
            page.save_plots(comparison, args.plots)
    if args.json:
        print(json.dumps(as_document(comparison), allow_nan=False))
    return 0 if comparison.comparable else EXIT_NOT_COMPARABLE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "perf compare",
        "Result files side by side, the first is what the others are held against. Exit code 0: compared, 1: two are "
        "not comparable and why, 2: a file could not be read.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of perf decode or serve, vLLM's client …")
    parser.add_argument("--label", action="append", help="what to call a file; once for each, in their order")
    parser.add_argument("--across", help=f"what is meant to differ, of {','.join(ACROSS)}")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page that needs no network")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write the plots there as SVG and PNG")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.read(argv)
    args.across = names("--across", args.across, ACROSS) if args.across else []
    if args.label and len(args.label) != len(args.files):
        raise UserError(f"--label: {len(args.label)} for {len(args.files)} files; give one for each, in their order")
    out_file("--html", args.html)
    if args.plots is not None and not args.plots.is_dir():
        raise UserError(f"--plots {args.plots}: there is no such folder")
    return args
