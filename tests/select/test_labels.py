"""attention_ratios: the training label without the attention matrix, against its definition, on every tier.

Not here: the label from a matrix (test_select.py), and what is trained on it (test_training.py).
"""

import subprocess
import sys

import numpy as np
import pytest
from tiers import every_tier, once

import dhsa
from dhsa import reference

CASES = {
    "plain": ((1, 4, 1, 300, 32), {}),
    "batch, groups, window": ((2, 6, 2, 517, 64), {"sliding_window": 100}),
    "softcap": ((1, 2, 2, 129, 16), {"softcap": 20.0, "sliding_window": 40, "window": 2}),
    "negative scale": ((1, 2, 1, 140, 24), {"scale": -0.3, "window": 3}),
    "window wider than the keys": ((1, 1, 1, 90, 8), {"sliding_window": 10**6}),
    "window narrower than a gap's": ((1, 2, 1, 70, 8), {"sliding_window": 3}),
    "wide gaps": ((1, 2, 1, 400, 16), {"window": 64}),
    "one gap": ((1, 1, 1, 16, 8), {}),
    "gemma": ((1, 4, 1, 1000, 256), {}),
    "head_dim 576": ((1, 4, 1, 200, 576), {}),
}


def qk(b, h, hkv, length, d, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((b, h, length, d)) * 2
    return q.astype(dtype), rng.standard_normal((b, hkv, length, d)).astype(dtype)


@every_tier
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_matrix(tier, name):
    shape, options = CASES[name]
    q, k = qk(*shape)
    want = once(reference.attention_ratios, q, k, **options)
    assert (want > 0).any()
    got = dhsa.attention_ratios(q, k, **options)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got == 0, want == 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=0)


def test_equals_boundary_ratios_of_torchs_matrix(torch):
    q, k = (torch.from_numpy(x) for x in qk(1, 4, 2, 256, 64))
    for sliding in (None, 50):
        distance = torch.arange(256)[:, None] - torch.arange(256)
        hidden = (distance < 0) | (distance >= (sliding or 256))
        logits = (q @ k.repeat_interleave(2, 1).mT / 8).masked_fill(hidden, -torch.inf)
        want = dhsa.boundary_ratios(logits.softmax(-1).mean(1)[0], window=4, sliding_window=sliding)
        got = dhsa.attention_ratios(q, k, sliding_window=sliding)
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got[0], want, rtol=1e-5, atol=0)


@every_tier
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_low_precision_input_is_exact(torch, tier, dtype, name):
    """Products of 16-bit numbers are exact in float32: only sums round."""
    shape, options = CASES[name]
    q, k = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in qk(*shape))
    want = once(reference.attention_ratios, q.double().numpy(), k.double().numpy(), **options)
    np.testing.assert_allclose(dhsa.attention_ratios(q, k, **options).numpy(), want, rtol=1e-5)
    q[0, 0, -2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"^q: the logits of query \d+ of batch item 0 are not all finite"):
        dhsa.attention_ratios(q, k, **options)


def test_strides_and_threads(make_qkv):
    q, k = qk(2, 4, 2, 900, 32)
    dhsa.set_num_threads(1)
    want = dhsa.attention_ratios(q, k, sliding_window=200)
    for threads in (2, 3, 7):
        dhsa.set_num_threads(threads)
        np.testing.assert_array_equal(dhsa.attention_ratios(q, k, sliding_window=200), want)
    wide = np.zeros((2, 900, 4, 40), np.float32)
    wide[..., :32] = q.transpose(0, 2, 1, 3)
    view = wide.transpose(0, 2, 1, 3)[..., :32]
    np.testing.assert_array_equal(dhsa.attention_ratios(view, k[:, :, ::-1][:, :, ::-1], sliding_window=200), want)


@pytest.mark.parametrize("length", [1, 2, 7, 15])
def test_too_short_for_a_gap(length):
    assert not dhsa.attention_ratios(*qk(1, 2, 1, length, 8)).any()


def test_large_logits_of_one_key():
    """A column that takes everything and columns that get nothing: ratios up to the limit of the 1e-6."""
    q, k = qk(1, 2, 1, 200, 8)
    k[0, 0, 100] *= 60
    np.testing.assert_allclose(dhsa.attention_ratios(q, k), reference.attention_ratios(q, k), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_no_numbers_are_refused(bad, which):
    tensors = qk(1, 2, 1, 300, 8)
    tensors[which][0, 0, 140, 3] = bad
    with pytest.raises(ValueError, match=r"^q: the logits of query 1\d\d of batch item 0 are not all finite"):
        dhsa.attention_ratios(*tensors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"window": 0}, ValueError, r"^window: "),
        ({"window": 65}, ValueError, r"^window: got 65, expected 1 to 64"),
        ({"window": 2.0}, TypeError, r"^window: "),
        ({"sliding_window": 0}, ValueError, r"^sliding_window: "),
        ({"scale": np.nan}, ValueError, r"^scale: "),
        ({"softcap": -1.0}, ValueError, r"^softcap: "),
        ({"k": np.zeros((1, 1, 21, 8), np.float32)}, ValueError, r"^k: 21 keys, expected as many as the 20 queries"),
        ({"k": np.zeros((1, 3, 20, 8), np.float32)}, ValueError, r"^k: 3 heads do not divide"),
        ({"k": np.zeros((1, 1, 20, 8), np.float64)}, TypeError, r"^k: "),
        ({"q": np.zeros((2, 20, 8), np.float32)}, ValueError, r"^q: expected 4 dimensions"),
        ({"q": np.zeros((1, 2, 9, 577), "f4"), "k": np.zeros((1, 1, 9, 577), "f4")}, NotImplementedError, "^q: "),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    q, k = qk(1, 2, 1, 20, 8)
    arguments = {"q": q, "k": k} | change
    with pytest.raises(error, match=message):
        dhsa.attention_ratios(arguments.pop("q"), arguments.pop("k"), **arguments)


def test_memory_is_linear():
    """32K keys: a matrix would take 4 GiB, the sums 6 MB."""
    program = (
        "import resource, numpy as np, dhsa\n"
        "q = np.ones((1, 1, 32768, 8), np.float32)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "dhsa.attention_ratios(q[:, :, :256], q[:, :, :256])\n"
        "before = peak()\n"
        "dhsa.attention_ratios(q, q, sliding_window=64)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 40 << 20
