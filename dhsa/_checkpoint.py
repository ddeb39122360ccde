"""Reads state dicts from PyTorch checkpoints (zip format) without torch and without executing what they contain.

A checkpoint is a pickle, and a pickle is a program. The unpickler here knows a handful of names (ordered dicts,
storages, the two functions that make tensors) and refuses every other one before anything is called.

`torch.load(weights_only=True)` executes no code either, but it refuses less (tried with torch 2.6, 2.13 and 2.14):

- It hashes tuples of shared tuples, which takes exponential time: a pickle of 1 KB keeps it busy without end.
- It copies a dict as often as the pickle says: a file of 250 KB takes 380 MiB and 7 to 12 seconds.
- torch 2.6 makes a storage of 256 bytes from a member of 100 bytes, without an error.
- It reads members whose checksum is wrong, and compressed ones (a file of 260 KB takes 256 MiB).

The directory of the archive shows only the last of these. For the others the pickle must be understood, as here.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MAX_PICKLE_BYTES = 4 << 20  # a state dict's pickle holds names and shapes only; a predictor's is a few kilobytes
MAX_STORAGE_BYTES = 4 << 30  # of a storage, and of all tensors together as float32
MAX_TUPLES_AGAIN = 16  # uses of earlier tuples: tuples of shared tuples take exponential time to hash
UNUSED_OPCODES = {"DUP", "POP", "POP_MARK", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "FROZENSET"}
UNUSED_OPCODES |= {"NEXT_BUFFER", "READONLY_BUFFER"}
# Opcodes whose result on the stack is never a tuple.
NO_TUPLE = {"BINUNICODE", "SHORT_BINUNICODE", "GLOBAL", "STACK_GLOBAL", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET"}
NO_TUPLE |= {"BINPERSID", "REDUCE"}

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


# Exceptions that damaged files cause. OSError (no such file) is raised as it is, except EINVAL, which a seek to before
# the file causes.
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
    RuntimeError,  # zipfile, of an encrypted member; RecursionError; NotImplementedError
    struct.error,
)


class _StorageType:
    """Stands for a torch storage class inside the pickle; cannot be called."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class _Function:
    """A function that a pickle can call. Setting attributes on it raises."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes of a function")


class _OrderedDict(OrderedDict):
    """Ignores attributes: torch stores versions of modules there, which are not needed, and each would be a copy."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, program: bytes, archive: zipfile.ZipFile, root: str, byte_order: str):
        super().__init__(io.BytesIO(program))
        self.items = len(program)  # limit on the items of all dicts made; without copies there are fewer
        self.archive, self.root, self.byte_order = archive, root, byte_order
        self.storages: dict[str, np.ndarray] = {}
        assert archive.fp is not None  # it is open
        self.room = os.fstat(archive.fp.fileno()).st_size  # members are stored uncompressed, one after the other

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Function(self.ordered_dict)
        if module == "torch" and name in STORAGES:
            return _StorageType(name)
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _Function(lambda *args: rebuild_tensor(*args[:4]))
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _Function(lambda *args: rebuild_parameter(*args[:1]))
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only tensors and plain containers are read")

    def ordered_dict(self, items: Any = ()) -> OrderedDict:
        self.items -= len(items)
        if self.items < 0:
            raise pickle.UnpicklingError("it copies dicts again and again")
        return _OrderedDict(items)

    def persistent_load(self, pid: Any) -> np.ndarray:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError("it holds a reference that is no tensor storage")
        _, kind, key, _location, count = pid
        if not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError("it holds a malformed storage reference")
        if key not in self.storages:
            dtype = STORAGES[kind.name]
            width = np.dtype(dtype).itemsize if dtype else 2
            limit = min(count * width, MAX_STORAGE_BYTES, self.room)
            data = read_member(self.archive, f"{self.root}/data/{key}", limit)
            self.room -= len(data)
            if len(data) != count * width:
                raise pickle.UnpicklingError(f"storage {key} holds {len(data)} bytes, not {count * width}")
            if dtype is None:
                wide = np.frombuffer(data, self.byte_order + "u2").astype(np.uint32) << 16
                self.storages[key] = wide.view(np.float32)
            else:
                self.storages[key] = np.frombuffer(data, self.byte_order + dtype)
        return self.storages[key]


def rebuild_parameter(data: Any) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise pickle.UnpicklingError("it holds a malformed parameter")
    return data


def rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> np.ndarray:
    """torch's strided tensor over a storage, as a read-only view. Raises if it reaches outside of the storage."""
    if not isinstance(storage, np.ndarray) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise pickle.UnpicklingError("it holds a malformed tensor")
    if len(shape) != len(stride) or len(shape) > 8:
        raise pickle.UnpicklingError("it holds a tensor with malformed shape or strides")
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *stride)):
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
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


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
            program = read_member(archive, pickles[0], MAX_PICKLE_BYTES)
            check_pickle(program)
            contents = _Unpickler(program, archive, root, ">" if big else "<").load()
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path}: refused as a checkpoint: {str(error) or type(error).__name__}") from None
    found = find_state_dict(contents, anchors, 3)
    if found is None:
        raise ValueError(f"{path}: holds no state dict with {' or '.join(anchors)}")
    total = 0
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            what = repr(name[:80]) if isinstance(name, str) else f"a key of type {type(name).__name__}"
            raise ValueError(f"{path}: refused as a checkpoint: its state dict has {what}, which is no named tensor")
        total += 4 * value.size
        if total > MAX_STORAGE_BYTES:  # tensors may share a storage, so the size of the file is no limit
            raise ValueError(
                f"{path}: refused as a checkpoint: its tensors take more than {MAX_STORAGE_BYTES} bytes as float32"
            )
    return dict(found)


def check_pickle(program: bytes) -> None:
    """Raises, before the pickle is run, if it would take memory or time out of proportion to its size.

    The unpickler's memo is an array as long as its largest index, so indices must be as small as a pickler makes them.
    Byte arrays are allocated before their contents are read, so the contents must be present.
    """
    stored: set[int] = set()
    suspect: set[int] = set()  # memo indices of objects that may be tuples
    again, before = 0, ""
    argument: Any  # its type depends on the opcode
    for opcode, argument, _ in pickletools.genops(program):
        name = opcode.name
        if name in UNUSED_OPCODES:
            raise pickle.UnpicklingError(f"its pickle has the opcode {name}, which torch never writes")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(stored) if name == "MEMOIZE" else int(argument)
            if not 0 <= index <= len(stored) + 1:
                raise pickle.UnpicklingError(f"its pickle numbers an object {index} after {len(stored)} others")
            stored.add(index)
            if before not in NO_TUPLE:
                suspect.add(index)
        elif name in ("GET", "BINGET", "LONG_BINGET") and int(argument) in suspect:
            again += 1
            if again > MAX_TUPLES_AGAIN:
                raise pickle.UnpicklingError(f"its pickle shares tuples more than {MAX_TUPLES_AGAIN} times")
        before = name


def find_state_dict(contents: Any, anchors: tuple[str, ...], depth: int) -> Mapping[str, Any] | None:
    """The first mapping with an anchor in `depth` levels of mappings, outer levels first. Each is searched once."""
    level, seen = [contents], {id(contents)}
    for _ in range(depth):
        inner = []
        for mapping in level:
            if not isinstance(mapping, Mapping):
                continue
            if any(isinstance(name, str) and name.endswith(anchors) for name in mapping):
                return mapping
            for value in mapping.values():
                if isinstance(value, Mapping) and id(value) not in seen:
                    seen.add(id(value))
                    inner.append(value)
        level = inner
    return None
