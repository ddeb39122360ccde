"""Reference for leaving out negligible tiles of keys (BLASST, arXiv 2512.12087), in float64.

The softmax processes the keys tile by tile and stores the largest logit of each row so far. If in a tile all visible
logits of all rows of a panel are below that by more than -ln(skip), the panel leaves the tile out: each of those
probabilities is less than ``skip`` times the row's largest. The executor determines how rows and keys are grouped; here
this is an argument.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dhsa._twin.attention import check, logits, selection_mask, visible


class Grouping(NamedTuple):
    """How an executor groups its work: ``keys`` of a tile, ``rows`` of a panel, ``queries`` of an item.

    An item is a run of queries of one block and all heads that share its list (one KV group, or one head where every
    head has a list of its own), row by row: the queries of the first head, those of the second, and so on. ``rows``
    neighbours of these form a panel. Tiles count entries of the list from the first that any row of the item sees.
    """

    keys: int
    rows: int
    queries: int


def skip_mask(
    q,
    k,
    skip: float,
    grouping: Grouping,
    *,
    selection=None,
    scale=None,
    softcap=None,
    window=None,
    causal=True,
    sinks=None,
) -> tuple[np.ndarray, float]:
    """bool [B, H, Lq, Lk]: the keys that each query still attends to (`masked_attention` does), and the share of the
    products of a panel and a tile that are left out. Arguments as in `attention` and `sparse_attention`; a sink counts
    as a logit that each row of its head has met before all keys."""
    q, k = (np.asarray(x).astype(np.float64) for x in (q, k))
    check(q, k)
    batch, heads, q_len, dim = q.shape
    sinks = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks).astype(np.float64)
    kv_heads, k_len = k.shape[1:3]
    scale = dim**-0.5 if scale is None else float(scale)
    block = q_len if selection is None else selection.query_block
    sets = 1 if selection is None else selection.shape[1]
    shared = 1 if sets == heads != kv_heads and sets > 1 else heads // kv_heads
    mask = np.broadcast_to(visible(q_len, k_len, window=window, causal=causal), (batch, heads, q_len, k_len)).copy()
    if selection is not None:
        mask &= selection_mask(selection, q_len, k_len)[:, np.arange(heads) * sets // heads]
    products = left = 0
    for b in range(batch):
        for h in range(0, heads, shared):
            s = np.stack([logits(q[b, i], k[b, i * kv_heads // heads], scale, softcap) for i in range(h, h + shared)])
            for first in range(0, q_len, block):
                row = (b * sets + h * sets // heads) * -(-q_len // block) + first // block
                keys = np.arange(k_len)
                if selection is not None:
                    keys = selection.indices[selection.indptr[row] : selection.indptr[row + 1]]
                for start in range(first, min(first + block, q_len), grouping.queries):
                    item = (slice(h, h + shared), slice(start, min(start + grouping.queries, first + block, q_len)))
                    sees = mask[b][item].reshape(-1, k_len)  # a copy if there are several heads
                    met = np.repeat(sinks[h : h + shared], len(sees) // shared)
                    counts = _leave_out(s[:, item[1]].reshape(-1, k_len), sees, keys, skip, grouping, met)
                    mask[b][item] = sees.reshape(mask[b][item].shape)
                    products, left = products + counts[0], left + counts[1]
    return mask, left / max(products, 1)


def _leave_out(s, sees, keys, skip, grouping, met) -> tuple[int, int]:
    """Clears in ``sees`` what one item leaves out. s, sees: [rows, Lk]; met [rows]: the largest logits so far. Returns
    the products it has, and those left out."""
    seen = np.flatnonzero(sees[:, keys].any(axis=0))
    keys = keys[seen[0] :] if len(seen) else keys[:0]
    products = left = 0
    for first in range(0, len(s), grouping.rows):
        rows = np.arange(first, min(first + grouping.rows, len(s)))[:, None]
        largest = met[rows[:, 0]]
        for at in range(0, len(keys), grouping.keys):
            tile = keys[at : at + grouping.keys]
            mask = sees[rows, tile]
            if not mask.any():
                continue
            products += 1
            x = np.where(mask, s[rows, tile], -np.inf)
            top = x.max(axis=1)
            # What is not finite must show in the output, so its tile stays.
            if (~mask.any(axis=1) | (top < largest + np.log(skip))).all() and np.isfinite(x[mask]).all():
                sees[rows, tile] = False
                left += 1
            largest = np.fmax(largest, top)
    return products, left
