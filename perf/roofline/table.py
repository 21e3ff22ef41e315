"""How `perf roofline` prints its document: parts of the model, figures of the card, and a line per point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ascend.devices.facts import Figure
from ascend.precision import PRECISIONS
from ascend.roofline import EAGLE3_PARAMETERS, USABLE_MEMORY

PARTS = {
    "routed_experts": "experts",
    "matmuls": "matmuls",
    "head": "head",
    "attention": "attention",
    "communication": "network",
}
TOO_LARGE = ("weights do not fit", "KV does not fit")


def print_tables(document: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    """Print everything but the JSON."""
    _print_head(document, figures)
    _print_model(document)
    _print_reads(document["rows"])
    _print_limits(document["rows"])
    if document["drafts"]:
        _print_speculation(document)
    _print_prefill(document["prefill"])
    _print_assumptions(document)


def _print_head(document: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    card, sharding = document["card"]["name"], document["sharding"]
    data = f", {sharding['data']} groups of them with tokens of their own" if sharding["data"] > 1 else ""
    print(f"LIMITS of {document['model']} on {sharding['cards']} x {card}: no measurement and no prediction.")
    blocks = f"in {sharding['experts']} blocks" if sharding["experts"] > 1 else "divided over all cards"
    print(f"Tensor parallel {sharding['tensor']}{data}; routed experts {blocks}. One card, on paper:")
    for name, figure in figures.items():
        print(f"  {name:<10} {figure!s:<14} {figure.source}")
    unknown = [name for name, figure in figures.items() if figure.value is None and name != "memory"]
    if unknown:
        print(f"  Nobody has said what its {', '.join(unknown)} is; --bandwidth and --peak take your own figure.")


def _print_model(document: Mapping[str, Any]) -> None:
    counted, stored = document["parameters"], document["weight_bytes"]
    print("\nWeights" + " " * 18 + "billions" + "".join(f"{name + ', GB':>15}" for name in stored))
    for part in next(iter(stored.values())):
        sizes = "".join(f"{one[part] / 1e9:>15.3f}" for one in stored.values())
        print(f"  {part:<20}{counted[part] / 1e9:>11.3f}{sizes}")
    totals = "".join(f"{sum(one.values()) / 1e9:>15.3f}" for one in stored.values())
    print(f"  {'total':<20}{counted['total'] / 1e9:>11.3f}{totals}")
    active, ends = counted["active_without_embeddings"], counted["embedding"] + counted["head"]
    print(f"  {'active per token':<20}{active / 1e9:>11.3f}   ({(active + ends) / 1e9:.3f} with embedding and head)")


def _print_reads(rows: Iterable[Mapping[str, Any]]) -> None:
    print("\nOne decode step reads and computes, at least (one copy of the model, however many cards hold parts twice)")
    print(f"{_HEAD}{'experts hit':>12}{'GB/step':>9}{'GB/token':>9}{'KV of it':>9}{'experts':>9}{'GFLOP/token':>12}")
    for row in rows:
        nbytes, flops = sum(row["bytes"].values()), sum(row["flops"].values())
        kv, experts = (row["bytes"][part] / nbytes for part in ("attention", "routed_experts"))
        print(
            f"{_start(row)}{row['distinct_experts']:>12.1f}{nbytes / 1e9:>9.2f}{nbytes / 1e9 / row['batch']:>9.2f}"
            f"{kv:>9.0%}{experts:>9.0%}{flops / 1e9 / row['batch']:>12.2f}"
        )


def _print_limits(rows: list[dict[str, Any]]) -> None:
    shares = any(row["share_of_limit"] for row in rows)
    print("\nThe limit, and what a card has to hold")
    print(
        f"{_HEAD}{'ms/step':>9}{'tok/s':>9}{'per seq.':>9}  {'longest part':<15}{'x dense 36B':>11}{'GB weights':>11}"
        f"{'GB KV':>7}  {'memory':<19}{'measured' if shares else ''}".rstrip()
    )
    for row in rows:
        memory, limit = row["memory"], row["limit"]
        reached = f"{row['share_of_limit']:.0%} of limit" if row["share_of_limit"] else ""
        if memory["verdict"] in TOO_LARGE:
            reached = ""
            speed = f"{'-':>9}{'-':>9}{'-':>9}  {'-':<15}{'-':>11}"
        elif limit is None:
            speed = f"{'unknown':>9}{'unknown':>9}{'unknown':>9}  {'unknown':<15}{'unknown':>11}"
        else:
            longest = max(limit["parts"], key=limit["parts"].__getitem__)
            share = f"{PARTS[longest]} {limit['parts'][longest] / limit['seconds']:.0%}"
            speed = (
                f"{1e3 * limit['seconds']:>9.3f}{limit['tokens_per_second']:>9,.0f}"
                f"{limit['tokens_per_second'] / row['batch']:>9,.0f}  {share:<15}{_dense(row):>11}"
            )
        print(
            f"{_start(row)}{speed}{memory['weights'] / 1e9:>11.1f}{memory['kv'] / 1e9:>7.1f}"
            f"  {memory['verdict']:<19}{reached}".rstrip()
        )


def _dense(row: Mapping[str, Any]) -> str:
    """The ratio, with a star where the dense model would not fit."""
    return f"{row['against_dense_36b']:.2f}{'*' if row['dense_36b_memory'] in TOO_LARGE else ' '}"


def _print_speculation(document: Mapping[str, Any]) -> None:
    drafts, acceptance = document["drafts"], document["acceptance"]
    print(f"\nVerifying {drafts} draft tokens of an EAGLE3 head ({EAGLE3_PARAMETERS / 1e9} B parameters, BF16)")
    gain = f"{'speed-up':>10}{'tok/s':>9}   at acceptance {acceptance:g}" if acceptance else ""
    print(f"{_HEAD}{'experts hit':>12}{'cost in plain steps':>21}{gain}")
    for row in document["rows"]:
        one = row["speculation"]
        if one is None or row["memory"]["verdict"] in TOO_LARGE:
            nothing = "unknown" if one is None else "-"
            print(f"{_start(row)}{nothing:>12}{nothing:>21}")
            continue
        gain = f"{one['speedup']:>10.2f}{one['tokens_per_second']:>9,.0f}" if acceptance else ""
        print(f"{_start(row)}{one['distinct_experts']:>12.1f}{one['cost']:>21.2f}{gain}")
    print("It pays where more tokens are accepted per step than it costs plain steps.")


def _print_prefill(rows: Iterable[Mapping[str, Any]]) -> None:
    print("\nPrefill, prompt tokens per second of one card at its full peak, by length of the prompt")
    print(f"{'precision':<11}{'2K':>10}{'8K':>10}{'32K':>10}{'128K':>10}   compute-bound from a chunk of")
    for row in rows:
        if row["tokens_per_second"] is None:
            print(f"{row['precision']:<11}" + f"{'unknown':>10}" * 4)
            continue
        speeds = "".join(f"{speed:>10,.0f}" for speed in row["tokens_per_second"].values())
        print(f"{row['precision']:<11}{speeds}{row['compute_bound_chunk']:>10,.0f} tokens")


def _print_assumptions(document: Mapping[str, Any]) -> None:
    sharding, latency = document["sharding"], document["all_reduce_seconds"]
    rows = document["rows"]
    print("\nWhat these limits assume")
    print(f"- Routing is {document['routing']}.")
    kv_dtypes = " and ".join(dict.fromkeys(row["kv_dtype"] for row in rows))
    print(f"- Keys and values are stored in {kv_dtypes}.")
    if sharding["experts"] > 1:
        by_batch = {row["batch"]: row["imbalance"] for row in rows}
        uneven = ", ".join(f"{factor:.2f} at batch {batch}" for batch, factor in by_batch.items())
        print(f"- Of {sharding['experts']} blocks of experts the busiest reads, times the mean (sampled): {uneven}.")
    network = f"an all-reduce takes {1e6 * latency:g} us" if latency else "communication takes no time"
    print(f"- Work is divided perfectly, nothing is read twice, launches take no time, {network}.")
    print("- A step's time is that of its parts one after the other, each limited by its bytes or by its FLOPs.")
    print(f"- An engine fills {USABLE_MEMORY:.0%} of a card with weights and KV cache (vLLM's default).")
    star = any(row["dense_36b_memory"] in TOO_LARGE for row in rows)
    print(
        "- x dense 36B: how many times the limit of a dense model of Seed-OSS-36B's shape, same cards and precision"
        + ("; * where that would not fit them." if star else ".")
    )
    if any((row["share_of_limit"] or 0) > 1 for row in rows):
        print("- What passes 100 % read less than this: more skewed routing, or other settings than were given here.")
    for name in document["weight_bytes"]:
        print(f"- {name}: {PRECISIONS[name].label}.")


_HEAD = f"{'precision':<11}{'context':>8}{'batch':>6}"


def _start(row: Mapping[str, Any]) -> str:
    return f"{row['precision']:<11}{row['context']:>8}{row['batch']:>6}"
