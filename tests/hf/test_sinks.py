"""Attention sinks, and values of another width than keys, in the transformers integration: every way in which a call is
computed, against a softmax in float64, and whole models against eager."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

import kinds  # noqa: E402
from tiny import EXACT, Layer, padded, qkv, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf import attention_forward  # noqa: E402
from dhsa.hf.compat import GRAPHS, cache_of, cache_option  # noqa: E402
from dhsa.hf.masks import key_lists, ranges_of  # noqa: E402
from dhsa.hf.switching import STATE, State  # noqa: E402

N = 200
SPARSE = dhsa.Config(budget=48, sink=4, local=16, query_block=16, dense_tail=0, break_even=0)
SINKS = torch.tensor([3.0, -1.0, 0.5, -torch.inf])
MODELS = ["gpt_oss", "deepseek_v3", "gemma4_text", "mimo_v2_flash"]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own code


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def layer_of(config):
    layer = Layer()
    layer.__dict__[STATE] = State(config, None, ())
    return layer.eval()


def inputs(batch=2, value_dim=None, dtype=torch.float32, **options):
    q, k, v = qkv(batch=batch, q_len=N, dtype=dtype, **options)
    if value_dim is not None:
        v = torch.randn(*v.shape[:3], value_dim, generator=torch.Generator().manual_seed(5)).to(dtype)
    return q, k, v


def expected(q, k, v, visible, sinks):
    """Attention in float64 with one more column in its softmax, which has no value; zeros where nothing is seen."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    column = sinks.double()[None, :, None, None].expand(*s.shape[:3], 1)
    return torch.cat([s, column], -1).softmax(-1)[..., :-1].nan_to_num() @ v


def masks():
    """{name: (mask for the attention function, what it says [B, 1, Lq, Lk], window)}"""
    causal = torch.ones(N, N).tril().bool()
    at = torch.arange(N)
    window = causal & (at[None] > at[:, None] - 40)
    left, right = (padded([N, 130], N, side)[1].bool() for side in ("left", "right"))
    gap = torch.ones(2, N, dtype=torch.bool)
    gap[1, 60:90] = False
    holes = causal.clone()  # every query lacks keys of its own: no list of keys serves all
    for query in range(40, N):
        holes[query, query // 2 - 9 : query // 2] = False
    prefix = causal.clone()
    prefix[:50, :50] = True
    return {
        "none": (None, causal[None, None], None),
        "window": (None, window[None, None], 40),
        "left": (left, causal & left[:, None, None] & left[:, None, :, None], None),
        "right": (right, causal & right[:, None, None] & right[:, None, :, None], None),
        "window and padding": (left, window & left[:, None, None] & left[:, None, :, None], 40),
        "a gap": (causal & gap[:, None, None], causal & gap[:, None, None], None),
        "gaps": (holes[None, None], holes[None, None], None),
        "prefix": (prefix[None, None], prefix[None, None], None),
        "full": (torch.ones(1, 1, N, N).bool(), torch.ones(1, 1, N, N).bool(), None),
    }


MASKS = masks()


def test_the_masks_are_computed_in_every_way():
    ways = {}
    for name, (mask, _, window) in MASKS.items():
        ranges = None if mask is None else ranges_of(mask, 2, N, N, window)
        several = ranges is not None and ranges.shape[1] > 1
        ways[name] = ("listed" if key_lists(ranges, N) is not None else "joined") if several else "one"
    assert ways["a gap"] == "listed"
    assert ways["gaps"] == "joined"
    assert set(ways.values()) == {"one", "listed", "joined"}


@pytest.mark.parametrize("value_dim", [None, 8, 40])
@pytest.mark.parametrize("name", MASKS)
def test_every_way_of_computing_has_the_sinks_once(name, value_dim):
    mask, visible, window = MASKS[name]
    q, k, v = inputs(value_dim=value_dim)
    out, _ = attention_forward(layer_of(EXACT), q, k, v, mask, sliding_window=window, s_aux=SINKS)
    assert out.shape == (2, N, 4, value_dim or 16)
    assert out.is_contiguous()
    want = expected(q, k, v, visible, SINKS).transpose(1, 2)
    seen = visible.expand(2, 1, N, N).any(-1)[:, 0]
    torch.testing.assert_close(out[seen].double(), want[seen], rtol=0, atol=2e-6)
    without, _ = attention_forward(layer_of(EXACT), q, k, v, mask, sliding_window=window)
    assert (without - out).abs().max() > 0.01  # the comparison notices sinks that are missing
    assert torch.equal(without[:, :, 3], out[:, :, 3])  # of the head whose sink is -inf


@pytest.mark.parametrize("value_dim", [None, 8, 40])
@pytest.mark.parametrize("name", ["none", "window", "left", "right", "full"])
def test_sparse_attention_has_the_sinks(name, value_dim):
    mask, _, window = MASKS[name]
    q, k, v = inputs(value_dim=value_dim)
    layer = layer_of(SPARSE.replace(budget=24))
    out, _ = attention_forward(layer, q, k, v, mask, sliding_window=window, s_aux=SINKS)
    assert dhsa.last_run(layer)[0].path == "sparse"
    for row in range(2):
        real = slice(0, N) if mask is None or mask.ndim == 4 else mask[row].nonzero()[:, 0]
        one = [t[row : row + 1, :, real].contiguous() for t in (q, k, v)]
        config, causal = SPARSE.replace(budget=24), name != "full"
        want = dhsa.attention(*one, config, window=window, causal=causal, sinks=SINKS)
        assert torch.equal(out[row, real], want[0].transpose(0, 1))
    exact, _ = attention_forward(layer_of(EXACT), q, k, v, mask, sliding_window=window, s_aux=SINKS)
    whole, _ = attention_forward(layer_of(SPARSE.replace(budget=N)), q, k, v, mask, sliding_window=window, s_aux=SINKS)
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-6)  # the same bits but for padding on the right
    assert (out - exact).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_may_have_the_dtype_of_the_model_or_float32(dtype):
    q, k, v = inputs(dtype=dtype)
    out = [attention_forward(layer_of(EXACT), q, k, v, None, s_aux=s)[0] for s in (SINKS, SINKS.to(dtype))]
    assert torch.equal(*out)
    assert out[0].dtype == dtype
    by_the_other_name, _ = attention_forward(layer_of(EXACT), q, k, v, None, sinks=SINKS.double())
    assert torch.equal(by_the_other_name, out[0])


def test_autocast_leaves_the_sinks_as_they_are():
    q, k, v = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention_forward(layer_of(EXACT), q, k, v, None, s_aux=SINKS / 3)
    want, _ = attention_forward(layer_of(EXACT), *(t.bfloat16() for t in (q, k, v)), None, s_aux=SINKS / 3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sinks", "error", "match"),
    [
        (
            torch.zeros(1, 4, N, 1),
            NotImplementedError,
            r"s_aux: expected one logit .* shape \[4\], got \[1, 4, 200, 1\]",
        ),
        (torch.zeros(2), NotImplementedError, r"s_aux: expected one logit .* shape \[4\], got \[2\]"),
        (torch.tensor(0.0), NotImplementedError, r"s_aux: expected one logit .* got \[\]"),
        (
            torch.zeros(4, dtype=torch.long),
            TypeError,
            r"s_aux: expected a tensor of floating-point numbers, got torch.int",
        ),
        ([0.0] * 4, TypeError, "s_aux: expected a tensor of floating-point numbers, got list"),
        (torch.tensor([0.0, 1.0, torch.nan, 0.0]), ValueError, "sinks"),
        (torch.tensor([0.0, 1.0, torch.inf, 0.0]), ValueError, "sinks"),
        (torch.zeros(4, device="meta"), (TypeError, ValueError), "sinks"),
    ],
)
def test_other_sinks_are_refused(sinks, error, match):
    with pytest.raises(error, match=match):
        attention_forward(layer_of(EXACT), *inputs(), None, s_aux=sinks)


def test_two_names_for_sinks_are_refused():
    with pytest.raises(ValueError, match="s_aux and sinks: expected one of them"):
        attention_forward(layer_of(EXACT), *inputs(), None, s_aux=SINKS, sinks=SINKS)


def test_the_gradient_of_sinks_alone_is_refused():
    layer, sinks = layer_of(EXACT), SINKS.clone().requires_grad_()
    with torch.enable_grad():
        out, _ = attention_forward(layer, *inputs(), None, s_aux=sinks)
        with pytest.raises(NotImplementedError, match="no backward pass"):
            out.sum().backward()
        with pytest.raises(NotImplementedError, match="no backward pass"):
            attention_forward(layer.train(), *inputs(), None, s_aux=sinks)
    assert sinks.grad is None


def test_labels_of_a_model_with_sinks_are_refused():
    from dhsa.commands import UserError
    from dhsa.training.stream import layer_keys

    model = kinds.build("gpt_oss")
    with pytest.raises(UserError, match="layer 0 has attention sinks, which labels do not count"):
        layer_keys(model, tokens(1, 60)[0].tolist(), lambda _: None, window=4)


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_of():
    built = {}

    def get(kind):
        if kind not in built:
            try:
                built[kind] = kinds.build(kind)
            except KeyError:
                pytest.skip(f"transformers {transformers.__version__} does not know {kind}")
        return built[kind]

    return get


def close(got, want):
    assert (got - want).abs().max() <= kinds.TOLERANCE * want.abs().max()


@pytest.mark.skipif(not GRAPHS, reason="graphs hold dhsa's operators from torch 2.13 on")
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_and_exported(model_of, kind):
    model, ids = model_of(kind), tokens(1, 150)
    want = model(ids, use_cache=False).logits
    with dhsa.patched(model, EXACT):
        plain = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        close(torch.compile(model, backend="eager")(ids, use_cache=False).logits, want)
        assert len(dhsa.last_run(model)) >= 2
    close(plain, want)


@pytest.mark.skipif(not GRAPHS, reason="graphs hold dhsa's operators from torch 2.13 on")
def test_an_exported_program_keeps_the_sinks():
    class Attend(torch.nn.Module):
        layer_idx, is_causal = 0, True

        def __init__(self):
            super().__init__()
            self.sinks = torch.nn.Parameter(SINKS.clone())

        def forward(self, q, k, v):
            return attention_forward(self, q, k, v, None, s_aux=self.sinks)[0]

    module, (q, k, v) = Attend().eval(), inputs(value_dim=24)
    program = torch.export.export(module, (q, k, v), strict=False).module()
    want = module(q, k, v)
    assert torch.equal(program(q, k, v), want)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(q, k, v), module(q, k, v))
    program.sinks.data[:] = -torch.inf  # a parameter of the program, as of the module
    assert not torch.equal(program(q, k, v), want)


@pytest.mark.parametrize("share", [None, "boundaries", "selections"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_in_pieces_and_steps_that_select(model_of, kind, share):
    """With a key index for each layer, and with layers that share: a budget that covers all keys changes nothing."""
    model = model_of(kind)
    config = SPARSE.replace(budget=500, decode="dhsa", share=share)
    steps = {"max_new_tokens": 5, "do_sample": False}
    with dhsa.patched(model, EXACT):
        expected_tokens, expected_logits = model.generate(tokens(1, 80), **steps), kinds._pieces(model)
    with dhsa.patched(model, config):
        assert torch.equal(model.generate(tokens(1, 80), **steps), expected_tokens)
        close(kinds._pieces(model), expected_logits)
    with dhsa.patched(model, config.replace(budget=40)):
        few = kinds._pieces(model)
        assert "sparse" in {run.path for run in dhsa.last_run(model, "prefill")}
        assert torch.isfinite(few).all()
        assert (few - expected_logits).abs().max() > 100 * kinds.TOLERANCE * expected_logits.abs().max()
        model.generate(tokens(1, 80), **steps)
        assert "sparse" in {run.path for run in dhsa.last_run(model, "decode")}


def test_a_sink_a_head_counts_in_a_decoding_step(model_of):
    """The first steps after a short prompt, where a sink takes much of the softmax."""
    model = copy.deepcopy(model_of("gpt_oss"))
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.sinks.data += 2
    ids, cache = tokens(1, 9), None
    outs = {}
    for implementation in ("eager", "dhsa"):
        model.set_attn_implementation(implementation)
        out = model(ids[:, :5], use_cache=True)
        cache, logits = cache_of(out), [out.logits]
        for at in range(5, 9):
            logits.append(model(ids[:, at : at + 1], use_cache=True, **cache_option(model, cache)).logits)
        outs[implementation] = torch.cat(logits, 1)
    close(outs["dhsa"], outs["eager"])


def test_check_reads_a_model_with_sinks(model_of):
    """The exact attention that it compares with has them as well: with nothing left out, nothing differs."""
    found = dhsa.check(model_of("gpt_oss"), tokens(1, N), SPARSE)
    assert any(layer.path == "sparse" for layer in found.layers)
    assert 0 < max(layer.output_error for layer in found.layers) < 1


def test_a_model_whose_layers_read_the_mask_is_refused_by_patch():
    config = transformers.DogeConfig(**{**kinds.SIZES, "num_hidden_layers": 1})
    model = transformers.DogeForCausalLM(config)
    with pytest.raises(ValueError, match="layers of 'doge' read the mask tensor themselves"):
        dhsa.patch(model)
    assert model.config._attn_implementation != "dhsa"
