"""Reference: the input of a method of selection for one block of queries, and code that the twins of several methods
share.

Two rules hold for all methods that compute logits. The probabilities of a row are zeros if one of its visible logits is
NaN or +inf, if all are -inf, or if there is none. And keys with a NaN or inf are always selected, so that they reach
the rows that see them, as in exact attention: their segments score +inf and have no mass.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from dhsa._twin.selection import Segments


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
