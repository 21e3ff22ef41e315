"""The collectives on gloo, and a rank that is lost: named by every other rank, within the timeout, and nobody hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ops.heartbeat import Heartbeat
from ops.process_group import Group, RankLost, start
from tests.ranks import Failure, Ranks, free_port

TIMEOUT = 4.0
SLACK = 1.0  # two cores run up to four ranks: time for a thread to be scheduled


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4, timeout=8.0) as ranks:
        yield ranks


# The collectives


def _collectives(group: Group, dtype: torch.dtype, width: int) -> None:
    size, rank = group.size, group.rank

    def of(r: int, rows: int) -> torch.Tensor:
        return torch.arange(rows * width, dtype=dtype).view(rows, width) % 7 + r

    everyone = range(size)
    assert torch.equal(group.all_reduce(of(rank, 3)), sum(of(r, 3).float() for r in everyone).to(dtype))
    assert torch.equal(group.all_gather(of(rank, 2)), torch.cat([of(r, 2) for r in everyone]))
    total = sum(of(r, 2 * size).float() for r in everyone).to(dtype)
    assert torch.equal(group.reduce_scatter(of(rank, 2 * size)), total[2 * rank : 2 * rank + 2])
    # r sends (r + 2·to) % 3 rows: uneven, some none
    counts = [[(r + 2 * to) % 3 for to in everyone] for r in everyone]
    received = group.all_to_all(of(rank, sum(counts[rank])), counts[rank], [counts[r][rank] for r in everyone])
    expected = [of(r, sum(counts[r])).split(counts[r])[rank] for r in everyone]
    assert torch.equal(received, torch.cat(expected))
    assert group.all_gather_ints([rank, -rank]) == [[r, -r] for r in everyone]
    strided = of(rank, 6)[::2].T
    assert torch.equal(group.all_gather(strided), torch.cat([of(r, 6)[::2].T for r in everyone]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 0])
def test_collectives(four: Ranks, dtype: torch.dtype, width: int) -> None:
    four.call(_collectives, dtype, width)


def _bf16_sums(group: Group) -> list[float]:
    """Sums of 1, 2⁻⁹, 2⁻⁹, 2⁻⁹: bf16 keeps eight bits, so a sum that is rounded at every step may stay at 1."""
    x = torch.full((4 * group.size,), 1.0 if group.rank == 0 else 2.0**-9, dtype=torch.bfloat16)
    return group.all_reduce(x.clone()).tolist() + group.reduce_scatter(x).tolist()


def test_bf16_is_summed_in_fp32(four: Ranks) -> None:
    expected = torch.tensor(1 + 3 * 2.0**-9).bfloat16().item()
    assert expected > 1
    assert four.call(_bf16_sums) == [[expected] * 20] * 4


def _mesh(group: Group) -> list[Any]:
    rows = group.split([[0, 1], [2, 3]])
    columns = group.split([[0, 2], [1, 3]])
    alone = group.split([[0], [1], [2], [3]])
    assert group.split([[0, 1, 2, 3]]) is group
    ids = [group_of.all_gather_ints([group.rank]) for group_of in (rows, columns, alone)]
    return [ids, rows.rank, rows.ranks, columns.rank, columns.ranks, alone.ranks, alone.size]


def test_split_makes_a_mesh(four: Ranks) -> None:
    assert four.call(_mesh)[2] == [[[[2], [3]], [[0], [2]], [[2]]], 0, (2, 3), 1, (0, 2), (2,), 1]


def test_split_wants_a_partition() -> None:
    with pytest.raises(ValueError, match=r"the parts \[\[0\], \[0\]\] are not a partition of \[0\]"):
        Group().split([[0], [0]])


def test_one_rank_talks_to_nobody() -> None:
    group = start(0, 1, "203.0.113.1", 1, "gloo")
    x = torch.ones(2, 3)
    assert group.all_reduce(x) is group.all_gather(x) is group.reduce_scatter(x) is group.all_to_all(x, [2], [2]) is x
    assert group.all_gather_ints([4]) == [[4]]
    assert group.split([[0]]) is group
    group.close()


def _listening(group: Group) -> set[str]:
    """Local addresses, as the kernel writes them, of this process's listening sockets."""
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"  # on some hosts gloo listens on loopback without it
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}").removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    return {line[1].rpartition(":")[0] for line in lines if line[3] == "0A" and line[9] in inodes}


def test_loopback_stays_on_loopback(four: Ranks) -> None:
    addresses = four.call(_listening)
    assert addresses[0] == {"0100007F"}
    assert set().union(*addresses) == {"0100007F"}


# A rank that is lost


def _work(group: Group, calls: int, stay_away: int | None = None) -> float:
    """All-reduce until it fails; rank ``stay_away`` lives on but does not come again after the first."""
    x = torch.ones(1000)
    for _ in range(calls):
        _timed(group, x)
        if group.rank == stay_away:
            time.sleep(1.5 * TIMEOUT)
    return 0.0


def _timed(group: Group, x: torch.Tensor) -> None:
    begun = time.monotonic()
    try:
        group.all_reduce(x)
    except RankLost as lost:
        raise RankLost(f"{time.monotonic() - begun:.2f} {lost}") from None


def _check_lost(answer: Any, line: str, seconds: float = TIMEOUT + SLACK) -> None:
    assert isinstance(answer, Failure), answer
    assert answer.kind == "RankLost", answer.trace
    taken, message = answer.message.split(" ", 1)
    assert message.startswith(line)
    assert float(taken) < seconds


@pytest.mark.parametrize(
    ("how", "when"),
    [
        pytest.param(signal.SIGSTOP, "during", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "before", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "during", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "before", marks=pytest.mark.slow),
    ],
)
def test_lost_rank_is_named(how: signal.Signals, when: str) -> None:
    with ExitStack() as stack:
        # Four jobs side by side, for they mostly wait.
        jobs = [(stack.enter_context(Ranks(size, TIMEOUT)), lost) for size, lost in [(2, 0), (2, 1), (4, 0), (4, 2)]]
        for ranks, _ in jobs:
            ranks.call(_work, 1)
        for ranks, lost in jobs:
            everyone = range(ranks.size)
            survivors = [rank for rank in everyone if rank != lost]
            if when == "before":
                ranks.signal(lost, how)
                ranks.send(_work, [(1,)] * ranks.size, survivors)
            else:
                ranks.send(_work, [(10**6,)] * ranks.size, everyone)
                time.sleep(0.2)
                ranks.signal(lost, how)
        for ranks, lost in jobs:
            for rank in set(range(ranks.size)) - {lost}:
                _check_lost(ranks.receive(rank), f"rank {lost} of {ranks.size} is gone")
        for ranks, lost in jobs:  # and once lost is lost for good: the next call fails at once
            survivors = [rank for rank in range(ranks.size) if rank != lost]
            ranks.send(_work, [(1,)] * ranks.size, survivors)
            for rank in survivors:
                _check_lost(ranks.receive(rank), f"rank {lost} of {ranks.size} is gone", seconds=0.5)


def _mesh_work(group: Group, stay_away: int) -> None:
    """0 waits for 1, and 1 waits in another group for 3, which stays away; then 0 and 2 could meet, and must not."""
    rows, columns = group.split([[0, 1], [2, 3]]), group.split([[0, 2], [1, 3]])
    group.all_gather_ints([0])
    if group.rank == stay_away:
        time.sleep(1.5 * TIMEOUT)
    try:
        if group.rank in (1, 3):
            time.sleep(0.3)
            _timed(columns, torch.ones(1))
        _timed(rows, torch.ones(1))
    finally:
        with pytest.raises(RankLost):
            columns.all_reduce(torch.ones(1))


@pytest.mark.slow
def test_rank_that_stays_away_is_named() -> None:
    line = f"did not come to all_reduce within {TIMEOUT:g} s"
    with Ranks(4, TIMEOUT) as one, Ranks(4, TIMEOUT) as mesh:
        one.send(_work, [(2, 2)] * 4, range(4))
        mesh.send(_mesh_work, [(3,)] * 4, range(4))
        for rank in range(4):
            _check_lost(one.receive(rank), f"rank 2 of 4 {line}")
        for rank in (0, 1, 3):
            _check_lost(mesh.receive(rank), f"rank 3 of 4 {line}")


def _end_when_lost(group: Group) -> None:
    """Rank 0, and with it the store, ends as soon as it knows."""
    try:
        _work(group, 10**6)
    except RankLost:
        if group.rank == 0:
            os._exit(0)
        raise


@pytest.mark.slow
def test_rank_0_ends_after_the_others_know() -> None:
    with Ranks(4, TIMEOUT) as ranks:
        ranks.send(_end_when_lost, [()] * 4, range(4))
        time.sleep(0.2)
        ranks.signal(1, signal.SIGKILL)
        for rank in (2, 3):
            _check_lost(ranks.receive(rank), "rank 1 of 4 is gone")


def test_rank_0_gives_the_others_time_to_read() -> None:
    store = dist.HashStore()
    heartbeat = Heartbeat(store, 0, 2, TIMEOUT)

    def fail() -> None:
        with heartbeat.watch("", range(2), "all_reduce"):
            store.set("lost", "rank 1 of 2 is gone")
            raise RuntimeError("Connection closed by peer")

    begun = time.monotonic()
    with pytest.raises(RankLost, match="rank 1 of 2 is gone"):
        fail()
    assert time.monotonic() - begun > 2 * heartbeat.interval
    heartbeat.close()


def _wrong_shape(group: Group) -> None:
    group.all_to_all(torch.ones(3), [3], [3])


@pytest.mark.slow
def test_an_error_that_is_no_loss_stays_itself(four: Ranks) -> None:
    four.send(_wrong_shape, [()] * 4, range(4))
    for rank in range(4):
        answer = four.receive(rank)
        assert isinstance(answer, Failure)
        assert answer.kind in ("RuntimeError", "ValueError"), answer.trace
    four.call(_collectives, torch.float32, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1 of 2"), (1, "rank 0 of 2")])
def test_rank_that_does_not_come_to_the_start_is_named(rank: int, missing: str) -> None:
    begun = time.monotonic()
    with pytest.raises(RankLost, match=f"^{missing} did not come"):
        start(rank, 2, "127.0.0.1", free_port(), "gloo", join_timeout=0.5)
    # The store's client waits between its tries, longer each time.
    assert time.monotonic() - begun < 10
