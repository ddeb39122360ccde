"""How float32 inputs are multiplied: the precision set, else that of torch, else the highest."""

from __future__ import annotations

import sys
from typing import Literal, get_args

from dhsa._arrays import type_name

__all__ = [
    "Precision",
    "get_float32_precision",
    "precision_argument",
    "precision_in_use",
    "set_float32_precision",
]

Precision = Literal["highest", "high", "medium"]
WORDS: tuple[str, ...] = get_args(Precision)  # in the order of dhsa_precision in csrc/include/dhsa.h

_chosen: Precision | None = None


def set_float32_precision(precision: Precision | None) -> None:
    """Set how every call of this process multiplies float32 queries, keys and values in attention.

    The words are those of `torch.set_float32_matmul_precision`. They apply where `build_info()["float32_precisions"]`
    lists them, that is where the CPU multiplies bfloat16 so fast that it saves time; elsewhere they change nothing.
    Selection, calls for at most 16 query rows of a KV head (decoding steps), and inputs of other dtypes do not depend
    on them. Sums, the softmax and results are float32 in any case.

    Args:
        precision: "highest": as float32. "high": as sums of two bfloat16 numbers, of whose four products the smallest
            is left out; on AMX. "medium": rounded to bfloat16; on AMX and AVX512-BF16. None (at first): the precision
            that torch has where torch is imported, else "highest".

    Raises:
        TypeError: `precision` is neither a str nor None.
        ValueError: `precision` is another word.
    """
    global _chosen
    if precision is not None and not isinstance(precision, str):
        raise TypeError(f"precision: expected a str or None, got {type_name(precision)}")
    if precision is not None and precision not in WORDS:
        raise ValueError(f"precision: got {precision!r}, expected 'highest', 'high', 'medium' or None")
    _chosen = precision


def get_float32_precision() -> Precision | None:
    """Return what `set_float32_precision` set; None: that of torch, or "highest"."""
    return _chosen


def precision_in_use() -> str:
    """The word that the next call follows."""
    if (chosen := _chosen) is not None:
        return chosen
    torch = sys.modules.get("torch")
    if torch is not None:
        try:
            return str(torch.get_float32_matmul_precision())
        except AttributeError:  # torch is being imported
            pass
    return "highest"


def precision_argument() -> int:
    """The same as _core takes it."""
    return WORDS.index(precision_in_use())
