"""BailingMoeV2 (Ling 2.0, AntAngelMed): one model implementation on CPU, CUDA and NPU.

`load_model` → a model; ``model(input_ids)`` → logits; `generate` → tokens. Read `config.py`, `model.py`, `loader.py`
and `generation.py` in this order. Importing this package costs nothing: torch comes with the first name that needs it,
and once transformers is imported too, its Auto classes know the architecture, with ``trust_remote_code`` off.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ascend.config import BailingMoeV2Config
    from ascend.eagle3 import load_eagle3
    from ascend.generation import generate
    from ascend.loader import load_model
    from ascend.model import BailingMoeV2ForCausalLM

__version__ = "0.1.0"
__all__ = ["BailingMoeV2Config", "BailingMoeV2ForCausalLM", "generate", "load_eagle3", "load_model", "register"]

_HOMES = {
    "BailingMoeV2Config": "ascend.config",
    "BailingMoeV2ForCausalLM": "ascend.model",
    "generate": "ascend.generation",
    "load_eagle3": "ascend.eagle3",
    "load_model": "ascend.loader",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ascend' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def register() -> None:
    """Tell transformers' `AutoConfig` and `AutoModelForCausalLM` about the architecture. May be called again."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ascend.config import BailingMoeV2AliasConfig, BailingMoeV2Config
    from ascend.model import BailingMoeV2AliasForCausalLM, BailingMoeV2ForCausalLM

    pairs = (
        (BailingMoeV2Config, BailingMoeV2ForCausalLM),
        (BailingMoeV2AliasConfig, BailingMoeV2AliasForCausalLM),
    )
    for config, model in pairs:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


class _RegisterOnImport(MetaPathFinder):
    """Registers the architecture right after transformers is first imported, which takes seconds and may never come.

    Where one of the two modules that `register` needs is what imports transformers, it is done right after that one.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ("transformers", "ascend.config", "ascend.model"):
            return None
        # Only looked for, as many libraries do, it is not imported yet: the finder stays until the module has run.
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                run(module)
                register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


if "transformers" in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
