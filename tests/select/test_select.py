"""Selection in C against the float64 reference: boundaries, the predictor, labels, chunk scores, lists of keys, and the
pipeline that strings them together.

Lists are compared exactly with those the reference makes of the same (fp32) scores; scores with a tolerance. Attention
itself and refused arguments are tested elsewhere.
"""

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import TIERS, every_tier, once
from weights import random_weights

import dhsa
from dhsa import _core, functional, reference

SCORE_OF = {"rows": "rows", "dhsa": "block"}

few = settings(max_examples=40, deadline=None)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def some_boundaries(batch, length, seed=0):
    """Rows of chunks of 1 to 12 keys, padded, and with an empty chunk inside."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(batch):
        cuts = np.cumsum(rng.integers(1, 13, length))
        rows.append([0, *cuts[cuts < length]])
        rows[-1].insert(1, rows[-1][-1])
        rows[-1].sort()
    width = max(len(row) for row in rows) + 1
    return np.array([row + [length] * (width - len(row)) for row in rows], np.int32)


def similarity(k, window):
    scores = np.empty((k.shape[0], k.shape[2]), np.float32)
    _core.similarity_scores(k, window, scores, dhsa.get_num_threads())
    return scores


# ---- boundaries ------------------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("length", [1, 2, 3, 9, 65, 200])
@pytest.mark.parametrize("window", [1, 4, 70])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_similarity_scores(tier, length, window, dtype):
    k = normal(2, 3, length, 5, dtype=dtype)
    if length > 8:
        k[0, :, 4:7] = 0  # a zero mean on a side has no direction
    scores = similarity(k, window)
    np.testing.assert_allclose(scores, reference.similarity_scores(k, window=window), rtol=1e-5, atol=1e-6)
    assert (scores[:, -1] == -np.inf).all()


def test_similarity_of_very_large_and_small_keys():
    k = normal(1, 2, 40, 8)
    want = similarity(k, 4)
    for factor in (2.0**80, 2.0**-100):  # their squares leave the range of float32
        big = similarity(k * np.float32(factor), 4)
        if factor > 1:
            np.testing.assert_allclose(big, want, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_allclose(big, reference.similarity_scores(k * np.float32(factor)), atol=1e-6)


def test_similarity_of_a_nan_stays_near_it():
    k = normal(1, 2, 60, 8)
    k[0, 1, 30, 3] = np.nan
    assert np.flatnonzero(np.isnan(similarity(k, 4)[0])).tolist() == list(range(26, 34))


@few
@given(
    scores=st.lists(
        st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, -1.0, -2.5, np.inf, -np.inf, np.nan]), min_size=1, max_size=60
    ),
    n=st.integers(0, 20),
    theta=st.sampled_from([-np.inf, -1.5, 0.0, 0.25]),
    nms=st.sampled_from([0, 1, 4, 100]),
    data=st.data(),
)
def test_picking(scores, n, theta, nms, data):
    instruction = data.draw(st.none() | st.integers(1, len(scores)))
    scores = np.array(scores, np.float32)
    picked = dhsa.pick_boundaries(scores, n, theta=theta, nms=nms, instruction=instruction)
    want = reference.pick_boundaries(scores, n, theta=theta, nms=nms, instruction=instruction)
    np.testing.assert_array_equal(picked, want)


def test_picking_sorts_every_float_of_a_long_row():
    bits = np.random.default_rng(1).integers(0, 2**32, 5000, dtype=np.uint32)
    scores = bits.view(np.float32)  # all exponents, both signs, NaN among them
    picked = dhsa.pick_boundaries(scores, 700, theta=-np.inf, nms=2)
    with np.errstate(invalid="ignore"):  # signalling NaN
        want = reference.pick_boundaries(scores, 700, theta=-np.inf, nms=2)
    np.testing.assert_array_equal(picked, want)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 100])
def test_fixed_boundaries(length):
    k = normal(2, 1, length, 4)
    for size in (1, 8, 1000):
        cuts = dhsa.boundaries(k, dhsa.Config(boundaries="fixed", chunk_size=size))
        np.testing.assert_array_equal(cuts, reference.boundaries(k, kind="fixed", chunk_size=size))


@pytest.mark.parametrize(
    "options", [{}, {"num_chunks": 5}, {"nms": 0}, {"theta": 0.2, "num_chunks": 50, "nms": 1}, {"nms": 1000}]
)
@pytest.mark.parametrize("length", [1, 2, 30, 300])
def test_similarity_boundaries_are_picked_from_the_scores(length, options):
    k = normal(3, 2, length, 8)
    n, nms = options.get("num_chunks", length // 4), options.get("nms", 2)
    rows = [reference.pick_boundaries(row, n, theta=options.get("theta", -np.inf), nms=nms) for row in similarity(k, 4)]
    cuts = dhsa.boundaries(k, dhsa.Config(boundaries="similarity", **options))
    assert cuts.shape == (3, max(len(row) for row in rows))
    for row, want in zip(cuts, rows, strict=True):
        np.testing.assert_array_equal(row[: len(want)], want)
        assert (row[len(want) :] == length).all()


# ---- predictor and label ---------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize(
    ("kv_heads", "dim", "heads", "window", "length", "gated"),
    [(2, 8, 4, 4, 300, True), (1, 32, 4, 4, 140, False), (3, 5, 3, 3, 50, True), (1, 12, 2, 1, 20, False),
     (2, 8, 8, 9, 200, True), (1, 6, 1, 20, 60, False), (2, 8, 4, 4, 8, True)],
)  # fmt: skip
def test_predictor_logits(tier, kv_heads, dim, heads, window, length, gated):
    weights = random_weights(kv_heads * dim, 24, gated, seed=window)
    k = normal(2, kv_heads, length, dim, seed=length)
    predictor = dhsa.BoundaryPredictor.from_state_dict(weights, heads=heads, window=window)
    want = once(reference.predictor_logits, k, weights, heads=heads, window=window)
    np.testing.assert_allclose(predictor.logits(k), want, rtol=2e-5, atol=2e-5)
    assert np.ptp(want[:, window - 1 : length - window]) > 0 or length - 2 * window < 1


def test_predictor_without_a_full_window_and_of_a_nan():
    weights = random_weights(16, 8)
    predictor = dhsa.BoundaryPredictor.from_state_dict(weights, heads=4, window=4)
    assert (predictor.logits(normal(1, 2, 7, 8)) == -100).all()
    k = normal(1, 2, 200, 8)
    k[0, 1, 90, 3], k[0, 0, 150, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        want = reference.predictor_logits(k, weights, heads=4, window=4)
    assert np.isnan(want).sum() == 16
    np.testing.assert_allclose(predictor.logits(k), want, rtol=2e-5, atol=2e-5)


def test_predictor_boundaries_leave_out_gaps_without_a_window():
    predictor = dhsa.BoundaryPredictor.from_state_dict(random_weights(16, 8), heads=4, window=5)
    k = normal(2, 2, 90, 8)
    config = dhsa.Config(boundaries="predictor", predictor=predictor, theta=-np.inf, nms=0, num_chunks=200)
    for row in dhsa.boundaries(k, config):
        np.testing.assert_array_equal(row, [0, *range(5, 86), 90])
    scores = predictor.logits(k)
    cuts = dhsa.boundaries(k, config.replace(num_chunks=6, nms=3, theta=-10.0))
    for row, score in zip(cuts, scores, strict=True):
        want = reference.pick_boundaries(score, 6, theta=-10, nms=3)
        np.testing.assert_array_equal(row[: len(want)], want)


@pytest.mark.parametrize("sliding", [None, 1, 10, 200])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (15, 4), (16, 4), (150, 1), (170, 4), (300, 40)])
def test_boundary_ratios(length, window, sliding):
    attn = np.exp(normal(length, length, seed=3)) * np.tri(length)
    attn = (attn / attn.sum(axis=1, keepdims=True)).astype(np.float32)
    got = dhsa.boundary_ratios(attn, window=window, sliding_window=sliding)
    want = reference.boundary_ratios(attn, window=window, sliding_window=sliding)
    np.testing.assert_allclose(got, want, rtol=1e-8)
    assert (want != 0).sum() == max(0, length - 4 * window + 1)
    wide = np.zeros((length, length + 7), np.float32)  # rows further apart than they are long
    wide[:, :length] = attn
    np.testing.assert_array_equal(dhsa.boundary_ratios(wide[:, :length], window=window, sliding_window=sliding), got)


# ---- chunk scores ----------------------------------------------------------------------------------------------------


def check_scores(q, k, edges, **options):
    got = dhsa.chunk_scores(q, k, edges, **options)
    want = once(reference.chunk_scores, q, k, edges, **options)
    assert got.shape == want.shape
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got, want, rtol=5e-5, atol=1e-6)
    return got


@every_tier
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("score", ["rows", "block"])
def test_chunk_scores(tier, score, heads, window):
    q, k = normal(2, 6, 83, 16), normal(2, 3, 110, 16, seed=1)
    edges = some_boundaries(2, 110)
    got = check_scores(q, k, edges, query_block=16, score=score, heads=heads, window=window)
    assert np.isneginf(got).any()
    assert np.isfinite(got).any()


@every_tier
@pytest.mark.parametrize(
    ("options", "heads", "kv_heads", "dim"),
    [
        ({"rows": 16}, 2, 1, 8),  # each query a row of its own
        ({"rows": 1}, 4, 4, 8),
        ({"rows": 5, "softcap": 2.0}, 4, 2, 7),
        ({"scale": -0.7}, 2, 2, 3),
        ({"scale": 0.0}, 2, 2, 3),
        ({"scale": -3.0, "softcap": 1.5}, 2, 1, 1),
        ({"rows": 16}, 24, 1, 5),  # more panels than are worked on at a time
        ({"score": "block", "pooling": "mean"}, 4, 2, 33),
        ({"score": "block", "scale": -0.3}, 4, 2, 256),
    ],
)
@pytest.mark.parametrize("sharing", ["all", "group", "head"])
def test_chunk_score_options(tier, options, heads, kv_heads, dim, sharing):
    q, k = normal(1, heads, 60, dim), normal(1, kv_heads, 60, dim, seed=1)
    check_scores(q, k, some_boundaries(1, 60), query_block=16, heads=sharing, **{"score": "rows", **options})


@few
@given(
    q_len=st.integers(1, 50),
    more=st.integers(0, 50),
    block=st.integers(1, 70),
    score=st.sampled_from(["rows", "block"]),
    window=st.none() | st.integers(1, 120),
    seed=st.integers(0, 5),
)
def test_chunk_scores_of_any_size(q_len, more, block, score, window, seed):
    q, k = normal(1, 2, q_len, 4, seed=seed), normal(1, 1, q_len + more, 4, seed=seed + 1)
    edges = some_boundaries(1, q_len + more, seed)
    check_scores(q, k, edges, query_block=block, score=score, heads="group", window=window)


def test_chunk_scores_do_not_look_past_the_block():
    """Row scores cut a chunk that straddles a block's end: later keys may not change what the block selects."""
    q, k = normal(1, 2, 64, 8), normal(1, 2, 64, 8, seed=1)
    edges = np.array([[0, 10, 25, 40, 60, 64]], np.int32)
    before = dhsa.chunk_scores(q, k, edges, query_block=16, score="rows")
    k[:, :, 32:] = normal(1, 2, 32, 8, seed=2)
    after = dhsa.chunk_scores(q, k, edges, query_block=16, score="rows")
    np.testing.assert_array_equal(after[:, :, :2], before[:, :, :2])
    assert (after[:, :, 2:] != before[:, :, 2:]).any()


@pytest.mark.parametrize("chunk", [200, 1000])
def test_long_chunks_round_little(chunk):
    q, k = normal(1, 1, 8, 8), normal(1, 1, 2000, 8) + np.float32(100)
    edges = np.append(np.arange(0, 2000, chunk), 2000)[None].astype(np.int32)
    got = dhsa.chunk_scores(q, k, edges, query_block=8, pooling="mean")
    want = reference.chunk_scores(q, k, edges, query_block=8, pooling="mean")
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-4)


@every_tier
@pytest.mark.parametrize(("score", "softcap"), [("rows", None), ("rows", 2.0), ("block", None), ("block", 1.5)])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
def test_not_finite_keys_and_queries(tier, score, softcap, heads):
    q, k = normal(1, 4, 64, 8), normal(1, 2, 64, 8, seed=1)
    edges = some_boundaries(1, 64)
    k[0, 1, 20, 3] = np.nan
    k[0, 0, 45, 0] = np.inf
    q[0, 1, 40, 2] = np.nan
    q[0, 2, 50, 2] = -np.inf
    got = check_scores(q, k, edges, query_block=16, score=score, heads=heads, softcap=softcap)
    assert not np.isnan(got).any()
    assert np.isposinf(got).any()


# ---- lists -----------------------------------------------------------------------------------------------------------


def core_scores(
    q, k, edges, *, method="rows", query_block, heads, scale=None, softcap=None, window=None, causal=True, **words
):
    """Scores of chunks by the core's own options, such as means and mean queries as selection has them."""
    asked = _core.Config(method=method, query_block=query_block, heads=heads, **words)
    sets = {"all": 1, "group": k.shape[1], "head": q.shape[1]}[heads]
    scores = np.empty((q.shape[0], sets, -(-q.shape[2] // query_block), edges.shape[1] - 1), np.float32)
    _core.chunk_scores(q, k, edges, asked, scale, softcap, window, causal, scores, 2)
    return scores


def check_select(q, k, config, *, window=None, scale=None, softcap=None, edges=None):
    """The C lists are what the reference makes of the C scores, bit for bit; returns the selection."""
    if edges is None:
        edges = dhsa.boundaries(k, config)
    words = {"method": config.method, "query_block": config.query_block, "heads": config.heads, "window": window}
    if config.method == "dhsa":
        scores = core_scores(q, k, edges, pooling=config.pooling, **words)
    else:
        layer = {"scale": scale, "softcap": softcap}
        scores = core_scores(q, k, edges, rows=config._core.rows, quantized=True, **layer, **words)
    want = reference.select_from_scores(
        scores, edges, q_len=q.shape[2], k_len=k.shape[2], query_block=config.query_block, budget=config.budget,
        sink=config.sink, local=config.local, dense_tail=config.dense_tail, window=window,
        score=SCORE_OF[config.method],
    )  # fmt: skip
    got = dhsa.select(q, k, config, boundaries=edges, window=window, scale=scale, softcap=softcap)
    np.testing.assert_array_equal(got.indptr, want.indptr)
    np.testing.assert_array_equal(got.indices, want.indices)
    assert got.shape == want.shape
    return got


def small(**options):
    """No shortlist, so that the C lists can be held against the C scores of all chunks."""
    values = {"budget": 40, "query_block": 16, "sink": 4, "local": 10, "dense_tail": 8, **options}
    return dhsa.Config(**values)


@every_tier
@pytest.mark.parametrize("case", vectors.params("select"))
def test_selection_agrees_with_vectors(tier, case):
    i = case.inputs
    config = dhsa.Config(
        method="dhsa", heads="all", sink=0, dense_tail=0, pooling=i["pooling"], query_block=i["query_block"],
        budget=i["budget"], local=i["local"],
    )  # fmt: skip
    selection = dhsa.select(i["q"], i["k"], config, boundaries=i["boundaries"], window=i["window"])
    vectors.check_indices(case, selection.indptr, selection.indices)


@every_tier
@pytest.mark.parametrize("window", [None, 30, 50, 90])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("score", ["rows", "dhsa"])
def test_selection(tier, score, heads, window):
    q, k = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1)
    got = check_select(q, k, small(method=score, heads=heads), window=window, scale=0.5, softcap=3.0)
    assert got.shape == (2, {"all": 1, "group": 2, "head": 4}[heads], 10)


@pytest.mark.parametrize("options", [
    {"sink": 0, "local": 0}, {"sink": 40, "local": 0}, {"sink": 0, "local": 40}, {"sink": 20, "local": 20},
    {"budget": 1, "sink": 0, "local": 0}, {"budget": 1, "sink": 1, "local": 0}, {"dense_tail": 0}, {"dense_tail": 1},
    {"dense_tail": 17}, {"dense_tail": 10**6}, {"budget": 10**9}, {"query_block": 1}, {"query_block": 1000},
    {"boundaries": "fixed", "chunk_size": 1}, {"boundaries": "fixed", "chunk_size": 1000}, {"num_chunks": "paper"},
])  # fmt: skip
@pytest.mark.parametrize("window", [None, 64])
def test_selection_options(options, window):
    q, k = normal(1, 2, 130, 8), normal(1, 1, 130, 8, seed=1)
    check_select(q, k, small(**options), window=window)
    check_select(q, k, small(**options, method="dhsa"), window=window)


@few
@given(
    q_len=st.integers(1, 60),
    more=st.integers(0, 60),
    block=st.integers(1, 40),
    budget=st.integers(1, 60),
    data=st.data(),
    window=st.none() | st.integers(1, 130),
    score=st.sampled_from(["rows", "dhsa"]),
    grid=st.sampled_from([0, 1, 2]),
)
def test_selection_of_any_size(q_len, more, block, budget, data, window, score, grid):
    sink = data.draw(st.integers(0, budget))
    local = data.draw(st.integers(0, budget - sink))
    tail = data.draw(st.integers(0, 70))
    q, k = normal(1, 2, q_len, 4), normal(1, 2, q_len + more, 4, seed=1)
    if grid:  # few different numbers, so that scores tie
        q, k = np.round(q / grid) * grid, np.round(k / grid) * grid
    config = small(query_block=block, budget=budget, sink=sink, local=local, dense_tail=tail, method=score)
    check_select(q, k, config, window=window, edges=some_boundaries(1, q_len + more, seed=budget))


def test_ties_go_to_the_recent_keys():
    q, k = np.zeros((1, 1, 100, 4), np.float32), normal(1, 1, 100, 4)
    edges = np.arange(0, 101, 4, dtype=np.int32)[None]
    selection = check_select(q, k, small(budget=30, sink=3, local=5, dense_tail=0, query_block=20), edges=edges)
    for i in range(1, 5):
        end = 20 * (i + 1)
        row = selection.indices[selection.indptr[i] : selection.indptr[i + 1]]
        assert row.tolist() == [0, 1, 2, *range(end - 27, end)]


def test_a_partly_fitting_chunk_gives_its_recent_keys():
    q = np.ones((1, 1, 40, 1), np.float32)
    k = np.zeros((1, 1, 40, 1), np.float32)
    k[0, 0, 8:18] = 3  # the chunk that every query wants
    edges = np.array([[0, 8, 18, 30, 40]], np.int32)
    config = small(budget=7, sink=1, local=2, dense_tail=0, query_block=8)
    selection = check_select(q, k, config, edges=edges, scale=1.0)
    row = selection.indices[selection.indptr[4] :].tolist()
    assert row == [0, 14, 15, 16, 17, 38, 39]


def test_negative_scores_are_ordered():
    q, k = np.ones((1, 1, 64, 2), np.float32), -np.abs(normal(1, 1, 64, 2))
    check_select(q, k, small(method="dhsa", budget=20, sink=2, local=3, dense_tail=0))


def test_not_finite_chunks_are_always_selected():
    q, k = normal(1, 2, 128, 8), normal(1, 2, 128, 8, seed=1)
    k[0, 1, 37, 2] = np.nan
    for score in ("rows", "dhsa"):
        selection = check_select(q, k, small(method=score, dense_tail=0))
        for i in range(3, 8):  # list set 1, blocks that end beyond the budget
            row = selection.indices[selection.indptr[8 + i] : selection.indptr[9 + i]]
            assert 37 in row


@pytest.mark.parametrize(("dtype", "score"), [("float16", "rows"), ("float16", "dhsa"), ("bfloat16", "dhsa")])
def test_half_dtypes_are_read_as_their_float32(torch, dtype, score):
    config = small(method=score)
    q, k = (torch.from_numpy(normal(1, 2, 100, 12, seed=seed)).to(getattr(torch, dtype)) for seed in (0, 1))
    got, want = dhsa.select(q, k, config), dhsa.select(q.float(), k.float(), config)
    np.testing.assert_array_equal(got.boundaries, want.boundaries)
    np.testing.assert_array_equal(got.indices, want.indices)


@every_tier
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize(
    ("dim", "options"),
    [(16, {}), (45, {"rows": 4, "softcap": 3.0}), (256, {"window": 40}), (64, {"rows": 16, "scale": -0.2})],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_quantized_row_scores(torch, tier, dim, options, heads, dtype):
    """No looser than fp32 once means and rows are quantized, since products of whole numbers are exact. Sums of keys
    and queries are exact here, so that both sides round the same numbers."""
    q, k = (np.round(normal(1, n, length, dim, seed=n) * 64) / 64 for n, length in ((4, 83), (2, 110)))
    q, k = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in (q, k))
    k[0, 1, 20, 3] = float("nan")
    q[0, 0, 50, 1] = float("inf")
    k[0, 0, 30:60] *= 2.0**-10
    kwargs = {"query_block": 16, "heads": heads, "rows": 16} | options
    edges = some_boundaries(1, 110)
    got = core_scores(q, k, edges, quantized=True, **kwargs)
    q, k = q.float().numpy(), k.float().numpy()
    want = once(reference.chunk_scores, q, k, edges, score="rows", quantize=True, **kwargs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    finite = np.isfinite(got)
    apart = np.abs(got[finite] - once(reference.chunk_scores, q, k, edges, score="rows", **kwargs)[finite])
    assert (apart / got[finite]).max() > 1e-3


@pytest.mark.parametrize("dim", [3, 45, 64, 256])
@pytest.mark.parametrize(
    "options", [{}, {"heads": "group", "rows": 16}, {"boundaries": "similarity", "shortlist": 512}]
)
def test_all_tiers_choose_the_same_keys(dim, options):
    """Products are exact on all of them, by whatever instruction; many more chunks than a tile, panels that are not
    full."""
    q, k = normal(1, 6, 700, dim), normal(1, 2, 1100, dim, seed=1)
    config = dhsa.Config(budget=128, sink=4, local=32, **options)
    lists = {}
    for tier in TIERS:
        dhsa.set_isa(tier)
        lists[tier] = dhsa.select(q, k, config)
    for got in lists.values():
        np.testing.assert_array_equal(got.indptr, lists["scalar"].indptr)
        np.testing.assert_array_equal(got.indices, lists["scalar"].indices)
    assert lists["scalar"].density() < 0.6


@every_tier
def test_quantized_row_scores_of_extreme_inputs(tier):
    """Of the largest numbers as of the same numbers, scaled; of zeros, and of numbers so small that they count as
    zeros, every logit is 0."""
    q, k = np.round(normal(1, 2, 20, 12) * 64), np.round(normal(1, 1, 40, 12, seed=1) * 64)
    edges = np.arange(0, 41, 4, dtype=np.int32)[None]
    kwargs = {"query_block": 20, "heads": "head", "rows": 20, "quantized": True}
    large, small = np.float32(2.0**110), np.float32(2.0**-140)
    plain = core_scores(q, k, edges, scale=2.0**-12, **kwargs)
    assert np.ptp(plain) > plain.mean()
    np.testing.assert_array_equal(core_scores(q, k * large, edges, scale=2.0**-122, **kwargs), plain)
    np.testing.assert_array_equal(core_scores(q * large, k, edges, scale=2.0**-122, **kwargs), plain)
    of_none = core_scores(np.zeros_like(q), np.zeros_like(k), edges, scale=1.0, **kwargs)
    want = reference.chunk_scores(
        0 * q, 0 * k, edges, query_block=20, rows=20, score="rows", heads="head", scale=1.0, quantize=True
    )
    np.testing.assert_allclose(of_none, want, rtol=1e-4)
    for factor in (np.float32(0), small):
        np.testing.assert_array_equal(core_scores(q, k * factor, edges, scale=1.0, **kwargs), of_none)
        np.testing.assert_array_equal(core_scores(q * factor, k, edges, scale=1.0, **kwargs), of_none)


@every_tier
def test_long_prompts_take_many_tiles_of_chunks(tier):
    """More chunks than a tile, more rows than a panel, means that are not finite here and there."""
    q, k = normal(1, 6, 40, 8) * 2, normal(1, 2, 1500, 8, seed=1)
    k[0, 0, [3, 700, 1499], 1] = np.nan
    k[0, 1, 400:420] = np.inf
    check_scores(q, k, some_boundaries(1, 1500), query_block=33, score="rows", heads="group", softcap=5.0)
    check_scores(q, k, np.arange(1501)[None].astype(np.int32), query_block=33, score="rows", heads="all")


@pytest.mark.parametrize("score", ["rows", "dhsa"])
def test_strides(score):
    q, k = normal(2, 4, 100, 8), normal(2, 2, 120, 8, seed=1)
    config = small(method=score)
    want = check_select(q, k, config)
    wide = np.zeros((2, 240, 2, 11), np.float32)  # [B, L, H, D] memory with gaps, read backwards
    wide[:, ::2, :, :8] = k[:, :, ::-1].swapaxes(1, 2)
    views = {
        "q by tokens": (np.ascontiguousarray(q.swapaxes(1, 2)).swapaxes(1, 2), k),
        "k with gaps": (q, wide[:, ::2, :, :8][:, ::-1].swapaxes(1, 2)),
    }
    for name, (q_view, k_view) in views.items():
        got = dhsa.select(q_view, k_view, config)
        np.testing.assert_array_equal(got.boundaries, want.boundaries, err_msg=name)
        np.testing.assert_array_equal(got.indices, want.indices, err_msg=name)


def test_same_bits_for_any_number_of_threads():
    q, k = normal(2, 4, 200, 8), normal(2, 2, 260, 8, seed=1)
    weights = random_weights(16, 12, gated=True)
    predictor = dhsa.BoundaryPredictor.from_state_dict(weights, heads=4)
    attn = np.abs(normal(400, 400))
    edges = some_boundaries(2, 260)

    def everything():
        yield similarity(k, 4)
        yield predictor.logits(k)
        yield dhsa.boundary_ratios(attn, window=4)
        for score, heads in itertools.product(("rows", "dhsa"), ("all", "group", "head")):
            yield dhsa.chunk_scores(q, k, edges, query_block=16, score=SCORE_OF[score], heads=heads)
            yield dhsa.select(q, k, small(method=score, heads=heads)).indices

    dhsa.set_num_threads(1)
    want = list(everything())
    for threads in (2, 3, 5):
        dhsa.set_num_threads(threads)
        for got, one in zip(everything(), want, strict=True):
            np.testing.assert_array_equal(got, one)


@pytest.mark.parametrize("edges", [[0, 5, 4, 64], [1, 64], [0, 63], [0, 65], [0, -3, 64], [0, 70, 64]])
def test_bad_boundaries_are_refused(edges):
    q, k = normal(1, 2, 64, 8), normal(1, 2, 64, 8)
    with pytest.raises(ValueError, match="boundaries"):
        dhsa.select(q, k, small(), boundaries=np.array([edges], np.int32))
    with pytest.raises(ValueError, match="boundaries"):
        dhsa.chunk_scores(q, k, np.array([edges], np.int32), query_block=16)


def test_a_wrong_plan_is_refused():
    q, k = normal(1, 2, 64, 8), normal(1, 2, 64, 8)
    core = small()._core
    indptr = np.empty(9, np.int64)
    _core.select_plan(q, k, core, None, None, None, True, indptr)
    cuts = np.array([[0, 30, 64]], np.int32)
    wrong = indptr.copy()
    wrong[3] += 1
    for plan in (wrong, indptr + 1):
        with pytest.raises(ValueError, match="indptr"):
            _core.select(q, k, cuts, core, None, None, None, True, plan, np.empty(plan[-1], np.int32), 1)


# ---- the pipeline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "window", "path"),
    [
        ({}, None, "sparse"), ({"heads": "head", "method": "dhsa"}, None, "sparse"), ({"heads": "all"}, 60, "sparse"),
        ({}, 40, "window"), ({}, 41, "sparse"), ({}, 1, "window"), ({"budget": 183}, None, "dense"),
        ({"budget": 182, "dense_tail": 0}, None, "sparse"), ({"budget": 182}, None, "dense"),
        ({"budget": 183}, 182, "window"), ({"budget": 183}, 183, "dense"),
        ({"dense_tail": 150}, None, "dense"), ({"dense_tail": 150}, 90, "window"), ({"dense_tail": 90}, 90, "sparse"),
        ({"method": "dhsa", "query_block": 60}, 50, "sparse"), ({"query_block": 200, "dense_tail": 0}, 50, "sparse"),
    ],
)  # fmt: skip
def test_prefill(options, window, path):
    q, k, v = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1), normal(2, 2, 183, 8, seed=2)
    config = small(**options)
    kwargs = {"scale": 0.6, "softcap": 4.0, "window": window, "return_lse": True}
    out, lse, stats = functional.run(q, k, v, config, **kwargs)
    assert stats.path == path
    selection = dhsa.select(q, k, config, window=window, scale=0.6, softcap=4.0)
    if path == "sparse":
        want, want_lse = dhsa.sparse_attention(q, k, v, selection, **kwargs)
        assert stats.density == pytest.approx(reference.density(selection, window=window), rel=1e-12)
        assert 0 < stats.density < 1
        assert stats.select_seconds > 0
    else:
        want, want_lse = dhsa.attention(q, k, v, **kwargs)
        assert stats.density == 1
        assert stats.select_seconds == 0
        assert reference.density(selection, window=window) == 1
    assert stats.attend_seconds > 0
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)


@pytest.mark.parametrize(
    ("options", "window"), [({}, None), ({"heads": "all", "dense_tail": 700}, None), ({"heads": "head"}, 1500)]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_prefill_in_waves_of_blocks(batch, options, window):
    """Lists of more than 2^18 keys in all are never held at once: the same bits as from one selection."""
    q, k, v = normal(batch, 4, 3000, 8), normal(batch, 2, 3500, 8, seed=1), normal(batch, 2, 3500, 8, seed=2)
    config = small(**{"budget": 1400, **options})
    selection = dhsa.select(q, k, config, window=window)
    assert len(selection.indices) > 2**18
    out, lse, stats = functional.run(q, k, v, config, window=window, return_lse=True)
    want, want_lse = dhsa.sparse_attention(q, k, v, selection, window=window, return_lse=True)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)
    assert stats.density == pytest.approx(reference.density(selection, window=window), rel=1e-12)


MEMORY = """
import ctypes, sys, torch, dhsa
dtype = getattr(torch, sys.argv[1])
dhsa.set_num_threads(2)
torch.manual_seed(0)
q, k, v = (torch.randn(1, h, 8192, 64).to(dtype) for h in (8, 4, 4))
out = torch.ones_like(q)
config = dhsa.Config(query_block=8, budget=512)
dhsa.attention(q[:, :, :300], k[:, :, :300], v[:, :, :300])
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
dhsa.attention(q, k, v, config, out=out)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beside_inputs_and_output(torch, dtype):
    """All lists together would take 8 MiB; means are 1 MiB at most, the rest is a wave and workspaces."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, dtype], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 5 * 1024


@every_tier
@pytest.mark.parametrize("score", ["rows", "dhsa"])
def test_prefill_against_the_reference(tier, score):
    q, k, v = normal(1, 4, 120, 8), normal(1, 2, 120, 8, seed=1), normal(1, 2, 120, 8, seed=2)
    # Small integers: means and products are exact enough for both sides to rank alike.
    q, k = np.round(q * 2), np.round(k * 2)
    config = small(method=score, boundaries="fixed", chunk_size=4)
    out, lse, stats = functional.run(q, k, v, config, scale=0.25, return_lse=True)
    want = reference.prefill(
        q, k, v, scale=0.25, boundary_options={"kind": "fixed", "chunk_size": 4}, query_block=16, budget=40, sink=4,
        local=10, dense_tail=8, score=SCORE_OF[score],
    )  # fmt: skip
    assert stats.path == want.path == "sparse"
    assert stats.density == pytest.approx(want.density, rel=1e-12)
    np.testing.assert_allclose(out, want.out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, want.lse, rtol=1e-5, atol=1e-5)


@functools.cache
def reference_case():
    q, k = normal(1, 4, 160, 16), normal(1, 2, 160, 16, seed=1)
    edges = some_boundaries(1, 160)
    options = {"query_block": 16, "score": "rows", "heads": "head", "quantize": True}
    return q, k, edges, reference.chunk_scores(q, k, edges, **options)


@every_tier
def test_selection_follows_the_reference_scores(tier):
    q, k, edges, scores = reference_case()
    selection = dhsa.select(q, k, small(dense_tail=0), boundaries=edges)
    vectors.check_follows_scores(selection, scores, edges, end_of=lambda i: 16 * (i + 1), sink=4, local=10, tol=1e-5)
