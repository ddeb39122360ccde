"""The choice of a candidate for each layer, from numbers only.

The KL divergence of the whole model is taken to be the sum of what each layer adds, and that to be in proportion to the
squared relative error of the layer's attention output. Both numbers of a choice are then sums over the layers, and the
choices that no other beats in both are found layer by layer: of all sums of the choices so far with the next layer's
candidates, those that another beats are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

__all__ = ["Option", "cheapest", "closest", "kept", "total", "uniform"]

K = TypeVar("K")

MOST = 4096  # sums kept after a layer; more would tell times apart by less than a 4,096th of the slowest choice


@dataclass(frozen=True)
class Option:
    """What a candidate does in one layer: `kl`, what it adds to the model's, in nats; `seconds` of selecting and
    attending."""

    kl: float
    seconds: float


Layers = Sequence[Mapping[K, Option]]  # for each layer, its candidates; the exact one is among them


def total(layers: Layers[K], choice: Sequence[K]) -> Option:
    """Return the sums over the layers."""
    found = [of[name] for of, name in zip(layers, choice, strict=True)]
    return Option(math.fsum(o.kl for o in found), math.fsum(o.seconds for o in found))


def cheapest(layers: Layers[K], kl: float) -> list[K]:
    """Return the choice of the least seconds whose `kl` is at most this; exact in all layers if there is no other."""
    exact = [min(of, key=lambda name: of[name].kl) for of in layers]
    return next((choice for choice in _frontier(layers) if total(layers, choice).kl <= kl), exact)


def closest(layers: Layers[K], seconds: float) -> list[K] | None:
    """Return the choice of the least `kl` whose seconds are at most this; None if there is none."""
    found = None
    for choice in _frontier(layers):
        if total(layers, choice).seconds > seconds:
            break
        found = choice
    return found


def _frontier(layers: Layers[K]) -> Iterator[list[K]]:
    """Yield the choices that no other beats in both numbers, the fastest first and the one of the least `kl` last.

    Exact as long as there are at most `MOST` of them after each layer; of more, the fastest in each of as many equal
    parts of the range of seconds is kept, and the slowest of all.
    """
    kl, seconds = np.zeros(1), np.zeros(1)
    steps = []  # for each layer: of each sum that was kept, the one it was made from, and the candidate added
    for of in layers:
        options = list(of.values())
        sums = np.add.outer(kl, [o.kl for o in options]).ravel()
        times = np.add.outer(seconds, [o.seconds for o in options]).ravel()
        order = np.lexsort((sums, times))
        least = np.minimum.accumulate(sums[order])
        order = order[np.append(True, least[1:] < least[:-1])]
        if len(order) > MOST:
            span = times[order] - times[order[0]]
            part = np.floor(span * (MOST / span[-1]))
            order = order[np.append(True, part[1:] > part[:-1])]
        kl, seconds = sums[order], times[order]
        steps.append(np.divmod(order, len(options)))
    names = [list(of) for of in layers]
    for place in range(len(kl)):
        choice = []
        for own, (parents, added) in zip(reversed(names), reversed(steps), strict=True):
            choice.append(own[added[place]])
            place = parents[place]
        yield choice[::-1]


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
