"""What tests of every instruction set tier share: the tiers of this CPU, and references computed once for all of them.

References are of float64 and know of no tier: a test that runs on five tiers would compute the same one five times.
"""

import hashlib

import numpy as np
import pytest

import dhsa

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


def _key(value):
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, hashlib.blake2b(np.ascontiguousarray(value)).digest()
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(value[name])) for name in sorted(value))
    return value
