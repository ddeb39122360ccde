"""Selection for bidirectional attention: a block of queries selects keys on both sides of it. Against the twins, like
the selections of causal attention in test_methods.py.
"""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_methods import MASSY, any_size, check, drawn_options, normal, row_of, small
from tiers import every_tier

import dhsa
from dhsa import functional, reference
from dhsa._twin.selection import local_span
from dhsa.methods import registry

METHODS = [name for name, method in registry.items() if method.has_both_sides]
CAUSAL_ONLY = sorted(set(registry) - set(METHODS))
few = settings(max_examples=60, deadline=None, derandomize=True)
BOTH = {"causal": False}


def bounds_of(method):
    return [{}, {"budget": 70, "mass": 0.8}] if method in MASSY else [{}]


# ---- lists against the twins -----------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("window", [None, 20, 21, 50, 90, 2**62])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("method", METHODS)
def test_method(tier, method, heads, window):
    """With a budget of 40, a two-sided window of 20 is exact: it shows at most 39 keys to a query."""
    q, k = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1)
    got, chosen = check(q, k, small(method=method, heads=heads), window=window, scale=0.5, softcap=3.0, **BOTH)
    assert got.shape == (2, {"all": 1, "group": 2, "head": 4}[heads], 10)
    assert not got.causal
    assert (chosen > 0) == (window != 20)
    if window is None:
        assert chosen == len(got.indptr) - 1  # no dense tail, and every block has more candidates than the budget
        assert (np.diff(got.indptr) == 40).all()
        if registry[method].reads_keys:  # far beyond the keys that are forced
            assert any(row_of(got, i)[-1] > 33 + 16 * i + 32 for i in range(8))
            assert any(row_of(got, i)[4] < 33 + 16 * i - 16 for i in range(2, 10))


@pytest.mark.parametrize("options", [
    {"sink": 0, "local": 0}, {"sink": 40, "local": 0}, {"sink": 0, "local": 40}, {"sink": 20, "local": 20},
    {"sink": 30, "local": 3}, {"sink": 3, "local": 37}, {"budget": 1, "sink": 0, "local": 0},
    {"budget": 1, "sink": 1, "local": 0}, {"budget": 1, "sink": 0, "local": 1}, {"budget": 129}, {"budget": 130},
    {"budget": 10**9}, {"budget": None}, {"query_block": 1}, {"query_block": 1000}, {"key_block": 1},
    {"key_block": 16}, {"key_block": 1000},
])  # fmt: skip
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("method", METHODS)
def test_method_options(method, options, window):
    q, k = normal(1, 2, 130, 8), normal(1, 1, 130, 8, seed=1)
    check(q, k, small(**options, method=method), window=window, scale=-0.4, **BOTH)


@few
@any_size
@pytest.mark.parametrize("method", METHODS)
def test_method_of_any_size(method, q_len, more, block, budget, data, window, key_block):
    options = drawn_options(data, method, query_block=block, budget=budget, key_block=key_block)
    q, k = normal(1, 2, q_len, 4, seed=block), normal(1, 2, q_len + more, 4, seed=budget + 100)
    check(q, k, small(**options, method=method), window=window, **BOTH)


@every_tier
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("share", [0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("method", [method for method in METHODS if method in MASSY])
def test_mass(tier, method, share, heads, window):
    q, k = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1)
    edges = dhsa.boundaries(k, dhsa.Config()) if method == "rows" else None
    for bounds in ({"budget": None}, {"budget": 60}, {"budget": 120, "floor": 48}):
        config = small(method=method, heads=heads, mass=share, **bounds)
        got, chosen = check(q, k, config, window=window, scale=1.0, edges=edges, **BOTH)
        assert chosen > 0
        if share == 0.6 and bounds["budget"] is None:
            assert len(set(np.diff(got.indptr).tolist())) > 5  # the data decide


@every_tier
@pytest.mark.parametrize("dim", [1, 33, 300, 576])
@pytest.mark.parametrize("method", METHODS)
def test_method_of_any_head_dim_and_group(tier, method, dim):
    q, k = normal(1, 5, 70, dim), normal(1, 1, 70, dim, seed=1)
    check(q, k, small(method=method, budget=24), **BOTH)
    check(q, np.repeat(k, 5, 1), small(method=method, budget=24, heads="all"), **BOTH)


@every_tier
@pytest.mark.parametrize("method", sorted(registry))
def test_wide_heads_of_causal_selection(tier, method):
    q, k = normal(1, 2, 70, 576), normal(1, 1, 70, 576, seed=1)
    check(q, k, small(method=method, dense_tail=0, budget=24))


@every_tier
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("method", [method for method in METHODS if registry[method].reads_keys])
def test_not_finite_keys_are_always_selected(tier, method, heads):
    q, k = normal(1, 4, 128, 8), normal(1, 2, 128, 8, seed=1)
    k[0, 1, 97, 2] = np.nan
    q[0, 1, 70, 3] = np.inf
    q[0, 3, 100, 0] = np.nan
    for bounds in bounds_of(method):
        got, _ = check(q, k, small(method=method, heads=heads, **bounds), **BOTH)
        last = got.shape[1] - 1  # a set with KV head 1
        assert all(97 in row_of(got, last * 8 + i) for i in range(8))


@every_tier
@pytest.mark.parametrize("window", [None, 58, 100])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
def test_shortlist(tier, heads, window):
    q, k = normal(2, 4, 450, 8), normal(2, 2, 500, 8, seed=1)
    for options in ({}, {"sink": 0, "local": 0}, {"boundaries": "fixed", "chunk_size": 3}):
        config = small(**{"budget": 70, "shortlist": 130, "rows": 9, "heads": heads, **options})
        got, chosen = check(q, k, config, window=window, scale=0.7, softcap=5.0, **BOTH)
        assert chosen > 0
        whole = dhsa.select(q, k, config.replace(shortlist=0), scale=0.7, softcap=5.0, window=window, **BOTH)
        assert (got == whole) == (window == 58)  # 130 candidates need no shortlist


# ---- what is forced --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_sinks_and_keys_around_the_block_are_always_selected(method):
    """Also where the sinks reach past the local keys."""
    q, k = normal(1, 1, 200, 4), normal(1, 1, 200, 4, seed=1)
    k[0, 0, 100:110] = 50 * q[0, 0].mean(0)  # what scores want
    for sink, local in ((4, 10), (36, 4), (40, 0), (0, 40), (0, 0)):
        got = dhsa.select(q, k, small(method=method, sink=sink, local=local), **BOTH)
        for i in range(13):
            row = set(row_of(got, i).tolist())
            near = range(*local_span(0, 200, local, (16 * i + min(16 * i + 16, 200)) // 2))
            assert set(range(sink)) | set(near) <= row
            assert len(row) == 40


def test_window_is_sinks_and_the_nearest_keys():
    q, k = normal(1, 2, 100, 4), normal(1, 1, 110, 4, seed=1)
    got = dhsa.select(q, k, small(method="window"), **BOTH)
    for i in range(7):
        start, end = 10 + 16 * i, min(10 + 16 * (i + 1), 110)
        first = min(max((start + end) // 2 - 18, 4), 110 - 36)
        assert row_of(got, i).tolist() == [*range(4), *range(first, first + 36)]


def test_a_key_after_the_block_is_found():
    """The one key that answers the queries of the first block lies far behind it: causal attention cannot see it."""
    q, k = normal(1, 1, 512, 16), 0.2 * normal(1, 1, 512, 16, seed=1)
    k[0, 0, 400] = 3 * q[0, 0, :32].mean(0) / np.linalg.norm(q[0, 0, :32].mean(0))
    q[0, 0, :32] += 4 * k[0, 0, 400]
    for method in ("rows", "block"):
        config = small(method=method, query_block=32, boundaries="fixed", chunk_size=4, key_block=4)
        assert 400 in row_of(dhsa.select(q, k, config, **BOTH), 0)
        assert 400 not in row_of(dhsa.select(q, k, config), 0)


@pytest.mark.parametrize("method", CAUSAL_ONLY)
def test_methods_of_causal_attention_are_refused(method):
    """By the core and by the twin; an exact config needs no selection."""
    q, k = normal(1, 1, 64, 8), normal(1, 1, 64, 8, seed=1)
    message = f"^causal: method {method} selects for causal attention only"
    for call in (
        lambda: dhsa.select(q, k, small(method=method), causal=False),
        lambda: dhsa.attention(q, k, k, small(method=method), causal=False),
        lambda: reference.method_lists(method, q, k, causal=False),
    ):
        with pytest.raises(NotImplementedError, match=message):
            call()
    exact = dhsa.attention(q, k, k, dhsa.Config(method=method, budget=None), causal=False)
    np.testing.assert_array_equal(exact, dhsa.attention(q, k, k, causal=False))


# ---- scores ----------------------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
def test_chunk_scores(tier, heads, window):
    q, k = normal(2, 6, 83, 16), normal(2, 3, 110, 16, seed=1)
    edges = np.array([[0, 4, 4, 17, 60, 63, 100, 110, 110], [0, 1, 2, 40, 41, 70, 90, 100, 110]], np.int32)
    options = {"query_block": 16, "score": "rows", "heads": heads, "window": window, "causal": False}
    got = dhsa.chunk_scores(q, k, edges, **options)
    want = reference.chunk_scores(q, k, edges, **options)
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_allclose(got, want, rtol=5e-5, atol=1e-6)
    if window is None:
        assert (np.isneginf(got) == (np.diff(edges) == 0)[:, None, None]).all()


# ---- attention over these lists --------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("method", METHODS)
def test_attention_is_select_then_attend(tier, method, window):
    q, k, v = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1), normal(2, 2, 183, 12, seed=2)
    sinks = normal(4, seed=3)
    for bounds in bounds_of(method):
        for heads in ("all", "group", "head"):
            config = small(method=method, heads=heads, **bounds)
            options = {"scale": 0.6, "softcap": 4.0, "window": window}
            out, lse, stats = functional.run(q, k, v, config, return_lse=True, causal=False, sinks=sinks, **options)
            selection = dhsa.select(q, k, config, causal=False, **options)
            want, want_lse, told = functional.run_selected(q, k, v, selection, return_lse=True, sinks=sinks, **options)
            np.testing.assert_array_equal(out, want)
            np.testing.assert_array_equal(lse, want_lse)
            assert stats.path == told.path == "sparse"
            assert stats.density == pytest.approx(reference.density(selection, window=window), rel=1e-12)
            assert told.density == selection.density() == pytest.approx(stats.density, rel=1e-12)
            twin, twin_lse = reference.sparse_attention(q, k, v, selection, sinks=sinks, return_lse=True, **options)
            np.testing.assert_allclose(out, twin, atol=3e-6)
            np.testing.assert_allclose(lse, twin_lse, atol=1e-5)
            assert np.abs(out - dhsa.attention(q, k, v, sinks=sinks, causal=False, **options)).max() > 1e-3


@pytest.mark.parametrize("window", [None, 1500])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_attention_in_waves_of_blocks(method, batch, window):
    """Lists of more than 2^18 keys in all are never held at once: the same bits as from one selection."""
    q, k, v = normal(batch, 4, 3000, 8), normal(batch, 2, 3500, 8, seed=1), normal(batch, 2, 3500, 8, seed=2)
    for bounds in [{"budget": 1400}, {"budget": None, "mass": 0.7}][: 1 + (method in MASSY)]:
        config = small(method=method, **bounds)
        selection = dhsa.select(q, k, config, window=window, causal=False)
        assert len(selection.indices) > 2**18
        out, lse, stats = functional.run(q, k, v, config, window=window, causal=False, return_lse=True)
        want, want_lse = dhsa.sparse_attention(q, k, v, selection, window=window, return_lse=True)
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(lse, want_lse)
        assert stats.density == pytest.approx(selection.density(), rel=1e-12)
        alone = dhsa.attention(q[:1], k[:1], v[:1], config, window=window, causal=False)
        np.testing.assert_array_equal(alone, out[:1])


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_strides(method):
    q, k, v = normal(2, 4, 200, 8), normal(2, 2, 260, 8, seed=1), normal(2, 2, 260, 8, seed=2)
    wide = np.zeros((2, 520, 2, 11), np.float32)  # [B, L, H, D] memory with gaps, read backwards
    wide[:, ::2, :, :8] = k[:, :, ::-1].swapaxes(1, 2)
    for bounds in bounds_of(method):
        for window in (None, 70):
            config, options = small(method=method, **bounds), {"window": window, "causal": False}
            dhsa.set_num_threads(1)
            want, out = dhsa.select(q, k, config, **options), dhsa.attention(q, k, v, config, **options)
            for threads in (2, 3):
                dhsa.set_num_threads(threads)
                assert dhsa.select(q, k, config, **options) == want
                np.testing.assert_array_equal(dhsa.attention(q, k, v, config, **options), out)
            read = wide[:, ::2, :, :8][:, ::-1].swapaxes(1, 2)
            assert dhsa.select(q, read, config, **options) == want
            np.testing.assert_array_equal(dhsa.attention(q, read, v, config, **options), out)


@pytest.mark.parametrize("window", [None, 60])
def test_the_dense_tail_does_not_apply(window):
    q, k, v = normal(1, 2, 150, 8), normal(1, 2, 183, 8, seed=1), normal(1, 2, 183, 8, seed=2)
    for method in METHODS:
        with_tail, without = small(method=method, dense_tail=10**6), small(method=method, dense_tail=0)
        assert dhsa.select(q, k, with_tail, window=window, **BOTH) == dhsa.select(q, k, without, window=window, **BOTH)
        np.testing.assert_array_equal(
            *(dhsa.attention(q, k, v, config, window=window, **BOTH) for config in (with_tail, without))
        )


@pytest.mark.parametrize(
    ("options", "window", "path"),
    [
        ({}, None, "sparse"), ({}, 20, "window"), ({}, 21, "sparse"), ({"budget": 183}, None, "dense"),
        ({"budget": 182}, None, "sparse"), ({"budget": 183}, 182, "window"), ({"budget": 183}, 183, "dense"),
        ({"budget": 100, "query_block": 200}, 50, "window"), ({"budget": 100, "query_block": 200}, 51, "sparse"),
    ],
)  # fmt: skip
def test_paths(options, window, path):
    q, k, v = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1), normal(2, 2, 183, 8, seed=2)
    config, layer = small(**options), {"window": window, "causal": False}
    out, _, stats = functional.run(q, k, v, config, **layer)
    assert stats.path == path
    assert config.leaves_out(150, 183, window, causal=False) == (path == "sparse")
    selection = dhsa.select(q, k, config, **layer)
    assert (selection.density() < 1) == (path == "sparse")
    if path != "sparse":
        np.testing.assert_array_equal(out, dhsa.attention(q, k, v, **layer))
        assert stats.density == selection.density() == 1


@every_tier
def test_prefill_against_the_reference(tier):
    q, k, v = (np.round(normal(1, h, 120, 8, seed=h) * 2) for h in (4, 2, 2))
    sinks = normal(4)
    config = small(boundaries="fixed", chunk_size=4)
    for window in (None, 45):
        out, lse, stats = functional.run(
            q, k, v, config, scale=0.25, window=window, sinks=sinks, causal=False, return_lse=True
        )
        want = reference.prefill(
            q, k, v, scale=0.25, window=window, sinks=sinks, boundary_options={"kind": "fixed", "chunk_size": 4},
            query_block=16, budget=40, sink=4, local=10, dense_tail=8, causal=False,
        )  # fmt: skip
        assert stats.path == want.path == "sparse"
        assert stats.density == pytest.approx(want.density, rel=1e-12)
        np.testing.assert_allclose(out, want.out, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lse, want.lse, rtol=1e-5, atol=1e-5)


@every_tier
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves(torch, tier, dtype):
    q, k, v = (torch.from_numpy(normal(1, h, 190, 72, seed=h)).to(getattr(torch, dtype)) for h in (4, 2, 2))
    config = small(query_block=32, budget=64)
    for window in (None, 90):
        out = dhsa.attention(q, k, v, config, window=window, causal=False).float().numpy()
        selection = dhsa.select(q, k, config, window=window, causal=False)
        want = reference.sparse_attention(*(x.float().numpy() for x in (q, k, v)), selection, window=window)
        np.testing.assert_allclose(out, want, atol=2e-2)


@every_tier
@pytest.mark.parametrize("window", [None, 40])
def test_a_nan_in_a_value_reaches_the_rows_that_attend_to_it(tier, window):
    q, k, v = normal(1, 4, 150, 8), normal(1, 2, 183, 8, seed=1), normal(1, 2, 183, 8, seed=2)
    config = small(heads="head")
    seen = dhsa.select(q, k, config, window=window, causal=False).mask(causal=True)
    v[0, 1, [3, 90, 182], 5] = np.nan
    out = dhsa.attention(q, k, v, config, window=window, causal=False)
    attended = seen[0, :, :, [3, 90, 182]].any(axis=0)
    attended[:2] = False
    assert attended.any()
    np.testing.assert_array_equal(np.isnan(out[0]).any(axis=-1), attended)


# ---- the selection as data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 25])
def test_selection_remembers_that_it_is_not_causal(window):
    q, k, v = normal(2, 4, 70, 8), normal(2, 2, 90, 8, seed=1), normal(2, 2, 90, 8, seed=2)
    config = small(budget=24)
    selection = dhsa.select(q, k, config, window=window, causal=False)
    assert repr(selection).count("causal=False") == 1
    assert "causal" not in repr(dhsa.select(q, k, config))
    same = pickle.loads(pickle.dumps(selection))
    assert same == selection
    assert not same.causal
    function, values = selection.__reduce__()
    old = function(*values[:-1])  # a pickle of a version without the field
    assert old.causal
    assert old != selection
    whole, seen = selection.mask(), selection.mask(causal=True)
    np.testing.assert_array_equal(whole, reference.selection_mask(selection, 70, 90))
    position, key = np.arange(70)[:, None] + 20, np.arange(90)
    visible = np.abs(key - position) < (window or 1000)
    np.testing.assert_array_equal(seen, whole & visible)
    assert selection.density() == seen.sum() / (visible.sum() * 2 * 4)
    assert 0 < selection.density() < 1
    again = dhsa.Selection.from_mask(seen, query_block=16, window=window, causal=False)
    np.testing.assert_array_equal(again.mask(causal=True), seen)
    assert again.density() == selection.density()
    np.testing.assert_array_equal(*(dhsa.sparse_attention(q, k, v, s, window=window) for s in (selection, again)))
    made = dhsa.Selection.from_indices(
        selection.indptr, selection.indices, shape=selection.shape, query_block=16, q_len=70, k_len=90, causal=False
    )
    assert made == selection
    assert dhsa.Selection.from_indices(
        selection.indptr, selection.indices, shape=selection.shape, query_block=16
    ) != selection  # fmt: skip


def test_more_queries_than_keys_take_lists_that_were_made_by_hand():
    """Where nothing is causal, positions do not matter. Selecting needs them."""
    q, k, v = normal(1, 2, 70, 8), normal(1, 1, 40, 8, seed=1), normal(1, 1, 40, 8, seed=2)
    everything = dhsa.Selection.from_indices(
        40 * np.arange(6), np.tile(np.arange(40), 5), shape=(1, 1, 5), query_block=16, causal=False
    )
    out, _, stats = functional.run_selected(q, k, v, everything)
    np.testing.assert_allclose(out, dhsa.attention(q, k, v, causal=False), atol=1e-6)
    assert stats.density == 1
    with pytest.raises(ValueError, match=r"^q: 70 queries are more than the 40 keys"):
        dhsa.select(q, k, small(), causal=False)


@few
@given(
    q_len=st.integers(1, 40),
    more=st.integers(0, 40),
    block=st.integers(1, 45),
    window=st.none() | st.integers(1, 90),
    causal=st.booleans(),
    seed=st.integers(0, 9),
)
def test_density_of_any_lists_is_that_of_the_mask(q_len, more, block, window, causal, seed):
    """Of the core and of Selection, for lists with keys that no query of the block sees."""
    k_len, nq = q_len + more, -(-q_len // block)
    rows = np.random.default_rng(seed).random((nq, k_len)) < 0.4
    selection = dhsa.Selection._trusted(
        np.concatenate([[0], np.cumsum(rows.sum(axis=1))]).astype(np.int64),
        np.nonzero(rows)[1].astype(np.int32),
        shape=(1, 1, nq), query_block=block, q_len=q_len, k_len=k_len, window=window, causal=causal,
    )  # fmt: skip
    position, key = np.arange(q_len)[:, None] + more, np.arange(k_len)
    visible = np.abs(key - position) < (window or 1000)
    if causal:
        visible &= key <= position
    expected = (rows[np.arange(q_len) // block] & visible).sum() / visible.sum()
    assert selection.density() == expected
    q, k = normal(1, 1, q_len, 4), normal(1, 1, k_len, 4)
    _, _, stats = functional.run_selected(q, k, k, selection, window=window)
    assert stats.density == expected
