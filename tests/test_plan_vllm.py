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

pytestmark = [pytest.mark.slow, pytest.mark.beside, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[1]
# What stays a parameter once the CPU engine has packed its linear layers, beside the router's bias, counted with any.
KEPT = ("embedding", "head", "norms", "routed_experts")


LENGTH = 16384  # four times what the demo's positions reach
CONFIGS: dict[str, tuple[float | None, dict[str, Any]]] = {
    "yarn is switched on": (None, {}),
    "yarn is told again": (4.0, {}),
    "the length is not scaled": (4.0, {"max_position_embeddings": 4096}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("models"), {}
    for number, (name, (yarn, changes)) in enumerate(CONFIGS.items()):
        found[name] = root / str(number)
        write_demo(found[name], size="tiny", seed=1, yarn=yarn, **changes)
    return found


@pytest.fixture(scope="module")
def overrides(models: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What the planner tells vLLM of each model's positions."""
    found = {}
    for name, path in models.items():
        plan = make_plan(open_model(str(path)), parse_cards("1x910B3"), Wanted(max_model_len=LENGTH))
        found[name] = plan.settings["hf-overrides"]
    return found


@pytest.fixture(scope="module")
def real(
    models: dict[str, Path], overrides: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What the real engine counts: one worker in bf16, two in fp32, 1 GiB of cache each."""
    folder = tmp_path_factory.mktemp("sizes")
    first = str(next(iter(models.values())))
    asked = {
        "engines": [[first, "bfloat16", 1], [first, "float32", 2]],
        "ropes": [[str(models[name]), overrides[name], LENGTH] for name in models],
    }
    (folder / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_sizes", str(folder / "asked.json"), str(folder / "out.json")],
        cwd=ROOT,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_the_engine_holds_as_many_blocks_and_bytes_of_weights(real: dict[str, Any], models: dict[str, Path]) -> None:
    model = open_model(str(next(iter(models.values()))))
    assert [one["tensor"] for one in real["engines"]] == [1, 2]
    for one in real["engines"]:
        wide = 4 if one["dtype"] == "float32" else 2
        division = Division(one["tensor"])
        assert one["blocks"] == 2**30 // kv_bytes_per_block(model.shape, division, one["block"], wide)
        nbytes = model.nbytes("bf16", wide)
        if one["loaded"] is not None:
            assert one["loaded"] == weights(nbytes, model.shape, division)
        kept = weights({name: nbytes[name] for name in KEPT}, model.shape, division)
        assert one["kept"] == [kept] * one["tensor"]


def test_pages_of_the_real_model_are_those_of_vllms_own_code(real: dict[str, Any]) -> None:
    shape = open_model("ling-flash").shape
    assert len({(row["tensor"], row["block"], row["bytes"]) for row in real["pages"]}) == 15
    for row in real["pages"]:
        per_block = kv_bytes_per_block(shape, Division(row["tensor"]), row["block"], row["bytes"])
        assert per_block == row["page"] * shape.num_hidden_layers
        assert row["blocks"] == row["memory"] // per_block


def test_vllm_reads_the_positions_that_are_told(real: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Its configuration has every rotary setting, and reaches the context."""
    assert len(real["ropes"]) == len(CONFIGS)
    for told, (rope, length) in zip(overrides.values(), real["ropes"], strict=True):
        assert rope.items() >= told["rope_parameters"].items()
        assert (rope["rope_type"], rope["rope_theta"], rope["truncate"]) == ("yarn", 600000.0, True)
        assert length == LENGTH
