"""Conversions: every tensor what the definition of its format says, every file what the library would write."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ascend
from ascend.checkpoint import open_checkpoint
from convert.engine import Steps, convert, prepare
from convert.plan import Request
from convert.sharding import Sharding
from tests import tiny
from tests.quantised import quantised_checkpoint

pytestmark = pytest.mark.beside

# Blocks of 128 that are whole, partial and more than one, widths that int4 takes, biases, two MTP layers.
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "use_qkv_bias": True,
    "use_bias": True,
    "num_nextn_predict_layers": 2,
}
IDS = torch.randint(0, tiny.SHAPE["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(1))
FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"target": "fp8"},
    "w8a8": {"target": "w8a8"},
    "modelslim": {"target": "w8a8", "layout": "modelslim"},
    "w4a16": {"target": "w4a16"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("plain")
    return {dtype: tiny.checkpoint(base / dtype, dtype, **SHAPE) for dtype in ("bf16", "fp32")}


@pytest.fixture(scope="module")
def made(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bf16 one in every format, by the converter."""
    base = tmp_path_factory.mktemp("made")
    return {name: run(plain["bf16"], base / name, **how) for name, how in FORMATS.items()}


def run(source: Path, to: Path, workers: int = 1, **request: Any) -> Path:
    convert(prepare(source, to, Request(**request)), workers)
    return to


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def independent(name: str, src: Path, dst: Path) -> dict[str, Tensor]:
    """What `tests.quantised` makes of the same weights: int4 in groups of 64, which divide all widths of `SHAPE`."""
    how: dict[str, Any] = {"format": FORMATS[name]["target"], "modelslim": name == "modelslim"}
    return tiny.read_tensors(quantised_checkpoint(src, dst, **how, group=64 if name == "w4a16" else None))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", FORMATS)
def test_tensors_are_those_of_the_definition(name: str, dtype: str, plain: dict[str, Path], tmp_path: Path) -> None:
    target = run(plain[dtype], tmp_path / "target", **FORMATS[name])
    same_tensors(tiny.read_tensors(target), independent(name, plain[dtype], tmp_path / "second opinion"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_is_what_the_library_writes(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    written = made[name] / "model.safetensors"
    save_file(load_file(written), tmp_path / "library", {"format": "pt"})
    ours, theirs = written.read_bytes(), (tmp_path / "library").read_bytes()
    length = int.from_bytes(ours[:8], "little")
    assert json.loads(ours[8 : 8 + length]) == json.loads(theirs[8 : 8 + length])
    assert ours[8 + length :] == theirs[8 + int.from_bytes(theirs[:8], "little") :]


@pytest.mark.parametrize("name", FORMATS)
def test_numpy_reads_the_weights_back(name: str, plain: dict[str, Path], made: dict[str, Path]) -> None:
    """The layouts once more, decoded without torch and without `ops`, and the bounds of the errors."""
    raw, whole = read_raw(made[name] / "model.safetensors"), tiny.read_tensors(plain["bf16"])
    rounded = 0
    for weight, tensor in whole.items():
        module, expected = weight.removesuffix(".weight"), tensor.double().numpy()
        form = "int4" if f"{module}.weight_packed" in raw else name if f"{module}.weight_scale" in raw else "plain"
        if form == "plain" and f"{module}.weight_scale_inv" in raw:
            form = "fp8"
        if form == "plain":
            assert np.array_equal(raw[weight][1], expected), weight
            continue
        rounded += 1
        if form == "int4":
            words, scale = raw[f"{module}.weight_packed"][1].astype(np.int64), raw[f"{module}.weight_scale"][1]
            value = (words[..., None] >> np.arange(0, 32, 4) & 15).reshape(expected.shape) - 8
            assert raw[f"{module}.weight_shape"][1].tolist() == list(expected.shape)
            steps = np.repeat(scale, expected.shape[1] // scale.shape[1], 1)
        elif form == "fp8":
            value, scale = e4m3(raw[weight][1]), raw[f"{module}.weight_scale_inv"][1]
            steps = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: expected.shape[0], : expected.shape[1]]
        else:
            value, steps = raw[weight][1].astype(float), raw[f"{module}.weight_scale"][1]
        error = np.abs(value * steps - expected)
        if form == "fp8":  # 3 bits of mantissa; below 2**-6 even steps of 2**-9
            assert (error <= np.maximum(np.abs(expected) / 16, steps * 2**-10) * (1 + 1e-6)).all(), weight
        else:  # half a step; where the scale was rounded down, the largest weight is clamped: 2**-9 of its size more
            assert (error <= steps / 2 + np.abs(expected) * 2**-8).all(), weight
            assert (
                error <= np.abs(expected).max(1, keepdims=True) * (1 / (254 if form != "int4" else 14) + 2**-8)
            ).all()
    matrices = 3 * (1 + 4 * 9) + 5 * 2  # gate, up, down of the dense MLP, of 8 experts and a shared one; attention
    assert rounded == (3 * 4 * 8 if name == "w4a16" else matrices)


def e4m3(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    sign, exponent, mantissa = codes >> 7, (codes >> 3 & 15).astype(int), codes & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.where(sign == 1, -size, size)


def read_raw(file: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Read a safetensors file by hand: dtype and values, floats as float64, FP8 as codes."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype = {"F32": "<f4", "I8": "i1", "F8_E4M3": "u1", "I32": "<u4", "I64": "<i8", "BF16": "<u2"}[entry["dtype"]]
        values = np.frombuffer(data[start + begin : start + end], dtype).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        found[name] = (entry["dtype"], values.astype(float) if entry["dtype"] in ("BF16", "F32") else values)
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_it_loads_and_computes_as_if_quantised_in_memory(
    name: str, plain: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    logits = ascend.load_model(made[name])(IDS)
    if name == "w4a16":  # in memory its groups are whole widths here
        wanted = ascend.load_model(quantised_checkpoint(plain["bf16"], tmp_path / "other", "w4a16", group=64))(IDS)
    else:
        wanted = ascend.load_model(plain["bf16"], quantise=FORMATS[name]["target"])(IDS)
    assert torch.equal(logits, wanted)


SOURCES = ("fp8", "w8a8", "modelslim", "w4a16", "fp8-channel")
LARGEST_STEP = {"fp8": 1 / 16, "w8a8": 1 / 127, "w4a16": 1 / 7, "bf16": 1 / 256}  # of a weight, or of a row's largest


PAIRS = [(source, to) for source in SOURCES for to in ("fp8", "w8a8", "w4a16", "bf16")]
QUICK = {("fp8", "w8a8"), ("w8a8", "bf16"), ("modelslim", "w8a8"), ("fp8-channel", "fp8"), ("w4a16", "w4a16")}


@pytest.mark.parametrize(
    ("source", "to"), [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_every_format_is_a_source_for_every_other(source: str, to: str, made: dict[str, Path], tmp_path: Path) -> None:
    src = fp8_channel(made["w8a8"], tmp_path / "source") if source == "fp8-channel" else made[source]
    target = run(src, tmp_path / "target", target=to)
    before, after = decoded(src), decoded(target)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        bound = weight.abs().amax(-1, keepdim=True) * LARGEST_STEP[to]
        assert ((after[name] - weight).abs() <= bound).all(), name
    stored = ascend.load_model(target)
    assert stored.quantised == (None if to == "bf16" else to)
    if source == to:  # as it is, byte by byte
        same_tensors(tiny.read_tensors(target), tiny.read_tensors(src))


def fp8_channel(src: Path, dst: Path) -> Path:
    """The int8 weights of ``src`` as FP8 with a scale per row, as compressed-tensors' FP8_DYNAMIC has it."""
    quantised_checkpoint(src, dst, "fp8", leave_out=[""])
    tensors = tiny.read_tensors(src)
    for name in [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]:
        tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)
    return tiny.write_tensors(dst, tensors)


def decoded(path: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint in fp32, by the names they have unquantised."""
    raw = tiny.read_tensors(path)
    weights = {}
    for name, values in raw.items():
        module, _, end = name.rpartition(".")
        scale = next(
            (raw[f"{module}.{one}"] for one in ("weight_scale", "weight_scale_inv") if f"{module}.{one}" in raw), None
        )
        if end not in ("weight", "weight_packed", "expert_bias", "bias"):
            continue
        if scale is None or end == "bias":
            weights[name] = values.float()
            continue
        if end == "weight_packed":
            values = ((values.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32) & 15) - 8).flatten(-2)
        rows, columns = values.shape
        step = scale.float().view(len(scale), -1)
        step = step.repeat_interleave(128, 0)[:rows] if len(step) < rows else step
        width = 128 if f"{module}.weight_scale_inv" in raw else columns // step.shape[1]
        weights[f"{module}.weight"] = values.float() * step.repeat_interleave(width, 1)[:, :columns]
    return weights


def test_bf16_from_other_floats(plain: dict[str, Path], tmp_path: Path) -> None:
    half = {name: one.half() if "bias" not in name else one for name, one in tiny.read_tensors(plain["fp32"]).items()}
    config = json.loads((plain["fp32"] / "config.json").read_text())
    (tmp_path / "fp16").mkdir()
    (tmp_path / "fp16" / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    tiny.write_tensors(tmp_path / "fp16", half)
    for source in (plain["fp32"], tmp_path / "fp16"):
        target = run(source, tmp_path / f"{source.name}-bf16", target="bf16")
        before, after = tiny.read_tensors(source), tiny.read_tensors(target)
        for name, tensor in after.items():
            kept = name.endswith("expert_bias") or (source.name == "fp16" and before[name].dtype == torch.float32)
            assert torch.equal(tensor, before[name] if kept else before[name].bfloat16()), name
        assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    ascend.load_model(tmp_path / "fp32-bf16")


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bytes_whatever_the_number_of_files(
    name: str, plain: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    """And the report's figures: each weight is rounded and measured by itself."""
    many = run(plain["bf16"], tmp_path / "many", **FORMATS[name], max_shard_bytes=150_000)
    assert len(list(many.glob("*.safetensors"))) > 10
    same_tensors(tiny.read_tensors(many), tiny.read_tensors(made[name]))
    reports = [json.loads((path / "conversion.json").read_text()) for path in (many, made[name])]
    assert reports[0]["classes"] == reports[1]["classes"]
    assert reports[0]["worst"] == reports[1]["worst"]
    open_checkpoint(many)
    again = run(plain["bf16"], tmp_path / "again", **FORMATS[name], max_shard_bytes=150_000)
    for file in many.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


@pytest.mark.slow
def test_the_same_bytes_with_two_processes(plain: dict[str, Path], tmp_path: Path) -> None:
    one = run(plain["bf16"], tmp_path / "one", target="fp8", max_shard_bytes=150_000)
    code = (
        "import sys; from pathlib import Path\n"
        "from convert.engine import convert, prepare; from convert.plan import Request\n"
        "if __name__ == '__main__':\n"
        "    convert(prepare(Path(sys.argv[1]), Path(sys.argv[2]), Request('fp8', max_shard_bytes=150_000)), 2)\n"
    )
    (tmp_path / "two.py").write_text(code)
    command = [sys.executable, str(tmp_path / "two.py"), str(plain["bf16"]), str(tmp_path / "two")]
    subprocess.run(
        command, check=True, cwd=Path(__file__).parent.parent, env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin"}
    )
    for file in one.iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_modules_that_are_ignored_stay_as_they_are(plain: dict[str, Path], tmp_path: Path) -> None:
    ignore = ("model.layers.2.mlp.experts.*", "*.attention.dense")
    target = run(plain["bf16"], tmp_path / "target", target="fp8", ignore=ignore)
    before, after = tiny.read_tensors(plain["bf16"]), tiny.read_tensors(target)
    kept = [name for name in before if "attention.dense" in name or "layers.2.mlp.experts" in name]
    assert len(kept) == 5 * 2 + 24
    for name in kept:
        assert torch.equal(after[name], before[name]), name
    listed = json.loads((target / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {name.removesuffix(".weight") for name in kept if name.endswith("weight")} <= set(listed)
    assert ascend.load_model(target)(IDS).isfinite().all()


REFUSED = {
    "a glob that names nothing": (
        {"target": "w8a8", "ignore": ("model.layers.9.*",)},
        "--ignore 'model.layers.9.*' names no module that w8a8 would quantise; it is a glob",
    ),
    "half of gate and up": (
        {"target": "w8a8", "ignore": ("model.layers.0.mlp.gate_proj",)},
        "but model.layers.0.mlp.gate_proj and up_proj is kept as one",
    ),
    "some experts": (
        {"target": "fp8", "ignore": ("model.layers.1.mlp.experts.3.*",)},
        "but model.layers.1.mlp.experts is kept as one",
    ),
    "everything": (
        {"target": "w8a8", "ignore": ("*",)},
        "--ignore leaves nothing that w8a8 would quantise: give fewer modules, or use bf16",
    ),
    "modelslim of fp8": (
        {"target": "fp8", "layout": "modelslim"},
        "--format modelslim is a form of w8a8 alone, not of fp8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_requests_that_are_refused(case: str, plain: dict[str, Path], tmp_path: Path) -> None:
    request, line = REFUSED[case]
    assert line in tiny.user_error(run, plain["bf16"], tmp_path / "target", **request)
    assert not list(tmp_path.iterdir())


def test_int4_needs_widths_of_whole_words(tmp_path: Path) -> None:
    source = tiny.checkpoint(tmp_path / "source", "bf16", moe_intermediate_size=20)
    line = tiny.user_error(run, source, tmp_path / "target", target="w4a16")
    assert line == "a width of the experts is no multiple of 8 (they share 4), as int4 needs: use w8a8"


def test_experts_of_each_rank_in_files_of_their_own(
    plain: dict[str, Path], made: dict[str, Path], tmp_path: Path
) -> None:
    target = run(plain["bf16"], tmp_path / "target", target="w8a8", sharding=Sharding(4, 8))
    same_tensors(tiny.read_tensors(target), tiny.read_tensors(made["w8a8"]))
    for file in target.glob("*.safetensors"):
        experts = {int(name.split(".experts.")[1].split(".")[0]) for name in load_file(file) if ".experts." in name}
        rank = file.name.partition("-ep")[2][:1]
        assert experts == ({2 * int(rank), 2 * int(rank) + 1} if rank else set()), file.name
    assert torch.equal(ascend.load_model(target)(IDS), ascend.load_model(made["w8a8"])(IDS))


def test_what_must_not_come_along_is_left_out_and_named(plain: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in plain["bf16"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    code = {"auto_map": {"AutoConfig": "evil.Config"}}
    tiny.edit_config(source, **code)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer | code))
    for name in ("modeling_evil.py", "training_state.pt", "weights.bin", "notes.xlsx"):
        (source / name).write_bytes(b"x")
    (source / "runs").mkdir()
    target = run(source, tmp_path / "target", target="fp8")
    assert json.loads((target / "conversion.json").read_text())["left_out"] == {
        "modeling_evil.py": "code is never run from a model directory",
        "training_state.pt": "a pickle can run code when it is opened",
        "weights.bin": "a pickle can run code when it is opened",
        "notes.xlsx": "not a file that a model needs",
        "runs": "a directory",
        "config.json: auto_map": "it names code to run",
    }
    assert {file.name for file in target.iterdir()} == {
        *(file.name for file in plain["bf16"].iterdir()), "conversion.json", "conversion.svg", "manifest.json",
    }  # fmt: skip
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((target / name).read_text())
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert {file.stat().st_mode & 0o777 for file in target.iterdir()} == {0o640}


def test_the_report_says_what_rounding_did(plain: dict[str, Path], made: dict[str, Path]) -> None:
    before, after = decoded(plain["bf16"]), decoded(made["w8a8"])
    report = json.loads((made["w8a8"] / "conversion.json").read_text())
    names = [name for name in before if ".mlp.experts." in name]
    squares = sum(float(before[name].double().square().sum()) for name in names)
    error = sum(float((after[name] - before[name]).double().square().sum()) for name in names)
    said = report["classes"]["routed_experts"]
    assert said["tensors"] == len(names) == 4 * 8 * 3
    assert said["mean_relative_error"] == pytest.approx(math.sqrt(error / squares), rel=1e-3)
    largest = max(float((after[name] - before[name]).abs().max() / before[name].abs().max()) for name in names)
    assert said["max_relative_error"] == pytest.approx(largest, rel=1e-3)
    assert "mean_relative_error" not in report["classes"]["router"]
    rounded = [name for name in before if not torch.equal(before[name], after[name])]
    errors = {name: float((after[name] - before[name]).norm() / before[name].norm()) for name in rounded}
    assert [one["tensor"] for one in report["worst"]] == sorted(errors, key=lambda name: -errors[name])[:10]


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    """A tensor of 1.6 GB and a file of as much pass through: neither is ever held, nor is the file mapped."""
    source = tiny.checkpoint(tmp_path / "source", "bf16", vocab_size=300, tie_word_embeddings=True)
    tensors = tiny.read_tensors(source)
    rows, columns = 200_000, 4096
    tiny.edit_config(source, vocab_size=rows)
    header, end = {}, 0
    for name, tensor in {**tensors, "model.word_embeddings.weight": torch.empty(0)}.items():
        shape = [rows, columns] if "word_embeddings" in name else list(tensor.shape)
        nbytes = math.prod(shape) * (4 if tensor.dtype == torch.float32 and "bias" in name else 2)
        header[name] = {
            "dtype": "F32" if "expert_bias" in name else "BF16",
            "shape": shape,
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(header).encode()
    with (source / "model.safetensors").open("wb") as stream:  # zeros that take no room on the disk
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    code = (
        "import resource, sys; from pathlib import Path; import convert.engine as e; from convert.plan import Request\n"
        "idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "e.convert(e.prepare(Path(sys.argv[1]), Path(sys.argv[2]), Request('fp8')), 1)\n"
        "print(idle, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "target")]
    out = subprocess.check_output(command, cwd=Path(__file__).parent.parent, text=True)
    idle, peak = map(int, out.split()[-2:])
    assert peak - idle < 150 << 10, "KiB: the plot's library is part of it"


def test_what_is_there_already_must_be_whole(plain: dict[str, Path], tmp_path: Path) -> None:
    def again(**steps: Any) -> Any:
        return convert(prepare(plain["bf16"], tmp_path / "target", Request("fp8")), 1, steps=Steps(**steps))

    assert again().report is not None
    assert again().report is None
    for asked in ({"check": lambda directory: {}}, {"sign": lambda directory: None}):
        assert "is there already, made without this --sign or --check" in tiny.user_error(again, **asked)
    (tmp_path / "target" / "model.safetensors").unlink()
    assert "model.safetensors: missing, though manifest.json names it" in tiny.user_error(again)


def test_places_that_no_target_can_have(plain: dict[str, Path], tmp_path: Path) -> None:
    """Told before the work, and nothing is left there."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    work = tmp_path / ".x.converting" / "files"
    shutil.copytree(plain["bf16"], work)
    places = {
        tmp_path / "link": "is a link",
        tmp_path / ("a" * 300): "File name too long",
        tmp_path / ("a" * 250): "the name is too long for what stands beside it",
        Path("/proc"): "is a mount point",
        tmp_path / "none" / "x": "is no directory",
    }
    for place, words in places.items():
        assert words in tiny.user_error(run, plain["bf16"], place, target="fp8")
    assert "lies where the work on" in tiny.user_error(run, work, tmp_path / "x", target="fp8")
    assert {file.name for file in work.iterdir()} == {file.name for file in plain["bf16"].iterdir()}
    assert sorted(file.name for file in tmp_path.iterdir()) == [".x.converting", "link"]
