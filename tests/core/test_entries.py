"""What the C entries and the functions around them take and refuse at their edges: exporters without strides, more CPUs
than threads, empty dimensions, names that are no names, numbers beyond what a list can hold, default devices."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

import dhsa
from dhsa import _threads


def test_exporters_without_strides(make_qkv):
    """ctypes hands out no strides where the memory is C-contiguous."""
    from dhsa import _core

    k = make_qkv(1, 2, 2, 40, 40, 16)[1]
    memory = (ctypes.c_float * 16 * 40 * 2 * 1).from_buffer_copy(k.tobytes())
    found, expected = np.empty((1, 40), np.float32), np.empty((1, 40), np.float32)
    _core.similarity_scores(memory, 4, found, 1)
    _core.similarity_scores(k, 4, expected, 1)
    np.testing.assert_array_equal(found, expected)


def test_more_cpus_than_threads(monkeypatch, make_qkv):
    monkeypatch.setattr(_threads, "_cpus", 5000)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert dhsa.get_num_threads() == 1024
    q, k, v = make_qkv(1, 2, 1, 9, 9, 16)
    assert np.isfinite(dhsa.attention(q, k, v)).all()


def test_workers_of_a_large_call_stay_asleep(make_qkv):
    """Results only: how long a small call takes after a large one is measured by hand, since tests are not timed."""
    q, k, v = make_qkv(1, 2, 1, 300, 300, 16)
    expected = dhsa.attention(q, k, v)
    for threads in (64, 2, 1, 64, 3):
        dhsa.set_num_threads(threads)
        np.testing.assert_array_equal(dhsa.attention(q, k, v), expected)


@pytest.mark.parametrize("name", ["scalar\0junk", "a" + "\u00e9" * 30, "\udcff", "", "\0"])
def test_names_of_no_tier(name):
    before = dhsa.build_info()["isa"]
    with pytest.raises(ValueError, match=r"isa: .* is not a tier"):
        dhsa.set_isa(name)
    assert dhsa.build_info()["isa"] == before


def test_a_tier_of_any_bytes_in_the_environment():
    command = [sys.executable, "-c", "import dhsa"]
    environment = {**os.environb, b"DHSA_ISA": b"\xff\xfe" + b"a\xc3\xa9" * 20}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: DHSA_ISA: '\\xff\\xfea" in done.stderr


class Refusing:
    """An exporter whose buffer fails, and that notes what is asked of it while an exception is set."""

    def __init__(self, error):
        self.error = error

    def __getattribute__(self, name):
        if name == "__dlpack__":
            raise AttributeError(name)
        return object.__getattribute__(self, name)

    def __buffer__(self, flags):
        raise self.error


@pytest.mark.skipif(sys.version_info < (3, 12), reason="a class in Python has a buffer from Python 3.12 on")
@pytest.mark.parametrize("error", [BufferError("not now"), MemoryError("no room")])
def test_a_refused_buffer_says_why(error):
    from dhsa import _core

    kind = MemoryError if isinstance(error, MemoryError) else ValueError
    with pytest.raises(kind, match=f"array: cannot be read through the buffer protocol: {error}"):
        _core.read_bandwidth(Refusing(error), 1)


class Dates(np.ndarray):
    """Its buffer cannot name its dtype, so that another way is looked for, by code that fails beside an exception."""

    def __getattribute__(self, name):
        if name == "__dlpack__":
            len(name)  # SystemError while an exception is set
            raise AttributeError(name)
        return super().__getattribute__(name)


def test_attributes_are_asked_for_without_an_exception():
    from dhsa import _core

    dates = np.zeros(4, "M8[s]").view(Dates)
    with pytest.raises(ValueError, match="array: cannot be read through the buffer protocol: cannot include dtype"):
        _core.read_bandwidth(dates, 1)


def test_memory_errors_have_a_text():
    from dhsa import _core

    with pytest.raises(MemoryError, match="Buffer: no memory for 1152921504606846976 elements"):
        _core.Buffer((2**60,), "float32")


WRITER = """
import threading, time
import numpy as np
import dhsa
g = np.random.default_rng(0)
q, k, v = (g.standard_normal((1, heads, 2048, 64)).astype(np.float32) for heads in (2, 1, 1))
selection = dhsa.select(q, k, dhsa.Config(budget=512, dense_tail=0))
expected = dhsa.sparse_attention(q, k, v, selection)
served = 0
for numbers in (selection.indptr, selection.indices):
    numbers.setflags(write=True)
    good, stop = numbers.copy(), threading.Event()

    def write():
        while not stop.is_set():
            time.sleep(0.003)
            numbers[1:-1] = np.iinfo(numbers.dtype).max // 2
            time.sleep(0.001)
            numbers[:] = good

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(100):
        time.sleep(g.uniform(0, 0.004))  # or calls and writes may keep step with each other
        try:
            result = dhsa.sparse_attention(q, k, v, selection)
        except ValueError as error:
            assert str(error).startswith(("indptr:", "indices:")), error
        else:
            np.testing.assert_array_equal(result, expected)
            served += 1
    stop.set()
    writer.join()
    numbers[:] = good
assert served > 0
"""


def test_a_selection_that_another_thread_writes_to():
    """What is checked is what is used: every call is right or refused, and none reads where no key is. A process of its
    own, since one that does would crash."""
    done = subprocess.run([sys.executable, "-c", WRITER], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"


def test_cpus_of_this_process():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("no affinity here")
    one = {min(os.sched_getaffinity(0))}
    code = f"import os; os.sched_setaffinity(0, {one}); import dhsa; print(dhsa.build_info()['cpu_count'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"1"
    assert dhsa.build_info()["cpu_count"] == len(os.sched_getaffinity(0))


def test_a_floor_beyond_any_list_is_refused():
    with pytest.raises(ValueError, match=f"floor: expected 144 to 2147483647, got {2**70}"):
        dhsa.Config(budget=None, mass=0.9, floor=2**70)


@pytest.mark.parametrize("field", ["budget", "break_even", "shortlist", "sink", "local"])
def test_numbers_beyond_any_list_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}: expected .* to 2147483647, got {2**70}"):
        dhsa.Config(**{field: 2**70})


class Array:
    """As much of the array API as is asked for, over a NumPy array."""

    def __init__(self, x):
        self.x, self.shape, self.dtype = x, x.shape, x.dtype

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()

    def __array_namespace__(self):
        return np


def test_an_empty_dimension_of_any_kind_of_array(make_qkv):
    q, k, v = make_qkv(1, 2, 1, 9, 9, 16)
    with pytest.raises(ValueError, match="q: dimension 2 has size 0, expected at least 1"):
        dhsa.attention(Array(q[:, :, :0]), Array(k), Array(v))


@pytest.mark.parametrize("shape", [(), (1, 2, 9), (1,) * 9])
def test_a_wrong_number_of_dimensions_of_any_kind_of_array(make_qkv, shape):
    """A Buffer holds at most 8."""
    for kind in (np.asarray, Array):
        with pytest.raises(ValueError, match=rf"q: expected 4 dimensions \[B, H, Lq, D\], got {len(shape)}"):
            dhsa.attention(*(kind(x) for x in (np.zeros(shape, np.float32), *make_qkv(1, 2, 1, 9, 9, 16)[1:])))


def test_a_wrong_dtype_of_an_array_of_another_library(make_qkv):
    with pytest.raises(TypeError, match="q: dtype: expected float32, float16 or bfloat16, got float64"):
        dhsa.attention(*(Array(x.astype(np.float64)) for x in make_qkv(1, 2, 1, 9, 9, 16)))


class Capsule(ctypes.Structure):
    """DLManagedTensor; rest: strides, offset, context and deleter, all 0."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("rest", ctypes.c_void_p * 4),
    )


class Exporter:
    def __init__(self, data, shape):
        self.shape = (ctypes.c_int64 * len(shape))(*shape)
        self.tensor = Capsule(data, (1, 0), len(shape), 2, 32, 1, ctypes.addressof(self.shape))

    def __dlpack__(self, **options):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


def test_exporters_that_say_impossible_things():
    from dhsa import _core

    memory, scores = np.zeros(64, np.float32), np.empty((1, 2), np.float32)
    assert _core.read_bandwidth(Exporter(memory.ctypes.data, (4, 16)), 1) > 0
    _core.similarity_scores(Exporter(memory.ctypes.data, (1, 2, 2, 16)), 1, scores, 1)
    for call in (
        lambda x: _core.read_bandwidth(x, 1),
        lambda x: _core.similarity_scores(x, 1, scores, 1),
        lambda x: _core.pick_boundaries(x, 1, 0.0, 1, None, scores),
    ):
        with pytest.raises(ValueError, match="has no data"):
            call(Exporter(None, (1, 2, 2, 16)))
        with pytest.raises(ValueError, match="dimension 1 has size -2"):
            call(Exporter(memory.ctypes.data, (1, -2, 2, 16)))
    with pytest.raises(ValueError, match="array: expected contiguous memory"):
        _core.read_bandwidth(Exporter(memory.ctypes.data, (1 << 40, 1 << 40)), 1)
    with pytest.raises(ValueError, match="array: expected contiguous memory"):
        _core.read_bandwidth(Exporter(memory.ctypes.data, (0, 1 << 40)), 1)


PROGRAM = """
import torch
import transformers.modeling_utils  # cannot be imported under such a device with every release of torch
torch.set_default_device("meta")
torch.set_default_dtype(torch.float64)
import dhsa
q, k, v = (torch.randn(1, 2, 60, 16, device="cpu", dtype=torch.float32) for _ in range(3))
config = dhsa.Config(budget=16, sink=2, local=4, query_block=8, dense_tail=0)
for out in (dhsa.attention(q, k, v), dhsa.attention(q, k, v, config, return_lse=True)[0]):
    assert out.device.type == "cpu" and out.dtype == torch.float32 and out.isfinite().all()
selection = dhsa.select(q, k, config)
assert torch.equal(dhsa.sparse_attention(q, k, v, selection), dhsa.attention(q, k, v, config))
assert dhsa.boundaries(k, config).device.type == "cpu"

from types import SimpleNamespace
from dhsa.evaluation.likelihood import likelihood
from dhsa.evaluation.tasks.output import _block_mass
from dhsa.training.networks import build, focal_loss
from dhsa.training.settings import Settings
head = SimpleNamespace(weight=torch.randn(50, 16, device="cpu", dtype=torch.float32), bias=None)
settings = SimpleNamespace(get_text_config=lambda: SimpleNamespace(final_logit_softcapping=None))
model = SimpleNamespace(get_output_embeddings=lambda: head, config=settings)
told, hits = likelihood(model, q[0, 0], torch.ones(60, dtype=torch.long, device="cpu"), True)
assert told.device.type == hits.device.type == "cpu" and told.isfinite().all() and told.dtype == torch.float64
mass = _block_mass(q[0], k[0], 0, None, 0.25, None)
assert mass.device.type == "cpu" and mass.isfinite().all()
for architecture in ("compact", "attention"):
    network = build(Settings(architecture=architecture), 32, 1.0, 0)
    logits = network(k[0].transpose(0, 1).reshape(60, 32))
    assert logits.device.type == "cpu" and logits.dtype == torch.float32
    assert focal_loss(logits, torch.zeros_like(logits), gamma=2.0, pos_weight=3.0).isfinite()
"""


def test_default_device_and_dtype_of_torch():
    pytest.importorskip("torch", reason="needs the hf extra: torch")
    pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_default_device_around_a_whole_model():
    """Of a kind whose own code names its devices."""
    torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
    pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    from tiny import SPARSE, build, padded

    model = build("llama")
    ids, mask = padded([150, 90], 150, "left")
    with torch.no_grad(), dhsa.patched(model, SPARSE):
        want = model(ids, attention_mask=mask).logits
        assert any(run.path == "sparse" for run in dhsa.last_run(model))
        with torch.device("meta"):
            assert torch.equal(model(ids, attention_mask=mask).logits, want)


def test_default_device_around_a_patched_model():
    torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
    pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    from tiny import SPARSE, build, padded

    model = build("gemma2")
    _, mask = padded([150, 90], 150, "left")
    with torch.no_grad(), dhsa.patched(model, SPARSE):
        expected = model.model.layers[1].self_attn  # a layer that sees everything
        hidden = torch.randn(2, 150, model.config.hidden_size)
        rotary = model.model.rotary_emb(hidden, torch.arange(150)[None])
        table = dhsa.hf.key_range_mask(2, 150, 150, attention_mask=mask.bool())
        want = expected(hidden, position_embeddings=rotary, attention_mask=table)[0]
        with torch.device("meta"):
            again = dhsa.hf.key_range_mask(2, 150, 150, attention_mask=mask.bool())
            got = expected(hidden, position_embeddings=rotary, attention_mask=again)[0]
    assert torch.equal(table, again)
    assert torch.equal(want, got)
