"""HCCL through gloo: torch_npu's own process group runs, its collectives move host memory between processes.

The C runtime's ``Hccl…`` calls end in `perform`. A communicator is a gloo process group over a store that the first
rank opens; the root information that HCCL passes around carries the store's address.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ascend.emulator.limits import Refused

# HcclDataType and HcclReduceOp of hccl_types.h.
DTYPES = {
    0: torch.int8,
    1: torch.int16,
    2: torch.int32,
    3: torch.float16,
    4: torch.float32,
    5: torch.int64,
    7: torch.uint8,
    10: torch.float64,
    11: torch.bfloat16,
}
REDUCTIONS = {0: dist.ReduceOp.SUM, 1: dist.ReduceOp.PRODUCT, 2: dist.ReduceOp.MAX, 3: dist.ReduceOp.MIN}
TIMEOUT = timedelta(seconds=int(os.environ.get("HCCL_EXEC_TIMEOUT", "60")))

_stores: dict[int, Any] = {}
_communicators: dict[int, Communicator] = {}


class Communicator:
    """One HCCL communicator: ``rank`` of ``size``, and a gloo group that does its work."""

    def __init__(self, port: int, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.user = ""
        store = _stores.pop(port, None) or dist.TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
        self.store = store
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens where the host's name points
        self.gloo: Any = dist.ProcessGroupGloo(store, rank, size, TIMEOUT)

    def claimed(self, user: str) -> Communicator:
        """This communicator, for collectives or for MC2: the ops' pages forbid any other operator in MC2's."""
        if self.user not in ("", user):
            raise Refused(f"{user} in a communicator that {self.user} uses already; MC2 needs one of its own")
        self.user = user
        return self

    def all_to_all(self, tensors: list[Tensor]) -> list[Tensor]:
        """Send ``tensors[i]`` to rank ``i``; return what came from each. Shapes are agreed on the way."""
        received: list[Tensor] = []
        for peer_offset in range(self.size):
            to, source = (self.rank + peer_offset) % self.size, (self.rank - peer_offset) % self.size
            received.append(tensors[self.rank] if peer_offset == 0 else self._swap(tensors[to], to, source))
        return [received[(self.rank - source) % self.size] for source in range(self.size)]

    def _swap(self, tensor: Tensor, to: int, source: int) -> Tensor:
        ndim = torch.tensor([tensor.dim(), *tensor.shape, *[0] * (7 - tensor.dim())])
        shape = torch.empty_like(ndim)
        self._pair(ndim, shape, to, source)
        out = torch.empty(shape[1 : 1 + int(shape[0])].tolist(), dtype=tensor.dtype)
        self._pair(tensor.contiguous(), out, to, source)
        return out

    def _pair(self, send: Tensor, receive: Tensor, to: int, source: int) -> None:
        works = [self.gloo.send([_bytes(send)], to, 0)] if send.numel() else []
        if receive.numel():
            self.gloo.recv([_bytes(receive)], source, 0).wait()
        for work in works:
            work.wait()


def by_name(name: str) -> Communicator:
    """Return the communicator that `get_hccl_comm_name` calls ``name``."""
    return _communicators[int(name.removeprefix("emulated_"), 16)]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _view(address: int, count: int, dtype: int) -> Tensor:
    """The ``count`` elements of device memory at ``address``."""
    if not count:
        return torch.empty(0, dtype=DTYPES[dtype])
    nbytes = count * DTYPES[dtype].itemsize
    buffer = (ctypes.c_char * nbytes).from_address(address)
    return torch.frombuffer(buffer, dtype=DTYPES[dtype])


def _counts(address: int, size: int) -> list[int]:
    return list((ctypes.c_uint64 * size).from_address(address))


def _summing(reduction: int) -> Any:
    options: Any = dist.AllreduceOptions()
    options.reduceOp = REDUCTIONS[reduction]
    return options


def _root_info(_: int, info: int, __: int, ___: Any) -> None:
    listener = socket.create_server(("127.0.0.1", 0))  # the store's own would listen on every interface
    port = listener.getsockname()[1]
    _stores[port] = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=TIMEOUT,
        master_listen_fd=listener.detach(),
    )
    ctypes.memmove(info, struct.pack("<I", port), 4)


def _init(handle: int, info: int, _: int, numbers: Any) -> None:
    (port,) = struct.unpack("<I", ctypes.string_at(info, 4))
    _communicators[handle] = Communicator(port, int(numbers[1]), int(numbers[0]))


def _destroy(handle: int, *_: Any) -> None:
    _communicators.pop(handle, None)


def _all_reduce(handle: int, send: int, receive: int, numbers: Any) -> None:
    count, dtype, reduction = numbers[0], numbers[1], numbers[2]
    out = _view(receive, count, dtype)
    if send != receive:
        out.copy_(_view(send, count, dtype))
    options = _summing(reduction)
    _communicators[handle].gloo.allreduce([out], options).wait()


def _broadcast(handle: int, data: int, _: int, numbers: Any) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = numbers[2], 0
    _communicators[handle].gloo.broadcast([_bytes(_view(data, numbers[0], numbers[1]))], options).wait()


def _all_gather(handle: int, send: int, receive: int, numbers: Any) -> None:
    communicator = _communicators[handle]
    count, dtype = numbers[0], numbers[1]
    parts = [torch.empty(count, dtype=DTYPES[dtype]) for _ in range(communicator.size)]
    communicator.gloo.allgather([parts], [_view(send, count, dtype).clone()]).wait()
    _view(receive, count * communicator.size, dtype).copy_(torch.cat(parts))


def _reduce_scatter(handle: int, send: int, receive: int, numbers: Any) -> None:
    communicator = _communicators[handle]
    count, dtype, reduction = numbers[0], numbers[1], numbers[2]
    total = _view(send, count * communicator.size, dtype).clone()
    options = _summing(reduction)
    communicator.gloo.allreduce([total], options).wait()
    _view(receive, count, dtype).copy_(total.view(communicator.size, -1)[communicator.rank])


def _all_to_all(handle: int, send: int, receive: int, numbers: Any) -> None:
    communicator = _communicators[handle]
    count, dtype = numbers[0], numbers[1]
    parts = communicator.all_to_all(list(_view(send, count * communicator.size, dtype).clone().split(count)))
    _view(receive, count * communicator.size, dtype).copy_(torch.cat(parts))


def _all_to_all_v(handle: int, send: int, receive: int, numbers: Any) -> None:
    communicator = _communicators[handle]
    dtype, size = numbers[1], communicator.size
    counts, offsets = _counts(numbers[0], size), _counts(numbers[2], size)
    receive_counts, receive_offsets = _counts(numbers[3], size), _counts(numbers[4], size)
    width = DTYPES[dtype].itemsize
    parts = [_view(send + offset * width, count, dtype).clone() for count, offset in zip(counts, offsets, strict=True)]
    for part, count, offset in zip(communicator.all_to_all(parts), receive_counts, receive_offsets, strict=True):
        _view(receive + offset * width, count, dtype).copy_(part)


def _send(handle: int, data: int, _: int, numbers: Any) -> None:
    _communicators[handle].gloo.send([_bytes(_view(data, numbers[0], numbers[1]))], numbers[2], 1).wait()


def _receive(handle: int, _: int, data: int, numbers: Any) -> None:
    _communicators[handle].gloo.recv([_bytes(_view(data, numbers[0], numbers[1]))], numbers[2], 1).wait()


_CALLS: dict[str, Callable[..., None]] = {
    "root_info": _root_info,
    "init": _init,
    "destroy": _destroy,
    "all_reduce": _all_reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "all_to_all_v": _all_to_all_v,
    "send": _send,
    "receive": _receive,
}

# Between processes and nothing else: these are not part of a captured graph.
SETTING_UP = ("root_info", "init", "destroy")
# Their host-side counts are read when they are called: a captured one would be replayed with those for ever.
NOT_CAPTURED = ("all_to_all_v",)
NUMBERS = 5  # that the runtime passes


def perform(what: str, handle: int, send: int, receive: int, numbers: Sequence[int]) -> None:
    """Do what HCCL's function of that name does."""
    if what not in SETTING_UP:
        _communicators[handle].claimed("collectives")
    _CALLS[what](handle, send, receive, numbers)
