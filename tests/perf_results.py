"""Result files of made-up runs, for the tests of `perf.result` and `perf compare`: plausible figures, not measured."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ascend.model_shape import ModelShape
from convert.demo_config import demo_config
from perf.machine import architecture_sha256
from perf.result import (
    DecodeRow,
    DecodeSettings,
    Machine,
    Model,
    OpsRow,
    OpsSettings,
    Result,
    Run,
    ServeRow,
    ServeSettings,
)

FLASH = demo_config("ling-flash", 0, "bf16", None, {})[0]
H20 = Machine(
    device="NVIDIA H20",
    device_type="cuda",
    emulated=False,
    cards=4,
    memory_bytes=102_000_000_000,
    software={"driver": "570.86.15", "cuda": "12.8"},
    host="a processor",
    cores=96,
    system="Linux 5.15 x86_64",
)
NPU = replace(H20, device="Ascend910B2", device_type="npu", cards=8, software={"driver": "25.2.0", "cann": "8.5.0"})
CPU = replace(H20, device="a processor", device_type="cpu", cards=1, software={}, cores=2)
MODEL = Model(
    "AntAngelMed", architecture_sha256(FLASH), "5" * 64, "bf16", 32, 32, asdict(ModelShape.from_config(FLASH))
)
VERSIONS = {"python": "3.11.9", "torch": "2.13.0"}


def run(machine: Machine = H20, model: Model = MODEL, **changes: Any) -> Run:
    made = Run("python -m perf …", "2026-11-22T12:00:00+00:00", "0123456789ab", 0, "a clock", VERSIONS, machine, model)
    return replace(made, **changes)


def around(middle: float, count: int, spread: float = 0.03, seed: int = 0) -> list[float]:
    """``count`` log-normal numbers around ``middle``."""
    draw = random.Random(f"{middle} {count} {seed}")
    return [middle * draw.lognormvariate(0, spread) for _ in range(count)]


def decode(
    steps: Mapping[tuple[str, int], Sequence[float]],
    head: Run | None = None,
    settings: DecodeSettings | None = None,
    **row: Any,
) -> Result:
    """Of `perf decode`: seconds of a step, one a round, by (engine, batch)."""
    rows = [
        DecodeRow(
            **{
                "engine": engine,
                "version": f"{engine} 1.0",
                "captured": None,
                "random_weights": False,
                "batch": batch,
                "context": 72,
                "step_seconds": list(seconds),
                "tokens_per_second": batch / (statistics.median(seconds) or 1),
                "distinct_experts": None,
                "bytes_per_step": 1e8,
                "flops_per_step": 1e9,
                "read_rate": [2e10] * len(seconds),
                "share_of_read_rate": 0.5,
                "sheet_rate": None,
                "share_of_sheet": None,
                "memory_bytes": 1_000_000,
                "watts": None,
            }
            | row
        )
        for (engine, batch), seconds in steps.items()
    ]
    rounds = len(rows[0].step_seconds)
    return Result("decode", head or run(CPU), settings or DecodeSettings(32, 64, rounds, 2), rows)


def ops() -> Result:
    row = OpsRow("linear", "ours", "bf16", {"T": 1, "H": 8}, 3, [1e-6], 1.0, 2.0, [1e9], [1e12], 0.5, 0.25)
    return Result("ops", run(), OpsSettings(1, None, True, 1 << 20), [row])


def serve(
    head: Run | None = None,
    throughput: Sequence[float] = (500.0, 1500.0),
    loads: Sequence[int] = (1, 8),
    settings: ServeSettings | None = None,
    rate: bool = False,
    repeats: int = 3,
    seed: int = 0,
    **row: Any,
) -> Result:
    """Of `perf serve`: ``throughput`` at each load of a closed loop (of arrivals with ``rate``)."""
    rows = []
    for load, tokens in zip(loads, throughput, strict=True):
        for repeat, speed in enumerate(around(tokens, repeats, seed=seed)):
            tpot = 1e3 * load / speed
            result = {"output_throughput": speed, "total_token_throughput": 3 * speed, "request_throughput": speed / 9}
            result |= {"median_tpot_ms": tpot, "p99_tpot_ms": 1.3 * tpot, "median_ttft_ms": 9 * tpot}
            result |= {
                "p99_ttft_ms": 20 * tpot,
                "p99_itl_ms": 2 * tpot,
                "p99_e2el_ms": 150 * tpot,
                "completed": 99,
                "failed": 0,
            }
            kind = {"max_concurrency": None, "request_rate": float(load)} if rate else {}
            made = {"max_concurrency": load, "request_rate": None, "repeat": repeat, "watts": None} | kind
            made |= {"prompts_sha256": f"{load}-{repeat}".ljust(64, "0"), "result": result}
            rows.append(ServeRow(**made | row))
    settings = settings or ServeSettings("vllm 0.32.0", "vllm bench 0.32.0", "short-chat", "7" * 64, 99, 256, 128, {})
    return Result("serve", head or run(), settings, rows)


def model(**changes: Any) -> Run:
    return run(model=replace(MODEL, **changes))
