"""`LayerConfigs.dense_anchors`: layers that attend to all keys select for others (HyLRA); and how they are found."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import build, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa import hf  # noqa: E402
from dhsa.hf.anchors import _held  # noqa: E402
from dhsa.hf.attention import DENSE_ANCHOR  # noqa: E402

SMALL = dhsa.Config(budget=48, sink=4, local=16, query_block=32, dense_tail=16, break_even=0)
CONFIGS = dhsa.LayerConfigs(default=SMALL, layers={}, reuse={1: (0, (1, 0, 3, 2)), 3: (2, None)}, dense_anchors=(0,))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("step", [False, True])
def test_a_dense_anchor_is_exact_and_its_lists_serve_others(seen, step):
    model = build("llama")
    config = SMALL.replace(decode="dhsa")
    with dhsa.patched(model, CONFIGS.replace(decode="dhsa")):
        if step:
            model.generate(tokens(1, 150), max_new_tokens=2, do_sample=False)
            config = config.replace(dense_tail=0)
        else:
            model(tokens(2, 150))
        runs = dhsa.last_run(model)
    anchor, reuser, sparse = (call[1:] for call in seen[-4:-1])
    q, k, v, options, out = anchor
    exact = dhsa.attention(q, k, v, dhsa.Config(budget=None), **options)
    torch.testing.assert_close(out, exact, rtol=0, atol=0)
    lists = dhsa.select(q, k, config, **options)._taken((1, 0, 3, 2))
    q, k, v, options, out = reuser
    torch.testing.assert_close(out, dhsa.sparse_attention(q, k, v, lists, **options), rtol=0, atol=0)
    q, k, v, options, out = sparse  # an anchor that is not dense
    own = dhsa.select(q, k, config, **options)
    torch.testing.assert_close(out, dhsa.sparse_attention(q, k, v, own, **options), rtol=0, atol=0)
    assert [run.path for run in runs] == ["decode" if step else "dense", "sparse", "sparse", "sparse"]
    assert (runs[0].density, runs[0].reason) == (1, DENSE_ANCHOR)
    assert runs[0].select_seconds > 0


def test_a_compiled_model_keeps_dense_anchors_exact():
    model, ids = build("llama"), tokens(1, 150)
    with dhsa.patched(model, CONFIGS):
        torch.compile(model, backend="eager")(ids)
        assert [run.path for run in dhsa.last_run(model)] == ["dense", "sparse", "sparse", "sparse"]


def test_find_anchors_makes_layers_that_need_many_keys_dense():
    """Layers 1 and 2 have the weights of layer 0 and see nearly the same; heads of layer 3 attend to all keys alike, so
    that no list holds their mass."""
    model, ids = build("llama"), tokens(1, 300)
    layers = model.model.layers
    layers[0].self_attn.q_proj.weight.mul_(20)
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
        layer.self_attn.o_proj.weight.mul_(1e-3)  # what the layers add is small
        layer.mlp.down_proj.weight.mul_(1e-3)
    layers[3].self_attn.q_proj.weight.zero_()
    found = hf.find_anchors(model, ids, SMALL, anchors=2, dense=True)
    assert {layer: anchor for layer, (anchor, _) in found.reuse.items()} == {1: 0, 2: 0}
    assert found.dense_anchors == (0,)
    assert {layer for layer, config in found.layers.items() if config.exact} == {3}
    hook = model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits of a whole prompt are not needed"))
    one = hf.find_anchors(model, ids, SMALL, anchors=1, dense=True)
    assert 0 < one.notes["shares"]["3"] < 0.5  # of the mass of an even distribution
    assert all(one.notes["shares"]["3"] < share <= 1 for share in found.notes["shares"].values())
    hook.remove()
    with dhsa.patched(model, found):
        model(ids)
        assert [run.path for run in dhsa.last_run(model)] == ["dense", "sparse", "sparse", "dense"]
    check = dhsa.check(model, ids, found)
    assert check.layers[0].why == "it attends to all keys, and selects for other layers (dense_anchors)"
    assert "exact, with neither a budget nor a mass" in check.layers[3].why


def test_the_mass_that_lists_hold():
    q, k = torch.randn(1, 4, 256, 16), torch.randn(1, 2, 256, 16)
    config = SMALL.replace(dense_tail=0)
    lists = dhsa.select(q, k, config)
    s = 0.25 * q[0].double() @ k[0].double().repeat_interleave(2, 0).mT
    p = s.masked_fill(torch.ones(256, 256, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    held = (p.numpy() * lists.mask()[0]).sum(axis=2)  # [H, Lq]
    want = np.mean([held[:, 32 * i : 32 * i + 32].mean() for i in (4, 5, 6, 7)])
    assert _held(q, k, lists, config, scale=0.25, softcap=None) == pytest.approx(want, rel=1e-9)


def test_files_copies_and_equality(tmp_path):
    CONFIGS.save(tmp_path / "c.json")
    for other in (dhsa.Config.load(tmp_path / "c.json"), pickle.loads(pickle.dumps(CONFIGS)), copy.deepcopy(CONFIGS)):
        assert other == CONFIGS
        assert hash(other) == hash(CONFIGS)
        assert other.dense_anchors == (0,)
    assert dhsa.LayerConfigs(default=SMALL, layers={}, reuse=CONFIGS.reuse) != CONFIGS
    assert "dense_anchors=(0,)" in repr(CONFIGS)
    for wrong, error, message in (
        ((1,), ValueError, r"dense_anchors: no layer reuses the lists of \[1\]"),
        ("a", TypeError, "dense_anchors: expected a tuple of layers, got 'a'"),
        ((-1,), ValueError, "dense_anchors: an index: expected 0 to"),
    ):
        with pytest.raises(error, match=rf"^{message}"):
            dhsa.LayerConfigs(default=SMALL, layers={}, reuse=CONFIGS.reuse, dense_anchors=wrong)
