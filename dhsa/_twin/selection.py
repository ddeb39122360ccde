"""Reference selection, and the whole pipeline from q, k, v to the sparse output.

Responsible for making lists of keys from chunk scores, and for the order of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from dhsa._twin.attention import selection_mask, sparse_attention, visible
from dhsa._twin.boundaries import boundaries as cut
from dhsa._twin.scores import boundary_rows, candidates, chunk_scores


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
    causal: bool = True

    def row(self, b: int, s: int, i: int) -> np.ndarray:
        """The keys of query block i, for head set s of batch b."""
        r = (b * self.shape[1] + s) * self.shape[2] + i
        return self.indices[self.indptr[r] : self.indptr[r + 1]]


def density(selection: Selection, *, window: int | None = None) -> float:
    """Share of the (query, key) pairs visible under the selection's causality and window that it attends to."""
    seen = visible(selection.q_len, selection.k_len, window=window, causal=selection.causal)
    kept = selection_mask(selection, selection.q_len, selection.k_len) & seen
    return float(kept.sum() / (seen.sum() * kept.shape[0] * kept.shape[1]))


class Segments(NamedTuple):
    """What a method scores: runs of keys. Unit c holds keys ``edges[c] .. edges[c + 1] - 1``."""

    edges: np.ndarray  # int [C + 1], never falling
    score: np.ndarray  # [C]: the highest come first; +inf: always selected, as far as the budget allows
    mass: np.ndarray | None = None  # [C]: estimated attention mass on any scale; 0 where the score is +inf


def local_span(lo: int, end: int, local: int, middle: int | None) -> tuple[int, int]:
    """The local keys [from, to) of a block with candidates [lo, end): the last ones, or with ``middle`` (bidirectional
    attention) those around this key, as far as the candidates reach."""
    local = min(local, end - lo)
    first = end - local if middle is None else min(max(middle - local // 2, lo), end - local)
    return first, first + local


def middle_of(i: int, q_len: int, k_len: int, query_block: int) -> int:
    """The key at the middle of query block i."""
    start = k_len - q_len + i * query_block
    return (start + min(start + query_block, k_len)) // 2


def topk(
    segments: Segments,
    lo: int,
    end: int,
    *,
    budget: int,
    sink: int = 0,
    local: int = 0,
    mass: float | None = None,
    floor: int | None = None,
    middle: int | None = None,
) -> np.ndarray:
    """The list of a block with candidates [lo, end): ascending keys.

    The candidates among the first ``sink`` keys of the sequence, the ``local`` keys of ``local_span``, and for the rest
    of the budget those of the highest score, every key having its segment's; of equal scores the more recent key, so
    that a segment that only partly fits gives its most recent keys.

    With ``mass``, segments are taken whole in that order only until all keys taken, the forced ones first, hold this
    share of the candidates' mass, each key having an equal share of its segment's; segments that score +inf are
    always taken. No fewer keys than ``floor`` (None: sink + local), no more than the budget. A mass of 1, or candidates
    without any, fill the budget.
    """
    keys = np.arange(lo, end)
    near, far = local_span(lo, end, local, middle)
    forced = (keys < sink) | ((keys >= near) & (keys < far))
    free = keys[~forced][::-1]
    segment = np.searchsorted(segments.edges, np.arange(end), side="right") - 1
    free = free[np.argsort(-segments.score[segment[free]], kind="stable")]  # best first, a segment's keys together
    size = min(budget, len(keys))
    if mass is not None:
        if segments.mass is None:
            raise ValueError("mass: these segments have no mass")
        of_key = np.zeros(end)
        of_key[lo:] = (segments.mass / np.maximum(np.bincount(segment[lo:], minlength=len(segments.mass)), 1))[
            segment[lo:]
        ]
        total, wanted = of_key.sum(), int(forced.sum())
        of_free = segment[free]
        begins = np.flatnonzero(np.diff(of_free, prepend=-1))  # of the segments in this order
        if len(begins):
            held = np.cumsum(np.append(of_key[keys[forced]].sum(), np.add.reduceat(of_key[free], begins)))[:-1]
            done = (held >= mass * total) & (segments.score[of_free[begins]] != np.inf)
            wanted += int(begins[np.argmax(done)]) if done.any() else len(free)
        if mass < 1 and total > 0:
            size = min(size, max(wanted, sink + local if floor is None else floor))
    return np.sort(np.concatenate([keys[forced], free[: size - forced.sum()]]))


def is_exact(
    i: int,
    q_len: int,
    k_len: int,
    query_block: int,
    least: int | None,
    dense_tail: int,
    window: int | None,
    causal: bool = True,
) -> bool:
    """Whether query block i sees all visible keys: its candidates end within ``least`` keys (None: all of them do), the
    window is no wider than that, or it holds one of the last ``dense_tail`` queries. Not causal: it has no more
    candidates than ``least``, or both sides of a window together are no wider."""
    lo, end = candidates(i, q_len, k_len, query_block, window, "rows", causal)
    if not causal:
        return least is None or end - lo <= least or (window is not None and 2 * window - 1 <= least)
    in_tail = min((i + 1) * query_block, q_len) > q_len - dense_tail
    return least is None or in_tail or end <= least or (window is not None and window <= least)


def selection_of(lists, shape, query_block: int, q_len: int, k_len: int, edges=None, causal: bool = True) -> Selection:
    """A Selection from its lists in CSR order."""
    indptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
    edges = None if edges is None else edges.astype(np.int32)
    return Selection(indptr, np.concatenate(lists).astype(np.int32), shape, query_block, q_len, k_len, edges, causal)


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
    causal: bool = True,
) -> Selection:
    """The keys each block sees, from chunk scores [B, S, nq, C] of its chunks.

    Block i holds the positions ``[start, start + query_block)``, start = Lk - Lq + i * query_block, and its candidates
    end at ``end = min(start + query_block, Lk)``. Without a window they begin at 0, with one at ``start - window + 1``
    for score "rows" (the union of its queries' windows) and at ``min(start + query_block - window, start)`` for
    "block" (upstream's rule).

    A block is exact, and sees the union of its queries' windows, if ``end <= budget``, if the window is no wider than
    the budget, or if it holds one of the last ``dense_tail`` queries; budget None makes all blocks exact. Any other
    block sees ``min(budget, candidates)`` keys, which ``topk`` picks.

    With causal=False a block's candidates are all keys, or the union of its queries' two-sided windows; ``dense_tail``
    does not apply. See ``is_exact`` and ``local_span``.
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
        for s in range(sets):
            for i in range(blocks):
                if budget is None or is_exact(i, q_len, k_len, query_block, budget, dense_tail, window, causal):
                    lists.append(np.arange(*candidates(i, q_len, k_len, query_block, window, "rows", causal)))
                else:
                    lo, end = candidates(i, q_len, k_len, query_block, window, score, causal)
                    segments = Segments(edges[b], scores[b, s, i])
                    middle = None if causal else middle_of(i, q_len, k_len, query_block)
                    lists.append(topk(segments, lo, end, budget=budget, sink=sink, local=local, middle=middle))
    return selection_of(lists, (batch, sets, blocks), query_block, q_len, k_len, edges, causal)


def select(
    q,
    k,
    boundaries,
    *,
    query_block: int = 64,
    budget: int | None = 1024,
    sink: int = 16,
    local: int = 128,
    dense_tail: int = 64,
    heads: str | None = None,
    score: str = "rows",
    pooling: str = "mean",
    rows: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
) -> Selection:
    """``chunk_scores`` and then ``select_from_scores``; the defaults are those of ``dhsa.Config``, but every chunk is
    scored: for the shortlist of longer prompts see ``method_lists``. heads None: "head" for "rows", else "group"."""
    q, k = np.asarray(q), np.asarray(k)
    if heads is None:
        heads = "head" if score == "rows" else "group"
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
        quantize=score == "rows",
        causal=causal,
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
        causal=causal,
    )


class Prefill(NamedTuple):
    """What ``prefill`` returns: the attention, its log-sum-exp, and how it came about."""

    out: np.ndarray  # float64 [B, H, Lq, E]
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
    sinks=None,
    boundaries=None,
    boundary_options: Mapping[str, Any] | None = None,
    query_block: int = 64,
    budget: int | None = 1024,
    **select_options: Any,
) -> Prefill:
    """boundaries -> chunk scores -> selection -> attention, causal unless causal=False is among the options.

    ``boundaries`` int [B, C + 1] or None: cut by ``reference.boundaries(k, query_block=..., **boundary_options)``. For
    row scores that is every 2 keys if there are no options, else with n = L // 4, but at most 8192 or L // 8, and nms
    2.
    ``select_options`` are those of ``select``. Where the selection leaves out no visible key the path is exact:
    "window" if a window cuts anything, else "dense".
    """
    if boundaries is None:
        rows = select_options.get("score", "rows") == "rows"
        length = np.shape(k)[2]
        fine = {"num_chunks": max(length // 8, min(length // 4, 8192)), "nms": 2} if rows else {}
        pairs = {"kind": "fixed", "chunk_size": 2} if rows else {}
        boundaries = cut(k, query_block=query_block, **(fine | dict(boundary_options or pairs)))
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
    out, lse = sparse_attention(
        q, k, v, selection, scale=scale, softcap=softcap, window=window, sinks=sinks, return_lse=True
    )
    share = density(selection, window=window)
    if share < 1.0:
        return Prefill(out, lse, "sparse", share, selection)
    return Prefill(out, lse, "dense" if window is None or window >= np.shape(k)[2] else "window", 1.0, None)
