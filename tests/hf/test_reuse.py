"""`LayerConfigs.reuse`: layers take the lists of an anchor, head by head; and how anchors are found."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import build, padded, tokens  # noqa: E402
from transformers import AttentionInterface  # noqa: E402

import dhsa  # noqa: E402
from dhsa import hf  # noqa: E402
from dhsa.hf.anchors import _best  # noqa: E402

SMALL = dhsa.Config(budget=48, sink=4, local=16, query_block=32, dense_tail=16, break_even=0)
SWAPPED = {2: (1, (1, 0, 3, 2))}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def configs(reuse, config=SMALL):
    return dhsa.LayerConfigs(default=config, layers={0: dhsa.Config(budget=None)}, reuse=reuse)


def test_a_layer_takes_the_lists_of_its_anchor_head_by_head(seen):
    model = build("llama")
    with dhsa.patched(model, configs(SWAPPED)):
        model(tokens(2, 150))
        runs = {run.layer: run for run in dhsa.last_run(model)}
    of = {layer: call for layer, *call in seen}
    q, k, v, options, _ = of[1]
    anchor = dhsa.select(q, k, SMALL, **options)
    q, k, v, options, out = of[2]
    mask = anchor.mask()[:, [1, 0, 3, 2]]
    lists = dhsa.Selection.from_mask(mask, query_block=32)
    torch.testing.assert_close(out, dhsa.sparse_attention(q, k, v, lists, **options), rtol=0, atol=0)
    q, k, v, options, out = of[3]  # selects for itself
    torch.testing.assert_close(out, dhsa.attention(q, k, v, SMALL, **options), rtol=0, atol=0)
    assert [runs[layer].path for layer in range(4)] == ["dense", "sparse", "sparse", "sparse"]


def test_the_same_heads_of_one_anchor_are_shared_selections(seen):
    model, ids = build("llama"), tokens(1, 150)
    with dhsa.patched(model, SMALL.replace(share="selections")):
        want = model(ids).logits
    every = dhsa.LayerConfigs(default=SMALL, layers={}, reuse={1: (0, None), 2: (0, None), 3: (0, None)})
    with dhsa.patched(model, every):
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_do_not_mix(side):
    model = build("llama")
    ids, mask = padded([150, 120], 150, side)
    with dhsa.patched(model, configs(SWAPPED)):
        places = (mask.cumsum(1) - 1).clamp(min=0)  # so that the numbers, and with them the lists, are the same
        together = model(ids, attention_mask=mask, position_ids=places).logits
        for row in range(2):
            real = mask[row].bool()
            torch.testing.assert_close(together[row, real], model(ids[row : row + 1, real]).logits[0])


def test_layers_with_a_window_have_anchors_of_their_own():
    """Layers 0 and 2 slide: lists of a layer with another window are not taken."""
    model, ids = build("gemma3"), tokens(1, 150)
    wrong = dhsa.LayerConfigs(default=SMALL, layers={}, reuse={2: (1, None)})
    with dhsa.patched(model, SMALL):
        want = model(ids).logits
    with dhsa.patched(model, wrong):
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0)
    right = dhsa.LayerConfigs(default=SMALL, layers={}, reuse={2: (0, None), 3: (1, None)})
    with dhsa.patched(model, right):
        assert not torch.equal(model(ids).logits, want)


def test_decoding_steps_reuse_lists(seen):
    """DELTA: in a step some layers choose, and the others take what they chose."""
    model, ids = build("llama"), tokens(1, 150)
    with dhsa.patched(model, configs(SWAPPED, SMALL.replace(decode="dhsa"))):
        model.generate(ids, max_new_tokens=3, do_sample=False)
    steps = [call for call in seen if call[1].shape[2] == 1]
    assert [call[0] for call in steps] == [0, 1, 2, 3] * 2
    config = SMALL.replace(dense_tail=0)
    _, q, k, _, options, _ = steps[1]
    anchor = dhsa.select(q, k, config, **options)
    _, q, k, v, options, out = steps[2]
    lists = anchor._taken((1, 0, 3, 2))
    assert len(lists.indices) == 4 * 48
    torch.testing.assert_close(out, dhsa.sparse_attention(q, k, v, lists, **options), rtol=0, atol=0)


def test_without_hooks_or_lists_each_layer_selects():
    model, ids = build("llama"), tokens(1, 150)
    with dhsa.patched(model, configs({})):
        want = model(ids).logits
    with dhsa.patched(model, configs({3: (0, None)})):  # the anchor is exact
        torch.testing.assert_close(model(ids).logits, want, rtol=0, atol=0)


def test_a_list_that_the_anchor_has_not_is_refused():
    model = build("llama")
    with (
        dhsa.patched(model, configs({2: (1, (0, 1, 2, 7))})),
        pytest.raises(ValueError, match=r"^reuse: layer 2 takes"),
    ):
        model(tokens(1, 150))
    with pytest.raises(ValueError, match=r"^config: has configs of layers \[9\]"):
        dhsa.patch(model, configs({9: (1, None)}))


def test_files_copies_and_equality(tmp_path):
    held = configs({2: (1, (1, 0, 3, 2)), 3: (1, None)})
    held.save(tmp_path / "c.json")
    for other in (dhsa.Config.load(tmp_path / "c.json"), pickle.loads(pickle.dumps(held)), copy.deepcopy(held)):
        assert other == held
        assert hash(other) == hash(held)
        assert dict(other.reuse) == {2: (1, (1, 0, 3, 2)), 3: (1, None)}
    assert held != configs({}) == configs({}).replace(skip=None)
    assert held.replace(budget=64).reuse == held.reuse
    assert "reuse={2: (1, (1, 0, 3, 2))" in repr(held)
    text = (tmp_path / "c.json").read_text()
    for old, new, message in (
        ('"layer": 1', '"layer": 2', "reuse: the anchor of layer 2"),
        ('"heads": null', '"head": null', "reuse: expected an object of layer and heads"),
        ('"reuse": {', '"reuse": {"x": 1,', "reuse: expected indices"),
    ):
        (tmp_path / "d.json").write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            dhsa.Config.load(tmp_path / "d.json")


@pytest.mark.parametrize(("reuse", "error", "message"), [
    ({1: 0}, TypeError, r"reuse: expected \(layer, heads\) for layer 1"),
    ({1: (1, None)}, ValueError, "reuse: the anchor of layer 1 must be an earlier layer, got 1"),
    ({1: (0, None), 2: (1, None)}, ValueError, "reuse: layer 1, the anchor of layer 2, reuses lists itself"),
    ({1: (0, ())}, TypeError, "reuse: expected a tuple of lists or None for layer 1"),
    ({1: (0, (-1,))}, ValueError, "reuse: a list for layer 1: expected 0 to"),
    ({"a": (0, None)}, TypeError, "reuse: an index: expected an int"),
    ([1], TypeError, "reuse: expected a dict, got list"),
])  # fmt: skip
def test_bad_reuse_is_refused(reuse, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        configs(reuse)
    with pytest.raises(ValueError, match=r"^reuse: layers that share selections"):
        dhsa.LayerConfigs(default=SMALL.replace(share="selections"), layers={}, reuse={1: (0, None)})


# ---- find_anchors ----------------------------------------------------------------------------------------------------


def test_anchors_are_those_of_the_largest_sum_of_shares():
    rng = np.random.default_rng(0)
    layers = [1, 3, 4, 6, 7]
    shares = {(a, b): 1.0 if a == b else rng.random() for i, b in enumerate(layers) for a in layers[: i + 1]}

    def worth(anchors):
        return sum(shares[max(a for a in anchors if a <= layer), layer] for layer in layers)

    for count in (1, 2, 3):
        found = _best(layers, shares, count)
        assert [layer for _, layer in found] == layers
        used = {anchor for anchor, _ in found}
        assert len(used) == count
        from itertools import combinations

        most = max(worth(c) for c in combinations(layers, count) if 1 in c)
        assert worth(used) == pytest.approx(most)


def test_find_anchors_matches_heads_that_select_alike():
    """Layer 2 has the weights of layer 1 with its heads in another order, and sees nearly the same hidden states."""
    model = build("llama", num_hidden_layers=4)
    one, two = (model.model.layers[i] for i in (1, 2))
    two.load_state_dict(one.state_dict())
    for layer in (one, two):  # what the layers add is small
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)
    size = model.config.hidden_size // model.config.num_attention_heads
    weight = two.self_attn.q_proj.weight
    heads = weight.view(-1, size, weight.shape[1])
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    order = [h // group * group + (group - 1 - h % group) for h in range(len(heads))]
    weight.copy_(heads[order].reshape(weight.shape).clone())
    ids = tokens(1, 200)
    found = hf.find_anchors(model, ids, SMALL, anchors=2)
    assert found.layers[0].exact
    assert found.reuse[2] == (1, tuple(order))
    assert found.notes["shares"]["2"] > 0.95
    assert 3 not in found.reuse
    with dhsa.patched(model, found):
        model(ids)
        assert {run.path for run in dhsa.last_run(model)} == {"dense", "sparse"}
    plain, _ = model(ids).logits, AttentionInterface  # the implementation is as it was
    assert torch.isfinite(plain).all()


def test_find_anchors_refuses_what_it_cannot_measure():
    model = build("llama")
    for bad, message in ((tokens(2, 200), "input_ids: expected a tensor"), (tokens(1, 40), "input_ids: 40 tokens")):
        with pytest.raises(ValueError, match=rf"^{message}"):
            hf.find_anchors(model, bad, SMALL)
    with pytest.raises(ValueError, match=r"^anchors: got 4, but 3 layers"):
        hf.find_anchors(model, tokens(1, 200), SMALL, anchors=4)
    with pytest.raises(ValueError, match=r"^config: shares selections"):
        hf.find_anchors(model, tokens(1, 200), SMALL.replace(share="selections"))
    with pytest.raises(TypeError, match=r"^config: expected a dhsa.Config or None, got LayerConfigs"):
        hf.find_anchors(model, tokens(1, 200), configs({}))
