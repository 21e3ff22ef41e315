"""From flags to the command: what is decided, what wins, and that a printed configuration is taken back."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from ascend.checkpoint import open_checkpoint
from convert.demo import write_demo
from serve.args import parse
from serve.config_file import profiles
from serve.printed import config_text
from serve.resolve import _cards, resolve
from serve.watch import isolation
from tests.tiny import user_error

RECORDED = Path(__file__).parent / "recorded" / "npu-smi-24.1.0.3-910b3-idle.txt"
DRY = ["--dry-run", "--port", "8123"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_demo(path)
    return path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with eight 910B3 as far as device nodes and npu-smi tell."""
    (tmp_path / "dev").mkdir()
    for card in range(8):
        (tmp_path / "dev" / f"davinci{card}").touch()
    tool = tmp_path / "npu-smi"
    tool.write_text(f'#!/bin/sh\n[ "$*" = info ] && cat {shlex.quote(str(RECORDED))}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("ASCEND_DEV", str(tmp_path / "dev"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    (tmp_path / "state" / "antangelmed").mkdir(parents=True)
    return tmp_path


def command(demo: Path, *arguments: str) -> list[str]:
    return resolve(parse([*DRY, "--model", str(demo), *arguments]), open_checkpoint(demo)).command.command


@pytest.mark.parametrize(
    "arguments",
    [
        "--device cpu",
        "--device cpu --max-num-seqs 4 --hang 7 --served-model-name x -- --seed 3 --no-enable-prefix-caching",
        "--device cpu --max-model-len 8192",
        "--device npu --cards 8x910B3-64G --drain 30",
        "--device npu --cards 8x910B3 --tensor-parallel-size 4 --expert-parallel --speculative ngram:5",
        "--device npu --emulate --cards 2x910B3 --speculative mtp",
        "--device cpu --speculative mtp --speculative-tokens 2",
        '--device npu --cards 2x910B4 -- --additional-config {"weight_nz_mode":2} --hf-overrides {"x":1}',
        "--device npu --cards 2x910B4 --max-model-len 8192",
        "--device cuda --cards 4xH20-96G --kv-cache-dtype fp8",
        "--device cuda --cards 1xH200 --engine sglang",
    ],
)
def test_a_printed_configuration_is_taken_back(demo: Path, tmp_path: Path, arguments: str) -> None:
    words = [*DRY, "--model", str(demo), *arguments.split()]
    settings = parse(words)
    resolved = resolve(settings, open_checkpoint(demo))
    file = tmp_path / "site.yaml"
    file.write_text(config_text(settings, resolved))
    again = parse(["--dry-run", "--config", str(file)])
    second = resolve(again, open_checkpoint(demo))
    assert flags_of(second.command.command) == flags_of(resolved.command.command)
    assert second.command.environment == resolved.command.environment
    assert again.hang == settings.hang


def flags_of(words: list[str]) -> list[str]:
    """A command's flags, each with its value, in no order: a file's engine flags come last."""
    joined: list[str] = []
    for word in words:
        if word.startswith("--"):
            joined.append(word)
        else:
            joined[-1:] = [f"{joined[-1]} {word}"] if joined else [word]
    return sorted(one.replace('": ', '":') for one in joined)


@pytest.mark.parametrize("name", [name for name in profiles() if "2node" not in name])
def test_a_profile_starts_for_its_cards(tmp_path: Path, name: str) -> None:
    """Profiles are for the real model; here for one with as many heads that reaches 4096 tokens."""
    write_demo(tmp_path / "wide", num_attention_heads=8, num_key_value_heads=4)
    words = command(tmp_path / "wide", "--profile", name, "--max-model-len", "4096")
    assert words[words.index("--max-model-len") + 1] == "4096"
    assert words.count("--max-model-len") == 1
    for flag in {word for word in words if word.startswith("--")}:
        assert words.count(flag) == 1, flag


def test_the_users_overrides_cannot_drop_the_plans_positions(demo: Path) -> None:
    """vLLM-Ascend would rotate them otherwise than the model, without a word."""
    words = ["--device", "npu", "--cards", "2x910B4", "--max-model-len", "8192", "--", "--hf-overrides"]
    settings = parse([*DRY, "--model", str(demo), *words, '{"num_experts_per_tok": 2}'])
    said = user_error(resolve, settings, open_checkpoint(demo))
    assert "positions would silently be wrong: put this into it, too: {" in said
    assert '"truncate": true' in said
    whole = said.partition("too: ")[2]
    assert whole in command(demo, *words, whole)


def test_a_profile_forces_no_positions_on_a_model(tmp_path: Path) -> None:
    write_demo(tmp_path / "wide", num_attention_heads=8, num_key_value_heads=4)
    words = command(tmp_path / "wide", "--profile", "910b-8x64g-bf16", "--max-model-len", "4096")
    assert "--hf-overrides" not in words
    more = command(
        tmp_path / "wide", "--profile", "910b-8x64g-bf16", "--max-model-len", "4096", "--max-num-seqs", "256"
    )
    assert "256]}" in more[more.index("--compilation-config") + 1]


def test_a_profile_for_other_weights_is_told(demo: Path) -> None:
    for name, told in (("910b-2x64g-w4a16", True), ("h20-4x-bf16", False)):
        settings = parse([*DRY, "--model", str(demo), "--profile", name, "--max-model-len", "4096"])
        notes = resolve(settings, open_checkpoint(demo)).notes
        assert any(f"--profile {name} was computed for weights in w4a16" in note for note in notes) is told


def test_what_the_user_gives_to_the_engine_wins_over_the_plan(demo: Path) -> None:
    graphs = '{"cudagraph_mode": "NONE"}'
    words = command(demo, "--device", "npu", "--cards", "8x910B3", "--", "--compilation_config", graphs)
    assert [word for word in words if "compilation" in word] == ["--compilation_config"]
    assert words[-1] == graphs


def test_the_users_environment_wins_but_not_over_what_is_safe(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # an earlier test's torch may have set it
    settings = parse([*DRY, "--model", str(demo), "--device", "npu", "--cards", "8x910B3"])
    environment = resolve(settings, open_checkpoint(demo)).command.full_environment()
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["TASK_QUEUE_ENABLE"] == "1"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/var/cache/here/antangelmed/inductor"


def test_cards_are_those_found(server: Path) -> None:
    cards = _cards(parse(["--device", "npu"]), "npu")
    assert str(cards) == "8x910B3-64G"
    assert cards.indices == tuple(range(8))


def test_cards_that_are_named_must_be_here(server: Path) -> None:
    assert _cards(parse(["--cards", "4x910B3"]), "npu").indices == (0, 1, 2, 3)
    assert "the cards here are 8x910B3-64G" in user_error(_cards, parse(["--cards", "8x910B4"]), "npu")
    assert "are not for --device cpu" in user_error(_cards, parse(["--cards", "8x910B4"]), "cpu")


@pytest.mark.parametrize("tool", ["missing", "silent", "failing"])
def test_named_cards_are_believed_where_no_tool_answers(
    server: Path, demo: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    (server / "npu-smi").unlink()
    if tool != "missing":
        (server / "npu-smi").write_text(f"#!/bin/sh\nexit {1 if tool == 'failing' else 0}\n")
        (server / "npu-smi").chmod(0o755)
    isolation.isolate((2,), "UCE ERROR", "npu", {})
    monkeypatch.setattr("serve.resolve._device", lambda settings: ("npu", "as asked for"))
    cards = _cards(parse(["--cards", "4x910B3"]), "npu")
    assert (str(cards), cards.indices) == ("4x910B3-64G", (0, 1, 3, 4))
    resolved = resolve(parse(["--model", str(demo), "--cards", "4x910B3"]), open_checkpoint(demo))
    assert "no vendor's tool answered: that the cards are 4x910B3-64G is only what --cards says" in resolved.notes
    assert "7 are to be had here" in user_error(_cards, parse(["--cards", "8x910B3"]), "npu")
    assert "that npu-smi does not name: say which" in user_error(_cards, parse(["--device", "npu"]), "npu")


def test_named_cards_that_are_not_in_dev_are_not_called_isolated(server: Path, tmp_path: Path) -> None:
    for node in (server / "dev").iterdir():
        node.unlink()
    said = user_error(_cards, parse(["--cards", "8x910B3"]), "npu")
    assert "no whole card for --device npu is in /dev" in said
    (server / "dev" / "vdavinci100").touch()
    for words in (["--cards", "8x910B3"], ["--device", "npu"]):
        assert "is a virtual NPU" in user_error(_cards, parse(words), "npu")
    assert "are not for --device npu" in user_error(_cards, parse(["--cards", "8xH20"]), "npu")


OWN_GRAPHS = [  # sizes, what is said, whether it is refused
    ([1, 2, 4, 8], None, False),
    ([1, 2, 4], "steps of more than 4 tokens run without a graph", False),
    ([1, 8, 16, 32], "graphs of [16, 32] tokens are never used", False),
    (list(range(1, 41)), "40 graph sizes, 32 at most", True),
    ([8, 4], "rising", True),
    ([8, 8192], "tokens at most", True),
    (["8"], "no list of numbers", True),
]


@pytest.mark.parametrize(("sizes", "said", "refused"), OWN_GRAPHS, ids=lambda value: str(value)[:20])
def test_the_users_own_graphs_are_judged(demo: Path, sizes: list, said: str | None, refused: bool) -> None:
    own = json.dumps({"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sizes})
    words = ["--device", "npu", "--cards", "8x910B3", "--max-num-seqs", "8", "--", "--compilation-config", own]
    settings, checkpoint = parse([*DRY, "--model", str(demo), *words]), open_checkpoint(demo)
    if refused:
        assert said is not None
        assert said in user_error(resolve, settings, checkpoint)
        return
    notes = [note for note in resolve(settings, checkpoint).notes if note.startswith("--compilation-config")]
    assert len(notes) == (said is not None)
    assert all(said in note for note in notes if said)


def test_the_users_own_drafts_decide_which_graphs_go(demo: Path) -> None:
    own = json.dumps({"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4, 8]})
    drafts = json.dumps({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 4})
    words = ["--device", "npu", "--cards", "8x910B3", "--", "--compilation-config", own, "--speculative-config", drafts]
    settings = parse([*DRY, "--model", str(demo), *words])
    assert "with 2 drafts" in user_error(resolve, settings, open_checkpoint(demo))


def test_an_isolated_card_is_not_used(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isolation.isolate((2,), "HBM MULTI BIT ECC ERROR", "npu", {})
    assert _cards(parse(["--device", "npu"]), "npu").indices == (0, 1, 3, 4, 5, 6, 7)
    assert _cards(parse(["--cards", "4x910B3"]), "npu").indices == (0, 1, 3, 4)
    said = user_error(_cards, parse(["--cards", "8x910B3"]), "npu")
    assert "7 are to be had here, card 2: HBM MULTI BIT ECC ERROR" in said
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "2")
    assert "all cards here are isolated" in user_error(_cards, parse(["--device", "npu"]), "npu")


def test_isolation_holds_within_what_the_user_made_visible(
    server: Path, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5")
    isolation.isolate((4,), "UCE ERROR", "npu", {"ASCEND_RT_VISIBLE_DEVICES": ""})
    monkeypatch.setattr("serve.resolve._device", lambda settings: ("npu", "as asked for"))
    resolved = resolve(parse(["--model", str(demo), "--device", "npu"]), open_checkpoint(demo))
    assert resolved.command.full_environment()["ASCEND_RT_VISIBLE_DEVICES"] == "5"
    assert resolved.plan.settings["tensor-parallel-size"] == 1


def test_sglang_has_no_place_for_a_key(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    settings = parse([*DRY, "--model", str(demo), "--device", "cuda", "--cards", "1xH200", "--engine", "sglang"])
    assert "VLLM_API_KEY is set, but SGLang takes a key only" in user_error(resolve, settings, open_checkpoint(demo))
    assert "secret" not in str(resolve(parse([*DRY, "--device", "cpu"]), None).command)


@pytest.mark.parametrize(
    ("listed", "answer"),
    [
        ("4,5", (4, 5)),
        ("4, 5", (4, 5)),
        ("5,5,9", (5,)),
        ("", "hides every card"),
        ("9", "hides every card"),
        ("GPU-1234abcd", "cards are planned by number"),
        ("-1", "cards are planned by number"),
    ],
)
def test_what_is_visible(server: Path, monkeypatch: pytest.MonkeyPatch, listed: str, answer: object) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", listed)
    settings = parse(["--device", "npu"])
    if isinstance(answer, str):
        assert answer in user_error(_cards, settings, "npu")
    else:
        assert _cards(settings, "npu").indices == answer


def test_visible_cards_are_in_no_file(
    server: Path, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr("serve.resolve._device", lambda settings: ("npu", "as asked for"))
    settings = parse(["--model", str(demo), "--device", "npu"])
    resolved = resolve(settings, open_checkpoint(demo))
    assert resolved.command.environment["ASCEND_RT_VISIBLE_DEVICES"] == "4,5"
    assert "VISIBLE" not in config_text(settings, resolved)
    (tmp_path / "site.yaml").write_text('environment: {ASCEND_RT_VISIBLE_DEVICES: "1"}')
    file = parse([*DRY, "--model", str(demo), "--device", "cpu", "--config", str(tmp_path / "site.yaml")])
    assert "is not for a file" in user_error(resolve, file, open_checkpoint(demo))
