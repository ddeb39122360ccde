"""Masks as key ranges: the mask function against transformers' own sdpa mask, and the cutting of ranges into
stretches."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SPARSE, Layer, masked_softmax, qkv  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

import dhsa  # noqa: E402
import dhsa.hf  # noqa: E402
from dhsa.hf.masks import (  # noqa: E402
    Least,
    MaskPart,
    key_range_mask,
    least_stretch,
    mask_parts,
    ranges_of,
)


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


def rebuilt(parts, table):
    """What the parts say, as a table of the same shape."""
    made = np.zeros_like(table)
    for s in parts:
        rows = slice(None) if s.row is None else slice(s.row, s.row + 1)
        here = made[rows, s.q_start : s.q_stop]
        assert not here.any()  # no query twice
        if s.ranged:
            own = s.table(table)
            assert own.max() == s.k_stop - s.k_start
            here[:] = np.where(own[..., 1:] > own[..., :1], own + s.k_start, 0)
        else:
            stop = np.arange(s.k_stop - (s.q_stop - s.q_start), s.k_stop) + 1
            start = np.full_like(stop, s.k_start) if s.window is None else np.maximum(s.k_start, stop - s.window)
            here[:] = np.stack([start, stop], -1)
        assert s.pairs == int((here[0, :, 1] - here[0, :, 0]).sum())
    return made


def test_segments_rebuild_the_table():
    rng = np.random.default_rng(0)
    for window in (None, 5, 1):
        mask = torch.zeros(4, 60, dtype=torch.bool)
        for row in range(3):
            lo, hi = sorted(rng.integers(0, 61, 2))
            mask[row, lo:hi] = True
        table = ranges_of(mask, 4, 60, 60, window)[:, 0]
        parts = mask_parts(table)
        assert (rebuilt(parts, table) == table).all()
        assert len(parts) <= 6  # a stretch and the last query of three rows
        assert not any(s.ranged for s in parts)
    packed = np.concatenate(
        [np.stack([np.full(n, a), np.arange(a, a + n) + 1], -1) for a, n in [(0, 9), (9, 30), (39, 4)]]
    )
    parts = mask_parts(packed[None].astype(np.int32))
    assert [(s.q_start, s.q_stop, s.k_start, s.k_stop, s.window, s.ranged) for s in parts] == [
        (0, 9, 0, 9, None, False),
        (9, 39, 9, 39, None, False),
        (39, 43, 39, 43, None, False),
    ]
    same = mask_parts(np.repeat(packed[None], 5, 0).astype(np.int32))
    assert [s.row for s in same] == [None] * 3
    bidirectional = np.repeat(np.array([[[0, 50]]], np.int32), 50, 1)
    assert mask_parts(bidirectional) == [MaskPart(0, 0, 50, 0, 50, None, 2500, True)]
    assert [s.row for s in mask_parts(bidirectional.repeat(2, 0))] == [0, 1]  # tables are served row by row
    assert mask_parts(np.zeros((2, 5, 2), np.int32)) == []


def table_of(length, spans, window=None, pad=0):
    """int32 [1, Lq, 2]: causal within a window, but tokens of a span see it whole; `pad` keys in front see nothing."""
    stop = np.arange(length) + 1
    start = np.zeros(length, int) if window is None else np.maximum(stop - window, 0)
    for a, b in spans:
        stop[a:b] = b
        start[a:b] = np.minimum(start[a:b], a)
    table = np.stack([start, stop], -1)
    table = np.concatenate([np.zeros((pad, 2), int), table + pad])
    return table[None].astype(np.int32)


def shapes(parts):
    return [(s.q_start, s.q_stop, s.k_start, s.k_stop, s.window, s.ranged) for s in parts]


def test_long_stretches_of_text_between_images_are_plain():
    spans, least = [(5, 21), (400, 416), (450, 466)], Least(100, 64)
    assert shapes(mask_parts(table_of(900, spans), least)) == [
        (0, 21, 0, 21, None, True),  # five tokens are not worth a selection
        (21, 400, 0, 400, None, False),
        (400, 466, 0, 466, None, True),
        (466, 900, 0, 900, None, False),
    ]
    assert shapes(mask_parts(table_of(900, spans, window=64), least)) == [
        (0, 21, 0, 21, None, True),
        (21, 400, 0, 400, 64, False),
        (400, 466, 337, 466, None, True),
        (466, 900, 403, 900, 64, False),
    ]
    for few in (None, Least(500, 1), Least(1, 1000)):  # exact; stretches too short; too few keys to leave any out
        assert shapes(mask_parts(table_of(900, spans), few)) == [(0, 900, 0, 900, None, True)]
    assert shapes(mask_parts(table_of(900, spans, window=64), Least(100, 65))) == [(0, 900, 0, 900, None, True)]
    one = mask_parts(table_of(900, []), least)  # no image: as ever
    assert shapes(one) == shapes(mask_parts(table_of(900, []))) == [(0, 900, 0, 900, None, False)]


def test_a_prefix_seen_from_both_sides_is_ranged_and_the_rest_plain():
    table = table_of(500, [(0, 80)], pad=30)
    assert shapes(mask_parts(table, Least(100, 64))) == [
        (30, 110, 30, 110, None, True),
        (110, 530, 30, 530, None, False),
    ]
    later = table[:, 60:]  # a second piece of the prompt, on a filled cache
    assert shapes(mask_parts(later, Least(100, 64))) == [(0, 50, 30, 110, None, True), (50, 470, 30, 530, None, False)]


@pytest.mark.parametrize("seed", range(60))
def test_segments_of_any_table_rebuild_it(seed):
    rng = np.random.default_rng(seed)
    length, window = int(rng.integers(30, 300)), [None, 1, 7, 40][rng.integers(4)]
    rows = []
    for _ in range(3):
        spans, at, pad = [], 0, int(rng.integers(0, 20))
        while rng.integers(4) and (at := at + int(rng.integers(1, 90))) < length - pad:
            spans.append((at, min(at + int(rng.integers(2, 30)), length - pad)))
            at = spans[-1][1]
        rows.append(table_of(length - pad, spans, window, pad))
    table = np.concatenate(rows)
    if rng.integers(2):
        table[:, rng.integers(0, length, 3)] = 0  # queries that see nothing, anywhere
    least = [None, Least(20, 1), Least(60, 8)][rng.integers(3)]
    parts = mask_parts(table, least)
    assert (rebuilt(parts, table) == table).all()
    for row in range(3):
        own = [s for s in parts if s.row in (None, row)]
        for s in own:
            if any(other.ranged for other in own) and not s.ranged:
                assert s.q_stop - s.q_start >= least.queries
                assert min(s.k_stop - s.k_start, s.window or length) >= least.keys


def test_what_a_stretch_must_have():
    assert least_stretch(dhsa.Config(budget=None)) is None
    assert least_stretch(dhsa.Config()) == Least(512, 1025)  # 64 of the 512 are the dense tail
    assert least_stretch(dhsa.Config(query_block=128, dense_tail=0, budget=300)) == Least(1024, 301)
    assert least_stretch(dhsa.Config(mass=0.9, budget=None, floor=500)) == Least(512, 501)


# ---- the attention function on such masks --------------------------------------------------------------------------

SPANS = [(5, 21), (300, 316), (700, 716)]  # the first and the last stretch of text are short


@pytest.mark.parametrize("form", ["table", "bool", "additive"])
@pytest.mark.parametrize("window", [None, 128])
def test_text_between_images_is_sparse_and_images_exact(window, form):
    """Each stretch is what `dhsa.attention` makes of its queries and all keys so far; in a window no wider than the
    budget nothing can be left out."""
    length, layer = 760, Layer()
    q, k, v = qkv(q_len=length)
    table = table_of(length, SPANS, window)
    visible = torch.from_numpy(visible_of(table, length))[:, None]
    mask = {
        "table": torch.from_numpy(table)[:, None],
        "bool": visible,
        "additive": torch.where(visible, 0.0, torch.finfo(torch.float32).min),
    }[form]
    dhsa.hf.switching.install(layer, dhsa.hf.switching.State(SPARSE, None, ()))
    with torch.no_grad():
        out, _ = dhsa.hf.attention_forward(layer, q, k, v, mask, sliding_window=window)
    out = out.transpose(1, 2)
    exact = masked_softmax(q, k, v, visible)
    assert least_stretch(SPARSE) == Least(256, 97)
    left_out = 0
    for a, b in [(21, 300), (316, 700)]:
        start = 0 if window is None else max(0, a + 1 - window)
        one, _, stats = dhsa.functional.run(q[:, :, a:b], k[:, :, start:b], v[:, :, start:b], SPARSE, window=window)
        assert stats.path == "sparse"
        assert torch.equal(out[:, :, a:b], one)
        assert (out[:, :, a:b] - exact[:, :, a:b]).abs().max() > 1e-2
        here = int(visible[0, 0, a:b].sum())
        left_out += (1 - stats.density) * here
        exact[:, :, a:b] = out[:, :, a:b]
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    (run,) = dhsa.last_run(layer)
    assert run.path == "sparse"
    assert run.density == pytest.approx(1 - left_out / int(visible.sum()))


def test_batches_of_prefixes_and_images():
    """Each row of a padded batch is what it is alone, bit for bit, whatever its spans."""
    length, layer = 600, Layer()
    q, k, v = qkv(batch=3, q_len=length)
    rows = [([(0, 70)], 0), ([(5, 21), (110, 126)], 100), ([], 250)]
    for config in (SPARSE, EXACT):
        dhsa.hf.switching.install(layer, dhsa.hf.switching.State(config, None, ()))
        for window in (None, 128):
            tables = [table_of(length - pad, spans, window, pad) for spans, pad in rows]
            mask = torch.from_numpy(np.concatenate(tables))[:, None]
            out, _ = dhsa.hf.attention_forward(layer, q, k, v, mask, sliding_window=window)
            for row, (spans, pad) in enumerate(rows):
                one = torch.from_numpy(table_of(length - pad, spans, window))[:, None]
                args = (x[row : row + 1, :, pad:] for x in (q, k, v))
                alone, _ = dhsa.hf.attention_forward(layer, *args, one, sliding_window=window)
                assert dhsa.last_run(layer)[0].path == (
                    "sparse" if config is SPARSE else "window" if window else "dense"
                )
                assert torch.equal(out[row, pad:], alone[0])
                assert not out[row, :pad].any()
