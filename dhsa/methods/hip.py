"""Fixed blocks of keys by a search in a tree of their middle keys."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from dhsa._twin.blocks import Block, bad_blocks, block_edges, fixed, fixed_keys, fixed_logits, segments_of
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Hip"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hip(Method):
    """Short runs of keys, found by a search in a tree: the candidates are cut into as many runs as the budget has room
    for, each is halved, and the better half of all halves is halved again. A run is scored by its middle key alone. In
    NumPy: for comparing what is selected.

    Args:
        key_block: keys of a run at which the search ends, at least 1.

    Raises:
        TypeError, ValueError: naming the option.

    Source: HiP, arXiv 2406.09827.
    """

    name: ClassVar[str] = "hip"
    summary: ClassVar[str] = "short runs by a tree search over middle keys"
    source: ClassVar[str] = "HiP, arXiv 2406.09827"
    cost: ClassVar[str] = "2 Q G budget / `key_block`, log2(n / budget) times"
    in_core: ClassVar[bool] = False
    has_mass: ClassVar[bool] = False
    heads: ClassVar[str] = "head"

    key_block: int = 2

    def __post_init__(self) -> None:
        self._keep_int("key_block", 1)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """The score of a run of ``key_block``-sized blocks of keys is the largest logit of its middle key with a query
        of the block, over the heads of the set. The search keeps as many runs as blocks fit into the room; it ends
        when the runs are single blocks, of which the best are taken. Source: HiP, arXiv 2406.09827.

        There, a query's own most recent keys are kept beside the search, as `Config.sink` and `Config.local` are here.
        Blocks of keys that the search left behind fill what is missing, the most recent first. A middle key after a
        query counts for it too, since it stands for earlier ones; candidates end with the block of queries.
        """
        o, edges = block.options, block_edges(block)
        first, last = block.lo // o["key_block"], len(edges) - 1
        n = max(1, min(last - first, -(-block.room // o["key_block"])))
        rows = [fixed(block.queries[h]) for h in range(len(block.q))]
        cuts = first + (last - first) * np.arange(n + 1) // n
        begins, ends = cuts[:-1], cuts[1:]
        while (ends - begins).max() > 1:
            middle = (begins + ends) // 2  # of runs of one block: their end, so that the first half is empty
            begins, ends = np.stack([begins, middle], 1).reshape(-1), np.stack([middle, ends], 1).reshape(-1)
            begins, ends = begins[begins < ends], ends[begins < ends]
            score = _scores(block, rows, edges, begins, ends)
            best = np.sort(np.lexsort((-begins, -score))[:n])
            begins, ends = begins[best], ends[best]
        score = np.full(last, -np.inf)
        score[begins] = _scores(block, rows, edges, begins, ends)
        return segments_of(edges, bad_blocks(block), score, score)


def _scores(block: Block, rows: list, edges: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The largest logit of the middle key of each run of blocks of keys, over all rows; -inf where none is finite."""
    middle = np.maximum((edges[begins] + edges[ends] - 1) // 2, block.lo)
    score = np.full(len(begins), -np.inf)
    for h, queries in enumerate(rows):
        s = fixed_logits(queries, fixed_keys(block, h)[middle], block.options)
        score = np.maximum(score, np.where(np.isnan(s), -np.inf, s).max(axis=0))
    return score
