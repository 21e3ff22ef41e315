"""What `serve.engine_flags` takes and refuses, against the lists made from the engines and vLLM's own parser."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend.errors import UserError
from ascend.model_shape import ModelShape
from convert.demo_config import demo_config
from serve.args import REFUSED, parse
from serve.config_file import as_flags
from serve.engine import FLAGS, FORCED, REMOVED
from serve.engine_flags import (
    check_additional_config,
    check_combination,
    check_flags,
    environment_names,
    read_flags,
)
from serve.engine_flags.rules import RULES
from serve.engine_flags.tables import LISTED, table
from serve.planning import Wanted, make_plan, parse_cards
from serve.planning.model import model_of
from serve.plugin.sglang import REFUSED as SGLANG_REFUSED
from serve.plugin.sglang import sglang_command
from tests.flag_cases import CASES
from tests.tiny import user_error

FLASH = ModelShape(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=9216, moe_intermediate_size=1024
)
PROFILES = sorted((Path(__file__).parent.parent / "serve" / "profiles").glob("*.yaml"))
VERSION = {"npu": ("0.23.0",), "cuda": ("0.32.0",), "cpu": ("0.32.0",)}


# What is refused


@pytest.mark.parametrize(
    ("device", "words", "said"),
    [
        ("cpu", "--max-num-sequence 4", "not known to vllm 0.32.0 (did you mean '--max-num-seqs'?)"),
        ("npu", "--max-num-queued-reqs 4", "'--max-num-queued-reqs' is not known to vllm 0.23.0"),
        ("cpu", "--calculate-kv-scales", "'--calculate-kv-scales' is not known to vllm 0.32.0"),
        ("cpu", "--max-num-seqs four", "--max-num-seqs: 'four' is not a whole number"),
        ("cpu", "--max-num-seqs", "--max-num-seqs: expected one argument"),
        ("cpu", "--gpu-memory-utilization most", "'most' is not a number"),
        ("cpu", "--kv-cache-dtype fp9", "--kv-cache-dtype: 'fp9' is not among its values (did you mean 'fp8'?)"),
        ("cpu", "--speculative-config {", "'{' is not JSON"),
        ("cpu", "--compilation-config 3", "'3' is not a JSON object"),
        ("cpu", "-cc.cudagraf_mode FULL", "unknown key 'cudagraf_mode' (did you mean 'cudagraph_mode'?)"),
        ("cpu", "--max-num", "ambiguous option: --max-num could match"),
        ("cpu", "--hf-overrides.a", "engine flag '--hf-overrides.a' needs a value"),
        ("cpu", "another/model", "'another/model' belongs to no flag"),
        ("cpu", "--help", "print its flags and stop"),
        ("npu", "--additional-config.enable_flashcom1 true", "(did you mean 'enable_flashcomm1'?)"),
    ],
)  # fmt: skip
def test_a_mistake_among_engine_flags(device: str, words: str, said: str) -> None:
    line = user_error(lambda: check_flags("vllm", None, device, words.split()))
    assert said in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("--max_num_seqs=4", {"max-num-seqs": 4}),
        ("--max-num-se 4 -tp 2", {"max-num-seqs": 4, "tensor-parallel-size": 2}),
        ("-O3", {"optimization-level": "3"}),
        ("-O 2 --max-model-len auto", {"optimization-level": "2", "max-model-len": -1}),
        ("--max-num-batched-tokens 4k --max-model-len 4K", {"max-num-batched-tokens": 4000, "max-model-len": 4096}),
        ("--no-enable_prefix-caching", {"enable-prefix-caching": False}),
        ("--hf-overrides.a.b 1 --hf_overrides.a.c_d x", {"hf-overrides": {"a": {"b": 1, "c_d": "x"}}}),
        ("-cc.cudagraph_capture_sizes+ 1,2", {"compilation-config": {"cudagraph_capture_sizes": ["1", "2"]}}),
        ("--seed 7 --served-model-name a b", {"seed": 7, "served-model-name": ["a", "b"]}),
    ],
)
def test_flags_mean_what_the_engine_reads(words: str, meant: dict[str, Any]) -> None:
    for version in ("0.23.0", "0.32.0"):
        assert read_flags("vllm", version, "cuda", words.split()) == meant


def test_a_newer_version_may_have_new_flags_but_old_ones_keep_their_kinds() -> None:
    assert read_flags("vllm", "0.33.1", "cuda", ["--brand-new", "--seed", "1"]) == {"seed": 1}
    assert "not a whole number" in user_error(lambda: check_flags("vllm", "0.33.1", "cuda", ["--seed", "x"]))


# `--additional-config`


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"enable_weight_nz_layout": True}, "it is 'weight_nz_mode' now"),
        ({"flashcomm2_parallel_size": 2}, "'enable_flashcomm2_parallel_size'"),
        ({"torchair_graph_config": {}}, "ACL graphs"),
        ({"ascend_scheduler_config": {"enabled": True}}, "would ignore 'ascend_scheduler_config' in silence"),
        ({"eplb_config": {"dynamic_eplbb": True}}, "(did you mean 'eplb_config.dynamic_eplb'?)"),
        ({"enable_flashcomm1": "true"}, "'enable_flashcomm1' is true or false, not 'true'"),
        ({"weight_nz_mode": True}, "'weight_nz_mode' is a whole number, not True"),
        ({"xlite_graph_config": True}, "'xlite_graph_config' is an object, not True"),
    ],
)
def test_keys_that_would_be_ignored_in_silence(value: dict[str, Any], said: str) -> None:
    assert said in user_error(lambda: check_additional_config(value))


def test_keys_that_vllm_ascend_reads() -> None:
    check_additional_config({"enable_flashcomm1": True, "weight_nz_mode": 2, "pa_shape_list": [1]})
    check_additional_config({"weight_prefetch_config": {"enabled": True, "prefetch_ratio": {"attn": {"qkv": 1.0}}}})
    check_additional_config({"profiling_chunk_config": {"enabled": True, "smooth_factor": 1}})


# Combinations


def combined(case: dict[str, Any]) -> str | None:
    """Return what is said of a case, None for nothing; by default 8 cards of one 910B server."""
    asked = {"device": "npu", "cards": 8, "nodes": 1, "environment": {}, "heads": 32, **case}
    shape = ModelShape(**{**vars(FLASH), "num_attention_heads": asked.pop("heads")})
    device, cards, nodes, environment = (asked.pop(key) for key in ("device", "cards", "nodes", "environment"))
    try:
        check_combination(asked, device, cards, shape, nodes, environment)
    except UserError as error:
        return str(error)
    return None


def test_every_rule_has_its_cases() -> None:
    assert {rule.name for rule in RULES} == CASES.keys()
    assert len({rule.message for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_fires_and_only_then(name: str) -> None:
    broken, kept = CASES[name]
    (rule,) = (rule for rule in RULES if rule.name == name)
    assert combined(broken) == rule.message
    assert combined(kept) is None


@pytest.mark.parametrize("flag", ["speculative-config", "hf-overrides", "compilation-config", "kv-transfer-config"])
@pytest.mark.parametrize("value", [None, 0, "x", True, [], {}, {"method": 3}, {"num_speculative_tokens": "x"}])
def test_rules_stand_odd_values_of_json(flag: str, value: Any) -> None:
    assert "\n" not in (combined({flag: value}) or "")


# What this project itself sends


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_what_a_profile_sends_the_engine_takes(path: Path) -> None:
    asked = parse(["--profile", path.stem, *(["--node-address", "10.0.0.1"] if "2node" in path.stem else [])])
    device = "npu" if path.stem.startswith("910b") else "cpu" if path.stem == "cpu" else "cuda"
    known = environment_names("vllm", None, device)
    for version in VERSION[device]:
        check_flags("vllm", version, device, asked.engine_flags)
        unknown = [name for name in asked.environment if name.startswith("VLLM") and name not in known]
        assert not unknown
        sent = read_flags("vllm", version, device, asked.engine_flags)
    cards = parse_cards(asked.cards or "cpu", asked.nodes)
    whole = {"tensor-parallel-size": asked.tensor_parallel_size, "data-parallel-size": asked.data_parallel_size, **sent}
    whole |= {"enable-expert-parallel": asked.expert_parallel, "block-size": asked.block_size}
    check_combination(whole, device, cards.count * cards.nodes, FLASH, asked.nodes, asked.environment)


@pytest.mark.parametrize("cards", ["8x910B3-64G", "16x910B3-64G", "8xH20-96G"])
def test_what_a_plan_sends_the_engine_takes(cards: str) -> None:
    where = parse_cards(cards, 2 if cards.startswith("16") else 1)
    config, _ = demo_config("ling-flash", 0, "bf16", 4.0, {})
    plan = make_plan(model_of(config, "flash"), where, Wanted(nodes=where.nodes), "vllm")
    for version in VERSION[plan.device]:
        sent = read_flags("vllm", version, plan.device, as_flags(plan.settings))
        assert sent == {key: value for key, value in plan.settings.items() if key in sent}
        assert all(value in (None, False) for key, value in plan.settings.items() if key not in sent)
        check_combination(sent, plan.device, where.count * where.nodes, FLASH, where.nodes, plan.environment)


def test_the_flags_and_variables_of_the_launcher_exist() -> None:
    for version in ("0.23.0", "0.32.0"):
        read_flags("vllm", version, "cuda", [*FLAGS, "--shutdown-timeout", "120"])
        names = environment_names("vllm", version, "cuda")
        assert {name for name in (*FORCED, *REMOVED) if name.startswith("VLLM")} <= names
    known = {name for file in LISTED.values() if file.startswith("vllm") for flag, row in table(file)["flags"].items()
             for name in (flag, *row.get("names", ()))}  # fmt: skip
    assert set(REFUSED) <= known


# SGLang


def test_a_plan_as_a_command_of_sglang() -> None:
    planned = {"tensor-parallel-size": 4, "max-model-len": 32768, "max-num-seqs": 64, "max-num-batched-tokens": 8192,
               "gpu-memory-utilization": 0.9, "enable-expert-parallel": True, "kv-cache-dtype": "fp8",
               "hf-overrides": {"rope_scaling": {"factor": 4.0}}, "compilation-config": {"mode": 3}}  # fmt: skip
    command = sglang_command(Path("/models/m"), "m", "127.0.0.1", 8000, planned, ("--watchdog-timeout", "300"))
    meant = read_flags("sglang", "0.5.23", "cuda", command[3:])
    assert command[1:3] == ["-m", "sglang.launch_server"]
    sizes = ("tp-size", "context-length", "max-running-requests", "chunked-prefill-size")
    assert [meant[size] for size in sizes] == [4, 32768, 64, 8192]
    assert (meant["attention-backend"], meant["host"], meant["ep-size"]) == ("fa3", "127.0.0.1", 4)
    assert json.loads(meant["json-model-override-args"]) == planned["hf-overrides"]
    assert "trust-remote-code" not in meant
    assert "no equivalent of 'speculative-config'" in user_error(
        lambda: sglang_command(Path("m"), "m", "127.0.0.1", 8000, {"speculative-config": {"method": "ngram"}})
    )


@pytest.mark.parametrize("flag", ["--trust-remote-code", "--trust-rem", "--log-requests", "--host=0.0.0.0"])
def test_sglang_flags_that_are_refused(flag: str) -> None:
    assert f"engine flag '{flag}' is refused" in user_error(
        lambda: sglang_command(Path("m"), "m", "127.0.0.1", 8000, {}, (flag,))
    )
    assert set(SGLANG_REFUSED) <= set(table("sglang-0.5.json")["flags"])


# Against vLLM's real parser


@pytest.fixture(scope="module")
def real() -> Iterator[Any]:
    pytest.importorskip("vllm", reason="the engine is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "")
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        yield make_arg_parser(FlexibleArgumentParser())


@pytest.mark.slow
@pytest.mark.beside
def test_the_list_is_that_of_the_installed_engine(real: Any) -> None:
    import vllm.envs

    from serve.engine_flags.dump import flags_of

    committed = table("vllm-0.32.json")
    assert json.loads(json.dumps(flags_of(real))) == committed["flags"]
    assert sorted(vllm.envs.environment_variables) == committed["environment"]


SPELLINGS = [
    "--max-num-seqs", "--max_num_seqs", "--max-num-se", "--max-num", "--seed", "--se", "-tp",
    "--tensor_parallel_size", "--kv-cache-dtype", "--dtype", "--enable-prefix-caching",
    "--no-enable-prefix-caching", "--no_enable_prefix_cach", "--enforce-eager", "--max-model-len",
    "--hf-overrides", "--hf-overrides.a", "--hf_overrides.a.b_c", "-cc", "-cc.cudagraph_mode=FULL", "-cc.cudagraf",
    "--compilation-config", "--additional-config", "--additional-config.x+", "-O", "-O3", "-O=2", "-O9",
    "--optimization-level", "--speculative-config", "-sc.method", "--served-model-name", "--moe-backend",
    "--headless", "--he", "--disable-log", "--nope", "--no-such=1", "--max-num-seqs=3", "--max_num_seqs=x",
    "--max-num-batched-tokens", "--gpu-memory-utilization", "--quantization", "--cudagraph-capture-sizes",
    "--api-server-count", "-asc", "--device-ids", "--hf-token", "--model-loader-extra-config",
    "--numa-bind-nodes", "--swap-space",
]  # fmt: skip
VALUES = [
    "1", "-1", "x", "4k", "4.5k", "4.5K", "0.9", "auto", "fp8", "fp9", "bfloat16", "None", "", "{}", "{",
    "null", "3", "[1]", '{"a": 1}', '{"cudagraph_mode": "FULL"}', '{"mode": 3}', '{"modes": 3}', "FULL", "a,b",
    "triton", "Deep-Gemm", "true",
]  # fmt: skip


def outcome(read: Any) -> tuple[bool, Any]:
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return True, read()
    except (UserError, SystemExit, IndexError):  # the last: the real one's answer to `--flag.key` at the end
        return False, None


@pytest.mark.slow
@pytest.mark.beside
@given(
    st.lists(
        st.tuples(st.sampled_from(SPELLINGS), st.lists(st.sampled_from(VALUES), max_size=2)), min_size=1, max_size=4
    )
)
@settings(max_examples=400, deadline=None)
def test_ours_takes_what_the_real_parser_takes(real: Any, pairs: list[tuple[str, list[str]]]) -> None:
    words = [word for flag, values in pairs for word in (flag, *values)]
    taken, meant = outcome(lambda: real.parse_args(words))
    if taken and (meant.model_tag is not None):
        return  # a word without a flag is a model to vLLM; here it is refused, as the launcher names the model
    ours, found = outcome(lambda: read_flags("vllm", "0.32.0", "cuda", words))
    assert ours == taken, words
    for name, value in (found or {}).items():
        theirs = getattr(meant, name.replace("-", "_"))
        if not isinstance(value, dict | list | str) or isinstance(theirs, str):
            assert theirs == value, (words, name)
