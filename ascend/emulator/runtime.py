"""Build the stand-in for CANN, once per torch-npu release: six shared libraries, an empty toolkit, eight device nodes.

In: ``runtime.c`` (what answers), ``inert.txt`` (what may do nothing) and the names that torch_npu's own library looks
up. Out: a folder in the user's cache. A name that is in neither file becomes a function that fails and says its name.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ascend.emulator import package
from ascend.errors import UserError
from ops import build

HERE = Path(__file__).parent
# torch_npu links against these; all functions live in the first.
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
# The same for vllm-ascend's extension and for torch_npu's Ascend Transformer Boost, which it uses.
PLUGIN_LIBRARIES = (
    "ascend_dump",
    "ascendalog",
    "atb",
    "c_sec",
    "error_manager",
    "ge_common_base",
    "mmpa",
    "opapi",
    "platform",
    "profapi",
    "register",
    "runtime",
    "unified_dlog",
)
SOURCES = {"register": HERE / "plugin.c", "atb": HERE / "atb.c"}
CANN = "9.1.0"
CARDS = 8
# The C functions of CANN by their prefixes. Kernels (aclnn…) are left out: a native op not overridden has to fail.
_NAMES = re.compile(rb"(?<=\0)((?:acl(?!nn)|Hccl|Msprof|rt[A-Z])[A-Za-z0-9]\w+)(?=\0)")
_DEFINED = re.compile(r"\b((?:acl|Hccl|Msprof|rt[A-Z])\w+)[()]")


def folder(torch_npu: Path) -> Path:
    """Return the stand-in for the torch_npu package that lies in ``torch_npu``, made on first use."""
    plugin = package.plugin()
    sources = [(HERE / name).read_bytes() for name in ("runtime.c", "plugin.c", "atb.c", "inert.txt", "runtime.py")]
    named = f"{torch_npu} {plugin or ''}".encode()
    digest = hashlib.sha256(b"\0".join([named, *sources])).hexdigest()[:16]
    home = build.cache_folder("cann") / digest
    if not home.exists():
        staged = Path(tempfile.mkdtemp(dir=home.parent))
        try:
            _make(staged, torch_npu / "torch_npu" / "lib" / "libtorch_npu.so", plugin)
            os.rename(staged, home)
        except OSError:
            if not home.exists():  # not another process that was first
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return home


def environment(home: Path) -> dict[str, str]:
    """Return the variables that point torch_npu, the dynamic linker and `ascend.devices` at a stand-in."""
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {
        "ASCEND_EMULATOR": "1",
        "ASCEND_HOME_PATH": str(home / "cann"),
        "ASCEND_OPP_PATH": str(home / "cann" / "opp"),
        "ASCEND_DEV": str(home / "dev"),
        "LD_LIBRARY_PATH": f"{home / 'lib'}{os.pathsep + inherited if inherited else ''}",
        "TASK_QUEUE_ENABLE": "0",  # ops run where they are called: the emulator's order is the program's
    }


def _make(home: Path, libtorch_npu: Path, plugin: Path | None) -> None:
    for name in ("lib", "dev", "cann/runtime", "cann/compiler", "cann/opp"):
        (home / name).mkdir(parents=True)
    (home / "cann" / "ascend_toolkit_install.info").write_text(f"version={CANN}\n")
    for node in ("davinci_manager", *(f"davinci{card}" for card in range(CARDS))):
        (home / "dev" / node).touch()
    source = home / "runtime.c"
    source.write_text(_source(libtorch_npu, *(plugin.glob("*.so") if plugin else ())))
    _compile(source, home / "lib" / f"lib{LIBRARIES[0]}.so")
    # A function is looked for in the library that has it on the card; a handle also searches what it depends on.
    depends = ("-Wl,--no-as-needed", f"-L{home / 'lib'}", f"-l{LIBRARIES[0]}")
    for library in (*LIBRARIES[1:], *(PLUGIN_LIBRARIES if plugin else ())):
        _compile(SOURCES.get(library, Path(os.devnull)), home / "lib" / f"lib{library}.so", *depends)


def _source(libtorch_npu: Path, *extensions: Path) -> str:
    answered = (HERE / "runtime.c").read_text()
    inert = {line for line in (HERE / "inert.txt").read_text().split("\n") if line and not line.startswith("#")}
    named = {name.decode() for file in (libtorch_npu, *extensions) for name in _NAMES.findall(file.read_bytes())}
    rest = sorted(named - set(_DEFINED.findall(answered)))
    made = [_function(name, "0" if name in inert else f'emulator_unsupported("{name}")') for name in rest]
    return "\n".join([answered, *made, ""])


def _function(name: str, value: str) -> str:
    return f"long {name}(void) {{ return {value}; }}"


def _compile(source: Path, library: Path, *options: str) -> None:
    command = [build.compiler(), "-x", "c", "-O1", "-w", "-shared", "-fPIC", str(source), "-o", str(library), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=build.COMPILE_TIMEOUT_S, check=False)
    if result.returncode:
        raise UserError(f"the emulated runtime does not compile: {result.stderr.strip().splitlines()[0]}")
