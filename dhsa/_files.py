"""Replaces files as a whole: after a crash or on a full disk, a file has its old contents or all of the new ones."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffix. The file there replaces that at `path` when the block ends
    without an error; otherwise the file at `path` stays as it is."""
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file():  # a plain file would replace a device or a pipe
        raise OSError(f"{path}: is not a regular file, nothing is written in its place")
    part = target.with_name(f".{os.getpid()}.{threading.get_native_id()}.{target.name}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # reports write errors of the disk
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
