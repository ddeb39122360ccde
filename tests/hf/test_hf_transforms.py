"""Patched models under what surrounds a forward pass in the field: transforms and recorders of torch, and autocast."""

import contextlib
import gc
import weakref

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SPARSE, Layer, build, padded, qkv, tokens  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402

import dhsa  # noqa: E402
import dhsa.hf  # noqa: E402
from dhsa.hf.compat import GRAPHS  # noqa: E402

graphs = pytest.mark.skipif(not GRAPHS, reason="graphs hold dhsa's operators from torch 2.13 on")

# Of torch and transformers themselves, as they are traced: torch deprecates torch.jit, which people use all the same.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("torch.jit.TracerWarning", "DeprecationWarning", "FutureWarning", "UserWarning")
]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(ids, attention_mask=mask, use_cache=False).logits


# ---- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["exact", "sparse"])
@pytest.mark.parametrize("masked", [False, True])
def test_jit_trace_is_refused(family, config, masked):
    model, ids = build(family), tokens(1, 150)
    arguments = (ids, torch.ones_like(ids)) if masked else (ids,)
    with torch.no_grad(), dhsa.patched(model, config):
        with pytest.raises(
            NotImplementedError, match=r"torch\.jit\.trace cannot record.*use torch\.export or attn_impl"
        ):
            torch.jit.trace(Logits(model), arguments, check_trace=False)
        model(ids)


def of_embeddings(model, ids):
    return lambda x: model(inputs_embeds=x, use_cache=False).logits, model.get_input_embeddings()(ids).detach()


@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["exact", "sparse"])
def test_transforms_are_refused_by_name(config):
    model, ids = build("llama"), tokens(1, 150)
    forward, hidden = of_embeddings(model, ids)
    transforms = {
        r"torch\.vmap": lambda: torch.vmap(forward)(hidden[None]),
        r"torch\.func\.grad": lambda: torch.func.grad(lambda x: forward(x).sum())(hidden),
        r"torch\.func\.jvp": lambda: torch.func.jvp(forward, (hidden,), (hidden,)),
        r"torch\.func\.functionalize": lambda: torch.func.functionalize(forward)(hidden),
    }
    with dhsa.patched(model, config):
        for name, call in transforms.items():
            with pytest.raises(
                NotImplementedError, match=rf'^\w+: {name} cannot transform.*use attn_implementation="eager"'
            ):
                call()


@pytest.mark.parametrize("how", ["called", "compiled", "in a dispatch mode"])
def test_a_tangent_is_not_lost(how):
    from torch.utils.flop_counter import FlopCounterMode

    torch._dynamo.reset()
    model, ids = build("llama", num_hidden_layers=2), tokens(1, 150)
    forward, hidden = of_embeddings(model, ids)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        assert forward_ad.unpack_dual(forward(dual)).tangent.abs().max() > 0
        with dhsa.patched(model, EXACT):
            run = torch.compile(forward, backend="eager") if how == "compiled" else forward
            mode = FlopCounterMode(display=False) if how == "in a dispatch mode" else contextlib.nullcontext()
            with mode, pytest.raises(NotImplementedError, match=r"has a tangent of torch\.autograd\.forward_ad"):
                run(dual)


@graphs
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap of jvp"])
def test_derivatives_are_refused_in_a_graph(transform):
    """The operator of a graph has no derivative, and functorch would go on without one."""
    from torch.utils.flop_counter import FlopCounterMode

    torch._dynamo.reset()
    model, ids = build("llama", num_hidden_layers=2), tokens(1, 80)
    forward, hidden = of_embeddings(model, ids)

    def run(x):
        if transform == "grad":
            return torch.func.grad(lambda y: forward(y).sum())(x)
        if transform == "jvp":
            return torch.func.jvp(forward, (x,), (x,))[1]
        return torch.vmap(lambda y: torch.func.jvp(forward, (y,), (y,))[1])(x[None])

    with dhsa.patched(model, EXACT):
        with (
            FlopCounterMode(display=False),
            pytest.raises(NotImplementedError, match=r"^query: torch\.func\.(jvp|grad) finds"),
        ):
            run(hidden)
        if transform != "grad":  # Dynamo itself fails on gradients through a model that breaks its graph
            with pytest.raises(NotImplementedError, match=r"^query: torch\.func\.jvp finds no derivative"):
                torch.compile(run, backend="eager")(hidden)


@graphs
def test_vmap_of_a_compiled_model_is_right():
    torch._dynamo.reset()
    model, ids = build("llama", num_hidden_layers=2), tokens(3, 80)
    forward, hidden = of_embeddings(model, ids)
    with torch.no_grad(), dhsa.patched(model, EXACT):
        got = torch.compile(torch.vmap(forward), backend="eager")(hidden[:, None])
        torch.testing.assert_close(got[:, 0], forward(hidden), rtol=0, atol=2e-5)


def test_an_ensemble_under_vmap_is_refused():
    from torch.func import functional_call, stack_module_state

    models, ids = [dhsa.patch(build("llama"), EXACT) for _ in range(2)], tokens(1, 90)
    state = stack_module_state(models)

    def one(parameters, buffers):
        return functional_call(models[0], (parameters, buffers), (ids,), {"use_cache": False}).logits

    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"^query: torch\.vmap cannot transform"):
        torch.vmap(one)(*state)


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "qwen3"])
def test_autocast(family, dtype):
    model = build(family)
    ids, mask = padded([150, 110], 150, "left")
    real = mask.bool()

    def logits():
        return model(ids, attention_mask=mask).logits[real].double()

    with torch.no_grad():
        exact = logits()
        with torch.autocast("cpu", dtype=dtype):
            theirs = (logits() - exact).abs().max()
        for config in (EXACT, SPARSE.replace(decode="dhsa", break_even=0)):
            with dhsa.patched(model, config), torch.autocast("cpu", dtype=dtype):
                error = (logits() - exact).abs().max()
                paths = {run.path for run in dhsa.last_run(model)}
                generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
            assert generated.shape == (2, 154)
            assert ("sparse" in paths) == (config is not EXACT)
            assert error <= 2 * theirs if config is EXACT else error.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [(0,), (0, 1), (2,), (1, 2), (0, 1, 2), ()])
def test_autocast_casts_as_sdpa_does(dtype, which):
    """Whichever of query, key and value the model left in float32."""
    tensors = list(qkv(1, 4, 2, 50, 50, 32, dtype=dtype))
    want, _ = dhsa.hf.attention_forward(Layer(), *tensors, None)
    for i in which:
        tensors[i] = tensors[i].float()
    with torch.autocast("cpu", dtype=dtype):
        got, _ = dhsa.hf.attention_forward(Layer(), *tensors, None)
        peer = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    assert got.dtype == peer.dtype == dtype
    assert torch.equal(got, want)
    with torch.autocast("cpu", dtype=dtype), torch.autocast("cpu", enabled=False):
        if len(which) in (0, 3):
            assert dhsa.hf.attention_forward(Layer(), *tensors, None)[0].dtype == tensors[0].dtype
        else:
            with pytest.raises(TypeError, match=r"^(key|value): dtype is .*as query; cast .* under torch\.autocast"):
                dhsa.hf.attention_forward(Layer(), *tensors, None)


@graphs
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast_in_a_graph(backend):
    torch._dynamo.reset()
    model, ids = dhsa.patch(build("llama", num_hidden_layers=2), SPARSE), tokens(1, 200)
    graph = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                want = model(ids, use_cache=False).logits
                got = graph(ids, use_cache=False).logits
            assert want.dtype == got.dtype == dtype
            assert torch.equal(got, want)
        assert torch.equal(graph(ids, use_cache=False).logits, plain)


# ---- what a forward leaves behind ------------------------------------------------------------------------------------


class Sliding(Layer):
    """An attention module with the cache under either of the names that transformers has for it."""

    def forward(self, q, k, v, past_key_values=None, cache=None):
        return dhsa.hf.attention_forward(self, q, k, v, None, sliding_window=8)


def test_a_forward_keeps_no_module_alive():
    """A sliding layer does not ask for what the hook before it noted of its cache."""
    module, cache = Sliding(), transformers.DynamicCache()
    dhsa.hf.caches.watch(module)
    with torch.no_grad():
        module(*qkv(), past_key_values=cache, cache=cache)
    module = weakref.ref(module)
    gc.collect()
    assert module() is None
