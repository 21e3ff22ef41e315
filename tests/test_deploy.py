"""Containers: Kubernetes, compose and the images keep one list of rules, and their numbers fit the launcher's.

Where a tool for a kind of file is at hand, it has its say too: kubectl, kubernetes-validate, docker compose, hadolint.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ascend
from serve.args import parse
from serve.engine import KINDS
from tests.deploy_files import DEPLOY, PROBE, ROOT, SETTINGS, SLOWEST_LOAD_S, STOP_S, compose, run, seconds, tool

DEVICES = ("cpu", "cuda", "npu")


@cache
def rendered(device: str) -> list[dict[str, Any]]:
    """The objects that an overlay renders to."""
    done = run(tool("kubectl"), "kustomize", DEPLOY / "kubernetes" / "overlays" / device)
    assert done.returncode == 0, done.stderr
    return [one for one in yaml.safe_load_all(done.stdout) if one]


def kind(device: str, wanted: str) -> dict[str, Any]:
    (found,) = (one for one in rendered(device) if one["kind"] == wanted)
    return found


def pod(device: str) -> dict[str, Any]:
    return kind(device, "Deployment")["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def container(device: str) -> dict[str, Any]:
    (found,) = pod(device)["containers"]
    assert "initContainers" not in pod(device)
    return found  # type: ignore[no-any-return]


def probe_limit(probe: dict[str, Any]) -> float:
    return float(probe["periodSeconds"] * probe["failureThreshold"])


def before_the_end(device: str) -> float:
    program, wait = container(device)["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    return float(wait)


KUBERNETES_RULES: dict[str, Callable[[str], bool]] = {
    "stops later than the drain": lambda d: pod(d)["terminationGracePeriodSeconds"] > STOP_S + before_the_end(d),
    "starts longer than the launcher tries": lambda d: probe_limit(container(d)["startupProbe"]) > SETTINGS.timeout,
    "starts longer than the slowest load": lambda d: probe_limit(container(d)["startupProbe"]) > SLOWEST_LOAD_S,
    "liveness is not readiness": lambda d: (
        container(d)["livenessProbe"]["exec"] != container(d)["readinessProbe"]["exec"]
    ),
    "liveness waits for the launcher": lambda d: probe_limit(container(d)["livenessProbe"]) > 2 * SETTINGS.hang,
    "probes are ours": lambda d: (
        {Path(container(d)[f"{name}Probe"]["exec"]["command"][0]).name for name in ("startup", "readiness", "liveness")}
        == {PROBE.name}
    ),
    "not root": lambda d: pod(d)["securityContext"]["runAsNonRoot"] and pod(d)["securityContext"]["runAsUser"] > 0,
    "owns what it writes": lambda d: pod(d)["securityContext"]["fsGroup"] == pod(d)["securityContext"]["runAsGroup"],
    "seccomp": lambda d: pod(d)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"},
    "root is read-only": lambda d: container(d)["securityContext"]["readOnlyRootFilesystem"] is True,
    "no capabilities": lambda d: container(d)["securityContext"]["capabilities"] == {"drop": ["ALL"]},
    "no more privileges": lambda d: (
        container(d)["securityContext"]["allowPrivilegeEscalation"] is False
        and not container(d)["securityContext"].get("privileged")
    ),
    "nothing of the host": lambda d: (
        not {"hostNetwork", "hostPID", "hostIPC"} & set(pod(d))
        and not any("hostPath" in volume for volume in pod(d)["volumes"])
        and not any("hostPort" in port for port in container(d)["ports"])
    ),
    "no token of the cluster": lambda d: pod(d)["automountServiceAccountToken"] is False,
    "model is read-only": lambda d: (
        next(mount for mount in container(d)["volumeMounts"] if mount["mountPath"] == "/model")["readOnly"]
        and next(one for one in pod(d)["volumes"] if one["name"] == "model")["persistentVolumeClaim"]["readOnly"]
    ),
    "shared memory": lambda d: {"name": "shm", "mountPath": "/dev/shm"} in container(d)["volumeMounts"],
    "cards asked for are cards granted": lambda d: (
        {name: amount for name, amount in container(d)["resources"]["requests"].items() if "/" in name}
        == {name: amount for name, amount in container(d)["resources"]["limits"].items() if "/" in name}
    ),
    "one server a set of cards": lambda d: kind(d, "Deployment")["spec"]["strategy"] == {"type": "Recreate"},
    "namespace refuses worse": lambda d: (
        kind(d, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    ),
    "inside the cluster alone": lambda d: kind(d, "Service")["spec"]["type"] == "ClusterIP",
    "no way out": lambda d: (
        kind(d, "NetworkPolicy")["spec"]["egress"] == []
        and set(kind(d, "NetworkPolicy")["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    ),
    "only the gateway comes in": lambda d: (
        [list(source) for rule in kind(d, "NetworkPolicy")["spec"]["ingress"] for source in rule["from"]]
        == [["podSelector"]]
    ),
    "policy and service are about the server": lambda d: all(
        labels.items() <= kind(d, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
        for labels in (
            kind(d, "Service")["spec"]["selector"],
            kind(d, "NetworkPolicy")["spec"]["podSelector"].get("matchLabels", {}),
            kind(d, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        )
    ),
    "image is pinned": lambda d: container(d)["image"] == f"antangelmed-{d}:{ascend.__version__}",
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", KUBERNETES_RULES)
def test_kubernetes(device: str, rule: str) -> None:
    assert KUBERNETES_RULES[rule](device)


def test_the_cards_of_kubernetes() -> None:
    assert container("npu")["resources"]["limits"]["huawei.com/Ascend910"] == "8"
    assert int(container("cuda")["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    assert not [name for name in container("cpu")["resources"]["limits"] if "/" in name]


def test_kubernetes_starts_what_the_launcher_understands() -> None:
    settings = yaml.safe_load(kind("cpu", "ConfigMap")["data"]["serve.yaml"])
    (words,) = (container("cpu")["args"],)
    assert words == ["--config", "/etc/antangelmed/serve.yaml"]
    config = parse(["--config", str(DEPLOY / "kubernetes" / "base" / "serve.yaml")])
    assert (config.port, str(config.model)) == (kind("cpu", "Service")["spec"]["ports"][0]["port"], "/model")
    assert config.host == settings["host"] == "0.0.0.0"  # the pod's own address; the network policy guards it
    assert parse(["--config", str(DEPLOY / "systemd" / "serve.yaml.example")]).host == "127.0.0.1"


COMPOSE_RULES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "stops later than the drain": lambda s: seconds(s["stop_grace_period"]) > STOP_S,
    "not root": lambda s: int(s["user"].split(":")[0]) > 0,
    "root is read-only": lambda s: s["read_only"] is True,
    "no capabilities": lambda s: s["cap_drop"] == ["ALL"] and "cap_add" not in s,
    "no more privileges": lambda s: s["security_opt"] == ["no-new-privileges:true"] and "privileged" not in s,
    "nothing of the host": lambda s: not {"network_mode", "pid", "ipc", "userns_mode"} & set(s),
    "writes where its user may": lambda s: (
        f"uid={s['user'].split(':')[0]}," in s["tmpfs"][1] and "/tmp:" in s["tmpfs"][0]
    ),
    "what it is given is read-only": lambda s: all(one["read_only"] for one in s["volumes"] if one["type"] == "bind"),
    "nothing is made on the host": lambda s: all(
        one["bind"] == {"create_host_path": False} for one in s["volumes"] if one["type"] == "bind"
    ),
    "no way out": lambda s: (
        list(s["networks"]) == ["antangelmed"] and compose()["networks"]["antangelmed"]["internal"] is True
    ),
    # An internal network publishes no port; if one is published one day, then to this machine alone.
    "this machine alone": lambda s: all(str(port).startswith("127.0.0.1:") for port in s.get("ports", [])),
    "a mistake is not repeated for ever": lambda s: re.fullmatch(r"on-failure:[1-9]", s["restart"]) is not None,
    "logs end": lambda s: {"max-size", "max-file"} <= set(s["logging"]["options"]),
    "no core dumps": lambda s: s["ulimits"]["core"] == 0,
    "no secrets": lambda s: all(value is None for value in s["environment"].values()),
    "its image": lambda s: s["image"] == f"antangelmed-{s['profiles'][0]}:{ascend.__version__}",
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", COMPOSE_RULES)
def test_compose(device: str, rule: str) -> None:
    assert set(compose()["services"]) == set(DEVICES)
    assert COMPOSE_RULES[rule](compose()["services"][device])


def test_compose_starts_what_the_launcher_understands() -> None:
    for service in compose()["services"].values():
        assert parse(service["command"]).host == "0.0.0.0"
        assert (ROOT / "serve" / service["build"]["context"].removeprefix("../")).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_compose_gives_the_cards_and_the_driver() -> None:
    npu = compose()["services"]["npu"]
    driver = {"davinci_manager", "devmm_svm", "hisi_hdc"}
    assert {Path(one).name for one in npu["devices"]} == driver | {f"davinci{number}" for number in range(8)}
    assert {one["source"] for one in npu["volumes"] if one["type"] == "bind"} > {
        "/usr/local/dcmi",
        "/usr/local/bin/npu-smi",
        "/usr/local/Ascend/driver/lib64",
        "/usr/local/Ascend/driver/version.info",
        "/etc/ascend_install.info",
    }


# --- images


@cache
def instructions(device: str) -> list[tuple[str, str]]:
    """A Dockerfile as pairs of instruction and rest."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / f"Dockerfile.{device}").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def said(device: str, instruction: str) -> list[str]:
    return [rest for word, rest in instructions(device) if word == instruction]


IMAGE_RULES: dict[str, Callable[[str], bool]] = {
    "a tag and room for a digest": lambda d: (
        said(d, "FROM")[-1] == "${IMAGE}:${TAG}${DIGEST:+@${DIGEST}}"
        and any(re.fullmatch(r"TAG=v?\d+\.\d+\.\d+.*", one) for one in said(d, "ARG"))
    ),
    "not root": lambda d: re.fullmatch(r"\d{4,}:\d{4,}", user_of(d)) is not None,
    "its user has a name": lambda d: "useradd --uid" in " ".join(said(d, "RUN")),
    "starts the launcher": lambda d: parse(json.loads(said(d, "ENTRYPOINT")[0])[-4:]).device == d,
    "healthy is ready": lambda d: said(d, "HEALTHCHECK")[0].endswith('/probe.sh", "ready"]'),
    "waits longer than the launcher tries": lambda d: (
        seconds(re.search(r"--start-period=(\S+)", said(d, "HEALTHCHECK")[0])[1]) > SETTINGS.timeout  # type: ignore[index]
    ),
    "labels": lambda d: (
        {f"org.opencontainers.image.{one}" for one in ("title", "version", "revision", "licenses")}
        <= {word.split("=")[0] for word in shlex.split(said(d, "LABEL")[0])}
    ),
    "version": lambda d: f"VERSION={ascend.__version__}" in said(d, "ARG"),
    "nothing from the network when it runs": lambda d: not re.search(r"curl|wget|git clone", " ".join(said(d, "RUN"))),
    # A request for log-probabilities makes torch compile a library; in a noexec /tmp that ended the engine (seen).
    "compiles where it may be run": lambda d: all(
        f"{name}=/var/cache/antangelmed/" in said(d, "ENV")[0]
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    ),
    "writes where compose and Kubernetes mount": lambda d: all(
        path in said(d, "RUN")[-2 if d == "cpu" else -1] for path in ("/var/lib/antangelmed", "/var/cache/antangelmed")
    ),
}


def user_of(device: str) -> str:
    """The user of an image, with the build's arguments put in."""
    values = dict(argument.split("=") for argument in said(device, "ARG") if "=" in argument)
    return re.sub(r"\$\{(\w+)\}", lambda name: values[name[1]], said(device, "USER")[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", IMAGE_RULES)
def test_image(device: str, rule: str) -> None:
    assert IMAGE_RULES[rule](device)


@pytest.mark.parametrize("device", DEVICES)
def test_all_agree_on_the_user(device: str) -> None:
    assert compose()["services"][device]["user"] == user_of(device)
    context = pod(device)["securityContext"]
    assert f"{context['runAsUser']}:{context['runAsGroup']}" == user_of(device)


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_the_base_image_is_of_an_engine_that_the_launcher_takes(device: str) -> None:
    (tag,) = (one.removeprefix("TAG=v") for one in said(device, "ARG") if one.startswith("TAG="))
    number = tuple(map(int, tag.split(".")[:2]))
    (engine,) = (found for key, found in KINDS.items() if key in (device, ("vllm", device)))
    for _, oldest, below in engine.packages:
        assert tuple(map(int, oldest.split("."))) <= number < tuple(map(int, below.split(".")))


# What the image of vLLM-Ascend 0.23.0 holds: its requirements.txt and that of vLLM 0.23.0. Ours is installed there with
# --no-deps, so nothing else would see that the two do not fit.
IN_THE_NPU_IMAGE = {
    "torch": "2.10.0",
    "transformers": "5.5.4",
    "pydantic": "2.12.0",
    "vllm": "0.23.0",
    "torch-npu": "2.10.0.post4",
}


def test_our_metadata_fits_the_image_of_vllm_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    runpy.run_path(str(ROOT / "setup.py"))
    assert SpecifierSet(told["python_requires"]).contains("3.12.13")
    asked = map(Requirement, [*told["install_requires"], *told["extras_require"]["npu"]])
    checked = [one for one in asked if one.name in IN_THE_NPU_IMAGE]
    assert {one.name for one in checked} == set(IN_THE_NPU_IMAGE)
    assert [str(one) for one in checked if not one.specifier.contains(IN_THE_NPU_IMAGE[one.name])] == []


# --- what the tools for these files say, where they are


def test_compose_is_understood() -> None:
    docker = tool("docker")
    if run(docker, "compose", "version").returncode:
        pytest.skip("docker has no compose plugin here")
    environment = {**os.environ, "MODEL": "/models"}
    for device in DEVICES:
        done = run(
            docker, "compose", "-f", DEPLOY / "compose.yaml", "--profile", device, "config", "-q", env=environment
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_kubernetes_validate(device: str, tmp_path: Path) -> None:
    validate = tool("kubernetes-validate")
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(rendered(device)))
    done = run(validate, "--strict", "--quiet", tmp_path / "all.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("device", DEVICES)
def test_hadolint(device: str) -> None:
    done = run(tool("hadolint"), DEPLOY / f"Dockerfile.{device}")
    assert done.returncode == 0, done.stdout


def test_an_image_gets_what_it_needs_and_nothing_that_lies_around() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    taken = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in taken)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages | {"setup.py", "pyproject.toml", "requirements"} <= taken
    assert not {"tests", ".git", ".venv"} & taken
