"""Reference methods of other papers that look at real logits: what each makes of one block of queries.

Responsible for vertical_slash, xattention, proxy, hisa and oracle, which are entries of _methods.METHODS; sources are
named with each. A Block (see there) goes in, Units or the list itself come out.

Two rules for all of them. A row of logits says nothing (its probabilities are zeros) where one of those it sees is NaN
or +inf, where all are -inf, or where it sees none. And keys with a NaN or inf are taken in any case, so that they reach
the rows that see them, as in exact attention: their units score +inf and hold no mass.
"""

from __future__ import annotations

import itertools

import numpy as np

from dhsa._twin.selection import Units

PROBE_QUERIES = 64  # vertical_slash: queries at the prompt's end that are looked at
PROXY_RUN = 16  # proxy: queries of a mean row of a head's own estimate
HISA_KEPT = 4  # hisa: keys of the blocks that are looked into, in budgets


def logits(rows, keys, options, factor=1.0):
    """cap(scale * rows . keys), rows [n, D] and keys [m, D]."""
    s = options["scale"] * factor * (rows @ keys.T)
    return s if options["softcap"] is None else options["softcap"] * np.tanh(s / options["softcap"])


def probabilities(s, seen=True):
    """Softmax of each row of s over the keys it sees, zeros elsewhere and in rows that say nothing."""
    seen = np.broadcast_to(seen, s.shape)
    top = np.where(seen, s, -np.inf).max(axis=1, initial=-np.inf, keepdims=True)
    valid = np.isfinite(top)
    p = np.where(seen & valid, np.exp(s - np.where(valid, top, 0.0)), 0.0)
    return p / np.where(valid, p.sum(axis=1, keepdims=True), 1.0)


def sees(queries, keys, window):
    """bool [n, m]: whether any query of run n sees any key of run m, runs given as (first, last) positions."""
    first, last = (x[:, None] for x in queries)
    seen = keys[0] <= last
    return seen if window is None else seen & (keys[1] > first - window)


def is_bad(block):
    """bool [end]: keys with a NaN or inf in any KV head of the set."""
    return ~np.isfinite(block.k[:, : block.end]).all(axis=(0, 2))


def units_of(edges, bad, score, mass):
    """Units of which those that are bad are taken in any case."""
    return Units(edges, np.where(bad, np.inf, score), np.where(bad, 0.0, mass))


def block_edges(block):
    """Edges of the blocks of keys up to the end of the query block's candidates."""
    return np.append(np.arange(0, block.end, block.options["key_block"]), block.end)


def mean_rows(block, h, run):
    """Means of runs of the block's neighbouring queries."""
    runs = range(block.begin, block.stop, run)
    return np.array([block.q[h, u : min(u + run, block.stop)].mean(axis=0) for u in runs])


def coarse(block, run):
    """[blocks of keys]: probabilities of mean rows over the mean keys of those with a candidate, summed over rows and
    heads. A block of keys that straddles the end is cut there; a mean with an inf counts as NaN."""
    edges = block_edges(block)
    total = np.zeros(len(edges) - 1)
    for h in range(len(block.q)):
        means = np.array([block.keys_of(h)[a:b].mean(axis=0) for a, b in itertools.pairwise(edges)])
        means[~np.isfinite(means).all(axis=1)] = np.nan
        p = probabilities(logits(mean_rows(block, h, run), means, block.options), edges[1:] > block.lo)
        total += p.sum(axis=0)
    return total


def columns_and_diagonals(block):
    """Columns [Lk] and diagonals [Lk] of the probabilities of the prompt's last 64 queries, summed over them and the
    heads. Diagonal d holds the pairs of a query and the key d before it."""
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


def vertical_slash(block):
    """Columns and diagonals that the prompt's last queries attend to, for all blocks alike. Source: MInference,
    arXiv 2407.02490; DHSA's second version calls it vs.

    Of what the forced keys leave, half (rounded up) goes to diagonals, best first, of equal ones the smaller d: each
    covers the keys d before the block's queries, and their union counts, the last of them giving its most recent keys.
    Columns fill the rest, best first, of equal ones the more recent; those that a diagonal has covered cost nothing.
    """
    columns, diagonals = columns_and_diagonals(block)
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


def xattention(block):
    """Blocks of keys by the sums of strided antidiagonals. Source: XAttention, arXiv 2503.16428.

    Queries (from the block's first on) and keys (from key 0 on) are cut into groups of ``stride``; what does not fill a
    group, or lies at or above the block's end, counts as zeros. For two groups the products of query ``stride - 1 - t``
    and key ``t`` are added, divided by ``stride`` (as in the source) and scaled: a logit. Each group of queries takes a
    softmax over the groups of keys of which any is visible to any of its queries; the probabilities are summed over
    them and the heads, and over the groups of a block of keys. The sums are also the mass.
    """
    stride, dim = block.options["stride"], block.q.shape[2]
    runs, groups = -(-(block.stop - block.begin) // stride), -(-block.end // stride)
    first, at = block.start + np.arange(runs) * stride, np.arange(groups) * stride
    last, key_last = (np.minimum(x + stride, block.end) - 1 for x in (first, at))
    seen = sees((first, last), (at, key_last), block.options["window"])
    total = np.zeros(groups)
    for h in range(len(block.q)):
        rows, keys = np.zeros((runs * stride, dim)), np.zeros((groups * stride, dim))
        rows[: block.stop - block.begin] = block.queries[h]
        keys[: block.end] = block.keys_of(h)[: block.end]
        rows = rows.reshape(runs, stride, dim)[:, ::-1].reshape(runs, -1)
        total += probabilities(logits(rows, keys.reshape(groups, -1), block.options, 1 / stride), seen).sum(axis=0)
    edges = block_edges(block)
    score = np.add.reduceat(total, edges[:-1] // stride)
    return units_of(edges, np.logical_or.reduceat(is_bad(block), edges[:-1]), score, score)


def proxy(block):
    """Blocks of keys by the scores of a proxy head. Source: ProxyAttn, arXiv 2509.24745.

    The proxy of a list is the mean of its heads' queries and of their keys; where each head has a list of its own, that
    of the whole KV group, for heads differ in how many keys they need more than in which. Every ``stride``-th query of
    the block, from its first on, and every ``stride``-th key, from key 0 on, take part: a softmax over those visible,
    and the largest probability of any such pair is the score of a block of keys.

    How much a head needs is its own affair. Our reading, one estimate a block and head: its mass is what the head's own
    mean rows of 16 queries give to the mean key of each block (``coarse``), so that a list goes down the proxy's order
    until it holds the share asked for of that.
    """
    stride = block.options["stride"]
    rows = block.group_q[:, block.begin : block.stop : stride].mean(axis=0)
    keys = block.k[:, : block.end : stride].mean(axis=0)
    at = np.arange(block.start, block.start + block.stop - block.begin, stride)
    key_at = np.arange(0, block.end, stride)
    p = probabilities(logits(rows, keys, block.options), sees((at, at), (key_at, key_at), block.options["window"]))
    edges = block_edges(block)
    bad = np.logical_or.reduceat(is_bad(block), edges[:-1])
    return units_of(edges, bad, np.maximum.reduceat(p.max(axis=0), edges[:-1] // stride), coarse(block, PROXY_RUN))


def hisa(block):
    """Single keys, but only those of the best blocks. Source: HISA, arXiv 2603.28458.

    There a trained indexer scores blocks by their mean key, then the tokens of the blocks that are kept. A frozen model
    has no indexer: mean rows of the block's queries (as many as row scores have) stand in for it, each with a softmax,
    summed over rows and heads: first over the mean keys of the blocks with a candidate, then over the candidates in the
    kept blocks. Kept are the blocks with a forced key (in the source the first and the last) and the best of the
    others, of equal ones the later, until they hold ``4 * budget`` candidates (all blocks without a budget). The second
    sums are also the mass.
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
    return units_of(np.arange(block.end + 1), bad & inside, np.where(inside, score, -np.inf), score)


def oracle(block):
    """Single keys by their exact attention mass: dense probabilities, summed over the block's queries and the heads."""
    at, keys = block.start + np.arange(block.stop - block.begin), np.arange(block.end)
    seen = sees((at, at), (keys, keys), block.options["window"])
    score = np.zeros(block.end)
    for h in range(len(block.q)):
        score += probabilities(logits(block.queries[h], block.keys_of(h)[: block.end], block.options), seen).sum(axis=0)
    return units_of(np.arange(block.end + 1), is_bad(block), score, score)
