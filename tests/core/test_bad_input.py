"""Every kind of bad input: a Python exception of the right type that names the argument, and a process that lives on.

After each refusal the same process computes a known answer. NaN and infinity are no errors: they reach the rows that
see them, as in exact attention, and only those.
"""

import math

import numpy as np
import pytest
from weights import random_weights

import dhsa
from dhsa import _core, reference

SPARSE = dhsa.Config(budget=16, query_block=8, sink=2, local=4, dense_tail=0)


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def good():
    """q, k, v that fit each other: B 1, H 4, Hkv 2, Lq 10, Lk 12, D 8."""
    return normal(1, 4, 10, 8), normal(1, 2, 12, 8, seed=1), normal(1, 2, 12, 8, seed=2)


def read_only(x):
    x = x.copy()
    x.setflags(write=False)
    return x


@pytest.fixture(autouse=True)
def process_lives_on():
    yield
    q, k, v = good()
    np.testing.assert_allclose(dhsa.attention(q, k, v), reference.attention(q, k, v), atol=3e-6)


def unaligned(x):
    raw = np.empty(x.nbytes + 1, np.uint8)[1:]
    raw[:] = x.reshape(-1).view(np.uint8)
    return raw.view(x.dtype).reshape(x.shape)


def odd_stride():
    """q-shaped, its heads 322 bytes apart: half a number off."""
    return np.ndarray((1, 4, 10, 8), np.float32, bytes(4 * 322), 0, (1290, 322, 32, 4))


def strided(strides):
    return np.lib.stride_tricks.as_strided(np.zeros(500, np.float32), (1, 4, 10, 8), strides)


q, k, v = good()
CALLS = {
    # rank, size, heads
    "q rank": (lambda: dhsa.attention(q[0], k, v), ValueError, r"^q: expected 4 dimensions \[B, H, Lq, D\], got 3"),
    "k rank": (lambda: dhsa.attention(q, k[0], v), ValueError, r"^k: expected 4 dimensions \[B, Hkv, Lk, D\], got 3"),
    "v rank": (lambda: dhsa.attention(q, k, v[None]), ValueError, r"^v: expected 4 dimensions .*, got 5"),
    "k rank, sparse": (lambda: dhsa.attention(q, k[0], v, SPARSE), ValueError, r"^k: expected 4 dimensions"),
    "q scalar": (lambda: dhsa.attention(np.float32(1), k, v), TypeError, r"^q: "),
    "q 0-d": (lambda: dhsa.attention(np.array(1.0, np.float32), k, v), ValueError, r"^q: expected 4 dimensions"),
    "batch": (lambda: dhsa.attention(q, k.repeat(2, 0), v.repeat(2, 0)), ValueError, r"^k: batch"),
    "v batch": (lambda: dhsa.attention(q, k, v.repeat(2, 0)), ValueError, r"^v: "),
    "v length": (lambda: dhsa.attention(q, k, v[:, :, :5]), ValueError, r"^v: "),
    "k head_dim": (lambda: dhsa.attention(q, k[..., :4], v[..., :4]), ValueError, r"^k: head_dim"),
    "heads do not divide": (
        lambda: dhsa.attention(normal(1, 3, 4, 8), k, v), ValueError, r"^k: 2 heads do not divide the 3 heads of q"),
    "more KV heads": (lambda: dhsa.attention(q[:, :1], k, v), ValueError, r"^k: .*heads"),
    "Lq > Lk": (lambda: dhsa.attention(normal(1, 4, 13, 8), k, v), ValueError, r"^q: 13 queries"),
    "Lq > Lk, sparse": (lambda: dhsa.attention(normal(1, 4, 13, 8), k, v, SPARSE), ValueError, r"^q: 13 queries"),
    "Lq > Lk, select": (lambda: dhsa.select(normal(1, 4, 13, 8), k, SPARSE), ValueError, r"^q: "),
    "empty Lq": (lambda: dhsa.attention(q[:, :, :0], k, v), ValueError, r"^q: dimension 2 has size 0"),
    "empty Lk": (lambda: dhsa.attention(q, k[:, :, :0], v[:, :, :0]), ValueError, r"^k: dimension 2 has size 0"),
    "empty batch": (lambda: dhsa.attention(q[:0], k[:0], v[:0]), ValueError, r"^q: dimension 0 has size 0"),
    "empty heads": (lambda: dhsa.attention(q, k[:, :0], v[:, :0]), ValueError, r"^k: dimension 1 has size 0"),
    "empty head_dim": (lambda: dhsa.attention(q[..., :0], k[..., :0], v[..., :0]), ValueError, r"^q: dimension 3"),
    "empty, sparse": (lambda: dhsa.attention(q, k[:, :, :0], v[:, :, :0], SPARSE), ValueError, r"^k: "),
    "empty k, boundaries": (lambda: dhsa.boundaries(k[:, :, :0], SPARSE), ValueError, r"^k: "),
    "huge": (
        lambda: dhsa.attention(*[np.broadcast_to(np.float32(0), (1, 1, 2**31, 2**16))] * 3),
        (ValueError, MemoryError), r"^(out|q): "),
    "huge length, selection": (
        lambda: dhsa.select(q, np.broadcast_to(np.float32(0), (1, 2, 2**40, 8)), SPARSE), ValueError, r"^k: "),
    "huge length, boundaries": (
        lambda: dhsa.boundaries(np.broadcast_to(np.float32(0), (1, 2, 2**40, 8)), SPARSE), ValueError, r"^k: "),
    "huge queries, selection": (
        lambda: dhsa.select(np.broadcast_to(np.float32(0), (1, 4, 2**40, 8)), k, SPARSE),
        ValueError, r"^q: its length"),
    "huge batch, selection": (
        lambda: dhsa.select(*[np.broadcast_to(np.float32(0), (2**50, 2, 10, 8))] * 2, SPARSE),
        MemoryError, r"^q: cannot"),
    "huge batch, boundaries": (
        lambda: dhsa.boundaries(np.broadcast_to(np.float32(0), (2**50, 2, 10, 8)), SPARSE), MemoryError, r"^k: cannot"),
    "huge batch, scores": (
        lambda: dhsa.chunk_scores(
            *[np.broadcast_to(np.float32(0), (2**50, 2, 10, 8))] * 2, np.array([[0, 10]]), query_block=5),
        MemoryError, r"^boundaries: cannot"),
    "empty Lq, selection": (lambda: dhsa.select(q[:, :, :0], k, SPARSE), ValueError, r"^q: dimension 2 has size 0"),
    "empty batch, selection": (lambda: dhsa.select(q[:0], k[:0], SPARSE), ValueError, r"^q: dimension 0 has size 0"),
    "empty heads, selection": (lambda: dhsa.select(q, k[:, :0], SPARSE), ValueError, r"^k: dimension 1 has size 0"),
    "empty batch, scores": (
        lambda: dhsa.chunk_scores(q[:0], k[:0], np.array([[0, 12]]), query_block=5),
        ValueError, r"^q: dimension 0 has size 0"),
    "batch, scores": (
        lambda: dhsa.chunk_scores(q, k.repeat(2, 0), np.array([[0, 12]]), query_block=5),
        ValueError, r"^k: batch is 2, expected 1 as q"),
    "head_dim 577": (
        lambda: dhsa.attention(*[np.zeros((1, 1, 2, 577), np.float32)] * 2, np.zeros((1, 1, 2, 8), np.float32)),
        NotImplementedError, r"^q: head_dim 577 is not supported yet, at most 576"),
    "values of 513": (
        lambda: dhsa.attention(q, k, normal(1, 2, 12, 513)),
        NotImplementedError, r"^v: head_dim 513 is not supported yet, at most 512"),
    "values of 0": (lambda: dhsa.attention(q, k, v[..., :0]), ValueError, r"^v: dimension 3 has size 0"),
    "v rank, of another width": (lambda: dhsa.attention(q, k, v[0, ..., :5]), ValueError, r"^v: expected 4 dimensions"),
    "out of the keys' width": (
        lambda: dhsa.attention(q, k, v[..., :5], out=np.zeros_like(q)),
        ValueError, r"^out: dimension 3 has size 8, expected 5 as v"),
    # dtypes, kinds
    "float64": (
        lambda: dhsa.attention(*(x.astype(np.float64) for x in (q, k, v))),
        TypeError, r"^q: expected .*got float64"),
    "int": (lambda: dhsa.attention(q, k, v.astype(np.int32)), TypeError, r"^v: expected .*got int32"),
    "bool": (lambda: dhsa.attention(q, k.astype(bool), v), TypeError, r"^k: expected .*got bool"),
    "complex": (lambda: dhsa.attention(q.astype(np.complex64), k, v), TypeError, r"^q: unsupported dtype"),
    "objects": (lambda: dhsa.attention(q.astype(object), k, v), TypeError, r"^q: unsupported dtype"),
    "other byte order": (
        lambda: dhsa.attention(q.astype(">f4"), k, v),
        TypeError, r"^q: unsupported dtype.*byte order"),
    "mixed dtypes, k": (
        lambda: dhsa.attention(q, k.astype(np.float16), v),
        TypeError, r"^k: dtype is float16, expected float32"),
    "mixed dtypes, v": (lambda: dhsa.attention(q, k, v.astype(np.float16)), TypeError, r"^v: dtype is float16"),
    "mixed dtypes, select": (lambda: dhsa.select(q, k.astype(np.float16), SPARSE), TypeError, r"^k: dtype is float16"),
    "list": (lambda: dhsa.attention(q.tolist(), k, v), TypeError, r"^q: expected a NumPy array.*got list"),
    "None": (lambda: dhsa.attention(q, None, v), TypeError, r"^k: expected a NumPy array.*got NoneType"),
    "masked array": (lambda: dhsa.attention(np.ma.masked_less(q, 0), k, v), TypeError, r"^q: masked arrays"),
    # strides, memory
    "last dim strided": (
        lambda: dhsa.attention(normal(1, 4, 10, 16)[..., ::2], k, v),
        ValueError, r"^q: the last dimension.*stride 2"),
    "last dim reversed": (lambda: dhsa.attention(q, k[..., ::-1], v), ValueError, r"^k: the last dimension.*stride -1"),
    "transposed": (
        lambda: dhsa.attention(q, k, v.swapaxes(2, 3).copy().swapaxes(2, 3)),
        ValueError, r"^v: the last dimension"),
    "unaligned": (lambda: dhsa.attention(unaligned(q), k, v), ValueError, r"^q: its memory is not aligned"),
    "odd stride": (
        lambda: dhsa.attention(odd_stride(), k, v),
        ValueError, r"^q: stride 322"),
    "out aliases q": (lambda: dhsa.attention(q, k, v, out=q), ValueError, r"^out: shares memory with q"),
    "out aliases v": (lambda: alias_v(), ValueError, r"^out: shares memory with v"),
    "out overlaps itself": (
        lambda: dhsa.attention(q, k, v, out=strided((0, 4, 32, 4))),
        ValueError, r"^out: its elements overlap"),
    "out expanded": (
        lambda: dhsa.attention(q, k, v, out=strided((0, 0, 32, 4))),
        ValueError, r"^out: its elements overlap"),
    "out read-only": (lambda: dhsa.attention(q, k, v, out=read_only(q)), ValueError, r"^out: is read-only"),
    "out shape": (
        lambda: dhsa.attention(q, k, v, out=np.zeros((1, 4, 9, 8), np.float32)),
        ValueError, r"^out: dimension 2"),
    "out dtype": (
        lambda: dhsa.attention(q, k, v, out=np.zeros(q.shape, np.float16)),
        TypeError, r"^out: dtype is float16"),
    "out kind": (lambda: dhsa.attention(q, k, v, out=[1]), TypeError, r"^out: expected a NumPy array.*got list"),
    # numbers
    "scale type": (lambda: dhsa.attention(q, k, v, scale="1"), TypeError, r"^scale: expected a number, got str"),
    "scale nan": (lambda: dhsa.attention(q, k, v, scale=math.nan), ValueError, r"^scale: expected a finite number"),
    "scale inf": (
        lambda: dhsa.attention(q, k, v, SPARSE, scale=math.inf),
        ValueError, r"^scale: expected a finite number"),
    "scale beyond float32": (lambda: dhsa.attention(q, k, v, scale=1e39), ValueError, r"^scale: .*at most 1e38"),
    "softcap beyond float32": (lambda: dhsa.attention(q, k, v, softcap=1e40), ValueError, r"^softcap: .*1e-30 to 1e38"),
    "softcap below float32": (lambda: dhsa.attention(q, k, v, SPARSE, softcap=1e-46), ValueError, r"^softcap: "),
    "softcap far below scale": (
        lambda: dhsa.attention(q, k, v, scale=1e20, softcap=1e-20), ValueError, r"^softcap: .*of the scale"),
    "scale beyond float32, scores": (
        lambda: dhsa.chunk_scores(q, k, np.array([[0, 12]]), query_block=5, score="rows", scale=-1e39),
        ValueError, r"^scale: "),
    "softcap 0": (
        lambda: dhsa.attention(q, k, v, softcap=0),
        ValueError, r"^softcap: expected None or a number above 0"),
    "softcap below 0": (lambda: dhsa.attention(q, k, v, softcap=-5.0), ValueError, r"^softcap: "),
    "softcap bool": (
        lambda: dhsa.attention(q, k, v, softcap=True),
        TypeError, r"^softcap: expected a number, got bool"),
    "window 0": (lambda: dhsa.attention(q, k, v, window=0), ValueError, r"^window: expected at least 1, got 0"),
    "window float": (lambda: dhsa.attention(q, k, v, window=2.0), TypeError, r"^window: expected an int, got float"),
    "window bool": (lambda: dhsa.attention(q, k, v, window=True), TypeError, r"^window: expected an int, got bool"),
    "window overflow": (
        lambda: dhsa.attention(q, k, v, window=2**70), ValueError, r"^window: expected 1 to 9223372036854775807, got"),
    "both sides, of a causal method": (
        lambda: dhsa.attention(q, k, v, dhsa.Config(method="hisa", budget=8), causal=False),
        NotImplementedError, r"^causal: method hisa selects for causal attention only; rows, block and window serve"),
    "both sides, select": (
        lambda: dhsa.select(q, k, dhsa.Config(method="dhsa", budget=8), causal=False),
        NotImplementedError, r"^causal: method dhsa"),
    "both sides, Lq > Lk": (
        lambda: dhsa.attention(normal(1, 4, 13, 8), k, v, SPARSE, causal=False), ValueError, r"^q: 13 queries"),
    "both sides, window, Lq > Lk": (
        lambda: dhsa.attention(normal(1, 4, 13, 8), k, v, window=4, causal=False), ValueError, r"^q: 13 queries"),
    "both sides, key indexes": (
        lambda: dhsa.functional.run(q, k, v, SPARSE, key_indexes=(_core.KeyIndex(),), causal=False),
        NotImplementedError, r"^key_indexes: only causal attention"),
    "both sides, boundaries unsorted": (
        lambda: dhsa.functional.run(q, k, v, SPARSE, boundaries=cut([0, 7, 5, 12]), causal=False),
        ValueError, r"^boundaries: "),
    "sinks kind": (lambda: dhsa.attention(q, k, v, sinks=[0.0] * 4), TypeError, r"^sinks: expected a NumPy array"),
    "sinks dtype": (
        lambda: dhsa.attention(q, k, v, sinks=np.zeros(4, np.float16)),
        TypeError, r"^sinks: dtype is float16, expected float32$"),
    "sinks dtype, of halves": (
        lambda: dhsa.attention(*(x.astype(np.float16) for x in (q, k, v)), sinks=np.zeros(4)),
        TypeError, r"^sinks: dtype is float64, expected float32 or float16$"),
    "sinks size": (lambda: dhsa.attention(q, k, v, sinks=normal(2)), ValueError, r"^sinks: expected size 4"),
    "sinks rank": (lambda: dhsa.attention(q, k, v, sinks=normal(1, 4)), ValueError, r"^sinks: expected 1 dimension"),
    "sinks scalar": (
        lambda: dhsa.attention(q, k, v, sinks=np.array(0, np.float32)), ValueError, r"^sinks: expected 1 dimension"),
    "sinks nan": (
        lambda: dhsa.attention(q, k, v, SPARSE, sinks=np.float32([0, math.nan, 0, 0])),
        ValueError, r"^sinks: that of head 1 is -?nan"),
    "sinks inf": (
        lambda: dhsa.attention(q, k, v, sinks=np.float32([0, 0, 0, math.inf])),
        ValueError, r"^sinks: that of head 3 is inf, expected a number of at most 1e38 or -inf"),
    "sinks beyond 1e38": (
        lambda: dhsa.attention(q, k, v, sinks=np.float32([-2e38, 0, 0, 0])), ValueError, r"^sinks: that of head 0"),
    "ranges shape": (
        lambda: dhsa.attention(q, k, v, key_ranges=np.zeros((1, 10), int)),
        ValueError, r"^key_ranges: expected 3"),
    "ranges size": (
        lambda: dhsa.attention(q, k, v, key_ranges=np.zeros((1, 9, 2), int)),
        ValueError, r"^key_ranges: expected size 10"),
    "ranges dtype": (
        lambda: dhsa.attention(q, k, v, key_ranges=np.zeros((1, 10, 2))),
        TypeError, r"^key_ranges: expected integers"),
    "ranges past the end": (
        lambda: dhsa.attention(q, k, v, key_ranges=np.full((1, 10, 2), 13)),
        ValueError, r"^key_ranges: row 0"),
    "ranges reversed": (
        lambda: dhsa.attention(q, k, v, key_ranges=np.tile([3, 2], (1, 10, 1))),
        ValueError, r"^key_ranges: row 0 is \[3, 2\)"),
    "ranges overflow": (
        lambda: dhsa.attention(q, k, v, key_ranges=np.full((1, 10, 2), 2**40)),
        ValueError, r"^key_ranges: .*fit"),
    "ranges, sparse": (
        lambda: dhsa.attention(q, k, v, SPARSE, key_ranges=np.zeros((1, 10, 2), int)),
        NotImplementedError, r"^key_ranges: "),
    "config type": (
        lambda: dhsa.attention(q, k, v, {"budget": 4}),
        TypeError, r"^config: expected a dhsa.Config or None, got dict"),
    "config type, select": (
        lambda: dhsa.select(q, k, None),
        TypeError, r"^config: expected a dhsa.Config, got NoneType"),
    "unknown keyword": (lambda: dhsa.attention(q, k, v, windw=3), TypeError, "windw"),
    # settings
    "threads 0": (lambda: dhsa.set_num_threads(0), ValueError, r"^n: expected 1 to 1024, got 0"),
    "threads below 0": (lambda: dhsa.set_num_threads(-3), ValueError, r"^n: "),
    "threads absurd": (lambda: dhsa.set_num_threads(100_000), ValueError, r"^n: expected 1 to 1024, got 100000"),
    "threads overflow": (lambda: dhsa.set_num_threads(2**100), ValueError, r"^n: "),
    "threads float": (lambda: dhsa.set_num_threads(2.5), TypeError, r"^n: expected an int, got float"),
    "threads bool": (lambda: dhsa.set_num_threads(True), TypeError, r"^n: expected an int, got bool"),
    "threads str": (lambda: dhsa.set_num_threads("4"), TypeError, r"^n: expected an int, got str"),
    "isa unknown": (lambda: dhsa.set_isa("sse9"), ValueError, "sse9"),
    "isa type": (lambda: dhsa.set_isa(None), TypeError, r"^name: expected a str"),
}  # fmt: skip


def alias_v():
    memory = normal(1, 4, 12, 8)
    return dhsa.attention(memory[:, :, :10].copy(), k, memory[:, 1:3], out=memory[:, :, 1:11])


def cut(*rows):
    return np.array(rows, np.int32)


def from_indices(indptr, indices, shape=(1, 1, 2), query_block=5, **lengths):
    return dhsa.Selection.from_indices(indptr, indices, shape=shape, query_block=query_block, **lengths)


def attend(*args, **options):
    return dhsa.sparse_attention(q, k, v, from_indices(*args, **options))


def scores(boundaries=None, **options):
    cuts = cut([0, 5, 12]) if boundaries is None else boundaries
    return dhsa.chunk_scores(q, k, cuts, **{"query_block": 5, **options})


SELECTION_CALLS = {
    # boundaries
    "boundaries begin late": (lambda: scores(cut([1, 5, 12])), ValueError, r"^boundaries: "),
    "boundaries end early": (lambda: scores(cut([0, 5, 11])), ValueError, r"^boundaries: "),
    "boundaries end late": (lambda: scores(cut([0, 5, 13])), ValueError, r"^boundaries: "),
    "boundaries unsorted": (lambda: scores(cut([0, 7, 5, 12])), ValueError, r"^boundaries: "),
    "boundaries negative": (lambda: scores(cut([0, -5, 12])), ValueError, r"^boundaries: "),
    "boundaries rise after padding": (lambda: scores(cut([0, 12, 5, 12])), ValueError, r"^boundaries: "),
    "boundaries huge": (lambda: scores(np.array([[0, 2**33, 12]])), ValueError, r"^boundaries: .*does not fit int32"),
    "boundaries floats": (lambda: scores(np.array([[0.0, 12.0]])), TypeError, r"^boundaries: expected integers"),
    "boundaries one": (lambda: scores(cut([12])), ValueError, r"^boundaries: expected at least the two"),
    "boundaries rank": (lambda: scores(cut([[0, 12]])), ValueError, r"^boundaries: expected 2 dimensions"),
    "boundaries batch": (lambda: scores(cut([0, 12], [0, 12])), ValueError, r"^boundaries: expected 1 rows"),
    "boundaries, select": (
        lambda: dhsa.select(q, k, SPARSE, boundaries=cut([0, 7, 5, 12])),
        ValueError, r"^boundaries: "),
    "score": (lambda: scores(score="best"), ValueError, r"^score: expected one of 'rows', 'block', got 'best'"),
    "pooling": (lambda: scores(pooling=3), TypeError, r"^pooling: expected one of .*got int"),
    "heads": (lambda: scores(heads="any"), ValueError, r"^heads: "),
    "both sides, block score": (lambda: scores(causal=False), NotImplementedError, r"^causal: the block score"),
    "sinks of a selection": (
        lambda: dhsa.sparse_attention(q, k, v, from_indices([0, 0, 0], []), sinks=normal(5)), ValueError, r"^sinks: "),
    "causal type": (
        lambda: from_indices([0, 0, 0], [], causal=0), TypeError, r"^causal: expected a bool, got int"),
    "causal type, mask": (
        lambda: dhsa.Selection.from_mask(np.ones((1, 1, 4, 4), bool), query_block=2, causal="no"),
        TypeError, r"^causal: expected a bool, got str"),
    "mask rows differ after the query": (
        lambda: dhsa.Selection.from_mask(np.tri(4, dtype=bool)[None, None], query_block=2, causal=False),
        ValueError, r"^mask: query 0 of \[0, 0\] sees other keys"),
    "query_block 0": (lambda: scores(query_block=0), ValueError, r"^query_block: expected 1 to 65536, got 0"),
    "rows": (lambda: scores(score="rows", rows=6), ValueError, r"^rows: expected 1 to 5, got 6"),
    "pick n": (lambda: dhsa.pick_boundaries([1.0, 2.0], -1, theta=0, nms=0), ValueError, r"^n: "),
    "pick theta": (lambda: dhsa.pick_boundaries([1.0, 2.0], 1, theta=math.nan, nms=0), ValueError, r"^theta: "),
    "pick nms": (lambda: dhsa.pick_boundaries([1.0, 2.0], 1, theta=0, nms=-1), ValueError, r"^nms: "),
    "pick instruction": (
        lambda: dhsa.pick_boundaries([1.0, 2.0], 1, theta=0, nms=0, instruction=3), ValueError, r"^instruction: "),
    "pick rank": (
        lambda: dhsa.pick_boundaries([[1.0, 2.0]], 1, theta=0, nms=0),
        ValueError, r"^scores: expected 1 dim"),
    "pick empty": (lambda: dhsa.pick_boundaries(np.empty(0), 1, theta=0, nms=0), ValueError, r"^scores: "),
    "pick theta, wide scores": (
        lambda: dhsa.pick_boundaries([0.1, 0.2], 1, theta="x", nms=0),
        TypeError, r"^theta: expected a number, got str"),
    "pick theta nan, wide scores": (
        lambda: dhsa.pick_boundaries([0.1, 0.2], 1, theta=math.nan, nms=0), ValueError, r"^theta: "),
    "pick theta bool, wide scores": (
        lambda: dhsa.pick_boundaries([0.1, 0.2], 1, theta=True, nms=0), TypeError, r"^theta: "),
    "pick dtype": (lambda: dhsa.pick_boundaries(["a"], 1, theta=0, nms=0), TypeError, r"^scores: expected real"),
    "ratios square": (lambda: dhsa.boundary_ratios(normal(4, 5), window=2), ValueError, r"^attn: expected one square"),
    "ratios dtype": (lambda: dhsa.boundary_ratios(np.eye(4, dtype=int), window=2), TypeError, r"^attn: expected float"),
    "ratios window": (lambda: dhsa.boundary_ratios(normal(9, 9), window=0), ValueError, r"^window: "),
    "ratios sliding": (
        lambda: dhsa.boundary_ratios(normal(9, 9), window=2, sliding_window=0), ValueError, r"^sliding_window: "),
    # selections on their own
    "indptr length": (lambda: from_indices([0, 1], [0]), ValueError, r"^indptr: expected .* = 3 entries, got 2"),
    "indptr start": (lambda: from_indices([1, 1, 2], [0, 1]), ValueError, r"^indptr: must begin with 0"),
    "indptr falls": (lambda: from_indices([0, 2, 1], [0, 1]), ValueError, r"^indptr: falls from 2 to 1 after row 1"),
    "indptr falls inside": (
        lambda: from_indices([0, 3, 1, 2], [0, 1], shape=(1, 1, 3)), ValueError, r"^indptr: falls from 3 to 1"),
    "indptr end": (lambda: from_indices([0, 1, 3], [0, 1]), ValueError, r"^indptr: ends with 3, but there are 2"),
    "indptr floats": (lambda: from_indices([0.0, 1.0, 2.0], [0, 1]), TypeError, r"^indptr: expected integers"),
    "indptr ragged": (lambda: from_indices([[0], [1, 2]], [0, 1]), ValueError, r"^indptr: cannot be read as an array"),
    "indptr rank": (lambda: from_indices([[0, 1, 2]], [0, 1]), ValueError, r"^indptr: expected 1 dimension"),
    "indices unsorted": (lambda: from_indices([0, 2, 4], [3, 4, 2, 1]), ValueError, r"^indices: must ascend.*in row 1"),
    "indices repeat": (
        lambda: from_indices([0, 2, 2], [3, 3]),
        ValueError, r"^indices: must ascend.*3 then 3 in row 0"),
    "indices negative": (lambda: from_indices([0, 1, 2], [0, -1]), ValueError, r"^indices: .*got -1 in row 1"),
    "indices out of known range": (
        lambda: from_indices([0, 1, 2], [0, 12], q_len=10, k_len=12),
        ValueError, r"^indices: expected 0 to 11, got 12 in row 1"),
    "indices overflow": (
        lambda: from_indices([0, 1, 2], [0, 2**31]),
        ValueError, r"^indices: 2147483648 does not fit int32"),
    "shape": (lambda: from_indices([0, 1], [0], shape=(1, 1)), ValueError, r"^shape: expected \(B, heads, nq\)"),
    "shape zero": (lambda: from_indices([0], [], shape=(1, 0, 2)), ValueError, r"^shape\[1\]: expected 1 to"),
    "shape type": (lambda: from_indices([0], [], shape=3), TypeError, r"^shape: "),
    "shape floats": (lambda: from_indices([0], [], shape=(1, 1, 1.5)), TypeError, r"^shape\[2\]: expected an int"),
    "block": (lambda: from_indices([0, 1, 2], [0, 1], query_block=0), ValueError, r"^query_block: "),
    "q_len": (lambda: from_indices([0, 1, 2], [0, 1], q_len=4), ValueError, r"^q_len: 4 queries are 1 blocks"),
    "k_len below q_len": (
        lambda: from_indices([0, 1, 2], [0, 1], q_len=10, k_len=9),
        ValueError, r"^q_len: more queries"),
    "mask dtype": (
        lambda: dhsa.Selection.from_mask(normal(1, 1, 4, 4), query_block=2),
        TypeError, r"^mask: expected bool"),
    "mask rank": (
        lambda: dhsa.Selection.from_mask(np.ones((4, 4), bool), query_block=2),
        ValueError, r"^mask: expected 4"),
    "mask empty": (
        lambda: dhsa.Selection.from_mask(np.ones((1, 0, 4, 4), bool), query_block=2),
        ValueError, r"^mask: is empty"),
    "mask Lq > Lk": (
        lambda: dhsa.Selection.from_mask(np.ones((1, 1, 5, 4), bool), query_block=2),
        ValueError, r"^mask: more queries"),
    "mask rows differ": (
        lambda: dhsa.Selection.from_mask(np.eye(4, dtype=bool)[None, None], query_block=2),
        ValueError, r"^mask: query 1 of \[0, 0\] sees other keys"),
    "mask too large": (
        lambda: from_indices([0, 0], [], shape=(1, 1, 1), query_block=65536, q_len=65536, k_len=65536).mask(),
        ValueError, r"^mask: .*4096 MiB"),
    # selections against the shapes they are used with
    "selection type": (
        lambda: dhsa.sparse_attention(q, k, v,
        ([0], [0])), TypeError, r"^selection: expected a dhsa.Selection"),
    "selection batch": (lambda: attend([0] * 5, [], shape=(2, 1, 2)), ValueError, r"^(selection|shape).*batch"),
    "selection heads": (lambda: attend([0] * 7, [], shape=(1, 3, 2)), ValueError, r"^(selection|shape).*heads"),
    "selection blocks": (lambda: attend([0] * 4, [], shape=(1, 1, 3)), ValueError, r"^(selection|shape)"),
    "selection range": (lambda: attend([0, 1, 2], [0, 12]), ValueError, r"^(selection\.)?indices"),
}  # fmt: skip

weights = random_weights(16, 8)
OTHER_CALLS = {
    # Config
    "unknown name": (lambda: dhsa.Config(budgt=4), TypeError, r"no field 'budgt'; did you mean 'budget'"),
    "unknown name, paper": (lambda: dhsa.Config.paper(block=4), TypeError, r"no field 'block'"),
    "positional": (lambda: dhsa.Config(2048), TypeError, "positional"),
    "budget 0": (lambda: dhsa.Config(budget=0), ValueError, r"^budget: expected 1 to 2147483647, got 0"),
    "budget float": (lambda: dhsa.Config(budget=8.0), TypeError, r"^budget: expected an int, got float"),
    "budget bool": (lambda: dhsa.Config(budget=True), TypeError, r"^budget: expected an int, got bool"),
    "budget below forced": (lambda: dhsa.Config(budget=383, sink=128, local=256), ValueError,
                            r"^budget: sink \+ local = 128 \+ 256 exceed"),
    "budget below local": (
        lambda: dhsa.Config(budget=100, local=101), ValueError, r"^budget: sink \+ local = 0 \+ 101"),
    "query_block": (lambda: dhsa.Config(query_block=65537), ValueError, r"^query_block: expected 1 to 65536"),
    "sink": (lambda: dhsa.Config(sink=-1), ValueError, r"^sink: "),
    "local": (lambda: dhsa.Config(local=-1), ValueError, r"^local: "),
    "dense_tail": (lambda: dhsa.Config(dense_tail="all"), TypeError, r"^dense_tail: expected an int, got str"),
    "heads": (lambda: dhsa.Config(heads="kv"), ValueError, r"^heads: expected one of 'group', 'all', 'head', got 'kv'"),
    "boundaries": (lambda: dhsa.Config(boundaries="learned"), ValueError, r"^boundaries: expected one of"),
    "method": (lambda: dhsa.Config(method="best"), ValueError, r"^method: expected one of .* got 'best'"),
    "method none": (lambda: dhsa.Config(method=None), TypeError, r"^method: expected one of"),
    "source": (lambda: dhsa.Config.source("best"), ValueError, r"^method: expected one of"),
    "mass 0": (lambda: dhsa.Config(mass=0), ValueError, r"^mass: expected a share above 0, at most 1, got 0"),
    "mass above 1": (lambda: dhsa.Config(mass=1.5), ValueError, r"^mass: expected a share above 0, at most 1, got 1.5"),
    "mass nan": (lambda: dhsa.Config(mass=math.nan), ValueError, r"^mass: expected a share above 0"),
    "mass type": (lambda: dhsa.Config(mass="most"), TypeError, r"^mass: expected a number, got str"),
    "mass of window": (lambda: dhsa.Config(method="window", mass=0.9), ValueError, r"^mass: .*no shares of"),
    "mass of dhsa": (lambda: dhsa.Config.paper(mass=0.9), ValueError, r"^mass: .*'dhsa' are no shares"),
    "floor alone": (lambda: dhsa.Config(floor=500), ValueError, r"^floor: is the least number of keys where `mass`"),
    "floor below forced": (lambda: dhsa.Config(mass=0.9, floor=143), ValueError, r"^floor: expected 144 to 1024"),
    "floor above budget": (lambda: dhsa.Config(mass=0.9, floor=4000), ValueError, r"^floor: expected 144 to 1024"),
    "key_block": (lambda: dhsa.Config(method="block", key_block=0), ValueError, r"^key_block: "),
    "stride": (lambda: dhsa.Config(method="proxy", stride=0), ValueError, r"^stride: "),
    "boundaries of no chunks": (
        lambda: dhsa.select(q, k, dhsa.Config(method="window"), boundaries=cut([0, 12])),
        ValueError, r"^boundaries: method='window' cuts no chunks"),
    "pooling": (lambda: dhsa.Config(method="dhsa", pooling="max"), ValueError, r"^pooling: expected one of"),
    "rows 0": (lambda: dhsa.Config(rows=0), ValueError, r"^rows: expected 1 to .*, got 0"),
    "rows above block": (lambda: dhsa.Config(rows=65), ValueError, r"^rows: expected 1 to 64, got 65"),
    "chunk_size": (lambda: dhsa.Config(chunk_size=0), ValueError, r"^chunk_size: "),
    "num_chunks": (lambda: dhsa.Config(num_chunks=0), ValueError, r"^num_chunks: "),
    "num_chunks name": (lambda: dhsa.Config(num_chunks="half"), ValueError, r"^num_chunks: "),
    "boundary_window": (lambda: dhsa.Config(boundary_window=0), ValueError, r"^boundary_window: "),
    "theta nan": (lambda: dhsa.Config(theta=math.nan), ValueError, r"^theta: "),
    "theta inf": (lambda: dhsa.Config(theta=math.inf), ValueError, r"^theta: "),
    "theta overflow": (lambda: dhsa.Config(theta=10**400), ValueError, r"^theta: "),
    "theta type": (lambda: dhsa.Config(theta="low"), TypeError, r"^theta: "),
    "nms": (lambda: dhsa.Config(nms=-1), ValueError, r"^nms: "),
    "predictor type": (
        lambda: dhsa.Config(predictor="p.pt"),
        TypeError, r"^predictor: expected a dhsa.BoundaryPredictor"),
    # BoundaryPredictor
    "wrong width": (lambda: predictor().logits(k[:, :1]), ValueError, "(?i)8.*16|16.*8"),
    "wrong width, boundaries": (
        lambda: dhsa.boundaries(k[:, :1], dhsa.Config(boundaries="predictor", predictor=predictor())),
        ValueError, "(?i)8.*16|16.*8"),
    "wrong width, attention": (
        lambda: dhsa.attention(
            *[normal(1, 1, 64, 8)] * 3, SPARSE.replace(boundaries="predictor", predictor=predictor())),
        ValueError, "(?i)8.*16|16.*8"),
    "logits rank": (lambda: predictor().logits(k[0]), ValueError, r"^k: expected 4 dimensions"),
    "logits kind": (lambda: predictor().logits([1]), TypeError, r"^k: "),
    "no mapping": (lambda: dhsa.BoundaryPredictor.from_state_dict([1], heads=4), TypeError, r"^state_dict: "),
    "missing": (
        lambda: predictor(**{"mlp.2.bias": None}), ValueError, r"^state_dict: lacks mlp\.2\.bias"),
    "unknown parameter": (
        lambda: predictor(**{"mlp.3.bias": np.ones(1)}), ValueError, r"^state_dict: unknown parameters mlp\.3\.bias"),
    "shape of a parameter": (
        lambda: predictor(**{"enc.norm.bias": np.ones(15)}),
        ValueError, r"^enc\.norm\.bias: expected shape \[16\].*got \[15\]"),
    "shape of the first": (
        lambda: predictor(**{"enc.mha.in_proj_weight": np.ones((16, 16))}),
        ValueError, r"^enc\.mha\.in_proj_weight: expected"),
    "rank of a parameter": (
        lambda: predictor(**{"mlp.0.weight": np.ones(8)}), ValueError, r"^mlp\.0\.weight: expected shape \[N, 4C\+1\]"),
    "dtype of a parameter": (
        lambda: predictor(**{"mlp.0.bias": np.ones(8, int)}), TypeError, r"^mlp\.0\.bias: expected floating point"),
    "NaN in a parameter": (
        lambda: predictor(**{"mlp.0.bias": np.full(8, np.nan)}), ValueError, r"^mlp\.0\.bias: .*not finite"),
    "heads do not divide": (
        lambda: dhsa.BoundaryPredictor.from_state_dict(weights, heads=3), ValueError, r"^heads: 3 heads do not divide"),
    "heads 0": (lambda: dhsa.BoundaryPredictor.from_state_dict(weights, heads=0), ValueError, r"^heads: "),
    "window 0": (lambda: dhsa.BoundaryPredictor.from_state_dict(weights, heads=4, window=0), ValueError, r"^window: "),
}  # fmt: skip


def predictor(**changes):
    changed = {name: x for name, x in {**weights, **changes}.items() if x is not None}
    return dhsa.BoundaryPredictor.from_state_dict(changed, heads=4)


@pytest.mark.parametrize("name", [*CALLS])
def test_attention_refuses(name):
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", [*SELECTION_CALLS])
def test_selection_refuses(name):
    call, error, message = SELECTION_CALLS[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", [*OTHER_CALLS])
def test_config_and_predictor_refuse(name):
    call, error, message = OTHER_CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_torch_arguments(torch):
    tq, tk, tv = (torch.from_numpy(x) for x in good())
    with pytest.raises(TypeError, match=r"^k: expected a torch tensor like the other arguments, got ndarray"):
        dhsa.attention(tq, k, tv)
    with pytest.raises(TypeError, match=r"^v: expected a NumPy array like the other arguments, got Tensor"):
        dhsa.attention(q, k, tv)
    with pytest.raises(ValueError, match=r"^k: expected a tensor on the CPU, got one on device 'meta'"):
        dhsa.attention(tq, tk.to("meta"), tv)
    with pytest.raises(ValueError, match=r"^v: expected a dense tensor, got a torch.sparse_coo one"):
        dhsa.attention(tq, tk, tv.to_sparse())
    with pytest.raises(ValueError, match=r"^q: expected a dense tensor, got a torch.sparse_coo one"):
        dhsa.attention(tq.to_sparse(), tk, tv)
    with pytest.raises(ValueError, match=r"^out: has its negative bit set"):
        dhsa.attention(tq, tk, tv, out=torch._neg_view(torch.empty(1, 4, 10, 8)))
    with pytest.raises(TypeError, match=r"^q: expected .*got float64"):
        dhsa.attention(tq.double(), tk, tv)
    with pytest.raises(TypeError, match=r"^k: dtype is bfloat16, expected float32"):
        dhsa.attention(tq, tk.bfloat16(), tv)
    with pytest.raises(TypeError, match=r"^v: expected float32, float16 or bfloat16, got int64"):
        dhsa.attention(tq, tk, tv.long())
    with pytest.raises(ValueError, match=r"^out: its elements overlap"):
        dhsa.attention(tq, tk, tv, out=torch.empty(1, 1, 10, 8).expand(1, 4, 10, 8))
    memory = torch.randn(1, 4, 12, 8)
    with pytest.raises(ValueError, match=r"^out: shares memory with k"):
        dhsa.attention(tq, memory[:, :2], tv, out=memory[:, :, 2:])
    with pytest.raises(NotImplementedError, match=r"^v: requires grad"):
        dhsa.attention(tq, tk, tv.clone().requires_grad_(), SPARSE)
    if torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^q: expected a tensor on the CPU, got one on device 'cuda:0'"):
            dhsa.attention(tq.cuda(), tk, tv)


class Exporter:
    """A DLPack array whose export does what the test wants."""

    class namespace:
        pass

    def __init__(self, export):
        self.export, self.shape, self.dtype = export, (1, 4, 10, 8), "float32"

    def __array_namespace__(self):
        return self.namespace

    def __dlpack__(self, **options):
        return self.export(**options)


def test_dlpack_arguments(torch):
    def refuse(**options):
        raise BufferError("on the moon")

    def stop(**options):
        raise KeyboardInterrupt

    with pytest.raises(ValueError, match=r"^q: cannot be read through DLPack: on the moon"):
        dhsa.attention(*[Exporter(refuse)] * 3)
    with pytest.raises(KeyboardInterrupt):
        dhsa.attention(*[Exporter(stop)] * 3)
    with pytest.raises(TypeError, match=r"^q: __dlpack__\(\) gave no unused DLPack capsule"):
        dhsa.attention(*[Exporter(lambda **options: "capsule")] * 3)
    used = torch.zeros(1, 4, 10, 8).__dlpack__()
    torch.from_dlpack(used)
    with pytest.raises(TypeError, match=r"^q: __dlpack__\(\) gave no unused DLPack capsule"):
        dhsa.attention(*[Exporter(lambda **options: used)] * 3)
    nothing = type("Nothing", (), {"__dlpack__": lambda self: None})()
    with pytest.raises(TypeError, match=r"^q: Nothing has DLPack but no __array_namespace__"):
        dhsa.attention(nothing, k, v)
    with pytest.raises(TypeError, match=r"^k: expected an array"):
        _core.attend_dense(q, object(), v, np.empty_like(q), None, None, None, None, True, None, 1, None, None, 0)
    with pytest.raises(TypeError, match="expected 14 positional arguments, got 2"):
        _core.attend_dense(q, k)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("window", [None, 9])
def test_not_finite_numbers_reach_the_rows_that_see_them(bad, which, window):
    args = {"q": normal(1, 4, 40, 8), "k": normal(1, 2, 40, 8, seed=1), "v": normal(1, 2, 40, 8, seed=2)}
    clean = dhsa.attention(**args, window=window)
    args[which][0, 1, 20, 3] = bad
    out = dhsa.attention(**args, window=window)
    with np.errstate(all="ignore"):
        want = reference.attention(**args, window=window)
    heads = [1] if which == "q" else [2, 3]  # KV head 1 serves query heads 2 and 3
    last = 20 if which == "q" else 39 if window is None else 28
    touched = np.zeros((1, 4, 40), bool)
    touched[:, heads, 20 : last + 1] = True
    np.testing.assert_allclose(out[~touched], clean[~touched], atol=1e-6)
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(want))
    np.testing.assert_allclose(out, want, atol=3e-6)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("method", ["rows", "dhsa"])
def test_not_finite_numbers_in_sparse_attention(which, method):
    config = SPARSE.replace(method=method)
    args = {"q": normal(1, 4, 64, 8), "k": normal(1, 2, 64, 8, seed=1), "v": normal(1, 2, 64, 8, seed=2)}
    args[which][0, 1, 20, 3] = np.nan
    out = dhsa.attention(**args, config=config)
    assert np.isnan(out).any()
    assert np.isfinite(out[:, :, :20]).all()  # the past of the NaN
    other = [0, 2, 3] if which == "q" else [0, 1]  # heads that do not read it
    assert np.isfinite(out[:, other]).all()
    if which == "q":
        assert np.isfinite(out[:, :, 21:]).all()
    if which == "k":
        assert np.isnan(out[:, 2:, 20:]).all()  # its chunk is always selected, so no row misses it
