"""Messages between the ranks of a group, by torch.distributed: point to point, so that a rank sends to another exactly
what it needs. The bytes are counted, and a rank that fails or stalls is named.

No port is opened beyond those of the group and its store, and nothing that is received is executed: messages hold
numbers, or JSON.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["GroupError", "Link", "Transfer", "process_group"]

MAX_FACTS = 1 << 20  # bytes of what a rank says about itself
_made: dict[str, int] = {}  # how many links each group had: what an earlier one left in the store is not read


class GroupError(RuntimeError):
    """The ranks of a group cannot go on together: one of them ended, stalled, or runs something else. The message names
    the rank and the cause."""


class Transfer:
    """Messages that are on their way. Their memory is kept until they have arrived."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._sends: list[tuple[int, Any, torch.Tensor]] = []
        self._receives: dict[int, tuple[Any, torch.Tensor]] = {}

    def take(self, source: int, timeout: float | None = None) -> torch.Tensor:
        """What rank `source` sent. `timeout`: the seconds to wait for it; None: those of the link."""
        work, buffer = self._receives.pop(source)
        self._link.wait(work, source, timeout)
        return buffer

    def done(self) -> None:
        """Waits until everything that this rank sends has been handed on."""
        for peer, work, _ in self._sends:
            self._link.wait(work, peer)
        self._sends.clear()


class Link:
    """A group of ranks, seen from one of them.

    `sent`: the bytes that this rank sent so far, without the headers of the network. `waited`: seconds spent waiting.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        self.group = process_group(group)
        self.rank, self.size = self.group.rank(), self.group.size()
        self.timeout = timeout
        self.sent, self.waited = 0, 0.0
        name = str(getattr(self.group, "group_name", ""))
        _made[name] = _made.get(name, 0) + 1
        self._place = f"dhsa/{name}/{_made[name]}"
        self._store = _store_of(self.group)
        self._waiting: tuple[int, float] | None = None  # (rank, since when)
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None

    def name(self, rank: int) -> str:
        return f"rank {dist.get_global_rank(self.group, rank)}"

    # ---- messages ------------------------------------------------------------------------------------------------

    def exchange(self, sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor]) -> Transfer:
        """Begins to send contiguous tensors to ranks, and to receive into others, one message for each pair of ranks.
        Empty tensors are not sent; the other side must not wait for them."""
        transfer = Transfer(self)
        for rank, buffer in receives.items():
            transfer._receives[rank] = (self._call(rank, self.group.recv, buffer), buffer)
        for rank, data in sends.items():
            transfer._sends.append((rank, self._call(rank, self.group.send, data), data))
            self.sent += data.numel() * data.element_size()
        return transfer

    def _call(self, rank: int, function: Callable[..., Any], tensor: torch.Tensor) -> Any:
        try:
            return function([tensor.view(-1).view(torch.uint8)], rank, 0)
        except RuntimeError as error:
            raise self._failed(rank, error, 0.0) from error

    def wait(self, work: Any, rank: int, timeout: float | None = None) -> None:
        """Waits for a message from or to `rank`. Raises GroupError if it does not come within the time limit, that of
        the link or `timeout`."""
        if self._watch is None or self._closed.is_set():  # also after `close`, when the model is patched again
            self._closed = threading.Event()
            self._watch = threading.Thread(target=self._report, name="dhsa-watch", daemon=True)
            self._watch.start()
        start = time.monotonic()
        self._waiting = (rank, start)
        try:
            work.wait(timedelta(seconds=self.timeout if timeout is None else timeout))
        except RuntimeError as error:
            raise self._failed(rank, error, time.monotonic() - start) from error
        finally:
            self._waiting = None
            self.waited += time.monotonic() - start

    def others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def gather(self, data: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of every rank, all of one shape, in the order of the ranks."""
        transfer = self.exchange(
            dict.fromkeys(self.others(), data), {rank: torch.empty_like(data) for rank in self.others()}
        )
        found = [data if rank == self.rank else transfer.take(rank) for rank in range(self.size)]
        transfer.done()
        return found

    def told(self, value: Any, timeout: float | None = None) -> Any:
        """`value` of rank 0, as JSON can hold it, on all ranks. `timeout`: the seconds to wait for it."""
        if self.rank == 0:
            data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
            for part in (torch.tensor([data.numel()]), data):
                self.exchange(dict.fromkeys(self.others(), part), {}).done()
            return value
        size = int(self.exchange({}, {0: torch.zeros(1, dtype=torch.int64)}).take(0, timeout))
        return json.loads(bytes(self.exchange({}, {0: torch.empty(size, dtype=torch.uint8)}).take(0).numpy()))

    def agree(self, what: str, facts: Mapping[str, Any], equal: frozenset[str] | None = None) -> list[dict[str, Any]]:
        """What every rank says. Raises GroupError, which names the ranks that say something else than most, if a fact
        of `equal` (None: any) is not the same on all ranks. `what` begins the message."""
        data = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.gather(torch.tensor([data.numel()]))]
        if max(sizes) > MAX_FACTS:
            large = sizes.index(max(sizes))
            raise GroupError(
                f"{what}: {self.name(large)} announces {max(sizes):,} bytes, expected at most {MAX_FACTS:,}"
            )
        transfer = self.exchange(
            dict.fromkeys(self.others(), data),
            {rank: torch.empty(sizes[rank], dtype=torch.uint8) for rank in self.others()},
        )
        found = [
            dict(facts) if r == self.rank else json.loads(bytes(transfer.take(r).numpy())) for r in range(self.size)
        ]
        transfer.done()
        for name in facts if equal is None else (name for name in facts if name in equal):
            self._compare(what, name, [json.dumps(said.get(name), sort_keys=True) for said in found])
        return found

    def _compare(self, what: str, name: str, said: list[str]) -> None:
        if len(set(said)) == 1:
            return
        usual = max(set(said), key=lambda one: (said.count(one), -said.index(one)))
        others = [rank for rank, one in enumerate(said) if one != usual]
        different = "; ".join(f"{self.name(rank)} has {_short(said[rank])}" for rank in others)
        message = f"{what}: {name} is {_short(usual)} on {self.name(said.index(usual))}, but {different}"
        self.end(message, others[0])
        raise GroupError(message)

    # ---- faults --------------------------------------------------------------------------------------------------

    def end(self, why: str, culprit: int | None = None) -> None:
        """Tells the other ranks, for their messages, why this one does not go on."""
        self._note("ended", {"why": why, "rank": culprit})

    def close(self) -> None:
        self._closed.set()

    def _note(self, kind: str, note: dict[str, Any] | None) -> None:
        with contextlib.suppress(Exception):  # the store may have gone with the rank that failed
            if self._store is not None:
                self._store.set(self._key(kind, self.rank), json.dumps(note))

    def _key(self, kind: str, rank: int) -> str:
        return f"{self._place}/{kind}/{rank}"

    def _noted(self, kind: str, rank: int) -> dict[str, Any] | None:
        with contextlib.suppress(Exception):
            key = self._key(kind, rank)
            if self._store is not None and self._store.check([key]):
                return dict(json.loads(self._store.get(key)))
        return None

    def _report(self) -> None:
        """Notes in the store which rank this one waits for, once it has waited a while, so that others can tell the
        rank that stalls from those that wait for it."""
        told, closed = None, self._closed
        while not closed.wait(min(1.0, self.timeout / 8)):
            waiting = self._waiting
            if waiting is not None and waiting != told and time.monotonic() - waiting[1] > min(1.0, self.timeout / 8):
                self._note("waits", {"rank": waiting[0], "since": time.time()})
                told = waiting

    def _failed(self, rank: int, error: RuntimeError, seconds: float) -> GroupError:
        """The error of a rank that waited in vain for `rank`: it names the rank at the end of the chain of those that
        wait for each other."""
        stalled = seconds >= 0.9 * self.timeout
        culprit, why = rank, ""
        seen = {self.rank}
        deadline = time.monotonic() + min(3.0, self.timeout)
        while culprit not in seen:
            seen.add(culprit)
            ended = self._noted("ended", culprit)
            while ended is None and not stalled and time.monotonic() < deadline:
                time.sleep(0.05)
                ended = self._noted("ended", culprit)
            if ended is not None:
                why = str(ended["why"])
                if ended["rank"] is None or ended["rank"] == self.rank:
                    break
                culprit = int(ended["rank"])
                continue
            waits = self._noted("waits", culprit) if stalled else None
            if waits is None or time.time() - waits["since"] > self.timeout + 10:
                break
            culprit = int(waits["rank"])
        if culprit in (self.rank, rank) or not why:
            own = "sent nothing for" if stalled else ""
            cause = (
                f"{own} {self.timeout:g} seconds; it stalls, or the network does"
                if stalled
                else "closed its connection: its process ended, or its network failed"
            )
            why = why or f"{self.name(culprit)} {cause}"
        self.end(why, culprit)
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return GroupError(f"{self.name(self.rank)} cannot go on: {why} ({first})")


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."


def process_group(group: Any) -> Any:
    """The ProcessGroup of `group`, which may be a DeviceMesh of one dimension. Raises TypeError or ValueError."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError("group: torch.distributed is not initialized; call torch.distributed.init_process_group first")
    if hasattr(group, "get_group") and hasattr(group, "mesh"):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected a DeviceMesh of one dimension, got {group.ndim}; take one of them, as in mesh['cp']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup or a DeviceMesh, got {type(group).__name__}")
    if group.rank() < 0:
        raise ValueError("group: this process is no rank of it")
    backend = dist.get_backend(group)
    if "gloo" not in str(backend):
        raise ValueError(f"group: its backend is {backend!r}, expected 'gloo', which moves tensors of the CPU")
    return group


def _store_of(group: Any) -> Any:
    """The store of the process group; None in a release of torch that has it elsewhere: errors then name the rank that
    this one waited for."""
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    try:
        return None if find is None else find()
    except (RuntimeError, ValueError):
        return None
