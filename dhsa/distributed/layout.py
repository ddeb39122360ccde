"""Where the tokens of a prompt are: which rank computes and holds which of them. Plain arithmetic without torch, which
every rank does for all ranks alike, so that nothing about it has to be sent.

The tokens of each call of a model are a *piece*. Batch rows are moved to the left so that each begins in column 0 of
its piece, whatever padding was before it; a row with fewer tokens than the piece has columns ends in empty columns.
A rank holds *runs* of columns of the pieces, in order. The keys of a row are its tokens of all pieces, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["REPLICATED", "Layout", "Piece", "Run", "cover", "intervals", "split"]

# A piece of at most this many tokens is computed by every rank, and one of them keeps its keys: a decoding step, or a
# short turn of a conversation. More tokens are divided.
REPLICATED = 64
# A rank keeps the keys of replicated pieces until it holds this many more than another rank.
STICKY = 64


class Run(NamedTuple):
    """Columns [start, stop) of a piece."""

    piece: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class Piece(NamedTuple):
    """The tokens of one call. `tokens`: how many each batch row has. `parts`: for each rank the columns [start, stop)
    that it holds, ascending. `replicated`: all ranks compute all columns."""

    tokens: tuple[int, ...]
    parts: tuple[tuple[tuple[int, int], ...], ...]
    replicated: bool

    @property
    def columns(self) -> int:
        return max(self.tokens)

    @property
    def even(self) -> bool:
        """Whether all rows have the same number of tokens."""
        return min(self.tokens) == max(self.tokens)


def split(columns: int, ranks: int, unit: int, balanced: bool) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Parts of `columns`, cut at multiples of `unit`. Each rank gets neighbouring units or, if `balanced`, two runs of
    them, one from each end of the piece, so that all ranks have as many pairs of a query and an earlier key. With fewer
    units than ranks some get none."""
    units = -(-columns // unit)
    share = 2 * ranks if balanced and units >= 2 * ranks else ranks
    edges = [min(columns, units * i // share * unit) for i in range(share + 1)]
    parts = []
    for rank in range(ranks):
        slots = (rank,) if share == ranks else (rank, share - 1 - rank)
        runs = [(edges[i], edges[i + 1]) for i in slots if edges[i] < edges[i + 1]]
        if len(runs) == 2 and runs[0][1] == runs[1][0]:
            runs = [(runs[0][0], runs[1][1])]
        parts.append(tuple(runs))
    return tuple(parts)


class Layout(NamedTuple):
    """The pieces of a sequence so far, for all ranks."""

    ranks: int
    pieces: tuple[Piece, ...] = ()

    @property
    def batch(self) -> int:
        return len(self.pieces[0].tokens) if self.pieces else 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The number of tokens of each batch row."""
        return tuple(map(sum, zip(*(piece.tokens for piece in self.pieces), strict=True))) if self.pieces else ()

    @property
    def columns(self) -> int:
        """The length of the sequence as the model counts it, with padding."""
        return sum(piece.columns for piece in self.pieces)

    @property
    def even(self) -> bool:
        return all(piece.even for piece in self.pieces)

    def before(self) -> np.ndarray:
        """int64 [pieces + 1, B]: the number of tokens of a row in the pieces before each one."""
        sums = np.zeros((len(self.pieces) + 1, max(1, self.batch)), np.int64)
        for i, piece in enumerate(self.pieces):
            sums[i + 1] = sums[i] + piece.tokens
        return sums

    def held(self, rank: int, last: int | None = None) -> list[Run]:
        """The runs whose keys a rank holds; the last `last` columns of them, as in a layer with a window."""
        runs = [Run(i, *part) for i, piece in enumerate(self.pieces) for part in piece.parts[rank]]
        return runs if last is None else ending(runs, last)

    def in_call(self, rank: int, window: int | None) -> list[Run]:
        """The runs whose keys the attention of a rank is handed in the call of the last piece: what it holds of the
        pieces before, of which layers with a window keep the last `window` - 1 columns, and its part of the last."""
        past = self._replace(pieces=self.pieces[:-1])
        new = [Run(len(self.pieces) - 1, *part) for part in self.pieces[-1].parts[rank]]
        return past.held(rank, None if window is None else window - 1) + new

    def queries(self, rank: int) -> list[Run]:
        """The columns of the last piece that a rank computes. A rank that has none computes the first one for nothing:
        no layer takes a sequence of no tokens."""
        at, piece = len(self.pieces) - 1, self.pieces[-1]
        if piece.replicated:
            return [Run(at, 0, piece.columns)]
        return [Run(at, *part) for part in piece.parts[rank]] or [Run(at, 0, 1)]

    def load(self, rank: int) -> int:
        """The number of columns that a rank holds."""
        return sum(run.length for run in self.held(rank))

    def extended(self, tokens: Sequence[int], *, unit: int, balanced: bool, whole: bool) -> Layout:
        """This layout with another piece. `whole`: a piece of at most REPLICATED columns may be replicated."""
        columns = max(tokens)
        if whole and columns <= REPLICATED:
            keeper = self._keeper()
            parts = tuple(((0, columns),) if rank == keeper else () for rank in range(self.ranks))
            piece = Piece(tuple(tokens), parts, True)
        else:
            piece = Piece(tuple(tokens), split(columns, self.ranks, unit, balanced), False)
        return Layout(self.ranks, (*self.pieces, piece))

    def _keeper(self) -> int:
        loads = [self.load(rank) for rank in range(self.ranks)]
        least = min(range(self.ranks), key=lambda rank: (loads[rank], rank))
        last = self.pieces[-1] if self.pieces else None
        if last is not None and last.replicated:
            keeper = next(rank for rank in range(self.ranks) if last.parts[rank])
            if loads[keeper] < loads[least] + STICKY:
                return keeper
        return least

    def reordered(self, rows: Iterable[int]) -> Layout:
        """The layout of a cache whose batch rows are those of `rows`."""
        rows = list(rows)
        return self._replace(pieces=tuple(p._replace(tokens=tuple(p.tokens[row] for row in rows)) for p in self.pieces))


def ending(runs: list[Run], last: int) -> list[Run]:
    """The last `last` columns of runs."""
    found: list[Run] = []
    for run in reversed(runs):
        if last <= 0:
            break
        found.append(run._replace(start=max(run.start, run.stop - last)))
        last -= run.length
    return found[::-1]


def intervals(layout: Layout, queries: Sequence[Run], keys: Sequence[Run], window: int | None) -> list[np.ndarray]:
    """The keys that queries see, as tables int32 [B, Lq, 2] of intervals [start, stop) of a buffer that holds the
    columns of `keys`, one run after the other. A query sees the keys of its row up to its own, within `window`; one in
    an empty column sees none. There are as many tables as a query has intervals that are apart, and none without a
    visible key."""
    before = layout.before()
    batch = before.shape[1]
    tables: list[np.ndarray] = []
    position, real = [], []
    for run in queries:
        column = np.arange(run.start, run.stop)
        position.append(before[run.piece][:, None] + column)
        real.append(column < np.asarray(layout.pieces[run.piece].tokens)[:, None])
    at = np.concatenate(position, axis=1) if position else np.zeros((batch, 0), np.int64)
    seen = np.concatenate(real, axis=1) if real else np.zeros((batch, 0), bool)
    offset = 0
    for run in keys:
        base = before[run.piece][:, None]
        tokens = np.asarray(layout.pieces[run.piece].tokens)[:, None]
        stop = np.minimum(np.minimum(run.stop, tokens), at + 1 - base)
        start = np.full_like(stop, run.start)
        if window is not None:
            start = np.maximum(start, at - window + 1 - base)
        some = seen & (stop > start)
        if some.any():
            table = np.where(some[..., None], np.stack([start, stop], -1) - run.start + offset, 0).astype(np.int32)
            if not tables or not _join(tables[-1], table):
                tables.append(table)
        offset += run.length
    return tables


def _join(left: np.ndarray, right: np.ndarray) -> bool:
    """Adds the intervals of `right` to those of `left`, if none is apart from it; returns whether it did."""
    none, nothing = left[..., 1] == left[..., 0], right[..., 1] == right[..., 0]
    if not (none | nothing | (left[..., 1] == right[..., 0])).all():
        return False
    left[..., 0] = np.where(none, right[..., 0], left[..., 0])
    left[..., 1] = np.where(nothing, left[..., 1], right[..., 1])
    return True


def cover(layout: Layout, queries: Sequence[Run], keys: Sequence[Run], window: int | None) -> list[Run]:
    """The parts of `keys` that some query sees, in order."""
    found: list[Run] = []
    for run in keys:
        seen = np.zeros(run.length + 1, np.int64)
        for some in queries:  # apart: the keys between the windows of two runs of queries are not needed
            for table in intervals(layout, [some], [run], window):
                visible = table[table[..., 1] > table[..., 0]]
                seen[visible[:, 0].min()] += 1
                seen[visible[:, 1].max()] -= 1
        edge = np.diff(np.concatenate([[0], (seen.cumsum()[:-1] > 0).astype(np.int8), [0]]))
        for start, stop in zip(np.flatnonzero(edge > 0), np.flatnonzero(edge < 0), strict=True):
            found.append(Run(run.piece, run.start + int(start), run.start + int(stop)))
    return found
