"""Methods of other papers on inputs small enough to work out by hand. That C and twins agree is test_methods.py's."""

import dataclasses

import numpy as np
import pytest

import dhsa
from dhsa import reference


def column(*numbers):
    """Queries or keys of one head and one dimension."""
    return np.array(numbers, np.float32)[None, None, :, None]


def config(method, **options):
    return dhsa.Config(method=method, **{"sink": 0, "local": 0, "dense_tail": 0, **options})


def last_list(q, k, options, **layer):
    """Keys of the last block of the last set of heads, in C and by the twin."""
    names = ("budget", "mass", "query_block", "sink", "local", "dense_tail", "heads")
    words = {name: getattr(options, name) for name in names} | dataclasses.asdict(options.options)
    got = dhsa.select(q, k, options, **layer)
    want = reference.method_lists(options.method, q, k, **words, **layer)
    np.testing.assert_array_equal(got.indptr, want.indptr)
    np.testing.assert_array_equal(got.indices, want.indices)
    return got.indices[got.indptr[-2] :].tolist()


def test_vertical_slash_finds_a_column_and_a_diagonal():
    at = np.eye(64, dtype=np.float32)
    q = 10 * at[5] + 10 * np.where(np.arange(64)[:, None] >= 12, np.roll(at, 12, axis=0), 0)  # key 5, and 12 before
    q, k = q[None, None], at[None, None]
    options = config("vertical_slash", budget=3, query_block=8)
    got = dhsa.select(q, k, options, scale=1.0)
    for i in range(3, 8):  # the two most recent keys of the diagonal, one column
        keys = got.indices[got.indptr[i] : got.indptr[i + 1]].tolist()
        assert keys == [5, 8 * i - 6, 8 * i - 5]
    wide = last_list(q, k, options.replace(budget=16), scale=1.0)
    assert {5, *range(44, 52)} <= set(wide)
    # Forced keys come first: of the six that are left, three are the diagonal's.
    forced = last_list(q, k, options.replace(budget=16, sink=6, local=4), scale=1.0)
    assert {*range(6), 49, 50, 51, *range(60, 64)} <= set(forced)


def test_vertical_slash_looks_at_64_queries():
    k = column(*np.zeros(200))
    k[0, 0, [20, 90]] = 5
    q = column(*[1.0] * 200)
    q[0, 0, 136:] = -1  # what the last 64 shun is all that the others want
    got = dhsa.select(q, k, config("vertical_slash", budget=50, query_block=8), scale=1.0)
    for i in range(16, 25):
        assert not {20, 90} & set(got.indices[got.indptr[i] : got.indptr[i + 1]].tolist()) - set(range(8 * i - 24, 200))


def test_xattention_pairs_the_last_query_with_the_first_key():
    """Groups of two: 2 * 1 + 1 * 0, 2 * 0 + 1 * 2 and 2 * 3 + 1 * 0, halved; side by side they were 1, 4, 3."""
    q, k = column(1, 2), column(1, 0, 0, 2, 3, 0)
    options = config("xattention", budget=2, query_block=2, key_block=2, stride=2)
    assert last_list(q, k, options, scale=1.0) == [4, 5]
    assert last_list(q, k, options.replace(budget=4), scale=1.0) == [2, 3, 4, 5]  # a tie
    # exp(1), exp(1) and exp(3) of a sum of 25.5
    share = np.exp(3) / (np.exp(3) + 2 * np.exp(1))
    for mass, keys in ((share - 1e-3, [4, 5]), (share + 1e-3, [2, 3, 4, 5])):
        assert last_list(q, k, options.replace(budget=None, mass=mass), scale=1.0) == keys


def test_xattention_counts_what_is_missing_as_zeros():
    """A lone query is the first of its group: it meets the second key of each pair, and key 4 none."""
    q, k = column(1), column(9, 0, 0, 2, 3)
    options = config("xattention", budget=2, query_block=2, key_block=2, stride=2)
    assert last_list(q, k, options, scale=1.0) == [2, 3]


def test_proxy_is_one_opinion_of_all_heads_of_a_group():
    """The heads' means are 2 and 1; every other key is looked at: 0, 1 and 2, not the 9 between them."""
    q = np.concatenate([column(-1, -1), column(5, 3)], axis=1)
    k = column(0, 9, 1, 0, 2, 0)
    options = config("proxy", budget=2, query_block=2, key_block=2, stride=2)
    for heads in ("head", "group", "all"):
        got = dhsa.select(q, k, options.replace(heads=heads), scale=1.0)
        assert got.indices.tolist() == [4, 5] * got.shape[1]
        assert last_list(q, k, options.replace(heads=heads, budget=4), scale=1.0) == [2, 3, 4, 5]


def test_proxy_lets_each_head_say_how_much_it_needs():
    """A mean query of 0 spreads its mass over all three blocks, one of 8 puts it into the last."""
    q = np.concatenate([column(0, 0), column(8, 8)], axis=1)
    k = column(0, 0, 1, 1, 2, 2)
    options = config("proxy", budget=None, mass=0.5, query_block=2, key_block=2, stride=2)
    got = dhsa.select(q, k, options, scale=1.0)
    assert [got.indices[a:b].tolist() for a, b in zip(got.indptr, got.indptr[1:], strict=False)] == [
        [2, 3, 4, 5],
        [4, 5],
    ]


def test_hisa_does_not_look_into_blocks_with_a_poor_mean():
    """Key 0 is the best by far, but its block's mean is 0; blocks of four keys in all are looked into, the best two."""
    q, k = column(1), column(10, -10, 1, 1, 2, 2, 3, 4, 0)
    options = config("hisa", budget=1, query_block=1, key_block=2, rows=1)
    assert last_list(q, k, options, scale=1.0) == [7]
    assert last_list(q, k, options.replace(budget=3), scale=1.0) == [0, 6, 7]  # now 12: all blocks
    assert last_list(q, k, options.replace(budget=2, sink=1), scale=1.0) == [0, 7]


@pytest.mark.parametrize("window", [None, 40])
def test_oracle_with_a_mass_is_the_shortest_list_that_holds_it(window):
    rng = np.random.default_rng(0)
    q, k = (np.pad(rng.standard_normal((1, 2, 96, 8)).astype(np.float32), [(0, 0)] * 3 + [(0, 88)]) for _ in range(2))
    options = config("oracle", budget=None, mass=0.8, query_block=16, heads="head")
    got = dhsa.select(q, k, options, scale=1.0, window=window)
    identity = np.eye(96, dtype=np.float32)[None, None].repeat(2, 1)
    dense = reference.attention(q, k, identity, scale=1.0, window=window)  # [1, 2, 96, 96]: its probabilities
    for h in range(2):
        for i in range(1, 6):
            keys = got.indices[got.indptr[6 * h + i] : got.indptr[6 * h + i + 1]]
            mass = dense[0, h, 16 * i : 16 * i + 16].sum(axis=0) / 16
            assert mass[keys].sum() >= 0.8 - 1e-5
            assert mass[keys].sum() - mass[keys].min() < 0.8 + 1e-5
            assert len(keys) == (np.cumsum(np.sort(mass)[::-1]) < 0.8).sum() + 1


def test_oracle_sees_no_key_that_its_queries_do_not():
    """Key 2 would be the best, but only the block's last query sees it; key 0 is seen by both."""
    q, k = column(1, 1), column(1, 0, 2)
    options = config("oracle", budget=1, query_block=2)
    # query 1: e / (e + 1) = .73 and .27; query 2: e, 1 and e^2 of 11.1: .245, .09, .665
    assert last_list(q, k, options, scale=1.0) == [0]


@pytest.mark.parametrize("method", ["xattention", "proxy"])
@pytest.mark.parametrize("stride", [5, 256, 2048])
def test_stride_that_does_not_divide_a_block(method, stride):
    with pytest.raises(ValueError, match=f"stride: got {stride}, expected a divisor of key_block = 128, at most 1024"):
        dhsa.Config(method=method, stride=stride)


def test_columns_and_diagonals_of_the_source_settings():
    assert dhsa.Config(method="vertical_slash").heads == "head"
    for method, share in (("xattention", 0.9), ("proxy", 0.95)):
        source = dhsa.Config.source(method)
        assert (source.mass, source.budget, source.key_block, source.heads) == (share, None, 128, "head")
