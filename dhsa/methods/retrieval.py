"""Single keys from an index of earlier queries and the keys that they attended to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from dhsa._twin.blocks import Block, Fixed, fixed, fixed_logits, is_bad, probabilities, sees, segments_of
from dhsa._twin.selection import Segments, Selection
from dhsa.methods.base import Method

__all__ = ["QueryIndex", "Retrieval"]

ROWS = 64  # queries whose products with all keys are computed at a time


@dataclasses.dataclass(frozen=True)
class Part:
    """The indexed queries of one head, in the order of their positions."""

    at: np.ndarray  # [n]: positions
    unit: np.ndarray  # [n, D]: the queries, divided by their norms
    links: np.ndarray  # int32 [n, links]: keys, the first one repeated where there are fewer

    def before(self, position: int) -> Part:
        n = int(np.searchsorted(self.at, position))
        return Part(self.at[:n], self.unit[:n], self.links[:n])

    def followed_by(self, other: Part) -> Part:
        pairs = ((self.at, other.at), (self.unit, other.unit), (self.links, other.links))
        return Part(*(np.concatenate(pair) for pair in pairs))


class QueryIndex:
    """The indexed queries of the calls of one layer, of which each continues the keys of the one before. `open` drops
    those at positions whose keys have changed since, as after a crop."""

    def __init__(self, every: int, links: int) -> None:
        self.every, self.links = every, links
        self.parts: dict[tuple[int, int], Part] = {}  # by batch item and query head
        self.made: dict[tuple[int, int], Part] = {}  # of the call whose lists are being made
        self._seen: np.ndarray | None = None  # [3, B, Lk]: three numbers of each key

    def open(self, q: np.ndarray, k: np.ndarray) -> None:
        self.made = {}
        dim = k.shape[3]
        now = np.stack([k[:, 0, :, 0], k[:, -1, :, dim - 1], k[:, 0, :, dim // 2]])
        old, self._seen = self._seen, now
        if old is None or old.shape[1] != now.shape[1]:
            self.parts = {}
            return
        n = min(old.shape[2], now.shape[2])
        same = ((old[..., :n] == now[..., :n]) | (np.isnan(old[..., :n]) & np.isnan(now[..., :n]))).all(axis=0)
        length = np.where(same.all(axis=1), n, same.argmin(axis=1))  # [B]: of the keys that are as they were
        self.parts = {(b, h): part.before(int(length[b])) for (b, h), part in self.parts.items()}

    def update(self, q: np.ndarray, k: np.ndarray, found: Selection | None, options: Mapping[str, Any]) -> None:
        """Index the queries of a call. A single query is a decoding step, which is not indexed."""
        if q.shape[2] == 1:
            return
        o = {"scale": options.get("scale"), "softcap": options.get("softcap"), "window": options.get("window")}
        o["scale"] = q.shape[3] ** -0.5 if o["scale"] is None else o["scale"]
        for b in range(len(q)):
            for h in range(q.shape[1]):
                if (made := self.made.pop((b, h), None)) is None:
                    keys = fixed(k[b, h * k.shape[1] // q.shape[1]])
                    made = indexed(q[b, h], keys, self.every, self.links, o)
                old = self.parts.get((b, h))
                self.parts[b, h] = made if old is None else old.followed_by(made)

    def holds(self, batch: int) -> bool:
        """Whether there is an indexed query of every batch item."""
        return all(any(len(part.at) for (b, _), part in self.parts.items() if b == item) for item in range(batch))


def indexed(q: np.ndarray, keys: Fixed, every: int, links: int, options: dict[str, Any]) -> Part:
    """The indexed queries of the last positions, q [Lq, D]: those at multiples of `every` that are finite, each with
    the visible keys of its largest products."""
    k_len = len(keys.whole)
    at = np.arange(k_len - len(q), k_len)
    at = at[(at % every == 0) & np.isfinite(q).all(axis=1)]
    queries = q[at - (k_len - len(q))]
    made = np.zeros((len(at), links), np.int32)
    n = min(links, k_len)
    every_key = np.arange(k_len)
    for a in range(0, len(at), ROWS):
        rows = at[a : a + ROWS]
        s = fixed_logits(fixed(queries[a : a + ROWS]), keys, options)
        s[~sees((rows, rows), (every_key, every_key), options["window"]) | np.isnan(s)] = -np.inf
        best = np.argpartition(-s, n - 1, axis=1)[:, :n]
        made[a : a + ROWS] = s.argmax(axis=1)[:, None]
        seen = ~np.isneginf(np.take_along_axis(s, best, axis=1))
        np.copyto(made[a : a + ROWS, :n], best, where=seen, casting="same_kind")
    return Part(at, unit(queries), made)


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors x [n, D] divided by their norms; those of norm 0 stay."""
    norms = np.sqrt((x**2).sum(axis=1, keepdims=True))
    return np.asarray(x / np.where(norms > 0, norms, 1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval(Method):
    """Single keys that an index returns. The index holds every few-th query so far, with the keys of its largest
    products. A query looks up the indexed queries that are most like it, and the exact products of their keys decide.
    In NumPy: for comparing what is selected.

    In a model with `Config(decode="dhsa")` the index of a prompt is kept with its cache, and decoding steps select by
    it. A prompt itself is selected as by every method; with a `dense_tail` of the prompt's length it is read by exact
    attention, as in the source, and indexed as well. Tokens that are decoded are not indexed: they are found as
    `Config.local` keys.

    Args:
        every: of the queries, those at positions that are multiples of it are indexed, at least 1.
        links: keys of each indexed query, at least 1.
        probes: indexed queries that a query looks up, at least 1.

    Raises:
        TypeError, ValueError: naming the option.

    Source: RetrievalAttention, arXiv 2409.10516.
    """

    name: ClassVar[str] = "retrieval"
    summary: ClassVar[str] = "single keys from an index of earlier queries and the keys of their largest products"
    source: ClassVar[str] = "RetrievalAttention, arXiv 2409.10516"
    cost: ClassVar[str] = "Q G (n / `every` + `links` `probes`), and keys / `every` times G n once"
    in_core: ClassVar[bool] = False
    has_mass: ClassVar[bool] = False
    remembers: ClassVar[Literal["", "layers", "calls"]] = "calls"
    heads: ClassVar[str] = "head"

    every: int = 4
    links: int = 64
    probes: int = 16

    def __post_init__(self) -> None:
        for name in ("every", "links", "probes"):
            self._keep_int(name, 1)

    def new_state(self) -> QueryIndex:
        return QueryIndex(self.every, self.links)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """For each query and head, the ``probes`` indexed queries of that head with the largest cosine; the keys of all
        that the block's queries look up are found. A found key scores the probability that the block's queries give
        it, in a softmax over the found and the forced keys, summed over queries and heads; if fewer are found than the
        budget has room for, the most recent keys fill it. Indexed are the queries of earlier calls and those before the
        block. Source: RetrievalAttention, arXiv 2409.10516.

        There, each query of the prompt is linked to its nearest keys as well, since indexes that link keys by their own
        distances fail where queries and keys are distributed differently. Keys that have queries in common are then
        joined to a graph, which a search walks from key to key. The paper's text was at hand in part only; here the
        links themselves are the index, and the nearest queries are found by comparing all that are indexed, so that
        nothing is lost by an approximate search. First and recent keys are attended to in any case there, too.
        """
        o, end = block.options, block.end
        bad, score = is_bad(block), np.full(end, -1.0)  # of keys that are not found
        forced = np.append(np.arange(o["sink"]), np.arange(max(0, end - o["local"]), end))
        positions = block.start + np.arange(block.stop - block.begin)
        for h in range(len(block.q)):
            part = _part(block, h).before(block.start)
            finite = np.isfinite(block.queries[h]).all(axis=1)
            queries, at = block.queries[h][finite], positions[finite]
            if not len(part.at) or not len(at):
                continue
            indexes, n = fixed(part.unit), min(o["probes"], len(part.at))
            cosine = (fixed(unit(queries)).whole @ indexes.whole.T) * indexes.scale
            keys = np.unique(part.links[np.argpartition(-cosine, n - 1, axis=1)[:, :n]])
            keys = np.union1d(keys, forced)
            keys = keys[(keys >= block.lo) & (keys < end)]
            keys = keys[~bad[keys]]
            s = fixed_logits(fixed(queries), fixed(block.keys_of(h)[keys]), o)
            p = probabilities(s, sees((at, at), (keys, keys), o["window"]))
            score[keys] = np.maximum(score[keys], 0.0) + p.sum(axis=0)
        return segments_of(np.arange(end + 1), bad, score, score)


def _part(block: Block, h: int) -> Part:
    """The indexed queries for head h of the set: those of earlier calls and those of this one."""
    head = block.set_index * len(block.q) + h

    def make() -> Part:
        o = block.options
        kv = h * len(block.k) // len(block.q)
        queries = block.q[h, :0] if block.q.shape[1] == 1 else block.q[h]  # a decoding step is not indexed
        keys = block.shared(("fixed keys", kv), lambda: fixed(block.k[kv]))
        made = indexed(queries, keys, o["every"], o["links"], o)
        if block.state is None:
            return made
        block.state.made[block.batch, head] = made
        old = block.state.parts.get((block.batch, head))
        return made if old is None else old.followed_by(made)

    return block.shared(("index", h), make)
