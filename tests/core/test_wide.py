"""Heads of up to 576 numbers, values of another width than keys, sinks of the softmax, and two-sided windows: exact and
over lists, on both paths of the executor, against the float64 reference and, in rounding, against PyTorch.
"""

import functools
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import every_tier

import dhsa
from dhsa import _core, functional, reference

DTYPES = ["float32", "float16", "bfloat16"]
# D, E: DeepSeek V3 and its latent heads, Gemma 4, and widths that fill no vector or end a strip
WIDTHS = [(192, 128), (576, 512), (512, 512), (96, 64), (64, 96), (300, 257), (33, 7), (7, 33), (1, 40), (40, 1)]

# h, hkv, lq, lk, options; those of at most 16 rows take the path of a decoding step
CASES = {
    "gqa": (4, 2, 65, 150, {}),
    "window": (2, 1, 70, 150, {"window": 40}),
    "softcap": (2, 1, 50, 140, {"softcap": 3.0, "scale": -0.2}),
    "not causal": (4, 1, 50, 45, {"causal": False}),
    "both sides": (4, 2, 60, 150, {"causal": False, "window": 30}),
    "step": (8, 2, 1, 150, {}),
    "step, no group": (3, 3, 1, 530, {"softcap": 5.0}),
    "few rows": (6, 3, 5, 150, {"window": 60}),
    "few rows, both sides": (8, 2, 3, 150, {"causal": False, "window": 2}),
    "few rows, not causal": (2, 1, 8, 3, {"causal": False}),
}


def make(h, hkv, lq, lk, dim, width, batch=2, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, h, lq, dim), (batch, hkv, lk, dim), (batch, hkv, lk, width)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def some_sinks(h, seed=3):
    sinks = np.random.default_rng(seed).normal(0, 3, h).astype(np.float32)
    if h > 2:
        sinks[1] = -math.inf
    return sinks


def wide(x):
    return x.float().numpy()


def reference_of(q, k, v, **options):
    """reference.attention, also for more queries than keys where nothing is causal."""
    if q.shape[2] <= k.shape[2]:
        return reference.attention(q, k, v, return_lse=True, **options)
    parts = [reference.attention(q[:, :, i : i + 1], k, v, return_lse=True, **options) for i in range(q.shape[2])]
    return tuple(np.concatenate([p[n] for p in parts], axis=2) for n in range(2))


def lists(shape, k_len, block, seed=5, causal=True):
    """Random lists, some empty, some with gaps, some complete."""
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(rng.random(k_len) < density) for density in rng.choice([0, 0.3, 0.7, 1], math.prod(shape))]
    indptr = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    return dhsa.Selection.from_indices(indptr, np.concatenate(rows), shape=shape, query_block=block, causal=causal)


def close(out, lse, want, want_lse, dtype):
    np.testing.assert_allclose(out, want, **({"atol": 1e-5} if dtype == "float32" else {"atol": 2e-2, "rtol": 1e-2}))
    np.testing.assert_allclose(lse, want_lse, atol=3e-5, rtol=2e-6)


# ---- against the reference -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def all_cases(widths, dtype):
    """[(q, k, v, sinks or None, options, what the reference says)], the same for every tier."""
    import torch

    found = []
    for h, hkv, lq, lk, options in CASES.values():
        q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make(h, hkv, lq, lk, *widths))
        for sinks in (None, some_sinks(h)):
            want = reference_of(wide(q), wide(k), wide(v), sinks=sinks, **options)
            found.append((q, k, v, None if sinks is None else torch.from_numpy(sinks), options, want))
    return found


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_every_shape_and_case(torch, widths, dtype, tier):
    for q, k, v, sinks, options, want in all_cases(widths, dtype):
        out, lse = dhsa.attention(q, k, v, sinks=sinks, return_lse=True, **options)
        assert out.shape == (*q.shape[:3], widths[1])
        assert out.dtype == q.dtype
        close(wide(out), lse.numpy(), *want, dtype)


@functools.lru_cache(maxsize=1)
def all_lists(widths, dtype, causal):
    """[(q, k, v, sinks, selection, options, what the reference says)]: on both paths, with one list for all heads, for
    a group and for each head; under a window or not."""
    import torch

    found = []
    h, hkv, lk, sinks = 4, 2, 200, some_sinks(4)
    for lq, block in ((90, 32), (3, 32)):
        q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make(h, hkv, lq, lk, *widths))
        for sets, window in ((1, None), (hkv, 60), (h, None)):
            selection = lists((2, sets, -(-lq // block)), lk, block, causal=causal)
            options = {"window": window, "softcap": 5.0, "return_lse": True}
            want = reference.sparse_attention(wide(q), wide(k), wide(v), selection, sinks=sinks, **options)
            found.append((q, k, v, torch.from_numpy(sinks), selection, options, want))
    return found


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(192, 128), (576, 512), (64, 96), (33, 7)])
@pytest.mark.parametrize("causal", [True, False])
def test_lists(torch, widths, dtype, causal, tier):
    for q, k, v, sinks, selection, options, want in all_lists(widths, dtype, causal):
        out, lse = dhsa.sparse_attention(q, k, v, selection, sinks=sinks, **options)
        close(wide(out), lse.numpy(), *want, dtype)


@every_tier
@pytest.mark.parametrize("widths", [(192, 128), (576, 512), (64, 96)])
@pytest.mark.parametrize("method", ["rows", "dhsa", "block", "hisa"])
def test_sparse(widths, method, tier):
    q, k, v = make(4, 2, 150, 200, *widths)
    sinks = some_sinks(4)
    config = dhsa.Config(method=method, budget=48, sink=4, local=12, query_block=32, dense_tail=0)
    out, lse, stats = functional.run(q, k, v, config, sinks=sinks, return_lse=True)
    assert stats.path == "sparse"
    selection = dhsa.select(q, k, config)
    want = reference.sparse_attention(q, k, v, selection, sinks=sinks, return_lse=True)
    close(out, lse, *want, "float32")
    again, again_lse = dhsa.sparse_attention(q, k, v, selection, sinks=sinks, return_lse=True)
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(lse, again_lse)


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq", [40, 4])
def test_key_ranges(torch, lq, dtype, tier):
    """Some ranges are empty: such a query gives zeros, and the sink is all that its softmax has."""
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make(4, 2, lq, 150, 96, 64))
    rng = np.random.default_rng(1)
    ranges = np.sort(rng.integers(0, 151, (2, lq, 2)), axis=-1).astype(np.int32)
    ranges[:, ::4, 1] = ranges[:, ::4, 0]
    sinks = some_sinks(4)
    out, lse = dhsa.attention(q, k, v, key_ranges=ranges, sinks=torch.from_numpy(sinks), return_lse=True)
    want = reference.attention(wide(q), wide(k), wide(v), key_ranges=ranges, sinks=sinks, return_lse=True)
    close(wide(out), lse.numpy(), *want, dtype)
    assert (out[:, :, ::4] == 0).all()
    np.testing.assert_allclose(lse[:, :, ::4], np.broadcast_to(sinks[None, :, None], lse[:, :, ::4].shape), rtol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    group, hkv = draw(st.sampled_from([1, 2, 3, 8])), draw(st.integers(1, 2))
    lq = draw(st.integers(1, 50))
    lk = draw(st.integers(lq, 300))
    dim, width = draw(st.integers(1, 576)), draw(st.integers(1, 512))
    window = draw(st.none() | st.integers(1, lk + 3))
    q, k, v = make(group * hkv, hkv, lq, lk, dim, width, batch=1, seed=lk)
    sinks = draw(st.sampled_from([None, some_sinks(group * hkv, seed=dim)]))
    options = {"window": window, "causal": draw(st.booleans()), "sinks": sinks, "return_lse": True}
    close(*dhsa.attention(q, k, v, **options), *reference.attention(q, k, v, **options), "float32")
    causal, block = options.pop("causal"), draw(st.integers(1, 60))
    sets = draw(st.sampled_from([1, hkv, group * hkv]))
    selection = lists((1, sets, -(-lq // block)), lk, block, seed=width, causal=causal)
    close(
        *dhsa.sparse_attention(q, k, v, selection, **options),
        *reference.sparse_attention(q, k, v, selection, **options),
        "float32",
    )


# ---- rounding --------------------------------------------------------------------------------------------------------


def float64_attention(torch, q, k, v):
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q.double() @ k.mT / math.sqrt(q.shape[3])
    hidden = torch.ones(s.shape[2:], dtype=torch.bool).triu(1 + s.shape[3] - s.shape[2])
    return s.masked_fill(hidden, -math.inf).softmax(-1) @ v


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(192, 128), (576, 512), (512, 512), (64, 96)])
@pytest.mark.parametrize("kind", ["random", "large logits", "long flat tail"])
def test_rounds_no_worse_than_torch(torch, widths, dtype, kind, tier):
    """Many rows, and one, which takes the other path."""
    generator = torch.Generator().manual_seed(1)
    for lq in (400, 1):
        q, k, v = (
            torch.randn(4 if lq == 1 else 1, h, n, d, generator=generator)
            for h, n, d in ((4, lq, widths[0]), (2, 400, widths[0]), (2, 400, widths[1]))
        )
        q = q * {"random": 1, "large logits": 8, "long flat tail": 1e-3}[kind]
        q, k, v = (x.to(getattr(torch, dtype)) for x in (q, k, v))
        want = float64_attention(torch, q, k, v)
        ours = dhsa.attention(q, k, v).double() - want
        # torch rounds its products to the dtype where widths are equal, so the narrower are padded with zeros.
        padded = (torch.nn.functional.pad(x, (0, max(widths) - x.shape[3])) for x in (q, k, v))
        theirs = torch.nn.functional.scaled_dot_product_attention(
            *padded, is_causal=lq > 1, enable_gqa=True, scale=widths[0] ** -0.5
        )
        theirs = theirs[..., : widths[1]].double() - want
        if (dtype, tier, lq) == ("float32", "scalar", 1):
            continue  # it sums one number after the other, which rounds more in fp32
        slack = 1.25 if lq > 1 else 2  # how well torch's library rounds depends on the CPU
        assert ours.square().mean() <= slack * theirs.square().mean()


# ---- sinks -----------------------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq", [70, 2])
def test_sinks_of_any_size(torch, lq, dtype, tier):
    """-inf is no sink, to the bit; one far below all logits is as good as none; a huge one takes all the weight."""
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make(4, 2, lq, 150, 40, 24))
    none, none_lse = dhsa.attention(q, k, v, return_lse=True)
    out, lse = dhsa.attention(q, k, v, sinks=torch.full((4,), -math.inf), return_lse=True)
    assert torch.equal(out, none)
    assert torch.equal(lse, none_lse)
    for sinks in ([-1e38, -1e30, -3000.0, -200.0], [1e38, 1e30, 3000.0, 40.0], [0.0, 2.0, -2.0, 5.0]):
        sinks = torch.tensor(sinks)
        out, lse = dhsa.attention(q, k, v, sinks=sinks, return_lse=True)
        want = reference.attention(wide(q), wide(k), wide(v), sinks=sinks.numpy(), return_lse=True)
        close(wide(out), lse.numpy(), *want, dtype)
        assert torch.isfinite(lse).all()
        if sinks[0] > 1000:
            assert (out[:, :3] == 0).all()
            assert torch.equal(lse[:, :2], sinks[:2, None].expand(2, 2, lq))


@pytest.mark.parametrize("lq", [70, 2])
def test_lse_with_sinks_gives_weights_and_merges(lq):
    """exp(logit - lse) are the weights of the keys. Results of disjoint sets of keys merge if one of them has the
    sinks."""
    q, k, v = make(4, 2, lq, 150, 40, 24)
    sinks = some_sinks(4)
    out, lse = dhsa.attention(q, k, v, sinks=sinks, causal=False, return_lse=True)
    logits = q @ np.repeat(k, 2, 1).swapaxes(2, 3) / np.sqrt(40)
    weights = np.exp(logits - lse[..., None])
    np.testing.assert_allclose(weights @ np.repeat(v, 2, 1), out, atol=1e-5)
    np.testing.assert_allclose(1 - weights.sum(-1), np.exp(sinks[None, :, None] - lse), atol=1e-5)
    parts = [dhsa.attention(q, k[:, :, :50], v[:, :, :50], causal=False, sinks=sinks, return_lse=True)]
    parts.append(dhsa.attention(q, k[:, :, 50:], v[:, :, 50:], causal=False, return_lse=True))
    np.testing.assert_allclose(np.logaddexp(parts[0][1], parts[1][1]), lse, atol=1e-5)
    np.testing.assert_allclose(sum(np.exp(x - lse)[..., None] * o for o, x in parts), out, atol=1e-5)


def test_kinds_of_sinks(torch):
    """Of NumPy or torch, of float32 or q's dtype, of any stride, a Parameter under no_grad."""
    arrays = make(4, 2, 30, 40, 16, 8)
    sinks = np.float32([0.5, -1, 2, -math.inf])
    want = dhsa.attention(*arrays, sinks=sinks)
    np.testing.assert_array_equal(dhsa.attention(*arrays, sinks=np.repeat(sinks, 3)[::3]), want)
    np.testing.assert_array_equal(dhsa.attention(*arrays, sinks=sinks[::-1].copy()[::-1]), want)
    halves = [x.astype(np.float16) for x in arrays]
    np.testing.assert_array_equal(
        dhsa.attention(*halves, sinks=sinks.astype(np.float16)), dhsa.attention(*halves, sinks=sinks)
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q, k, v = (torch.from_numpy(x).to(dtype) for x in arrays)
        own = torch.from_numpy(sinks)
        want = dhsa.attention(q, k, v, sinks=own)
        parameter = torch.nn.Parameter(own.to(dtype))
        with torch.no_grad():
            assert torch.equal(dhsa.attention(q, k, v, sinks=parameter), want)
        with pytest.raises(NotImplementedError, match=r"^sinks: requires grad"):
            dhsa.attention(q, k, v, sinks=parameter)
        assert torch.equal(dhsa.attention(q, k, v, sinks=own.repeat_interleave(2)[::2]), want)
        one = dhsa.attention(q, k, v, sinks=torch.tensor([0.5]).to(dtype).expand(4))
        assert torch.equal(one, dhsa.attention(q, k, v, sinks=torch.full((4,), 0.5)))
        with pytest.raises(TypeError, match=r"^sinks: dtype is float64, expected float32"):
            dhsa.attention(q, k, v, sinks=own.double())
        with pytest.raises(TypeError, match=r"^sinks: expected a torch tensor like the other arguments, got ndarray"):
            dhsa.attention(q, k, v, sinks=sinks)
    np.testing.assert_array_equal(sinks, np.float32([0.5, -1, 2, -math.inf]))  # read only


def test_sinks_do_not_change_what_is_selected():
    q, k, v = make(4, 2, 150, 200, 32, 32)
    config = dhsa.Config(budget=48, sink=4, local=12, query_block=32, dense_tail=0)
    plain = functional.run(q, k, v, config)
    with_sinks = functional.run(q, k, v, config, sinks=some_sinks(4))
    assert plain[2].density == with_sinks[2].density < 1
    assert np.abs(plain[0] - with_sinks[0]).max() > 1e-3


# ---- NaN, threads, memory --------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(192, 128), (576, 512), (33, 7)])
@pytest.mark.parametrize("lq", [100, 4])
def test_bad_values_reach_the_rows_that_see_them(torch, widths, dtype, lq, tier):
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make(4, 2, lq, 150, *widths, batch=1))
    sinks = torch.from_numpy(some_sinks(4))
    position = np.arange(lq)[:, None] + 150 - lq
    for options in ({}, {"window": 20}, {"causal": False, "window": 20}):
        clean = dhsa.attention(q, k, v, sinks=sinks, **options)
        spoilt = v.clone()
        spoilt[0, 1, 148, 5], spoilt[0, 1, 130, 6] = math.nan, math.inf
        out = dhsa.attention(q, k, spoilt, sinks=sinks, **options)
        for key, column in ((148, 5), (130, 6)):
            window, causal = options.get("window", 1000), options.get("causal", True)
            sees = ((np.abs(key - position) < window) & ((key <= position) | (not causal)))[:, 0]
            bad = ~torch.isfinite(out[0, :, :, column])
            assert not bad[:2].any()
            np.testing.assert_array_equal(bad[2:].numpy(), np.broadcast_to(sees, (2, lq)))
        good = torch.isfinite(out)
        assert good.sum() == out.numel() - (~torch.isfinite(out[..., 5:7])).sum()
        np.testing.assert_allclose(
            wide(out)[good.numpy()], wide(clean)[good.numpy()], atol=1e-6 if dtype == "float32" else 1e-2
        )


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq", [200, 2])
def test_same_bits_for_any_number_of_threads(torch, lq, dtype, tier):
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make(6, 2, lq, 500, 192, 128))
    sinks = torch.from_numpy(some_sinks(6))
    sparse = dhsa.Config(budget=96, sink=16, local=40, query_block=48)
    results = []
    for threads in (1, 2, 3):
        dhsa.set_num_threads(threads)
        results.append([])
        for config in (None, sparse):
            for options in ({}, {"causal": False}, {"causal": False, "window": 90}):
                results[-1] += dhsa.attention(q, k, v, config, sinks=sinks, return_lse=True, **options)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lq", [60, 1])
def test_values_that_are_a_part_of_the_keys(torch, lq, dtype):
    """As latent attention has them: keys of 576 numbers, of which the first 512 are the values, in the same memory."""
    q, k, _ = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make(8, 1, lq, 120, 576, 1))
    v = k[..., :512]
    assert torch.equal(dhsa.attention(q, k, v), dhsa.attention(q, k, v.contiguous()))
    out = torch.full((2, lq, 8, 520), 7.0, dtype=q.dtype)
    into = out.transpose(1, 2)[..., 4:516]
    assert dhsa.attention(q, k, v, out=into) is into
    assert torch.equal(into, dhsa.attention(q, k, v))
    assert (out[..., :4] == 7).all()
    assert (out[..., 516:] == 7).all()


def test_limits_are_those_of_the_core():
    assert (_core.MAX_HEAD_DIM, _core.MAX_VALUE_DIM) == (576, 512)
    q, k, v = make(1, 1, 2, 3, 576, 512)
    assert dhsa.attention(q, k, v).shape == (2, 1, 2, 512)
    with pytest.raises(NotImplementedError, match=r"^q: head_dim 577 is not supported yet, at most 576"):
        dhsa.select(*make(1, 1, 2, 3, 577, 1)[:2], dhsa.Config())


# ---- two-sided windows -----------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 63, 128, 129, 299, 300, 2**40, 2**63 - 1])
def test_two_sided_windows(torch, window, dtype, tier):
    """Against the reference, by many rows and by few; a window wider than the keys is none."""
    for lq in (290, 3):
        q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make(4, 2, lq, 300, 24, 24, batch=1))
        out, lse, stats = functional.run(q, k, v, window=window, causal=False, return_lse=True)
        assert stats.path == ("window" if window < 300 else "dense")
        want = reference.attention(wide(q), wide(k), wide(v), window=window, causal=False, return_lse=True)
        close(wide(out), lse.numpy(), *want, dtype)
        if window >= 300:
            assert torch.equal(out, dhsa.attention(q, k, v, causal=False))


def test_a_two_sided_window_is_key_ranges():
    q, k, v = make(4, 2, 200, 240, 16, 16)
    at = np.arange(200) + 40
    ranges = np.stack([np.maximum(0, at - 29), np.minimum(at + 30, 240)], axis=-1).astype(np.int32)
    want = dhsa.attention(q, k, v, key_ranges=np.stack([ranges] * 2))
    np.testing.assert_allclose(dhsa.attention(q, k, v, window=30, causal=False), want, atol=1e-6)
    alone = dhsa.attention(q[:1], k[:1], v[:1], window=30, causal=False)
    np.testing.assert_array_equal(alone, dhsa.attention(q, k, v, window=30, causal=False)[:1])


def test_a_selection_made_for_one_width_serves_another():
    """Values may have any width, and a pickled selection too."""
    q, k, _ = make(4, 2, 150, 200, 64, 1)
    selection = pickle.loads(pickle.dumps(dhsa.select(q, k, dhsa.Config(budget=48, sink=4, local=12), causal=False)))
    for width in (1, 80, 512):
        v = make(4, 2, 150, 200, 64, width, seed=width)[2]
        out = dhsa.sparse_attention(q, k, v, selection)
        np.testing.assert_allclose(out, reference.sparse_attention(q, k, v, selection), atol=1e-5)
