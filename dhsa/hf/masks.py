"""Attention masks of transformers as key ranges: for every query, the intervals [start, stop) of keys that it sees.

A range table is [B, m, Lq, 2] int32. It has four dimensions because transformers passes 4-D masks on unchanged. Its
size is linear in the prompt, that of a mask tensor is quadratic. m is nearly always 1; a query with fewer than m
intervals is filled up with empty ones, (0, 0). This module makes range tables from masks of transformers or of the
user, and finds their stretches of plain causal or sliding-window attention, which may then run sparse. It computes no
attention and does not depend on models.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from dhsa._tensors import one_interval, visible
from dhsa.config import Config

from .compat import outside_graphs
from .refusals import check_contents, check_padding
from .tracing import traced_ranges, tracing
from .transforms import refuse_transforms

__all__ = [
    "MAX_INTERVALS",
    "Least",
    "MaskPart",
    "causal_rows",
    "key_lists",
    "key_range_mask",
    "least_stretch",
    "mask_parts",
    "padding_of",
    "ranged_rows",
    "ranges_of",
    "two_sided",
    "without_padding",
]

# Each interval is an attention call of its own. Padding between turns of a conversation makes a few. A mask that needs
# more than this is of another kind (strided, random), for which intervals are not suited.
MAX_INTERVALS = 16

# Masks given as [.., Lq, Lk] tensors are read in slices of about this many elements.
_SLICE_ELEMENTS = 1 << 22

# The end of an interval that reaches to the last key, however many keys the attention function receives.
_TO_THE_LAST = np.iinfo(np.int32).max


class MaskPart(NamedTuple):
    """Queries [q_start, q_stop) of batch row `row` (None: of every row) and the keys [k_start, k_stop) that they see.

    Not `ranged`: causally, within `window` if given, the last query at the last of the keys; of `two_sided`, keys on
    both sides. `ranged`: as the table says (bidirectional spans, and stretches that are too short for a call of their
    own). `pairs` counts the (query, key) pairs of one row."""

    row: int | None
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    window: int | None
    pairs: int
    ranged: bool = False

    def covers(self, q_len: int, k_len: int) -> bool:
        """Whether the part is the whole call: every row, query and key."""
        return self[:5] == (None, 0, q_len, 0, k_len)

    def table(self, ranges: np.ndarray) -> np.ndarray:
        """The part of `ranges` [B, Lq, 2] that belongs to the part, relative to its first key."""
        rows = slice(None) if self.row is None else slice(self.row, self.row + 1)
        return np.maximum(ranges[rows, self.q_start : self.q_stop] - self.k_start, 0)  # no key: (0, 0)


# ---- the mask function that transformers calls -----------------------------------------------------------------------


@outside_graphs
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

    Returns None where the queries are the last `q_length` of `kv_length` positions, nothing is padded, no window hides
    a key and the layers know that they are causal. Else returns a range table, int32 [batch_size, m, q_length, 2]. It
    never makes a [q_length, kv_length] tensor.

    In a causal pattern, a query that is itself padding (its own entry of `attention_mask` is False) sees no key, and
    its output is zeros. Two kinds of such queries see what transformers says all the same, because `generate` reads
    their logits in a right-padded row: the last query, and one before a real token (in assisted generation, prompt and
    candidates are one call).

    Raises NotImplementedError if some query would see keys in more than MAX_INTERVALS intervals.
    """
    sides = "allow_is_bidirectional_skip" in kwargs and not use_vmap  # as transformers calls it for encoders
    everything = mask_function is bidirectional_mask_function and local_size is None and not use_vmap
    if everything and attention_mask is None and kwargs.get("allow_is_bidirectional_skip"):
        # Encoders pass no cache: `kv_length` is then the number of queries. transformers makes no mask here. This
        # function does, because some modules do not say that they are not causal.
        return torch.tensor([0, _TO_THE_LAST], dtype=torch.int32, device="cpu").repeat(batch_size, 1, q_length, 1)
    # The layers of such a model say that they are not causal, and would read None as full attention.
    told = getattr(kwargs.get("config"), "use_bidirectional_attention", None) not in (True, "all")
    if tracing():
        return traced_ranges(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip and told, use_vmap, "allow_is_bidirectional_skip" in kwargs,
        )  # fmt: skip
    refuse_transforms(attention_mask=attention_mask, q_offset=q_offset, q_length=q_length)
    if attention_mask is not None:
        check_padding(attention_mask, batch_size)
    q_offset = int(q_offset)  # a tensor in static caches
    # Positions below are relative to the first key that the attention function will receive.
    first = q_offset - kv_offset
    padding = padding_of(attention_mask, kv_offset, kv_length)

    at = (batch_size, q_length, kv_length, q_offset, kv_offset)
    if sides and _follows_sides(mask_function, local_size, *at):
        rows = _two_sided_rows(batch_size, q_length, kv_length, first, local_size)
        return torch.from_numpy(without_padding(rows, padding, None))
    plain = allow_is_causal_skip and not use_vmap
    if plain and not _follows(mask_function, local_size, *at):
        plain = False  # a pattern of another kind, for instance chunked attention, which also names a local size
    if not plain:
        # Any other pattern: evaluate it some queries at a time, and store only the ends of each row's intervals.
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
    if padding is None and aligned and not cut and told:
        return None
    rows = causal_rows(batch_size, q_length, kv_length, first, local_size)
    return torch.from_numpy(without_padding(rows, padding, first))


def padding_of(attention_mask: torch.Tensor | None, kv_offset: int, kv_length: int) -> np.ndarray | None:
    """bool [B, up to kv_length], False for padding, of the keys from `kv_offset` on; None if all of them are tokens."""
    if attention_mask is None:
        return None
    check_padding(attention_mask)
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(dtype=torch.bool, device="cpu").numpy()
    return None if padding.shape[1] == kv_length and padding.all() else padding


def causal_rows(
    batch_size: int, q_length: int, kv_length: int, first: int, window: int | None, begins: np.ndarray | None = None
) -> np.ndarray:
    """int32 [B, Lq, 2]: the interval of each query from position `first` on. It ends at the query itself, and begins at
    the number that `begins` [B or 1, Lk] has for it, or at the edge of `window`."""
    position = np.arange(first, first + q_length, dtype=np.int64)
    ranges = np.empty((batch_size, q_length, 2), np.int32)
    ranges[:, :, 0] = 0 if begins is None else begins[:, position.clip(0, kv_length - 1)]
    if window is not None and first + q_length > window:
        ranges[:, :, 0] = np.maximum(ranges[:, :, 0], position - window + 1)
    ranges[:, :, 1] = np.minimum(position + 1, kv_length)
    return ranges


def _two_sided_rows(batch_size: int, q_length: int, kv_length: int, first: int, radius: int | None) -> np.ndarray:
    """int32 [B, Lq, 2]: the interval of each query from position `first` on that sees all keys, or those at most
    `radius` away from it."""
    ranges = np.empty((batch_size, q_length, 2), np.int32)
    ranges[..., 0], ranges[..., 1] = 0, kv_length
    if radius is not None:
        position = np.arange(first, first + q_length, dtype=np.int64)
        ranges[..., 0] = np.clip(position - radius, 0, kv_length)
        ranges[..., 1] = np.clip(position + radius + 1, 0, kv_length)
        ranges[ranges[..., 0] >= ranges[..., 1]] = 0
    return ranges


def without_padding(ranges: np.ndarray, padding: np.ndarray | None, first: int | None) -> np.ndarray:
    """The range table [B, m, Lq, 2] of `ranges` [B, Lq, 2] without the keys that are padding, and without the keys of
    queries that are padding. `first`: the position of the first query, or None: queries that are padding see keys, as
    transformers lets them in encoders, whose convolutions may read their outputs."""
    if padding is None:
        return ranges[:, None]
    # [B, m, 1, 2]; keys past the mask's end are hidden, as in transformers' sdpa.
    none = np.zeros((len(padding), 1, 1, 2), np.int32)
    real = _intervals(padding[:, None, :], what="attention_mask") if padding.shape[1] else none
    start = np.maximum(ranges[:, None, :, 0], real[..., 0])
    stop = np.minimum(ranges[:, None, :, 1], real[..., 1])
    table = np.stack([start, stop], axis=-1)
    if first is not None:
        _hide_padding(table, padding, first)
    table[table[..., 0] >= table[..., 1]] = 0
    if table.shape[1] == 1:
        return table
    # The intervals of every query first, empty ones last: each column that remains is an attention call.
    order = np.argsort(table[..., 1] == 0, axis=1, kind="stable")
    table = np.take_along_axis(table, order[..., None], axis=1)
    return table[:, : max(1, int((table[..., 1] > 0).sum(axis=1).max()))]


def _hide_padding(table: np.ndarray, padding: np.ndarray, first: int) -> None:
    # Queries that are padding. Those past the mask's end are not: transformers hides only their keys.
    position = np.arange(first, first + table.shape[2])
    known = (position >= 0) & (position < padding.shape[1])
    known[-1] = False
    served = padding.copy()
    served[:, :-1] |= padding[:, 1:]
    table[:, :, known] *= served[:, None, position[known], None]


def _follows(mask_function: Callable, window: int | None, *at: int) -> bool:
    """Whether `mask_function` is causal attention with this window, judged by the whole key rows of four queries.
    `at`: as in `_probed`.

    Only called where transformers says that the pattern is one of its own and unmodified, so this only distinguishes
    between these. A chunked pattern differs from a sliding one in all rows but the last of each chunk.
    """
    if mask_function is causal_mask_function and window is None:
        return True
    found, q, kv = _probed(mask_function, *at)
    expected = kv <= q
    if window is not None:
        expected = expected & (kv > q - window)
    return bool((found == expected).all())


def _follows_sides(mask_function: Callable, radius: int | None, *at: int) -> bool:
    """Whether `mask_function` is bidirectional attention of all keys or of those at most `radius` away, judged as
    `_follows` does."""
    if radius is None:
        return mask_function is bidirectional_mask_function
    found, q, kv = _probed(mask_function, *at)
    return bool((found == ((kv - q).abs() <= radius)).all())


def _probed(
    mask_function: Callable, batch_size: int, q_length: int, kv_length: int, q_offset: int, kv_offset: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `mask_function` says about all keys for four queries, and the positions of these queries and of the keys."""
    probes = sorted({0, q_length // 2, max(q_length - 2, 0), q_length - 1})
    q = torch.tensor(probes, device="cpu")[None, None, :, None] + q_offset
    kv = torch.arange(kv_length, device="cpu")[None, None, None, :] + kv_offset
    batch = torch.arange(batch_size, device="cpu")[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device="cpu")
    return mask_function(batch, head, q, kv), q, kv


# ---- any mask an attention function may meet -------------------------------------------------------------------------


def ranges_of(
    mask: torch.Tensor,
    batch: int,
    q_len: int,
    k_len: int,
    window: int | None,
    causal: bool = True,
    heads: int | None = None,
) -> np.ndarray:
    """The ranges int32 [batch, m, q_len, 2] (contiguous, not to be written to) of a mask of one of these kinds:

    - int32 [B or 1, m, Lq, 2]: a range table already;
    - [B, Lk] bool or integer, True or 1 for a real token: key padding over plain attention, the last query at the last
      key, within `window` if given; if not `causal`, over all keys, for queries that are padding too;
    - [B or 1, heads or 1, Lq, Lk] bool (True: visible) or additive (0: visible, -inf or a dtype's minimum: hidden),
      equal in all heads. It is complete: causality and window come from it alone, as in transformers.

    `heads`: those of the queries; None: not known.

    Raises ValueError on a shape that does not fit, TypeError on any other dtype, NotImplementedError if some query sees
    more than MAX_INTERVALS intervals, if heads differ, or if the additive mask has other values (a position bias).
    """
    if not isinstance(mask, torch.Tensor):
        check_padding(mask)
    check_contents(mask)
    if mask.ndim == 4 and mask.dtype == torch.int32 and 1 <= mask.shape[1] <= MAX_INTERVALS and mask.shape[3] == 2:
        ranges = mask.cpu().numpy()
        ranges = np.where(ranges == _TO_THE_LAST, np.int32(k_len), ranges)
        if ranges.shape[1] > 1:  # masks of compiled models have as many intervals as there could be
            used: np.ndarray = np.any(ranges, axis=(0, 2, 3))
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
        rows = causal_rows(batch, q_len, k_len, first, window if causal else None)
        if not causal:
            rows[:] = 0, k_len
        padding = padding_of(mask[:, -k_len:], 0, k_len)
        return np.ascontiguousarray(without_padding(rows, padding, first if causal else None))
    if mask.ndim != 4:
        raise ValueError(f"attention_mask: expected 2 or 4 dimensions, got shape {tuple(mask.shape)}")
    if mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, q_len) or mask.shape[3] != k_len:
        raise ValueError(f"attention_mask: expected shape [{batch}, 1, {q_len}, {k_len}], got {tuple(mask.shape)}")
    if heads is not None and mask.shape[1] not in (1, heads):
        raise ValueError(
            f"attention_mask: expected shape [{batch}, 1 or {heads}, {q_len}, {k_len}], got {tuple(mask.shape)}"
        )

    # Read again in every layer: only its contents say whether a tensor has changed, and hashing takes as long.
    return _spread(_read_4d(mask), batch, q_len)


def _spread(ranges: np.ndarray, batch: int, q_len: int) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(ranges, (batch, ranges.shape[1], q_len, 2)))


def _read_4d(mask: torch.Tensor) -> np.ndarray:
    """Ranges [B', m, Lq', 2] of a 4-D mask, whose dimensions of size 1 stay as they are; read in slices."""
    mask = mask.detach()
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"attention_mask: a 4-D mask must be bool or additive floating point, got {mask.dtype}")
    heads = 1 if mask.stride(1) == 0 else mask.shape[1]
    step = max(1, _SLICE_ELEMENTS // max(1, mask.shape[3]))
    rows = []
    for b in range(mask.shape[0]):
        parts: list[np.ndarray] = []
        for start in range(0, mask.shape[2], step):
            stop = min(start + step, mask.shape[2])
            for h in range(heads):
                if (seen := visible(mask[b, h, start:stop])) is None:
                    raise NotImplementedError(
                        "attention_mask: an additive mask may hold 0 for visible keys and -1e4 or less for others; "
                        'this one holds other values, and "dhsa" adds no bias to scores'
                    )
                found = _intervals(seen[None], start, first_batch=b)
                if h == 0:
                    parts.append(found)
                elif not np.array_equal(parts[-1], found):
                    raise NotImplementedError(
                        'attention_mask: the heads have different masks, "dhsa" supports one for all heads'
                    )
        rows.append(_joined(parts, axis=2))
    return _joined(rows, axis=0)


def _joined(tables: list[np.ndarray], axis: int) -> np.ndarray:
    """Concatenates range tables [B, m, n, 2], with empty intervals where one has fewer than another."""
    most = max(t.shape[1] for t in tables)
    padded = [np.pad(t, ((0, 0), (0, most - t.shape[1]), (0, 0), (0, 0))) if t.shape[1] < most else t for t in tables]
    return np.concatenate(padded, axis=axis)


def _intervals(seen: np.ndarray, first_row: int = 0, first_batch: int = 0, what: str = "attention mask") -> np.ndarray:
    """int32 [B, m, n, 2] of bool [B, n, Lk], where m is the largest number of intervals of a row. Raises
    NotImplementedError if m exceeds MAX_INTERVALS."""
    batch, rows, k_len = seen.shape
    if (one := one_interval(seen.reshape(batch * rows, k_len))) is not None:
        return one.reshape(batch, 1, rows, 2)
    edge = np.zeros((*seen.shape[:-1], 1), bool)
    before, after = np.concatenate([edge, seen[..., :-1]], -1), np.concatenate([seen[..., 1:], edge], -1)
    begins, ends = seen & ~before, seen & ~after
    number = begins.sum(axis=-1)
    most = int(number.max())
    if most > MAX_INTERVALS:
        b, row = np.argwhere(number == most)[0]
        where = f"batch row {b + first_batch}" + ("" if what == "attention_mask" else f", query {row + first_row}")
        raise NotImplementedError(
            f'{what}: {where} sees keys in {most} separate intervals, "dhsa" supports at most {MAX_INTERVALS}; '
            'use attn_implementation="eager" for such masks'
        )
    table = np.zeros((*number.shape, most, 2), np.int32)
    b, row, key = np.nonzero(begins)  # in order, as the ends are: the n-th beginning belongs to the n-th end
    slot = (begins.cumsum(axis=-1, dtype=np.int32) - 1)[b, row, key]
    table[b, row, slot, 0] = key
    table[b, row, slot, 1] = np.nonzero(ends)[2] + 1
    return np.ascontiguousarray(table.transpose(0, 2, 1, 3))


def key_lists(ranges: np.ndarray, k_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Ranges [B, m, Lq, 2] as a list of keys for each row, of which every query sees a contiguous part: (indptr int64
    [B + 1], indices int32, spans int32 [B, Lq, 2]). This is possible if the gaps are the same for all queries of a row,
    as with padding; else returns None."""
    lists, spans = [], np.zeros((len(ranges), ranges.shape[2], 2), np.int32)
    for table, span in zip(ranges, spans, strict=True):
        start, stop = table[..., 0], table[..., 1]
        seen = stop > start
        change = np.bincount(start[seen], minlength=k_len + 1) - np.bincount(stop[seen], minlength=k_len + 1)
        covered = change.cumsum()[:k_len] > 0
        before = np.concatenate([[0], covered.cumsum()])
        some = seen.any(axis=0)
        span[:, 0] = np.where(some, np.where(seen, start, k_len).min(axis=0), 0)
        span[:, 1] = stop.max(axis=0)
        if not np.array_equal(before[span[:, 1]] - before[span[:, 0]], (stop - start).sum(axis=0)):
            return None
        lists.append(np.flatnonzero(covered).astype(np.int32))
    return np.cumsum([0, *map(len, lists)], dtype=np.int64), np.concatenate(lists), spans


# ---- what of it is plain ---------------------------------------------------------------------------------------------


class Least(NamedTuple):
    """The least size of a stretch of plain attention between others for which a selection of its own saves time."""

    queries: int
    keys: int


def least_stretch(config: Config) -> Least | None:
    """The limits for a config; None if it never leaves a key out. The last queries of every stretch are exact
    (`dense_tail`), and every stretch cuts all of its keys into chunks again."""
    if config.exact:
        return None
    return Least(8 * max(config.dense_tail, config.query_block), config.exact_up_to + 1)


def two_sided(ranges: np.ndarray) -> list[MaskPart] | None:
    """Ranges [B, Lq, 2] of as many queries as keys, one interval a query, as bidirectional attention: in each row, the
    tokens of one stretch see all of each other, or those nearer than a window, and what lies outside is padding.

    Returns the stretches of the rows, those without a token left out, or one of row None where all rows are alike; None
    for any other mask, causal ones above all."""
    at = np.arange(ranges.shape[1])
    if not (ranges[..., 1] > at + 1).any():
        return None
    if (ranges[1:] == ranges[:1]).all():
        found = [_two_sided_row(ranges[0], None)]
    else:
        found = [_two_sided_row(table, row) for row, table in enumerate(ranges)]
    parts = [part for part in found if part is not None]
    return [part for part in parts if part.pairs] if len(parts) == len(found) else None


def _two_sided_row(table: np.ndarray, row: int | None) -> MaskPart | None:
    start, stop = table.astype(np.int64).T
    seen = stop > start
    if not seen.any():
        return MaskPart(row, 0, 0, 0, 0, None, 0)
    first, last = int(start[seen].min()), int(stop.max())
    if not seen[first:last].all():
        return None
    at = np.arange(len(table))
    window, tokens = int((stop - at)[first:last].max()), last - first
    if window >= tokens:  # every token sees all of them; padding farther away from them than a window may see fewer
        fewer = np.flatnonzero(seen & (stop - start < tokens))
        one = int(fewer[0]) if len(fewer) else 0
        window = (
            2 * len(table) if not len(fewer) else one + 1 - int(start[one]) if one >= last else int(stop[one]) - one
        )
    begins, ends = np.maximum(at - window + 1, first), np.minimum(at + window, last)
    if not (((start == begins) & (stop == ends)) | ~seen).all():
        return None
    pairs = int((stop - start)[first:last].sum())
    return MaskPart(row, first, last, first, last, window if window < tokens else None, pairs)


def ranged_rows(ranges: np.ndarray, row: int | None) -> list[MaskPart]:
    """Batch row `row` of `ranges` [B, Lq, 2] (None: each of them) as a ranged part."""
    rows = range(len(ranges)) if row is None else (row,)
    parts = (_ranged(ranges[one], one, 0, ranges.shape[1]) for one in rows)
    return [part for part in parts if part is not None]


def mask_parts(
    ranges: np.ndarray, least: Least | None = None, limit: int = 64, late: int | None = None
) -> list[MaskPart]:
    """Cuts ranges [B, Lq, 2], one interval a query, into stretches of plain causal or sliding-window attention where
    that saves time, and ranged stretches for the rest. Queries that see no key are left out.

    `late`: the largest difference between the position of a query's own key and the number of the query, which is the
    number of keys minus that of queries. None: not known. In a plain stretch a query sees keys up to its own; a band
    that continues beyond it, as in a two-sided window, is ranged.

    Padded, packed and static-cache prompts give one plain stretch for each sequence: the only one of its batch row, or
    one that begins with a query that sees one key, or the last query alone (of a right-padded row). In any other row
    (bidirectional prefixes or spans of images, more than `limit` sequences), stretches of at least `least` stay plain
    and see all keys before them too, and what lies between is ranged. With `least` None the whole row is ranged.
    """
    if len(ranges) > 1 and (ranges[1:] == ranges[:1]).all():
        same = mask_parts(ranges[:1], least, limit, late)
        # In a ranged stretch, only a call of its own gives a row the tiles, and so the bits, that it has alone.
        if not any(s.ranged for s in same):
            return [s._replace(row=None) for s in same]
    found: list[MaskPart] = []
    for row, table in enumerate(ranges):
        runs = _runs(table)
        plain = [s for s in (_plain(table, row, late, *run) for run in runs) if s is not None]
        every = len(plain) == len(runs)
        if every and len(runs) <= limit and all(len(runs) == 1 or _stands_alone(s, table) for s in plain):
            found += plain
            continue
        plain = [s for s in plain if least is not None and _pays(s, least)]
        begins = [runs[0][0], *(s.q_stop for s in plain)]
        ends = [*(s.q_start for s in plain), runs[-1][1]]
        between = (_ranged(table, row, begin, end) for begin, end in zip(begins, ends, strict=True))
        found += [s for pair in itertools.zip_longest(between, plain) for s in pair if s is not None]
    return found


def _stands_alone(s: MaskPart, table: np.ndarray) -> bool:
    start, stop = table[s.q_start]
    return stop - start == 1 or s.q_start == len(table) - 1


def _runs(table: np.ndarray) -> list[tuple[int, int]]:
    """The longest runs [start, stop) of queries that see a key, where the interval of each query ends one key after
    that of the query before, and begins at the same key or one key later."""
    start, stop = table[:, 0], table[:, 1]
    seen = stop > start
    lost = np.diff(start)
    both = seen[1:] & seen[:-1]
    goes_on = both & (np.diff(stop) == 1) & (lost >= 0) & (lost <= 1)
    # Another text begins where a query sees no key that the one before saw, and the next query also sees its keys.
    goes_on &= (start[1:] < stop[:-1]) | (np.append(lost[1:], 1) != 0)
    goes_on[1:] &= ~(both & (np.diff(stop) == 0))[:-1]  # the last token of a span belongs to it
    begins, ends = seen.copy(), seen.copy()
    begins[1:] &= ~goes_on
    ends[:-1] &= ~goes_on
    return list(zip(np.flatnonzero(begins).tolist(), (np.flatnonzero(ends) + 1).tolist(), strict=True))


def _plain(table: np.ndarray, row: int, late: int | None, q_start: int, q_stop: int) -> MaskPart | None:
    """A run as plain attention, or None if its beginnings are not those of a window or it does not end at the queries'
    own keys. `late` only bounds which keys these are in a static cache, where the number of filled entries is not
    known."""
    start, stop = table[q_start:q_stop].astype(np.int64).T
    if late is not None and not (q_start < stop[0] or len(stop) == 1):  # a single query may look back from anywhere
        return None
    if late is not None and stop[0] > q_start + late + 1:
        return None
    seen = stop - start
    window = int(seen.max()) if start[-1] > start[0] else None
    if window is not None and not np.array_equal(start, np.maximum(start[0], stop - window)):
        return None
    return MaskPart(row, q_start, q_stop, int(start[0]), int(stop[-1]), window, int(seen.sum()))


def _pays(s: MaskPart, least: Least) -> bool:
    return s.q_stop - s.q_start >= least.queries and min(s.k_stop - s.k_start, s.window or least.keys) >= least.keys


def _ranged(table: np.ndarray, row: int, q_start: int, q_stop: int) -> MaskPart | None:
    """What lies between plain stretches, without the queries at either end that see no key; None if none is left."""
    seen = np.flatnonzero(table[q_start:q_stop, 1] > table[q_start:q_stop, 0])
    if not len(seen):
        return None
    q_start, q_stop = q_start + int(seen[0]), q_start + int(seen[-1]) + 1
    start, stop = table[q_start:q_stop].astype(np.int64).T
    pairs = int((stop - start).sum())
    return MaskPart(row, q_start, q_stop, int(start[stop > start].min()), int(stop.max()), None, pairs, True)
