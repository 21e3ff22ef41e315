"""Where the memory of one card goes, in bytes: weights, keys and values, and what engine and runtime need beside them.

Weights and keys and values are exact (`ascend.cost`; checked against files and against vLLM's own accounting). What is
called an estimate below has not been measured on a card: it is meant to be too large rather than too small.

Letters: T tokens of a step, S sequences, H hidden_size, K experts per token, I an expert's width, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ascend.cost import Sharding, kv_bytes_per_card, weight_bytes_per_card
from ascend.devices.facts import GiB, MiB
from ascend.model_shape import ModelShape
from convert.cards import as_precision
from serve.planning.cards import Cards
from serve.planning.drafter import OFF, Drafter

WORKSPACE = GiB  # estimate: the runtime's context, libraries' and kernels' workspaces
FRAGMENTS = GiB  # estimate: left free beside the graphs, since allocators lose some to fragments
GRAPH_BASE, PER_GRAPH = 256 * MiB, 32 * MiB  # estimate: of captured graphs, their pool shared
HCCL_MIB = 200  # vllm_ascend/utils.py:66, _DEFAULT_BUFFER_SIZE; HCCL takes it twice for each communicator
HCCL_DP_MIB = 50  # vllm_ascend/utils.py:67, of the data-parallel group
NCCL_EACH = 256 * MiB  # estimate: of one NCCL communicator in a server with NVLink
MOST_UTILISED = 0.92  # vLLM's default gpu_memory_utilization (vllm/config/cache.py, 0.23 and 0.32)


@dataclass(frozen=True)
class Division:
    """How a model is divided over cards. expert: whole experts on each card, instead of a part of every one."""

    tensor: int = 1
    data: int = 1
    pipeline: int = 1
    expert: bool = False

    @property
    def cards(self) -> int:
        """All of them."""
        return self.tensor * self.data * self.pipeline

    @property
    def sharding(self) -> Sharding:
        """Of one stage of the pipeline, as `ascend.cost` has it."""
        blocks = self.tensor * self.data if self.expert else 1
        return Sharding(self.tensor, blocks, self.data)

    def layers(self, shape: ModelShape) -> int:
        """Layers of the fullest stage."""
        return math.ceil(shape.num_hidden_layers / self.pipeline)

    def __str__(self) -> str:
        parts = (("TP", self.tensor), ("DP", self.data), ("PP", self.pipeline))
        named = [f"{name}{count}" for name, count in parts if count > 1]
        return " ".join([*named, f"EP{self.tensor * self.data}"] if self.expert else named) or "one card"


@dataclass(frozen=True)
class Load:
    """What is served. sequences: of one data-parallel group; step_tokens: at most in one step; block: tokens of a block
    of the KV cache; kv_bytes: per value; drafts: verified beside each token; graphs: sizes captured as graphs."""

    max_model_len: int
    sequences: int
    step_tokens: int
    block: int
    kv_bytes: float = 2
    drafts: int = 0
    graphs: tuple[int, ...] = ()


@dataclass(frozen=True)
class CardMemory:
    """Bytes of one card, the fullest; they add up to ``total``, what is installed.

    reserve: what the engine leaves alone, the runtime's own share among it. kv_tokens: that the blocks of ``kv`` hold.
    """

    weights: float
    kv: float
    activations: float
    graphs: float
    collectives: float
    reserve: float
    total: float
    utilisation: float
    kv_blocks: int
    kv_tokens: int

    def rows(self) -> dict[str, float]:
        """The parts by name."""
        names = ("weights", "kv", "activations", "graphs", "collectives", "reserve")
        return {name: getattr(self, name) for name in names}


def card_memory(
    nbytes: Mapping[str, float],
    shape: ModelShape,
    cards: Cards,
    division: Division,
    load: Load,
    mc2_mib: int = HCCL_MIB,
    utilisation: float | None = None,
    drafter: Drafter = OFF,
) -> CardMemory:
    """Return where the memory goes; ``kv`` takes all that is left, and is below zero where nothing is.

    Args:
        nbytes: of the weights by class (`PlannedModel.nbytes`).
        mc2_mib: HCCL_BUFFSIZE, which sizes the buffers of the MC2 group.
        drafter: what drafts; its weights and its keys and values are among the model's.
        utilisation: share of the usable memory that the engine takes; None for as much as graphs leave, at most 0.92.
    """
    graphs = GRAPH_BASE + PER_GRAPH * len(load.graphs) if load.graphs else 0.0
    usable = cards.usable
    if utilisation is None:
        utilisation = max(0.01, min(MOST_UTILISED, math.floor(100 * (usable - graphs - FRAGMENTS) / usable) / 100))
    held = weights(drafter.weights(nbytes, division.tensor), shape, division)
    needed = activations(shape, division, load)
    buffers = collectives(cards.device, division, mc2_mib)
    room = usable * utilisation - held - needed - buffers
    per_block = kv_bytes_per_block(shape, division, load.block, load.kv_bytes, drafter)
    blocks = max(0, int(room // per_block))
    # A part of a block is no use to anyone: it is counted as reserve.
    kv = blocks * per_block if room >= 0 else room
    taken = held + needed + buffers + kv
    return CardMemory(
        held,
        kv,
        needed,
        graphs,
        buffers,
        cards.memory - taken - graphs,
        cards.memory,
        utilisation,
        blocks,
        blocks * load.block,
    )


def weights(nbytes: Mapping[str, float], shape: ModelShape, division: Division) -> float:
    """Bytes of weights on the fullest card; a stage of a pipeline has its layers, and embedding or head."""
    by_class = dict(nbytes)
    whole = sum(by_class.pop(name, 0.0) for name in ("mtp", "other"))
    if division.pipeline > 1:
        part = division.layers(shape) / shape.num_hidden_layers
        ends = max(by_class.get("embedding", 0.0), by_class.get("head", 0.0))
        by_class = {name: value * part for name, value in by_class.items() if name not in ("embedding", "head")}
        by_class["embedding"] = ends
    return weight_bytes_per_card(shape, as_precision(shape, by_class), division.sharding) + whole


def kv_bytes_per_block(
    shape: ModelShape, division: Division, block: int, kv_bytes: float, drafter: Drafter = OFF
) -> int:
    """Bytes of one block on a card, keys and values of all its layers: vLLM's page_size_bytes times its layers.

    A card holds at least one head, so that beyond as many cards as there are heads each lies on several
    (vllm/config/model.py, get_num_kv_heads).
    """
    stage = replace(shape, num_hidden_layers=division.layers(shape))
    drafts = block * drafter.kv_bytes_per_token(division.tensor, kv_bytes)
    return int(kv_bytes_per_card(stage, 1, block, division.sharding, kv_bytes) + drafts)


def kv_tokens_needed(load: Load, typical: int) -> int:
    """Tokens that the cache must hold, in whole blocks: one sequence of full length, and all of typical length.

    One block is lost to the engine, which keeps an empty one.
    """
    per_sequence = math.ceil(min(typical, load.max_model_len) / load.block)
    blocks = max(math.ceil(load.max_model_len / load.block), load.sequences * per_sequence)
    return (blocks + 1) * load.block


def activations(shape: ModelShape, division: Division, load: Load) -> float:
    """Estimate of the most that a step holds beside weights and cache, in 16 bits.

    The larger of a layer of the largest step (four copies of the tokens, and of every token's K copies on their way in
    and out of the experts) and of sampling (logits in fp32 with two copies for all sequences); and the workspaces.
    """
    T, H, K, V = load.step_tokens, shape.hidden_size, shape.num_experts_per_tok, shape.vocab_size
    I_card = shape.moe_intermediate_size / (1 if division.expert else division.tensor * division.data)
    gathered = T * division.data  # of all groups, on the all-gather path
    layer = 4 * T * H * 2 + gathered * K * (2 * H + 3 * I_card) * 2
    sampling = 3 * load.sequences * (load.drafts + 1) * V * 4
    return WORKSPACE + max(layer, sampling)


def communicators(division: Division, device: str) -> dict[str, int]:
    """The groups of more than one card that a worker talks in, by name, with their sizes.

    vllm/distributed/parallel_state.py makes world, TP, DP, PP and, for MoE models, EP; vllm-ascend adds MC2 over the
    same cards (vllm_ascend/distributed/parallel_state.py). Buffers come with first use, so it is the most there are.
    """
    blocks = division.tensor * division.data
    groups = {
        "world": division.cards,
        "tp": division.tensor,
        "dp": division.data,
        "pp": division.pipeline,
        "ep": blocks,
    }
    if device == "npu":
        groups["mc2"] = blocks
    return {name: size for name, size in groups.items() if size > 1}


def collectives(device: str, division: Division, mc2_mib: int = HCCL_MIB) -> float:
    """Bytes of the buffers of all communicators on a card; HCCL's are given by its settings, NCCL's an estimate."""
    groups = communicators(division, device)
    if device != "npu":
        return NCCL_EACH * len(groups)
    sizes = {"dp": HCCL_DP_MIB, "mc2": mc2_mib}
    return sum(2 * sizes.get(name, HCCL_MIB) * MiB for name in groups)
