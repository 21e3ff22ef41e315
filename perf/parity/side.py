"""One side of `perf parity` in a process of its own, and the file it leaves: `python -m perf.parity.side …`.

The file is a safetensors file: the tensors of `perf.parity.trace`, and under the metadata key ``parity`` a JSON object
(`SideInfo`) that says what computed them. ``--like FILE`` is the other side's: tokens, and what the layers get.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from ascend.errors import UserError, run_command

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class SideInfo:
    """What computed a side, and of what.

    side: "cpu", "cuda", "npu" or "npu-emulated"; an emulated card is never called "npu". batches: rows, padded length
    and padding of each. software: driver, CANN, CUDA, as far as they say. commit: of this project's checkout.
    weights_sha256: of samples of the files, see `perf.machine`. streams_sha256: of its own residual streams;
    like_sha256: of those that its layers got.
    """

    side: str
    device_name: str
    emulated: bool
    host: str
    software: dict[str, str]
    commit: str | None
    torch: str
    torch_npu: str | None
    dtype: str
    quantise: str | None
    n_group: int
    topk_group: int
    batches: list[list[int]]
    decode: int
    seed: int
    config_sha256: str
    weights_sha256: str
    tokens_sha256: str
    streams_sha256: str
    like_sha256: str
    date: str


def read_info(file: Path) -> SideInfo:
    """Read a side's metadata, without torch. Raises `UserError` for a file that is none, or of another version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as stream:
            info = json.loads((stream.metadata() or {})["parity"])
        return SideInfo(**info)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: not a side of this version's `perf parity`; record it again") from None


def config_sha256(model: str | Path) -> str:
    """Return the SHA-256 of a checkpoint's ``config.json``."""
    return hashlib.sha256((Path(model) / "config.json").read_bytes()).hexdigest()


def make_side(args: argparse.Namespace) -> tuple[dict[str, Tensor], SideInfo]:
    """Load the model on the device, compute the side, and say what did."""
    import torch
    from safetensors.torch import load_file

    import ascend
    from ascend.devices import get_device
    from perf.machine import commit, describe, weights_sha256
    from perf.parity.prompts import random_batches, restored_batches
    from perf.parity.trace import trace

    device = get_device(args.device)
    machine = describe(device)
    like, like_info = (load_file(args.like), read_info(args.like)) if args.like else (None, None)
    model = ascend.load_model(args.model, args.device, DTYPES.get(args.dtype), quantise=args.quantise)
    dtype = {name: short for short, name in DTYPES.items()}.get(str(model.dtype).removeprefix("torch."))
    if dtype is None:
        raise UserError(f"{args.model}: there are no limits for {model.dtype}; give --dtype bf16 or fp32")
    if like is None or like_info is None:
        batches = random_batches(model.config.vocab_size, args.rows, args.prompt_length, args.seed)
        shapes = [[*batch.ids_BT.shape, int(batch.start_B[0])] for batch in batches]
    else:
        shapes = like_info.batches
        batches = restored_batches(like["token"], shapes)
    tensors = trace(model, batches, args.decode, like)
    streams = [f"stream.{layer}" for layer in range(model.config.num_hidden_layers + 1)]
    info = SideInfo(
        side="npu-emulated" if machine.emulated else machine.device_type,
        device_name=machine.device,
        emulated=machine.emulated,
        host=machine.host,
        software=machine.software,
        commit=commit(),
        torch=torch.__version__,
        torch_npu=sys.modules["torch_npu"].__version__ if device.type == "npu" else None,
        dtype=dtype,
        quantise=model.quantised,
        n_group=model.config.n_group,
        topk_group=model.config.topk_group,
        batches=shapes,
        decode=args.decode,
        seed=args.seed,
        config_sha256=config_sha256(args.model),
        weights_sha256=weights_sha256(args.model),
        tokens_sha256=_sha256(tensors, ["row", "position", "token"]),
        streams_sha256=_sha256(tensors, streams),
        like_sha256=_sha256(tensors if like is None else like, streams),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return tensors, info


def write_side(file: Path, tensors: Mapping[str, Tensor], info: SideInfo) -> None:
    """Write the file, mode 0640, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        save_file(dict(tensors), part, {"parity": json.dumps(asdict(info))})
        part.chmod(0o640)
        part.replace(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be written ({str(error).splitlines()[0]})") from None
    finally:
        part.unlink(missing_ok=True)


def _sha256(tensors: Mapping[str, Tensor], names: list[str]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in names:
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Compute the side that the arguments describe and write it to ``--out``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--quantise")
    parser.add_argument("--rows", type=int)  # this and the next come from --like where there is one
    parser.add_argument("--prompt-length", type=int)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--decode", type=int, required=True)
    parser.add_argument("--like", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_side(args.out, *make_side(args))


if __name__ == "__main__":
    sys.exit(run_command(main))
