"""Reference chunk scores: how relevant each chunk of keys is for each block of queries.

Responsible for candidates, chunk means and both scores; the top-k is in selection.py.
"""

from __future__ import annotations

import itertools

import numpy as np

from dhsa._twin.attention import check


def boundary_rows(boundaries, batch: int, k_len: int) -> np.ndarray:
    """Boundaries [C + 1] or [B, C + 1], checked, as int64 [B, C + 1]."""
    rows = np.atleast_2d(np.asarray(boundaries)).astype(np.int64)
    rows = np.broadcast_to(rows, (batch, rows.shape[1]))
    if rows.shape[1] < 2 or (rows[:, 0] != 0).any() or (rows[:, -1] != k_len).any() or (np.diff(rows) < 0).any():
        raise ValueError(f"boundaries: expected rows ascending from 0 to {k_len}")
    return rows


def chunk_means(k, boundaries) -> np.ndarray:
    """Mean key of each chunk: k [B, Hkv, L, D], boundaries [B, C + 1] or [C + 1] -> float64 [B, Hkv, C, D].

    An empty chunk (the padding of a boundary row) gives zeros.
    """
    k = np.asarray(k).astype(np.float64)
    rows = boundary_rows(boundaries, k.shape[0], k.shape[2])
    means = np.zeros((k.shape[0], k.shape[1], rows.shape[1] - 1, k.shape[3]))
    for b, row in enumerate(rows):
        for c in range(len(row) - 1):
            if row[c + 1] > row[c]:
                means[b, :, c] = k[b, :, row[c] : row[c + 1]].mean(axis=1)
    return means


def chunk_spreads(k, edges) -> np.ndarray:
    """The mean squared distance of the keys of each chunk to their mean, divided by D: k [Hkv, L, D] -> [Hkv, C]."""
    spreads = np.zeros((len(k), len(edges) - 1))
    for c, (a, b) in enumerate(itertools.pairwise(edges)):
        if b > a:
            spreads[:, c] = k[:, a:b].var(axis=1).mean(axis=-1)
    return np.where(np.isfinite(spreads), spreads, 0.0)


def candidates(
    i: int, q_len: int, k_len: int, query_block: int, window: int | None, score: str, causal: bool = True
) -> tuple[int, int]:
    """Candidate keys [lo, end) of query block i.

    Not causal: all keys, or the union of the queries' windows. Causal: ``end`` is the block's nominal end, capped by
    Lk. The lower edge in a window layer: under "rows" the union of the queries' windows; under "block" upstream's rule,
    the nominal end (not capped) minus the window, but never above the block's own start, so that windows narrower than
    a block leave no query without itself.
    """
    start = k_len - q_len + i * query_block
    end = min(start + query_block, k_len)
    if not causal:
        return (0, k_len) if window is None else (max(0, start - window + 1), min(end - 1 + window, k_len))
    if window is None:
        return 0, end
    if score == "rows":
        return max(0, start - window + 1), end
    return max(0, min(start + query_block - window, start)), end


def head_sets(heads: str, q_heads: int, kv_heads: int) -> list[range]:
    """The query heads that share one selection."""
    sizes = {"all": q_heads, "group": q_heads // kv_heads, "head": 1}
    if heads not in sizes:
        raise ValueError(f"heads: expected 'group', 'all' or 'head', got {heads!r}")
    return [range(h, h + sizes[heads]) for h in range(0, q_heads, sizes[heads])]


def block_scores(q, means, lengths, pooling, members, group):
    """The paper's score of the candidate chunks, and which of these have a finite mean.

    q [H, n, D], the block's queries; means [Hkv, C, D] and lengths [C], candidate chunks only -> float64 [C], bool [C].
    Heads of a set are averaged on both sides before the product, as upstream does.
    """
    row = q[list(members)].mean(axis=1)
    keys = means[[h // group for h in members]]
    if pooling == "mean_sqrt":
        row = row * np.sqrt(q.shape[1])
        keys = keys * np.sqrt(lengths)[None, :, None]
    finite = np.isfinite(keys).all(axis=(0, 2))
    keys = np.where(finite[None, :, None], keys, 0.0)
    products = keys.mean(axis=0) @ row.mean(axis=0)
    return products if np.isfinite(products).all() else np.zeros_like(products), finite


def quantized(x) -> tuple[np.ndarray, np.ndarray]:
    """Vectors x [..., D] as whole numbers up to 127, rounded half to even, and their factors [...]; float64.

    Computed in float32, as the core does. Vectors so small that 127 divided by them overflows give zeros, and those
    that are not finite NaN.
    """
    x = np.asarray(x, np.float32)
    most = np.abs(x).max(axis=-1, keepdims=True, initial=0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        factor = np.float32(127) / most
        usable = np.isfinite(factor)
        whole = np.where(usable, np.rint(x * factor), np.where(np.isfinite(most), 0, np.nan))
    scale = np.where(usable, most / np.float32(127), 0)[..., 0]
    return whole.astype(np.float64), scale.astype(np.float64)


def power(x) -> np.ndarray:
    """A power of two that is linear between whole exponents: 2**floor(x) * (1 + x - floor(x)); 0 for x <= -127 and for
    NaN, and at most 2**63."""
    x = np.clip(np.where(np.isnan(x), -np.inf, x), -127, 63)
    whole = np.floor(x)
    return np.where(x == -127, 0.0, np.ldexp(1 + x - whole, whole.astype(int)))


def row_scores(q, means, rows, query_block, scale, softcap, members, group, quantize, lengths, logs=None, spreads=None):
    """Sums of squared row probabilities over the candidate chunks, of the probabilities themselves, which chunks have a
    finite mean, and the logarithms to base 2 of the rows' denominators.

    q [H, n, D], the block's queries; means [Hkv, C, D], candidate chunks only -> float64 [C], float64 [C], bool [C],
    dict from (head, first query) to float. A chunk counts as often in a row's denominator as it has keys, lengths [C],
    and what is squared is the probability of one of them. logs: the denominators of an earlier stage, to be used.
    spreads [Hkv, C]: of the keys of chunks. If products with these were normally distributed, their squared
    probabilities would be larger than that of the mean by exp(2 variance); half of that exponent is added.
    """
    finite = np.isfinite(means[sorted({h // group for h in members})]).all(axis=(0, 2))
    step = -(-query_block // rows)
    squares, sums, found = np.zeros(means.shape[1]), np.zeros(means.shape[1]), {}
    for h in members:
        finite_here = np.isfinite(means[h // group]).all(axis=1)
        keys, weights = means[h // group][finite_here], lengths[finite_here]
        key_scale = np.ones(len(keys))
        if quantize:
            keys, key_scale = quantized(keys)
        for u in range(0, q.shape[1], step):
            row, row_scale, extra = q[h, u : u + step].mean(axis=0), np.ones(()), np.zeros(())
            if spreads is not None:
                extra = np.log2(np.e) * scale**2 * (row @ row) * spreads[h // group][finite_here]
            if quantize:
                row, row_scale = quantized(row)
            s = scale * row_scale * key_scale * (keys @ row)
            if softcap is not None:
                s = softcap * np.tanh(s / softcap)
            s = s * np.log2(np.e)
            if logs is not None:
                log = logs[h, u]
            elif not s.size or not np.isfinite(row).all() or not np.isfinite(s.max()):
                log = np.inf
            else:
                most = np.floor(s.max())  # a whole number, so that the choice of the reference does not matter
                log = most + np.log2((weights * power(s - most)).sum())
            found[h, u] = log
            if log == np.inf:
                continue
            squares[finite_here] += power(2 * (s - log) + extra)
            sums[finite_here] += weights * power(s - log)
    return squares, sums, finite, found


def chunk_scores(
    q,
    k,
    boundaries,
    *,
    query_block: int,
    score: str = "block",
    pooling: str = "mean_sqrt",
    heads: str = "all",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    rows: int | None = None,
    quantize: bool = False,
    causal: bool = True,
) -> np.ndarray:
    """The score of each chunk for each block of queries: float64 [B, S, nq, C], nq = ceil(Lq / query_block).

    boundaries int [B, C + 1] or [C + 1]; S is 1, Hkv or H for ``heads`` "all", "group", "head".

    score "block" (the paper): ``scale * mean_h(rq_h) . mean_h(rk_h)`` over the heads h of the set, with rq the mean
    query of the block and rk the mean key of the whole chunk; pooling "mean_sqrt" multiplies them by the square root
    of the number of queries and of keys. scale None means 1; a softcap caps the products.

    score "rows" (ours): the block's queries are averaged in groups of ``ceil(query_block / rows)`` neighbours (the
    last group of a short block may be smaller), each such row and head takes a softmax of
    ``cap(scale * row . meankey)`` over the chunks with a candidate key, and a chunk's score is the sum of the squared
    probabilities over rows and heads of the set. In place of exponentials there are powers of two that are linear
    between whole exponents, see ``power``. A chunk straddling the block's end is cut there. rows None means
    half of ``query_block``, rounded up, scale None ``D ** -0.5``. pooling does not apply. A chunk counts as often in
    the softmax as it has keys, and its score is made of the probability of one of them. quantize: the mean rows and
    mean keys are quantized before the product, see ``quantized``, which is what the core does for selection.

    A chunk without a candidate key (see ``select_from_scores``; window given or not) scores -inf. With causal=False,
    which is for "rows" only, keys after the block are candidates too. A chunk whose mean
    key is not finite scores +inf, so that it is picked and the NaN reaches the rows that see it, and is left out of
    every softmax of its KV head; a row with a NaN or +inf product adds nothing.
    """
    q, k = np.asarray(q).astype(np.float64), np.asarray(k).astype(np.float64)
    check(q, k)
    if score not in ("rows", "block"):
        raise ValueError(f"score: expected 'rows' or 'block', got {score!r}")
    if pooling not in ("mean", "mean_sqrt"):
        raise ValueError(f"pooling: expected 'mean' or 'mean_sqrt', got {pooling!r}")
    if score == "block" and not causal:
        raise NotImplementedError("causal: the block score is for causal attention only")
    batch, q_heads, q_len, dim = q.shape
    k_len, group = k.shape[2], q_heads // k.shape[1]
    edges = boundary_rows(boundaries, batch, k_len)
    sets = head_sets(heads, q_heads, k.shape[1])
    rows = (query_block + 1) // 2 if rows is None else rows
    scale = (1.0 if score == "block" else dim**-0.5) if scale is None else scale
    blocks = -(-q_len // query_block)
    scores = np.full((batch, len(sets), blocks, edges.shape[1] - 1), -np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        whole = chunk_means(k, edges)
        for b in range(batch):
            for i in range(blocks):
                lo, end = candidates(i, q_len, k_len, query_block, window, score, causal)
                live = np.maximum(edges[b, :-1], lo) < np.minimum(edges[b, 1:], end)
                queries = q[b, :, i * query_block : (i + 1) * query_block]
                means, lengths = whole[b].copy(), np.diff(edges[b])
                straddles = np.flatnonzero((edges[b, :-1] < end) & (edges[b, 1:] > end))
                if score == "rows" and straddles.size:
                    c = straddles[0]
                    means[:, c] = k[b, :, edges[b, c] : end].mean(axis=1)
                    lengths[c] = end - edges[b, c]
                for s, members in enumerate(sets):
                    if score == "block":
                        value, finite = block_scores(queries, means[:, live], lengths[live], pooling, members, group)
                        value = scale * value
                        if softcap is not None:
                            value = softcap * np.tanh(value / softcap)
                    else:
                        value, _, finite, _ = row_scores(
                            queries, means[:, live], rows, query_block, scale, softcap, members, group, quantize,
                            lengths[live],
                        )  # fmt: skip
                    scores[b, s, i, live] = np.where(finite, value, np.inf)
    return scores
