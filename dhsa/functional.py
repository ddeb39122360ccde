"""The functions of the package: arguments checked and defaulted, results allocated, the C core called.

Shapes: q [B, H, Lq, D], k and v [B, Hkv, Lk, D]; query i sits at key position i + (Lk - Lq). Arrays are NumPy, torch
(CPU) or of any library with DLPack and the array API namespace; all of one kind and one dtype (float32, float16 or
bfloat16), the last dimension contiguous. Results are of the kind of q. Not here: definitions (dhsa.reference),
arithmetic (csrc/).
"""

from __future__ import annotations

from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from dhsa import _core
from dhsa._arrays import (
    Array,
    DlpackKind,
    NumpyKind,
    TorchKind,
    allocate,
    check_int,
    empty,
    int_array,
    kind_of,
    to_numpy,
    type_name,
)
from dhsa._threads import get_num_threads, set_num_threads
from dhsa.config import HEADS, MAX_QUERY_BLOCK, POOLINGS, SCORES, Config, check_choice
from dhsa.selection import Selection

__all__ = [
    "RunStats",
    "attention",
    "attention_ratios",
    "boundaries",
    "boundary_ratios",
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

    path: "dense" (exact, all visible keys), "window" (exact, sliding window) or "sparse".
    density: (query, key) pairs attended / pairs visible; 1.0 on exact paths.
    select_seconds: boundaries, chunk scores and selection. attend_seconds: attention itself.
    skipped: the share of products of a tile of keys and a group of query rows that `Config.skip` left out.
    """

    path: str
    density: float
    select_seconds: float
    attend_seconds: float
    skipped: float = 0.0


def _inputs(q: Array, k: Array, v: Array, out: Array | None) -> tuple[Any, Array, Array, Array, Array, bool]:
    """Kind, checked q, k and v, the output to write, and whether it is the caller's own."""
    kind = kind_of(q, "q")
    q, k, v = kind.accept(q, "q"), kind.accept(k, "k"), kind.accept(v, "v")
    if out is None:
        return kind, q, k, v, allocate(kind.empty_like, q), False
    target = kind.accept(out, "out")
    if kind is TorchKind and out.is_neg():
        raise ValueError("out: has its lazy minus sign set; results would not reach its memory")
    if kind is TorchKind and out._is_zerotensor():
        raise ValueError("out: is a tensor of zeros that has no memory")
    return kind, q, k, v, target, True


def run(
    q: Array,
    k: Array,
    v: Array,
    config: Config | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    key_ranges: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
    boundaries: Array | None = None,
    pasts: tuple[Any, ...] | None = None,
    same: int = 0,
    keep: bool = True,
) -> tuple[Array, Array | None, RunStats]:
    """`attention` with a report: (out, lse or None, RunStats). For integrations; arguments, errors as in `attention`,
    but `config.share` is the caller's business.

    boundaries: int32 [B, C + 1], used in place of `config.boundaries`, for example those of an earlier layer, by a
    config with a method of chunks. pasts: a `_core.Past` for each batch item, of such a config: what an earlier call
    cut and averaged of the same keys is not done again, and a single query is a decoding step (arXiv 2510.24606): its
    keys are chosen for it alone, where the tokens that came by such steps are one chunk. same: so many keys are said to
    be those of the last call; where they are many, a Past looks at some of them in each call. It looks at all others.
    keep: whether the means of chunks stay, most of its memory.
    """
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config: expected a dhsa.Config or None, got {type_name(config)}")
    kind, q, k, v, target, given = _inputs(q, k, v, out)
    lse = allocate(kind.empty_lse, q) if return_lse else None
    if key_ranges is not None:
        # A copy: the core checks it once and then relies on it, while another thread might write to the caller's.
        key_ranges = int_array(key_ranges, "key_ranges", np.int32, copy=True)
    skip = None if config is None else config.skip
    if boundaries is not None:
        if config is None or config._exact or config.score is None:
            method = "an exact config" if config is None or config._exact else f"method={config.method!r}"
            raise ValueError(f"boundaries: {method} cuts no chunks; expected None")
        boundaries = _boundary_array(boundaries, k.shape[0])
    args = (q, k, v, target, lse, scale, softcap, window, causal, key_ranges, get_num_threads(), skip)
    if config is None or config._exact:
        start = perf_counter()
        skipped = _core.attend_dense(*args)
        seconds = perf_counter() - start
        path = "window" if window is not None and window < k.shape[2] else "dense"
        stats = RunStats(path, 1.0, 0.0, seconds, skipped)
    else:
        if key_ranges is not None or not causal:
            name = "causal" if key_ranges is None else "key_ranges"
            raise NotImplementedError(f"{name}: selection needs plain causal attention; use an exact config for others")
        if len(k.shape) != 4:
            raise ValueError(f"k: expected 4 dimensions [B, Hkv, Lk, D], got {len(k.shape)}")
        done, *report = _core.prefill(
            *args, config._boundary_args(k.shape[2]), config._select_args, boundaries, pasts, same, int(keep)
        )
        stats = RunStats(PATHS[done], *report)
    if type(kind) is DlpackKind:  # its results are Buffers until here
        target = target if given else kind.result(target)
        lse = None if lse is None else kind.result(lse)
    return out if given else target, lse, stats


def attention(
    q: Array,
    k: Array,
    v: Array,
    config: Config | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    key_ranges: Array | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Attention over the keys that `config` selects; exact over all visible keys with None or a budget of None.

    s = scale * q.k, then softcap * tanh(s / softcap), then the mask, then softmax; sums in float32. A NaN or infinity
    in q, k or v reaches exactly the rows that see it, as in exact attention; with `config.skip` one in v may be left
    out where its probability is that small.

    Args:
        q: [B, H, Lq, D]; float32, float16 or bfloat16. Any strides but the last, which must be 1. D at most 256.
        k, v: [B, Hkv, Lk, D], H a multiple of Hkv (heads h * G .. h * G + G - 1 use KV head h, G = H / Hkv).
        config: a Config. Sparse attention is causal; a sequence no longer than the budget is exact anyway.
        scale: factor of the logits, at most 1e38; None: 1 / sqrt(D).
        softcap: caps the logits smoothly at +-softcap, 1e-30 to 1e38; None: no cap.
        window: sliding window: the query at position p sees keys p - window < j <= p; None: all up to p.
        causal: False: every query sees every key (exact attention only, without a window).
        key_ranges: int32 [B, Lq, 2]: query i of batch item b sees keys start <= j < stop, in place of causality and
            window (exact attention only). Serves padded batches.
        return_lse: also return the log-sum-exp of the masked logits.
        out: [B, H, Lq, D] to write into, of q's kind and dtype, sharing no memory with the inputs.

    Returns:
        [B, H, Lq, D] of q's kind and dtype (`out` itself if given); with return_lse a tuple of it and float32 [B, H,
        Lq], natural log. A query that sees no key gives zeros and -inf.

    Raises:
        TypeError: dtypes or kinds other than those above, or mixed. ValueError: ranks, sizes, strides, devices, ranges,
        aliasing, a config with `share`. NotImplementedError: autograd and other transforms, recorders and subclasses of
        torch's, D above 256, selection without plain causality. All name the argument.

    Source: arXiv 2510.24606; without a config plain softmax attention.
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


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    selection: Selection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    skip: float | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> Any:
    """Causal attention over the keys of a selection: the second half of `attention`, for a selection made or kept
    before.

    Causality and `window` apply per token inside the lists; `skip` is `Config.skip`. The selection is checked in full
    against the shapes at hand, so one of another layer may be used. Arguments, results and errors otherwise as in
    `attention`.

    Raises:
        TypeError, ValueError: also if the selection does not fit q and k (batch, sharing, blocks, key range).
    """
    result, lse, _ = run_selected(
        q, k, v, selection, scale=scale, softcap=softcap, window=window, skip=skip, return_lse=return_lse, out=out
    )
    return (result, lse) if return_lse else result


def run_selected(
    q: Array,
    k: Array,
    v: Array,
    selection: Selection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    key_ranges: Array | None = None,
    skip: float | None = None,
    return_lse: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array | None, RunStats]:
    """`sparse_attention` with a report, as `run` is of `attention`; nothing was selected, so no seconds went there.

    key_ranges: as in `attention`, of what the lists hold. The lists then say which keys there are, none is left out.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a dhsa.Selection, got {type_name(selection)}")
    kind, q, k, v, target, given = _inputs(q, k, v, out)
    lse = allocate(kind.empty_lse, q) if return_lse else None
    if key_ranges is not None:
        key_ranges = int_array(key_ranges, "key_ranges", np.int32, copy=True)
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
    if type(kind) is DlpackKind:
        target = target if given else kind.result(target)
        lse = None if lse is None else kind.result(lse)
    return out if given else target, lse, stats


def _config(config: object) -> Config:
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a dhsa.Config, got {type_name(config)}")
    return config


def _boundaries(k: Array, config: Config) -> np.ndarray:
    if len(k.shape) != 4:
        raise ValueError(f"k: expected 4 dimensions [B, Hkv, Lk, D], got {len(k.shape)}")
    batch, length = k.shape[0], k.shape[2]
    check_int(length, "k: its length", 1, _core.MAX_LENGTH)
    args = config._boundary_args(length)
    result = empty((batch, _core.boundaries_capacity(args, length)), np.int32, "k")
    counts = empty((batch,), np.int64, "k")
    _core.boundaries(k, args, result, counts, get_num_threads())
    most = int(counts.max(initial=2))
    return result if most == result.shape[1] else np.ascontiguousarray(result[:, :most])


def boundaries(k: Array, config: Config) -> Array:
    """Cuts keys into chunks of variable length, by `config.boundaries`.

    Args:
        k: [B, Hkv, Lk, D] as in `attention`. config: a Config.

    Returns:
        int32 [B, C + 1] of k's kind: 0 = b0 < b1 < ... = Lk. Batch items may have different numbers of chunks: shorter
        rows are padded at the end by repeating Lk, so padding reads as empty chunks; C is the largest number of chunks.

    Raises:
        TypeError, ValueError: as in `attention`, or a predictor of another width than Hkv * D.

    Source: arXiv 2510.24606, boundary prediction; similarity boundaries are this project's.
    """
    kind = kind_of(k, "k")
    return kind.result(_boundaries(kind.accept(k, "k"), _config(config)))


def pick_boundaries(scores: Array, n: int, *, theta: float, nms: int, instruction: int | None = None) -> Array:
    """Picks boundaries from gap scores: best first (equal scores: lower index first), spaced out.

    Args:
        scores: [L], entry j scores the gap between keys j and j + 1; the last entry, no gap, is ignored. NaN never
            wins.
        n: the most gaps to accept, at least 0 (so n + 1 chunks).
        theta: a gap's score must exceed it; -inf: any finite score.
        nms: a gap must lie more than this many keys from every accepted one.
        instruction: an instruction of this many tokens ends the sequence: gap L - instruction is accepted first, counts
            in n, and later gaps are skipped.

    Returns:
        int32 [C + 1]: 0, the accepted gaps plus 1 in ascending order, L; of the kind of `scores`.

    Raises:
        TypeError, ValueError: naming the argument.

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
    """float32 scores and threshold that order as wider ones do, which float32 may round together or over theta."""
    with np.errstate(over="ignore"):
        narrow = scores.astype(np.float32)
    if np.array_equal(narrow, scores) or isinstance(theta, bool) or theta != theta:  # the core refuses the latter two
        return narrow, theta
    # The bits of positive float32 numbers ascend with them; from the smallest normal one on, ranks never reach inf.
    rank = np.unique(scores, return_inverse=True)[1].reshape(-1).astype(np.int32) + 0x00800000
    ranked = rank.view(np.float32)
    ranked[~(scores > theta)] = -np.inf
    return ranked, -np.inf


def _boundary_array(value: Array, batch: int) -> np.ndarray:
    """Boundaries as int32 [B, n]; one row serves all batch items. Their contents are checked by the core."""
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


def _score_shape(q: Array, k: Array, heads: int, query_block: int) -> tuple[int, int, int]:
    """(B, sharing sets, nq) of q and k, checked as far as results of this shape need it; the rest is the core's."""
    for x, name, axes in ((q, "q", "[B, H, Lq, D]"), (k, "k", "[B, Hkv, Lk, D]")):
        if len(x.shape) != 4:
            raise ValueError(f"{name}: expected 4 dimensions {axes}, got {len(x.shape)}")
        for axis, size in enumerate(x.shape):
            if size < 1:  # before results of that size are made
                raise ValueError(f"{name}: dimension {axis} has size {size}, expected at least 1")
        check_int(x.shape[2], f"{name}: its length", 1, _core.MAX_LENGTH)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: batch is {k.shape[0]}, expected {q.shape[0]} as q")
    sets = (k.shape[1], 1, q.shape[1])[heads]  # in the order of HEADS
    return q.shape[0], sets, -(-q.shape[2] // query_block)


def chunk_scores(
    q: Array,
    k: Array,
    boundaries: Array,
    *,
    query_block: int,
    score: str = "block",
    pooling: str = "mean_sqrt",
    heads: str = "all",
    scale: float | None = None,
    softcap: float | None = None,
    rows: int | None = None,
    by_length: bool = False,
    window: int | None = None,
) -> Array:
    """Scores every chunk of keys for every block of queries.

    Args:
        q, k: as in `attention`.
        boundaries: int [B, C + 1] (or [C + 1] for all items), from 0 to Lk, never falling; a repeated entry is an
            empty chunk, as in padding.
        query_block: queries in a block, 1 to 65536.
        score: "block" (the paper's: product of the block's mean query and the chunk's mean key, each the mean over the
            heads of a sharing set) or "rows" (softmax over chunk means for each of `rows` mean queries and each head;
            squares, summed).
        pooling: of the block score: "mean", or "mean_sqrt" (times the square root of the length, for both).
        heads: sharing sets: "all", "group" or "head".
        scale: None: 1 for "block", 1 / sqrt(D) for "rows". softcap: caps the logits, or the block's products; None: no
            cap.
        rows: mean queries of a full block for "rows"; None: query_block // 4.
        by_length: for "rows": a chunk counts in the softmax as often as it has keys, and its score is that of one key.
        window: the layer's sliding window, which bounds a block's candidate keys.

    float32 input is scored in float32; selection, which only needs the order, rounds the means of "rows" to bf16.

    Returns:
        float32 [B, heads, nq, C] of q's kind. Chunks without a candidate key (past the block's end, under the window,
        or padding) score -inf. A chunk whose mean key is not finite scores +inf, so that it is always selected.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `attention`, and for boundaries that are unsorted or out of
        range.

    Source: arXiv 2510.24606, sparse selection ("block"); "rows" is this project's.
    """
    kind = kind_of(q, "q")
    q, k = kind.accept(q, "q"), kind.accept(k, "k")
    query_block = check_int(query_block, "query_block", 1, MAX_QUERY_BLOCK)
    score_index = check_choice(score, "score", SCORES)
    pooling_index = check_choice(pooling, "pooling", POOLINGS)
    heads_index = check_choice(heads, "heads", HEADS)
    rows = max(1, query_block // 4) if rows is None else check_int(rows, "rows", 1, query_block)
    shape = _score_shape(q, k, heads_index, query_block)
    cuts = _boundary_array(boundaries, k.shape[0])
    result = empty((*shape, cuts.shape[1] - 1), np.float32, "q")
    score_args = (score_index, pooling_index, heads_index, query_block, rows, int(by_length))
    _core.chunk_scores(q, k, cuts, score_args, scale, softcap, window, result, get_num_threads())
    return kind.result(result)


def select(
    q: Array,
    k: Array,
    config: Config,
    *,
    boundaries: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Selection:
    """Selects the keys each block of queries may attend to: the first half of `attention`.

    Args:
        q, k: as in `attention`.
        config: a Config; with a budget and a mass of None every block takes all its candidates.
        boundaries: int [B, C + 1] to use in place of `config.boundaries`, for example those of an earlier layer; None
            for methods without chunks.
        window: the layer's sliding window. scale, softcap: the layer's, for all methods but "dhsa"; None: 1 / sqrt(D),
            no cap.

    Returns:
        A Selection of shape (B, heads, nq), its arrays NumPy whatever q is.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `attention` and `chunk_scores`.

    Source: arXiv 2510.24606, sparse selection.
    """
    config = _config(config)
    kind = kind_of(q, "q")
    q, k = kind.accept(q, "q"), kind.accept(k, "k")
    select_args = config._select_args
    shape = _score_shape(q, k, HEADS.index(config.heads), config.query_block)
    chunks = config.score is not None
    if not chunks and boundaries is not None:
        raise ValueError(f"boundaries: method={config.method!r} cuts no chunks; expected None")
    if config.score == "block":
        scale = softcap = None  # its products are only compared with each other
    indptr = empty((shape[0] * shape[1] * shape[2] + 1,), np.int64, "q")
    _core.select_plan(q, k, select_args, scale, softcap, window, indptr)
    cuts = None
    if chunks:
        cuts = _boundaries(k, config) if boundaries is None else _boundary_array(boundaries, k.shape[0])
    indices = empty((int(indptr[-1]),), np.int32, "config")
    _core.select(q, k, cuts, select_args, scale, softcap, window, indptr, indices, get_num_threads())
    if indptr[-1] < indices.size:
        indices = indices[: indptr[-1]].copy()  # a share of mass took less than there was room for
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


def boundary_ratios(attn: Array, *, window: int, sliding_window: int | None = None) -> Array:
    """The boundary predictor's training label: how differently later tokens attend to the two sides of a gap.

    Args:
        attn: [L, L], one head-mean attention matrix, rows queries; read as float32.
        window: w, keys on each side of a gap.
        sliding_window: W of a sliding layer: only the first W rows past the gap's future side count. None: all of them.

    Returns:
        float64 [L] of the kind of `attn`: (max + 1e-6) / (min + 1e-6) of the attention received by the w keys up to gap
        j and by the w after it; 0 where the gap lacks full windows (valid for 2w - 1 <= j < L - 2w).

    Raises:
        TypeError, ValueError: naming the argument.

    Source: arXiv 2510.24606, boundary labels.
    """
    array = to_numpy(attn, "attn")
    if array.dtype.kind != "f":
        raise TypeError(f"attn: expected floating point numbers, got {array.dtype}")
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.size == 0:
        raise ValueError(f"attn: expected one square matrix [L, L], got shape {list(array.shape)}")
    if array.dtype != np.float32 or (array.shape[1] > 1 and array.strides[1] != array.itemsize):
        try:
            array = np.ascontiguousarray(array, np.float32)
        except (MemoryError, ValueError) as error:
            raise MemoryError(f"attn: cannot be copied, its shape is {list(array.shape)}: {error}") from None
    check_int(array.shape[0], "attn: its length", 1, _core.MAX_LENGTH)
    result = empty((array.shape[0],), np.float64, "attn")
    _core.boundary_ratios(array, window, sliding_window, result, get_num_threads())
    kind = kind_of(attn, "attn") if hasattr(type(attn), "__dlpack__") else NumpyKind
    return kind.result(result)


def attention_ratios(
    q: Array,
    k: Array,
    *,
    window: int = 4,
    sliding_window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Array:
    """The training label straight from queries and keys: `boundary_ratios` of the head-mean of their causal attention
    matrix, which is never formed. Memory grows with L alone, about 190 bytes a key at the default window.

    Args:
        q, k: as in `attention`, with as many queries as keys.
        window: w, keys on each side of a gap, 1 to 64.
        sliding_window, scale, softcap: the layer's; None: none, 1 / sqrt(D), none.

    Returns:
        float64 [B, L] of q's kind; entry j as in `boundary_ratios`.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `attention`; ValueError also for logits that are not finite.

    Source: arXiv 2510.24606, boundary labels.
    """
    kind = kind_of(q, "q")
    q, k = kind.accept(q, "q"), kind.accept(k, "k")
    if len(q.shape) != 4:
        raise ValueError(f"q: expected 4 dimensions [B, H, L, D], got {len(q.shape)}")
    check_int(q.shape[2], "q: its length", 1, _core.MAX_LENGTH)
    result = empty((q.shape[0], q.shape[2]), np.float64, "q")
    _core.attention_ratios(q, k, window, sliding_window, scale, softcap, result, get_num_threads())
    return kind.result(result)


def set_isa(name: str) -> None:
    """Sets the instruction set tier of the whole process: one that `build_info()` lists as detected, or "auto" for the
    best (or what the environment variable DHSA_ISA said at the start).

    Raises:
        TypeError: not a str. ValueError: unknown, or not usable on this CPU.
    """
    _core.isa_set(name)


def build_info() -> dict[str, Any]:
    """What was compiled, detected and chosen: `compiler`, `c_standard`, `limited_api` (lowest Python version),
    `isa_compiled` and `isa_detected` (lists, lowest tier first), `isa` (in use), `products` (the dtypes that it
    multiplies as they are; the others are converted to float32 while packing), `cpu_count` (this process's),
    `num_threads` (of the next call).
    """
    return {**_core.build_info(), "num_threads": get_num_threads()}
