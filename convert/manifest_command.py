"""`python -m convert manifest DIR`: write the manifest of a directory as it is, signed or not.

For a checkpoint that was received and is known to be good; what this toolkit converts has a manifest already.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ascend.arguments import Parser
from ascend.checkpoint import open_checkpoint
from ascend.errors import UserError
from ascend.progress import Progress
from convert.manifest import MANIFEST, SIGNATURE, read_manifest, write_manifest


def main(argv: Sequence[str]) -> int:
    """Run it; ``argv`` begins with the command's name."""
    command, *rest = argv
    parser = Parser(
        f"convert {command}", "Write the manifest of a directory as it is: the SHA-256 and size of every file."
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a checkpoint that is known to be good")
    parser.add_argument("--sign", metavar="KEY", type=Path, help="Ed25519 private key to sign the manifest with")
    parser.add_argument("--force", action="store_true", help="replace the manifest, and the signature, that are there")
    args = parser.read(rest)
    directory: Path = args.directory
    if args.sign:
        from convert.signature import private_key

        private_key(args.sign)  # a wrong one is told before the work
    open_checkpoint(directory, beside_pickles=True)
    there = [name for name in (MANIFEST, SIGNATURE) if (directory / name).exists()]
    if there and not args.force:
        raise UserError(f"{directory / there[0]}: is there already; `verify` checks it, --force replaces it")
    (directory / SIGNATURE).unlink(missing_ok=True)  # it is none of the new one
    total = sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(directory))
    with Progress("SHA-256", total) as progress:
        write_manifest(directory, command={"command": command}, source={}, advance=progress.advance)
    if args.sign:
        from convert.signature import sign

        sign(directory, args.sign)
    manifest = read_manifest(directory)
    signed = f", signed with {args.sign}" if args.sign else ""
    print(f"{directory / MANIFEST}: {len(manifest.files)} files, {manifest.nbytes / 1e6:,.1f} MB{signed}")
    return 0
