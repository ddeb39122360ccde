"""Fixed blocks by mean vectors, except where a mean says little."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from dhsa._twin.blocks import (
    Block,
    bad_blocks,
    block_edges,
    key_means,
    probabilities,
    segments_of,
    shorter,
    steady_logits,
)
from dhsa._twin.selection import Segments, topk
from dhsa.methods.base import Method

__all__ = ["Sparge"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparge(Method):
    """Fixed blocks of keys by the softmax of the block's mean query over the mean keys, but only where the vectors of a
    block are alike, so that their mean stands for them. Blocks of keys that are not alike are always taken. In NumPy:
    for comparing what is selected.

    Args:
        key_block: keys of a block, at least 1.
        similarity: the least similarity of a block of queries or keys with itself (theta in the source), 0 to 1: the
            squared norm of their mean, divided by the largest squared norm.

    Raises:
        TypeError, ValueError: naming the option.

    Source: SpargeAttn, arXiv 2502.18137.
    """

    name: ClassVar[str] = "sparge"
    summary: ClassVar[str] = "fixed blocks by mean vectors where the vectors of a block are alike, and all others"
    source: ClassVar[str] = "SpargeAttn, arXiv 2502.18137"
    cost: ClassVar[str] = "G n / `key_block`, Q times as much where queries differ"
    in_core: ClassVar[bool] = False
    heads: ClassVar[str] = "head"
    paper_fields: ClassVar[Mapping[str, Any]] = {"budget": None, "mass": 0.9, "query_block": 128, "key_block": 64}

    key_block: int = 128
    similarity: float = 0.3

    def __post_init__(self) -> None:
        self._keep_int("key_block", 1)
        self._keep_float("similarity", 0, 1)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Per head the softmax of the mean query over the mean keys of the blocks of keys that are alike, summed over
        heads; also the mass. Source: SpargeAttn, arXiv 2502.18137.

        There, the similarity of vectors X is the mean of X X^T divided by its largest entry. The mean is the squared
        norm of the mean vector, and the largest entry the largest squared norm. Blocks of keys below ``similarity`` in
        any KV head of the set are selected whatever their score, as far as the budget allows.

        A block of queries below it sees all keys in the source. It does so here under a mass, as far as the budget
        allows. Without one each of its queries has a softmax of its own, and the sums decide.

        The second stage of the source, which leaves out tiles of small probability while it computes attention, is
        `Config.skip`. The thresholds are tuned for each head of a model there; here they are the same for all.
        """
        o, edges = block.options, block_edges(block)
        alike = np.ones(len(edges) - 1, bool)
        for kv in range(len(block.k)):
            alike &= _similar(block, kv, edges) >= o["similarity"]
        total, seen = np.zeros(len(edges) - 1), edges[1:] > block.lo
        for h in range(len(block.q)):
            queries = block.queries[h]
            if _likeness(queries) >= o["similarity"]:
                queries = queries.mean(axis=0, keepdims=True)
            elif o["mass"] is not None:
                alike = np.zeros_like(alike)
            means = np.where(alike[:, None], key_means(block, h), 0.0)
            total += probabilities(steady_logits(queries, means, o), seen & alike).sum(axis=0) / len(queries)
        # As all blocks that are not alike may be more than the budget has room for, those with a NaN come before them.
        bad = bad_blocks(block)
        segments = segments_of(edges, bad | ~alike, total, total)
        bounds = {name: o[name] for name in ("sink", "local", "mass", "floor")}
        room = len(topk(segments, block.lo, block.end, budget=block.room, **bounds))
        return shorter(block, Segments(edges, np.where(bad, np.inf, np.where(alike, total, len(block.q) + 1))), room)


def _likeness(x: np.ndarray) -> float:
    """The similarity of vectors x [n, D] with themselves, 0 to 1; 0 if one is not finite, 1 if all are zero."""
    most = (x**2).sum(axis=1).max()
    return float((x.mean(axis=0) ** 2).sum() / most) if np.isfinite(most) and most > 0 else float(most == 0)


def _similar(block: Block, kv: int, edges: np.ndarray) -> np.ndarray:
    """[blocks of keys]: their similarity with themselves."""
    keys = block.k[kv]
    size = block.options["key_block"]
    begins = range(0, len(keys) // size * size, size)
    whole = block.shared(("similar", kv), lambda: np.array([_likeness(keys[a : a + size]) for a in begins]))
    n = block.end // size
    return np.append(whole[:n], [_likeness(keys[a : block.end]) for a in edges[n:-1]])
