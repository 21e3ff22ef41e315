"""`serve plan`: the command, its page and its file, the profiles that ship, models, memory, found cards, the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend.devices.base import Memory
from ascend.devices.cpu import CpuDevice
from ascend.devices.facts import GiB
from ascend.errors import UserError
from ascend.model_shape import ModelShape
from convert.cards import fits
from convert.demo import write_demo
from convert.demo_config import demo_config
from serve.plan import main
from serve.planning import Cards, Plan, Wanted, cards, found_cards, make_plan, open_model, parse_cards
from serve.planning.memory import Division, Load, card_memory, weights
from serve.planning.model import PlannedModel, model_of
from serve.planning.page import DERIVED, config_file, page
from tests.machines import machine
from tests.quantised import quantised_checkpoint

ROOT = Path(__file__).parents[1]
PROFILES_DIRECTORY = ROOT / "serve" / "profiles"
FLASH = open_model("antangelmed")

PROFILES: dict[str, tuple[str, dict[str, Any]]] = {
    "910b-8x64g-bf16": ("8x910B3-64G", {}),
    "910b-8x64g-w8a8": ("8x910B3-64G", {"precision": "w8a8"}),
    "910b-2x64g-w4a16": ("2x910B3-64G", {"precision": "w4a16"}),
    "910b-2node-16x64g-bf16": ("16x910B3-64G", {"nodes": 2}),
    "910b-2node-16x64g-w8a8": ("16x910B3-64G", {"nodes": 2, "precision": "w8a8"}),
    "h20-4x-bf16": ("4xH20-96G", {}),
    "h20-2x-fp8": ("2xH20-96G", {"precision": "fp8"}),
    "h200-1x-fp8": ("1xH200-141G", {"precision": "fp8"}),
    "cpu": ("cpu-512G", {}),
}


def planned(name: str) -> Plan:
    """The plan that a profile was printed from."""
    named, wanted = PROFILES[name]
    return make_plan(FLASH, parse_cards(named, wanted.get("nodes", 1)), Wanted(**wanted))


def test_every_profile_is_there() -> None:
    assert {file.stem for file in PROFILES_DIRECTORY.glob("*.yaml")} == set(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_what_the_planner_prints(name: str) -> None:
    text = (PROFILES_DIRECTORY / f"{name}.yaml").read_text()
    assert text == config_file(planned(name)), "python -m serve plan … --yaml prints another one now"
    assert "not yet run on" in text
    assert yaml.safe_load(text)["device"] == planned(name).device


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_plans_itself_again(name: str) -> None:
    """What the file fixes is what there is: all of it given as wishes makes the same plan."""
    first, content = planned(name), yaml.safe_load((PROFILES_DIRECTORY / f"{name}.yaml").read_text())
    names = {field.name for field in fields(Wanted)}
    given = {key.replace("-", "_"): value for key, value in content.items()}
    wanted = Wanted(**{key: value for key, value in given.items() if key in names}, precision=first.precision)
    if first.device == "cpu":
        assert content == {"device": "cpu"}
        return
    again = make_plan(FLASH, parse_cards(content["cards"], wanted.nodes), wanted)
    assert again.settings == first.settings
    assert again.environment == first.environment == content["environment"]
    engine = content.get("engine-flags", {})
    assert engine == {key: value for key, value in first.settings.items() if key in engine}


def test_a_file_holds_every_setting() -> None:
    wanted = Wanted(max_num_seqs=256, speculative="ngram", kv_cache_dtype="fp8", tensor_parallel_size=4)
    plan = make_plan(FLASH, parse_cards("8xH20"), wanted)
    content = yaml.safe_load(config_file(plan, given=DERIVED))
    in_file = {**content, **content.pop("engine-flags")}
    in_file["enable-expert-parallel"] = in_file.pop("expert-parallel")
    assert in_file.items() >= plan.settings.items()
    assert (in_file["speculative"], in_file["speculative-tokens"]) == ("ngram", 3)
    assert in_file["speculative-config"] == {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    assert in_file["kv-cache-dtype"] == "fp8"


# --- the command ---


def test_the_command_answers_within_a_second_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, time; start = time.monotonic();"
        "from serve.plan import main; main(sys.argv[1:]);"
        "print(time.process_time(), sorted({'torch', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "--cards", "8x910B3-64G"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    seconds, modules = done.stdout.splitlines()[-1].split(" ", 1)
    assert modules == "[]"
    assert float(seconds) < 1.5  # of this process: the machine may be busy with others


def test_the_page_says_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cards", "8x910B3-64G", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    document, text = json.loads(last), "\n".join(lines)
    plan = make_plan(FLASH, parse_cards("8x910B3-64G"), Wanted())
    assert document == json.loads(json.dumps(plan.as_json()))
    for name in (*plan.settings, *plan.environment):
        assert f"\n{name} = " in text
    for words in ("weights          24.10", "total            64.00", "1,134 tokens/s each", "has not been run on"):
        assert words in text
    assert max(len(line) for line in lines if " = {" not in line) <= 120


def test_the_command_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cards", "2xH20", "--precision", "fp8", "--yaml"]) == 0
    assert capsys.readouterr().out == (PROFILES_DIRECTORY / "h20-2x-fp8.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "8x910B3"], "did you mean '--cards'"),
        (["--model", "/nowhere", "--cards", "8x910B3"], "no such directory"),
        (["--model", "ling-flsh", "--cards", "8x910B3"], "did you mean 'ling-flash'"),
        (["--cards", "8x910B3", "--max-num-seqs", "0"], "not a number above zero"),
        (["--cards", "8x910B3", "--gpu-memory-utilization", "nan"], "not a number above zero"),
        (["--cards", "7x910B3", "--nodes", "2"], "do not divide into 2 servers"),
        (["--cards", "8x910B3", "--engine", "sglang"], "for CUDA alone"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the model ---


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "small"
    changes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_hidden_layers": 2, "num_experts": 8}
    write_demo(directory, size="tiny", seed=1, n_group=2, **changes)
    return directory


@pytest.mark.parametrize("precision", ["bf16", "fp8", "w8a8", "w4a16"])
def test_the_formula_weighs_what_files_do(precision: str, source: Path, tmp_path: Path) -> None:
    """Within 1 %, and with the names that files give it; a model without files is planned by the formula."""
    path = source if precision == "bf16" else quantised_checkpoint(source, tmp_path / "out", precision)
    model = open_model(str(path))
    assert model.precision == precision
    by_files, by_formula = model.nbytes(precision), replace(model, stored={}).nbytes(precision)
    assert set(by_files) <= set(by_formula)
    for name, nbytes in by_files.items():
        assert nbytes == pytest.approx(by_formula[name], rel=0.01), name
    file_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    mtp = file_bytes - sum(by_files.values())
    assert 0 < mtp < 0.5 * file_bytes  # the one MTP layer, which engines do not load


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    config = demo_config("ling-flash", 0, "bf16", 4.0, {})[0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for text in (str(tmp_path), str(tmp_path / "config.json")):
        model = open_model(text)
        assert (model.context, model.longest, model.is_yarn) == (131072, 131072, True)
        assert sum(model.nbytes("bf16").values()) == pytest.approx(205.8e9, rel=0.01)
    quantised = model_of({**config, "quantization_config": {"quant_method": "fp8"}}, "x")
    assert quantised.precision == "fp8"


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**12), st.floats(), st.text(max_size=3), st.just([]), st.just({})
)
ROPE = st.dictionaries(
    st.sampled_from(["type", "rope_type", "factor", "original_max_position_embeddings", "rope_theta", "truncate"]),
    st.one_of(st.just("yarn"), VALUES),
)
KEYS = st.sampled_from(
    sorted({*FLASH.config, "quantization_config", "rope_parameters", "rotary_dim"} - {"rope_scaling"})
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=2), st.one_of(st.none(), ROPE), st.sampled_from(["8x910B3", "2xH200"]))
def test_any_config_gives_a_plan_or_one_line(changes: dict[str, Any], rope: Any, named: str) -> None:
    refusal = ""
    try:
        model = model_of({**FLASH.config, "rope_scaling": rope, **changes}, "any")
        config_file(make_plan(model, parse_cards(named), Wanted()))
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_what_is_not_stored_so_must_be_converted_first() -> None:
    plan = make_plan(FLASH, parse_cards("8x910B3"), Wanted(precision="w8a8"))
    assert any("python -m convert w8a8" in warning for warning in plan.warnings)


# --- memory ---


def test_rows_add_up_and_are_those_of_the_arithmetic() -> None:
    plan = make_plan(FLASH, parse_cards("8x910B3"), Wanted())
    memory = plan.memory
    assert memory is not None
    assert sum(memory.rows().values()) == pytest.approx(64 * GiB)
    taken = memory.weights + memory.kv + memory.activations + memory.collectives
    assert taken <= 61 * GiB * 0.92 < taken + 4 * 2**20  # all but a part of a block
    assert memory.graphs + GiB <= 61 * GiB * 0.08 + 2**20


def test_the_table_of_convert_and_the_plan_weigh_alike() -> None:
    shape = FLASH.shape
    for precision in ("bf16", "w8a8", "w4a16"):
        nbytes = FLASH.nbytes(precision)
        for fit in fits(shape, nbytes, {precision}, 131072):
            assert fit.cards is not None
            assert fit.weights == pytest.approx(weights(nbytes, shape, Division(fit.cards, expert=True)))


def test_a_pipeline_holds_its_layers_and_one_end() -> None:
    shape = ModelShape.from_config({**demo_config("ling-flash", 0, "bf16", None, {})[0], "num_hidden_layers": 8})
    model = PlannedModel("x", {}, shape)
    whole, half = (weights(model.nbytes("bf16"), shape, Division(pipeline=stages)) for stages in (1, 2))
    ends = 157184 * 4096 * 2
    assert half == pytest.approx((whole - 2 * ends) / 2 + ends)


def test_a_larger_share_of_the_memory_goes_to_keys_and_values() -> None:
    load = Load(4096, 8, 2048, 128)
    sizes = [
        card_memory(FLASH.nbytes("bf16"), FLASH.shape, parse_cards("8x910B3"), Division(8), load, utilisation=share)
        for share in (0.8, 0.9)
    ]
    assert sizes[1].kv - sizes[0].kv == pytest.approx(6.1 * GiB, rel=0.001)
    assert sizes[0].kv_tokens == sizes[0].kv_blocks * 128


def test_a_time_per_token_decides_how_many_sequences() -> None:
    slow, fast = (make_plan(FLASH, parse_cards("8x910B3"), Wanted(tpot_ms=ms)) for ms in (70, 20))
    assert slow.settings["max-num-seqs"] > fast.settings["max-num-seqs"] >= 4
    for plan, ms in ((slow, 70), (fast, 20)):
        assert plan.limits.full is not None
        assert plan.limits.full.seconds <= ms / 1000 * 0.25
    unknown = make_plan(FLASH, parse_cards("8xH20-3e"), Wanted(tpot_ms=20))
    assert unknown.limits.full is None
    assert any("could not be judged" in warning for warning in unknown.warnings)


# --- the cards of this machine ---

NPU_SMI = """
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     910B3               | OK            | 91.3        46                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3364 / 65536         |
+===========================+===============+====================================================+
| 1     910B3               | OK            | 93.6        48                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          3364 / 65536         |
"""


def found(folder: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[str], told: str, **environ: str) -> Cards:
    monkeypatch.setattr(cards, "_output", lambda command: told)
    return found_cards(host=machine(folder, [f"/dev/{name}" for name in nodes], environ=environ))


def test_found_npus_are_named_by_their_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = found(tmp_path, monkeypatch, ["davinci0", "davinci1", "davinci_manager"], NPU_SMI)
    assert (str(here), here.indices) == ("2x910B3-64G", (0, 1))


def test_of_found_cards_the_visible_ones_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [f"nvidia{index}" for index in range(4)]
    here = found(tmp_path, monkeypatch, nodes, "NVIDIA H200\n" * 4, CUDA_VISIBLE_DEVICES="1,3,9")
    assert (str(here), here.indices) == ("2xH200-141G", (1, 3))
    assert make_plan(FLASH, here, Wanted()).environment["CUDA_VISIBLE_DEVICES"] == "1,3"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("", "that nvidia-smi does not name: say which"),
        ("NVIDIA H200\nNVIDIA H20\n", "of several kinds (H20-96G, H200-141G)"),
        ("NVIDIA T4\n", "NVIDIA T4, are not in the table"),
        ("NVIDIA H100 PCIe\n", "NVIDIA H100 PCIe, are not in the table"),
    ],
)
def test_cards_that_nothing_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        found(tmp_path, monkeypatch, ["nvidia0", "nvidia1"], told)
    assert message in str(caught.value)


def test_names_in_any_case_are_one_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = found(tmp_path, monkeypatch, ["nvidia0", "nvidia1"], "NVIDIA H200\nnvidia h200\n")
    assert str(here) == "2xH200-141G"


def test_atlas_a3_and_virtual_npus_are_said_to_be_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a3 = (ROOT / "tests" / "recorded" / "npu-smi-26.0.rc2-a3-beginning.txt").read_text()
    with pytest.raises(UserError, match=r"Atlas A3 \(910C\) is not supported"):
        found(tmp_path / "a3", monkeypatch, ["davinci0", "davinci1"], a3)
    with pytest.raises(UserError, match="/dev/vdavinci100 is a virtual NPU, a part of a card"):
        found(tmp_path / "virtual", monkeypatch, ["davinci_manager", "vdavinci100"], "")


def test_a_64_gb_910b4_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = (ROOT / "tests" / "recorded" / "npu-smi-25.2.2-910b4-1-serving.txt").read_text()
    assert str(found(tmp_path, monkeypatch, ["davinci0", "davinci1"], told)) == "2x910B4-1-64G"


def test_without_cards_there_is_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(tmp_path, monkeypatch, [], "").device == "cpu"


# --- the CPU ---


@pytest.fixture
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "memory", lambda self: Memory(2**36, 2**36, 0))  # 64 GiB
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3})


@pytest.mark.usefixtures("large_machine")
def test_the_kv_cache_of_a_cpu_is_as_large_as_it_needs_and_memory_allows() -> None:
    one = {**FLASH.config, "num_hidden_layers": 1, "num_experts": 8, "n_group": 1, "topk_group": 1}
    small = model_of({**one, "vocab_size": 256, "rope_scaling": None, "max_position_embeddings": 32768}, "small")
    layers = model_of({**small.config, "num_hidden_layers": 32}, "layers")
    for model, wanted, gib in (
        (layers, Wanted(max_model_len=4096), 4),  # 64 KiB a token, 16 sequences
        (layers, Wanted(max_model_len=4096, dtype="float32"), 8),
        (layers, Wanted(), 13),  # a quarter of the 54 GiB that the weights leave, not 32
        (small, Wanted(max_model_len=64), 1),
        (layers, Wanted(max_model_len=4096, tensor_parallel_size=2), 2),
    ):
        plan = make_plan(model, parse_cards("cpu"), wanted)
        assert plan.environment["VLLM_CPU_KVCACHE_SPACE"] == str(gib), wanted


@pytest.mark.usefixtures("large_machine")
def test_few_cores_are_all_bound_and_small_models_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = open_model("tiny")
    plan = make_plan(tiny, parse_cards("cpu"), Wanted())
    assert plan.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,2,3"
    assert plan.settings == {"enforce-eager": True}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(9)))
    large = make_plan(open_model("small"), parse_cards("cpu"), Wanted())
    assert "VLLM_CPU_OMP_THREADS_BIND" not in large.environment
    assert "enforce-eager" not in large.settings


@pytest.mark.usefixtures("large_machine")
def test_widened_weights_are_said_and_counted(source: Path, tmp_path: Path) -> None:
    model = open_model(str(quantised_checkpoint(source, tmp_path / "out", "w8a8")))
    plan = make_plan(model, parse_cards("cpu"), Wanted())
    assert any("stored as w8a8 are widened to 16 bits" in line and "activations" in line for line in plan.warnings)
    assert not make_plan(model, parse_cards("cpu"), Wanted(quantization="fp8")).warnings
    assert not make_plan(open_model(str(source)), parse_cards("cpu"), Wanted()).warnings


@pytest.mark.usefixtures("large_machine")
def test_what_a_cpu_cannot(source: Path) -> None:
    for model, wanted, message in (
        (FLASH, Wanted(), "takes 191.6 GiB of memory"),
        (open_model("tiny"), Wanted(max_model_len=16385), "16384 tokens; lower it"),
        (open_model("tiny"), Wanted(precision="w8a8"), "is not for the CPU"),
        (open_model("tiny"), Wanted(tensor_parallel_size=3), "does not divide"),
        (open_model("tiny"), Wanted(nodes=2, data_parallel_size=3), "over 2 nodes"),
    ):
        with pytest.raises(UserError) as caught:
            make_plan(model, parse_cards("cpu"), wanted)
        assert message in str(caught.value)
    two = make_plan(open_model("tiny"), parse_cards("cpu"), Wanted(nodes=2))
    assert two.settings["data-parallel-size"] == 2
    assert "one machine" not in page(two)
