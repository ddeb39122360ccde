"""Reference: the input of a method of selection for one block of queries, and code that the twins of several methods
share.

Two rules hold for all methods that compute logits. The probabilities of a row are zeros if one of its visible logits is
NaN or +inf, if all are -inf, or if there is none. And keys with a NaN or inf are always selected, so that they reach
the rows that see them, as in exact attention: their segments score +inf and have no mass.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from dhsa._twin.selection import Segments, topk

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Block:
    """What a method may use to score segments for one query block and the heads of one set, all float64."""

    q: np.ndarray  # [Hs, Lq, D]: all queries of the set's heads
    k: np.ndarray  # [Hkvs, Lk, D]: all keys of their KV heads; head h reads k[h * Hkvs // Hs]
    index: int  # of the query block
    begin: int  # its queries are q[:, begin:stop] ...
    stop: int
    start: int  # ... at positions from this one on
    lo: int  # its candidates are keys [lo, end)
    end: int
    room: int  # the most keys of its list, forced ones counted
    group_q: np.ndarray  # [Hg, Lq, D]: all queries of the heads that read k, be they of the set or not
    options: dict[str, Any]  # of method_lists, None replaced by what it stands for; "edges": chunks of the batch row
    v: np.ndarray | None = None  # [Hkvs, Lk, E]: their values, for methods that read them
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)  # what `shared` holds, for all blocks of the set
    set_index: int = 0  # of the set of heads, which is that of its lists
    sets: int = 1  # of the layer
    batch: int = 0  # index of the batch item
    state: Any = None  # what a method that remembers has found out before

    @property
    def queries(self) -> np.ndarray:
        """[Hs, n, D]: the block's own."""
        return self.q[:, self.begin : self.stop]

    @property
    def middle(self) -> int | None:
        """The key at the block's middle; None in causal attention."""
        return None if self.options["causal"] else self.start + (self.stop - self.begin) // 2

    def keys_of(self, h: int) -> np.ndarray:
        """[Lk, D]: the keys that head h of the set reads."""
        return self.k[h * len(self.k) // len(self.q)]

    def shared(self, name: Any, make: Callable[[], _T]) -> _T:
        """What `make` returns, which is the same for all blocks of the set, and computed for the first of them."""
        if name not in self.memo:
            self.memo[name] = make()
        found: _T = self.memo[name]
        return found


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Vectors in fixed point: `whole` [n, D], whole numbers, times `scale` [n]."""

    whole: np.ndarray
    scale: np.ndarray

    def __getitem__(self, rows: Any) -> Fixed:
        return Fixed(self.whole[rows], self.scale[rows])


def fixed(x: np.ndarray, most: int = 2**20) -> Fixed:
    """Vectors x [n, D] in fixed point, the largest number of each being `most`. One that is not finite is all NaN.

    Products of two of them are whole numbers below 2**53 (D is at most 576), which float64 holds without rounding. So
    they have the same bits with every BLAS library, for any number of its threads.
    """
    top = np.abs(x).max(axis=1, initial=0.0, keepdims=True)
    good = np.isfinite(x).all(axis=1, keepdims=True)
    scale = np.where(good & (top > 0), top / most, 1.0)
    whole = np.where(good, np.rint(np.where(good, x, 0.0) / scale), np.nan)
    return Fixed(whole, scale[:, 0])


def fixed_logits(rows: Fixed, keys: Fixed, options: dict[str, Any]) -> np.ndarray:
    """`logits` of vectors in fixed point."""
    s = options["scale"] * (rows.whole @ keys.whole.T) * rows.scale[:, None] * keys.scale
    return s if options["softcap"] is None else options["softcap"] * np.tanh(s / options["softcap"])


def logits(rows, keys, options, factor=1.0):
    """cap(scale * rows . keys), rows [n, D] and keys [m, D]."""
    s = options["scale"] * factor * (rows @ keys.T)
    return s if options["softcap"] is None else options["softcap"] * np.tanh(s / options["softcap"])


def probabilities(s, seen: np.ndarray | bool = True):
    """Softmax of each row of s over the keys it sees, zeros elsewhere and in rows whose logits are not finite."""
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


def segments_of(edges, bad, score, mass):
    """Segments, of which those that are bad are always selected."""
    return Segments(edges, np.where(bad, np.inf, score), np.where(bad, 0.0, mass))


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


def steady_logits(rows, keys, options):
    """`logits` by products in fixed point, for methods that run in NumPy."""
    return fixed_logits(fixed(rows), fixed(keys), options)


def fixed_keys(block: Block, h: int) -> Fixed:
    """The keys up to the block's end that head h of the set reads, in fixed point."""
    kv = h * len(block.k) // len(block.q)
    return block.shared(("fixed keys", kv), lambda: fixed(block.k[kv]))[: block.end]


def key_means(block: Block, h: int) -> np.ndarray:
    """[blocks of keys, D]: the mean keys, for head h of the set, of `block_edges`."""
    size, keys = block.options["key_block"], block.keys_of(h)
    n = block.end // size
    kv = h * len(block.k) // len(block.q)
    means = block.shared(
        ("key means", kv),
        lambda: keys[: len(keys) // size * size].reshape(len(keys) // size, size, keys.shape[1]).mean(axis=1),
    )
    rest = [keys[n * size : block.end].mean(axis=0)] if block.end % size else []
    return np.vstack([means[:n], *rest])


def bad_blocks(block: Block) -> np.ndarray:
    """bool [blocks of keys]: those with a key that is not finite, in any KV head of the set."""
    bad = block.shared("bad", lambda: np.asarray(~np.isfinite(block.k).all(axis=(0, 2))))
    edges = block_edges(block)
    return np.asarray(np.logical_or.reduceat(bad[: block.end], edges[:-1]))


def shorter(block: Block, segments: Segments, room: int) -> np.ndarray:
    """The list of a method that takes at most `room` keys, where that is less than the block's room; forced keys and
    segments that score +inf are taken first, as ever."""
    o = block.options
    forced = min(o["sink"] + o["local"], block.room)
    room = min(block.room, max(room, forced, 1))
    return topk(segments, block.lo, block.end, budget=room, sink=o["sink"], local=o["local"])
