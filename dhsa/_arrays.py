"""Which kind of array came in (NumPy, torch, other DLPack libraries) and how results of the same kind are made.

Checks here are the ones the C core cannot make: device, autograd, mixed kinds. Shapes and dtypes are checked in C.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import numpy as np

from dhsa import _core

Array = Any  # a NumPy array, a torch tensor, or an array of any library with DLPack and the array API namespace


def type_name(value: object) -> str:
    return type(value).__name__


def check_int(value: object, name: str, low: int, high: int | None = None) -> int:
    """`value` as an int in low..high; TypeError or ValueError naming the argument otherwise. Bools are refused."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type_name(value)}") from None
    if number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


class NumpyKind:
    """NumPy arrays in, NumPy arrays out."""

    name = "a NumPy array"

    @staticmethod
    def accept(x: Array, name: str) -> Array:
        if type(x) is np.ndarray:
            return x
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}: expected a NumPy array like the other arguments, got {type_name(x)}")
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name}: masked arrays are not supported, their mask would be lost")
        return x

    @staticmethod
    def empty_like(x: Array) -> Array:
        return np.empty(x.shape, x.dtype)

    @staticmethod
    def empty_lse(x: Array) -> Array:
        return np.empty(x.shape[:-1], np.float32)

    @staticmethod
    def result(x: Array) -> Array:
        return x


class TorchKind:
    """torch CPU tensors in and out. Only ever used with torch imported by the caller."""

    name = "a torch tensor"

    @staticmethod
    def accept(x: Array, name: str) -> Array:
        torch = sys.modules["torch"]
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch tensor like the other arguments, got {type_name(x)}")
        if not x.is_cpu:
            raise ValueError(f"{name}: expected a tensor on the CPU, got one on device '{x.device}'")
        if x.layout is not torch.strided or x.is_quantized:
            kind = "quantized" if x.is_quantized else str(x.layout)
            raise ValueError(f"{name}: expected a dense tensor, got a {kind} one")
        if x.requires_grad:
            if torch.is_grad_enabled():
                raise NotImplementedError(
                    f"{name}: requires grad, but there is no backward pass (prefill only); use torch.no_grad()"
                )
            x = x.detach()
        if x.is_neg():  # a lazy minus sign that the memory does not show
            x = x.resolve_neg()
        return x

    @staticmethod
    def empty_like(x: Array) -> Array:
        torch = sys.modules["torch"]
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def empty_lse(x: Array) -> Array:
        torch = sys.modules["torch"]
        return torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")

    @staticmethod
    def result(x: Array) -> Array:
        return sys.modules["torch"].from_numpy(x)


class DlpackKind:
    """Arrays of any other library that follows the array API standard: read by DLPack, results by its from_dlpack."""

    def __init__(self, namespace: Any):
        self.namespace = namespace
        self.name = f"an array of {getattr(namespace, '__name__', namespace)}"

    def accept(self, x: Array, name: str) -> Array:
        if not hasattr(x, "__dlpack__") or not hasattr(x, "__array_namespace__"):
            raise TypeError(f"{name}: expected {self.name} like the other arguments, got {type_name(x)}")
        if x.__array_namespace__() is not self.namespace:
            raise TypeError(f"{name}: expected {self.name} like the other arguments, got one of another library")
        return x

    @staticmethod
    def empty_like(x: Array) -> Array:
        return _core.Buffer(tuple(x.shape), str(x.dtype).rpartition(".")[2])

    @staticmethod
    def empty_lse(x: Array) -> Array:
        return _core.Buffer(tuple(x.shape[:-1]), "float32")

    def result(self, x: Array) -> Array:
        # Both numpy arrays and Buffers speak DLPack; a user's own `out` never comes here.
        return self.namespace.from_dlpack(x)


def kind_of(x: Array, name: str) -> Any:
    """The kind that results take, from the first array argument."""
    if isinstance(x, np.ndarray):
        return NumpyKind
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, getattr(torch, "Tensor", ())):
        return TorchKind
    if hasattr(x, "__dlpack__") and hasattr(x, "__array_namespace__"):
        return DlpackKind(x.__array_namespace__())
    if hasattr(x, "__dlpack__"):
        raise TypeError(
            f"{name}: {type_name(x)} has DLPack but no __array_namespace__ to make results of its kind with"
        )
    raise TypeError(f"{name}: expected a NumPy array, a torch tensor or a DLPack array, got {type_name(x)}")


def allocate(make: Any, like: Array) -> Array:
    """make(like), with a failed allocation told as what it is."""
    try:
        return make(like)
    except (MemoryError, ValueError, RuntimeError) as error:
        raise MemoryError(f"out: cannot allocate a result for q of shape {list(like.shape)}: {error}") from None


def empty(shape: tuple[int, ...], dtype: Any, name: str) -> np.ndarray:
    """np.empty, with a failed allocation blamed on the argument whose size asked for it."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise MemoryError(f"{name}: cannot allocate an array of shape {list(shape)}: {error}") from None


def to_numpy(x: Array, name: str) -> np.ndarray:
    """Any array or nested sequence as a NumPy array, without a copy where possible."""
    if isinstance(x, np.ndarray):
        return NumpyKind.accept(x, name)
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(x, getattr(torch, "Tensor", ())):
            return TorchKind.accept(x, name).numpy()
        if hasattr(x, "__dlpack__"):
            return np.from_dlpack(x)
    except (ValueError, NotImplementedError):
        raise
    except (TypeError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name}: cannot be read as an array: {error}") from None
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists among them
        raise type(error)(f"{name}: cannot be read as an array: {error}") from None


def int_array(x: Array, name: str, dtype: Any, *, copy: bool = False) -> np.ndarray:
    """Any integer array as a contiguous NumPy array of `dtype`; values that do not fit are refused, not wrapped."""
    array = to_numpy(x, name)
    if array.dtype.kind not in "iu":
        if array.size == 0 and not hasattr(x, "dtype"):
            array = array.astype(dtype)  # an empty list has no dtype of its own
        else:
            raise TypeError(f"{name}: expected integers, got {array.dtype}")
    if array.dtype != dtype and array.size:
        limits = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise ValueError(f"{name}: {low if low < limits.min else high} does not fit {np.dtype(dtype).name}")
    return np.array(array, dtype=dtype, order="C", copy=True) if copy else np.ascontiguousarray(array, dtype=dtype)
