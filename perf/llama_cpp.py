"""llama.cpp through llama-cpp-python, as an engine of `perf decode`: a batch of sequences in one context, greedy.

As it comes, which is: all weights read into memory (not mapped), repacked where the build can (it can for some
quantised formats, and on processors with AMX for BF16), flash attention where it decides so, KV cache in fp16, one
stream of the cache per sequence. A model that is to run in fp32 gets an fp32 cache and no flash attention.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ascend.errors import UserError
from perf.engines import Engine, Setting
from perf.gguf import write_gguf

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAD = 256  # llama.cpp rounds the cells of a sequence up to this


class LlamaCpp(Engine):
    """One model and one context. Logits are views of llama.cpp's own buffer, good until the next step."""

    def __init__(self, setting: Setting) -> None:
        if setting.device != "cpu":
            raise UserError(f"engine llama.cpp: it runs on the cpu only here, not on {setting.device}")
        if setting.quantise is not None:
            raise UserError("engine llama.cpp: it runs unquantised only")
        if setting.random:
            raise UserError("engine llama.cpp needs a checkpoint: its weights come from a file")
        try:
            import gguf  # noqa: F401
            import llama_cpp
        except ImportError:
            raise UserError(
                "engine llama.cpp needs: pip install llama-cpp-python gguf (compiles about 10 minutes)"
            ) from None
        self.lib: Any = llama_cpp
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        with tempfile.TemporaryDirectory(prefix="llama-cpp-") as scratch:
            file = Path(scratch) / "model.gguf"
            write_gguf(setting.model, file, setting.dtype)
            self.model = self._load(file)
        self.context = self._context(setting)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(setting.max_batch * setting.max_length, 0, 1)
        self.length = 0

    def generate(self, prompts: list[list[int]], new_tokens: int) -> int:
        """See `Engine.generate`."""
        made = [self.prefill(prompts).argmax(-1)]
        for _ in range(new_tokens - 1):
            made.append(self.step(made[-1]).argmax(-1))
        return sum(len(one) for one in made)

    def prefill(self, prompts: list[list[int]]) -> NDArray[Any]:
        """Forget everything, take in prompts of one length, return the logits after them, float32 [B, V]."""
        import numpy as np

        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        self.length = 0
        return self._decode(np.asarray(prompts))

    def step(self, token_B: NDArray[Any]) -> NDArray[Any]:
        """Take in one more token of every sequence, return the logits after it, float32 [B, V]."""
        return self._decode(token_B[:, None])

    def _decode(self, token_BT: NDArray[Any]) -> NDArray[Any]:
        import numpy as np

        rows, columns = token_BT.shape
        count = rows * columns
        fill = {
            "token": token_BT.ravel(),
            "pos": np.tile(np.arange(self.length, self.length + columns), rows),
            "n_seq_id": np.ones(count),
            "logits": np.tile(np.arange(columns) == columns - 1, rows),
        }
        for name, values in fill.items():
            np.ctypeslib.as_array(getattr(self.batch, name), (count,))[:] = values
        for index in range(count):
            self.batch.seq_id[index][0] = index // columns
        self.batch.n_tokens = count
        if code := self.lib.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode ended with code {code} at {rows} x {columns} tokens")
        self.length += columns
        logits = self.lib.llama_get_logits(self.context)  # waits until all is computed
        return np.ctypeslib.as_array(logits, (rows, self.vocab_size))

    def _load(self, file: Path) -> Any:
        parameters = self.lib.llama_model_default_params()
        parameters.load_mode = self.lib.LLAMA_LOAD_MODE_NONE  # the file goes when it is loaded
        parameters.n_gpu_layers = 0
        model = self.lib.llama_model_load_from_file(str(file).encode(), parameters)
        if not model:
            raise UserError("engine llama.cpp: it cannot load this model; run again with --verbose to see why")
        return model

    def _context(self, setting: Setting) -> Any:
        parameters = self.lib.llama_context_default_params()
        parameters.n_ctx = setting.max_batch * -(-setting.max_length // PAD) * PAD
        parameters.n_batch = setting.max_batch * setting.max_length
        parameters.n_seq_max = setting.max_batch
        parameters.n_threads = parameters.n_threads_batch = setting.threads
        if setting.dtype == "float32":  # flash attention rounds to fp16 whatever the cache is in
            parameters.type_k = parameters.type_v = self.lib.GGML_TYPE_F32
            parameters.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = self.lib.llama_init_from_model(self.model, parameters)
        if not context:
            raise UserError("engine llama.cpp: no context of this size; run again with --verbose to see why")
        return context
