"""A Config for each layer of a model: the same numbers as giving each module its Config by hand, wherever a model's
Config is read."""

import dataclasses
import json
from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", reason="needs the hf extra")

from tiny import EXACT, SPARSE, build, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa import hf  # noqa: E402
from dhsa.hf import switching  # noqa: E402
from dhsa.hf.compat import cache_option  # noqa: E402

FAMILIES = ["llama", "gemma3"]
BASE = SPARSE.replace(break_even=0)
LAYERS = {
    0: BASE.replace(budget=64),
    1: BASE.replace(budget=80, heads="head", boundaries="fixed", chunk_size=2),
    3: BASE.replace(query_block=16, rows=16, dense_tail=0),
}
CONFIGS = dhsa.LayerConfigs(default=BASE, layers=LAYERS)
STEPS = CONFIGS.replace(decode="dhsa")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@contextmanager
def by_hand(model, configs):
    """Each attention module is given the state of a model that is patched with its Config."""
    with dhsa.patched(model, configs.default):
        for module in switching.attention_modules(model):
            if hasattr(module, "layer_idx"):
                module.__dict__[switching.STATE] = switching.State(configs.at(module.layer_idx), None, ())
        yield


def feed(model, cache, ids):
    return model(ids, **cache_option(model, cache), use_cache=True).logits


def pieces(model, ids, sizes, steps):
    """Logits of a prompt in pieces and of steps after it, and the records of the last of each."""
    cache = transformers.DynamicCache(config=model.config)
    parts = ids[:, : sum(sizes)].split(sizes, 1)
    found = [feed(model, cache, part) for part in (*parts, *ids[:, sum(sizes) :][:, :steps].split(1, 1))]
    return torch.cat(found, 1), dhsa.last_run(model, "prefill"), dhsa.last_run(model, "decode")


def shown(runs):
    return [(run.layer, run.path, run.density, run.reason) for run in runs]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("configs", [CONFIGS, STEPS], ids=["exact steps", "sparse steps"])
@pytest.mark.parametrize("sizes", [[300], [140, 60, 100]], ids=["whole", "pieces"])
def test_each_layer_has_its_own(models, tmp_path, family, configs, sizes):
    model, ids = models(family), tokens(2, 310)
    dataclasses.replace(configs, model=hf.model_facts(model)).save(tmp_path / "configs.json")
    with by_hand(model, configs):
        expected, prefill, decode = pieces(model, ids, sizes, 10)
    for given in (configs, tmp_path / "configs.json", str(tmp_path / "configs.json")):
        with dhsa.patched(model, given):
            got, *runs = pieces(model, ids, sizes, 10)
        assert torch.equal(got, expected)
        assert [shown(r) for r in runs] == [shown(prefill), shown(decode)]
    densities = {run.density for run in prefill if run.kind == "full"}
    assert len(densities) == sum(run.kind == "full" for run in prefill)  # each layer attended to another number of keys
    with dhsa.patched(model, configs.default):
        assert not torch.equal(pieces(model, ids, sizes, 10)[0], expected)


def test_generation(models):
    model, ids = models("llama"), tokens(1, 300)
    options = {"max_new_tokens": 12, "do_sample": False}
    with by_hand(model, STEPS):
        expected = model.generate(ids, **options)
    with dhsa.patched(model, STEPS):
        assert torch.equal(model.generate(ids, **options), expected)


def test_layers_still_says_which_may_be_sparse(models):
    model, ids = models("llama"), tokens(1, 300)
    with dhsa.patched(model, CONFIGS, layers=[1, 2]):
        model(ids)
        assert [run.path for run in dhsa.last_run(model)] == ["dense", "sparse", "sparse", "dense"]


def test_a_config_without_selection_for_one_layer(models):
    model, ids = models("llama"), tokens(1, 300)
    with dhsa.patched(model, dhsa.LayerConfigs(default=EXACT, layers={2: BASE})):
        model(ids)
        assert [run.path for run in dhsa.last_run(model)] == ["dense", "dense", "sparse", "dense"]


@pytest.mark.parametrize("share", ["boundaries", "selections"])
def test_layers_that_share(models, share):
    model, ids = models("llama"), tokens(1, 300)
    layers = {1: BASE.replace(budget=64)} if share == "boundaries" else {1: EXACT}
    configs = dhsa.LayerConfigs(default=BASE, layers=layers).replace(share=share)
    with dhsa.patched(model, configs):
        model(ids)
        runs = dhsa.last_run(model)
    with dhsa.patched(model, BASE.replace(share=share)):
        model(ids)
        plain = dhsa.last_run(model)
    assert [run.density == other.density for run, other in zip(runs, plain, strict=True)] == [True, False, True, True]


# ---- models of another shape -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_hidden_layers": 5}, "config: made for a model with num_hidden_layers 5, but this one has 4; make one"),
        ({"num_attention_heads": 8, "head_dim": 64}, "num_attention_heads 8, head_dim 64, but this one has 4, "),
        ({"model_type": "qwen2"}, "model_type 'qwen2', but this one has 'llama'"),
    ],
)
def test_another_model_is_refused(models, tmp_path, facts, message):
    model = models("llama")
    assert hf.model_facts(model)["num_attention_heads"] == 4
    configs = dataclasses.replace(CONFIGS, model=hf.model_facts(model) | facts)
    configs.save(tmp_path / "configs.json")
    before = model.config._attn_implementation
    for given in (configs, tmp_path / "configs.json"):
        with pytest.raises(ValueError, match=message):
            dhsa.patch(model, given)
        with pytest.raises(ValueError, match=message):
            dhsa.check(model, tokens(1, 64), given)
    assert model.config._attn_implementation == before
    assert switching.STATE not in model.__dict__


def test_layers_that_are_not_there_are_refused(models):
    configs = dhsa.LayerConfigs(default=BASE, layers={3: BASE, 4: BASE})
    with pytest.raises(ValueError, match=r"^config: has configs of layers \[4\], but those of this model are 0\.\.3"):
        dhsa.patch(models("llama"), configs)


def test_other_arguments_are_refused(models, tmp_path):
    for given in (3, {"budget": 5}):
        with pytest.raises(TypeError, match=r"^config: expected a dhsa\.Config, dhsa\.LayerConfigs, the path of"):
            dhsa.patch(models("llama"), given)
    with pytest.raises(FileNotFoundError):
        dhsa.patch(models("llama"), tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: no JSON"):
        dhsa.patch(models("llama"), tmp_path / "x.json")


# ---- the default, graphs, checks, saved prompts ----------------------------------------------------------------------


def test_as_the_default_of_models_that_are_loaded_as_dhsa(models, monkeypatch):
    model, ids = build("llama", "dhsa"), tokens(1, 300)
    other = models("llama")
    with by_hand(other, CONFIGS):
        expected = other(ids).logits
    monkeypatch.setattr(switching, "DEFAULT", dataclasses.replace(CONFIGS, model=hf.model_facts(model)))
    assert torch.equal(model(ids).logits, expected)
    with dhsa.patched(other):
        assert torch.equal(other(ids).logits, expected)
    with pytest.raises(ValueError, match="config: made for a model with model_type 'llama'"):
        build("qwen2", "dhsa")(ids)


@pytest.mark.skipif(not hf.compat.GRAPHS, reason="compiled graphs have our operators from torch 2.13 on")
def test_in_graphs(models):
    model, ids = models("llama"), tokens(1, 300)
    with by_hand(model, CONFIGS):
        expected = model(ids).logits
    with dhsa.patched(model, CONFIGS):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(ids).logits, expected)
        assert len({run.density for run in dhsa.last_run(model)}) == 4
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    frozen = [node.args[5] for node in program.graph.nodes if "dhsa.attention" in str(node.target)]
    assert [dhsa.Config.from_dict(json.loads(words)["config"]) for words in frozen] == [
        CONFIGS.at(layer) for layer in range(4)
    ]
    assert torch.equal(program.module()(ids, use_cache=False).logits, expected)


def test_check(models):
    model, ids = models("llama"), tokens(1, 300)
    configs = dhsa.LayerConfigs(default=BASE, layers={0: BASE.replace(budget=400), 1: EXACT})
    found = dhsa.check(model, ids, configs)
    assert found.config is configs
    assert [layer.path for layer in found.layers] == ["dense", "dense", "sparse", "sparse"]
    assert found.layers[0].why == "the prompt's 300 keys are within the budget of 400"
    assert found.layers[1].why == "the config is exact, with neither a budget nor a mass"
    with dhsa.patched(model, configs, layers=[2]):
        again = dhsa.check(model, ids)
    assert again.config is configs
    assert [layer.path for layer in again.layers] == ["dense", "dense", "sparse", "dense"]
    assert again.layers[3].why == "it is not among layers="


def test_networks_of_layers():
    predictor = dhsa.BoundaryPredictor.default()
    network = dhsa.BoundaryPredictor.from_state_dict(dict(predictor.layer(5).state_dict()), window=predictor.window)
    assert network.model is None
    model = build("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=network.channels)
    cut = BASE.replace(boundaries="predictor", predictor=network)
    configs = dhsa.LayerConfigs(default=BASE, layers={2: cut})
    model(tokens(1, 32))
    ids = tokens(1, 300)
    with by_hand(model, configs):
        expected = model(ids).logits
    with dhsa.patched(model, configs):
        assert torch.equal(model(ids).logits, expected)
    with dhsa.patched(model, BASE):
        assert not torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="predictor: trained for a model with model_type 'gemma3_text'"):
        dhsa.patch(model, dhsa.LayerConfigs(default=BASE, layers={2: cut.replace(predictor=predictor)}))


def test_saved_prompts(models, tmp_path):
    model, ids = models("llama"), tokens(1, 310)
    with dhsa.patched(model, STEPS):
        cache = transformers.DynamicCache(config=model.config)
        feed(model, cache, ids[:, :300])
        dhsa.save_cache(cache, tmp_path / "prompt.safetensors", model=model, tokens=ids[:, :300])
        assert hf.saved.attention_of(model) == repr(STEPS)
        expected = torch.cat([feed(model, cache, part) for part in ids[:, 300:].split(1, 1)], 1)
        opened = dhsa.load_cache(tmp_path / "prompt.safetensors", model)
        got = torch.cat([feed(model, opened, part) for part in ids[:, 300:].split(1, 1)], 1)
    assert torch.equal(got, expected)
