"""The launcher before the engine: every mistake is one line within two seconds, and the environment is made once."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ascend.checkpoint import open_checkpoint
from ascend.devices import get_device
from ascend.errors import UserError
from ascend.model_shape import context_limit
from convert.demo import write_demo
from convert.demo_config import MARKER
from convert.manifest import MANIFEST, write_manifest
from convert.signature import sign
from serve import engine
from serve.args import REFUSED, parse
from serve.locked import difference
from serve.preflight import check, port_holder, reserve_port
from serve.resolve import resolve
from serve.watch.process import end_session, session_members
from serve.watch.progress import error_line
from tests.launcher import LAUNCH, ROOT, free_port, run_in_time
from tests.test_signature import write_key
from tests.tiny import edit_config, read_config, user_error

SECONDS = 2.0
ENV_SH = ROOT / "serve" / "env.sh"


def launch(*arguments: str, cwd: Path | None = None, script: Path = LAUNCH) -> subprocess.CompletedProcess[str]:
    """Run the launcher as a user does; it must end by itself, in time."""
    return run_in_time([str(script), *arguments], SECONDS, cwd=cwd)


def refusal(*arguments: str) -> str:
    """The one line that answers a mistake."""
    done = launch(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_demo(path, max_shard_size="2MB")
    return path


@pytest.fixture
def broken(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "broken"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.slow  # a start each
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--prot 8123", "unknown flag '--prot' (did you mean '--port'?)"),
        ("--devcie=cpu", "did you mean '--device'?"),
        ("--swap-space 2", "flags of the engine itself go after '--'"),
        ("extra", "unknown flag 'extra'"),
        ("--device", "argument --device: expected one argument"),
        ("--device gpu", "unknown device 'gpu' (did you mean 'cuda'?)"),
        ("--device tpu", "unknown device 'tpu'"),
        ("--port 0", "'0' is not a port"),
        ("--port 70000", "'70000' is not a port"),
        ("--port http", "'http' is not a port"),
        ("--host 203.0.113.1", "cannot listen on 203.0.113.1"),
        ("--host no.such.host.invalid", "--host no.such.host.invalid: not an address"),
        ("--dtype int3", "invalid choice: 'int3'"),
        ("--max-model-len 0", "'0' is not a whole number from 1 on"),
        ("--timeout soon", "'soon' is not a time"),
        ("--model /nowhere/at/all", "/nowhere/at/all: no such model directory"),
        (f"--model {__file__}", "is not a directory"),
        (f"--model {ROOT / 'serve'}", "has no config.json"),
        ("--verify fully", "invalid choice: 'fully'"),
        ("--verify full", "--verify full needs --model: the demo has no manifest"),
        ("--key pub.pem", "--key needs --model"),
        ("--model . --key pub.pem --verify off", "--key asks for a signed manifest, --verify off"),
        ("-- --trust-remote-code", "engine flag '--trust-remote-code' is refused: code that lies in a model"),
        ("-- --port 1", "engine flag '--port' is refused: it is the launcher's own flag"),
    ],
)
def test_a_mistake_in_the_flags(arguments: str, expected: str) -> None:
    assert expected in refusal("--device", "cpu", *arguments.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "expected"), [("npu", "torch_npu is not installed"), ("cuda", "no NVIDIA driver"), ("cuda:1", "cuda")]
)
def test_a_device_that_is_not_here(device: str, expected: str) -> None:
    try:
        get_device(device)
    except UserError:
        line = refusal("--device", device)
    else:
        pytest.skip(f"this machine has {device}")
    assert "is not available" in line
    assert expected in line


def test_a_taken_port_names_its_holder(taken_port: int) -> None:
    line = refusal("--device", "cpu", "--port", str(taken_port))
    assert f"port {taken_port} is taken by pid {os.getpid()} (" in line


def test_a_port_that_another_launcher_prepares() -> None:
    port = free_port()
    with reserve_port(port):
        line = refusal("--device", "cpu", "--port", str(port))
    assert f"port {port} is being taken by another start" in line
    assert f"(pid {os.getpid()})" in line
    reserve_port(port).close()  # free again at once


def test_a_free_port_has_no_holder() -> None:
    assert port_holder(free_port()) == "a socket that is not listening yet"


def truncate(path: Path) -> str:
    file = sorted(path.glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 7)
    return f"{file.name}: cut off within tensor "


def remove_shard(path: Path) -> str:
    file = sorted(path.glob("*.safetensors"))[0]
    file.unlink()
    return f"{file.name}: missing"


def damage_config(path: Path) -> str:
    (path / "config.json").write_text("{")
    return "config.json: not readable as JSON"


def other_model(path: Path) -> str:
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return "model_type is 'llama'"


def add_pickle(path: Path) -> str:
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return "pytorch_model.bin: a pickle can run code"


def remove_tokenizer(path: Path) -> str:
    (path / "tokenizer.json").unlink()
    return "has no tokenizer"


@pytest.mark.parametrize(
    "damage",
    [truncate, remove_shard, damage_config, other_model, add_pickle, remove_tokenizer],
    ids=lambda f: f.__name__,
)
def test_a_model_that_cannot_be_served(broken: Path, damage: Callable[[Path], str]) -> None:
    expected = damage(broken)
    assert expected in refusal("--device", "cpu", "--port", str(free_port()), "--model", str(broken))


def model_of(directory: Path, *, manifest: bool) -> Path:
    """A checkpoint that does not say it is a demo."""
    write_demo(directory)
    config = read_config(directory)
    (directory / "config.json").write_text(json.dumps({key: config[key] for key in config if key != MARKER}))
    if manifest:
        write_manifest(directory, command={}, source={})
    return directory


def checked(capsys: pytest.CaptureFixture[str], model: Path, *arguments: str, early: bool = False) -> str:
    """What the check prints for a good model."""
    check(parse(["--port", str(free_port()), "--model", str(model), *arguments]), early)
    return capsys.readouterr().err


def test_nothing_vouches_for_a_model_without_manifest(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(tmp_path / "model", manifest=False)
    said = checked(capsys, model)
    assert said.count("\n") == 1
    assert f"{model}: has no manifest.json, so nothing vouches for its files: `python -m convert manifest DIR`" in said
    assert checked(capsys, model, "--verify", "off") == ""
    assert checked(capsys, model, early=True) == ""  # it will be said once
    assert checked(capsys, demo) == ""
    for flags in (["--verify", "quick"], ["--verify", "full"], ["--key", "nothing"]):
        arguments = ["--device", "cpu", "--port", str(free_port()), "--model", str(model), *flags]
        assert "nothing" in user_error(check, parse(arguments))
    assert "has no manifest.json" in refusal(
        "--device", "cpu", "--port", str(free_port()), "--model", str(model), "--verify", "quick"
    )


def test_a_model_is_what_its_manifest_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(tmp_path / "model", manifest=True)
    assert checked(capsys, model) == ""
    with (model / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    assert checked(capsys, model) == ""  # the quick check reads no content
    with pytest.raises(UserError, match=r"model\.safetensors: its content is not what manifest\.json says"):
        checked(capsys, model, "--verify", "full")
    assert "hashing 8 files, 0.0 GB: 0 s at 1 GB/s, longer from a slow disk\n" in capsys.readouterr().err
    assert checked(capsys, model, "--verify", "full", early=True) == ""
    (model / "evil.py").write_text("print('hello')")
    edit_config(model, extra=1)
    line = refusal("--device", "cpu", "--port", str(free_port()), "--model", str(model))
    assert "config.json: has " in line
    assert "(and 1 more: `python -m convert verify DIR` lists them)" in line
    assert checked(capsys, model, "--verify", "off") == ""


def test_a_model_is_what_was_signed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(tmp_path / "model", manifest=True)
    key = write_key(tmp_path / "key", Ed25519PrivateKey.generate())
    pub = ["--key", str(tmp_path / "key.pub")]
    with pytest.raises(UserError, match=r"manifest\.sig: missing, so manifest\.json is not signed"):
        checked(capsys, model, *pub)
    sign(model, key)
    assert "hashing" in checked(capsys, model, *pub)
    assert checked(capsys, model, *pub, "--verify", "quick") == checked(capsys, model) == ""
    text = (model / "README.md").read_text()
    (model / "README.md").write_text(text.swapcase())  # of the same size
    with pytest.raises(UserError, match=r"README\.md: its content is not what manifest\.json says"):
        checked(capsys, model, *pub)
    capsys.readouterr()
    (model / "README.md").write_text("other")
    write_manifest(model, command={}, source={})
    assert checked(capsys, model) == ""  # who can write here can write a manifest
    assert checked(capsys, model, *pub, early=True) == ""  # before there is an environment no signature can be checked
    line = refusal("--device", "cpu", "--port", str(free_port()), "--model", str(model), *pub)
    assert f"{model / MANIFEST}: is not what {pub[1]} signed" in line


def test_a_context_beyond_the_models(demo: Path) -> None:
    line = refusal("--device", "cpu", "--port", str(free_port()), "--model", str(demo), "--max-model-len", "16385")
    assert "--max-model-len 16385 is more than the model's 16384 tokens" in line


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 4}}, 16384),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        ({}, None),
    ],
)
def test_context_limit(config: dict[str, object], limit: int | None) -> None:
    assert context_limit(config) == limit


@pytest.mark.parametrize("flag", sorted(REFUSED))
def test_engine_flags_that_are_refused_in_every_spelling(flag: str) -> None:
    spellings = [flag, f"{flag}=1"]
    if flag.startswith("--"):
        spellings += [flag.replace("-", "_").replace("__", "--", 1), flag[:-1]]
    for spelling in spellings:
        with pytest.raises(UserError, match="is refused: "):
            parse(["--", "--seed", "1", spelling])


def test_engine_flags_that_are_passed_on() -> None:
    flags = ("--seed", "2", "--enable-prefix-caching", "-O1", "--max-logprobs=8")
    assert parse(["--port", "9", "--", *flags]).engine_flags == flags


def test_dry_run_prints_a_command_that_a_shell_can_run(demo: Path) -> None:
    port = free_port()
    done = launch("--device", "cpu", "--port", str(port), "--model", str(demo), "--dry-run", "--", "--seed", "7")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", " "))
    assert words[0] == "env"
    settings = dict(word.split("=", 1) for word in words[1 : words.index("-m") - 1])
    assert settings.items() >= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}.items()
    assert int(settings["VLLM_CPU_KVCACHE_SPACE"]) >= 1
    flags = words[words.index("-m") :]
    assert flags[flags.index("--model") + 1] == str(demo)
    assert flags[flags.index("--port") + 1] == str(port)
    assert "--trust-remote-code" not in flags
    assert flags[-2:] == ["--seed", "7"]
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_what_the_user_has_set_is_kept_or_made_safe(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    environment = resolve(
        parse(["--device", "cpu", "--model", str(demo)]), open_checkpoint(demo)
    ).command.full_environment()
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["VLLM_LOGGING_LEVEL"] == "INFO"
    assert "VLLM_SERVER_DEV_MODE" not in environment
    assert set(environment["VLLM_PLUGINS"].split(",")) == {"mine", engine.PLUGIN}


def test_a_configuration_file_cannot_make_the_engine_unsafe(demo: Path, tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    for name, said in (
        ("VLLM_LOGGING_LEVEL", "is not for a file to set"),
        ("VLLM_SERVER_DEV_MODE", "is not for a file to set"),
        ("VLLM_API_KEY", "is a secret: set it in the launcher's environment"),
    ):
        file.write_text(f"environment: {{{name}: 1}}\n")
        settings = parse(["--device", "cpu", "--model", str(demo), "--config", str(file)])
        assert said in user_error(resolve, settings, open_checkpoint(demo))


def test_the_engine_must_be_one_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.check_engine("vllm", "cpu")
    monkeypatch.setattr(engine.metadata, "version", lambda name: "0.17.1")
    with pytest.raises(
        UserError, match=r"device cuda needs vllm from 0.32, below 0.34, and here it is 0.17.1: activate"
    ):
        engine.check_engine("vllm", "cuda")


def test_help_and_mistakes_need_no_torch() -> None:
    code = "import sys, serve.launch; print({'torch', 'transformers', 'vllm', 'numpy'} & set(sys.modules))"
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout == ("set()\n")
    assert "--ready-file" in launch("--help").stdout


def test_it_works_from_anywhere_through_a_link(tmp_path: Path) -> None:
    link = tmp_path / "a link"
    link.symlink_to(LAUNCH)
    (tmp_path / "serve.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')")
    done = launch("--device", "cpu", "--model", "nothing here", cwd=tmp_path, script=link)
    assert done.stderr == f"error: {tmp_path}/nothing here: no such model directory\n"


def test_a_second_preparation_costs_nothing() -> None:
    command = f"source {shlex.quote(str(ENV_SH))}; use_environment serve test; echo $ENV_PYTHON"
    seconds = []
    for _ in range(3):
        begin = time.monotonic()
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - begin)
    assert min(seconds) < 0.3
    assert done.stderr == ""
    assert Path(done.stdout.strip()).exists()


def test_locked_finds_the_first_difference(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    for text, expected in {
        "# nothing\n": None,
        "pytest==0.1\n": f"pytest is {pytest.__version__}, wanted 0.1",
        'pytest==0.1 ; python_version < "3"\n': None,
        f"pytest=={pytest.__version__}  # fine\nno-such-package==1\n": "no-such-package is not installed",
    }.items():
        lock.write_text(text)
        assert difference(str(lock)) == expected


@pytest.mark.slow
@pytest.mark.beside
def test_an_installation_that_fails_is_one_line_and_is_redone(tmp_path: Path) -> None:
    root = tmp_path / "clone with spaces"
    shutil.copytree(ROOT / "serve", root / "serve")
    (root / "requirements").mkdir()
    (root / "setup.py").touch()
    (root / "requirements" / "cpu.lock.txt").write_text("torch==0.0.1+cpu\n")
    (root / "requirements" / "engine-cpu.lock.txt").touch()
    command = f"source {shlex.quote(str(root / 'serve' / 'env.sh'))}; use_environment serve"
    clean = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment = {**clean, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", "-c", command], env=environment, stderr=subprocess.PIPE, text=True)

    first = start()
    while not (root / ".venv.unfinished").exists():
        assert first.poll() is None
        time.sleep(0.02)
    second = start()
    told = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert [first.returncode, second.returncode] == [2, 2]
    for lines in told:
        assert lines.splitlines()[-1].startswith("error: pip could not install")
        assert "set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels" in lines
        assert "install.log" in lines
    assert f"waiting for another start (pid {first.pid})" in told[1]
    assert "broken off: starting afresh" in told[1]


@pytest.mark.slow
def test_a_session_is_ended_to_the_last_process() -> None:
    # The leader ignores SIGTERM, one process has lost its parent, and one hangs that is given time to end by itself.
    script = (
        "trap '' TERM; (sleep 60 &); (exec -a multiprocessing.resource_tracker sleep 60) & sleep 60 & wait; sleep 60"
    )
    leader = subprocess.Popen(["bash", "-c", script], start_new_session=True)
    while len(session_members(leader.pid)) < 4:
        time.sleep(0.02)
    end_session(leader.pid, 0.2, leader.poll)
    assert session_members(leader.pid) == set()
    assert leader.poll() == -9


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("", "it wrote nothing to its log"),
        ("starting\n", "starting"),
        (
            "api_server.py: error: unrecognized arguments: --foo\n",
            "api_server.py: error: unrecognized arguments: --foo",
        ),
        (
            "(EngineCore pid=7) ERROR 11-22 14:28:07 [core.py:1] ValueError: heads do not fit\n"
            "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.\n",
            "ValueError: heads do not fit",
        ),
        (
            "pydantic_core.ValidationError: 1 validation error for X\n  Value error, too long [type=value_error]\n",
            "too long",
        ),
        ("OSError: [Errno 98] \x1b[31mAddress already in use\n", "OSError: [Errno 98]  [31mAddress already in use"),
    ],
)
def test_the_reason_an_engine_ended(tmp_path: Path, log: str, line: str) -> None:
    (tmp_path / "log").write_text(log)
    assert error_line(tmp_path / "log") == line
