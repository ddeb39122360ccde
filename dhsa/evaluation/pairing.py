"""Paired comparison. Every method reads the same prompts, so their differences are computed prompt by prompt.

The standard error of the mean difference is the one over prompts. The much larger variation between texts cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Estimate", "estimate", "paired"]


class Estimate(NamedTuple):
    """A mean over `count` prompts and its standard error, NaN for fewer than two."""

    mean: float
    error: float
    count: int  # type: ignore[assignment]  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def sure(self) -> bool:
        """Whether the mean is beyond twice its standard error. False for fewer than two prompts."""
        return abs(self.mean) > 2 * self.error


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values and its standard error."""
    count = len(values)
    if not count:
        return Estimate(math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, math.nan, count)
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def paired(left: Mapping[str, float], right: Mapping[str, float]) -> Estimate:
    """Return the mean of left - right over the prompts that both have."""
    return estimate([left[name] - right[name] for name in left if name in right])
