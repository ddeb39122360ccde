"""`generate` in all its modes and over all its caches: with an exact config the tokens are eager's.

Equality of tokens says nothing where two of them are nearly as likely, so each comparison shows first that noise far
above what the two ways of adding up differ by leaves eager's own tokens as they are.
"""

import copy
import importlib.util

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SIZES, SPARSE, WINDOW, padded, tokens  # noqa: E402

import dhsa  # noqa: E402

LENGTH, STEPS = 90, 24  # past the window from the start, and the caches of sliding layers roll
FAMILIES = ["gemma2", "gemma3", "llama"]
TOLERANCE, NOISE = 2e-5, 2e-4  # of logits of about 3


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


class Noise(transformers.LogitsProcessor):
    """Moves every logit up or down; leaves the generator that samples alone."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids, scores):
        return scores + NOISE * (2 * torch.randint(0, 2, scores.shape, generator=self.generator) - 1)


def prompts(lengths, seed, side="left"):
    """Arguments of `generate` for prompts of these lengths."""
    ids, mask = padded(lengths, max(lengths), side)
    ids[mask.bool()] = tokens(1, sum(lengths), seed)[0]
    return {"input_ids": ids} if len(lengths) == 1 else {"input_ids": ids, "attention_mask": mask}


def generate(model, noise=None, **options):
    torch.manual_seed(5)
    if noise is not None:
        options["logits_processor"] = transformers.LogitsProcessorList([Noise(noise)])
    options = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(output_logits=True, **options)


def same_as_eager(model, lengths, tolerance=TOLERANCE, side="left", **options):
    """Asserts equal tokens and near logits of the first prompts whose tokens do not hang on noise; returns the prompts
    and what was generated."""
    for seed in range(6):
        asked = prompts(lengths, seed, side)
        expected = generate(model, **asked, **options)
        noisy = (generate(model, noise=noise, **asked, **options).sequences for noise in range(2))
        if all(torch.equal(one, expected.sequences) for one in noisy):
            break
    else:
        pytest.fail("every prompt has tokens that are nearly as likely as others")
    with dhsa.patched(model, EXACT):
        got = generate(model, **asked, **options)
        assert {r.layer for r in dhsa.last_run(model)} == set(range(model.config.num_hidden_layers))
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.logits) == len(expected.logits) > 0
    for one, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    return asked, got


# ---- caches --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_streams(monkeypatch):
    """Offloaded caches copy on an accelerator's streams. On the CPU these are all that is missing: copies between a
    device and itself are none, but layers are fetched, handed over and put away as ever."""

    class Stream:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
@pytest.mark.parametrize("length", [WINDOW - 10, LENGTH])
@pytest.mark.parametrize("family", FAMILIES)
def test_caches(models, no_streams, family, length, cache):
    """Of sliding layers too, full before or during the decoding."""
    same_as_eager(models(family), [length, length - 9], cache_implementation=cache)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
def test_quantized_caches(models, backend, beams):
    """Full attention only, says transformers. A key that is rounded the other way for its last bit moves the logits
    further than adding up in another order does."""
    settings = {"backend": backend}
    if backend != "fp8":
        if importlib.util.find_spec({"quanto": "optimum", "hqq": "hqq"}[backend]) is None:
            pytest.skip(f"needs the package of {backend}")
        axis = {"quanto": 0, "hqq": 1}[backend]
        settings |= {"residual_length": 16, "q_group_size": 16, "axis_key": axis, "axis_value": axis}
    elif not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("needs a transformers that has it")
    model, rounding = models("llama"), 1e-3
    options = {"num_beams": beams, "cache_implementation": "quantized", "cache_config": settings}
    asked, got = same_as_eager(model, [LENGTH, LENGTH - 9], rounding, **options)
    full = generate(model, **asked, num_beams=beams)
    assert (full.logits[1] - got.logits[1]).abs().max() > 10 * rounding  # or nothing would have been quantized


# ---- modes ---------------------------------------------------------------------------------------------------------

MODES = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "in pieces": {"prefill_chunk_size": 37},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 20},
    "sampling of several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beams, several of them": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beams, sampling": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "beams over a static cache": {"num_beams": 3, "cache_implementation": "static"},
    "guidance": {"guidance_scale": 1.5},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_modes(models, family, mode):
    """Of a prompt, and of three padded to the left."""
    options = MODES[mode]
    same_as_eager(models(family), [LENGTH], **options)
    same_as_eager(models(family), [LENGTH, 71, 12], **options)
    steps = {r.step for r in dhsa.last_run(models(family))}
    assert steps == {"prefill" if mode == "no cache" else "decode"}


# ---- speculation: several queries on a filled cache, of which some are taken back -----------------------------------


def assistant_of(model):
    """The model without its last two layers, which guesses right now and then."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:2]
    small = type(model)._from_config(config, attn_implementation="eager").eval()
    small.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in small.state_dict()})
    small.generation_config.assistant_confidence_threshold = 0  # guess on, be it never so unlikely
    small.generation_config.num_assistant_tokens = 4
    return small


def guesses(model, asked, guesser, **options):
    """(those that came true, those that were taken back) of a greedy run that speculates."""
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, ids, out: seen.append(ids[0].shape[1]))
    with dhsa.patched(model, EXACT):
        got = generate(model, **asked, **guesser, **options).sequences
    handle.remove()
    # Eager with the same helper: in early releases a helper changes what the model says.
    assert torch.equal(got, generate(model, **asked, **guesser, **options).sequences)
    return STEPS - len(seen), sum(seen) - LENGTH - STEPS + 1


@pytest.mark.parametrize("helper", ["eager", "dhsa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_assisted(models, family, helper):
    model = models(family)
    guesser = {"assistant_model": assistant_of(model)}
    if helper == "dhsa":
        dhsa.patch(guesser["assistant_model"], SPARSE)  # its guesses may be wrong, and decide nothing
    same_as_eager(model, [LENGTH], do_sample=True, top_k=5, **guesser)
    options = {"no_repeat_ngram_size": 2}  # Gemma 2's random weights say one word over and over, too easily guessed
    asked, _ = same_as_eager(model, [LENGTH], **guesser, **options)
    assert min(guesses(model, asked, guesser, **options)) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup(models, family):
    # The end token is never said; early releases look prompts up only where there is one.
    model, guesser = models(family), {"prompt_lookup_num_tokens": 5, "eos_token_id": SIZES["vocab_size"]}
    same_as_eager(model, [LENGTH], do_sample=True, top_k=0, **guesser)
    asked, _ = same_as_eager(model, [LENGTH], **guesser)
    assert min(guesses(model, asked, guesser)) > 0


# ---- sparse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sparse_prompt_goes_on_alike_over_all_caches(models, no_streams, family, options):
    model, asked = models(family), prompts([260], 0)
    exact = generate(model, **asked, **options)
    with dhsa.patched(model, SPARSE):
        expected = generate(model, **asked, **options)
        assert (expected.logits[-1] - exact.logits[-1]).abs().max() > 50 * TOLERANCE  # it was sparse
        for cache in ("static", "offloaded", "offloaded_static"):
            got = generate(model, **asked, cache_implementation=cache, **options)
            assert torch.equal(got.sequences, expected.sequences)
            torch.testing.assert_close(got.logits[-1], expected.logits[-1], rtol=0, atol=TOLERANCE)
