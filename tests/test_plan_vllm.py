"""`serve.planning`'s arithmetic against the real vLLM: bytes of weights, blocks of the KV cache, settings it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from convert.demo import write_demo
from serve.planning import Wanted, make_plan, open_model, parse_cards
from serve.planning.memory import Division, kv_bytes_per_block, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]
# What stays a parameter once the CPU engine has packed its linear layers.
KEPT = ("embedding", "head", "norms", "routed_experts")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_demo(directory, size="tiny", seed=1)
    return directory


def run_module(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def real(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real engine counts: one worker in bf16, two in fp32, 1 GiB of cache each."""
    out = tmp_path_factory.mktemp("sizes") / "out.json"
    run_module("tests.vllm_sizes", str(out), str(demo), "bfloat16", "float32:2")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_engine_holds_as_many_blocks_and_bytes_of_weights(real: dict[str, Any], demo: Path) -> None:
    model = open_model(str(demo))
    assert [one["tensor"] for one in real["engines"]] == [1, 2]
    for one in real["engines"]:
        wide = 4 if one["dtype"] == "float32" else 2
        division = Division(one["tensor"])
        assert one["blocks"] == 2**30 // kv_bytes_per_block(model.shape, division, one["block"], wide)
        nbytes = model.nbytes("bf16", wide)
        if one["loaded"] is not None:
            assert one["loaded"] == weights(nbytes, model.shape, division)
        bias = model.stored["router"].bias * 4  # stays, too, and whole on each card
        kept = weights({name: nbytes[name] for name in KEPT}, model.shape, division) + bias
        assert one["kept"] == [kept] * one["tensor"]


def test_pages_of_the_real_model_are_those_of_vllms_own_code(real: dict[str, Any]) -> None:
    shape = open_model("ling-flash").shape
    assert len({(row["tensor"], row["block"], row["bytes"]) for row in real["pages"]}) == 15
    for row in real["pages"]:
        per_block = kv_bytes_per_block(shape, Division(row["tensor"]), row["block"], row["bytes"])
        assert per_block == row["page"] * shape.num_hidden_layers
        assert row["blocks"] == row["memory"] // per_block


RESOLVE = """
import json, sys
from serve.vllm_plugin import register
from vllm.engine.arg_utils import EngineArgs
register()
model, overrides, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
config = EngineArgs(model, hf_overrides=overrides, max_model_len=length, skip_tokenizer_init=True).create_model_config()
json.dump([config.hf_config.rope_parameters, config.max_model_len], open(sys.argv[4], "w"))
"""


@pytest.mark.parametrize("yarn", [None, 4.0])
def test_vllm_reads_the_rope_settings_that_are_overridden(yarn: float | None, tmp_path: Path) -> None:
    """YaRN is switched on or told again: vLLM's configuration has every value, and reaches the context."""
    write_demo(tmp_path / "model", size="tiny", seed=1, yarn=yarn)
    model = open_model(str(tmp_path / "model"))
    assert model.longest == 16384
    plan = make_plan(model, parse_cards("1x910B3"), Wanted(max_model_len=16384))
    overrides = plan.settings["hf-overrides"]
    out = tmp_path / "out.json"
    code = tmp_path / "resolve.py"
    code.write_text(RESOLVE)
    done = subprocess.run(
        [sys.executable, str(code), str(tmp_path / "model"), json.dumps(overrides), "16384", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rope, length = json.loads(out.read_text())
    assert rope.items() >= overrides["rope_parameters"].items()
    assert rope["rope_theta"] == 600000.0
    assert rope["truncate"] is True
    assert length == 16384
