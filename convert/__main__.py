"""`python -m convert COMMAND …`: one module per command, imported only when it is called."""

from __future__ import annotations

import sys

from ascend.commands import run_package

COMMANDS = {
    "fp8": "SRC DST: FP8 in blocks of 128 x 128, for NVIDIA Hopper (vLLM, SGLang)",
    "w8a8": "SRC DST: INT8 per output channel, for Ascend 910B and NVIDIA",
    "w4a16": "SRC DST: INT4 routed experts in groups of 128, for little memory",
    "bf16": "SRC DST: back to BF16, from any of them",
    "inspect": "DIR: what a checkpoint holds, what it weighs, which cards it fits on",
    "verify": "DIR: every byte against the manifest, every tensor against the config",
    "manifest": "DIR: write the manifest of a directory as it is, signed or not",
    "canary": "DIR: record log-probabilities that each start of a server is held to",
    "demo": "DIR: a demo checkpoint: the full architecture in miniature, with random weights",
    "eagle3-init": "DIR --model MODEL: an EAGLE3 draft head of the published shape, with random weights",
}
MODULES = {target: "command" for target in ("fp8", "w8a8", "w4a16", "bf16")}
MODULES |= {"manifest": "manifest_command", "eagle3-init": "eagle3_init"}

if __name__ == "__main__":
    sys.exit(run_package("convert", COMMANDS, MODULES))
