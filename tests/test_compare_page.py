"""The page of `perf compare`: as text, as a browser builds it, and as it looks; and the plots as files."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from perf.compare.command import main
from perf.compare.comparison import compare
from perf.compare.figures import PLOTS, draw, svg
from perf.compare.systems import read_systems
from perf.result import Result, write
from tests.perf_results import CPU, H20, MODEL, NPU, decode, run, serve

pytestmark = pytest.mark.beside

LOADS = (1, 2, 4, 8, 16, 32, 64, 128)
EVIL = '<script>alert(1)</script>" id="x url(#y $\\frac$ &amp; 医院'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here to open the page with")
Page = Callable[..., Path]


def site(number: int) -> Result:
    """A made-up server, as fast as its number."""
    machine = (H20, NPU, replace(H20, device="NVIDIA H200"))[number % 3]
    speeds = [(100 + 50 * number) * load / (1 + load / 40) for load in LOADS]
    return serve(run(replace(machine, cards=number + 1)), speeds, LOADS, seed=number, watts=500.0 + number)


DECODED = decode({(engine, batch): [0.01 * batch, 0.011 * batch] for batch in (1, 8) for engine in ("lean", "vllm")})
KINDS: dict[str, list[Result]] = {
    "one": [site(0)],
    "two": [site(0), site(1)],
    "five": [site(number) for number in range(5)],
    "decode": [DECODED],
    "open loop": [serve(rate=True)],
}


@pytest.fixture
def page(tmp_path: Path) -> Page:
    def made(results: list[Result], *arguments: str, code: int = 0) -> Path:
        files = [tmp_path / f"{number}.json" for number in range(len(results))]
        for file, one in zip(files, results, strict=True):
            write(file, one)
        out = tmp_path / "page.html"
        assert main([*map(str, files), "--html", str(out), *arguments]) == code
        return out

    return made


@dataclass
class Outline(HTMLParser):
    """What a page is made of; complains of tags that are not closed in their order."""

    void = frozenset(("meta", "br", "link", "img", "hr", "input"))
    open: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name}"
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                self.addresses.append(value or "")
            elif not name.startswith("xmlns"):
                assert "://" not in (value or ""), f"{tag} {name}={value}"
            if name == "id":
                self.ids.append(value or "")
            self.addresses += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def outline(page: Path) -> Outline:
    found = Outline()
    found.feed(page.read_text(encoding="utf-8"))
    found.close()
    assert found.open == []
    return found


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind != "decode" else []) for kind in KINDS]
)
def test_the_page_is_whole_and_loads_nothing(kind: str, page: Page) -> None:
    file = page(KINDS[kind])
    assert file.stat().st_mode & 0o777 == 0o640
    found = outline(file)
    assert all(address.startswith("#") for address in found.addresses)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(found.seen)
    assert len(found.ids) == len(set(found.ids)), "plots share no ids"
    assert {address[1:] for address in found.addresses} <= set(found.ids)
    assert "@import" not in file.read_text()
    expected = {
        "one": ["throughput", "pareto", "ttft", "tpot", "share"],
        "two": list(PLOTS),
        "five": list(PLOTS),
        "decode": ["throughput", "pareto", "ratios", "share"],
        "open loop": ["throughput", "pareto", "ttft", "tpot"],
    }
    assert [name[5:] for name in found.ids if name.startswith("plot-")] == expected[kind]
    assert found.seen["svg"] == len(expected[kind])
    text = "".join(found.text)
    for what in ("Measured side by side", "Figures", "Who measured what, and where", "0123456789ab"):
        assert what in text
    assert ("Verdict" in text) == (kind not in ("one", "open loop"))


def test_what_users_write_stays_text(page: Page, tmp_path: Path) -> None:
    evil = tmp_path / """it's a "file" <b>.json"""
    write(evil, site(0))
    out = tmp_path / "page.html"
    named = run(NPU, replace(MODEL, name="<i>m</i>"), command="x <u>y</u>", commit="<s>")
    write(tmp_path / "b.json", serve(named, (9.0, 20.0), (1, 2)))
    arguments = [str(evil), str(tmp_path / "b.json"), "--label", EVIL, "--label", "_b", "--html", str(out)]
    assert main(arguments) == 0
    found = outline(out)
    assert not {"script", "i", "u", "s"} & set(found.seen)
    text = "".join(found.text)
    assert f"A\u2003{EVIL}" not in text  # an en space is set
    assert text.count(EVIL) >= 3, "title, heading and provenance"
    assert evil.name in text
    assert "<i>m</i>" in text
    assert shlex.join(["python", "-m", "perf", "compare", *arguments]) in text
    drawn = [part for part in found.text if part.strip().startswith("A  <script>")]
    assert len(drawn) >= 4, "the legends"
    assert {part.strip() for part in drawn} == {f"A  {EVIL}"}
    assert "B  _b" in found.text


@pytest.mark.slow
def test_the_page_says_what_the_verdict_is(page: Page) -> None:
    other = serve(run(NPU, replace(MODEL, precision="fp8")), (600.0, 2000.0))
    text = page([serve(), other, serve(run(replace(NPU, emulated=True)))], code=1).read_text()
    assert text.count("not comparable</b>") == 2
    assert "<code>--across precision</code>" in text
    assert "C is an emulated card: a program on this computer's processor" in text.replace("&#39;", "'")
    assert "How many times as much" not in text
    assert 'class="better"' not in text
    assert "plot-ratios" not in text
    assert "(EMULATED)" in text
    text = page([serve(), other], "--across", "precision").read_text()
    assert "B against A: comparable" in text
    assert "differs as asked: precision, bf16 against fp8" in text
    assert 'class="better"' in text
    assert "plot-ratios" in text


@pytest.mark.slow
def test_the_figures_in_the_tables(page: Page) -> None:
    made = serve(watts=200.0, repeats=1)
    other = serve(run(NPU), (1000.0, 1000.0), repeats=1)
    text = re.sub(r"\s+", " ", page([made, other]).read_text())
    speeds = [row.result["output_throughput"] for row in made.rows]
    ratios = [row.result["output_throughput"] / speed for row, speed in zip(other.rows, speeds, strict=True)]
    for one in ratios:
        assert f'<span class="open">{one:.2f}</span> <small>no bounds</small>' in text
    assert re.search(rf"<td>A, concurrency 8</td> <td>{speeds[1]:,.0f}</td>", text)
    assert re.search(rf"<td>{speeds[1] / 4:,.0f}</td><td>{speeds[1] / 200:,.2f}</td>", text)


def browse(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    where = ["--disable-quic", f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,5000"]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *quiet, *where]
    return subprocess.run(
        [*command, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "two", "five"])
def test_a_browser_shows_it(kind: str, page: Page, tmp_path: Path) -> None:
    """Boxes are measured by a script that is added to a copy of the page: the page itself has none."""
    labels = [part for number, _ in enumerate(KINDS[kind]) for part in ("--label", f"{number}, {EVIL} " * 3)]
    file = page(KINDS[kind], *labels)
    measure = tmp_path / "measured.html"
    script = """<script>
      const box = e => e.getBoundingClientRect(), out = [];
      document.querySelectorAll("figure svg").forEach(svg => {
        const s = box(svg), texts = [...svg.querySelectorAll("text")].map(box);
        const outside = texts.filter(t => t.left < s.left - 1 || t.right > s.right + 1 || t.top < s.top - 1 ||
                                          t.bottom > s.bottom + 1).length;
        out.push([svg.parentNode.id, Math.round(s.width), Math.round(s.height), texts.length, outside].join(" "));
      });
      document.title = out.join(";") + "|" + document.documentElement.scrollWidth;
    </script></body>"""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", file.read_text())
    assert "<script" not in text
    measure.write_text(text.replace("</body>", script))
    dom = browse(measure, "--dump-dom").stdout
    title = re.search(r"<title>([^<]*)</title>", dom)
    assert title is not None
    boxes, width = title[1].split("|")
    assert int(width) <= 1400, "nothing reaches beyond the window"
    for box in boxes.split(";"):
        name, across, down, texts, outside = box.split()
        assert int(across) > 400, name
        assert int(down) > 200, name
        assert int(texts) > 5, name
        assert int(outside) == 0, f"{name}: text is cut off"
    assert len(boxes.split(";")) == (5 if kind == "one" else 6)
    picture = tmp_path / "page.png"
    done = browse(file, f"--screenshot={picture}")
    assert "Content Security Policy" not in done.stderr, "the page's own policy stops nothing of it"
    with Image.open(picture) as image:
        assert image.size == (1400, 5000)
        colours = image.convert("RGB").getcolors(1 << 24) or []
    assert len(colours) > 100
    white = sum(count for count, colour in colours if colour == (255, 255, 255))
    assert 0.3 < white / (1400 * 5000) < 0.99
    blue = (0, 0x72, 0xB2)  # of the first system
    assert any(colour == blue and count > 100 for count, colour in colours)


@pytest.mark.slow
def test_plots_as_files(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "plots"
    folder.mkdir()
    page(KINDS["two"], "--plots", str(folder), "--label", EVIL, "--label", "b")
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")
    )
    for file in folder.iterdir():
        assert file.stat().st_mode & 0o777 == 0o640
        if file.suffix == ".svg":
            assert ElementTree.parse(file).getroot().tag.endswith("svg")
        else:
            with Image.open(file) as image:
                assert min(image.size) > 600
                assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20


@pytest.mark.slow
def test_the_same_data_draw_the_same_picture(tmp_path: Path) -> None:
    write(tmp_path / "a.json", DECODED)
    comparison = compare(read_systems(tmp_path / "a.json"))
    first, again = ({name: svg(canvas, name) for name, canvas in draw(comparison).items()} for _ in range(2))
    assert first == again
    assert list(first) == ["throughput", "pareto", "ratios", "share"]
    for name, text in first.items():
        assert text.startswith("<svg ")
        root = ElementTree.fromstring(text)
        assert {element.get("id", name) for element in root.iter()} == {
            one for one in (element.get("id", name) for element in root.iter()) if one.startswith(name)
        }


@pytest.mark.slow
def test_plots_have_room_for_many_points_and_long_labels(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write(tmp_path / "a.json", site(0))
    systems = [replace(read_systems(tmp_path / "a.json")[0], label=f"{number} " + 60 * "long ") for number in range(9)]
    drawn = draw(compare(systems))
    few = draw(compare(systems[:2]))
    for name in ("ratios", "share"):
        assert drawn[name].get_figheight() > 2 * few[name].get_figheight(), name
    for name, canvas in drawn.items():
        assert "svg" in svg(canvas, name)
        (axes,) = canvas.axes
        room = axes.get_position()
        assert room.width > 0.6
        assert room.height > 0.5
        legends = [text.get_text() for legend in canvas.legends for text in legend.get_texts()]
        assert all(len(text) <= 80 for text in legends)
        assert (len(legends) >= 9) == (name not in ("ratios", "share"))
    assert [str(one.message) for one in recwarn if "layout" in str(one.message)] == []


def test_emulated_cards_are_marked_in_every_legend(tmp_path: Path) -> None:
    write(tmp_path / "a.json", serve(run(replace(NPU, emulated=True))))
    write(tmp_path / "b.json", serve(run(CPU)))
    canvas = draw(compare([*read_systems(tmp_path / "a.json"), *read_systems(tmp_path / "b.json")]))["throughput"]
    legend = [text.get_text() for text in canvas.legends[0].get_texts()]
    assert legend == ["A  EMULATED, 8 x Ascend910B2, bf16", "B  a processor, bf16"]
