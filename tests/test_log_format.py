"""Log records as the engine's processes write them: one prefix per line, nothing that steers, nothing of a request."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.plugin.log_format import (
    CONFIG_FILE,
    LONGEST_LINE,
    MARK,
    MOST_LINES,
    SERVING,
    WITHHELD,
    SafeFormatter,
    printable,
)
from serve.watch.faults import faults_in
from serve.watch.progress import _PREFIX, STAGES

WORD = "kanarienvogel"
PLACE = "vllm/entrypoints/openai/serving.py"


@pytest.fixture(autouse=True)
def formatter() -> Iterator[SafeFormatter]:
    """The formatter of a process that does not serve yet; its hooks are taken back."""
    before = logging.raiseExceptions, threading.excepthook, sys.unraisablehook
    yield SafeFormatter()
    SafeFormatter.serves = False
    logging.captureWarnings(False)
    logging.raiseExceptions, threading.excepthook, sys.unraisablehook = before


def record(
    message: object,
    *args: object,
    process: str = "APIServer",
    name: str = "vllm.entrypoints.openai.serving",
    path: str = PLACE,
    error: BaseException | None = None,
) -> logging.LogRecord:
    """A record as vLLM's loggers make them."""
    info = (type(error), error, error.__traceback__) if error else None
    found = logging.LogRecord(name, logging.ERROR, path, 7, message, args, info)
    found.vllm_process_name = process
    return found


def serving(formatter: SafeFormatter) -> SafeFormatter:
    """The same, once the server is open."""
    formatter.format(record(SERVING[0] + " http://127.0.0.1:8000", name="vllm.entrypoints.launcher"))
    return formatter


def raised(error: BaseException) -> BaseException:
    """The error with a traceback."""
    try:
        raise error
    except BaseException as caught:
        return caught


def test_lines_are_as_vllm_writes_them_so_that_stages_are_seen(formatter: SafeFormatter) -> None:
    for text, _ in STAGES:
        line = formatter.format(record(f"{text} x"))
        assert _PREFIX.sub("", line) == f"{text} x"
        assert line.startswith("(APIServer pid=")
        assert " ERROR " in line
        assert line.endswith(f"[serving.py:7] {text} x")


@given(st.text(), st.booleans())
def test_no_text_makes_a_line_or_steers_a_terminal(text: str, is_serving: bool) -> None:
    SafeFormatter.serves = is_serving
    for made in (
        record("Error with model %s", text), record("%(a)s", {"a": text}), record("request " + text),
        record("x", error=raised(ValueError(text))), record("it ended: %s", text, process="EngineCore"),
        record("it ended", process="Worker_TP1", error=raised(RuntimeError(text))),
    ):  # fmt: skip
        lines = SafeFormatter().format(made).split("\n")
        assert all(line.isprintable() for line in lines)
        assert all(line.startswith(("(APIServer pid=", "(EngineCore pid=", "(Worker_TP1 pid=")) for line in lines)
        assert len(lines) <= MOST_LINES + 1
        assert "\n".join(lines).encode()
    assert "\n" not in printable(text)
    assert len(printable("x" * 10**6)) < LONGEST_LINE + 100


def test_a_serving_api_server_says_nothing_of_a_request(formatter: SafeFormatter) -> None:
    serving(formatter)
    told = [
        formatter.format(record("Error with model %s of %d", WORD, 3)),
        formatter.format(record("%(what)s", {"what": WORD})),
        formatter.format(record(f"Error in streaming tool calls: {WORD}")),
        formatter.format(record(ValueError(WORD))),
        formatter.format(record("%d", WORD)),
        formatter.format(record("Error in parser.", error=raised(KeyError(WORD)))),
        formatter.format(
            record("Task exception was never retrieved", name="asyncio", error=raised(RuntimeError(WORD)))
        ),
    ]
    try:
        try:
            raise KeyError(WORD)
        except KeyError as error:
            raise ValueError(WORD) from error
    except ValueError as error:
        told.append(formatter.format(record("Exception in ASGI application\n", name="uvicorn.error", error=error)))
    assert [line for line in told if WORD in line] == []
    assert f"Error with model {WITHHELD} of 3" in told[0]
    assert "KeyError: " in told[-1]
    assert "ValueError: " in told[-1]
    assert "test_log_format.py" in told[-1]


def test_vllm_0_23_puts_the_prefix_itself(formatter: SafeFormatter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "_original_write", sys.stdout.write, raising=False)
    assert formatter.format(record("one\ntwo")).startswith("ERROR ")
    assert formatter.format(record("one\ntwo")).count("[serving.py:7] ") == 2


def test_every_line_has_the_mark_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "5eed")
    lines = SafeFormatter().format(record("UCE ERROR\ntwo", process="Worker_TP1")).split("\n")
    assert [line.partition("[")[2] for line in lines] == ["serving.py:7 5eed] UCE ERROR", "serving.py:7 5eed] two"]
    (fault,) = faults_in(lines, "5eed")
    assert (fault.name, fault.cards, fault.is_signed) == ("UCE", (1,), True)


def test_what_an_operator_needs_is_told(formatter: SafeFormatter) -> None:
    started = record("start failed: %s", "no such file", error=raised(ValueError("KV cache is too small")))
    assert "no such file" in formatter.format(started)
    assert "ValueError: KV cache is too small" in formatter.format(started)
    serving(formatter)
    stats = record("Engine %03d: Avg prompt throughput: %s tokens/s", 0, "5.0", name="vllm.v1.metrics.loggers")
    assert "Engine 000: Avg prompt throughput: 5.0 tokens/s" in formatter.format(stats)
    fault = raised(RuntimeError("NPU function error: UCE ERROR, error code is 507053"))
    died = record(
        "EngineCore encountered a fatal error.", process="EngineCore", path="vllm/v1/engine/core.py", error=fault
    )
    assert "RuntimeError: NPU function error: UCE ERROR, error code is 507053" in formatter.format(died)
    EngineDeadError = type("EngineDeadError", (Exception,), {})
    dead = formatter.format(record("AsyncLLM output_handler failed.", error=raised(EngineDeadError("see above"))))
    assert "EngineDeadError: see above" in dead


def test_the_engine_core_says_nothing_of_what_reads_a_request(formatter: SafeFormatter) -> None:
    serving(formatter)

    def run_busy_loop() -> None:
        raise ValueError(WORD)

    def grammar() -> None:
        exec(compile(f"raise RuntimeError('{WORD}')", "vllm/v1/structured_output/backend_xgrammar.py", "exec"))

    for function in (run_busy_loop, grammar):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            function()
        assert WORD not in formatter.format(record("failed", process="EngineCore", error=caught.value))
    for path in ("vllm/v1/structured_output/backend_guidance.py", "vllm/logging_utils/dump_input.py"):
        assert WORD not in formatter.format(record("LLMatcher error: %s", WORD, process="EngineCore", path=path))
    assert "x\\ny" in formatter.format(record("Request %s", "x\ny", process="EngineCore", path="vllm/v1/core.py"))


def test_the_file_configures_every_logger_in_a_process_of_its_own() -> None:
    program = f"""
import json, logging, logging.config, threading, warnings
logging.config.dictConfig(json.load(open({str(CONFIG_FILE)!r})))
logging.getLogger("vllm.x").info("told %s", "one")
logging.getLogger("vllm.x").debug("not told")
logging.getLogger("uvicorn.access").info("{WORD}")
logging.getLogger("uvicorn.error").info("{SERVING[1]} now")
logging.getLogger("asyncio").error("of asyncio %s", "{WORD}")
warnings.warn("{WORD}")
def end(): raise ValueError("{WORD}")
thread = threading.Thread(target=end); thread.start(); thread.join()
logging.getLogger("vllm.x").error("%d", "{WORD}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CONFIG_FILE.parents[1],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert all(line.startswith("(MainProcess pid=") for line in lines)
    assert WORD not in done.stdout
    assert "told one" in lines[0]
    assert "not told" not in done.stdout
    assert f"of asyncio {WITHHELD}" in done.stdout
    assert "an exception ended a thread" in done.stdout
    assert json.loads(CONFIG_FILE.read_text())["version"] == 1


def test_a_library_that_quiets_the_root_logger_leaves_vllms_alone() -> None:
    """vLLM's dependency for SageMaker does it when vLLM 0.23 imports its API server; stages were seen no more."""
    program = (
        "import json, logging, logging.config\n"
        f"logging.config.dictConfig(json.load(open({str(CONFIG_FILE)!r})))\n"
        "import model_hosting_container_standards.logging_config\n"
        "logging.getLogger('vllm.engine').info('Loading weights took 3 s')\n"
        "logging.getLogger('theirs').error('it broke')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first.endswith("Loading weights took 3 s")
    assert second.endswith("it broke")
