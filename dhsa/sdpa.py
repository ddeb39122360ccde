"""Exact attention by torch's own signature, and torch's own calls sent here.

`scaled_dot_product_attention` is `torch.nn.functional.scaled_dot_product_attention` for tensors on the CPU, computed
by the C core. `replace_sdpa` and `replacing_sdpa` put a function in the place of torch's that serves the calls that
this one can serve and passes the others on, for programs that know nothing of this package. Needs torch, not
transformers; imported when one of its names is first used.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np

try:
    import torch
except ImportError as error:
    raise ImportError(
        f"{error}; scaled_dot_product_attention takes tensors of torch: pip install 'dhsa[hf]'", name=error.name
    ) from error

from dhsa import _core, functional
from dhsa._arrays import check_int, torch_obstacle, type_name
from dhsa._tensors import autocast, autocast_dtype, one_interval, visible
from dhsa.selection import Selection

__all__ = ["SdpaCounts", "replace_sdpa", "replacing_sdpa", "restore_sdpa", "scaled_dot_product_attention"]

# (queries, keys) below which torch's own function takes less time than this package, or as long: measured with two
# threads of a Xeon with AVX-512 and AMX by `benchmarks/bench_dropin.py --lengths`, November 2026.
LEAST = {torch.float32: (64, 96), torch.bfloat16: (32, 48), torch.float16: (32, 48)}

# Masks are read in slices of about this many elements.
SLICE = 1 << 20


class _Unserved(Exception):
    """Why a call is not served: the exception that `scaled_dot_product_attention` raises, and what a replacement
    counts the call under."""

    def __init__(self, error: type[Exception], reason: str, detail: str = "") -> None:
        self.error, self.reason, self.detail = error, reason, detail

    def refuse(self) -> NoReturn:
        raise self.error(self.reason + self.detail)


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute exact attention with the signature and the semantics of `torch.nn.functional`'s function of this name.

    Leading dimensions may be any number and broadcast, as in torch. In two points it is stricter than torch: `key` and
    `value` must be of one length, and a mask beside `is_causal` is refused. Under `torch.autocast` the inputs are cast
    to its dtype.

    Args:
        query: [..., H, Lq, D], or [Lq, D]; float32, float16 or bfloat16, on the CPU.
        key: [..., H, Lk, D]; with `enable_gqa` [..., Hkv, Lk, D], where H is a multiple of Hkv.
        value: [..., H, Lk, Dv]; with `enable_gqa` [..., Hkv, Lk, Dv].
        attn_mask: broadcastable to [..., H, Lq, Lk]. bool (True: the key is seen), or additive, float32 or of the
            query's dtype (0: seen; -inf, or -1e4 and less: hidden). The keys that a query sees must be one interval,
            or the same for all queries (padding). None: all keys.
        dropout_p: 0.0; there is no dropout.
        is_causal: query i sees the keys 0 to i, also where Lq and Lk differ.
        scale: factor of the logits, at most 1e38. None: 1 / sqrt(D).
        enable_gqa: query heads h * G to h * G + G - 1 use head h of `key` and `value`, where G = H / Hkv.

    Returns:
        [..., H, Lq, Dv] of the query's dtype. A query that sees no key gives zeros. Of tensors of four dimensions whose
            last one is contiguous, the result's memory is laid out as the query's.

    Raises:
        TypeError: an argument is of another type or dtype than those above. The message names the argument, as it does
            for all errors here.
        ValueError: shapes do not fit, tensors are not on the CPU, or `attn_mask` stands beside `is_causal`.
        NotImplementedError: dropout; a call that autograd records; masks other than those above (biases, several
            intervals that differ from query to query); D above 576 or Dv above 512; transforms, recorders and tensor
            subclasses of torch.
    """
    try:
        return _Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa).run()
    except _Unserved as unserved:
        refused = unserved
    refused.refuse()


class _Call:
    """One call, checked and brought into the form of the core: q [B, H, Lq, D], k and v [B, Hkv, Lk, D]."""

    def __init__(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any,
        dropout_p: Any,
        is_causal: Any,
        scale: Any,
        enable_gqa: Any,
    ) -> None:
        """Checks all but the contents of a mask. _Unserved if the call is none that can be served."""
        _check_tensors(query, key, value, attn_mask)
        _check_numbers(dropout_p, is_causal, scale, enable_gqa)
        if attn_mask is not None and is_causal:
            raise _Unserved(
                ValueError, "attn_mask: is given beside is_causal=True", "; a mask says itself what is causal"
            )
        query, key, value = autocast(query, key, value)
        _check_dtypes(query, key, value, attn_mask)
        if attn_mask is not None and attn_mask.numel():
            _visible(attn_mask[(-1,) * (attn_mask.ndim - 1)])  # most biases show in one row, and are refused here
        self.mask, self.causal, self.scale = attn_mask, is_causal, scale
        self.lead, self.heads, self.kv_heads = _leading(query, key, value, enable_gqa)
        self.q_len, self.k_len, self.width = query.shape[-2], key.shape[-2], value.shape[-1]
        _check_sizes(query, key, value)
        if attn_mask is not None:
            self.mask = _narrowed(attn_mask, (*self.lead, self.q_len, self.k_len))
        # Where torch's own kernel takes the tensors as they are, its result has the query's layout; else the plain one.
        dense = all(x.ndim == 4 and x.stride(-1) == 1 for x in (query, key, value))
        self.like = query if dense and query.shape[:2] == self.lead else None
        self.q, self.k, self.v = query, key, value

    def run(self) -> torch.Tensor:
        """The result. _Unserved if the mask is none that can be served."""
        shape = (*self.lead, self.q_len, self.width)
        if 0 in shape or self.k_len == 0:
            return self.q.new_zeros(shape)
        keys = _All() if self.mask is None else _read(self.mask, self.q_len, self.k_len)
        k_len = self.k_len
        if self.causal:
            k_len = min(self.q_len, k_len)  # those after it are seen by none
            keys = _causal(self.q_len, k_len)
        outer, heads, kv_heads = self.lead[: len(self.lead) - 1], self.heads, self.kv_heads
        q = self._flat(self.q, outer, heads, self.q_len)
        k, v = (self._flat(x[..., :k_len, :], outer, kv_heads, k_len) for x in (self.k, self.v))
        if keys.per_head:
            k, v = (x.repeat_interleave(heads // kv_heads, 1) if heads > kv_heads else x for x in (k, v))
            q, k, v = (x.reshape(-1, 1, *x.shape[2:]) for x in (q, k, v))
            outer = self.lead
        if self.like is not None and self.width == q.shape[-1] and not keys.per_head:
            out = torch.empty_like(self.like)
        else:
            out = q.new_empty((*q.shape[:-1], self.width))
        keys.attend(q, k, v, out, self.scale, outer)
        return out if out.shape == shape else out.view(shape)

    @staticmethod
    def _flat(x: torch.Tensor, outer: tuple[int, ...], heads: int, length: int) -> torch.Tensor:
        """[B, heads, length, D], the last dimension contiguous."""
        width = x.shape[-1]
        if x.ndim == 2:
            x = x[None]
        if x.shape[:-2] != (*outer, heads):
            x = x.expand(*outer, heads, length, width)
        if x.ndim != 4:
            x = x.reshape(math.prod(outer), heads, length, width)
        return x if x.stride(-1) == 1 or width == 1 else x.contiguous()


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_tensors(query: Any, key: Any, value: Any, attn_mask: Any) -> None:
    recorded = torch.is_grad_enabled()
    tensors: list[tuple[str, Any]] = [("query", query), ("key", key), ("value", value)]
    if attn_mask is not None:
        tensors.append(("attn_mask", attn_mask))
    for name, x in tensors:
        if not isinstance(x, torch.Tensor):
            raise _Unserved(TypeError, f"{name}: expected a torch tensor, got {type_name(x)}")
        if recorded and x.requires_grad:
            raise _Unserved(
                NotImplementedError,
                f"{name}: requires grad, and there is no backward pass",
                "; call under torch.no_grad() or torch.inference_mode()",
            )
        if obstacle := torch_obstacle(x):
            raise _Unserved(NotImplementedError, f"{name}: {obstacle}")
        if not x.is_cpu:
            raise _Unserved(ValueError, f"{name}: expected a tensor on the CPU, got one on device '{x.device.type}'")
        if x.layout is not torch.strided:
            raise _Unserved(ValueError, f"{name}: expected a dense tensor, got a {x.layout} one")
        if x.ndim < 2:
            raise _Unserved(ValueError, f"{name}: expected at least 2 dimensions, got {x.ndim}")


def _check_numbers(dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> None:
    if not isinstance(dropout_p, (int, float)):
        raise _Unserved(TypeError, f"dropout_p: expected a number, got {type_name(dropout_p)}")
    if dropout_p != 0:
        raise _Unserved(NotImplementedError, "dropout_p: is not 0, and there is no dropout", f", got {dropout_p}")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise _Unserved(TypeError, f"{name}: expected a bool, got {type_name(flag)}")
    if scale is None:
        return
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise _Unserved(TypeError, f"scale: expected a number, got {type_name(scale)}")
    if not abs(scale) <= 1e38:
        raise _Unserved(ValueError, "scale: expected a finite number of at most 1e38", f", got {scale}")


def _check_dtypes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None) -> None:
    if query.dtype not in LEAST:
        raise _Unserved(TypeError, f"query: expected float32, float16 or bfloat16, got {_name(query)}")
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise _Unserved(TypeError, f"{name}: dtype is {_name(x)}, expected {_name(query)} as query")
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise _Unserved(TypeError, f"attn_mask: expected bool, float32 or {_name(query)}, got {_name(attn_mask)}")


def _name(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _leading(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[tuple[int, ...], int, int]:
    """The dimensions of the result before the last two, the number of heads, and that of key and value."""
    q, k, v = (tuple(x.shape[:-2]) for x in (query, key, value))
    if q == k == v and q:
        return q, q[-1], q[-1]
    if not enable_gqa:
        lead = _broadcast(q, k, v)
        return (lead, lead[-1], lead[-1]) if lead else ((), 1, 1)
    if not (q and k and v):
        raise _Unserved(ValueError, "enable_gqa: needs query, key and value of at least 3 dimensions")
    if k[-1] != v[-1]:
        raise _Unserved(
            NotImplementedError,
            "value: its number of heads is not that of key",
            f", got {v[-1]} and {k[-1]}; repeat the heads of one of them",
        )
    if k[-1] == 0 or q[-1] % k[-1]:
        raise _Unserved(ValueError, "key: its heads do not divide those of query", f", got {k[-1]} and {q[-1]}")
    return (*_broadcast(q[:-1], k[:-1], v[:-1]), q[-1]), q[-1], k[-1]


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise _Unserved(
            ValueError,
            "key: the leading dimensions of query, key and value do not broadcast",
            f", got {', '.join(str(list(s)) for s in shapes)}",
        ) from None


def _check_sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    dim, width = query.shape[-1], value.shape[-1]
    if key.shape[-1] != dim:
        raise _Unserved(ValueError, "key: its last dimension is not query's", f", got {key.shape[-1]} and {dim}")
    if value.shape[-2] != key.shape[-2]:
        raise _Unserved(
            ValueError, "value: its length is not that of key", f", got {value.shape[-2]} and {key.shape[-2]}"
        )
    if dim == 0:
        raise _Unserved(ValueError, "query: its last dimension has size 0")
    if dim > _core.MAX_HEAD_DIM:
        raise _Unserved(NotImplementedError, f"query: its last dimension is above {_core.MAX_HEAD_DIM}", f", got {dim}")
    if width > _core.MAX_VALUE_DIM:
        message = f"value: its last dimension is above {_core.MAX_VALUE_DIM}"
        raise _Unserved(NotImplementedError, message, f", got {width}")


# ---- masks -----------------------------------------------------------------------------------------------------------


class _All(NamedTuple):
    """Every query sees every key."""

    per_head: bool = False  # whether each head is an item of the batch

    def attend(self, q: Any, k: Any, v: Any, out: Any, scale: float | None, outer: tuple[int, ...]) -> None:
        functional.run(q, k, v, scale=scale, causal=False, out=out)


class _Square(NamedTuple):
    """Query i sees the keys 0 to i, the last query the last key."""

    per_head: bool = False

    def attend(self, q: Any, k: Any, v: Any, out: Any, scale: float | None, outer: tuple[int, ...]) -> None:
        functional.run(q, k, v, scale=scale, out=out)


class _Ranges(NamedTuple):
    """Each query sees the keys of one interval: `table` int32 [..., Lq or 1, 2], its other dimensions broadcastable to
    the leading ones of the call."""

    table: np.ndarray
    per_head: bool = False

    def attend(self, q: Any, k: Any, v: Any, out: Any, scale: float | None, outer: tuple[int, ...]) -> None:
        table = np.broadcast_to(self.table, (*outer, q.shape[2], 2)).reshape(q.shape[0], q.shape[2], 2)
        functional.run(q, k, v, scale=scale, key_ranges=table, out=out)


class _Lists(NamedTuple):
    """All queries see the same keys: `seen` bool [..., Lk], its other dimensions broadcastable to the leading ones."""

    seen: np.ndarray
    per_head: bool = False

    def attend(self, q: Any, k: Any, v: Any, out: Any, scale: float | None, outer: tuple[int, ...]) -> None:
        seen = np.broadcast_to(self.seen, (*outer, k.shape[2])).reshape(q.shape[0], k.shape[2])
        counts = np.count_nonzero(seen, axis=1)
        indptr = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        indices = np.nonzero(seen)[1].astype(np.int32)
        spans = np.zeros((q.shape[0], q.shape[2], 2), np.int32)
        some = counts > 0
        spans[some, :, 0] = seen.argmax(1)[some, None]
        spans[some, :, 1] = k.shape[2] - seen[:, ::-1].argmax(1)[some, None]
        selection = Selection._trusted(indptr, indices, shape=(len(q), 1, 1), query_block=q.shape[2])
        functional.run_selected(q, k, v, selection, scale=scale, key_ranges=spans, out=out)


def _causal(q_len: int, k_len: int) -> Any:
    if q_len == k_len:
        return _Square()
    table = np.zeros((q_len, 2), np.int32)
    table[:, 1] = np.minimum(np.arange(1, q_len + 1), k_len)
    return _Ranges(table)


def _narrowed(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A mask with as many dimensions as `shape`, of size 1 wherever all its rows are the same memory."""
    sizes = (1,) * (len(shape) - mask.ndim) + tuple(mask.shape)
    if len(sizes) != len(shape) or any(m not in (1, n) for m, n in zip(sizes, shape, strict=True)):
        raise _Unserved(
            ValueError,
            "attn_mask: does not broadcast to the leading dimensions, queries and keys",
            f", expected {list(shape)}, got {list(mask.shape)}",
        )
    if mask.ndim < len(shape):
        mask = mask[(None,) * (len(shape) - mask.ndim)]
    for axis in range(len(shape) - 1):
        if mask.stride(axis) == 0 and mask.shape[axis] > 1:
            mask = mask.narrow(axis, 0, 1)
    return mask if mask.shape[-1] == shape[-1] else mask.expand(*mask.shape[:-1], shape[-1])


def _read(mask: torch.Tensor, q_len: int, k_len: int) -> Any:
    """What a mask of `_narrowed` says. _Unserved if it is neither intervals nor the same for all queries."""
    lead, rows = mask.shape[:-2], mask.shape[-2]
    table = _intervals(mask.reshape(-1, k_len))
    if table is None:
        first = mask[..., :1, :]
        if rows > 1 and not torch.equal(mask, first.expand_as(mask)):
            raise _Unserved(
                NotImplementedError, "attn_mask: the keys of a query are several intervals, and differ among queries"
            )
        seen, per_head = _without_heads(_visible(first.reshape(-1, k_len)).reshape(*lead, k_len), axis=-2)
        return _Lists(seen, per_head)
    if (table == (0, k_len)).all():
        return _All()
    table, per_head = _without_heads(table.reshape(*lead, rows, 2), axis=-3)
    if rows == q_len == k_len and not table[..., 0].any() and (table[..., 1] == np.arange(1, k_len + 1)).all():
        return _Square(per_head)
    return _Ranges(table, per_head)


def _without_heads(array: np.ndarray, axis: int) -> tuple[np.ndarray, bool]:
    """`array` without its axis of heads, if they are all alike, and whether they are not; without leading dimensions
    there are no heads."""
    if array.ndim < -axis:
        return array, False
    first = array.take([0], axis)
    if array.shape[axis] == 1 or (array == first).all():
        return first.squeeze(axis), False
    return array, True


def _intervals(mask: torch.Tensor) -> np.ndarray | None:
    """int32 [R, 2], the interval of keys that each row of a mask [R, Lk] lets be seen; None if a row has several."""
    step = max(1, SLICE // mask.shape[1])
    tables = []
    for begin in range(0, len(mask), step):
        if (table := one_interval(_visible(mask[begin : begin + step]))) is None:
            return None
        tables.append(table)
    return np.concatenate(tables)


def _visible(mask: torch.Tensor) -> np.ndarray:
    """bool [R, Lk] or [Lk] of a mask, which may be additive. _Unserved if it is a bias."""
    if (seen := visible(mask)) is None:
        raise _Unserved(
            NotImplementedError, "attn_mask: is a bias", ": expected 0 for keys that are seen and -inf for others"
        )
    blind = ~seen.any(-1)
    if mask.dtype != torch.bool and blind.any() and not torch.isneginf(mask[torch.from_numpy(np.asarray(blind))]).all():
        raise _Unserved(  # a softmax of finite numbers alone makes probabilities
            NotImplementedError, "attn_mask: is a bias", ": a query whose keys are all hidden needs -inf for each"
        )
    return seen


# ---- in the place of torch's function --------------------------------------------------------------------------------


class SdpaCounts:
    """What became of the calls of `torch.nn.functional.scaled_dot_product_attention` since it was replaced.

    Attributes:
        served: the calls that this package computed.
        passed: the calls that were passed on to torch, a `collections.Counter` by reason; `passed.total()` is their
            number. A compiled graph counts once, when it is made, by a reason that begins with "torch.compile".
    """

    served: int
    passed: Counter[str]

    def __init__(self, break_even: int | None) -> None:
        self.served, self.passed = 0, Counter()
        self._break_even = break_even

    def __repr__(self) -> str:
        return f"SdpaCounts(served={self.served}, passed={dict(self.passed.most_common())})"


_lock = threading.Lock()
_active: tuple[SdpaCounts, ...] = ()  # of every replacement that has not ended, the latest last
_lasting: SdpaCounts | None = None  # that of `replace_sdpa`
_installed: Callable[..., Any] | None = None  # what stands in the place of torch's function
_original: Any = None  # what stood there before


def replace_sdpa(*, break_even: int | None = None) -> SdpaCounts:
    """Serve the calls of `torch.nn.functional.scaled_dot_product_attention` by this package, until `restore_sdpa`.

    For programs that know nothing of this package. The function is replaced for the whole process. Calls that
    `dhsa.scaled_dot_product_attention` can compute are served; the others are passed on to torch's function, arguments
    as they are. So are calls with fewer than 64 queries or 96 keys in float32, 32 or 48 in 16 bits, which torch
    computes as fast; calls in graphs that torch.compile or torch.export make; and those under
    `torch.nn.attention.sdpa_kernel`. Names that were imported from torch.nn.functional before keep torch's function.

    Args:
        break_even: pass on the calls with fewer keys than this, whatever the number of queries. 0: none. None: as
            measured, see above.

    Returns:
        The counts of calls from now on. If the function is replaced already, those of the call that did it.

    Raises:
        TypeError: `break_even` is not an int or None.
        ValueError: `break_even` is negative.
    """
    global _lasting
    with _lock:
        if _lasting is None:
            _lasting = _begin(break_even)
        else:
            _lasting._break_even = _checked(break_even)
        return _lasting


def restore_sdpa() -> None:
    """Put back the function that `replace_sdpa` replaced: afterwards it is the very object that it was.

    Inside a `with replacing_sdpa()` block, it is put back when that ends. If another package has replaced the function
    since, its replacement stays, and calls that it hands on go to torch.

    Raises:
        ValueError: `replace_sdpa` was not called, or its replacement has been undone.
    """
    global _lasting
    with _lock:
        if _lasting is None:
            raise ValueError("torch.nn.functional.scaled_dot_product_attention: not replaced by replace_sdpa")
        _end(_lasting)
        _lasting = None


@contextmanager
def replacing_sdpa(*, break_even: int | None = None) -> Iterator[SdpaCounts]:
    """`replace_sdpa` for the duration of a with statement, with counts of its own.

    Blocks may be nested, and may overlap in threads: the function is replaced for the whole process until the last one
    ends, and each counts all calls that happen meanwhile. The `break_even` of the block that began last applies.

    Args:
        break_even: as in `replace_sdpa`.

    Raises:
        TypeError: as in `replace_sdpa`.
        ValueError: as in `replace_sdpa`.
    """
    with _lock:
        counts = _begin(break_even)
    try:
        yield counts
    finally:
        with _lock:
            _end(counts)


def _checked(break_even: int | None) -> int | None:
    return None if break_even is None else check_int(break_even, "break_even", 0)


def _begin(break_even: int | None) -> SdpaCounts:
    global _active, _installed, _original
    counts = SdpaCounts(_checked(break_even))
    if not _active:
        _original = torch.nn.functional.scaled_dot_product_attention
        _installed = _replacement(_original)
        torch.nn.functional.scaled_dot_product_attention = _installed
    _active = (*_active, counts)
    return counts


def _end(counts: SdpaCounts) -> None:
    global _active, _installed, _original
    _active = tuple(c for c in _active if c is not counts)
    if not _active:
        if torch.nn.functional.scaled_dot_product_attention is _installed:
            torch.nn.functional.scaled_dot_product_attention = _original
        _installed = _original = None


def _replacement(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function for the place of `original`."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            _count_graph()
            return original(*args, **kwargs)
        if _installed is not replacement:  # left behind by another package that put its own above this one
            return original(*args, **kwargs)
        try:
            bound = _bind(*args, **kwargs)
        except TypeError:
            _count("arguments: not those of dhsa.scaled_dot_product_attention")
            return original(*args, **kwargs)
        if torch.overrides.has_torch_function(bound[:4]):
            if all(type(x) in _PLAIN for x in bound[:4]):  # a mode, such as torch.device as a context
                return torch.overrides.handle_torch_function(replacement, bound[:3], *args, **kwargs)
            _count("query, key, value or attn_mask: of a class of its own")
            return original(*args, **kwargs)
        try:
            _check_break_even(bound[0], bound[1])
            result = _Call(*bound).run()
        except _Unserved as unserved:
            _count(unserved.reason)
        else:
            _count(None)
            return result
        return original(*args, **kwargs)

    for name in ("__name__", "__qualname__", "__doc__"):
        setattr(replacement, name, getattr(original, name, None))
    replacement.__module__ = "torch.nn.functional"  # where pickle finds what has this name
    return replacement


def _bind(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> tuple[Any, ...]:
    """The arguments of a call in the order of `_Call`."""
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def _check_break_even(query: Any, key: Any) -> None:
    """_Unserved for a call that torch computes as fast, or with a backend that was asked for."""
    if not (torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()):
        raise _Unserved(NotImplementedError, "sdpa_kernel: some of torch's backends are ruled out")
    if not (isinstance(query, torch.Tensor) and isinstance(key, torch.Tensor) and query.ndim > 1 and key.ndim > 1):
        return
    active = _active
    least = active[-1]._break_even if active else None
    least_q, least_k = LEAST.get(autocast_dtype(query), (0, 0)) if least is None else (0, least)
    if query.shape[-2] < least_q:
        raise _Unserved(NotImplementedError, f"break-even: fewer than {least_q} queries")
    if key.shape[-2] < least_k:
        raise _Unserved(NotImplementedError, f"break-even: fewer than {least_k} keys")


@torch.compiler.assume_constant_result
def _count_graph() -> None:
    _count("torch.compile: a graph keeps torch's function")


def _count(reason: str | None) -> None:
    """Count a call in every replacement that has not ended: as served, or as passed on for a reason."""
    with _lock:
        for counts in _active:
            if reason is None:
                counts.served += 1
            else:
                counts.passed[reason] += 1
