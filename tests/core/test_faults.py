"""Allocations of the core that fail, and threads that cannot be made, in every function of the extension.

Needs an extension that was built with DHSA_FAULTS=1, as `make test-debug` does; tests/c/test_memory.c fails the
allocations of a selection in any build. Memory that Python allocates is not part of this.
"""

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest
from weights import compact_weights, random_weights

import dhsa
from dhsa import _core, functional
from dhsa.methods import registry

faults = getattr(_core, "faults", None)
needs_faults = pytest.mark.skipif(faults is None, reason="needs an extension that was built with DHSA_FAULTS=1")


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


L, D = 96, 8
Q, K, V = normal(1, 4, L, D), normal(1, 2, L, D, seed=1), normal(1, 2, L, D, seed=2)
SMALL = {"sink": 2, "local": 4, "query_block": 16, "dense_tail": 0}
CUT = dhsa.Config(budget=24, boundaries="similarity", **SMALL)
EDGES = np.arange(0, L + 1, 4, dtype=np.int32)

CASES = {}


def case(name, *inputs):
    """Registers a function that calls an entry and returns its results. `inputs` are its arguments that must not
    change: arrays, and functions that make a KeyIndex, which the function is given."""

    def register(call):
        assert name not in CASES
        CASES[name] = call, inputs
        return call

    return register


def options(method, **more):
    """A Config of a method whose options fit 96 keys."""
    own = {"key_block": 8, "stride": 4, "shortlist": 0}
    own = {key: value for key, value in own.items() if key in registry[method].options()}
    return dhsa.Config(method=method, **{"budget": 24, **SMALL, **own, **more})


# ---- attention -------------------------------------------------------------------------------------------------------

case("attend_dense", Q, K, V)(lambda: dhsa.attention(Q, K, V, return_lse=True))
STEP = normal(2, 4, 1, D, seed=3), normal(2, 2, 700, D, seed=4), normal(2, 2, 700, D, seed=5)
case("attend_dense: decode", *STEP)(lambda: dhsa.attention(*STEP, return_lse=True))
HALF = tuple(x.astype(np.float16) for x in (Q, K, V))
RANGES, SINKS = np.tile(np.array([[[3, 50]]], np.int32), (1, L, 1)), normal(4, seed=6)
case("attend_dense: float16, ranges, sinks", *HALF, RANGES, SINKS)(
    lambda: dhsa.attention(*HALF, key_ranges=RANGES, sinks=SINKS.astype(np.float16))
)
LISTS = dhsa.select(Q, K, options("window"))
case("attend_sparse", Q, K, V, LISTS.indptr, LISTS.indices)(
    lambda: dhsa.sparse_attention(Q, K, V, LISTS, return_lse=True)
)


def prefill(config, index=None, q=Q, k=K, v=V, **more):
    indexes = None if index is None else (index,)
    out, lse, stats = functional.run(q, k, v, config, return_lse=True, key_indexes=indexes, **more)
    assert stats.path == "sparse"
    return out, lse, np.array(stats.density)


METHODS = {}
for name in (name for name, method in registry.items() if method.in_core):
    METHODS[name] = options(name)
    if registry[name].has_mass:
        METHODS[f"{name}, mass"] = options(name, budget=60, mass=0.8)
METHODS["rows, shortlist"] = options("rows", budget=24, shortlist=48)
METHODS["rows, every head"] = options("rows", heads="head", rows=2)
METHODS["rows, similarity"] = CUT
for name, config in METHODS.items():
    case(f"prefill: {name}", Q, K, V)(lambda config=config: prefill(config))
    if registry[config.method].has_both_sides:
        case(f"prefill: {name}, both sides", Q, K, V)(lambda c=config: prefill(c, causal=False, window=70))
# More than 2**18 keys on all lists together, and more than 32 lists: several waves.
WAVES = normal(1, 8, 400, 4), normal(1, 8, 400, 4, seed=1), normal(1, 8, 400, 4, seed=2)
case("prefill: waves", *WAVES)(
    lambda: prefill(
        dhsa.Config(method="window", budget=128, heads="head", sink=0, local=0, query_block=1, dense_tail=0),
        None, *WAVES,
    )
)  # fmt: skip
case("prefill: given boundaries", Q, K, V, EDGES)(lambda: prefill(CUT, boundaries=EDGES[None]))


# ---- what is kept about keys -----------------------------------------------------------------------------------------

SHORT = CUT.replace(shortlist=48)


def after(*calls, config=CUT):
    """A function that makes a KeyIndex which has served these stretches of queries (start, end)."""

    def make():
        index = _core.KeyIndex()
        for start, end in calls:
            step(index, start, end, config)
        return index

    return make


def step(index, start, end, config=CUT, **more):
    return prefill(config, index, Q[:, :, start:end], K[:, :, :end].copy(), V[:, :, :end].copy(), **more)


case("prefill: index", Q, K, V, after())(lambda index: step(index, 0, 64))
case("prefill: index, more of a prompt", Q, K, V, after((0, 40)))(lambda index: step(index, 40, 90, same=40))
case("prefill: index, step", Q, K, V, after((0, 64)))(lambda index: step(index, 64, 65, same=64))
case("prefill: index, second step", Q, K, V, after((0, 64), (64, 65)))(lambda index: step(index, 65, 66, same=65))
case("prefill: index, shortlist", Q, K, V, after((0, 64), config=SHORT))(lambda index: step(index, 64, 65, SHORT))
case("prefill: index, given boundaries", Q, K, V, after((0, 40)))(
    lambda index: step(index, 40, L, boundaries=EDGES[None])
)
case("prefill: index, no means", Q, K, V, after((0, 40)))(lambda index: step(index, 40, 90, keep_means=False))
case("prefill: index, other keys", Q, K, V, after((0, 64)))(
    lambda index: prefill(CUT, index, Q[:, :, :70], K[:, :, 20:90].copy(), V[:, :, 20:90].copy())
)

FULL = after((0, 64), (64, 65))
case("KeyIndex")(lambda: _core.KeyIndex().to_bytes())
case("KeyIndex: boundaries", FULL)(lambda index: np.array(index.boundaries))
case("KeyIndex: nbytes", FULL)(lambda index: np.array(index.nbytes))
case("KeyIndex: copy", FULL)(lambda index: copy.copy(index).to_bytes())
case("KeyIndex: deepcopy", FULL)(lambda index: copy.deepcopy(index).to_bytes())
case("KeyIndex: to_bytes", FULL)(lambda index: index.to_bytes())
for name, config in {"rows": CUT, "shortlist": SHORT, "dhsa": options("dhsa")}.items():
    WRITTEN = after((0, 90), config=config)().to_bytes()
    case(f"KeyIndex: from_bytes, {name}")(lambda data=WRITTEN: _core.KeyIndex.from_bytes(data).to_bytes())


# ---- boundaries and labels -------------------------------------------------------------------------------------------


@case("similarity_scores", K)
def _():
    scores = np.empty((1, L), np.float32)
    _core.similarity_scores(K, 4, scores, 2)
    return scores


NETWORKS = {
    "attention": dhsa.BoundaryPredictor.from_state_dict(random_weights(16, 5, gated=True), heads=2),
    "compact": dhsa.BoundaryPredictor.from_state_dict(compact_weights(16)),
}
CUTS = {
    "similarity": CUT,
    "threshold": CUT.replace(theta=0.0, nms=2),
    "fixed": dhsa.Config(budget=24, boundaries="fixed", chunk_size=5, **SMALL),
}
for name, network in NETWORKS.items():
    case(f"predictor_logits: {name}", K)(lambda network=network: network.logits(K))
    CUTS[name] = dhsa.Config(budget=24, boundaries="predictor", predictor=network, **SMALL)
    case(f"prefill: {name}", Q, K, V)(lambda config=CUTS[name]: prefill(config))
for name, config in CUTS.items():
    case(f"boundaries: {name}", K)(lambda config=config: dhsa.boundaries(K, config))
SCORES = normal(L)
case("pick_boundaries", SCORES)(lambda: dhsa.pick_boundaries(SCORES, 9, theta=0.0, nms=2))
case("attention_ratios", Q, K)(lambda: dhsa.attention_ratios(Q, K, window=4, sliding_window=50))


# ---- scores and selection --------------------------------------------------------------------------------------------

for name in ("rows", "block"):
    case(f"chunk_scores: {name}", Q, K, EDGES)(
        lambda score=name: dhsa.chunk_scores(Q, K, EDGES[None], query_block=16, score=score)
    )
for name, config in METHODS.items():
    case(f"select: {name}", Q, K)(lambda config=config: (s := dhsa.select(Q, K, config), s.indptr, s.indices)[1:])


@case("select_plan", Q, K)
def _():
    indptr = np.zeros(2 * 6 + 1, np.int64)
    _core.select_plan(Q, K, CUT.replace(heads="group")._core, None, None, None, True, indptr)
    return indptr


def means(edges, spread):
    n = len(edges) - 1
    made = np.zeros((2, n, D), np.int8), np.zeros((2, n), np.float32), np.zeros((2, n), np.float32)
    arrays = (*made[:2], made[2] if spread else None, np.zeros((2, n), np.int8))
    _core.chunk_means(K, edges, arrays, 2)
    return arrays


GROUPS = EDGES[::4].copy()
for name, edges in {"chunks": EDGES, "groups": GROUPS}.items():
    case(f"chunk_means: {name}", K, edges)(
        lambda edges=edges: [x for x in means(edges, edges is GROUPS) if x is not None]
    )


@case("select_blocks", Q, K, EDGES)
def _():
    config = CUT.replace(shortlist=48, heads="group")
    indptr, indices = np.zeros(2 * 3 + 1, np.int64), np.zeros(2 * 3 * L, np.int32)
    chunks = MEANS["chunks"], MEANS["groups"]
    _core.select_blocks(Q, K, EDGES[None], *chunks, config._core, None, None, None, 2, 3, indptr, indices, 2)
    return indptr, indices


MEANS = {"chunks": means(EDGES, False), "groups": means(GROUPS, True)}


# ---- the rest --------------------------------------------------------------------------------------------------------

BUFFER = _core.Buffer((2, 3), "bfloat16")
case("Buffer")(lambda: [] if _core.Buffer((2, 3), "float16") else None)
case("Buffer: __dlpack__")(lambda: [] if BUFFER.__dlpack__() else None)
case("Buffer: __dlpack__, versioned")(lambda: [] if BUFFER.__dlpack__(max_version=(1, 0)) else None)
case("Config")(lambda: [] if _core.Config(predictor=NETWORKS["compact"]._args()) else None)
case("boundaries_capacity")(lambda: np.array(_core.boundaries_capacity(CUT._core, 1000)))
case("isa_set")(lambda: _core.isa_set(_core.isa_current()) or [])
case("isa_current")(lambda: _core.isa_current().encode())
case("build_info")(lambda: repr(_core.build_info()).encode())
case("cpu_count")(lambda: np.array(_core.cpu_count()))
case("fma_peak")(lambda: np.array(_core.fma_peak(2) > 0))
case("read_bandwidth", V)(lambda: np.array(_core.read_bandwidth(V, 2) > 0))


def content(results):
    if isinstance(results, bytes):
        return [results]
    return [np.asarray(x).tobytes() for x in (results if isinstance(results, (tuple, list)) else [results])]


def bytes_of(given):
    return [x.to_bytes() if isinstance(x, _core.KeyIndex) else x.tobytes() for x in given]


@needs_faults
@pytest.mark.parametrize("lasting", [False, True], ids=["one", "all from then on"])
@pytest.mark.parametrize("name", CASES)
def test_any_allocation_may_fail(name, lasting):
    """The n-th one, for n = 1, 2, ... until the call succeeds. Each time: MemoryError, inputs as before, nothing left
    behind, and the next call right. A KeyIndex is as before or empty; from an empty one, what it had is found again."""
    dhsa.set_num_threads(2)
    call, inputs = CASES[name]
    empty = _core.KeyIndex().to_bytes()

    def prepare(blank=False):
        return [(_core.KeyIndex() if blank else x()) if callable(x) else x for x in inputs]

    def run(given):
        return content(call(*(x for x in given if isinstance(x, _core.KeyIndex))))

    want, anew = run(prepare()), run(prepare(blank=True))  # these start the threads, too
    for n in itertools.count(1):
        held = faults(0, 0, False)[0]
        given = prepare()
        before, holding = bytes_of(given), faults(0, 0, False)[0]
        faults(n, 0, lasting)
        got, said = None, ""
        try:
            got = run(given)
        except MemoryError as error:
            said = str(error)
        left, asked, _, failed = faults(0, 0, False)
        if not failed:
            assert got == want
            assert asked == n - 1
            break
        assert got is None, f"allocation {n} of {name} failed, and the call went on"
        assert "no memory" in said
        now = bytes_of(given)
        emptied = now != before
        if emptied:
            assert now == [empty if isinstance(x, _core.KeyIndex) else b for x, b in zip(given, before, strict=True)]
        assert left == holding or (emptied and left < holding)
        assert run(given) == (anew if emptied else want)
        del given, got
        assert faults(0, 0, False)[0] == held


def test_every_function_of_the_extension_is_among_them():
    functions = {name for name in dir(_core) if not name.startswith("_") and callable(getattr(_core, name))}
    assert {name.partition(":")[0] for name in CASES} == functions - {"Past", "faults"}


# These work in memory that Python gives, or in none.
WITHOUT = {
    "Config", "KeyIndex: nbytes", "KeyIndex: to_bytes", "boundaries_capacity", "build_info", "chunk_means: chunks",
    "chunk_means: groups", "cpu_count", "fma_peak", "isa_current", "isa_set", "read_bandwidth", "select_plan",
}  # fmt: skip


@needs_faults
def test_the_others_ask_for_memory():
    """Else nothing would fail above."""
    without = set()
    for name, (call, inputs) in CASES.items():
        given = [x() for x in inputs if callable(x)]
        faults(0, 0, False)
        call(*given)
        if faults(0, 0, False)[1] == 0:
            without.add(name)
    assert without == WITHOUT


THREADS = """
import os
import traceback
import numpy as np
import dhsa
from dhsa._core import faults

def threads():
    return len(os.listdir("/proc/self/task"))

g = np.random.default_rng(0)
q, k, v = (g.standard_normal((1, 4, 300, 16)).astype(np.float32) for _ in range(3))
dhsa.set_num_threads(1)
config = dhsa.Config(budget=64, sink=4, local=16, query_block=16)
want = dhsa.attention(q, k, v), dhsa.attention(q, k, v, config)
before = threads()
dhsa.set_num_threads(6)
for allocation, thread, lasting, made in ((0, 1, 1, 0), (0, 1, 0, 5), (0, 1, 1, 5)):
    held = faults(allocation, thread, lasting)[0]
    # One that fails ends the making of threads in that job; the next job asks for them again.
    for _ in range(3):
        assert (dhsa.attention(q, k, v) == want[0]).all()
        assert (dhsa.attention(q, k, v, config) == want[1]).all()
    left, _, asked, failed = faults(0, 0, 0)
    assert left == held, (left, held)
    assert threads() - before == made, (threads(), before, made)
    assert failed == asked if lasting else failed == 1, (asked, failed)
if os.fork() == 0:
    code = 1
    try:  # the child has no threads but its own, and makes one
        faults(0, 2, 1)
        for n in range(2, 6):
            dhsa.set_num_threads(n)
            assert (dhsa.attention(q, k, v, config) == want[1]).all()
            assert threads() == 2, threads()
        faults(0, 0, 0)
        assert (dhsa.attention(q, k, v, config) == want[1]).all()
        assert threads() == 5, threads()
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
"""


@needs_faults
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_threads_that_cannot_be_made():
    """The call runs on those that are there, with the same bits, and later calls make those that are missing."""
    done = subprocess.run([sys.executable, "-P", "-c", THREADS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
