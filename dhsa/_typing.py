"""Types in the signatures of the public functions, for type checkers and readers. Nothing is checked with them."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "ArrayLike", "ArrayT", "DLPackArray", "ScalarT", "SupportsDLPack"]


class SupportsDLPack(Protocol):
    """An object that hands out its memory by the DLPack protocol of the Python array API standard."""

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...


class DLPackArray(SupportsDLPack, Protocol):
    """An array of a library with DLPack, such as a torch tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...


# NumPy arrays are listed beside the protocol: in NumPy's annotations, only those of numbers have __dlpack__.
Array: TypeAlias = npt.NDArray[Any] | DLPackArray
ArrayLike: TypeAlias = npt.ArrayLike | SupportsDLPack  # nested sequences too
ArrayT = TypeVar("ArrayT", bound=npt.NDArray[Any] | DLPackArray)  # results are of the type of an argument
ScalarT = TypeVar("ScalarT", bound=np.generic)
