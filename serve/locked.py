"""Does this interpreter's environment hold exactly what lock files name? Run by `env.sh`: `python locked.py FILE…`.

Exit code 0 if so. Otherwise the first difference is printed and the exit code is 1. Nothing of the project is imported,
since the environment may lack all of it.
"""

from __future__ import annotations

import sys
from importlib import metadata


def difference(lock_file: str) -> str | None:
    """Return the first line of a lock file (``name==version ; marker``) that this environment does not meet."""
    try:
        from packaging.markers import Marker  # every lock file's closure has it
    except ImportError:
        return "packaging is not installed"
    with open(lock_file, encoding="utf-8") as lines:
        pins = [line.split("#")[0].strip() for line in lines]
    for pin in filter(None, pins):
        requirement, _, marker = (part.strip() for part in pin.partition(";"))
        if marker and not Marker(marker).evaluate():
            continue
        name, _, version = requirement.partition("==")
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            return f"{name} is not installed"
        if found != version:
            return f"{name} is {found}, wanted {version}"
    return None


if __name__ == "__main__":
    for problem in filter(None, map(difference, sys.argv[1:])):
        print(problem)
        sys.exit(1)
