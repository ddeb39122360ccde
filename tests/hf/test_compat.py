"""What differs between releases of transformers: the cache is found whatever it is called, its absence is said, and a
release that is too old is refused by its name."""

import inspect
import subprocess
import sys
import warnings

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import build, tokens  # noqa: E402
from transformers import DynamicCache, EncoderDecoderCache  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf import attention, caches, compat  # noqa: E402
from dhsa.hf.switching import attention_modules  # noqa: E402

STEPS = dhsa.Config(budget=64, sink=4, local=16, query_block=16, dense_tail=0, decode="dhsa")
PROMPT = 250


def kept_by(cache):
    """Of each layer of a cache, how many keys the chunks that are kept beside it reach."""
    kept = [getattr(layer, caches._KEPT, None) for layer in cache.layers]
    return [0 if k is None else max((index.boundaries or [0])[-1] for index in k.key_indexes.values()) for k in kept]


def read(model, cache):
    """Logits of a step after a prompt, both through `cache`."""
    with torch.no_grad():
        model(tokens(1, PROMPT), **compat.cache_option(model, cache), use_cache=True)
        return model(tokens(1, 1, seed=1), **compat.cache_option(model, cache), use_cache=True).logits


def renaming(name):
    """A hook that hands a module's cache over under another name; with name None, as something that is no cache."""

    def hook(module, args, kwargs):
        for old in ("cache", "past_key_values"):
            if kwargs.get(old) is not None:
                module.handed = kwargs.pop(old)
                kwargs[name or "unheard_of"] = module.handed if name else (module.handed,)
        return args, kwargs

    return hook


def unrenamed(module, args, kwargs):
    """The hook after the one that looks for caches: the module itself gets what it knows."""
    for name in list(kwargs):
        if name in ("another_name", "unheard_of"):
            del kwargs[name]
            own = inspect.signature(module.forward).parameters
            kwargs["cache" if "cache" in own else "past_key_values"] = module.handed
    return args, kwargs


def test_what_a_model_keeps_is_found_on_this_release():
    model = build("llama")
    with dhsa.patched(model, STEPS):
        cache = DynamicCache(config=model.config)
        read(model, cache)
        assert kept_by(cache) == [PROMPT + 1] * model.config.num_hidden_layers
        assert {run.reason for run in dhsa.last_run(model)} == {""}


def test_a_cache_is_found_by_another_name():
    model = build("llama")
    with dhsa.patched(model, STEPS):
        expected = read(model, DynamicCache(config=model.config))
    for module in attention_modules(model):
        module.register_forward_pre_hook(renaming("another_name"), with_kwargs=True)
    with dhsa.patched(model, STEPS):
        for module in attention_modules(model):
            module.register_forward_pre_hook(unrenamed, with_kwargs=True)
        cache = DynamicCache(config=model.config)
        assert torch.equal(read(model, cache), expected)
        assert kept_by(cache) == [PROMPT + 1] * model.config.num_hidden_layers


def test_a_cache_that_cannot_be_seen_is_said_once():
    model = build("llama")
    with dhsa.patched(model, STEPS):
        expected = read(model, DynamicCache(config=model.config))
    for module in attention_modules(model):
        module.register_forward_pre_hook(renaming(None), with_kwargs=True)
    with dhsa.patched(model, STEPS):
        for module in attention_modules(model):
            module.register_forward_pre_hook(unrenamed, with_kwargs=True)
        cache = DynamicCache(config=model.config)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            got = read(model, cache)
            read(model, DynamicCache(config=model.config))
        assert [str(w.message) for w in said if caches.UNSEEN in str(w.message)] == [
            f"dhsa: LlamaAttention attends to 251 keys with 1 queries, but {caches.UNSEEN}; dhsa.last_run names this "
            "reason for each layer"
        ]
        runs = dhsa.last_run(model)
        assert {(run.path, run.reason) for run in runs} == {("sparse", caches.UNSEEN)}
        assert len(runs) == model.config.num_hidden_layers
        assert kept_by(cache) == [0] * len(runs)
        # Chunks that are made for the step alone are other chunks than those of the prompt, from which steps go on.
        torch.testing.assert_close(got, expected, rtol=0, atol=0.5)


@pytest.mark.skipif(not compat.GRAPHS, reason="compiled graphs cannot be told from such calls")
def test_a_module_that_is_called_past_its_hooks_is_said_once():
    """As some adapters do: their own module calls `forward` of the one inside."""

    class Around(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner.forward(*args, **kwargs)

    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn = Around(layer.self_attn)
    with dhsa.patched(model, STEPS):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            read(model, DynamicCache(config=model.config))
            read(model, DynamicCache(config=model.config))
        assert len([w for w in said if f"but {caches.UNHOOKED}" in str(w.message)]) == 1
        assert {(run.path, run.reason) for run in dhsa.last_run(model)} == {("sparse", caches.UNHOOKED)}


@pytest.mark.skipif(not compat.GRAPHS, reason="torch before 2.13 fails to compile some of these models")
def test_a_compiled_step_says_that_graphs_keep_nothing():
    torch._dynamo.reset()
    model = build("llama")
    with dhsa.patched(model, STEPS), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        read(torch.compile(model, backend="eager"), DynamicCache(config=model.config))
        assert {run.reason for run in dhsa.last_run(model)} == {caches.COMPILED}


def test_a_cache_that_weak_references_cannot_name_is_seen():
    class Slots:
        __slots__ = ("cache",)
        is_compileable = False

        def __init__(self, cache):
            self.cache = cache

        def __getattr__(self, name):
            return getattr(object.__getattribute__(self, "cache"), name)

        def update(self, *args, **kwargs):
            return self.cache.update(*args, **kwargs)

        def get_seq_length(self, *args):
            return self.cache.get_seq_length(*args)

    model = build("llama")
    with dhsa.patched(model, STEPS):
        expected = read(model, DynamicCache(config=model.config))
        cache = Slots(DynamicCache(config=model.config))
        assert torch.equal(read(model, cache), expected)
        assert kept_by(cache) == [PROMPT + 1] * model.config.num_hidden_layers
    assert getattr(caches._running, "entry", None) is None


def test_caches_are_recognized_by_what_they_are():
    class Own:
        def update(self, keys, values, layer): ...

        def get_seq_length(self, layer=0): ...

    cache, own = DynamicCache(), Own()
    pair = EncoderDecoderCache(cache, DynamicCache())
    assert compat.cache_in((), {"past_key_values": cache}) is cache
    assert compat.cache_in((), {"cache": cache, "attention_mask": torch.zeros(2)}) is cache
    assert compat.cache_in((torch.zeros(2), None, cache), {}) is cache
    assert compat.cache_in((own,), {}) is own
    assert compat.cache_in((), {"cache": pair}) is cache
    assert compat.cache_in((torch.zeros(2), {}, [cache], set()), {"cache": None, "position_ids": 3}) is None


def test_a_module_that_reads_the_keys_of_another_layer_keeps_its_own_beside_the_cache():
    cache = DynamicCache()
    k = torch.randn(1, 2, 40, 8)
    cache.update(k, k, 0)
    module = torch.nn.Module()
    module.layer_idx = 3
    place = caches._place_of(cache, module)
    assert place[0] is cache
    assert place != caches._place_of(cache, type("", (), {"layer_idx": 4})())
    module.layer_idx = 0
    assert caches._place_of(cache, module) == (cache.layers[0], caches._KEPT)


def test_running_calls_keep_no_module_alive():
    model = build("gemma2")
    with dhsa.patched(model, STEPS), torch.no_grad():
        model(tokens(1, 60))
        entry = getattr(caches._running, "entry", None)
        assert entry is None or entry[0]() is not None
    import gc
    import weakref

    gone = [weakref.ref(module) for module in attention_modules(model)]
    del model
    gc.collect()
    assert gone
    assert all(ref() is None for ref in gone)


def test_an_older_transformers_is_refused_by_its_name():
    program = """
import transformers.masking_utils as m
def sdpa_mask(batch_size, cache_position, kv_length, kv_offset=0): ...
m.sdpa_mask = sdpa_mask
try:
    import dhsa.hf
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert f"transformers {transformers.__version__} is older than {compat.OLDEST}" in done.stdout
    assert f"pip install 'transformers>={compat.OLDEST}'" in done.stdout


def test_compiled_models_are_right_whether_or_not_graphs_hold_the_operators():
    model, ids = build("llama"), tokens(1, 200)
    try:
        with torch.no_grad():
            torch.compile(model, backend="eager")(ids, use_cache=False)
    except Exception as error:
        pytest.skip(f"this torch does not compile this transformers without dhsa either: {error}")
    with dhsa.patched(model, dhsa.Config(budget=64, query_block=16)), torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        got = torch.compile(model, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert attention.attention_forward.__name__ == "attention_forward"
