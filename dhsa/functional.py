"""The functions of the package. They check arguments, fill in defaults, allocate results and call the C core.

Shapes: q is [B, H, Lq, D], k is [B, Hkv, Lk, D], v is [B, Hkv, Lk, E]. Query i is at key position i + (Lk - Lq).
Arrays are NumPy arrays, torch CPU tensors, or arrays of any library with DLPack and the array API namespace. All arrays
of a call are of one kind and one dtype (float32, float16 or bfloat16), and their last dimension is contiguous. Results
are of the kind of q.

The definitions of what is computed are in dhsa.reference; the arithmetic is in csrc/. The parts of selection are in
selecting.py.
"""

from __future__ import annotations

import warnings
from time import perf_counter
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from dhsa import _core
from dhsa._arrays import (
    DlpackKind,
    Kind,
    TorchKind,
    allocate,
    allocate_lse,
    check_rank,
    float_row,
    int_array,
    kind_of,
    type_name,
)
from dhsa._precision import (
    get_float32_precision,
    precision_argument,
    precision_in_use,
    set_float32_precision,
)
from dhsa._threads import get_num_threads, set_num_threads
from dhsa._typing import Array, ArrayLike, ArrayT, ScalarT
from dhsa.config import Config
from dhsa.selecting import boundaries, boundary_array, chunk_scores, cutting, pick_boundaries, select
from dhsa.selection import Selection

__all__ = [
    "RunStats",
    "attention",
    "boundaries",
    "build_info",
    "chunk_scores",
    "get_float32_precision",
    "get_num_threads",
    "pick_boundaries",
    "run",
    "run_selected",
    "select",
    "set_float32_precision",
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
    q: Any, k: Any, v: Any, out: Any, return_lse: bool, key_ranges: Any, sinks: Any
) -> tuple[Kind, Any, Any, Any, Any, Any, np.ndarray | None, np.ndarray | None]:
    """Return the kind of array and, checked: q, k, v, the output to write, the log-sum-exp to write or None,
    `key_ranges`, and `sinks` as float32."""
    kind = kind_of(q, "q")
    accept = kind.accept
    q, k, v = accept(q, "q"), accept(k, "k"), accept(v, "v")
    if out is None:
        target = allocate(kind, q, v)
    else:
        target = accept(out, "out")
        if kind is TorchKind and out.is_neg():
            raise ValueError("out: has its negative bit set (torch.Tensor.is_neg); results would not reach its memory")
        if kind is TorchKind and out._is_zerotensor():
            raise ValueError("out: is a tensor of zeros that has no memory")
    lse = allocate_lse(kind, q) if return_lse else None
    # Copies: the core checks them once and then relies on them, while another thread might write to the caller's.
    if key_ranges is not None:
        key_ranges = int_array(key_ranges, "key_ranges", np.int32, copy=True)
    if sinks is not None:
        sinks = float_row(kind, sinks, "sinks", q)
    return kind, q, k, v, target, lse, key_ranges, sinks


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
    sinks: Array | None = None,
    return_lse: bool = False,
    out: ArrayT | None = None,
    boundaries: ArrayLike | None = None,
    key_scores: ArrayLike | None = None,
    key_indexes: tuple[_core.KeyIndex, ...] | None = None,
    same: int = 0,
    keep_means: bool = True,
    pasts: tuple[_core.KeyIndex, ...] | None = None,
    keep: bool | None = None,
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
        sinks: as in `attention`.
        return_lse: as in `attention`.
        out: as in `attention`.
        boundaries: int32 [B, C + 1], used in place of `config.boundaries`, for example those of an earlier layer. Only
            for methods that cut keys into chunks.
        key_scores: as in `select`, in place of the scores of `config.method`.
        key_indexes: a `_core.KeyIndex` for each batch item, for methods that cut keys into chunks. Boundaries and chunk
            means that an earlier call computed for the same keys are reused. A single query is then a decoding step
            (arXiv 2510.24606): keys are selected for this query alone, and the tokens that earlier decoding steps
            added form one chunk.
        same: how many of the keys the caller states to be those of the last call. Of many such keys, a KeyIndex
            compares only some in each call; it compares all other keys.
        keep_means: whether to keep the means of chunks, which take most of the memory of a KeyIndex.
        pasts: the former name of `key_indexes`.
        keep: the former name of `keep_means`.
    """
    if pasts is not None or keep is not None:
        warnings.warn("pasts and keep: now named key_indexes and keep_means", DeprecationWarning, stacklevel=2)
        key_indexes = pasts if key_indexes is None else key_indexes
        keep_means = keep_means if keep is None else keep
    if config is not None and not isinstance(config, Config):
        raise TypeError(f"config: expected a dhsa.Config or None, got {type_name(config)}")
    if key_scores is not None and (config is None or config.exact):
        raise ValueError("key_scores: an exact config leaves no key out; expected None")
    if config is not None and not config.exact and (key_scores is not None or not config.options.in_core):
        if key_ranges is not None:
            raise NotImplementedError("key_ranges: selection takes none; use an exact config")
        seen: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
        rest: dict[str, Any] = {"sinks": sinks, "return_lse": return_lse, "out": out}
        return _select_and_run(q, k, v, config, key_scores, boundaries, causal, seen, rest)
    kind, q, k, v, target, lse, key_ranges, sinks = _open(q, k, v, out, return_lse, key_ranges, sinks)
    skip = None if config is None else config.skip
    if boundaries is not None:
        if config is None or config.exact or not config.options.has_chunks:
            method = "an exact config" if config is None or config.exact else f"method={config.method!r}"
            raise ValueError(f"boundaries: {method} cuts no chunks; expected None")
        boundaries = boundary_array(boundaries, k.shape[0])
    shared = (lse, scale, softcap, window, causal, key_ranges, get_num_threads(), skip, sinks, precision_argument())
    args = (q, k, v, target, *shared)
    if config is None or config.exact:
        start = perf_counter()
        skipped = _core.attend_dense(*args)
        seconds = perf_counter() - start
        path = "window" if window is not None and window < k.shape[2] else "dense"
        stats = RunStats(path, 1.0, 0.0, seconds, skipped)
    else:
        if key_ranges is not None:
            raise NotImplementedError("key_ranges: selection takes none; use an exact config")
        check_rank(k, "k", "[B, Hkv, Lk, D]")
        done, *report = _core.prefill(*args, cutting(config), boundaries, key_indexes, same, int(keep_means))
        stats = RunStats(PATHS[done], *report)
    if type(kind) is DlpackKind:  # what `_open` allocated are still Buffers
        target, lse = _results(kind, target, lse, out)
    return target if out is None else out, lse, stats


def _select_and_run(
    q: ArrayT,
    k: Array,
    v: Array,
    config: Config,
    key_scores: ArrayLike | None,
    boundaries: ArrayLike | None,
    causal: bool,
    seen: dict[str, Any],
    rest: dict[str, Any],
) -> tuple[ArrayT, ArrayT | None, RunStats]:
    """`run` by lists that are made outside of the core: by a method in NumPy, or from given scores."""
    check_rank(q, "q", "[B, H, Lq, D]")
    check_rank(k, "k", "[B, Hkv, Lk, D]")
    lengths = q.shape[2], k.shape[2]
    if 0 < lengths[0] <= lengths[1] and not config.leaves_out(*lengths, seen["window"], causal=causal):
        return run(q, k, v, Config(budget=None, skip=config.skip), causal=causal, **seen, **rest)
    start = perf_counter()
    values = v if config.options.reads_values and key_scores is None else None
    lists = select(q, k, config, v=values, key_scores=key_scores, boundaries=boundaries, causal=causal, **seen)
    seconds = perf_counter() - start
    result, lse, stats = run_selected(q, k, v, lists, skip=config.skip, **seen, **rest)
    return result, lse, stats._replace(select_seconds=seconds)


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
    sinks: Array | None = ...,
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
    sinks: Array | None = ...,
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
    sinks: Array | None = ...,
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
    sinks: Array | None = ...,
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
    sinks: Array | None = None,
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
            576.
        k: [B, Hkv, Lk, D]. H is a multiple of Hkv; query heads h * G to h * G + G - 1 use KV head h, where G = H / Hkv.
        v: [B, Hkv, Lk, E]. E may differ from D, and is at most 512.
        config: a Config. A sequence no longer than the budget is attended to exactly.
        scale: factor of the logits, at most 1e38. None: 1 / sqrt(D).
        softcap: bound of the logits, 1e-30 to 1e38, applied smoothly by tanh. None: no bound.
        window: sliding window: the query at position p sees the keys j with p - window < j <= p; with causal=False,
            those with p - window < j < p + window. None: all keys up to p; with causal=False, all keys.
        causal: False: every query sees the keys on both sides of it (bidirectional attention, as in encoders). Of a
            config that leaves keys out, the methods "rows", "block" and "window" can then be used; a block of queries
            selects keys on both sides, its `local` keys lie around it, and `dense_tail` does not apply.
        key_ranges: int32 [B, Lq, 2]: query i of batch item b sees the keys start <= j < stop, in place of causality and
            window (exact attention only). Useful for padded batches.
        sinks: [H] of q's kind, float32 or q's dtype: one logit for each query head, finite (at most 1e38) or -inf,
            which joins the softmax of every query and has no value, so that the weights of the keys add up to less than
            1. It is neither scaled nor bounded by `softcap`. With `config.skip`, it counts as a logit that each row has
            met before all keys. None: none.
        return_lse: also return the log-sum-exp of the masked logits, that of the sink included: the weight of a key is
            exp(logit - lse). To merge the results of attention to several disjoint sets of keys by their log-sum-exp,
            pass `sinks` for one of the sets only.
        out: [B, H, Lq, E], written to; of q's kind and dtype, sharing no memory with the inputs.

    Returns:
        [B, H, Lq, E] of q's kind and dtype (`out` itself if given). With return_lse, a tuple of it and the log-sum-exp,
            float32 [B, H, Lq], natural logarithm. A query that sees no key gives zeros and -inf (or its head's sink).

    Raises:
        TypeError: the dtypes or kinds of arrays are not those above, or are mixed. The message names the argument, as
            it does for all errors here.
        ValueError: a rank, size, stride, device, range or overlap of memory is wrong, or the config has a `share`.
        NotImplementedError: autograd and other transforms, recorders and tensor subclasses of torch; D above 576, E
            above 512; `key_ranges` with a config that leaves keys out; causal=False with a method of selection that is
            for causal attention only.

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
        sinks=sinks,
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
    sinks: Array | None = ...,
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
    sinks: Array | None = ...,
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
    sinks: Array | None = ...,
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
    sinks: Array | None = ...,
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
    sinks: Array | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Compute attention over the keys of a selection.

    This is the second half of `attention`, for a selection that was made before. Causality (unless the selection was
    made with causal=False) and `window` apply to each query within the lists. The selection is checked in full against
    the shapes of q and k, so a selection of another layer may be used.

    Args:
        q: as in `attention`.
        k: as in `attention`.
        v: as in `attention`.
        selection: a Selection.
        scale: as in `attention`.
        softcap: as in `attention`.
        window: as in `attention`.
        skip: as `Config.skip`.
        sinks: as in `attention`.
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
        q,
        k,
        v,
        selection,
        scale=scale,
        softcap=softcap,
        window=window,
        skip=skip,
        sinks=sinks,
        return_lse=return_lse,
        out=out,
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
    sinks: Array | None = None,
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
        sinks: as in `attention`.
        return_lse: as in `attention`.
        out: as in `attention`.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection: expected a dhsa.Selection, got {type_name(selection)}")
    kind, q, k, v, target, lse, key_ranges, sinks = _open(q, k, v, out, return_lse, key_ranges, sinks)
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
        selection.causal,
        key_ranges,
        get_num_threads(),
        skip,
        sinks,
        precision_argument(),
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
        A dict of `compiler`; `c_standard`; `limited_api` (the lowest Python version; None in free-threaded Python);
            `isa_compiled` and `isa_detected` (lists, the lowest tier first); `isa` (the tier in use); `products` (the
            dtypes that this tier multiplies without conversion; others are converted to float32 while packing);
            `float32_precisions` (those that this tier serves, see `set_float32_precision`; the others are computed as
            "highest"); `float32_precision` (of the next call, whether served or not); `cpu_count` (CPUs of this
            process); and `num_threads` (of the next call).
    """
    return {**_core.build_info(), "float32_precision": precision_in_use(), "num_threads": get_num_threads()}
