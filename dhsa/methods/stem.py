"""Fixed blocks of keys by mean vectors and the size of their values; fewer keys for later queries."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from dhsa._twin.blocks import Block, bad_blocks, block_edges, key_means, segments_of, shorter, steady_logits
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Stem"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stem(Method):
    """Fixed blocks of keys by the product of the block's mean query and the mean key, to which the logarithm of the
    mean norm of the values is added: what has large values changes the output more. The lists of later blocks of
    queries are shorter, since later tokens are built on earlier ones. In NumPy: for comparing what is selected.

    Args:
        key_block: keys of a block, at least 1.
        beta: the factor of the logarithm, 0 to 10. 0: values do not count.
        decay: the length of the last block's list, as a share of the budget; 0.01 to 1. Lengths fall from the budget to
            it in a line over the positions of the prompt, so that the mean is less than the budget: compare at equal
            density. 1: they do not fall.

    Raises:
        TypeError, ValueError: naming the option.

    Source: Stem, arXiv 2603.06274. Its text could be read in part: the form of the sum, `beta` and `decay` are read
    from descriptions of it.
    """

    name: ClassVar[str] = "stem"
    summary: ClassVar[str] = "fixed blocks by mean vectors and the norms of values, fewer for later queries"
    source: ClassVar[str] = "Stem, arXiv 2603.06274"
    cost: ClassVar[str] = "G n / `key_block`"
    in_core: ClassVar[bool] = False
    has_mass: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True

    key_block: int = 128
    beta: float = 0.2
    decay: float = 0.7

    def __post_init__(self) -> None:
        self._keep_int("key_block", 1)
        self._keep_float("beta", 0, 10)
        self._keep_float("decay", 0.01, 1)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Per head the logits of the mean query over mean keys, plus ``beta`` times the logarithm of the mean norm of
        the values of the block of keys (no less than 0, as in the source), summed over heads. Source: Stem, arXiv
        2603.06274.

        A block of queries that ends at share x of the keys takes ``1 - (1 - decay) x`` of the budget. A block of keys
        with a key or value that is not finite is always selected.
        """
        o, edges = block.options, block_edges(block)
        assert block.v is not None
        bad, score = bad_blocks(block), np.zeros(len(edges) - 1)
        for h in range(len(block.q)):
            kv = h * len(block.k) // len(block.q)
            norms = block.shared(("norms", kv), functools.partial(_norms, block.v[kv]))
            size = np.add.reduceat(norms[: block.end], edges[:-1]) / np.diff(edges)
            means = key_means(block, h)
            finite = np.isfinite(size) & np.isfinite(means).all(axis=1)
            bad = bad | ~finite
            query = block.queries[h].mean(axis=0, keepdims=True)
            if np.isfinite(query).all():  # else the head does not count
                logits = steady_logits(query, np.where(finite[:, None], means, 0.0), o)[0]
                score += logits + o["beta"] * np.log(np.maximum(np.where(finite, size, 1.0), 1.0))
        share = 1 - (1 - o["decay"]) * block.end / block.k.shape[1]
        return shorter(block, segments_of(edges, bad, score, score), int(np.ceil(share * block.room)))


def _norms(x: np.ndarray) -> np.ndarray:
    """The norms of vectors x [n, E]."""
    return np.asarray(np.sqrt((x**2).sum(axis=1)))
