"""The choice of a candidate for each layer, from numbers only.

The KL divergence of the whole model is taken to be the sum of what each layer adds, and that to be in proportion to the
squared relative error of the layer's attention output. So it is least, at given seconds, where every layer has the
candidate with the least `kl + rate * seconds` at one rate for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Option", "cheapest", "chosen", "closest", "kept", "total", "uniform"]

K = TypeVar("K")


@dataclass(frozen=True)
class Option:
    """What a candidate does in one layer: `kl`, what it adds to the model's, in nats; `seconds` of selecting and
    attending."""

    kl: float
    seconds: float


Layers = Sequence[Mapping[K, Option]]  # for each layer, its candidates; the exact one is among them


def chosen(layers: Layers[K], rate: float) -> list[K]:
    """Return the best candidate of each layer at a rate in nats a second."""
    return [min(of, key=lambda name: of[name].kl + rate * of[name].seconds) for of in layers]


def total(layers: Layers[K], choice: Sequence[K]) -> Option:
    """Return the sums over the layers."""
    found = [of[name] for of, name in zip(layers, choice, strict=True)]
    return Option(math.fsum(o.kl for o in found), math.fsum(o.seconds for o in found))


def cheapest(layers: Layers[K], kl: float) -> list[K]:
    """Return the choice of the least seconds whose `kl` is at most this; exact in all layers if there is no other."""
    return _last(layers, lambda made: made.kl <= kl, rising=True)


def closest(layers: Layers[K], seconds: float) -> list[K] | None:
    """Return the choice of the least `kl` whose seconds are at most this; None if there is none."""
    choice = _last(layers, lambda made: made.seconds <= seconds, rising=False)
    return choice if total(layers, choice).seconds <= seconds else None


def _last(layers: Layers[K], good: Callable[[Option], bool], rising: bool) -> list[K]:
    """Return the choice at the highest (`rising`) or lowest rate at which the totals are `good`."""
    low, high = 1e-12, 1e12
    best, worst = (low, high) if rising else (high, low)  # best: always good, unless nothing is
    for _ in range(100):
        middle = math.sqrt(low * high)
        if good(total(layers, chosen(layers, middle))):
            best = middle
        else:
            worst = middle
        low, high = min(best, worst), max(best, worst)
    return chosen(layers, best)


def uniform(layers: Layers[K], names: Sequence[K]) -> dict[K, Option]:
    """Return the totals of each candidate in all layers; in a layer that has it not, the exact one counts, which is the
    one without error.
    """
    exact = [min(of.values(), key=lambda option: option.kl) for of in layers]
    found = {}
    for name in names:
        options = [of.get(name, other) for of, other in zip(layers, exact, strict=True)]
        found[name] = Option(math.fsum(o.kl for o in options), math.fsum(o.seconds for o in options))
    return found


def kept(points: Mapping[K, Sequence[tuple[float, float]]], most: int) -> list[K]:
    """Return the names that are on the frontier in the most places, at most `most`, those in more of them first.

    points: for each name, (error, seconds) in each of several places.
    """
    counts = {
        name: sum(
            not any(e < error and s < seconds for e, s in (own[place] for own in points.values()))
            for place, (error, seconds) in enumerate(points[name])
        )
        for name in points
    }
    return sorted((name for name in points if counts[name]), key=lambda name: -counts[name])[:most]
