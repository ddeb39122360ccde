"""Results on disk: one JSON object a line, appended as they are measured, found by a key of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dhsa.commands import UserError

__all__ = ["Follower", "Store", "digest"]


def digest(value: Any) -> str:
    """Return 16 hexadecimal digits of the JSON text of a value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The rows of a file, by key.

    Each line holds a digest of itself as "check" (lines of earlier releases hold none). A line that is incomplete or
    damaged is skipped and measured again.
    """

    def __init__(self, path: Path, whole: Callable[[dict[str, Any]], bool] = lambda row: True) -> None:
        """`whole`: whether a row has all its fields, for lines without a digest."""
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.damaged = 0
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        except OSError as error:
            raise UserError(f"--out: {error}") from error
        self._torn = bool(lines and lines[-1])  # the file does not end with a newline
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                check = row.pop("check", None)
                if not (whole(row) if check is None else check == digest(row)):
                    raise ValueError
                self.rows[row["key"]] = row
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                self.damaged += 1

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, which must have a "key". It is on disk when this returns.

        Raises:
            UserError: the row could not be written completely. The part that was written is removed, or, where that
                fails too, separated from the next row.
        """
        check = digest(json.loads(json.dumps(row, allow_nan=False)))  # of the values as a reader parses them
        line = json.dumps({**row, "check": check}, allow_nan=False).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                start = file.seek(0, os.SEEK_END)
                rest = memoryview((b"\n" if self._torn else b"") + line)
                try:
                    while rest:  # a write may be incomplete, as when the disk is full
                        rest = rest[file.write(rest) :]
                    os.fsync(file.fileno())
                except OSError:
                    if len(rest) < len(line):
                        self._torn = True
                    file.truncate(start)
                    raise
        except OSError as error:
            raise UserError(f"--out: {error}") from error
        self._torn = False
        self.rows[row["key"]] = row


class Follower(Store):
    """The store of a process that measures with another one, which writes: it has the keys, and writes nothing."""

    def __init__(self, path: Path, keys: Iterable[str]) -> None:
        self.path, self.damaged = path, 0
        self.rows = {key: {} for key in keys}

    def add(self, row: dict[str, Any]) -> None:
        """Note that there is a row with this key."""
        self.rows[row["key"]] = row
