"""What the cards can do on paper: one table, a source beside every figure, and `None` where nobody has said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GiB = 2**30
MiB = 2**20
T = 1e12


@dataclass(frozen=True)
class Figure:
    """One number of a card in ``unit`` (B, B/s, FLOP/s; OP/s for integers) and who says so; None is unknown."""

    value: float | None
    unit: str
    source: str

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        if self.unit == "B":
            return f"{self.value / GiB:.1f} GiB"
        scale, prefix = (1e12, "T") if self.value >= 1e12 else (1e9, "G")
        return f"{self.value / scale:.4g} {prefix}{self.unit}"


@dataclass(frozen=True)
class DeviceFacts:
    """The figures of one card.

    memory: bytes installed, as the vendor's tool lists them; what a process gets is less (`Device.memory`).
    bandwidth: bytes per second between memory and cores.
    peak: dense peak by dtype (bf16, fp16, fp8, int8). A dtype the card does not compute in has no entry.
    driver_names: what drivers call this card, beside its own name.
    per_server: cards that one server holds at most. linked: of these, how many are all linked with one another.
    """

    name: str
    memory: Figure
    bandwidth: Figure
    peak: Mapping[str, Figure] = field(default_factory=dict, hash=False)
    driver_names: tuple[str, ...] = ()
    per_server: int = 8  # Atlas 800 A2, HGX; a chassis of PCIe cards takes as many
    linked: int = 8


def _memory(value: float | None, source: str) -> Figure:
    return Figure(value, "B", source)


def _bandwidth(value: float | None, source: str) -> Figure:
    return Figure(value, "B/s", source)


def _peaks(source: str, **values: float | None) -> dict[str, Figure]:
    return {dtype: Figure(value, "OP/s" if dtype == "int8" else "FLOP/s", source) for dtype, value in values.items()}


def _cube(soc: str, cores: int, clock_hz: float, sold_as: str) -> dict[str, Figure]:
    """Peaks of a 910B: each cube core multiplies 16×16×16 (int8 16×32×16) per cycle, two operations a product."""
    source = (
        f"arithmetic on CANN's own platform_config/{soc}.ini: {cores} cube cores x {clock_hz / 1e9:g} GHz x 8192 "
        f"FLOP (int8 16384) per cycle; no official sheet found, {sold_as}"
    )
    fp16 = cores * clock_hz * 8192
    return _peaks(source, bf16=fp16, fp16=fp16, int8=2 * fp16)


_NO_HBM_SHEET = "no official sheet found"
_BOX16 = 16  # Atlas 200T A2 Box16; that only halves of eight are linked is assumed, no page found says otherwise
_INI_64 = "CANN platform_config, memory_size 64 GiB; the runtime hands out about 61 GiB of it"
_HOPPER_PEAK = "NVIDIA {0} product page (its figures with sparsity, halved)"
_A100_PEAK = "NVIDIA A100 datasheet, dense; no FP8 before Hopper and Ada"
_H20_PEAK = "no NVIDIA sheet found; 148/296 in the LMSYS and Ant Group post of 2025-09-26 (H20-96G against H800-80G)"

UNKNOWN = "not in the table"

_TABLE = (
    DeviceFacts(
        "910B1",
        _memory(64 * GiB, _INI_64),
        _bandwidth(None, f"{_NO_HBM_SHEET}; third parties say 1.6 and 1.8 TB/s"),
        _cube("Ascend910B1", 24, 1.85e9, "sold as 376 or 400 TFLOP/s (sources disagree)"),
        ("Ascend910B1",),
    ),
    DeviceFacts(
        "910B2",
        _memory(64 * GiB, _INI_64),
        _bandwidth(
            1.6 * T, f"{_NO_HBM_SHEET}; nominal 1.6 TB/s in Huawei's msmodeling, a public 910B2 kernel measures 1.40"
        ),
        _cube("Ascend910B2", 24, 1.8e9, "sold as 376 TFLOP/s"),
        ("Ascend910B2",),
    ),
    DeviceFacts(
        "910B2C",
        _memory(64 * GiB, "npu-smi total, 65536 MB, in public listings of servers with 16 of them"),
        _bandwidth(None, f"{_NO_HBM_SHEET}; 1.6 TB/s is only said of the 910B2"),
        _cube("Ascend910B2C", 24, 1.8e9, "no figure of its own"),
        ("Ascend910B2C",),
        per_server=_BOX16,
    ),
    DeviceFacts(
        "910B3",
        _memory(64 * GiB, _INI_64),
        _bandwidth(1.6 * T, f"{_NO_HBM_SHEET}; nominal 1.6 TB/s in Huawei's msmodeling and SGLang's NPU benchmark"),
        _cube("Ascend910B3", 20, 1.8e9, "sold as 313 TFLOP/s"),
        ("Ascend910B3",),
    ),
    DeviceFacts(
        "910B4",
        _memory(32 * GiB, "CANN platform_config/Ascend910B4.ini, memory_size 32 GiB"),
        _bandwidth(0.8 * T, f"{_NO_HBM_SHEET}; 800 GB/s in arXiv 2505.15112 and in Huawei's msmodeling"),
        _cube("Ascend910B4", 20, 1.5e9, "sold as 280 TFLOP/s"),
        ("Ascend910B4",),
    ),
    DeviceFacts(
        "910B4-1",
        _memory(64 * GiB, "npu-smi 25.2.2 total, 65536 MB (vllm-ascend issue 7447); the ini file says 32 GiB"),
        _bandwidth(None, f"{_NO_HBM_SHEET}; not the 0.8 TB/s of the 910B4, a user's copy ran at about 1.5 TB/s"),
        _cube("Ascend910B4-1", 20, 1.5e9, "sold as 280 TFLOP/s"),
        ("Ascend910B4-1",),
    ),
    DeviceFacts(
        "A100-40G",
        _memory(40960 * MiB, "nvidia-smi total, 40960 MiB; sold as 40 GB"),
        _bandwidth(1.555 * T, "NVIDIA A100 datasheet, 40 GB, SXM and PCIe"),
        _peaks(_A100_PEAK, bf16=312 * T, fp16=312 * T, int8=624 * T),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"),
    ),
    DeviceFacts(
        "A100-80G",
        _memory(81920 * MiB, "nvidia-smi total, 81920 MiB; sold as 80 GB"),
        _bandwidth(1.935 * T, "NVIDIA A100 datasheet, 80 GB PCIe; SXM has 2.039 TB/s"),
        _peaks(_A100_PEAK, bf16=312 * T, fp16=312 * T, int8=624 * T),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"),
    ),
    DeviceFacts(
        "A800-80G",
        _memory(81920 * MiB, "nvidia-smi total, 81920 MiB; sold as 80 GB"),
        _bandwidth(None, "no NVIDIA sheet found; taken for an A100 with slower NVLink, which nobody measured here"),
        _peaks("no NVIDIA sheet found; no FP8 on this generation", bf16=None, fp16=None, int8=None),
        ("NVIDIA A800-SXM4-80GB", "NVIDIA A800 80GB PCIe"),
    ),
    DeviceFacts(
        "L20-48G",
        _memory(46068 * MiB, "nvidia-smi total, 46068 MiB; sold as 48 GB"),
        _bandwidth(None, "no NVIDIA sheet found"),
        _peaks("no NVIDIA sheet found; Ada computes in FP8", bf16=None, fp16=None, fp8=None, int8=None),
        ("NVIDIA L20",),
    ),
    DeviceFacts(
        "H20-96G",
        _memory(97871 * MiB, "nvidia-smi total, 97871 MiB; sold as 96 GB"),
        _bandwidth(4.0 * T, "no NVIDIA sheet found; 4000 GB/s in the LMSYS and Ant Group post of 2025-09-26"),
        _peaks(_H20_PEAK, bf16=148 * T, fp16=148 * T, fp8=296 * T, int8=296 * T),
        ("NVIDIA H20",),
    ),
    DeviceFacts(
        "H20-3e-141G",
        _memory(143771 * MiB, "nvidia-smi total, 143771 MiB; sold as 141 GB"),
        _bandwidth(None, "no NVIDIA sheet found; 4.8 TB/s is only inferred from the HBM3e it shares with H200"),
        _peaks(
            "no NVIDIA sheet found; 148/296 is only inferred from the 78 SMs it shares with the H20 of 96 GB",
            bf16=None,
            fp16=None,
            fp8=None,
            int8=None,
        ),
        ("NVIDIA H20-3e",),
    ),
    DeviceFacts(
        "H100-80G",
        _memory(81559 * MiB, "nvidia-smi total, 81559 MiB; sold as 80 GB"),
        _bandwidth(3.35 * T, "NVIDIA H100 product page, SXM"),
        _peaks(_HOPPER_PEAK.format("H100"), bf16=989.5 * T, fp16=989.5 * T, fp8=1979 * T, int8=1979 * T),
        ("NVIDIA H100 80GB HBM3",),
    ),
    DeviceFacts(
        "H800-80G",
        _memory(81559 * MiB, "that of the H100 of 80 GB, which it is with slower NVLink; sold as 80 GB"),
        _bandwidth(None, "no NVIDIA sheet found"),
        _peaks("no NVIDIA sheet found; Hopper computes in FP8", bf16=None, fp16=None, fp8=None, int8=None),
        ("NVIDIA H800",),
    ),
    DeviceFacts(
        "H200-141G",
        _memory(143771 * MiB, "nvidia-smi total, 143771 MiB; sold as 141 GB"),
        _bandwidth(4.8 * T, "NVIDIA H200 product page, SXM"),
        _peaks(_HOPPER_PEAK.format("H200"), bf16=989.5 * T, fp16=989.5 * T, fp8=1979 * T, int8=1979 * T),
        ("NVIDIA H200",),
    ),
    DeviceFacts(
        "CPU",
        _memory(None, "read where it runs: CpuDevice.memory()"),
        _bandwidth(None, "measured where it runs: CpuDevice.measure_bandwidth()"),
        _peaks("depends on the processor; measure it where it runs", bf16=None, fp16=None, int8=None),
    ),
)

TABLE: dict[str, DeviceFacts] = {row.name: row for row in _TABLE}
_BY_NAME = {name.casefold(): row for row in _TABLE for name in (row.name, *row.driver_names)}


def lookup(name: str) -> DeviceFacts:
    """Return the facts of the card a driver calls ``name``; a card not in the table gets a row of unknowns.

    Only whole names match: an "NVIDIA H100 PCIe", an "NVIDIA H200 NVL" or an "Ascend910_9392" is another card with
    other figures, and a MIG slice is a part of one.
    """
    row = _BY_NAME.get(" ".join(name.split()).casefold())
    return row or DeviceFacts(name, _memory(None, UNKNOWN), _bandwidth(None, UNKNOWN))
