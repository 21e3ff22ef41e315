"""Which experts a model's tokens choose, counted while it runs: what a balanced placement is made from.

with expert_loads.recording(model) as loads:
    ...                                              # whatever is typical of the site
write_loads(path, {layer: counts.tolist() for layer, counts in loads.items()})

loads = read_loads(path, config.num_experts)         # on the machine that serves; all of `ops.placement`
placement = {layer: balance(load, ranks=8, slots_per_rank=34) for layer, load in loads.items()}
parallel = Parallel.mesh(world, tensor=8, experts=8, placement=placement)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ascend.model import BailingMoeV2ForCausalLM, Gate
from ops.placement import record


@contextmanager
def recording(model: BailingMoeV2ForCausalLM) -> Iterator[dict[int, Tensor]]:
    """Count the tokens that choose each expert: int64 ``[E]`` on the device, by layer. The host waits for nothing.

    With data-parallel ranks each counts its own tokens; padding is counted too. A captured graph counts nothing.
    """
    loads: dict[int, Tensor] = {}

    def count(layer: int) -> Any:
        def hook(gate: Gate, arguments: Any, output: tuple[Tensor, ...]) -> None:
            counts = record(output[1], model.config.num_experts)
            loads[layer] = loads[layer] + counts if layer in loads else counts

        return hook

    gates = [(i, layer.mlp.gate) for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]
    handles = [gate.register_forward_hook(count(i)) for i, gate in gates]
    try:
        yield loads
    finally:
        for handle in handles:
            handle.remove()
