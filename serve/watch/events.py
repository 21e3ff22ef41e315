"""What happened to the service, one JSON line per event: start, ready, death, hang, fault, restart, drain, end."""

from __future__ import annotations

import contextlib
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from serve.state import printable

KEPT_BYTES = 2**20  # beyond this the file becomes FILE.1 at the next start of the launcher


class EventLog:
    """Appends to a file of mode 0640. Nothing of a request is in it, and what an engine wrote is made printable."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with contextlib.suppress(OSError):
            if path.stat().st_size > KEPT_BYTES:
                path.rename(f"{path}.1")

    def write(self, event: str, **details: Any) -> None:
        """Add one line. A full disk must not end the service: then the line is lost."""
        told = {key: printable(value)[:500] if isinstance(value, str) else value for key, value in details.items()}
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **told}) + "\n"
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
            with open(descriptor, "wb") as stream:
                stream.write(line.encode())
