"""The first and the most recent keys, or in bidirectional attention the nearest ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from dhsa._twin.blocks import Block
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Window"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Method):
    """The first and the most recent keys. It has no options of its own: `Config.sink` first keys, and as many recent
    ones as the budget leaves. In bidirectional attention, the keys nearest to the middle of the block take the place of
    recent ones.

    Source: StreamingLLM, arXiv 2309.17453.
    """

    name: ClassVar[str] = "window"
    summary: ClassVar[str] = "the first and the most recent keys"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"
    cost: ClassVar[str] = "none"
    has_mass: ClassVar[bool] = False
    reads_keys: ClassVar[bool] = False
    has_both_sides: ClassVar[bool] = True

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """All scores are equal: of equal keys the recent ones are taken first. Or, in bidirectional attention, each key
        by its distance from the middle of the block, which is at the boundary between two keys."""
        if block.middle is not None:
            keys = np.arange(block.end)
            return Segments(np.arange(block.end + 1), -abs(keys + 0.5 - block.middle))
        return Segments(np.array([0, block.end]), np.zeros(1))
