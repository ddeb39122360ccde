"""Lists by scores from outside: against the plainest computation, in arrays and in models."""

import numpy as np
import pytest

import dhsa
from dhsa import functional, reference

SMALL = dhsa.Config(budget=40, query_block=16, sink=4, local=10, dense_tail=8)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def plain(scores, config, lo, end):
    """Forced keys, and the best others, the later of equal ones first."""
    keys = set(range(lo, end))
    forced = {key for key in keys if key < config.sink or key >= end - config.local}
    ranked = sorted(keys - forced, key=lambda key: (-scores[key], -key))
    return sorted(forced | set(ranked[: config.budget - len(forced)]))


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("method", ["rows", "dhsa", "window", "oracle"])
def test_lists_are_the_best_keys_by_given_scores(method, heads, n, window):
    q, k = normal(2, 4, 130, 8), normal(2, 2, 150, 8, seed=1)
    scores = np.round(np.random.default_rng(2).random((2, n, 150)) * 20)  # many ties
    config = SMALL.replace(method=method, heads=heads)
    got = dhsa.select(q, k, config, key_scores=scores, window=window)
    sets = {"all": 1, "group": 2, "head": 4}[heads]
    assert got.shape == (2, sets, 9)
    of_heads = np.repeat(scores, 4 // n, axis=1).reshape(2, sets, 4 // sets, 150).sum(axis=2)
    for row in range(2 * sets * 9):
        (b, s), i = divmod(row // 9, sets), row % 9
        end = min(20 + 16 * (i + 1), 150)
        lo = 0 if window is None else max(0, 20 + 16 * i - window + 1)
        want = plain(of_heads[b, s], config, lo, end) if i < 7 and end > 40 else list(range(lo, end))
        assert got.indices[got.indptr[row] : got.indptr[row + 1]].tolist() == want


def test_a_mass_takes_keys_until_they_hold_it():
    q, k = normal(1, 1, 64, 8), normal(1, 1, 64, 8, seed=1)
    scores = np.zeros((1, 1, 64))
    scores[0, 0, [20, 30, 40]] = 5, 3, 2
    config = dhsa.Config(budget=None, mass=0.8, query_block=16, sink=0, local=0, floor=0, dense_tail=0)
    got = dhsa.select(q, k, config, key_scores=scores)
    assert got.indices[got.indptr[3] :].tolist() == [20, 30]


def test_keys_that_are_not_finite_are_taken_and_both_sides_are_served():
    q, k = normal(1, 2, 96, 8), normal(1, 1, 96, 8, seed=1)
    k[0, 0, 50, 3] = np.nan
    scores = np.zeros((1, 1, 96))
    scores[0, 0, 60:] = 1
    got = dhsa.select(q, k, SMALL, key_scores=scores)
    assert all(50 in got.indices[got.indptr[r] : got.indptr[r + 1]] for r in (3, 4, 5))
    both = dhsa.select(q, k, SMALL.replace(dense_tail=0), key_scores=scores, causal=False)
    first = both.indices[: both.indptr[1]]
    assert 95 in first  # after the block
    assert len(first) == 40


def test_run_is_select_and_then_attention():
    q, k, v = normal(2, 4, 130, 8), normal(2, 2, 150, 8, seed=1), normal(2, 2, 150, 8, seed=2)
    scores = np.random.default_rng(3).random((2, 4, 150))
    layer = {"scale": 0.3, "softcap": 4.0, "window": 90}
    out, lse, stats = functional.run(q, k, v, SMALL, key_scores=scores, return_lse=True, **layer)
    selection = dhsa.select(q, k, SMALL, key_scores=scores, **layer)
    assert stats.path == "sparse"
    assert stats.density == pytest.approx(reference.density(selection, window=90))
    np.testing.assert_allclose(out, reference.sparse_attention(q, k, v, selection, **layer), atol=3e-6)
    want = dhsa.sparse_attention(q, k, v, selection, return_lse=True, **layer)
    np.testing.assert_array_equal(out, want[0])
    np.testing.assert_array_equal(lse, want[1])
    short = functional.run(q[:, :, :30], k[:, :, :30], v[:, :, :30], SMALL, key_scores=scores[:, :, :30])[2]
    assert (short.path, short.density) == ("dense", 1.0)


@pytest.mark.parametrize(("scores", "error", "message"), [
    ("abc", TypeError, r"^key_scores: expected real numbers"),
    (np.ones((1, 1, 150), bool), TypeError, r"^key_scores: expected real numbers, got bool"),
    (np.ones(150), ValueError, r"^key_scores: expected 3 dimensions"),
    (np.ones((1, 1, 150)), ValueError, r"^key_scores: expected shape \[2, 1 or 2 or 4, 150\], got \[1, 1, 150\]"),
    (np.ones((2, 3, 150)), ValueError, r"^key_scores: expected shape"),
    (np.ones((2, 1, 149)), ValueError, r"^key_scores: expected shape"),
    (np.full((2, 1, 150), np.nan), ValueError, r"^key_scores: expected finite numbers"),
])  # fmt: skip
def test_what_is_refused(scores, error, message):
    q, k = normal(2, 4, 130, 8), normal(2, 2, 150, 8, seed=1)
    with pytest.raises(error, match=message):
        dhsa.select(q, k, SMALL, key_scores=scores)


def test_what_does_not_go_together_is_refused():
    q, k, v = normal(1, 1, 64, 8), normal(1, 1, 64, 8, seed=1), normal(1, 1, 64, 8, seed=2)
    scores = np.ones((1, 1, 64))
    with pytest.raises(ValueError, match=r"^boundaries: key_scores are of single keys"):
        dhsa.select(q, k, SMALL, key_scores=scores, boundaries=[0, 64])
    with pytest.raises(ValueError, match=r"^key_scores: an exact config"):
        functional.run(q, k, v, None, key_scores=scores)
    with pytest.raises(ValueError, match=r"^key_scores: with a mass"):
        dhsa.select(q, k, SMALL.replace(mass=0.5), key_scores=-scores)
    with pytest.raises(ValueError, match=r"^v: method='rows' reads no values"):
        dhsa.select(q, k, SMALL, v=v)
