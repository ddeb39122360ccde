"""The parts of selection, for arrays: boundaries of chunks, scores of chunks, and the lists of a selection.

Kinds of arrays and shapes are those of functional.py, which attends over the keys that are selected here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from dhsa import _core
from dhsa._arrays import Kind, NumpyKind, check_int, check_rank, empty, int_array, kind_of, to_numpy, type_name
from dhsa._threads import get_num_threads
from dhsa._typing import Array, ArrayLike, ArrayT
from dhsa.config import HEADS, MAX_QUERY_BLOCK, POOLINGS, SCORES, Config, check_choice
from dhsa.methods.base import State
from dhsa.methods.lists import method_lists
from dhsa.selection import Selection

__all__ = ["boundaries", "chunk_scores", "pick_boundaries", "select"]


def _config(config: object) -> Config:
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a dhsa.Config, got {type_name(config)}")
    return config


def cutting(config: Config) -> _core.Config:
    """`config` for _core; ValueError if keys are to be cut by a predictor that has no network for all layers."""
    if config.boundaries == "predictor" and config.predictor is not None:
        config.predictor._args()
    return config._core


def _boundaries(k: Any, config: Config) -> np.ndarray:
    check_rank(k, "k", "[B, Hkv, Lk, D]")
    batch, length = k.shape[0], k.shape[2]
    check_int(length, "k: its length", 1, _core.MAX_LENGTH)
    parsed = cutting(config)
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


def boundary_array(value: ArrayLike, batch: int) -> np.ndarray:
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
    window: int | None = ..., causal: bool = ...,
) -> npt.NDArray[np.float32]: ...
@overload
def chunk_scores(
    q: ArrayT, k: Array, boundaries: ArrayLike, *, query_block: int, score: Literal["block", "rows"] = ...,
    pooling: Literal["mean", "mean_sqrt"] = ..., heads: Literal["all", "group", "head"] = ...,
    scale: float | None = ..., softcap: float | None = ..., rows: int | None = ...,
    window: int | None = ..., causal: bool = ...,
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
    causal: bool = True,
) -> Any:
    """Score every chunk of keys for every block of queries.

    Scores are computed from unrounded means in float32. Selection needs only their order, and rounds queries and means
    of "rows" to 8 bits.

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
        rows: for "rows": mean queries of a full block. None: half of query_block, rounded up, as in `Config`.
        window: the layer's sliding window, which bounds a block's candidate keys.
        causal: for "rows", False: the keys after the block are candidates too.

    Returns:
        float32 [B, heads, nq, C] of q's kind. Chunks without a candidate key (past the block's end, outside the window,
            or padding) score -inf. A chunk whose mean key is not finite scores +inf, so that it is always selected.

    Raises:
        TypeError: as in `attention`.
        ValueError: as in `attention`, or boundaries that decrease or are out of range.
        NotImplementedError: as in `attention`, or causal=False with score="block".

    Source: arXiv 2510.24606, sparse selection ("block"); "rows" is this project's.
    """
    kind = kind_of(q, "q")
    q, k = kind.accept(q, "q"), kind.accept(k, "k")
    query_block = check_int(query_block, "query_block", 1, MAX_QUERY_BLOCK)
    check_choice(score, "score", SCORES)
    check_choice(pooling, "pooling", POOLINGS)
    heads_index = check_choice(heads, "heads", HEADS)
    rows = (query_block + 1) // 2 if rows is None else check_int(rows, "rows", 1, query_block)
    shape = _score_shape(q, k, heads_index, query_block)
    cuts = boundary_array(boundaries, k.shape[0])
    result = empty((*shape, cuts.shape[1] - 1), np.float32, "q")
    config = _core.Config(
        method="dhsa" if score == "block" else score,
        query_block=query_block,
        rows=rows,
        pooling=pooling,
        heads=heads,
    )
    _core.chunk_scores(q, k, cuts, config, scale, softcap, window, causal, result, get_num_threads())
    return kind.result(result)


def select(
    q: Array,
    k: Array,
    config: Config,
    *,
    v: Array | None = None,
    key_scores: ArrayLike | None = None,
    boundaries: ArrayLike | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = True,
    state: State | None = None,
) -> Selection:
    """Select the keys that each block of queries may attend to: the first half of `attention`.

    Args:
        q: as in `attention`.
        k: as in `attention`.
        config: a Config. With a budget and a mass of None, every block takes all its candidate keys.
        v: as in `attention`, for methods that read values ("stem"), which need it. None for all others.
        key_scores: real numbers [B, n, Lk], the scores of single keys, which take the place of those that
            `config.method` would compute: for example how much a smaller draft model attends to each key. n is 1 (for
            all heads), Hkv or H; the heads that share a list add theirs. With `config.mass` they are shares of the mass
            on any scale, so at least 0. Forced keys, the budget and exact blocks stay those of `config`. Source: SpecKV
            and SpecPC, arXiv 2506.08373. None: the method computes them.
        boundaries: int [B, C + 1], used in place of `config.boundaries`, for example those of an earlier layer. None
            for methods without chunks.
        window: the layer's sliding window.
        scale: the layer's factor of the logits. Not used by "dhsa". None: 1 / sqrt(D).
        softcap: the layer's bound of the logits. Not used by "dhsa". None: no bound.
        causal: as in `attention`. The selection remembers it.
        state: for methods that use what they found in earlier layers ("spatten") or calls ("retrieval"): what
            `config.options.new_state()` returned for the first of them. It is read and then updated. None: this layer
            or call stands alone.

    Returns:
        A Selection of shape (B, heads, nq). Its arrays are NumPy, whatever the kind of q is.

    Raises:
        TypeError: as in `attention`; or `state` is not of the method.
        ValueError: as in `attention` and `chunk_scores`; `v` is missing, or given to a method that reads none;
            `key_scores` has the wrong shape, is not finite or, with a mass, negative; `state` is of another prompt.
        NotImplementedError: as in `attention`.

    Source: arXiv 2510.24606, sparse selection.
    """
    config = _config(config)
    kind = kind_of(q, "q")
    q, k = kind.accept(q, "q"), kind.accept(k, "k")
    shape = _score_shape(q, k, HEADS.index(config.heads), config.query_block)
    chunks = config.options.has_chunks and key_scores is None
    if key_scores is not None and boundaries is not None:
        raise ValueError("boundaries: key_scores are of single keys, not of chunks; expected None")
    if not chunks and boundaries is not None:
        raise ValueError(f"boundaries: method={config.method!r} cuts no chunks; expected None")
    if key_scores is not None:
        key_scores = given_scores(key_scores, config, q.shape[0], q.shape[1], k.shape[1], k.shape[2])
        config = _bounds(config)
    if v is not None and not config.options.reads_values:
        raise ValueError(f"v: method={config.method!r} reads no values; expected None")
    if key_scores is None and not (causal or config.options.in_core or config.options.has_both_sides):
        raise NotImplementedError(
            f"causal: method {config.method} selects for causal attention only; rows, block and window serve both sides"
        )
    if state is not None and (key_scores is not None or type(state) is not type(config.options.new_state())):
        raise TypeError(f"state: expected that of method={config.method!r}, got {type_name(state)}")
    if config.method == "dhsa":
        scale = softcap = None  # only the order of its products matters
    indptr = empty((shape[0] * shape[1] * shape[2] + 1,), np.int64, "q")
    _core.select_plan(q, k, config._core, scale, softcap, window, causal, indptr)
    if key_scores is not None or not config.options.in_core:
        return _in_numpy(kind, q, k, v, config, key_scores, scale, softcap, window, causal, state)
    cuts = None
    if chunks:
        cuts = _boundaries(k, config) if boundaries is None else boundary_array(boundaries, k.shape[0])
    indices = empty((int(indptr[-1]),), np.int32, "config")
    _core.select(q, k, cuts, config._core, scale, softcap, window, causal, indptr, indices, get_num_threads())
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
        causal=bool(causal),
    )


def given_scores(scores: ArrayLike, config: Config, batch: int, heads: int, kv_heads: int, k_len: int) -> np.ndarray:
    """`key_scores` as float64 [B, n, Lk], checked; TypeError or ValueError naming the argument otherwise."""
    array = to_numpy(scores, "key_scores")
    if array.dtype.kind not in "fiu":
        raise TypeError(f"key_scores: expected real numbers, got {array.dtype}")
    if array.ndim != 3:
        raise ValueError(f"key_scores: expected 3 dimensions [B, n, Lk], got {array.ndim}")
    sizes = dict.fromkeys((1, kv_heads, heads))
    if array.shape[0] != batch or array.shape[1] not in sizes or array.shape[2] != k_len:
        expected = f"[{batch}, {' or '.join(map(str, sizes))}, {k_len}]"
        raise ValueError(f"key_scores: expected shape {expected}, got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("key_scores: expected finite numbers, got a NaN or infinity")
    if config.mass is not None and (array < 0).any():
        raise ValueError("key_scores: with a mass they are shares of it; expected at least 0, got a negative one")
    return array.astype(np.float64)


_BOUNDS = ("budget", "mass", "floor", "query_block", "sink", "local", "dense_tail", "heads")


def _bounds(config: Config) -> Config:
    """A Config with the bounds of `config` for given scores, which may serve any mass and both sides."""
    return Config(method="block", **{name: getattr(config, name) for name in _BOUNDS})


def _in_numpy(
    kind: Kind,
    q: Any,
    k: Any,
    v: Any,
    config: Config,
    key_scores: np.ndarray | None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    causal: bool,
    state: State | None,
) -> Selection:
    """The selection by a method that is in NumPy, or by given scores. The arguments were checked."""
    options = {} if key_scores is not None else dataclasses.asdict(config.options)
    if key_scores is None and config.options.reads_values:
        if v is None:
            raise ValueError(f"v: method={config.method!r} reads the values; expected those of the keys, got None")
        v = kind.accept(v, "v")
        check_rank(v, "v", "[B, Hkv, Lk, E]")
        if tuple(v.shape[:3]) != tuple(k.shape[:3]):
            raise ValueError(f"v: expected [B, Hkv, Lk] = {list(k.shape[:3])} as k, got {list(v.shape[:3])}")
        v = kind.to_float32(v)
    found = method_lists(
        config.method,
        kind.to_float32(q),
        kind.to_float32(k),
        v=v,
        key_scores=key_scores,
        scale=scale,
        softcap=softcap,
        window=window,
        causal=causal,
        state=state,
        **{name: getattr(config, name) for name in _BOUNDS},
        **options,
    )
    return Selection._trusted(
        found.indptr,
        found.indices,
        shape=found.shape,
        query_block=found.query_block,
        q_len=found.q_len,
        k_len=found.k_len,
        window=None if window is None else check_int(window, "window", 1),
        causal=bool(causal),
    )
