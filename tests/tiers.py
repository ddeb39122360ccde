"""What tests of every instruction set tier share: the tiers of this CPU, lists of keys, references computed once.

References are of float64 and know of no tier: a test that runs on five tiers would compute the same one five times.
"""

import hashlib
import math

import numpy as np
import pytest

import dhsa
from dhsa import reference

TIERS = dhsa.build_info()["isa_detected"]
# The first decorator of a test, so that a case is met on all tiers before the next one. `tier` is in conftest.py.
every_tier = pytest.mark.parametrize("tier", TIERS, indirect=True)

_results = {}


def once(function, *args, **kwargs):
    """function(*args, **kwargs), which may have been computed before for equal arguments; arrays are compared by what
    they hold. The result is shared: it must not be changed."""
    key = function, _key(args), _key(kwargs)
    if key not in _results:
        while len(_results) >= 64:
            del _results[next(iter(_results))]  # the oldest
        _results[key] = function(*args, **kwargs)
    return _results[key]


def exact_attention(q, k, v, options):
    """(output, log-sum-exp) of reference.attention, which wants lengths to agree, also for more queries than keys
    where nothing is causal."""
    if options.get("causal", True) or q.shape[2] <= k.shape[2]:
        return reference.attention(q, k, v, return_lse=True, **options)
    parts = [reference.attention(q[:, :, i : i + 1], k, v, return_lse=True, **options) for i in range(q.shape[2])]
    return tuple(np.concatenate([p[n] for p in parts], axis=2) for n in range(2))


def random_lists(shape, k_len, densities, query_block):
    """A Selection of this shape; each list has each key with one of these probabilities."""
    rng = np.random.default_rng(3)
    lists = [np.flatnonzero(rng.random(k_len) < density) for density in rng.choice(densities, math.prod(shape))]
    indptr = np.concatenate([[0], np.cumsum([len(keys) for keys in lists])]).astype(np.int64)
    indices = np.concatenate(lists).astype(np.int32)
    return dhsa.Selection.from_indices(indptr, indices, shape=shape, query_block=query_block)


def _key(value):
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, hashlib.blake2b(np.ascontiguousarray(value)).digest()
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(value[name])) for name in sorted(value))
    return value
