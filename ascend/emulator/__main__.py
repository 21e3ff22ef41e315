"""`python -m ascend.emulator -- COMMAND …`: run any Python program as if eight Ascend 910B3 were in this machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from ascend.errors import UserError, run_command

USAGE = "usage: python -m ascend.emulator -- COMMAND …   for example: -- python -m perf parity --help"
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Return this process's environment, changed so that a Python started in it computes on the emulated cards.

    Raises `UserError` if torch-npu cannot be had or the runtime cannot be compiled.
    """
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # a torch_npu beside torch finds no CANN in this process
    from ascend.emulator import package, runtime  # with torch: a wrong command is told without waiting for it
    from ops.build import BuildError

    try:
        torch_npu = package.folder(package.version())
        changes = runtime.environment(runtime.folder(torch_npu))
    except BuildError as error:
        raise UserError(f"the emulator cannot be built: {error}") from None
    paths = [str(Path(__file__).with_name("bootstrap")), str(torch_npu), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environ = os.environ | changes | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    environ.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)  # as on a machine with a card, `import torch` brings torch_npu
    return environ


def main(argv: list[str]) -> int:
    """Become the command, in the emulator's environment."""
    if argv[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    command = argv[1:] if argv[:1] == ["--"] else argv
    if not command:
        raise UserError(f"no command; {USAGE}")
    program = sys.executable if command[0] in ("python", "python3") else shutil.which(command[0])
    if program is None:
        raise UserError(f"no program '{command[0]}' on the PATH")
    return os.execve(program, [program, *command[1:]], environment())


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
