"""`python -m convert demo`: names, shapes, weights, bytes, and every refusal."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from ascend.errors import UserError
from convert.demo import is_demo, write_demo
from convert.demo_config import NOTE, SIZES, demo_config
from convert.shapes import count, tensor_shapes

ROOT = Path(__file__).parents[1]
FILES = [
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def run(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "convert", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60)


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def stored(directory: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                view = tensors.get_slice(name)
                found[name] = (tuple(view.get_shape()), view.get_dtype())
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "tiny"
    write_demo(directory)
    return directory


# --- what is in it ---


def test_tiny_holds_exactly_the_architectures_tensors(tiny):
    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (width, 128),
            f"{prefix}.up_proj.weight": (width, 128),
            f"{prefix}.down_proj.weight": (128, width),
        }

    expected: dict[str, tuple[int, ...]] = {
        "model.word_embeddings.weight": (2048, 128),
        "model.norm.weight": (128,),
        "lm_head.weight": (2048, 128),
        "model.layers.4.enorm.weight": (128,),
        "model.layers.4.hnorm.weight": (128,),
        "model.layers.4.eh_proj.weight": (128, 256),
        "model.layers.4.final_layernorm.weight": (128,),
        **mlp("model.layers.0.mlp", 256),
    }
    for layer in range(5):
        expected |= {
            f"model.layers.{layer}.input_layernorm.weight": (128,),
            f"model.layers.{layer}.post_attention_layernorm.weight": (128,),
            f"model.layers.{layer}.attention.query_key_value.weight": (256, 128),
            f"model.layers.{layer}.attention.dense.weight": (128, 128),
            f"model.layers.{layer}.attention.query_layernorm.weight": (32,),
            f"model.layers.{layer}.attention.key_layernorm.weight": (32,),
        }
    for layer in range(1, 5):
        expected[f"model.layers.{layer}.mlp.gate.weight"] = (16, 128)
        expected[f"model.layers.{layer}.mlp.gate.expert_bias"] = (16,)
        expected |= mlp(f"model.layers.{layer}.mlp.shared_experts", 64)
        for expert in range(16):
            expected |= mlp(f"model.layers.{layer}.mlp.experts.{expert}", 64)
    assert {name: shape for name, (shape, _) in stored(tiny).items()} == expected
    assert {name for name, (_, dtype) in stored(tiny).items() if dtype != "BF16"} == {
        f"model.layers.{layer}.mlp.gate.expert_bias" for layer in range(1, 5)
    }


@pytest.mark.parametrize(
    ("overrides", "parameters", "appeared", "vanished"),
    [
        ({"n_group": 1}, 2_582_656, set(), set()),
        ({"num_shared_experts": 2}, 2_680_960, set(), set()),
        ({"num_shared_experts": 2, "moe_shared_expert_intermediate_size": 96}, 2_779_264, set(), set()),
        ({"num_shared_experts": 0}, 2_484_352, set(), {"model.layers.1.mlp.shared_experts.up_proj.weight"}),
        ({"partial_rotary_factor": 1.0}, 2_582_656, set(), set()),
        (
            {"first_k_dense_replace": 2},
            2_261_104,
            {"model.layers.1.mlp.up_proj.weight"},
            {"model.layers.1.mlp.gate.weight"},
        ),
        (
            {"first_k_dense_replace": 9},
            1_618_000,
            {"model.layers.3.mlp.up_proj.weight"},
            {"model.layers.3.mlp.gate.weight"},
        ),
        ({"tie_word_embeddings": True}, 2_320_512, set(), {"lm_head.weight"}),
        ({"use_qkv_bias": True}, 2_583_936, {"model.layers.4.attention.query_key_value.bias"}, set()),
        ({"use_bias": True}, 2_583_296, {"model.layers.0.attention.dense.bias"}, set()),
        ({"use_qk_norm": False}, 2_582_336, set(), {"model.layers.0.attention.query_layernorm.weight"}),
        ({"num_nextn_predict_layers": 0}, 2_080_176, set(), {"model.layers.4.eh_proj.weight"}),
        ({"num_nextn_predict_layers": 2}, 3_085_136, {"model.layers.5.eh_proj.weight"}, set()),
    ],
)
def test_tensors_follow_the_config(tmp_path, tiny, overrides, parameters, appeared, vanished):
    demo = write_demo(tmp_path / "demo", **overrides)
    config = json.loads((tmp_path / "demo" / "config.json").read_text())
    assert overrides.items() <= config.items()
    found = stored(tmp_path / "demo")
    assert found == tensor_shapes(config)
    assert demo.parameters == count(found)[0] == parameters
    assert appeared <= found.keys() - stored(tiny).keys()
    assert vanished <= stored(tiny).keys() - found.keys()


def test_keys_that_depend_on_an_override_follow_it(tmp_path):
    def config(**overrides: object) -> dict[str, object]:
        return demo_config("tiny", 0, "bf16", None, overrides)[0]

    assert config()["rotary_dim"] == 16
    assert config(partial_rotary_factor=1.0)["rotary_dim"] == 32
    assert config(rotary_dim=8)["partial_rotary_factor"] == 0.25
    assert config(n_group=1)["topk_group"] == 1
    assert config(moe_intermediate_size=32)["moe_shared_expert_intermediate_size"] == 32


def test_yarn_extends_the_context():
    config = demo_config("ling-flash", 0, "bf16", 4.0, {})[0]
    assert config["max_position_embeddings"] == 131072
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }


def test_parameters_of_the_real_models():
    shapes = tensor_shapes(demo_config("ling-flash", 0, "bf16", None, {})[0])
    embedding_and_head = 2 * 157184 * 4096
    attention = (32 + 2 * 4) * 128 * 4096 + 32 * 128 * 4096 + 2 * 128  # q, k, v; output; the two norms of a head
    dense = 3 * 4096 * 9216
    expert = 3 * 4096 * 1024
    moe = 4096 * 256 + 256 + (256 + 1) * expert  # router, its bias, routed and shared experts
    total = embedding_and_head + 32 * (attention + 2 * 4096) + dense + 31 * moe + 4096
    active = total - 31 * (256 - 8) * expert
    assert count(shapes)[0] == total == 102_889_705_216
    assert round(active / 1e9, 2) == 6.15
    outside_experts = sum(count({name: shapes[name]})[0] for name in shapes if ".experts." not in name)
    assert outside_experts + 31 * 8 * expert == active

    assert count(tensor_shapes(demo_config("ling-mini", 0, "bf16", None, {})[0]))[0] == 16_255_643_392
    assert 0.5e9 < count(tensor_shapes(demo_config("small", 0, "bf16", None, {})[0]))[0] < 0.55e9


def test_config_speaks_the_familys_language(tiny):
    config = json.loads((tiny / "config.json").read_text())
    assert config["architectures"] == ["BailingMoeV2ForCausalLM"]
    expected = {
        "model_type": "bailing_moe",
        "torch_dtype": "bfloat16",
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "norm_topk_prob": True,
        "use_rmsnorm": True,
        "routed_scaling_factor": 2.5,
        "rope_theta": 600000.0,
        "rope_scaling": None,
        "moe_router_enable_expert_bias": True,
        "eos_token_id": 2034,
        "pad_token_id": 2034,
    }
    assert expected.items() <= config.items()
    assert json.loads((tiny / "generation_config.json").read_text())["eos_token_id"] == [2034, 2037]


def test_it_says_that_the_weights_are_random_and_carries_no_code(tiny):
    assert "auto_map" not in json.loads((tiny / "config.json").read_text())
    assert sorted(content(tiny)) == FILES
    assert NOTE in (tiny / "README.md").read_text()
    assert json.loads((tiny / "config.json").read_text())["random_weights_demo"]["note"] == NOTE
    assert is_demo(tiny)
    assert not is_demo(tiny.parent)


def test_files_are_private_to_user_and_group(tiny):
    assert {file.stat().st_mode & 0o777 for file in tiny.iterdir()} == {0o640}
    assert tiny.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("size", ["ling-mini", "ling-flash"])
def test_real_shapes_come_without_weights_and_with_the_familys_ids(tmp_path, size):
    demo = write_demo(tmp_path / size, size=size)
    assert demo.parameters == demo.weight_bytes == 0
    assert not list((tmp_path / size).glob("*.safetensors*"))
    tokenizer = Tokenizer.from_file(str(tmp_path / size / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 157184
    assert [tokenizer.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>", "<|role_end|>")] == [
        156891,
        156892,
        156895,
    ]
    assert json.loads((tmp_path / size / "generation_config.json").read_text())["eos_token_id"] == [156892, 156895]


# --- the weights ---


def load(directory: Path, name: str) -> np.ndarray:
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors[name].float().numpy()


def test_bf16_is_the_fp32_checkpoint_rounded(tmp_path, tiny):
    import torch
    from safetensors.torch import load_file

    write_demo(tmp_path / "fp32", dtype="fp32")
    wide, narrow = (load_file(directory / "model.safetensors") for directory in (tmp_path / "fp32", tiny))
    assert all(tensor.dtype == torch.float32 for tensor in wide.values())
    assert all(torch.equal(wide[name].to(narrow[name].dtype), narrow[name]) for name in narrow)


def test_weights_keep_activations_healthy_and_choices_alive(tiny):
    projection = load(tiny, "model.layers.1.mlp.experts.3.down_proj.weight")
    assert projection.std() == pytest.approx(1 / np.sqrt(64), rel=0.05)
    assert np.abs(load(tiny, "model.layers.1.mlp.gate.expert_bias")).min() > 0
    norm = load(tiny, "model.norm.weight")
    assert 0.05 < norm.std() < 0.2
    assert norm.mean() == pytest.approx(1, abs=0.05)
    # Hidden states after a norm have a root mean square of one: what the router and the head make of them:
    x_TH = np.random.default_rng(0).standard_normal((512, 128))
    assert (x_TH @ load(tiny, "model.layers.1.mlp.gate.weight").T).std() == pytest.approx(1, rel=0.1)
    assert (x_TH @ load(tiny, "lm_head.weight").T).std() == pytest.approx(4, rel=0.1)


def test_ids_without_text_are_not_chosen(tmp_path):
    write_demo(tmp_path / "demo", vocab_size=2304)
    head = load(tmp_path / "demo", "lm_head.weight")
    assert head[2048:].std() == pytest.approx(head[:2048].std() / 10, rel=0.05)
    assert load(tmp_path / "demo", "model.word_embeddings.weight")[2048:].std() == pytest.approx(1, rel=0.05)


def test_tensors_differ_by_name_and_by_seed(tmp_path, tiny):
    write_demo(tmp_path / "other", seed=1)
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert not np.array_equal(load(tiny, name), load(tmp_path / "other", name))
    assert not np.array_equal(load(tiny, name), load(tiny, name.replace("experts.0", "experts.1")))
    assert (tiny / "tokenizer.json").read_bytes() == (tmp_path / "other" / "tokenizer.json").read_bytes()


def test_a_tensor_does_not_depend_on_the_rest_of_the_checkpoint(tmp_path, tiny):
    write_demo(tmp_path / "other", num_hidden_layers=2, num_nextn_predict_layers=0, n_group=1)
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    assert np.array_equal(load(tiny, name), load(tmp_path / "other", name))


# --- determinism and shards ---


@pytest.mark.parametrize("threads", ["1", "7"])
def test_another_process_writes_the_same_bytes(tmp_path, tiny, threads):
    result = run("demo", tmp_path / "demo", PYTHONHASHSEED=threads, RAYON_NUM_THREADS=threads, OMP_NUM_THREADS=threads)
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "demo") == content(tiny)


def test_shards_hold_what_one_file_would(tmp_path, tiny):
    write_demo(tmp_path / "demo", max_shard_size="1MB")
    names = sorted(file.name for file in (tmp_path / "demo").glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) > 4
    assert stored(tmp_path / "demo") == stored(tiny)
    index = json.loads((tmp_path / "demo" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == count(stored(tiny))[1]
    for name in names:
        with safe_open(tmp_path / "demo" / name, framework="np") as tensors:
            keys = set(tensors.keys())
            assert keys == {key for key, file in index["weight_map"].items() if file == name}
        assert count({key: stored(tiny)[key] for key in keys})[1] <= 1_000_000
    assert np.array_equal(load(tiny, "lm_head.weight"), load(tmp_path / "demo", "lm_head.weight"))


# --- all or nothing ---


def test_an_older_demo_is_replaced_only_by_force(tmp_path):
    write_demo(tmp_path / "demo")
    with pytest.raises(UserError, match="already holds a demo: give --force"):
        write_demo(tmp_path / "demo", seed=1)
    write_demo(tmp_path / "demo", seed=1, force=True, num_nextn_predict_layers=0)
    assert json.loads((tmp_path / "demo" / "config.json").read_text())["random_weights_demo"]["seed"] == 1
    assert sorted(content(tmp_path / "demo")) == FILES
    assert os.listdir(tmp_path) == ["demo"]


@pytest.mark.parametrize("text", ["{}", "7", "not json"])
def test_a_directory_of_someone_else_is_never_touched(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="holds no demo: it is not overwritten"):
        write_demo(tmp_path, force=True)
    assert content(tmp_path) == {"config.json": text.encode()}


def test_an_empty_directory_and_a_link_to_one_are_fine(tmp_path, tiny):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    write_demo(tmp_path / "link")
    assert content(tmp_path / "real") == content(tiny)
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("place", "message"),
    [("missing/demo", "is no directory: make it first"), ("file", "is a file"), ("n" * 300, "File name too long")],
)
def test_an_impossible_place_is_refused(tmp_path, place, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        write_demo(tmp_path / place)
    assert os.listdir(tmp_path) == ["file"]


def test_a_place_that_takes_no_files_is_refused():
    with pytest.raises(UserError, match="cannot write to /proc"):
        write_demo("/proc/demo", size="ling-mini")


def test_too_little_space_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"0\.00 GB free, the weights need 0\.01 GB"):
        write_demo(tmp_path / "demo")


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    command = [sys.executable, "-m", "convert", "demo", str(tmp_path / "demo")]
    result = subprocess.run(command, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: cannot write")
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_sigterm_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "convert", "demo", str(tmp_path / "demo"), "--size", "small"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("writing model-00001")
    assert len(os.listdir(tmp_path)) == 1
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    process.stderr.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--force",)])
def test_writers_at_once_leave_one_whole_demo(tmp_path, tiny, options):
    command = [sys.executable, "-m", "convert", "demo", str(tmp_path / "demo"), *options]
    writers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    errors = [writer.communicate(timeout=60)[1] for writer in writers]
    # Without --force, one that starts after the first has finished is refused; the others accept what is there.
    late = [error for writer, error in zip(writers, errors, strict=True) if writer.returncode]
    assert all("already holds a demo" in error for error in late)
    assert not (late and options)
    assert content(tmp_path / "demo") == content(tiny)
    assert os.listdir(tmp_path) == ["demo"]


# --- the command ---


def test_json_is_the_last_line(tmp_path):
    result = run("demo", tmp_path / "demo", "--json", "--mtp", 0, "--yarn", 2, "--dtype", "fp32", "--seed", 3)
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["parameters"] == 2_080_176
    assert document["weight_bytes"] == 4 * 2_080_176
    assert document["path"] == str(tmp_path / "demo")
    assert document["note"] == NOTE
    config = json.loads((tmp_path / "demo" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["torch_dtype"]) == (8192, "float32")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dmeo", "D"], "unknown command 'dmeo' (did you mean 'demo'?)"),
        (["demo"], "the following arguments are required: DIR"),
        (["demo", "D", "--sed", "1"], "unknown argument '--sed' (did you mean '--seed'?)"),
        (["demo", "D", "E"], "unknown argument 'E'"),
        (["demo", "D", "--size", "tinny"], "unknown size 'tinny' (did you mean 'tiny'?)"),
        (["demo", "D", "--weights", "heavi"], "unknown weights 'heavi' (did you mean 'heavy'?)"),
        (["demo", "D", "--dtype", "fp16"], "unknown dtype 'fp16'"),
        (["demo", "D", "--seed", "x"], "invalid int value: 'x'"),
        (["demo", "D", "--mtp", "-1"], "num_nextn_predict_layers -1 is negative"),
        (["demo", "D", "--yarn", "0.5"], "YaRN factor 0.5"),
        (["demo", "D", "--yarn", "nan"], "YaRN factor nan"),
        (["demo", "D", "--max-shard-size", "5"], "max shard size '5'"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path, args, message):
    result = run(*[str(tmp_path / arg) if arg == "D" else arg for arg in args])
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert os.listdir(tmp_path) == []


def test_help_names_the_commands_and_sizes():
    assert "demo" in run().stdout
    text = run("demo", "--help").stdout
    assert all(size in text for size in SIZES)
    assert "RANDOM WEIGHTS" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hiden_size": 64}, "unknown config key 'hiden_size' (did you mean 'hidden_size'?)"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"n_group": 3}, "num_experts 16 is no multiple of n_group 3"),
        ({"n_group": 16, "topk_group": 8}, "leaves no two experts to each of 16 groups"),
        ({"n_group": 0}, "n_group 0 is below 1"),
        ({"topk_group": 5}, "topk_group 5 exceeds n_group 4"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds the experts of 2 of 4 groups of 16"),
        ({"rotary_dim": 7}, "rotary_dim 7 is odd"),
        ({"partial_rotary_factor": 2.0}, "rotary_dim 64 exceeds head_dim 32"),
        ({"vocab_size": 270}, "vocab_size 270 is too small"),
    ],
)
def test_an_impossible_config_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError) as error:
        write_demo(tmp_path / "demo", **overrides)
    assert message in str(error.value)
    assert os.listdir(tmp_path) == []


def test_the_smallest_vocabulary_is_bytes_and_added_tokens(tmp_path):
    write_demo(tmp_path / "demo", vocab_size=271)
    tokenizer = Tokenizer.from_file(str(tmp_path / "demo" / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode("患者 abc").ids) == "患者 abc"


def test_the_tiny_demo_needs_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys; from convert.demo import write_demo; write_demo(sys.argv[1]);"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "demo")], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "set()", result.stderr
