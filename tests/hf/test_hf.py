"""The transformers integration on tiny models of random weights, against transformers' own eager attention.

Every model has windows smaller than its prompts, grouped heads and, where its family has one, a softcap, at values at
which dropping any of them would show.
"""

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import (  # noqa: E402
    EXACT,
    FAMILIES,
    SPARSE,
    WINDOW,
    Layer,
    build,
    masked_softmax,
    padded,
    qkv,
    tokens,
)
from transformers import DynamicCache, StaticCache  # noqa: E402

import dhsa  # noqa: E402
import dhsa.hf  # noqa: E402
from dhsa.hf.compat import GRAPHS, cache_option  # noqa: E402


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---- whole models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [300, 517])
def test_exact_prefill_agrees_with_eager(models, family, length):
    model, ids = models(family), tokens(1, length)
    expected = model(ids).logits
    with dhsa.patched(model, EXACT):
        got = model(ids).logits
        kinds = {r.kind: r.path for r in dhsa.last_run(model)}
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert kinds == ({"full": "dense"} if family == "llama" else {"full": "dense", "sliding": "window"})


def test_exact_gemma2_at_a_thousand_tokens_without_cache_and_in_a_batch(models):
    model, ids = models("gemma2"), tokens(2, 1000)
    expected = model(ids, use_cache=False).logits
    with dhsa.patched(model, EXACT):
        got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "change", [{"attn_logit_softcapping": None}, {"sliding_window": 63}, {"query_pre_attn_scalar": 32}]
)
def test_the_comparison_would_notice_a_dropped_option(models, change):
    ids = tokens(1, 300)
    other = build("gemma2", **change)
    other.load_state_dict(models("gemma2").state_dict())
    assert (other(ids).logits - models("gemma2")(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(models, family):
    """300 tokens and then 24 steps: the sliding caches are full from the start and roll."""
    model, ids = models(family), tokens(1, 300)
    expected = model.generate(ids, max_new_tokens=24, do_sample=False)
    with dhsa.patched(model, EXACT):
        got = model.generate(ids, max_new_tokens=24, do_sample=False)
        steps = dhsa.last_run(model)
        prefill = dhsa.last_run(model, "prefill")
    assert torch.equal(got, expected)
    assert {r.path for r in steps} == {"decode"}
    assert [r.layer for r in steps] == [0, 1, 2, 3]
    assert {r.query_shape[2] for r in prefill} == {300}
    for run in steps:
        assert run.key_shape[2] == (WINDOW if run.kind == "sliding" else 323)


def test_prompt_that_grows_past_the_window_while_decoding(models):
    model, ids = models("gemma2"), tokens(1, WINDOW - 6)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with dhsa.patched(model, EXACT):
        assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_agrees_with_eager(models, family, side):
    model, lengths, size = models(family), [300, 171, 40], 300
    ids, mask = padded(lengths, size, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    with dhsa.patched(model, EXACT):
        got = model(ids, attention_mask=mask, position_ids=positions).logits
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=2e-5)


def test_generate_on_a_left_padded_batch(models):
    model = models("gemma2")
    ids, mask = padded([200, 90, 33], 200, "left")
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    with dhsa.patched(model, EXACT):
        got = model.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_as_sparse_as_they_are_alone(models, side):
    """A padded row sees the same selection as the same prompt without padding: the padding is not even looked at."""
    model, lengths = models("gemma2"), [300, 171]
    ids, mask = padded(lengths, 300, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with dhsa.patched(model, SPARSE):
        got = model(ids, attention_mask=mask, position_ids=positions).logits
        assert {r.path for r in dhsa.last_run(model) if r.kind == "full"} == {"sparse"}
        for row, n in enumerate(lengths):
            alone = model(tokens(1, n, seed=row)).logits[0]
            torch.testing.assert_close(got[row][mask[row].bool()], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
@pytest.mark.parametrize("length", [WINDOW - 20, 200])
def test_static_cache(models, family, length):
    model, ids = models(family), tokens(2, length)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    with dhsa.patched(model, EXACT):
        got = model.generate(ids, max_new_tokens=30, do_sample=False, cache_implementation="static")
    assert torch.equal(got, expected)


def test_static_cache_prefill_is_sparse_over_the_real_keys_only(models):
    model, ids = models("gemma2"), tokens(1, 300)
    with dhsa.patched(model, SPARSE):
        plain = model(ids).logits
        cached = model(ids, **cache_option(model, StaticCache(model.config, max_cache_len=400))).logits
        runs = [r for r in dhsa.last_run(model) if r.kind == "full"]
    assert {r.path for r in runs} == {"sparse"}
    assert {r.key_shape[2] for r in runs} == {400}
    torch.testing.assert_close(cached, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_prompt_in_pieces(models, static):
    """Later pieces meet a filled cache: more keys than queries, in sliding layers only the last W - 1 of them."""
    model, ids = models("gemma2"), tokens(1, 400)
    expected = model(ids).logits
    with dhsa.patched(model, EXACT):
        cache = StaticCache(model.config, max_cache_len=500) if static else DynamicCache(config=model.config)
        got = torch.cat(
            [model(ids[:, a:b], **cache_option(model, cache)).logits for a, b in [(0, 30), (30, 210), (210, 400)]], 1
        )
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_sparse_prefill_is_really_sparse(models):
    model, ids = models("gemma2"), tokens(1, 700)
    with dhsa.patched(model, EXACT):
        exact = model(ids).logits
    with dhsa.patched(model, SPARSE):
        sparse = model(ids).logits
        runs = dhsa.last_run(model)
    assert [(r.layer, r.kind) for r in runs] == [(0, "sliding"), (1, "full"), (2, "sliding"), (3, "full")]
    for run in runs:
        assert run.query_shape == (1, 4, 700, 32)
        assert run.key_shape == (1, 2, 700, 32)
        assert run.step == "prefill"
        assert run.attend_seconds >= 0
        assert run.select_seconds >= 0
        if run.kind == "full":
            assert run.path == "sparse"
            assert 0 < run.density < 0.6
        else:
            assert run.path == "window"
            assert run.density == 1
    assert not torch.allclose(exact, sparse, atol=1e-4)
    assert torch.isfinite(sparse).all()


def test_generate_after_a_sparse_prefill(models):
    model, ids = models("gemma3"), tokens(1, 400)
    with dhsa.patched(model, SPARSE):
        out = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert {r.path for r in dhsa.last_run(model, "prefill")} == {"window", "sparse"}
        assert {r.path for r in dhsa.last_run(model)} == {"decode"}
    assert out.shape == (1, 404)


def test_layers_chooses_the_sparse_ones(models):
    model, ids = models("gemma2"), tokens(1, 300)
    with dhsa.patched(model, SPARSE, layers=[3]):
        model(ids)
        assert [r.path for r in dhsa.last_run(model)] == ["window", "dense", "window", "sparse"]
    with dhsa.patched(model, SPARSE, layers=range(0)):
        logits = model(ids).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=2e-5)


def test_named_implementation_without_patch_uses_the_default_config(models):
    ids = tokens(1, 300)
    model = build("gemma2", "dhsa")
    torch.testing.assert_close(model(ids).logits, models("gemma2")(ids).logits, rtol=0, atol=2e-5)
    assert [r.path for r in dhsa.last_run(model)] == ["window", "dense"] * 2  # 300 keys are within the default budget
    default = dhsa.Config()
    q, k, v = qkv(q_len=6 * default.budget, heads=1, kv_heads=1)
    layer = Layer()
    dhsa.hf.attention_forward(layer, q, k, v, None)
    assert dhsa.last_run(layer)[0].path == "sparse"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    """Judged by the error that eager itself makes in that precision, against the model in float32."""
    model, ids = build("gemma2"), tokens(1, 300)
    exact = model(ids).logits
    model.to(dtype)
    eager_error = (model(ids).logits.float() - exact).square().mean().sqrt()
    with dhsa.patched(model, EXACT):
        got = model(ids).logits
    assert got.dtype == dtype
    assert (got.float() - exact).square().mean().sqrt() < 1.5 * eager_error


@pytest.mark.skipif(not GRAPHS, reason="torch before 2.13 fails to compile some of these models, whatever attends")
def test_compiled_model_breaks_its_graph_at_the_attention(models):
    model = models("gemma2")
    ids, mask = padded([150, 90], 150, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    with dhsa.patched(model, EXACT):
        got = torch.compile(model, backend="eager")(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)


def test_packed_sequences_are_kept_apart(models):
    model, lengths = models("gemma2"), [130, 150, 7]
    ids = torch.cat([tokens(1, n, seed=row) for row, n in enumerate(lengths)], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for config in (EXACT, SPARSE):
        with dhsa.patched(model, config):
            got = model(ids, position_ids=positions, use_cache=False).logits[0]
            alone = [model(tokens(1, n, seed=row)).logits[0] for row, n in enumerate(lengths)]
        torch.testing.assert_close(got, torch.cat(alone), rtol=0, atol=2e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_given_4d_mask(models, additive):
    """A prefix that all see, then causal: intervals, but neither causal nor a window."""
    model, ids, n, prefix = models("gemma2"), tokens(2, 150), 150, 40
    visible = torch.ones(n, n).tril().bool()
    visible[:, :prefix] = True
    mask = visible.expand(2, 1, n, n)
    if additive:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    eager = torch.where(visible, 0.0, torch.finfo(torch.float32).min).expand(2, 1, n, n)
    expected = model(ids, attention_mask=eager).logits
    with dhsa.patched(model, SPARSE):
        got = model(ids, attention_mask=mask).logits
        assert {r.density for r in dhsa.last_run(model)} == {1.0}
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
    assert (expected - model(ids).logits).abs().max() > 1e-3


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_inference_mode(models):
    model, ids = models("gemma2"), tokens(1, 150)
    expected = model(ids).logits
    with dhsa.patched(model, EXACT), torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=2e-5)


def test_output_attentions_are_refused(models):
    model = models("gemma2")
    with dhsa.patched(model, EXACT), pytest.raises(NotImplementedError, match=r"output_attentions.*eager"):
        model(tokens(1, 20), output_attentions=True)
    asked = build("llama")
    asked.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        dhsa.patch(asked)
    assert asked.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"s_aux": torch.zeros(1, 4, 96, 1)}, "s_aux: expected one logit for each query head, shape"),
        ({"sinks": torch.zeros(3)}, "sinks: expected one logit for each query head, shape"),
        ({"position_bias": torch.zeros(1, 4, 96, 96)}, "position_bias"),
        ({"cache": object()}, "cache"),
        ({"cu_seq_lens_q": torch.tensor([0, 50, 96])}, "cu_seq_lens_q"),
        ({"is_causal": False, "sliding_window": 8}, "needs a mask"),
    ],
)
def test_arguments_without_a_counterpart_are_refused(kwargs, match):
    with pytest.raises(NotImplementedError, match=match):
        dhsa.hf.attention_forward(Layer(), *qkv(), None, **kwargs)


def test_cross_attention_is_refused():
    layer = Layer()
    layer.is_cross_attention = True
    with pytest.raises(NotImplementedError, match="cross-attention"):
        dhsa.hf.attention_forward(layer, *qkv(), None)
    with pytest.raises(ValueError, match="Lq <= Lk"):
        dhsa.hf.attention_forward(Layer(is_causal=False), *qkv(q_len=20, k_len=10), None)


def holes(step, n=96):
    """Causal, but of the keys every `step`th only."""
    mask = torch.ones(n, n).tril().bool()
    mask[:, torch.arange(n) % step != (n - 1) % step] = False
    return mask[None, None]


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (holes(2), NotImplementedError, "batch row 0, query 95 sees keys in 48 separate intervals"),
        (torch.where(holes(3), 0.0, -torch.inf), NotImplementedError, "32 separate intervals"),
        (torch.randn(1, 1, 96, 96), NotImplementedError, "adds no bias to scores"),
        (
            torch.stack([torch.ones(96, 96).tril(), torch.ones(96, 96)] * 2)[None].bool(),
            NotImplementedError,
            "heads have different",
        ),
        (torch.ones(1, 1, 96, 96, dtype=torch.int64), TypeError, "bool or additive"),
        (torch.ones(1, 1, 96, 95, dtype=torch.bool), ValueError, "expected shape"),
        (torch.ones(3, 1, 96, 96, dtype=torch.bool), ValueError, "expected shape"),
        (torch.ones(96, 96, 1, dtype=torch.bool), ValueError, "2 or 4 dimensions"),
        (torch.ones(1, 90, dtype=torch.bool), ValueError, "expected shape"),
        (torch.tensor([[1, 0] * 48]), NotImplementedError, "batch row 0 sees keys in 48 separate intervals"),
        (torch.full((1, 1, 96, 2), 97, dtype=torch.int32), ValueError, "beyond the 96 keys"),
    ],
)
def test_masks_that_cannot_be_served_are_refused(mask, error, match):
    with pytest.raises(error, match=match):
        dhsa.hf.attention_forward(Layer(), *qkv(), mask)


def test_padding_with_holes_in_a_model(models):
    """Two turns of a conversation, each padded: one row sees keys in two intervals."""
    mask = torch.ones(2, 260, dtype=torch.long)
    mask[0, 80:130] = mask[0, :9] = mask[1, :30] = 0
    model, ids = models("gemma2"), tokens(2, 260)
    expected = model(ids, attention_mask=mask).logits
    for config in (EXACT, SPARSE):  # gaps are exact always
        with dhsa.patched(model, config):
            got = model(ids, attention_mask=mask).logits
            assert {r.density for r in dhsa.last_run(model)} == {1.0}
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "llama"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_on_a_right_padded_batch(models, family, cache):
    """transformers warns of it and goes on: the new tokens' keys follow after the padding's. Less padding than a window
    is wide, or the last query would see no key, for which eager has the mean of all values, "dhsa" (as sdpa) zeros."""
    model = models(family)
    ids, mask = padded([200, 170, 150], 200, "right")
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "cache_implementation": cache}
    expected = model.generate(ids, **options)
    with dhsa.patched(model, EXACT):
        assert torch.equal(model.generate(ids, **options), expected)
        assert {r.path for r in dhsa.last_run(model)} == {"decode"}
    with dhsa.patched(model, SPARSE):
        model.generate(ids, **options)
        assert "sparse" in {r.path for r in dhsa.last_run(model, "prefill")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_of_several_intervals(dtype, additive):
    q, k, v = qkv(batch=2, q_len=70, k_len=96, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    visible = (torch.rand(2, 1, 70, 12, generator=g) < 0.5).repeat_interleave(8, 3)  # rows of up to six intervals
    visible[0, 0, 5] = False
    expected = masked_softmax(q, k, v, visible, softcap=2.0).transpose(1, 2)
    mask = torch.where(visible, 0.0, -torch.inf) if additive else visible
    out, _ = dhsa.hf.attention_forward(Layer(), q, k, v, mask, softcap=2.0)
    assert out.dtype == dtype
    assert (out[0, 5] == 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


# ---- the attention function alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [EXACT, SPARSE])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_mask_straight_into_the_attention_function(config, side):
    lengths, n, layer = [200, 120, 0], 200, Layer()
    q, k, v = qkv(batch=3, q_len=n)
    mask = padded(lengths, n, side)[1].bool()
    dhsa.hf.switching.install(layer, dhsa.hf.switching.State(config, None, ()))
    out, _ = dhsa.hf.attention_forward(layer, q, k, v, mask, scaling=0.3, softcap=5.0)
    assert out.shape == (3, n, 4, 16)
    assert out.is_contiguous()
    assert (out[:, :-1][~mask[:, :-1]] == 0).all()  # generate may read the last query, so it sees its keys
    assert (out[2] == 0).all()
    for row, length in enumerate(lengths[:2]):
        real = mask[row]
        alone = dhsa.attention(
            q[row : row + 1, :, real],
            k[row : row + 1, :, real],
            v[row : row + 1, :, real],
            config,
            scale=0.3,
            softcap=5.0,
        )
        torch.testing.assert_close(out[row][real], alone[0].transpose(0, 1), rtol=0, atol=1e-6)
        assert alone.shape[2] == length


@pytest.mark.parametrize("window", [None, 20, 150])
def test_arguments_reach_the_core(window):
    q, k, v = qkv(q_len=150, k_len=190, dim=24)
    layer = Layer()
    dhsa.hf.switching.install(layer, dhsa.hf.switching.State(SPARSE, None, ()))
    out, weights = dhsa.hf.attention_forward(layer, q, k, v, None, scaling=0.5, softcap=3.0, sliding_window=window)
    assert weights is None
    expected = dhsa.attention(q, k, v, SPARSE, scale=0.5, softcap=3.0, window=window)
    assert torch.equal(out, expected.transpose(1, 2).contiguous())
    dhsa.hf.switching.install(layer, dhsa.hf.switching.State(EXACT, None, ()))
    out, _ = dhsa.hf.attention_forward(layer, q, k, v, None, scaling=0.5, softcap=3.0, sliding_window=window)
    position, j = torch.arange(150)[:, None] + 40, torch.arange(190)
    visible = (j <= position) & (j > position - (window or 10**6))
    expected = masked_softmax(q, k, v, visible, 0.5, 3.0).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_not_causal_without_a_mask_sees_everything():
    q, k, v = qkv(q_len=70, k_len=90)
    for layer, is_causal in [(Layer(is_causal=False), None), (Layer(), False)]:
        dhsa.hf.switching.install(layer, dhsa.hf.switching.State(SPARSE, None, ()))
        out, _ = dhsa.hf.attention_forward(layer, q, k, v, None, is_causal=is_causal)
        expected = masked_softmax(q, k, v, torch.ones(70, 90, dtype=torch.bool)).transpose(1, 2)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_strided_input_and_transposed_values():
    q, k, v = qkv(q_len=130)
    q2 = q.transpose(1, 2).contiguous().transpose(1, 2)
    v2 = v.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # last stride is not 1
    assert v2.stride(-1) != 1
    expected, _ = dhsa.hf.attention_forward(Layer(), q, k, v, None)
    got, _ = dhsa.hf.attention_forward(Layer(), q2, k, v2, None)
    assert torch.equal(got, expected)


def test_a_mask_changed_in_place_is_read_again():
    q, k, v = qkv(q_len=96)
    mask = torch.ones(1, 1, 96, 96, dtype=torch.bool).tril()
    first, _ = dhsa.hf.attention_forward(Layer(), q, k, v, mask)
    mask[..., :10] = False
    mask[..., :10, 10] = True
    second, _ = dhsa.hf.attention_forward(Layer(), q, k, v, mask)
    torch.testing.assert_close(second.double(), masked_softmax(q, k, v, mask).transpose(1, 2), rtol=0, atol=1e-5)
    assert not torch.allclose(first, second)
