"""Row scores on chunks: this project's method, and the default."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from dhsa._arrays import check_int
from dhsa._twin.blocks import Block
from dhsa._twin.scores import chunk_means, chunk_spreads, row_scores
from dhsa._twin.selection import Segments, local_span
from dhsa.methods.base import Method

__all__ = ["Rows"]

MIN_SHORTLIST = 4096  # keys; with fewer, scoring every chunk is cheap
GROUP = 4  # chunks of a group, which the coarse stage takes or leaves out as a whole


def _row_scores(block: Block, edges: np.ndarray, live: np.ndarray, logs: Any = None, whole: Any = None):
    """Row scores and mass of chunks ``edges``, whether their means are finite, and the logarithms of the denominators
    of the rows; 0 and True where not live. Means and rows are quantized. whole: the chunks whose spread counts."""
    o = block.options
    score, mass, finite = np.zeros(len(live)), np.zeros(len(live)), np.ones(len(live), bool)
    means = chunk_means(block.k[None, :, : block.end], edges)[0]
    spreads = None if whole is None else np.where(whole, chunk_spreads(block.k[:, : block.end], edges), 0.0)[:, live]
    score[live], mass[live], finite[live], logs = row_scores(
        block.queries, means[:, live], o["rows"], o["query_block"], o["scale"], o["softcap"], range(len(block.q)),
        len(block.q) // len(block.k), True, np.diff(edges)[live], logs, spreads,
    )  # fmt: skip
    return score, mass, finite, logs


def _shortlist(block: Block, cuts: np.ndarray) -> tuple[np.ndarray, Any]:
    """Which chunks the coarse stage leaves: whole groups of 4, by the scores of their mean keys. And the logarithms of
    the denominators of the rows."""
    o = block.options
    groups = np.append(cuts[:-1][::GROUP], cuts[-1])
    edges = np.minimum(groups, block.end)
    live = np.maximum(edges[:-1], block.lo) < edges[1:]
    score, _, finite, logs = _row_scores(block, edges, live, whole=edges[1:] == groups[1:])
    score[~finite], score[~live] = np.inf, -np.inf
    near, far = local_span(block.lo, block.end, o["local"], block.middle)
    score[(groups[:-1] < o["sink"]) | ((groups[1:] > near) & (groups[:-1] < far))] = np.inf
    keys = np.maximum(np.minimum(groups[1:], block.end) - np.maximum(groups[:-1], block.lo), 0)
    chosen, held = np.zeros(len(score), bool), 0
    for g in np.lexsort((-np.arange(len(score)), -score)):
        if held < o["shortlist"] and keys[g] > 0:
            chosen[g], held = True, held + keys[g]
    return np.repeat(chosen, GROUP)[: len(cuts) - 1], logs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(Method):
    """Chunks by row scores: each query of a block, or each mean of a few neighbouring ones, takes a softmax over the
    chunk means, in which a chunk counts as often as it has keys; the squares are summed. Queries and means are rounded
    to 8 bits for that, and exponentials are powers of two that are linear between whole exponents.

    Args:
        rows: mean queries that a full block is reduced to, 1 to query_block. None: half of query_block, rounded up, so
            that a row is the mean of two neighbouring queries. With rows=query_block every query counts by itself,
            which is nearer to exact attention at the same budget and takes twice the time of selecting.
        shortlist: if a block has more candidates, a coarse stage over groups of 4 chunks leaves about this many keys,
            whose chunks are then scored. At least the budget; 0: never. None: 4 budgets, at least 4096; never with
            `Config.mass`.

    Raises:
        TypeError, ValueError: naming the option.

    Source: this project; chunks as in arXiv 2510.24606.
    """

    name: ClassVar[str] = "rows"
    summary: ClassVar[str] = "chunks by the softmax of means of two queries over chunk means"
    source: ClassVar[str] = "this project"
    cost: ClassVar[str] = "`rows` G (chunks of the shortlist + groups of 4 chunks)"
    has_chunks: ClassVar[bool] = True
    has_both_sides: ClassVar[bool] = True
    heads: ClassVar[str] = "head"
    boundaries: ClassVar[str] = "fixed"
    chunk_size: ClassVar[int] = 2

    rows: int | None = None
    shortlist: int | None = None

    def __post_init__(self) -> None:
        self._keep_int("rows", 1)
        self._keep_int("shortlist", 0)

    def core(self, *, query_block: int, budget: int | None) -> dict[str, Any]:
        rows = (query_block + 1) // 2 if self.rows is None else check_int(self.rows, "rows", 1, query_block)
        if self.shortlist is not None and 0 < self.shortlist < (budget or 0):
            raise ValueError(f"shortlist: {self.shortlist} keys are fewer than the budget of {budget}")
        return {"rows": rows, "shortlist": self.shortlist}

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Row scores on chunks, see ``chunk_scores``, with means and rows quantized. The mass of a chunk is the sum of
        its row probabilities. With more candidates than ``shortlist``, only the chunks that the coarse stage leaves are
        scored (not with ``mass``), by its denominators.
        """
        o = block.options
        edges = np.minimum(o["edges"], block.end)  # a chunk that straddles the block's end is cut there
        candidate = np.maximum(edges[:-1], block.lo) < edges[1:]
        live, logs = candidate.copy(), None
        if 0 < o["shortlist"] < block.end - block.lo and o["mass"] is None:
            left, logs = _shortlist(block, o["edges"])
            live &= left | (edges[1:] < o["edges"][1:])
        score, mass, _, _ = _row_scores(block, edges, live, logs)
        finite = np.isfinite(chunk_means(block.k[None, :, : block.end], edges)[0]).all(axis=(0, 2))
        score[~live] = -np.inf
        score[~finite & candidate], mass[~finite] = np.inf, 0.0
        return Segments(edges, score, mass)
