"""Fixed blocks of keys by products of few bits with every query."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from dhsa._twin.blocks import Block, Fixed, bad_blocks, block_edges, fixed, fixed_logits, sees, segments_of, shorter
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Sale"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sale(Method):
    """Fixed blocks of keys by the largest weight that a query of the block gives to one of their keys, relative to the
    largest weight of a first or recent key. Weights are estimated for every pair, from queries and keys that are
    rounded to a few bits. In NumPy: for comparing what is selected.

    Args:
        key_block: keys of a block, at least 1.
        bits: of the numbers of queries and keys, 2 to 8.
        threshold: blocks of keys whose relative weight is below it are left out, even if the budget has room; 0 to 1.
            0: the budget decides alone.

    Raises:
        TypeError, ValueError: naming the option.

    Source: SALE, arXiv 2505.24179. It estimates each pair of query and key, which `cost` counts; its speed comes from
    products of 4 bits, which this implementation has not.
    """

    name: ClassVar[str] = "sale"
    summary: ClassVar[str] = "fixed blocks by the largest relative weight of a pair, in few bits"
    source: ClassVar[str] = "SALE, arXiv 2505.24179"
    cost: ClassVar[str] = "Q G n, of `bits` bits"
    in_core: ClassVar[bool] = False
    has_mass: ClassVar[bool] = False
    heads: ClassVar[str] = "head"

    key_block: int = 32
    bits: int = 4
    threshold: float = 0.0

    def __post_init__(self) -> None:
        self._keep_int("key_block", 1)
        self._keep_int("bits", 2, 8)
        self._keep_float("threshold", 0, 1)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Queries and keys are rounded to whole numbers of at most ``2**(bits - 1) - 1``, each vector with a factor of
        its own. The relative weight of a pair is ``exp(logit - most)``, where ``most`` is the row's largest logit of a
        first or local key that the query sees. The largest of a block of keys, over the rows and the heads of the set,
        is its score. Source: SALE, arXiv 2505.24179.

        The source says that weights are compared with those of first and recent tokens; that it is the largest of
        these is how it is read here. A row that sees none of them counts relative to its largest logit. Its thresholds
        are calibrated for each head; here there is one.
        """
        o, edges = block.options, block_edges(block)
        most, at = 2 ** (o["bits"] - 1) - 1, np.arange(block.start, block.start + block.stop - block.begin)
        keys = np.arange(block.end)
        near = (keys >= block.lo) & ((keys < o["sink"]) | (keys >= block.end - o["local"]))
        first = block.start if o["window"] is None else block.lo  # of the keys that some query does not see
        unseen = ~sees((at, at), (keys[first:], keys[first:]), o["window"])
        score = np.full(len(edges) - 1, -np.inf)
        for h in range(len(block.q)):
            kv = h * len(block.k) // len(block.q)
            of_keys = block.shared(("few bits", kv), functools.partial(_few_bits, block.k[kv], most))[: block.end]
            s = fixed_logits(_few_bits(block.queries[h], most), of_keys, o)
            s[:, first:][unseen] = -np.inf
            s[:, : block.lo] = -np.inf
            s = s[np.isfinite(s.max(axis=1))]  # rows without a NaN
            if not len(s):
                continue
            forced = s[:, near].max(axis=1, initial=-np.inf)
            s -= np.where(np.isfinite(forced), forced, s.max(axis=1))[:, None]
            score = np.maximum(score, np.maximum.reduceat(s.max(axis=0), edges[:-1]))
        bad = bad_blocks(block)
        least = np.log(o["threshold"]) if o["threshold"] > 0 else -np.inf
        wanted = bad | (score >= least)
        room = int((near | np.repeat(wanted, np.diff(edges)) & (keys >= block.lo)).sum())
        segments = segments_of(edges, bad, score, score)
        return segments if o["threshold"] == 0 else shorter(block, segments, room)


def _few_bits(x: np.ndarray, most: int) -> Fixed:
    """Vectors in whole numbers up to `most`, whose products float32 holds without rounding."""
    found = fixed(x, most)
    return Fixed(found.whole.astype(np.float32), found.scale.astype(np.float32))
