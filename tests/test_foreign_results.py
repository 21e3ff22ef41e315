"""Result files of other load tools: each becomes the same figures, and what cannot be compared is refused.

The fixtures hold the keys that are read and some beside them, at their places and in their units. Places and units are
those of files that vLLM 0.32.0, guidellm 0.8.1 and aiperf 0.13.0 wrote against a server of known times, and of the
sources that write them: vLLM's `benchmarks/serve.py`, guidellm's `benchmark/schemas/`, aiperf's
`exporters/metrics_json_exporter.py` and `common/models/export_models.py`. All three describe one and the same run here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perf.compare.foreign import FORMATS, read_foreign
from perf.compare.rules import judge
from perf.compare.systems import METRICS, System, read_systems
from tests.tiny import user_error

# 24 requests of 32 tokens in and 16 out, 4 at a time.
WANTED = {
    "output_throughput": 320.0,
    "total_token_throughput": 960.0,
    "request_throughput": 20.0,
    "median_ttft_ms": 50.0,
    "p99_ttft_ms": 60.0,
    "median_tpot_ms": 10.0,
    "p99_tpot_ms": 11.0,
    "median_e2el_ms": 200.0,
    "p99_e2el_ms": 220.0,
    "p99_itl_ms": 13.0,
}


def vllm(load: Any = 4, rate: Any = "inf") -> dict[str, Any]:
    """As `vllm bench serve --save-result --percentile-metrics ttft,tpot,itl,e2el` writes it."""
    return {
        "date": "20261122-211319",
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": "/srv/models/AntAngelMed",
        "tokenizer_id": "/srv/models/AntAngelMed",
        "num_prompts": 24,
        "request_rate": rate,
        "burstiness": 1.0,
        "max_concurrency": load,
        "duration": 1.2,
        "completed": 24,
        "failed": 0,
        "total_input_tokens": 768,
        "total_output_tokens": 384,
        "request_goodput": 19.0,
        "mean_ttft_ms": 51.0,
        "std_ttft_ms": 2.0,
        **WANTED,
    }


def _distribution(median: float, p99: float, mean: float, total: float = 0.0, other: float = 0.0) -> dict[str, Any]:
    def one(factor: float) -> dict[str, Any]:
        scaled = {"mean": mean, "median": median, "total_sum": total}
        percentiles = {"p95": median, "p99": p99, "p999": 9 * p99}
        return {key: factor * value for key, value in scaled.items()} | {
            "count": 24,
            "percentiles": {key: factor * value for key, value in percentiles.items()},
        }

    return {"successful": one(1.0), "errored": one(0.0), "incomplete": one(other), "total": one(1.0 + other)}


def guidellm_run(strategy: dict[str, Any], incomplete: float = 0.0) -> dict[str, Any]:
    """One of the file's benchmarks; latencies of requests are in seconds, all others in milliseconds."""
    return {
        "type_": "generative_benchmark",
        "config": {
            "strategy": strategy,
            "backend": {"kind": "openai_http", "model": "medical/AntAngelMed", "target": "http://127.0.0.1:8000"},
        },
        "metrics": {
            "request_totals": {"successful": 24, "errored": 0, "incomplete": 24 * incomplete, "total": 24},
            "requests_per_second": _distribution(9.7, 110.0, 20.0, other=incomplete),
            "request_latency": _distribution(0.2, 0.22, 0.21, other=incomplete),
            "prompt_token_count": _distribution(32, 32, 32, 768, incomplete),
            "output_token_count": _distribution(16, 16, 16, 384, incomplete),
            "time_to_first_token_ms": _distribution(50.0, 60.0, 51.0, other=incomplete),
            "time_per_output_token_ms": _distribution(13.0, 14.0, 13.0, other=incomplete),
            "inter_token_latency_ms": _distribution(10.0, 11.0, 10.1, other=incomplete),
            "output_tokens_per_second": _distribution(217.0, 1466.0, 320.0, other=incomplete),
            "tokens_per_second": _distribution(295.0, 20302.0, 960.0, other=incomplete),
        },
    }


def guidellm(*runs: dict[str, Any]) -> dict[str, Any]:
    """A whole `benchmarks.json`."""
    concurrent = {"type_": "concurrent", "worker_count": 4, "max_concurrency": 4, "streams": 4}
    return {
        "metadata": {"version": 2, "guidellm_version": "0.8.1", "python_version": "3.11.7"},
        "config": {"spec": {"data": [{"kind": "synthetic_text", "prompt_tokens": 32, "output_tokens": 16}]}},
        "benchmarks": list(runs or (guidellm_run(concurrent),)),
        "conclusions": [],
    }


def aiperf(phase: dict[str, Any] | None = None) -> dict[str, Any]:
    """As `aiperf profile --streaming` writes `profile_export_aiperf.json`."""

    def latency(p50: float, p99: float) -> dict[str, Any]:
        return {"unit": "ms", "avg": 1.1 * p50, "p50": p50, "p99": p99, "count": 24}

    phase = phase or {"name": "profiling", "kind": "profiling", "type": "concurrency", "requests": 24, "concurrency": 4}
    return {
        "schema_version": "1.4",
        "aiperf_version": "0.13.0",
        "request_throughput": {"unit": "requests/sec", "avg": 20.0},
        "request_latency": latency(200.0, 220.0),
        "request_count": {"unit": "requests", "avg": 24.0},
        "time_to_first_token": latency(50.0, 60.0),
        "inter_token_latency": latency(10.0, 11.0),
        "inter_chunk_latency": latency(10.0, 13.0),
        "output_token_throughput": {"unit": "tokens/sec", "avg": 320.0},
        "total_token_throughput": {"unit": "tokens/sec", "avg": 960.0},
        "total_isl": {"unit": "tokens", "avg": 768.0},
        "total_osl": {"unit": "tokens", "avg": 384.0},
        "input_config": {
            "models": {"items": [{"name": "AntAngelMed"}]},
            "datasets": [{"name": "main", "type": "synthetic", "entries": 24}],
            "phases": [{"name": "warmup", "kind": "warmup", "type": "concurrency", "concurrency": 9}, phase],
        },
        "was_cancelled": False,
        "is_complete": True,
        "request_error_rate": {"unit": "%", "avg": 0.0},
    }


FILES: dict[str, Callable[[], dict[str, Any]]] = {"vllm bench serve": vllm, "guidellm": guidellm, "aiperf": aiperf}
# Where each says that requests failed.
FAILED = {
    "vllm bench serve": "failed",
    "guidellm": "benchmarks.0.metrics.request_totals.errored",
    "aiperf": "request_error_rate.avg",
}


def put(document: Any, path: str, *value: Any) -> Any:
    """Set what stands at a path, or take it away where no value is given; returns the document."""
    *folders, last = path.split(".")
    place = document
    for key in folders:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place.pop(last, None)
    if value:
        (place[last],) = value
    return document


def read(document: Any) -> System:
    """Read a document that holds one system."""
    (system,) = read_foreign(document, "a.json", None)
    return system


@pytest.mark.parametrize("tool", FILES)
def test_figures(tool: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(FILES[tool]()))
    (system,) = read_systems(tmp_path / "a.json")
    (point,) = system.points
    assert (point.axis, point.load) == ("concurrency", 4)
    wanted = {key: [pytest.approx(value)] for key, value in WANTED.items()}
    if tool == "guidellm":
        del wanted["p99_itl_ms"]
    assert point.samples == wanted
    assert system.tool.startswith(tool)
    assert (system.run, system.cards, system.source) == (None, None, str(tmp_path / "a.json"))
    assert system.lengths == (32.0, 16.0)
    lengths = {key: system.settings[key] for key in ("model", "input tokens", "output tokens")}
    assert lengths == {"model": "AntAngelMed", "input tokens": 32, "output tokens": 16}


def test_the_label_is_the_users() -> None:
    assert [one.label for one in read_foreign(vllm(), "a.json", "910B")] == ["910B"]
    assert read(vllm()).label == "AntAngelMed, vllm bench serve"


def test_tables_know_no_other_metrics() -> None:
    assert {form.tool for form in FORMATS} == set(FILES)
    for form in FORMATS:
        assert set(form.metrics) <= set(METRICS)


@pytest.mark.parametrize("a", FILES)
@pytest.mark.parametrize("b", FILES)
def test_the_same_work_of_two_tools_compares(a: str, b: str) -> None:
    assert judge(read(FILES[a]()), read(FILES[b]())).comparable


@pytest.mark.parametrize(
    ("path", "value"), [("model_id", "Ling-mini"), ("total_input_tokens", 2 * 768), ("total_output_tokens", 390 + 24)]
)
def test_other_work_does_not(path: str, value: Any) -> None:
    assert not judge(read(vllm()), read(put(vllm(), path, value))).comparable


def test_rates_and_limits() -> None:
    def load(document: Any) -> tuple[str, float, Any]:
        system = read(document)
        (point,) = system.points
        return point.axis, point.load, system.settings.get("requests at a time, at most")

    assert load(vllm(None, 2.5)) == ("rate", 2.5, None)
    assert load(vllm(8, 2.5)) == ("rate", 2.5, 8)
    assert load(vllm(None, "inf")) == ("concurrency", 24, None)  # all at once
    constant = {"type_": "constant", "rate": 3.0, "max_concurrency": 10240}  # what it says where no limit was asked for
    assert load(guidellm(guidellm_run(constant))) == ("rate", 3.0, None)
    poisson = {"name": "profiling", "type": "poisson", "requests": 24, "rate": 10.0}
    assert load(aiperf(poisson)) == ("rate", 10.0, None)
    assert load(aiperf(poisson | {"concurrency": 8})) == ("rate", 10.0, 8)


def test_synchronous_is_one_at_a_time() -> None:
    system = read(guidellm(guidellm_run({"type_": "synchronous", "max_concurrency": 1})))
    assert [(one.axis, one.load) for one in system.points] == [("concurrency", 1)]


def test_runs_of_one_file_become_points_and_samples() -> None:
    runs = [guidellm_run({"type_": "concurrent", "streams": streams}) for streams in (8, 1, 8)]
    runs[0]["metrics"]["output_tokens_per_second"]["total"]["mean"] = 640.0
    system = read(guidellm(*runs))
    assert [one.load for one in system.points] == [1, 8]
    assert system.points[1].samples["output_throughput"] == [640.0, 320.0]


def test_a_metric_that_one_repeat_lacks_is_left_out() -> None:
    runs = [guidellm_run({"type_": "concurrent", "streams": 4}) for _ in range(2)]
    runs[1]["metrics"]["time_to_first_token_ms"]["successful"]["median"] = 0.0  # an answer that was not streamed
    (point,) = read(guidellm(*runs)).points
    assert "median_ttft_ms" not in point.samples
    assert len(point.samples["p99_ttft_ms"]) == 2


def test_requests_cut_off_by_the_clock_are_no_failures() -> None:
    (point,) = read(guidellm(guidellm_run({"type_": "concurrent", "streams": 4}, incomplete=0.25))).points
    assert point.samples["output_throughput"] == [400.0]
    assert point.samples["request_throughput"] == [20.0]
    assert point.samples["median_e2el_ms"] == [200.0]


def test_goodput_is_not_read() -> None:
    assert "request_goodput" not in read(vllm()).points[0].samples


@pytest.mark.parametrize("tool", FILES)
def test_failed_requests_are_refused(tool: str) -> None:
    error = user_error(read, put(FILES[tool](), FAILED[tool], 1))
    assert "a.json" in error
    assert "failed" in error
    assert "does not say" in user_error(read, put(FILES[tool](), FAILED[tool]))
    assert "does not say" in user_error(read, put(FILES[tool](), FAILED[tool], None))


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (put(aiperf(), "was_cancelled", True), "was_cancelled is True"),
        (put(aiperf(), "is_complete", False), "is_complete is False"),
        (put(vllm(), "ramp_up_strategy", "linear"), "ramp_up_strategy is 'linear'"),
        (put(vllm(), "completed", 0), "nothing was measured"),
        (put(vllm(), "output_throughput"), "no output_throughput"),
        (aiperf({"type": "concurrency"}), "no load"),
        (aiperf({"type": "fixed_schedule", "concurrency": 4}), "phases.-1.type is 'fixed_schedule'"),
        (put(aiperf(), "input_config.phases", []), "phases.-1.type is None"),
        (guidellm(guidellm_run({"type_": "throughput"})), "benchmarks.0: no load"),
        (guidellm(guidellm_run({"type_": "trace", "max_concurrency": 10240})), "strategy.type_ is 'trace'"),
        (put(guidellm(), "benchmarks", []), "no run"),
        ({"backend": "sglang", "completed": 3}, "vllm bench serve, guidellm, aiperf"),
        ([], "no known tool"),
        (None, "no known tool"),
        ("text", "no known tool"),
    ],
)
def test_what_cannot_be_compared_is_refused(document: Any, says: str) -> None:
    error = user_error(read, document)
    assert error.startswith("a.json")
    assert says in error


def test_mixed_runs_are_refused() -> None:
    runs = [guidellm_run({"type_": "constant", "rate": 2.0, "max_concurrency": limit}) for limit in (4, 8)]
    assert "different limits" in user_error(read, guidellm(*runs))
    runs = [guidellm_run({"type_": "concurrent", "streams": 4}) for _ in range(2)]
    runs[1]["config"]["backend"]["model"] = "Ling-mini"
    assert "several models" in user_error(read, guidellm(*runs))
