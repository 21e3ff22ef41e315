"""What a service manager is told, where there is one: https://www.freedesktop.org/software/systemd/man/sd_notify.html."""

from __future__ import annotations

import contextlib
import os
import socket
import threading


def notify(state: str) -> None:
    """Send ``READY=1``, ``STOPPING=1`` or the like to the socket that systemd has named; without one do nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # the abstract namespace
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(state.encode(), address)


def feed_watchdog() -> None:
    """From now on tell systemd twice per ``WatchdogSec`` that the launcher runs, if it asks for that."""
    interval = os.environ.get("WATCHDOG_USEC", "")
    is_meant = os.environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
    if not interval.isdecimal() or not is_meant:
        return

    def feed() -> None:
        while not forever.wait(int(interval) / 2e6):
            notify("WATCHDOG=1")

    forever = threading.Event()
    threading.Thread(target=feed, name="watchdog", daemon=True).start()
