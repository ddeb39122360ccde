"""A pattern for each head: blocks by the mean query, or columns and diagonals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from dhsa._twin.blocks import (
    Block,
    bad_blocks,
    block_edges,
    is_bad,
    key_means,
    probabilities,
    sees,
    segments_of,
    steady_logits,
)
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method
from dhsa.methods.vertical_slash import PROBE_QUERIES, columns_and_diagonals

__all__ = ["FlexPrefill"]


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The square root of the Jensen-Shannon divergence (natural logarithm) of two distributions; 0 to sqrt(ln 2)."""
    middle = (p + q) / 2
    parts = [np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0) / np.where(middle > 0, middle, 1.0)), 0.0).sum() / 2
             for x in (p, q)]  # fmt: skip
    return float(np.sqrt(max(0.0, sum(parts))))


def estimate_misses(block: Block) -> float:
    """How far the estimate of attention by mean vectors lies from attention itself, for the prompt's last queries: the
    divergence of both over blocks of keys, the mean over the heads of the set."""
    o, k_len = block.options, block.k.shape[1]
    last = block.q[:, -min(PROBE_QUERIES, block.q.shape[1]) :]
    at, keys = np.arange(k_len - last.shape[1], k_len), np.arange(k_len)
    edges = np.append(np.arange(0, k_len, o["key_block"]), k_len)
    total = 0.0
    for h in range(len(block.q)):
        rows = probabilities(steady_logits(last[h], block.keys_of(h), o), sees((at, at), (keys, keys), o["window"]))
        real = np.add.reduceat(rows.mean(axis=0), edges[:-1])
        means = np.add.reduceat(block.keys_of(h), edges[:-1], axis=0) / np.diff(edges)[:, None]
        seen = sees((at[:1], at[-1:]), (edges[:-1], edges[1:] - 1), o["window"])
        estimate = probabilities(steady_logits(last[h].mean(axis=0, keepdims=True), means, o), seen)[0]
        total += divergence(real, estimate)
    return total / len(block.q)


def covers(block: Block, ranks: np.ndarray) -> np.ndarray:
    """[end]: the rank of the best diagonal that runs through each key and a query of the block. ranks [Lk]: of
    diagonals; diagonal d joins a query to the key d before it."""
    n, none = block.stop - block.begin, len(ranks)
    # Query start + t and key j are on diagonal start + t - j, so key j has those from start - j on, n of them.
    padded = np.concatenate([np.full(n, none), ranks[: block.start + n], np.full(n, none)])
    best = np.lib.stride_tricks.sliding_window_view(padded, n).min(axis=1)  # [d]: of diagonals d - n to d - 1
    return np.asarray(best[n + block.start - np.arange(block.end)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexPrefill(Method):
    """Each head has one of two patterns. Where mean vectors estimate the attention of the prompt's last queries well,
    its lists are fixed blocks of keys by mean queries and mean keys; elsewhere they are the columns and diagonals that
    these queries attend to. In NumPy: for comparing what is selected.

    Args:
        key_block: keys of a block, at least 1.
        tau: the divergence below which the estimate counts as good, 0 to 1. 0: columns and diagonals always; 1: blocks
            always.

    Raises:
        TypeError, ValueError: naming the option.

    Source: FlexPrefill, arXiv 2502.20766. Its estimate costs the attention of 64 queries once, and one product for
    each mean query and block of keys, which `cost` counts.
    """

    name: ClassVar[str] = "flexprefill"
    summary: ClassVar[str] = "blocks by mean vectors, or columns and diagonals, whichever fits a head"
    source: ClassVar[str] = "FlexPrefill, arXiv 2502.20766"
    cost: ClassVar[str] = "64 G keys, once for all blocks, and G n / `key_block`"
    in_core: ClassVar[bool] = False
    heads: ClassVar[str] = "head"
    paper_fields: ClassVar[Mapping[str, Any]] = {"budget": None, "mass": 0.9, "key_block": 128, "tau": 0.1}

    key_block: int = 128
    tau: float = 0.1

    def __post_init__(self) -> None:
        self._keep_int("key_block", 1)
        self._keep_float("tau", 0, 1)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """One pattern for all blocks of a set of heads. Source: FlexPrefill, arXiv 2502.20766.

        The last 64 queries of the prompt stand for all. Their attention over blocks of keys, and its estimate from
        their mean and the mean keys, differ by the square root of the Jensen-Shannon divergence (`estimate_misses`).
        Below ``tau`` blocks of keys are scored by the softmax of the block's mean query over mean keys, summed over
        heads, which is also their mass.

        Otherwise lists are columns and diagonals of the attention of these 64 queries, as in `vertical_slash`. Under a
        budget half of what forced keys leave goes to diagonals. Under a mass, the fewest diagonals that hold that share
        of all diagonals and the fewest columns that hold that share of all columns are taken; if that is more than
        the room, the list is as under a budget, and if it is less than the floor, further columns fill it.

        The source sorts the blocks of keys of all blocks of queries in one list, to share the work between them; here
        every block of queries reaches the share by itself, since lists have a budget of their own. Its least number of
        keys is `Config.floor`. If heads share a list, the mean of their divergences decides.
        """
        o = block.options
        if block.shared("misses", lambda: estimate_misses(block)) < o["tau"]:
            total = np.zeros(len(block_edges(block)) - 1)
            seen = block_edges(block)[1:] > block.lo
            for h in range(len(block.q)):
                mean = block.queries[h].mean(axis=0, keepdims=True)
                means = key_means(block, h)
                finite = np.asarray(np.isfinite(means).all(axis=1))
                total += probabilities(steady_logits(mean, np.where(finite[:, None], means, 0.0), o), seen & finite)[0]
            return segments_of(block_edges(block), bad_blocks(block), total, total)
        columns, diagonals = block.shared("columns", lambda: columns_and_diagonals(block, steady_logits))
        keys = np.arange(block.end)
        chosen = (keys >= block.lo) & ((keys < o["sink"]) | (keys >= block.end - o["local"]))
        free = (keys >= block.lo) & ~chosen
        bad = np.flatnonzero(free & is_bad(block))
        chosen[bad[len(bad) - min(len(bad), block.room - int(chosen.sum())) :]] = True
        free &= ~chosen
        order = np.argsort(-diagonals, kind="stable")
        cover = covers(block, np.argsort(order, kind="stable"))
        by_column = np.lexsort((-keys, -columns[: block.end]))
        if o["mass"] is not None:
            few = fewest(diagonals[order], o["mass"])
            best = np.sort(-columns, kind="stable")
            least = -best[fewest(-best, o["mass"]) - 1] if columns.any() else 0.0
            wanted = free & ((cover < few) | ((columns[: block.end] >= least) & (columns[: block.end] > 0)))
            if (chosen | wanted).sum() <= block.room:
                chosen |= wanted
                rest = by_column[free[by_column] & ~chosen[by_column]]
                chosen[rest[: max(0, min(o["floor"], block.room) - int(chosen.sum()))]] = True
                return np.flatnonzero(chosen)
        half = -(-(block.room - int(chosen.sum())) // 2)
        by_cover = np.lexsort((-keys, cover))
        chosen[by_cover[free[by_cover]][:half]] = True
        rest = by_column[free[by_column] & ~chosen[by_column]]
        chosen[rest[: block.room - int(chosen.sum())]] = True
        return np.flatnonzero(chosen)


def fewest(parts: np.ndarray, share: float) -> int:
    """How many of `parts`, the largest first, hold `share` of their sum; at least 1."""
    held = np.cumsum(parts)
    return min(int(np.searchsorted(held, share * held[-1])) + 1, len(parts))
