"""NVIDIA cards through torch's own CUDA build."""

from __future__ import annotations

import re
from typing import Any

from ascend.devices.base import Accelerator, Problem, last_line, number_from

# The oldest driver of each CUDA major release (docs.nvidia.com/deploy/cuda-compatibility, minor version
# compatibility). It explains a failure and never decides one: NVIDIA's forward compatibility packages run newer
# CUDA on older drivers.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
FP8_CAPABILITY = (8, 9)  # Ada, then Hopper: the first tensor cores with FP8


class CudaDevice(Accelerator):
    """An NVIDIA GPU."""

    type = "cuda"
    label = "CUDA device"
    collective_backend = "nccl"

    def quantised_formats(self, index: int | None = None) -> tuple[str, ...]:
        """Return INT8 and INT4 formats, and FP8 where the tensor cores have it."""
        has_fp8 = self._api().get_device_capability(self._at(index)) >= FP8_CAPABILITY
        return ("fp8", "w8a8", "w4a16") if has_fp8 else ("w8a8", "w4a16")

    def software(self) -> dict[str, str]:
        """Return the driver's version and the CUDA release that torch is built with."""
        driver, cuda = self._driver(), self._torch_cuda()
        return ({"driver": driver} if driver else {}) | ({"cuda": cuda} if cuda else {})

    def watts(self, index: int | None = None) -> float | None:
        """Return the card's draw by its UUID, since CUDA_VISIBLE_DEVICES may renumber the cards."""
        uuid = f"GPU-{self._api().get_device_properties(self._at(index)).uuid}"
        query = ("nvidia-smi", f"--id={uuid}", "--query-gpu=power.draw", "--format=csv,noheader,nounits")
        return number_from(query, r"([\d.]+)")

    def why_unavailable(self) -> Problem | None:
        """Return the first thing missing, from the driver up to torch; torch is imported only if none is."""
        return self._cards() or self._packages() or self._start()

    def _cards(self) -> Problem | None:
        if not self.host.nodes("nvidiactl"):
            return Problem(
                "no NVIDIA driver: /dev/nvidiactl is missing",
                "install the driver until nvidia-smi lists the cards; start a container with --gpus all",
            )
        cards = len(self.host.nodes(r"nvidia\d+"))
        if not cards:
            return Problem(
                "no NVIDIA card is visible: the driver is there, but no /dev/nvidia0 or other card",
                "check nvidia-smi; start a container with --gpus all",
            )
        visible = self.host.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and not _shows_a_card(visible, cards):
            return Problem(
                f"CUDA_VISIBLE_DEVICES='{visible}' hides every card",
                f"unset it, or list indices from 0 to {cards - 1}, such as CUDA_VISIBLE_DEVICES=0",
            )
        return None

    def _packages(self) -> Problem | None:
        torch = self.host.package("torch")
        if torch is None:
            return Problem("torch is not installed", "pip install a CUDA build of torch")
        if self._torch_cuda() is None:
            return Problem(
                f"torch {torch.version} is a CPU build",
                f"install the CUDA build of torch {torch.version.split('+')[0]} in its place",
            )
        return None

    def _torch_cuda(self) -> str | None:
        """Return the CUDA release torch is built with ("13.0"), from its version file; None for a CPU build."""
        torch = self.host.package("torch")
        try:
            text = torch.locate_file("torch/version.py").read_text()
        except OSError:
            return None if torch.version.endswith("+cpu") else ""
        built = re.search(r"^cuda\b[^=\n]*=\s*'([\d.]+)'", text, re.MULTILINE)
        return built.group(1) if built else None

    def _driver(self) -> str | None:
        """Return the driver's version ("580.159.04") as the kernel tells it, None where it does not."""
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", self.host.text("/proc/driver/nvidia/version"))
        return found.group(1) if found else None

    def _start(self) -> Problem | None:
        try:
            api = self._api()
            if api.is_available():
                return None
            api.init()
            detail = "it finds no card"
        except Exception as error:
            detail = last_line(error)
        return self.start_failure(detail)

    def start_failure(self, detail: str) -> Problem:
        """Return why torch could not start CUDA: the driver's age if it is too old, else ``detail``, torch's words."""
        cuda = self._torch_cuda() or ""
        found = self._driver()
        oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0])) if cuda[:1].isdigit() else None
        if found and oldest and int(found.split(".")[0]) < oldest:
            torch = self.host.package("torch").version
            return Problem(
                f"the NVIDIA driver {found} is too old for torch {torch}: CUDA {cuda} needs driver {oldest} or newer",
                "update the driver, or install a torch built for an older CUDA",
            )
        whole = "python -c 'import torch; torch.cuda.init()' shows it whole"
        return Problem(f"torch cannot start CUDA: {detail}", whole)

    def _api(self) -> Any:
        import torch

        return torch.cuda

    def _new_graph(self) -> Any:
        return self._api().CUDAGraph()


def _shows_a_card(visible: str, cards: int) -> bool:
    """Say whether CUDA may find a card behind this CUDA_VISIBLE_DEVICES, which it reads up to the first it lacks."""
    first = visible.split(",")[0].strip()
    number = re.match(r"\+?\d+", first)
    return first.startswith(("GPU-", "MIG-")) or (number is not None and int(number.group()) < cards)
