"""`_core.Config`: its fields are checked where it is made, by name; it is immutable; and what it says of whole calls is
what the blocks of a call do."""

import copy
import math
import pickle
import random

import numpy as np
import pytest

import dhsa
from dhsa import _core, functional
from dhsa._twin.selection import is_exact


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"method": "sparse"}, ValueError, "^method: expected one of 'rows', 'dhsa', .*'oracle', got 'sparse'"),
        ({"method": 0}, TypeError, "^method: expected a str, got int"),
        ({"heads": "none"}, ValueError, "^heads: expected one of 'group', 'all', 'head', got 'none'"),
        ({"boundaries": "x"}, ValueError, "^boundaries: expected one of 'similarity', 'fixed', 'predictor', got 'x'"),
        ({"pooling": None}, TypeError, "^pooling: expected a str, got NoneType"),
        ({"budget": 0}, ValueError, "^budget: expected at least 1, got 0"),
        ({"budget": 2**63}, ValueError, "^budget: expected 1 to .*, got 9223372036854775808"),
        ({"budget": 16.0}, TypeError, "^budget: expected an int, got float"),
        ({"budget": True}, TypeError, "^budget: expected an int, got bool"),
        ({"budget": 8, "sink": 4, "local": 5}, ValueError, "^budget: 8 keys do not hold the 4 of sink and 5 of local"),
        ({"sink": 2**62, "local": 2**63 - 1, "mass": 0.5}, ValueError, "^budget: "),
        ({"sink": -1}, ValueError, "^sink: expected at least 0, got -1"),
        ({"local": -1}, ValueError, "^local: expected at least 0, got -1"),
        ({"dense_tail": None}, TypeError, "^dense_tail: expected an int, got NoneType"),
        ({"method": "window", "mass": 0.5}, ValueError, "^mass: the scores of method window are no shares"),
        ({"mass": 1.5}, ValueError, "^mass: got 1.5, expected above 0, at most 1"),
        ({"mass": 0}, ValueError, "^mass: expected None or a number above 0, at most 1, got 0"),
        ({"mass": math.nan}, ValueError, "^mass: expected a finite number, got nan"),
        ({"mass": 0.5, "floor": 4, "sink": 5}, ValueError, r"^floor: got 4, expected sink \+ local = 5 to"),
        ({"mass": 0.5, "floor": 99, "budget": 98}, ValueError, "^floor: got 99, expected .* budget of 98"),
        ({"query_block": 2**31}, ValueError, "^query_block: got 2147483648, expected 1 to 2147483647"),
        ({"query_block": 8, "rows": 9}, ValueError, "^rows: got 9, expected 1 to the query_block of 8"),
        ({"budget": 64, "shortlist": 63}, ValueError, "^shortlist: got 63, expected at least the budget of 64"),
        ({"method": "block", "key_block": 0}, ValueError, "^key_block: expected at least 1, got 0"),
        ({"method": "block", "key_block": 2**40}, ValueError, "^key_block: got 1099511627776, expected 1 to"),
        ({"method": "proxy", "stride": 3}, ValueError, "^stride: got 3, expected a divisor of key_block = 128"),
        ({"method": "xattention"}, ValueError, "^stride: got 0, expected a divisor"),
        ({"chunk_size": 0, "boundaries": "fixed"}, ValueError, "^chunk_size: expected at least 1, got 0"),
        ({"boundary_window": 0}, ValueError, "^boundary_window: expected at least 1, got 0"),
        ({"num_chunks": "some"}, ValueError, "^num_chunks: expected an int, 'paper' or None, got 'some'"),
        ({"num_chunks": -1}, ValueError, "^num_chunks: expected at least 0, got -1"),
        ({"theta": math.nan}, ValueError, "^theta: expected a number, got nan"),
        ({"theta": "0"}, TypeError, "^theta: expected a number, got str"),
        ({"nms": -1}, ValueError, "^nms: expected at least 0, got -1"),
        ({"quantized": 1}, TypeError, "^quantized: expected a bool, got int"),
        ({"predictor": 5}, TypeError, "^predictor: expected a tuple, got int"),
        ({"predictor": (1, 2)}, TypeError, "^predictor: expected a tuple of 13 items, got 2"),
        ({"budgets": 5}, TypeError, "^Config has no field 'budgets'"),
    ],
)  # fmt: skip
def test_fields_are_checked_where_it_is_made(fields, error, message):
    with pytest.raises(error, match=message):
        _core.Config(**fields)


def test_it_takes_names_only_and_stays_as_it_is():
    with pytest.raises(TypeError, match="keyword"):
        _core.Config("rows")
    core = _core.Config(budget=9)
    for name in ("budget", "anything"):
        with pytest.raises(AttributeError):
            setattr(core, name, 5)
    with pytest.raises(TypeError, match=r"dhsa\.Config"):
        pickle.dumps(core)
    config = dhsa.Config(method="proxy", budget=300, mass=0.9, num_chunks="paper")
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert again == config
        assert again.replace(method="rows") == config.replace(method="rows")
        assert (again._core.method, again._core.mass, again._core.num_chunks) == ("proxy", 0.9, "paper")


def test_entries_take_nothing_else():
    q = np.zeros((1, 1, 4, 8), np.float32)
    for config in (None, dhsa.Config(), ()):
        with pytest.raises(TypeError, match=r"^config: expected a _core\.Config, got "):
            _core.select_plan(q, q, config, None, None, None, True, np.empty(2, np.int64))
        with pytest.raises(TypeError, match=r"^config: expected a _core\.Config, got "):
            _core.boundaries_capacity(config, 4)


def test_it_keeps_the_weights_of_its_network():
    weights = {
        "project.weight": np.ones((2, 8)), "project.bias": np.ones(2), "token.weight": np.ones((3, 4)),
        "token.bias": np.ones(3), "head.0.weight": np.ones((4, 9)), "head.0.bias": np.ones(4),
        "head.2.weight": np.ones((1, 4)), "head.2.bias": np.ones(1),
    }  # fmt: skip
    k = np.random.default_rng(0).standard_normal((1, 1, 40, 8), dtype=np.float32)
    predictor = dhsa.BoundaryPredictor.from_state_dict(weights)
    core = dhsa.Config(boundaries="predictor", predictor=predictor)._core
    expected = dhsa.boundaries(k, dhsa.Config(boundaries="predictor", predictor=predictor))
    del predictor, weights
    found, counts = np.empty((1, _core.boundaries_capacity(core, 40)), np.int32), np.empty(1, np.int64)
    _core.boundaries(k, core, found, counts, 1)
    np.testing.assert_array_equal(found[:, : counts[0]], expected)
    bare = _core.Config(boundaries="predictor")  # a network is needed to cut, not to ask
    assert not bare.leaves_out(40, 40, None, True)
    with pytest.raises(ValueError, match=r"^predictor: .* there is none"):
        _core.boundaries(k, bare, np.empty((1, 40), np.int32), counts, 1)


def test_gaps_of_each_length():
    for length in (1, 7, 8, 31, 1000, 32_767, 32_768, 65_536, 100_001, 2**30 - 1):
        assert _core.Config().num_gaps(length) == max(length // 8, min(length // 4, 8192))
        assert _core.Config(method="dhsa").num_gaps(length) == length // 8
        assert _core.Config(num_chunks="paper", query_block=256).num_gaps(length) == length // 256 * 8
        assert _core.Config(num_chunks=5).num_gaps(length) == 5
    with pytest.raises(ValueError, match=r"^length: expected 1 to"):
        _core.Config().num_gaps(0)


@pytest.mark.parametrize("causal", [True, False])
def test_leaves_out_is_what_blocks_do(causal):
    """Of whole calls in constant time, against the twin's rule of each block; both answers come often."""
    chance, answers = random.Random(5), {True: 0, False: 0}
    for _ in range(4000):
        k_len = chance.randint(1, 90)
        q_len = chance.randint(1, k_len)
        block, tail = chance.choice([1, 3, 8, 16, 64]), chance.choice([0, 0, 1, 5, 16, 40, 200])
        window = chance.choice([None, None, 1, 7, 20, 60, 2**40])
        budget, mass = chance.randint(4, 60), chance.choice([None, 0.5])
        floor = None if mass is None else chance.randint(4, budget)
        core = _core.Config(
            method=chance.choice(["rows", "block"]), budget=budget, mass=mass, floor=floor, sink=1, local=3,
            query_block=block, dense_tail=tail,
        )  # fmt: skip
        least = budget if mass is None else floor
        assert core.exact_up_to == least
        blocks = range(-(-q_len // block))
        expected = not all(is_exact(i, q_len, k_len, block, least, tail, window, causal) for i in blocks)
        got = core.leaves_out(q_len, k_len, window, causal)
        assert got == expected, (q_len, k_len, window, tail, block, least)
        answers[expected] += 1
    assert min(answers.values()) > 800


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 30, 90])
@pytest.mark.parametrize("q_len", [1, 17, 40, 100])
def test_leaves_out_is_what_a_call_does(window, q_len, causal):
    k = np.random.default_rng(1).standard_normal((1, 1, 100, 8), dtype=np.float32)
    for tail in (0, 8, 100):
        for budget in (8, 50, 120, None):
            config = dhsa.Config(budget=budget, sink=1, local=2, query_block=16, dense_tail=tail)
            _, _, stats = functional.run(k[:, :, :q_len], k, k, config, window=window, causal=causal)
            assert (stats.path == "sparse") == config.leaves_out(q_len, 100, window, causal=causal)
            assert config.exact == (budget is None)


def test_leaves_out_of_odd_lengths():
    core = _core.Config(budget=4, dense_tail=2**63 - 1)
    assert not core.leaves_out(0, 0, None, True)
    assert not core.leaves_out(100, 100, None, True)
    assert not _core.Config(budget=4, query_block=2**31 - 1).leaves_out(1, 4, None, True)
    assert _core.Config(budget=4, query_block=2**31 - 1).leaves_out(2**30 - 1, 2**30 - 1, None, True)
    for lengths, name in (((-1, 5), "q_len"), ((1, 2**30), "k_len")):
        with pytest.raises(ValueError, match=f"^{name}: expected 0 to"):
            core.leaves_out(*lengths, None, True)
    with pytest.raises(ValueError, match=r"^window: expected at least 1"):
        core.leaves_out(5, 5, 0, True)
