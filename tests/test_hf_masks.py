"""Masks as key ranges: the mask function against transformers' own sdpa mask, and the cutting of ranges into
stretches."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from transformers.masking_utils import (  # noqa: E402
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from dhsa.hf.masks import key_range_mask, ranges_of, segments  # noqa: E402


def visible_of(ranges, k_len):
    j = np.arange(k_len)
    return (j >= ranges[:, :, :1]) & (j < ranges[:, :, 1:])


@pytest.mark.parametrize("seed", range(40))
def test_mask_function_says_what_sdpas_says(seed):
    rng = np.random.default_rng(seed)
    batch, q_length, q_offset = int(rng.integers(1, 4)), int(rng.integers(1, 40)), int(rng.choice([0, 0, 5, 33]))
    window = [None, 1, 7, 64][rng.integers(4)]
    static = bool(rng.integers(2))
    kv_offset = 0 if static or window is None else max(0, q_offset - window + 1)
    kv_length = q_offset + q_length - kv_offset + (int(rng.integers(0, 9)) if static else 0)
    kwargs = {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": torch.tensor(q_offset) if static else q_offset,
        "kv_offset": kv_offset,
        "local_size": window,
    }
    if window is not None:
        kwargs["mask_function"] = sliding_window_causal_mask_function(window)
    total, mask = q_offset + q_length, None
    if rng.integers(2):
        mask = torch.zeros(batch, total, dtype=torch.bool)
        for row in range(batch):
            lo, hi = sorted(rng.integers(0, total + 1, 2))
            mask[row, lo:hi] = True
        kwargs["attention_mask"] = mask
    expected = sdpa_mask(**kwargs, allow_is_causal_skip=False)[:, 0].numpy()
    table = key_range_mask(**kwargs)
    if table is None:
        position = np.arange(kv_length - q_length, kv_length)[:, None]
        assert (expected == (np.arange(kv_length) <= position)).all()
        return
    assert table.shape == (batch, 1, q_length, 2)
    assert table.dtype == torch.int32
    if mask is not None:
        real = mask[:, q_offset:, None].clone()
        real[:, :-1] |= mask[:, q_offset + 1 :, None]
        real[:, -1] = True  # the last query sees its keys, padding or not, and so does one before a real token
        expected = expected & real.numpy()
    assert (visible_of(table[:, 0].numpy(), kv_length) == expected).all()
    if mask is None or mask.all():
        assert kv_length > q_offset + q_length - kv_offset or window is not None  # else None would have done


def test_other_patterns_are_evaluated_not_assumed():
    """Chunked attention announces a local size just as a sliding window does, and is not one."""
    common = {"batch_size": 2, "q_length": 50, "kv_length": 50, "local_size": 16}
    chunked = chunked_causal_mask_function(16, torch.tensor([0, 3]))
    expected = sdpa_mask(**common, mask_function=chunked, allow_is_causal_skip=False)[:, 0].numpy()
    got = key_range_mask(**common, mask_function=chunked)[:, 0].numpy()
    assert (visible_of(got, 50) == expected).all()
    with pytest.raises(NotImplementedError, match=r"query 49 .* 25 separate intervals"):
        key_range_mask(
            1, 50, 50, mask_function=lambda b, h, q, k: (k <= q) & ((q < 49) | (k % 2 == 0)), allow_is_causal_skip=False
        )


@pytest.mark.parametrize("seed", range(20))
def test_gaps_become_more_intervals(seed):
    """Padding anywhere, and masks of any shape; a query that is padding, as its successor is, sees nothing."""
    rng = np.random.default_rng(seed)
    batch, length, window = 3, int(rng.integers(20, 60)), [None, 9][seed % 2]
    padding = torch.ones(batch, length, dtype=torch.bool)
    for row in range(1, batch):
        for _ in range(row):
            lo = int(rng.integers(0, length - 3))
            padding[row, lo : lo + 3] = False
    q, k = torch.arange(length)[:, None], torch.arange(length)
    plain = (k <= q) & (k > q - (window or length))
    real = padding[:, :, None].clone()
    real[:, :-1] |= padding[:, 1:, None]
    real[:, -1] = True
    expected = plain & padding[:, None, :] & real

    def union(table):
        return np.any([visible_of(table[:, j], length) for j in range(table.shape[1])], axis=0)

    got = ranges_of(padding, batch, length, length, window)
    assert got.shape[1] > 1
    assert (union(got) == expected.numpy()).all()
    got = ranges_of(expected[:, None], batch, length, length, window)
    assert (union(got) == expected.numpy()).all()
    assert (got[..., 1] - got[..., 0]).sum() == expected.sum()  # no key twice
    again = ranges_of(torch.from_numpy(got.copy()), batch, length, length, window)
    assert np.array_equal(again, got)


def test_plain_masks_cost_nothing():
    assert key_range_mask(4, 100_000, 100_000) is None
    assert (
        key_range_mask(4, 1, 100_000, q_offset=99_999, attention_mask=torch.ones(4, 100_000, dtype=torch.bool)) is None
    )
    window = sliding_window_causal_mask_function(512)
    assert key_range_mask(1, 100_000, 100_000, mask_function=window, local_size=512).numel() == 200_000


def test_segments_rebuild_the_table():
    def rebuilt(parts, shape):
        table = np.zeros(shape, np.int32)
        for s in parts:
            stop = np.arange(s.k_stop - (s.q_stop - s.q_start), s.k_stop) + 1
            start = np.full_like(stop, s.k_start) if s.window is None else np.maximum(s.k_start, stop - s.window)
            rows = slice(None) if s.row is None else s.row
            table[rows, s.q_start : s.q_stop] = np.stack([start, stop], -1)
            assert s.pairs == (stop - start).sum()
        return table

    rng = np.random.default_rng(0)
    for window in (None, 5, 1):
        mask = torch.zeros(4, 60, dtype=torch.bool)
        for row in range(3):
            lo, hi = sorted(rng.integers(0, 61, 2))
            mask[row, lo:hi] = True
        table = ranges_of(mask, 4, 60, 60, window)[:, 0]
        parts = segments(table)
        assert (rebuilt(parts, table.shape) == table).all()
        assert len(parts) <= 6  # a stretch and the last query of three rows
    packed = np.concatenate(
        [np.stack([np.full(n, a), np.arange(a, a + n) + 1], -1) for a, n in [(0, 9), (9, 30), (39, 4)]]
    )
    parts = segments(packed[None].astype(np.int32))
    assert [(s.q_start, s.q_stop, s.k_start, s.k_stop, s.window) for s in parts] == [
        (0, 9, 0, 9, None),
        (9, 39, 9, 39, None),
        (39, 43, 39, 43, None),
    ]
    same = segments(np.repeat(packed[None], 5, 0).astype(np.int32))
    assert [s.row for s in same] == [None] * 3
    bidirectional = np.repeat(np.array([[[0, 50]]], np.int32), 50, 1)
    assert segments(bidirectional) is None
    assert segments(np.zeros((2, 5, 2), np.int32)) == []
