"""The paper's score on chunks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from dhsa._arrays import check_choice
from dhsa._twin.blocks import Block
from dhsa._twin.scores import block_scores, chunk_means
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Dhsa"]

POOLINGS = ("mean", "mean_sqrt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dhsa(Method):
    """Chunks by the paper's score: the product of the block's mean query and the chunk's mean key, each also the mean
    over the heads of a set.

    Args:
        pooling: "mean", or "mean_sqrt" (the paper's first version: both means times the square root of the length).

    Raises:
        TypeError, ValueError: naming the option.

    Source: arXiv 2510.24606. `Config.paper` is the setting of its first version.
    """

    name: ClassVar[str] = "dhsa"
    summary: ClassVar[str] = "chunks by the product of mean query and mean key"
    source: ClassVar[str] = "DHSA, arXiv 2510.24606"
    cost: ClassVar[str] = "1 a chunk"
    has_chunks: ClassVar[bool] = True
    has_mass: ClassVar[bool] = False

    pooling: str = "mean"

    def __post_init__(self) -> None:
        check_choice(self.pooling, "pooling", POOLINGS)

    @classmethod
    def paper(cls) -> Dhsa:
        """The pooling of the paper's first version."""
        return cls(pooling="mean_sqrt")

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """The paper's score on chunks, see ``chunk_scores``."""
        o = block.options
        edges = o["edges"]
        live = np.maximum(edges[:-1], block.lo) < np.minimum(edges[1:], block.end)
        score = np.full(len(live), -np.inf)
        means = chunk_means(block.k[None], edges)[0]
        value, finite = block_scores(
            block.queries, means[:, live], np.diff(edges)[live], o["pooling"], range(len(block.q)),
            len(block.q) // len(block.k),
        )  # fmt: skip
        score[live] = np.where(finite, value, np.inf)
        return Segments(edges, score)
