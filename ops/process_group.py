"""The collectives of this project over a ``torch.distributed`` group: gloo on CPU, NCCL on CUDA, HCCL on NPU.

A rank that dies or never comes is an error that names it, on every other rank and within the timeout: `RankLost`. That
is shown on gloo (tests/test_process_group.py), whose calls return when they are done. NCCL and HCCL only queue their
work: there the backend's own watchdog ends a process whose collective hangs, and what it prints names no rank.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ops.heartbeat import NAMING, Heartbeat, RankLost, name_ranks

DEVICE_OF = {"gloo": "cpu", "nccl": "cuda", "hccl": "npu"}

# The names of torch 2.13 where they exist (there the old ones warn), else those of torch 2.10.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """Ranks that call the same collectives in the same order; ``Group()`` is this process alone, and talks to nobody.

    rank: this process's place in ``ranks``, the global ranks of the members; size: how many they are. Tensors are on
    the device of the backend. gloo waits until a collective is done; NCCL and HCCL queue it on the current stream. What
    is empty on all ranks alike is not sent. A process group made elsewhere comes without a heartbeat: it works, and its
    errors are the backend's.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, heartbeat: Heartbeat | None = None) -> None:
        self.process_group = process_group
        self.rank, self.backend, self._name = 0, "", ""
        self.ranks: tuple[int, ...] = (heartbeat.rank if heartbeat else 0,)
        if process_group is not None:
            self.rank, self.backend = dist.get_rank(process_group), dist.get_backend(process_group)
            self.ranks = tuple(dist.get_process_group_ranks(process_group))
            self._name = process_group.group_name
        self.size = len(self.ranks)
        self._heartbeat = heartbeat

    def __repr__(self) -> str:
        return f"Group(rank {self.rank} of {self.size}, {self.backend or 'alone'}, global ranks {list(self.ranks)})"

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks; every rank gets it. ``x`` may be overwritten: use what is returned."""
        if self.size == 1 or not x.numel():
            return x
        # gloo adds in the dtype it is given, in an order that depends on the place: bf16 is rounded at every step.
        wide = x.float() if self.backend == "gloo" and x.dtype.itemsize == 2 else x.contiguous()
        with self._collective("all_reduce"):
            dist.all_reduce(wide, group=self.process_group)
        return wide.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """``x [n, …]``, the same shape on all ranks, one after the other: ``[size · n, …]``."""
        if self.size == 1:
            return x
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        if not x.numel():
            return out
        with self._collective("all_gather"):
            _gather(out, x.contiguous(), group=self.process_group)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum of ``x [size · n, …]`` over the ranks, of which this rank gets its part ``[n, …]``.

        On gloo the parts are exchanged, which moves no more bytes, and added in fp32: its own adds as its all-reduce
        does, and not every build has one.
        """
        if self.size == 1:
            return x
        n = x.shape[0] // self.size
        if not x.numel():
            return x[:n]
        if self.backend == "gloo":
            parts = self.all_to_all(x, [n] * self.size, [n] * self.size, "reduce_scatter")
            return parts.unflatten(0, (self.size, n)).float().sum(0).to(x.dtype)
        out = x.new_empty((n, *x.shape[1:]))
        with self._collective("reduce_scatter"):
            _reduce_scatter(out, x.contiguous(), group=self.process_group)
        return out

    def all_to_all(
        self, x: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], operation: str = "all_to_all"
    ) -> Tensor:
        """Send ``send_counts[r]`` rows of ``x`` to each rank r, in order; the rows received, sorted by their rank.

        The counts are integers of the host. ``operation`` is what an error calls this.
        """
        if self.size == 1:
            return x
        out = x.new_empty((sum(receive_counts), *x.shape[1:]))
        with self._collective(operation):
            dist.all_to_all_single(
                out, x.contiguous(), list(receive_counts), list(send_counts), group=self.process_group
            )
        return out

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        """The integers of every rank, as many on each, by rank. The host waits for the device once."""
        if self.size == 1:
            return [list(values)]
        own = torch.tensor([list(values)], dtype=torch.int64, device=DEVICE_OF[self.backend])
        return self.all_gather(own).tolist()

    def hccl_name(self) -> str:
        """What HCCL calls this group's communicator, for the ops that use it themselves."""
        assert self.process_group is not None, "one process alone has no communicator"
        backend: Any = self.process_group._get_backend(torch.device("npu"))
        return str(backend.get_hccl_comm_name(self.rank))

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        """Make a group of each of ``parts`` (ascending ranks, every rank in exactly one); return this rank's.

        Call it on the group that `start` returned, on all its ranks, with the same parts in the same order. A part that
        is the whole group, or one rank, costs nothing: each further HCCL communicator takes its buffers, 400 MB by
        default, from the device (HCCL_BUFFSIZE, taken twice).
        """
        if sorted(rank for part in parts for rank in part) != sorted(self.ranks):
            raise ValueError(f"the parts {[list(part) for part in parts]} are not a partition of {list(self.ranks)}")
        own = self
        for part in parts:
            if len(part) == self.size:
                continue
            process_group = None
            if len(part) > 1:
                with self._collective("split"):
                    process_group = dist.new_group(sorted(part), timeout=_limit(self.backend, self._heartbeat))
            if self.ranks[self.rank] in part:
                own = Group(process_group, self._heartbeat)
        return own

    def twin(self) -> Group:
        """Make another communicator of the same ranks, for ops that share theirs with nothing else; as `split`."""
        with self._collective("twin"):
            process_group = dist.new_group(list(self.ranks), timeout=_limit(self.backend, self._heartbeat))
        return Group(process_group, self._heartbeat)

    def close(self) -> None:
        """Leave the job, all its groups included; call it on the group that `start` returned."""
        if self.process_group is None or self._heartbeat is None:
            return
        lost = self._heartbeat.verdict
        self._heartbeat.close()
        if not lost:  # a lost rank's connections could keep it waiting
            dist.destroy_process_group()

    def _collective(self, operation: str) -> AbstractContextManager[None]:
        if self._heartbeat is None:
            return nullcontext()
        return self._heartbeat.watch(self._name, self.ranks, operation)


def start(
    rank: int, size: int, address: str, port: int, backend: str, timeout: float = 60.0, join_timeout: float = 120.0
) -> Group:
    """Join a job of ``size`` processes and return the group of all; rank 0 holds the store, at ``address:port``.

    Call it once per process, after an accelerator's device is set. timeout: seconds after which a collective fails;
    join_timeout: how long to wait for the other processes to come here. Raises RankLost for one that does not, OSError
    where rank 0 cannot listen.
    """
    if size == 1:
        return Group()
    store = _store(rank == 0, size, address, port, join_timeout)
    heartbeat = Heartbeat(_store(False, size, address, port, join_timeout), rank, size, timeout)
    if absent := heartbeat.absent(join_timeout):
        raise RankLost(f"{name_ranks(absent, size)} did not come to {address}:{port} within {join_timeout:g} s")
    if backend == "gloo" and _is_loopback(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo listens where the host's name points
    with heartbeat.watch("", range(size), "start"):
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("groups", store),
            rank=rank,
            world_size=size,
            timeout=_limit(backend, heartbeat),
        )
    return Group(dist.group.WORLD, heartbeat)


def _limit(backend: str, heartbeat: Heartbeat | None) -> timedelta | None:
    """What the backend is told: less than our timeout on gloo, where finding out who is lost comes after it."""
    if heartbeat is None:
        return None
    return timedelta(seconds=heartbeat.timeout * (1 - NAMING if backend == "gloo" else 1))


def _store(host_it: bool, size: int, address: str, port: int, join_timeout: float) -> dist.TCPStore:
    listener = None
    if host_it:  # a socket of ours: the store's own would listen on every interface
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, port), family=family).detach()
    try:
        return dist.TCPStore(
            address,
            port,
            size,
            is_master=host_it,
            timeout=timedelta(seconds=join_timeout),
            wait_for_workers=False,
            master_listen_fd=listener,
        )
    except RuntimeError as error:
        raise RankLost(
            f"{name_ranks([0], size)} did not come: nothing answers at {address}:{port} within {join_timeout:g} s"
        ) from error


def _is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
