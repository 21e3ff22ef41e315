"""`acl.rt` of CANN: functions of the runtime by the names of Python."""

from __future__ import annotations

import ctypes


def memcpy(dst: int, dest_max: int, src: int, count: int, direction: int) -> int:
    """Copy ``count`` bytes between addresses, in whichever direction: device memory is host memory here. Returns 0."""
    if count > dest_max:
        raise ValueError(f"acl.rt.memcpy: {count} bytes into room for {dest_max}")
    ctypes.memmove(dst, src, count)
    return 0
