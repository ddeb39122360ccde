"""Blocks at distances of powers of two."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from dhsa._twin.blocks import Block
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Power"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Power(Method):
    """Blocks of query_block keys, ordered by the number of hops of power-of-two length that their distance takes. It
    has no options of its own.

    Source: PowerAttention, arXiv 2503.03588.
    """

    name: ClassVar[str] = "power"
    summary: ClassVar[str] = "blocks at distances that few hops of power-of-two length cover"
    source: ClassVar[str] = "PowerAttention, arXiv 2503.03588"
    cost: ClassVar[str] = "none"
    has_mass: ClassVar[bool] = False
    reads_keys: ClassVar[bool] = False

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Blocks of ``query_block`` keys, counted back from the query block itself (distance 0), ordered by the number
        of hops of power-of-two length that their distance takes; of equal ones the nearer come first."""
        size = block.options["query_block"]
        most = -(-block.start // size)
        distance = np.arange(most, -1, -1)
        edges = np.append(np.maximum(block.start - distance * size, 0), block.end)
        return Segments(edges, -np.array([int(d).bit_count() for d in distance], np.float64))
