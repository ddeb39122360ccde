"""Methods that run in NumPy, in models: padding, windows, shared lists, 16 bits, pieces of a prompt and generation."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import build, padded, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf.compat import cache_option  # noqa: E402
from dhsa.methods import registry  # noqa: E402

METHODS = [name for name, method in registry.items() if not method.in_core]
SMALL = {"budget": 48, "sink": 4, "local": 16, "query_block": 32, "dense_tail": 16}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def small(method):
    own = {"key_block": 8} if "key_block" in registry[method].options() else {}
    return dhsa.Config(method=method, **SMALL, **own)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_padded_batch_are_as_if_alone(method):
    """In a model with layers of both kinds; keys of padding are no candidates."""
    model = build("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    ids, mask = padded([150, 120], 150, "left")
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with dhsa.patched(model, small(method)):
        together = model(ids, attention_mask=mask, position_ids=places).logits
        assert {run.path for run in dhsa.last_run(model)} == {"sparse"}
        for row in range(2):
            real = mask[row].bool()
            torch.testing.assert_close(together[row, real], model(ids[row : row + 1, real]).logits[0])


@pytest.mark.parametrize("method", METHODS)
def test_generation_pieces_and_shared_lists(method):
    model, ids = build("llama", num_hidden_layers=2).bfloat16(), tokens(1, 150)
    with dhsa.patched(model, small(method).replace(share="selections")):
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 150
        cache = model(ids[:, :96]).past_key_values
        logits = model(ids[:, 96:], **cache_option(model, cache)).logits
        assert {run.path for run in dhsa.last_run(model)} == {"sparse"}
        assert np.isfinite(logits.float().numpy()).all()
    if registry[method].remembers != "calls":
        with pytest.raises(ValueError, match=r'^decode: "dhsa" chooses among chunks'):
            small(method).replace(decode="dhsa")
