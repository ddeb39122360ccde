"""Switching models to "dhsa" and back: patch, unpatch, patched, last_run; in any order, several models at once."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SIZES, SPARSE, build, same_in_threads, tokens  # noqa: E402

import dhsa  # noqa: E402


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_patch_and_unpatch_restore_the_implementation(models):
    model, ids = build("llama", "sdpa"), tokens(1, 200)
    before = model(ids).logits
    assert dhsa.patch(model, EXACT) is model
    assert model.config._attn_implementation == "dhsa"
    dhsa.patch(model, SPARSE)  # replaces the config, keeps what was there before the first
    model(ids)
    assert dhsa.last_run(model)[0].path == "sparse"
    assert dhsa.unpatch(model) is model
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match="not patched"):
        dhsa.unpatch(model)


def test_patched_nests_and_survives_exceptions(models):
    model, ids = models("gemma2"), tokens(1, 200)
    with dhsa.patched(model, EXACT):
        with dhsa.patched(model, SPARSE):
            model(ids)
            assert dhsa.last_run(model)[1].path == "sparse"
        model(ids)
        assert dhsa.last_run(model)[1].path == "dense"
        with pytest.raises(IndexError), dhsa.patched(model, SPARSE):
            model(torch.full((1, 9), SIZES["vocab_size"]))
        model(ids)
        assert dhsa.last_run(model)[1].path == "dense"
    assert model.config._attn_implementation == "eager"


def test_patched_leaves_the_model_as_it_was_whatever_happened_inside(models):
    model, ids = models("gemma2"), tokens(1, 200)
    with dhsa.patched(model, SPARSE):
        dhsa.unpatch(model)
    assert model.config._attn_implementation == "eager"
    with dhsa.patched(model, EXACT):
        with dhsa.patched(model, SPARSE):
            model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "dhsa"
        model(ids)
        assert dhsa.last_run(model)[1].path == "dense"
        with dhsa.patched(model, SPARSE):
            dhsa.unpatch(model)
        model(ids)
        assert dhsa.last_run(model)[1].path == "dense"
    assert model.config._attn_implementation == "eager"


def test_blocks_of_patched_that_do_not_nest(models):
    """The later block's configuration stays until that block ends; then the model is as it was before both."""
    model, ids = models("llama"), tokens(1, 200)
    first, second = dhsa.patched(model, EXACT), dhsa.patched(model, SPARSE)
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match=r"model: a block .* ended before one that began later"):
        first.__exit__(None, None, None)
    model(ids)
    assert dhsa.last_run(model)[0].path == "sparse"
    second.__exit__(None, None, None)
    assert model.config._attn_implementation == "eager"
    left = {name for module in model.modules() for name in vars(module) if name.startswith("_dhsa")}
    assert left <= {"_dhsa_runs"}  # what `last_run` tells
    with dhsa.patched(model, SPARSE):  # the error of a block hides none of the code in it
        outer, inner = dhsa.patched(model, EXACT), dhsa.patched(model, EXACT)
        outer.__enter__()
        inner.__enter__()
        error = KeyError("x")
        assert not outer.__exit__(KeyError, error, None)
        inner.__exit__(None, None, None)
        model(ids)
        assert dhsa.last_run(model)[0].path == "sparse"
    assert model.config._attn_implementation == "eager"


def test_blocks_of_patched_in_two_threads(models):
    model, ids = models("llama"), tokens(1, 200)
    with dhsa.patched(model, SPARSE), ThreadPoolExecutor(1) as pool:

        def block():
            with dhsa.patched(model, EXACT):
                raise AssertionError("not reached")

        with pytest.raises(RuntimeError, match="model: another thread is inside"):
            pool.submit(block).result(60)
        model(ids)
        assert dhsa.last_run(model)[0].path == "sparse"
    assert model.config._attn_implementation == "eager"


def test_an_attention_module_that_is_put_in_later(models):
    model, ids = build("llama"), tokens(1, 200)
    dhsa.patch(model, EXACT)
    old = model.model.layers[0].self_attn
    new = type(old)(model.config, 0).eval()
    new.load_state_dict(old.state_dict())
    model.model.layers[0].self_attn = new
    with pytest.raises(RuntimeError, match=r"LlamaAttention \(layer 0\) was put into the model after dhsa.patch"):
        model(ids)
    dhsa.patch(model, EXACT)
    found = model(ids).logits
    assert {run.path for run in dhsa.last_run(model)} == {"dense"}
    dhsa.unpatch(model)
    torch.testing.assert_close(found, model(ids).logits)


def test_models_built_from_one_config_are_patched_apart(models):
    """transformers keeps the implementation in the config, and hands one config object to both."""
    ids, config = tokens(1, 300), models("gemma2").config
    torch.manual_seed(3)
    first, second, third = (transformers.Gemma2ForCausalLM(copy.deepcopy(config)).eval() for _ in range(3))
    for model in (second, third):
        for part in model.modules():
            if hasattr(part, "config"):
                part.config = first.config
    expected = third(ids).logits
    dhsa.patch(first, SPARSE)
    dhsa.patch(second, EXACT)
    assert torch.equal(third(ids).logits, expected)
    assert dhsa.last_run(third) == []
    dhsa.unpatch(first)
    assert first.config._attn_implementation == "eager"
    second(ids)
    assert [r.path for r in dhsa.last_run(second)] == ["window", "dense"] * 2
    dhsa.unpatch(second)
    assert second.config._attn_implementation == "eager"
    # One object a model, still: an edit of it must reach the modules.
    assert len({id(m.config) for m in first.modules() if hasattr(m, "config")}) == 1


def test_two_models_with_two_configs_in_two_threads(models):
    wide = dhsa.Config(budget=160, sink=8, local=32, query_block=32, dense_tail=16, break_even=0)
    pairs = [(build("gemma2"), SPARSE), (build("llama"), wide)]
    ids = tokens(1, 500)
    expected = [dhsa.patch(model, config)(ids).logits for model, config in pairs]
    assert {r.path for model, _ in pairs for r in dhsa.last_run(model) if r.kind == "full"} == {"sparse"}
    same_in_threads([lambda model=model: model(ids).logits for model, _ in pairs], expected)


def test_patched_model_can_be_copied(models):
    model, ids = models("gemma2"), tokens(1, 200)
    with dhsa.patched(model, SPARSE):
        twin = copy.deepcopy(model)
        expected = model(ids).logits
    assert twin.config._attn_implementation == "dhsa"
    assert torch.equal(twin(ids).logits, expected)
    dhsa.unpatch(twin)
    assert twin.config._attn_implementation == "eager"


def test_patch_rejects(models, monkeypatch):
    model = models("gemma2")
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        dhsa.patch(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"config: expected a dhsa\.Config, .* or None, got dict"):
        dhsa.patch(model, {"budget": 3})
    with pytest.raises(ValueError, match=r"layers: \[4, 9\] not in this model, whose layers are 0\.\.3"):
        dhsa.patch(model, SPARSE, layers=[1, 4, 9])
    with pytest.raises(TypeError, match="layers: expected layer indices"):
        dhsa.patch(model, SPARSE, layers=["1"])
    with pytest.raises(TypeError, match="layers: expected layer indices or None, got 3"):
        dhsa.patch(model, SPARSE, layers=3)
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got int"):
        dhsa.unpatch(3)
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        dhsa.patched(torch.nn.Linear(2, 2)).__enter__()
    with pytest.raises(TypeError, match="model: expected a torch module, got int"):
        dhsa.last_run(3)
    # transformers refuses by a logged warning only
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="does not support changing its attention implementation"):
        dhsa.patch(model, SPARSE)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="step: expected"):
        dhsa.last_run(model, "both")


def test_last_run_of_a_model_that_never_ran():
    assert dhsa.last_run(build("llama")) == []


def test_last_run_says_what_was_skipped():
    """Padded prompts as well: what `skip` leaves out does not hang on the way a mask takes."""
    model, ids = build("llama"), tokens(1, 600)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(60)  # random weights would attend to everything
    for config in (EXACT, dhsa.Config(budget=400, query_block=64, sink=16, local=64)):
        for mask in (torch.ones(1, 600), torch.arange(600)[None] >= 40):
            with dhsa.patched(model, config.replace(skip=0.5)):
                model(ids, attention_mask=mask.long())
                assert all(0 < r.skipped < 1 for r in dhsa.last_run(model))
            with dhsa.patched(model, config):
                model(ids, attention_mask=mask.long())
                assert all(r.skipped == 0 for r in dhsa.last_run(model))
