"""The keys and values of each sequence, from a contiguous tensor or from the blocks of a paged cache.

Shapes: B sequences, S key slots of each, L of them in use, G key-value heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend.emulator.limits import Refused, require, require_dim, require_dtype, require_shape

Pair = tuple[Tensor, Tensor]
"""Keys and values ``[L, G, D]`` of one sequence."""


def per_sequence(op: str, name: str, lengths: list[int], sequences: int, longest: int) -> list[int]:
    """One length per sequence: a single one counts for all, more than needed are cut off."""
    require(len(lengths) == 1 or len(lengths) >= sequences, op, f"{name} has {len(lengths)} for {sequences} sequences")
    lengths = list(lengths) * sequences if len(lengths) == 1 else list(lengths[:sequences])
    require(all(0 <= n <= longest for n in lengths), op, f"{name} {lengths} is not within 0..{longest}")
    return lengths


def contiguous_kv(
    op: str, key: Tensor, value: Tensor, layout: str, sequences: int, G: int, D: int, lengths: list[int] | None
) -> list[Pair]:
    """From tensors in the layout of the query; in TND ``lengths`` are cumulative."""
    require_shape(op, "value", value, key.shape)
    require_dim(op, "key", key, 3 if layout in ("BSH", "TND") else 4)
    if layout == "TND":
        require_shape(op, "key", key, [len(key), G, D])
        if lengths is None or len(lengths) != sequences:
            raise Refused(f"{op}: actual_seq_lengths_kv does not give one cumulative length per sequence (TND)")
        starts = [0, *lengths[:-1]]
        rising = all(start <= end for start, end in zip(starts, lengths, strict=True)) and lengths[-1] <= len(key)
        require(rising, op, f"actual_seq_lengths_kv {lengths} is not cumulative up to {len(key)}; TND without blocks")
        return [(key[start:end], value[start:end]) for start, end in zip(starts, lengths, strict=True)]
    if layout == "BSH":
        require(key.shape[-1] == G * D, op, f"key has H {key.shape[-1]}; {G} heads of {D} are needed")
        key, value = key.unflatten(-1, (G, D)), value.unflatten(-1, (G, D))
    elif layout == "BNSD":
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    S = key.shape[1]
    require_shape(op, "key (as BSND)", key, [sequences, S, G, D])
    lengths = per_sequence(op, "actual_seq_lengths_kv", lengths or [S], sequences, S)
    return [(k[:n], v[:n]) for k, v, n in zip(key, value, lengths, strict=True)]


def paged_kv(
    op: str,
    key: Tensor,
    value: Tensor,
    layout: str,
    sequences: int,
    G: int,
    D: int,
    lengths: list[int] | None,
    block_table: Tensor,
    block_size: int,
    single: bool,
) -> list[Pair]:
    """From caches ``[blocks, block_size, G·D]`` or (BNSD and TND) ``[blocks, G, block_size, D]``; lengths per sequence.

    ``single``: one new token per sequence outside TND, for which smaller blocks are allowed.
    """
    require_dtype(op, "block_table", block_table, torch.int32)
    require_dim(op, "block_table", block_table, 2)
    if layout == "TND":
        right = 0 < block_size <= 1024 and block_size % 16 == 0
    else:
        right = 0 < block_size <= 512 and block_size % (16 if single else 128) == 0
    require(right, op, f"block_size is {block_size}; 128 is right everywhere (TND: by 16 to 1024, else by 128 to 512)")
    require_dim(op, "key", key, 3, *((4,) if layout in ("BNSD", "TND") else ()))
    blocks = key.shape[0]
    require_shape(op, "key", key, [blocks, block_size, G * D] if key.dim() == 3 else [blocks, G, block_size, D])
    require_shape(op, "value", value, key.shape)
    require(key.dim() == 4 or G * D <= 65535, op, f"{G} heads of {D} are over 65535 in one row; use the 4-D cache")
    if lengths is None:
        raise Refused(f"{op}: actual_seq_lengths_kv is missing; a block_table needs it, per sequence")
    require(block_table.shape[0] == sequences, op, f"block_table has {block_table.shape[0]} rows of {sequences}")
    lengths = per_sequence(op, "actual_seq_lengths_kv", lengths, sequences, block_table.shape[1] * block_size)
    if key.dim() == 3:
        key, value = key.unflatten(-1, (G, D)), value.unflatten(-1, (G, D))
    else:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    pairs = []
    for row, length in zip(block_table.long(), lengths, strict=True):
        used = row[: -(-length // block_size)]
        known = bool(((used >= 0) & (used < blocks)).all())
        require(known, op, f"block_table points outside the {blocks} blocks; the device would read foreign memory")
        pairs.append((key[used].flatten(0, 1)[:length], value[used].flatten(0, 1)[:length]))
    return pairs
