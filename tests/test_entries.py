"""What the C entries and the functions around them take and refuse at their edges: exporters without strides, more CPUs
than threads, empty dimensions, names that are no names, numbers beyond what a list can hold, default devices."""

import ctypes
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


@pytest.mark.parametrize("name", ["scalar\0junk", "a" + "\u00e9" * 30, "", "\0"])
def test_names_of_no_tier(name):
    before = dhsa.build_info()["isa"]
    with pytest.raises(ValueError, match=r"isa: .* is not a tier"):
        dhsa.set_isa(name)
    assert dhsa.build_info()["isa"] == before


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


PROGRAM = """
import torch
torch.set_default_device("meta")
torch.set_default_dtype(torch.float64)
import dhsa
q, k, v = (torch.randn(1, 2, 60, 16, device="cpu", dtype=torch.float32) for _ in range(3))
config = dhsa.Config(budget=16, sink=2, local=4, query_block=8, dense_tail=0)
for out in (dhsa.attention(q, k, v), dhsa.attention(q, k, v, config, return_lse=True)[0]):
    assert out.device.type == "cpu" and out.dtype == torch.float32 and out.isfinite().all()
"""


def test_default_device_and_dtype_of_torch():
    pytest.importorskip("torch", reason="needs the hf extra: torch")
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


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
