"""A report as a terminal shows it: both sides, what is out of tolerance (or all), the logits, the verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from perf.parity.judge import Comparison, Divergence, DriftNumbers, LayerNumbers, LogitNumbers, layer_checks
from perf.parity.judge_served import ServedNumbers
from perf.parity.limits import Limits
from perf.parity.report import Report
from perf.parity.side import SideInfo

SHOWN = 5  # diverged positions


def show(report: Report, all_layers: bool) -> None:
    """Print the report; ``all_layers`` shows the good ones one by one too."""
    a, b, numbers = report.a, report.b, report.numbers
    _side("a", a)
    if isinstance(b, SideInfo):
        _side("b", b)
    else:
        print(f"b  {b.side}, model {b.model}; vLLM {b.version or 'not named'}, {b.top} logprobs; {b.date}")
    rows = sum(batch[0] for batch in a.batches)
    positions = numbers.positions if isinstance(numbers, ServedNumbers) else numbers.whole.positions
    print(
        f"   {report.precision}; {positions} tokens in {rows} rows, one padded; {a.decode} decode steps; "
        f"seed {a.seed}; config {a.config_sha256[:12]}"
    )
    if report.same_weights is False:
        print("   the checkpoint's files are not the same bytes on both sides")
    if isinstance(numbers, ServedNumbers):
        _served(numbers, report.limits)
    else:
        _compared(numbers, report.limits, all_layers)
    _diverged(numbers.divergences, report.limits)
    print(f"\n{report.result}: {report.why}")


def _side(letter: str, side: SideInfo) -> None:
    versions = f"torch {side.torch}" + (f", torch_npu {side.torch_npu}" if side.torch_npu else "")
    name = f"{side.device_name}, EMULATED: no card took part" if side.emulated else side.device_name
    print(f"{letter}  {side.side:<13}{name}; {versions}; {side.date}")


def _compared(numbers: Comparison, limits: Limits, all_layers: bool) -> None:
    print(f"\n{'layer alone':<14}{'attention':>11}{'MLP':>9}{'gain':>9}{'router':>9}{'stream':>9}{'flips':>7}")
    bad = {layer.name: [check for check in layer_checks(layer, limits) if not check.kept] for layer in numbers.layers}
    for layer in numbers.layers:
        if bad[layer.name] or all_layers:
            remark = str(bad[layer.name][0]).partition(": ")[2] if bad[layer.name] else ""
            _layers(layer.name, [layer], f"  <- {remark}" if remark else "")
    good = [layer for layer in numbers.layers if not bad[layer.name]]
    if good:
        _layers(f"{len(good)} of {len(numbers.layers)} good", good)
    parts = f"{limits.part:>11.1e}{limits.part:>9.1e}{limits.gain:>9.1e}"
    print(f"{'limit':<14}{parts}{limits.router:>9.1e}{limits.stream:>9.1e}")
    _drift(numbers.drift, limits, all_layers)
    print(f"\n{'logits':<22}{'positions':>9}{'max|Δ|/std':>11}{'KL mean':>10}{'KL max':>10}{'top-1':>9}{'top-5':>9}")
    _logits("final norm and head", numbers.head)
    _logits("whole pass", numbers.whole)
    _logits("  before any flip", numbers.whole_clean)
    _logits("  on a's experts", numbers.forced)
    _logits("decode", numbers.decode)
    _logits("  before any flip", numbers.decode_clean)
    _logits("  on a's experts", numbers.forced_decode)


def _layers(name: str, layers: list[LayerNumbers], remark: str = "") -> None:
    attention, mlp, stream = (worst(getattr(layer, key) for layer in layers) for key in ("attention", "mlp", "stream"))
    gain = worst(abs(gain) for layer in layers for gain in (layer.attention_gain, layer.norm_gain, layer.mlp_gain))
    router = worst(one for layer in layers for one in (layer.router, layer.weights))
    flips = sum(layer.flips for layer in layers)
    print(f"{name:<14}{attention:>11.1e}{mlp:>9.1e}{gain:>9.1e}{router:>9.1e}{stream:>9.1e}{flips:>7}{remark}")


def _drift(layers: list[DriftNumbers], limits: Limits, all_layers: bool) -> None:
    print(f"\n{'whole pass':<14}{'drift':>11}{'limit':>9}{'all tokens':>12}{'worst token':>13}{'same experts':>14}")
    numbered = list(enumerate(layers, 1))
    for number, layer in numbered if all_layers else numbered[-1:]:
        same = "" if layer.same_experts is None else f"{layer.same_experts:.1%}"
        limit = limits.drift * math.sqrt(number)
        far = f"{layer.clean:>11.1e}{limit:>9.1e}{layer.everything:>12.1e}{layer.worst:>13.1e}"
        print(f"{'after ' + layer.name:<14}{far}{same:>14}")


def _logits(name: str, of: LogitNumbers) -> None:
    if of.positions:
        numbers = f"{of.delta:>11.1e}{of.kl_mean:>10.1e}{of.kl_max:>10.1e}{of.top1:>9.1%}{of.top5:>9.1%}"
        print(f"{name:<22}{of.positions:>9}{numbers}")


def _served(numbers: ServedNumbers, limits: Limits) -> None:
    kind = "before any near-tie" if numbers.judged < numbers.positions else "all"
    print(f"\n{'share of positions':<22}{'within':>10}{'rounding':>10}{'times':>7}   ({numbers.judged}, {kind})")
    for row in numbers.quantiles:
        print(f"{row.share:<22.0%}{row.distance:>10.1e}{row.yardstick:>10.1e}{row.factor:>7.2f}")
    for name, factor, limit in (
        ("first tenth", numbers.first, limits.first),
        ("middle half", numbers.middle, limits.middle),
        ("last tenth", numbers.tail, limits.tail),
        (f"decode, {numbers.decode_positions} steps", numbers.decode, limits.tail),
    ):
        print(f"{name:<42}{factor:>7.2f}   limit {limit}")
    calm = f"{numbers.settled} before any near-tie"
    print(f"{calm:<22}{numbers.settled_max:>10.1e}{'':>17}   limit {limits.logits}")
    given = f"|Δ logprob| of the given token: median {numbers.given_median:.1e}, largest {numbers.given_max:.1e}"
    print(f"\n{given}; KL at least {numbers.kl_mean:.1e}; top-1 {numbers.top1:.1%}, top-5 {numbers.top5:.1%}")


def _diverged(found: Sequence[Divergence], limits: Limits) -> None:
    if not found:
        return
    first = [f"{'another best token':<22}{'a leads by':>11}{'they moved':>11}   why"]
    worst_first = sorted(found, key=lambda one: (one.explained(limits), one.after_flip, -one.lead))
    for one in worst_first[:SHOWN]:
        where = f"{one.where} {one.row}:{one.position}"
        moved = "not named" if one.moved is None else f"{one.moved:.2g}"
        first.append(f"{where:<22}{one.lead:>11.2g}{moved:>11}   {explanation(one, limits)}")
    more = f"\n… and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    print("\n" + "\n".join(first) + more)


def explanation(one: Divergence, limits: Limits) -> str:
    """In words, why another token may be the best one."""
    if one.lead <= 2 * limits.logits:
        return "rounding: a near-tie"
    return "after a near-tie of the router" if one.after_flip else "NOT EXPLAINED by rounding"


def worst(values: Iterable[float]) -> float:
    """The largest; what is not a number is larger."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)
