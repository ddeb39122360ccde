"""The safetensors format: the length of a JSON header, the header, and the bytes of tensors, side by side.

Written piece by piece, so that tensors larger than the memory can be, and read without trust: every number of a header
is checked against the others and against the size of the file before anything is made of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import IO, Any, NamedTuple

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
MAX_NUMBERS = 1 << 52


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


def read_header(file: IO[bytes], size: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """Return metadata and tensors of a file of `size` bytes; ValueError for a file that is not whole."""
    if size < 8:
        raise ValueError(f"has {size} bytes, expected a safetensors file")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise ValueError(
            f"has {size} bytes, but its header would be {length} long; it is cut short, or no safetensors file"
        )
    text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"has a header that is no JSON ({type(error).__name__}), expected a safetensors file"
        ) from None
    if not isinstance(header, dict):
        raise ValueError("has a header that is no JSON object, expected a safetensors file")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has metadata that are not strings, expected a safetensors file")
    found = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    at = 8 + length
    for name, entry in sorted(found.items(), key=lambda item: item[1][2:]):
        if entry.start != at:
            raise ValueError(
                f"has tensor {name[:80]!r} at byte {entry.start}, expected it at {at}, beside the one before it"
            )
        at = entry.stop
    if at != size:
        raise ValueError(f"has {size} bytes, expected {at} as its header says; it is cut short, or was changed")
    return metadata, found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name is there twice")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _entry(name: str, value: Any, origin: int) -> Entry:
    try:
        dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"describes tensor {name[:80]!r} wrongly, expected dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise ValueError(f"has tensor {name[:80]!r} of dtype {str(dtype)[:20]!r}, expected one of {', '.join(WIDTHS)}")
    if len(shape) > 8 or not all(type(n) is int and 0 <= n < MAX_NUMBERS for n in (*shape, start, stop)):
        raise ValueError(f"has tensor {name[:80]!r} with sizes or offsets that are no sizes")
    count = math.prod(shape)
    if count > MAX_NUMBERS or stop - start != count * WIDTHS[dtype]:
        raise ValueError(
            f"has tensor {name[:80]!r} of {stop - start} bytes, expected {count * WIDTHS[dtype]} by its shape and dtype"
        )
    return Entry(dtype, shape, origin + start, origin + stop)
