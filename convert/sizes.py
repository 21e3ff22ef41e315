"""Sizes as users write them."""

from __future__ import annotations

import re

from ascend.errors import UserError

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Read ``512MB`` or ``5GB`` as bytes. Raises `UserError` for anything else."""
    match = re.fullmatch(r"(\d+)\s*([a-z]+)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in UNITS or int(match[1]) == 0:
        raise UserError(f"max shard size '{text}' is not a size: write it like 512MB or 5GB")
    return int(match[1]) * UNITS[match[2].upper()]
