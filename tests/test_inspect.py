"""`python -m convert inspect`: what it says of real directories, of bare configs, and of broken ones."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend.errors import UserError
from convert.demo import write_demo
from convert.demo_config import demo_config
from convert.inspect import as_json, inspect, main
from convert.inspect_page import page
from convert.shapes import count, tensor_shapes
from tests.quantised import quantised_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspect") / "tiny"
    write_demo(directory)
    return directory


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inspect") / "flash"
    write_demo(directory, size="ling-flash", yarn=4)
    return directory


def with_config(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a checkpoint, with other keys in its config."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_a_checkpoint_class_by_class(tiny):
    report = inspect(tiny)
    assert report.held["attention"].formats == ("BF16",)
    assert report.held["router"].formats == ("F32", "BF16")
    tensors = {name: (one.tensors, one.parameters) for name, one in report.held.items()}
    assert tensors == {  # by hand: hidden 128, 2048 words, 4 + 1 layers of which 4 have 16 experts of width 64
        "embedding": (1, 2048 * 128),
        "head": (1, 2048 * 128),
        "attention": (10, 5 * (256 + 128) * 128),
        "dense_mlp": (3, 3 * 256 * 128),
        "router": (8, 4 * (16 * 128 + 16)),
        "shared_experts": (12, 4 * 3 * 64 * 128),
        "routed_experts": (192, 4 * 16 * 3 * 64 * 128),
        "norms": (21, 5 * (2 * 128 + 2 * 32) + 128),
        "mtp": (4, 2 * 128 * 128 + 3 * 128),
    }
    assert sum(one.nbytes for one in report.held.values()) == report.files["tensor_bytes"]
    assert report.files["disk_bytes"] == sum(file.stat().st_size for file in tiny.iterdir())
    assert report.parameters["total"] + report.parameters["mtp"] == 2_582_656
    assert report.remarks == ()
    assert all(fit.cards == 1 for fit in report.cards["stored"])


@pytest.mark.parametrize("mtp_layers", [0, 1, 3])
def test_parameters_are_those_of_the_files(tmp_path, mtp_layers):
    write_demo(tmp_path / "demo", num_nextn_predict_layers=mtp_layers, use_qkv_bias=True, use_bias=True)
    report = inspect(tmp_path / "demo")
    assert report.remarks == ()
    assert report.model["mtp_layers"] == report.files["mtp_layers"] == mtp_layers


@pytest.mark.parametrize(("format", "share"), [("fp8", 0.5), ("w8a8", 0.5), ("w4a16", 0.25)])
def test_a_quantised_checkpoint(tmp_path, tiny, format, share):
    plain, report = inspect(tiny), inspect(quantised_checkpoint(tiny, tmp_path / format, format))
    routed, before = report.held["routed_experts"], plain.held["routed_experts"]
    assert routed.formats == (format,)
    assert (routed.tensors, routed.parameters) == (before.tensors, before.parameters)
    assert share < routed.nbytes / before.nbytes < share + 0.1  # the scales, of matrices this small
    assert report.held["attention"].formats == (("BF16",) if format == "w4a16" else (format,))
    assert report.held["head"] == plain.held["head"]
    words = {"fp8": "fp8 e4m3, blocks of [128, 128]", "w8a8": "int8 per channel, activations too", "w4a16": "int4 per"}
    assert words[format] in page(report)
    told = "no: it has no FP8; convert to w8a8 first" in page(report)
    assert told == (format == "fp8")


def test_the_real_model_from_its_config(flash):
    report = inspect(flash / "config.json")
    assert report.parameters == {"total": 102_889_705_216, "active": pytest.approx(6.15e9, rel=1e-3), "mtp": 0}
    assert report.model["yarn"]["factor"] == 4
    assert {name: round(nbytes / 1e9, 1) for name, nbytes in report.would_weigh.items()} == {
        "bf16": 205.8,
        "fp8": 104.2,
        "w8a8": 104.3,
        "w4a16": 57.6,
    }
    text = page(report)
    for part in (
        "102.89 B total, 6.15 B active",
        "131,072 tokens (yarn, factor 4 on 32768)",
        "910B1/2/2C/3/4-1 ",
        "As w4a16",
    ):
        assert part in text
    # The directory holds nothing but the config and the tokenizer: the same answer.
    assert page(inspect(flash)).splitlines()[1:] == text.splitlines()[1:]


@pytest.mark.parametrize("mtp_layers", [0, 1, 2])
def test_planned_bytes_are_those_of_the_tensors(tmp_path, mtp_layers):
    config = demo_config("ling-mini", 0, "bf16", None, {"num_nextn_predict_layers": mtp_layers})[0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    parameters, nbytes = count(tensor_shapes(config))
    report = inspect(tmp_path)
    assert report.would_weigh["bf16"] == nbytes
    assert report.parameters["total"] + report.parameters["mtp"] == parameters


def test_it_fits_a_screen(tiny, flash, tmp_path):
    for report in (inspect(tiny), inspect(flash), inspect(quantised_checkpoint(tiny, tmp_path / "q", "w8a8"))):
        lines = page(report).splitlines()
        assert len(lines) <= 50
        assert max(map(len, lines)) <= 100


def test_what_could_run_is_named_and_not_run(tmp_path, tiny):
    directory = with_config(tiny, tmp_path / "it", auto_map={"AutoConfig": "trap.Config"})
    (directory / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    (directory / "old.bin").write_bytes(b"\x80\x04.")
    text = page(inspect(directory))
    for line in ("auto_map for: AutoConfig", "code: trap.py", "pickles: old.bin"):
        assert line in text
    assert not (tmp_path / "sprung").exists()
    assert "never run" not in page(inspect(tiny))


def test_what_is_missing_is_said(tmp_path, tiny):
    assert "tokenizer yes, chat template yes, generation config yes, manifest NO" in " ".join(
        page(inspect(tiny)).split()
    )
    directory = shutil.copytree(tiny, tmp_path / "it")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (directory / name).unlink()
    (directory / "manifest.json").write_text("{}")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    found = " ".join(page(inspect(directory)).split())
    assert "tokenizer NO, chat template NO, generation config NO, manifest yes" in found
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert inspect(directory).files["chat_template"]


def test_files_and_config_that_differ_are_noted(tmp_path, tiny):
    report = inspect(with_config(tiny, tmp_path / "it", num_nextn_predict_layers=0))
    assert report.remarks == (
        "the files hold 2,582,656 parameters, config.json stands for 2,080,176",
        "the files hold 1 MTP layers, config.json says 0",
    )
    assert "NOTE" in page(report)


def test_json_is_one_document(tiny, flash, capsys):
    assert main([str(tiny), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads(json.dumps(as_json(inspect(tiny))))
    assert document["held"]["routed_experts"]["parameters"] == 1_572_864
    assert document["cards"]["stored"][0]["card"] == "910B1"
    main([str(flash), "--json"])
    assert set(json.loads(capsys.readouterr().out)["cards"]) == {"bf16", "fp8", "w8a8", "w4a16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_size": "big"}, "hidden_size is 'big', it must be an integer"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000, no model of this architecture is so large"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000, no model"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ({"max_position_embeddings": 1e5}, "max_position_embeddings is 100000.0, it must be an integer"),
    ],
)
def test_an_impossible_config_gets_one_line(tmp_path, flash, changes, message):
    with pytest.raises(UserError) as error:
        inspect(with_config(flash, tmp_path / "it", **changes))
    assert message in str(error.value)


def test_a_broken_directory_gets_the_line_of_whoever_loads_it(tmp_path, tiny):
    directory = shutil.copytree(tiny, tmp_path / "it")
    with (directory / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    with pytest.raises(UserError, match=r"model\.safetensors: cut off within tensor"):
        inspect(directory)
    for path, message in ((tmp_path / "none", "no such model directory"), (tmp_path, "it has no config.json")):
        with pytest.raises(UserError, match=message):
            inspect(path)
    with pytest.raises(UserError, match=r"give a checkpoint directory or its config\.json"):
        inspect(directory / "tokenizer.json")
    with pytest.raises(UserError, match=r"unknown argument '--jsn' \(did you mean '--json'\?\)"):
        main([str(directory), "--jsn"])


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=2), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip
KEYS = st.sampled_from([*sorted(demo_config("ling-flash", 0, "bf16", 4.0, {})[0]), "quantization_config", "auto_map"])


@settings(max_examples=150, deadline=None)
@given(changes=st.dictionaries(KEYS, VALUES, max_size=4))
def test_whatever_a_config_says_there_is_a_page_or_one_line(tmp_path_factory, changes):
    directory = tmp_path_factory.mktemp("fuzz")
    config = demo_config("ling-flash", 0, "bf16", 4.0, {})[0] | changes
    (directory / "config.json").write_text(json.dumps(config))
    start = time.monotonic()
    message = ""
    try:
        report = inspect(directory)
    except UserError as error:
        message = str(error)
    else:
        assert max(map(len, page(report).encode().decode().splitlines())) <= 100
        json.dumps(as_json(report))
    assert "\n" not in message
    assert time.monotonic() - start < 1
    shutil.rmtree(directory)


GROUPS = st.dictionaries(
    st.sampled_from(["quant_method", "fmt", "format", "ignore", "weight_block_size", "config_groups"]),
    st.one_of(VALUES, st.just({"g": {"weights": {"num_bits": [8], "strategy": None}, "input_activations": {}}})),
)


@settings(max_examples=60, deadline=None)
@given(quantization=GROUPS)
def test_whatever_the_quantisation_says_it_is_put_into_words(tmp_path_factory, quantization):
    directory = tmp_path_factory.mktemp("fuzz")
    config = demo_config("ling-flash", 0, "bf16", None, {})[0] | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    assert "quantisation  " in page(inspect(directory))
    shutil.rmtree(directory)
