"""Which batch sizes are captured as graphs: few, as streams run out, and multiples of what a step must be one of."""

from __future__ import annotations

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
LARGEST = 512  # vllm_ascend/platform.py:241; vLLM's own limit is the same


def capture_sizes(sequences: int, drafts: int, multiple: int, step_tokens: int) -> tuple[int, ...]:
    """Return the sizes in tokens, rising: whole sequences with their drafts, each a multiple of ``multiple``.

    The last covers ``sequences`` where `LARGEST` and a step's tokens allow it; larger batches run without a graph.
    """
    per_sequence = drafts + 1
    sizes = set()
    for batch in {*(one for one in BATCHES if one < sequences), sequences}:
        size = batch * per_sequence
        while size % multiple:
            size += per_sequence
        if size <= min(LARGEST, step_tokens):
            sizes.add(size)
    return tuple(sorted(sizes))


def default_sizes(sequences: int, drafts: int) -> tuple[int, ...]:
    """What vLLM itself captures where nothing is said (vllm/config/vllm.py, `_set_cudagraph_sizes`)."""
    most = min(2 * sequences * (drafts + 1), LARGEST)
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST + 1, 16))
    return tuple(size for size in sizes if size <= most)
