"""Random calls of the core against its NumPy twin: shapes, strides, dtypes, windows, key ranges, methods of selection,
tiers and threads.

With PYTHONPATH=tests:tests/select, as `make fuzz` has it:

python -m fuzz.differential --seconds 60      prints the seed and how many calls of each kind were compared
python -m fuzz.differential --seed 7 --first 1234 --count 1      one call again

A call depends on the seed and its number only. The first one that differs ends the program with both and what it was.
"""

import collections
import contextlib
import itertools
import math
import time

import numpy as np
from fuzz.arguments import parsed
from test_key_index import CONFIGS as INDEXED
from test_key_index import expected as without_index
from test_methods import MASSY, check, small
from tiers import TIERS, exact_attention, random_lists
from weights import compact_weights, random_weights

import dhsa
from dhsa import _core, functional, reference
from dhsa.methods import registry

try:
    import torch
except ImportError:
    torch = None

METHODS = [name for name, method in registry.items() if method.in_core]
DTYPES = ["float32", "float32", "float16"] + (["bfloat16"] if torch else [])
HEADS = ("all", "group", "head")


class Dice:
    """Random choices of one call, and what they were."""

    def __init__(self, seed, number):
        self.rng = np.random.default_rng([seed, number])
        self.said = {}

    def whole(self, low, high):
        return int(self.rng.integers(low, high + 1))

    def maybe(self, share):
        return self.rng.random() < share

    def one(self, values):
        return values[int(self.rng.integers(len(values)))]

    def say(self, **what):
        self.said |= what
        return next(iter(what.values()))

    def size(self, high):
        """Often small, or next to a multiple of what a tile may be."""
        if self.maybe(0.4):
            return self.whole(1, min(high, 12))
        if self.maybe(0.4):
            return min(high, max(1, self.one([16, 32, 64, 128, 256]) + self.whole(-1, 1)))
        return self.whole(1, high)

    def normal(self, *shape):
        """Multiples of 2^-7 below 8, which all dtypes but bfloat16 hold, so that sums of a few are exact."""
        return np.clip(np.round(self.rng.standard_normal(shape) * 128) / 128, -7, 7).astype(np.float32)


def laid_out(dice, x):
    """The same numbers in other strides: axes in any order, gaps, reversed, repeated; the last axis is contiguous."""
    order = dice.rng.permutation(3)
    steps = [dice.whole(1, 2) for _ in range(3)]
    shape = [x.shape[axis] * step for axis, step in zip(order, steps, strict=True)]
    memory = np.full((*shape, x.shape[3] + dice.one([0, 0, 1, 5])), np.nan, x.dtype)
    view = memory[tuple(slice(None, None, step) for step in steps)][..., : x.shape[3]]
    view = view.transpose([*np.argsort(order), 3])
    for axis in range(3):
        if dice.maybe(0.2):
            view = np.flip(view, axis)
    view[...] = x
    return view


def inputs(dice, *arrays):
    """Arrays of the core of one dtype, in any layout, and the float64 numbers that they hold."""
    dtype = dice.say(dtype=dice.one(DTYPES))
    if dtype == "bfloat16":
        held = [torch.from_numpy(x).to(torch.bfloat16) for x in arrays]
        numbers = [x.double().numpy() for x in held]
        for i, x in enumerate(held):
            if dice.maybe(0.5):  # heads last but one in memory, as models have them
                held[i] = x.transpose(1, 2).contiguous().transpose(1, 2)
        return held, numbers
    held = [x.astype(dtype) for x in arrays]
    numbers = [x.astype(np.float64) for x in held]
    return [laid_out(dice, x) if dice.maybe(0.7) else x for x in held], numbers


def as_float64(x):
    return x.double().numpy() if torch is not None and isinstance(x, torch.Tensor) else np.asarray(x, np.float64)


def close(got, want, least, most):
    """NaN where NaN is expected, and elsewhere as close as the dtype allows; infinities are equal."""
    np.testing.assert_allclose(as_float64(got), want, atol=least, rtol=most)


def shape_of(dice, longest=160):
    kv_heads = dice.whole(1, 3)
    lengths = sorted((dice.size(longest), dice.size(longest)))
    if dice.maybe(0.25):
        lengths[0] = dice.whole(1, min(4, lengths[1]))  # a decoding step
    b, h, d = dice.whole(1, 2), kv_heads * dice.whole(1, 4), dice.one([1, 3, 8, 16, 33, 64, 80, 130])
    return dice.say(shape=(b, h, kv_heads, *lengths, d))


def qkv(dice, shape):
    b, h, hkv, lq, lk, d = shape
    e = dice.say(e=d if dice.maybe(0.7) else dice.one([1, 5, 24, 72]))
    return dice.normal(b, h, lq, d), dice.normal(b, hkv, lk, d), dice.normal(b, hkv, lk, e)


def scaling(dice):
    return dice.say(scaling={
        "scale": dice.one([None, None, 0.5, -0.3, 0.0, 1.0]),
        "softcap": dice.one([None, None, 3.0, 50.0]),
        "window": dice.one([None, None, 1, dice.whole(1, 40), dice.whole(1, 400)]),
    })  # fmt: skip


def bounds(dice, numbers, scale, skip=None, keys=0):
    """How far results may be from the twin's: rounding of logits and of the dtype, and what a skip leaves out."""
    q, k, v = numbers
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else abs(scale)
    finite = [np.abs(x[np.isfinite(x)]).max(initial=0) for x in (q, k, v)]
    logit = scale * finite[0] * finite[1] * math.sqrt(q.shape[3])
    rough = dice.said["dtype"] != "float32" or dice.said.get("precision") == "medium"
    error = (2e-2 if rough else 1e-5 if dice.said.get("precision") is None else 2e-4) * max(1, logit / 8)
    return error * max(1, finite[2]) + 2 * keys * (skip or 0) * finite[2], error + 2 * keys * (skip or 0)


# ---- kinds of calls --------------------------------------------------------------------------------------------------


def exact(dice):
    shape = shape_of(dice)
    b, h, _, lq, lk, _ = shape
    arrays, numbers = inputs(dice, *qkv(dice, shape))
    options = scaling(dice)
    if dice.maybe(0.25):
        start = dice.rng.integers(0, lk + 1, (b, lq, 1))
        options |= {"window": None, "key_ranges": np.concatenate([start, dice.rng.integers(start, lk + 1)], 2)}
        dice.say(ranges=True)
    elif dice.say(causal=dice.maybe(0.6)) is False:
        options["causal"] = False
    asked = dict(options)
    if dice.maybe(0.3):
        options["sinks"] = dice.one([dice.normal(h), np.full(h, -np.inf, np.float32)])
        asked["sinks"] = torch.from_numpy(options["sinks"]) if dice.said["dtype"] == "bfloat16" else options["sinks"]
    if dice.said["dtype"] == "float32" and dice.maybe(0.15):
        dhsa.set_float32_precision(dice.say(precision=dice.one(["high", "medium"])))
    skip = dice.say(skip=1e-6 if dice.maybe(0.15) else None)
    config = None if skip is None else dhsa.Config(budget=None, skip=skip)
    if dice.maybe(0.1) and skip is None:  # reaches exactly the rows that see it
        at = dice.whole(0, lk - 1)
        which = dice.say(nan=dice.whole(1, 2))
        arrays[which][0, 0, at, 0] = numbers[which][0, 0, at, 0] = math.nan
    got, lse = dhsa.attention(*arrays, config, return_lse=True, **asked)
    with np.errstate(invalid="ignore"):
        want, want_lse = exact_attention(*numbers, options)
    least, of_lse = bounds(dice, numbers, options["scale"], skip, lk)
    close(got, want, least, 1e-2 if least > 1e-3 else 1e-5)
    close(lse, want_lse, of_lse, 2e-6)
    threads = dhsa.get_num_threads()
    dhsa.set_num_threads(dice.whole(1, 4))
    again = dhsa.attention(*arrays, config, **asked)
    dhsa.set_num_threads(threads)
    np.testing.assert_array_equal(as_float64(again), as_float64(got))


def listed(dice):
    shape = shape_of(dice)
    b, h, hkv, lq, lk, _ = shape
    arrays, numbers = inputs(dice, *qkv(dice, shape))
    options = scaling(dice)
    block = dice.say(block=dice.size(80))
    lists = random_lists((b, dice.one([1, hkv, h]), -(-lq // block)), lk, [0, 0.03, 0.3, 1], block)
    got, lse = dhsa.sparse_attention(*arrays, lists, return_lse=True, **options)
    want, want_lse = reference.sparse_attention(*numbers, lists, return_lse=True, **options)
    least, of_lse = bounds(dice, numbers, options["scale"])
    close(got, want, least, 1e-2 if least > 1e-3 else 1e-5)
    close(lse, want_lse, of_lse, 2e-6)


def config_of(dice, *, both_sides=False):
    method = dice.say(method=dice.one([m for m in METHODS if registry[m].has_both_sides or not both_sides]))
    budget = dice.whole(1, 60)
    sink = dice.whole(0, budget)
    options = {
        "query_block": dice.size(40), "budget": budget, "sink": sink, "local": dice.whole(0, budget - sink),
        "key_block": dice.whole(1, 30), "heads": dice.one(HEADS), "dense_tail": dice.one([0, dice.whole(0, 70)]),
    }  # fmt: skip
    if method in MASSY and dice.maybe(0.4):
        options |= {"mass": dice.one([0.1, 0.5, 0.9, 1.0])}
    elif method == "rows" and dice.maybe(0.3):
        options["shortlist"] = budget + dice.whole(0, 80)
    if method == "rows" and dice.maybe(0.3):
        options["rows"] = dice.whole(1, options["query_block"])
    return dice.say(config=small(method=method, **options))


def selected(dice):
    both_sides = dice.say(both_sides=dice.maybe(0.2))
    b, h, hkv, lq, lk, d = dice.say(shape=(dice.whole(1, 2), *dice.one([(2, 1), (4, 2), (3, 3)]), dice.size(90), 0, 8))
    lk = lq + dice.whole(0, 60)
    q, k = dice.normal(b, h, lq, d), dice.normal(b, hkv, lk, d)
    config, layer = config_of(dice, both_sides=both_sides), scaling(dice)
    layer["scale"] = layer["scale"] or 0.5  # of zero, all keys are alike
    check(q, k, config, **layer, **({"causal": False} if both_sides else {}))


def whole_call(dice):
    """What a call attends to is what `select` lists, to the bit, for any number of threads."""
    shape = shape_of(dice, 120)
    arrays, _ = inputs(dice, *qkv(dice, shape))
    config, layer = config_of(dice), scaling(dice)
    got, _, stats = functional.run(*arrays, config, **layer)
    if stats.path == "sparse":
        threads = dhsa.get_num_threads()
        dhsa.set_num_threads(dice.whole(1, 4))
        lists = dhsa.select(*arrays[:2], config, **layer)
        want = dhsa.sparse_attention(*arrays, lists, **layer)
        dhsa.set_num_threads(threads)
    else:
        want = dhsa.attention(*arrays, **layer)
    np.testing.assert_array_equal(as_float64(got), as_float64(want))


def cut(dice):
    (k,), (numbers,) = inputs(dice, dice.normal(dice.whole(1, 2), dice.whole(1, 3), dice.size(200), dice.size(40)))
    window, length = dice.whole(1, 9), k.shape[2]
    scores = np.empty(k.shape[:1] + k.shape[2:3], np.float32)
    _core.similarity_scores(k, window, scores, dhsa.get_num_threads())
    close(scores, reference.similarity_scores(numbers, window=window), 2e-6, 1e-5)
    n, nms, theta = dice.whole(0, length + 1), dice.whole(0, 9), dice.one([-math.inf, 0.0, -0.3])
    instruction = dice.one([None, dice.whole(1, length)])
    picked = dhsa.pick_boundaries(scores[0], n, theta=theta, nms=nms, instruction=instruction)
    want = reference.pick_boundaries(scores[0], n, theta=theta, nms=nms, instruction=instruction)
    np.testing.assert_array_equal(picked, want)


def predicted(dice):
    heads, window = dice.one([1, 2, 4]), dice.whole(1, 9)
    hkv, d = dice.one([(1, 4), (2, 8), (4, 5)])
    (k,), (numbers,) = inputs(dice, dice.normal(dice.whole(1, 2), hkv, dice.size(120), d))
    if dice.say(network=dice.one(["attention", "compact"])) == "compact":
        weights = compact_weights(hkv * d, dice.whole(1, 20), dice.whole(1, 9), dice.whole(1, 20), dice.whole(0, 99))
        network = dhsa.BoundaryPredictor.from_state_dict(weights, window=window)
        want = reference.compact_logits(numbers, weights, window=window)
    else:
        weights = random_weights(hkv * d, dice.whole(1, 24), dice.maybe(0.5), dice.whole(0, 99))
        network = dhsa.BoundaryPredictor.from_state_dict(weights, heads=heads, window=window)
        want = reference.predictor_logits(numbers, weights, heads=heads, window=window)
    close(network.logits(k), want, 1e-4, 1e-4)


def labelled(dice):
    length, (h, hkv), d = dice.size(150), dice.one([(1, 1), (4, 2), (3, 1)]), dice.size(40)
    b, window = dice.whole(1, 2), dice.whole(1, 9)
    (q, k), numbers = inputs(dice, dice.normal(b, h, length, d), dice.normal(b, hkv, length, d))
    options = {
        "window": window, "sliding_window": dice.one([None, dice.whole(1, 100)]), "softcap": dice.one([None, 3.0]),
        "scale": dice.one([None, 0.3]),
    }  # fmt: skip
    dice.say(options=options)
    close(dhsa.attention_ratios(q, k, **options), reference.attention_ratios(*numbers, **options), 1e-6, 1e-3)


def indexed(dice):
    """A KeyIndex through a few calls: each is the call without it from the same cuts, to the bit."""
    config = INDEXED[dice.say(config=dice.one(list(INDEXED)))]
    k, v = dice.normal(1, 2, 500, 16), dice.normal(1, 2, 500, 16)
    index, length, same = _core.KeyIndex(), dice.whole(150, 300), 0
    for turn in range(dice.whole(2, 6)):
        queries = 1 if turn and dice.maybe(0.5) else dice.whole(2, 80)
        length = min(length + (queries if turn else 0), 500)
        if dice.maybe(0.2):
            length = dice.whole(queries, length)
        if dice.maybe(0.2):
            index = _core.KeyIndex.from_bytes(index.to_bytes())
        if dice.maybe(0.2):
            at = dice.whole(0, length - 1)
            k[0, dice.whole(0, 1), at] += 1
            same = min(same, at)
        q, keys, values = dice.normal(1, 4, queries, 16), k[:, :, :length], v[:, :, :length]
        out, _, stats = functional.run(q, keys, values, config, key_indexes=(index,), same=min(same, length))
        if stats.path == "sparse":
            np.testing.assert_array_equal(out, without_index(q, keys, values, config, index), err_msg=f"turn {turn}")
            same = length


CALLS = {
    exact: 8, listed: 4, selected: 6, whole_call: 4, cut: 2, predicted: 1, labelled: 1, indexed: 1,
}  # fmt: skip
SHARES = [call for call, share in CALLS.items() for _ in range(share)]


def compare(seed, number):
    """One call; its kind. Raises AssertionError, with what it was, where it differs from the twin."""
    dice = Dice(seed, number)
    call = dice.one(SHARES)
    dhsa.set_isa(dice.say(tier=dice.one(TIERS)))
    dhsa.set_num_threads(dice.say(threads=dice.one([1, 1, 2, 3])))
    try:
        call(dice)
    except Exception as error:
        what = f"--seed {seed} --first {number} --count 1: {call.__name__} {dice.said}"
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    finally:
        dhsa.set_float32_precision(None)
    return call.__name__


def run(seed, seconds, first=0, count=None):
    """Compares calls until the time is over; returns how many of each kind."""
    counts, end = collections.Counter(), time.monotonic() + seconds
    numbers = itertools.count(first) if count is None else range(first, first + count)
    for number in numbers:
        if time.monotonic() > end:
            break
        counts[compare(seed, number)] += 1
    return counts


def main():
    given = parsed(__doc__.partition("\n")[0])
    with contextlib.suppress(KeyboardInterrupt):
        counts = run(given.seed, given.seconds, given.first, given.count)
        print(f"seed {given.seed}: {counts.total()} calls compared ({dict(sorted(counts.items()))})")


if __name__ == "__main__":
    main()
