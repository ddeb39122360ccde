"""Leaving out negligible tiles (Config.skip): against the reference with the executor's own tiles, on every tier, and
against the bound that the docs promise, which needs to know no tiles."""

import math

import numpy as np
import pytest
from tiers import every_tier, once, random_lists

import dhsa
from dhsa import functional, reference

LANES = {"scalar": 8, "avx2": 16, "neon": 16, "avx512": 48, "avx512bf16": 48, "amx": 48}

# b, h, hkv, lq, lk, d, options, skip
CASES = {
    "one panel an item": (1, 2, 1, 40, 900, 32, {}, 0.1),
    "gqa": (2, 4, 2, 300, 700, 64, {}, 0.3),
    "many items": (1, 3, 1, 800, 800, 16, {}, 0.2),
    "head_dim 129": (1, 2, 2, 40, 1000, 129, {}, 0.3),
    "window": (1, 4, 2, 400, 900, 24, {"window": 500}, 0.1),
    "softcap": (1, 4, 2, 150, 900, 48, {"softcap": 8.0}, 0.3),
    "negative scale": (1, 2, 1, 60, 800, 20, {"scale": -0.9}, 0.05),
    "not causal": (1, 2, 1, 60, 900, 20, {"causal": False}, 0.05),
    "zero scale": (1, 2, 1, 60, 600, 20, {"scale": 0.0}, 0.5),
    "both sides": (1, 4, 2, 400, 900, 24, {"causal": False, "window": 500}, 0.1),
    "sinks": (2, 4, 2, 300, 900, 64, {"sinks": np.float32([4, -2, -np.inf, 60])}, 0.1),
    "head_dim 512": (1, 4, 1, 300, 700, 512, {}, 0.3),
}


@pytest.fixture
def make(torch, make_qkv):
    """Every row attends to a few keys much more than to most, as to real sinks; stretches of keys are loud or quiet."""

    def make(b, h, hkv, lq, lk, d, dtype="float32", scale=None):
        q, k, v = make_qkv(b, h, hkv, lq, lk, d)
        k *= np.repeat(np.random.default_rng(1).uniform(0.2, 2, lk // 150 + 1), 150)[:lk, None]
        q[..., 0], k[..., 0] = 2, 0
        k[:, :, ::600, 0] = 3 / (scale or d**-0.5)
        return [torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)) for x in (q, k, v)]

    return make


def exactly(q):
    return [x.float().numpy() for x in q]


def grouping(tier, dtype, batch, sets, heads, q_len, block=None, window=None, dim=64):
    """The executor's: see attend() in csrc/attend/attend.c; `heads` share a list, of which there are `sets`."""
    pair = dtype != "float32" and dtype in dhsa.build_info()["products"]
    lanes = 32 if pair else LANES[tier]
    least, most = -(-lanes // heads), max(min(512, 512 * 1024 // (2 * dim)) // heads, 1)
    fair = -(-q_len * (1 if window else batch) * sets // (8 if pair else 16))
    run = max(least, min(most, -(-fair // least) * least))
    return reference.Grouping(256 if pair else 128, lanes, min(block or q_len, run))


@every_tier
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_tier_leaves_out_what_the_reference_does(torch, make, name, dtype, tier):
    *shape, options, skip = CASES[name]
    b, h, hkv, lq = shape[:4]
    q, k, v = make(*shape, dtype, options.get("scale"))
    config = dhsa.Config(budget=None, skip=skip)
    given = {name: torch.from_numpy(x) if name == "sinks" else x for name, x in options.items()}
    out, lse, stats = functional.run(q, k, v, config, return_lse=True, **given)
    q, k, v = exactly((q, k, v))
    groups = grouping(tier, dtype, b, hkv, h // hkv, lq, window=options.get("window"), dim=shape[5])
    mask, share = once(reference.skip_mask, q, k, skip, groups, **options)
    scaling = {name: options[name] for name in ("scale", "softcap", "sinks") if name in options}
    want, want_lse = once(reference.masked_attention, q, k, v, mask, return_lse=True, **scaling)
    assert stats.skipped == pytest.approx(share, abs=1e-12)
    assert 0.01 < share < 0.9 or name == "zero scale"
    np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=2e-6)
    np.testing.assert_allclose(out.float(), want, atol=1e-5 if dtype == "float32" else 2e-2)


@every_tier
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("window", [None, 700])
def test_lists_agree_with_the_reference(make, tier, dtype, heads, window):
    """Random lists, some empty, some short, one complete; a short last block; a window on top."""
    b, h, hkv, lq, lk, block = 2, 4, 2, 150, 1200, 64
    q, k, v = make(b, h, hkv, lq, lk, 40, dtype)
    sets, nq = {"all": 1, "group": hkv, "head": h}[heads], math.ceil(lq / block)
    selection = random_lists((b, sets, nq), lk, [0, 0.5, 0.8, 1], query_block=block)
    out, lse = dhsa.sparse_attention(q, k, v, selection, window=window, skip=0.2, return_lse=True)
    q, k, v = exactly((q, k, v))
    alone = heads == "head"
    groups = grouping(tier, dtype, b, h if alone else hkv, 1 if alone else h // hkv, lq, block, window)
    mask, share = reference.skip_mask(q, k, 0.2, groups, selection=selection, window=window)
    want, want_lse = once(reference.masked_attention, q, k, v, mask, return_lse=True)
    assert share > 0.02
    assert np.isneginf(want_lse).any()
    np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=2e-6)
    np.testing.assert_allclose(out.float(), want, atol=1e-5 if dtype == "float32" else 2e-2)


@every_tier
@pytest.mark.parametrize("skip", [0.5, 0.05, 0.005])
def test_what_is_left_out_stays_below_the_bound(make, tier, skip):
    """Each probability left out is less than `skip` times the row's largest, so their sum is less than that for each
    key; and what it changes of the output, no more than twice that sum of the largest value."""
    q, k, v = make(1, 4, 2, 400, 1500, 64)
    out, lse, stats = functional.run(q, k, v, dhsa.Config(budget=None, skip=skip), return_lse=True)
    want, want_lse = dhsa.attention(q, k, v, return_lse=True)
    assert stats.skipped > (0.02 if skip > 0.01 else 0)
    keys = k.repeat_interleave(2, 1)
    seen = np.arange(1500) <= np.arange(400)[:, None] + 1100
    logits = np.where(seen, (q @ keys.mT / 8).numpy(), -np.inf)
    largest = np.exp(logits.max(-1) - want_lse.numpy())
    lost = 1 - np.exp((lse - want_lse).numpy())
    assert (lost > -1e-5).all()
    assert lost.max() > 1e-4
    assert (lost < skip * largest * seen.sum(-1) + 1e-5).all()
    change = (out - want).abs().amax(-1).numpy()
    assert (change <= 2 * np.maximum(lost, 0) * v.abs().max().item() + 1e-5).all()


@every_tier
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("window", [None, 200])
def test_where_nothing_is_negligible_no_bit_changes(make, tier, dtype, window):
    """Rows are grouped in another order then, and values packed later; a row's sums are the same."""
    q, k, v = make(1, 4, 2, 500, 700, 48, dtype)
    sparse = dhsa.Config(budget=256, query_block=64, sink=16, local=64)
    for config in (dhsa.Config(budget=None), sparse):
        off = functional.run(q, k, v, config, window=window, return_lse=True)
        on = functional.run(q, k, v, config.replace(skip=1e-300), window=window, return_lse=True)
        assert on[2].skipped == off[2].skipped == 0
        assert on[0].equal(off[0])
        assert on[1].equal(off[1])


@every_tier
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [None, 600])
def test_same_bits_for_any_number_of_threads(make, tier, dtype, budget):
    q, k, v = make(1, 6, 2, 333, 800, 56, dtype)
    config = dhsa.Config(budget=budget, skip=0.1, query_block=48)
    results = []
    for threads in (1, 2, 3, 5):
        dhsa.set_num_threads(threads)
        results.append(functional.run(q, k, v, config, softcap=20.0))
    assert all(r[0].equal(results[0][0]) for r in results[1:])
    assert {r[2].skipped for r in results} == {results[0][2].skipped}
    assert results[0][2].skipped > 0.02


@every_tier
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_never_left_out(make, tier, dtype, which, bad):
    tensors = dict(zip("qkv", make(1, 4, 2, 200, 900, 24, dtype), strict=True))
    tensors[which][0, 1, 177, 5] = bad
    config = dhsa.Config(budget=None, skip=0.3)
    out, _, stats = functional.run(*tensors.values(), config)
    with np.errstate(all="ignore"):
        want = once(reference.attention, *exactly(tensors.values()))
    assert stats.skipped > 0.02
    np.testing.assert_array_equal(out.isnan().numpy(), np.isnan(want))


@every_tier
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_no_numbers_reach_no_row_that_does_not_see_them(make, tier, dtype):
    q, k, v = make(1, 4, 2, 200, 900, 24, dtype)
    k[0, 1, 800] = k[0, 1, 600]  # a key that none leaves out
    config = dhsa.Config(budget=None, skip=0.3)
    clean = dhsa.attention(q, k, v, config).float()
    v[0, 1, 800, 5] = math.nan  # query 100 is the first to see it
    v[0, 0, 0, 3] = math.inf  # a sink: in the first tile, which every row keeps
    out = dhsa.attention(q, k, v, config).float()
    assert out[0, :2, :, 3].isinf().all()
    assert out[0, 2:, 100:, 5].isnan().all()
    out[0, :2, :, 3], out[0, 2:, 100:, 5] = clean[0, :2, :, 3], clean[0, 2:, 100:, 5]
    np.testing.assert_allclose(out, clean, atol=1e-6 if dtype == "float32" else 1e-2)


def test_few_rows_are_exact(make):
    q, k, v = make(1, 4, 2, 3, 2000, 64)
    out, _, stats = functional.run(q, k, v, dhsa.Config(budget=None, skip=0.9))
    assert out.equal(dhsa.attention(q, k, v))
    assert stats.skipped == 0


def test_any_selection_and_key_ranges_take_it(make):
    q, k, v = make(1, 4, 2, 700, 900, 32)
    sparse = dhsa.Config(budget=400, query_block=64, sink=64, local=64)
    off = functional.run(q, k, v, sparse)
    on = functional.run(q, k, v, sparse.replace(skip=0.3))
    assert (on[2].path, on[2].density) == ("sparse", off[2].density)
    assert on[2].skipped > 0.02
    assert off[2].skipped == 0
    assert 1e-4 < (on[0] - off[0]).abs().max() < 1
    ranges = np.stack([np.zeros((1, 700)), np.arange(201, 901)[None]], axis=-1).astype(np.int32)
    exact = dhsa.Config(budget=None, skip=0.3)
    assert dhsa.attention(q, k, v, exact, key_ranges=ranges).equal(dhsa.attention(q, k, v, exact))


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (1, ValueError), (-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError),
     ("x", TypeError), (True, TypeError), ([0.1], TypeError), (10**400, ValueError)],
)  # fmt: skip
def test_bad_values(make, value, error):
    with pytest.raises(error, match=r"^skip: "):
        dhsa.Config(skip=value)
    q, k, v = make(1, 2, 1, 40, 40, 8)
    selection = dhsa.select(q, k, dhsa.Config())
    with pytest.raises(error, match=r"^skip: "):
        dhsa.sparse_attention(q, k, v, selection, skip=value)
