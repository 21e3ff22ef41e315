"""What `perf parity` prints: a short table, and with ``--json`` one JSON document on the last line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from perf.judge import Comparison, LayerNumbers, Limits, LogitNumbers, Verdict, judge_layer
from perf.parity_side import SideInfo


def report(
    a: SideInfo, b: SideInfo, numbers: Comparison, limits: Limits, verdict: Verdict, all_layers: bool, as_json: bool
) -> None:
    """Print both sides, the layers out of tolerance (or all), the logits and the verdict with its reasons."""
    for letter, side in (("a", a), ("b", b)):
        versions = f"torch {side.torch}" + (f", torch_npu {side.torch_npu}" if side.torch_npu else "")
        name = f"{side.device_name}, EMULATED: no card took part" if side.emulated else side.device_name
        print(f"{letter}  {side.side:<13}{name}; {versions}; {side.date}")
    precision = f"{a.quantise} over {a.dtype}" if a.quantise else a.dtype
    rows = sum(batch[0] for batch in a.batches)
    print(
        f"   {precision}; {numbers.whole.positions} tokens in {rows} rows, one padded; {a.decode} decode steps; "
        f"seed {a.seed}; config {a.config_sha256[:12]}"
    )
    _layers(numbers.layers, limits, all_layers)
    print(f"\n{'logits':<22}{'positions':>9}{'max|Δ|/std':>11}{'KL mean':>10}{'KL max':>10}{'top-1':>9}{'top-5':>9}")
    _logits("final norm and head", numbers.head)
    _logits("whole pass", numbers.whole)
    _logits("  before any flip", numbers.whole_clean)
    _logits("decode", numbers.decode)
    _logits("  before any flip", numbers.decode_clean)
    print(f"\n{'PASS' if verdict.passed else 'FAIL'}: {_why(a, b, numbers, verdict)}")
    if as_json:
        document = {
            "a": asdict(a),
            "b": asdict(b),
            "verdict": "PASS" if verdict.passed else "FAIL",
            "reasons": verdict.reasons,
            "cause": verdict.cause,
            "limits": asdict(limits),
            "numbers": asdict(numbers),
        }
        print(json.dumps(_finite(document), allow_nan=False))


def _layers(layers: list[LayerNumbers], limits: Limits, all_layers: bool) -> None:
    print(f"\n{'layer alone':<14}{'attention':>11}{'MLP':>9}{'gain':>9}{'router':>9}{'stream':>9}{'flips':>7}")
    good = [layer for layer in layers if not judge_layer(layer, limits)]
    for layer in layers:
        bad = judge_layer(layer, limits)
        if bad or all_layers:
            _layer(layer.name, [layer], "  <- " + bad[0][0] if bad else "")
    if good:
        _layer(f"{len(good)} of {len(layers)} good", good)
    parts = f"{limits.part:>11.1e}{limits.part:>9.1e}{limits.gain:>9.1e}"
    print(f"{'limit':<14}{parts}{limits.router:>9.1e}{limits.stream:>9.1e}")


def _layer(name: str, layers: list[LayerNumbers], remark: str = "") -> None:
    attention, mlp, stream = (_worst(getattr(layer, key) for layer in layers) for key in ("attention", "mlp", "stream"))
    gain = _worst(abs(gain) for layer in layers for gain in (layer.attention_gain, layer.mlp_gain))
    router = _worst(one for layer in layers for one in (layer.router, layer.weights))
    flips = sum(layer.flips for layer in layers)
    print(f"{name:<14}{attention:>11.1e}{mlp:>9.1e}{gain:>9.1e}{router:>9.1e}{stream:>9.1e}{flips:>7}{remark}")


def _worst(values: Any) -> float:
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)


def _logits(name: str, of: LogitNumbers) -> None:
    if of.positions:
        numbers = f"{of.delta:>11.1e}{of.kl_mean:>10.1e}{of.kl_max:>10.1e}{of.top1:>9.1%}{of.top5:>9.1%}"
        print(f"{name:<22}{of.positions:>9}{numbers}")


def _why(a: SideInfo, b: SideInfo, numbers: Comparison, verdict: Verdict) -> str:
    if not verdict.passed:
        more = f" (and {len(verdict.reasons) - 1} more)" if len(verdict.reasons) > 1 else ""
        return f"{verdict.reasons[0]}{more}; look at: {verdict.cause}"
    flips = sum(layer.flips for layer in numbers.layers)
    ties = f", {flips} tokens took other experts at a near-tie" if flips else ""
    emulated = "; an emulated card says nothing of a real one's rounding or speed" if a.emulated or b.emulated else ""
    return f"{b.side} computes what {a.side} does in all {len(numbers.layers)} layers and the head{ties}{emulated}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
