"""What can be told before anything slow starts: is the port free, is the model whole, does it fit what was asked.

Only the standard library and the light parts of `ascend` are imported here: a mistake is answered within two seconds.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from pathlib import Path

from ascend.checkpoint import Checkpoint, open_checkpoint
from ascend.errors import UserError, run_command
from convert.demo_config import MARKER
from convert.manifest import MANIFEST, NOTHING_VOUCHES, check_full, check_quick, read_manifest, summary
from serve.args import LaunchSettings, parse
from serve.planning.model import model_of

LISTENING = "0A"  # the kernel's TCP_LISTEN in /proc/net/tcp, include/net/tcp_states.h
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def check(settings: LaunchSettings, early: bool = False) -> Checkpoint | None:
    """Check all that needs no device: the port and, where one is named, the model. Raises `UserError`.

    early: the environment is still to be made, so what needs a package, or long, is left for the second time.
    """
    check_port(settings.host, settings.port)
    if settings.model is None:
        return None
    is_vouched_for = check_files(settings, settings.model, early)
    checkpoint = check_model(settings.model, settings.max_model_len)
    if not (is_vouched_for or early or settings.verify == "off" or MARKER in checkpoint.config):
        print(f"{settings.model}: {NOTHING_VOUCHES}", file=sys.stderr)
    return checkpoint


def check_files(settings: LaunchSettings, model: Path, early: bool) -> bool:
    """Check a model's files against its manifest, and that against ``settings.key``; False if there is no manifest.

    The signature comes first: until it is good, nothing of the directory is believed. Raises `UserError`.
    """
    is_asked_for = settings.key is not None or settings.verify in ("quick", "full")
    if settings.verify == "off" or not model.is_dir() or not (is_asked_for or (model / MANIFEST).exists()):
        return False
    signed = None
    if settings.key is not None and not early:
        from convert.signature import verify_signature  # needs a package

        signed = verify_signature(model, settings.key)
    manifest = read_manifest(model, signed)
    if settings.verify != "full" or early:
        problems = check_quick(model, manifest)
    else:
        from ascend.progress import Progress  # needs a package

        what = f"{len(manifest.files)} files, {manifest.nbytes / 1e9:.1f} GB"
        print(f"hashing {what}: {manifest.nbytes / 1e9:.0f} s at 1 GB/s, longer from a slow disk", file=sys.stderr)
        with Progress("SHA-256", manifest.nbytes) as progress:
            problems = check_full(model, manifest, progress.advance)
    if problems:
        raise UserError(summary(problems))
    return True


def check_port(host: str, port: int) -> None:
    """Raise `UserError` if the server could not listen there; for a taken port it names the process that holds it."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {host}: not an address of this machine ({error.strerror or error})") from None
    with socket.socket(family, kind) as probe:
        # As the server itself will do: connections of an earlier server that are still closing do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"port {port} is taken by {port_holder(port)}; stop it or choose another --port"
                ) from None
            reason = os.strerror(error.errno or 0)
            raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --host or --port") from None


def reserve_port(port: int) -> socket.socket:
    """Keep other launchers off the port until the server itself holds it. Returns what must be kept open meanwhile.

    A name in the abstract socket namespace lives as long as its owner, so nothing can be left behind. Raises
    `UserError` that names the launcher which was first.
    """
    name = f"\0antangelmed/serve/{port}"
    reservation = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        reservation.bind(name)
        reservation.listen()
    except OSError:
        reservation.close()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            try:
                client.connect(name)
                pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                owner = f"pid {pid}"
            except OSError:
                owner = "another user's"
        raise UserError(
            f"port {port} is being taken by another start of this launcher ({owner}); choose another --port"
        ) from None
    return reservation


def port_holder(port: int) -> str:
    """Return "pid 123 (name)" for the process that listens on a TCP port, or why that cannot be told."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in filter(str.isdecimal, os.listdir("/proc")):
        try:
            for descriptor in os.scandir(f"/proc/{process}/fd"):
                if os.readlink(descriptor.path) in inodes:
                    return f"pid {process} ({Path(f'/proc/{process}/comm').read_text().strip()})"
        except OSError:
            continue  # it has ended meanwhile, or belongs to someone else
    return "a process of another user (run as root to see which)" if inodes else "a socket that is not listening yet"


def check_model(path: Path, max_model_len: int | None) -> Checkpoint:
    """Return the checkpoint if an engine can load it. Raises `UserError` naming the file that is wrong."""
    checkpoint = open_checkpoint(path)
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise UserError(f"{path}: has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy the whole directory")
    longest = model_of(checkpoint.config, path.name).longest
    if max_model_len is not None and max_model_len > longest:
        raise UserError(f"--max-model-len {max_model_len} is more than the model's {longest} tokens; lower it")
    return checkpoint


def has_chat_template(path: Path) -> bool:
    """Return whether the tokenizer can turn messages into a prompt; a base model's may not."""
    if (path / "chat_template.jinja").exists():
        return True
    file = path / "tokenizer_config.json"
    return file.exists() and '"chat_template"' in file.read_text(errors="replace")


def main() -> None:
    """Check the launcher's command line; `launch.sh` does so before it installs anything."""
    check(parse(sys.argv[1:]), early=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
