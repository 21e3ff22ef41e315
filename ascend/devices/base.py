"""The contract every device keeps, what a probe sees of the machine, and what CUDA and NPU cards have in common."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from ascend.devices.facts import DeviceFacts, lookup

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

TOOL_SECONDS = 5.0  # after which a vendor's tool that hangs is given up
WARM_UPS = 3  # runs on a side stream before a capture, as PyTorch's CUDA graph notes do; lazy set-up happens in them


@dataclass(frozen=True)
class Problem:
    """Why a device cannot be used and what to do about it; two halves of one line."""

    reason: str
    remedy: str


@dataclass(frozen=True)
class Memory:
    """Bytes: all there are, those free for this process to take, and those this process holds already."""

    total: int
    free: int
    reserved: int


class Event(Protocol):
    """A mark in a stream with a time; the accelerators' own event class has this shape."""

    def record(self, stream: Any = None) -> None:
        """Mark the work given to ``stream`` (the current one if None) so far."""

    def wait(self, stream: Any = None) -> None:
        """Make ``stream`` (the current one if None) wait for the mark."""

    def synchronize(self) -> None:
        """Wait for the mark on the host."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this mark to a later one."""


@dataclass(frozen=True)
class Host:
    """The machine as the probes see it; a test points it at a folder instead.

    root: where absolute paths start. environ: the environment. site: the folders searched for installed packages
    (None: ``sys.path``). Device nodes are looked for in ``/dev``, or where the environment's ``ASCEND_DEV`` says: a
    container may see the host's nodes elsewhere, and the emulated NPU keeps its own.
    """

    root: Path = Path("/")
    environ: MutableMapping[str, str] = field(default_factory=lambda: os.environ)
    site: tuple[str, ...] | None = None

    def path(self, absolute: str) -> Path:
        """Return where the absolute path lies under this root."""
        return self.root / absolute.lstrip("/")

    def text(self, absolute: str) -> str:
        """Return a file's text, or an empty string if it cannot be read."""
        try:
            return self.path(absolute).read_text(errors="replace")
        except OSError:
            return ""

    def nodes(self, pattern: str) -> list[str]:
        """Return the names of the device nodes that match the whole regular expression, sorted."""
        dev = Path(self.environ["ASCEND_DEV"]) if self.environ.get("ASCEND_DEV") else self.path("/dev")
        try:
            return sorted(name for name in os.listdir(dev) if re.fullmatch(pattern, name))
        except OSError:
            return []

    def package(self, name: str) -> Any:
        """Return the installed distribution (importlib.metadata) called ``name``, or None; nothing is imported."""
        from importlib import metadata

        folders = sys.path if self.site is None else list(self.site)
        return next(iter(metadata.distributions(name=name, path=folders)), None)


class Device(ABC):
    """One kind of device, and the card of it at ``index``.

    ``str(device)`` is what torch calls it ("cpu", "cuda:1", "npu:0"). Methods that take an index mean this device's
    own card if it is None. Nothing here imports torch before it has to; a process calls `activate` before it creates
    streams, events or graphs.
    """

    type: ClassVar[str]
    label: ClassVar[str]  # how a sentence calls it
    collective_backend: ClassVar[str]  # for torch.distributed
    compute_dtypes: ClassVar[tuple[str, ...]] = ("bf16", "fp16", "fp32")
    captures_graphs: ClassVar[bool]

    def __init__(self, index: int = 0, host: Host | None = None) -> None:
        self.index = index
        self.host = host or Host()

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"

    @property
    def torch_device(self) -> torch.device:
        """Return torch's own name for this card, to put tensors on."""
        import torch

        return torch.device(str(self))

    def facts(self, index: int | None = None) -> DeviceFacts:
        """Return what is known of the card on paper."""
        return lookup(self.name(index))

    @abstractmethod
    def why_unavailable(self) -> Problem | None:
        """Return why no such device can be used here, or None. What files can tell is told without importing torch."""

    @abstractmethod
    def count(self) -> int:
        """Return the number of cards this process may use."""

    @abstractmethod
    def name(self, index: int | None = None) -> str:
        """Return the card's name as its driver reports it."""

    @abstractmethod
    def memory(self, index: int | None = None) -> Memory:
        """Return the card's memory in bytes."""

    @abstractmethod
    def quantised_formats(self, index: int | None = None) -> tuple[str, ...]:
        """Return the quantised checkpoint formats the card computes in, named as `python -m convert` names them."""

    def software(self) -> dict[str, str]:
        """Return the versions below torch that decide speed and results (driver, CANN), as far as files tell them."""
        return {}

    def watts(self, index: int | None = None) -> float | None:
        """Return what the card draws now, as the vendor's tool reads it; None where nothing tells."""
        return None

    @abstractmethod
    def activate(self) -> None:
        """Make this card the current one of the process."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the card has done all it was given."""

    @abstractmethod
    def stream(self) -> Any:
        """Return a new stream of the current card."""

    @abstractmethod
    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which ``stream`` is the current one."""

    @abstractmethod
    def event(self) -> Event:
        """Return a new event that keeps time."""

    @abstractmethod
    def graph_pool(self) -> Any:
        """Return a memory pool that several captures may share, None where nothing is captured."""

    @abstractmethod
    def capture(self, fn: Callable[[], Result], pool: Any = None) -> Callable[[], Result]:
        """Record what ``fn`` does and return a callable that does it again.

        ``fn`` reads its inputs from tensors that stay where they are, branches on nothing a tensor holds, and may be
        run any number of times (a capture runs it to warm up). Where `captures_graphs` is true a replay fills the same
        result tensors again: read them before the next one. Elsewhere the callable is ``fn`` itself, run eagerly.
        """


@dataclass(frozen=True)
class Replay(Generic[Result]):
    """A captured graph, called to replay it. ``graph`` is the vendor's object, for what only that vendor has."""

    graph: Any
    result: Result

    def __call__(self) -> Result:
        """Do the captured work again and return its result tensors, filled anew."""
        self.graph.replay()
        return self.result


class Accelerator(Device):
    """What ``torch.cuda`` and ``torch.npu``, which mirrors it, do under the same names."""

    captures_graphs = True

    @abstractmethod
    def _api(self) -> Any:
        """Return ``torch.cuda`` or ``torch.npu``, imported."""

    @abstractmethod
    def _new_graph(self) -> Any:
        """Return an empty graph of the vendor's class."""

    def _at(self, index: int | None) -> int:
        return self.index if index is None else index

    def count(self) -> int:
        """Return the number of cards this process may use, as torch counts them."""
        return int(self._api().device_count())

    def name(self, index: int | None = None) -> str:
        """Return the card's name as torch reports it."""
        return str(self._api().get_device_name(self._at(index)))

    def memory(self, index: int | None = None) -> Memory:
        """Return the card's memory; reserved is what torch's allocator holds for this process."""
        free, total = self._api().mem_get_info(self._at(index))
        return Memory(total, free, self._api().memory_reserved(self._at(index)))

    def activate(self) -> None:
        """Make this card the current one of the process."""
        self._api().set_device(self.index)

    def synchronize(self) -> None:
        """Wait until the card has done all it was given."""
        self._api().synchronize(self.index)

    def stream(self) -> Any:
        """Return a new stream of the current card."""
        return self._api().Stream()

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which ``stream`` is the current one."""
        context: AbstractContextManager[Any] = self._api().stream(stream)
        return context

    def event(self) -> Event:
        """Return a new event that keeps time."""
        event: Event = self._api().Event(enable_timing=True)
        return event

    def graph_pool(self) -> Any:
        """Return a memory pool that several captures may share."""
        return self._api().graph_pool_handle()

    def capture(self, fn: Callable[[], Result], pool: Any = None) -> Callable[[], Result]:
        """Warm ``fn`` up on a side stream, capture one run of it, and return the replay (see `Device.capture`)."""
        api = self._api()
        with api.device(self.index):
            side = api.Stream()
            side.wait_stream(api.current_stream())
            with api.stream(side):
                for _ in range(WARM_UPS):
                    fn()
            api.current_stream().wait_stream(side)
            graph = self._new_graph()
            # Without a stream it takes one that the first capture of the process made, on the card of that capture.
            with api.graph(graph, pool=pool, stream=side):
                result = fn()
        return Replay(graph, result)


def number_from(command: Sequence[str], pattern: str) -> float | None:
    """Return the number that ``pattern``'s group finds in what a vendor's tool prints; None where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, done.stdout)
    return float(found.group(1)) if found else None


def last_line(error: BaseException) -> str:
    """Return the last line of an error that says something.

    torch_npu ends its messages with a line "[ERROR] time (PID…) ERR…" that only repeats a code.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("[ERROR]")]
    return (told or lines or [type(error).__name__])[-1]
