"""What vLLM 0.23 to 0.33 lacks for this architecture; found by the entry point group `vllm.general_plugins`.

1. The configuration class. Without it a directory whose config.json has an `auto_map` is refused unless remote code is
   allowed, and one without is not known at all. With it registered, transformers takes it and never looks at the
   `auto_map`. To be dropped when transformers has the class.
2. A model class that leaves out the MTP layers, routes in fp32 and can be drafted for, see `model.py`.
3. Its MTP layers as a draft model, see `mtp.py` and `drafts.py`.
4. On the CPU: a quantization method that widens what vLLM has no kernels for, see `widened.py`.
5. On the CPU: experts over several data parallel ranks, see `experts.py`.
6. One log: vllm-ascend writes a second one, with all that `log_format.py` withholds, see `_keep_to_one_log`.
"""

from __future__ import annotations

import importlib.util
import os

from serve.plugin.drafts import MTP, TARGET, add_draft_config
from serve.plugin.log_format import CONFIG_FILE, VARIABLE


def register() -> None:
    """Register them. vLLM calls this in the API server, the engine core and every worker, maybe more than once."""
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform

    import ascend

    ascend.register()
    # By name: imported only where they are needed.
    ModelRegistry.register_model(TARGET, f"serve.plugin.model:{TARGET}")
    ModelRegistry.register_model(MTP, f"serve.plugin.mtp:{MTP}")
    add_draft_config()
    _keep_to_one_log()
    if current_platform.is_cpu():
        import serve.plugin.experts  # completes vLLM's
        import serve.plugin.widened  # noqa: F401, registers its method


def _keep_to_one_log() -> None:
    """Where the launcher has given the format of the log: no copy of every record in another, below ``~/ascend/log``.

    vllm-ascend 0.23 begins one file there per process, and removes none. It asks for it later than plugins are loaded.
    """
    if os.environ.get(VARIABLE) == str(CONFIG_FILE) and importlib.util.find_spec("vllm_ascend"):
        import vllm_ascend.logger as theirs

        theirs.configure_ascend_file_logging = lambda: None
