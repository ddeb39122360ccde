"""Attention of few query rows (csrc/attend/decode.c) against the float64 reference, on every tier, and its rounding
against PyTorch's in the same dtype.

Decoding steps and short runs of queries: lengths around the parts that keys are cut into, odd head_dims.
"""

import functools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import TIERS, every_tier, exact_attention, once, random_lists

import dhsa
from dhsa import _core, reference

DTYPES = ["float32", "float16", "bfloat16"]

# b, h, hkv, lq, lk, d, options
CASES = {
    "one number": (1, 1, 1, 1, 1, 1, {}),
    "one key": (2, 8, 4, 1, 1, 64, {}),
    "no group": (1, 3, 3, 1, 700, 64, {}),
    "groups of 2": (1, 8, 4, 1, 1500, 256, {}),
    "groups of 4": (2, 8, 2, 1, 1025, 128, {}),
    "groups of 8": (1, 8, 1, 1, 2049, 80, {}),
    "groups of 7": (1, 14, 2, 1, 600, 72, {}),
    "5000 keys": (1, 4, 1, 1, 5000, 96, {}),
    "one part": (1, 2, 1, 1, 512, 33, {}),
    "one key more": (1, 2, 1, 1, 513, 31, {}),
    "head_dim 1": (1, 4, 2, 2, 530, 1, {}),
    "head_dim 255": (1, 2, 1, 1, 140, 255, {}),
    "three queries": (2, 4, 1, 3, 777, 48, {}),
    "eight queries": (1, 4, 2, 8, 1030, 129, {}),
    "queries from the start": (1, 4, 2, 8, 8, 16, {}),
    "sixteen queries": (1, 2, 2, 16, 600, 40, {}),
    "window": (1, 4, 2, 1, 2000, 64, {"window": 700}),
    "window 1": (1, 4, 2, 4, 900, 64, {"window": 1}),
    "window, queries": (2, 4, 1, 4, 1200, 20, {"window": 513}),
    "window past the keys": (1, 2, 1, 4, 300, 20, {"window": 1 << 40}),
    "softcap": (1, 4, 2, 1, 1100, 64, {"softcap": 3.0}),
    "softcap, window, scale": (1, 4, 2, 5, 1100, 80, {"softcap": 50.0, "window": 530, "scale": 0.7}),
    "negative scale": (1, 2, 1, 2, 600, 20, {"scale": -0.3}),
    "negative scale, softcap": (1, 2, 1, 2, 600, 20, {"scale": -0.3, "softcap": 2.0}),
    "zero scale": (1, 2, 1, 2, 600, 20, {"scale": 0.0}),
    "not causal": (1, 4, 2, 3, 1000, 24, {"causal": False}),
    "not causal, fewer keys": (1, 2, 1, 8, 3, 24, {"causal": False}),
}


def check(q, k, v, **options):
    out, lse = dhsa.attention(q, k, v, return_lse=True, **options)
    want, want_lse = once(exact_attention, q, k, v, options)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=2e-6)


@every_tier
@pytest.mark.parametrize("name", CASES)
def test_every_tier_agrees_with_the_reference(make_qkv, name, tier):
    *shape, options = CASES[name]
    assert shape[1] // shape[2] * shape[3] <= _core.DECODE_ROWS
    check(*make_qkv(*shape), **options)


@every_tier
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_the_fp32_result_rounded_once(torch, make_qkv, name, dtype, tier):
    """Products are fp32 on every tier: the only rounding is the last, but sums may be in another order."""
    *shape, options = CASES[name]
    halves = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in make_qkv(*shape)]
    out, lse = dhsa.attention(*halves, return_lse=True, **options)
    whole, want_lse = dhsa.attention(*[x.float() for x in halves], return_lse=True, **options)
    step = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    assert ((out.float() - whole).abs() <= step * whole.abs() + 2e-6).all()
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=2e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    group = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16]))
    hkv, batch = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    lq = data.draw(st.integers(1, _core.DECODE_ROWS // group))
    lk = data.draw(st.integers(lq, 1700))
    dim = data.draw(st.integers(1, 256))
    window = data.draw(st.one_of(st.none(), st.integers(1, lk + 3)))
    rng = np.random.default_rng(lk)
    shapes = [(batch, group * hkv, lq, dim), (batch, hkv, lk, dim), (batch, hkv, lk, dim)]
    check(*(rng.standard_normal(s, dtype=np.float32) for s in shapes), window=window)


@every_tier
@pytest.mark.parametrize("group", [1, 4])
def test_key_ranges(make_qkv, group, tier):
    """Ranges that are empty, whole, overlapping, apart, and within one part; another set for each batch item."""
    q, k, v = make_qkv(2, 2 * group, 2, 4, 1300, 40)
    ranges = [[[0, 1300], [5, 5], [511, 1024], [1299, 1300]], [[0, 3], [600, 900], [200, 700], [1300, 1300]]]
    ranges = np.array(ranges, np.int32)
    check(q, k, v, key_ranges=ranges)
    nothing = dhsa.attention(q, k, v, key_ranges=np.zeros_like(ranges), return_lse=True)
    assert (nothing[0] == 0).all()
    assert np.isneginf(nothing[1]).all()


@every_tier
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("window", [None, 400])
def test_lists(make_qkv, tier, heads, window):
    """One block's lists: with gaps, runs, an empty one; a window on top."""
    b, h, hkv, lq, lk = 2, 8, 4, 3, 1500
    q, k, v = make_qkv(b, h, hkv, lq, lk, 40)
    sets = {"all": 1, "group": hkv, "head": h}[heads]
    selection = random_lists((b, sets, 1), lk, [0, 0.05, 0.6, 1], query_block=64)
    out, lse = dhsa.sparse_attention(q, k, v, selection, window=window, softcap=5.0, return_lse=True)
    want, want_lse = reference.sparse_attention(q, k, v, selection, window=window, softcap=5.0, return_lse=True)
    np.testing.assert_allclose(out, want, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["cache", "tokens first", "reversed", "broadcast"])
def test_strided_caches(torch, make_qkv, dtype, layout):
    """A cache with room to spare, [B, L, H, D] seen as [B, H, L, D], and strides of any sign: the same bits."""
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make_qkv(2, 4, 2, 2, 1100, 72))
    want = dhsa.attention(q, k, v)

    def lay(x):
        if layout == "cache":
            room = torch.full((2, 2, 1500, 72), math.nan, dtype=x.dtype)
            room[:, :, :1100] = x
            return room[:, :, :1100]
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    if layout in ("cache", "tokens first"):
        assert torch.equal(dhsa.attention(q, lay(k), lay(v)), want)
    elif layout == "broadcast":
        one = k[:1, :1].expand(2, 2, -1, -1)
        assert torch.equal(dhsa.attention(q, one, one), dhsa.attention(q, one.contiguous(), one.contiguous()))
    elif dtype == "float32":  # torch has no negative strides, NumPy has no bfloat16
        back = [np.ascontiguousarray(x.numpy()[:, :, ::-1])[:, :, ::-1] for x in (k, v)]
        assert back[0].strides[2] < 0
        np.testing.assert_array_equal(dhsa.attention(q.numpy(), *back), want.numpy())


def float64_attention(q, k, v):
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (q.double() @ k.mT / math.sqrt(q.shape[3])).softmax(-1) @ v


@functools.lru_cache(maxsize=1)  # for all tiers
def rounded_by_torch(dtype, kind):
    """Four problems of a kind: (q, k, v, float64 attention); and torch's errors."""
    import torch

    generator = torch.Generator().manual_seed(1)
    problems, errors = [], []
    for _ in range(4):
        q, k, v = (torch.randn(4, h, n, 128, generator=generator) for h, n in ((8, 1), (2, 2000), (2, 2000)))
        if kind == "large logits":
            q = q * 8
        elif kind == "near ties":
            k = k[:, :, :1] + (1e-3 if dtype == "float32" else 2e-2) * k
        elif kind == "long flat tail":
            q = q * 1e-3
        q, k, v = (x.to(getattr(torch, dtype)) for x in (q, k, v))
        want = float64_attention(q, k, v)
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        problems.append((q, k, v, want))
        errors.append(sdpa.double() - want)
    return problems, torch.stack(errors)


# The scalar tier sums one number after the other, which rounds more in fp32; of halves only the last rounding shows.
@pytest.mark.parametrize(
    ("dtype", "tier"),
    [(dtype, tier) for dtype in DTYPES for tier in TIERS if (dtype, tier) != ("float32", "scalar")],
    indirect=["tier"],
)
@pytest.mark.parametrize("kind", ["random", "large logits", "near ties", "long flat tail"])
def test_rounds_no_worse_than_torch(torch, dtype, kind, tier):
    problems, theirs = rounded_by_torch(dtype, kind)
    ours = torch.stack([dhsa.attention(q, k, v).double() - want for q, k, v, want in problems])
    assert ours.square().mean() <= 1.1**2 * theirs.square().mean()
    # The largest of a few thousand errors is a matter of luck; it may not be out of line.
    assert ours.abs().max() <= 1.5 * theirs.abs().max()


@every_tier
@pytest.mark.parametrize("power", [2, 7, 8, 9, 12, 20, 36])
def test_logits_of_any_size(make_qkv, tier, power):
    """Also where parts differ so much that only one counts, and exact ties across parts share the weight."""
    q, k, v = make_qkv(1, 2, 1, 2, 1400, 16, seed=power)
    k[0, :, ::70] = k[0, :, :1]
    q, k = (x * np.float32(10.0 ** (power / 2)) for x in (q, k))
    out, lse = dhsa.attention(q, k, v, return_lse=True)
    want, want_lse = reference.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, want, atol=1e-4)
    np.testing.assert_allclose(lse, want_lse, rtol=3e-6)


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_numbers_reach_the_rows_that_see_them_and_no_other(torch, make_qkv, tier, dtype, which, bad):
    """Four queries under a window: key 0 is seen by none, 702 by some (window), 1097 and 1099 by some (causality)."""
    tensors = {n: torch.from_numpy(x) for n, x in zip("qkv", make_qkv(1, 4, 2, 4, 1100, 24), strict=True)}
    tensors = {n: x.to(getattr(torch, dtype)) for n, x in tensors.items()}
    clean = dhsa.attention(*tensors.values(), window=396)
    positions = torch.arange(4) + 1096
    for at in (0, 1, 2, 3) if which == "q" else (0, 702, 1096, 1097, 1099):
        spoilt = {n: x.clone() for n, x in tensors.items()}
        spoilt[which][0, 1, at, 5] = bad
        out = dhsa.attention(*spoilt.values(), window=396)
        with np.errstate(all="ignore"):
            want = once(reference.attention, *(x.float().numpy() for x in spoilt.values()), window=396)
        np.testing.assert_array_equal(torch.isnan(out).numpy(), np.isnan(want))
        np.testing.assert_array_equal(torch.isinf(out).numpy(), np.isinf(want))
        sees = torch.zeros((4, 4), dtype=torch.bool)
        if which == "q":
            sees[1, at] = True
        else:
            sees[2:] = (at <= positions) & (at > positions - 396)
        assert torch.equal(out[0][~sees], clean[0][~sees])


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(torch, make_qkv, tier, dtype):
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make_qkv(2, 6, 2, 2, 3333, 56))
    results = []
    for threads in (1, 2, 3, 5, 2, 3):
        dhsa.set_num_threads(threads)
        results.append(dhsa.attention(q, k, v, softcap=20.0, return_lse=True))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_one_query_more_takes_the_other_way_and_agrees(make_qkv):
    """The border between the two ways of attending: rows of both agree where they see the same keys."""
    q, k, v = make_qkv(1, 8, 2, 5, 900, 64)
    both = [dhsa.attention(q[:, :, -n:], k, v) for n in (4, 5)]
    np.testing.assert_allclose(both[0], both[1][:, :, 1:], atol=2e-6)


def test_read_bandwidth_reads_what_it_is_given(torch):
    """It times, so only that its answer is a rate and that what it cannot read is refused."""
    assert dhsa._core.read_bandwidth(np.ones(1_000_003, np.float32), 2) > 0
    assert dhsa._core.read_bandwidth(torch.ones(2, 3, 1001, dtype=torch.bfloat16), 1) > 0
    for bad in (np.ones((8, 8), np.float32)[:, :4], np.ones(0, np.float32)):
        with pytest.raises(ValueError, match="array: expected contiguous memory"):
            dhsa._core.read_bandwidth(bad, 1)
    with pytest.raises(ValueError, match="num_threads"):
        dhsa._core.read_bandwidth(np.ones(8, np.float32), 0)
