"""Results on disk: one JSON object a line, appended as they come, found again by a key of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dhsa.loading import UserError

__all__ = ["Store", "digest"]


def digest(value: Any) -> str:
    """16 hex digits of what JSON makes of a value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """The rows of a file, by key. A line that a kill left half written, or that is not what was written, is passed over
    and measured again: each line holds a digest of itself as "check" (lines of earlier releases hold none)."""

    def __init__(self, path: Path, whole: Callable[[dict[str, Any]], bool] = lambda row: True) -> None:
        """`whole`: whether a row has what it needs, for lines without a digest."""
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.damaged = 0
        try:
            lines = path.read_bytes().split(b"\n") if path.exists() else []
        except OSError as error:
            raise UserError(f"--out: {error}") from error
        self._torn = bool(lines and lines[-1])  # the file does not end with a line's end
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
        """Appends a row, which must have a "key"; it is on disk when this returns.

        Raises:
            UserError: it could not be written whole. What was written of it is taken away again, or, where that fails
            too, kept apart from the next row.
        """
        check = digest(json.loads(json.dumps(row, allow_nan=False)))  # of what a reader will find
        line = json.dumps({**row, "check": check}, allow_nan=False).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                start = file.seek(0, os.SEEK_END)
                rest = memoryview((b"\n" if self._torn else b"") + line)
                try:
                    while rest:  # a write may take less than all, as when the disk fills
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
