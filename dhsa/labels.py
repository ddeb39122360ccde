"""The labels that boundary predictors are trained on, from an attention matrix or from queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dhsa import _core
from dhsa._arrays import NumpyKind, check_int, check_rank, empty, kind_of, to_numpy
from dhsa._threads import get_num_threads
from dhsa._typing import Array, ArrayT

__all__ = ["attention_ratios", "boundary_ratios"]

GAPS = 128  # of a tile in boundary_ratios


@overload
def boundary_ratios(
    attn: npt.NDArray[Any] | Sequence[Sequence[float]], *, window: int, sliding_window: int | None = ...
) -> npt.NDArray[np.float64]: ...
@overload
def boundary_ratios(attn: ArrayT, *, window: int, sliding_window: int | None = ...) -> ArrayT: ...
def boundary_ratios(attn: Any, *, window: int, sliding_window: int | None = None) -> Any:
    """Compute the training label of boundary predictors from an attention matrix.

    The label states how differently later tokens attend to the two sides of a gap.

    Args:
        attn: [L, L], one attention matrix, averaged over heads, rows are queries. Read as float32.
        window: w, the number of keys on each side of a gap.
        sliding_window: W of a sliding layer: of the rows after the gap's later side, only the first W count. None: all.

    Returns:
        float64 [L] of the kind of `attn`: (max + 1e-6) / (min + 1e-6) of the attention that the w keys up to gap j and
            the w keys after it receive. 0 where the gap lacks full windows (it has them for 2w - 1 <= j < L - 2w).

    Raises:
        TypeError: an argument of the wrong type; the message names it.
        ValueError: an argument out of range; the message names it.

    Source: arXiv 2510.24606, boundary labels.
    """
    array = to_numpy(attn, "attn")
    if array.dtype.kind != "f":
        raise TypeError(f"attn: expected floating point numbers, got {array.dtype}")
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.size == 0:
        raise ValueError(f"attn: expected one square matrix [L, L], got shape {list(array.shape)}")
    check_int(array.shape[0], "attn: its length", 1, _core.MAX_LENGTH)
    window = check_int(window, "window", 1)
    sliding_window = None if sliding_window is None else check_int(sliding_window, "sliding_window", 1)
    try:
        with np.errstate(all="ignore"):
            result = _ratios(array.astype(np.float32, copy=False), min(window, len(array)), sliding_window)
    except MemoryError as error:
        raise MemoryError(f"attn: no memory for the sums of its shape {list(array.shape)}: {error}") from None
    kind = kind_of(attn, "attn") if hasattr(type(attn), "__dlpack__") else NumpyKind
    return kind.result(result)


def _ratios(attn: npt.NDArray[np.float32], window: int, sliding_window: int | None) -> npt.NDArray[np.float64]:
    """The ratios of `boundary_ratios`. One running sum of each column serves all gaps of a tile, so that the matrix is
    read once for each tile, not once for each gap."""
    length = len(attn)
    ratios = np.zeros(length)
    for first in range(2 * window - 1, length - 2 * window, GAPS):
        last = min(first + GAPS, length - 2 * window)
        stop = length if sliding_window is None else min(length, last - 1 + window + sliding_window)
        # From the last row up: after row j + w, a column holds the sum of the rows that gap j uses.
        terms = attn[first + window : stop, first - window + 1 : last + window][::-1].astype(np.float64)
        if sliding_window is not None and sliding_window < len(terms):
            # After each row is added, the row that is no longer within the sliding window is subtracted.
            added, terms = terms, np.zeros((2 * len(terms), terms.shape[1]))
            terms[::2] = added
            terms[2 * sliding_window + 1 :: 2] = -added[:-sliding_window]
            sums = np.add.accumulate(terms)[1::2]
        else:
            sums = np.add.accumulate(terms)
        gap = np.arange(last - first)[:, None]
        columns = sums[::-1][gap, gap + np.arange(2 * window)]
        past, future = (np.add.accumulate(part, axis=1)[:, -1] for part in np.split(columns, 2, axis=1))
        larger, smaller = np.where(past > future, past, future), np.where(past < future, past, future)
        ratios[first:last] = (larger + 1e-6) / (smaller + 1e-6)
    return ratios


# fmt: off
@overload
def attention_ratios(
    q: npt.NDArray[Any], k: Array, *, window: int = ..., sliding_window: int | None = ..., scale: float | None = ...,
    softcap: float | None = ...,
) -> npt.NDArray[np.float64]: ...
@overload
def attention_ratios(
    q: ArrayT, k: Array, *, window: int = ..., sliding_window: int | None = ..., scale: float | None = ...,
    softcap: float | None = ...,
) -> ArrayT: ...
# fmt: on
def attention_ratios(
    q: Any,
    k: Array,
    *,
    window: int = 4,
    sliding_window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Any:
    """Compute the training label of boundary predictors from queries and keys.

    The result is `boundary_ratios` of their causal attention matrix, averaged over heads, which is never formed. Memory
    grows linearly with L: about 190 bytes a key at the default window.

    Args:
        q: as in `attention`, with as many queries as keys.
        k: as in `attention`.
        window: w, the number of keys on each side of a gap, 1 to 64.
        sliding_window: the layer's sliding window. None: none.
        scale: the layer's factor of the logits. None: 1 / sqrt(D).
        softcap: the layer's bound of the logits. None: no bound.

    Returns:
        float64 [B, L] of q's kind; entries as in `boundary_ratios`.

    Raises:
        TypeError: as in `attention`.
        ValueError: as in `attention`, or the logits are not finite.
        NotImplementedError: as in `attention`.

    Source: arXiv 2510.24606, boundary labels.
    """
    kind = kind_of(q, "q")
    q, k = kind.accept(q, "q"), kind.accept(k, "k")
    check_rank(q, "q", "[B, H, L, D]")
    check_int(q.shape[2], "q: its length", 1, _core.MAX_LENGTH)
    result = empty((q.shape[0], q.shape[2]), np.float64, "q")
    _core.attention_ratios(q, k, window, sliding_window, scale, softcap, result, get_num_threads())
    return kind.result(result)
