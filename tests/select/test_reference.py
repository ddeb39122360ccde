"""Tests of the float64 reference itself: the shared vectors, torch where it is there, and properties of each step.

The C code is compared to the reference elsewhere; here nothing of the extension runs.
"""

import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from dhsa import reference
from dhsa._twin import scores as twin

few = settings(max_examples=60, deadline=None)


def qkv(seed=0, batch=1, heads=4, kv_heads=2, q_len=40, k_len=40, dim=8):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, heads, q_len, dim))
    k, v = (rng.standard_normal((batch, kv_heads, k_len, dim)) for _ in range(2))
    return q, k, v


# ---- shared vectors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", vectors.params("select"))
def test_selection_agrees_with_vectors(case):
    options = {name: value for name, value in case.inputs.items() if name not in ("q", "k", "boundaries")}
    selection = reference.select(
        *(case.inputs[name] for name in ("q", "k", "boundaries")),
        **options, score="block", heads="all", sink=0, dense_tail=0,
    )  # fmt: skip
    vectors.check_indices(case, selection.indptr, selection.indices)


@pytest.mark.parametrize("case", vectors.params("predict"))
def test_predictor_agrees_with_vectors(case):
    i = case.inputs
    logits = reference.predictor_logits(i["k"], i["weights"], heads=i["heads"], window=i["window"])
    np.testing.assert_allclose(logits[0], case.expected["logits"], rtol=1e-5, atol=1e-6)
    w = i["window"]
    assert (logits[0, : w - 1] == -100).all()
    assert (logits[0, -w:] == -100).all()
    picked = reference.pick_boundaries(
        logits[0], i["num_chunks"], theta=i["theta"], nms=i["nms"], instruction=i["instruction"]
    )
    np.testing.assert_array_equal(picked, case.expected["boundaries"])


@pytest.mark.parametrize("case", vectors.params("label"))
def test_ratios_agree_with_vectors(case):
    np.testing.assert_allclose(reference.boundary_ratios(**case.inputs), case.expected["ratios"], rtol=1e-12)


@pytest.mark.parametrize("case", vectors.params("attend"))
def test_sparse_attention_agrees_with_vectors(case):
    i = case.inputs
    selection = SimpleNamespace(**{name: i[name] for name in ("indptr", "indices", "shape", "query_block")})
    out, lse = reference.sparse_attention(
        i["q"], i["k"], i["v"], selection, scale=i["scale"], window=i["window"], return_lse=True
    )
    np.testing.assert_allclose(out, case.expected["out"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(lse, case.expected["lse"], rtol=1e-10, atol=1e-12)


# ---- attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("q_len", "k_len", "kv_heads"), [(33, 33, 4), (33, 33, 2), (5, 33, 1), (1, 17, 2)])
def test_attention_agrees_with_torch(q_len, k_len, kv_heads, window):
    torch = pytest.importorskip("torch")
    q, k, v = qkv(1, 2, 4, kv_heads, q_len, k_len)
    # The mask is written out here, not taken from the reference, so that both have to be right.
    mask = np.array(
        [
            [j <= i + k_len - q_len and (window is None or j > i + k_len - q_len - window) for j in range(k_len)]
            for i in range(q_len)
        ]
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(x) for x in (q, k, v)), attn_mask=torch.from_numpy(mask), scale=0.3, enable_gqa=True
    )
    out = reference.attention(q, k, v, scale=0.3, window=window)
    np.testing.assert_allclose(out, expected.numpy(), rtol=1e-11, atol=1e-12)


def test_attention_default_scale_softcap_and_lse_by_hand():
    q, k, v = qkv(2, heads=1, kv_heads=1, q_len=1, k_len=3, dim=4)
    s = 2.0 * np.tanh(k[0, 0] @ q[0, 0, 0] / 2.0 / 2.0)  # scale D ** -0.5 = 1/2, softcap 2
    out, lse = reference.attention(q, k, v, softcap=2.0, return_lse=True)
    np.testing.assert_allclose(lse[0, 0, 0], np.log(np.exp(s).sum()), rtol=1e-12)
    np.testing.assert_allclose(out[0, 0, 0], np.exp(s) @ v[0, 0] / np.exp(s).sum(), rtol=1e-12)


def test_key_ranges_match_a_window_and_empty_ranges_give_zeros():
    q, k, v = qkv(3, batch=2)
    stop = np.arange(1, 41)
    ranges = np.stack([np.stack([np.maximum(0, stop - 9), stop], axis=1)] * 2)
    np.testing.assert_allclose(
        reference.attention(q, k, v, key_ranges=ranges), reference.attention(q, k, v, window=9), rtol=1e-12, atol=1e-14
    )
    ranges[1, 5] = (7, 7)
    out, lse = reference.attention(q, k, v, key_ranges=ranges, return_lse=True)
    assert (out[1, :, 5] == 0).all()
    assert (lse[1, :, 5] == -np.inf).all()
    assert np.isfinite(lse[0]).all()


def test_nan_reaches_only_the_rows_that_see_it():
    q, k, v = qkv(4)
    for poisoned in ("k", "v"):
        tensors = {"q": q, "k": k.copy(), "v": v.copy()}
        tensors[poisoned][0, 1, 20, 3] = np.nan
        bad = np.isnan(reference.attention(**tensors, window=6)).any(axis=-1)
        expected = np.zeros((1, 4, 40), bool)
        expected[0, 2:, 20:26] = True  # KV head 1 serves heads 2 and 3; keys 20 .. 25 later rows see key 20
        np.testing.assert_array_equal(bad, expected)


def test_wrong_shapes_are_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="q: expected 4"):
        reference.chunk_scores(q[0], k, [0, 40], query_block=8)
    with pytest.raises(ValueError, match="queries for"):
        reference.attention(q, k[:, :, :20], v[:, :, :20])
    with pytest.raises(ValueError, match="k: shape"):
        reference.attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="v: shape"):
        reference.attention(q, k, v[:, :, :20])
    with pytest.raises(ValueError, match="sinks: expected shape"):
        reference.attention(q, k, v, sinks=np.zeros(3))
    with pytest.raises(NotImplementedError, match="causal: the block score"):
        reference.chunk_scores(q, k, [0, 40], query_block=8, causal=False)
    with pytest.raises(NotImplementedError, match="causal: method hisa"):
        reference.method_lists("hisa", q, k, causal=False)


# ---- boundaries ------------------------------------------------------------------------------------------------


@few
@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, 3.0, -np.inf, np.nan]), min_size=1, max_size=40),
    n=st.integers(0, 12),
    theta=st.sampled_from([-np.inf, 0.25, 1.0]),
    nms=st.integers(0, 6),
    data=st.data(),
)
def test_picking_keeps_its_rules(scores, n, theta, nms, data):
    length = len(scores)
    t = data.draw(st.none() | st.integers(1, length))
    cuts = reference.pick_boundaries(scores, n, theta=theta, nms=nms, instruction=t)
    assert cuts[0] == 0
    assert cuts[-1] == length
    assert (np.diff(cuts) > 0).all()
    gaps = [int(c) - 1 for c in cuts[1:-1]]
    forced = [length - t] if t is not None and t > 1 else []
    last = length - t if t is not None else length - 1
    assert set(forced) <= set(gaps)
    assert len(gaps) <= max(n, len(forced))
    assert all(b - a > nms for a, b in itertools.pairwise(gaps))
    assert all(scores[g] > theta for g in gaps if g not in forced)
    # Nothing better was passed over: whoever is out was too close to someone at least as good, or there was no room.
    for j in range(min(last, length - 1)):
        if j in gaps or not scores[j] > theta:
            continue
        near = any(abs(j - g) <= nms and (g in forced or (-scores[g], g) < (-scores[j], j)) for g in gaps)
        better = sum(g in forced or (-scores[g], g) < (-scores[j], j) for g in gaps)
        assert near or better >= n


def test_picking_prefers_the_lower_index_among_equals():
    np.testing.assert_array_equal(reference.pick_boundaries([1, 1, 1, 1, 1, 1, 1, 1], 2, nms=2), [0, 1, 4, 8])


def test_similarity_scores_find_a_change_of_direction():
    k = np.zeros((1, 2, 24, 4))
    k[0, :, :10, 0] = 1.0
    k[0, :, 10:, 1] = 1.0
    scores = reference.similarity_scores(k)
    assert scores.shape == (1, 24)
    assert scores[0].argmax() == 9
    assert scores[0, 9] == 0.0
    assert scores[0, 23] == -np.inf
    np.testing.assert_allclose(scores[0, [0, 5, 14, 22]], -1.0)
    # One key on the left, 4 on the right of which 1 differs: cos = 3 / sqrt(10).
    np.testing.assert_allclose(scores[0, 6], -3 / np.sqrt(10), rtol=1e-12)
    np.testing.assert_array_equal(reference.boundaries(k, num_chunks=1), [[0, 10, 24]])


def test_boundaries_of_each_kind():
    _, k, _ = qkv(5, batch=2, k_len=50)
    np.testing.assert_array_equal(
        reference.boundaries(k, kind="fixed", chunk_size=16), [[0, 16, 32, 48, 50], [0, 16, 32, 48, 50]]
    )
    cuts = reference.boundaries(k)
    assert cuts.dtype == np.int32
    assert cuts.shape[0] == 2
    assert (cuts[:, -1] == 50).all()
    for b in range(2):  # n = 50 // 8 gaps at most, more than 4 apart
        row = np.unique(cuts[b])
        assert 1 <= len(row) - 2 <= 6
        assert (np.diff(row[1:-1]) > 4).all()
    ends = functools.partial(np.full, fill_value=7.0)
    cuts = reference.boundaries(
        k, kind="predictor", predictor=lambda k: ends((2, 50)), num_chunks=50, nms=0, theta=-np.inf
    )
    np.testing.assert_array_equal(cuts[0], [0, *range(4, 47), 50])  # gaps 3 .. 45: the ends never win
    with pytest.raises(ValueError, match="predictor"):
        reference.boundaries(k, kind="predictor")


# ---- chunk scores ----------------------------------------------------------------------------------------------


def line_power(x):
    """2 ** x at whole x, and on the line between these elsewhere."""
    below = np.floor(x)
    return np.exp2(below) + (np.exp2(below + 1) - np.exp2(below)) * (x - below)


def squared_powers(logits, lengths):
    """The squared probabilities of rows of logits [..., C] by powers of two in place of exponentials."""
    x = logits / np.log(2)
    top = np.floor(x.max(axis=-1, keepdims=True))
    return line_power(2 * (x - top - np.log2((lengths * line_power(x - top)).sum(axis=-1, keepdims=True))))


def test_powers_are_linear_between_whole_exponents():
    x = np.linspace(-126, 62, 5001)
    np.testing.assert_allclose(twin.power(x), line_power(x), rtol=1e-13)
    assert (twin.power(x) / np.exp2(x) < 1.0615).all()
    np.testing.assert_array_equal(twin.power(np.arange(-126.0, 63)), np.exp2(np.arange(-126.0, 63)))
    ends = twin.power(np.array([-127.0, -1e9, -np.inf, np.nan, 63, 1e9, np.inf]))
    np.testing.assert_array_equal(ends, [0, 0, 0, 0, 2.0**63, 2.0**63, 2.0**63])


def test_quantized_vectors():
    """Whole numbers up to 127, half to even, and their factor; vectors are 0 where the factor has no inverse."""
    whole, factor = twin.quantized([[0.5, 1.5, -2.5, 127], [0, -0.0, 0, 0], [1e-40, 0, 0, 0], [np.nan, 1, 2, 3]])
    np.testing.assert_array_equal(whole, [[0, 2, -2, 127], [0] * 4, [0] * 4, [np.nan] * 4])
    np.testing.assert_array_equal(factor[:3], [1, 0, 0])
    x = np.random.default_rng(0).standard_normal((50, 40)) * np.exp2(np.arange(-25, 25))[:, None]
    whole, factor = twin.quantized(x)
    np.testing.assert_array_equal(np.abs(whole).max(axis=1), 127)
    np.testing.assert_array_equal(whole, np.round(whole))
    assert (np.abs(x - whole * factor[:, None]) <= factor[:, None] * 0.50001).all()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_quantized_row_scores_are_those_of_quantized_vectors(softcap):
    q, k, _ = qkv(12, heads=2, kv_heads=1, q_len=8, k_len=24)
    edges = np.arange(0, 25, 3)
    got = reference.chunk_scores(
        q, k, edges, query_block=8, rows=4, score="rows", heads="all", softcap=softcap, quantize=True
    )
    means = k[0, 0].reshape(8, 3, -1).mean(axis=1)
    rows = q[0].reshape(2, 4, 2, -1).mean(axis=2)
    (means, by), (rows, of) = twin.quantized(means), twin.quantized(rows)
    logits = rows @ means.T * by * of[..., None] / np.sqrt(8)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    want = squared_powers(logits, np.full(8, 3)).sum(axis=(0, 1))
    np.testing.assert_allclose(got[0, 0, 0], want, rtol=1e-12)
    plain = reference.chunk_scores(q, k, edges, query_block=8, rows=4, score="rows", heads="all", softcap=softcap)
    assert 1e-4 < (np.abs(plain / got - 1)).max() < 0.1


def test_the_spread_of_keys_adds_to_their_squares():
    """Half of what normally distributed products would add: row_scores with the spreads of chunks."""
    q, k, _ = qkv(13, heads=1, kv_heads=1, q_len=4, k_len=12)
    edges, lengths = [0, 5, 9, 10, 12], np.array([5, 4, 1, 2])
    spreads = twin.chunk_spreads(k[0], edges)
    for c, (a, b) in enumerate(itertools.pairwise(edges)):
        far = k[0, 0, a:b] - k[0, 0, a:b].mean(axis=0)
        np.testing.assert_allclose(spreads[0, c], (far**2).mean(), rtol=1e-12, atol=1e-15)
    means = twin.chunk_means(k, edges)[0]
    words = 4, 4, 0.5, None, [0], 1, False, lengths
    squares, sums, _, logs = twin.row_scores(q[0], means, *words, spreads=spreads)
    _, same_sums, _, same_logs = twin.row_scores(q[0], means, *words)
    np.testing.assert_array_equal(sums, same_sums)
    assert logs == same_logs
    expected = np.zeros(4)
    for u in range(4):
        x = 0.5 * means[0] @ q[0, 0, u] / np.log(2)
        more = 0.25 * (q[0, 0, u] @ q[0, 0, u]) * spreads[0] / np.log(2)
        expected += line_power(2 * (x - logs[0, u]) + more)
    np.testing.assert_allclose(squares, expected, rtol=1e-12)
    given = {key: value + 1 for key, value in logs.items()}  # denominators of an earlier stage that are twice as large
    np.testing.assert_allclose(twin.row_scores(q[0], means, *words, given)[1], sums / 2, rtol=1e-12)


def test_row_scores_of_single_keys_are_squared_probabilities():
    q, k, _ = qkv(6, heads=2, kv_heads=1, q_len=8, k_len=24)
    scores = reference.chunk_scores(q, k, np.arange(25), query_block=4, rows=4, score="rows", heads="all", softcap=3.0)
    for i, end in enumerate((20, 24)):
        s = q[0, :, 4 * i : 4 * i + 4] @ k[0, 0, :end].T / np.sqrt(8)
        squares = squared_powers(3.0 * np.tanh(s / 3.0), np.ones(end))
        np.testing.assert_allclose(scores[0, 0, i, :end], squares.sum(axis=(0, 1)), rtol=1e-12)
        assert (scores[0, 0, i, end:] == -np.inf).all()


def test_row_scores_cut_the_straddling_chunk_and_average_neighbours():
    q, k, _ = qkv(7, heads=1, kv_heads=1, q_len=10, k_len=10)
    scores = reference.chunk_scores(q, k, [0, 3, 10], query_block=7, rows=2, score="rows", scale=1.0)
    for i, (rows, end) in enumerate([([q[0, 0, :4], q[0, 0, 4:7]], 7), ([q[0, 0, 7:10]], 10)]):
        means, lengths = np.stack([k[0, 0, :3].mean(0), k[0, 0, 3:end].mean(0)]), np.array([3, end - 3])
        expected = 0
        for row in rows:
            expected = expected + squared_powers(means @ row.mean(0), lengths)
        np.testing.assert_allclose(scores[0, 0, i], expected, rtol=1e-12)


def test_block_scores_by_hand_for_each_sharing():
    q, k, _ = qkv(8, heads=4, kv_heads=2, q_len=12, k_len=12)
    edges = [0, 2, 7, 12]
    rq = np.stack([q[0, :, :8].mean(1) * np.sqrt(8), q[0, :, 8:].mean(1) * np.sqrt(4)], axis=1)  # [H, nq, D]
    rk = np.stack([k[0, :, a:b].mean(1) * np.sqrt(b - a) for a, b in itertools.pairwise(edges)], axis=1)
    score = functools.partial(reference.chunk_scores, q, k, edges, query_block=8)
    np.testing.assert_allclose(score()[0, 0], rq.mean(0) @ rk.mean(0).T, rtol=1e-12)
    for h in range(4):
        np.testing.assert_allclose(score(heads="head")[0, h], rq[h] @ rk[h // 2].T, rtol=1e-12)
    np.testing.assert_allclose(score(heads="group", scale=2.0)[0, 1], 2 * rq[2:].mean(0) @ rk[1].T, rtol=1e-12)
    plain = score(pooling="mean", heads="head")[0, 3, 1, 2]
    np.testing.assert_allclose(plain, q[0, 3, 8:].mean(0) @ k[0, 1, 7:].mean(0), rtol=1e-12)


@pytest.mark.parametrize("score", ["rows", "block"])
def test_scores_of_chunks_without_candidates_and_of_bad_chunks(score):
    q, k, _ = qkv(9, q_len=64, k_len=64)
    k[0, 1, 33] = np.nan
    edges = np.array([[0, 8, 16, 32, 40, 64, 64]])
    scores = reference.chunk_scores(q, k, edges, query_block=16, window=24, score=score, heads="group")
    lo = [max(0, s - 23) if score == "rows" else max(0, s - 8) for s in (0, 16, 32, 48)]
    for i in range(4):
        end = 16 * (i + 1)
        for c in range(6):
            a, b = edges[0, c : c + 2]
            empty = max(a, lo[i]) >= min(b, end)
            assert (scores[0, 0, i, c] == -np.inf) == empty
            assert (scores[0, 1, i, c] == np.inf) == (not empty and c == 3)
    assert not np.isnan(scores).any()


def test_a_row_with_an_infinite_query_adds_nothing():
    q, k, _ = qkv(10, heads=1, kv_heads=1, q_len=8, k_len=8)
    means = np.stack([k[0, 0, :4].mean(0), k[0, 0, 4:].mean(0)])
    q[0, 0, 5] = np.inf
    expected = 0
    for u in (0, 2, 6):  # rows of two queries each; that of queries 4 and 5 is bad
        expected = expected + squared_powers(means @ q[0, 0, u : u + 2].mean(0), np.array([4, 4]))
    scores = reference.chunk_scores(q, k, [0, 4, 8], query_block=8, score="rows", rows=4, scale=1.0)
    np.testing.assert_allclose(scores[0, 0, 0], expected, rtol=1e-12)
    blocks = reference.chunk_scores(q, k, [0, 4, 8], query_block=4)
    assert (blocks[0, 0, 1] == 0).all()
    assert np.isfinite(blocks[0, 0, 0, 0])
    assert blocks[0, 0, 0, 0] != 0


# ---- selection -------------------------------------------------------------------------------------------------


@st.composite
def selection_cases(draw):
    k_len = draw(st.integers(1, 60))
    q_len = draw(st.integers(1, k_len))
    block = draw(st.integers(1, 20))
    budget = draw(st.integers(1, 40))
    sink = draw(st.integers(0, budget))
    cuts = draw(st.sets(st.integers(1, max(1, k_len - 1)), max_size=8))
    edges = np.array(sorted({0, k_len} | {c for c in cuts if c < k_len}))
    blocks = -(-q_len // block)
    seed = draw(st.integers(0, 2**16))
    scores = np.random.default_rng(seed).integers(-2, 3, (1, 2, blocks, len(edges) - 1)).astype(float)
    options = {
        "q_len": q_len,
        "k_len": k_len,
        "query_block": block,
        "budget": budget,
        "sink": sink,
        "local": draw(st.integers(0, budget - sink)),
        "dense_tail": draw(st.integers(0, 10)),
        "window": draw(st.none() | st.integers(1, 60)),
        "score": draw(st.sampled_from(["rows", "block"])),
    }
    return scores, edges, options


@few
@given(selection_cases())
def test_selection_keeps_its_rules(case):
    scores, edges, o = case
    selection = reference.select_from_scores(scores, edges, **o)
    window = o["window"]
    of = np.searchsorted(edges, np.arange(o["k_len"]), side="right") - 1
    for s in range(2):
        for i in range(selection.shape[2]):
            keys = selection.row(0, s, i)
            start = o["k_len"] - o["q_len"] + i * o["query_block"]
            end = min(start + o["query_block"], o["k_len"])
            union = np.arange(0 if window is None else max(0, start - window + 1), end)
            if window is None or o["score"] == "rows":
                lo = union[0]
            else:
                lo = max(0, min(start, start + o["query_block"] - window))
            tail = min((i + 1) * o["query_block"], o["q_len"]) > o["q_len"] - o["dense_tail"]
            if tail or end <= o["budget"] or (window is not None and window <= o["budget"]):
                np.testing.assert_array_equal(keys, union)
                continue
            candidates = np.arange(lo, end)
            assert len(keys) == min(o["budget"], len(candidates))
            assert (np.diff(keys) > 0).all()
            assert np.isin(keys, candidates).all()
            forced = candidates[(candidates < o["sink"]) | (candidates >= end - o["local"])]
            assert np.isin(forced, keys).all()
            chosen, left = np.setdiff1d(keys, forced), np.setdiff1d(candidates, keys)
            if len(chosen) and len(left):  # by score, then by recency
                assert min((scores[0, s, i, of[j]], j) for j in chosen) > max((scores[0, s, i, of[j]], j) for j in left)


def test_selection_of_each_sharing_follows_its_scores():
    q, k, _ = qkv(11, batch=2, q_len=70, k_len=90)
    edges = reference.boundaries(k)
    for heads, sets in (("all", 1), ("group", 2), ("head", 4)):
        options = {"query_block": 16, "heads": heads}
        selection = reference.select(q, k, edges, budget=40, sink=3, local=12, dense_tail=0, **options)
        scores = reference.chunk_scores(q, k, edges, score="rows", quantize=True, **options)
        assert selection.shape == (2, sets, 5)
        assert (np.diff(selection.indptr) == np.minimum(40, 20 + 16 * (np.arange(sets * 10) % 5 + 1))).all()
        vectors.check_follows_scores(
            selection, scores, edges, end_of=lambda i: min(90, 20 + 16 * (i + 1)), sink=3, local=12
        )


def test_a_chunk_with_nan_is_picked():
    q, k, v = qkv(12, heads=1, kv_heads=1, q_len=64, k_len=64)
    k[0, 0, 10] = np.nan
    edges = reference.boundaries(k, kind="fixed", chunk_size=4)
    selection = reference.select(q, k, edges, query_block=8, budget=16, sink=2, local=8, dense_tail=0)
    assert all(10 in selection.row(0, 0, i) for i in range(1, 8))
    out = reference.sparse_attention(q, k, v, selection)
    np.testing.assert_array_equal(np.isnan(out).any(axis=-1)[0, 0], np.arange(64) >= 10)


def test_a_prefix_within_the_budget_is_taken_whole():
    # The last block's nominal end, 64, would put the lower edge of its candidates at 1 under the block score.
    selection = reference.select_from_scores(
        np.zeros((1, 1, 2, 1)), [0, 60], q_len=60, k_len=60, query_block=32, budget=62, window=63, score="block"
    )
    np.testing.assert_array_equal(selection.row(0, 0, 1), np.arange(60))


def test_selection_refuses_a_budget_below_the_forced_keys():
    with pytest.raises(ValueError, match="budget"):
        reference.select_from_scores(
            np.zeros((1, 1, 1, 1)), [0, 8], q_len=8, k_len=8, query_block=8, budget=4, sink=3, local=2
        )


# ---- the pipeline ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["rows", "block"])
@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"budget": None}, "dense"),
        ({"budget": 60}, "dense"),
        ({"budget": 16, "window": 16}, "window"),
        ({"budget": 16, "window": 60}, "sparse"),
        ({"budget": 16, "dense_tail": 30}, "dense"),
        ({"budget": 16}, "sparse"),
    ],
)
def test_prefill_is_exact_where_nothing_is_left_out(options, path, score):
    q, k, v = qkv(13, q_len=30, k_len=60)
    result = reference.prefill(q, k, v, query_block=8, sink=2, local=4, score=score, **{"dense_tail": 0, **options})
    out, lse = reference.attention(q, k, v, window=options.get("window"), return_lse=True)
    assert result.path == path
    if path == "sparse":
        assert 0.2 < result.density < 0.9
        assert np.abs(result.out - out).max() > 1e-3
        assert (result.lse <= lse + 1e-12).all()
    else:
        assert result.density == 1.0
        np.testing.assert_array_equal(result.out, out)
        np.testing.assert_array_equal(result.lse, lse)


def test_density_counts_visible_pairs():
    selection = reference.Selection(
        np.array([0, 2, 4]), np.array([0, 1, 1, 3], np.int32), (1, 1, 2), 2, q_len=4, k_len=4
    )
    # Visible 1 + 2 + 3 + 4; listed and visible: row 0 sees 0, row 1 0 1, row 2 1, row 3 1 3.
    assert reference.density(selection) == 6 / 10
    assert reference.density(selection, window=2) == 5 / 7
