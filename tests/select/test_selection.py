"""Selection: validated construction, immutability, masks and density, and its use in sparse_attention.

Not here: how selections are found (test_select.py) and refused ones (test_bad_input.py).
"""

import pickle

import numpy as np
import pytest
import vectors
from tiers import every_tier

import dhsa
from dhsa import reference


def test_selection_from_indices(make_qkv):
    q, k, v = make_qkv(1, 2, 1, 7, 9, 8)
    indptr, indices = [0, 3, 3, 6], [0, 2, 5, 1, 3, 8]
    selection = dhsa.Selection.from_indices(indptr, indices, shape=(1, 1, 3), query_block=3)
    assert (selection.indptr.dtype, selection.indices.dtype) == (np.int64, np.int32)
    out, lse = dhsa.sparse_attention(q, k, v, selection, return_lse=True)
    want, want_lse = reference.sparse_attention(q, k, v, selection, return_lse=True)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)
    assert (lse[0, :, 3:6] == -np.inf).all()  # the empty list
    assert (out[0, :, 3:6] == 0).all()
    empty = dhsa.Selection.from_indices([0, 0], [], shape=(1, 1, 1), query_block=16)
    assert (dhsa.sparse_attention(q, k, v, empty) == 0).all()


def test_selection_is_immutable():
    indices = np.array([0, 2, 5], np.int32)
    selection = dhsa.Selection.from_indices([0, 3], indices, shape=(1, 1, 1), query_block=4, q_len=3, k_len=8)
    indices[0] = 99  # it made a copy
    assert selection.indices[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        selection.indices[0] = 1
    with pytest.raises(AttributeError, match="immutable"):
        selection.query_block = 8
    with pytest.raises(AttributeError, match="immutable"):
        del selection.indices
    with pytest.raises(TypeError, match="from_indices"):
        dhsa.Selection([0], [])
    same = pickle.loads(pickle.dumps(selection))
    assert same == selection
    assert (same.q_len, same.k_len) == (3, 8)
    assert "k_len=8" in repr(selection)


@pytest.mark.parametrize("window", [None, 20])
def test_mask_round_trip_and_density(make_qkv, window):
    q, k, _ = make_qkv(2, 4, 2, 70, 90, 8)
    # A budget above the window would take blocks whole; this one leaves keys out of windows too.
    config = dhsa.Config(budget=12, query_block=16, sink=2, local=4, dense_tail=0)
    selection = dhsa.select(q, k, config, window=window)
    whole, seen = selection.mask(), selection.mask(causal=True)
    assert whole.shape == seen.shape == (2, 4, 70, 90)
    assert whole.dtype == np.bool_
    np.testing.assert_array_equal(whole, reference.selection_mask(selection, 70, 90))
    position, key = np.arange(70)[:, None] + 20, np.arange(90)
    visible = (key <= position) & (key > position - (window or 1000))
    np.testing.assert_array_equal(seen, whole & visible)
    assert selection.density() == pytest.approx(seen.sum() / (visible.sum() * 2 * 4))
    assert 0 < selection.density() < 1
    assert dhsa.Selection.from_mask(whole, query_block=16) == selection or window is not None
    from_seen = dhsa.Selection.from_mask(seen, query_block=16, window=window)
    np.testing.assert_array_equal(from_seen.mask(causal=True), seen)


def test_density_of_many_queries_costs_no_memory_for_each():
    lists = dhsa.Selection.from_indices([0] * 16384 + [1], [5], shape=(1, 1, 16384), query_block=65536)
    assert lists.density() == pytest.approx(65536 / (2.0**30 * (2**30 + 1) / 2))


@pytest.mark.parametrize("window", [90, 2**62, 2**63 - 1])
def test_a_window_wider_than_the_keys_is_none(make_qkv, window):
    q, k, v = make_qkv(1, 4, 2, 60, 90, 8)
    config = dhsa.Config(budget=24, query_block=16, sink=2, local=4, dense_tail=0)
    want, selection = dhsa.select(q, k, config), dhsa.select(q, k, config, window=window)
    assert selection == want
    assert selection.density() == want.density()
    np.testing.assert_array_equal(selection.mask(causal=True), want.mask(causal=True))
    assert dhsa.Selection.from_mask(want.mask(), query_block=16, window=window) == want
    out = dhsa.sparse_attention(q, k, v, selection, window=window)
    np.testing.assert_array_equal(out, dhsa.attention(q, k, v, config))


def test_from_mask_is_what_sdpa_does(torch, make_qkv):
    q, k, v = make_qkv(1, 4, 2, 24, 24, 8)
    rng = np.random.default_rng(2)
    mask = np.repeat(rng.random((1, 4, 3, 24)) < 0.6, 8, axis=2)
    mask |= np.eye(24, dtype=bool)  # a row without keys is NaN there
    for block in range(3):
        part = mask[:, :, block * 8 : block * 8 + 8]
        part |= part.any(axis=2, keepdims=True)
    selection = dhsa.Selection.from_mask(torch.from_numpy(mask), query_block=8)
    assert selection.shape == (1, 4, 3)
    attend = torch.nn.functional.scaled_dot_product_attention
    wide = [torch.from_numpy(x) for x in (q, k.repeat(2, axis=1), v.repeat(2, axis=1))]
    want = attend(*wide, attn_mask=torch.from_numpy(mask & np.tri(24, dtype=bool)))
    np.testing.assert_allclose(dhsa.sparse_attention(q, k, v, selection), want.numpy(), atol=3e-6)


@pytest.mark.parametrize("case", vectors.params("attend"))
@every_tier
def test_attend_vectors(case, tier):
    inputs = dict(case.inputs)
    options = {name: inputs.pop(name) for name in ("indptr", "indices", "shape", "query_block")}
    selection = dhsa.Selection.from_indices(**options)
    out, lse = dhsa.sparse_attention(**inputs, selection=selection, return_lse=True)
    np.testing.assert_allclose(out, case.expected["out"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse, case.expected["lse"], rtol=1e-4)
