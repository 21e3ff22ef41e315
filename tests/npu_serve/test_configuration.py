"""vllm-ascend's own checks: they take what the launcher would start, and refuse what its rules say they refuse.

Its real platform plugin makes a configuration of every command line, without a card's worth of weights: what a plan
decided must come out of it unchanged.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ascend.checkpoint import Checkpoint, open_checkpoint
from convert.eagle3_init import write_head
from serve.args import parse
from serve.config_file import as_flags
from serve.engine_flags import read_flags
from serve.engine_flags.rules import RULES, Rule
from serve.nodes import node as nodes
from serve.nodes.interfaces import Interface
from serve.planning.model import model_in
from serve.resolve import Resolved, resolve
from tests.flag_cases import CASES
from tests.npu_serve.headers import write_plain, write_quantised
from tests.tiny import user_error

DRY = ["--device", "npu", "--dry-run", "--port", "8123"]
WORKER = "vllm_ascend.worker.worker.NPUWorker"
Answer = dict[str, Any]
Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Ask the engine for the configuration of a command line."""
    home = tmp_path_factory.mktemp("engine")
    with (home / "log").open("w") as log:
        command = [sys.executable, "-m", "tests.npu_serve.engine_config"]
        engine = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=home
        )
    assert engine.stdin is not None
    assert engine.stdout is not None
    assert engine.stdout.readline() == "ready\n", (home / "log").read_text()[-3000:]

    def asked(flags: list[str], environment: dict[str, str] | None = None) -> Answer:
        engine.stdin.write(json.dumps({"flags": flags, "environment": environment or {}}) + "\n")
        engine.stdin.flush()
        return json.loads(engine.stdout.readline())

    yield asked
    engine.stdin.close()
    assert engine.wait(60) == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    plain = write_plain(home / "bf16")
    write_head(home / "head", plain, draft_vocab_size=1000)
    return {
        "bf16": plain,
        "w8a8": write_quantised(home / "w8a8", plain, "w8a8"),
        "modelslim": write_quantised(home / "modelslim", plain, "w8a8", "modelslim"),
        "w4a16": write_quantised(home / "w4a16", plain, "w4a16"),
        "32k": write_plain(home / "32k", yarn=None),
        "mtp": write_plain(home / "mtp", num_nextn_predict_layers=1),
        "head": home / "head",
    }


# What the launcher starts

QUANTIZATION = {"w8a8": "compressed-tensors", "modelslim": "ascend", "w4a16": "compressed-tensors"}
PLANS = {
    "a server in bf16": ("bf16", "--cards 8x910B3-64G"),
    "smaller cards": ("w8a8", "--cards 8x910B4-32G"),
    "smaller cards, ModelSlim": ("modelslim", "--cards 8x910B4-32G"),
    "half a server": ("w8a8", "--cards 4x910B3-64G"),
    "two cards": ("w4a16", "--cards 2x910B3-64G"),
    "experts whole": ("bf16", "--cards 8x910B3-64G --tensor-parallel-size 4 --data-parallel-size 2 --expert-parallel"),
    "stages": ("bf16", "--cards 8x910B3-64G --tensor-parallel-size 4 --pipeline-parallel-size 2"),
    "longer than config.json says": ("32k", "--cards 8x910B3-64G --max-model-len 131072"),
    "short": ("32k", "--cards 8x910B3-64G --max-model-len 8192 --max-num-seqs 512"),
    "MTP": ("mtp", "--cards 8x910B3-64G --speculative mtp"),
    "three drafts of one MTP layer": ("mtp", "--cards 8x910B3-64G --speculative mtp --speculative-tokens 3"),
    "ngram": ("bf16", "--cards 8x910B3-64G --speculative ngram:5"),
    "EAGLE3": ("bf16", "--cards 8x910B3-64G --speculative eagle3:HEAD"),
    "emulated cards": ("32k", "--emulate --cards 8x910B3-64G --max-model-len 4096"),
    "flags of the user's": (
        "w8a8",
        '--cards 8x910B3-64G --expert-parallel -- --additional-config {"enable_flashcomm1":true} '
        '--compilation-config {"cudagraph_mode":"FULL_DECODE_ONLY","cudagraph_capture_sizes":[8,16]}',
    ),
    "profile 910b-8x64g-bf16": ("bf16", "--profile 910b-8x64g-bf16"),
    "profile 910b-8x64g-w8a8": ("w8a8", "--profile 910b-8x64g-w8a8"),
    "profile 910b-2x64g-w4a16": ("w4a16", "--profile 910b-2x64g-w4a16"),
    "first of two servers": ("bf16", "--profile 910b-2node-16x64g-bf16 --node-address 10.0.0.1"),
    "second of two servers": ("bf16", "--profile 910b-2node-16x64g-bf16 --node-address 10.0.0.9 --node-rank 1"),
    "two servers in W8A8": ("w8a8", "--profile 910b-2node-16x64g-w8a8 --node-address 10.0.0.1"),
}
DRAFTS = {
    "mtp": "BailingMoeV2MTPModel",
    "eagle3": "LlamaForCausalLMEagle3",
    "ngram": "BailingMoeV2ForCausalLM",  # itself: there is no other model
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a network to the other servers."""
    monkeypatch.setattr(nodes, "interfaces", lambda: {"roce0": Interface("roce0", True, ("10.0.0.1",))})
    monkeypatch.setattr(nodes, "source_address", {"10.0.0.9": "10.0.0.1"}.get)
    monkeypatch.setattr(nodes, "_check_free", lambda address, port: None)


cached_model = cache(model_in)


@cache  # of 25,000 tensors each
def opened(model: Path) -> Checkpoint:
    return open_checkpoint(model)


def resolved(model: Path, words: str) -> Resolved:
    settings = parse([*DRY, "--model", str(model), *words.split()])
    return resolve(settings, opened(model))


@cache
def plain(model: Path) -> list[str]:
    """The flags of a model's own plan."""
    return started(resolved(model, "--cards 8x910B3-64G"))


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is read once, not for each of its plans."""
    monkeypatch.setattr("serve.resolve.model_in", cached_model)


def started(one: Resolved) -> list[str]:
    """The flags of the engine that would run."""
    return one.command.command[one.command.command.index("--model") :]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_taken_and_comes_out_as_it_went_in(name: str, ask: Ask, models: dict[str, Path]) -> None:
    model, words = PLANS[name]
    plan = resolved(models[model], words.replace("HEAD", str(models["head"])))
    answer = ask(started(plan), plan.command.environment)
    assert "error" not in answer, answer
    made = answer["config"]
    assert made["worker"] == WORKER
    assert made["quantization"] == QUANTIZATION.get(model)
    wanted = read_flags("vllm", "0.23.0", "npu", started(plan)[2:])
    decided = wanted.keys() & made.keys()
    assert len(decided) >= 8
    assert {key: made[key] for key in decided} == {key: wanted[key] for key in decided}
    graphs = wanted["compilation-config"]
    assert (made["graph-mode"], made["graph-sizes"]) == (graphs["cudagraph_mode"], graphs["cudagraph_capture_sizes"])
    rope = wanted.get("hf-overrides", {}).get("rope_parameters", {"rope_theta": 6e5, "partial_rotary_factor": 0.5})
    assert made["rope"].items() >= rope.items()
    drafts = wanted.get("speculative-config")
    assert made["drafts"] == (drafts and [drafts["method"], drafts["num_speculative_tokens"], DRAFTS[drafts["method"]]])


def test_compiled_code_of_one_draft_head_is_not_taken_for_another(
    ask: Ask, models: dict[str, Path], tmp_path: Path
) -> None:
    """Other layers to tap and another shape are another key; other weights alone are not."""

    def key(head: Path) -> str:
        answer = ask(started(resolved(models["bf16"], f"--cards 8x910B3-64G --speculative eagle3:{head}")))
        assert "error" not in answer, answer
        return answer["config"]["compiled-under"]

    again, taps, shape = (tmp_path / name for name in ("again", "taps", "shape"))
    for copy in (again, taps):
        shutil.copytree(models["head"], copy, copy_function=os.link)
    config = json.loads((taps / "config.json").read_text())
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [1, 9, 20]
    (taps / "config.json").unlink()  # it is the other's, too
    (taps / "config.json").write_text(json.dumps(config))
    write_head(shape, models["bf16"], draft_vocab_size=900)
    first = key(models["head"])
    assert key(again) == first
    assert len({first, key(taps), key(shape)}) == 3


# What the rules say of it: each one is tried with what breaks it and with what just does not (`tests.flag_cases`)

ENGINE_RULES = [rule for rule in RULES if "npu" in rule.devices]
NOT_FLAGS = ("cards", "nodes", "device", "environment", "heads")


def asked(ask: Ask, model: Path, case: dict[str, Any]) -> Answer:
    flags = {key: value for key, value in case.items() if key not in NOT_FLAGS}
    if "heads" in case:
        flags["hf-overrides"] = {"num_attention_heads": case["heads"]}
    return ask(["--model", str(model), *as_flags(flags)], case.get("environment"))


def places(rule: Rule) -> list[str]:
    """Patterns of the engine's files and lines that a rule names: "vLLM config/x.py name", "ascend_config.py:1, 2"."""
    source = rule.source.partition(";")[0]
    package = "vllm/" if source.startswith("vLLM ") else "vllm_ascend/"
    file, _, lines = source.removeprefix("vLLM ").partition(".py")
    numbers = re.findall(r"\d+", lines) if lines.startswith(":") else [r"\d+"]
    return [f"{package}{re.escape(file)}\\.py:{number}" for number in numbers]


@pytest.mark.parametrize("rule", ENGINE_RULES, ids=lambda rule: rule.name)
def test_the_engine_does_what_a_rule_says_of_it(rule: Rule, ask: Ask, models: dict[str, Path]) -> None:
    broken, kept = (asked(ask, models["bf16"], case) for case in CASES[rule.name])
    assert "error" not in kept, kept
    if rule.source.startswith("nobody"):
        assert "error" not in broken, f"somebody does: {broken}"
    else:
        assert "error" in broken, "it is taken without a word"
        said = [where for where in broken["where"] if any(re.fullmatch(place, where) for place in places(rule))]
        assert said, f"said elsewhere than in {rule.source}: {broken}"


# What a user may get wrong, by the launcher's whole way: what the engine says of it, None for nothing, and what we say


class Mistake(NamedTuple):
    """ours: words for the launcher; theirs: for the engine, after a good plan's; None: those of ours after ``--``."""

    model: str
    ours: str
    theirs: str | None
    said: str | None
    told: str


def additional(text: str, said: str | None, told: str) -> Mistake:
    return Mistake("bf16", f"-- --additional-config {text}", None, said, told)


YARN = '"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":32768'
MISTAKES = {
    "a typo": additional('{"enable_flashcom1":true}', None, "ignore 'enable_flashcom1' in silence (did you mean"),
    "a documented key": additional('{"flashcomm2_parallel_size":4}', None, "'enable_flashcomm2_parallel_size'"),
    "a key of old": additional('{"enable_weight_nz_layout":true}', None, "it is 'weight_nz_mode' now"),
    "Torchair": additional('{"torchair_graph_config":{"enabled":true}}', None, "graphs are ACL graphs now"),
    "its old scheduler": additional('{"ascend_scheduler_config":{"enabled":true}}', None, "vLLM's own scheduler"),
    "experts' tensors": additional('{"expert_tensor_parallel_size":4}', None, "would ignore 'expert_tensor_par"),
    "a word for a switch": additional('{"enable_prefill_mc2":"false"}', None, "is true or false, not 'false'"),
    "a typo inside": additional(
        '{"eplb_config":{"dynamic_eplbb":true}}', "no attribute 'dynamic_eplbb'", "does not know 'eplb_"
    ),
    "half an object": additional("{bad", "should be a valid dictionary", "'{bad' is not"),
    "three cards": Mistake(
        "bf16",
        "--tensor-parallel-size 3",
        "--tensor-parallel-size 3",
        "must be divisible by tensor parallel",
        "does not divide",
    ),
    "too many cards": Mistake(
        "bf16", "--tensor-parallel-size 16", "--tensor-parallel-size 16", None, "in servers of 8 cards"
    ),
    "too long": Mistake(
        "bf16",
        "--max-model-len 262144",
        "--max-model-len 262144",
        "greater than the derived max_model_len",
        "more than the 131072 tokens",
    ),
    "an FP8 cache": Mistake("bf16", "--kv-cache-dtype fp8", "--kv-cache-dtype fp8", None, "has no such cache"),
    "float32": Mistake("bf16", "--dtype float32", "--dtype float32", None, "use bfloat16"),
    "blocks of 64": Mistake("bf16", "--block-size 64", "--block-size 64", None, "--block-size 64 on an NPU"),
    "MTP without a layer": Mistake(
        "bf16",
        "--speculative mtp",
        '--speculative-config {"method":"mtp","num_speculative_tokens":1}',
        "Unsupported speculative method: 'mtp'",
        "has no MTP layer",
    ),
    "MTP in stages": Mistake(
        "mtp",
        "--speculative mtp --pipeline-parallel-size 2 --tensor-parallel-size 4",
        '--speculative-config {"method":"mtp","num_speculative_tokens":1} --pipeline-parallel-size 2',
        "PP+MTP is only supported on PD-disaggregated P nodes",
        "--speculative mtp with --pipeline-parallel-size 2",
    ),
    "sixteen drafts": Mistake(
        "bf16",
        "--speculative ngram:16",
        '--speculative-config {"method":"ngram","num_speculative_tokens":16}',
        None,
        "16 drafts (15 at most)",
    ),
    "another format": Mistake(
        "w8a8", "-- --quantization ascend", None, "does not match the quantization method", "is compressed-tensors"
    ),
    "a format that is not": Mistake(
        "bf16", "-- --quantization ascend", None, "ModelSlim Quantization Config Not Found", "the model's is none"
    ),
    "nor this one": Mistake(
        "modelslim", "-- --quantization compressed-tensors", None, "missing 3 required positional", "is ascend"
    ),
    "FP8 weights": Mistake(
        "bf16", "-- --quantization fp8", None, "missing 2 required positional", "not a format of a 910B"
    ),
    "positions without theta": Mistake(
        "32k", f'-- --hf-overrides {{"rope_parameters":{{{YARN}}}}}', None, None, "without 'rope_theta'"
    ),
    "the type's old key": Mistake(
        "32k",
        '-- --hf-overrides {"rope_scaling":{"type":"default","rope_theta":600000.0}}',
        None,
        "'rope_type'",
        "rope settings need 'rope_type'",
    ),
    "a flag of a newer vLLM": Mistake("bf16", "-- --max-num-queued-reqs 4", None, "2", "is not known to vllm 0.23.0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_the_start(name: str, ask: Ask, models: dict[str, Path]) -> None:
    mistake = MISTAKES[name]
    told = user_error(resolved, models[mistake.model], f"--cards 8x910B3-64G {mistake.ours}")
    assert mistake.told in told
    words = mistake.ours.removeprefix("-- ") if mistake.theirs is None else mistake.theirs
    answer = ask([*plain(models[mistake.model]), *words.split()])
    assert ("error" in answer) == (mistake.said is not None), answer
    assert (mistake.said or "") in answer.get("error", "")
