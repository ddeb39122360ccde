"""Switching in any order: a random walk over patch, unpatch, patched, set_attn_implementation, parts of models and
exceptions leaves every model as it was, or refuses; threads do not mix; what cannot be switched says so."""

import copy
import pickle
import threading
from contextlib import ExitStack

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tiny import EXACT, IMAGES, SPARSE, build, tokens  # noqa: E402

import dhsa  # noqa: E402
import dhsa.hf  # noqa: E402

SHARED = SPARSE.replace(share="boundaries")
CONFIGS = [EXACT, SPARSE, SHARED]
KEPT = "_dhsa_runs"  # what last_run tells stays


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def attributes(model):
    """Every attribute of every module by identity, what the registries of hooks hold, and what the configs name."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == KEPT:
                continue
            if key in ("_dhsa_hook", "_dhsa_hooks", "_dhsa_handle"):
                found[name, key] = True
            elif "hooks" in key:
                found[name, key] = len(value or ())  # numbered anew when put back
            else:
                found[name, key] = id(value)
        if hasattr(module, "config"):
            found[name, "implementation"] = module.config._attn_implementation
    return found


def family_of(name):
    """(whole model, its part)"""
    model = build(name)
    return model, (model.model.language_model if name == IMAGES else model.model)


PAIRS = {}


def pair(name):
    if name not in PAIRS:
        PAIRS[name] = family_of(name)
    return PAIRS[name]


STEP = st.tuples(
    st.sampled_from(["patch", "unpatch", "with", "raise", "set", "run"]),
    st.integers(0, 1),  # the model or its part
    st.integers(0, 2),  # which config, or which implementation
)


class Stop(Exception):
    pass


def unpatched(model):
    """Unpatches it if it is patched and nothing lies over it."""
    try:
        dhsa.unpatch(model)
    except ValueError as error:
        if "not patched" not in str(error) and "patched later" not in str(error):
            raise
        return False
    return True


@settings(max_examples=50, deadline=None)
@example(
    name=IMAGES, steps=[("patch", 1, 1), ("patch", 0, 1)]
)  # what transformers notes of parts must not be taken over
@given(name=st.sampled_from(["llama", "gemma2", IMAGES]), steps=st.lists(STEP, max_size=12))
def test_any_order_leaves_the_model_as_it_was(name, steps):
    both = pair(name)
    before = attributes(both[0])
    implementations = ["eager", "sdpa" if both[0]._supports_sdpa else "eager", "dhsa"]
    try:
        for what, which, number in steps:
            model = both[which]
            if what == "patch":
                dhsa.patch(model, CONFIGS[number])
            elif what == "unpatch":
                unpatched(model)
            elif what in ("with", "raise"):
                seen = attributes(both[0])
                with ExitStack() as stack:
                    stack.enter_context(pytest.raises(Stop) if what == "raise" else ExitStack())
                    with dhsa.patched(model, CONFIGS[number]):
                        if number == 0:
                            model.set_attn_implementation(implementations[which])
                        if number == 1:
                            dhsa.unpatch(model)
                        if number == 2:
                            dhsa.patch(both[1], EXACT)
                        if what == "raise":
                            raise Stop
                assert changed(seen, attributes(both[0])) == {}
            elif what == "set":
                model.set_attn_implementation(implementations[number])
            elif what == "run" and name != IMAGES:
                both[0](tokens(1, 9))
    finally:
        for _ in range(30):  # from the top down
            if not any([unpatched(both[1]), unpatched(both[0])]):
                break
        both[0].set_attn_implementation("eager")
    assert changed(before, attributes(both[0])) == {}


def changed(before, after):
    return {
        key: (before.get(key), after.get(key))
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    }


def test_a_part_is_patched_over_its_model_and_unpatched_first():
    model, ids = build("llama"), tokens(1, 300)
    dhsa.patch(model, EXACT)
    dhsa.patch(model.model, SPARSE, layers=[1])
    model(ids)
    assert [r.path for r in dhsa.last_run(model)] == ["dense", "sparse", "dense", "dense"]
    with pytest.raises(ValueError, match=r"a part of it.*was patched later; unpatch that first"):
        dhsa.unpatch(model)
    dhsa.unpatch(model.model)
    model(ids)
    assert {r.path for r in dhsa.last_run(model)} == {"dense"}
    dhsa.unpatch(model)
    assert model.config is model.model.config  # one object, as transformers made it
    model.set_attn_implementation("sdpa")
    assert model.model.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_what_is_set_in_a_config_while_patched_stays():
    model = build("llama")
    config = model.config
    with dhsa.patched(model, EXACT):
        assert model.config is not config
        model.config.use_cache = False
        model.config.rope_parameters["factor"] = 9.0
    assert model.config is config
    assert config.use_cache is False
    assert config.rope_parameters["factor"] == 9.0
    assert config._attn_implementation == "eager"


def test_a_part_that_refuses_makes_patch_raise(monkeypatch):
    """transformers logs a warning and goes on with the rest of the model."""
    model = build(IMAGES)
    before = attributes(model)
    language = type(model.model.language_model)
    monkeypatch.setattr(language, "_can_set_attn_implementation", classmethod(lambda cls: False))
    for context in (dhsa.patch, lambda m: dhsa.patched(m).__enter__()):
        with pytest.raises(ValueError, match=f"{language.__name__} does not support changing"):
            context(model)
        assert changed(before, attributes(model)) == {}


def test_a_switch_that_fails_on_a_patched_model_leaves_it_patched(monkeypatch):
    model, ids = build("llama"), tokens(1, 300)
    dhsa.patch(model, SPARSE)
    model.set_attn_implementation("eager")
    before = attributes(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
        with pytest.raises(ValueError, match="does not support changing"):
            dhsa.patch(model, EXACT)
    assert changed(before, attributes(model)) == {}
    model.set_attn_implementation("dhsa")
    model(ids)
    assert {r.path for r in dhsa.last_run(model)} == {"sparse"}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_copy_of_a_patched_model_is_its_own(implementation):
    model = build("llama", implementation)
    dhsa.patch(model, SPARSE)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert dhsa.unpatch(twin).config._attn_implementation == implementation
        assert twin.config is twin.model.config is not model.config
    assert model.config._attn_implementation == "dhsa"
    dhsa.unpatch(model)


def test_threads_that_switch_and_run_do_not_mix():
    """Two models of one config object, each patched and unpatched in its own thread while the other runs."""
    pair = [build("llama"), build("llama")]
    for module in pair[1].modules():
        if hasattr(module, "config"):
            module.config = pair[0].config
    ids, wide = tokens(1, 300), SPARSE.replace(budget=160)
    expected = []
    for model, config in zip(pair, (SPARSE, wide), strict=True):
        with dhsa.patched(model, config):
            expected.append((model(ids).logits, [r.density for r in dhsa.last_run(model)]))
    assert expected[0][1] != expected[1][1]
    wrong = []

    def work(which, config):
        with torch.no_grad():
            for _ in range(6):
                with dhsa.patched(pair[which], config):
                    logits = pair[which](ids).logits
                    densities = [r.density for r in dhsa.last_run(pair[which])]
                if not torch.equal(logits, expected[which][0]) or densities != expected[which][1]:
                    wrong.append(which)
                if pair[which].config._attn_implementation != "eager":
                    wrong.append("config")

    threads = [threading.Thread(target=work, args=(which, config)) for which, config in enumerate((SPARSE, wide))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
