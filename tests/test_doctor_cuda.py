"""`serve doctor` on NVIDIA: driver, cards, their memory, NVLink, each sick and well."""

import pytest

from serve.doctor import cuda_cards
from tests.sick_machines import case_name, lay_out, nvidia_smi, recorded, told

NVSWITCH = {"files": {"/dev/nvidia-nvswitchctl": ""}}

# check: what is changed on a healthy machine, and the beginning of a line that it then says.
SICK = {
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
        (
            "cuda",
            nvidia_smi((recorded("nvidia-smi-mismatch.txt"), 18)),
            "error nvidia-smi: the driver was updated while",
        ),
        ("cuda", nvidia_smi((recorded("nvidia-smi-no-driver.txt"), 9)), "error nvidia-smi: no driver is loaded"),
        (
            "cuda",
            nvidia_smi((recorded("nvidia-smi-lost.txt"), 255)),
            "error nvidia-smi: a card does not answer any more",
        ),
        ("cuda", nvidia_smi((recorded("nvidia-smi-no-devices.txt"), 6)), "error nvidia-smi: the driver sees no card"),
        (
            "cuda",
            nvidia_smi(("Field is not valid\n", 2)),
            "unknown health and free memory of the cards (nvidia-smi ended",
        ),
        (
            "cuda",
            nvidia_smi(("", 0)),
            "unknown health and free memory of the cards (nvidia-smi's answer could not be read)",
        ),
        (
            "cuda",
            nvidia_smi("nvidia-smi-ours-h20-trouble.txt"),
            "error not every card is shown (nvidia-smi shows 5 and /dev",
        ),
    ],
    cuda_cards.check_cards: [
        ("cuda", nvidia_smi("nvidia-smi-ours-h20-trouble.txt"), "error card 1: 2 uncorrectable memory errors"),
        ("cuda", nvidia_smi("nvidia-smi-ours-h20-trouble.txt"), "error card 2 is in MIG mode"),
        ("cuda", nvidia_smi("nvidia-smi-ours-h20-trouble.txt"), "unknown card 2: memory errors"),
        ("cuda", nvidia_smi("nvidia-smi-ours-h20-trouble.txt"), "error card 3 answers [GPU requires reset]"),
        ("cuda", nvidia_smi("nvidia-smi-ours-h20-trouble.txt"), "warning card 4 has 91 °C"),
        ("cuda", nvidia_smi("nvidia-smi-ours-h20-trouble.txt"), "note card 4: persistence mode is off"),
    ],
    cuda_cards.check_memory: [
        (
            "cuda",
            nvidia_smi("nvidia-smi-ours-h20-trouble.txt"),
            "warning card 0: 96671 of 97871 MiB are in use, and no",
        ),
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
}
CASES = [(check, *case) for check, cases in SICK.items() for case in cases]


@pytest.mark.parametrize(("check", "device", "changes", "line"), CASES, ids=case_name)
def test_a_sick_machine(check, device, changes, line, tmp_path):
    found = told(check, lay_out(tmp_path, device, **changes))
    assert any(one.startswith(line) for one in found), found


@pytest.mark.parametrize(
    ("visible", "cards"), [(None, {"1", "2", "3", "4"}), ("0", set()), ("0,3", {"3"}), ("GPU-1a2b3c4d", {"1"})]
)
def test_gpus_that_are_left_out_are_not_looked_at(visible, cards, tmp_path):
    changes = {"environ": {"CUDA_VISIBLE_DEVICES": visible}, **nvidia_smi("nvidia-smi-ours-h20-trouble.txt")}
    lines = told(cuda_cards.check_cards, lay_out(tmp_path, "cuda", **changes))
    assert {line.split()[2].rstrip(":") for line in lines if line.split()[1] == "card"} == cards


def test_where_nvidia_smi_fails_it_is_said_once(tmp_path):
    m = lay_out(tmp_path, "cuda", **nvidia_smi((recorded("nvidia-smi-mismatch.txt"), 18)))
    rest = (cuda_cards.check_cards, cuda_cards.check_memory, cuda_cards.check_remapped)
    assert [line for check in rest for line in told(check, m)] == []
