"""Attention of one rank's queries to the keys of all ranks.

In a divided piece, every rank is sent the keys and values that its queries see, once, and attends to what each rank
holds as it arrives, its own first. In a replicated piece, every rank attends the same queries to its own keys. In both,
partial results are joined by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dhsa import functional
from dhsa.config import Config
from dhsa.functional import RunStats

from .layout import Layout, Run, cover, intervals
from .link import Link

__all__ = ["Parts", "Turn", "exact", "joined", "places", "rows_of"]


class Parts(NamedTuple):
    """What a rank sends to others, receives and attends to in layers of one window."""

    own: list[Run]  # the keys that the attention function is handed, or those of them that count
    tables: list[np.ndarray]  # of the own keys
    sends: dict[int, list[tuple[int, int]]]  # {rank: [start, stop) of the own keys}
    receives: dict[int, list[Run]]


class Turn:
    """One call of the model: the layout, with the piece of this call as the last one, and what follows from it for the
    layers of each window."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.piece = layout.pieces[-1]
        self.queries = layout.queries(rank)
        self.columns = sum(run.length for run in self.queries)
        self.past = Layout(layout.ranks, layout.pieces[:-1])
        self._parts: dict[int | None, Parts] = {}
        self._known: dict[Any, Any] = {}

    def rows(self, rows: Sequence[int]) -> Turn:
        """The same call for some rows of the batch only."""
        if list(rows) == list(range(self.layout.batch)):
            return self
        return self.known(tuple(rows), lambda: Turn(self.layout.reordered(rows), self.rank))

    def pairs(self, window: int | None) -> int:
        """The visible pairs of this rank's queries and a key, in all rows."""
        total = 0
        before = self.layout.before()
        for run in self.queries if self.piece.replicated or self.piece.parts[self.rank] else []:
            at = before[run.piece][:, None] + np.arange(run.start, run.stop) + 1
            seen = np.arange(run.start, run.stop) < np.asarray(self.piece.tokens)[:, None]
            total += int((at if window is None else np.minimum(at, window))[seen].sum())
        return total

    def known(self, what: Any, find: Callable[[], Any]) -> Any:
        """What `find` returned the first time that it was asked for."""
        if what not in self._known:
            self._known[what] = find()
        return self._known[what]

    def parts(self, window: int | None) -> Parts:
        if window not in self._parts:
            self._parts[window] = self._find(window)
        return self._parts[window]

    def _find(self, window: int | None) -> Parts:
        own = self.layout.in_call(self.rank, window)
        sends, receives = {}, {}
        for rank in range(self.layout.ranks):
            if rank == self.rank or self.piece.replicated:
                continue
            if self.piece.parts[rank] and (wanted := cover(self.layout, self.layout.queries(rank), own, window)):
                sends[rank] = [(at, at + run.length) for run, at in zip(wanted, places(own, wanted), strict=True)]
            theirs = self.layout.in_call(rank, window)
            if self.piece.parts[self.rank] and (got := cover(self.layout, self.queries, theirs, window)):
                receives[rank] = got
        queries = self.queries if self.piece.replicated or self.piece.parts[self.rank] else []
        return Parts(own, intervals(self.layout, queries, own, window), sends, receives)


def places(held: Sequence[Run], wanted: Sequence[Run]) -> list[int]:
    """Where in a buffer of the columns of `held` each run of `wanted`, a part of one of them, begins."""
    found = []
    for run in wanted:
        offset = 0
        for other in held:
            if other.piece == run.piece and other.start <= run.start and run.stop <= other.stop:
                found.append(offset + run.start - other.start)
                break
            offset += other.length
    return found


def rows_of(x: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Columns of [B, H, L, D] as one contiguous tensor."""
    parts = [x[:, :, start:stop] for start, stop in ranges]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0].contiguous()


def exact(
    link: Link,
    turn: Turn,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: Config,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> RunStats:
    """Exact attention of `query` [B, H, Lq, D], the rank's columns of the piece, into `out` [B, H, Lq, E]. `key` and
    `value` [B, Hkv, m, D or E] hold what the rank held before and, behind it, the columns of this call."""
    parts = turn.parts(window)
    held = sum(run.length for run in parts.own)
    key, value = key[:, :, :held], value[:, :, :held]  # without a column that this rank only computes
    options = {"scale": scale, "softcap": softcap}
    if turn.piece.replicated:
        return _together(link, turn, query, key, value, config, parts, window, sinks, out, options)
    sends = {
        rank: torch.cat([rows_of(x, ranges).view(-1) for x in (key, value)]) for rank, ranges in parts.sends.items()
    }
    batch, heads, _, dim = key.shape
    lengths = {rank: sum(run.length for run in runs) for rank, runs in parts.receives.items()}
    receives = {rank: key.new_empty(batch * heads * n * (dim + value.shape[3])) for rank, n in lengths.items()}
    transfer = link.exchange(sends, receives)
    partial = _Partial(query, out)
    for table in parts.tables:
        partial.add(key, value, table, config, {**options, "sinks": sinks})
        sinks = None  # a sink is part of one call only: each query sees its own key, which is of the first table
    for rank, runs in parts.receives.items():
        data, n = transfer.take(rank), lengths[rank]
        k = data[: batch * heads * n * dim].view(batch, heads, n, dim)
        v = data[batch * heads * n * dim :].view(batch, heads, n, value.shape[3])
        for table in intervals(turn.layout, turn.queries, runs, window):
            partial.add(k, v, table, config, options)
    transfer.done()
    return partial.finish()


def _together(
    link: Link,
    turn: Turn,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    config: Config,
    parts: Parts,
    window: int | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    options: dict[str, Any],
) -> RunStats:
    """A replicated piece: every rank attends to its own keys and tells all others, and all join the same partial
    results in the same order, so that they go on with the same bits."""
    keeper = next(rank for rank in range(turn.layout.ranks) if turn.piece.parts[rank])
    partial = _Partial(query, out)
    own = {**options, "sinks": sinks if keeper == turn.rank else None}
    for table in parts.tables:
        partial.add(key, value, table, config, own)
        own["sinks"] = None
    holders = [
        rank
        for rank in range(turn.layout.ranks)
        if cover(turn.layout, turn.queries, turn.layout.in_call(rank, window), window)
    ]
    stats = partial.stats
    if holders == [turn.rank] and link.size == 1:
        return partial.finish()
    size = out.numel() * out.element_size()
    sends: dict[int, torch.Tensor] = {}
    mine = torch.empty(0, dtype=torch.uint8)
    if turn.rank in holders:
        total, lse = partial.result()
        mine = torch.cat(
            [total.to(out.dtype).contiguous().view(-1).view(torch.uint8), lse.reshape(-1).view(torch.uint8)]
        )
        sends = dict.fromkeys(link.others(), mine)
    receives = {
        rank: torch.empty(size + 4 * out.shape[0] * out.shape[1] * out.shape[2], dtype=torch.uint8)
        for rank in holders
        if rank != turn.rank
    }
    transfer = link.exchange(sends, receives)
    found = []
    for rank in holders:
        data = mine if rank == turn.rank else transfer.take(rank)
        found.append((data[:size].view(out.dtype).view(out.shape), data[size:].view(torch.float32).view(out.shape[:3])))
    out.copy_(joined(found))
    transfer.done()
    return stats


def joined(found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Results [.., E] of attention to disjoint sets of keys as one, weighted by their log-sum-exp [..]; float32."""
    total, lse = found[0][0].float(), found[0][1]
    for part, part_lse in found[1:]:
        both = torch.logaddexp(lse, part_lse)
        nothing = both == -torch.inf  # neither has a key; the difference of the two would be NaN
        old, new = ((one - both).exp_().masked_fill_(nothing, 0)[..., None] for one in (lse, part_lse))
        total, lse = total * old + part * new, both
    return total


class _Partial:
    """Attention that is computed one set of keys at a time, into `out`."""

    def __init__(self, query: torch.Tensor, out: torch.Tensor) -> None:
        self._query, self._out = query, out
        self._total: torch.Tensor | None = None
        self._lse: torch.Tensor | None = None
        self._first: tuple[torch.Tensor, torch.Tensor, np.ndarray, Config, dict[str, Any]] | None = None
        self.stats = RunStats("dense", 1.0, 0.0, 0.0, 0.0)

    def add(self, k: torch.Tensor, v: torch.Tensor, table: np.ndarray, config: Config, options: dict[str, Any]) -> None:
        """Adds the keys of the intervals of `table` [B, Lq, 2]."""
        seen = np.flatnonzero((table[..., 1] > table[..., 0]).any(axis=0))
        if not len(seen):
            return
        rows = slice(int(seen[0]), int(seen[-1]) + 1)
        part, lse, stats = functional.run(
            self._query[:, :, rows], k, v, config, key_ranges=np.ascontiguousarray(table[:, rows]), return_lse=True,
            **options,
        )  # fmt: skip
        self.stats = self.stats._replace(
            attend_seconds=self.stats.attend_seconds + stats.attend_seconds,
            skipped=max(self.stats.skipped, stats.skipped),
        )
        if self._total is None:
            whole = rows == slice(0, self._query.shape[2])
            if whole:
                self._total, self._lse = part.float(), lse
                return
            self._start(part.shape[3])
        assert self._total is not None
        assert self._lse is not None
        total, old = self._total[:, :, rows], self._lse[:, :, rows]
        both = torch.logaddexp(old, lse)
        nothing = both == -torch.inf
        keep, new = ((one - both).exp_().masked_fill_(nothing, 0)[..., None] for one in (old, lse))
        total.mul_(keep).add_(part * new)
        old.copy_(both)

    def _start(self, width: int) -> None:
        shape = self._query.shape[:3]
        self._total = torch.zeros((*shape, width), dtype=torch.float32)
        self._lse = torch.full(shape, -torch.inf, dtype=torch.float32)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, float32, and its log-sum-exp."""
        if self._total is None:
            self._start(self._out.shape[3])
        assert self._total is not None
        assert self._lse is not None
        return self._total, self._lse

    def finish(self) -> RunStats:
        self._out.copy_(self.result()[0])
        return self.stats
