"""`dhsa.hf.key_scores`: the layers of a model select keys by scores from outside."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import build, padded, qkv, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa import hf  # noqa: E402
from dhsa.hf.compat import cache_option  # noqa: E402

SMALL = dhsa.Config(budget=48, sink=4, local=16, query_block=32, dense_tail=16, break_even=0)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_a_layer_attends_to_the_keys_that_the_scores_name():
    q, k, v = qkv(2, q_len=160)
    scores = torch.rand(2, 1, 160, generator=torch.Generator().manual_seed(1))
    with dhsa.patched(build("llama"), SMALL) as model:
        module = model.model.layers[0].self_attn
        with hf.key_scores(scores):
            out, _ = hf.attention_forward(module, q, k, v, None, scaling=0.25)
        selection = dhsa.select(q, k, SMALL, key_scores=scores, scale=0.25)
        want = dhsa.sparse_attention(q, k, v, selection, scale=0.25).transpose(1, 2)
        torch.testing.assert_close(out, want, rtol=0, atol=0)
        other, _ = hf.attention_forward(module, q, k, v, None, scaling=0.25)
        assert not torch.equal(out, other)  # outside the block the method selects


@pytest.mark.parametrize("share", [None, "boundaries", "selections"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_layers_of_a_model(family, share):
    """Scores that rise with the position take the most recent keys, as "window" does."""
    model, ids = build(family), tokens(2, 150)
    recent = np.arange(150.0)[None, None]
    with dhsa.patched(model, SMALL.replace(method="window")):
        want = model(ids).logits
    with dhsa.patched(model, SMALL.replace(share=share)), hf.key_scores(recent):
        got = model(ids).logits
        assert {run.path for run in dhsa.last_run(model)} == {"sparse"}
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_padded_batch_has_its_own_scores(side):
    model = build("llama")
    ids, mask = padded([150, 120], 150, side)
    scores = torch.rand(2, 1, 150, generator=torch.Generator().manual_seed(1))
    with dhsa.patched(model, SMALL):
        with hf.key_scores(scores):
            together = model(ids, attention_mask=mask).logits
        for row in range(2):
            seen = mask[row].bool()
            with hf.key_scores(scores[row : row + 1, :, seen]):
                alone = model(ids[row : row + 1, seen]).logits
            torch.testing.assert_close(together[row, seen], alone[0])


def test_generation_and_pieces_of_a_prompt():
    model, ids = build("llama"), tokens(1, 150)
    scores = torch.rand(1, 1, 150, generator=torch.Generator().manual_seed(1))
    with dhsa.patched(model, SMALL.replace(decode="dhsa")), hf.key_scores(scores):
        whole = model.generate(ids, max_new_tokens=5, do_sample=False)
        cache = model(ids[:, :96]).past_key_values
        rest = model(ids[:, 96:], **cache_option(model, cache)).logits
        assert whole.shape[1] > 150
        assert rest.shape[1] == 54
        assert {run.path for run in dhsa.last_run(model)} == {"sparse"}


def test_what_does_not_fit_is_refused():
    model, ids = build("gemma3"), tokens(2, 150)
    for bad, message in ((np.ones(5), "3 dimensions"), (np.full((1, 1, 5), np.inf), "finite")):
        with pytest.raises(ValueError, match=rf"^key_scores: .*{message}"), hf.key_scores(bad):
            pass
    with pytest.raises(TypeError, match=r"^key_scores: expected real numbers"), hf.key_scores([["a"]]):
        pass
    with dhsa.patched(model, SMALL):
        with (
            pytest.raises(ValueError, match=r"^key_scores: got 149 scores, but the call has 150"),
            hf.key_scores(np.ones((1, 1, 149))),
        ):
            model(ids)
        with (
            pytest.raises(ValueError, match=r"^key_scores: got a batch of 3, expected 1 or 2"),
            hf.key_scores(np.ones((3, 1, 150))),
        ):
            model(ids)
        with hf.key_scores(np.ones((1, 1, 200))):
            cache = model(tokens(2, 150)).past_key_values
            with pytest.raises(NotImplementedError, match=r"^key_scores: the cache of a layer with a sliding window"):
                model(tokens(2, 50), **cache_option(model, cache))
