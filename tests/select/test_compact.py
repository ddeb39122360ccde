"""The compact boundary network in C against its twins in NumPy and torch, on every tier; predictors with a network for
each layer; the weights that come with the package, and which models take them.

Not here: how networks are trained (test_training.py), files and damage to them (test_predictor.py).
"""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from tiers import every_tier, once
from weights import compact_weights, random_weights

import dhsa
from dhsa import reference
from dhsa.predictor import ARCHITECTURES, SHIPPED

WEIGHTS = Path(dhsa.__file__).parent / "weights" / SHIPPED


def keys(b, h, length, d, seed=0):
    return np.random.default_rng(seed).standard_normal((b, h, length, d)).astype(np.float32)


def compact(channels, window=4, **sizes):
    return dhsa.BoundaryPredictor.from_state_dict(compact_weights(channels, **sizes), window=window)


# ---- the network -----------------------------------------------------------------------------------------------------


@every_tier
@pytest.mark.parametrize(
    ("shape", "window", "sizes"),
    [
        ((1, 1, 700, 256), 4, {"width": 32, "pooled": 32, "hidden": 32}),
        ((2, 3, 531, 40), 3, {}),
        ((1, 2, 130, 12), 1, {"pooled": 2}),
        ((2, 1, 300, 16), 20, {"width": 1, "pooled": 1, "hidden": 1}),
        ((1, 2, 8, 8), 4, {}),
        ((1, 2, 9, 8), 4, {}),
    ],
)
def test_logits(tier, shape, window, sizes):
    k = keys(*shape)
    weights = compact_weights(shape[1] * shape[3], **sizes)
    want = once(reference.compact_logits, k, weights, window=window)
    got = dhsa.BoundaryPredictor.from_state_dict(weights, window=window).logits(k)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert (got[:, : window - 1] == -100).all()
    assert (got[:, shape[2] - window :] == -100).all()
    assert (got[:, window - 1 : shape[2] - window] != -100).all()


@pytest.mark.parametrize("length", [1, 2, 7])
def test_shorter_than_two_windows(length):
    assert (compact(16).logits(keys(2, 2, length, 8)) == -100).all()


def test_a_batch_is_its_rows_and_threads_change_no_bit():
    k = keys(3, 2, 900, 8)
    predictor = compact(16)
    dhsa.set_num_threads(1)
    want = predictor.logits(k)
    for row in range(3):
        np.testing.assert_array_equal(predictor.logits(k[row : row + 1])[0], want[row])
    for threads in (2, 3):
        dhsa.set_num_threads(threads)
        np.testing.assert_array_equal(predictor.logits(k), want)
    wide = np.zeros((3, 900, 2, 11), np.float32)
    wide[..., :8] = k.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(predictor.logits(wide.transpose(0, 2, 1, 3)[..., :8]), want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_keys_are_read_as_they_are(torch, dtype):
    k = torch.from_numpy(keys(1, 2, 200, 8)).to(getattr(torch, dtype))
    predictor = compact(16)
    got = predictor.logits(k)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), predictor.logits(k.float().numpy()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_key_that_is_no_number_spoils_the_gaps_that_see_it_and_no_other(bad):
    k = keys(1, 2, 300, 8)
    predictor = compact(16)
    clean = predictor.logits(k)
    k[0, 1, 150, 2] = bad
    got = predictor.logits(k)
    spoilt = np.isnan(got[0])
    np.testing.assert_array_equal(np.flatnonzero(spoilt), np.arange(146, 154))
    np.testing.assert_array_equal(got[0][~spoilt], clean[0][~spoilt])
    np.testing.assert_array_equal(np.isnan(reference.compact_logits(k, predictor.state_dict())[0]), spoilt)
    cuts = dhsa.boundaries(k, dhsa.Config(boundaries="predictor", predictor=predictor, nms=0, num_chunks=400))
    assert not set(range(147, 155)) & set(cuts[0].tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token.bias": None}, r"^state_dict: lacks token\.bias"),
        ({"token.extra": np.ones(1)}, r"^state_dict: unknown parameters token\.extra"),
        (
            {"token.weight": np.ones((5, 11))},
            r"^token\.weight: expected shape \[5, 12\] \(\[M, 2R\] with C = 16, R = 6",
        ),
        ({"head.0.weight": np.ones((7, 14))}, r"^head\.0\.weight: expected shape \[7, 15\]"),
        ({"head.2.bias": np.full(1, np.inf)}, r"^head\.2\.bias: .*not finite"),
        ({"project.weight": np.ones(16)}, r"^project\.weight: expected shape \[R, C\]"),
    ],
)
def test_weights_that_do_not_fit(change, message):
    weights = {name: x for name, x in (compact_weights(16) | change).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        dhsa.BoundaryPredictor.from_state_dict(weights)


def test_heads_are_for_the_paper_alone():
    with pytest.raises(ValueError, match=r"^heads: the compact network has no attention heads"):
        dhsa.BoundaryPredictor.from_state_dict(compact_weights(16), heads=4)
    with pytest.raises(ValueError, match=r"^heads: needed for the paper's network"):
        dhsa.BoundaryPredictor.from_state_dict(random_weights(16, 8))


def test_cost_at_a_width_of_1024():
    """Multiplications and additions of a gap, from the shapes of the default network."""
    training = pytest.importorskip("dhsa.training.settings")
    settings = training.Settings()
    weights = compact_weights(1024, settings.width, settings.pooled, settings.hidden)
    assert sum(2 * x.size for x in weights.values()) < 100_000


# ---- layers ----------------------------------------------------------------------------------------------------------


def layered(shared=True, layers=(1, 3)):
    weights = compact_weights(16) if shared else {}
    for layer in layers:
        weights |= {f"layers.{layer}.{name}": x for name, x in compact_weights(16, seed=layer).items()}
    facts = {"model_type": "m", "num_hidden_layers": 4}
    return dhsa.BoundaryPredictor.from_state_dict(weights, model=facts, notes={"by": "hand"})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_layers_survive_files_and_pickles(tmp_path, dtype):
    pytest.importorskip("safetensors", reason="needs the predictor extra: safetensors")
    k = keys(1, 2, 90, 8)
    predictor = layered()
    predictor.save(tmp_path / "p.safetensors", dtype=dtype, notes={"losses": "[1]"})
    again = pickle.loads(pickle.dumps(predictor))
    for other in (dhsa.BoundaryPredictor.load(tmp_path / "p.safetensors"), again):
        assert (other.layers, other.shared, other.architecture, other.heads) == ((1, 3), True, "compact", None)
        assert other.model == {"model_type": "m", "num_hidden_layers": 4}
        assert other.notes == {"by": "hand", **({} if other is again else {"losses": "[1]"})}
        for mine, its in ((predictor, other), *((predictor.layer(i), other.layer(i)) for i in (0, 1, 3))):
            np.testing.assert_allclose(its.logits(k), mine.logits(k), atol=0 if dtype == "float32" else 5e-3)
    wide = compact_weights(16) | {"head.2.bias": np.full(1, 1e30)}
    with pytest.raises(ValueError, match=r"^head\.2\.bias: holds numbers beyond float16"):
        dhsa.BoundaryPredictor.from_state_dict(wide).save(tmp_path / "w.safetensors", dtype="float16")


def test_a_layer_takes_its_own_network_or_the_one_for_all():
    k = keys(1, 2, 90, 8)
    predictor = layered()
    alone = {i: dhsa.BoundaryPredictor.from_state_dict(compact_weights(16, seed=i)) for i in (0, 1, 3)}
    for layer, seed in ((0, 0), (1, 1), (2, 0), (3, 3)):
        own = predictor.layer(layer)
        assert own.layers == ()
        np.testing.assert_array_equal(own.logits(k), alone[seed].logits(k))
    np.testing.assert_array_equal(predictor.logits(k), alone[0].logits(k))
    with pytest.raises(TypeError, match=r"^index: "):
        predictor.layer("1")
    bare = layered(shared=False)
    assert not bare.shared
    with pytest.raises(ValueError, match=r"^index: there are networks of layers 1, 3 only, not of 2"):
        bare.layer(2)
    config = dhsa.Config(boundaries="predictor", predictor=bare)
    for call in (lambda: bare.logits(k), lambda: dhsa.boundaries(k, config)):
        with pytest.raises(ValueError, match=r"^predictor: has networks of layers 1, 3 only; take one of them"):
            call()
    with pytest.raises(ValueError, match=r"layer 1 has 8, not 16"):
        dhsa.BoundaryPredictor.from_state_dict(
            compact_weights(16) | {f"layers.1.{name}": x for name, x in compact_weights(8).items()}
        )
    with pytest.raises(ValueError, match=r"^state_dict: is empty"):
        dhsa.BoundaryPredictor.from_state_dict({})


def test_a_common_prefix_is_removed():
    k = keys(1, 2, 50, 8)
    predictor = layered()
    prefixed = {f"module.{name}": x for name, x in predictor.state_dict().items()}
    again = dhsa.BoundaryPredictor.from_state_dict(prefixed)
    assert again.layers == (1, 3)
    np.testing.assert_array_equal(again.layer(3).logits(k), predictor.layer(3).logits(k))


# ---- the defaults ----------------------------------------------------------------------------------------------------


def test_gaps_are_picked_as_the_method_has_it():
    """A compact network is picked from like similarity, the paper's as the paper says."""

    def picking(config):
        core = config._core
        return core.num_gaps(8192), core.boundary_window, core.theta, core.nms

    ours, theirs = compact(16), dhsa.BoundaryPredictor.from_state_dict(random_weights(16, 8), heads=4)
    for options in ({}, {"method": "dhsa"}, {"method": "block"}):
        similarity = dhsa.Config(**options)
        mine = dhsa.Config(boundaries="predictor", predictor=ours, **options)
        assert picking(mine) == picking(similarity)
        paper = dhsa.Config(boundaries="predictor", predictor=theirs, **options)
        assert picking(paper) == (8192 // 64 * 8, 4, 1.1, 8)
    k = keys(1, 2, 400, 8)
    got = dhsa.boundaries(k, dhsa.Config(boundaries="predictor", predictor=ours))
    want = dhsa.pick_boundaries(ours.logits(k)[0], 100, theta=-np.inf, nms=2)
    np.testing.assert_array_equal(got[0], want)


def test_the_shipped_weights():
    pytest.importorskip("safetensors", reason="needs the predictor extra: safetensors")
    assert WEIGHTS.stat().st_size < 1 << 20
    card = WEIGHTS.with_suffix(".md").read_text(encoding="utf-8")
    for word in ("Made: 20", "Text: ", "Settings: ", "| mean | |", "PSF"):
        assert word in card
    predictor = dhsa.Config(boundaries="predictor").predictor
    assert predictor is dhsa.BoundaryPredictor.default()
    assert (predictor.architecture, predictor.channels, predictor.window) == ("compact", 256, 4)
    assert predictor.shared
    assert predictor.layers == tuple(range(18))
    assert predictor.model["model_type"] == "gemma3_text"
    k = keys(1, 1, 100, 256)
    np.testing.assert_array_equal(
        dhsa.boundaries(k, dhsa.Config(boundaries="predictor"))[0],
        dhsa.pick_boundaries(predictor.logits(k)[0], 25, theta=-np.inf, nms=2),
    )


@pytest.mark.parametrize("shape", [(1, 1, 100, 128), (1, 3, 100, 64)])
def test_another_width_says_how_to_train(shape):
    pytest.importorskip("safetensors", reason="needs the predictor extra: safetensors")
    config = dhsa.Config(boundaries="predictor", budget=32, query_block=8, dense_tail=0)
    k = keys(*shape)
    for call in (
        lambda: dhsa.boundaries(k, config), lambda: dhsa.attention(k, k, k, config), lambda: config.predictor.logits(k)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^predictor: made for 256 channels.*python -m dhsa train-boundaries"):
            call()


def test_a_model_takes_the_networks_of_its_layers(torch, models):
    """Through transformers: layer by layer what the same networks do by hand; and no network of another model."""
    pytest.importorskip("transformers")
    from tiny import tokens

    from dhsa import hf

    model = models("gemma3")
    weights = compact_weights(64)
    for layer in (1, 3):
        weights |= {f"layers.{layer}.{name}": x for name, x in compact_weights(64, seed=layer).items()}
    facts = hf.model_facts(model)
    assert facts == {
        "model_type": "gemma3_text", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    predictor = dhsa.BoundaryPredictor.from_state_dict(weights, model=facts)
    config = dhsa.Config(
        budget=96, sink=8, local=32, query_block=32, dense_tail=0, boundaries="predictor", predictor=predictor,
        break_even=0,
    )  # fmt: skip
    ids = tokens(1, 300)
    taken = []
    run = hf.attention.functional.run

    def spy(q, k, v, config=None, **options):
        taken.append(config)
        return run(q, k, v, config, **options)

    hf.attention.functional.run = spy
    try:
        with torch.no_grad(), dhsa.patched(model, config):
            own = model(ids).logits
    finally:
        hf.attention.functional.run = run
    found = [None if c.predictor is None else c.predictor.state_dict() for c in taken]
    for layer, seed in ((0, 0), (1, 1), (2, 0), (3, 3)):
        np.testing.assert_array_equal(found[layer]["head.2.weight"], compact_weights(64, seed=seed)["head.2.weight"])
    shared = dhsa.BoundaryPredictor.from_state_dict(compact_weights(64))
    with torch.no_grad(), dhsa.patched(model, config.replace(predictor=shared)):
        assert not torch.equal(model(ids).logits, own)
    other = dhsa.BoundaryPredictor.from_state_dict(weights, model=facts | {"num_hidden_layers": 26})
    with pytest.raises(
        ValueError, match=r"^predictor: trained for a model with num_hidden_layers 26, but this one has 4"
    ):
        dhsa.patch(model, config.replace(predictor=other))
    bare = {name: x for name, x in weights.items() if name.startswith("layers.")}
    only = dhsa.BoundaryPredictor.from_state_dict(bare)
    with pytest.raises(
        ValueError, match=r"^predictor: has networks of layers \[1, 3\] only, none of \[0, 2\]; .* layers=\[1, 3\]"
    ):
        dhsa.patch(model, config.replace(predictor=only))
    dhsa.patch(model, config.replace(predictor=only), layers=[1, 3])
    dhsa.unpatch(model)


def test_the_documents_name_every_parameter():
    text = re.sub(r"\s+", " ", dhsa.BoundaryPredictor.from_state_dict.__doc__)
    for architecture in ARCHITECTURES.values():
        for name in architecture.parameters:
            assert name in text or (name.endswith("bias") and "the bias of each" in text)
