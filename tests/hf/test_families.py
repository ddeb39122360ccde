"""Every family of models that is said to work, at random weights: prefill, padded batches, generation and sparsity
against transformers' own eager attention, in fp32 and bf16. And what is refused, said by real models.

Weights are bf16 numbers in both precisions, and rotary frequencies stay fp32, so that what is measured in bf16 is the
rounding of activations alone. It is judged by eager's own: the distance of both to eager in fp32.
"""

import copy
import functools

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import (  # noqa: E402
    ALL_FAMILIES,
    EXACT,
    IMAGE_TOKEN,
    IMAGE_TOKENS,
    IMAGES,
    SIZES,
    SPARSE,
    WINDOW,
    Layer,
    build,
    padded,
    qkv,
    tokens,
)

import dhsa  # noqa: E402
import dhsa.hf  # noqa: E402
from dhsa.hf.compat import cache_option  # noqa: E402

LENGTH, LENGTHS, STEPS = 300, [300, 171, 70], 12
DTYPES = [torch.float32, torch.bfloat16]
FULL, SLIDING = ["gemma", "llama", "olmo2"], ["mistral", "phi3"]  # of the others every other layer slides
# fp32: largest difference of logits of about 3. bf16: root mean square error as a multiple of eager's own.
TOLERANCE, MULTIPLE = 2e-5, 1.2


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model_of():
    """model_of(family, dtype): both precisions hold the same weights."""

    @functools.cache
    def make(family, dtype):
        if dtype == torch.float32:
            model = build(family)
            for weight in model.parameters():
                weight.data = weight.data.bfloat16().float()
            return model
        model = copy.deepcopy(make(family, torch.float32))
        for weight in model.parameters():  # not the buffers: rotary frequencies are fp32 in models loaded as bf16, too
            weight.data = weight.data.bfloat16()
        return model

    return make


def prompt(family, length, row=0):
    """Arguments of a model for one prompt; of two images in its text, the second across the end of a window."""
    ids = tokens(1, length, seed=row)
    if family != IMAGES:
        return {"input_ids": ids}
    for start in (5 + row, WINDOW - 8 - row):
        ids[:, start : start + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(row))
    return {"input_ids": ids, "token_type_ids": (ids == IMAGE_TOKEN).long(), "pixel_values": pixels}


def batch_of(family, side):
    """LENGTHS[i] tokens in row i of a padded batch, and the same prompts one by one."""
    alone = [prompt(family, n, row) for row, n in enumerate(LENGTHS)]
    batch = {}
    for name in alone[0]:
        if name == "pixel_values":
            batch[name] = torch.cat([a[name] for a in alone])
            continue
        _, mask = padded(LENGTHS, LENGTH, side)
        batch[name] = torch.zeros_like(mask)
        batch[name][mask.bool()] = torch.cat([a[name][0] for a in alone])
    return batch | {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}, alone


def run(model, arguments):
    if "pixel_values" in arguments:
        arguments = arguments | {"pixel_values": arguments["pixel_values"].to(model.dtype)}
    return model(**arguments).logits.float()


@pytest.fixture(scope="module")
def eager(model_of):
    """eager(family, dtype, length, row=0): logits of one prompt, kept."""

    @functools.cache
    def logits(family, dtype, length, row=0):
        return run(model_of(family, dtype), prompt(family, length, row))

    return logits


def error(got, expected):
    return float((got - expected).square().mean().sqrt())


def agrees(got, dtype, eager, family, length, row=0):
    """Asserts that logits are eager's, as far as the dtype can say."""
    exact = eager(family, torch.float32, length, row)
    assert got.shape == exact.shape
    if dtype == torch.float32:
        torch.testing.assert_close(got, exact, rtol=0, atol=TOLERANCE)
    else:
        allowed = MULTIPLE * error(eager(family, dtype, length, row), exact)
        assert 0 < allowed < 0.05 * exact.std()
        assert error(got, exact) <= allowed


def kind_paths(family, sparse):
    """(kind, path) of each text layer."""
    full = ("full", "sparse" if sparse else "dense")
    if family in FULL:
        return [full] * 4
    if family in SLIDING:
        return [("sliding", "sparse" if sparse else "window")] * 4
    return [("sliding", "window"), full] * 2


def text_runs(model, step=None):
    return [r for r in dhsa.last_run(model, step) if r.layer >= 0]


# ---- what works ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_prefill_agrees_with_eager(model_of, eager, family, dtype):
    model = model_of(family, dtype)
    with dhsa.patched(model, EXACT):
        got = run(model, prompt(family, LENGTH))
        runs = text_runs(model)
    agrees(got, dtype, eager, family, LENGTH)
    assert [(r.kind, r.path) for r in runs] == kind_paths(family, sparse=False)
    assert {r.density for r in runs} == {1.0}
    assert eager(family, dtype, LENGTH).abs().max() > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_rows_of_a_padded_batch_are_the_rows_alone(model_of, eager, family, side, dtype):
    model = model_of(family, dtype)
    batch, alone = batch_of(family, side)
    with dhsa.patched(model, EXACT):
        got = run(model, batch)
        single = [run(model, one)[0] for one in alone]
    for row, n in enumerate(LENGTHS):
        here = got[row][batch["attention_mask"][row].bool()]
        agrees(here[None], dtype, eager, family, n, row)
        if dtype == torch.float32:
            torch.testing.assert_close(here, single[row], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, WINDOW, 200])
def test_attention_of_a_padded_row_has_the_bits_of_the_row_alone(window, side, dtype):
    """Of models that cannot be asked: other lengths may give other bits in their linear layers."""
    layer, mask = Layer(), padded(LENGTHS, LENGTH, side)[1].bool()
    dhsa.hf.switching.install(layer, dhsa.hf.switching.State(EXACT, None, ()))
    q, k, v = qkv(batch=3, q_len=LENGTH, dtype=dtype)
    out, _ = dhsa.hf.attention_forward(layer, q, k, v, mask, sliding_window=window)
    for row, real in enumerate(mask):
        one = (x[row : row + 1, :, real] for x in (q, k, v))
        alone, _ = dhsa.hf.attention_forward(layer, *one, None, sliding_window=window)
        assert torch.equal(out[row][real], alone[0])


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_generate_gives_eagers_tokens(model_of, family):
    model = model_of(family, torch.float32)
    options = {"max_new_tokens": STEPS, "do_sample": False}
    batch, _ = batch_of(family, "left")
    for arguments in (prompt(family, LENGTH), {name: batch[name] for name in batch if name != "position_ids"}):
        expected = model.generate(**arguments, **options)
        with dhsa.patched(model, EXACT):
            assert torch.equal(model.generate(**arguments, **options), expected)
            steps = text_runs(model)
        assert [r.layer for r in steps] == [0, 1, 2, 3]
        assert {(r.path, r.query_shape[2]) for r in steps} == {("decode", 1)}
        whole = LENGTH + STEPS - 1  # and a cache of a sliding layer holds a window's keys
        window = model.config.get_text_config().sliding_window if "sliding" in {r.kind for r in steps} else None
        assert {r.key_shape[2] for r in steps} == {window if r.kind == "sliding" else whole for r in steps}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_generate_in_bf16_is_as_near_as_eager(model_of, family):
    """The logits behind each new token, against those of eager for the same text: tokens that are nearly equally likely
    may come out in another order, and say nothing."""
    model, first = model_of(family, torch.bfloat16), prompt(family, LENGTH)
    arguments = {name: x.bfloat16() if name == "pixel_values" else x for name, x in first.items()}
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with dhsa.patched(model, EXACT):
        out = model.generate(**arguments, **options)
    got = torch.cat(out.logits).float()
    assert got.shape == (STEPS, SIZES["vocab_size"])
    whole = first | {"input_ids": out.sequences[:, :-1]}
    if family == IMAGES:
        whole["token_type_ids"] = torch.nn.functional.pad(first["token_type_ids"], (0, STEPS - 1))
    exact, near = (run(model_of(family, dtype), whole)[0, LENGTH - 1 :] for dtype in DTYPES)
    assert error(got, exact) <= 1.5 * error(near, exact)  # fewer numbers than in a prefill: more chance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_sparse_where_it_should_be(model_of, eager, family, dtype):
    model, arguments = model_of(family, dtype), {"input_ids": tokens(1, LENGTH)}
    with dhsa.patched(model, EXACT):
        exact = run(model, arguments)
    with dhsa.patched(model, SPARSE):
        got = run(model, arguments)
        runs = text_runs(model)
    assert [(r.kind, r.path) for r in runs] == kind_paths(family, sparse=True)
    assert all(r.density < 0.8 if r.path == "sparse" else r.density == 1 for r in runs)
    assert torch.isfinite(got).all()
    # Queries with no more keys than the budget see all of them, in every layer: nothing before them is changed either.
    few = SPARSE.budget
    close = {torch.float32: TOLERANCE, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(got[:, :few], exact[:, :few], rtol=0, atol=close)
    assert (got[:, few:] - exact[:, few:]).abs().max() > 0.2
    with dhsa.patched(model, SPARSE.replace(budget=LENGTH)):
        assert torch.equal(run(model, arguments), exact)
        assert [(r.kind, r.path) for r in text_runs(model)] == kind_paths(family, sparse=False)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 32}),
        ("gemma2", {"sliding_window": WINDOW - 1}),
        ("gemma3", {"query_pre_attn_scalar": 32}),
        ("gemma3", {"sliding_window": WINDOW - 1}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}),
        ("mistral", {"sliding_window": 159}),
        ("phi3", {"sliding_window": 159}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}}),
        ("qwen2", {"sliding_window": WINDOW - 1}),
        ("qwen3", {"sliding_window": WINDOW - 1}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
        ("smollm3", {"sliding_window": WINDOW - 1}),
        (IMAGES, {"sliding_window": WINDOW - 1}),
    ],
)
def test_the_comparison_would_notice(model_of, eager, family, change):
    """What a family has of its own is at work in the tiny model: without it the logits would be others."""
    other = build(family, **change)
    other.load_state_dict(model_of(family, torch.float32).state_dict())
    assert (run(other, prompt(family, LENGTH)) - eager(family, torch.float32, LENGTH)).abs().max() > 50 * TOLERANCE


@pytest.mark.parametrize("family", ["gemma3", "olmo2", "qwen3"])
def test_the_comparison_would_notice_norms_of_queries_and_keys(model_of, eager, family):
    other = copy.deepcopy(model_of(family, torch.float32))
    for layer in other.model.layers:
        layer.self_attn.k_norm = torch.nn.Identity()
    assert (run(other, prompt(family, LENGTH)) - eager(family, torch.float32, LENGTH)).abs().max() > 50 * TOLERANCE


# ---- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [EXACT, SPARSE])
def test_tokens_of_a_picture_see_each_other(model_of, eager, config):
    """A mask that is neither causal nor a window is exact whatever the config, where no text between or after pictures
    is long; and the tower's attention is served."""
    model, arguments = model_of(IMAGES, torch.float32), prompt(IMAGES, LENGTH)
    with dhsa.patched(model, config):
        got = run(model, arguments)
        runs = dhsa.last_run(model)
        blind = run(model, arguments | {"token_type_ids": torch.zeros_like(arguments["token_type_ids"])})
    agrees(got, torch.float32, eager, IMAGES, LENGTH)
    assert [(r.layer, r.path, r.query_shape) for r in runs if r.layer < 0] == [(-1, "dense", (2, 2, 64, 16))] * 2
    assert {r.density for r in runs} == {1.0}
    assert (blind - got).abs().max() > 50 * TOLERANCE


def test_long_text_after_pictures_is_sparse(model_of):
    """After the second picture; pictures and what comes before them are exact."""
    model, arguments = model_of(IMAGES, torch.float32), prompt(IMAGES, 700)
    expected = run(model, arguments)
    with dhsa.patched(model, EXACT):
        exact = run(model, arguments)
    with dhsa.patched(model, SPARSE):
        got = run(model, arguments)
        runs = text_runs(model)
        assert [(r.kind, r.path) for r in runs] == kind_paths(IMAGES, sparse=True)
        again = run(model, arguments | {"use_cache": False})
    torch.testing.assert_close(exact, expected, rtol=0, atol=TOLERANCE)
    text = WINDOW - 8 + IMAGE_TOKENS
    torch.testing.assert_close(got[:, :text], expected[:, :text], rtol=0, atol=TOLERANCE)
    assert (got - expected).abs().max() > 0.2
    assert all(0.2 < r.density < 0.7 if r.kind == "full" else r.density == 1 for r in runs)
    torch.testing.assert_close(again, got, rtol=0, atol=TOLERANCE)


def test_text_for_a_model_of_pictures_is_sparse(model_of):
    """Processors say "no picture here" by zeros: the mask is then causal, and seen to be."""
    model, ids = model_of(IMAGES, torch.float32), tokens(1, LENGTH)
    with dhsa.patched(model, SPARSE):
        plain = run(model, {"input_ids": ids})
        told = run(model, {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)})
        assert [(r.kind, r.path) for r in text_runs(model)] == kind_paths(IMAGES, sparse=True)
    torch.testing.assert_close(told, plain, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_pictures_with_a_filled_cache(model_of, cache):
    """A second piece of the prompt holds the second picture: more keys than queries, and spans beyond the causal."""
    model, arguments = model_of(IMAGES, torch.float32), prompt(IMAGES, LENGTH)
    ids, kinds, pixels = (arguments[name] for name in ("input_ids", "token_type_ids", "pixel_values"))
    cut = 5 + IMAGE_TOKENS + 7
    pieces = [(slice(0, cut), pixels[:1]), (slice(cut, LENGTH), pixels[1:])]

    def fed():
        config = model.config.get_text_config()
        one = (
            transformers.StaticCache(config, max_cache_len=LENGTH + 9)
            if cache == "static"
            else (transformers.DynamicCache(config=config))
        )
        return torch.cat(
            [
                model(
                    input_ids=ids[:, part],
                    token_type_ids=kinds[:, part],
                    pixel_values=image,
                    **cache_option(model, one),
                ).logits
                for part, image in pieces
            ],
            1,
        )

    expected = fed()
    with dhsa.patched(model, EXACT):
        got = fed()
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


# ---- what is refused -----------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}


def refuses(model, match, **arguments):
    model = dhsa.patch(model.eval())
    with pytest.raises(NotImplementedError, match=match) as raised:
        model(**arguments)
    assert 'attn_implementation="eager"' in str(raised.value)


def test_attention_bias_is_refused():
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SMALL, **sizes))
    try:
        refuses(model, "position_bias", input_ids=tokens(1, 20), decoder_input_ids=tokens(1, 9))
    except ValueError as error:  # of early releases, whose T5 takes no implementation by name
        expected = "T5ForConditionalGeneration does not support changing its attention implementation"
        assert expected in str(error)  # noqa: PT017
    alibi = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM does not support changing its attention implementation"):
        dhsa.patch(alibi)


@pytest.mark.parametrize("length", [9, 20, 30])  # fewer, as many and more queries than keys
def test_cross_attention_of_bart_is_refused(length):
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL, **ENCODER_DECODER))
    refuses(model, "BartAttention is cross", input_ids=tokens(1, 20), decoder_input_ids=tokens(1, length))


def test_whisper_has_its_encoder_but_no_cross_attention():
    sizes = {**ENCODER_DECODER, "num_mel_bins": 8, "max_source_positions": 40, "max_target_positions": 64}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SMALL, **sizes)).eval()
    sound = torch.randn(1, 8, 80, generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    expected = model.model.encoder(sound).last_hidden_state
    with dhsa.patched(model, SPARSE):
        got = model.model.encoder(sound).last_hidden_state
        assert [r.path for r in dhsa.last_run(model)] == ["dense"]
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
    refuses(model, "WhisperAttention is cross", input_features=sound, decoder_input_ids=tokens(1, 9))


def test_cross_attention_of_a_class_of_its_own_is_refused():
    """Llama 3.2 Vision's has no other mark, and would pass for causal."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    config = MllamaTextConfig(**sizes, attn_implementation="dhsa")
    with pytest.raises(NotImplementedError, match="MllamaTextCrossAttention is cross-attention"):
        MllamaTextCrossAttention(config, layer_idx=0)(torch.randn(1, 9, 32), torch.randn(1, 20, 32))


@pytest.mark.parametrize("name", ["sinks", "indices", "block_indices"])
def test_arguments_of_newer_models_are_not_ignored(name):
    """Sinks of each token, by another name; keys that a model has chosen itself."""
    x = torch.randn(1, 2, 20, 16)
    with pytest.raises(NotImplementedError, match=name):
        dhsa.hf.attention_forward(torch.nn.Module(), x, x, x, None, **{name: torch.zeros(1, 2, 20, 4)})


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_training_is_refused(model_of, family):
    model = copy.deepcopy(model_of(family, torch.float32))
    with dhsa.patched(model, EXACT):
        with torch.enable_grad(), pytest.raises(NotImplementedError, match=r"no backward pass.*torch\.no_grad"):
            run(model.train(), prompt(family, LENGTH))
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        with pytest.raises(NotImplementedError, match=r"dropout=0\.1: call model\.eval"):
            run(model, prompt(family, LENGTH))
