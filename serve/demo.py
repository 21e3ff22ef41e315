"""The demo checkpoint that is served when no model is named: built once per user, shared by every later start."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import convert
from ascend.errors import UserError

DEMO_NAME = "antangelmed-demo"


def demo_size(emulate: bool) -> str:
    """Return the size of the demo: the attention ops of a 910B take heads of 128, emulated or not."""
    return "tiny-npu" if emulate else "tiny"


def demo_directory(size: str = "tiny") -> Path:
    """Return where the demo of this size lies or will lie. Its name changes with the code that writes it."""
    digest = hashlib.sha256()
    for file in sorted(Path(next(iter(convert.__path__))).iterdir()):
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "antangelmed" / f"demo-{size}-{digest.hexdigest()[:12]}"


def build_demo(directory: Path, size: str = "tiny") -> None:
    """Write the demo unless it is there; it appears whole or not at all, also when two starts write it at once."""
    from convert.demo import write_demo  # needs numpy, which is not there before the environment is

    if directory.exists():
        return
    try:
        directory.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory.parent}: cannot be made ({error.strerror}); set XDG_CACHE_HOME") from None
    write_demo(directory, size=size, force=True)
