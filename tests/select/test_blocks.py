"""Lists of some blocks of queries, by means of chunks that come from elsewhere, are those of the whole prompt."""

import itertools

import numpy as np
import pytest

import dhsa
from dhsa import _core
from dhsa.config import HEADS

GROUP = 4


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def arrays(kv_heads, chunks, dim, spread):
    return (
        np.full((kv_heads, chunks, dim), 99, np.int8),
        np.full((kv_heads, chunks), np.nan, np.float32),
        np.full((kv_heads, chunks), np.nan, np.float32) if spread else None,
        np.full((kv_heads, chunks), 0, np.int8),
    )


def means(k, edges, spread, parts):
    """Means that were computed in parts, each by one who has the keys of its chunks only."""
    found = arrays(k.shape[1], len(edges) - 1, k.shape[3], spread)
    for first, last in parts:
        own = np.full_like(k, np.nan)
        own[:, :, edges[first] : edges[last]] = k[:, :, edges[first] : edges[last]]
        part = arrays(k.shape[1], last - first, k.shape[3], spread)
        _core.chunk_means(own, np.ascontiguousarray(edges[first : last + 1]), part, 1)
        for whole, some in zip(found, part, strict=True):
            if whole is not None:
                whole[:, first:last] = some
    return found


def blocks(q, k, config, edges, first, count, window=None, softcap=None):
    """The lists of blocks [first, first + count), with no more of q and k than is said to be read."""
    rows = config.query_block
    at = k.shape[2] - q.shape[2]
    some_q, some_k = np.full_like(q, np.nan), np.full_like(k, np.nan)
    some_q[:, :, first * rows : (first + count) * rows] = q[:, :, first * rows : (first + count) * rows]
    groups = np.append(edges[:-1:GROUP], edges[-1]).astype(np.int32)
    start = groups[np.searchsorted(groups, at + first * rows, "right") - 1]
    some_k[:, :, start : at + (first + count) * rows] = k[:, :, start : at + (first + count) * rows]
    n = len(edges) - 1
    fine, coarse = means(k, edges, False, [(0, n // 3), (n // 3, n)]), None
    n = len(groups) - 1
    coarse = means(k, groups, True, [(0, n // 2), (n // 2, n)])
    sets = (k.shape[1], 1, q.shape[1])[HEADS.index(config.heads)]
    indptr, indices = np.zeros(sets * count + 1, np.int64), np.zeros(sets * count * k.shape[2], np.int32)
    _core.select_blocks(
        some_q, some_k, edges[None], fine, coarse, config._core, None, softcap, window, first, count, indptr, indices, 1
    )
    return [indices[a:b].tolist() for a, b in itertools.pairwise(indptr)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shortlist", [0, 192])
@pytest.mark.parametrize("dim", [16, 40])
def test_lists_of_blocks_are_those_of_all(heads, shortlist, dim, rng):
    config = dhsa.Config(
        budget=96, sink=8, local=32, query_block=32, dense_tail=16, heads=heads, shortlist=shortlist, chunk_size=3
    )
    past, length = 41, 500
    q = rng.standard_normal((1, 4, length, dim), np.float32)
    k = rng.standard_normal((1, 2, past + length, dim), np.float32)
    k[0, 1, 77, 3] = np.nan
    for window, softcap in ((None, None), (None, 2.0), (150, None)):
        edges = dhsa.boundaries(k, config)[0]
        whole = dhsa.select(q, k, config, boundaries=edges, window=window, softcap=softcap)
        sets, nq = whole.shape[1:]
        found = {}
        for first, count in ((0, 5), (5, 1), (6, nq - 6)):
            lists = blocks(q, k, config, edges, first, count, window, softcap)
            for at, keys in enumerate(lists):
                found[at // count, first + at % count] = keys
        for head in range(sets):
            for i in range(nq):
                at = head * nq + i
                expected = whole.indices[whole.indptr[at] : whole.indptr[at + 1]].tolist()
                assert found[head, i] == expected, (window, softcap, head, i)


@pytest.mark.parametrize("method", ["window", "power"])
def test_methods_that_read_no_keys_need_no_means(method, rng):
    config = dhsa.Config(method=method, budget=96, sink=8, local=32, query_block=32, dense_tail=16)
    q, k = (rng.standard_normal((1, h, 400, 8), np.float32) for h in (4, 2))
    whole = dhsa.select(q, k, config)
    sets, nq = whole.shape[1:]
    indptr, indices = np.zeros(sets * 3 + 1, np.int64), np.zeros(sets * 3 * 400, np.int32)
    blank = np.full_like(q, np.nan), np.full_like(k, np.nan)
    _core.select_blocks(*blank, None, None, None, config._core, None, None, None, 6, 3, indptr, indices, 1)
    for head in range(sets):
        for i in range(3):
            at = head * nq + 6 + i
            part = indices[indptr[head * 3 + i] : indptr[head * 3 + i + 1]]
            assert (part == whole.indices[whole.indptr[at] : whole.indptr[at + 1]]).all()


def test_bad_input_is_named(rng):
    config = dhsa.Config(budget=96, sink=8, local=32, query_block=32)
    q, k = (rng.standard_normal((1, h, 200, 8), np.float32) for h in (4, 2))
    edges = np.arange(0, 201, 2, dtype=np.int32)
    fine = means(k, edges, False, [(0, 100)])
    indptr, indices = np.zeros(4 * 2 + 1, np.int64), np.zeros(4 * 2 * 200, np.int32)

    def call(boundaries=edges, chunks=fine, config=config, first=0, indices=indices, q=q):
        _core.select_blocks(
            q, k, boundaries[None], chunks, None, config._core, None, None, None, first, 2, indptr, indices, 1
        )

    call()
    for message, changes in {
        "first": {"first": 6},
        "indices": {"indices": indices[:50]},
        "chunks": {"chunks": None},
        "boundaries": {"boundaries": edges[:-1]},
        "q": {"q": np.repeat(q, 2, axis=0)},
    }.items():
        with pytest.raises(ValueError, match=f"^{message}: |^k: batch"):
            call(**changes)
    with pytest.raises(NotImplementedError, match=r"^method: block reads"):
        call(config=config.replace(method="block", heads="head"))
    with pytest.raises(ValueError, match=r"^edges: entry 2"):
        _core.chunk_means(k, np.array([0, 5, 3], np.int32), arrays(2, 2, 8, False), 1)
    with pytest.raises(ValueError, match=r"^means: expected room"):
        _core.chunk_means(k, np.array([0, 5], np.int32), arrays(1, 1, 8, False), 1)
