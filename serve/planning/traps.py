"""The traps on the way to a working engine, one row each: what goes wrong, who says so, how a plan is checked for it.

Every plan keeps all rules; what a user fixed and breaks one of them is refused with the rule's words. Lines are those
of vllm-ascend 0.23.0 (vllm_ascend/…) and of vLLM 0.23.0 (vllm/…).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ascend.errors import UserError
from serve.planning.draft import MC2_LEAST_CARDS, MC2_MOST_EXPERTS, Draft
from serve.planning.graphs import LARGEST
from serve.planning.memory import HCCL_MIB
from serve.planning.rope import KEY

MOST_GRAPHS = 32
# CANN 9.1, environment variables: HCCL_CONNECT_TIMEOUT is within [120, 7200] s (and 20 s more are waited),
# HCCL_EXEC_TIMEOUT within [0, 2147483647], 0 for ever; with HCCL_OP_EXPANSION_MODE=AIV within [0, 1091].
SHORTEST_TIMEOUT, LONGEST_CONNECT, LONGEST_EXEC = 120, 7200, 2**31 - 1
MOST_TOKENS_EACH = 16  # vllm_ascend/attention/attention_v1.py:251: a token and its drafts
NPU_HEAD_DIMS = (128, 192)
QUANT_BLOCK = {"fp8": 128, "w4a16": 128, "w4a16-all": 128}  # inputs that share a scale (`ascend.precision`)
NPU, CUDA, BOTH = ("npu",), ("cuda",), ("npu", "cuda")


@dataclass(frozen=True)
class Trap:
    """why: what happens, in one line. source: where that is written. broken: what is wrong with a draft, or None."""

    devices: tuple[str, ...]
    why: str
    source: str
    broken: Callable[[Draft], str | None] | None = None


def problems(draft: Draft) -> list[str]:
    """Return what is wrong with a draft, by all rules for its cards."""
    found = []
    for trap in TRAPS.values():
        if draft.cards.device in trap.devices and trap.broken is not None and (problem := trap.broken(draft)):
            found.append(f"{problem}: {trap.why}")
    return found


def mc2_buffer_mib(draft: Draft) -> int:
    """MiB of HCCL_BUFFSIZE that MC2 needs: ``2 · (tokens · cards · min(experts a card, K) · H · 2 B + 2 MB)``.

    Of one card's tokens; CANN's page on aclnnMoeDistributeDispatch. At least the default, 200.
    """
    shape, blocks = draft.model.shape, draft.division.tensor * draft.division.data
    tokens = math.ceil(max(draft.load.graphs, default=draft.load.sequences) / draft.division.tensor)
    copies = min(shape.num_experts // blocks, shape.num_experts_per_tok)
    nbytes = 2 * (tokens * blocks * copies * shape.hidden_size * 2 + 2 * 10**6)
    return max(HCCL_MIB, math.ceil(nbytes / 10**6))


def _fp8_weights(draft: Draft) -> str | None:
    return f"{draft.precision} on {draft.cards.facts.name}" if draft.precision == "fp8" else None


def _no_fp8_on_card(draft: Draft) -> str | None:
    wants = draft.precision == "fp8" or draft.kv_dtype == "fp8"
    return f"fp8 on {draft.cards.facts.name}" if wants and "fp8" not in draft.cards.facts.peak else None


def _fp8_kv(draft: Draft) -> str | None:
    return "--kv-cache-dtype fp8 on an NPU" if draft.kv_dtype == "fp8" else None


def _float32(draft: Draft) -> str | None:
    return "--dtype float32 on a card" if draft.dtype == "float32" else None


def _block_128(draft: Draft) -> str | None:
    return f"--block-size {draft.load.block} on an NPU" if draft.load.block != 128 else None


def _block_16(draft: Draft) -> str | None:
    return f"--block-size {draft.load.block}" if draft.load.block % 16 else None


def _plain_attention(draft: Draft) -> str | None:
    return "INT4 beyond the experts on an NPU" if draft.precision == "w4a16-all" else None


def _tensor_in_server(draft: Draft) -> str | None:
    if draft.division.tensor > draft.cards.count:
        return f"--tensor-parallel-size {draft.division.tensor} in servers of {draft.cards.count} cards"
    return None


def _enough_cards(draft: Draft) -> str | None:
    division, cards = draft.division, draft.cards
    if division.cards > cards.total:
        return f"{division} needs {division.cards} cards of {cards.total}"
    if division.data % cards.nodes or division.tensor * division.pipeline > cards.count:
        return f"{division} does not spread evenly over {cards.nodes} servers of {cards.count} cards"
    return None


def _divides(draft: Draft) -> str | None:
    if draft.division.pipeline > draft.model.shape.num_hidden_layers:
        return f"--pipeline-parallel-size {draft.division.pipeline} for {draft.model.shape.num_hidden_layers} layers"
    try:
        draft.division.sharding.check(draft.model.shape)
    except UserError as error:
        return str(error)
    return None


def _scales_divide(draft: Draft) -> str | None:
    block, shape, division = QUANT_BLOCK.get(draft.precision), draft.model.shape, draft.division
    if block is None:
        return None
    widths = {"an expert": (shape.moe_intermediate_size, 1 if division.expert else division.tensor * division.data)}
    if draft.precision != "w4a16":
        widths["the shared expert"] = (shape.shared_intermediate_size, division.tensor)
        widths["the dense MLP"] = (shape.intermediate_size, division.tensor)
    for name, (width, parts) in widths.items():  # a width that is no multiple of 128 has groups of its own size
        if width % (parts * block) and width % block == 0:
            return f"{draft.precision} in {division}: {name} of width {width} in {parts} parts of {width // parts}"
    return None


def _flashcomm(draft: Draft) -> str | None:
    if not draft.settings.get("additional-config", {}).get("enable_flashcomm1"):
        return None
    if not draft.division.expert or draft.division.tensor < 2:
        return f"enable_flashcomm1 with {draft.division}"
    odd = [size for size in draft.load.graphs if size % draft.division.tensor]
    return f"enable_flashcomm1 with graphs of {odd[0]} tokens on {draft.division}" if odd else None


def _graphs(draft: Draft) -> str | None:
    return graph_problem(draft.load.graphs, draft.load.drafts, draft.load.step_tokens)


def graph_problem(sizes: Sequence[int], drafts: int, step_tokens: int) -> str | None:
    """Return what is wrong with the sizes of graphs on an NPU, planned or a user's own, or None."""
    most = min(LARGEST, step_tokens)
    if len(sizes) > MOST_GRAPHS:
        return f"{len(sizes)} graph sizes, {MOST_GRAPHS} at most"
    if any(size < 1 or size > most or size % (drafts + 1) for size in sizes) or list(sizes) != sorted(set(sizes)):
        return f"graph sizes {list(sizes)} with {drafts} drafts and {most} tokens at most, rising"
    return None


def graph_notes(sizes: Sequence[int], drafts: int, sequences: int) -> list[str]:
    """Return what is wasted or lacking among sizes of graphs that hold decode steps alone; ``sequences`` at once."""
    full = sequences * (drafts + 1)
    notes = []
    if unused := [size for size in sizes if size > full and any(full <= other < size for other in sizes)]:
        notes.append(f"graphs of {unused} tokens are never used: {sequences} sequences are {full} tokens")
    if sizes and max(sizes) < full:
        notes.append(f"steps of more than {max(sizes)} tokens run without a graph, and there may be {full}")
    return notes


def _drafts(draft: Draft) -> str | None:
    if draft.load.drafts + 1 > MOST_TOKENS_EACH:
        return f"{draft.load.drafts} drafts ({MOST_TOKENS_EACH - 1} at most)"
    return None


def _draft_layers(draft: Draft) -> str | None:
    drafter = draft.drafter
    if drafter.method == "mtp" and drafter.tokens > drafter.layers and drafter.tokens % drafter.layers:
        return f"--speculative-tokens {drafter.tokens} with {drafter.layers} MTP layers"
    return None


def _draft_stages(draft: Draft) -> str | None:
    if draft.drafter.layers and draft.division.pipeline > 1:
        return f"--speculative {draft.drafter.method} with --pipeline-parallel-size {draft.division.pipeline}"
    return None


def _draft_head_dim(draft: Draft) -> str | None:
    if draft.drafter.method == "eagle3" and draft.drafter.head_dim not in NPU_HEAD_DIMS:
        return f"--speculative {draft.drafter} with a head_dim of {draft.drafter.head_dim}"
    return None


def _step_holds_all(draft: Draft) -> str | None:
    needed = draft.load.sequences * (draft.load.drafts + 1)
    if draft.load.step_tokens < needed:
        return (
            f"--max-num-batched-tokens {draft.load.step_tokens} for {draft.load.sequences} sequences ({needed} tokens)"
        )
    return None


def _context(draft: Draft) -> str | None:
    model, asked = draft.model, draft.load.max_model_len
    if asked > model.longest:
        return f"--max-model-len {asked} is more than the {model.longest} tokens that {model.name} reaches"
    return None


def _rope(draft: Draft) -> str | None:
    reached = draft.model.context
    if not (draft.model.is_yarn or draft.load.max_model_len > reached):
        return None
    rope = draft.settings.get("hf-overrides", {}).get(KEY, {})
    whole = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"} <= rope.keys()
    if whole and "truncate" in rope:
        return None
    return "YaRN without rope settings of its own" if draft.cards.device == "npu" else None


def _rope_cuda(draft: Draft) -> str | None:
    needed = not draft.model.is_yarn and draft.load.max_model_len > draft.model.context
    given = draft.settings.get("hf-overrides", {})
    is_told = KEY in given and "max_position_embeddings" in given
    return f"{draft.load.max_model_len} tokens" if needed and not is_told else None


def _blocking(draft: Draft) -> str | None:
    return "ASCEND_LAUNCH_BLOCKING" if draft.environment.get("ASCEND_LAUNCH_BLOCKING") != "0" else None


def _timeouts(draft: Draft) -> str | None:
    """Within a server at most 300 s; over several, where cards wait for those that still load, as long as that."""
    if draft.division.cards == 1:
        return None
    ready = int(draft.environment.get("VLLM_ENGINE_READY_TIMEOUT_S", 0))
    several = draft.cards.nodes > 1
    for name, most in (("HCCL_CONNECT_TIMEOUT", LONGEST_CONNECT), ("HCCL_EXEC_TIMEOUT", LONGEST_EXEC)):
        value = draft.environment.get(name)
        low, high = (min(ready, most), most) if several else (SHORTEST_TIMEOUT, 300)
        if value is None or not low <= int(value) <= high:
            return f"{name}={value}"
    return None


def _mc2(draft: Draft) -> str | None:
    if draft.uses_mc2 and int(draft.environment.get("HCCL_BUFFSIZE", 0)) < mc2_buffer_mib(draft):
        return f"HCCL_BUFFSIZE below {mc2_buffer_mib(draft)}"
    return None


def _utilisation(draft: Draft) -> str | None:
    value = draft.utilisation
    return None if value is None or 0 < value <= 0.98 else f"--gpu-memory-utilization {value:g}"


_ASCEND, _VLLM = "vllm-ascend 0.23.0", "vLLM 0.23.0"

TRAPS: dict[str, Trap] = {
    "no-fp8": Trap(
        NPU,
        "no op of the 910B computes in FP8, and vLLM-Ascend ends in a TypeError; convert to w8a8",
        f"{_ASCEND}, quantization/utils.py:132: fp8 is for A5 alone",
        _fp8_weights,
    ),
    "no-fp8-card": Trap(CUDA, "the card has no FP8", "ascend.devices.facts", _no_fp8_on_card),
    "no-fp8-kv": Trap(
        NPU,
        "vLLM-Ascend takes the flag without a word and has no such cache for this model; leave it out",
        f"{_ASCEND}: nothing in platform.py checks it; C8 caches want k_proj and v_proj, ours are fused",
        _fp8_kv,
    ),
    "float32": Trap(
        BOTH,
        "the engines take float32 without a word, at twice the bytes, and a 910B's matrix units do not compute in it; "
        "use bfloat16",
        f"{_ASCEND}: platform.py has no check",
        _float32,
    ),
    # A fact: it is obeyed, with a warning.
    "float16": Trap(
        BOTH,
        "float16 ends at 65504 and this model was trained in bfloat16, which does not: larger activations become "
        "infinite and answers '!!!!' (vllm-ascend issues 562, 5144, 6332 tell of other models; this one was not tried "
        "here): use bfloat16",
        "vllm-ascend issues 562, 5144, 6332",
    ),
    "block-128": Trap(
        NPU,
        "vLLM-Ascend changes any other block to 128 tokens where prefix caching or chunked prefill is on",
        f"{_ASCEND}, utils.py:1369-1406",
        _block_128,
    ),
    "block-16": Trap(CUDA, "blocks are multiples of 16 tokens", f"{_VLLM}, vllm/v1/attention/backends", _block_16),
    "w4a16-plain-attention": Trap(
        NPU,
        "vLLM-Ascend has W4A16 for experts only; convert w4a16 leaves attention and shared experts plain",
        f"{_ASCEND}, quantization/methods/w4a16.py:111",
        _plain_attention,
    ),
    "tensor-in-server": Trap(
        BOTH,
        "tensor parallelism stays within a server: two exchanges a layer do not go over the network, and engines find "
        "too few cards only in their workers",
        f"{_VLLM}; {_ASCEND}, worker/worker.py:490",
        _tensor_in_server,
    ),
    "enough-cards": Trap(
        BOTH,
        "a worker needs a card of its own, and a replica of the model stays within a server",
        _VLLM,
        _enough_cards,
    ),
    "divides": Trap(BOTH, "every card gets an equal share", f"{_VLLM}, vllm/config/model.py", _divides),
    "scales-divide": Trap(
        BOTH,
        "blocks of 128 values that share a scale cannot be cut; use --expert-parallel, which keeps experts whole",
        f"{_VLLM}, layers/quantization/fp8.py, compressed_tensors_moe.py",
        _scales_divide,
    ),
    "flashcomm1": Trap(
        NPU,
        "it needs tensor and expert parallelism and graph sizes that are multiples of the former",
        f"{_ASCEND}, platform.py:557, 764, 768",
        _flashcomm,
    ),
    "graphs": Trap(
        NPU,
        "each captured size costs streams, which end in error 207008; sizes are whole steps of all drafts",
        f"{_ASCEND}, docs/source/faqs.md 17; ascend_forward_context.py caps MC2 at 512 tokens",
        _graphs,
    ),
    "drafts": Trap(
        NPU, "attention takes 16 tokens of a sequence in a decode step", f"{_ASCEND}, attention_v1.py:251", _drafts
    ),
    "speculative": Trap(
        BOTH,
        "off unless asked for: mtp where the checkpoint has such a layer, eagle3:DIR with a trained head, or ngram",
        "this project's plugin gives vLLM the first two for this architecture",
    ),
    "draft-layers": Trap(
        BOTH, "layers take turns, so it is a multiple of them", f"{_VLLM}, vllm/config/speculative.py", _draft_layers
    ),
    "draft-stages": Trap(
        BOTH,
        "the draft's layers are in the last stage, the embedding they need in the first",
        f"{_ASCEND}, platform.py:443; {_VLLM}, v1/spec_decode/llm_base_proposer.py",
        _draft_stages,
    ),
    "draft-head-dim": Trap(
        NPU,
        f"the attention of an Ascend card takes {' or '.join(map(str, NPU_HEAD_DIMS))}",
        "torch_npu, npu_fused_infer_attention_score, layout TND",
        _draft_head_dim,
    ),
    "step-holds-all": Trap(
        BOTH,
        "a step must have room for a token of each sequence",
        f"{_VLLM}, vllm/config/scheduler.py",
        _step_holds_all,
    ),
    "context": Trap(BOTH, "positions beyond it are unknown to the model", "config.json", _context),
    "yarn-npu": Trap(
        NPU,
        'vLLM-Ascend\'s YaRN does not round its range unless told "truncate": true, so positions differ from the '
        "model's (9 rad at 128K); a dictionary without rope_theta would rotate with 10000",
        f"{_ASCEND}, ops/rotary_embedding.py:269; {_VLLM}, rotary_embedding/__init__.py:64, config/model.py:449",
        _rope,
    ),
    "yarn-cuda": Trap(
        CUDA,
        "config.json does not stretch the positions so far: YaRN must be switched on",
        f"{_VLLM}, config/model.py, _get_and_verify_max_len",
        _rope_cuda,
    ),
    "launch-blocking": Trap(NPU, "graphs do not go together with it", f"{_ASCEND}, platform.py:651", _blocking),
    "hccl-timeouts": Trap(
        NPU,
        "by default a card that died is noticed after half an hour; below 120 s slow starts are taken for dead, and "
        "servers do not read the weights equally fast, so that one waits for another as long as loading may take",
        "CANN 9.1, HCCL_CONNECT_TIMEOUT: 120 s by default, 120 to 7200; HCCL_EXEC_TIMEOUT: 1836 s by default",
        _timeouts,
    ),
    "mc2": Trap(
        NPU,
        f"MC2 is taken from {MC2_LEAST_CARDS} cards and at most {MC2_MOST_EXPERTS} experts a card on; its buffers are "
        "sized by HCCL_BUFFSIZE alone",
        f"{_ASCEND}, ascend_forward_context.py:236-252, utils.py:1099",
        _mc2,
    ),
    "utilisation": Trap(
        BOTH, "graphs and the runtime need a rest of the memory", f"{_VLLM}, vllm/config/cache.py", _utilisation
    ),
    # What is a fact and not a rule: a plan says it where it matters.
    "allgather": Trap(
        NPU,
        "fewer than 16 910B never use MC2: tokens are gathered on all cards, with or without expert parallelism",
        f"{_ASCEND}, ascend_forward_context.py:236-252",
    ),
    "kv-twice": Trap(
        BOTH,
        "with more cards than KV heads each head lies on several, so the cache holds no more than with fewer cards",
        f"{_VLLM}, vllm/config/model.py, get_num_kv_heads",
    ),
    "prefix-caching": Trap(
        BOTH,
        "shared beginnings are computed once. How fast an answer begins can tell that another user sent the same "
        "beginning (CVE-2025-46570); departments that must not learn that of each other get engines of their own or "
        "a cache_salt in each request",
        "vLLM security advisory on CVE-2025-46570",
    ),
}
