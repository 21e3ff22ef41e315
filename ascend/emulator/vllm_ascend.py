"""What the real vllm-ascend needs to load on emulated cards, beside torch_npu.

Its C extension is linked against more of CANN than torch_npu is, and built for an older torch: `runtime.py` and
``plugin.c`` let it load and register the schemas of its ops; their kernels are replaced (`overrides`). One kernel of
vLLM itself is Triton's, which has no Ascend compiler here: `SlotMapping` takes its place.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

from torch import Tensor

from ascend.emulator import graphs, log, memory, overrides
from ascend.emulator.kernels.vllm_ascend import SHAPES
from ascend.emulator.limits import Refused


class SlotMapping:
    """vLLM 0.23's Triton kernel `_compute_slot_mapping_kernel`: where the key and value of each new token go."""

    def __getitem__(self, grid: Any) -> Any:
        return self.run

    @staticmethod
    def run(
        num_tokens: int,
        max_num_tokens: int,
        query_start_loc: Tensor,
        positions: Tensor,
        block_table: Tensor,
        block_table_stride: int,
        block_size: int,
        slot_mapping: Tensor,
        *,
        TOTAL_CP_WORLD_SIZE: int,
        TOTAL_CP_RANK: int,
        CP_KV_CACHE_INTERLEAVE_SIZE: int,
        PAD_ID: int,
        BLOCK_SIZE: int,
    ) -> None:
        """Write ``slot_mapping [max_num_tokens]``: block times ``block_size`` plus place in it; the rest is PAD_ID.

        ``query_start_loc [requests + 1]`` cuts ``positions [num_tokens]`` into requests, rows of ``block_table``.
        """
        name = "triton::_compute_slot_mapping_kernel"
        if TOTAL_CP_WORLD_SIZE != 1:
            raise Refused(f"{name}: the emulator has no context parallelism")
        graphs.behind_a_wait(name)
        graphs.refuse_while_capturing(name)
        log.op(name)
        slots, table = memory.alias(slot_mapping), memory.alias(block_table)
        starts, place = memory.alias(query_start_loc).tolist(), memory.alias(positions).long()
        slots[num_tokens:max_num_tokens] = PAD_ID
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            token = slice(start, min(end, num_tokens))
            blocks = table[request].long()[place[token] // block_size]
            slots[token] = blocks * block_size + place[token] % block_size


def install_slot_mapping(module: ModuleType) -> None:
    """Put `SlotMapping` into vLLM's module; what imports it later gets this one."""
    module._compute_slot_mapping_kernel = SlotMapping()  # type: ignore[attr-defined]


def install_ops(module: ModuleType) -> None:
    """Compute the ops of the extension.

    It is built for torch 2.10: the numbers of the dispatch keys it names are one lower in 2.13, so that its own kernels
    and meta kernels lie where nothing looks for them.
    """
    library = overrides.install_namespace("_C_ascend")
    for name, shapes in SHAPES.items():
        library.impl(name, shapes, "Meta")
