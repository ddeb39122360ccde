"""The executor against the float64 reference, on every tier, and its rounding against PyTorch's in the same dtype.

Shapes are odd on purpose: lengths that fill no tile, head_dims that fill no vector, windows that cut tiles.
"""

import functools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from tiers import TIERS, every_tier, exact_attention, once, random_lists

import dhsa
from dhsa import reference

# b, h, hkv, lq, lk, d, options
CASES = {
    "one number": (1, 1, 1, 1, 1, 1, {}),
    "gqa": (2, 4, 2, 65, 65, 64, {}),
    "tiles": (1, 2, 1, 300, 300, 32, {}),
    "mqa, continued": (1, 5, 1, 33, 290, 40, {}),
    "decode": (2, 8, 4, 1, 517, 64, {}),
    "head_dim 256": (1, 2, 1, 40, 140, 256, {}),
    "head_dim 129": (1, 2, 2, 20, 150, 129, {}),
    "head_dim 3": (1, 3, 3, 50, 50, 3, {}),
    "window 1": (1, 2, 1, 70, 70, 16, {"window": 1}),
    "window 100": (1, 4, 2, 301, 301, 24, {"window": 100}),
    "window, continued": (2, 2, 1, 37, 333, 72, {"window": 64}),
    "window past the keys": (1, 2, 2, 90, 120, 8, {"window": 1000}),
    "softcap": (1, 4, 2, 150, 150, 48, {"softcap": 3.0}),
    "softcap, window": (1, 4, 2, 150, 280, 80, {"softcap": 50.0, "window": 77, "scale": 0.7}),
    "negative scale": (1, 2, 1, 60, 60, 20, {"scale": -0.3}),
    "zero scale": (1, 2, 1, 60, 60, 20, {"scale": 0.0}),
    "not causal": (1, 2, 1, 60, 45, 20, {"causal": False}),
}


@every_tier
@pytest.mark.parametrize("name", CASES)
def test_every_tier_agrees_with_the_reference(make_qkv, name, tier):
    *shape, options = CASES[name]
    q, k, v = make_qkv(*shape)
    out, lse = dhsa.attention(q, k, v, return_lse=True, **options)
    want, want_lse = once(exact_attention, q, k, v, options)
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=2e-6)


@every_tier
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "config", [None, dhsa.Config(budget=64, sink=8, local=24, query_block=32)], ids=["exact", "sparse"]
)
def test_half_precision_is_the_fp32_result_rounded_once(torch, make_qkv, tier, dtype, config):
    """Converted while packing: the same as converting whole tensors first and rounding the output at the end. With
    products of its own the probabilities are rounded too, as in PyTorch."""
    halves = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in make_qkv(1, 4, 2, 190, 190, 72)]
    out = dhsa.attention(*halves, config, softcap=30.0)
    assert out.dtype == getattr(torch, dtype)
    want = dhsa.attention(*[x.float() for x in halves], config, softcap=30.0).to(out.dtype)
    if dtype in dhsa.build_info()["products"]:
        assert (out.float() - want.float()).abs().max() < 2e-2
        assert (out.float() - want.float()).square().mean().sqrt() < 1e-3
    else:
        assert torch.equal(out, want)


def float64_attention(q, k, v):
    import torch

    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q.double() @ k.mT / math.sqrt(q.shape[3])
    hidden = torch.ones(s.shape[2:], dtype=torch.bool).triu(1)
    return s.masked_fill(hidden, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kind", ["random", "large logits", "near ties", "long flat tail"])
def test_fp32_rounds_no_worse_than_torch(torch, dim, kind):
    generator = torch.Generator().manual_seed(dim)
    q, k, v = (torch.randn(1, h, 1500, dim, generator=generator) for h in (4, 2, 2))
    if kind == "large logits":
        q = q * 10
    elif kind == "near ties":
        k = k[:, :, :1] + 1e-3 * k
    elif kind == "long flat tail":
        q = q * 1e-3
    want = float64_attention(q, k, v)
    ours = dhsa.attention(q, k, v).double() - want
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).double() - want
    # How well torch's library rounds depends on the CPU.
    assert ours.square().mean() <= 1.1 * theirs.square().mean()
    # The largest of half a million errors is a matter of luck; it may not be out of line.
    assert ours.abs().max() <= 1.5 * theirs.abs().max()


@functools.lru_cache(maxsize=1)  # for all tiers
def rounded_by_torch(dtype, kind):
    """A problem: q, k, v, float64 attention, and torch's error."""
    import torch

    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, dtype)
    q, k, v = (torch.randn(1, h, 700, 128, generator=generator) for h in (4, 2, 2))
    if kind == "large logits":
        q = q * 8
    elif kind == "near ties":
        k = k[:, :, :1] + 2e-2 * k
    elif kind == "long flat tail":
        q = q * 1e-3
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    want = float64_attention(q, k, v)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return q, k, v, want, sdpa.double() - want


@every_tier
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["random", "large logits", "near ties", "long flat tail"])
def test_half_precision_rounds_no_worse_than_torch(torch, dtype, kind, tier):
    q, k, v, want, theirs = rounded_by_torch(dtype, kind)
    ours = dhsa.attention(q, k, v).double() - want
    assert ours.square().mean() <= 1.1 * theirs.square().mean()
    assert ours.abs().max() <= 1.1 * theirs.abs().max()


@every_tier
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_of_every_shape(torch, make_qkv, name, dtype, tier):
    """The fp32 cases again, against float64 attention of the rounded inputs: tails, clipped tiles, windows."""
    *shape, options = CASES[name]
    halves = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in make_qkv(*shape)]
    out, lse = dhsa.attention(*halves, return_lse=True, **options)
    want, want_lse = once(exact_attention, *[x.float().numpy() for x in halves], options)
    np.testing.assert_allclose(out.float().numpy(), want, atol=2e-2, rtol=1e-2)
    np.testing.assert_allclose(lse.numpy(), want_lse, atol=2e-5, rtol=2e-6)


@every_tier
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bad_numbers_in_half_precision(torch, make_qkv, tier, which, bad, window, dtype):
    """As for fp32 below: values past the end of a clipped tile are read in pairs, but must not be seen."""
    rows = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in make_qkv(1, 4, 2, 200, 200, 24)]
    tensors = dict(zip("qkv", rows, strict=True))
    clean = dhsa.attention(*tensors.values(), window=window).float().numpy()
    tensors[which][0, 1, 77, 5] = bad
    out = dhsa.attention(*tensors.values(), window=window).float().numpy()
    sees = np.zeros((4, 200), bool)
    if which == "q":
        sees[1, 77] = True
    else:
        sees[2:, 77 : (200 if window is None else 77 + window)] = True
    np.testing.assert_allclose(out[0][~sees], clean[0][~sees], atol=1e-2)
    # A logit of -inf is no harm; everything else such a number touches is lost.
    assert (bad == math.inf and which == "k") or not np.isfinite(out[0][sees]).all(axis=-1).any()


@every_tier
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_panels_that_see_nothing_between_panels_that_do(torch, make_qkv, dtype, tier):
    """Values of a panel are added during the next one that sees something, wherever that lies."""
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make_qkv(1, 1, 1, 1024, 1024, 64))
    ranges = np.tile(np.int32([0, 1024]), (1, 1024, 1))
    ranges[:, np.arange(1024) // 48 % 3 == 1] = 0
    ranges[:, 512:][:, np.arange(512) // 32 % 2 == 1] = 0
    out = dhsa.attention(q, k, v, key_ranges=ranges).float().numpy()
    want = once(reference.attention, *[x.float().numpy() for x in (q, k, v)], key_ranges=ranges)
    np.testing.assert_allclose(out, want, atol=1e-5 if dtype == "float32" else 4e-3)


@every_tier
@pytest.mark.parametrize("power", [2, 7, 8, 9, 12, 20, 36])
def test_logits_of_any_size(make_qkv, tier, power):
    q, k, v = make_qkv(1, 2, 1, 90, 90, 16, seed=power)
    q[0, :, 0], k[0, :, ::7] = q[0, :, 1], k[0, :, :1]  # exact ties share the weight
    q, k = (x * np.float32(10.0 ** (power / 2)) for x in (q, k))
    out, lse = dhsa.attention(q, k, v, return_lse=True)
    want, want_lse = reference.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, want, atol=1e-4)
    np.testing.assert_allclose(lse, want_lse, rtol=3e-6)
    sparse = dhsa.Config(budget=24, query_block=8, sink=2, local=8, dense_tail=0)
    selection = dhsa.select(q, k, sparse)
    np.testing.assert_allclose(
        dhsa.attention(q, k, v, sparse), reference.sparse_attention(q, k, v, selection), atol=1e-4
    )
    edges = np.arange(91, dtype=np.int32)[None]
    scores = dhsa.chunk_scores(q, k, edges, query_block=8, score="rows", heads="head")
    want = reference.chunk_scores(q, k, edges, query_block=8, score="rows", heads="head")
    if power == 2:
        np.testing.assert_allclose(scores, want, atol=3e-4)
    # Beyond that, exponents have no fraction in fp32, on which the powers depend by 6 percent. The number of keys that
    # share a probability is less than the rounding of the largest logits.
    alone = np.arange(90) % 7 != 0
    np.testing.assert_allclose(scores[..., alone], want[..., alone], rtol=0.13, atol=3e-4)
    assert (scores <= 8 * (1 + 1e-6)).all()
    assert (scores[want > 1e-6] > 1e-6).all()


@every_tier
@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("window", [None, 90])
def test_lists_agree_with_the_reference(make_qkv, tier, heads, window):
    """Random lists, some empty, some with gaps, some runs; a short last block; a window on top."""
    b, h, hkv, lq, lk, block = 2, 4, 2, 150, 210, 64
    q, k, v = make_qkv(b, h, hkv, lq, lk, 40)
    sets, nq = {"all": 1, "group": hkv, "head": h}[heads], math.ceil(lq / block)
    selection = random_lists((b, sets, nq), lk, [0, 0.05, 0.5, 1], query_block=block)
    out, lse = dhsa.sparse_attention(q, k, v, selection, window=window, softcap=5.0, return_lse=True)
    want, want_lse = reference.sparse_attention(q, k, v, selection, window=window, softcap=5.0, return_lse=True)
    assert np.isneginf(want_lse).any()
    np.testing.assert_allclose(out, want, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    assert (out[np.isneginf(lse)] == 0).all()


@every_tier
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("window", [None, 50])
def test_bad_numbers_reach_the_rows_that_see_them_and_no_other(make_qkv, tier, which, bad, window):
    tensors = dict(zip("qkv", make_qkv(1, 4, 2, 200, 200, 24), strict=True))
    tensors[which][0, 1, 77, 5] = bad
    clean = dhsa.attention(*make_qkv(1, 4, 2, 200, 200, 24), window=window)
    out = dhsa.attention(*tensors.values(), window=window)
    sees = np.zeros((4, 200), bool)
    if which == "q":
        sees[1, 77] = True
    else:
        sees[2:, 77 : (200 if window is None else 77 + window)] = True
    # Not bit for bit: a tile that holds a value that is no number is added by other instructions.
    np.testing.assert_allclose(out[0][~sees], clean[0][~sees], atol=1e-6)
    with np.errstate(all="ignore"):
        want = once(reference.attention, *tensors.values(), window=window)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(out), np.isinf(want))


@every_tier
@pytest.mark.parametrize(
    "config", [None, dhsa.Config(budget=96, sink=16, local=40, query_block=48)], ids=["exact", "sparse"]
)
def test_same_bits_for_any_number_of_threads(make_qkv, tier, config):
    q, k, v = make_qkv(2, 6, 2, 333, 401, 56)
    results = []
    for threads in (1, 2, 3, 5):
        dhsa.set_num_threads(threads)
        results.append(dhsa.attention(q, k, v, config, softcap=20.0))
    assert all(np.array_equal(results[0], other) for other in results[1:])


FORK = """
import os, sys, numpy as np, dhsa
dhsa.set_num_threads(3)
x = np.random.default_rng(0).standard_normal((1, 4, 300, 32), dtype=np.float32)
want = dhsa.attention(x, x, x)
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(dhsa.attention(x, x, x), want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(dhsa.attention(x, x, x), want)
print("well")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_makes_its_own_threads():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "well", done.stderr


MEMORY = """
import sys, numpy as np, dhsa
length = int(sys.argv[1])
dhsa.set_num_threads(2)
rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1, h, length, 64), dtype=np.float32) for h in (2, 1, 1))
out = np.ones_like(q)
config = dhsa.Config(budget=512, sink=64, local=128) if sys.argv[2] == "sparse" else None
window = 256 if sys.argv[2] == "window" else None
dhsa.attention(q[:, :, :300], k[:, :, :300], v[:, :, :300])
open("/proc/self/clear_refs", "w").write("5")
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
dhsa.attention(q, k, v, config, window=window, out=out)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("path", ["dense", "window", "sparse"])
def test_memory_does_not_grow_with_the_square_of_the_length(path):
    """At 12,000 tokens one byte a (query, key) pair would be 137 MiB; the whole call stays under 16."""
    done = subprocess.run([sys.executable, "-c", MEMORY, "12000", path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 1024


def test_build_info_names_the_dtypes_with_products_of_their_own():
    dhsa.set_isa("scalar")
    assert dhsa.build_info()["products"] == ["float32"]
    if "avx512bf16" in TIERS:
        dhsa.set_isa("avx512bf16")
        assert dhsa.build_info()["products"] == ["float32", "bfloat16"]
