"""Files of a Config and of LayerConfigs: what is written is read again, what is damaged is refused in a sentence."""

import contextlib
import copy
import json
import math
import os
import pickle

import hypothesis
import hypothesis.strategies as st
import pytest

import dhsa
from dhsa.config import FORMAT, MAX_FILE_BYTES

MODEL = {"model_type": "llama", "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": None}
CONFIGS = {
    "default": dhsa.Config(),
    "exact": dhsa.Config(budget=None, skip=0.001),
    "paper": dhsa.Config.paper(budget=512),
    "xattention": dhsa.Config(method="xattention", stride=8, mass=0.9, budget=None, floor=600),
    "fixed": dhsa.Config(budget=300, heads="head", boundaries="fixed", chunk_size=2, rows=16, break_even=5000),
    "theta": dhsa.Config(theta=-math.inf, nms=0, num_chunks=77, decode="dhsa", share="boundaries"),
    "network": dhsa.Config(boundaries="predictor"),
}


def layered(**changes):
    layers = {3: dhsa.Config(budget=512), 0: dhsa.Config(budget=None), 2: dhsa.Config(heads="group")}
    return dhsa.LayerConfigs(**{"default": dhsa.Config(budget=700), "layers": layers, "model": MODEL} | changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_read_as_it_was_written(tmp_path, name):
    config, path = CONFIGS[name], tmp_path / "config.json"
    config.save(path)
    again = dhsa.Config.load(path)
    assert again == config
    assert again._core.heads == config._core.heads  # of the method, where none was asked for
    assert again.replace(method="window", mass=None, floor=None, decode="exact", share=None).method == "window"
    assert dhsa.Config.load(str(path)) == config
    path.write_text(json.dumps(config.to_dict()))
    assert dhsa.Config.load(path) == config


def test_a_file_does_not_depend_on_defaults(tmp_path):
    """Every field is in it, and a file of an earlier release may lack one."""
    path = tmp_path / "config.json"
    dhsa.Config().save(path)
    found = json.loads(path.read_text())
    missing = set(dhsa.config.FIELDS) - set(found["config"])
    assert missing == {"predictor"}
    assert {"rows", "shortlist"} <= set(found["config"])
    del found["config"]["skip"]
    path.write_text(json.dumps(found))
    assert dhsa.Config.load(path) == dhsa.Config()


def test_configs_of_layers_are_read_as_they_were_written(tmp_path):
    configs, path = layered(notes={"kl": 0.02, "texts": ["a", "b"]}), tmp_path / "configs.json"
    configs.save(path)
    again = dhsa.Config.load(path)
    assert again == configs
    assert hash(again) == hash(configs)
    assert repr(again) == repr(pickle.loads(pickle.dumps(again)))
    assert again.notes == configs.notes
    assert list(again.layers) == [0, 2, 3]
    assert [again.at(layer).budget for layer in (None, 0, 1, 2, 3, 9)] == [700, None, 700, 1024, 512, 700]
    for twin in (pickle.loads(pickle.dumps(again)), copy.deepcopy(again), copy.copy(again)):
        assert (twin, twin.notes) == (configs, configs.notes)
    assert again != layered(model=None)
    assert again.replace(skip=0.01).at(2) == dhsa.Config(heads="group", skip=0.01)
    assert again.replace(skip=0.01).notes == configs.notes
    with pytest.raises(TypeError):
        again.layers[1] = dhsa.Config()


def test_a_network_of_its_own_is_named_by_its_path(tmp_path):
    network = dhsa.BoundaryPredictor.default().layer(5)
    network.save(tmp_path / "net.safetensors")
    config = dhsa.Config(boundaries="predictor", predictor=network)
    with pytest.raises(ValueError, match="predictor: a network cannot be stored"):
        config.save(tmp_path / "config.json")
    assert not list(tmp_path.glob("*.json"))
    configs = dhsa.LayerConfigs(default=config, layers={0: config.replace(budget=512), 1: dhsa.Config()})
    configs.save(tmp_path / "configs.json", predictor="net.safetensors")  # relative to the file, not to the process
    again = dhsa.Config.load(tmp_path / "configs.json")
    assert again.default.predictor is again.at(0).predictor
    assert again.at(1).predictor is None
    assert (again.default.predictor.state_dict()["project.bias"] == network.state_dict()["project.bias"]).all()
    other = config.replace(predictor=dhsa.BoundaryPredictor.default().layer(11))
    with pytest.raises(ValueError, match="different networks"):
        dhsa.LayerConfigs(default=config, layers={0: other}).save(tmp_path / "x.json", predictor="net.safetensors")
    (tmp_path / "net.safetensors").unlink()
    with pytest.raises(OSError, match="net"):
        dhsa.Config.load(tmp_path / "configs.json")


# ---- what is refused -------------------------------------------------------------------------------------------------


def good():
    return {"format": FORMAT, "version": 1, "config": {"budget": 512}, "layers": {"1": {"budget": 256}}}


def changed(**values):
    return json.dumps({key: value for key, value in (good() | values).items() if value != "gone"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        (changed()[:-3], "no JSON"),
        (b"\xff\xfe{}", "not in UTF-8"),
        ("[" * 100_000, "too deep"),
        ("[]", "expected an object of JSON, got list"),
        ("3", "expected an object of JSON, got int"),
        (changed(format="dhsa"), "format: expected 'dhsa.config', got 'dhsa'"),
        (changed(format=None), "format: expected 'dhsa.config', got 'None'"),
        (changed(format="gone"), "Config has no field 'version'"),
        (changed(version=2), "version: this release reads 1, got 2"),
        (changed(version=True), "version: this release reads 1, got True"),
        (changed(version="gone"), "version: this release reads 1, got None"),
        (changed(extra=1), "'extra' is not known"),
        (changed(config="gone"), "config: is missing"),
        (changed(config=None), "values: expected a dict, got NoneType"),
        (changed(config={"budgets": 1}), "Config has no field 'budgets'; did you mean 'budget'"),
        (changed(config={"budget": "512"}), "budget: expected an int"),
        (changed(config={"budget": 0}), "budget: "),
        (changed(config={"method": "window", "rows": 8}), "rows: is an option of method='rows'"),
        (changed(config={"options": {}}), "Config has no field 'options'"),
        (changed(config={"predictor": 5}), "predictor: expected a dhsa.BoundaryPredictor, got int"),
        ('{"format": "dhsa.config", "version": 1, "config": {"theta": NaN}}', "NaN is no number of JSON"),
        ('{"format": "dhsa.config", "version": 1, "config": {"mass": Infinity}}', "Infinity is no number"),
        ('{"format": "dhsa.config", "version": 1, "config": {}, "config": {}}', "a name twice"),
        (changed(layers=[1]), "layers: expected an object, got list"),
        (changed(layers={"one": {}}), "layers: expected indices, got 'one'"),
        (changed(layers={"01": {}}), "layers: expected indices, got '01'"),
        (changed(layers={"-1": {}}), "layers: expected indices, got '-1'"),
        (changed(layers={"1000000": {}}), "layers: expected indices"),
        (changed(layers={"7": {"budget": -1}}), "layer 7: budget: "),
        (changed(layers={"7": None}), "layer 7: values: expected a dict"),
        (changed(layers={"1": {"share": "boundaries"}}), "share: layers share with each other"),
        (changed(model=[1]), "model: expected a dict, got list"),
        (changed(notes="x"), "notes: expected a dict, got str"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        dhsa.Config.load(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        dhsa.Config.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="not a regular file"):
        dhsa.Config.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        dhsa.Config.load(tmp_path / "pipe")  # does not wait for a writer
    big = tmp_path / "big.json"
    big.write_text(json.dumps(good()) + " " * MAX_FILE_BYTES)
    with pytest.raises(ValueError, match="more than 4,194,304 bytes"):
        dhsa.Config.load(big)


def test_what_was_there_stays_if_writing_fails(tmp_path):
    path = tmp_path / "configs.json"
    layered().save(path)
    with pytest.raises(TypeError):
        layered(notes={"set": {1}}).save(path)
    with pytest.raises(ValueError, match="JSON"):
        layered(notes={"kl": math.nan}).save(path)
    assert dhsa.Config.load(path) == layered()
    assert [p.name for p in tmp_path.iterdir()] == ["configs.json"]


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=300, deadline=None)
def test_a_file_with_any_change_is_read_or_refused_in_a_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "changed.json"
    layered().save(path)
    text = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "twice"]))
        if kind == "byte":
            text[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del text[at : at + data.draw(st.integers(1, 40))]
        else:
            text[at:at] = text[at : at + 30]
        if not text:
            break
    path.write_bytes(text)
    assert read_or_refused(path)


def read_or_refused(path):
    """Whether a file is read as configs, or refused by an error that names it."""
    try:
        return isinstance(dhsa.Config.load(path), (dhsa.Config, dhsa.LayerConfigs))
    except ValueError as error:
        return str(error).startswith(f"{path}: ")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@hypothesis.given(
    st.sampled_from(["", "config", "layers", "layer"]),
    st.sampled_from([*dhsa.config.FIELDS, *dhsa.config.OPTIONS, "format", "version", "layers", "model", "notes", "1"]),
    VALUES,
)
@hypothesis.settings(max_examples=400, deadline=None)
def test_a_value_of_any_kind_is_read_or_refused_in_a_sentence(tmp_path_factory, where, name, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    found = good()
    part = {"": found, "config": found["config"], "layers": found["layers"], "layer": found["layers"]["1"]}[where]
    part[name] = value
    path.write_text(json.dumps(found))
    with contextlib.suppress(FileNotFoundError) if name == "predictor" else contextlib.nullcontext():  # a path
        assert read_or_refused(path)


# ---- LayerConfigs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"default": None}, TypeError, "^default: expected a dhsa.Config, got NoneType"),
        ({"default": layered()}, TypeError, "^default: expected a dhsa.Config, got LayerConfigs"),
        ({"layers": [dhsa.Config()]}, TypeError, "^layers: expected a dict, got list"),
        ({"layers": {0: {}}}, TypeError, "^layers: expected a dhsa.Config for layer 0, got dict"),
        ({"layers": {"0": dhsa.Config()}}, TypeError, "^layers: an index: expected an int, got str"),
        ({"layers": {-1: dhsa.Config()}}, ValueError, "^layers: an index: expected"),
        ({"model": "llama"}, TypeError, "^model: expected a dict, got str"),
        ({"notes": None}, TypeError, "^notes: expected a dict, got NoneType"),
    ],
)
def test_arguments_are_checked(changes, error, message):
    with pytest.raises(error, match=message):
        layered(**changes)


def test_layers_that_share_must_agree():
    base = dhsa.Config(share="boundaries", boundaries="fixed", chunk_size=4)
    exact = dhsa.Config(budget=None, share="boundaries")
    made = dhsa.LayerConfigs(default=base, layers={0: base.replace(budget=512, heads="head"), 1: exact})
    assert made.share == "boundaries"
    with pytest.raises(ValueError, match=r"^share: boundaries of one layer .* chunk_size must be the same"):
        dhsa.LayerConfigs(default=base, layers={0: base.replace(chunk_size=2)})
    with pytest.raises(ValueError, match=r"^share: layers share with each other.*\"'boundaries'\", 'None'"):
        dhsa.LayerConfigs(default=base, layers={0: dhsa.Config()})
    base = dhsa.Config(share="selections")
    dhsa.LayerConfigs(default=base, layers={0: base, 1: exact.replace(share="selections")})
    with pytest.raises(ValueError, match=r"^share: selections of one layer .* budget must be the same"):
        dhsa.LayerConfigs(default=base, layers={0: base.replace(budget=512)})


def test_arrays_take_one_config():
    import numpy as np

    q = np.zeros((1, 1, 4, 8), np.float32)
    with pytest.raises(TypeError, match=r"config: expected a dhsa\.Config or None, got LayerConfigs"):
        dhsa.attention(q, q, q, layered())
