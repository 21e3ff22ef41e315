"""Compile the C kernels on the machine that runs them, once, and load them.

In: the sources in ``ops/csrc``. Out: a `ctypes.CDLL` whose functions run on the OpenMP threads that torch has already
made. The library lies in ``${XDG_CACHE_HOME:-~/.cache}/antangelmed/kernels/`` under a name made of everything that it
depends on: sources, flags, compiler, processor. So an update, another compiler or a shared home on another processor
gets a library of its own, and nothing is ever rebuilt in place.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")

# Nobody looks at `errno` or at floating-point traps; without them, loops with sqrt and comparisons become vector code.
# Nothing here lets the compiler reorder a sum or forget about NaN.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
TUNING = {"aarch64": "-mcpu=native"}

COMPILE_TIMEOUT_S = 300

_REMEDY = "set XDG_CACHE_HOME to a folder of your own that can be written to and run from"


class BuildError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why in one line."""


def load() -> ctypes.CDLL:
    """Return the compiled kernels, from the cache or compiled now. Raises `BuildError`."""
    found = compiler()
    flags = (*FLAGS, TUNING.get(platform.machine(), "-march=native"))
    try:
        library = cache_folder("kernels") / f"kernels-{_fingerprint(found, flags)}.so"
        if not library.exists():
            _compile(found, flags, library)
        kernels = ctypes.CDLL(str(library))
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{found} took more than {error.timeout:.0f} s") from error
    except OSError as error:
        raise BuildError(f"{error}; {_REMEDY}") from error
    _share_threads(kernels)
    return kernels


def compiler() -> str:
    """Return the path of a C compiler. Raises `BuildError`."""
    for name in ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError("no C compiler (cc, gcc or clang) on the PATH; install gcc")


def cache_folder(name: str) -> Path:
    """Return the user's own folder of that name for what is compiled here, made if need be. Raises `BuildError`.

    What lies in it is executed, so it must be no one else's.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "antangelmed" / name
    except RuntimeError as error:
        raise BuildError(f"this user has no home directory; {_REMEDY}") from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"{folder} belongs to another user or others can write to it; chmod 700 it, or {_REMEDY}")
    return folder


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False, timeout=60).stdout
    parts = [version, " ".join(flags).encode(), _processor()]
    parts += [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".c", ".h")]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _processor() -> bytes:
    """What ``-march=native`` looks at: the model and feature lines of the first processor."""
    wanted = ("model", "flags", "features", "cpu ")
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor().encode()
    return "\n".join(line for line in first.splitlines() if line.lower().startswith(wanted)).encode()


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile to a name of our own and rename: two processes that start at once both end with a whole file."""
    descriptor, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(descriptor)
    try:
        command = [compiler, *flags, str(SOURCES / "kernels.c"), "-o", temporary, "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_TIMEOUT_S)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["no message"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise BuildError(f"{compiler} failed: {first.strip()}")
        os.replace(temporary, library)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _share_threads(kernels: ctypes.CDLL) -> None:
    """Hand the kernels the OpenMP runtime of torch by its addresses; without one they run on one thread."""
    mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line}
    runtimes = sorted(path for path in mapped if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))
    for path in sorted(runtimes, key=lambda path: "torch" not in path):
        runtime = ctypes.CDLL(path)
        kernels.team_init.argtypes = [ctypes.c_void_p] * 3
        names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num")
        kernels.team_init(*(ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names))
        return
