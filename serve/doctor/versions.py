"""Which releases belong together on Ascend: one table, a source beside every row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.doctor.holes import release

PYTHON = ((3, 10), (3, 13))  # from, below: setup.py, and vllm-ascend v0.23.0


@dataclass(frozen=True)
class Pairing:
    """What a release of vLLM-Ascend is built for and tested with; distributions by name, CANN (toolkit and NNAL) apart.

    must: another release does not load, or not work. tested: another release may work, and nobody has said so.
    """

    vllm_ascend: str
    must: Mapping[str, str]
    tested: Mapping[str, str]
    cann: str
    source: str


_POLICY = "vllm-ascend v0.23.0, docs/source/community/versioning_policy.md"

PAIRINGS = (
    Pairing(
        "0.23.0",
        {"vllm": "0.23.0", "torch": "2.10.0", "torch-npu": "2.10.0.post4"},
        {"triton-ascend": "3.2.2", "transformers": "5.5.4"},
        "9.1.0",
        "vllm-ascend v0.23.0, requirements.txt, Dockerfile and installation.md (its versioning_policy.md still says "
        "CANN 9.0.1, torch-npu 2.10.0.post2 and triton-ascend 3.2.1)",
    ),
    Pairing(
        "0.18.0",
        {"vllm": "0.18.0", "torch": "2.9.0", "torch-npu": "2.9.0"},
        {},
        "8.5.1",
        _POLICY,
    ),
    Pairing(
        "0.13.0",
        {"vllm": "0.13.0", "torch": "2.8.0", "torch-npu": "2.8.0"},
        {},
        "8.5.0",
        _POLICY,
    ),
    Pairing(
        "0.11.0",
        {"vllm": "0.11.0", "torch": "2.7.1", "torch-npu": "2.7.1"},
        {},
        "8.3.RC2",
        _POLICY,
    ),
)
LATEST = PAIRINGS[0]  # what this project runs


def pairing(vllm_ascend: str) -> Pairing | None:
    """Return the row of a release of vLLM-Ascend, "0.23.0.post1" or "0.23.0rc1" included; None if it has none."""
    return next((row for row in PAIRINGS if release(row.vllm_ascend) == release(vllm_ascend)), None)


def is_same_release(one: str, other: str) -> bool:
    """Whether two versions differ in nothing but what is after the release, as in "2.10.0.post4" and "2.10.0+cpu"."""
    return release(one) == release(other) and bool(release(one))
