"""vllm-ascend writes all that vLLM logs into a second file, whatever the administrator's format withholds.

Gives vLLM's log a format that shows no message, as ``VLLM_LOGGING_CONFIG_PATH`` does, logs one, and looks for it. The
directory, ``~/ascend/log/vllm_ascend``, is another here. Without a card:
`python -m ascend.emulator -- python serve/upstream/second_log.py`.
"""

import tempfile
from logging.config import dictConfig
from pathlib import Path

import vllm_ascend.logger as theirs
from vllm.logger import init_logger

CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"quiet": {"format": "%(levelname)s (withheld)"}},
    "handlers": {"out": {"class": "logging.StreamHandler", "formatter": "quiet", "stream": "ext://sys.stdout"}},
    "loggers": {"vllm": {"handlers": ["out"], "level": "INFO", "propagate": False}},
}
dictConfig(CONFIG)
with tempfile.TemporaryDirectory() as directory:
    theirs._LOG_DIR = directory
    theirs.configure_ascend_file_logging()  # what the platform and the workers do
    init_logger("vllm.entrypoints").error("of a request: %s", "Mrs Miller, 74, has had …")
    for file in Path(directory).iterdir():
        print(f"in a file: {file.read_text().partition('] ')[2]}", end="")
