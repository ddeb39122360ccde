"""float32 attention at the precisions of `set_float32_precision`, judged by float64 beside a twin that rounds and
splits numbers in the same way.

What PyTorch's CPU build does under these words differs from release to release and is no reference: in most, scaled dot
product attention ignores them.
"""

import sys
import threading

import numpy as np
import pytest
from tiers import TIERS, every_tier

import dhsa

WORDS = ["highest", "high", "medium"]


def served(word):
    return word in dhsa.build_info()["float32_precisions"]


def rounded(x):
    """x, rounded to bfloat16, half to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def multiply(a, b, word):
    """a @ b, of numbers of the precision and otherwise in float64."""
    if word == "highest":
        return a.astype(np.float64) @ b.astype(np.float64)
    (a_high, b_high), parts = (rounded(x).astype(np.float64) for x in (a, b)), []
    if word == "high":
        a_low, b_low = (rounded(x - rounded(x)).astype(np.float64) for x in (a.astype(np.float32), b))
        parts = [a_high @ b_low, a_low @ b_high]
    return sum(parts, a_high @ b_high)


def twin(q, k, v, word):
    """Causal attention of as many queries as keys."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat(group, 1), v.repeat(group, 1)
    s = multiply(q, k.swapaxes(2, 3), word) / np.sqrt(q.shape[3])
    s[..., ~np.tri(q.shape[2], dtype=bool)] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    return multiply(p, v, word) / p.sum(-1, keepdims=True)


def error(got, want):
    return np.sqrt(np.mean((got - want) ** 2)), np.abs(got - want).max()


@every_tier
@pytest.mark.parametrize("dim", [1, 45, 256])
@pytest.mark.parametrize("word", WORDS)
def test_error_is_that_of_the_rounded_numbers(make_qkv, tier, word, dim):
    q, k, v = make_qkv(1, 4, 2, 200, 200, dim)
    plain = dhsa.attention(q, k, v)
    exact = twin(q, k, v, "highest")
    dhsa.set_float32_precision(word)
    got = dhsa.attention(q, k, v)
    if word == "highest" or not served(word):
        np.testing.assert_array_equal(got, plain)
        return
    ours, own = error(got, exact), error(twin(q, k, v, word), exact)
    assert ours[0] < 1.1 * own[0]
    assert ours[1] < 1.5 * own[1]
    assert ours[0] > 2 * error(plain, exact)[0]  # the word was followed


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"softcap": 5.0}, {"scale": -0.3}, {"causal": False}])
@pytest.mark.parametrize("config", [None, dhsa.Config(budget=128, sink=4, local=32, skip=1e-3), dhsa.Config(budget=64)])
def test_medium_follows_every_option(make_qkv, options, config):
    """Near to the highest in all of them, with values of another size than keys, and on lists with gaps."""
    if not served("medium"):
        pytest.skip('no tier here has "medium"')
    q, k, v = make_qkv(2, 6, 2, 330, 400, 40)
    v = np.concatenate([v, v], axis=3)[..., :72].copy()
    want, lse = dhsa.attention(q, k, v, config, return_lse=True, **options)
    dhsa.set_float32_precision("medium")
    got, got_lse = dhsa.attention(q, k, v, config, return_lse=True, **options)
    assert 1e-4 < np.abs(got - want).max() < 0.05
    np.testing.assert_allclose(got_lse, lse, atol=0.05)


@pytest.mark.parametrize("tier", TIERS)
def test_selection_and_decoding_do_not_depend_on_it(make_qkv, tier):
    dhsa.set_isa(tier)
    q, k, v = make_qkv(1, 4, 2, 300, 300, 32)
    config = dhsa.Config(budget=64, sink=4, local=16)
    lists, step = dhsa.select(q, k, config), dhsa.attention(q[:, :, -1:], k, v)
    dhsa.set_float32_precision("medium")
    assert dhsa.select(q, k, config) == lists
    np.testing.assert_array_equal(dhsa.attention(q[:, :, -1:], k, v), step)


@pytest.mark.parametrize("word", WORDS)
def test_the_same_bits_for_any_number_of_threads(make_qkv, word):
    q, k, v = make_qkv(1, 6, 2, 700, 700, 48)
    dhsa.set_float32_precision(word)
    results = []
    for threads in (1, 2, 5):
        dhsa.set_num_threads(threads)
        results.append(dhsa.attention(q, k, v))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


@pytest.mark.parametrize("word", WORDS)
def test_not_finite_and_huge_numbers(make_qkv, word):
    """NaN and infinities reach the rows that see them and no others; finite numbers that bfloat16 would round to
    infinity stay finite."""
    q, k, v = make_qkv(1, 2, 1, 300, 300, 20)
    v[0, 0, 200, 3], v[0, 0, 250, 7] = np.nan, np.inf
    v[0, 0, 5, 11] = np.finfo(np.float32).max
    dhsa.set_float32_precision(word)
    got = dhsa.attention(q, k, v)
    bad = np.zeros(got.shape, bool)
    bad[:, :, 200:, 3] = bad[:, :, 250:, 7] = True
    np.testing.assert_array_equal(~np.isfinite(got), bad)
    assert np.isnan(got[:, :, 200:, 3]).all()
    assert (got[:, :, 250:, 7] == np.inf).all()
    k[0, 0, 100] = np.nan
    got = dhsa.attention(q, k, v)
    assert np.isnan(got[:, :, 100:]).all()
    assert np.isfinite(got[:, :, :100]).all()


def test_follows_torch_until_it_is_set(torch, make_qkv):
    q, k, v = make_qkv(1, 2, 2, 200, 200, 32)
    plain = dhsa.attention(q, k, v)
    assert dhsa.get_float32_precision() is None
    before = torch.get_float32_matmul_precision()
    try:
        for word in WORDS:
            torch.set_float32_matmul_precision(word)
            assert dhsa.build_info()["float32_precision"] == word
            assert (dhsa.attention(q, k, v) == plain).all() == (word == "highest" or not served(word))
        dhsa.set_float32_precision("highest")
        assert dhsa.get_float32_precision() == dhsa.build_info()["float32_precision"] == "highest"
        np.testing.assert_array_equal(dhsa.attention(q, k, v), plain)
    finally:
        torch.set_float32_matmul_precision(before)


def test_without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert dhsa.build_info()["float32_precision"] == "highest"
    assert "torch" not in sys.modules


def test_a_call_follows_one_word_while_another_thread_sets_it(make_qkv):
    q, k, v = make_qkv(1, 2, 2, 400, 400, 32)
    allowed = []
    for word in WORDS:
        dhsa.set_float32_precision(word)
        allowed.append(dhsa.attention(q, k, v).tobytes())
    stop = threading.Event()

    def change():
        while not stop.is_set():
            for word in WORDS:
                dhsa.set_float32_precision(word)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(20):
            assert dhsa.attention(q, k, v).tobytes() in allowed
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize(
    ("word", "kind"), [("low", ValueError), ("HIGH", ValueError), (1, TypeError), (b"high", TypeError)]
)
def test_other_words_are_refused(word, kind):
    with pytest.raises(kind, match=r"^precision: "):
        dhsa.set_float32_precision(word)
    assert dhsa.get_float32_precision() is None


def test_the_break_even_rule_knows_the_word(torch, make_qkv):
    """What it keeps for a dtype and a tier has the precision in its key."""
    from dhsa.hf import break_even

    q, k, _ = (torch.from_numpy(x) for x in make_qkv(1, 2, 2, 200, 200, 32))
    costs = set()
    for word in WORDS:
        dhsa.set_float32_precision(word)
        costs.add(break_even.seconds(dhsa.Config(), q, k, None))
    assert len(costs) == (2 if served("medium") else 1)
