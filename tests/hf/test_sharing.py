"""`Config.share`: layers of one forward take boundaries or selections from one another, and from nobody else."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import FAMILIES, build, padded, qkv, same_in_threads, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa import functional, hf  # noqa: E402
from dhsa.hf.compat import GRAPHS, cache_option  # noqa: E402

# Below the windows of the tiny models, so that layers of both kinds are sparse.
SMALL = dhsa.Config(boundaries="similarity", budget=48, sink=4, local=16, query_block=32, dense_tail=16, break_even=0)
CUTS, LISTS = SMALL.replace(share="boundaries"), SMALL.replace(share="selections")
KINDS = ["sliding_attention", "full_attention"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def model():
    return build("gemma3", num_hidden_layers=6, layer_types=KINDS * 3)


@pytest.fixture
def made(monkeypatch):
    """Which functions found something: "boundaries" or "select", in order."""
    names = []
    for name in ("boundaries", "select"):
        plain = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, _p=plain, _n=name, **o: (names.append(_n), _p(*a, **o))[1])
    return names


def held(model):
    return model.__dict__[hf.switching.STATE].sharing._stack


def hooks(model):
    """Of sharing: every patched attention module has another one, by which it knows its cache."""
    own = sum("_dhsa_hook" in m.__dict__ for m in model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) - own


# ---- the functions underneath ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rows", "dhsa"])
@pytest.mark.parametrize(("q_len", "window"), [(300, None), (120, None), (300, 80)])
def test_run_takes_boundaries(method, q_len, window):
    q, k, v = qkv(batch=2, q_len=q_len, k_len=300)
    config = SMALL.replace(method=method)
    plain, lse, stats = functional.run(q, k, v, config, window=window, return_lse=True)
    own = functional.run(q, k, v, config, window=window, return_lse=True, boundaries=dhsa.boundaries(k, config))
    assert torch.equal(own[0], plain)
    assert torch.equal(own[1], lse)
    assert (own[2].path, own[2].density) == ("sparse", stats.density)
    other = np.array([*range(0, 300, 7), 300])
    given, _, _ = functional.run(q, k, v, config, window=window, boundaries=other)
    selection = dhsa.select(q, k, config, boundaries=other, window=window)
    torch.testing.assert_close(given, dhsa.sparse_attention(q, k, v, selection, window=window), rtol=0, atol=2e-6)
    assert (given - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "cuts", "message"),
    [
        (SMALL, [[0, 5, 99]], r"^boundaries: row 0 ends with 99, expected the number of keys, 100"),
        (SMALL, [[0, 50, 40, 100]], r"^boundaries: row 0 falls from 50 to 40 at entry 2"),
        (SMALL, [[1, 100]], r"^boundaries: row 0 begins with 1, expected 0"),
        (SMALL, [[0, 100]] * 3, r"^boundaries: expected 2 rows, one a batch item, got 3"),
        (SMALL.replace(budget=100), [[0, 99]], r"^boundaries: row 0 ends with 99"),  # exact, but checked
        (SMALL.replace(method="window"), [[0, 100]], r"^boundaries: method='window' cuts no chunks; expected None"),
        (SMALL.replace(budget=None), [[0, 100]], r"^boundaries: an exact config cuts no chunks; expected None"),
        (None, [[0, 100]], r"^boundaries: an exact config cuts no chunks; expected None"),
    ],
)  # fmt: skip
def test_run_refuses_boundaries(config, cuts, message):
    with pytest.raises(ValueError, match=message):
        functional.run(*qkv(batch=2, q_len=100), config, boundaries=np.array(cuts))


def test_the_core_refuses_boundaries():
    """What functional.run checks first, for who calls the core."""
    q, k, v = qkv(q_len=100)
    args = (q, k, v, torch.empty_like(q), None, None, None, None, True, None, 1, None, None, 0)
    window, cuts = SMALL.replace(method="window"), np.array([[0, 100]], np.int32)
    with pytest.raises(ValueError, match="boundaries: this method cuts no chunks"):
        dhsa._core.prefill(*args, window._core, cuts, None, 0, 1)
    with pytest.raises(ValueError, match="boundaries"):
        dhsa._core.prefill(*args, SMALL._core, np.repeat(cuts, 2, 0), None, 0, 1)


@pytest.mark.parametrize("window", [None, 80, 300, 2**31])
@pytest.mark.parametrize("q_len", [300, 120])
def test_run_selected_says_what_it_did(q_len, window):
    q, k, v = qkv(batch=2, q_len=q_len, k_len=300)
    selection = dhsa.select(q, k, SMALL, window=window)
    out, lse, stats = functional.run_selected(q, k, v, selection, window=window, return_lse=True)
    again, again_lse = dhsa.sparse_attention(q, k, v, selection, window=window, return_lse=True)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    assert (stats.path, stats.select_seconds, stats.skipped) == ("sparse", 0, 0)
    assert stats.attend_seconds > 0
    assert stats.density == pytest.approx(selection.density(), rel=1e-12)
    assert stats.density == functional.run(q, k, v, SMALL, window=window)[2].density


def test_run_selected_says_what_it_skipped():
    q, k, v = qkv(q_len=1000)
    config = SMALL.replace(budget=600, skip=0.5)
    out, _, stats = functional.run(q * 30, k, v, config)
    listed, _, told = functional.run_selected(q * 30, k, v, dhsa.select(q * 30, k, config), skip=0.5)
    assert 0 < told.skipped < 1
    assert (told.skipped, told.density) == (stats.skipped, stats.density)
    assert torch.equal(listed, out)


# ---- the config ------------------------------------------------------------------------------------------------------


def test_config():
    assert dhsa.Config().share is None
    with pytest.raises(ValueError, match="share: expected one of 'boundaries', 'selections', got 'all'"):
        dhsa.Config(share="all")
    with pytest.raises(TypeError, match="share: expected one of 'boundaries', 'selections', got bool"):
        dhsa.Config(share=True)
    with pytest.raises(ValueError, match="share: method='window' cuts no chunks"):
        dhsa.Config(method="window", share="boundaries")
    assert dhsa.Config(method="window", share="selections").share == "selections"
    with pytest.raises(ValueError, match="share: method='block' cuts no chunks"):
        CUTS.replace(method="block")


def test_single_calls_have_nothing_to_share_with():
    q, k, v = qkv(q_len=300)
    with pytest.raises(ValueError, match=r"^share: 'selections' is between the layers of a patched model"):
        dhsa.attention(q, k, v, LISTS)
    assert dhsa.select(q, k, LISTS) == dhsa.select(q, k, SMALL)
    assert torch.equal(dhsa.boundaries(k, CUTS), dhsa.boundaries(k, SMALL))


# ---- layers of a model -----------------------------------------------------------------------------------------------


def by_hand(calls, share):
    """Each layer's output from its own q, k and v, by what the first layer, or the first of its kind, found."""
    found = {}
    for layer, q, k, v, options, _ in calls:
        window = options["window"]
        key = window if share == "selections" else None
        if key not in found:
            found[key] = dhsa.boundaries(k, SMALL) if share == "boundaries" else dhsa.select(q, k, SMALL, **options)
        selection = found[key]
        if share == "boundaries":
            selection = dhsa.select(q, k, SMALL, boundaries=found[key], **options)
        yield layer, dhsa.sparse_attention(q, k, v, selection, **options)


@pytest.mark.parametrize("share", ["boundaries", "selections"])
def test_layers_use_what_the_first_found(model, seen, made, share):
    ids = tokens(1, 400)
    with dhsa.patched(model, SMALL.replace(share=share)):
        logits = model(ids).logits
        runs = dhsa.last_run(model)
    assert made == (["boundaries"] if share == "boundaries" else ["select"] * 2)
    assert [r.path for r in runs] == ["sparse"] * 6
    assert all(r.select_seconds > 0 for r in runs)
    assert all(0 < r.density < 1 for r in runs)
    if share == "selections":  # the same lists
        assert [len({r.density for r in runs[kind::2]}) for kind in (0, 1)] == [1, 1]
    calls = list(seen)
    for (layer, *_, out), (same, expected) in zip(calls, by_hand(calls, share), strict=True):
        assert layer == same
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    with dhsa.patched(model, SMALL):
        own = model(ids).logits
    assert (logits - own).abs().max() > 1e-4  # it does make a difference
    first = seen[len(calls)]
    assert torch.equal(first[-1], calls[0][-1])  # none to the first layer


@pytest.mark.parametrize("share", ["boundaries", "selections"])
def test_each_forward_finds_its_own(model, made, share):
    """Prompts of one length do not see each other's."""
    prompts = [tokens(1, 400, seed=seed) for seed in range(3)]
    config = SMALL.replace(share=share)
    alone = []
    for ids in prompts:
        with dhsa.patched(model, config):
            alone.append(model(ids).logits)
    made.clear()
    with dhsa.patched(model, config):
        for ids, expected in zip(prompts, alone, strict=True):
            assert torch.equal(model(ids).logits, expected)
    assert len(made) == 3 * (1 if share == "boundaries" else 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", ["boundaries", "selections"])
def test_rows_of_a_padded_batch_are_those_run_alone(family, share):
    model = build(family)
    lengths = [400, 250, 400]
    for side in ("left", "right"):
        ids, mask = padded(lengths, 400, side)
        with dhsa.patched(model, SMALL.replace(share=share)):
            together = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
            for row, n in enumerate(lengths):
                where = slice(400 - n, 400) if side == "left" else slice(0, n)
                alone = model(tokens(1, n, seed=row)).logits[0]
                # A right-padded row's last query is one of its own; padding may end a forced span.
                torch.testing.assert_close(together[row, where][:-1], alone[:-1], rtol=0, atol=1e-4)


def test_layers_that_are_left_exact_neither_find_nor_use(model, made):
    ids = tokens(1, 400)
    with dhsa.patched(model, LISTS, layers=[1, 4, 5]):
        model(ids)
        runs = dhsa.last_run(model)
    assert [r.path for r in runs] == ["window", "sparse", "window", "dense", "sparse", "sparse"]
    assert made == ["select", "select"]  # layers 1 and 4; 5 uses 1's
    with dhsa.patched(model, LISTS.replace(budget=64)):  # the windows' width
        model(ids)
        assert [r.path for r in dhsa.last_run(model)] == ["window", "sparse"] * 3
    assert made == ["select"] * 3
    with dhsa.patched(model, LISTS):
        model(tokens(1, 40))
        assert [r.path for r in dhsa.last_run(model)] == ["dense"] * 6
    assert made == ["select"] * 3


def test_generate_and_continued_prefill(model, made):
    """Each piece of a prompt is a forward of its own; sliding caches hold other keys than full ones."""
    ids = tokens(1, 400)
    for share, name, first in (("boundaries", "boundaries", 1), ("selections", "select", 2)):
        made.clear()
        with dhsa.patched(model, SMALL.replace(share=share)):
            cache = transformers.DynamicCache(config=model.config)
            model(ids[:, :200], **cache_option(model, cache))
            assert made == [name] * first
            model(ids[:, 200:], **cache_option(model, cache))
            # A layer whose cache knows where earlier keys were cut finds its boundaries there.
            assert made == [name] * (first + (1 if share == "boundaries" else 2))
            out = model.generate(ids, max_new_tokens=3, do_sample=False)
            assert out.shape[1] == 403
            assert not held(model)


def test_a_broken_off_forward_leaves_nothing(model, monkeypatch):
    ids, others = tokens(1, 400), tokens(1, 400, seed=1)
    with dhsa.patched(model, LISTS):
        expected = model(ids).logits
        layer = model.model.layers[3]
        for error, left in ((RuntimeError, 0), (KeyboardInterrupt, 2)):

            def fail(*args, error=error, **kwargs):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(layer.mlp, "forward", fail)
                with pytest.raises(error):
                    model(others)
            assert len(held(model)) == left  # of a KeyboardInterrupt torch tells no hook
            assert torch.equal(model(ids).logits, expected)
            assert not held(model)


def test_layers_called_outside_of_a_forward_do_not_share(model, made):
    """As tools do that run all prompts through one layer after the other."""
    q, k, v = qkv(q_len=400, dim=32)
    with dhsa.patched(model, LISTS):
        first, later = (model.model.layers[i].self_attn for i in (1, 3))
        hf.attention_forward(first, q, k, v, None)
        out, _ = hf.attention_forward(later, q, v, k, None)
    assert not made  # each by the pipeline itself
    assert torch.equal(out.transpose(1, 2), functional.run(q, v, k, SMALL)[0])


def test_the_same_layer_again_finds_anew(model, made):
    q, k, v = qkv(q_len=400, dim=32)
    with dhsa.patched(model, LISTS):
        sharing = model.__dict__[hf.switching.STATE].sharing
        sharing.enter(model, ())
        for layer in (1, 3, 5, 1, 3):
            hf.attention_forward(model.model.layers[layer].self_attn, q, k, v, None)
        sharing.leave(model, (), None)
    assert made == ["select"] * 2


def test_two_threads_and_one_model(model):
    prompts = [tokens(1, 400, seed=seed) for seed in range(2)]
    with dhsa.patched(model, LISTS):
        expected = [model(ids).logits for ids in prompts]
        same_in_threads([lambda ids=ids: model(ids).logits for ids in prompts], expected)


def test_two_models_in_turn(model):
    """One model's forward inside another's, layer by layer, as in assisted decoding gone wild."""
    twin, ids, others = copy.deepcopy(model), tokens(1, 400), tokens(1, 400, seed=1)
    with dhsa.patched(model, LISTS), dhsa.patched(twin, LISTS):
        expected = model(ids).logits
        handle = model.model.layers[2].register_forward_hook(lambda *_: (twin(others), None)[1])
        assert torch.equal(model(ids).logits, expected)
        handle.remove()


def test_hooks_come_and_go(model):
    assert hooks(model) == 0
    with dhsa.patched(model, LISTS):
        once = hooks(model)
        assert once > 0
        dhsa.patch(model, CUTS)
        assert hooks(model) == once
        with dhsa.patched(model, SMALL):
            assert hooks(model) == 0
        assert hooks(model) == once
    assert hooks(model) == 0
    dhsa.patch(model, SMALL)
    assert hooks(model) == 0
    dhsa.patch(model, LISTS)
    dhsa.unpatch(model)
    assert hooks(model) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_among_themselves(model, copied, made):
    ids = tokens(1, 400)
    with dhsa.patched(model, LISTS):
        expected = model(ids).logits
        twin = copied(model)
    assert twin.__dict__[hf.switching.STATE].sharing is not None
    made.clear()
    assert torch.equal(twin(ids).logits, expected)
    assert made == ["select"] * 2
    dhsa.unpatch(twin)
    assert hooks(twin) == 0 == hooks(model)


def test_the_doctor_shares_too(model, made):
    ids = tokens(1, 400)
    checked = dhsa.check(model, ids, LISTS)
    assert made == ["select"] * 2
    assert [layer.path for layer in checked.layers] == ["sparse"] * 6
    assert all(layer.output_error > 0 for layer in checked.layers)
    own = dhsa.check(model, ids, SMALL)
    errors = [[layer.output_error for layer in check.layers] for check in (own, checked)]
    assert errors[0][:2] == errors[1][:2]  # the first of each kind
    assert errors[0][2] != errors[1][2]
    assert hooks(model) == 0


@pytest.mark.skipif(not GRAPHS, reason="torch before 2.13 fails to compile some of these models, whatever attends")
def test_compiled_models_find_their_own(model):
    """Their graphs know of no hooks."""
    ids = tokens(1, 400)
    with dhsa.patched(model, SMALL):
        own = model(ids).logits
    with dhsa.patched(model, LISTS):
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, backend="eager")(ids).logits, own, rtol=0, atol=1e-5)
        assert not held(model)


def test_shared_selections_leave_nothing_stale_beside_a_cache(monkeypatch):
    """Pieces that take another layer's lists cut nothing; a step after them must not trust what lies there from before
    the cache was cropped."""
    model = build("llama")
    first, other, step = tokens(1, 400), tokens(1, 100, seed=1), tokens(1, 1, seed=2)

    def read():
        cache = transformers.DynamicCache(config=model.config)
        model(first, **cache_option(model, cache))
        model(step, **cache_option(model, cache))
        cache.crop(-101)
        model(other, **cache_option(model, cache))
        return model(step, **cache_option(model, cache)).logits

    with dhsa.patched(model, LISTS.replace(decode="dhsa")):
        trusting = read()
        assert all(r.density < 1 for r in dhsa.last_run(model))
        monkeypatch.setattr(hf.caches.Kept, "unchanged", lambda kept, layer: 0)  # looks at every key
        assert torch.equal(trusting, read())
