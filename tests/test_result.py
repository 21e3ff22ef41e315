"""Result files: what is written is read again, everything else is refused in one line; who measured what, where."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascend.devices import get_device
from ascend.errors import UserError
from perf import machine, result
from perf.arguments import names, numbers, out_file
from perf.models import open_model
from perf.result import KINDS, Machine, Model, Result, Run
from tests import perf_results, tiny
from tests.tiny import user_error

REPOSITORY = Path(__file__).parents[1]
RESULTS = {
    "decode": perf_results.decode({("lean", 1): [0.01, 0.02], ("vllm", 8): [0.03, 0.04]}),
    "ops": perf_results.ops(),
    "serve": perf_results.serve(),
}


def changed(kind: str, path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The document of a kind with the value at ``path`` replaced; `...` takes it away."""
    document = copy.deepcopy(result.document(RESULTS[kind]))
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


def refusal(document: Any) -> str:
    return user_error(result.parse, document, "F")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    result.write(file, RESULTS[kind])
    assert result.read(file) == RESULTS[kind]
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["a.json"]


FIGURES = st.floats(allow_nan=False, allow_infinity=False)


@given(seconds=st.lists(FIGURES, min_size=1), watts=st.none() | FIGURES, memory=st.none() | st.integers(0, 2**60))
def test_numbers_are_read_as_they_were(seconds: list[float], watts: float | None, memory: int | None) -> None:
    made = perf_results.decode({("lean", 1): seconds}, tokens_per_second=1.0, watts=watts, memory_bytes=memory)
    text = json.dumps(result.document(made), allow_nan=False)
    assert result.parse(json.loads(text), "F") == made


def test_what_is_not_a_number_is_null(tmp_path: Path) -> None:
    row = replace(RESULTS["serve"].rows[0], result={"p99": math.nan, "all": [math.inf, {"x": -math.inf}, (1.5,)]})
    result.write(tmp_path / "a", replace(RESULTS["serve"], rows=[row]))
    assert result.read(tmp_path / "a").rows[0].result == {"p99": None, "all": [None, {"x": None}, [1.5]]}


def test_a_number_that_is_none_is_refused_in_a_file(tmp_path: Path) -> None:
    """Python's json reads NaN, which is no JSON and no figure."""
    (tmp_path / "a").write_text(json.dumps(changed("decode", ("rows", 0, "tokens_per_second"), math.nan)))
    with pytest.raises(ValueError, match=r"NaN|finite"):
        result.read(tmp_path / "a")
    (tmp_path / "a").write_text(json.dumps(changed("serve", ("rows", 0, "result", "output_throughput"), math.inf)))
    with pytest.raises(ValueError, match=r"Infinity|finite"):
        result.read(tmp_path / "a")


def documents(kind: str) -> Iterator[tuple[tuple[Any, ...], type]]:
    """Every object with fields in the kind's document: the path to it and its class."""
    settings_of, row = KINDS[kind]
    yield ("run",), Run
    yield ("run", "machine"), Machine
    yield ("run", "model"), Model
    yield ("settings",), settings_of
    yield ("rows", 0), row


def required(of: Any) -> set[str]:
    """Fields without a default; those with one are newer than files that are committed."""
    return {one.name for one in fields(of) if one.default is MISSING and one.default_factory is MISSING}


def test_what_is_newer_than_a_file_has_its_default() -> None:
    newer = {
        ("settings",): {"kv": None, "filled": False, "drafts": None, "acceptance": None},
        ("rows", 0): {
            "drafts": 0, "tokens_per_step": 1.0, "prefill_seconds": [], "prefill_flops": None, "matmul_rate": [],
            "share_of_matmul_rate": None, "kernels_per_layer": None,
        },
    }  # fmt: skip
    document = copy.deepcopy(result.document(RESULTS["decode"]))
    for part, known in ((document["settings"], newer["settings",]), (document["rows"][0], newer["rows", 0])):
        for name, value in known.items():
            assert part.pop(name) == value
    assert result.parse(document, "F") == RESULTS["decode"]
    for file in (REPOSITORY / "perf" / "results").glob("*.json"):
        assert result.read(file).rows, file


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_needed_and_no_other_is_known(kind: str) -> None:
    for path, of in documents(kind):
        where = ".".join(map(str, path[:1])) if path[0] != "rows" else "rows.0"
        inner = "".join(f"{step}." for step in path[1:]) if path[0] == "run" else ""
        assert is_dataclass(of)
        for name in required(of):
            assert refusal(changed(kind, (*path, name), ...)) == f"F: {where}.{inner}{name}: field required"
        first = fields(of)[0].name
        assert refusal(changed(kind, (*path, f"{first}s"), 1)) == (
            f"F: {where}.{inner}{first}s: unknown field (did you mean '{first}'?)"
        )


MISTYPED = {
    ("run", "seed"): "0",
    ("run", "commit"): 7,
    ("run", "versions"): {"torch": 2.13},
    ("run", "machine", "cards"): 1.5,
    ("run", "machine", "emulated"): 0,
    ("run", "machine", "memory_bytes"): True,
    ("run", "machine", "software"): ["driver"],
    ("run", "model", "shape"): {"hidden_size": "8"},
    ("settings", "rounds"): None,
    ("rows", 0, "captured"): "yes",
    ("rows", 1, "random_weights"): None,
    ("rows", 0, "step_seconds"): 0.1,
    ("rows", 1, "step_seconds"): ["0.1"],
    ("rows", 1, "batch"): "8",
    ("run",): [],
    ("settings",): None,
    ("rows", 0): 3,
}


@pytest.mark.parametrize("path", MISTYPED, ids=str)
def test_nothing_is_turned_into_another_type(path: tuple[Any, ...]) -> None:
    line = refusal(changed("decode", path, MISTYPED[path]))
    where = ".".join(map(str, path[:2] if path[0] == "rows" else path[:1]))
    rest = ".".join(map(str, path[2 if path[0] == "rows" else 1 :]))
    assert line.startswith(f"F: {where}.{rest}" if rest else f"F: {where}: ")
    assert "should be a" in line


@pytest.mark.parametrize(
    ("document", "line"),
    [
        ([], "F: not a result of `perf`: schema, kind, run, settings or rows is missing"),
        (3, "F: not a result of `perf`: schema, kind, run, settings or rows is missing"),
        (changed("ops", ("rows",), ...), "F: not a result of `perf`: schema, kind, run, settings or rows is missing"),
        (changed("ops", ("schema",), 2), "F: schema 2, this version reads 1; measure again"),
        (changed("ops", ("schema",), "1"), "F: schema '1', this version reads 1; measure again"),
        (changed("ops", ("kind",), "op"), "F: unknown kind 'op' (did you mean 'ops'?)"),
        (changed("ops", ("kind",), []), "F: unknown kind []"),
        (changed("ops", ("kind",), None), "F: unknown kind None"),
        (changed("ops", ("rows",), []), "F: it holds no rows: nothing was measured"),
        (changed("ops", ("rows",), {}), "F: it holds no rows: nothing was measured"),
        (changed("ops", ("setings",), 1), "F: unknown field 'setings' (did you mean 'settings'?)"),
    ],
    ids=lambda value: value[3:40] if isinstance(value, str) else "",
)
def test_other_documents_are_refused(document: Any, line: str) -> None:
    assert refusal(document) == line


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert user_error(result.read, file) == f"{file}: cannot be read (No such file or directory)"
    assert user_error(result.read, tmp_path) == f"{tmp_path}: cannot be read (Is a directory)"
    for text in (b"{", b"\xff\xfe\x00"):
        file.write_bytes(text)
        assert user_error(result.read, file).startswith(f"{file}: not JSON (")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    file.write_text("what was there")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert user_error(result.write, file, RESULTS["ops"]) == f"{file}: cannot be written (No space left)"
    unfit = replace(RESULTS["serve"], rows=[replace(RESULTS["serve"].rows[0], result={"x": object()})])
    with pytest.raises(TypeError):
        result.write(file, unfit)
    assert file.read_text() == "what was there"
    assert os.listdir(tmp_path) == ["a.json"]
    gone = tmp_path / "gone" / "a.json"
    assert user_error(result.write, gone, RESULTS["ops"]) == f"{gone}: cannot be written (No such file or directory)"
    (tmp_path / "folder").mkdir()
    assert "cannot be written" in user_error(result.write, tmp_path / "folder", RESULTS["ops"])
    assert sorted(os.listdir(tmp_path)) == ["a.json", "folder"]


def perf(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "perf", *arguments], cwd=REPOSITORY, capture_output=True, text=True)


def test_the_schema_names_every_field_and_admits_no_other() -> None:
    done = perf("schema")
    assert (done.returncode, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    assert schema == result.json_schema()
    assert list(schema) == list(KINDS)
    for kind, parts in schema.items():
        run = parts["run"]
        described = [run, run["$defs"]["Machine"], run["$defs"]["Model"], parts["settings"], parts["rows"]]
        for one, of in zip(described, (Run, Machine, Model, *KINDS[kind]), strict=True):
            assert set(one["properties"]) == {field.name for field in fields(of)}
            assert set(one["required"]) == required(of)
            assert one["additionalProperties"] is False
    wrong = perf("schema", "--kind")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown argument '--kind'; see `python -m perf schema --help`\n"


# Who measured what, and where.


def test_the_architecture_is_the_same_however_the_model_is_kept() -> None:
    config = perf_results.FLASH
    kept = {
        "torch_dtype": "float16",
        "dtype": "float32",
        "quantization_config": {"quant_method": "fp8"},
        "auto_map": {"AutoModel": "modeling.X"},
        "transformers_version": "9",
        "_name_or_path": "/a",
        "use_cache": False,
        "random_weights_demo": {},
    }
    same = machine.architecture_sha256(config)
    assert len(same) == 64
    assert machine.architecture_sha256(dict(reversed(list((config | kept).items())))) == same
    for key, value in kept.items():
        assert machine.architecture_sha256(config | {key: value}) == same, key
    for key, value in {"hidden_size": 8, "rope_scaling": {"factor": 4.0}, "routed_scaling_factor": 2.4}.items():
        assert machine.architecture_sha256(config | {key: value}) != same, key


def test_weights_are_known_by_samples_of_them(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    digest = machine.weights_sha256(one)
    copied = shutil.copytree(one, tmp_path / "copy")
    tiny.edit_config(copied, torch_dtype="float16")
    assert machine.weights_sha256(copied) == digest == machine.weights_sha256(str(one))
    assert machine.weights_sha256(tiny.checkpoint(tmp_path / "other", seed=1)) != digest
    tensors = tiny.read_tensors(one)
    last = sorted(tensors)[-1]
    renamed = {name if name != last else f"{name}x": tensor for name, tensor in tensors.items()}
    assert machine.weights_sha256(tiny.write_tensors(copied, renamed)) != digest
    tiny.write_tensors(copied, tensors)
    again = machine.weights_sha256(copied)
    data = bytearray((copied / "model.safetensors").read_bytes())
    every = (len(data) - machine.SAMPLE_BYTES) / (machine.SAMPLES - 1)  # from the begin of one sample to the next
    for place in [-1, *(int(sample * every) + 9 for sample in range(1, machine.SAMPLES))]:
        data[place] ^= 1
        (copied / "model.safetensors").write_bytes(data)
        assert machine.weights_sha256(copied) != again
        again = machine.weights_sha256(copied)


def test_a_checkpoint_is_described_by_its_config(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "demo")
    model = machine.checkpoint_model(path, "w8a8")
    assert (model.name, model.precision, model.layers, model.num_hidden_layers) == ("demo", "w8a8", 3, 3)
    assert model.weights == machine.weights_sha256(path)
    assert model.architecture_sha256 == machine.architecture_sha256(tiny.read_config(path))
    assert model.shape is not None
    assert model.shape["hidden_size"] == 64
    assert machine.model_of("x", tiny.read_config(path), "random", "bf16", 2).layers == 2


def test_this_run_says_who_and_when() -> None:
    run = machine.this_run(["decode", "--model", "a b"], 7, perf_results.CPU, perf_results.MODEL, lean="ascend 1")
    assert run.command == "python -m perf decode --model 'a b'"
    assert (run.seed, run.date[-6:], run.versions["lean"]) == (7, "+00:00", "ascend 1")
    assert run.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "numpy"} <= set(run.versions)
    assert "torch-npu" not in run.versions or run.versions["torch-npu"]
    assert run.clock.startswith("clock_gettime(CLOCK_MONOTONIC), ")
    result.parse(result.document(replace(RESULTS["ops"], run=run)), "F")


def test_this_machine_is_described() -> None:
    described = machine.describe(get_device("cpu"))
    assert (described.device_type, described.emulated, described.cards) == ("cpu", False, 1)
    assert described.device == described.host != ""
    assert described.cores == len(os.sched_getaffinity(0))
    assert described.memory_bytes == get_device("cpu").memory().total
    assert described.system.startswith("Linux ")


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *who, "-C", str(folder), *arguments], check=True, capture_output=True)


def test_commit_says_if_files_differ_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() is None
    git(tmp_path, "init")
    assert machine.commit() is None, "a repository without a commit"
    (tmp_path / "file").write_text("x")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    clean = machine.commit()
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "file").write_text("y")
    assert machine.commit() == f"{clean}+changes"
    monkeypatch.setenv("PATH", "")
    assert machine.commit() is None


# What `decode` and `ops` share: models and command lines.


def test_models_by_name_by_config_and_by_checkpoint(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    folder, config, model = open_model("tiny", None, "bf16", scratch)
    assert (folder, model.weights, model.layers, model.num_hidden_layers) == (scratch, "random", 4, 4)
    assert tiny.read_config(scratch) == config
    assert config["num_nextn_predict_layers"] == 0
    whole = model.architecture_sha256
    folder, config, model = open_model("tiny", 2, "bf16", scratch)
    assert (config["num_hidden_layers"], model.layers, model.num_hidden_layers) == (2, 2, 4)
    assert model.architecture_sha256 == whole, "fewer layers of the same model"
    path = tiny.checkpoint(tmp_path / "demo")
    folder, config, model = open_model(str(path), None, "bf16", scratch)
    assert (folder, model.weights) == (path, machine.weights_sha256(path))
    assert "a checkpoint, measured whole" in user_error(open_model, str(path), 2, "bf16", scratch)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(path / "config.json", alone)
    folder, config, model = open_model(str(alone), 2, "bf16", scratch)
    assert (folder, model.name, model.weights, model.layers) == (scratch, "alone", "random", 2)
    for layers in (0, 1, 5):
        assert user_error(open_model, "tiny", layers, "bf16", scratch) == (
            f"--layers {layers}: tiny has 4, of which at least 2 make a dense and an MoE layer"
        )
    assert "(did you mean 'tiny'?)" in user_error(open_model, "tinny", None, "bf16", scratch)
    assert "config.json" in user_error(open_model, str(tmp_path), None, "bf16", scratch)


@pytest.mark.parametrize("key", ["num_hidden_layers", "first_k_dense_replace"])
def test_a_config_of_another_family_gets_one_line(key: str, tmp_path: Path) -> None:
    config = {name: value for name, value in perf_results.FLASH.items() if name != key}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "scratch").mkdir()
    assert key in user_error(open_model, str(tmp_path), 2, "bf16", tmp_path / "scratch")


LISTS = st.lists(st.integers(-3, 40), min_size=1, max_size=6)


@given(values=LISTS)
def test_lists_of_numbers(values: list[int]) -> None:
    text = ",".join(map(str, values))
    if min(values) < 1 or len(set(values)) < len(values):
        line = f"--batch '{text}' is not a list of different whole numbers from 1, such as 1,8,32"
        assert user_error(numbers, "--batch", text) == line
    else:
        assert numbers("--batch", text) == values


@given(text=st.text(alphabet="1,. -x", max_size=6))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_no_list_of_numbers_ends_in_a_traceback(text: str) -> None:
    try:
        found = numbers("--batch", text)
    except UserError:
        return
    assert all(one > 0 for one in found)


def test_lists_of_names_and_files_to_write(tmp_path: Path) -> None:
    assert names("--x", "b,a", ("a", "b")) == ["b", "a"]
    assert user_error(names, "--x", "a,bb", ("a", "bbb")) == "--x: unknown 'bb' (did you mean 'bbb'?); there is a, bbb"
    assert user_error(names, "--x", "a,a", ("a", "b")) == "--x 'a,a' names one twice"
    out_file("--out", None)
    out_file("--out", tmp_path / "new.json")
    assert user_error(out_file, "--out", tmp_path) == f"--out {tmp_path}: is a directory"
    gone = tmp_path / "gone" / "x"
    assert user_error(out_file, "--out", gone) == f"--out {gone}: there is no such folder"


def test_a_result_is_what_its_kind_says() -> None:
    for kind, made in RESULTS.items():
        assert isinstance(made, Result)
        assert refusal(result.document(made) | {"kind": next(one for one in KINDS if one != kind)}).startswith("F: ")
