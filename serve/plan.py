"""`python -m serve plan`: which settings to serve a model with on some cards, why, and where the memory goes.

Nothing is started and no card is opened. What does not go is refused with what would.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from ascend.arguments import Parser
from ascend.precision import PRECISIONS
from serve.planning import Wanted, found_cards, make_plan, open_model, parse_cards
from serve.planning.page import config_file, page
from serve.planning.wanted import METHODS

DEFAULT_MODEL = "antangelmed"


def main(arguments: Sequence[str]) -> int:
    """Print a plan. Raises `UserError` for what cannot be."""
    args = _parse(arguments)
    cards = parse_cards(args.cards, args.nodes) if args.cards else found_cards(args.nodes)
    wanted = Wanted(**{name: getattr(args, name) for name in Wanted.__dataclass_fields__})
    plan = make_plan(open_model(args.model), cards, wanted, args.engine)
    if args.yaml:
        print(config_file(plan), end="")
        return 0
    print(page(plan))
    if args.json:
        print(json.dumps(plan.as_json()))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("serve plan", "Settings to serve a model with, each with its reason. What is not given is decided.")
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="DIR", help=f"directory or config.json; default: {DEFAULT_MODEL}")
    add("--cards", metavar="CARDS", help="such as 8x910B3-64G, 4xH20, cpu; default: those found here")
    add("--nodes", type=_positive, default=1, metavar="N", help="servers that the cards are in; default 1")
    add("--engine", choices=("vllm", "sglang"), default="vllm", help="sglang: on CUDA alone; default vllm")
    add("--precision", choices=PRECISIONS, metavar="NAME", help=f"{', '.join(PRECISIONS)}; default: what is stored")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"))
    add("--max-model-len", type=_positive, metavar="TOKENS", help="longest prompt plus answer")
    add("--max-num-seqs", type=_positive, metavar="N", help="requests in work at once, in each data-parallel group")
    add("--max-num-batched-tokens", type=_positive, metavar="N", help="tokens of one step")
    add("--tpot-ms", type=_number, metavar="MS", help="longest time per token of a sequence")
    add("--kv-cache-dtype", choices=("auto", "bf16", "fp8"))
    add("--tensor-parallel-size", type=_positive, metavar="N")
    add("--data-parallel-size", type=_positive, metavar="N", help="over all servers")
    add("--pipeline-parallel-size", type=_positive, metavar="N")
    add("--expert-parallel", action=argparse.BooleanOptionalAction, help="whole experts on each card")
    add("--gpu-memory-utilization", type=_number, metavar="SHARE")
    add("--block-size", type=_positive, metavar="TOKENS")
    add("--speculative", metavar="|".join(METHODS), help="what drafts tokens to verify; default: off")
    add("--speculative-tokens", type=_positive, metavar="K", help="drafts a step; default: what pays most")
    add("--quantization", metavar="METHOD", help="of the engine, by name")
    add("--json", action="store_true", help="end with one line of JSON")
    add("--yaml", action="store_true", help="print a file for serve/launch.sh --config instead")
    return parser.read(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above zero")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above zero")
    return value
