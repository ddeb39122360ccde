"""Files that are replaced as a whole (after a crash or on a full disk, a file has its old contents or all of the new
ones), and files of JSON that are read without trust."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_json", "replacing"]


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


def read_json(path: str | os.PathLike[str], most: int) -> Any:
    """The value of a JSON file of at most `most` bytes. ValueError for anything else, for names that an object has
    twice, and for NaN and infinities, which JSON does not have; OSError for a file that cannot be read."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("is not a regular file")  # a device or a pipe might never end
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"has more than {most:,} bytes")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("no JSON: too deep") from None
    except UnicodeDecodeError:
        raise ValueError("no JSON: not in UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
