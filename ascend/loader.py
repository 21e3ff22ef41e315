"""Checkpoint to model and back: one table of names, tensors read by mmap one at a time into their place.

Plain checkpoints and quantised ones alike: what is quantised is allocated so and filled with what is stored.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from ascend.checkpoint import INDEX, SINGLE, Checkpoint, TensorEntry, open_checkpoint
from ascend.config import BailingMoeV2AliasConfig, BailingMoeV2Config
from ascend.devices import get_device
from ascend.errors import UserError, suggest
from ascend.model import BailingMoeV2ForCausalLM
from ascend.module_formats import CONVERT, ModuleFormat, check_described, check_division, module_formats, take_formats
from ascend.parallel import Parallel
from ascend.pieces import Piece, checkpoint_pieces, checkpoint_tensors, units_of
from ascend.progress import Progress
from ascend.quantisation import check_computes, check_format, check_on, quantise_model
from ascend.stored import PLAIN, StoredWeight, stored_weights

HUGE_PAGE_BYTES = 2 << 20

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
STORED = DTYPES | {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}
CONFIGS = {config.model_type: config for config in (BailingMoeV2Config, BailingMoeV2AliasConfig)}


def load_model(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    quantise: str | None = None,
    parallel: Parallel | None = None,
) -> BailingMoeV2ForCausalLM:
    """Load a checkpoint directory in eval mode; calling the model then returns logits, fp32 ``[B, T, V]``.

    ``dtype`` None keeps the stored one (that of the embedding table); the router is fp32 in every case. What is stored
    quantised (`ascend.stored`) stays so, in memory too; ``quantise`` ("w8a8", "w4a16", "fp8") rounds the weights of a
    plain checkpoint once they are there. With ``parallel`` only this rank's part is read. Raises `UserError` before
    anything is allocated if a file or tensor is missing, extra, damaged, or of wrong shape or type, or in a format that
    cannot be computed there; while reading, if what comes along with a quantised weight contradicts its format.
    """
    model = load(path, None, device, dtype, quantise, parallel)
    model.plain_logits = True
    return model


def load(
    path: str | Path,
    config: BailingMoeV2Config | None,
    device: Any,
    dtype: torch.dtype | str | None,
    quantise: str | None = None,
    parallel: Parallel | None = None,
) -> BailingMoeV2ForCausalLM:
    """Load for `load_model` and `from_pretrained`: check everything, allocate on the device, then fill."""
    checkpoint = open_checkpoint(path)
    check_described(checkpoint.path, checkpoint.config)
    stored = stored_weights(checkpoint.tensors)
    target, dtype = _torch_device(device), _dtype(dtype, checkpoint)
    config = config if config is not None else CONFIGS[checkpoint.config["model_type"]](**checkpoint.config)
    if quantise is not None:
        check_format(quantise)
        check_on(target, dtype, quantise, config, parallel or Parallel())
    with _default_dtype(dtype), torch.device("meta"):
        model = BailingMoeV2ForCausalLM(config)
        check_tensors(checkpoint.path, stored, model)
        formats = module_formats(model, stored)
        if parallel is not None:
            model = BailingMoeV2ForCausalLM(config, parallel)
        if formats:
            _check_formats(checkpoint.path, formats, target, dtype, quantise, model)
            check_division(model, stored)
            take_formats(model, formats)
    model.generation_config = _generation_config(checkpoint.path) or model.generation_config
    model = model.to_empty(device=target).requires_grad_(False).eval()
    _ask_for_huge_pages(model)
    _fill(model, stored, checkpoint.path.name)
    if config.norm_head and model.lm_head is not None:
        # As vLLM does at load: each column over the vocabulary gets unit length.
        weight = model.lm_head.weight
        squares_H = weight.float().square().sum(0)
        if len(weight) < config.vocab_size:
            squares_H = model.parallel.tensor.all_reduce(squares_H)
        weight.copy_(weight.float() / squares_H.sqrt().clamp(min=1e-7))
    if quantise is not None:
        quantise_model(model, quantise)
    model.model.lay_out()
    return model


def _check_formats(
    path: Path,
    formats: Mapping[str, ModuleFormat],
    device: torch.device,
    dtype: torch.dtype,
    quantise: str | None,
    model: BailingMoeV2ForCausalLM,
) -> None:
    """Raise `UserError` if the device does not compute in what the checkpoint is stored in."""
    names = {one.name for one in formats.values()}
    if quantise is not None:
        raise UserError(f"{path}: is quantised already ({', '.join(sorted(names))}); leave `quantise` away")
    experts = {one.name for module, one in formats.items() if module.endswith(".experts")}
    width = len(model.parallel.expert_width(model.config.moe_intermediate_size))
    for name in sorted(names):
        check_computes(device, dtype, name, width if name in experts else None, model.parallel, CONVERT)


def check_tensors(path: Path, stored: Mapping[str, StoredWeight], model: BailingMoeV2ForCausalLM) -> None:
    """Raise `UserError` unless a checkpoint has exactly the weights of ``model`` (whole, plain; ``meta`` will do)."""
    wanted = dict(checkpoint_tensors(model))
    for name, place in wanted.items():
        weight = stored.get(name)
        if weight is None:
            if not _may_be_absent(name, model):
                raise UserError(f"{path}: tensor {name} is missing from all files")
            continue
        if weight.shape != tuple(place.shape):
            raise UserError(
                f"{weight.values.file}: tensor {name} has shape {list(weight.shape)}, "
                f"config.json asks for {list(place.shape)}"
            )
    for name, weight in stored.items():
        if name not in wanted and not (name == "lm_head.weight" and model.lm_head is None):
            raise UserError(
                f"{weight.values.file}: tensor {name} has no place in the model of config.json{suggest(name, wanted)}"
            )
        for end, entry in weight.beside:
            if entry.dtype not in STORED:
                raise UserError(f"{entry.file}: the {end} of tensor {name} has dtype {entry.dtype}, unknown here")
    plain = [weight.values for weight in stored.values() if weight.format == PLAIN]
    halves = {entry.dtype: entry for entry in plain if entry.dtype in ("BF16", "F16")}
    if len(halves) == 2:
        raise UserError(
            f"{halves['F16'].file}: holds F16 tensors, {halves['BF16'].file} BF16 ones; convert to one of them"
        )


def _may_be_absent(name: str, model: BailingMoeV2ForCausalLM) -> bool:
    return name.endswith(".expert_bias") and not model.config.moe_router_enable_expert_bias


def _fill(model: BailingMoeV2ForCausalLM, stored: Mapping[str, StoredWeight], name: str) -> None:
    """Read what ``model`` holds of the stored weights, in the order of the files, and check what lies beside them."""
    uses: list[tuple[TensorEntry, Callable[[Tensor], None]]] = []
    beside: dict[str, StoredWeight] = {}
    for piece in checkpoint_pieces(model):
        weight = stored.get(piece.name)
        if weight is None or piece.is_zero:
            piece.place.zero_()
            continue
        uses.append((dict(weight.entries())[piece.part], partial(_put, piece, weight)))
        beside[weight.name] = weight
    for weight in beside.values():
        uses.extend((entry, partial(_check_beside, weight, end)) for end, entry in weight.beside)
    uses.sort(key=lambda use: (use[0].file, use[0].offset))
    mapped: mmap.mmap | None = None
    file: Path | None = None
    total = sum(entry.nbytes for entry, _ in uses)
    with Progress(f"loading {name}", total) as progress, _one_thread():
        for entry, use in uses:
            if entry.file != file or mapped is None:
                file = entry.file
                with file.open("rb") as stream:
                    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            _read(mapped, entry, use)
            progress.advance(entry.nbytes)


def _put(piece: Piece, weight: StoredWeight, tensor: Tensor) -> None:
    place, tensor = piece.place, piece.of(tensor, units_of(weight, piece.part))
    if tensor.dtype is torch.float8_e4m3fn:  # bytes: no value of it is looked at
        place, tensor = place.view(torch.uint8), tensor.view(torch.uint8)
    place.copy_(tensor)


def _check_beside(weight: StoredWeight, end: str, tensor: Tensor) -> None:
    where = f"{weight.values.file}: the {end} of tensor {weight.name}"
    if end == "weight_offset" and tensor.count_nonzero():
        raise UserError(f"{where} is not all zeros: asymmetric formats are not supported; quantise symmetrically")
    if end == "weight_shape" and tensor.tolist() != list(weight.shape):
        raise UserError(f"{where} is {tensor.tolist()}, but its values and scales are of {list(weight.shape)}")


def _ask_for_huge_pages(model: BailingMoeV2ForCausalLM) -> None:
    # Weights that are read in long streams miss the TLB less: a few per cent of a decode step on an EPYC.
    # Only a wish, and only where the kernel knows it: what it says is not looked at.
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    for parameter in model.parameters():
        if advise is None or parameter.device.type != "cpu":
            continue
        begin = parameter.data_ptr() + -parameter.data_ptr() % mmap.PAGESIZE
        end = parameter.data_ptr() + parameter.numel() * parameter.element_size()
        if end - begin >= HUGE_PAGE_BYTES:
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_HUGEPAGE))


@contextmanager
def _one_thread() -> Iterator[None]:
    # A copy is bound by memory. Of small tensors on a busy machine, threads that wait for one another made it 6 times
    # slower than one alone.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read(mapped: mmap.mmap, entry: TensorEntry, use: Callable[[Tensor], None]) -> None:
    if not entry.nbytes:
        return
    stored = torch.frombuffer(mapped, dtype=STORED[entry.dtype], count=math.prod(entry.shape), offset=entry.offset)
    use(stored.view(entry.shape))
    # Give the pages back at once: they would count as this process's memory until the file is unmapped.
    begin = entry.offset - entry.offset % mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, begin, entry.offset + entry.nbytes - begin)


def _dtype(dtype: torch.dtype | str | None, checkpoint: Checkpoint) -> torch.dtype:
    if dtype is None or dtype == "auto":
        stored = checkpoint.tensors.get("model.word_embeddings.weight")
        return DTYPES.get(stored.dtype, torch.float32) if stored else torch.float32
    names = {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    found = names.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UserError(f"dtype {dtype} is not one of {', '.join(names)}{suggest(str(dtype), names)}")
    return found


def _torch_device(device: Any) -> torch.device:
    if isinstance(device, dict):
        if set(device) != {""}:
            raise UserError("device_map spreads the model over several devices; this version loads it on one")
        device = device[""]
    name = f"cuda:{device}" if isinstance(device, int) else str(device)
    return get_device(name).torch_device


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _generation_config(path: Path) -> GenerationConfig | None:
    file = path / "generation_config.json"
    if not file.exists():
        return None
    try:
        return GenerationConfig.from_pretrained(str(path))
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not readable ({str(error).splitlines()[0]}); correct or remove it") from None


def save(model: BailingMoeV2ForCausalLM, path: Path, max_shard_size: int | str = "5GB") -> None:
    """Write a model as a checkpoint directory: original tensor names, safetensors, shards of at most that size.

    Weights that an earlier save left in the directory are removed, so that nobody takes them for the new ones. Raises
    `UserError` for a model that is no whole checkpoint any more: quantised, in a device's layout, or a rank's part.
    """
    if model.quantised or model.model.laid_out or model.parallel.world.size > 1:
        raise UserError("only a whole model as it was loaded on a CPU or CUDA device, not quantised, can be saved")
    shards = _shards(model, _bytes(max_shard_size))
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    path.mkdir(parents=True, exist_ok=True)
    for old in (path / INDEX, path / SINGLE, *path.glob("model-?????-of-?????.safetensors")):
        old.unlink(missing_ok=True)
    model.config.architectures = ["BailingMoeV2ForCausalLM"]
    model.config.dtype = model.dtype
    model.config.save_pretrained(str(path))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(path))
    total = 0
    for file, tensors in zip(files, shards, strict=True):
        # One shard at a time in memory: the views of stacked experts become tensors of their own only here.
        stored = {name: _stored(model, tensor).clone() for name, tensor in tensors.items()}
        total += sum(tensor.nbytes for tensor in stored.values())
        save_file(stored, path / file, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
        (path / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))


def _stored(model: BailingMoeV2ForCausalLM, tensor: Tensor) -> Tensor:
    # The router's weight is fp32 in memory; where it came from the model's dtype it goes back to it without loss.
    rounded = tensor.to(model.dtype)
    return rounded if torch.equal(rounded.to(tensor.dtype), tensor) else tensor


def _shards(model: BailingMoeV2ForCausalLM, limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in checkpoint_tensors(model):
        if _may_be_absent(name, model) and not tensor.any():
            continue
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    return shards


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = size.strip().upper()
    for unit in sorted(units, key=len, reverse=True):
        if digits.endswith(unit) and digits.removesuffix(unit).strip().replace(".", "", 1).isdigit():
            return int(float(digits.removesuffix(unit)) * units[unit])
    raise UserError(f"max_shard_size {size!r} is not a size such as 5GB or 500MB")
