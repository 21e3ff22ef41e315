"""What `python -m convert inspect` prints: one screen, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from convert.cards import RESERVE_TEXT, table

if TYPE_CHECKING:
    from convert.inspect import Report

WIDTH = 100


def page(report: Report) -> str:
    """Return the report as lines of text."""
    return "\n".join(line for entry in _lines(report) for line in _wrapped(entry))


def _lines(report: Report) -> Iterator[str]:
    model, counted, files = report.model, report.parameters, report.files
    yield report.path
    yield _row("architecture", f"{_text(model['architecture'])} ({model['model_type']})")
    mtp = f" + {_billions(counted['mtp'])} MTP" if counted["mtp"] else ""
    yield _row("parameters", f"{_billions(counted['total'])} total, {_billions(counted['active'])} active{mtp}")
    layers = f"{model['dense_layers']} dense + {model['moe_layers']} MoE, {model['mtp_layers']} MTP"
    yield _row("layers", f"{layers}; hidden {model['hidden_size']}, vocabulary {model['vocab_size']}")
    heads = f"{model['num_attention_heads']} query, {model['num_key_value_heads']} KV, head size {model['head_dim']}"
    yield _row("attention", heads)
    routing = (
        f"{model['num_experts']} of width {model['moe_intermediate_size']}, {model['num_experts_per_tok']} a token"
    )
    groups = f"{model['topk_group']} of {model['n_group']} groups, {model['num_shared_experts']} shared"
    yield _row("experts", f"{routing}, {groups}")
    yield _row("context", f"{model['context']:,} tokens{_yarn(model['yarn'])}")
    yield _row("quantisation", str(model["quantization"]))
    present = [
        f"{what} {'yes' if files[key] else 'NO'}"
        for key, what in (
            ("tokenizer", "tokenizer"),
            ("chat_template", "chat template"),
            ("generation_config", "generation config"),
            ("manifest", "manifest"),
        )
    ]
    shards = f"{files['shards']} of weights, " if files["shards"] else "no weights, "
    yield _row("files", f"{shards}{files['disk_bytes'] / 1e9:,.3f} GB in all; {', '.join(present)}")
    for key, what in (("auto_map", "auto_map for"), ("code", "code"), ("pickles", "pickles")):
        if files[key]:
            yield _row("never run", f"{what}: {_names(files[key])}")
    for remark in report.remarks:
        yield _row("NOTE", remark)
    yield ""
    if report.held:
        yield from _held(report)
        yield ""
        yield table(report.cards["stored"])
    for name, nbytes in report.would_weigh.items():
        title, *rows = table(report.cards[name]).splitlines()
        yield f"As {name}: {nbytes / 1e9:,.2f} GB" if name != "bf16" else f"As bf16: {nbytes / 1e9:,.2f} GB\n{title}"
        yield from rows
    yield RESERVE_TEXT


def _held(report: Report) -> Iterator[str]:
    yield f"{'class':<18}{'format':<22}{'tensors':>10}{'parameters':>20}{'GB':>12}"
    for name, one in report.held.items():
        formats = " + ".join(one.formats)
        yield f"{name:<18}{formats:<22}{one.tensors:>10,}{one.parameters:>20,}{one.nbytes / 1e9:>12,.3f}"
    tensors = sum(one.tensors for one in report.held.values())
    parameters = sum(one.parameters for one in report.held.values())
    nbytes = report.files["tensor_bytes"] / 1e9
    yield f"{'all':<18}{'':<22}{tensors:>10,}{parameters:>20,}{nbytes:>12,.3f}"


def _wrapped(entry: str) -> list[str]:
    """Cut an entry to the width: a screen is a screen, whatever a config says."""
    lines = []
    for line in entry.split("\n"):
        lines += textwrap.wrap(line, WIDTH, subsequent_indent=" " * 14) if len(line) > WIDTH else [line]
    return lines


def _row(name: str, text: str) -> str:
    return f"{name:<14}{text}"


def _yarn(yarn: Mapping[str, Any] | None) -> str:
    if yarn is None:
        return ""
    kind = _text(yarn.get("rope_type", yarn.get("type")))
    return f" ({kind}, factor {_text(yarn.get('factor'))} on {_text(yarn.get('original_max_position_embeddings'))})"


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(_text(name) for name in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def _billions(count: float) -> str:
    return f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"


def _text(value: Any) -> str:
    """A value of someone else's file: what would reach the terminal as control characters does not."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
