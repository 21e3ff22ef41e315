"""How the engine's records are logged: no client can forge a line of them, and nothing of a request is in them.

What libraries in C++ write to standard error goes past it, and may repeat what a client sent. So the launcher puts a
word into each start's environment that nobody can guess: only lines with it were formatted here.

`logging.json` beside this file goes to vLLM as `VLLM_LOGGING_CONFIG_PATH` (0.23 and 0.32 read it in every process, and
give it to uvicorn too), and names `SafeFormatter`. Timestamps, levels and places are vLLM's own.

Whatever cannot be printed is escaped, long lines are cut, every line of a record has the record's prefix. What may hold
a request's text is withheld: in an API server that serves, arguments that are no numbers, the messages of exceptions,
and messages put together before they were logged; in the engine's other processes, all that comes from the code which
reads requests, and messages of exceptions that no device or operating system raised.

Only the standard library is imported: every process of the engine does it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

CONFIG_FILE = Path(__file__).with_name("logging.json")
VARIABLE = "VLLM_LOGGING_CONFIG_PATH"
MARK = "ANTANGELMED_LOG_MARK"  # in the environment: a word that stands in every line's prefix
WITHHELD = "(withheld: it may hold a request's text)"
LONGEST_LINE, MOST_LINES = 4000, 200

# In the API server's log just before the first request may come: of vLLM, and of uvicorn.
SERVING = ("Starting vLLM server on", "Started server process", "Application startup complete")
_API_SERVERS = ("MainProcess", "APIServer", "ApiServer", "DPSupervisor")
# Loggers whose records in a serving API server are about the server, not about a request.
_ABOUT_ITSELF = (
    "vllm.v1.metrics",
    "vllm.entrypoints.launcher",
    "vllm.entrypoints.launchers",
    "vllm.uncaught",
    "uvicorn.error",
)
# Functions of the engine core and the workers that run from the first request on …
_LOOPS = ("run_busy_loop", "process_input_sockets", "preprocess_add_request", "worker_busy_loop")
# … and files that read what a client sent: schemas, grammars, sampling parameters.
_READERS = re.compile(r"structured_output|xgrammar|llguidance|outlines|lm_format_enforcer|dump_input|jinja2|pydantic")
_HARMLESS = ("EngineDeadError", "EngineGenerateError", "CancelledError", "KeyboardInterrupt", "SystemExit")


class SafeFormatter(logging.Formatter):
    """Formats vLLM's records, uvicorn's and everybody else's."""

    serves = False  # of this process: once it is True, a client's text may be in any record

    def __init__(self, fmt: str | None = None, datefmt: str | None = None, style: str = "%", **_: object) -> None:
        mark = f" {os.environ[MARK]}" if os.environ.get(MARK) else ""
        super().__init__(f"%(levelname)s %(asctime)s [%(filename)s:%(lineno)d{mark}] ", "%m-%d %H:%M:%S")
        logging.raiseExceptions = False  # a record that cannot be written would be printed with its arguments
        logging.captureWarnings(True)
        threading.excepthook = _log_of_thread
        sys.unraisablehook = _log_unraisable

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        prefix = _process(record) + self.formatMessage(self._dated(record))
        lines = list(self._lines(record))
        if isinstance(record.msg, str) and record.msg.startswith(SERVING):
            SafeFormatter.serves = True
        if len(lines) > MOST_LINES:
            half = MOST_LINES // 2
            lines = [*lines[:half], f"… {len(lines) - 2 * half} lines left out …", *lines[-half:]]
        return "\n".join(prefix + line for line in lines)

    def _dated(self, record: logging.LogRecord) -> logging.LogRecord:
        record.asctime = self.formatTime(record, self.datefmt)
        record.message = ""
        return record

    def _lines(self, record: logging.LogRecord) -> Iterator[str]:
        is_api = _name(record).startswith(_API_SERVERS)
        try:
            message = _message(record, is_api and SafeFormatter.serves)
        except Exception:  # arguments that do not fit, or that cannot be turned into text
            message = "a message that cannot be formatted"
        # A record of vLLM's own may have several lines. A client's text has been escaped, or is withheld, by now.
        yield from map(printable, message.split("\n"))
        if record.exc_info and record.exc_info[1]:
            for line in _exception(record.exc_info[1], is_api and SafeFormatter.serves):
                yield printable(line)


def _message(record: logging.LogRecord, is_serving_api: bool) -> str:
    own = record.name.startswith(_ABOUT_ITSELF)
    if _READERS.search(record.pathname) and not str(record.msg).startswith("Dumping input data"):
        return WITHHELD
    if not record.args:
        known = own or not is_serving_api or (record.name.startswith("vllm") and _is_written_there(record))
        return str(record.msg) if known else WITHHELD
    if own or not is_serving_api:
        return _escaped(record)
    arguments = record.args
    if isinstance(arguments, dict):
        return str(record.msg) % {key: _number(value) for key, value in arguments.items()}
    return str(record.msg) % tuple(map(_number, arguments))


def _escaped(record: logging.LogRecord) -> str:
    """The message, with arguments on one line each: those of a request do not make lines."""
    # vLLM's own arguments with several lines are tracebacks and tables, before anybody can ask anything.
    if isinstance(record.args, tuple) and SafeFormatter.serves:
        return str(record.msg) % tuple(printable(one) if isinstance(one, str) else one for one in record.args)
    return record.getMessage()


def _is_written_there(record: logging.LogRecord) -> bool:
    """Whether a message stands in the source as it is: then nobody has put a client's words into it."""
    import linecache

    first = re.split(r"[\"\\\n]", str(record.msg))[0][:24]
    around = "".join(linecache.getline(record.pathname, record.lineno + step) for step in range(4))
    return len(first) > 3 and first in around and "{" not in around


class _Withheld:
    """Stands for an argument in any conversion."""

    def __str__(self) -> str:
        return WITHHELD

    __repr__ = __str__


def _number(value: Any) -> Any:
    return value if value is None or isinstance(value, (int, float)) else _Withheld()


def _exception(error: BaseException, is_serving_api: bool, depth: int = 0) -> Iterator[str]:
    """The traceback, and the message where it is not a request's."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and depth < 5:
        yield from _exception(cause, is_serving_api, depth + 1)
        yield "The above exception led to this one:"
    yield "Traceback (most recent call last):"
    frames = traceback.extract_tb(error.__traceback__)
    for one in frames.format():
        yield from one.rstrip("\n").split("\n")
    kind = type(error).__name__
    said = str(error) if _is_shown(error, frames, is_serving_api) else WITHHELD
    first, *more = said.split("\n")
    yield f"{type(error).__module__}.{kind}: {first}".removeprefix("builtins.")
    yield from more


def _is_shown(error: BaseException, frames: traceback.StackSummary, is_serving_api: bool) -> bool:
    if type(error).__name__ in _HARMLESS:
        return True
    if is_serving_api or any(_READERS.search(frame.filename) for frame in frames):
        return False
    # RuntimeError is also what torch raises for a device: AcceleratorError, OutOfMemoryError, DistBackendError.
    return isinstance(error, (RuntimeError, OSError, MemoryError)) or not any(frame.name in _LOOPS for frame in frames)


def _name(record: logging.LogRecord) -> str:
    return str(getattr(record, "vllm_process_name", None) or multiprocessing.current_process().name)


def _process(record: logging.LogRecord) -> str:
    """vLLM's prefix, if no wrapped stream puts it there (as in 0.23)."""
    return "" if hasattr(sys.stdout, "_original_write") else f"({_name(record)} pid={record.process}) "


def printable(text: str) -> str:
    """The text on one line, with what could steer a terminal, or is no whole character, as an escape; cut if long."""
    text = text.expandtabs(4)
    cut = text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + f"… ({len(text)} characters)"
    return "".join(one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in cut)


def _log_of_thread(hooked: threading.ExceptHookArgs) -> None:
    _log_uncaught("an exception ended a thread", hooked.exc_type, hooked.exc_value, hooked.exc_traceback)


def _log_unraisable(hooked: Any) -> None:
    _log_uncaught("an exception could not be raised", hooked.exc_type, hooked.exc_value, hooked.exc_traceback)


def _log_uncaught(
    what: str, kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    logging.getLogger("vllm.uncaught").error(what, exc_info=(kind, error or kind(), trace))
