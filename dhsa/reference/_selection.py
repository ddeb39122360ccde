"""Reference selection, and the whole pipeline from q, k, v to the sparse output.

Responsible for turning chunk scores into lists of keys and for stringing the steps together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dhsa.reference._attention import selection_mask, sparse_attention, visible
from dhsa.reference._boundaries import boundaries as cut
from dhsa.reference._scores import boundary_rows, candidates, chunk_scores


class Selection(NamedTuple):
    """Which keys each block of queries sees: CSR over (batch, head set, query block), in that order.

    Row ``(b, s, i)`` is ``indices[indptr[r]:indptr[r + 1]]`` with ``r = (b * S + s) * nq + i``, ascending and unique.
    S is 1 (one list for all heads), Hkv (one a KV group) or H (one a head).
    """

    indptr: np.ndarray  # int64 [B * S * nq + 1]
    indices: np.ndarray  # int32
    shape: tuple[int, int, int]  # (B, S, nq)
    query_block: int
    q_len: int
    k_len: int
    boundaries: np.ndarray | None = None  # int32 [B, C + 1]

    def row(self, b: int, s: int, i: int) -> np.ndarray:
        """The keys of query block i, for head set s of batch b."""
        r = (b * self.shape[1] + s) * self.shape[2] + i
        return self.indices[self.indptr[r] : self.indptr[r + 1]]


def density(selection: Selection, *, window: int | None = None) -> float:
    """Share of the (query, key) pairs visible under causality and window that the selection attends to."""
    seen = visible(selection.q_len, selection.k_len, window=window)
    kept = selection_mask(selection, selection.q_len, selection.k_len) & seen
    return float(kept.sum() / (seen.sum() * kept.shape[0] * kept.shape[1]))


def select_from_scores(
    scores,
    boundaries,
    *,
    q_len: int,
    k_len: int,
    query_block: int,
    budget: int | None,
    sink: int = 0,
    local: int = 0,
    dense_tail: int = 0,
    window: int | None = None,
    score: str = "rows",
) -> Selection:
    """The keys each block sees, from chunk scores [B, S, nq, C] of its chunks.

    Block i holds the positions ``[start, start + query_block)``, start = Lk - Lq + i * query_block, and its candidates
    end at ``end = min(start + query_block, Lk)``. Without a window they begin at 0, with one at ``start - window + 1``
    for score "rows" (the union of its queries' windows) and at ``min(start + query_block - window, start)`` for
    "block" (upstream's rule).

    A block is exact, and sees the union of its queries' windows, if ``end <= budget``, if the window is no wider than
    the budget, or if it holds one of the last ``dense_tail`` queries; budget None makes all blocks exact. Any other
    block sees ``min(budget, candidates)`` keys: the candidates among the first ``sink`` keys of the sequence, the last
    ``local`` candidates, and for the rest those of the highest score, every key having its chunk's; of equal scores
    the more recent key, so that a chunk that only partly fits gives its most recent keys.
    Raises ValueError where sink + local exceed the budget.
    """
    scores = np.asarray(scores).astype(np.float64)
    batch, sets, blocks, chunks = scores.shape
    edges = boundary_rows(boundaries, batch, k_len)
    if blocks != -(-q_len // query_block) or edges.shape[1] != chunks + 1:
        raise ValueError(f"scores: shape {scores.shape} does not fit {q_len} queries and {edges.shape[1] - 1} chunks")
    if budget is not None and (budget < 1 or sink + local > budget):
        raise ValueError(f"budget: {budget} keys are less than one or than sink {sink} + local {local}")
    lists: list[np.ndarray] = []
    for b in range(batch):
        chunk_of = np.searchsorted(edges[b], np.arange(k_len), side="right") - 1
        for s in range(sets):
            for i in range(blocks):
                lo, end = candidates(i, q_len, k_len, query_block, window, score)
                in_tail = min((i + 1) * query_block, q_len) > q_len - dense_tail
                if budget is None or in_tail or end <= budget or (window is not None and window <= budget):
                    lo, end = candidates(i, q_len, k_len, query_block, window, "rows")
                    lists.append(np.arange(lo, end))
                    continue
                keys = np.arange(lo, end)
                forced = (keys < sink) | (keys >= end - local)
                free = keys[~forced]
                best = free[np.lexsort((-free, -scores[b, s, i, chunk_of[free]]))]
                lists.append(np.sort(np.concatenate([keys[forced], best[: budget - forced.sum()]])))
    indptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    return Selection(
        indptr,
        np.concatenate(lists).astype(np.int32),
        (batch, sets, blocks),
        query_block,
        q_len,
        k_len,
        edges.astype(np.int32),
    )


def select(
    q,
    k,
    boundaries,
    *,
    query_block: int = 128,
    budget: int | None = 2048,
    sink: int = 128,
    local: int = 256,
    dense_tail: int = 64,
    heads: str = "group",
    score: str = "rows",
    pooling: str = "mean",
    rows: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Selection:
    """``chunk_scores`` and then ``select_from_scores``; the defaults are those of ``dhsa.Config``."""
    q, k = np.asarray(q), np.asarray(k)
    scores = chunk_scores(
        q,
        k,
        boundaries,
        query_block=query_block,
        score=score,
        pooling=pooling,
        heads=heads,
        # The scale of a block score does not change the order; the pipeline leaves it out.
        scale=None if score == "block" else scale,
        softcap=softcap,
        window=window,
        rows=rows,
    )
    return select_from_scores(
        scores,
        boundaries,
        q_len=q.shape[2],
        k_len=k.shape[2],
        query_block=query_block,
        budget=budget,
        sink=sink,
        local=local,
        dense_tail=dense_tail,
        window=window,
        score=score,
    )


class Prefill(NamedTuple):
    """What ``prefill`` returns: the attention, its log-sum-exp, and how it came about."""

    out: np.ndarray  # float64 [B, H, Lq, D]
    lse: np.ndarray  # float64 [B, H, Lq]
    path: str  # "dense", "window" or "sparse"
    density: float
    selection: Selection | None  # None where the path is exact


def prefill(
    q,
    k,
    v,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    boundaries=None,
    boundary_options: Mapping[str, Any] | None = None,
    query_block: int = 128,
    budget: int | None = 2048,
    **select_options: Any,
) -> Prefill:
    """boundaries -> chunk scores -> selection -> attention, causal.

    ``boundaries`` int [B, C + 1] or None: cut by ``reference.boundaries(k, query_block=..., **boundary_options)``.
    ``select_options`` are those of ``select``. Where the selection leaves out no visible key the path is exact:
    "window" if a window cuts anything, else "dense".
    """
    if boundaries is None:
        boundaries = cut(k, query_block=query_block, **(boundary_options or {}))
    selection = select(
        q,
        k,
        boundaries,
        query_block=query_block,
        budget=budget,
        scale=scale,
        softcap=softcap,
        window=window,
        **select_options,
    )
    out, lse = sparse_attention(q, k, v, selection, scale=scale, softcap=softcap, window=window, return_lse=True)
    share = density(selection, window=window)
    if share < 1.0:
        return Prefill(out, lse, "sparse", share, selection)
    return Prefill(out, lse, "dense" if window is None or window >= np.shape(k)[2] else "window", 1.0, None)
