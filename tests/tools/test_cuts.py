"""Boundaries that no Config has (`dhsa.evaluation.cuts`): the way around the plain pipeline changes nothing else."""

import json

import numpy as np
import pytest

for name in ("torch", "transformers", "rich", "matplotlib"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import torch  # noqa: E402
from test_evaluation import engine, evaluate, folder, prompt, rows_of  # noqa: E402, F401
from tiny import FAMILIES, build, qkv, tokens  # noqa: E402
from weights import compact_weights, random_weights  # noqa: E402

import dhsa  # noqa: E402
from dhsa.commands import UserError  # noqa: E402
from dhsa.evaluation import cuts, runner, settings, tasks  # noqa: E402
from dhsa.evaluation.cuts import Cuts, cutting, label_boundaries  # noqa: E402
from dhsa.evaluation.tasks import output  # noqa: E402

SMALL = {"budget": 96, "sink": 8, "local": 32, "query_block": 32}
CONFIGS = {
    "rows": dhsa.Config(**SMALL, dense_tail=16),
    "dhsa": dhsa.Config(**SMALL, method="dhsa", dense_tail=0, heads="head"),
    "fixed": dhsa.Config(**SMALL, boundaries="fixed", chunk_size=7),
    "mass": dhsa.Config(mass=0.7, budget=None, sink=4, local=8, query_block=16),
    "long tail": dhsa.Config(**SMALL, dense_tail=264),
    "within budget": dhsa.Config(**SMALL | {"budget": 300}),
}
LAYERS = [{}, {"window": 150}, {"window": 64}, {"window": 150, "scale": 0.3, "softcap": 2.0}]


def by_hand(q, k, config, **layer):
    """The label's boundaries from the attention matrix itself, in float64, one batch row."""
    scale = layer.get("scale") or q.shape[-1] ** -0.5
    s = scale * q[0].double() @ k[0].double().repeat_interleave(q.shape[1] // k.shape[1], 0).transpose(1, 2)
    s = s if layer.get("softcap") is None else layer["softcap"] * torch.tanh(s / layer["softcap"])
    i, j = torch.arange(s.shape[1])[:, None], torch.arange(s.shape[2])
    seen = (j <= i) & (j > i - (layer.get("window") or s.shape[2]))
    attn = s.masked_fill(~seen, -torch.inf).softmax(-1).mean(0).float()
    ratios = dhsa.boundary_ratios(attn, window=4, sliding_window=layer.get("window")).numpy()
    with np.errstate(divide="ignore"):
        scores = np.log(ratios)
    return dhsa.pick_boundaries(
        scores, config._core.num_gaps(len(scores)), theta=config.theta or -np.inf, nms=config._core.nms
    ).tolist()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_own_boundaries_give_the_plain_pipeline(name, layer):
    """Bit for bit, over several waves of blocks too, and with the same report."""
    config = CONFIGS[name]
    for length in (270, 330):
        q, k, v = qkv(q_len=length, batch=2, seed=length)
        plain, lse, stats = dhsa.functional.run(q, k, v, config, return_lse=True, **layer)
        out = torch.empty_like(q)
        made, own_lse, own = Cuts("").run(q, k, v, config, return_lse=True, out=out, **layer)
        assert made is out
        assert torch.equal(made, plain)
        assert torch.equal(own_lse, lse)
        assert (own.path, own.density) == (stats.path, pytest.approx(stats.density, rel=1e-12))


def test_own_boundaries_over_several_waves():
    q, k, v = qkv(q_len=5000, heads=8, kv_heads=4, dim=8)
    for config in (dhsa.Config(budget=2048, query_block=32), dhsa.Config(method="dhsa", budget=2048, query_block=32)):
        out, _, stats = Cuts("").run(q, k, v, config)
        assert stats.path == "sparse"
        assert torch.equal(out, dhsa.attention(q, k, v, config))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", ["rows", "dhsa"])
def test_label_boundaries_by_hand(name, layer):
    for config in (CONFIGS[name], CONFIGS[name].replace(num_chunks=9, nms=5), CONFIGS[name].replace(theta=0.02)):
        q, k, _ = qkv(q_len=270, batch=2, seed=3)
        options = {"sliding_window": layer.get("window"), **{n: layer.get(n) for n in ("scale", "softcap")}}
        made = label_boundaries(q, k, config, **options)
        for b in range(2):
            expected = by_hand(q[b : b + 1], k[b : b + 1], config, **layer)
            assert len(expected) > 10
            assert made[b].tolist() == expected + [270] * (made.shape[1] - len(expected))
        assert made.shape[1] == max(len(by_hand(q[b : b + 1], k[b : b + 1], config, **layer)) for b in range(2))


def test_label_cuts_are_what_attention_uses():
    for name in ("rows", "dhsa"):
        q, k, v = qkv(q_len=270)
        made = Cuts("label")
        out, _, stats = made.run(q, k, v, CONFIGS[name], window=150, scale=0.4)
        expected = dhsa.select(q, k, CONFIGS[name], boundaries=by_hand(q, k, CONFIGS[name], window=150, scale=0.4),
                               window=150, scale=0.4)  # fmt: skip
        assert np.array_equal(made.selection.indices, expected.indices)
        assert torch.equal(out, dhsa.sparse_attention(q, k, v, expected, window=150, scale=0.4))
        assert (stats.path, stats.density) == ("sparse", expected.density())
        assert not torch.equal(out, dhsa.attention(q, k, v, CONFIGS[name], window=150, scale=0.4))


@pytest.mark.parametrize("word", ["shared", "shared-label"])
def test_shared_cuts_are_the_first_sparse_layers(word):
    config = CONFIGS["rows"]
    layers = [qkv(q_len=270, seed=seed) for seed in range(3)]
    made = Cuts(word)
    for step, window in ((0, 64), (1, None), (2, 200)):  # the first layer's window is within the budget
        out, _, stats = made.run(*layers[step], config, window=window)
        q, k, v = layers[step]
        if step == 0:
            assert stats.path == "window"
            assert made.selection is None
            assert torch.equal(out, dhsa.attention(q, k, v, config, window=64))
            continue
        first = by_hand(*layers[1][:2], config) if "label" in word else dhsa.boundaries(layers[1][1], config)
        expected = dhsa.select(q, k, config, boundaries=first, window=window)
        assert made.selection.boundaries[0].tolist() == list(first if "label" in word else first[0])
        assert torch.equal(out, dhsa.sparse_attention(q, k, v, expected, window=window))


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_cut_and_put_back(family):
    """In a patched model: what each layer attends to, its record, and nothing left behind."""
    model, ids = build(family), tokens(1, 270)
    config = CONFIGS["rows"].replace(dense_tail=0, break_even=0)
    seen = []

    class Noting(Cuts):
        def run(self, q, k, v, config=None, **options):
            made = super().run(q, k, v, config, **options)
            seen.append((q.clone(), k.clone(), v.clone(), options, made[0].clone(), made[2], self.selection))
            return made

    plain_run = dhsa.functional.run
    with torch.no_grad(), dhsa.patched(model, config):
        plain = model(ids).logits
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuts, "Cuts", Noting)
            with cutting("label"):
                cut = model(ids).logits
            runs = dhsa.last_run(model, "prefill")
        with cutting(""):
            assert torch.equal(model(ids).logits, plain)
        assert dhsa.functional.run is plain_run
        with pytest.raises(RuntimeError, match="inside"), cutting("label"):
            raise RuntimeError("inside")
        assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(cut, plain)
    assert [run.path for run in runs] == [entry[5].path for entry in seen]
    assert any(run.path == "sparse" for run in runs)
    for q, k, v, options, out, stats, selection in seen:
        layer = {name: options[name] for name in ("window", "scale", "softcap")}
        if stats.path != "sparse":
            assert torch.equal(out, dhsa.attention(q, k, v, config, **layer))
            continue
        assert selection.boundaries[0].tolist() == by_hand(q, k, config, **layer)
        assert torch.equal(out, dhsa.sparse_attention(q, k, v, selection, **layer))


@pytest.mark.parametrize("word", cuts.WORDS)
def test_attention_to_both_sides_is_refused_where_it_leaves_keys_out(word):
    config = dhsa.Config(budget=96, query_block=32)
    q, k, v = (torch.randn(1, 2, 500, 16) for _ in range(3))
    with pytest.raises(NotImplementedError, match=rf"^cuts={word}: is for causal attention"):
        Cuts(word).run(q, k, v, config, causal=False)
    out, _, stats = Cuts(word).run(q, k, v, dhsa.Config(budget=500), causal=False)
    assert stats.path == "dense"
    assert torch.equal(out, dhsa.attention(q, k, v, causal=False))


# ---- settings, the engine, the store ---------------------------------------------------------------------------------

SIMILAR = "rows:boundaries=similarity"  # what "rows" is with any word for its cuts


def test_the_engine_cuts_each_prefill_anew(engine):  # noqa: F811
    made = {spec: settings.setting(spec, 96) for spec in (SIMILAR, *(f"rows:cuts={word}" for word in cuts.WORDS))}
    assert {engine.first_sparse(s, 500) for s in made.values()} == {1}
    hidden = {spec: engine.prefill(prompt(), s)[0] for spec, s in made.items()}
    work = {spec: engine.prefill(prompt(), s)[1] for spec, s in made.items()}
    assert {done["sparse_layers"] for done in work.values()} == {2}
    for done in work.values():  # as many keys; which of a block's own are among them differs
        assert done["density"] == pytest.approx(work[SIMILAR]["density"], abs=0.005)
    for a in hidden:
        for b in hidden:
            assert torch.equal(hidden[a], hidden[b]) == (a == b)
    for spec, s in made.items():  # another prompt in between leaves nothing of its boundaries
        engine.prefill(prompt(seed=5), s)
        assert torch.equal(engine.prefill(prompt(), s)[0], hidden[spec])
    # With one sparse layer there is nothing to share.
    one = type(engine)(engine.model, engine.tokenizer, layers=[3])
    assert torch.equal(one.prefill(prompt(), made[SIMILAR])[0], one.prefill(prompt(), made["rows:cuts=shared"])[0])
    shared = settings.setting(f"{SIMILAR}:share=boundaries", 96)  # the option's way, with other waves of blocks
    assert (engine.prefill(prompt(), shared)[0] - hidden["rows:cuts=shared"]).abs().max() < 1e-4
    text, _ = engine.generate(prompt(), made["rows:cuts=shared-label"], 3)
    assert len(text) == 3


def test_losses_are_of_these_cuts(engine):  # noqa: F811
    """`output`: a setting's boundaries, shared ones those of the item's first sparse layer."""
    made = [settings.setting(spec, 96) for spec in (SIMILAR, "rows:cuts=label", "dhsa:cuts=shared-label")]
    found = dict(output.measure(engine, tasks.Item("a", prompt(), {"length": 500}), made))
    layers, kept = [1, 3], []
    assert [[entry["layer"] for entry in facts["layers_seen"]] for facts in found.values()] == [layers] * 3

    def layer(index, q, k, v, window, scale, softcap, sinks):
        assert sinks is None
        if index in layers:
            kept.append((q.clone(), k.clone(), v.clone(), {"window": window, "scale": scale, "softcap": softcap}))

    with output._watched(layer):
        engine.prefill(prompt(), settings.dense())
    for setting, facts in found.items():
        for place, (q, k, v, options) in enumerate(kept):
            source = kept[0 if "shared" in setting.cuts else place]
            where = by_hand(*source[:2], setting.config, **source[3]) if setting.cuts else None
            selection = dhsa.select(q, k, setting.config, boundaries=where, **options)
            exact = dhsa.attention(q, k, v, **options)
            error = (dhsa.sparse_attention(q, k, v, selection, **options) - exact).norm() / exact.norm()
            assert facts["layers_seen"][place]["error"] == pytest.approx(float(error), rel=1e-5)
            assert facts["layers_seen"][place]["density"] == pytest.approx(selection.density())


def test_words_make_other_settings_and_other_rows():
    item = tasks.Item("a", [1, 2, 3], {"length": 3})
    base = {"model": "m", "dtype": "float32", "products": "fp32", "layers": ""}
    made = [settings.setting(spec, 96) for spec in (SIMILAR, *(f"rows:cuts={word}" for word in cuts.WORDS))]
    assert [s.cuts for s in made] == ["", *cuts.WORDS]
    assert len({runner.key(base, "ppl", item, s, "b") for s in made}) == 4
    assert len({s.config for s in made}) == 1
    assert [s.fields().get("cuts") for s in made] == [None, *cuts.WORDS]
    tuned = settings.setting("dhsa:cuts=label:num_chunks=40:nms=3", 96)
    assert (tuned.config._core.num_gaps(500), tuned.config._core.nms) == (40, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rows:cuts=best", "cuts: expected one of label, shared, shared-label, got 'best'"),
        ("rows:cuts=", "cuts: expected one of label, shared, shared-label, got ''"),
        ("rows:cuts=shared:boundaries=fixed", "cuts=shared: has no effect on boundaries=fixed"),
        ("window:cuts=shared", "only methods of chunks that have a budget or a mass"),
        ("rows:budget=none:cuts=shared", "only methods of chunks that have a budget or a mass"),
        ("exact:cuts=label", "only methods of chunks that have a budget or a mass"),
        ("rows:boundaries=fixed:cuts=label", "boundaries=fixed is ignored"),
        ("rows:skip=0.1:cuts=shared", "not with skip"),
        ("rows:share=selections:cuts=label", "not with share"),
        ("window:share=boundaries", "share: method='window' cuts no chunks"),
        ("rows:cut=label", "expected source, cuts=WORD or field=value"),
        ("rows:boundaries=predictor:predictor=no/such.safetensors", "predictor: .*No such file"),
    ],
)
def test_words_that_say_nothing_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        settings.setting(spec, 96)


def test_output_has_no_layers_that_share(engine):  # noqa: F811
    made = [settings.setting("rows:share=selections", 96)]
    with pytest.raises(UserError, match="rows:share=selections: task output looks at each layer on its own"):
        next(output.measure(engine, tasks.Item("a", prompt(), {"length": 500}), made))


def test_predictors_come_from_files(engine, tmp_path):  # noqa: F811
    """A predictor's file in a spec is the predictor's boundaries; rows know it by its weights."""
    pytest.importorskip("safetensors")
    files, made = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], []
    for seed, file in enumerate(files):
        predictor = dhsa.BoundaryPredictor.from_state_dict(random_weights(64, 8, seed=seed), heads=4)
        predictor.save(file)
        spec = f"rows:boundaries=predictor:predictor={file}:num_chunks=60:theta=-inf:nms=4"
        made.append(settings.setting(spec, 96))
        assert np.array_equal(made[-1].config.predictor.logits(qkv(dim=32)[1]), predictor.logits(qkv(dim=32)[1]))
        hidden, _ = engine.prefill(prompt(), made[-1])
        with torch.no_grad(), dhsa.patched(engine.model, made[-1].config.replace(predictor=predictor)):
            whole = engine.model.get_decoder()(torch.tensor([prompt()])).last_hidden_state[0]
        assert torch.equal(hidden, whole)
    assert made[0].fields()["predictor"] != made[1].fields()["predictor"]
    assert json.dumps(made[0].fields())
    with pytest.raises(UserError, match="predictor= needs boundaries=predictor, got fixed"):
        settings.setting(f"rows:predictor={files[0]}", 96)
    with pytest.raises(UserError, match="boundaries=predictor is ignored"):
        settings.setting(f"rows:boundaries=predictor:predictor={files[0]}:cuts=label", 96)
    files[0].write_bytes(b"nonsense of some length")
    with pytest.raises(UserError, match=r"predictor: .*neither safetensors"):
        settings.setting(f"dhsa:boundaries=predictor:predictor={files[0]}", 96)


def test_networks_of_single_layers(engine):  # noqa: F811
    """Each layer is cut by its own network, inside `output` too; shared boundaries are the first sparse layer's."""
    weights = {n: compact_weights(64, seed=n) for n in (1, 3)}
    own = {n: dhsa.BoundaryPredictor.from_state_dict(w) for n, w in weights.items()}
    both = {f"layers.{n}.{name}": array for n, w in weights.items() for name, array in w.items()}
    both = dhsa.BoundaryPredictor.from_state_dict(both)
    some = type(engine)(engine.model, engine.tokenizer, layers=[1, 3])
    kept = {}

    def layer(index, q, k, v, window, scale, softcap, sinks):
        kept[index] = (q.clone(), k.clone(), v.clone(), {"window": window, "scale": scale, "softcap": softcap})

    with output._watched(layer):
        engine.prefill(prompt(), settings.dense())
    config = settings.setting("rows", 96).config.replace(boundaries="predictor", predictor=both)
    made = [settings.Setting(f"own {word}", config, 96, cuts=word) for word in ("", "shared")]
    found = dict(output.measure(some, tasks.Item("a", prompt(), {"length": 500}), made))
    for setting in made:
        entries = found[setting]["layers_seen"]
        assert [entry["layer"] for entry in entries] == [1, 3]
        for entry in entries:
            q, k, v, options = kept[entry["layer"]]
            source = 1 if setting.cuts else entry["layer"]
            where = dhsa.boundaries(kept[source][1], config.replace(predictor=own[source]))
            selection = dhsa.select(q, k, config, boundaries=where, **options)
            exact = dhsa.attention(q, k, v, **options)
            error = (dhsa.sparse_attention(q, k, v, selection, **options) - exact).norm() / exact.norm()
            assert entry["error"] == pytest.approx(float(error), rel=1e-5)
    hidden = [some.prefill(prompt(), setting)[0] for setting in made]
    assert not torch.equal(*hidden)
    one = settings.Setting("one", config.replace(predictor=own[1]), 96)
    assert one.fields()["predictor"] != made[0].fields()["predictor"]
    assert not torch.equal(some.prefill(prompt(), one)[0], hidden[0])


def test_rows_of_a_run_say_their_cuts(folder, tmp_path):  # noqa: F811
    methods = f"{SIMILAR},rows:cuts=label,rows:cuts=shared,dhsa:cuts=shared-label"
    args = ["ppl", "--methods", methods, "--budget", "96", "--lengths", "400", "--documents", "1"]
    assert evaluate(folder, tmp_path, *args) == 0
    rows = rows_of(tmp_path)
    assert [r["method"] for r in rows] == ["dense", *methods.split(",")]
    assert [r["config"].get("cuts") for r in rows] == [None, None, "label", "shared", "shared-label"]
    assert len({r["nll"] for r in rows}) == 5


def test_a_predictor_of_another_model_is_refused_by_name(engine, tmp_path):  # noqa: F811
    pytest.importorskip("safetensors")
    predictor = dhsa.BoundaryPredictor.from_state_dict(compact_weights(64), model={"num_hidden_layers": 26})
    predictor.save(tmp_path / "p.safetensors")
    setting = settings.setting(f"rows:boundaries=predictor:predictor={tmp_path / 'p.safetensors'}", 96)
    with pytest.raises(UserError, match=r"^--methods: rows:.*predictor: trained for a model with num_hidden_layers 26"):
        engine.prefill(list(range(1, 90)) * 4, setting)
    assert engine.model.config._attn_implementation != "dhsa"
