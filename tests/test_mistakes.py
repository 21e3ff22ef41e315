"""Mistakes of every kind, through the launcher as a user calls it: one line with a remedy, exit code 2, at once.

Nothing is imitated but the machine: folders in which the device nodes and packages lie that the mistake is about.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from convert.demo import write_demo
from tests.launcher import LAUNCH, free_port, run_in_time
from tests.tiny import edit_config

SECONDS = 2.0
NPU = "--device npu --dry-run --cards "
CUDA = "--device cuda --dry-run --cards "

# name: (arguments, what the line must say, what it must advise)
MISTAKES = {
    "unknown flag": ("--modle DIR", "unknown flag '--modle'", "did you mean '--model'"),
    "unknown device": ("--device gpu", "unknown device 'gpu'", "did you mean 'cuda'"),
    "no value": ("--port", "expected one argument", "--help` lists the flags"),
    "port no number": ("--port eight", "'eight' is not a port", "from 1 to 65535"),
    "foreign address": ("--host 203.0.113.1", "cannot listen on 203.0.113.1", "choose another --host"),
    "no such model": ("--model /models/none", "no such model directory", "/models/none"),
    "no such config": ("--config /etc/none.yaml", "cannot be read", "/etc/none.yaml"),
    "no such profile": ("--profile 910b", "unknown profile '910b'", "there is"),
    "no driver, NPU": ("--device npu", "device npu is not available", "or use device cpu"),
    "no driver, CUDA": ("--device cuda", "device cuda is not available", "or use device cpu"),
    "unknown card": (f"{NPU}8x910B5", "unknown card '910B5'", "there is 910B1"),
    "910B which": (f"{NPU}8x910B", "unknown card '910B'", "910B1, 910B2, 910B3 or 910B4"),
    "wrong memory": (f"{NPU}8x910B3-32G", "a 910B3 has 64 GiB, not 32", ""),
    "too many cards": (f"{NPU}16x910B3", "one server holds 8 cards", "say --nodes 2"),
    "cards of another device": (f"{CUDA}8x910B3", "are for --device npu, not cuda", "give one of them"),
    "TP that does not divide": (f"{NPU}8x910B3 --tensor-parallel-size 3", "does not divide", "what would do"),
    "TP beyond the server": (f"{NPU}8x910B3 --tensor-parallel-size 16", "", "what would do"),
    "TP x DP beyond the cards": (f"{NPU}8x910B3 --tensor-parallel-size 8 --data-parallel-size 2", "", "what would do"),
    "context beyond the model": (
        f"{NPU}8x910B3 --max-model-len 40000 --model DIR",
        "more than the model's 16384",
        "lower",
    ),
    "float32 on a 910B": (f"{NPU}8x910B3 --dtype float32", "float32", "use bfloat16"),
    "FP8 cache on a 910B": (f"{NPU}8x910B3 --kv-cache-dtype fp8", "fp8", "leave it out"),
    "block size": (f"{NPU}8x910B3 --block-size 64", "64", "what would do"),
    "too much memory": (
        f"{CUDA}4xH20 --gpu-memory-utilization 1.0",
        "does not fit on 4xH20-96G",
        "--gpu-memory-utilization 0.92",
    ),
    "share above one": (f"{CUDA}4xH20 --gpu-memory-utilization 92", "'92' is not a share", "up to 1"),
    "a pace out of reach": (f"{CUDA}4xH20 --tpot-ms 0.0001", "out of reach", "what would do"),
    "SGLang on an NPU": ("--device npu --engine sglang", "--engine sglang is for CUDA", "use --engine vllm"),
    "rank of one node": ("--node-rank 1", "--node-rank 1 of --nodes 1", "ranks go from 0 to 0"),
    "nodes without address": ("--nodes 2", "--nodes needs --node-address", "node 0"),
    "address without nodes": ("--node-address 10.0.0.1", "are for several servers", "give --nodes too"),
    "address of the internet": (
        "--nodes 2 --node-address 8.8.8.8",
        "an address of the internet",
        "network of their own",
    ),
    "loopback for nodes": ("--nodes 2 --node-address 127.0.0.1", "no other server can reach", "give node 0's address"),
    "no such interface": (
        "--nodes 2 --node-address 10.0.0.1 --network-interface nic9",
        "has none of that name",
        "it has lo",
    ),
    "remote code": ("-- --trust-remote-code", "is refused", "this architecture needs none"),
    "prompts in the log": ("-- --enable-log-requests", "is refused", "never go to a log"),
    "key on the command line": ("-- --api-key abc", "is refused", "set VLLM_API_KEY"),
    "the launcher's own": ("-- --tensor-parallel-size 2", "is refused", "give it before '--'"),
    "unknown engine flag": ("-- --enable-prefix-cachingg", "is not known to vllm", "did you mean"),
    "engine flag of a wrong kind": ("-- --seed one", "--seed: 'one' is not a whole number", ""),
    "no JSON": (f"{NPU}8x910B3 -- --additional-config {{", "additional-config", "JSON"),
    "unknown additional key": (
        f'{NPU}8x910B3 -- --additional-config {{"enable_weight_nz_layout":true}}',
        "enable_weight_nz_layout",
        "weight_nz_mode",
    ),
    "manifest of a demo": ("--verify full", "--verify full needs --model", "has no manifest"),
    "key and no look": ("--model DIR --key a.pem --verify off", "--key asks for a signed manifest", "give one of them"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_demo(path)
    return path


def answer(*arguments: str, **environment: str) -> str:
    """What the launcher says, in time."""
    done = run_in_time([str(LAUNCH), *arguments], SECONDS, env={**os.environ, **environment})
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    *notes, line = done.stderr.splitlines()
    assert all(note.startswith("note: ") for note in notes), notes
    assert line.startswith("error: ")
    return line


@pytest.mark.slow  # each is a start of its own
@pytest.mark.beside
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake(name: str, demo: Path) -> None:
    arguments, said, advised = MISTAKES[name]
    words = [str(demo) if word == "DIR" else word for word in arguments.split()]
    if "--port" not in words:
        words = ["--port", str(free_port()), *words]
    if "--device" not in words:
        words = ["--device", "cpu", *words]
    line = answer(*words)
    assert said in line
    assert advised in line


def test_there_are_enough_of_them() -> None:
    assert len(MISTAKES) >= 30


@pytest.mark.slow
@pytest.mark.beside
def test_a_directory_that_others_may_write_to(demo: Path, tmp_path: Path) -> None:
    edit_config(demo)
    demo.chmod(0o777)
    try:
        line = answer("--device", "cpu", "--port", str(free_port()), "--model", str(demo))
    finally:
        demo.chmod(0o755)
    assert "can be written by everyone" in line
    assert "chmod -R o-w" in line
