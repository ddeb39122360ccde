"""`dhsa.Config`: defaults, spellings of a method, values, presets. `_core.Config` is tested in test_config.py, files of
configurations in test_config_files.py."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
from weights import random_weights

import dhsa


def test_config_defaults():
    config = dhsa.Config()
    expected = {
        "budget": 1024,
        "query_block": 64,
        "sink": 16,
        "local": 128,
        "dense_tail": 64,
        "heads": "head",
        "boundaries": "fixed",
        "chunk_size": 2,
        "num_chunks": None,
        "boundary_window": 4,
        "theta": None,
        "nms": None,
        "method": "rows",
        "rows": None,
        "shortlist": None,
        "options": dhsa.methods.Rows(),
        "predictor": None,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert parsed(config) == {
        "method": "rows", "budget": 1024, "mass": None, "floor": 144, "query_block": 64, "sink": 16, "local": 128,
        "dense_tail": 64, "heads": "head", "boundaries": "fixed", "chunk_size": 2, "num_chunks": None,
        "boundary_window": 4, "theta": -math.inf, "nms": 2, "predictor": None, "rows": 32, "quantized": False,
        "shortlist": 4096, "pooling": "mean", "key_block": 128, "stride": None, "exact": False, "exact_up_to": 1024,
    }  # fmt: skip
    assert dhsa.Config(budget=3000)._core.shortlist == 12000
    similar = dhsa.Config(boundaries="similarity")
    assert similar._core.num_gaps(1000) == 250
    chunks = [similar._core.num_gaps(length) for length in (32_000, 40_000, 65_536, 131_072)]
    assert chunks == [8000, 8192, 8192, 16_384]


def test_how_keys_are_cut_follows_what_is_asked_for():
    """Similarity where one of its options is given, else as the method wants it."""
    for options in ({"num_chunks": 40}, {"num_chunks": "paper"}, {"boundary_window": 4}, {"theta": 0.0}, {"nms": 3}):
        assert dhsa.Config(**options).boundaries == "similarity"
        assert dhsa.Config(**options, boundaries="fixed").boundaries == "fixed"
        assert dhsa.Config().replace(**options).boundaries == "similarity"
    for options in ({}, {"chunk_size": 5}, {"budget": 300}, {"rows": 4}):
        assert dhsa.Config(**options).boundaries == "fixed"
    assert dhsa.Config(chunk_size=5).chunk_size == 5
    paper = dhsa.Config(method="dhsa")
    assert (paper.boundaries, paper.chunk_size, paper.heads) == ("similarity", 8, "group")
    assert (paper.replace(method="rows").boundaries, paper.replace(method="rows").chunk_size) == ("fixed", 2)


def parsed(config):
    """What the core made of a config."""
    values = {name: getattr(config._core, name) for name in dir(config._core) if name[0] != "_"}
    return {name: value for name, value in values.items() if not callable(value)}


def test_config_fits_default_forced_keys_into_a_small_budget():
    assert (dhsa.Config(budget=144).sink, dhsa.Config(budget=144).local) == (16, 128)
    assert (dhsa.Config(budget=128).sink, dhsa.Config(budget=128).local) == (16, 64)
    assert (dhsa.Config(budget=128, local=120).sink, dhsa.Config(budget=128, local=120).local) == (8, 120)
    assert dhsa.Config(budget=128, local=120).replace(budget=1024) == dhsa.Config(local=120)
    assert dhsa.Config().replace(budget=1).local == 0
    assert (dhsa.Config.paper(budget=64).sink, dhsa.Config.paper(budget=64).local) == (16, 32)


def test_config_paper():
    paper = dhsa.Config.paper()
    assert (paper.query_block, paper.local, paper.heads, paper.method, paper.pooling) == (
        256,
        128,
        "all",
        "dhsa",
        "mean_sqrt",
    )
    assert (paper._core.num_gaps(1000), paper._core.theta, paper._core.nms) == (24, -math.inf, 8)
    assert dhsa.Config.paper(budget=1024, nms=2).nms == 2
    predictor = dhsa.BoundaryPredictor.from_state_dict(random_weights(8, 4), heads=2)
    learned = dhsa.Config.paper(predictor=predictor)
    assert learned.boundaries == "predictor"
    assert (learned._core.num_gaps(1000), learned._core.theta, learned._core.nms) == (24, 1.1, 8)
    assert learned._core.predictor[:2] == (2, 4)  # heads, window


def test_config_spellings_of_a_method():
    flat = dhsa.Config(method="xattention", stride=16, mass=0.9)
    assert flat == dhsa.Config(method=dhsa.methods.XAttention(stride=16), mass=0.9) != dhsa.Config(method="xattention")
    assert (flat.method, flat.options, flat.stride, flat.key_block, flat.heads) == (
        "xattention",
        dhsa.methods.XAttention(stride=16),
        16,
        128,
        "head",
    )
    assert dhsa.Config(method="xattention") == dhsa.Config(method=dhsa.methods.XAttention())
    assert hash(flat) == hash(flat.replace())
    per_head = dhsa.Config(method="proxy", heads=None)
    assert (per_head.heads, per_head.stride) == ("head", 4)
    assert per_head.replace(method="block") == dhsa.Config(method="block")
    assert per_head.replace(method="block").heads == "group"
    assert per_head.replace(heads="all").heads == "all"
    assert per_head.replace(stride=2, budget=300) == dhsa.Config(method="proxy", stride=2, budget=300)
    assert per_head.replace(method="xattention", stride=2) == dhsa.Config(method="xattention", stride=2)
    assert flat.replace(method="xattention", key_block=64) == flat.replace(key_block=64)
    assert dhsa.Config.paper().replace(method="rows").method == "rows"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: dhsa.Config(method="block", stride=8),
            "^stride: is an option of method='xattention' and 'proxy'",
        ),
        (lambda: dhsa.Config(method="window", key_block=128), "^key_block: .*; method='window' has no options"),
        (lambda: dhsa.Config(pooling="mean"), "^pooling: is an option of method='dhsa'; method='rows' has rows, short"),
        (lambda: dhsa.Config(method="proxy").replace(rows=3), "^rows: is an option of method='rows' and 'hisa'"),
        (lambda: dhsa.Config(method="proxy").replace(method="block", stride=3), "^stride: is an option of"),
        (lambda: dhsa.Config(method=dhsa.methods.Proxy(), stride=2), "^stride: give options to dhsa.methods.Proxy or"),
        (lambda: dhsa.Config(method=dhsa.methods.Proxy), r"^method: .* got a class; write Proxy\(\)"),
        (
            lambda: dhsa.Config(score="block"),
            "^score: is gone; write method='rows' for score='rows'",
        ),
        (lambda: dhsa.Config(by_length=False), "^by_length: is gone; method='rows' always counts"),
        (lambda: dhsa.Config().replace(score="rows"), "^score: is gone"),
    ],
)
def test_config_options_of_another_method_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_config_attributes_that_are_not_there():
    with pytest.raises(AttributeError, match=r"^stride: is an option of .*; this Config has method='rows'"):
        _ = dhsa.Config().stride
    with pytest.raises(AttributeError, match=r"^score: is gone"):
        _ = dhsa.Config().score
    with pytest.raises(AttributeError, match="no attribute 'budgets'"):
        _ = dhsa.Config().budgets
    assert not hasattr(dhsa.Config(method="window"), "rows")


EXAMPLES = {
    "Config()": dhsa.Config(),
    "Config(budget=512)": dhsa.Config(budget=512, query_block=64),
    "Config(budget=None, mass=0.9)": dhsa.Config(mass=0.9, budget=None),
    "Config(method='window', sink=4)": dhsa.Config(method="window", sink=4),
    "Config(rows=16)": dhsa.Config(rows=16),
    "Config(method='hisa', key_block=64, dense_tail=0)": dhsa.Config(method="hisa", key_block=64, dense_tail=0),
    "Config(budget=64, sink=16)": dhsa.Config(budget=20, sink=16).replace(budget=64),
    "Config(budget=20, sink=16)": dhsa.Config(budget=20, sink=16),
    "Config(theta=-inf)": dhsa.Config(theta=-math.inf),
    "Config(boundaries='fixed', chunk_size=4, num_chunks='paper')": dhsa.Config(
        boundaries="fixed", chunk_size=4, num_chunks="paper"
    ),
}


@pytest.mark.parametrize("text", EXAMPLES)
def test_config_prints_pickles_and_becomes_a_dict(text):
    config = EXAMPLES[text]
    assert eval(text, {"Config": dhsa.Config, "inf": math.inf}) == config
    assert repr(config) == text or "budget=64, sink=16" in text
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert parsed(again) == parsed(config)
    words = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert dhsa.Config.from_dict(words) == config
    assert copy.deepcopy(config) == config


def test_config_with_a_predictor_becomes_a_dict(tmp_path):
    shipped = dhsa.Config(boundaries="predictor")
    assert shipped.to_dict() == {"boundaries": "predictor"}
    assert dhsa.Config.from_dict(shipped.to_dict()) == shipped
    own = dhsa.Config.paper(predictor=dhsa.BoundaryPredictor.from_state_dict(random_weights(8, 4), heads=2))
    with pytest.raises(ValueError, match=r"^predictor: .*save it and give its path"):
        own.to_dict()
    own.predictor.save(tmp_path / "p.safetensors")
    words = json.loads(json.dumps(own.to_dict(predictor=str(tmp_path / "p.safetensors"))))
    again = dhsa.Config.from_dict(words)
    assert again.replace(predictor=own.predictor) == own
    assert {**parsed(again), "predictor": None} == {**parsed(own), "predictor": None}
    with pytest.raises(TypeError, match=r"^values: expected a dict, got list"):
        dhsa.Config.from_dict([])


def test_config_mass():
    config = dhsa.Config(mass=0.9, budget=None, sink=100, local=200)
    assert (config._core.budget, config._core.mass, config._core.floor, config.exact_up_to) == (None, 0.9, 300, 300)
    floored = dhsa.Config(mass=0.9, floor=600)
    assert (floored._core.budget, floored._core.floor, floored.exact_up_to, floored.exact) == (1024, 600, 600, False)
    assert config.replace(mass=None) == dhsa.Config(budget=None, sink=100, local=200)


def test_config_of_a_source():
    assert dhsa.Config.source("window", budget=512) == dhsa.Config(method="window", budget=512)
    stem = dhsa.Config.source("xattention", dense_tail=0)
    assert (stem.mass, stem.budget, stem.key_block, stem.stride, stem.heads) == (0.9, None, 128, 8, "head")
    assert dhsa.Config.source("proxy", mass=0.5).mass == 0.5


def test_config_is_a_value():
    config = dhsa.Config(budget=512, sink=np.int64(4))
    assert config == dhsa.Config(budget=512, sink=4) != dhsa.Config(budget=512)
    assert hash(config) == hash(dhsa.Config(budget=512, sink=4))
    assert type(config.sink) is int
    assert config.replace(local=3) == dhsa.Config(budget=512, sink=4, local=3)
    assert pickle.loads(pickle.dumps(config)) == config
    assert "budget=512" in repr(config)
    with pytest.raises(AttributeError):
        config.budget = 3
    with pytest.raises(TypeError, match="no field 'sinks'; did you mean 'sink'"):
        config.replace(sinks=3)


def test_presets_are_the_default_with_other_budgets():
    assert dhsa.Config.fast() == dhsa.Config(boundaries="similarity", heads="group")
    assert dhsa.Config.fast(query_block=16, rows=4).options.rows == 4
    assert dhsa.Config.faithful() == dhsa.Config(budget=2048)
    changed = dhsa.Config.fast(budget=300, decode="dhsa")
    assert changed == dhsa.Config(budget=300, boundaries="similarity", heads="group", decode="dhsa")
    assert dhsa.Config.faithful(heads="group").heads == "group"
    with pytest.raises(TypeError, match="budgets"):
        dhsa.Config.fast(budgets=3)


def test_rows_are_means_of_two_queries():
    found = [dhsa.Config(query_block=n)._core.rows for n in (1, 2, 33, 64)]
    assert found == [1, 1, 17, 32]
    assert dhsa.Config(rows=64)._core.rows == 64
    with pytest.raises(ValueError, match="rows"):
        dhsa.Config(rows=65)


def test_chunks_are_pairs_unless_an_option_of_similarity_is_given():
    assert (dhsa.Config().boundaries, dhsa.Config().chunk_size) == ("fixed", 2)
    assert dhsa.Config(num_chunks=9).boundaries == dhsa.Config(nms=3).boundaries == "similarity"
    assert dhsa.Config(method="dhsa").boundaries == "similarity"
    assert dhsa.Config(boundaries="fixed", method="dhsa").chunk_size == 8
    assert dhsa.Config(num_chunks=9).replace(num_chunks=None) == dhsa.Config()
    assert dhsa.Config.from_dict(dhsa.Config(num_chunks=9).to_dict()) == dhsa.Config(num_chunks=9)
