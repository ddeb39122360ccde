"""Reads state dicts out of PyTorch checkpoints (zip format) without torch and without executing what they contain.

A checkpoint is a pickle, and a pickle is a program. The unpickler here knows a handful of names (ordered dicts,
storages, the two functions that make tensors) and refuses every other one before anything is called.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_PICKLE_BYTES = 16 << 20  # a state dict's pickle holds names and shapes only; a predictor's is a few kilobytes
MAX_STORAGE_BYTES = 4 << 30

# Storage classes and how NumPy reads them; None: bfloat16, which NumPy lacks.
STORAGES: dict[str, str | None] = {
    "FloatStorage": "f4",
    "DoubleStorage": "f8",
    "HalfStorage": "f2",
    "BFloat16Storage": None,
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


# What reading garbage can raise; OSError (no such file) passes through.
_DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
)


class _StorageType:
    """Stands for a torch storage class inside the pickle; cannot be called."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str, byte_order: str):
        super().__init__(file)
        self.archive, self.root, self.byte_order = archive, root, byte_order
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        # Made anew for each load: a pickle may set attributes on what it is given.
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return _StorageType(name)
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, stride, *rest: rebuild_tensor(storage, offset, shape, stride)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *rest: data
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only tensors and plain containers are read")

    def persistent_load(self, pid: Any) -> np.ndarray:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError("it holds a reference that is no tensor storage")
        _, kind, key, _location, count = pid
        if not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError("it holds a malformed storage reference")
        if key not in self.storages:
            dtype = STORAGES[kind.name]
            width = np.dtype(dtype).itemsize if dtype else 2
            data = read_member(self.archive, f"{self.root}/data/{key}", min(count * width, MAX_STORAGE_BYTES))
            if len(data) != count * width:
                raise pickle.UnpicklingError(f"storage {key} holds {len(data)} bytes, not {count * width}")
            if dtype is None:
                wide = np.frombuffer(data, self.byte_order + "u2").astype(np.uint32) << 16
                self.storages[key] = wide.view(np.float32)
            else:
                self.storages[key] = np.frombuffer(data, self.byte_order + dtype)
        return self.storages[key]


def rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> np.ndarray:
    """torch's strided tensor over a storage, as a copy; refuses to reach outside of it."""
    if not isinstance(storage, np.ndarray) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("it holds a malformed tensor")
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("it holds a tensor with malformed shape or strides")
    last, count = offset, 1
    for size, step in zip(shape, stride, strict=True):
        last += (size - 1) * step
        count *= size
    if count == 0:
        return np.empty(shape, storage.dtype)
    if last >= storage.size or count > storage.size:
        raise pickle.UnpicklingError("it holds a tensor that reaches outside of its storage")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False).copy()


def read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise pickle.UnpicklingError(f"it lacks {name}") from None
    if info.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is compressed, which torch never does")
    if info.file_size > limit:
        raise pickle.UnpicklingError(f"{name} has {info.file_size} bytes, more than the {limit} expected")
    return archive.read(info)


def read_checkpoint(path: str, anchors: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The state dict in the checkpoint at `path`: the dict, at the top or nested under string keys, that has a key
    ending with one of `anchors`.

    Raises:
        ValueError: damaged, or holds anything but tensors and plain containers, or no such dict.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise pickle.UnpicklingError("it has no single data.pkl, so it is no torch.save file")
            root = pickles[0].partition("/")[0]
            big = f"{root}/byteorder" in archive.namelist() and read_member(archive, f"{root}/byteorder", 16) == b"big"
            # archive.open, not read: pickle reads on demand, but never past the size checked here.
            read_member(archive, pickles[0], MAX_PICKLE_BYTES)
            with archive.open(pickles[0]) as file:
                contents = _Unpickler(file, archive, root, ">" if big else "<").load()
    except _DAMAGE as error:
        raise ValueError(f"{path}: refused as a checkpoint: {str(error) or type(error).__name__}") from None
    found = find_state_dict(contents, anchors, 3)
    if found is None:
        raise ValueError(f"{path}: holds no state dict with {' or '.join(anchors)}")
    return {str(name): value for name, value in found.items()}


def find_state_dict(contents: Any, anchors: tuple[str, ...], depth: int) -> Mapping[str, Any] | None:
    if not isinstance(contents, Mapping) or depth == 0:
        return None
    if any(isinstance(name, str) and name.endswith(anchors) for name in contents):
        return contents
    for value in contents.values():
        found = find_state_dict(value, anchors, depth - 1)
        if found is not None:
            return found
    return None
