"""Every selection method against its reference twin, and what they all share: forced keys, budgets, exact blocks.

What is particular to chunks (boundaries, their scores) is tested in test_select.py.
"""

import numpy as np
import pytest

import dhsa


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def small(**options):
    return dhsa.Config(**{"budget": 40, "query_block": 16, "sink": 4, "local": 10, "dense_tail": 8, **options})


def test_window_is_sinks_and_recent_keys():
    q, k, v = normal(1, 2, 100, 4), normal(1, 1, 110, 4, seed=1), normal(1, 1, 110, 4, seed=2)
    config = small(method="window", dense_tail=0)
    got = dhsa.select(q, k, config)
    assert got.boundaries is None
    for i in range(7):
        end = min(10 + 16 * (i + 1), 110)
        want = list(range(end)) if end <= 40 else [*range(4), *range(end - 36, end)]
        assert got.indices[got.indptr[i] : got.indptr[i + 1]].tolist() == want
    np.testing.assert_array_equal(dhsa.attention(q, k, v, config), dhsa.sparse_attention(q, k, v, got))


def test_a_method_that_is_not_there():
    with pytest.raises(NotImplementedError, match="method"):
        dhsa.select(normal(1, 1, 8, 4), normal(1, 1, 8, 4), dhsa.Config(method="oracle"))
