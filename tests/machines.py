"""Machines laid out in a folder, for the probes of `ascend.devices` to look at."""

from ascend.devices import Host

SOURCED = {"ASCEND_HOME_PATH": "/cann", "ASCEND_OPP_PATH": "/cann/opp"}
DRIVER_FILE = "/proc/driver/nvidia/version"
OLD_DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12\n"
)
NEW_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (builder)\n"


def machine(folder, nodes=(), files=None, packages=None, environ=None, built_with=None):
    """Lay out a machine in ``folder``: device nodes, files by absolute path, installed packages, an environment."""
    for name, text in {**dict.fromkeys(nodes, ""), **(files or {})}.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    site = folder / "site"
    for name, version in (packages or {}).items():
        metadata = site / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (site / name).mkdir()
        (site / name / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {built_with!r}\n")
    return Host(folder, dict(environ or {}), (str(site),))
