"""A KeyIndex driven by random calls: keys that come and go, one at a time or many, other keys in any head, cuts that
are given, copies, any number of threads. After each call the result must equal that of a call without a KeyIndex from
the same cuts."""

import copy
import pickle
import threading
import time

import numpy as np
import pytest
from test_key_index import CONFIGS, expected, keys_and_values, normal, run

import dhsa
from dhsa import _core, functional

HEADS, DIM = 2, 16


def cuts_of(rng, length):
    """Boundaries of any kind: chunks of any length, empty ones at the front, in the middle and at the end."""
    inner = rng.integers(0, length + 1, rng.integers(0, length // 3 + 2))
    ends = [0] * int(rng.integers(1, 4)), [length] * int(rng.integers(1, 4))
    return np.sort(np.concatenate([ends[0], inner, ends[1]])).astype(np.int32)[None]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(4))
def test_random_histories(name, seed):
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    k, v = keys_and_values(900, heads=HEADS, dim=DIM, seed=seed)
    k, v = k.copy(), v.copy()
    index, length, same, compared = _core.KeyIndex(), int(rng.integers(1, 200)), 0, 0
    for turn in range(40):
        what = rng.choice(["piece", "step", "step", "crop", "other", "again", "copy", "one", "given"])
        queries = 1
        if what in ("piece", "given"):
            queries = int(rng.integers(2, 120))
            length = min(length + queries, 900)
        elif what == "step":
            length = min(length + 1, 900)
        elif what == "crop":
            length = int(rng.integers(1, length + 1))
        elif what == "one":
            length = 1
        elif what == "other":  # as little as one number of one head
            at, head = int(rng.integers(0, length)), int(rng.integers(0, HEADS))
            k[0, head, at, int(rng.integers(0, DIM))] = rng.standard_normal()
            same = min(same, at)
        if what == "copy":
            index = copy.deepcopy(index)
        queries = min(queries, length)
        same = min(same, length) if rng.random() < 0.5 else 0
        dhsa.set_num_threads(int(rng.choice([1, 2, 5])))
        q = normal(1, 4, queries, DIM, seed=turn)
        keys, values = k[:, :, :length], v[:, :, :length]
        options = {"boundaries": cuts_of(rng, length)} if what == "given" and rng.random() < 0.7 else {}
        out, _, stats = functional.run(
            q, keys, values, config, key_indexes=(index,), same=same, keep_means=True, **options
        )
        if stats.path != "sparse":  # all keys are within the budget: the KeyIndex was not asked
            np.testing.assert_array_equal(out, dhsa.attention(q, keys, values))
            continue
        np.testing.assert_array_equal(out, expected(q, keys, values, config, index), err_msg=f"turn {turn}: {what}")
        same = length
        compared += 1
    assert compared > 5


@pytest.mark.parametrize("head", range(3))
@pytest.mark.parametrize("place", [0, 7, DIM - 1])
def test_keys_are_known_by_all_their_heads_and_numbers(head, place):
    config = CONFIGS["rows"]
    k, v = keys_and_values(400, heads=3, dim=DIM)
    index, q = _core.KeyIndex(), normal(1, 3, 100, DIM, seed=9)
    run(q, k, v, config, index)
    other = k.copy()
    other[0, head, 200, place] = np.nan
    out, _ = run(q, other, v, config, index)
    np.testing.assert_array_equal(out, expected(q, other, v, config, index))
    fresh, _ = run(q, other, v, config, _core.KeyIndex())
    assert np.isnan(
        fresh[0, head]
    ).any()  # a chunk that is no number is chosen, so that it reaches the rows that see it
    np.testing.assert_array_equal(np.isnan(out[0, head]).any(-1), np.isnan(fresh[0, head]).any(-1))


def calls_until_noticed(heads, dim, length, change):
    """How many calls, which are told that all keys are the same, pass before a key that is no number is seen."""
    k, v = keys_and_values(length, heads=heads, dim=dim)
    q, index, other = normal(1, heads, 2, dim, seed=9), _core.KeyIndex(), k.copy()
    run(q, k, v, CONFIGS["rows"], index)
    other[0, -1, change] = np.nan
    for call in range(512):
        if np.isnan(run(q, other, v, CONFIGS["rows"], index, same=length)[0]).any():
            return call
    return None


def test_all_keys_of_a_small_cache_are_looked_at_whatever_is_said():
    for change in (0, 1, 200, 398, 399):
        assert calls_until_noticed(1, 16, 400, slice(change, change + 1)) == 0


def test_what_is_said_to_be_the_same_is_looked_at_in_turns():
    """Some keys all over and the last ones in each call, and each of the others within 512 calls."""
    large = 4, 256, 2000
    assert calls_until_noticed(*large, slice(1000, 1125)) == 0
    assert calls_until_noticed(*large, slice(1990, 1991)) == 0
    assert calls_until_noticed(*large, slice(0, 1)) == 0
    for change in (700, 1901):
        assert 0 < calls_until_noticed(*large, slice(change, change + 1)) < 512


def test_copies_and_pickles():
    k, v = keys_and_values(300)
    q, index = normal(1, 4, 1, 16), _core.KeyIndex()
    run(normal(1, 4, 299, 16), k[:, :, :299], v[:, :, :299], CONFIGS["rows"], index)
    twin = copy.copy(index)
    assert twin is not index
    assert twin.boundaries == index.boundaries
    run(q, k + 1, v, CONFIGS["rows"], twin)
    assert index.boundaries[-1] == 299  # the other's is its own
    assert twin.boundaries[-1] == 300
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="KeyIndex: cannot be pickled; a new one learns what it needs"):
            pickle.dumps(index, protocol)


def test_copied_and_pickled_while_in_use():
    k, v = keys_and_values(6000, dim=64)
    q, index = normal(1, 4, 6000, 64), _core.KeyIndex()
    ended, told = threading.Event(), set()

    def work():
        while not ended.is_set():
            run(q, k, v, CONFIGS["rows"], index)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until = time.monotonic() + 30
        while len(told) < 2 and time.monotonic() < until:
            for make in (copy.copy, copy.deepcopy):
                try:
                    make(index)
                except RuntimeError as error:
                    told.add((make, str(error)))
            with pytest.raises(TypeError, match="KeyIndex: cannot be pickled"):
                pickle.dumps(index)
    finally:
        ended.set()
        thread.join()
    assert told == {(make, "key_indexes: in use by another call") for make in (copy.copy, copy.deepcopy)}
    assert copy.copy(index).boundaries == index.boundaries


@pytest.mark.parametrize("floor", [0, 1])
def test_a_step_on_a_cache_of_one_key(floor):
    config = dhsa.Config(mass=0.5, floor=floor, sink=0, local=0, dense_tail=0, query_block=4)
    k, v = keys_and_values(3, heads=1, dim=DIM)
    q, index = normal(1, 2, 1, DIM), _core.KeyIndex()
    for length in (1, 2, 3, 1):
        out, _ = run(q, k[:, :, :length], v[:, :, :length], config, index)
        if length == 1:
            np.testing.assert_allclose(out, np.broadcast_to(v[:, :, :1], out.shape), rtol=1e-6)
        assert np.isfinite(out).all()


def test_cuts_that_begin_with_empty_chunks_then_others():
    config = CONFIGS["rows"]
    k, v = keys_and_values(300, dim=DIM)
    q, index = normal(1, 4, 50, DIM, seed=5), _core.KeyIndex()
    for cuts in ([0, 0, 0, 100, 300], [0, 50, 300], [0, 0, 300], list(range(301)), [0, 300]):
        given = np.array([cuts], np.int32)
        out, _, _ = functional.run(q, k, v, config, key_indexes=(index,), same=300, keep_means=True, boundaries=given)
        np.testing.assert_array_equal(out, expected(q, k, v, config, index))
        assert index.boundaries == [0, *cuts[1:]]


def test_refused_arguments_leave_pasts_alone():
    config = CONFIGS["rows"]
    k, v = keys_and_values(300, dim=DIM)
    q, index = normal(1, 4, 50, DIM, seed=5), _core.KeyIndex()
    run(q, k, v, config, index)
    before = index.boundaries, index.nbytes
    two = np.concatenate([k, k])
    with pytest.raises(ValueError, match="batch"):
        functional.run(q, two, two, config, key_indexes=(index, _core.KeyIndex()), keep_means=False)
    assert (index.boundaries, index.nbytes) == before
    assert before[0][-1] == 300
