"""The Python face: names, arrays in and out of every kind, Selection, settings.

Numbers are compared with dhsa.reference where they matter; the numerics themselves are tested
elsewhere, predictors in test_predictor.py and refused input in test_bad_input.py.
"""

import ast
import inspect
import math
import re
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
import vectors

import dhsa
from dhsa import _core, reference

ROOT = Path(__file__).resolve().parents[2]
SMALL = dhsa.Config(budget=48, query_block=16, sink=4, local=16, dense_tail=0)


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# ---- the package ------------------------------------------------------------------------------------------------


def test_names():
    functions = "attention boundaries pick_boundaries chunk_scores select sparse_attention"
    ratios = "boundary_ratios attention_ratios"
    others = "Config LayerConfigs Selection BoundaryPredictor reference"
    machine = "set_num_threads get_num_threads set_float32_precision get_float32_precision set_isa build_info"
    hooks = "patch unpatch patched last_run check save_cache load_cache shard GroupError"
    drop_in = "scaled_dot_product_attention SdpaCounts replacing_sdpa replace_sdpa restore_sdpa"
    assert sorted(dhsa.__all__) == sorted(f"{functions} {ratios} {others} {machine} {hooks} {drop_in}".split())
    assert set(dhsa.__all__) <= set(dir(dhsa))
    assert dhsa.reference is reference
    with pytest.raises(AttributeError, match="no attribute 'atention'"):
        dhsa.atention  # noqa: B018


def test_import_needs_numpy_alone():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors", "rich", "matplotlib", "gguf"):
            raise ImportError(name + " is not wanted here")
sys.meta_path.insert(0, Refuse())
import numpy as np
import dhsa
q = np.ones((1, 2, 5, 8), np.float32)
assert np.allclose(dhsa.attention(q, q, q), 1)
assert dhsa.get_num_threads() == dhsa.build_info()["cpu_count"]
dhsa.reference
from dhsa import *
import pydoc
assert "Not available" in pydoc.render_doc(dhsa)
try:
    dhsa.patch(None)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == (
        "torch is not wanted here; dhsa's transformers integration needs its extra: pip install 'dhsa[hf]'\n"
    ), done.stderr


def test_version_has_one_source():
    """pyproject.toml reads it from the package, so that neither can be of another release."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "dhsa.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab]\d+|rc\d+|\.dev\d+)?", dhsa.__version__)


def test_stub_has_the_extensions_functions():
    tree = ast.parse((ROOT / "dhsa" / "_core.pyi").read_text())
    stub = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    constants = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    aliases = {
        node.targets[0].id: node.value.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)
    }
    assert {*stub, *constants, *aliases} == {name for name in dir(_core) if not name.startswith("__")}
    assert aliases == {"Past": "KeyIndex"}
    assert _core.Past is _core.KeyIndex
    assert all(type(getattr(_core, name)) is int for name in constants)
    for name, node in stub.items():
        if isinstance(node, ast.FunctionDef):
            names = [arg.arg for arg in node.args.posonlyargs + node.args.args]
            assert names == list(inspect.signature(getattr(_core, name)).parameters), name


def test_build_info():
    info = dhsa.build_info()
    assert info["isa_compiled"][0] == "scalar"
    assert set(info["isa_detected"]) <= set(info["isa_compiled"])
    assert info["isa"] in info["isa_detected"]
    assert info["num_threads"] == dhsa.get_num_threads() >= 1
    assert info["cpu_count"] >= 1


# ---- arrays in and out ------------------------------------------------------------------------------------------


class Foreign:
    """An array of a library that knows nothing but DLPack and the array API's from_dlpack."""

    class namespace:
        __name__ = "foreign"

        @staticmethod
        def from_dlpack(x):
            import torch

            return Foreign(torch.from_dlpack(x))

        float32 = "torch.float32"

        @staticmethod
        def astype(x, dtype):
            return Foreign(x.tensor.to(getattr(__import__("torch"), dtype.rpartition(".")[2])))

    def __init__(self, tensor, versioned=True):
        self.tensor, self.versioned = tensor, versioned
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def __array_namespace__(self):
        return self.namespace

    def __dlpack__(self, **options):
        if options and not self.versioned:
            raise TypeError("unexpected keyword argument 'max_version'")
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_numpy_in_numpy_out(make_qkv, dtype):
    q, k, v = make_qkv(2, 4, 2, 7, 9, 16, dtype)
    out, lse = dhsa.attention(q, k, v, return_lse=True)
    want, want_lse = reference.attention(q, k, v, return_lse=True)
    assert type(out) is np.ndarray
    assert (out.dtype, lse.dtype) == (dtype, np.float32)
    np.testing.assert_allclose(out, want, atol=2e-3 if dtype == np.float16 else 2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("config", [None, SMALL], ids=["exact", "sparse"])
def test_torch_in_torch_out(torch, make_qkv, dtype, config):
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in make_qkv(1, 4, 2, 100, 120, 16))
    out, lse = dhsa.attention(q, k, v, config, return_lse=True)
    assert isinstance(out, torch.Tensor)
    assert (out.dtype, out.shape, out.is_contiguous()) == (q.dtype, q.shape, True)
    assert (lse.dtype, lse.shape) == (torch.float32, q.shape[:3])
    wide = dhsa.attention(q.float().numpy(), k.float().numpy(), v.float().numpy(), config)
    error = (out.float().numpy() - wide).__abs__().max()
    assert error <= {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_any_dlpack_array(torch, make_qkv, dtype, versioned):
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in make_qkv(1, 4, 2, 20, 30, 16)]
    want, want_lse = dhsa.attention(*tensors, return_lse=True)
    arrays = [Foreign(x, versioned) for x in tensors]
    out, lse = dhsa.attention(*arrays, return_lse=True)
    assert isinstance(out, Foreign)
    assert torch.equal(out.tensor, want)
    assert torch.equal(lse.tensor, want_lse)
    own = Foreign(torch.zeros_like(want), versioned)
    assert dhsa.attention(*arrays, out=own) is own
    assert torch.equal(own.tensor, want)
    cuts = dhsa.boundaries(arrays[1], SMALL)
    assert isinstance(cuts, Foreign)
    assert cuts.tensor.dtype == torch.int32
    selection = dhsa.select(arrays[0], arrays[1], SMALL, boundaries=cuts)
    sparse = dhsa.sparse_attention(*arrays, selection)
    assert torch.equal(sparse.tensor, dhsa.attention(*tensors, SMALL))
    narrow, sinks = tensors[2][..., :9], torch.tensor([1.0, -2.0, 0.5, 3.0])
    want = dhsa.attention(*tensors[:2], narrow, sinks=sinks)
    for given in (sinks, sinks.to(tensors[0].dtype)):
        out = dhsa.attention(*arrays[:2], Foreign(narrow, versioned), sinks=Foreign(given, versioned))
        assert torch.equal(out.tensor, want)
        assert out.tensor.shape == (1, 4, 20, 9)


@pytest.mark.parametrize(
    ("library", "dtype"),
    [
        ("array_api_strict", "float32"),  # has neither of the 16-bit dtypes
        ("jax.numpy", "float32"),
        ("jax.numpy", "float16"),
        ("jax.numpy", "bfloat16"),
    ],
)
def test_other_array_libraries(make_qkv, library, dtype):
    """Results are arrays of the library, and those of the same numbers in NumPy."""
    xp = pytest.importorskip(library)
    if library == "array_api_strict" and np.lib.NumpyVersion(np.__version__) < "2.1.0":
        pytest.skip("array_api_strict has DLPack 1.0 from NumPy 2.1 on")
    to_numpy = np.asarray if library == "jax.numpy" else np.from_dlpack
    q, k, v = (xp.asarray(x, dtype=getattr(xp, dtype)) for x in make_qkv(1, 4, 2, 100, 120, 16))
    out, lse = dhsa.attention(q, k, v, SMALL, return_lse=True)
    assert type(out) is type(lse) is type(q)
    assert (out.dtype, out.shape, lse.dtype) == (q.dtype, q.shape, xp.float32)
    same = [to_numpy(x).astype(np.float32) for x in (q, k, v)]
    want, want_lse = reference.sparse_attention(*same, dhsa.select(q, k, SMALL), return_lse=True)
    np.testing.assert_allclose(
        to_numpy(out).astype(np.float32), want, atol={"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    )
    np.testing.assert_allclose(to_numpy(lse), want_lse, atol=1e-5)
    cuts = dhsa.boundaries(k, SMALL)
    assert type(cuts) is type(q)
    assert cuts.dtype == xp.int32
    assert dhsa.select(q, k, SMALL, boundaries=cuts) == dhsa.select(q, k, SMALL)


def test_buffer_outlives_its_owner(torch):
    buffer = _core.Buffer((2, 3), "bfloat16")
    tensors = [torch.from_dlpack(buffer), torch.from_dlpack(buffer)]
    assert buffer.__dlpack_device__() == (1, 0)
    tensors[0].fill_(2.5)
    capsules = [buffer.__dlpack__(), buffer.__dlpack__(max_version=(1, 0))]
    del buffer, capsules
    assert tensors[1].dtype == torch.bfloat16
    assert tensors[1].tolist() == [[2.5] * 3] * 2
    for bad, error in (
        (((1,), "int8"), TypeError),
        (((0,), "float32"), ValueError),
        (((2**62, 4), "float32"), ValueError),
    ):
        with pytest.raises(error):
            _core.Buffer(*bad)


def test_nothing_is_held_after_a_call(torch, make_qkv):
    arrays = make_qkv(1, 2, 1, 5, 6, 8)
    tensors = [torch.from_numpy(x.copy()) for x in arrays]
    foreign = [Foreign(x) for x in tensors]
    before = [sys.getrefcount(x) for x in arrays], [x._use_count() for x in tensors]
    for _ in range(3):
        for group in (arrays, tensors, foreign):
            dhsa.attention(*group)
            with pytest.raises(ValueError, match=r"^v: "):
                dhsa.attention(
                    group[0], group[1], type(group[0])(tensors[2][:, :, :3]) if group is foreign else group[2][:, :, :3]
                )
    assert before == ([sys.getrefcount(x) for x in arrays], [x._use_count() for x in tensors])


def test_strided_inputs(make_qkv):
    q, k, v = make_qkv(2, 4, 2, 11, 13, 8)
    want = dhsa.attention(q, k, v)
    swapped = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (q, k, v)]
    np.testing.assert_array_equal(dhsa.attention(*swapped), want)
    backwards = [np.ascontiguousarray(x[:, ::-1])[:, ::-1] for x in (q, k, v)]
    assert backwards[0].strides[1] < 0
    np.testing.assert_array_equal(dhsa.attention(*backwards), want)
    one_head = [np.broadcast_to(x[:1, :1], (3, 2, *x.shape[2:])) for x in (q, k, v)]
    assert one_head[0].strides[0] == one_head[0].strides[1] == 0
    copied = dhsa.attention(*(np.ascontiguousarray(x) for x in one_head))
    np.testing.assert_array_equal(dhsa.attention(*one_head), copied)
    padded = [np.concatenate([x, x], axis=-1)[..., :8] for x in (q, k, v)]
    np.testing.assert_array_equal(dhsa.attention(*padded), want)


def test_head_dim_of_one_may_have_any_stride():
    x = normal(1, 2, 6, 4)[..., ::4]
    assert x.shape[-1] == 1
    np.testing.assert_array_equal(dhsa.attention(x, x, x), dhsa.attention(x.copy(), x.copy(), x.copy()))


def test_out(torch, make_qkv):
    q, k, v = make_qkv(1, 4, 2, 10, 12, 8)
    want = dhsa.attention(q, k, v)
    for out in (np.empty_like(q), np.empty((1, 10, 4, 8), np.float32).transpose(0, 2, 1, 3)):
        out[:] = np.nan
        assert dhsa.attention(q, k, v, out=out) is out
        np.testing.assert_array_equal(out, want)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    view = torch.empty(1, 10, 4, 8).transpose(1, 2)
    assert dhsa.attention(*tensors, out=view) is view
    np.testing.assert_array_equal(view.numpy(), want)
    selection = dhsa.select(q, k, dhsa.Config(budget=None))
    out, lse = dhsa.sparse_attention(q, k, v, selection, out=np.empty_like(q), return_lse=True)
    np.testing.assert_allclose(out, want, atol=1e-6)
    assert lse.shape == (1, 4, 10)


def test_torch_grad_mode(torch, make_qkv):
    q, k, v = (torch.from_numpy(x) for x in make_qkv(1, 2, 2, 4, 4, 8))
    want = dhsa.attention(q, k, v)
    q.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"^q: requires grad"):
        dhsa.attention(q, k, v)
    with torch.no_grad():
        assert torch.equal(dhsa.attention(q, k, v), want)
    with torch.inference_mode():
        assert torch.equal(dhsa.attention(q * 1, k * 1, v * 1), want)


def test_torch_lazy_negation_is_seen(torch):
    x = torch.randn(1, 2, 5, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    lazy = x.conj().imag
    assert lazy.is_neg()
    # Its last stride is 2; resolving makes it plain memory.
    assert torch.equal(dhsa.attention(lazy, lazy, lazy), dhsa.attention(*[(-x.imag).contiguous()] * 3))


def test_options_reach_the_core(make_qkv):
    q, k, v = make_qkv(1, 4, 2, 40, 50, 16)
    for options in (
        {"scale": 0.3},
        {"softcap": 1.5},
        {"window": 9},
        {"causal": False},
        {"scale": -0.2, "softcap": 3, "window": 20},
    ):
        want = reference.attention(q, k, v, **options)
        np.testing.assert_allclose(dhsa.attention(q, k, v, **options), want, atol=3e-6, err_msg=str(options))


def test_key_ranges(make_qkv):
    q, k, v = make_qkv(2, 2, 1, 6, 9, 8)
    rng = np.random.default_rng(1)
    start = rng.integers(0, 6, (2, 6))
    ranges = np.stack([start, start + rng.integers(0, 4, (2, 6))], axis=-1)
    ranges[0, 0] = ranges[1, 5] = (4, 4)
    out, lse = dhsa.attention(q, k, v, key_ranges=ranges, return_lse=True)
    for b in range(2):
        for i in range(6):
            lo, hi = ranges[b, i]
            row = slice(i, i + 1)
            if lo == hi:
                assert (out[b, :, i] == 0).all()
                assert (lse[b, :, i] == -np.inf).all()
            else:
                one = reference.attention(
                    q[b : b + 1, :, row], k[b : b + 1, :, lo:hi], v[b : b + 1, :, lo:hi], causal=False
                )
                np.testing.assert_allclose(out[b : b + 1, :, row], one, atol=2e-6)


# ---- settings ---------------------------------------------------------------------------------------------------


def test_threads_setting(torch):
    dhsa.set_num_threads(3)
    assert dhsa.get_num_threads() == 3
    dhsa.set_num_threads(np.int64(5))
    assert dhsa.get_num_threads() == 5
    dhsa.set_num_threads(None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert dhsa.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("config", [None, SMALL], ids=["exact", "sparse"])
def test_same_bits_for_any_number_of_threads(make_qkv, config):
    q, k, v = make_qkv(2, 4, 2, 150, 170, 24)
    results = []
    for threads in (1, 2, 3, 5):
        dhsa.set_num_threads(threads)
        results.append(dhsa.attention(q, k, v, config, return_lse=True))
    for out, lse in results[1:]:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize("isa", dhsa.build_info()["isa_detected"])
def test_set_isa(make_qkv, isa):
    q, k, v = make_qkv(1, 4, 2, 37, 53, 20)
    dhsa.set_isa(isa)
    assert dhsa.build_info()["isa"] == isa
    np.testing.assert_allclose(dhsa.attention(q, k, v), reference.attention(q, k, v), atol=3e-6)
    dhsa.set_isa("auto")


def test_calls_from_many_threads(make_qkv):
    q, k, v = make_qkv(1, 2, 1, 60, 60, 16)
    want = dhsa.attention(q, k, v, SMALL)
    wrong = []

    def work():
        for _ in range(10):
            if not np.array_equal(dhsa.attention(q, k, v, SMALL), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_interrupt_is_honoured_on_return(make_qkv):
    q, k, v = make_qkv(1, 2, 1, 1500, 1500, 64)

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    def call():
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        while True:  # on a busy machine the alarm may come between two calls
            _core.attend_dense(q, k, v, out, None, None, None, None, True, None, 1, None, None, 0)

    old = signal.signal(signal.SIGALRM, interrupt)
    out = np.empty_like(q)
    dhsa.set_num_threads(1)
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    np.testing.assert_allclose(dhsa.attention(q[:, :, :8], k[:, :, :8], v[:, :, :8]), out[:, :, :8], atol=1e-5)


# ---- boundaries, scores, selection ------------------------------------------------------------------------------


def test_fixed_boundaries():
    k = normal(2, 1, 21, 4)
    cuts = dhsa.boundaries(k, dhsa.Config(boundaries="fixed", chunk_size=8))
    assert cuts.dtype == np.int32
    assert cuts.tolist() == [[0, 8, 16, 21]] * 2


def test_boundaries_pad_shorter_rows():
    k = normal(2, 1, 200, 8)
    k[1] = 1  # nothing changes, so no gap stands out
    cuts = dhsa.boundaries(k, dhsa.Config(theta=-0.9, nms=4))
    counts = [len(np.unique(row)) for row in cuts]
    assert counts[1] < counts[0] == cuts.shape[1]
    assert (cuts[1, counts[1] :] == 200).all()
    for row, count in zip(cuts, counts, strict=True):
        assert row[0] == 0
        assert (np.diff(row[:count]) > 0).all()
        assert row[count - 1] == 200


def test_results_follow_the_kind_of_the_input(torch):
    q, k = normal(1, 2, 64, 8), normal(1, 2, 64, 8, seed=1)
    tq, tk = torch.from_numpy(q), torch.from_numpy(k)
    cuts = dhsa.boundaries(tk, SMALL)
    assert cuts.dtype == torch.int32
    np.testing.assert_array_equal(cuts.numpy(), dhsa.boundaries(k, SMALL))
    scores = dhsa.chunk_scores(tq, tk, cuts, query_block=16)
    assert scores.dtype == torch.float32
    np.testing.assert_array_equal(scores.numpy(), dhsa.chunk_scores(q, k, cuts.numpy(), query_block=16))
    picked = dhsa.pick_boundaries(torch.randn(30), 3, theta=-1e9, nms=2)
    assert picked.dtype == torch.int32
    ratios = dhsa.boundary_ratios(torch.rand(32, 32), window=4)
    assert ratios.dtype == torch.float64
    selection = dhsa.select(tq, tk, SMALL)
    assert type(selection.indices) is type(selection.indptr) is type(selection.boundaries) is np.ndarray
    assert selection == dhsa.select(q, k, SMALL)


def test_pick_boundaries():
    scores = [0, 5, 4, 0, 5, 0, 0, 3, 9, 0]
    assert dhsa.pick_boundaries(scores, 3, theta=0, nms=1).tolist() == [0, 2, 5, 9, 10]
    assert dhsa.pick_boundaries(scores, 9, theta=0, nms=0).tolist() == [0, 2, 3, 5, 8, 9, 10]
    assert dhsa.pick_boundaries(np.float64(scores), 9, theta=4, nms=0).tolist() == [0, 2, 5, 9, 10]
    assert dhsa.pick_boundaries(scores, 0, theta=0, nms=0).tolist() == [0, 10]
    assert dhsa.pick_boundaries(scores, 1, theta=0, nms=0, instruction=3).tolist() == [0, 8, 10]
    assert dhsa.pick_boundaries(np.full(10, np.nan), 4, theta=-math.inf, nms=0).tolist() == [0, 10]
    assert dhsa.pick_boundaries([1.0], 5, theta=0, nms=0).tolist() == [0, 1]
    rng = np.random.default_rng(3)
    for _ in range(20):
        scores = rng.integers(0, 6, 50).astype(np.float32)
        options = {"theta": float(rng.integers(-1, 4)), "nms": int(rng.integers(0, 6))}
        n = int(rng.integers(0, 20))
        want = reference.pick_boundaries(scores, n, **options)
        np.testing.assert_array_equal(dhsa.pick_boundaries(scores, n, **options), want)


def test_wide_scores_are_not_rounded():
    # In float32 these would round to one number, above theta.
    assert dhsa.pick_boundaries([1.1, 1.1 + 1e-9, 1.1 - 1e-9, 0.0], 4, theta=1.1, nms=0).tolist() == [0, 2, 4]
    assert dhsa.pick_boundaries([2**40, 2**40 + 1, 5, 0], 1, theta=-math.inf, nms=0).tolist() == [0, 2, 4]
    assert dhsa.pick_boundaries([1e300, 1e301, -1e300, math.nan], 2, theta=0, nms=0).tolist() == [0, 1, 2, 4]
    rng = np.random.default_rng(5)
    for _ in range(20):
        scores = 1 + rng.integers(0, 9, 60) * 1e-12
        options = {"theta": 1 + 3e-12, "nms": int(rng.integers(0, 6))}
        want = reference.pick_boundaries(scores, 10, **options)
        np.testing.assert_array_equal(dhsa.pick_boundaries(scores, 10, **options), want)


@pytest.mark.parametrize("case", vectors.params("label"))
def test_label_vectors(case):
    ratios = dhsa.boundary_ratios(**case.inputs)
    assert ratios.dtype == np.float64
    np.testing.assert_allclose(ratios, case.expected["ratios"], rtol=1e-4)


@pytest.mark.parametrize("heads", ["all", "group", "head"])
@pytest.mark.parametrize("method", ["rows", "dhsa"])
def test_select_then_attend_is_attention(make_qkv, heads, method):
    q, k, v = make_qkv(2, 4, 2, 70, 90, 16)
    config = SMALL.replace(heads=heads, method=method, dense_tail=5)
    options = {"scale": 0.3, "softcap": 4.0}
    out, lse = dhsa.attention(q, k, v, config, **options, return_lse=True)
    selection = dhsa.select(q, k, config, **options)
    assert selection.shape == (2, {"all": 1, "group": 2, "head": 4}[heads], 5)
    assert selection.query_block == 16
    assert (selection.q_len, selection.k_len) == (70, 90)
    np.testing.assert_array_equal(selection.boundaries, dhsa.boundaries(k, config))
    again, lse_again = dhsa.sparse_attention(q, k, v, selection, **options, return_lse=True)
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(lse, lse_again)
    assert np.abs(out - dhsa.attention(q, k, v, **options)).max() > 1e-3  # it did leave keys out


def test_selection_is_reused_with_given_boundaries(make_qkv):
    q, k, _ = make_qkv(2, 2, 1, 64, 64, 8)
    cuts = dhsa.boundaries(k, dhsa.Config(boundaries="fixed", chunk_size=5))
    selection = dhsa.select(q, k, SMALL, boundaries=cuts)
    assert selection == dhsa.select(q, k, SMALL, boundaries=cuts[0])  # one row serves all
    assert selection == dhsa.select(q, k, SMALL.replace(boundaries="fixed", chunk_size=5))
    other = make_qkv(2, 2, 1, 64, 64, 8, seed=9)
    want = reference.sparse_attention(*other, selection)
    np.testing.assert_allclose(dhsa.sparse_attention(*other, selection), want, atol=3e-6)


def test_budget_none_selects_everything(make_qkv):
    q, k, _ = make_qkv(1, 2, 1, 40, 50, 8)
    selection = dhsa.select(q, k, dhsa.Config(budget=None, query_block=16))
    assert selection.density() == 1.0
    assert selection.mask(causal=True).all(axis=1).sum() == sum(range(11, 51))


def test_a_budget_beyond_every_length_is_exact(make_qkv):
    q, k, v = make_qkv(1, 2, 1, 30, 30, 8)
    config = dhsa.Config(budget=2**31 - 1)
    np.testing.assert_array_equal(dhsa.attention(q, k, v, config), dhsa.attention(q, k, v))
    assert dhsa.select(q, k, config).density() == 1


def test_run_reports(make_qkv):
    from dhsa.functional import run

    q, k, v = make_qkv(1, 4, 2, 200, 200, 16)
    _, lse, stats = run(q, k, v)
    assert lse is None
    assert (stats.path, stats.density, stats.select_seconds) == ("dense", 1.0, 0.0)
    assert stats.attend_seconds > 0
    assert run(q, k, v, window=32)[2].path == "window"
    assert run(q, k, v, window=200)[2].path == "dense"
    assert run(q, k, v, dhsa.Config(budget=None), window=32)[2].path == "window"
    stats = run(q, k, v, SMALL)[2]
    assert stats.path == "sparse"
    assert stats.select_seconds > 0 < stats.attend_seconds
    assert stats.density == pytest.approx(dhsa.select(q, k, SMALL).density())
    assert run(q, k, v, dhsa.Config(budget=400))[2].path == "dense"
    assert run(q, k, v, SMALL, window=32)[2].path == "window"
