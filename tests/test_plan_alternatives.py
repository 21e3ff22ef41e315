"""What a refusal says would do is done: each alternative goes through the real parser, and is planned."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

import serve.nodes.node
import serve.resolve
from ascend.checkpoint import open_checkpoint
from convert.demo import write_demo
from serve.args import parse
from serve.nodes.interfaces import Interface
from serve.plan import main
from serve.planning import open_model
from serve.resolve import resolve
from tests.tiny import user_error

FLASH = open_model("antangelmed")

REFUSED = [  # flags that both commands have
    "--cards 2x910B4",
    "--cards 1xH200",
    "--cards 1x910B3 --max-num-seqs 64 --tensor-parallel-size 1 --max-num-batched-tokens 9000",
    "--cards 2x910B3 --max-num-seqs 8",
    "--cards 8x910B3 --tensor-parallel-size 3",
    "--cards 8x910B3 --tensor-parallel-size 8 --data-parallel-size 2",
    "--cards 8x910B3 --kv-cache-dtype fp8",
    "--cards 8x910B3 --dtype float32",
    "--cards 8x910B3 --block-size 64",
    "--cards 8x910B3 --max-model-len 131073",
    "--cards 8x910B3 --max-num-seqs 64 --max-num-batched-tokens 32",
    "--cards 8x910B3 --gpu-memory-utilization 0.4",
    "--cards 8x910B3 --tpot-ms 0.1",
    "--cards 8x910B3 --pipeline-parallel-size 33",
    "--cards 1x910B2C --max-num-seqs 256 --no-expert-parallel",
    "--cards 8xA800 --kv-cache-dtype fp8 --expert-parallel",
    "--cards 1x910B4 --tensor-parallel-size 1 --gpu-memory-utilization 0.3 --max-num-seqs 256",  # two changes at once
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "demo"
    write_demo(path)
    return path


def alternatives(said: str) -> list[str]:
    text = said.partition("what would do: ")[2]
    assert text, said
    return text.split(", or ")


def applied(words: list[str], change: str) -> tuple[list[str], str | None]:
    """The words with a change made as it reads, and the precision that was converted to."""
    converted = re.search(r"`python -m convert (\S+) SRC DST` and --model DST", change)
    change = change.replace(converted[0], "") if converted else change.replace(" (convert it first)", "")
    change, _, dropped = change.replace("without", "|without").partition("|without")
    gone = re.findall(r"--[\w-]+", dropped)
    new = change.replace("ADDRESS", "10.0.0.1").split()
    gone += [word for word in new if word.startswith("--")]
    gone += [flag.replace("--", "--no-") for flag in gone]
    gone += [flag.replace("--no-", "--") for flag in gone if flag.startswith("--no-")]
    kept: list[str] = []
    skipping = False
    for word in words:
        if word.startswith("--"):
            skipping = word in gone
        if not skipping:
            kept.append(word)
    return [*kept, *new], converted[1] if converted else None


@pytest.mark.parametrize(
    "flags", [*REFUSED, "--cards 8x910B3 --speculative ngram:20", "--cards 8x910B3 --precision fp8"]
)
def test_each_alternative_of_serve_plan_is_planned(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    for change in alternatives(user_error(main, flags.split())):
        words, converted = applied(flags.split(), change)
        assert converted is None
        assert main(words) == 0, change


@pytest.mark.parametrize("flags", REFUSED)
def test_each_alternative_of_the_launcher_is_planned(flags: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(demo)
    start = ["--dry-run", "--port", "8123", "--model", str(demo)]
    monkeypatch.setattr(serve.resolve, "model_in", lambda path: FLASH)
    monkeypatch.setattr(serve.nodes.node, "own_interface", lambda settings: Interface("eth1", True, ("10.0.0.1",)))
    monkeypatch.setattr(serve.nodes.node, "_check_free", lambda address, port: None)  # no address of this machine
    said = user_error(resolve, parse([*start, *flags.split()]), checkpoint)
    assert "--precision" not in said
    for change in alternatives(said):
        words, converted = applied(flags.split(), change)
        model = replace(FLASH, precision=converted or "bf16")
        monkeypatch.setattr(serve.resolve, "model_in", lambda path, model=model: model)
        assert resolve(parse([*start, *words]), checkpoint).plan.precision == model.precision, change
