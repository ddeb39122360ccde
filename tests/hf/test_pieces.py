"""Prompts in pieces and decoding steps that choose their keys, in transformers models: what is kept beside a cache is
that cache's own, whatever happens to it, and is never more than a shorter way to the same numbers."""

import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra")
transformers = pytest.importorskip("transformers", reason="needs the hf extra")

from tiny import FAMILIES, SIZES, tokens  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf import caches  # noqa: E402
from dhsa.hf.compat import cache_option  # noqa: E402

STEPS = dhsa.Config(budget=64, sink=4, local=16, query_block=16, dense_tail=0, decode="dhsa", break_even=0)
PIECES = STEPS.replace(decode="exact")
EXACT = dhsa.Config(budget=None)
PROMPT = 250


def feed(model, cache, ids, **options):
    """Logits of these tokens after what the cache holds."""
    with torch.no_grad():
        return model(ids, **cache_option(model, cache), use_cache=True, **options).logits


def steps(model, cache, ids):
    return torch.cat([feed(model, cache, ids[:, i : i + 1]) for i in range(ids.shape[1])], 1)


def new_cache(model):
    return DynamicCache(config=model.config)


def paths(model, step):
    return {(run.kind, run.path) for run in dhsa.last_run(model, step)}


def indexes_of(cache):
    return [
        index
        for layer in cache.layers
        if (kept := getattr(layer, caches._KEPT, None))
        for index in kept.key_indexes.values()
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_build_on_each_other(models, family):
    model, ids = models(family), tokens(2, 600)
    with dhsa.patched(model, EXACT):
        dense = feed(model, new_cache(model), ids)
    with dhsa.patched(model, PIECES):
        at_once = feed(model, new_cache(model), ids)
        cache, found = new_cache(model), []
        for i in range(0, 600, 150):
            before = [index.boundaries for index in indexes_of(cache)]
            found.append(feed(model, cache, ids[:, i : i + 150]))
            assert ("full", "sparse") in paths(model, "prefill")
            for old, index in zip(before, indexes_of(cache), strict=bool(before)):
                assert index.boundaries[: len(old)] == old
                assert index.boundaries[-1] == i + 150
        assert len(indexes_of(cache)) == 2 * sum(run.kind == "full" for run in dhsa.last_run(model))
    pieces = torch.cat(found, 1)
    assert (pieces - at_once).norm() <= (at_once - dense).norm()
    assert (pieces - dense).norm() <= 1.1 * (at_once - dense).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_choose_their_keys(models, family):
    model, ids = models(family), tokens(1, PROMPT + 20)
    with dhsa.patched(model, STEPS):
        cache = new_cache(model)
        feed(model, cache, ids[:, :PROMPT])
        logits = steps(model, cache, ids[:, PROMPT:])
        runs = dhsa.last_run(model, "decode")
        assert {run.path for run in runs if run.kind == "full"} == {"sparse"}
        assert {run.path for run in runs if run.kind == "sliding"} <= {"decode"}
        for run in runs:
            if run.path == "sparse":
                assert run.density == pytest.approx(64 / (PROMPT + 20))
                assert run.query_shape[2] == 1
        for index in indexes_of(cache):  # the prompt's chunks, the answer so far, the token itself
            assert index.boundaries[-3:] == [PROMPT, PROMPT + 19, PROMPT + 20]
    with dhsa.patched(model, PIECES):
        cache = new_cache(model)
        feed(model, cache, ids[:, :PROMPT])
        assert not torch.equal(steps(model, cache, ids[:, PROMPT:]), logits)
        assert {run.path for run in dhsa.last_run(model, "decode")} == {"decode"}


def test_a_budget_of_everything_is_exact_decoding(models):
    model, ids = models("llama"), tokens(1, PROMPT)
    options = {"max_new_tokens": 12, "do_sample": False}
    with dhsa.patched(model, EXACT):
        exact = model.generate(ids, **options)
    with dhsa.patched(model, STEPS.replace(budget=400)):
        assert torch.equal(model.generate(ids, **options), exact)
        assert paths(model, "decode") == {("full", "decode")}


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_cropped_cache_forgets(models, family):
    model, ids, other = models(family), tokens(1, PROMPT + 12), tokens(1, 8, seed=3)
    with dhsa.patched(model, STEPS):
        expected = new_cache(model)
        feed(model, expected, ids[:, :PROMPT])
        steps(model, expected, ids[:, PROMPT : PROMPT + 4])
        want = steps(model, expected, other)
        cache = DynamicCache() if family == "gemma3" else new_cache(model)  # one that may be cropped
        feed(model, cache, ids[:, :PROMPT])
        steps(model, cache, ids[:, PROMPT:])
        cache.crop(-8)
        assert torch.equal(steps(model, cache, other), want)


@pytest.mark.parametrize("cut", [1, 60])
def test_a_cache_cropped_into_the_prompt(models, cut):
    """Chunks that end before the cut stay; what follows is cut as a prompt's."""
    model, ids, other = models("llama"), tokens(1, PROMPT), tokens(1, 90, seed=3)
    with dhsa.patched(model, STEPS):
        cache = new_cache(model)
        feed(model, cache, ids)
        before = [index.boundaries for index in indexes_of(cache)]
        cache.crop(-cut)
        feed(model, cache, other)
        for old, index in zip(before, indexes_of(cache), strict=True):
            stay = [edge for edge in old if edge <= PROMPT - cut]
            assert index.boundaries[: len(stay)] == stay
            assert index.boundaries[-1] == PROMPT - cut + 90


@pytest.mark.parametrize("how", ["numpy", "data", "inference"])
@pytest.mark.parametrize("where", [slice(120, 121), slice(40, 200)])
def test_keys_written_where_pytorch_does_not_see_it(models, how, where, monkeypatch):
    """Neither the tensor nor its version tells; the next step is the one of a cache whose keys are all looked at."""
    model, ids = models("llama"), tokens(1, PROMPT + 3)

    def written():
        cache = new_cache(model)
        feed(model, cache, ids[:, :PROMPT])
        steps(model, cache, ids[:, PROMPT : PROMPT + 2])
        before = [index.boundaries for index in indexes_of(cache)]
        for layer in cache.layers:
            keys = {"numpy": layer.keys.numpy(), "data": layer.keys.data, "inference": layer.keys}[how]
            keys[0, -1, where] *= -3
        logits = feed(model, cache, ids[:, PROMPT + 2 :])
        return logits, before, [index.boundaries for index in indexes_of(cache)]

    with dhsa.patched(model, STEPS), torch.inference_mode(how == "inference"):
        found, before, after = written()
        monkeypatch.setattr(caches.Kept, "unchanged", lambda self, layer: 0)
        want, _, cuts = written()
    assert torch.equal(found, want)
    assert after == cuts
    for old, new in zip(before, after, strict=True):  # cut anew from the first key that is another
        assert new[-3] == PROMPT + 2
        stay = [edge for edge in old if edge <= where.start]
        assert new[: len(stay)] == stay


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_reordered_rows_are_whose_they_are(models, family):
    model, prompt = models(family), tokens(1, PROMPT).expand(3, -1)
    first, second = tokens(3, 5, seed=1), tokens(3, 5, seed=2)
    beams = torch.tensor([2, 0, 0])
    with dhsa.patched(model, STEPS):
        cache = new_cache(model)
        feed(model, cache, prompt)
        steps(model, cache, first)
        cache.reorder_cache(beams)
        found = steps(model, cache, second)
        for row, source in enumerate(beams):
            alone = new_cache(model)
            feed(model, alone, prompt[:1])
            steps(model, alone, first[source : source + 1])
            want = steps(model, alone, second[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], want, rtol=1e-4, atol=1e-4)
            assert [p.boundaries for p in indexes_of(cache)[row::3]] == [p.boundaries for p in indexes_of(alone)]


def test_two_generations_in_turns(models):
    model = models("gemma3")
    ids = [tokens(1, PROMPT + 10, seed=s) for s in (1, 2)]
    with dhsa.patched(model, STEPS):
        want = []
        for x in ids:
            cache = new_cache(model)
            feed(model, cache, x[:, :PROMPT])
            want.append(steps(model, cache, x[:, PROMPT:]))
        both = [new_cache(model) for _ in ids]
        for cache, x in zip(both, ids, strict=True):
            feed(model, cache, x[:, :PROMPT])
        for i in range(PROMPT, PROMPT + 10):
            for cache, x, logits in zip(both, ids, want, strict=True):
                assert torch.equal(feed(model, cache, x[:, i : i + 1])[:, 0], logits[:, i - PROMPT])


def test_a_cache_used_anew(models):
    model = models("llama")
    with dhsa.patched(model, STEPS):
        cache = new_cache(model)
        feed(model, cache, tokens(1, PROMPT, seed=1))
        steps(model, cache, tokens(1, 5))
        cache.reset()
        if cache.get_seq_length() > 0:
            pytest.skip("this transformers fills a dynamic cache with zeros when it is reset and goes on after them")
        ids = tokens(1, PROMPT + 5, seed=2)
        fresh = new_cache(model)
        assert torch.equal(feed(model, cache, ids[:, :PROMPT]), feed(model, fresh, ids[:, :PROMPT]))
        assert torch.equal(steps(model, cache, ids[:, PROMPT:]), steps(model, fresh, ids[:, PROMPT:]))


def test_a_prefix_serves_several_prompts(models):
    """A deep copy of a cache brings its chunks along, and leaves the original's alone."""
    model, prefix = models("llama"), tokens(1, PROMPT)
    ends = [tokens(1, 40, seed=s) for s in (1, 2)]
    with dhsa.patched(model, STEPS):
        cache = new_cache(model)
        feed(model, cache, prefix)
        kept = [index.boundaries for index in indexes_of(cache)]
        for end in ends:
            twin = copy.deepcopy(cache)
            assert [index.boundaries for index in indexes_of(twin)] == kept
            found = feed(model, twin, end)
            own = new_cache(model)
            feed(model, own, prefix)
            assert torch.equal(found, feed(model, own, end))
        assert [index.boundaries for index in indexes_of(cache)] == kept


@pytest.mark.parametrize("change", [{"chunk_size": 16}, {"boundaries": "similarity"}, {"method": "dhsa"}], ids=str)
def test_another_config_cuts_keys_anew(models, change):
    """What a cache knows of its keys is for configs that cut them alike."""
    model, ids = models("llama"), tokens(1, PROMPT + 4)
    prompt, rest = ids[:, :PROMPT], ids[:, PROMPT:]
    other = STEPS.replace(**change)
    cache = new_cache(model)
    with dhsa.patched(model, STEPS):
        feed(model, cache, prompt)
    bare = copy.deepcopy(cache)
    for layer in bare.layers:
        delattr(layer, caches._KEPT)
    with dhsa.patched(model, other):
        found, expected = steps(model, copy.deepcopy(cache), rest), steps(model, bare, rest)
        assert paths(model, "decode") == {("full", "sparse")}
    assert torch.equal(found, expected)
    with dhsa.patched(model, STEPS.replace(budget=80)):  # cuts them alike
        kept = indexes_of(cache)
        steps(model, cache, rest)
        assert indexes_of(cache) == kept


def test_a_pickled_cache_needs_no_dhsa(models):
    model, ids = models("llama"), tokens(1, PROMPT + 4)
    with dhsa.patched(model, STEPS):
        cache = new_cache(model)
        feed(model, cache, ids[:, :PROMPT])
        file = io.BytesIO()
        pickle.dump(cache, file)
        assert b"dhsa.hf" not in file.getvalue()
        back = pickle.loads(file.getvalue())
        found = steps(model, back, ids[:, PROMPT:])
        assert torch.isfinite(found).all()
        assert {run.path for run in dhsa.last_run(model, "decode")} == {"sparse"}


@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_padded_rows_step_as_if_alone(models, family):
    model, lengths = models(family), (PROMPT, 180)
    rows = [tokens(1, n + 6, seed=n) for n in lengths]
    ids = torch.zeros(2, PROMPT, dtype=torch.long)
    mask = torch.zeros(2, PROMPT + 6, dtype=torch.long)
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        ids[b, PROMPT - n :] = row[0, :n]
        mask[b, PROMPT - n :] = 1
    with dhsa.patched(model, STEPS):
        cache = new_cache(model)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        found = [feed(model, cache, ids, attention_mask=mask[:, :PROMPT], position_ids=position[:, :PROMPT])[:, -1:]]
        for i in range(6):
            now = torch.cat([row[:, n + i : n + i + 1] for row, n in zip(rows, lengths, strict=True)])
            at = PROMPT + i
            found.append(
                feed(model, cache, now, attention_mask=mask[:, : at + 1], position_ids=position[:, at : at + 1])
            )
            assert ("full", "sparse") in paths(model, "decode")
        found = torch.cat(found, 1)
        for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
            alone = new_cache(model)
            want = torch.cat([feed(model, alone, row[:, :n])[:, -1:], steps(model, alone, row[:, n:])], 1)
            torch.testing.assert_close(found[b : b + 1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_static_caches_step_alike(models, family, inference):
    """Theirs is one tensor for good, so that it alone says nothing of what is in it."""
    model, ids = models(family), tokens(1, PROMPT + 8)
    with dhsa.patched(model, STEPS), torch.inference_mode(inference):
        dynamic, static = new_cache(model), StaticCache(config=model.config, max_cache_len=PROMPT + 30)
        for x in (ids, tokens(1, PROMPT + 8, seed=4)):
            want = [feed(model, dynamic, x[:, :PROMPT])[:, -1:], steps(model, dynamic, x[:, PROMPT:])]
            found = [feed(model, static, x[:, :PROMPT])[:, -1:], steps(model, static, x[:, PROMPT:])]
            assert ("full", "sparse") in paths(model, "decode")
            torch.testing.assert_close(torch.cat(found, 1), torch.cat(want, 1), rtol=1e-4, atol=1e-4)
            dynamic = new_cache(model)
            static.reset()


GENERATE = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    # The end token is never said; early releases look prompts up only where there is one.
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 4, "eos_token_id": SIZES["vocab_size"]},
    "static": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("how", GENERATE)
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_generate_whether_keys_are_trusted_or_looked_at(models, family, how, monkeypatch):
    """That the tensor of the last call is still there may only save a look, never change a number."""
    if how == "prompt lookup" and family == "gemma3":
        pytest.skip("transformers cannot crop a cache that slides")
    model, ids = models(family), tokens(1, PROMPT)
    options = {"max_new_tokens": 16, "disable_compile": True, **GENERATE[how]}

    def generate():
        torch.manual_seed(0)
        with dhsa.patched(model, STEPS):
            return model.generate(ids, **options)

    found = generate()
    monkeypatch.setattr(caches.Kept, "unchanged", lambda self, layer: 0)
    assert torch.equal(found, generate())


def test_the_look_is_left_out(models, monkeypatch):
    model, ids, told = models("llama"), tokens(1, PROMPT), []
    real = caches.Memory.of
    monkeypatch.setattr(
        caches.Memory,
        "of",
        lambda self, row, start: told.append(real(self, row, start)["same"]) or real(self, row, start),
    )
    with dhsa.patched(model, STEPS):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    layers = model.config.num_hidden_layers
    assert told == [0] * layers + [PROMPT + i for i in range(3) for _ in range(layers)]


def test_nothing_of_it_stays(models):
    model = models("gemma2")
    before = [dict(module.__dict__) for module in model.modules()]
    with dhsa.patched(model, STEPS):
        assert any(module._forward_pre_hooks for module in model.modules())
        cache = new_cache(model)
        feed(model, cache, tokens(1, PROMPT))
    assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in model.modules())
    assert [set(d) - {"_dhsa_runs"} for d in before] == [
        set(module.__dict__) - {"_dhsa_runs"} for module in model.modules()
    ]


def test_decode_is_for_methods_of_chunks():
    with pytest.raises(ValueError, match="decode: \"dhsa\" chooses among chunks, which method='window' has not"):
        dhsa.Config(method="window", decode="dhsa")
    with pytest.raises(ValueError, match="decode: expected one of 'exact', 'dhsa', got 'sparse'"):
        dhsa.Config(decode="sparse")


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_generate_reads_a_prompt_in_pieces(models, family):
    model, ids = models(family), tokens(2, 400)
    options = {"max_new_tokens": 8, "do_sample": False}
    want = model.generate(ids, **options)
    with dhsa.patched(model, EXACT):
        assert torch.equal(model.generate(ids, prefill_chunk_size=128, **options), want)
    with dhsa.patched(model, STEPS):
        model.generate(ids, prefill_chunk_size=128, **options)
        assert ("full", "sparse") in paths(model, "prefill")
        assert {run.key_shape[2] for run in dhsa.last_run(model, "prefill") if run.kind == "full"} == {400}
        assert {run.query_shape[2] for run in dhsa.last_run(model, "prefill")} == {400 % 128}
