"""Selection: the keys that each block of queries may attend to, as immutable CSR arrays, validated in full.

How selections are found is in functional.select; how they are used is in functional.sparse_attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dhsa._arrays import check_int, int_array, to_numpy, type_name
from dhsa._typing import ArrayLike

MAX_MASK_BYTES = 1 << 28  # 256 MiB: masks are for inspection and tests, not for computing attention


class Selection:
    """The keys that each block of queries may attend to. Immutable; one selection may serve any number of layers.

    Row r = (b * heads + s) * nq + i lists the keys of query block i (queries i * query_block onwards) for the heads s
    that share a selection, of batch item b: `indices[indptr[r]:indptr[r + 1]]`, ascending and unique. Causality (unless
    `causal` is False) and the sliding window still apply to each query within a list.

    A Selection is made by `dhsa.select`, `Selection.from_indices` or `Selection.from_mask`.

    Attributes:
        indptr: int64 [B * heads * nq + 1].
        indices: int32 [indptr[-1]].
        shape: (B, heads, nq). heads is 1 (all heads share a selection), Hkv (those of a KV head do) or H (none do).
        query_block: queries in a block.
        boundaries: int32 [B, C + 1], the chunk boundaries that the selection was made with, rows padded with k_len; or
            None.
        q_len: the number of queries it was made for; None where unknown (`from_indices` without it).
        k_len: the number of keys it was made for; None where unknown.
        window: the sliding window it was made under, or None.
        causal: whether a query attends to no key after its position. `sparse_attention` follows it.
    """

    __slots__ = ("boundaries", "causal", "indices", "indptr", "k_len", "q_len", "query_block", "shape", "window")

    indptr: np.ndarray
    indices: np.ndarray
    shape: tuple[int, int, int]
    query_block: int
    boundaries: np.ndarray | None
    q_len: int | None
    k_len: int | None
    window: int | None
    causal: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("use dhsa.select, Selection.from_indices or Selection.from_mask")

    @classmethod
    def _trusted(
        cls,
        indptr: np.ndarray,
        indices: np.ndarray,
        *,
        shape: tuple[int, int, int],
        query_block: int,
        boundaries: np.ndarray | None = None,
        q_len: int | None = None,
        k_len: int | None = None,
        window: int | None = None,
        causal: bool = True,
    ) -> Selection:
        """Take ownership of arrays that are known to be valid."""
        self = object.__new__(cls)
        for array in (indptr, indices, boundaries):
            if array is not None:
                array.setflags(write=False)
        for name, value in (
            ("indptr", indptr),
            ("indices", indices),
            ("shape", shape),
            ("query_block", query_block),
            ("boundaries", boundaries),
            ("q_len", q_len),
            ("k_len", k_len),
            ("window", window),
            ("causal", causal),
        ):
            object.__setattr__(self, name, value)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Selection is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Selection is immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, tuple(getattr(self, name) for name in _FIELDS)

    def __eq__(self, other: object) -> bool:
        """Whether the lists are equal for equal blocks, and causality. Boundaries and lengths are not compared."""
        if not isinstance(other, Selection):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.query_block == other.query_block
            and self.causal == other.causal
            and np.array_equal(self.indptr, other.indptr)
            and np.array_equal(self.indices, other.indices)
        )

    __hash__ = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        lengths = "" if self.k_len is None else f", q_len={self.q_len}, k_len={self.k_len}"
        window = "" if self.window is None else f", window={self.window}"
        causal = "" if self.causal else ", causal=False"
        return (
            f"Selection(shape={self.shape}, query_block={self.query_block}{lengths}{window}{causal}, "
            f"{self.indices.size} keys listed)"
        )

    @classmethod
    def from_indices(
        cls,
        indptr: ArrayLike,
        indices: ArrayLike,
        *,
        shape: tuple[int, int, int],
        query_block: int,
        q_len: int | None = None,
        k_len: int | None = None,
        causal: bool = True,
    ) -> Selection:
        """Make a selection from CSR arrays, which are copied and validated in full.

        Args:
            indptr: integers [B * heads * nq + 1], beginning with 0, not decreasing, ending with len(indices).
            indices: integers [n]; in each row ascending, unique and at least 0 (and below k_len if given).
            shape: (B, heads, nq).
            query_block: queries in a block, 1 to 65536.
            q_len: number of queries, if known; used by `density` and `mask`.
            k_len: number of keys, if known; used by `density` and `mask`.
            causal: False: queries also attend to listed keys after their positions.

        Raises:
            TypeError: an argument of the wrong type; the message names it.
            ValueError: wrong contents; the message names the argument and the row.
        """
        shape = check_shape(shape)
        query_block = check_int(query_block, "query_block", 1, 65536)
        causal = check_bool(causal, "causal")
        rows = shape[0] * shape[1] * shape[2]
        indptr = int_array(indptr, "indptr", np.int64, copy=True)
        indices = int_array(indices, "indices", np.int32, copy=True)
        for array, name in ((indptr, "indptr"), (indices, "indices")):
            if array.ndim != 1:
                raise ValueError(f"{name}: expected 1 dimension, got {array.ndim}")
        if indptr.size != rows + 1:
            raise ValueError(f"indptr: expected B * heads * nq + 1 = {rows + 1} entries, got {indptr.size}")
        if indptr[0] != 0:
            raise ValueError(f"indptr: must begin with 0, got {indptr[0]}")
        falls = np.flatnonzero(indptr[1:] < indptr[:-1])
        if falls.size:
            raise ValueError(f"indptr: falls from {indptr[falls[0]]} to {indptr[falls[0] + 1]} after row {falls[0]}")
        if indptr[-1] != indices.size:
            raise ValueError(f"indptr: ends with {indptr[-1]}, but there are {indices.size} indices")
        q_len, k_len = check_lengths(q_len, k_len, shape[2], query_block)
        bad = indices < 0
        if k_len is not None:
            bad |= indices >= k_len
        if bad.any():
            at = int(np.argmax(bad))
            expected = "at least 0" if k_len is None else f"0 to {k_len - 1}"
            raise ValueError(f"indices: expected {expected}, got {indices[at]} in row {row_of(indptr, at)}")
        if indices.size > 1:
            unsorted = indices[1:] <= indices[:-1]
            starts = indptr[1:-1]
            unsorted[starts[(starts > 0) & (starts < indices.size)] - 1] = False  # steps from one row to the next
            if unsorted.any():
                at = int(np.argmax(unsorted)) + 1
                raise ValueError(
                    f"indices: must ascend without repeats within a row, got {indices[at - 1]} then {indices[at]} "
                    f"in row {row_of(indptr, at)}"
                )
        return cls._trusted(
            indptr, indices, shape=shape, query_block=query_block, q_len=q_len, k_len=k_len, causal=causal
        )

    @classmethod
    def from_mask(
        cls, mask: ArrayLike, *, query_block: int, window: int | None = None, causal: bool = True
    ) -> Selection:
        """Make a selection from a boolean mask.

        All queries of a block share one list. The rows of a block must therefore be equal wherever causality (and
        `window`, if given) lets a query look; above the diagonal and outside the window they may differ. Query i is at
        key position i + (Lk - Lq).

        Args:
            mask: bool [B, heads, Lq, Lk], True where a query may attend to a key.
            query_block: queries in a block, 1 to 65536.
            window: the sliding window under which the mask was made. None: none.
            causal: False: the mask is that of bidirectional attention, in which keys after a query count too.

        Raises:
            TypeError: `mask` is not boolean.
            ValueError: the rank is wrong, Lq > Lk, or rows of one block differ (the message names the first).
        """
        array = to_numpy(mask, "mask")
        if array.dtype != np.bool_:
            raise TypeError(f"mask: expected bool, got {array.dtype}")
        if array.ndim != 4:
            raise ValueError(f"mask: expected 4 dimensions [B, heads, Lq, Lk], got {array.ndim}")
        if 0 in array.shape:
            raise ValueError(f"mask: is empty, shape {list(array.shape)}")
        query_block = check_int(query_block, "query_block", 1, 65536)
        if window is not None:
            window = check_int(window, "window", 1)
        causal = check_bool(causal, "causal")
        batch, heads, q_len, k_len = array.shape
        if q_len > k_len:
            raise ValueError(f"mask: more queries ({q_len}) than keys ({k_len})")
        nq = -(-q_len // query_block)
        lists = []
        for b in range(batch):
            for s in range(heads):
                for i in range(nq):
                    first, last = i * query_block, min((i + 1) * query_block, q_len)
                    rows = array[b, s, first:last]
                    visible = visible_keys(first, last, q_len, k_len, window, causal)
                    keys = (rows & visible).any(axis=0)
                    different = ((rows != keys) & visible).any(axis=1)
                    if different.any():
                        at = first + int(np.argmax(different))
                        raise ValueError(
                            f"mask: query {at} of [{b}, {s}] sees other keys than the rest of its block of "
                            f"{query_block} queries, beyond what causality and the window explain"
                        )
                    lists.append(np.flatnonzero(keys).astype(np.int32))
        indptr = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(keys) for keys in lists], out=indptr[1:])
        return cls._trusted(
            indptr,
            np.concatenate(lists),
            shape=(batch, heads, nq),
            query_block=query_block,
            q_len=q_len,
            k_len=k_len,
            window=window,
            causal=causal,
        )

    def _taken(self, heads: Sequence[int]) -> Selection:
        """A selection whose list s is this one's list `heads[s]`."""
        batch, sets, nq = self.shape
        rows = [(b * sets + s) * nq for b in range(batch) for s in heads]
        lengths = np.diff(self.indptr)
        indptr = np.zeros(batch * len(heads) * nq + 1, np.int64)
        np.cumsum(np.concatenate([lengths[row : row + nq] for row in rows]), out=indptr[1:])
        indices = np.concatenate([self.indices[self.indptr[row] : self.indptr[row + nq]] for row in rows])
        same = {name: getattr(self, name) for name in _FIELDS[3:]}
        return Selection._trusted(indptr, indices, shape=(batch, len(heads), nq), **same)

    def _lengths(self) -> tuple[int, int]:
        """Return q_len and k_len. Where unknown, assume whole blocks of queries and the fewest keys that fit."""
        q_len = self.q_len if self.q_len is not None else self.shape[2] * self.query_block
        if self.k_len is not None:
            return q_len, self.k_len
        return q_len, max(q_len, int(self.indices.max(initial=-1)) + 1)

    def density(self) -> float:
        """Return the (query, key) pairs attended to, divided by those visible under the selection's causality and
        window.

        Pairs are summed over all lists. Without known lengths (`from_indices`), nq * query_block queries and the fewest
        keys that fit are assumed.
        """
        q_len, k_len = self._lengths()
        offset = k_len - q_len
        width = k_len if self.window is None else min(self.window, k_len)  # sums with a larger one could overflow
        ahead = 0 if self.causal else width - 1  # how far after its position a query sees keys
        # A query at position p misses p - width + 1 keys before its window, and k_len - 1 - p - ahead keys after it.
        visible = q_len * k_len - _falling_sum(k_len - width, q_len) - _falling_sum(q_len - 1 - ahead, q_len)
        visible *= self.shape[0] * self.shape[1]
        rows = np.repeat(np.arange(self.indptr.size - 1), np.diff(self.indptr))
        first = rows % self.shape[2] * self.query_block
        last = np.minimum(first + self.query_block, q_len) - 1 + offset
        first += offset
        keys = self.indices.astype(np.int64)
        np.minimum(last, keys + width - 1, out=last)
        attended = int(np.maximum(last - np.maximum(first, keys - ahead) + 1, 0).sum())
        return attended / visible

    def mask(self, *, causal: bool = False, window: int | None = None) -> npt.NDArray[np.bool_]:
        """Return the selection as a boolean mask [B, heads, Lq, Lk], for small sizes.

        Args:
            causal: False: each query has its block's whole list. True: each query has what it attends to, under the
                selection's causality and window; usable as an SDPA mask.
            window: with causal=True, the sliding window. None: the selection's own.

        Raises:
            ValueError: the mask would take more than 256 MiB, or a window is given without causal=True.
        """
        q_len, k_len = self._lengths()
        batch, heads, nq = self.shape
        size = batch * heads * q_len * k_len
        if size > MAX_MASK_BYTES:
            raise ValueError(
                f"mask: [{batch}, {heads}, {q_len}, {k_len}] would take {size >> 20} MiB, more than "
                f"{MAX_MASK_BYTES >> 20}; use indptr and indices"
            )
        if window is not None:
            if not causal:
                raise ValueError("window: needs causal=True")
            window = check_int(window, "window", 1)
        else:
            window = self.window
        blocks = np.zeros((batch * heads * nq, k_len), np.bool_)
        rows = np.repeat(np.arange(self.indptr.size - 1), np.diff(self.indptr))
        blocks[rows, self.indices] = True
        mask: npt.NDArray[np.bool_] = blocks.reshape(batch, heads, nq, k_len)[
            :, :, np.arange(q_len) // self.query_block
        ]
        if causal:
            mask &= visible_keys(0, q_len, q_len, k_len, window, self.causal)
        return mask


_FIELDS = ("indptr", "indices", "shape", "query_block", "boundaries", "q_len", "k_len", "window", "causal")


def _rebuild(*values: Any) -> Selection:
    """Unpickle a Selection. Its contents are validated again, since a pickle may hold anything."""
    if len(values) == len(_FIELDS) - 1:
        values = (*values, True)  # of a version without `causal`
    indptr, indices, shape, query_block, boundaries, q_len, k_len, window, causal = values
    selection = Selection.from_indices(
        indptr, indices, shape=shape, query_block=query_block, q_len=q_len, k_len=k_len, causal=causal
    )
    return Selection._trusted(
        selection.indptr,
        selection.indices,
        shape=selection.shape,
        query_block=selection.query_block,
        boundaries=None if boundaries is None else int_array(boundaries, "boundaries", np.int32, copy=True),
        q_len=selection.q_len,
        k_len=selection.k_len,
        window=None if window is None else check_int(window, "window", 1),
        causal=selection.causal,
    )


def check_shape(shape: Any) -> tuple[int, int, int]:
    """Return (B, heads, nq) as ints of at least 1."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: expected (B, heads, nq), got {type_name(shape)}")
    if len(shape) != 3:
        raise ValueError(f"shape: expected (B, heads, nq), got {len(shape)} entries")
    batch, heads, nq = (check_int(size, f"shape[{i}]", 1, 2**31 - 1) for i, size in enumerate(shape))
    return batch, heads, nq


def check_lengths(q_len: Any, k_len: Any, nq: int, query_block: int) -> tuple[int | None, int | None]:
    """Check known lengths against the number of blocks and against each other."""
    if q_len is not None:
        q_len = check_int(q_len, "q_len", 1, 2**31 - 1)
        if -(-q_len // query_block) != nq:
            raise ValueError(
                f"q_len: {q_len} queries are {-(-q_len // query_block)} blocks of {query_block}, not nq = {nq}"
            )
    if k_len is not None:
        k_len = check_int(k_len, "k_len", 1, 2**31 - 1)
        if q_len is None:
            raise ValueError("k_len: give q_len too, it says where the queries sit")
        if q_len > k_len:
            raise ValueError(f"q_len: more queries ({q_len}) than keys ({k_len})")
    return q_len, k_len


def row_of(indptr: np.ndarray, at: int) -> int:
    """Return the CSR row that entry `at` belongs to."""
    return int(np.searchsorted(indptr, at, side="right")) - 1


def check_bool(value: object, name: str) -> bool:
    """`value` as a bool; TypeError naming the argument otherwise."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected a bool, got {type_name(value)}")
    return bool(value)


def visible_keys(
    first: int, last: int, q_len: int, k_len: int, window: int | None, causal: bool
) -> npt.NDArray[np.bool_]:
    """Return bool [last - first, k_len]: keys that causality and the window leave to queries first to last - 1."""
    position = np.arange(first, last)[:, None] + (k_len - q_len)
    keys = np.arange(k_len)
    width = k_len if window is None else min(window, k_len)  # sums with a larger one could overflow
    return (keys > position - width) & (keys < position + (1 if causal else width))


def _falling_sum(most: int, n: int) -> int:
    """The sum of the n numbers most, most - 1, ..., of those that are above 0."""
    count = max(0, min(n, most))
    return count * (2 * most - count + 1) // 2
