"""`serve doctor` as a whole: healthy machines, tools that hang, the launcher's quick part, the command."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ascend.devices import Host
from ascend.errors import UserError
from serve import doctor
from serve.doctor import checks, cuda_cards, machine, model_files, npu_cards, packages, ports, system
from serve.doctor.checks import CHECKS, examine
from serve.doctor.finding import LEVELS
from serve.doctor.machine import Asked, Machine
from tests import test_doctor_cuda, test_doctor_host, test_doctor_npu
from tests.launcher import free_port, wait_for
from tests.sick_machines import HANGS, lay_out, npu_smi, nvidia_smi, told

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("device", "asked"), [("npu", {"nodes": 2, "network_interface": "eth0"}), ("cuda", {}), ("cpu", {})]
)
def test_a_healthy_machine(device, asked, tmp_path):
    """Nothing is wrong or unknown but the holes of vLLM 0.23, the newest that vLLM-Ascend has."""
    found = list(examine(lay_out(tmp_path, device, asked=asked)))
    wrong = [str(one) for one in found if one.level not in ("ok", "note") and one.check != "holes"]
    assert [line[:27] for line in wrong] == (["whether driver 25.3.rc1 is "] if device == "npu" else [])
    levels = Counter(one.level for one in found)
    assert levels["ok"] > 15
    assert levels["warning"] == (5 if device == "npu" else 0)


def test_every_check_has_a_sick_machine():
    elsewhere = {
        packages.check_python,
        packages.check_pairing,
        packages.check_pins,
        packages.check_holes,
        system.check_disk,
        ports.check_port,
        model_files.check_files,
        model_files.check_code,
        model_files.check_rights,
        model_files.check_room,
    }
    sick = {*test_doctor_npu.SICK, *test_doctor_cuda.SICK, *test_doctor_host.SICK}
    assert {row.check for row in CHECKS} == sick | elsewhere


CHOSEN = [("npu", "ASCEND_RT_VISIBLE_DEVICES"), ("cuda", "CUDA_VISIBLE_DEVICES")]


@pytest.mark.parametrize(("device", "variable"), CHOSEN)
def test_a_card_that_is_not_shown_is_no_error_where_cards_were_chosen(device, variable, tmp_path):
    fewer = (
        npu_smi("npu-smi-24.1.rc1-910b3-cut-off.txt")
        if device == "npu"
        else nvidia_smi("nvidia-smi-ours-h20-trouble.txt")
    )
    check = npu_cards.check_npu_smi if device == "npu" else cuda_cards.check_nvidia_smi
    m = lay_out(tmp_path, device, environ={variable: "0"}, **fewer)
    assert told(check, m)[0].startswith("warning not every card is shown")


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_tool_that_hangs_is_ended_with_its_children(tmp_path):
    m = lay_out(tmp_path, **npu_smi(HANGS))
    begin = time.monotonic()
    answer = m.run("npu-smi", "info", seconds=0.3)
    assert (answer.problem, time.monotonic() - begin < 2) == ("gave no answer within 0 s", True)
    assert wait_for(lambda: not is_running((tmp_path / "child").read_text().strip()), 2)
    assert m.run("npu-smi", "info", "-t", "ecc", "-i", "0").problem == "was not asked again: it hung before"
    m.answers[("npu-smi", "info")] = answer
    assert told(npu_cards.check_npu_smi, m)[0].startswith(
        "unknown health and free memory of the cards (npu-smi gave no"
    )


def test_time_that_is_used_up_is_said(tmp_path):
    m = lay_out(tmp_path, quick=True)
    m.seconds_used = machine.QUICK_SECONDS - 0.05
    assert m.run("npu-smi", "info").problem == "was not asked: the time for quick checks is used up"
    assert told(npu_cards.check_npu_smi, m)[0].startswith("unknown health and free memory of the cards")


def test_a_tool_is_asked_once(tmp_path):
    m = lay_out(tmp_path)
    first = m.run("npu-smi", "info")
    (tmp_path / "bin" / "npu-smi").unlink()
    assert m.run("npu-smi", "info") is first
    assert m.run("npu-smi", "other").is_missing


def test_room_where_a_folder_is_still_to_be_made(tmp_path):
    m = Machine(Asked(), Host(tmp_path))
    assert m.free_bytes("/not/yet/there") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_a_check_that_fails_itself_is_told(tmp_path, monkeypatch):
    def check_broken(m):
        yield from ()
        raise KeyError("MemTotal")

    monkeypatch.setattr(checks, "CHECKS", (checks.Row(check_broken), *CHECKS[:1]))
    found = list(examine(lay_out(tmp_path, "cpu")))
    assert [(one.level, one.check) for one in found] == [("unknown", "broken"), ("ok", "python")]
    assert "KeyError" in str(found[0])


def test_what_tools_say_cannot_steer_the_terminal():
    line = str(doctor.Finding("error", "card\x1b[2J", "why\nerror forged", "do"))
    assert line == "card [2J (why error forged); do"


def test_the_launcher_s_part_is_quick(tmp_path, monkeypatch):
    """Tools that hang cost it their time together and no more; what takes longer is not looked at."""
    assert machine.QUICK_SECONDS == 8
    monkeypatch.setattr(machine, "QUICK_SECONDS", 0.3)
    m = lay_out(tmp_path, quick=True, **npu_smi(HANGS))
    found = list(examine(m))
    assert 0.3 <= m.seconds_used < 1.5
    assert [one.check for one in found if one.level == "unknown"] == ["driver", "npu_smi", "wheel"]
    assert {one.check for one in found}.isdisjoint(row.check.__name__[6:] for row in CHECKS if row.is_slow)


def test_errors_come_in_an_order_that_helps(tmp_path):
    """On a bare machine the first error, which the launcher shows, is the first thing to do."""
    errors = [one for one in doctor.findings("npu", quick=True, machine=Host(tmp_path, {}, ())) if one.level == "error"]
    assert [one.check for one in errors][:2] == ["device", "device"]
    assert str(errors[0]).startswith("torch_npu is not installed (")


def run(*arguments, **environ):
    """Run the command in a fresh interpreter; return (exit code, standard output, standard error)."""
    code = (
        "import sys; from ascend.errors import run_command; from serve.doctor import main;"
        "code = run_command(lambda: main(sys.argv[1:]));"
        "print(*({'torch', 'transformers', 'numpy', 'vllm'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr.strip()


def test_the_command_here():
    """This machine is ready for the CPU, and told what it lacks for an NPU; torch is never imported."""
    port = str(free_port())
    code, out, heavy = run("--device", "cpu", "--json", "--port", port)
    document = json.loads(out.splitlines()[-1])
    assert (code, document["is_ready"], document["device"], heavy) == (0, True, "cpu", "")
    assert {one["level"] for one in document["findings"]} <= set(LEVELS)
    assert all(set(one) == {"level", "what", "why", "remedy", "check"} for one in document["findings"])
    if any(Path("/dev").glob("davinci*")):
        pytest.skip("this machine has an NPU: what it lacks for one is not known here")
    code, out, heavy = run("--device", "npu", "--port", port)
    lines = out.splitlines()
    assert (code, lines[0], heavy) == (2, "device npu", "")
    assert [line for line in lines if line.startswith("error   no Ascend driver: /dev/davinci_manager is missing")]
    assert lines[-1].startswith("not ready: a launch on npu would fail (")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--devcie", "cpu"], "unknown argument '--devcie' (did you mean '--device'?)"),
        (["--device", "npx"], "unknown device 'npx' (did you mean 'npu'?): choose one of auto, npu, cuda, cpu"),
        (["--port", "70000"], "argument --port: '70000' is not a port, a number from 1 to 65535"),
        (["--nodes", "0"], "argument --nodes: '0' is not a whole number from 1 on"),
    ],
)
def test_mistakes_in_the_flags(arguments, line):
    with pytest.raises(UserError) as error:
        doctor.main(arguments)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    ("nodes", "device"),
    [(["/dev/davinci0", "/dev/nvidia0"], "npu"), (["/dev/nvidiactl"], "cuda"), (["/dev/null"], "cpu")],
)
def test_auto_goes_by_the_device_nodes(nodes, device, tmp_path):
    from serve.doctor.command import _device

    assert _device("auto", lay_out(tmp_path, "cpu", nodes=nodes).host)[0] == device
