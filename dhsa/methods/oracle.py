"""The exact attention mass of each key, for comparison."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from dhsa._twin.blocks import Block, is_bad, logits, probabilities, sees, segments_of
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Oracle"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(Method):
    """Single keys by their exact attention mass, summed over the queries of the block and the heads of the set. It is
    slower than dense attention, and is meant for comparison. It has no options of its own.

    Source: the upper bound in the comparisons of many papers.
    """

    name: ClassVar[str] = "oracle"
    summary: ClassVar[str] = "single keys by their exact attention mass"
    source: ClassVar[str] = "for study"
    cost: ClassVar[str] = "2 Q G n"

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Single keys by their exact attention mass: dense probabilities, summed over the block's queries and the
        heads."""
        at, keys = block.start + np.arange(block.stop - block.begin), np.arange(block.end)
        seen = sees((at, at), (keys, keys), block.options["window"])
        score = np.zeros(block.end)
        for h in range(len(block.q)):
            score += probabilities(logits(block.queries[h], block.keys_of(h)[: block.end], block.options), seen).sum(
                axis=0
            )
        return segments_of(np.arange(block.end + 1), is_bad(block), score, score)
