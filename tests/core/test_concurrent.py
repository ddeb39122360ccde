"""Calls of several Python threads at the same time, with threads, tiers, forks and the end of the process in between.

`make test-threads` runs this file in a build with ThreadSanitizer, which ends the process at the first race.
"""

import copy
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import dhsa
from dhsa import _core, functional

SECONDS = float(os.environ.get("DHSA_CONCURRENT_SECONDS", "1"))
TIERS = dhsa.build_info()["isa_detected"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


L = 200
Q, K, V = normal(1, 4, L, 16), normal(1, 2, L, 16, seed=1), normal(1, 2, L, 16, seed=2)
SPARSE = dhsa.Config(budget=48, sink=4, local=16, query_block=16, dense_tail=0, boundaries="similarity")
BLOCKS = dhsa.Config(method="block", budget=48, sink=4, local=16, query_block=16, dense_tail=0, key_block=8)
LISTS = dhsa.select(Q, K, SPARSE)


def generation():
    """A prompt and some steps of its own."""
    index, found = _core.KeyIndex(), []
    for start, end in ((0, 150), (150, 151), (151, 152), (152, L)):
        q, k, v = Q[:, :, start:end], K[:, :, :end].copy(), V[:, :, :end].copy()
        found.append(functional.run(q, k, v, SPARSE, key_indexes=(index,), same=start)[0])
    written = _core.KeyIndex.from_bytes(index.to_bytes())
    return [*found, np.array(copy.copy(index).boundaries), np.array(written.boundaries)]


def through_buffers():
    """A result in memory of the core that another library takes and gives back."""
    out = _core.Buffer((1, 4, L, 16), "float32")
    _core.attend_dense(Q, K, V, out, None, None, None, None, True, None, 3, None, None, 0)
    return [np.from_dlpack(out).copy()]


CALLS = {
    "dense": lambda: [dhsa.attention(Q, K, V)],
    "window": lambda: [dhsa.attention(Q, K, V, window=50)],
    "step": lambda: [dhsa.attention(Q[:, :, -1:], K, V)],
    "sparse": lambda: [dhsa.attention(Q, K, V, SPARSE)],
    "blocks": lambda: [dhsa.attention(Q, K, V, BLOCKS)],
    "lists": lambda: [dhsa.sparse_attention(Q, K, V, LISTS)],
    "select": lambda: [dhsa.select(Q, K, BLOCKS).indices],
    "boundaries": lambda: [dhsa.boundaries(K, SPARSE)],
    "labels": lambda: [dhsa.attention_ratios(Q, K, window=4)],
    "generation": generation,
    "buffers": through_buffers,
}
# The kernels are chosen once in these calls, so that each is of one tier also where it changes.
OF_ONE_TIER = ("dense", "window", "step", "lists", "boundaries", "buffers")


def at_once(names, good, between, seconds=SECONDS):
    """Runs the calls of these names, each in a thread of its own and again and again, and `between` in this one, until
    the time is over. good(name, arrays) says whether a result is right."""
    stop, wrong, counts = threading.Event(), [], dict.fromkeys(names, 0)
    started = threading.Barrier(len(names) + 1)

    def work(name):
        started.wait()
        try:
            while not stop.is_set():
                if not good(name, CALLS[name]()):
                    raise AssertionError("another result")
                counts[name] += 1
        except BaseException as error:
            wrong.append((name, error))
            stop.set()

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    try:
        started.wait()
        end = time.monotonic() + seconds
        while not stop.is_set() and (time.monotonic() < end or min(counts.values()) < 2):
            between()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]
    return counts


def equal(got, want):
    return len(got) == len(want) and all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def quiet():
    """{name: what a call gives when nothing else runs}"""
    dhsa.set_num_threads(3)
    return {name: call() for name, call in CALLS.items()}


def test_with_threads_that_change(quiet):
    numbers = iter(range(10**9))

    def between():
        dhsa.set_num_threads(1 + next(numbers) % 6)
        time.sleep(0.001)

    at_once(list(CALLS), lambda name, got: equal(got, quiet[name]), between)


def test_with_tiers_that_change():
    """What a call computes by one tier is one of the results of the tiers; the others may be of two at once."""
    expected = {}
    for tier in TIERS:
        dhsa.set_isa(tier)
        for name in OF_ONE_TIER:
            expected.setdefault(name, []).append(CALLS[name]())
    numbers = iter(range(10**9))

    def between():
        dhsa.set_isa(TIERS[next(numbers) % len(TIERS)])
        assert dhsa.build_info()["isa"] in TIERS
        time.sleep(0.001)

    def good(name, got):
        if name in expected:
            return any(equal(got, want) for want in expected[name])
        return all(np.isfinite(x).all() for x in got)

    at_once(list(CALLS), good, between)


def child(quiet):
    """Runs every call in a process that is forked here and now; whether all were right."""
    process = os.fork()
    if process == 0:
        right = False
        try:
            dhsa.set_num_threads(4)
            right = all(equal(call(), quiet[name]) for name, call in CALLS.items())
        finally:
            os._exit(0 if right else 1)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_with_forks_in_between(quiet):
    """The child has the calling thread only, whatever the others were doing, and makes threads of its own."""

    def between():
        assert child(quiet)

    at_once(["dense", "sparse", "generation"], lambda name, got: equal(got, quiet[name]), between)


def test_an_index_that_two_threads_use(quiet):
    """One call at a time has it; another one is refused, and finds it whole later."""
    index, refused, served = _core.KeyIndex(), [], []
    end = time.monotonic() + SECONDS / 2

    def work():
        while time.monotonic() < end or not served:
            try:
                got = functional.run(Q, K, V, SPARSE, key_indexes=(index,))[0]
                index.to_bytes()
            except RuntimeError as error:
                refused.append(str(error))
            else:
                served.append(np.array_equal(got, quiet["sparse"][0]))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(served)
    assert set(refused) <= {"key_indexes: in use by another call"}
    assert functional.run(Q, K, V, SPARSE, key_indexes=(index,))[2].path == "sparse"


ENDING = """
import threading, time
import numpy as np
import dhsa
g = np.random.default_rng(0)
q, k, v = (g.standard_normal((1, 4, 600, 32)).astype(np.float32) for _ in range(3))
config = dhsa.Config(budget=64, sink=4, local=16, query_block=16)
dhsa.set_num_threads(3)
started = threading.Semaphore(0)

def work(config):
    while True:
        dhsa.attention(q, k, v, config)
        started.release()

for i in range(4):
    threading.Thread(target=work, args=(config if i % 2 else None,), daemon=True).start()
for _ in range(8):
    started.acquire()
"""


WAYS = ["", "raise SystemExit(7)", "import os; os._exit(7)", "import os; os.kill(os.getpid(), 15)"]


@pytest.mark.parametrize("way", WAYS)
def test_a_process_that_ends_while_threads_compute(way):
    done = subprocess.run(
        [sys.executable, "-P", "-c", ENDING + way], capture_output=True, text=True, timeout=900, check=False
    )
    assert (done.returncode, done.stderr) == (-15 if "kill" in way else 7 if way else 0, "")


RACE = """
import threading
import numpy as np
from dhsa import _core
x = np.ones((1, 4, 600, 32), np.float32)
out = np.empty_like(x)
args = x, x, x, out, None, None, None, None, True, None, 1, None, None, 0
threads = [threading.Thread(target=lambda: [_core.attend_dense(*args) for _ in range(20)]) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.skipif(
    "libtsan" not in os.environ.get("LD_PRELOAD", ""), reason="needs ThreadSanitizer: make test-threads"
)
def test_a_race_is_reported():
    """Two calls that write to one array, which is the caller's fault."""
    done = subprocess.run([sys.executable, "-P", "-c", RACE], capture_output=True, text=True, check=False)
    assert done.returncode == 66, done.stderr
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
