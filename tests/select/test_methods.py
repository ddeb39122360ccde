"""Every selection method against its reference twin, and what they all share: forced keys, budgets, shares of mass,
exact blocks, windows, threads, the pipeline. A method joins by its entry in dhsa.methods.registry.

What is particular to chunks (boundaries, their scores) is tested in test_select.py.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import every_tier, once

import dhsa
from dhsa import _core, functional, reference
from dhsa.methods import registry

TOLERANCE = 1e-5  # relative, of fp32 scores
TWINS = sorted(reference.METHODS)
NO_MASS = [name for name, method in registry.items() if not method.has_mass]
MASSY = [method for method in TWINS if method not in NO_MASS]
few = settings(max_examples=60, deadline=None, derandomize=True)


def normal(*shape, seed=0, dtype=np.float32):
    """Multiples of 2^-12, so that sums of a few are exact: "rows" rounds means to bf16, where a hair may decide."""
    return (np.round(np.random.default_rng(seed).standard_normal(shape) * 4096) / 4096).astype(dtype)


def small(**options):
    values = {"budget": 40, "query_block": 16, "sink": 4, "local": 10, "dense_tail": 8, **options}
    own = registry[values.get("method", "rows")].options()
    if "key_block" in own:
        values.setdefault("key_block", 12)
    else:
        values.pop("key_block", None)  # of tests that give it to every method
    if "stride" in own:
        values.setdefault("stride", math.gcd(values["key_block"], 4))
    # At the sizes of these tests: some blocks of keys are alike, and some keys are out of reach.
    for name, value in (("similarity", 0.03), ("reach", 16)):
        if name in own:
            values.setdefault(name, value)
    return dhsa.Config(**values)


def twin_options(config, **layer):
    names = ("budget", "mass", "floor", "query_block", "sink", "local", "dense_tail", "heads")
    return {name: getattr(config, name) for name in names} | dataclasses.asdict(config.options) | layer


def select(q, k, config, **layer):
    """`dhsa.select`, with values where the method reads them."""
    return dhsa.select(q, k, config, **values(k, config), **layer)


def values(k, config):
    return {"v": k[..., ::-1] - k[..., :1]} if config.options.reads_values else {}


def row_of(selection, r):
    return selection.indices[selection.indptr[r] : selection.indptr[r + 1]]


class Expected(NamedTuple):
    """What the twin gives for one list: its keys; the segments, if it ranks segments, and, under a share of mass, the
    least and the greatest length."""

    keys: np.ndarray
    exact: bool
    segments: reference.Segments | None = None
    lengths: tuple[int, int] | None = None


def expected(q, k, config, edges, layer):
    """The twin's lists, in CSR order."""
    options = twin_options(config, **layer)
    if config.method == "dhsa":
        options |= {"scale": 1.0, "softcap": None}
    lists = []
    options |= values(k, config)
    for here, found in reference.method_blocks(config.method, q, k, boundaries=edges, **options):
        if found is None:
            lists.append(Expected(np.arange(here.lo, here.end), exact=True))
        elif not isinstance(found, reference.Segments):
            lists.append(Expected(found, exact=False))
        else:
            bounds = {"budget": here.room, "sink": config.sink, "local": config.local, "middle": here.middle}
            lengths = None
            if config.mass is not None:
                bounds |= {"mass": config.mass, "floor": config.floor}
                lengths = tuple(
                    len(reference.topk(found, here.lo, here.end, **bounds | {"mass": config.mass * factor}))
                    for factor in (1 - TOLERANCE, min(1 + TOLERANCE, 1 / config.mass))
                )
            lists.append(Expected(reference.topk(found, here.lo, here.end, **bounds), False, found, lengths))
    return lists


def check_row(got, want, config):
    """One list against the twin's: equal, but for segments whose scores cannot be told apart in fp32."""
    if want.segments is None:
        np.testing.assert_array_equal(got, want.keys)
        return
    if config.mass is not None:
        least, most = want.lengths
        assert least <= len(got) <= most
    if np.array_equal(got, want.keys):
        return
    if config.mass is None:
        assert len(got) == len(want.keys)
    other, found = np.setxor1d(got, want.keys), want.segments
    segment = np.searchsorted(found.edges, other, side="right") - 1
    scores = found.score[segment]
    size = np.abs(found.score[np.isfinite(found.score)]).max() if config.method in NO_MASS else np.abs(scores).max()
    assert 0 < np.ptp(scores) <= TOLERANCE * size


def check(q, k, config, *, edges=None, **layer):
    """The C lists are the twin's; returns the selection and how many lists were not exact."""
    if config.options.has_chunks and edges is None:
        edges = dhsa.boundaries(k, config)
    got = select(q, k, config, boundaries=edges, **layer)
    assert (got.boundaries is None) == (not config.options.has_chunks)
    lists = once(expected, q, k, config, edges, layer)
    assert len(lists) == len(got.indptr) - 1
    assert len(got.indices) == got.indptr[-1]
    for row, want in enumerate(lists):
        check_row(row_of(got, row), want, config)
    return got, sum(not want.exact for want in lists)


# What a method of any size is tried with, and the options that go with a budget.
any_size = given(
    q_len=st.integers(1, 60),
    more=st.integers(0, 60),
    block=st.integers(1, 40),
    budget=st.integers(1, 60),
    data=st.data(),
    window=st.none() | st.integers(1, 130),
    key_block=st.integers(1, 30),
)


def drawn_options(data, method, **options):
    sink = data.draw(st.integers(0, options["budget"]))
    local = data.draw(st.integers(0, options["budget"] - sink))
    options |= {"sink": sink, "local": local}
    if method in MASSY and data.draw(st.booleans()):
        options |= {"mass": data.draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))}
        options |= {"floor": data.draw(st.none() | st.integers(sink + local, options["budget"]))}
    return options


# ---- against the twins -----------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("window", [None, 30, 50, 90])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("method", TWINS)
def test_method(tier, method, heads, window):
    q, k = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1)
    got, chosen = check(q, k, small(method=method, heads=heads), window=window, scale=0.5, softcap=3.0)
    assert got.shape == (2, {"all": 1, "group": 2, "head": 4}[heads], 10)
    assert (chosen > 0) == (window != 30)


@pytest.mark.parametrize("options", [
    {"sink": 0, "local": 0}, {"sink": 40, "local": 0}, {"sink": 0, "local": 40}, {"sink": 20, "local": 20},
    {"budget": 1, "sink": 0, "local": 0}, {"dense_tail": 0}, {"dense_tail": 17}, {"dense_tail": 10**6},
    {"budget": 10**9}, {"budget": None}, {"query_block": 1}, {"query_block": 1000}, {"key_block": 1},
    {"key_block": 16}, {"key_block": 1000},
])  # fmt: skip
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("method", TWINS)
def test_method_options(method, options, window):
    q, k = normal(1, 2, 130, 8), normal(1, 1, 130, 8, seed=1)
    check(q, k, small(**options, method=method), window=window, scale=-0.4)


@few
@any_size
@pytest.mark.parametrize("method", TWINS)
def test_method_of_any_size(method, q_len, more, block, budget, data, window, key_block):
    options = drawn_options(data, method, query_block=block, budget=budget, key_block=key_block)
    q, k = normal(1, 2, q_len, 4, seed=block), normal(1, 2, q_len + more, 4, seed=budget + 100)
    check(q, k, small(**options, method=method, dense_tail=data.draw(st.integers(0, 70))), window=window)


@every_tier
@pytest.mark.parametrize("dim", [1, 7, 33, 256])
@pytest.mark.parametrize("method", TWINS)
def test_method_of_any_head_dim_and_group(tier, method, dim):
    q, k = normal(1, 5, 70, dim), normal(1, 1, 70, dim, seed=1)
    check(q, k, small(method=method, dense_tail=0, budget=24))
    check(q, np.repeat(k, 5, 1), small(method=method, dense_tail=0, budget=24, heads="all"))


@every_tier
@pytest.mark.parametrize("method", [method for method in TWINS if registry[method].reads_keys])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
def test_not_finite_keys_are_always_selected(tier, method, heads):
    q, k = normal(1, 4, 128, 8), normal(1, 2, 128, 8, seed=1)
    k[0, 1, 37, 2] = np.nan
    q[0, 1, 70, 3] = np.inf
    q[0, 3, 100, 0] = np.nan
    config = small(method=method, heads=heads, dense_tail=0)
    got, _ = check(q, k, config)
    last = got.shape[1] - 1  # a set with KV head 1
    for i in range(3, 8):  # blocks that end beyond the budget
        assert 37 in row_of(got, last * 8 + i)
    if method in MASSY:
        got, _ = check(q, k, config.replace(budget=90, mass=0.3))
        for i in range(3, 8):
            assert 37 in row_of(got, last * 8 + i)


@pytest.mark.parametrize("method", TWINS)
def test_nothing_but_nan(method):
    q, k = normal(1, 2, 90, 8), normal(1, 1, 90, 8, seed=1)
    for x, y in ((np.full_like(q, np.nan), k), (q, np.full_like(k, np.nan)), (np.full_like(q, np.inf), -k)):
        config = small(method=method, dense_tail=0, heads="all")
        config = config.replace(decay=1) if method == "stem" else config
        got, _ = check(x, y, config)
        assert np.diff(got.indptr).tolist() == [16, 32, 40, 40, 40, 40]


# ---- the shortlist of "rows" ----------------------------------------------------------------------------------------


def long_prompt(**options):
    return small(**{"budget": 70, "shortlist": 130, "rows": 9, "dense_tail": 0, **options})


@every_tier
@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
def test_shortlist(tier, heads, window):
    q, k = normal(2, 4, 450, 8), normal(2, 2, 500, 8, seed=1)
    for options in ({}, {"sink": 0, "local": 0}, {"boundaries": "fixed", "chunk_size": 3}):
        config = long_prompt(heads=heads, **options)
        got, chosen = check(q, k, config, window=window, scale=0.7, softcap=5.0)
        assert chosen > 0
        whole = dhsa.select(q, k, config.replace(shortlist=0), scale=0.7, softcap=5.0, window=window)
        assert (got == whole) == (window == 100)  # a window with fewer candidates needs no shortlist


def test_shortlist_of_rows_of_boundaries_with_padding_and_chunks_of_any_length():
    q, k = normal(2, 2, 400, 8), normal(2, 1, 400, 8, seed=1)
    cuts = [np.unique(np.random.default_rng(s).integers(1, 400, n)) for s, n in ((0, 150), (1, 60))]
    edges = np.full((2, 152), 400, np.int32)
    for row, cut in zip(edges, cuts, strict=True):
        row[0], row[1 : 1 + len(cut)] = 0, cut
    edges[0, 40:44] = edges[0, 40]  # empty chunks inside
    check(q, k, long_prompt(), edges=edges)
    check(q, k, long_prompt(), edges=np.tile(np.append(np.arange(0, 33), 400).astype(np.int32), (2, 1)))


@every_tier
@pytest.mark.parametrize("chunks", [1, 129, 257])
def test_shortlist_of_all_of_128_j_plus_1_chunks(tier, chunks):
    """The last group holds one chunk: its products need the room of a whole group."""
    size = 2 if chunks > 1 else 10**6
    length = size * chunks if chunks > 1 else 200
    q, k = normal(1, 8, 32, 32), normal(1, 1, length, 32, seed=1)  # the last block is full: several panels of rows
    config = small(budget=32, shortlist=length - 1, rows=16, dense_tail=0, boundaries="fixed", chunk_size=size)
    _, chosen = check(q, k, config)
    assert chosen > 0


@every_tier
@pytest.mark.parametrize("empties", [50, 300, 1000])
def test_shortlist_of_few_keys_in_many_chunks(tier, empties):
    """Empty chunks have no keys, so that a shortlist of a number of keys may meet any number of them."""
    q, k = normal(1, 8, 300, 32), normal(1, 1, 300, 32, seed=1)
    once = np.concatenate([[0], np.full(empties + 1, 5), np.arange(10, 301, 10)])
    spread = np.sort(np.concatenate([np.arange(301), np.repeat(np.arange(0, 300, 2), empties // 50)]))
    for edges in (once, spread):
        _, chosen = check(q, k, long_prompt(), edges=edges.astype(np.int32)[None])
        assert chosen > 0


@every_tier
def test_shortlist_never_loses_keys_that_are_not_finite(tier):
    q, k = normal(1, 4, 480, 8), normal(1, 2, 480, 8, seed=1)
    k[0, 1, [37, 201], 2] = np.nan
    q[0, 1, 333, 3] = np.inf
    got, _ = check(q, k, long_prompt(heads="head"))
    for i in range(14, 30):
        assert {37, 201} <= set(row_of(got, 3 * 30 + i).tolist())
    check(q, np.full_like(k, np.nan), long_prompt())
    check(np.full_like(q, np.nan), k, long_prompt())


def test_shortlist_is_what_makes_a_needle_found_or_lost():
    """One key answers the last block's queries: the coarse look finds its segment, though its group's mean hides it."""
    q, k = normal(1, 1, 512, 16), 0.2 * normal(1, 1, 512, 16, seed=1)
    k[0, 0, 100] = 3 * q[0, 0, 480:].mean(0) / np.linalg.norm(q[0, 0, 480:].mean(0))
    q[0, 0, 480:] += 4 * k[0, 0, 100]
    got = dhsa.select(q, k, long_prompt(query_block=32, boundaries="fixed", chunk_size=4))
    assert 100 in row_of(got, 15)


def test_threads_and_attention_with_a_shortlist():
    q, k, v = normal(2, 4, 400, 8), normal(2, 2, 450, 8, seed=1), normal(2, 2, 450, 8, seed=2)
    dhsa.set_num_threads(1)
    want = dhsa.select(q, k, long_prompt())
    out = dhsa.attention(q, k, v, long_prompt())
    for threads in (2, 5):
        dhsa.set_num_threads(threads)
        assert dhsa.select(q, k, long_prompt()) == want
        np.testing.assert_array_equal(dhsa.attention(q, k, v, long_prompt()), out)
    np.testing.assert_array_equal(dhsa.sparse_attention(q, k, v, want), out)


def test_no_shortlist_under_a_mass_and_bad_ones_are_refused():
    q, k = normal(1, 2, 400, 8), normal(1, 1, 400, 8, seed=1)
    config = long_prompt(mass=0.7, budget=100)
    assert dhsa.select(q, k, config) == dhsa.select(q, k, config.replace(shortlist=0))
    with pytest.raises(ValueError, match="shortlist: 50 keys are fewer than the budget of 70"):
        long_prompt(shortlist=50)
    with pytest.raises(TypeError, match="shortlist"):
        long_prompt(shortlist="all")


def test_hisa_looks_into_more_keys_than_it_keeps_numbers_of():
    q, k = normal(1, 2, 40, 4), normal(1, 1, 17000, 4, seed=1)
    config = small(method="hisa", budget=None, mass=0.3, key_block=128, dense_tail=0)
    got, chosen = check(q, k, config)
    assert chosen == 3
    assert np.diff(got.indptr).min() > 1000
    check(q, k, config.replace(budget=2000, mass=None))


@pytest.mark.parametrize("method", ["block", "xattention", "proxy", "hisa"])
def test_blocks_longer_than_any_prompt(method):
    q, k = normal(1, 2, 60, 4), normal(1, 1, 60, 4, seed=1)
    stride = {"stride": 8} if "stride" in registry[method].options() else {}
    check(q, k, small(method=method, key_block=2**31 - 8, **stride))


# ---- shares of mass --------------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("share", [0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("method", MASSY)
def test_mass(tier, method, share, heads, window):
    q, k = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1)
    edges = dhsa.boundaries(k, dhsa.Config()) if method == "rows" else None
    lengths = []
    for bounds in ({"budget": None}, {"budget": 60}, {"budget": 120, "floor": 48}):
        config = small(method=method, heads=heads, mass=share, dense_tail=0, **bounds)
        got, chosen = check(q, k, config, window=window, scale=1.0, edges=edges)
        assert chosen > 0
        lengths.append(np.diff(got.indptr))
    free, most, between = lengths
    np.testing.assert_array_equal(most, np.minimum(free, 60))
    if share == 0.6:
        assert len(set(free.tolist())) > 4  # the data decide
    everything = small(method=method, heads=heads, budget=None)
    visible = np.diff(dhsa.select(q, k, everything, boundaries=edges, window=window).indptr)
    if share == 1:
        np.testing.assert_array_equal(free, visible)
    np.testing.assert_array_equal(between[free > 48], np.minimum(free, 120)[free > 48])
    np.testing.assert_array_equal(between[free <= 48], np.minimum(visible, 48)[free <= 48])


def test_mass_takes_whole_units_until_the_share_is_held():
    """One key says it all: probabilities 0.5, 0.25, 0.125, ... of blocks of 8 keys."""
    q = np.ones((1, 1, 64, 1), np.float32)
    k = np.repeat(np.log(2.0) * np.array([-4, 0, -2, -6, -1, -5, -3, -7]), 8)[None, None, :, None].astype(np.float32)
    total = sum(2.0**-n for n in range(8))
    for share, blocks in ((1.0 / total - 1e-3, [1]), (1.0 / total + 1e-3, [1, 4]), (1.74 / total, [1, 4, 2])):
        config = dhsa.Config(
            method="block", key_block=8, query_block=64, budget=None, mass=share, sink=0, local=0, dense_tail=0
        )
        got = dhsa.select(q, k, config, scale=1.0)
        assert got.indices.tolist() == [8 * b + i for b in sorted(blocks) for i in range(8)]
    # Forced keys count first: the sinks hold 4 / 8 of block 0, the local ones all of block 7.
    forced = (2.0**-4 / 2 + 2.0**-7) / total
    got = dhsa.select(q, k, config.replace(sink=4, local=8, mass=forced - 1e-4), scale=1.0)
    assert got.indices.tolist() == [*range(4), *range(56, 64)]
    got = dhsa.select(q, k, config.replace(sink=4, local=8, mass=forced + 1e-4), scale=1.0)
    assert got.indices.tolist() == [*range(4), *range(8, 16), *range(56, 64)]


# ---- what all methods share ------------------------------------------------------------------------------------------


LAST = ("vertical_slash", "flexprefill", "token_sparse")  # they ask the prompt's last queries


def given(v, config):
    return {"v": v} if config.options.reads_values else {}


def bounds_of(method):
    return [{}, {"budget": 70, "mass": 0.8}] if method in MASSY else [{}]


@pytest.mark.parametrize("method", TWINS)
def test_same_bits_for_any_number_of_threads_and_strides(method):
    q, k = normal(2, 4, 200, 8), normal(2, 2, 260, 8, seed=1)
    wide = np.zeros((2, 520, 2, 11), np.float32)  # [B, L, H, D] memory with gaps, read backwards
    wide[:, ::2, :, :8] = k[:, :, ::-1].swapaxes(1, 2)
    for bounds in bounds_of(method):
        config = small(method=method, **bounds)
        dhsa.set_num_threads(1)
        want = select(q, k, config)
        for threads in (2, 3, 5):
            dhsa.set_num_threads(threads)
            assert select(q, k, config) == want
        by_tokens = np.ascontiguousarray(q.swapaxes(1, 2)).swapaxes(1, 2)
        assert select(by_tokens, wide[:, ::2, :, :8][:, ::-1].swapaxes(1, 2), config) == want


@pytest.mark.parametrize("method", TWINS)
def test_halves_are_read_as_their_float32(method):
    q, k = normal(1, 2, 100, 12, dtype=np.float16), normal(1, 2, 100, 12, seed=1, dtype=np.float16)
    config = small(method=method)
    assert select(q, k, config) == select(q.astype(np.float32), k.astype(np.float32), config)


@pytest.mark.parametrize("method", [method for method in TWINS if method not in LAST])
def test_later_keys_change_nothing(method):
    """Lists of a block depend on the keys up to its end alone."""
    config = small(method=method, dense_tail=0, boundaries="fixed", chunk_size=5)
    q, k = normal(1, 2, 128, 8), normal(1, 2, 128, 8, seed=1)
    before = select(q, k, config)
    k[:, :, 64:] = normal(1, 2, 64, 8, seed=2)
    after = select(q, k, config)
    for s in range(2):
        for i in range(4 if method != "dhsa" else 3):  # the paper's means are of whole chunks
            np.testing.assert_array_equal(row_of(before, s * 8 + i), row_of(after, s * 8 + i))
    if registry[method].reads_keys:
        assert before != after


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("method", TWINS)
def test_attention_is_select_then_attend(method, window):
    q, k, v = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1), normal(2, 2, 183, 8, seed=2)
    for bounds in bounds_of(method):
        config = small(method=method, **bounds)
        options = {"scale": 0.6, "softcap": 4.0, "window": window}
        out, lse, stats = functional.run(q, k, v, config, return_lse=True, **options)
        selection = dhsa.select(q, k, config, **given(v, config), **options)
        want, want_lse = dhsa.sparse_attention(q, k, v, selection, return_lse=True, **options)
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(lse, want_lse)
        assert stats.path == "sparse"
        assert stats.density == pytest.approx(reference.density(selection, window=window), rel=1e-12)
        np.testing.assert_allclose(out, reference.sparse_attention(q, k, v, selection, **options), atol=3e-6)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", TWINS)
def test_attention_in_waves_of_blocks(method, batch):
    """Lists of more than 2^18 keys in all are never held at once: the same bits as from one selection."""
    q, k, v = normal(batch, 4, 3000, 8), normal(batch, 2, 3500, 8, seed=1), normal(batch, 2, 3500, 8, seed=2)
    for bounds in [{"budget": 1400}, {"budget": None, "mass": 0.7}][: 1 + (method in MASSY)]:
        config = small(method=method, **bounds)
        selection = dhsa.select(q, k, config, **given(v, config))
        assert len(selection.indices) > 2**18
        out, lse, stats = functional.run(q, k, v, config, return_lse=True)
        want, want_lse = dhsa.sparse_attention(q, k, v, selection, return_lse=True)
        np.testing.assert_array_equal(out, want)
        np.testing.assert_array_equal(lse, want_lse)
        assert stats.density == pytest.approx(selection.density(), rel=1e-12)


def test_window_is_sinks_and_recent_keys():
    q, k = normal(1, 2, 100, 4), normal(1, 1, 110, 4, seed=1)
    got = dhsa.select(q, k, small(method="window", dense_tail=0))
    for i in range(7):
        end = min(10 + 16 * (i + 1), 110)
        want = list(range(end)) if end <= 40 else [*range(4), *range(end - 36, end)]
        assert row_of(got, i).tolist() == want


def test_power_takes_powers_of_two_first():
    q, k = normal(1, 1, 256, 4), normal(1, 1, 256, 4, seed=1)
    got = dhsa.select(q, k, small(method="power", query_block=8, budget=56, sink=0, local=8, dense_tail=0))
    blocks = (31 - np.unique(row_of(got, 31) // 8)).tolist()
    assert blocks == [16, 8, 4, 3, 2, 1, 0]  # all powers, then the nearest sum of two


def test_chunks_need_boundaries():
    q, k = normal(1, 2, 64, 8), normal(1, 2, 64, 8)
    core = small()._core
    indptr = np.empty(9, np.int64)
    _core.select_plan(q, k, core, None, None, None, True, indptr)
    with pytest.raises(ValueError, match=r"^boundaries: expected at least"):
        _core.select(q, k, None, core, None, None, None, True, indptr, np.empty(indptr[-1], np.int32), 1)


def test_every_method_has_a_twin_or_says_that_it_is_not_there():
    q, k = normal(1, 1, 8, 4), normal(1, 1, 8, 4)
    for method in registry:
        if method not in TWINS:
            with pytest.raises(NotImplementedError, match="method"):
                dhsa.select(q, k, dhsa.Config(method=method))
