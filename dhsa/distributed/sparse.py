"""Attention to selected keys, of one sequence whose keys several ranks hold.

The lists are those that one process makes. Each rank makes those of its own blocks of queries:

1. A chunk's mean is computed by the rank that holds the first key of its group of chunks. That rank is sent the few
   keys of the group that others hold.
2. The means are sent to the ranks whose blocks can see them.
3. Each rank selects, and asks every other rank for the rows that some block of its own selected: one bit for each key.
4. Those rows of keys and values are sent.

In layers with a window, ranks exchange the keys and values of the window instead, and compute its means themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from dhsa import _core, functional
from dhsa.config import HEADS, Config
from dhsa.functional import RunStats
from dhsa.methods.rows import GROUP
from dhsa.selection import Selection

from .attention import Turn, places
from .layout import Layout, Run, cover
from .link import Link

__all__ = ["METHODS", "edges_of", "sparse"]

METHODS = ("rows", "window", "power")  # those whose lists of a block need no more of other blocks than chunk means


class Span(NamedTuple):
    """`length` keys from `start` on, which are in a rank's buffer from `at` on."""

    start: int
    length: int
    at: int

    @property
    def stop(self) -> int:
        return self.start + self.length


Range = tuple[int, int]


def edges_of(config: Config, cuts: Sequence[int], keys: int) -> np.ndarray:
    """The boundaries of all `keys`, of which those before each number of `cuts` were cut in a call of their own."""
    ends = [end for end in cuts if end < keys] + [keys]
    parts = [np.arange(a, b, config.chunk_size) for a, b in zip([0, *ends], ends, strict=False)]
    return np.concatenate([*parts, [keys]]).astype(np.int32)


def spans_of(layout: Layout, rank: int, window: int | None) -> list[Span]:
    """The keys of a batch of one that a rank's attention is handed, by their place in the sequence."""
    before, found, at = layout.before()[:, 0], [], 0
    for run in layout.in_call(rank, window):
        stop = min(run.stop, layout.pieces[run.piece].tokens[0])
        if stop > run.start:
            found.append(Span(int(before[run.piece]) + run.start, stop - run.start, at))
        at += run.length
    return found


def within(spans: Iterable[Span], ranges: Iterable[Range]) -> list[Span]:
    """The parts of spans that lie in one of the ranges, which do not overlap, in the order of the sequence."""
    found = [
        Span(max(s.start, a), min(s.stop, b) - max(s.start, a), s.at + max(s.start, a) - s.start)
        for s in spans
        for a, b in ranges
        if max(s.start, a) < min(s.stop, b)
    ]
    return sorted(found)


class Keys(NamedTuple):
    """What all ranks know about a sequence in a layer. `queries`: the positions of each rank's queries, an empty range
    if it has none."""

    spans: tuple[tuple[Span, ...], ...]
    queries: tuple[Range, ...]
    past: int
    length: int
    edges: np.ndarray
    groups: np.ndarray
    owners: np.ndarray  # of groups

    @property
    def new(self) -> int:
        """The number of queries of all ranks."""
        return self.length - self.past

    def group_start(self, key: int) -> int:
        return int(self.groups[np.searchsorted(self.groups, key, "right") - 1])

    def keys_for_means(self, rank: int) -> list[Range]:
        """The keys that a rank needs for the means of its groups, and for the groups that its blocks cut."""
        own = np.flatnonzero(self.owners == rank)
        ranges = [(int(self.groups[g]), int(self.groups[g + 1])) for g in own]
        first, last = self.queries[rank]
        if first < last:
            ranges += [(self.group_start(first), first), (self.group_start(last), first)]
        return merged(ranges)

    def cut_chunks(self, rank: int) -> Range:
        """The chunks before the end of a rank's last query, of a group that does not end with it."""
        first, last = self.queries[rank]
        if first == last:
            return 0, 0
        group = int(np.searchsorted(self.groups, last, "right")) - 1
        return group * GROUP, int(np.searchsorted(self.edges, last, "right")) - 1

    def groups_for(self, sender: int, rank: int) -> np.ndarray:
        """The groups whose means `sender` computes and `rank` uses: those that end before its last query does."""
        first, last = self.queries[rank]
        if first == last:
            return np.zeros(0, np.int64)
        return np.flatnonzero((self.owners == sender) & (self.groups[1:] <= last))

    def asked(self, rank: int, holder: int) -> list[Span]:
        """The keys of `holder` that `rank` may ask for: those before its first query."""
        first, last = self.queries[rank]
        return within(self.spans[holder], [(0, first)]) if first < last else []


def merged(ranges: Iterable[Range]) -> list[Range]:
    found: list[Range] = []
    for a, b in sorted(r for r in ranges if r[0] < r[1]):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], b))
        else:
            found.append((a, b))
    return found


def sequence(layout: Layout, config: Config, cuts: Sequence[int]) -> Keys:
    past = sum(piece.tokens[0] for piece in layout.pieces[:-1])
    count = layout.pieces[-1].tokens[0]
    spans = tuple(tuple(spans_of(layout, rank, None)) for rank in range(layout.ranks))
    queries = tuple(queries_of(layout, rank, past, count) for rank in range(layout.ranks))
    edges = edges_of(config, cuts, past + count)
    groups = np.append(edges[:-1:GROUP], edges[-1]).astype(np.int32)
    holder = np.zeros(past + count, np.int32)
    for rank, held in enumerate(spans):
        for span in held:
            holder[span.start : span.stop] = rank
    return Keys(spans, queries, past, past + count, edges, groups, holder[groups[:-1]])


def queries_of(layout: Layout, rank: int, past: int, count: int) -> Range:
    parts = layout.pieces[-1].parts[rank]
    assert len(parts) <= 1, "parts of sparse layers are not balanced"
    start, stop = parts[0] if parts else (0, 0)
    return past + start, past + max(start, min(stop, count))


def sparse(
    link: Link,
    turn: Turn,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: Config,
    *,
    cuts: Sequence[int],
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> RunStats:
    """Attention of a batch of one to the keys that `config` selects, into `out` [1, H, Lq, E]. `query`, `key` and
    `value` as in `attention.exact`. `cuts`: as `edges_of` takes it."""
    options: dict[str, Any] = {"scale": scale, "softcap": softcap}
    start, waited = perf_counter(), link.waited
    if window is None:
        found = _selected(link, turn, query, key, value, config, cuts, options)
    else:
        found = _windowed(link, turn, query, key, value, config, window, options)
    seconds = perf_counter() - start - (link.waited - waited)
    if found is None:  # no queries here, but keys for others
        out.zero_()
        return RunStats("sparse", 1.0, seconds, 0.0)
    k, v, selection, first = found
    n = selection.q_len or 0
    _, _, stats = functional.run_selected(
        query[:, :, :n], k, v, selection, window=window, skip=config.skip, sinks=sinks, out=out[:, :, :n], **options
    )
    out[:, :, n:] = 0  # columns of longer rows
    here = _pairs(n, k.shape[2], window)
    return stats._replace(
        density=stats.density * here / _pairs(n, first + n, window),
        select_seconds=seconds,
    )


def _pairs(queries: int, keys: int, window: int | None) -> int:
    """Causal pairs of the last `queries` of `keys` positions within a window."""
    return int(np.minimum(np.arange(keys - queries, keys) + 1, keys if window is None else window).sum())


# ---- layers that see all keys ----------------------------------------------------------------------------------------


def _selected(
    link: Link,
    turn: Turn,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: Config,
    cuts: Sequence[int],
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, Selection, int] | None:
    at = turn.known(("sequence", tuple(cuts), config), lambda: sequence(turn.layout, config, cuts))
    rank, others = link.rank, link.others()
    first, last = at.queries[rank]
    own = at.spans[rank]
    keys = key.new_empty(1, key.shape[1], at.length, key.shape[3])  # memory that is not written is not used
    for span in own:
        keys[:, :, span.start : span.stop] = key[:, :, span.at : span.at + span.length]
    chunks = groups = None
    if config.options.has_chunks:
        _fetch_for_means(link, at, key, keys)
        chunks, groups = _all_means(link, at, keys, config)
    sends: dict[int, torch.Tensor] = {}
    chosen = indptr = indices = None
    if first < last:
        indptr, indices = _lists(at, query, keys, config, chunks, groups, options, rank)
        chosen = _chosen(indptr, indices, key.shape[1], query.shape[1], at.length, config)
        sends = {r: _bits(chosen, spans) for r in others if (spans := at.asked(rank, r))}
    receives = {}
    for r in others:
        if spans := at.asked(r, rank):
            size = key.shape[1] * -(-sum(s.length for s in spans) // 8)
            receives[r] = torch.empty(size, dtype=torch.uint8)
    transfer = link.exchange(sends, receives)
    answers = {}
    for r in receives:
        rows = _rows(transfer.take(r), at.asked(r, rank), key.shape[1])
        if any(map(len, rows)):
            answers[r] = torch.cat([x[0, h, row].reshape(-1) for x in (key, value) for h, row in enumerate(rows)])
    asked = {}
    if chosen is not None:
        for r in others:
            wanted = [_wanted(chosen[h], at.asked(rank, r)) for h in range(key.shape[1])]
            if any(map(len, wanted)):
                asked[r] = wanted
    width = key.shape[3] + value.shape[3]
    buffers = {r: key.new_empty(sum(map(len, wanted)) * width) for r, wanted in asked.items()}
    transfer.done()
    transfer = link.exchange(answers, buffers)
    result = None
    if chosen is not None and indptr is not None and indices is not None:
        chosen[:, first:last] = True
        kept = np.flatnonzero(chosen.any(axis=0))
        place = np.zeros(at.length, np.int32)
        place[kept] = np.arange(len(kept))
        k = key.new_empty(1, key.shape[1], len(kept), key.shape[3])
        v = value.new_empty(1, key.shape[1], len(kept), value.shape[3])
        for span in own:
            some = kept[(kept >= span.start) & (kept < span.stop)]
            for x, y in ((k, key), (v, value)):
                x[:, :, place[some]] = y[:, :, some - span.start + span.at]
        for r, wanted in asked.items():
            data, offset = transfer.take(r), 0
            for x in (k, v):
                for h, row in enumerate(wanted):
                    size = len(row) * x.shape[3]
                    x[0, h, place[row]] = data[offset : offset + size].view(len(row), x.shape[3])
                    offset += size
        selection = _selection(indptr, place[indices], query, key, config, last - first, len(kept))
        result = k, v, selection, first
    transfer.done()
    return result


def _fetch_for_means(link: Link, at: Keys, key: torch.Tensor, keys: torch.Tensor) -> None:
    """Fills in the keys that this rank needs for means and does not hold."""
    heads, dim = key.shape[1], key.shape[3]

    def wanted(rank: int, holder: int) -> list[Span]:
        return within(at.spans[holder], at.keys_for_means(rank))

    sends, receives = {}, {}
    for r in link.others():
        if spans := wanted(r, link.rank):
            sends[r] = torch.cat([key[:, :, s.at : s.at + s.length] for s in spans], dim=2).contiguous()
        if spans := wanted(link.rank, r):
            receives[r] = key.new_empty(1, heads, sum(s.length for s in spans), dim)
    transfer = link.exchange(sends, receives)
    for r in receives:
        data, offset = transfer.take(r), 0
        for span in wanted(link.rank, r):
            keys[:, :, span.start : span.stop] = data[:, :, offset : offset + span.length]
            offset += span.length
    transfer.done()


class _Means(NamedTuple):
    """Arrays of `_core.chunk_means`: int8 [Hkv, n, D], float32 [Hkv, n], the same or None, int8 [Hkv, n]."""

    mean: np.ndarray
    scale: np.ndarray
    spread: np.ndarray | None
    state: np.ndarray

    @classmethod
    def empty(cls, heads: int, n: int, dim: int, spread: bool) -> _Means:
        floats = np.zeros((heads, n), np.float32)
        return cls(
            np.zeros((heads, n, dim), np.int8),
            floats,
            np.zeros_like(floats) if spread else None,
            np.zeros((heads, n), np.int8),
        )

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        return self.mean, self.scale, self.spread, self.state

    def parts(self) -> list[np.ndarray]:
        return [part for part in self if part is not None]


def _all_means(link: Link, at: Keys, keys: torch.Tensor, config: Config) -> tuple[_Means, _Means | None]:
    """The means of all chunks that this rank's blocks see, and of their groups where there is a shortlist."""
    heads, dim = keys.shape[1], keys.shape[3]
    shortlist = config._core.shortlist
    two = shortlist > 0 and config.mass is None and at.length > shortlist
    chunks = _Means.empty(heads, len(at.edges) - 1, dim, False)
    groups = _Means.empty(heads, len(at.groups) - 1, dim, True) if two else None
    mine = np.flatnonzero(at.owners == link.rank)
    for begin, end in _runs(mine):
        _compute(keys, at.edges, chunks, *_chunks(at, begin, end))
        if groups is not None:
            _compute(keys, at.groups, groups, begin, end)

    def pieces(which: np.ndarray) -> list[np.ndarray]:
        """The parts of the arrays that hold the means of these groups, as views."""
        found = []
        for begin, end in _runs(which):
            first, last = _chunks(at, begin, end)
            found += [part[h, first:last] for part in chunks.parts() for h in range(heads)]
            if groups is not None:
                found += [part[h, begin:end] for part in groups.parts() for h in range(heads)]
        return found

    sends, receives = {}, {}
    for r in link.others():
        if len(which := at.groups_for(link.rank, r)):
            sends[r] = torch.from_numpy(np.concatenate([x.reshape(-1).view(np.uint8) for x in pieces(which)]))
        if len(which := at.groups_for(r, link.rank)):
            receives[r] = torch.empty(sum(x.nbytes for x in pieces(which)), dtype=torch.uint8)
    transfer = link.exchange(sends, receives)
    for r in receives:
        data, offset = transfer.take(r).numpy(), 0
        for x in pieces(at.groups_for(r, link.rank)):
            x[...] = data[offset : offset + x.nbytes].view(x.dtype).reshape(x.shape)
            offset += x.nbytes
    transfer.done()
    _compute(keys, at.edges, chunks, *at.cut_chunks(link.rank))
    return chunks, groups


def _runs(numbers: np.ndarray) -> list[Range]:
    """Ascending numbers as ranges."""
    if not len(numbers):
        return []
    cut = np.flatnonzero(np.diff(numbers) > 1)
    starts, stops = numbers[np.append(0, cut + 1)], numbers[np.append(cut, len(numbers) - 1)] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _chunks(at: Keys, begin: int, end: int) -> Range:
    """The chunks of groups [begin, end)."""
    return begin * GROUP, min(end * GROUP, len(at.edges) - 1)


def _compute(keys: torch.Tensor, edges: np.ndarray, means: _Means, first: int, last: int) -> None:
    """Computes the means [first, last) of chunks with these edges."""
    if first >= last:
        return
    heads, _, dim = means.mean.shape
    part = _Means.empty(heads, last - first, dim, means.spread is not None)
    edges = np.ascontiguousarray(edges[first : last + 1])
    _core.chunk_means(keys, edges, part.arrays(), functional.get_num_threads())
    for whole, some in zip(means.parts(), part.parts(), strict=True):
        whole[:, first:last] = some


def _lists(
    at: Keys,
    query: torch.Tensor,
    keys: torch.Tensor,
    config: Config,
    chunks: _Means | None,
    groups: _Means | None,
    options: dict[str, Any],
    rank: int,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The lists of this rank's blocks, indptr and indices."""
    first, last = at.queries[rank]
    block, begin = config.query_block, first - at.past
    blocks = -(-(last - first) // block)
    # Queries of other ranks are not read, and their memory is not used.
    queries = query.new_empty(1, query.shape[1], at.new, query.shape[3])
    queries[:, :, begin : begin + last - first] = query[:, :, : last - first]
    sets = (keys.shape[1], 1, query.shape[1])[HEADS.index(config.heads or config.options.heads)]
    room = np.empty(sets * -(-at.new // block) + 1, np.int64)
    scaling = (options["scale"], options["softcap"], window)
    _core.select_plan(queries, keys, config._core, *scaling, True, room)
    lengths = np.diff(room).reshape(sets, -1)[:, begin // block : begin // block + blocks]
    indptr, indices = np.empty(sets * blocks + 1, np.int64), np.empty(int(lengths.sum()), np.int32)
    _core.select_blocks(
        queries, keys, None if chunks is None else at.edges[None], None if chunks is None else chunks.arrays(),
        None if groups is None else groups.arrays(), config._core, *scaling, begin // block, blocks, indptr, indices,
        functional.get_num_threads(),
    )  # fmt: skip
    return indptr, indices[: indptr[-1]]


def _chosen(
    indptr: np.ndarray, indices: np.ndarray, kv_heads: int, heads: int, length: int, config: Config
) -> np.ndarray:
    """bool [Hkv, Lk]: the keys that some list of a KV head has."""
    sets = (kv_heads, 1, heads)[HEADS.index(config.heads or config.options.heads)]
    chosen = np.zeros((kv_heads, length), bool)
    ends = indptr[:: (len(indptr) - 1) // sets]
    for s in range(sets):
        part = indices[ends[s] : ends[s + 1]]
        if sets == 1:
            chosen[:, part] = True
        else:
            chosen[s * kv_heads // sets, part] = True
    return chosen


def _bits(chosen: np.ndarray, spans: Sequence[Span]) -> torch.Tensor:
    """One bit for each key of the spans and each KV head."""
    some = np.concatenate([chosen[:, s.start : s.stop] for s in spans], axis=1)
    return torch.from_numpy(np.packbits(some, axis=1).reshape(-1))


def _rows(bits: torch.Tensor, spans: Sequence[Span], heads: int) -> list[np.ndarray]:
    """For each KV head the rows of this rank's buffer that were asked for."""
    at = np.concatenate([np.arange(s.at, s.at + s.length) for s in spans])
    asked = np.unpackbits(bits.numpy().reshape(heads, -1), axis=1, count=len(at)).astype(bool)
    return [at[row] for row in asked]


def _wanted(chosen: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """The keys of the spans that were selected, in the order in which they are sent."""
    return np.concatenate([s.start + np.flatnonzero(chosen[s.start : s.stop]) for s in spans] or [np.zeros(0, int)])


def _selection(
    indptr: np.ndarray,
    indices: np.ndarray,
    query: torch.Tensor,
    key: torch.Tensor,
    config: Config,
    q_len: int,
    k_len: int,
    window: int | None = None,
) -> Selection:
    blocks = -(-q_len // config.query_block)
    return Selection._trusted(
        indptr, indices, shape=(1, (len(indptr) - 1) // blocks, blocks), query_block=config.query_block, q_len=q_len,
        k_len=k_len, window=window,
    )  # fmt: skip


# ---- layers with a window --------------------------------------------------------------------------------------------


def _windowed(
    link: Link,
    turn: Turn,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: Config,
    window: int,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, Selection, int] | None:
    layout, rank = turn.layout, link.rank
    past = sum(piece.tokens[0] for piece in layout.pieces[:-1])
    base = past - min(past, window - 1)  # the keys that one process's cache would have, of which the first is key 0
    # The first group of a block's window may begin before it.
    wide = window + GROUP * (config.chunk_size or config.options.chunk_size) if config.options.has_chunks else window
    seen = functools.partial(_seen, layout, window, wide)
    own = layout.in_call(rank, window)
    sends, receives = {}, {}
    for r in link.others():
        if wanted := seen(r, rank):
            ranges = [(at, at + run.length) for run, at in zip(wanted, places(own, wanted), strict=True)]
            sends[r] = torch.cat([x[:, :, a:b].reshape(-1) for x in (key, value) for a, b in ranges])
        if wanted := seen(rank, r):
            n = sum(run.length for run in wanted)
            receives[r] = key.new_empty(n * key.shape[1] * (key.shape[3] + value.shape[3]))
    transfer = link.exchange(sends, receives)
    count = layout.pieces[-1].tokens[0]
    first, last = queries_of(layout, rank, past, count)
    result = None
    if first < last:
        low = max(0, first - wide + 1 - base)
        k = key.new_empty(1, key.shape[1], past + count - base, key.shape[3])
        v = value.new_empty(1, key.shape[1], past + count - base, value.shape[3])
        for span in within(spans_of(layout, rank, window), [(base, last)]):
            for x, y in ((k, key), (v, value)):
                x[:, :, span.start - base : span.stop - base] = y[:, :, span.at : span.at + span.length]
        before = layout.before()[:, 0]
        for r in receives:
            data, offset = transfer.take(r), 0
            for x in (k, v):
                for run in seen(rank, r):
                    size = x.shape[1] * run.length * x.shape[3]
                    start = int(before[run.piece]) + run.start - base
                    x[:, :, start : start + run.length] = data[offset : offset + size].view(
                        1, x.shape[1], run.length, x.shape[3]
                    )
                    offset += size
        edges = edges_of(config, (), past + count - base)
        groups = np.append(edges[:-1:GROUP], edges[-1]).astype(np.int32)
        queries = tuple((first - base, last - base) if r == rank else (0, 0) for r in range(link.size))
        at = Keys((), queries, past - base, past + count - base, edges, groups, np.zeros(0))
        chunks = coarse = None
        if config.options.has_chunks:
            chunks = _Means.empty(key.shape[1], len(edges) - 1, key.shape[3], False)
            whole = np.flatnonzero((groups[:-1] >= low) & (groups[1:] <= last - base))
            coarse = _Means.empty(key.shape[1], len(groups) - 1, key.shape[3], True)
            for begin, end in _runs(whole):
                _compute(k, edges, chunks, *_chunks(at, begin, end))
                _compute(k, groups, coarse, begin, end)
            _compute(k, edges, chunks, *at.cut_chunks(rank))
        indptr, indices = _lists(at, query, k, config, chunks, coarse, options, rank, window)
        n = last - base - low
        selection = _selection(indptr, indices - np.int32(low), query, key, config, last - first, n, window)
        result = k[:, :, low : last - base], v[:, :, low : last - base], selection, first
    transfer.done()
    return result


def _seen(layout: Layout, window: int, wide: int, rank: int, holder: int) -> list[Run]:
    """What `rank` is sent by `holder`: the keys of its window, and of the groups in which that begins."""
    first, last = queries_of(layout, rank, 0, layout.pieces[-1].tokens[0])
    if first == last:
        return []
    # A rank may hold keys before those that the cache of one process would have.
    before = layout.before()[:, 0]
    base = int(before[-2]) - min(int(before[-2]), window - 1)
    held = [run._replace(start=max(run.start, base - int(before[run.piece]))) for run in layout.in_call(holder, window)]
    queries = [Run(len(layout.pieces) - 1, first, last)]
    return cover(layout, queries, [run for run in held if run.length > 0], wide)
