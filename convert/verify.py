"""`python -m convert verify DIR`: is every byte what the manifest says, is every tensor what the config asks for.

signature (with --key) ─► manifest ─► files: names, sizes, SHA-256 ─► weights: names, shapes, formats, values
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ascend.arguments import Parser
from ascend.errors import EXIT_USER_ERROR
from ascend.progress import Progress
from convert.manifest import SIGNATURE, Manifest, check_full, check_quick, read_manifest

MOST_LINES = 20
NOT_LOOKED_AT = "not looked at"


@dataclass(frozen=True)
class Verified:
    """What was checked and what came of it. ``signature``: "good", "none", or that there is one and no key to it.

    files: "sizes and headers", or "SHA-256". weights: "good", "bad" or "not looked at".
    """

    directory: str
    files: str
    count: int
    nbytes: int
    signature: str
    weights: str
    problems: list[str]
    seconds: float


def verify(directory: Path, key: Path | None = None, quick: bool = False, content: bool = True) -> Verified:
    """Check a directory. Raises `UserError` if it has no readable manifest, or with ``key`` none that this key signed.

    Weights are looked at where the files are what the manifest says.
    """
    begun = time.monotonic()
    signature = "not looked at: no --key" if (directory / SIGNATURE).is_file() else "none"
    signed = None
    if key is not None:
        from convert.signature import verify_signature

        signed, signature = verify_signature(directory, key), "good"
    manifest = read_manifest(directory, signed)
    problems = _check_files(directory, manifest, quick)
    weights = NOT_LOOKED_AT
    if content and not quick and not problems:
        from convert.content import check_content

        with Progress("values", manifest.nbytes) as progress:
            problems = check_content(directory, progress.advance)
        weights = "bad" if problems else "good"
    files, seconds = "sizes and headers" if quick else "SHA-256", round(time.monotonic() - begun, 3)
    return Verified(str(directory), files, len(manifest.files), manifest.nbytes, signature, weights, problems, seconds)


def _check_files(directory: Path, manifest: Manifest, quick: bool) -> list[str]:
    if quick:
        return check_quick(directory, manifest)
    with Progress("SHA-256", manifest.nbytes) as progress:
        return check_full(directory, manifest, progress.advance)


def main(argv: Sequence[str]) -> int:
    """Run `python -m convert verify` with ``argv``."""
    parser = Parser(
        "convert verify", "Check a directory against its manifest, and its weights against its config.json."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a directory with a manifest.json")
    parser.add_argument("--key", metavar="PUB", type=Path, help="Ed25519 public key that must have signed the manifest")
    parser.add_argument("--quick", action="store_true", help="only the files' names, sizes and headers, no content")
    parser.add_argument("--no-content", action="store_true", help="hashes alone: leave out what the weights mean")
    parser.add_argument("--json", action="store_true", help="end the output with one JSON document")
    args = parser.read(argv)
    done = verify(args.directory, args.key, args.quick, not args.no_content)
    for problem in done.problems[:MOST_LINES]:
        print(f"error: {problem}", file=sys.stderr)
    if len(done.problems) > MOST_LINES:
        print(f"error: and {len(done.problems) - MOST_LINES} more", file=sys.stderr)
    for line in _summary(done):
        print(line)
    if args.json:
        print(json.dumps(asdict(done)))
    return EXIT_USER_ERROR if done.problems else 0


def _summary(done: Verified) -> list[str]:
    what = f"{done.count} files, {done.nbytes / 1e6:,.1f} MB"
    verdict = f"{len(done.problems)} problem{'s' * (len(done.problems) > 1)}" if done.problems else "good"
    looked_at = done.files if done.weights == NOT_LOOKED_AT else f"{done.files} and weights"
    lines = [f"{done.directory}: {verdict}; {what}, {looked_at}, {done.seconds:.1f} s"]
    if done.files != "SHA-256":
        lines.append("content was not looked at: a changed bit in a tensor is only found without --quick")
    elif done.weights == NOT_LOOKED_AT:
        lines.append(
            "what the weights mean was not looked at" + (": the files are not the ones" if done.problems else "")
        )
    if done.signature != "none":
        lines.append(f"signature: {done.signature}")
    return lines
