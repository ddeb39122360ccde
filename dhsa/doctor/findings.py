"""What a check reports: warnings (something is wrong, not sparse, or slow), notes, and whether the result is ok.

The functions use numbers only, so that each rule can be tested without a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dhsa.doctor.report import Check
from dhsa.predictor import TRAIN

__all__ = ["LARGE_KL", "Facts", "findings"]

# Nats, at the next token or on average over the last positions; about 10 % of perplexity. Averages of Gemma 3 270M on
# 4,096 tokens of text: 0.0004 at a budget of 2,048 keys, 0.004 at 512, 0.06 at 128.
LARGE_KL = 0.1
SLOW_SELECT = 0.25  # the share of a call's seconds that selection takes
_NAMED = 3  # the number of layers with the largest errors that are named

# Kinds of `reasons.Reason` that are no cause for a warning.
_EXPECTED = {"anchor", "window", "layers", "causal", "break-even"}


@dataclass(frozen=True)
class Facts:
    """What `findings` needs in addition to the Check.

    implementation: the model's own attention implementation, as its config names it. dtype: of its queries, such as
    "float32". isa, products: as in `build_info`. reasons: for each of check.layers, the kind of its Reason, "" if
    sparse. exact_fault: (layer, text) of the first layer with NaN or inf in the exact run, or None. logits_finite:
    whether the logits have neither NaN nor +inf, (exact, sparse). unserved: layers without a boundary network. shared:
    layers whose keys were cut by the network for all layers. precision, precisions: `float32_precision` and
    `float32_precisions` of `build_info`.
    """

    implementation: str | None
    dtype: str
    isa: str
    products: tuple[str, ...]
    reasons: tuple[str, ...]
    exact_fault: tuple[int, str] | None
    logits_finite: tuple[bool, bool]
    unserved: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    precision: str = "highest"
    precisions: tuple[str, ...] = ("highest",)


def findings(check: Check, facts: Facts) -> tuple[list[str], list[str], bool]:
    """Return (warnings, notes, ok)."""
    wrong = [*_not_finite(check, facts), *_networks(facts), *_different(check, facts)]
    warnings: list[str] = []
    notes: list[str] = []
    for kind, text, layers in _grouped(check, facts):
        (notes if kind in _EXPECTED else warnings).append(f"{_layers(layers)} ran exact: {text}.")
    if not any(layer.path == "sparse" for layer in check.layers):
        warnings.insert(0, "Nothing was left out in any layer: this prompt is no test of sparse attention.")
    warnings += _slow(check)
    if facts.dtype not in facts.products:
        warnings.append(
            f"{facts.dtype} has no products of its own in the instruction set in use ({facts.isa}): converted to "
            "float32 tile by tile, at float32's speed."
        )
    if facts.dtype == "float32" and facts.precision not in facts.precisions:
        notes.append(
            f'float32 precision "{facts.precision}" has no effect on attention in the instruction set in use '
            f'({facts.isa}): computed as "highest".'
        )
    if facts.shared:
        notes.append(
            f"{_layers(facts.shared)}: the predictor has no network of {'its' if len(facts.shared) == 1 else 'their'} "
            "own, so the one for all layers cut the keys."
        )
    if facts.implementation != "dhsa":
        notes.append(
            f'The model\'s own attention implementation is "{facts.implementation}"; both runs used "dhsa" instead.'
        )
    return wrong + warnings, notes, not wrong


def _not_finite(check: Check, facts: Facts) -> list[str]:
    """Describe where NaN or inf come from."""
    first = next((layer for layer in check.layers if layer.not_finite), None)
    fault = facts.exact_fault
    if first is not None:
        what, _, names = first.not_finite.partition(" in ")
        where = "in attention's output, while q, k and v were finite" if names == "output" else f"in {names}"
        exact = (
            "stays finite" if fault is None
            else "has it there too" if fault[0] == first.layer
            else f"has {fault[1]} first in layer {fault[0]}"
        )  # fmt: skip
        return [f"{what} first seen in layer {first.layer}, {where}; the exact run {exact}."]
    if fault is not None:
        return [f"{fault[1]} of layer {fault[0]} in the exact run; the sparse run stays finite."]
    return [
        f"The {name} run's logits hold NaN or inf, though every attention layer was finite."
        for name, finite in zip(("exact", "sparse"), facts.logits_finite, strict=True)
        if not finite
    ]


def _networks(facts: Facts) -> list[str]:
    if not facts.unserved:
        return []
    return [
        f"{_layers(facts.unserved)} ran exact: the predictor has no network for {_it(facts.unserved)}, nor one for all "
        f"layers. dhsa.patch refuses this config unless layers= names others; train networks by: {TRAIN}"
    ]


def _different(check: Check, facts: Facts) -> list[str]:
    """Describe a different answer, and which layers have the largest errors."""
    if not all(facts.logits_finite):
        return []
    found = []
    for row, (agree, (exact, sparse)) in enumerate(zip(check.agree, check.next_tokens, strict=True)):
        if not agree:
            where = f" of row {row}" if len(check.agree) > 1 else ""
            found.append(f"The next token{where} is {sparse} in place of {exact}; KL {check.kl[row]:.3g} nats.")
        elif check.kl[row] > LARGE_KL:
            where = f"row {row}'s" if len(check.agree) > 1 else "the"
            found.append(f"KL of {where} next token is {check.kl[row]:.3g} nats, more than {LARGE_KL}.")
    if check.tail_kl > LARGE_KL:
        found.append(
            f"KL over the last {check.tail} positions is {check.tail_kl:.3g} nats on average, more than {LARGE_KL}."
        )
    worst = sorted((layer for layer in check.layers if layer.output_error > 0), key=lambda layer: -layer.output_error)
    if found and worst:
        named = ", ".join(f"{layer.layer} ({layer.output_error:.0%})" for layer in worst[:_NAMED])
        found[-1] += f" The largest output errors are those of layer {named}."
    return found


def _slow(check: Check) -> list[str]:
    sparse = [layer for layer in check.layers if layer.path == "sparse"]
    select, attend = (sum(getattr(layer, f"{name}_seconds") for layer in sparse) for name in ("select", "attend"))
    exact = sum(layer.exact_seconds for layer in sparse)
    found = []
    if select > SLOW_SELECT * (select + attend):
        found.append(
            f"Selection takes {select / (select + attend):.0%} of the sparse layers' time: a longer query_block, fewer "
            "chunks (num_chunks) or a method that looks at less make it cheaper."
        )
    if sparse and select + attend > exact:
        took = f"{(select + attend) * 1e3:,.1f} ms, exact attention {exact * 1e3:,.1f} ms"
        found.append(f"The sparse layers took {took}: at this length sparse attention does not pay.")
    return found


def _grouped(check: Check, facts: Facts) -> list[tuple[str, str, list[int]]]:
    """Return (kind, text, layers) of the reasons that layers share, without those that have a warning of their own."""
    found: dict[tuple[str, str], list[int]] = {}
    for layer, kind in zip(check.layers, facts.reasons, strict=True):
        if kind and kind != "network":
            found.setdefault((kind, layer.why), []).append(layer.layer)
    return [(*key, layers) for key, layers in found.items()]


def _it(layers: Iterable[int]) -> str:
    return "it" if len(tuple(layers)) == 1 else "them"


def _layers(numbers: Iterable[int]) -> str:
    """ "Layer 3", "Layers 0-4, 6"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"Layer{'' if len(runs) == 1 and len(runs[0]) == 1 else 's'} {text}"
