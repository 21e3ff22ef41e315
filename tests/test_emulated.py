"""`--device npu --emulate` up to the command: what goes with it, and what an emulated card gets beside the plan."""

from __future__ import annotations

import json

import pytest

from serve import emulated
from serve.args import parse
from serve.resolve import Resolved, resolve
from tests.tiny import user_error


def resolved(*words: str) -> Resolved:
    return resolve(parse(["--device", "npu", "--emulate", "--dry-run", *words]), None)


def test_the_plan_is_kept_and_what_the_emulation_needs_is_added() -> None:
    one, plain = resolved(), resolve(parse(["--device", "npu", "--dry-run", "--cards", "1x910B3"]), None)
    command = one.command.command
    assert tuple(command[: len(emulated.PREFIX)]) == emulated.PREFIX
    assert "EMULATED" in one.why
    added = set(command) - set(plain.command.command)
    flags = {word for word in added if word.startswith("--")}
    assert flags == {"--", "--num-gpu-blocks-override", "--additional-config"}
    assert one.plan.environment == plain.plan.environment
    assert one.command.environment.items() >= emulated.ENVIRONMENT.items()
    assert not emulated.ENVIRONMENT.keys() & plain.command.environment.keys()


def test_its_own_additional_settings_do_not_hide_the_plans() -> None:
    command = resolved("--cards", "4x910B3", "--expert-parallel").command.command
    value = json.loads(command[command.index("--additional-config") + 1])
    assert value == {"enable_flashcomm1": True, "ascend_compilation_config": {"fuse_qknorm_rope": False}}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu", "--emulate"], "goes with --device npu, not cpu"),
        (["--device", "npu", "--emulate", "--cards", "2xH20"], "--emulate has up to 8 Ascend cards"),
        (["--device", "npu", "--emulate", "--nodes", "2", "--node-address", "10.0.0.1"], "leave --nodes out"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words: list[str], said: str) -> None:
    assert said in user_error(resolve, parse([*words, "--dry-run"]), None)
