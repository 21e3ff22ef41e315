"""The page of `perf parity --html`: whole in itself, everything escaped, private, and drawn by a real browser."""

from __future__ import annotations

import dataclasses
import re
import shutil
import stat
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from perf.parity.judge import Check, Comparison, Divergence, DriftNumbers, LayerNumbers, LogitNumbers, all_checks, judge
from perf.parity.judge_served import QuantileNumbers, ServedNumbers, served_checks
from perf.parity.limits import LIMITS
from perf.parity.page import criteria, page, write_page
from perf.parity.report import Report, ServerInfo
from perf.parity.side import SideInfo
from tests.tiny import user_error

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
A = SideInfo(
    side="cpu",
    device_name="CPU <b>&",
    emulated=False,
    host="host",
    software={},
    commit="c0ffee",
    torch="2.13.0",
    torch_npu=None,
    dtype="bf16",
    quantise=None,
    n_group=4,
    topk_group=2,
    batches=[[8, 48, 0], [1, 48, 16]],
    decode=4,
    seed=0,
    config_sha256="c" * 64,
    weights_sha256="e" * 64,
    tokens_sha256="d" * 64,
    streams_sha256="1" * 64,
    like_sha256="1" * 64,
    date="2026-01-01T00:00:00+00:00",
)
B = dataclasses.replace(A, side="npu-emulated", device_name="Ascend910B3", emulated=True, weights_sha256="f" * 64)
SERVER = ServerInfo("http://127.0.0.1:8000", "<script>alert(1)</script>", "0.32.0", 20, A.date)


def compared(layers: int = 33, **last: float) -> Report:
    own = [LayerNumbers(f"layer {n}", attention=1e-2, flips=n) for n in range(layers - 1)]
    own.append(LayerNumbers(f"layer {layers - 1}", **last))  # type: ignore[arg-type]
    drift = [DriftNumbers(f"layer {n}", 1e-3 * (n + 1) ** 0.5, 2e-2, 0.1, 0.99 if n else None) for n in range(layers)]
    found = [Divergence("decode", 0, 3, lead=9.0, moved=9.5, after_flip=False)]
    numbers = Comparison(0.0, own, drift, found, *[LogitNumbers(8, delta=0.01)] * 7)
    checks = all_checks(numbers, LIMITS["bf16"])
    return Report("perf parity 'x<y'", A, B, numbers, LIMITS["bf16"], checks, judge(checks))


def served(factor: float) -> Report:
    quantiles = [QuantileNumbers(share, factor * 1e-2, 1e-2) for share in (0.1, 0.25, 0.5, 0.75, 0.9)]
    numbers = ServedNumbers(416, 3, 1e-3, 416, quantiles, 1e-3, 42, 1e-2, 0.1, 0.2, 0.01, 0.97, 0.98, [])
    checks = served_checks(numbers, LIMITS["bf16"])
    return Report("perf parity check", A, SERVER, numbers, LIMITS["bf16"], checks, judge(checks))


REPORTS = {
    "pass": compared(),
    "fail": compared(attention=5.0),
    "not a number": compared(mlp=float("nan")),
    "served": served(1.1),
    "served badly": served(12.0),
}


class Page(HTMLParser):
    """What a browser would load, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [name for name, _ in attributes if name in ("src", "href", "srcset", "data", "action", "style")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_whole_in_itself(name: str) -> None:
    report = REPORTS[name]
    html = page(report)
    parsed = Page(html)
    assert parsed.open == []
    assert parsed.loads == []
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "b"}
    assert not re.search(r"url\(|@import|javascript:", html)
    assert [url for url in re.findall(r"https?://[^\s<]+", html) if not url.startswith("http://127.0.0.1:8000")] == []
    assert f'<section class="verdict {report.result}">' in html
    assert (report.result == "PASS") == (name in ("pass", "served"))
    for words in (A.config_sha256, A.tokens_sha256, "CPU &lt;b&gt;&amp;", "What this does not prove", "Signature"):
        assert words in html


def test_what_failed_is_marked_where_it_is() -> None:
    html = page(REPORTS["fail"])
    assert "<li>layer 32: attention 5, limit 0.08</li>" in html
    assert re.search(r'<tr class="bad"><th>layer 32</th><td>attention</td>.*BROKEN', html)
    assert "NOT EXPLAINED by rounding" in html
    assert "files are not the same bytes on both sides" in html
    assert "EMULATED, no card took part" in html
    assert "perf parity &#39;x&lt;y&#39;" in html


def test_a_criterion_shows_the_check_nearest_to_its_limit() -> None:
    values = (("layer 0", 0.5), ("layer 1", -0.7), ("MTP 0", 0.1), ("head", 0.9))
    checks = [Check(place, "attention", value, 1.0, "") for place, value in values]
    found = criteria(checks)
    assert [(one.worst.place, one.checks) for one in found] == [("layer 1", 3), ("head", 1)]
    unknown = criteria([*checks, Check("layer 2", "attention", float("nan"), 1.0, "")])
    assert unknown[0].worst.place == "layer 2"


def test_the_page_is_private_and_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_page(REPORTS["pass"], file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "folder").mkdir()
    assert "cannot be written" in user_error(write_page, REPORTS["pass"], tmp_path / "folder")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
@pytest.mark.parametrize("name", ["pass", "served badly"])
def test_a_browser_draws_it(name: str, tmp_path: Path) -> None:
    write_page(REPORTS[name], tmp_path / "report.html")
    (tmp_path / "profile").mkdir()
    command = [str(CHROMIUM), *QUIET, f"--user-data-dir={tmp_path / 'profile'}"]
    options = [f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,2400", (tmp_path / "report.html").as_uri()]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=120)
    picture = (tmp_path / "page.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 50_000  # a blank page of this size takes 10 kB
