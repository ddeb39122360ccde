"""Blocks of keys, then single keys inside the best of them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from dhsa._arrays import check_int
from dhsa._twin.blocks import Block, block_edges, coarse, is_bad, logits, mean_rows, probabilities, segments_of
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Hisa"]

HISA_KEPT = 4  # keys of the blocks whose keys are scored, in budgets


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hisa(Method):
    """Single keys of the best fixed blocks: mean rows of the queries score the means of blocks first, then the keys in
    the best of these blocks.

    Args:
        key_block: keys of a block, at least 1.
        rows: mean queries that a full block is reduced to, 1 to query_block. None: query_block // 4.

    Raises:
        TypeError, ValueError: naming the option.

    Source: HISA, arXiv 2603.28458.
    """

    name: ClassVar[str] = "hisa"
    summary: ClassVar[str] = "single keys of the best fixed blocks"
    source: ClassVar[str] = "HISA, arXiv 2603.28458"
    cost: ClassVar[str] = "`rows` G (n / `key_block` + 4 budgets)"

    key_block: int = 128
    rows: int | None = None

    def __post_init__(self) -> None:
        self._keep_int("key_block", 1)
        self._keep_int("rows", 1)

    def core(self, *, query_block: int, budget: int | None) -> dict[str, Any]:
        rows = max(1, query_block // 4) if self.rows is None else check_int(self.rows, "rows", 1, query_block)
        return {"key_block": self.key_block, "rows": rows}

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Single keys, but only those of the best blocks. Source: HISA, arXiv 2603.28458.

        In the source, a trained indexer scores blocks by their mean key, then the tokens of the blocks that are kept. A
        frozen model has no indexer. Here mean rows of the block's queries (as many as row scores have) replace it, each
        with a softmax, summed over rows and heads: first over the mean keys of the blocks with a candidate, then over
        the candidates in the kept blocks. The blocks with a forced key (in the source the first and the last) are kept,
        and the best of the others, of equal ones the later, until they hold ``4 * budget`` candidates (all blocks
        without a budget). The second sums are also the mass.
        """
        o, edges, bad = block.options, block_edges(block), is_bad(block)
        run = -(-o["query_block"] // o["rows"])
        first = np.where(np.logical_or.reduceat(bad, edges[:-1]), np.inf, coarse(block, run))
        begins = np.maximum(edges[:-1], block.lo)
        held = np.maximum(edges[1:] - begins, 0)
        kept = (held > 0) & ((begins < o["sink"]) | (edges[1:] > block.end - o["local"]))
        for c in np.lexsort((-np.arange(len(first)), -first)):
            if o["budget"] is None or held[kept].sum() < HISA_KEPT * o["budget"]:
                kept[c] |= held[c] > 0
        inside = np.repeat(kept, np.diff(edges)) & (np.arange(block.end) >= block.lo)
        score = np.zeros(block.end)
        for h in range(len(block.q)):
            s = logits(mean_rows(block, h, run), block.keys_of(h)[: block.end], o)
            score += probabilities(s, inside).sum(axis=0)
        return segments_of(np.arange(block.end + 1), bad & inside, np.where(inside, score, -np.inf), score)
