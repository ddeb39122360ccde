"""Attention masks of transformers as key ranges: for every query, the intervals [start, stop) of keys that it sees.

A range table is [B, m, Lq, 2] int32 (four dimensions, because transformers passes 4-D masks on untouched), linear in
the prompt where a mask tensor is quadratic, and says the same. Nearly always m is 1; a query with fewer than m
intervals has empty ones, (0, 0), in place of the missing. This module makes one from whatever transformers or the user
hands over, and finds the stretches of it that are plain causal or sliding-window attention, which may then run
sparse. It computes no attention and knows nothing of models.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .tracing import traced_ranges, tracing

__all__ = [
    "MAX_INTERVALS",
    "Segment",
    "causal_rows",
    "key_range_mask",
    "padding_of",
    "ranges_of",
    "segments",
    "without_padding",
]

# Each interval is an attention call of its own. Padding between turns of a conversation makes a few; a mask that needs
# more than this is of another kind (strided, random), for which ranges are the wrong form.
MAX_INTERVALS = 16

# Masks given as [.., Lq, Lk] tensors are read in slices of about this many elements.
_SLICE_ELEMENTS = 1 << 22

# An additive mask hides a key with -inf, with the smallest number of some dtype, or (older code) with -1e9. All of
# these are at or below float16's minimum; anything else that is not 0 is a bias, which is something other than a mask.
_HIDDEN = -65504.0


class Segment(NamedTuple):
    """Queries [q_start, q_stop) of batch row `row` (None: of every row) that attend causally, within `window` if given,
    to the keys [k_start, k_stop), the last query at the last of these keys. `pairs` counts the (query, key) pairs of
    one row."""

    row: int | None
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    window: int | None
    pairs: int


# ---- the mask function that transformers calls -----------------------------------------------------------------------


def key_range_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: object,
) -> torch.Tensor | None:
    """The mask for attention implementation "dhsa", in the signature of transformers' AttentionMaskInterface.

    Returns None where the queries are the last `q_length` of `kv_length` positions, nothing is padded and no window
    cuts anything off; else a range table, int32 [batch_size, m, q_length, 2]. Never a [q_length, kv_length] tensor.

    A query that is itself padding (its own entry of `attention_mask` is False) sees nothing: its output is zeros. Two
    kinds see what transformers says in any case, because `generate` reads their logits of a right-padded row: the last
    query, and one before a real token (with an assistant, prompt and candidates are one call).

    Raises NotImplementedError if some query would see keys in more than MAX_INTERVALS intervals.
    """
    if tracing():
        return traced_ranges(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip, use_vmap, "allow_is_bidirectional_skip" in kwargs,
        )  # fmt: skip
    q_offset = int(q_offset)  # static caches count in a tensor
    # Positions below count from the first key that the attention function will be given.
    first = q_offset - kv_offset
    padding = padding_of(attention_mask, kv_offset, kv_length)

    plain = allow_is_causal_skip and not use_vmap
    if plain and not _follows(mask_function, local_size, batch_size, q_length, kv_length, q_offset, kv_offset):
        plain = False  # a pattern of another kind, for instance chunked attention, which also names a local size
    if not plain:
        # Any pattern at all: evaluate it some queries at a time, and keep of each row only where it begins and ends.
        parts = []
        step = max(1, _SLICE_ELEMENTS // max(1, batch_size * kv_length))
        for start in range(0, q_length, step):
            piece = sdpa_mask(
                batch_size=batch_size,
                q_length=min(step, q_length - start),
                kv_length=kv_length,
                q_offset=q_offset + start,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                allow_is_causal_skip=False,
                allow_is_bidirectional_skip=False,
                use_vmap=use_vmap,
            )
            parts.append(_intervals(piece[:, 0].cpu().numpy(), start))
        return torch.from_numpy(_joined(parts, axis=2))

    aligned = first + q_length == kv_length
    cut = local_size is not None and first + q_length > local_size
    if padding is None and aligned and not cut:
        return None
    rows = causal_rows(batch_size, q_length, kv_length, first, local_size)
    return torch.from_numpy(without_padding(rows, padding, first))


def padding_of(attention_mask: torch.Tensor | None, kv_offset: int, kv_length: int) -> np.ndarray | None:
    """bool [B, up to kv_length], False for padding, of the keys from `kv_offset` on; None if all of them are tokens."""
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(dtype=torch.bool, device="cpu").numpy()
    return None if padding.shape[1] == kv_length and padding.all() else padding


def causal_rows(
    batch_size: int, q_length: int, kv_length: int, first: int, window: int | None, begins: np.ndarray | None = None
) -> np.ndarray:
    """int32 [B, Lq, 2]: what each query from key `first` on sees, from where it begins ([B or 1, Lk], a number a key),
    within `window`, up to itself."""
    position = np.arange(first, first + q_length, dtype=np.int64)
    ranges = np.empty((batch_size, q_length, 2), np.int32)
    ranges[:, :, 0] = 0 if begins is None else begins[:, position.clip(0, kv_length - 1)]
    if window is not None and first + q_length > window:
        ranges[:, :, 0] = np.maximum(ranges[:, :, 0], position - window + 1)
    ranges[:, :, 1] = np.minimum(position + 1, kv_length)
    return ranges


def without_padding(ranges: np.ndarray, padding: np.ndarray | None, first: int) -> np.ndarray:
    """The range table [B, m, Lq, 2] of `ranges` [B, Lq, 2] less the keys that are padding."""
    if padding is None:
        return ranges[:, None]
    real = _intervals(padding[:, None, :], what="attention_mask")  # [B, m, 1, 2]
    start = np.maximum(ranges[:, None, :, 0], real[..., 0])
    stop = np.minimum(ranges[:, None, :, 1], real[..., 1])
    table = np.stack([start, stop], axis=-1)
    # Queries that are padding. Those past the mask's end are not: transformers only calls their keys hidden.
    position = np.arange(first, first + ranges.shape[1])
    known = (position >= 0) & (position < padding.shape[1])
    known[-1] = False
    served = padding.copy()
    served[:, :-1] |= padding[:, 1:]
    table[:, :, known] *= served[:, None, position[known], None]
    table[table[..., 0] >= table[..., 1]] = 0
    if table.shape[1] == 1:
        return table
    # Every query's intervals first, what is empty last: each column that is left is an attention call.
    order = np.argsort(table[..., 1] == 0, axis=1, kind="stable")
    table = np.take_along_axis(table, order[..., None], axis=1)
    return table[:, : max(1, int((table[..., 1] > 0).sum(axis=1).max()))]


def _follows(
    mask_function: Callable,
    window: int | None,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
) -> bool:
    """Whether `mask_function` is causal attention with this window, judged by the whole key rows of four queries.

    Only asked where transformers says that the pattern is its own and unmodified, so that the question is merely which
    of its patterns it is; a chunked pattern differs from a sliding one in all rows but the last of each chunk.
    """
    if mask_function is causal_mask_function and window is None:
        return True
    probes = sorted({0, q_length // 2, max(q_length - 2, 0), q_length - 1})
    q = torch.tensor(probes)[None, None, :, None] + q_offset
    kv = torch.arange(kv_length)[None, None, None, :] + kv_offset
    batch = torch.arange(batch_size)[:, None, None, None]
    found = mask_function(batch, torch.zeros(1, 1, 1, 1, dtype=torch.long), q, kv)
    expected = kv <= q
    if window is not None:
        expected = expected & (kv > q - window)
    return bool((found == expected).all())


# ---- any mask an attention function may meet -------------------------------------------------------------------------

# A model hands the same tensor to every layer: read a big one once. Weak, so that nothing is kept alive.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def ranges_of(mask: torch.Tensor, batch: int, q_len: int, k_len: int, window: int | None) -> np.ndarray:
    """The ranges int32 [batch, m, q_len, 2] (contiguous, not to be written to) of a mask of one of these kinds:

    - int32 [B or 1, m, Lq, 2]: a range table already;
    - [B, Lk] bool or integer, True or 1 for a real token: key padding over plain attention, the last query at the last
      key, within `window` if given;
    - [B or 1, heads or 1, Lq, >= Lk] bool (True: visible) or additive (0: visible, -inf or a dtype's minimum: hidden),
      equal in all heads. It is complete: causality and window come from it alone, as in transformers.

    Raises ValueError on a shape that does not fit, TypeError on a dtype that is none of these, NotImplementedError if
    some query's keys are more than MAX_INTERVALS intervals, if heads differ, or if the additive mask carries other
    values (a position bias).
    """
    if mask.ndim == 4 and mask.dtype == torch.int32 and 1 <= mask.shape[1] <= MAX_INTERVALS and mask.shape[3] == 2:
        ranges = mask.cpu().numpy()
        if ranges.shape[1] > 1:  # compiled masks come with room for all that there could be
            used = ranges.any(axis=(0, 2, 3))
            used[0] = True
            ranges = ranges[:, used]
        if ranges.shape[0] not in (1, batch) or ranges.shape[2] != q_len:
            raise ValueError(
                f"attention_mask: expected key ranges of shape [{batch}, m, {q_len}, 2], got {tuple(mask.shape)}"
            )
        if ranges.size and (ranges.min() < 0 or ranges[..., 1].max() > k_len):
            raise ValueError(f"attention_mask: key ranges reach beyond the {k_len} keys")
        return _spread(ranges, batch, q_len)
    if mask.ndim == 2:
        if mask.shape[0] != batch or mask.shape[1] < k_len:
            raise ValueError(f"attention_mask: expected shape [{batch}, {k_len}], got {tuple(mask.shape)}")
        first = k_len - q_len
        rows = causal_rows(batch, q_len, k_len, first, window)
        return np.ascontiguousarray(without_padding(rows, padding_of(mask[:, -k_len:], 0, k_len), first))
    if mask.ndim != 4:
        raise ValueError(f"attention_mask: expected 2 or 4 dimensions, got shape {tuple(mask.shape)}")
    if mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, q_len) or mask.shape[3] < k_len:
        raise ValueError(f"attention_mask: expected shape [{batch}, 1, {q_len}, {k_len}], got {tuple(mask.shape)}")

    version = None if mask.is_inference() else mask._version
    known = _known.get(mask)
    if known is not None and version is not None and known[:2] == (version, k_len):
        ranges = known[2]
    else:
        ranges = _read_4d(mask, k_len)
        if version is not None:  # an inference tensor does not say when it changes
            _known[mask] = (version, k_len, ranges)
    return _spread(ranges, batch, q_len)


def _spread(ranges: np.ndarray, batch: int, q_len: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(ranges, (batch, ranges.shape[1], q_len, 2)))


def _read_4d(mask: torch.Tensor, k_len: int) -> np.ndarray:
    """Ranges [B', m, Lq', 2] of a 4-D mask, its sizes 1 kept as they are; read in slices."""
    mask = mask.detach()[..., :k_len]
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"attention_mask: a 4-D mask must be bool or additive floating point, got {mask.dtype}")
    heads = 1 if mask.stride(1) == 0 else mask.shape[1]
    step = max(1, _SLICE_ELEMENTS // max(1, k_len))
    rows = []
    for b in range(mask.shape[0]):
        parts: list[np.ndarray] = []
        for start in range(0, mask.shape[2], step):
            stop = min(start + step, mask.shape[2])
            for h in range(heads):
                piece = mask[b, h, start:stop]
                if piece.dtype != torch.bool:
                    visible = piece == 0
                    if not bool((visible | (piece <= _HIDDEN)).all()):
                        raise NotImplementedError(
                            "attention_mask: an additive mask may hold 0 and -inf (or a dtype's minimum) only; "
                            'this one carries other values, a position bias, which "dhsa" does not add'
                        )
                    piece = visible
                found = _intervals(piece.cpu().numpy()[None], start, first_batch=b)
                if h == 0:
                    parts.append(found)
                elif not np.array_equal(parts[-1], found):
                    raise NotImplementedError(
                        'attention_mask: the heads have different masks, "dhsa" takes one for all heads'
                    )
        rows.append(_joined(parts, axis=2))
    return _joined(rows, axis=0)


def _joined(tables: list[np.ndarray], axis: int) -> np.ndarray:
    """Range tables [B, m, n, 2] put together, with empty intervals where one has fewer than another."""
    most = max(t.shape[1] for t in tables)
    padded = [np.pad(t, ((0, 0), (0, most - t.shape[1]), (0, 0), (0, 0))) if t.shape[1] < most else t for t in tables]
    return np.concatenate(padded, axis=axis)


def _intervals(
    visible: np.ndarray, first_row: int = 0, first_batch: int = 0, what: str = "attention mask"
) -> np.ndarray:
    """int32 [B, m, n, 2] of bool [B, n, Lk], m the most intervals that a row has. NotImplementedError if they are too
    many."""
    count = visible.sum(axis=-1, dtype=np.int32)
    start = visible.argmax(axis=-1).astype(np.int32)
    stop = (visible.shape[-1] - visible[..., ::-1].argmax(axis=-1)).astype(np.int32)
    empty = count == 0
    start[empty] = stop[empty] = 0
    if np.array_equal(stop - start, count):
        return np.stack([start, stop], axis=-1)[:, None]
    edge = np.zeros((*visible.shape[:-1], 1), bool)
    before, after = np.concatenate([edge, visible[..., :-1]], -1), np.concatenate([visible[..., 1:], edge], -1)
    begins, ends = visible & ~before, visible & ~after
    number = begins.sum(axis=-1)
    most = int(number.max())
    if most > MAX_INTERVALS:
        b, row = np.argwhere(number == most)[0]
        where = f"batch row {b + first_batch}" + ("" if what == "attention_mask" else f", query {row + first_row}")
        raise NotImplementedError(
            f'{what}: {where} sees keys in {most} separate intervals, "dhsa" serves at most {MAX_INTERVALS}; '
            'use attn_implementation="eager" for such masks'
        )
    table = np.zeros((*number.shape, most, 2), np.int32)
    b, row, key = np.nonzero(begins)  # in order, and so are the ends: the two belong together pair by pair
    slot = (begins.cumsum(axis=-1, dtype=np.int32) - 1)[b, row, key]
    table[b, row, slot, 0] = key
    table[b, row, slot, 1] = np.nonzero(ends)[2] + 1
    return np.ascontiguousarray(table.transpose(0, 2, 1, 3))


# ---- what of it is plain ---------------------------------------------------------------------------------------------


def segments(ranges: np.ndarray, limit: int = 64) -> list[Segment] | None:
    """Cuts ranges [B, Lq, 2], one interval a query, into stretches of plain causal or sliding-window attention; queries
    that see nothing are left out.

    Padded, packed and static-cache prompts come out as one stretch a sequence: either the only one of its batch row, or
    beginning with a query that sees one key, or the last query alone (of a right-padded row). Returns None for any
    other table (prefixes seen from both sides, bidirectional spans) and for rows of more than `limit` sequences: those
    are served by exact attention with the table itself.
    """
    if len(ranges) > 1 and (ranges[1:] == ranges[:1]).all():
        same = segments(ranges[:1], limit)
        return None if same is None else [s._replace(row=None) for s in same]
    found: list[Segment] = []
    for row, table in enumerate(ranges):
        start, stop = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
        seen = stop > start
        # A stretch goes on while each query sees one key more at its end and loses at most one at its beginning.
        lost = np.diff(start)
        goes_on = seen[1:] & seen[:-1] & (np.diff(stop) == 1) & (lost >= 0) & (lost <= 1)
        edges = np.concatenate([[0], np.flatnonzero(~goes_on) + 1, [len(start)]])
        edges = [int(e) for e in edges if e == len(start) or seen[e]]
        if len(edges) > limit + 1:
            return None
        for q_start, nxt in itertools.pairwise(edges):
            q_stop = nxt
            while q_stop > q_start and not seen[q_stop - 1]:
                q_stop -= 1
            s, e = start[q_start:q_stop], stop[q_start:q_stop]
            width = int((e - s).max())
            window = width if s[-1] > s[0] else None
            if window is not None and not np.array_equal(s, np.maximum(s[0], e - window)):
                return None
            if len(edges) > 2 and e[0] - s[0] != 1 and q_start < len(table) - 1:
                return None
            found.append(Segment(row, q_start, q_stop, int(s[0]), int(e[-1]), window, int((e - s).sum())))
    return found
