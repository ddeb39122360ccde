"""Columns and diagonals of the attention of the last queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from dhsa._twin.blocks import Block, is_bad, logits, probabilities, sees
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["VerticalSlash"]

PROBE_QUERIES = 64  # queries at the prompt's end whose attention is computed


def columns_and_diagonals(block: Block, logits: Callable[..., np.ndarray] = logits) -> tuple[np.ndarray, np.ndarray]:
    """Columns [Lk] and diagonals [Lk] of the probabilities of the prompt's last 64 queries, summed over them and the
    heads. Diagonal d holds the pairs of a query and the key d before it. logits: which function computes them."""
    k_len = block.k.shape[1]
    n = min(PROBE_QUERIES, block.q.shape[1])
    at, keys = np.arange(k_len - n, k_len), np.arange(k_len)
    columns, diagonals = np.zeros(k_len), np.zeros(k_len)
    for h in range(len(block.q)):
        s = logits(block.q[h, -n:], block.keys_of(h), block.options)
        p = probabilities(s, sees((at, at), (keys, keys), block.options["window"]))
        columns += p.sum(axis=0)
        for row, position in zip(p, at, strict=True):
            diagonals[: position + 1] += row[position::-1]
    return columns, diagonals


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerticalSlash(Method):
    """Keys that the last 64 queries of the prompt attend to, as columns and as diagonals, the same for all blocks.

    It has no options of its own. By default each head has lists of its own, as in the source.

    Source: MInference, arXiv 2407.02490.
    """

    name: ClassVar[str] = "vertical_slash"
    summary: ClassVar[str] = "columns and diagonals that the prompt's last queries attend to"
    source: ClassVar[str] = "MInference, arXiv 2407.02490"
    cost: ClassVar[str] = "64 G keys, once for all blocks"
    has_mass: ClassVar[bool] = False
    heads: ClassVar[str] = "head"

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Columns and diagonals that the prompt's last queries attend to, the same for all blocks. Source: MInference,
        arXiv 2407.02490; the second version of the DHSA paper calls it vs.

        Half (rounded up) of the budget that the forced keys leave goes to diagonals, best first, of equal ones the
        smaller d. Diagonal d covers the keys d before the block's queries. Keys of several diagonals count once, and
        the last diagonal gives its most recent keys. Columns fill the rest, best first, of equal ones the more recent;
        those that a diagonal covers already do not count.
        """
        columns, diagonals = block.shared("columns", lambda: columns_and_diagonals(block))
        keys = np.arange(block.end)
        chosen = (keys >= block.lo) & ((keys < block.options["sink"]) | (keys >= block.end - block.options["local"]))
        free = (keys >= block.lo) & ~chosen
        bad = np.flatnonzero(free & is_bad(block))
        chosen[bad[len(bad) - min(len(bad), block.room - int(chosen.sum())) :]] = True
        half = -(-(block.room - int(chosen.sum())) // 2)
        end = block.start + block.stop - block.begin
        for d in np.argsort(-diagonals, kind="stable"):
            run = range(end - d - 1, max(block.start - d, 0) - 1, -1)
            fresh = [j for j in run if free[j] and not chosen[j]][:half]
            chosen[fresh] = True
            half -= len(fresh)
            if half == 0:
                break
        for j in np.lexsort((-np.arange(len(columns)), -columns)):
            if chosen.sum() < block.room and j < block.end and free[j]:
                chosen[j] = True
        return np.flatnonzero(chosen)
