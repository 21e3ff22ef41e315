"""`serve/UPSTREAM.md`: its scripts print what the page shows, and the lines it names read as it quotes them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "serve" / "UPSTREAM.md"
SCRIPTS = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "serve" / "upstream").glob("*.py"))
CITED = re.compile(r"^\| `(vllm(?:_ascend)?)/(\S+):(\d+)` \| `(.+)` \|$", re.M)


@cache
def printed() -> dict[str, tuple[bool, str]]:
    environ = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "tests.npu_serve.forked", *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def shown() -> dict[str, str]:
    blocks = re.findall(r"```console\n\$ python (\S+)\n(.*?)```", PAGE.read_text(), re.S)
    assert len(dict(blocks)) == len(blocks)
    return dict(blocks)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_what_the_page_shows(script: str) -> None:
    ended_well, output = printed()[script]
    assert ended_well
    assert output == shown()[script]


def test_the_page_shows_no_other_script() -> None:
    assert sorted(shown()) == SCRIPTS


@pytest.mark.parametrize(("package", "file", "line", "code"), CITED.findall(PAGE.read_text()))
def test_a_line_reads_as_it_is_quoted(package: str, file: str, line: str, code: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / file).read_text().splitlines()
    assert text[int(line) - 1].strip() == code


def test_every_section_names_a_line() -> None:
    sections = PAGE.read_text().split("\n## ")[1:]
    assert len(sections) == len(SCRIPTS)
    assert all(CITED.search(section) and "```console" in section for section in sections)
