"""Reference attention: dense, sliding-window and over a selection, in float64.

Responsible for the exact result only; which keys a selection holds is decided in selection.py.
"""

from __future__ import annotations

import numpy as np


def softmax(x, axis):
    """Softmax of finite or -inf logits along an axis."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def check(q: np.ndarray, k: np.ndarray, v: np.ndarray | None = None) -> None:
    """Raises ValueError where the shapes of q, k and v do not go together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and x.ndim != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, heads, L, D], got {x.ndim}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"k: shape {k.shape} does not go with q's {q.shape}")
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q: {q.shape[2]} queries for {k.shape[2]} keys")
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: shape {v.shape} does not go with k's {k.shape}")


def visible(q_len: int, k_len: int, *, window: int | None = None, causal: bool = True) -> np.ndarray:
    """bool [Lq, Lk]: may query i see key j? With p = i + Lk - Lq: ``j <= p`` if causal, and ``|j - p| < window`` where
    given."""
    position = np.arange(q_len)[:, None] + (k_len - q_len)
    key = np.arange(k_len)[None, :]
    mask = key <= position if causal else np.ones((q_len, k_len), bool)
    if window is not None:
        mask &= abs(key - position) < window
    return mask


def logits(q, k, scale, softcap):
    """q [Lq, D], k [Lk, D] -> [Lq, Lk] scaled and capped."""
    with np.errstate(invalid="ignore", over="ignore"):
        s = scale * (q @ k.T)
        return s if softcap is None else softcap * np.tanh(s / softcap)


def _attend_head(q, k, v, mask, scale, softcap, sink):
    """One head: q [Lq, D], k [Lk, D], v [Lk, E], mask bool [Lq, Lk], sink a logit -> out [Lq, E], lse [Lq]."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        s = np.where(mask, logits(q, k, scale, softcap), -np.inf)
        top = s.max(axis=1, keepdims=True, initial=sink)
        top = np.where(top == -np.inf, 0.0, top)
        p = np.where(mask, np.exp(s - top), 0.0)
        total = p.sum(axis=1, keepdims=True) + np.exp(sink - top)
        # A NaN or inf in v may reach only the rows that see it, but 0 * NaN is NaN: such values are added row by row.
        bad = ~np.isfinite(v).all(axis=1)
        out = p @ np.where(bad[:, None], 0.0, v)
        for j in np.flatnonzero(bad):
            rows = mask[:, j]
            out[rows] += p[rows, j, None] * v[j]
        out = np.where(total == 0, 0.0, out / total)
        lse = np.where(total == 0, -np.inf, top + np.log(total))[:, 0]
    return out, lse


def _attend(q, k, v, mask_of, scale, softcap, sinks, return_lse):
    """All heads; ``mask_of(b, h)`` gives the bool [Lq, Lk] mask of one."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    check(q, k, v)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    group = q.shape[1] // k.shape[1]
    sinks = np.full(q.shape[1], -np.inf) if sinks is None else np.asarray(sinks).astype(np.float64)
    if sinks.shape != q.shape[1:2]:
        raise ValueError(f"sinks: expected shape {q.shape[1:2]}, got {sinks.shape}")
    out: np.ndarray = np.zeros((*q.shape[:3], v.shape[3]))
    lse: np.ndarray = np.zeros(q.shape[:3])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            mask = mask_of(b, h)
            out[b, h], lse[b, h] = _attend_head(
                q[b, h], k[b, h // group], v[b, h // group], mask, scale, softcap, sinks[h]
            )
    return (out, lse) if return_lse else out


def attention(
    q, k, v, *, scale=None, softcap=None, window=None, causal=True, key_ranges=None, sinks=None, return_lse=False
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Exact attention: ``softmax(mask(cap(scale * q k^T))) v`` with ``cap(s) = softcap * tanh(s / softcap)``.

    q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, E] -> out [B, H, Lq, E], and with ``return_lse`` lse [B, H, Lq]
    (natural log of the sum of the exponentials of the visible logits, and of the head's sink). A query that sees no key
    gives zeros and ``lse = -inf``. ``scale`` None means ``D ** -0.5``. ``key_ranges`` int [B, Lq, 2]: query i of batch
    b sees the keys [start, stop) in place of ``causal`` and ``window``. ``sinks`` [H]: a logit of each head that joins
    the softmax, neither scaled nor capped, and has no value. NaN and inf reach exactly the rows that see them.
    Raises ValueError for shapes that do not fit.
    """
    q_len, k_len = np.shape(q)[2], np.shape(k)[2]
    if key_ranges is None:
        mask = visible(q_len, k_len, window=window, causal=causal)
        return _attend(q, k, v, lambda b, h: mask, scale, softcap, sinks, return_lse)
    ranges = np.asarray(key_ranges)
    if ranges.shape != (np.shape(q)[0], q_len, 2):
        raise ValueError(f"key_ranges: expected shape {(np.shape(q)[0], q_len, 2)}, got {ranges.shape}")
    key = np.arange(k_len)[None, :]
    return _attend(
        q, k, v, lambda b, h: (key >= ranges[b, :, :1]) & (key < ranges[b, :, 1:]), scale, softcap, sinks, return_lse
    )


def masked_attention(q, k, v, mask, *, scale=None, softcap=None, sinks=None, return_lse=False):
    """Attention of each query over the keys that ``mask`` bool [B, H, Lq, Lk] leaves it, otherwise as `attention`."""
    return _attend(q, k, v, lambda b, h: mask[b, h], scale, softcap, sinks, return_lse)


def sparse_attention(q, k, v, selection, *, scale=None, softcap=None, window=None, sinks=None, return_lse=False):
    """Exact attention over the keys a selection lists, causality and window applied per token inside a list.

    ``selection`` is anything with ``indptr``, ``indices``, ``shape`` (B, S, nq) and ``query_block``, and ``causal`` if
    that may be False; head h uses list set ``h * S // H``. Shapes, results and errors as in ``attention``.
    """
    q_len, k_len, heads = np.shape(q)[2], np.shape(k)[2], np.shape(q)[1]
    sets = selection.shape[1]
    if sets not in (1, np.shape(k)[1], heads) or selection.shape[2] != -(-q_len // selection.query_block):
        raise ValueError(f"selection: shape {selection.shape} does not go with q's {np.shape(q)}")
    seen = visible(q_len, k_len, window=window, causal=getattr(selection, "causal", True))
    mask = selection_mask(selection, q_len, k_len) & seen
    return _attend(q, k, v, lambda b, h: mask[b, h * sets // heads], scale, softcap, sinks, return_lse)


def selection_mask(selection, q_len: int, k_len: int) -> np.ndarray:
    """bool [B, S, Lq, Lk]: the lists of a selection, one row a query; causality and windows not applied."""
    batch, sets, blocks = selection.shape
    size = selection.query_block
    mask = np.zeros((batch, sets, q_len, k_len), bool)
    for b in range(batch):
        for s in range(sets):
            for i in range(blocks):
                r = (b * sets + s) * blocks + i
                keys = selection.indices[selection.indptr[r] : selection.indptr[r + 1]]
                mask[b, s, i * size : (i + 1) * size, keys] = True
    return mask
