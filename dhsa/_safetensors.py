"""The safetensors format: the length of a JSON header, the header, and the bytes of tensors, side by side.

Written piece by piece, so that tensors larger than the memory can be, and with bytes that no tensor has yet as holes of
the file; the library of the format does neither. It checks files that are read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

from dhsa._files import replacing

__all__ = ["WIDTHS", "Entry", "TooLargeError", "read_header", "write"]

WIDTHS = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I8": 1,
    "U8": 1,
}  # bytes of a number of each dtype that is used here
MAX_HEADER = 16 << 20  # a cache of 200 layers needs 200 KiB
ALIGNMENT = 64  # of the first tensor, in the file


class Entry(NamedTuple):
    """A tensor in a file: its dtype as the format names it, its shape, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TooLargeError(OSError):
    """A file would have `size` bytes, which are more than allowed."""

    def __init__(self, size: int, most: int) -> None:
        super().__init__(f"the file would have {size:,} bytes, expected at most {most:,}")
        self.size = size


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[str, tuple[int, ...], Iterable[Any]]],
    metadata: Mapping[str, str],
    max_bytes: int | None = None,
) -> None:
    """Write a file in place of what is at `path`; if that fails, what was there stays.

    Args:
        path: the file.
        tensors: dtype, shape and pieces of each tensor, in the order of the file. A piece is a buffer of bytes, or the
            number of zero bytes that stand in its place; they take no room on file systems that have sparse files.
        metadata: of the header.
        max_bytes: the most that the file may have. None: no limit.

    Raises:
        TooLargeError: the file would have more than `max_bytes`. Nothing is written.
        OSError: the file cannot be written.
    """
    at, header = 0, dict[str, Any](__metadata__=dict(metadata))
    for name, (dtype, shape, _) in tensors.items():
        stop = at + math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    size = 8 + len(text) + at
    if max_bytes is not None and size > max_bytes:
        raise TooLargeError(size, max_bytes)
    with replacing(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, pieces in tensors.values():
            for piece in pieces:
                if isinstance(piece, int):
                    file.seek(piece, os.SEEK_CUR)
                else:
                    file.write(piece)
        assert file.tell() == size
        file.truncate(size)  # a seek at the end has not made the file longer


def read_header(file: BinaryIO) -> tuple[dict[str, str], dict[str, Entry]]:
    """Return metadata and tensors of a file that was opened by its path; ValueError for a file that is not whole.

    The library of the format checks the file, tensors that lie side by side up to its end included, but does not tell
    where they lie. That is read here.
    """
    from safetensors import SafetensorError, safe_open

    length = int.from_bytes(file.read(8), "little")
    try:
        if length > MAX_HEADER:  # the library takes longer ones, which would be large objects here
            raise ValueError(f"its header would have {length:,} bytes")
        with safe_open(os.fsdecode(file.name), framework="np"):
            pass
        header = json.loads(file.read(length).decode())
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: _entry(about, 8 + length) for name, about in header.items()}
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"is cut short, was changed or is no safetensors file, expected a whole one: {error}"
        ) from None
    if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
        raise ValueError("was replaced while it was opened; open it again")
    return metadata, entries


def _entry(about: dict[str, Any], origin: int) -> Entry:
    start, stop = about["data_offsets"]
    return Entry(about["dtype"], tuple(about["shape"]), origin + start, origin + stop)
