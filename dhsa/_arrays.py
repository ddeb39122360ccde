"""Kinds of arrays (NumPy, torch, other libraries with DLPack): how arguments are read and results are made.

The checks here are those that the C core cannot make: device, autograd, mixed kinds. Shapes and dtypes are checked in
C.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from dhsa import _core
from dhsa._typing import ArrayLike

if TYPE_CHECKING:
    import torch


def type_name(value: object) -> str:
    return type(value).__name__


def check_int(value: object, name: str, low: int, high: int | None = None) -> int:
    """`value` as an int in low..high; TypeError or ValueError naming the argument otherwise. Bools are refused."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type_name(value)}") from None
    if number < low or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def check_float(value: object, name: str, low: float, high: float) -> float:
    """`value` as a float in low..high; TypeError or ValueError naming the argument otherwise. Bools are refused."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type_name(value)}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low:g} to {high:g}, got {value}")
    return float(value)


def check_number(value: Any, name: str, expected: str = "a number") -> float:
    """`value` as a float; TypeError or ValueError naming the field otherwise."""
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name}: expected a number, got {type_name(value)}")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {type_name(value)}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected {expected}, got an int beyond every float") from None


def check_choice(value: object, name: str, choices: tuple[str, ...]) -> int:
    """The position of `value` in `choices`; TypeError or ValueError naming the argument otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {type_name(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices.index(value)


def check_rank(x: Any, name: str, axes: str) -> None:
    """ValueError naming the argument for an array that has not the four dimensions `axes`."""
    if len(x.shape) != 4:
        raise ValueError(f"{name}: expected 4 dimensions {axes}, got {len(x.shape)}")


def torch_obstacle(x: Any) -> str | None:
    """The reason why the memory of torch tensor `x` must not be read directly, without operators of torch; None for a
    plain tensor. A transform or a recorder would not see the access, and a subclass of Tensor may give its memory
    another meaning."""
    torch = sys.modules["torch"]
    if torch.compiler.is_dynamo_compiling():  # the call itself never becomes part of a graph
        return None
    if torch._C._is_tracing():  # torch.jit.is_tracing, but faster
        return "torch.jit.trace cannot record this package's functions; its graph would hold memory that is not written"
    if torch._C._len_torch_dispatch_stack() > 0:  # modes that only observe, such as FlopCounterMode, are allowed
        if torch.compiler.is_compiling():
            return "torch.export cannot record this package's functions, which are no operators of torch"
        keys = torch._C._TorchDispatchModeKey
        if torch._C._get_dispatch_mode(keys.PROXY) or torch._C._get_dispatch_mode(keys.FUNCTIONAL):
            return "make_fx cannot record this package's functions, which are no operators of torch"
        if torch._C._get_dispatch_mode(keys.FAKE):
            return "FakeTensorMode cannot run this package's functions, which need data"
    functorch = torch._C._functorch
    if functorch.maybe_current_level() is not None and (transform := _transform(functorch, x)):
        return f"torch.{transform} cannot transform this package's functions, which are no operators of torch"
    if tangent := torch_tangent(x):
        return tangent
    if x.is_nested:
        return "is a nested tensor, expected one whose items all have one shape"
    kind = type(x)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return None
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    ordinary = (torch.Tensor.__torch_function__.__func__, torch._C._disabled_torch_function_impl)
    if function in ordinary and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__:
        return None
    if kind.__name__ == "FakeTensor":
        return "is a FakeTensor, which has a shape and no data"
    return f"is a {kind.__name__}, which gives torch's operators a meaning of its own; expected a plain torch.Tensor"


def torch_tangent(x: Any) -> str | None:
    """The reason why torch tensor `x` cannot be read, if it has a tangent of forward-mode autograd; else None."""
    forward_ad = sys.modules["torch"].autograd.forward_ad
    if forward_ad._current_level < 0 or forward_ad.unpack_dual(x).tangent is None:
        return None
    return (
        "has a tangent of torch.autograd.forward_ad, which would be lost: there is no forward-mode derivative of "
        "this package's functions"
    )


def _transform(functorch: Any, x: Any) -> str | None:
    """The active transform of torch.func that wraps `x`, or that wraps every tensor made now."""
    if functorch.is_batchedtensor(x):
        return "vmap"
    kinds = functorch.TransformType
    names = {kinds.Grad: "func.grad", kinds.Jvp: "func.jvp", kinds.Functionalize: "func.functionalize"}
    now = names.get(functorch.peek_interpreter_stack().key())  # vmap does not change tensors that are not batched
    return now or ("func" if functorch.is_functorch_wrapped_tensor(x) else None)


class Kind(Protocol):
    """A library whose arrays are read and made: NumpyKind, TorchKind or a DlpackKind."""

    def accept(self, x: Any, name: str) -> Any:
        """Argument `name` as an array of this library that the core can read; TypeError, ValueError or
        NotImplementedError otherwise."""
        ...

    def empty_like(self, x: Any) -> Any:
        """Memory for a result of the shape and dtype of `x`."""
        ...

    def empty_of(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Memory for a result of the dtype of `x`."""
        ...

    def empty_lse(self, x: Any) -> Any:
        """Memory for the float32 log-sum-exp of queries `x`."""
        ...

    def to_float32(self, x: Any) -> np.ndarray:
        """The numbers of `x`, which `accept` returned, in float32 as a NumPy array that may share memory with it."""
        ...

    def result(self, x: Any) -> Any:
        """NumPy array `x`, or what `empty_like` and `empty_lse` made, as an array of this library."""
        ...


class NumpyKind:
    """NumPy arrays in, NumPy arrays out."""

    name = "a NumPy array"

    @staticmethod
    def accept(x: object, name: str) -> np.ndarray:
        if type(x) is np.ndarray:
            return x
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}: expected a NumPy array like the other arguments, got {type_name(x)}")
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name}: masked arrays are not supported, their mask would be lost")
        return x

    @staticmethod
    def empty_like(x: np.ndarray) -> np.ndarray:
        return np.empty(x.shape, x.dtype)

    @staticmethod
    def empty_of(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return np.empty(shape, x.dtype)

    @staticmethod
    def empty_lse(x: np.ndarray) -> np.ndarray:
        return np.empty(x.shape[:-1], np.float32)

    @staticmethod
    def to_float32(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32)

    @staticmethod
    def result(x: np.ndarray) -> np.ndarray:
        return x


class TorchKind:
    """torch CPU tensors in and out. Only used if the caller has imported torch."""

    name = "a torch tensor"

    @staticmethod
    def accept(x: Any, name: str) -> torch.Tensor:
        torch = sys.modules["torch"]
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a torch tensor like the other arguments, got {type_name(x)}")
        if obstacle := torch_obstacle(x):
            raise NotImplementedError(f"{name}: {obstacle}")
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
        if x.is_neg():  # a lazy negation, which the memory does not show
            x = x.resolve_neg()
        if x._is_zerotensor():  # zeros without memory
            x = x.clone()
        return x

    @staticmethod
    def empty_like(x: torch.Tensor) -> torch.Tensor:
        torch = sys.modules["torch"]
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def empty_of(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        return x.new_empty(shape)

    @staticmethod
    def empty_lse(x: torch.Tensor) -> torch.Tensor:
        torch = sys.modules["torch"]
        return torch.empty(x.shape[:-1], dtype=torch.float32, device="cpu")

    @staticmethod
    def to_float32(x: torch.Tensor) -> np.ndarray:
        numbers: np.ndarray = x.detach().float().numpy()
        return numbers

    @staticmethod
    def result(x: np.ndarray) -> torch.Tensor:
        return sys.modules["torch"].from_numpy(x)


class DlpackKind:
    """Arrays of any other library that follows the array API standard, such as JAX: arguments are read through DLPack,
    results are made by the library's from_dlpack."""

    def __init__(self, namespace: Any):
        self.namespace = namespace
        self.name = f"an array of {getattr(namespace, '__name__', namespace)}"

    def accept(self, x: Any, name: str) -> Any:
        if not hasattr(x, "__dlpack__") or not hasattr(x, "__array_namespace__"):
            raise TypeError(f"{name}: expected {self.name} like the other arguments, got {type_name(x)}")
        if x.__array_namespace__() is not self.namespace:
            raise TypeError(f"{name}: expected {self.name} like the other arguments, got one of another library")
        return x

    @staticmethod
    def empty_like(x: Any) -> _core.Buffer:
        return _core.Buffer(tuple(x.shape), _dtype_name(x))

    @staticmethod
    def empty_of(x: Any, shape: tuple[int, ...]) -> _core.Buffer:
        return _core.Buffer(shape, _dtype_name(x))

    @staticmethod
    def empty_lse(x: Any) -> _core.Buffer:
        return _core.Buffer(tuple(x.shape[:-1]), "float32")

    def to_float32(self, x: Any) -> np.ndarray:
        # NumPy cannot read bfloat16, so the library converts.
        wide = x if _dtype_name(x) == "float32" else self.namespace.astype(x, self.namespace.float32)
        return np.from_dlpack(wide)

    def result(self, x: np.ndarray | _core.Buffer) -> Any:
        # NumPy arrays and Buffers both have DLPack; an `out` of the caller is not passed here.
        return self.namespace.from_dlpack(x)


def kind_of(x: Any, name: str) -> Kind:
    """The kind of array argument `name`, which results have as well."""
    if isinstance(x, np.ndarray):
        return NumpyKind
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, getattr(torch, "Tensor", ())):
        return TorchKind
    methods = type(x)  # recorders such as torch.fx.Proxy have every attribute
    if hasattr(methods, "__dlpack__") and hasattr(methods, "__array_namespace__"):
        return DlpackKind(x.__array_namespace__())
    if hasattr(methods, "__dlpack__"):
        raise TypeError(
            f"{name}: {type_name(x)} has DLPack but no __array_namespace__ to make results of its kind with"
        )
    raise TypeError(f"{name}: expected a NumPy array, a torch tensor or a DLPack array, got {type_name(x)}")


def _dtype_name(x: Any) -> str:
    """For example "bfloat16", for an array of any library."""
    return str(x.dtype).rpartition(".")[2]


def allocate(kind: Kind, q: Any, v: Any) -> Any:
    """Memory for the attention of queries q over values v. Shapes are checked before the library raises its own error,
    by `len`, since check_rank would take time in each short call."""
    shape, v_shape = q.shape, v.shape
    if len(shape) != 4:
        raise ValueError(f"q: expected 4 dimensions [B, H, Lq, D], got {len(shape)}")
    if 0 in shape:
        raise ValueError(f"q: dimension {list(shape).index(0)} has size 0, expected at least 1")
    if len(v_shape) == 4 and v_shape[3] == shape[3]:
        return _allocated(kind.empty_like, q)
    check_rank(v, "v", "[B, Hkv, Lk, E]")
    return _allocated(kind.empty_of, q, (*shape[:3], v_shape[3]))


def allocate_lse(kind: Kind, q: Any) -> Any:
    """Memory for the log-sum-exp of queries q."""
    check_rank(q, "q", "[B, H, Lq, D]")
    return _allocated(kind.empty_lse, q)


def _allocated(make: Callable[..., Any], q: Any, *shape: tuple[int, ...]) -> Any:
    """make(q, *shape); a failed allocation raises MemoryError with the shape."""
    try:
        return make(q, *shape)
    except TypeError as error:  # of a Buffer
        raise TypeError(f"q: {error}") from None
    except (MemoryError, ValueError, RuntimeError) as error:
        of = f" and values of {shape[0][3]} numbers" if shape else ""
        raise MemoryError(f"out: cannot allocate a result for q of shape {list(q.shape)}{of}: {error}") from None


def float_row(kind: Kind, x: Any, name: str, q: Any) -> np.ndarray:
    """Argument `name`, one-dimensional, of float32 or the dtype of q, as a new float32 NumPy array."""
    x = kind.accept(x, name)
    given, expected = _dtype_name(x), dict.fromkeys(("float32", _dtype_name(q)))
    if given not in expected:
        raise TypeError(f"{name}: dtype is {given}, expected {' or '.join(expected)}")
    if len(x.shape) != 1:
        raise ValueError(f"{name}: expected 1 dimension, got {len(x.shape)}")
    return np.array(kind.to_float32(x), np.float32)


def empty(shape: tuple[int, ...], dtype: Any, name: str) -> np.ndarray:
    """np.empty; a failed allocation raises MemoryError with the name of the argument that determines the size."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        raise MemoryError(f"{name}: cannot allocate an array of shape {list(shape)}: {error}") from None


def to_numpy(x: ArrayLike, name: str) -> np.ndarray:
    """Any array or nested sequence as a NumPy array, without a copy where possible."""
    if isinstance(x, np.ndarray):
        return NumpyKind.accept(x, name)
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(x, getattr(torch, "Tensor", ())):
            tensor: np.ndarray = TorchKind.accept(x, name).numpy()
            return tensor
        if hasattr(type(x), "__dlpack__"):
            return np.from_dlpack(x)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    except (ValueError, NotImplementedError):
        raise
    except (TypeError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name}: cannot be read as an array: {error}") from None
    try:
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError) as error:  # for example a ragged list
        raise type(error)(f"{name}: cannot be read as an array: {error}") from None


def int_array(x: ArrayLike, name: str, dtype: npt.DTypeLike, *, copy: bool = False) -> np.ndarray:
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
