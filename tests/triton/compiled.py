"""What the compiler makes of the Triton kernels for Hopper (sm_90), found out without a card.

`recording` catches the launches of host functions instead of running them, `compiled` compiles one with the ptxas that
comes with Triton and reads the machine code. ``python -m tests.triton.compiled [WORD ...]`` prints the table of all ops
of `tests.triton.full_size`, or of those whose label has one of the words.

What it shows: registers, spills, shared memory, how wide the loads of each source line are, which tensor core
instructions there are. What it cannot: that a kernel is right or fast. Tensors on the meta device lie at address 0, so
all count as aligned to 16 bytes, views too.
"""

from __future__ import annotations

import hashlib
import inspect
import linecache
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

# A cache for this directory alone: Triton's key is the source, but what it keeps names files, maybe of a checkout that
# is gone, and lines are looked up there.
ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antangelmed"
os.environ["TRITON_CACHE_DIR"] = str(CACHE / f"triton-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]}")
TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Of a Hopper multiprocessor (CUDA programming guide, compute capability 9.0).
REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 228 * 1024, 64, 32
MOST_SHARED = 227 * 1024  # of one program: the system takes 1 KiB of each

# Of PTX: files, places (the innermost where functions are inlined), loads to registers and to shared memory.
_FILE = re.compile(r'\.file\s+(\d+) "([^"]+)"')
_PLACE = re.compile(r"^\s*\.loc\s+(\d+) (\d+)")
_LOAD = re.compile(r"\bld\.global[.\w:]*?(?:\.v(\d+))?\.[bfsu](\d+)\s")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\], (0x[0-9a-f]+|\d+)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]+)")
_TENSOR_CORE = ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA")


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be compiled for one call, and the grid."""

    function: jit.JITFunction
    grid: tuple[int, ...]
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any

    @property
    def name(self) -> str:
        return f"{Path(inspect.getfile(self.function.fn)).stem}.{self.function.fn.__name__}"

    @cached_property
    def key(self) -> str:
        """The same for launches that are compiled to the same code."""
        return repr((self.name, self.signature, self.constexprs, self.attributes, self.options))


@dataclass
class Resources:
    """What a compiled kernel takes; sizes in bytes. loads: number of load instructions by source line and width."""

    registers: int
    stack: int
    shared: int
    warps: int
    loads: dict[tuple[str, int], Counter[int]] = field(default_factory=dict)
    asynchronous: int = 0  # of the loads: those to shared memory, under way while the program goes on
    tensor_core: Counter[str] = field(default_factory=Counter)
    spills: int = 0  # instructions that go to local memory

    @property
    def programs(self) -> int:
        """How many run on one multiprocessor at once."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_warps = min(WARPS // self.warps, REGISTERS // (per_warp * self.warps))
        return min(by_warps, SHARED // (self.shared + 1024), PROGRAMS)

    def widths(self, pattern: str) -> Counter[int]:
        """Bytes per thread of the loads in source lines that match, by number of instructions."""
        found: Counter[int] = Counter()
        for (file, line), widths in self.loads.items():
            if re.search(pattern, linecache.getline(file, line)):
                found.update(widths)
        return found


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block launches are added to the list, and nothing runs."""
    launches: list[Launch] = []
    backend = make_backend(TARGET)

    def run(self: jit.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # As JITFunction.run does, but for the target instead of the present device.
        bind = jit.create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constexprs, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        grid = grid(bound) if callable(grid) else grid
        launches.append(Launch(self, tuple(grid), signature, constexprs, attributes, options))

    original, jit.JITFunction.run = jit.JITFunction.run, run
    try:
        yield launches
    finally:
        jit.JITFunction.run = original


_cache: dict[str, Resources] = {}


def compiled(launch: Launch) -> Resources:
    """Compile it, once per process."""
    if launch.key not in _cache:
        source = ASTSource(launch.function, launch.signature, launch.constexprs, launch.attributes)
        kernel = triton.compile(source, target=TARGET, options=launch.options.__dict__)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
            code = _tool("nvdisasm", "--print-code", file.name)
        registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
        found = Resources(registers, stack, kernel.metadata.shared, kernel.metadata.num_warps)
        _read_code(code, found)
        _read_loads(kernel.asm["ptx"], found)
        _cache[launch.key] = found
    return _cache[launch.key]


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _read_code(code: str, found: Resources) -> None:
    for name in _INSTRUCTION.findall(code):
        opcode = name.partition(".")[0]
        found.spills += opcode in ("LDL", "STL")
        if opcode in _TENSOR_CORE:
            found.tensor_core[name] += 1


def _read_loads(ptx: str, found: Resources) -> None:
    files = dict(_FILE.findall(ptx))
    place, begins, fixed = ("?", 0), False, False
    for line in ptx.splitlines():
        if "inline asm" in line:
            # LLVM counts the lines of an inline assembly on from its place, as if they stood in the file: 3.9 does.
            begins, fixed = "begin" in line, False
        elif (where := _PLACE.search(line)) and not fixed:
            place, fixed = (files[where[1]], int(where[2])), begins
        elif load := _LOAD.search(line):
            found.loads.setdefault(place, Counter())[int(load[1] or 1) * int(load[2]) // 8] += 1
        elif copy := _COPY.search(line):
            found.loads.setdefault(place, Counter())[int(copy[1], 0)] += 1
            found.asynchronous += 1


HEAD = f"{'kernel':28} {'grid':>9} {'warps':>5} {'regs':>4} {'spills':>6} {'KiB':>6} {'/SM':>3} {'async':>5}  loads"


def row(launch: Launch) -> str:
    """Return one line on a launch."""
    found = compiled(launch)
    widths: Counter[int] = sum(found.loads.values(), Counter())
    many = [f"{width} B: {number}" for width, number in sorted(widths.items(), reverse=True)]
    many += [f"{name}: {number}" for name, number in found.tensor_core.items()]
    return (
        f"{launch.name:28} {','.join(map(str, launch.grid)):>9} {found.warps:>5} {found.registers:>4} "
        f"{found.spills:>6} {found.shared / 1024:>6.1f} {found.programs:>3} {found.asynchronous:>5}  {', '.join(many)}"
    )


def reason(error: BaseException) -> str:
    """What was wrong in the kernel: the compiler's error tells where, its cause what."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def main(words: list[str]) -> None:
    """Print the table of the ops at the real model's sizes."""
    from tests.triton.full_size import TOKENS, cases, launches

    print(f"Triton {triton.__version__}, sm_90. spills: instructions on local memory. KiB: of shared memory.")
    print(
        "/SM: programs at once on a multiprocessor. loads: instructions by bytes per thread; async: to shared memory."
    )
    print(HEAD)
    for tokens in TOKENS:
        for label, op, arguments in cases(tokens):
            if words and not any(word in label for word in words):
                continue
            print(f"# {label}, {tokens} tokens")
            try:
                caught = launches(op, arguments)
                for launch in caught:
                    print(row(launch), flush=True)
                if not caught:
                    print("no kernel of ours")
            except Exception as error:  # the next may do
                print(f"missing: {reason(error)}")


if __name__ == "__main__":
    main(sys.argv[1:])
