"""A key index as bytes: it goes on as the one that was written, and other bytes are refused."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import dhsa
from dhsa import _core, functional

CONFIGS = {
    "rows": dhsa.Config(budget=64, sink=4, local=16, query_block=16, dense_tail=0),
    "rows, shortlist": dhsa.Config(budget=64, sink=4, local=16, query_block=16, dense_tail=0, shortlist=96),
    "means in fp32": dhsa.Config(method="dhsa", budget=64, sink=4, local=16, query_block=16, dense_tail=0),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


K, V, Q = normal(1, 2, 900, 16), normal(1, 2, 900, 16, seed=1), normal(1, 4, 900, 16, seed=2)


def call(index, start, end, config, dtype=np.float32, same=0):
    q, k, v = (x.astype(dtype) for x in (Q[:, :, start:end], K[:, :, :end], V[:, :, :end]))
    out, _, stats = functional.run(q, k, v, config, key_indexes=(index,), same=same)
    assert stats.path == "sparse"
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_goes_on_as_the_one_that_was_written(name, dtype):
    """Written after a prompt, after steps, and after more of the prompt; then steps and a prompt follow."""
    config, first = CONFIGS[name], _core.KeyIndex()
    for start, end in ((0, 700), (700, 701), (701, 702), (702, 760), (760, 761)):
        call(first, start, end, config, dtype)
        written = first.to_bytes()
        again = _core.KeyIndex.from_bytes(memoryview(written))
        assert again.to_bytes() == written
        cuts = first.boundaries
        assert again.boundaries == cuts[: len(again.boundaries)]
        assert len(again.boundaries) > 20
        twin = _core.KeyIndex.from_bytes(written)
        for a, b in ((end, end + 1), (end + 1, end + 2), (end + 2, end + 60)):
            expected = call(twin, a, b, config, dtype)
            np.testing.assert_array_equal(call(again, a, b, config, dtype, same=a), expected)
    assert len(written) > 700 * 8


def test_means_are_part_of_it():
    config, index = CONFIGS["rows"], _core.KeyIndex()
    call(index, 0, 900, config)
    with_means = len(index.to_bytes())
    functional.run(Q, K, V, config, key_indexes=(index,), same=900, keep_means=False)
    assert len(index.to_bytes()) < 0.6 * with_means


def test_keys_that_are_others_are_noticed():
    config, index = CONFIGS["rows"], _core.KeyIndex()
    call(index, 0, 800, config)
    again = _core.KeyIndex.from_bytes(index.to_bytes())
    k = K.copy()
    k[:, :, 300:] += 1
    out, _, _ = functional.run(Q[:, :, 800:], k, V, config, key_indexes=(again,), same=800)
    call(fresh := _core.KeyIndex(), 0, 300, config)
    np.testing.assert_array_equal(out, functional.run(Q[:, :, 800:], k, V, config, key_indexes=(fresh,))[0])


def test_empty():
    assert _core.KeyIndex.from_bytes(_core.KeyIndex().to_bytes()).boundaries == []


@pytest.mark.parametrize("value", [None, 3, "text", np.zeros((4, 4), np.uint8).T[::2]])
def test_no_bytes(value):
    with pytest.raises(TypeError, match="bytes: expected a contiguous buffer"):
        _core.KeyIndex.from_bytes(value)


INDEX = _core.KeyIndex()
functional.run(Q, K, V, CONFIGS["rows, shortlist"], key_indexes=(INDEX,))
WRITTEN = INDEX.to_bytes()


@pytest.mark.parametrize("size", [0, 1, 95, 96, 2000, len(WRITTEN) - 1])
def test_cut_short(size):
    with pytest.raises(ValueError, match=f"bytes: these {size} are no key index"):
        _core.KeyIndex.from_bytes(WRITTEN[:size])


@pytest.mark.parametrize("field", range(12))
@pytest.mark.parametrize("value", [-1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)])
def test_numbers_of_the_header(field, value):
    head = np.frombuffer(WRITTEN, np.int64, 12).copy()
    head[field] = value
    with pytest.raises(ValueError, match="are no key index"):
        _core.KeyIndex.from_bytes(head.tobytes() + WRITTEN[96:])


def test_means_that_are_not_finite():
    with pytest.raises(ValueError, match="are no key index"):
        _core.KeyIndex.from_bytes(WRITTEN[:-8] + b"\xff" * 8)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_read_can_be_used(data):
    """Changed bytes are refused, or stand for cuts and means that a call can work with."""
    changed = bytearray(WRITTEN)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, 95), st.integers(0, len(changed) - 1)))
        changed[at] = data.draw(st.integers(0, 255))
    try:
        index = _core.KeyIndex.from_bytes(changed)
    except ValueError:
        return
    assert np.isfinite(functional.run(Q, K, V, CONFIGS["rows, shortlist"], key_indexes=(index,), same=900)[0]).all()
    assert np.isfinite(functional.run(Q[:, :, :1], K, V, CONFIGS["rows"], key_indexes=(index,), same=900)[0]).all()
