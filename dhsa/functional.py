"""The functions of the package. They check arguments, fill in defaults, allocate results and call the C core.

Shapes: q is [B, H, Lq, D]; k and v are [B, Hkv, Lk, D]. Query i is at key position i + (Lk - Lq). Arrays are NumPy
arrays, torch CPU tensors, or arrays of any library with DLPack and the array API namespace. All arrays of a call are
of one kind and one dtype (float32, float16 or bfloat16), and their last dimension is contiguous. Results are of the
kind of q.

The definitions of what is computed are in dhsa.reference; the arithmetic is in csrc/.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from dhsa import _core
from dhsa._arrays import (
    DlpackKind,
    Kind,
    NumpyKind,
    TorchKind,
    allocate,
    check_int,
    check_rank,
    empty,
    int_array,
    kind_of,
    to_numpy,
    type_name,
)
from dhsa._threads import get_num_threads, set_num_threads
from dhsa._typing import Array, ArrayLike, ArrayT, ScalarT
from dhsa.config import HEADS, MAX_QUERY_BLOCK, POOLINGS, SCORES, Config, check_choice
from dhsa.selection import Selection

__all__ = [
    "RunStats",
    "attention",
    "boundaries",
    "build_info",
    "chunk_scores",
    "get_num_threads",
    "pick_boundaries",
    "run",
    "run_selected",
    "select",
    "set_isa",
    "set_num_threads",
    "sparse_attention",
]

PATHS = ("dense", "window", "sparse")


class RunStats(NamedTuple):
    """What one attention call did.

    Attributes:
        path: "dense" (exact, all visible keys), "window" (exact, sliding window) or "sparse".
        density: (query, key) pairs attended to, divided by pairs visible. 1.0 on exact paths.
        select_seconds: seconds for boundaries, chunk scores and selection.
        attend_seconds: seconds for attention itself.
        skipped: the share of the products of a tile of keys and a group of query rows that `Config.skip` left out.
    """

    path: str
    density: float
    select_seconds: float
    attend_seconds: float
    skipped: float = 0.0


def _open(
    q: Any, k: Any, v: Any, out: Any, return_lse: bool, key_ranges: Any
) -> tuple[Kind, Any, Any, Any, Any, Any, np.ndarray | None]:
    """Return the kind of array and, checked: q, k, v, the output to write, the log-sum-exp to write or None, and
    `key_ranges`."""
    kind = kind_of(q, "q")
    accept = kind.accept
    q, k, v = accept(q, "q"), accept(k, "k"), accept(v, "v")
    if out is None:
        target = allocate(kind.empty_like, q)
    else:
        target = accept(out, "out")
        if kind is TorchKind and out.is_neg():
            raise ValueError("out: has its negative bit set (torch.Tensor.is_neg); results would not reach its memory")
        if kind is TorchKind and out._is_zerotensor():
            raise ValueError("out: is a tensor of zeros that has no memory")
    lse = allocate(kind.empty_lse, q) if return_lse else None
    if key_ranges is not None:
        # A copy: the core checks it once and then relies on it, while another thread might write to the caller's.
        key_ranges = int_array(key_ranges, "key_ranges", np.int32, copy=True)
    return kind, q, k, v, target, lse, key_ranges


def _results(kind: DlpackKind, target: Any, lse: Any, out: Any) -> tuple[Any, Any]:
    """Return the output and the log-sum-exp, those of them that are Buffers as arrays of the caller's library."""
    return kind.result(target) if out is None else out, None if lse is None else kind.result(lse)


def run(
    q: ArrayT,
    k: Array,
    v: Array,
    config: Config | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    key_ranges: ArrayLike | None = None,
    return_lse: bool = False,
    out: ArrayT | None = None,
    boundaries: ArrayLike | None = None,
    key_indexes: tuple[_core.KeyIndex, ...] | None = None,
    same: int = 0,
    keep_means: bool = True,
) -> tuple[ArrayT, ArrayT | None, RunStats]:
    """Compute `attention` and report what was done: (out, lse or None, RunStats).

    For integrations. Arguments and errors are those of `attention`, except that `config.share` is not refused: sharing
    is left to the caller.

    Args:
        q: as in `attention`.
        k: as in `attention`.
        v: as in `attention`.
        config: as in `attention`.
        scale: as in `attention`.
        softcap: as in `attention`.
        window: as in `attention`.
        causal: as in `attention`.
        key_ranges: as in `attention`.
        return_lse: as in `attention`.
        out: as in `attention`.
        boundaries: int32 [B, C + 1], used in place of `config.boundaries`, for example those of an earlier layer. Only
            for methods that cut keys into chunks.
        key_indexes: a `_core.KeyIndex` for each batch item, for methods that cut keys into chunks. Boundaries and chunk
            means that an earlier call computed for the same keys are reused. A single query is then a decoding step
            (arXiv 2510.24606): keys are selected for this query alone, and the tokens that earlier decoding steps
            added form one chunk.
        same: how many of the keys the caller states to be those of the last call. Of many such keys, a KeyIndex
            compares only some in each call; it compares all other keys.
        keep_means: whether to keep the means of chunks, which take most of the memory of a KeyIndex.
    """
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config: expected a dhsa.Config or None, got {type_name(config)}")
    kind, q, k, v, target, lse, key_ranges = _open(q, k, v, out, return_lse, key_ranges)
    skip = None if config is None else config.skip
    if boundaries is not None:
        if config is None or config.exact or not config.options.has_chunks:
            method = "an exact config" if config is None or config.exact else f"method={config.method!r}"
            raise ValueError(f"boundaries: {method} cuts no chunks; expected None")
        boundaries = _boundary_array(boundaries, k.shape[0])
    args = (q, k, v, target, lse, scale, softcap, window, causal, key_ranges, get_num_threads(), skip)
    if config is None or config.exact:
        start = perf_counter()
        skipped = _core.attend_dense(*args)
        seconds = perf_counter() - start
        path = "window" if window is not None and window < k.shape[2] else "dense"
        stats = RunStats(path, 1.0, 0.0, seconds, skipped)
    else:
        if key_ranges is not None or not causal:
            name = "causal" if key_ranges is None else "key_ranges"
            raise NotImplementedError(f"{name}: selection needs plain causal attention; use an exact config for others")
        check_rank(k, "k", "[B, Hkv, Lk, D]")
        done, *report = _core.prefill(*args, _cutting(config), boundaries, key_indexes, same, int(keep_means))
        stats = RunStats(PATHS[done], *report)
    if type(kind) is DlpackKind:  # what `_open` allocated are still Buffers
        target, lse = _results(kind, target, lse, out)
    return target if out is None else out, lse, stats


# fmt: off  # four signatures that differ in q, return_lse and the result only
@overload
def attention(
    q: ArrayT,
    k: Array,
    v: Array,
    config: Config | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    causal: bool = ...,
    key_ranges: ArrayLike | None = ...,
    return_lse: Literal[False] = ...,
    out: ArrayT | None = ...,
) -> ArrayT: ...
@overload
def attention(
    q: npt.NDArray[ScalarT],
    k: Array,
    v: Array,
    config: Config | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    causal: bool = ...,
    key_ranges: ArrayLike | None = ...,
    return_lse: Literal[True],
    out: npt.NDArray[ScalarT] | None = ...,
) -> tuple[npt.NDArray[ScalarT], npt.NDArray[np.float32]]: ...
@overload
def attention(
    q: ArrayT,
    k: Array,
    v: Array,
    config: Config | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    causal: bool = ...,
    key_ranges: ArrayLike | None = ...,
    return_lse: Literal[True],
    out: ArrayT | None = ...,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def attention(
    q: ArrayT,
    k: Array,
    v: Array,
    config: Config | None = ...,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    causal: bool = ...,
    key_ranges: ArrayLike | None = ...,
    return_lse: bool,
    out: ArrayT | None = ...,
) -> ArrayT | tuple[ArrayT, Any]: ...
# fmt: on
def attention(
    q: Any,
    k: Array,
    v: Array,
    config: Config | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    key_ranges: ArrayLike | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Compute attention over the keys that `config` selects.

    With a config of None, or a budget of None, attention is exact over all visible keys. The logits are s = scale * (q
    . k), then softcap * tanh(s / softcap), then the mask, then softmax. Sums are float32. A NaN or infinity in q, k or
    v reaches exactly the rows that see it, as in exact attention; with `config.skip`, one in v may be left out where
    its probability is below that bound.

    Args:
        q: [B, H, Lq, D]; float32, float16 or bfloat16. Any strides, except that the last one must be 1. D is at most
            256.
        k: [B, Hkv, Lk, D]. H is a multiple of Hkv; query heads h * G to h * G + G - 1 use KV head h, where G = H / Hkv.
        v: [B, Hkv, Lk, D].
        config: a Config. Sparse attention is causal. A sequence no longer than the budget is attended to exactly.
        scale: factor of the logits, at most 1e38. None: 1 / sqrt(D).
        softcap: bound of the logits, 1e-30 to 1e38, applied smoothly by tanh. None: no bound.
        window: sliding window: the query at position p sees the keys j with p - window < j <= p. None: all keys up to
            p.
        causal: False: every query sees every key (exact attention without a window only).
        key_ranges: int32 [B, Lq, 2]: query i of batch item b sees the keys start <= j < stop, in place of causality and
            window (exact attention only). Useful for padded batches.
        return_lse: also return the log-sum-exp of the masked logits.
        out: [B, H, Lq, D], written to; of q's kind and dtype, sharing no memory with the inputs.

    Returns:
        [B, H, Lq, D] of q's kind and dtype (`out` itself if given). With return_lse, a tuple of it and the log-sum-exp,
            float32 [B, H, Lq], natural logarithm. A query that sees no key gives zeros and -inf.

    Raises:
        TypeError: the dtypes or kinds of arrays are not those above, or are mixed. The message names the argument, as
            it does for all errors here.
        ValueError: a rank, size, stride, device, range or overlap of memory is wrong, or the config has a `share`.
        NotImplementedError: autograd and other transforms, recorders and tensor subclasses of torch; D above 256;
            selection without plain causality.

    Source: arXiv 2510.24606; without a config, plain softmax attention.
    """
    if isinstance(config, Config) and config.share is not None:
        raise ValueError(
            f"share: {config.share!r} is between the layers of a patched model, and one call has no other layers; "
            "keep what dhsa.select returns and give it to dhsa.sparse_attention"
        )
    result, lse, _ = run(
        q,
        k,
        v,
        config,
        scale=scale,
        softcap=softcap,
        window=window,
        causal=causal,
        key_ranges=key_ranges,
        return_lse=return_lse,
        out=out,
    )
    return (result, lse) if return_lse else result


# fmt: off  # four signatures that differ in q, return_lse and the result only
@overload
def sparse_attention(
    q: ArrayT,
    k: Array,
    v: Array,
    selection: Selection,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    skip: float | None = ...,
    return_lse: Literal[False] = ...,
    out: ArrayT | None = ...,
) -> ArrayT: ...
@overload
def sparse_attention(
    q: npt.NDArray[ScalarT],
    k: Array,
    v: Array,
    selection: Selection,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    skip: float | None = ...,
    return_lse: Literal[True],
    out: npt.NDArray[ScalarT] | None = ...,
) -> tuple[npt.NDArray[ScalarT], npt.NDArray[np.float32]]: ...
@overload
def sparse_attention(
    q: ArrayT,
    k: Array,
    v: Array,
    selection: Selection,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    skip: float | None = ...,
    return_lse: Literal[True],
    out: ArrayT | None = ...,
) -> tuple[ArrayT, ArrayT]: ...
@overload
def sparse_attention(
    q: ArrayT,
    k: Array,
    v: Array,
    selection: Selection,
    *,
    scale: float | None = ...,
    softcap: float | None = ...,
    window: int | None = ...,
    skip: float | None = ...,
    return_lse: bool,
    out: ArrayT | None = ...,
) -> ArrayT | tuple[ArrayT, Any]: ...
# fmt: on
def sparse_attention(
    q: Any,
    k: Array,
    v: Array,
    selection: Selection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    skip: float | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Compute causal attention over the keys of a selection.

    This is the second half of `attention`, for a selection that was made before. Causality and `window` apply to each
    query within the lists. The selection is checked in full against the shapes of q and k, so a selection of another
    layer may be used.

    Args:
        q: as in `attention`.
        k: as in `attention`.
        v: as in `attention`.
        selection: a Selection.
        scale: as in `attention`.
        softcap: as in `attention`.
        window: as in `attention`.
        skip: as `Config.skip`.
        return_lse: as in `attention`.
        out: as in `attention`.

    Returns:
        As `attention`.

    Raises:
        TypeError: as in `attention`, or `selection` is no Selection.
        ValueError: as in `attention`, or the selection does not fit q and k (batch, heads, blocks, key range).
        NotImplementedError: as in `attention`.
    """
    result, lse, _ = run_selected(
        q, k, v, selection, scale=scale, softcap=softcap, window=window, skip=skip, return_lse=return_lse, out=out
    )
    return (result, lse) if return_lse else result


def run_selected(
    q: ArrayT,
    k: Array,
    v: Array,
    selection: Selection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    key_ranges: ArrayLike | None = None,
    skip: float | None = None,
    return_lse: bool = False,
    out: ArrayT | None = None,
) -> tuple[ArrayT, ArrayT | None, RunStats]:
    """Compute `sparse_attention` and report what was done, as `run` does for `attention`. No time is spent on
    selection.

    Args:
        q: as in `attention`.
        k: as in `attention`.
        v: as in `attention`.
        selection: a Selection.
        scale: as in `attention`.
        softcap: as in `attention`.
        window: as in `attention`.
        key_ranges: as in `attention`, within the lists. The lists then state which keys exist, and none is left out.
        skip: as `Config.skip`.
        return_lse: as in `attention`.
        out: as in `attention`.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a dhsa.Selection, got {type_name(selection)}")
    kind, q, k, v, target, lse, key_ranges = _open(q, k, v, out, return_lse, key_ranges)
    start = perf_counter()
    # Copies: the core checks them once and then relies on them, while another thread might make them writeable.
    indptr, indices = selection.indptr.copy(), selection.indices.copy()
    density, skipped = _core.attend_sparse(
        q,
        k,
        v,
        target,
        lse,
        scale,
        softcap,
        window,
        True,
        key_ranges,
        get_num_threads(),
        skip,
        indptr,
        indices,
        selection.shape,
        selection.query_block,
    )
    path, density = ("sparse", density) if key_ranges is None else ("dense", 1.0)
    stats = RunStats(path, density, 0.0, perf_counter() - start, skipped)
    if type(kind) is DlpackKind:  # what `_open` allocated are still Buffers
        target, lse = _results(kind, target, lse, out)
    return target if out is None else out, lse, stats


def _config(config: object) -> Config:
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a dhsa.Config, got {type_name(config)}")
    return config


def _cutting(config: Config) -> _core.Config:
    """`config` for _core; ValueError if keys are to be cut by a predictor that has no network for all layers."""
    if config.boundaries == "predictor" and config.predictor is not None:
        config.predictor._args()
    return config._core


def _boundaries(k: Any, config: Config) -> np.ndarray:
    check_rank(k, "k", "[B, Hkv, Lk, D]")
    batch, length = k.shape[0], k.shape[2]
    check_int(length, "k: its length", 1, _core.MAX_LENGTH)
    parsed = _cutting(config)
    result = empty((batch, _core.boundaries_capacity(parsed, length)), np.int32, "k")
    counts = empty((batch,), np.int64, "k")
    _core.boundaries(k, parsed, result, counts, get_num_threads())
    most = int(counts.max(initial=2))
    return result if most == result.shape[1] else np.ascontiguousarray(result[:, :most])


@overload
def boundaries(k: npt.NDArray[Any], config: Config) -> npt.NDArray[np.int32]: ...
@overload
def boundaries(k: ArrayT, config: Config) -> ArrayT: ...
def boundaries(k: Any, config: Config) -> Any:
    """Cut keys into chunks of variable length, as `config.boundaries` says.

    Args:
        k: [B, Hkv, Lk, D], as in `attention`.
        config: a Config.

    Returns:
        int32 [B, C + 1] of k's kind, with 0 = b0 < b1 < ... = Lk. Batch items may have different numbers of chunks: C
            is the largest number, and shorter rows are padded at the end with Lk, which reads as empty chunks.

    Raises:
        TypeError: as in `attention`.
        ValueError: as in `attention`, or the predictor's width is not Hkv * D.
        NotImplementedError: as in `attention`.

    Source: arXiv 2510.24606, boundary prediction; similarity boundaries are this project's.
    """
    kind = kind_of(k, "k")
    return kind.result(_boundaries(kind.accept(k, "k"), _config(config)))


@overload
def pick_boundaries(
    scores: npt.NDArray[Any] | Sequence[float], n: int, *, theta: float, nms: int, instruction: int | None = ...
) -> npt.NDArray[np.int32]: ...
@overload
def pick_boundaries(scores: ArrayT, n: int, *, theta: float, nms: int, instruction: int | None = ...) -> ArrayT: ...
def pick_boundaries(scores: Any, n: int, *, theta: float, nms: int, instruction: int | None = None) -> Any:
    """Pick boundaries from the scores of gaps, the highest score first, with a minimum distance.

    Of equal scores, the lower index comes first.

    Args:
        scores: [L]; entry j scores the gap between keys j and j + 1. The last entry, which is no gap, is ignored. A NaN
            is never picked.
        n: the most gaps to accept, at least 0 (so at most n + 1 chunks).
        theta: a gap is accepted only if its score exceeds it. -inf: any finite score.
        nms: a gap is accepted only if it lies more than this many keys from every gap accepted before it.
        instruction: the sequence ends in an instruction of this many tokens: gap L - instruction is accepted first and
            counts in n, and later gaps are skipped.

    Returns:
        int32 [C + 1] of the kind of `scores`: 0, the accepted gaps plus 1 in ascending order, and L.

    Raises:
        TypeError: an argument of the wrong type; the message names it.
        ValueError: an argument out of range; the message names it.

    Source: arXiv 2510.24606, boundary prediction.
    """
    array = to_numpy(scores, "scores")
    if array.dtype.kind not in "fiu":
        raise TypeError(f"scores: expected real numbers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"scores: expected 1 dimension, got {array.ndim}")
    if not 1 <= array.size <= _core.MAX_LENGTH:
        raise ValueError(f"scores: expected 1 to {_core.MAX_LENGTH} entries, got {array.size}")
    n = check_int(n, "n", 0)
    if (array.dtype.itemsize > 4 or array.dtype.kind != "f") and isinstance(theta, (int, float, np.number)):
        array, theta = _ranked(array, theta)
    array = np.ascontiguousarray(array, np.float32)
    result = np.empty(min(n, array.size) + 3, np.int32)
    count = _core.pick_boundaries(array, n, theta, nms, instruction, result)
    kind = kind_of(scores, "scores") if hasattr(type(scores), "__dlpack__") else NumpyKind
    return kind.result(result[:count].copy())


def _ranked(scores: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
    """Return float32 scores and a threshold that order as the given wider numbers do.

    Rounding to float32 could make different scores equal, or move one across the threshold.
    """
    with np.errstate(over="ignore"):
        narrow = scores.astype(np.float32)
    if np.array_equal(narrow, scores) or isinstance(theta, bool) or theta != theta:  # the core refuses a bool and NaN
        return narrow, theta
    # Bit patterns of positive float32 numbers ascend with the numbers. Ranks start at the smallest normal one.
    rank = np.unique(scores, return_inverse=True)[1].reshape(-1).astype(np.int32) + 0x00800000
    ranked = rank.view(np.float32)
    ranked[~(scores > theta)] = -np.inf
    return ranked, -np.inf


def _boundary_array(value: ArrayLike, batch: int) -> np.ndarray:
    """Return boundaries as int32 [B, n]. One row serves all batch items. The core checks the contents."""
    array = int_array(value, "boundaries", np.int32)
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise ValueError(f"boundaries: expected 2 dimensions [B, C + 1], got {array.ndim}")
    if array.shape[1] < 2:
        raise ValueError(f"boundaries: expected at least the two entries 0 and Lk, got {array.shape[1]}")
    if array.shape[0] == 1 and batch > 1:
        array = np.broadcast_to(array, (batch, array.shape[1]))
    if array.shape[0] != batch:
        raise ValueError(f"boundaries: expected {batch} rows, one a batch item, got {array.shape[0]}")
    # A copy: the core checks it once and then relies on it, while another thread might write to the caller's.
    result = empty(array.shape, np.int32, "boundaries")
    result[...] = array
    return result


def _score_shape(q: Any, k: Any, heads: int, query_block: int) -> tuple[int, int, int]:
    """Return (B, number of lists that heads share, nq), after the checks that allocating results needs. The core does
    the others.
    """
    for x, name, axes in ((q, "q", "[B, H, Lq, D]"), (k, "k", "[B, Hkv, Lk, D]")):
        check_rank(x, name, axes)
        for axis, size in enumerate(x.shape):
            if size < 1:  # before results of that size are allocated
                raise ValueError(f"{name}: dimension {axis} has size {size}, expected at least 1")
        check_int(x.shape[2], f"{name}: its length", 1, _core.MAX_LENGTH)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: batch is {k.shape[0]}, expected {q.shape[0]} as q")
    sets = (k.shape[1], 1, q.shape[1])[heads]  # in the order of HEADS
    return q.shape[0], sets, -(-q.shape[2] // query_block)


# fmt: off
@overload
def chunk_scores(
    q: npt.NDArray[Any], k: Array, boundaries: ArrayLike, *, query_block: int, score: Literal["block", "rows"] = ...,
    pooling: Literal["mean", "mean_sqrt"] = ..., heads: Literal["all", "group", "head"] = ...,
    scale: float | None = ..., softcap: float | None = ..., rows: int | None = ...,
    window: int | None = ...,
) -> npt.NDArray[np.float32]: ...
@overload
def chunk_scores(
    q: ArrayT, k: Array, boundaries: ArrayLike, *, query_block: int, score: Literal["block", "rows"] = ...,
    pooling: Literal["mean", "mean_sqrt"] = ..., heads: Literal["all", "group", "head"] = ...,
    scale: float | None = ..., softcap: float | None = ..., rows: int | None = ...,
    window: int | None = ...,
) -> ArrayT: ...
# fmt: on
def chunk_scores(
    q: Any,
    k: Array,
    boundaries: ArrayLike,
    *,
    query_block: int,
    score: Literal["block", "rows"] = "block",
    pooling: Literal["mean", "mean_sqrt"] = "mean_sqrt",
    heads: Literal["all", "group", "head"] = "all",
    scale: float | None = None,
    softcap: float | None = None,
    rows: int | None = None,
    window: int | None = None,
) -> Any:
    """Score every chunk of keys for every block of queries.

    float32 input is scored in float32. Selection needs only the order of scores, and rounds the means of "rows" to
    bf16.

    Args:
        q: as in `attention`.
        k: as in `attention`.
        boundaries: int [B, C + 1] (or [C + 1] for all items), from 0 to Lk, not decreasing. A repeated entry is an
            empty chunk, as in padding.
        query_block: queries in a block, 1 to 65536.
        score: "block" (the paper's: product of the block's mean query and the chunk's mean key, each the mean over the
            heads that share a selection) or "rows" (softmax over chunk means for each of `rows` mean queries and each
            head, in which a chunk counts once for each of its keys; squares of the share of one key, summed).
        pooling: for "block": "mean", or "mean_sqrt" (times the square root of the length, for queries and keys).
        heads: which heads share a selection: "all", "group" or "head".
        scale: None: 1 for "block", 1 / sqrt(D) for "rows".
        softcap: bounds the logits of "rows", or the products of "block". None: no bound.
        rows: for "rows": mean queries of a full block. None: query_block // 2.
        window: the layer's sliding window, which bounds a block's candidate keys.

    Returns:
        float32 [B, heads, nq, C] of q's kind. Chunks without a candidate key (past the block's end, before the window,
            or padding) score -inf. A chunk whose mean key is not finite scores +inf, so that it is always selected.

    Raises:
        TypeError: as in `attention`.
        ValueError: as in `attention`, or boundaries that decrease or are out of range.
        NotImplementedError: as in `attention`.

    Source: arXiv 2510.24606, sparse selection ("block"); "rows" is this project's.
    """
    kind = kind_of(q, "q")
    q, k = kind.accept(q, "q"), kind.accept(k, "k")
    query_block = check_int(query_block, "query_block", 1, MAX_QUERY_BLOCK)
    check_choice(score, "score", SCORES)
    check_choice(pooling, "pooling", POOLINGS)
    heads_index = check_choice(heads, "heads", HEADS)
    rows = max(1, query_block // 2) if rows is None else check_int(rows, "rows", 1, query_block)
    shape = _score_shape(q, k, heads_index, query_block)
    cuts = _boundary_array(boundaries, k.shape[0])
    result = empty((*shape, cuts.shape[1] - 1), np.float32, "q")
    config = _core.Config(
        method="dhsa" if score == "block" else score,
        query_block=query_block,
        rows=rows,
        pooling=pooling,
        heads=heads,
    )
    _core.chunk_scores(q, k, cuts, config, scale, softcap, window, result, get_num_threads())
    return kind.result(result)


def select(
    q: Array,
    k: Array,
    config: Config,
    *,
    boundaries: ArrayLike | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Selection:
    """Select the keys that each block of queries may attend to: the first half of `attention`.

    Args:
        q: as in `attention`.
        k: as in `attention`.
        config: a Config. With a budget and a mass of None, every block takes all its candidate keys.
        boundaries: int [B, C + 1], used in place of `config.boundaries`, for example those of an earlier layer. None
            for methods without chunks.
        window: the layer's sliding window.
        scale: the layer's factor of the logits. Not used by "dhsa". None: 1 / sqrt(D).
        softcap: the layer's bound of the logits. Not used by "dhsa". None: no bound.

    Returns:
        A Selection of shape (B, heads, nq). Its arrays are NumPy, whatever the kind of q is.

    Raises:
        TypeError: as in `attention`.
        ValueError: as in `attention` and `chunk_scores`.
        NotImplementedError: as in `attention`.

    Source: arXiv 2510.24606, sparse selection.
    """
    config = _config(config)
    kind = kind_of(q, "q")
    q, k = kind.accept(q, "q"), kind.accept(k, "k")
    shape = _score_shape(q, k, HEADS.index(config.heads), config.query_block)
    chunks = config.options.has_chunks
    if not chunks and boundaries is not None:
        raise ValueError(f"boundaries: method={config.method!r} cuts no chunks; expected None")
    if config.method == "dhsa":
        scale = softcap = None  # only the order of its products matters
    indptr = empty((shape[0] * shape[1] * shape[2] + 1,), np.int64, "q")
    _core.select_plan(q, k, config._core, scale, softcap, window, indptr)
    cuts = None
    if chunks:
        cuts = _boundaries(k, config) if boundaries is None else _boundary_array(boundaries, k.shape[0])
    indices = empty((int(indptr[-1]),), np.int32, "config")
    _core.select(q, k, cuts, config._core, scale, softcap, window, indptr, indices, get_num_threads())
    if indptr[-1] < indices.size:
        indices = indices[: indptr[-1]].copy()  # with a share of mass, fewer keys may be taken than allocated
    return Selection._trusted(
        indptr,
        indices,
        shape=shape,
        query_block=config.query_block,
        boundaries=cuts,
        q_len=q.shape[2],
        k_len=k.shape[2],
        window=None if window is None else check_int(window, "window", 1),
    )


def set_isa(name: str) -> None:
    """Set the instruction set tier that the whole process uses.

    Args:
        name: one of those that `build_info()` lists as detected, or "auto" for the best one (or the one that the
            environment variable DHSA_ISA named at the start).

    Raises:
        TypeError: `name` is not a str.
        ValueError: the tier is unknown, or not usable on this CPU.
    """
    _core.isa_set(name)


def build_info() -> dict[str, Any]:
    """Return what was compiled, detected and chosen.

    Returns:
        A dict of `compiler`; `c_standard`; `limited_api` (the lowest Python version); `isa_compiled` and `isa_detected`
            (lists, the lowest tier first); `isa` (the tier in use); `products` (the dtypes that this tier multiplies
            without conversion; others are converted to float32 while packing); `cpu_count` (CPUs of this process); and
            `num_threads` (of the next call).
    """
    return {**_core.build_info(), "num_threads": get_num_threads()}
