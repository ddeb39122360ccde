"""Decoding steps by an index of the prompt's queries, which is kept with the cache."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import build, padded, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf.attention import NO_INDEX  # noqa: E402
from dhsa.hf.compat import GRAPHS, cache_option  # noqa: E402

OWN = {"every": 2, "links": 8, "probes": 3}
SMALL = dhsa.Config(method="retrieval", budget=32, sink=2, local=8, query_block=32, dense_tail=0, decode="dhsa", **OWN)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def steps(model, ids, count=2):
    """Cache and logits after a prompt and a few tokens."""
    cache = model(ids).past_key_values
    for i in range(count):
        logits = model(tokens(len(ids), 1, seed=9 + i), **cache_option(model, cache)).logits
    return cache, logits


@pytest.mark.parametrize("tail", [0, 10**6])
def test_steps_select_by_the_index_of_the_prompt(seen, tail):
    """Of a prompt that is sparse, and of one that exact attention has read."""
    model, config = build("llama"), SMALL.replace(dense_tail=tail)
    with dhsa.patched(model, config):
        steps(model, tokens(2, 150))
        assert {run.path for run in dhsa.last_run(model, "prefill")} == {"dense" if tail else "sparse"}
        assert {(run.path, run.reason) for run in dhsa.last_run(model, "decode")} == {("sparse", "")}
    states = {layer: config.options.new_state() for layer in range(4)}
    for layer, q, k, v, options, out in seen:
        one = SMALL if q.shape[2] > 1 or not tail else config.replace(dense_tail=0)
        lists = dhsa.select(q, k, one, state=states[layer], **options)
        if q.shape[2] == 1 or not tail:
            torch.testing.assert_close(out, dhsa.sparse_attention(q, k, v, lists, **options), rtol=0, atol=0)
        else:
            torch.testing.assert_close(out, dhsa.attention(q, k, v, dhsa.Config(budget=None), **options))


def test_pieces_of_a_prompt_index_what_the_whole_indexes():
    model, ids = build("llama", num_hidden_layers=1), tokens(1, 160)
    exact = SMALL.replace(dense_tail=10**6)
    with dhsa.patched(model, exact):
        _, want = steps(model, ids)
        cache = model(ids[:, :100]).past_key_values
        model(ids[:, 100:], **cache_option(model, cache))
        for i in range(2):
            got = model(tokens(1, 1, seed=9 + i), **cache_option(model, cache)).logits
        torch.testing.assert_close(got, want)


def test_rows_of_a_padded_batch_are_as_if_alone():
    model = build("gemma3")
    ids, mask = padded([150, 120], 150, "left")
    with dhsa.patched(model, SMALL):
        together = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        kinds = {(run.kind, run.path, run.reason) for run in dhsa.last_run(model, "decode")}
        assert kinds == {("full", "sparse", ""), ("sliding", "decode", "")}
        for row in range(2):
            real = mask[row].bool()
            alone = model.generate(ids[row : row + 1, real], max_new_tokens=4, do_sample=False)
            assert alone[0, -4:].tolist() == together[row, -4:].tolist()


def test_caches_are_copied_cropped_and_pickled():
    model, ids = build("llama"), tokens(1, 150)
    with dhsa.patched(model, SMALL):
        cache, _ = steps(model, ids)
        twin = copy.deepcopy(cache)
        step = tokens(1, 1, seed=5)
        want = model(step, **cache_option(model, cache)).logits
        torch.testing.assert_close(model(step, **cache_option(model, twin)).logits, want, rtol=0, atol=0)
        other = pickle.loads(pickle.dumps(twin))
        model(step, **cache_option(model, other))
        assert {(run.path, run.reason) for run in dhsa.last_run(model, "decode")} == {("decode", NO_INDEX)}
        cache.crop(60 - cache.get_seq_length())
        model(step, **cache_option(model, cache))
        assert {run.path for run in dhsa.last_run(model, "decode")} == {"sparse"}
        state = next(iter(cache.layers[0]._dhsa_states.values()))
        assert max(part.at.max() for part in state.parts.values()) < 60
        assert all((part.links < 60).all() for part in state.parts.values())


def test_without_a_cache_or_an_index_steps_are_exact_and_say_so():
    model, ids = build("llama"), tokens(1, 150)
    with dhsa.patched(model, SMALL.replace(decode="exact")):
        cache = model(ids).past_key_values
    with dhsa.patched(model, SMALL):
        got = model(ids[:, :1], **cache_option(model, cache)).logits
        assert {run.reason for run in dhsa.last_run(model, "decode")} == {NO_INDEX}
    with dhsa.patched(model, SMALL.replace(decode="exact")):
        cache = model(ids).past_key_values
        torch.testing.assert_close(got, model(ids[:, :1], **cache_option(model, cache)).logits, rtol=0, atol=0)


def test_what_it_cannot_serve_is_refused():
    model, ids = build("llama"), tokens(1, 150)
    with pytest.raises(ValueError, match=r"^share: with decode='dhsa' each layer of method='retrieval'"):
        SMALL.replace(share="selections")
    if GRAPHS:  # torch before 2.13 fails to compile some models, whatever attends
        with dhsa.patched(model, SMALL), pytest.raises(Exception, match=r"method: 'retrieval' uses what it found in"):
            torch.compile(model, backend="eager")(ids)
    q, k = np.ones((1, 2, 64, 8), np.float32), np.ones((1, 1, 64, 8), np.float32)
    with pytest.raises(TypeError, match=r"^state: expected that of method='retrieval', got Cascade"):
        dhsa.select(q, k, SMALL, state=dhsa.methods.Spatten().new_state())
