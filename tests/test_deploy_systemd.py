"""The systemd unit and its drop-ins: their rules, and what systemd-analyze says of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from serve.args import parse
from tests.deploy_files import ROOT, SETTINGS, SLOWEST_LOAD_S, STOP_S, UNIT, compose, run, seconds, tool


@cache
def unit(*files: Path) -> dict[str, list[str]]:
    """The settings of a unit and its drop-ins: name -> values; an empty one takes the earlier ones away."""
    found: dict[str, list[str]] = {}
    for file in files or (UNIT,):
        for line in file.read_text().splitlines():
            name, equals, value = line.partition("=")
            if equals and not line.startswith(("#", "[")):
                found[name] = [*found.get(name, []), value] if value else []
    return found


def one(name: str) -> str:
    (value,) = unit()[name]
    return value


def interfaces(name: str) -> dict[str, str]:
    """Which network a drop-in tells each library to use."""
    words = shlex.split(" ".join(unit(UNIT.with_name(name)).get("Environment", [])))
    return {key: value for key, _, value in (word.partition("=") for word in words) if key.endswith("_IFNAME")}


def test_cards_of_one_server_meet_where_the_unit_lets_them() -> None:
    lo = {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"}
    assert interfaces("npu.conf") == {"HCCL_SOCKET_IFNAME": "=lo", **lo}
    assert interfaces("cuda.conf") == {"NCCL_SOCKET_IFNAME": "=lo", **lo}
    (unset,) = unit(UNIT.with_name("multi-node.conf"))["UnsetEnvironment"]
    assert set(unset.split()) == interfaces("npu.conf").keys() | interfaces("cuda.conf").keys()


UNIT_RULES: dict[str, Callable[[], bool]] = {
    "starts longer than the launcher tries": lambda: (
        seconds(one("TimeoutStartSec")) > max(SETTINGS.timeout, SLOWEST_LOAD_S)
    ),
    "stops later than the drain": lambda: seconds(one("TimeoutStopSec")) > STOP_S,
    "only the launcher is told to stop": lambda: one("KillMode") == "mixed",
    "waits for the first answer": lambda: one("Type") == "notify",
    "a mistake is not repeated": lambda: (
        one("Restart") == "on-failure" and "2" in one("RestartPreventExitStatus").split()
    ),
    "a failure is not repeated for ever": lambda: int(one("StartLimitBurst")) <= 5,
    "told to stop early is no failure": lambda: {"130", "143"} <= set(one("SuccessExitStatus").split()),
    "not root": lambda: one("User") == "antangelmed",
    "no way out": lambda: one("IPAddressDeny") == "any" and one("IPAddressAllow") == "localhost",
    "no core dumps": lambda: one("LimitCORE") == "0",
    "no more privileges": lambda: one("NoNewPrivileges") == "yes" and unit()["CapabilityBoundingSet"] == [],
    "files are the group's at most": lambda: one("UMask") == "0027",
    "writes in its own places alone": lambda: (
        one("ProtectSystem") == "strict"
        and "ReadWritePaths" not in unit()
        and {one(f"{place}Directory") for place in ("State", "Cache", "Runtime")} == {"antangelmed"}
    ),
    "compiles where it may be run": lambda: (
        "TORCHINDUCTOR_CACHE_DIR=/var/cache/antangelmed/" in " ".join(unit()["Environment"])
    ),
    "works where its state is": lambda: one("WorkingDirectory") == "/var/lib/antangelmed",
    "the engine may die": lambda: one("OOMPolicy") == "continue",
}


@pytest.mark.parametrize("rule", UNIT_RULES)
def test_unit(rule: str) -> None:
    assert UNIT_RULES[rule]()


@pytest.mark.parametrize("drop_in", ["", "npu", "cuda"])
def test_the_unit_starts_what_the_launcher_understands(drop_in: str, tmp_path: Path) -> None:
    files = [UNIT, *([UNIT.with_name(f"{drop_in}.conf")] if drop_in else [])]
    (command,) = unit(*files)["ExecStart"]
    words = shlex.split(command.replace("/etc/antangelmed/serve.yaml", str(UNIT.with_name("serve.yaml.example"))))
    programs = [word for word in words if word.startswith("/opt/antangelmed/")]
    assert [
        program for program in programs if not os.access(program.replace("/opt/antangelmed", str(ROOT)), os.X_OK)
    ] == []
    settings = parse(words[words.index("/opt/antangelmed/serve/launch.sh") + 1 :])
    assert settings.device == (drop_in or "auto")
    assert str(settings.ready_file) == "/run/antangelmed/ready.json"
    if drop_in == "npu":
        allowed = {Path(line.split()[0]).name for line in unit(*files)["DeviceAllow"]}
        assert allowed == {Path(name).name for name in compose()["services"]["npu"]["devices"]}


def installed(folder: Path, *drop_ins: str) -> Path:
    """The unit as it would lie in /etc, its programs being those of this tree."""
    drop = folder / f"{UNIT.name}.d"
    drop.mkdir()
    for file in (UNIT, *(UNIT.with_name(f"{name}.conf") for name in drop_ins)):
        place = folder if file == UNIT else drop
        (place / file.name).write_text(file.read_text().replace("/opt/antangelmed", str(ROOT)))
    return folder / UNIT.name


DROP_INS = [(), ("npu",), ("cuda", "ward-network"), ("npu", "multi-node")]


@pytest.mark.parametrize("drop_ins", DROP_INS)
def test_systemd_understands_the_unit(drop_ins: tuple[str, ...], tmp_path: Path) -> None:
    done = run(tool("systemd-analyze"), "verify", "--man=no", installed(tmp_path, *drop_ins))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("drop_ins", DROP_INS)
def test_systemd_calls_the_unit_safe(drop_ins: tuple[str, ...], tmp_path: Path) -> None:
    if "--offline" not in run(tool("systemd-analyze"), "--help").stdout:
        pytest.skip("this systemd-analyze cannot judge files")
    command = (tool("systemd-analyze"), "security", "--offline=true", "--no-pager")
    done = run(*command, "--threshold=30", installed(tmp_path, *drop_ins))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exposure level" in done.stdout
