"""Every trap of `serve.planning.traps`: a plan keeps clear of it, and who walks into it is told what would do."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ascend.routing
from ascend.devices.facts import GiB
from ascend.errors import UserError
from convert.demo_config import demo_config
from serve.planning import Plan, PlannedModel, Wanted, make_plan, open_model, parse_cards
from serve.planning.environment import variables
from serve.planning.memory import Load
from serve.planning.model import model_of
from serve.planning.planner import _decide
from serve.planning.rope import hf_overrides
from serve.planning.traps import TRAPS, problems

FLASH = open_model("antangelmed")
PLAIN = open_model("ling-flash")


def plan(cards: str, model: PlannedModel = FLASH, **wanted: Any) -> Plan:
    nodes = wanted.get("nodes", 1)
    return make_plan(model, parse_cards(cards, nodes), Wanted(**wanted))


REFUSED = [  # cards, wishes, what is said, what would do
    ("8x910B3", {"precision": "fp8"}, "no op of the 910B computes in FP8", "--precision w8a8"),
    ("1xH20", {"precision": "fp8"}, "does not fit on 1xH20-96G", "--cards 2xH20-96G"),
    ("8x910B3", {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 on an NPU", "without --kv-cache-dtype"),
    ("8x910B3", {"dtype": "float32"}, "--dtype float32 on a card", "--dtype bfloat16"),
    ("8x910B3", {"block_size": 64}, "changes any other block to 128", "--block-size 128"),
    ("8xH20", {"block_size": 20}, "multiples of 16", "without --block-size"),
    ("8x910B3", {"precision": "w4a16-all"}, "W4A16 for experts only", "--precision w8a8"),
    ("8x910B3", {"tensor_parallel_size": 16}, "in servers of 8 cards", "--tensor-parallel-size 8"),
    ("8x910B3", {"tensor_parallel_size": 3}, "does not divide into 3 cards", "--tensor-parallel-size 8"),
    ("8x910B3", {"tensor_parallel_size": 8, "data_parallel_size": 2}, "16 cards of 8", "--tensor-parallel-size 4"),
    ("16x910B3", {"nodes": 2, "tensor_parallel_size": 8, "data_parallel_size": 1}, "evenly", "--data-parallel-size 2"),
    ("8x910B3", {"pipeline_parallel_size": 33}, "33", "without --pipeline-parallel-size"),
    ("8x910B3", {"speculative": "mtp"}, "has no MTP layer", "without --speculative"),
    ("8x910B3", {"speculative": "ngram", "speculative_tokens": 16}, "16 tokens of a sequence",
     "--speculative-tokens 15"),
    ("8x910B3", {"speculative": "ngram:16"}, "16 tokens of a sequence", "--speculative ngram:15"),
    ("8x910B3", {"max_num_seqs": 64, "max_num_batched_tokens": 32}, "a token of each", "--max-num-seqs 32"),
    ("8x910B3", {"max_model_len": 131073}, "more than the 131072 tokens", "--max-model-len 131072"),
    ("8x910B3", {"gpu_memory_utilization": 0.99}, "need a rest", "--gpu-memory-utilization 0.92"),
    ("8x910B3", {"gpu_memory_utilization": 0.4}, "does not fit", "--gpu-memory-utilization 0.92"),
    ("8x910B4", {"precision": "w8a8", "max_num_seqs": 256, "gpu_memory_utilization": 0.98}, "does not fit",
     "--gpu-memory-utilization 0.92"),
    ("8x910B3", {"tpot_ms": 0.1}, "out of reach", "without --tpot-ms"),
    ("2x910B4", {}, "GiB a card short", "--cards 8x910B4-32G"),
    ("1xH200", {}, "64.6 GiB a card short", "--precision fp8"),
    ("2x910B3", {"max_num_seqs": 8}, "does not fit", "--precision w8a8"),
    ("2x910B3", {"precision": "w8a8", "max_num_seqs": 4096}, "4096 of 1024", "--max-num-seqs 128"),
    ("16xH100", {"nodes": 2, "tensor_parallel_size": 8, "expert_parallel": False, "precision": "fp8"}, "cannot be cut",
     "--tensor-parallel-size 4"),
]  # fmt: skip


@pytest.mark.parametrize(("cards", "wanted", "why", "instead"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_go_is_one_line_with_what_would(cards: str, wanted: dict, why: str, instead: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(cards, **wanted)
    message = str(caught.value)
    assert why in message
    assert instead in message.partition("what would do: ")[2], message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ("8x910B", "910B1, 910B2, 910B3 or 910B4? npu-smi info tells"),
        ("8x910B5", "did you mean '910B"),
        ("4xA100", "unknown card 'A100'"),
        ("8x910B4-64G", "a 910B4 has 32 GiB, not 64"),
        ("0xH20", "write a number and a card"),
        ("16xH20", "one server holds 8 cards; say --nodes 2"),
        ("32x910B2C", "one server holds 16 cards; say --nodes 2"),
        ("8x910C", "Atlas A3 (910C) is not supported"),
        ("8xAscend910_9392", "Atlas A3 (910C) is not supported"),
        ("", "write a number and a card"),
    ],
)
def test_cards_that_are_not_known(cards: str, message: str) -> None:
    with pytest.raises(UserError, match="--cards") as caught:
        parse_cards(cards)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("8x910b3", "8x910B3-64G"),
        ("8 X Ascend910B2", "8x910B2-64G"),
        ("h20", "1xH20-96G"),
        ("2xH20-3e", "2xH20-3e-141G"),
        ("4xh20-141g", "4xH20-3e-141G"),
        ("NVIDIA H20", "1xH20-96G"),
        ("1xH200", "1xH200-141G"),
        ("2x910B4-32G", "2x910B4-32G"),
        ("8x910b4-1", "8x910B4-1-64G"),
        ("16x910B2C", "16x910B2C-64G"),
        ("8xa800", "8xA800-80G"),
        ("8xA100-80GB", "8xA100-80G"),
        ("8xNvidia A100-40gb", "8xA100-40G"),
        ("8xh800", "8xH800-80G"),
        ("4xL20", "4xL20-48G"),
    ],
)
def test_cards_as_people_write_them(text: str, name: str) -> None:
    assert str(parse_cards(text)) == name
    assert parse_cards(name) == parse_cards(text)


@pytest.mark.parametrize("cards", ["8x910B4-1", "8x910B2C", "8xA800", "8xH800", "8xL20"])
def test_a_card_nobody_measured_is_planned_by_its_memory(cards: str) -> None:
    one = plan(cards, precision="w8a8")
    assert one.limits.full is None
    assert any("its limits are unknown" in warning for warning in one.warnings)


def test_sixteen_cards_in_one_server_send_between_halves() -> None:
    one = plan("16x910B2C")
    assert (one.division, one.nodes) == ("TP8 DP2 EP16", 1)
    assert "sent by MC2" in {choice.name: choice.why for choice in one.choices}["enable-expert-parallel"]
    assert "HCCL_OP_EXPANSION_MODE" not in one.environment
    assert "additional-config" not in one.settings
    assert "never use MC2" in {choice.name: choice.why for choice in plan("8x910B2C").choices}["enable-expert-parallel"]


def test_float16_is_obeyed_with_a_warning() -> None:
    for cards in ("8x910B3", "4xH20"):
        one = plan(cards, dtype="float16")
        assert one.settings["dtype"] == "float16"
        assert any("float16 ends at 65504" in warning for warning in one.warnings)
        assert not any("float16" in warning for warning in plan(cards).warnings)


def test_cuda_cites_nothing_of_vllm_ascend() -> None:
    more: dict[str, Any] = {"max_num_seqs": 64, "speculative": "ngram", "data_parallel_size": 2, "dtype": "float16"}
    for wanted in ({}, {**more, "expert_parallel": True}):
        for choice in plan("4xH20", **wanted).choices:
            assert not re.search("vllm.ascend", choice.source + choice.why, re.IGNORECASE), choice
            assert "910B" not in choice.why, choice


@pytest.mark.parametrize(
    ("text", "tokens", "said"),
    [
        ("ngram:0", None, "write ngram or ngram:3"),
        ("ngram:x", None, "write ngram or ngram:3"),
        ("ngram:3", 4, "write ngram or ngram:3"),
        ("off:3", None, "there is off, mtp, eagle3:DIR, ngram"),
        ("mtp:1", None, "there is off, mtp, eagle3:DIR, ngram"),
        ("eagle3", None, "there is off, mtp, eagle3:DIR, ngram"),
        ("eagle3:/absent", None, "no such directory"),
        ("off", 3, "without --speculative"),
    ],
)
def test_what_drafts_is_one_of_a_few(text: str, tokens: int | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan("8x910B3", speculative=text, speculative_tokens=tokens)


def test_more_drafts_than_a_step_has_graphs_for_are_one_sequence() -> None:
    assert plan("8xH20", speculative="ngram:600").settings["max-num-seqs"] == 1


def test_yarn_is_told_again_on_an_npu_with_truncate_and_theta() -> None:
    for model in (FLASH, PLAIN):
        overrides = plan("8x910B3", model, max_model_len=131072).settings["hf-overrides"]
        # vLLM 0.32 takes the context from this number, 0.23 from the rotary settings.
        assert overrides.pop("max_position_embeddings", None) == (131072 if model is PLAIN else None)
        assert overrides == {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 600000.0,
                "partial_rotary_factor": 0.5,
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "truncate": True,
            }
        }
    # YaRN changes all positions, not only the far ones.
    assert "hf-overrides" in plan("8x910B3", max_model_len=4096).settings
    assert "hf-overrides" not in plan("8x910B3", PLAIN).settings


def test_cuda_needs_no_rope_settings_but_to_switch_yarn_on() -> None:
    assert "hf-overrides" not in plan("4xH20").settings
    switched = plan("4xH20", PLAIN, max_model_len=40000).settings["hf-overrides"]["rope_parameters"]
    assert switched["rope_type"] == "yarn"
    short = model_of({**FLASH.config, "max_position_embeddings": 32768}, "not scaled")
    assert plan("4xH20", short).settings["hf-overrides"] == {"max_position_embeddings": 131072}


def test_what_a_config_says_of_yarn_is_kept() -> None:
    config = demo_config("ling-flash", 0, "bf16", 2.0, {})[0]
    for key, theta in (("rope_scaling", None), ("rope_parameters", 1e6)):
        rope = {"type": "yarn", "factor": 2.0, "beta_fast": 16, "truncate": False}
        rope |= {"rope_theta": theta} if theta else {}
        model = model_of({**config, "rope_scaling": None, key: rope}, "other")
        settings = hf_overrides(model, 4096, "npu")["rope_parameters"]
        assert settings["rope_theta"] == (theta or 600000.0)
        assert settings["beta_fast"] == 16
        assert settings["truncate"] is False
        assert settings["rope_type"] == "yarn"
        assert settings["original_max_position_embeddings"] == 65536


def test_eight_910b_gather_and_sixteen_send() -> None:
    one, two = plan("8x910B3"), plan("16x910B3", nodes=2)
    why = {choice.name: choice.why for choice in one.choices}["enable-expert-parallel"]
    assert "never use MC2" in why
    assert one.settings["enable-expert-parallel"] is False
    assert (two.division, two.settings["enable-expert-parallel"]) == ("TP8 DP2 EP16", True)
    assert "16 whole experts a card" in {choice.name: choice.why for choice in two.choices}["enable-expert-parallel"]
    assert two.settings["tensor-parallel-size"] == 8
    # Four servers of 8: 8 experts a card.
    assert plan("32x910B3", nodes=4).division == "TP8 DP4 EP32"


def test_mc2_gets_the_buffer_it_needs() -> None:
    few = plan("16x910B3", nodes=2)
    assert few.environment["HCCL_BUFFSIZE"] == "200"
    # 512 tokens on 2 cards a group: 256 a card, 2 * (256 * 16 * 8 * 4096 * 2 + 2e6) bytes
    many = plan("16x910B3", nodes=8, precision="w8a8", max_num_seqs=512, tensor_parallel_size=2)
    assert many.environment["HCCL_BUFFSIZE"] == "541"
    assert many.memory is not None
    assert few.memory is not None
    assert many.memory.collectives - few.memory.collectives == 2 * 341 * 2**20


def test_whole_experts_only_where_they_do_not_lose() -> None:
    few, many = plan("8x910B3", max_num_seqs=8), plan("8x910B3", max_num_seqs=256)
    assert few.settings["enable-expert-parallel"] is False
    assert many.settings["enable-expert-parallel"] is True
    why = {choice.name: choice.why for choice in few.choices}["enable-expert-parallel"]
    assert "3.3 GB instead of 1.4 with 1" in why  # routed experts alone: 3.5 times as many
    assert "with 8" in why


def test_flashcomm_comes_with_whole_experts_and_graphs_that_divide() -> None:
    many = plan("8x910B3", max_num_seqs=250)
    assert many.settings["additional-config"] == {"enable_flashcomm1": True}
    sizes = many.settings["compilation-config"]["cudagraph_capture_sizes"]
    assert all(size % 8 == 0 for size in sizes)
    assert sizes[-1] >= 250
    assert "additional-config" not in plan("8x910B3").settings


def test_graphs_are_few_and_hold_all_drafts() -> None:
    for drafts, seqs in ((0, 100), (3, 100), (7, 64), (15, 32)):
        wanted = {"speculative": f"ngram:{drafts}"} if drafts else {}
        one = plan("8x910B3", max_num_seqs=seqs, expert_parallel=False, **wanted)
        sizes = one.settings["compilation-config"]["cudagraph_capture_sizes"]
        assert sizes[-1] == seqs * (drafts + 1)
        assert len(sizes) <= 16
        assert all(size % (drafts + 1) == 0 for size in sizes)
        if drafts:
            assert one.settings["speculative-config"]["num_speculative_tokens"] == drafts


def test_more_cards_than_kv_heads_hold_no_more() -> None:
    eight, four = plan("8x910B3").memory, plan("4x910B3").memory
    assert eight is not None
    assert four is not None
    assert eight.kv / eight.kv_tokens == four.kv / four.kv_tokens == 2 * 32 * 128 * 2
    assert "each on 2 cards" in {one.name: one.why for one in plan("8x910B3").choices}["tensor-parallel-size"]


def test_communicators_are_counted() -> None:
    mib = 2**20
    for cards, wanted, expected in (
        ("8x910B3", {}, 4 * 400),  # world, TP, EP, MC2
        ("16x910B3", {"nodes": 2}, 4 * 400 + 100),  # DP's is smaller
        ("1x910B3", {"precision": "w4a16", "max_model_len": 4096, "max_num_seqs": 1}, 0),
    ):
        memory = plan(cards, **wanted).memory
        assert memory is not None
        assert memory.collectives == expected * mib


def test_the_environment_of_an_npu() -> None:
    environment = plan("8x910B3").environment
    assert (
        environment.items()
        >= {
            "ASCEND_LAUNCH_BLOCKING": "0",
            "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
            "HCCL_OP_EXPANSION_MODE": "AIV",
            "TASK_QUEUE_ENABLE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_PROC_BIND": "false",
        }.items()
    )
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"):
        assert 120 <= int(environment[name]) <= 300
    several = plan("16x910B3", nodes=2).environment
    for name in ("HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT"):  # one server waits while another still loads
        assert several[name] == several["VLLM_ENGINE_READY_TIMEOUT_S"] == "1680"
    slow = replace(_decide(FLASH, parse_cards("16x910B3", 2), Wanted(nodes=2))[0], environment={})
    values = {one.name: one.value for one in variables(slow, 1e13)}
    assert (values["HCCL_CONNECT_TIMEOUT"], int(values["HCCL_EXEC_TIMEOUT"]) > 7200) == ("7200", True)
    assert int(environment["VLLM_ENGINE_READY_TIMEOUT_S"]) >= 600 + 206e9 / 0.2e9
    assert not any(name.startswith(("HCCL", "ASCEND")) for name in plan("4xH20").environment)


def test_which_cards_are_used_is_said_where_some_stay_idle() -> None:
    six = plan("6xH200")
    assert six.environment["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert any("2 of 6 cards stay idle" in warning for warning in six.warnings)
    assert "CUDA_VISIBLE_DEVICES" not in plan("8xH200").environment
    shared = replace(parse_cards("4x910B3"), indices=(1, 3, 4, 6))
    assert make_plan(FLASH, shared, Wanted()).environment["ASCEND_RT_VISIBLE_DEVICES"] == "1,3,4,6"


def test_the_side_channel_of_prefix_caching_is_said() -> None:
    for cards in ("8x910B3", "4xH20"):
        why = {one.name: one.why for one in plan(cards).choices}["enable-prefix-caching"]
        assert "CVE-2025-46570" in why


@pytest.mark.parametrize(
    ("cards", "wanted", "change", "trap"),
    [
        ("8x910B3", {}, {"settings": {}}, "yarn-npu"),
        ("8x910B3", {}, {"settings": {"hf-overrides": {"rope_parameters": {"truncate": True}}}}, "yarn-npu"),
        ("4xH20", {"max_model_len": 40000, "model": PLAIN}, {"settings": {}}, "yarn-cuda"),
        ("8x910B3", {}, {"environment": {}}, "launch-blocking"),
        ("8x910B3", {}, {"environment": {"HCCL_EXEC_TIMEOUT": "1836"}}, "hccl-timeouts"),
        ("16x910B3", {"nodes": 2}, {"environment": {"HCCL_BUFFSIZE": "100"}}, "mc2"),
        ("8x910B3", {}, {"settings": {"additional-config": {"enable_flashcomm1": True}}}, "flashcomm1"),
        ("16x910B3", {"nodes": 2}, {"environment": {"HCCL_CONNECT_TIMEOUT": "300"}}, "hccl-timeouts"),
        ("8x910B3", {}, {"load": Load(4096, 64, 8192, 128, graphs=tuple(range(1, 65)))}, "graphs"),
        ("8x910B3", {}, {"load": Load(4096, 64, 8192, 128, drafts=1, graphs=(2, 3))}, "graphs"),
    ],
)
def test_the_rules_see_what_the_planner_would_never_write(
    cards: str, wanted: dict[str, Any], change: dict[str, Any], trap: str
) -> None:
    wishes = {"model": FLASH, "nodes": 1, **wanted}
    model, nodes = wishes.pop("model"), wishes["nodes"]
    draft, _ = _decide(model, parse_cards(cards, nodes), Wanted(**wishes))
    assert problems(draft) == []
    assert any(problem.endswith(TRAPS[trap].why) for problem in problems(replace(draft, **change)))


def test_every_trap_says_why_and_who_knows() -> None:
    for name, trap in TRAPS.items():
        assert trap.why, name
        assert trap.source, name
        assert trap.devices, name


# --- any wish: a plan that keeps every rule, or one line ---

MODELS = {
    "with mtp": model_of(demo_config("ling-flash", 0, "bf16", None, {"num_nextn_predict_layers": 1})[0], "with-mtp"),
    "antangelmed": FLASH,
    "ling-flash": PLAIN,
    "ling-mini": open_model("ling-mini"),
    "tiny": open_model("tiny"),
}
WISHES = st.fixed_dictionaries(
    {},
    optional={
        "precision": st.sampled_from(["bf16", "fp8", "w8a8", "w4a16", "w4a16-all"]),
        "max_model_len": st.integers(1, 300_000),
        "max_num_seqs": st.sampled_from([1, 7, 64, 300]),
        "max_num_batched_tokens": st.sampled_from([16, 2048, 16384]),
        "tensor_parallel_size": st.sampled_from([1, 2, 3, 4, 8, 16]),
        "data_parallel_size": st.sampled_from([1, 2, 4]),
        "pipeline_parallel_size": st.sampled_from([1, 2, 5]),
        "expert_parallel": st.booleans(),
        "gpu_memory_utilization": st.floats(0.01, 1.0),
        "kv_cache_dtype": st.sampled_from(["auto", "bf16", "fp8"]),
        "block_size": st.sampled_from([16, 64, 128]),
        "speculative": st.sampled_from(["off", "ngram", "ngram:15", "mtp"]),
        "tpot_ms": st.floats(0.1, 200),
    },
)
CARD = st.sampled_from(["910B1", "910B2", "910B3", "910B4", "H20", "H20-3e", "H100", "H200"])


@settings(max_examples=30, deadline=None)
@given(CARD, st.integers(1, 8), st.sampled_from([1, 1, 2, 4]), st.sampled_from(sorted(MODELS)), WISHES)
def test_any_wish_gives_a_plan_that_keeps_every_rule_or_one_line(
    card: str, count: int, nodes: int, name: str, wanted: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ascend.routing, "TOKENS", 64)  # what is sampled for imbalance: here its size matters little
        one, refusal = None, ""
        try:
            one = plan(f"{count * nodes}x{card}", MODELS[name], **wanted, nodes=nodes)
        except UserError as error:
            refusal = str(error)
    if one:
        keeps_every_rule(one, MODELS[name], count, nodes, wanted)
    else:
        assert "\n" not in refusal
        assert "; what would do: " in refusal or "nothing near it" in refusal


def keeps_every_rule(one: Plan, model: PlannedModel, count: int, nodes: int, wanted: dict[str, Any]) -> None:
    """The rules again, from the settings alone."""
    settings, memory = one.settings, one.memory
    assert memory is not None
    assert sum(memory.rows().values()) == pytest.approx(memory.total)
    assert min(memory.rows().values()) >= 0
    assert memory.total <= 141 * GiB
    for name, value in wanted.items():  # what was asked for is what there is
        flag = name.replace("_", "-")
        if flag in settings and name not in ("dtype", "kv_cache_dtype"):
            assert settings[flag] == value
    tensor, data = settings["tensor-parallel-size"], settings.get("data-parallel-size", 1)
    pipeline, npu = settings.get("pipeline-parallel-size", 1), one.device == "npu"
    expert = settings.get("enable-expert-parallel", False)
    assert tensor <= count
    assert tensor * data * pipeline <= count * nodes
    assert nodes == 1 or data * pipeline % nodes == 0
    assert model.shape.num_attention_heads % tensor == 0
    seqs, length = settings["max-num-seqs"], settings["max-model-len"]
    drafts = settings.get("speculative-config", {}).get("num_speculative_tokens", 0)
    assert drafts <= 15
    assert settings["max-num-batched-tokens"] >= seqs * (drafts + 1)
    assert memory.kv_tokens >= length
    assert length <= model.longest
    assert 0 < settings["gpu-memory-utilization"] <= 0.98
    assert settings["dtype"] == "bfloat16"
    if npu:
        assert settings["block-size"] == 128
        assert one.precision in ("bf16", "w8a8", "w4a16")
        assert "kv-cache-dtype" not in settings
        sizes = settings["compilation-config"]["cudagraph_capture_sizes"]
        assert settings["compilation-config"]["cudagraph_mode"] == "FULL_DECODE_ONLY"
        assert sizes == sorted(set(sizes))
        assert len(sizes) <= 32
        assert all(size % (drafts + 1) == 0 and size <= 512 for size in sizes)
        flashcomm = settings.get("additional-config", {}).get("enable_flashcomm1", False)
        assert not flashcomm or (expert and tensor > 1 and not any(size % tensor for size in sizes))
        rope = settings.get("hf-overrides", {}).get("rope_parameters")
        assert (rope is not None) == (model.is_yarn or length > model.context)
        assert rope is None or ("truncate" in rope and rope["rope_theta"] == 600000.0)
        if tensor * data * pipeline > 1:
            assert int(one.environment["HCCL_BUFFSIZE"]) >= 200
