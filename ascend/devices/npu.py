"""Huawei Ascend cards through torch_npu: torch_npu, its torch, CANN, the driver and a card all have to be there."""

from __future__ import annotations

import re
from itertools import pairwise, takewhile
from typing import Any

from ascend.devices.base import Accelerator, Problem, last_line, number_from

# torch-npu by the torch it is built for: the pairs this project is run with.
TORCH_NPU = {"2.10.0": "2.10.0.post4", "2.13.0": "2.13.0"}
CANN = "9.1.0"
SERVING_TORCH = "2.10.0"  # what vLLM-Ascend 0.23 is built for
INSTALL = f"pip install torch=={SERVING_TORCH} torch-npu=={TORCH_NPU[SERVING_TORCH]} in an environment of its own"
# CANN's installer, newest layout first: as root, then for one user.
SET_ENV = (
    "/usr/local/Ascend/cann/set_env.sh",
    "/usr/local/Ascend/ascend-toolkit/set_env.sh",
    "{home}/Ascend/cann/set_env.sh",
    "{home}/Ascend/ascend-toolkit/set_env.sh",
)
DRIVER_VERSION = "/usr/local/Ascend/driver/version.info"
CANN_VERSION = ("version.cfg", "ascend_toolkit_install.info", "compiler/version.info")  # older and newer layouts
CONTAINER = "--device /dev/davinci0 --device /dev/davinci_manager --device /dev/devmm_svm --device /dev/hisi_hdc"


class NpuDevice(Accelerator):
    """An Ascend 910B."""

    type = "npu"
    label = "NPU"
    collective_backend = "hccl"

    def quantised_formats(self, index: int | None = None) -> tuple[str, ...]:
        """Return INT8 and INT4 formats: no op of the 910B computes in FP8."""
        return ("w8a8", "w4a16")

    def software(self) -> dict[str, str]:
        """Return the driver's version from its installer's file, and CANN's from the toolkit that is sourced."""
        found: dict[str, str] = {}
        toolkit = self.host.environ.get("ASCEND_HOME_PATH", "")
        for name, files in (("driver", (DRIVER_VERSION,)), ("cann", [f"{toolkit}/{file}" for file in CANN_VERSION])):
            texts = (re.search(r"(?im)^version\s*=\s*\[?([\w.]+)", self.host.text(file)) for file in files)
            version = next((text.group(1) for text in texts if text), None)
            found |= {name: version} if version else {}
        return found

    def watts(self, index: int | None = None) -> float | None:
        """Return the card's draw; npu-smi counts all cards, ASCEND_RT_VISIBLE_DEVICES may have renumbered them."""
        visible = re.findall(r"\d+", self.host.environ.get("ASCEND_RT_VISIBLE_DEVICES", ""))
        card = self._at(index)
        shown = int(visible[card]) if card < len(visible) else card
        return number_from(("npu-smi", "info", "-t", "power", "-i", str(shown)), r"Power[^:\n]*\(W\)\s*:\s*([\d.]+)")

    def why_unavailable(self) -> Problem | None:
        """Return the first thing missing, from Python's side down to the card; torch is imported only if none is."""
        return self._packages() or self._cann() or self._cards() or self._start()

    def _packages(self) -> Problem | None:
        torch_npu, torch = self.host.package("torch_npu"), self.host.package("torch")
        if torch_npu is None:
            return Problem("torch_npu is not installed", f"on a machine with an Ascend card run {INSTALL}")
        if torch is None:
            return Problem("torch is not installed", f"run {INSTALL}")
        needed, found = _release(torch_npu.version), _release(torch.version)
        if needed == found:
            return None
        other = f", or torch-npu=={TORCH_NPU[found]} for this torch" if found in TORCH_NPU else ""
        return Problem(
            f"torch_npu {torch_npu.version} does not match torch {torch.version}: it is built for torch {needed}",
            f"pip install torch=={needed}{other}",
        )

    def _cann(self) -> Problem | None:
        environ = self.host.environ
        scripts = [script.format(home=environ.get("HOME", "/root")) for script in SET_ENV]
        script = next((script for script in scripts if self.host.path(script).exists()), None)
        remedy = f"source {script}" if script else f"install CANN {CANN}, then source {SET_ENV[0]}"
        for variable in ("ASCEND_HOME_PATH", "ASCEND_OPP_PATH"):
            value = environ.get(variable)
            if not value:
                return Problem(f"CANN is not sourced: {variable} is not set", remedy)
            if not self.host.path(value).exists():
                return Problem(f"CANN is not where {variable} says: there is no {value}", remedy)
        return None

    def _cards(self) -> Problem | None:
        if not self.host.nodes("davinci_manager"):
            return Problem(
                "no Ascend driver: /dev/davinci_manager is missing",
                f"install the driver until npu-smi info lists the cards; into a container pass {CONTAINER}",
            )
        cards = len(self.host.nodes(r"v?davinci\d+"))
        if not cards:
            return Problem(
                "no Ascend card is visible: the driver is there, but no /dev/davinci0 or other card",
                f"check npu-smi info; into a container pass {CONTAINER}",
            )
        visible = self.host.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        if visible is not None and not _shows_a_card(visible, cards):
            return Problem(
                f"ASCEND_RT_VISIBLE_DEVICES='{visible}' hides every card",
                f"unset it, or list indices from 0 to {cards - 1} in rising order, such as ASCEND_RT_VISIBLE_DEVICES=0",
            )
        return None

    def _start(self) -> Problem | None:
        try:
            count = self.count()
        except Exception as error:
            return Problem(
                f"torch_npu does not load: {last_line(error)}",
                "python -c 'import torch_npu' shows it whole; check the CANN release and the driver's libraries",
            )
        if count:
            return None
        return Problem(
            "torch_npu finds no card although the driver shows one",
            "check npu-smi info, and that this user is in the driver's group (HwHiAiUser)",
        )

    def _api(self) -> Any:
        import torch_npu

        return torch_npu.npu  # torch.npu is this module

    def _new_graph(self) -> Any:
        return self._api().NPUGraph()


def _release(version: str) -> str:
    """Return "2.10.0" of "2.10.0.post4" or "2.10.0+cpu": torch_npu's release names the torch it is built for."""
    return re.sub(r"[^\d.].*", "", version).rstrip(".")


def _shows_a_card(visible: str, cards: int) -> bool:
    """Say whether torch_npu finds a card behind this ASCEND_RT_VISIBLE_DEVICES.

    As torch_npu reads it: the indices before the first other character and before the first there is no card for; and
    none at all unless they rise.
    """
    digits = re.sub(r"[^\d,].*", "", visible).split(",")
    indices = [int(index) for index in takewhile(bool, digits)]
    shown = list(takewhile(lambda index: index < cards, indices))
    return bool(shown) and all(low < high for low, high in pairwise(shown))
