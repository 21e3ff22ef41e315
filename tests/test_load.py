"""The load of `perf serve` without the load client: workloads, points, and what is refused in place of a report."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend.errors import UserError
from convert.demo import write_demo
from perf import serve
from perf.load import client
from perf.load.checks import check, check_prefix_cache, lag
from perf.load.client import LoadClient
from perf.load.endpoint import Endpoint, connect, prefix_cache_hits
from perf.load.points import Point, closed_loop, open_loop
from perf.load.site import machine_of, model_of, token_ids
from perf.load.table import summary, table
from perf.load.workloads import WORKLOADS, Workload, arrivals, identity, lengths, requests, sha256, workload
from perf.power import PowerMeter
from perf.result import ServeRow
from tests.launcher import ROOT, free_port
from tests.timed_server import TimedServer
from tests.tiny import edit_config, user_error

IDS = range(100, 1100)


@pytest.fixture(scope="module")
def server() -> Iterator[TimedServer]:
    with TimedServer(api_key="sesame", max_model_len=1024) as running:
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo's directory with the name that the timed server serves."""
    path = tmp_path_factory.mktemp("models") / "timed"
    write_demo(path)
    return path


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    spans = [sorted(draw(st.tuples(st.integers(least, 300), st.integers(least, 300)))) for least in (8, 4)]
    return Workload("drawn", (spans[0][0], spans[0][1]), (spans[1][0], spans[1][1]), "")


@given(workloads(), st.integers(0, 2**40), st.integers(1, 40), st.integers(0, 10**6), st.integers(128, 10**6))
def test_requests_are_as_stated(work: Workload, seed: int, count: int, first: int, size: int) -> None:
    ids = range(first, first + size)
    asked = requests(work, seed, "a", count, ids)
    assert [(len(one.prompt), one.output_tokens) for one in asked] == lengths(work, seed, count)
    for one in asked:
        assert work.input_tokens[0] <= len(one.prompt) <= work.input_tokens[1]
        assert work.output_tokens[0] <= one.output_tokens <= work.output_tokens[1]
        assert all(token in ids for token in one.prompt)
    # Another label gives other prompts of the same lengths, and none begins alike: no prefix cache can know it.
    other = requests(work, seed, "b", count, ids)
    assert [len(one.prompt) for one in other] == [len(one.prompt) for one in asked]
    assert len({tuple(one.prompt[:8]) for one in asked + other}) == 2 * count
    assert sha256(asked) == sha256(requests(work, seed, "a", count, ids)) != sha256(other)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_length_comes_up_and_none_else(name: str) -> None:
    work = workload(name)
    pairs = lengths(work, 0, 4000)
    for drawn, (low, high) in zip(zip(*pairs, strict=True), (work.input_tokens, work.output_tokens), strict=True):
        assert (min(drawn), max(drawn)) == (low, high) or high - low > 500
        assert abs(sum(drawn) / len(drawn) - (low + high) / 2) <= 0.03 * high


def test_the_identity_is_of_workload_seed_scale_and_ids() -> None:
    def of(name: str = "short-chat", scale: float = 1.0, seed: int = 0, ids: range = IDS) -> str:
        return identity(workload(name, scale), seed, ids)

    # Written down once: another figure means that sites with different versions of this code measure different work.
    assert of() == of() == "3eaf41fbf52f4ff926008482155205162f8d76eaa99edb102661a6e7497a90c6"
    assert len({of(), of("gsm8k"), of(scale=0.5), of(seed=1), of(ids=range(100, 1101))}) == 5
    assert workload("short-chat", 0.5).name == "short-chat x0.5"
    assert workload("short-chat", 1e-6).input_tokens == (8, 8)
    assert "did you mean 'short-chat'" in user_error(workload, "shortchat")


@given(st.integers(0, 1000), st.integers(2, 300), st.floats(0.01, 1000))
def test_arrivals_keep_the_rate(seed: int, count: int, rate: float) -> None:
    times = arrivals(seed, "a", count, rate)
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] == pytest.approx((count - 1) / rate)
    assert arrivals(seed, "a", count, rate) == times != arrivals(seed, "b", count + 1, rate)


def test_gaps_between_arrivals_are_exponential() -> None:
    times = arrivals(3, "a", 20_001, 5.0)
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    for share, quantile in ((0.5, 0.1386), (0.9, 0.4605)):  # -ln(1 - share) / 5
        assert gaps[round(share * len(gaps))] == pytest.approx(quantile, rel=0.03)


def test_points_hold_whole_waves() -> None:
    assert [closed_loop(users, None).requests for users in (1, 3, 8, 128)] == [16, 18, 32, 512]
    assert closed_loop(8, 21).requests == 16
    assert closed_loop(8, 100).requests == 32
    assert "less than --concurrency 8" in user_error(closed_loop, 8, 7)
    assert (open_loop(2.0, None).requests, open_loop(0.1, None).requests, open_loop(9.0, 50).requests) == (60, 16, 50)


def answer(**changes: Any) -> dict[str, Any]:
    """A load client's result that is fine, but for the changes."""
    fine = {
        "completed": 3, "failed": 0, "errors": ["", "", ""], "input_lens": [9, 9, 9], "output_lens": [5, 5, 5],
        "client_cpu_share": 0.1, "ttfts": [0.2, 0.2, 0.2],
        "start_times": [50.0, 51.0, 52.0], "scheduled_times": [0.0, 1.0, 2.0],
    }  # fmt: skip
    return fine | changes


def test_what_must_not_be_reported_is_refused() -> None:
    asked, point = [(9, 5)] * 3, Point(None, 1.0, 3)
    check(answer(), point, asked)
    failed = answer(completed=2, failed=1, errors=["", "Traceback\nConnectionResetError: gone", ""])
    assert "rate 1/s: 1 of 3 requests failed: ConnectionResetError: gone" in user_error(check, failed, point, asked)
    short = answer(output_lens=[5, 4, 4])
    assert "answered with 4 tokens in place of 5 (2 of 3 requests)" in user_error(check, short, point, asked)
    assert "a prompt of 10 tokens in place of 9" in user_error(check, answer(input_lens=[9, 10, 9]), point, asked)
    assert "busy 95%" in user_error(check, answer(client_cpu_share=0.95), point, asked)
    late = answer(start_times=[50.0, 51.021, 52.0])
    assert lag(late) == pytest.approx(0.021)
    assert "went out 21 ms after its arrival (20 ms are allowed)" in user_error(check, late, point, asked)
    check(late | {"ttfts": [0.5, 0.5, 0.5]}, point, asked)  # 25 ms are allowed
    check(late, Point(1, None, 3), asked)  # a closed loop has no schedule


def completed(server: TimedServer, prompt: list[int]) -> None:
    body = json.dumps({"model": "timed", "prompt": prompt, "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sesame"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/v1/completions", body, headers)) as response:
        response.read()


def test_what_a_prefix_cache_knew_is_no_result(server: TimedServer) -> None:
    endpoint, point = Endpoint(server.url, "timed", api_key="sesame"), Point(4, None, 3)
    before = prefix_cache_hits(endpoint)
    completed(server, [1, 2, 3, 4])
    assert prefix_cache_hits(endpoint) == before
    completed(server, [1, 2, 3, 4])
    after = prefix_cache_hits(endpoint)
    assert (before, after) == (0.0, 4.0), "summed over the engines"
    line = "concurrency 4: the server knew 4 of 399 prompt tokens from an earlier run (prefix cache): restart it or "
    assert user_error(check_prefix_cache, point, before, after, 399) == f"{line}take another --seed"
    check_prefix_cache(point, before, after, 400)
    check_prefix_cache(point, None, after, 1)
    check_prefix_cache(point, before, None, 1)
    assert prefix_cache_hits(Endpoint(server.url, "timed", api_key="wrong")) is None


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("vllm:gpu_prefix_cache_hits_total 7.0\n", 7.0),
        ('vllm:gpu_prefix_cache_hits_total{a="}"} 7.0\nvllm:prefix_cache_hits_total{a="}"} 7.0\n', 7.0),
        ("vllm:prefix_cache_hits_total 1.2e+06", 1.2e6),
        ("# vllm:prefix_cache_hits_total 3.0\nvllm:prefix_cache_queries_total 3.0\n", None),
        ("", None),
    ],
)
def test_the_names_of_a_prefix_cache(text: str, hits: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perf.load.endpoint._fetch", lambda url, key: text.encode())
    assert prefix_cache_hits(Endpoint("http://x", "m")) == hits


def test_the_key_goes_nowhere_else(server: TimedServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"redirects \(302\): give the server's own address"):
        connect(f"{server.url}/moved", model, None, "sesame")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert connect(server.url, model, None, "sesame").model == "timed"


def test_special_tokens_are_not_sent(tmp_path: Path) -> None:
    write_demo(tmp_path / "tiny")
    assert token_ids(tmp_path / "tiny") == range(2033)
    document = json.loads((tmp_path / "tiny" / "tokenizer.json").read_text())
    document["added_tokens"] = [{"id": 500}]
    (tmp_path / "tiny" / "tokenizer.json").write_text(json.dumps(document))
    assert token_ids(tmp_path / "tiny") == range(501, 2048)
    edit_config(tmp_path / "tiny", vocab_size=5000)  # padded: ids that are no words
    assert token_ids(tmp_path / "tiny") == range(501, 2048)
    (tmp_path / "tiny" / "tokenizer.json").unlink()
    assert token_ids(tmp_path / "tiny") == range(5000)


@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "bf16"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "w4a16"),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"},
                                                  "input_activations": {"num_bits": 8}}},
                }
            },
            "w8a8",
        ),
        ({"quantization_config": {"quant_method": "novel"}}, None),
    ],
)  # fmt: skip
def test_the_precision_is_the_configs(tmp_path: Path, model: Path, changes: dict[str, Any], precision: str) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    edit_config(tmp_path, **changes)
    if precision is None:
        assert "say --precision" in user_error(model_of, tmp_path, None)
        return
    told = model_of(tmp_path, None)
    assert (told.precision, told.weights) == (precision, None)
    assert told.architecture_sha256 == model_of(model, None).architecture_sha256
    assert model_of(tmp_path, "w8a8").precision == "w8a8"


def test_machines_are_this_one_or_named(server: TimedServer, model: Path) -> None:
    here = connect(server.url, model, None, "sesame")
    machine, device, cards = machine_of(None, here)
    assert (machine.device_type, machine.cards, cards) == ("cpu", 1, 1)
    assert device is not None
    named, device, cards = machine_of("4xH20-96G", here)
    assert (named.device, named.device_type, named.cards, device, cards) == ("H20-96G", "cuda", 4, None, 4)
    assert machine_of("2x910B3", here)[0].device_type == "npu"
    assert "did you mean 'H20-96G'" in user_error(machine_of, "4xH20-96", here)
    assert "neither a number" in user_error(machine_of, "x4", here)
    assert "this machine has 1" in user_error(machine_of, "2", here)


class Cards:
    """Devices of which each tells its watts, or not."""

    index = 0

    def __init__(self, *watts: float | None) -> None:
        self.each = watts

    def watts(self, index: int) -> float | None:
        return self.each[index]


def test_power_is_of_all_cards_or_unknown() -> None:
    for cards, watts in ((Cards(100.0, 50.0), 150.0), (Cards(100.0, None), None), (None, None)):
        with PowerMeter(cards, 2) as power:  # type: ignore[arg-type]
            pass
        assert power.watts == watts


def test_the_table_shows_medians_over_repeats() -> None:
    rows = [
        ServeRow(8, None, repeat, "", {"output_throughput": rate, "p99_ttft_ms": 200.0, "request_goodput": None}, watts)
        for repeat, (rate, watts) in enumerate(((90.0, 5.0), (100.0, 7.0), (400.0, None)))
    ]
    [point] = summary(rows)
    assert (point["max_concurrency"], point["output_throughput"], point["repeats"]) == (8, 100.0, 3)
    assert point["watts"] is None
    heading, line = table(rows).splitlines()
    assert line.split()[:2] == ["8", "100.0"]
    assert len(heading) == len(line)


def test_the_table_shows_what_became_of_drafts() -> None:
    figures = {"spec_decode_acceptance_rate": 48.75, "spec_decode_acceptance_length": 1.4875}
    rows = [ServeRow(8, None, 0, "", {"output_throughput": 90.0, **figures}, None)]
    heading, line, *note = table(rows).splitlines()
    assert heading.endswith("accepted %  tok/step")
    assert line.split()[-2:] == ["48.8", "1.49"]
    assert "drawn token ids" in note[0]
    assert "The server drafts" not in table([ServeRow(8, None, 0, "", {"output_throughput": 90.0}, None)])


COMMAND = ("--model", "DIR", "--out", "OUT", "--base-url", "URL")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--concurency", "8"), "unknown argument '--concurency' (did you mean '--concurrency'?)"),
        (("--api-key=SECRET",), "every user of this machine could read"),
        (("--precision", "w8a"), "unknown 'w8a' (did you mean 'w8a8'?)"),
        (("--workload", "chat"), "there is short-chat"),
        (("--concurrency", "1,x"), "--concurrency '1,x' is not a list of different whole numbers"),
        (("--rate", "8,8"), "--rate '8,8' is not a list of different numbers"),
        (("--rate", "-1"), "above 0"),
        (("--rate", "2", "--concurrency", "4"), "exclude each other"),
        (("--goodput", "tfft:500"), "unknown latency 'tfft' (did you mean 'ttft'?)"),
        (("--goodput", "ttft"), "say milliseconds"),
        (("--repeats", "x"), "--repeats"),
        (("--requests", "4", "--concurrency", "8"), "less than --concurrency 8"),
        (("--out", "/nowhere/x.json"), "--out /nowhere/x.json: there is no such folder"),
        (("--model", "/nowhere"), "/nowhere: no such model directory"),
        (("--api-key-file", "/nowhere"), "--api-key-file /nowhere: cannot be read"),
        ((), "the server wants an API key (401)"),
        (("--base-url", "ftp://x"), "--base-url must be"),
        (("--base-url", "http://user:pw@127.0.0.1:1"), "without user or password"),
        (("--base-url", "http://127.0.0.1:1"), "nothing answers at http://127.0.0.1:1/v1/models"),
    ],
)
def test_mistakes_are_answered_at_once(
    server: TimedServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve, "LoadClient", None)  # nothing slow may start
    values = {"DIR": str(model), "OUT": str(tmp_path / "out.json"), "URL": server.url}
    error = user_error(serve.main, [*(values.get(part, part) for part in COMMAND), *options])
    assert message in error
    assert "SECRET" not in error


def test_the_endpoint_must_serve_what_is_said(
    server: TimedServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "key"
    key.write_text("sesame\n")
    monkeypatch.setattr(serve, "LoadClient", None)
    base = [
        "--model",
        str(model),
        "--out",
        str(tmp_path / "o.json"),
        "--base-url",
        server.url,
        "--api-key-file",
        str(key),
    ]
    assert "needs 8,192 tokens, the server takes 1,024" in user_error(serve.main, [*base, "--workload", "record-8k"])
    assert "does not serve 'time' (did you mean 'timed'?)" in user_error(
        serve.main, [*base, "--served-model-name", "time"]
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_bytes((model / "config.json").read_bytes())
    assert "does not serve 'other' but timed" in user_error(serve.main, [*base, "--model", str(tmp_path / "other")])
    told = connect(f"{server.url}/v1/", tmp_path / "other", "timed", "sesame")
    assert (told.base_url, told.model, told.engine, told.max_model_len) == (server.url, "timed", "stub 1", 1024)
    assert "sesame" not in repr(told)
    key.write_text("two\nlines")
    assert "holds no key of one line" in user_error(serve.main, base)


def test_without_vllm_one_line_names_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "find_spec", lambda name: None)
    assert "guidellm or aiperf" in user_error(client.check_installed)


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("import time; time.sleep(60)", "no answer within 0.5 s: the server hangs"),
        ("raise SystemExit(3)", "ended with code 3"),
        ("""print('{"error": "ValueError: no"}', flush=True); input()""", "the load client failed: ValueError: no"),
    ],
)
def test_a_client_that_hangs_or_dies_is_told(worker: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""print('{{"version": "0"}}', flush=True); {worker}"""
    monkeypatch.setattr(LoadClient, "COMMAND", (sys.executable, "-c", code))
    with LoadClient(Endpoint("http://x", "m"), workload("gsm8k"), 0, IDS, timeout=0.5) as running:
        assert running.version == "vllm bench serve, vllm 0"
        start = time.monotonic()
        assert message in user_error(running.measure, Point(1, None, 1))
        assert time.monotonic() - start < 30
    assert running.process.poll() is not None


def test_one_failed_request_and_nothing_is_written(
    server: TimedServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker whose warm-up goes well, and of whose first run one request fails.
    results = [{"failed": failed, "completed": 4 - failed, "errors": ["", "Gone\n"]} for failed in (0, 1)]
    lines = [json.dumps(line) for line in ({"version": "0"}, *({"result": one, "sha256": ""} for one in results))]
    monkeypatch.setattr(
        LoadClient, "COMMAND", (sys.executable, "-c", f"print('\\n'.join({lines}), flush=True); input()")
    )
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    out = tmp_path / "out.json"
    argv = ["--base-url", server.url, "--model", str(model), "--concurrency", "1", "--out", str(out)]
    error = user_error(serve.main, argv)
    assert error == "concurrency 1: 1 of 4 requests failed: Gone; nothing is reported"
    assert not list(tmp_path.iterdir())


def test_a_mistake_costs_no_import_of_torch() -> None:
    code = (
        "import sys\nfrom perf import serve\nfrom ascend.errors import UserError\n"
        f"try: serve.main(['--model', 'x', '--out', 'y', '--base-url', 'http://127.0.0.1:{free_port()}'])\n"
        "except UserError: print({'torch', 'vllm', 'aiohttp', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
