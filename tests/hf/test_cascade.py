"""Methods that go from layer to layer: keys that no head of a layer wanted are no candidates in later ones."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import build, padded, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf.compat import GRAPHS, cache_option  # noqa: E402

SMALL = dhsa.Config(method="spatten", budget=32, sink=2, local=8, query_block=32, dense_tail=0)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_of_a_model_take_what_the_layer_before_left(seen, family):
    """Layers with a window and those without have a cascade each."""
    model = build(family)
    with dhsa.patched(model, SMALL):
        for seed in (0, 1):  # a forward pass begins with all keys
            seen.clear()
            model(tokens(2, 150, seed=seed))
            states, alone = {}, []
            for _, q, k, v, options, out in seen:
                state = states.setdefault(options["window"], SMALL.options.new_state())
                alone.append(dhsa.select(q, k, SMALL, **options))
                lists = dhsa.select(q, k, SMALL, state=state, **options)
                want = dhsa.sparse_attention(q, k, v, lists, **options)
                torch.testing.assert_close(out, want, rtol=0, atol=0)
                alone[-1] = alone[-1] == lists
            assert alone == ([True, False, False, False] if family == "llama" else [True, True, False, False])
        assert {run.path for run in dhsa.last_run(model)} == {"sparse"}


def test_falling_budgets_with_one_list_are_nested(seen):
    budgets = {1: 64, 2: 48, 3: 32}
    model = build("llama")
    one = SMALL.replace(heads="all")
    layers = {0: dhsa.Config(budget=None)} | {layer: one.replace(budget=n) for layer, n in budgets.items()}
    with dhsa.patched(model, dhsa.LayerConfigs(default=one, layers=layers)):
        model(tokens(1, 150))
    state, before = one.options.new_state(), None
    for layer, q, k, v, options, out in seen[1:]:
        lists = dhsa.select(q, k, layers[layer], state=state, **options)
        torch.testing.assert_close(out, dhsa.sparse_attention(q, k, v, lists, **options), rtol=0, atol=0)
        mask = lists.mask()
        assert mask[0, 0, -1].sum() == budgets[layer]
        assert before is None or not (mask & ~before).any()
        before = mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_do_not_mix(side):
    model = build("llama")
    ids, mask = padded([150, 120], 150, side)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with dhsa.patched(model, SMALL):
        together = model(ids, attention_mask=mask, position_ids=places).logits
        for row in range(2):
            real = mask[row].bool()
            torch.testing.assert_close(together[row, real], model(ids[row : row + 1, real]).logits[0])


def test_pieces_and_generation():
    model, ids = build("llama"), tokens(1, 150)
    with dhsa.patched(model, SMALL):
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == 153
        cache = model(ids[:, :96]).past_key_values
        rest = model(ids[:, 96:], **cache_option(model, cache)).logits
        assert torch.isfinite(rest).all()
        assert {run.path for run in dhsa.last_run(model)} == {"sparse"}


def test_what_it_cannot_serve_is_refused():
    model, ids = build("llama"), tokens(1, 150)
    with pytest.raises(ValueError, match=r"^reuse: method='spatten' uses what it found before"):
        dhsa.LayerConfigs(default=SMALL, layers={}, reuse={1: (0, None)})
    if GRAPHS:  # torch before 2.13 fails to compile some models, whatever attends
        with dhsa.patched(model, SMALL):
            compiled = torch.compile(model, backend="eager")
            with pytest.raises(Exception, match=r"method: 'spatten' uses what it found in earlier layers"):
                compiled(ids)
    q, k = np.ones((1, 2, 64, 8), np.float32), np.ones((1, 1, 64, 8), np.float32)
    state = SMALL.options.new_state()
    dhsa.select(q, k, SMALL, state=state)
    with pytest.raises(ValueError, match=r"^state: of a prompt with \[B, Lq, Lk\] = \[1, 64, 64\], expected \[1, 32"):
        dhsa.select(q[:, :, :32], k, SMALL, state=state)
    with pytest.raises(TypeError, match=r"^state: method='rows' uses nothing of earlier layers or calls"):
        dhsa.select(q, k, dhsa.Config(budget=16), state=state)
    with pytest.raises(TypeError, match=r"^state: expected that of method='spatten', got dict"):
        dhsa.select(q, k, SMALL, state={})
