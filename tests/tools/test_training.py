"""Training boundary predictors: texts, labels out of a running model, networks, the loop, the command; tiny models.

Not here: the label's numbers (test_labels.py) and the networks in C (test_compact.py, test_select.py).
"""

import json
import math
import re

import numpy as np
import pytest

for name in ("torch", "transformers", "rich", "safetensors"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import torch  # noqa: E402
from test_evaluation import folder  # noqa: E402, F401
from tiny import build, tokens  # noqa: E402
from weights import compact_weights, random_weights  # noqa: E402

import dhsa  # noqa: E402
from dhsa import __main__ as command_line  # noqa: E402
from dhsa import commands, reference  # noqa: E402
from dhsa.commands import UserError  # noqa: E402
from dhsa.training import documents, loop, networks, scores, stream  # noqa: E402
from dhsa.training.settings import Settings  # noqa: E402

SMALL = Settings(tokens=256, crop=48, width=8, pooled=8, hidden=8, epochs=2, seed=3)


def text(train=3, held_out=1, length=256):
    pieces = [tokens(1, length, seed=i)[0].tolist() for i in range(train + held_out)]
    return documents.Text(pieces[:train], pieces[train:], "random tokens")


def state_of(predictor):
    return predictor.state_dict()


def equal(a, b):
    a, b = state_of(a), state_of(b)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ---- networks and loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("channels", "heads", "window"), [(32, 4, 4), (48, 8, 3)])
def test_the_papers_network_in_torch_and_in_c(channels, heads, window, gated):
    settings = Settings(architecture="attention", heads=heads, hidden=20, window=window, gated=gated)
    network = networks.build(settings, channels, 1.0, seed=5)
    k = torch.randn(1, 2, 150, channels // 2)
    predictor = dhsa.BoundaryPredictor.from_state_dict(network.folded(), heads=heads, window=window)
    assert set(predictor.state_dict()) == set(random_weights(channels, 20, gated))
    with torch.no_grad():
        want = network(k[0].transpose(0, 1).reshape(150, channels))
    got = predictor.logits(k)[0, window - 1 : 150 - window]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_compact_network_in_torch_and_in_c(scale):
    network = networks.build(Settings(width=9, pooled=7, hidden=11, window=3), 32, scale, seed=5)
    k = 5 * torch.randn(1, 2, 150, 16)
    predictor = dhsa.BoundaryPredictor.from_state_dict(network.folded(), window=3)
    assert set(predictor.state_dict()) == set(compact_weights(32))
    with torch.no_grad():
        want = network(k[0].transpose(0, 1).reshape(150, 32))
    torch.testing.assert_close(predictor.logits(k)[0, 2:147], want, rtol=1e-4, atol=1e-4)


def test_soft_labels_and_focal_loss():
    ratios = torch.tensor([1.0, 2.0, 8.0])
    want = [1 / (1 + math.exp(-2 * (math.log(r + 1e-6) - math.log(2)))) for r in ratios.tolist()]
    labels = networks.soft_labels(ratios)
    np.testing.assert_allclose(labels, want, rtol=1e-6)
    logits = torch.tensor([0.5, -1.0, 2.0])
    by_hand = []
    for x, y in zip(logits.tolist(), want, strict=True):
        p = 1 / (1 + math.exp(-x))
        entropy = -(1.3 * y * math.log(p) + (1 - y) * math.log(1 - p))
        by_hand.append((1 - (p * y + (1 - p) * (1 - y))) ** 2 * entropy)
    got = networks.focal_loss(logits, labels, gamma=2.0, pos_weight=1.3)
    assert float(got) == pytest.approx(sum(by_hand) / 3, rel=1e-5)


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_average_precision():
    positive = np.array([True, False, True, False])
    assert scores.average_precision(np.array([4.0, 3, 2, 1]), positive) == pytest.approx((1 + 2 / 3) / 2)
    assert scores.average_precision(np.array([1.0, 2, 3, 4]), positive) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert scores.average_precision(np.zeros(4), positive) == pytest.approx(0.5)  # one step: the share of positives
    assert math.isnan(scores.average_precision(np.ones(3), np.zeros(3, bool)))


def test_recall_is_of_boundaries_picked_alike():
    rng = np.random.default_rng(0)
    ratios = 1 + rng.random(400)
    ratios[:7] = ratios[-8:] = 0
    assert scores.recall(ratios, ratios) == 1
    assert scores.recall(rng.random(400), ratios) < 0.5
    unlabelled = ratios.copy()
    unlabelled[:7] = 1e9  # gaps without a label are not picked, whatever their score
    assert scores.recall(unlabelled, ratios) == 1


# ---- the model's keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
def test_keys_and_labels_are_those_of_the_models_attention(models, family):
    """Against eager's own attention matrices."""
    model = models(family)
    ids = tokens(1, 120)
    with torch.no_grad():
        attentions = model.model(ids, output_attentions=True, use_cache=False).attentions
    seen = {}

    def visit(found):
        seen[found.layer] = (found.rows().clone(), found.ratios)

    stream.layer_keys(model, ids[0].tolist(), visit, window=4)
    assert list(seen) == [0, 1, 2, 3]
    kinds = getattr(model.config, "layer_types", ["full_attention"] * 4)
    for layer, (rows, ratios) in seen.items():
        sliding = model.config.sliding_window if kinds[layer] == "sliding_attention" else None
        want = dhsa.boundary_ratios(attentions[layer][0].mean(0), window=4, sliding_window=sliding)
        torch.testing.assert_close(ratios, want, rtol=1e-3, atol=0)
        assert rows.shape == (120, model.config.num_key_value_heads * model.model.layers[layer].self_attn.head_dim)
    assert model.config._attn_implementation == "eager"  # as it was


def test_models_without_labels_are_refused(models):
    with pytest.raises(UserError, match=r"^layers: \[9\] are no attention layers of this model; there are \[0, 1"):
        stream.layer_keys(models("llama"), [1] * 40, lambda found: None, window=4, layers=[1, 9])
    import transformers

    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(UserError, match=r"^model: "):
        stream.layer_keys(mamba.eval(), [1] * 40, lambda found: None, window=4)
    bad = build("llama")
    with torch.no_grad():
        bad.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"^model: layer 1: q: the logits of query"):
        stream.layer_keys(bad, [5] * 40, lambda found: None, window=4)


def test_other_models_are_not_read(models):
    other, seen = build("llama", "dhsa"), []

    def visit(found):
        seen.append(found.layer)
        with torch.no_grad():
            other(tokens(1, 40))

    stream.layer_keys(models("gemma3"), [5] * 40, visit, window=4)
    assert seen == [0, 1, 2, 3]


def test_errors_of_a_visitor_are_its_own(models):
    def visit(found):
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        stream.layer_keys(models("llama"), [5] * 40, visit, window=4)
    assert models("llama").config._attn_implementation == "eager"


# ---- the loop --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    model = build("gemma3", query_pre_attn_scalar=1)  # sharp attention: its layers have boundaries
    return model, loop.train(model, text(), SMALL)


def test_training_learns_what_it_says(trained):
    model, done = trained
    assert done.predictor.layers == (0, 1, 2, 3)
    assert done.predictor.shared
    assert len(done.history) == 6
    assert {who for h in done.history for who in h} == {"own", "shared"}
    assert done.history[-1]["own"] < done.history[0]["own"]
    assert list(done.scores) == [0, 1, 2, 3]
    assert set(done.scores[2]) == {"own", "shared", "similarity", "random", "positive"}
    # The scores are of the networks that come out, on the piece held out.
    seen = {}
    stream.layer_keys(
        model, text().held_out[0], lambda f: seen.__setitem__(f.layer, (f.keys.clone(), f.ratios.numpy())), window=4
    )
    keys, ratios = seen[2]
    assert scores.score(done.predictor.layer(2).logits(keys)[0].numpy(), ratios) == done.scores[2]["own"]
    assert scores.score(done.predictor.logits(keys)[0].numpy(), ratios) == done.scores[2]["shared"]
    assert scores.score(scores.similarity(keys, 4), ratios) == done.scores[2]["similarity"]
    assert 0 < done.scores[2]["own"]["average_precision"] < 1
    np.testing.assert_allclose(
        scores.similarity(keys, 4), reference.similarity_scores(keys.numpy(), window=4)[0], rtol=1e-4, atol=1e-5
    )
    assert done.scores[2]["positive"] == pytest.approx((ratios[ratios > 0] > 2).mean())


def test_what_can_be_learned_is_learned(monkeypatch):
    """Labels that follow from the keys: far above chance on text that was not seen."""
    rng = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=rng)

    def layer_keys(model, ids, visit, **options):
        g = torch.Generator().manual_seed(ids[0])
        keys = torch.randn(1, 1, 600, 16, generator=g)
        mass = (keys[0, 0] @ direction / 5).exp().unfold(0, 4, 1).sum(-1)
        ratios = torch.zeros(600, dtype=torch.float64)
        left, right = mass[4:-8], mass[8:-4]  # gaps 7 to 591
        ratios[7:592] = torch.maximum(left, right)[:585] / torch.minimum(left, right)[:585]
        visit(stream.LayerKeys(0, keys, ratios))

    monkeypatch.setattr(loop, "layer_keys", layer_keys)
    many = documents.Text([[i] * 600 for i in range(30)], [[1000] * 600, [1001] * 600], "")
    done = loop.train(build("llama"), many, Settings(networks="layers", epochs=4, crop=64))
    row = done.scores[0]
    assert row["own"]["average_precision"] > 0.85 > row["positive"] + 0.2
    assert row["own"]["recall"] > 1.5 * row["random"]["recall"]
    assert abs(row["random"]["average_precision"] - row["positive"]) < 0.1


def test_the_same_seed_gives_the_same_weights_and_another_does_not(trained):
    model, done = trained
    again = loop.train(model, text(), SMALL)
    assert equal(again.predictor, done.predictor)
    assert again.history == done.history
    other = loop.train(model, text(), Settings(**SMALL.fields() | {"seed": 4}))
    assert not equal(other.predictor, done.predictor)


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_training_goes_on_to_the_same_weights(trained, tmp_path, after):
    model, done = trained
    state = tmp_path / "p.state"
    count = 0

    def stop():
        nonlocal count
        count += 1
        if count > after:  # in the piece after the last one that was written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(model, text(), SMALL, state=state, advance=stop)
    assert state.exists()
    with pytest.raises(UserError, match=r"p\.state is of a training with other settings, text or model: remove it"):
        loop.train(model, text(), Settings(**SMALL.fields() | {"rate": 1e-3}), state=state)
    with pytest.raises(UserError, match="other settings, text or model"):
        loop.train(model, text(train=2), SMALL, state=state)
    steps = []
    again = loop.train(model, text(), SMALL, state=state, advance=lambda: steps.append(1))
    assert again.resumed == 1
    assert len(steps) == 2 * 3 + 1
    assert equal(again.predictor, done.predictor)
    assert again.history == done.history
    np.testing.assert_equal(again.scores, done.scores)  # NaN, where a layer has no boundaries, is NaN again
    assert [path.name for path in tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("change", "layers", "shared"),
    [
        ({"networks": "shared"}, (), True),
        ({"networks": "layers", "layers": (1, 3)}, (1, 3), False),
        ({"architecture": "attention", "hidden": 8}, (), True),
    ],
)
def test_what_is_trained_is_what_was_asked_for(change, layers, shared):
    settings = Settings(**SMALL.fields() | {"networks": None, "rate": 1e-3} | change)
    done = loop.train(build("gemma3"), text(2), settings)
    assert (done.predictor.layers, done.predictor.shared) == (layers, shared)
    assert done.predictor.architecture == change.get("architecture", "compact")
    assert set(done.scores) == set(change.get("layers", range(4)))
    assert done.predictor.model["num_hidden_layers"] == 4


def test_the_pool_is_bounded(models):
    model = models("llama")
    piece = tokens(1, 2000)[0].tolist()
    settings = Settings(tokens=2000, crop=16)
    pool = loop._pool(model, piece, settings, np.random.default_rng(0))
    assert len(pool) == 4 * -(-(2000 - 15) // 16)
    small = Settings(tokens=2000, crop=16, pool_mib=1)
    some = loop._pool(model, piece, small, np.random.default_rng(0))
    assert sum(c.keys.nbytes + c.labels.nbytes for c in some) <= 2**20 < sum(c.keys.nbytes for c in pool)
    assert len({sum(c.layer == i for c in some) for i in range(4)}) == 1
    assert all(len(c.keys) == len(c.labels) + 7 for c in some + pool)
    with pytest.raises(UserError, match=r"^pool_mib: 1 MiB do not hold 100000 gaps of each of 4 layers"):
        loop._pool(model, piece, Settings(crop=100_000, pool_mib=1), np.random.default_rng(0))


def test_crops_hold_the_labels_of_their_gaps(models):
    model = models("gemma3")
    piece = tokens(1, 200)[0].tolist()
    whole = {}
    stream.layer_keys(model, piece, lambda f: whole.__setitem__(f.layer, (f.rows().clone(), f.ratios)), window=4)
    pool = loop._pool(model, piece, Settings(crop=30), np.random.default_rng(1))
    assert len({crop.layer for crop in pool[:7]}) > 1  # layers are mixed
    found = 0
    for crop in pool:
        rows, ratios = whole[crop.layer]
        (a,) = (i for i in range(200 - len(crop.keys) + 1) if torch.equal(rows[i : i + len(crop.keys)], crop.keys))
        want = networks.soft_labels(ratios[a + 3 : a + 3 + len(crop.labels)].float())
        torch.testing.assert_close(crop.labels, want)
        found += len(crop.labels)
    assert found == 4 * (200 - 15)


def test_failures_are_named(monkeypatch):
    model = build("llama")
    with pytest.raises(UserError, match=r"^text: too little"):
        loop.train(model, documents.Text([], [[1] * 200], ""), SMALL)
    with pytest.raises(UserError, match=r"^text: a piece of 300 tokens, but the settings say at most 256"):
        loop.train(model, text(length=300), SMALL)
    with pytest.raises(UserError, match=r"the loss is no longer finite after \d pieces; try a lower rate"):
        loop.train(model, text(2), Settings(**SMALL.fields() | {"rate": 1e30, "schedule": "constant"}))
    with pytest.raises(UserError, match="the loss of the own networks did not fall"):
        loop._check(None, [{"own": 0.1}, {"own": 0.2}])
    with pytest.raises(UserError, match=r"^heads: 3 do not divide the 32 channels"):
        loop.train(model, text(2), Settings(architecture="attention", heads=3))

    def two_widths(model, ids, visit, **options):
        for layer, width in ((0, 8), (1, 16)):
            visit(stream.LayerKeys(layer, torch.randn(1, 1, 100, width), torch.ones(100, dtype=torch.float64)))

    monkeypatch.setattr(loop, "layer_keys", two_widths)
    with pytest.raises(UserError, match=r"^layers: keys of layer 1 have 16 channels, those of layer 0 8"):
        loop.train(model, text(2), SMALL)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"architecture": "large"}, ValueError, r"^architecture: expected one of"),
        ({"networks": "none"}, ValueError, r"^networks: expected one of"),
        ({"schedule": "step"}, ValueError, r"^schedule: "),
        ({"window": 65}, ValueError, r"^window: "),
        ({"rate": 0.0}, ValueError, r"^rate: expected a number above 0"),
        ({"gamma": -1.0}, ValueError, r"^gamma: "),
        ({"layers": ()}, ValueError, r"^layers: expected at least one"),
        ({"epochs": 1.5}, TypeError, r"^epochs: "),
    ],
)
def test_settings_refuse(options, error, message):
    with pytest.raises(error, match=message):
        Settings(**options)


def test_the_papers_settings_are_those_of_its_network():
    paper = Settings(architecture="attention")
    assert (paper.networks, paper.rate, paper.schedule, paper.epochs) == ("shared", 1e-4, "constant", 2)
    assert (paper.gamma, paper.pos_weight, paper.window) == (2.0, 1.3, 4)
    rates = [loop._rate(Settings(), x) for x in (0, 0.01, 0.02, 0.5, 0.999)]
    assert rates[0] < rates[1] < rates[2] <= 3e-3
    assert rates[2] > rates[3] > rates[4] > 0
    assert rates[3] == pytest.approx(1.5e-3)
    assert {loop._rate(paper, x) for x in (0, 0.3, 0.9)} == {1e-4}


# ---- texts and the command -------------------------------------------------------------------------------------------


def test_documents_are_split_whole():
    texts = [f"{i}" * (10 + i) for i in range(40)]
    learn, judge = documents.split(texts, seed=1)
    assert sorted(learn + judge) == sorted(texts)
    assert 0.1 < sum(map(len, judge)) / sum(map(len, texts)) < 0.25
    assert documents.split(texts, seed=1) == (learn, judge)
    assert documents.split(texts, seed=2)[1] != judge
    assert documents.split(["ab" * 50, " \n"], seed=0) == (["ab" * 43 + "a"], ["b" + "ab" * 6])
    assert len(documents.split(["a", "b" * 99], seed=0)[0]) == 1


def test_pythons_own_documentation_is_there():
    found = documents.python_documents()
    assert len(found) > 50
    assert sum(map(len, found)) > 500_000
    assert any("argparse" in d[:200].lower() or "ArgumentParser" in d for d in found)


def run(*args):
    return command_line.main(["train-boundaries", *map(str, args)])


def test_the_command(folder, tmp_path, capsys):  # noqa: F811
    rng = np.random.default_rng(0)
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text("".join(rng.choice(list("abcdefgh \n"), 400)))
    out = tmp_path / "made.safetensors"
    options = ("--model", folder, "--text", *sorted(tmp_path.glob("*.txt")), "--out", out, "--tokens", 256)
    assert run(*options, "--dtype", "float16", "--threads", 1, "--held-out", 1) == 0
    shown = capsys.readouterr()
    assert re.search(r"│ mean +│", shown.out)
    assert "BoundaryPredictor.load" in shown.err
    predictor = dhsa.BoundaryPredictor.load(out)
    assert predictor.layers == (0, 1, 2, 3)
    card = out.with_suffix(".md").read_text()
    assert "0.txt, 1.txt" in card
    assert re.search(r"\| mean \| \| (0\.\d{3}|nan) \| 0\.\d{3} \| ", card)
    import safetensors

    with safetensors.safe_open(out, "numpy") as file:
        notes = file.metadata()
        assert {file.get_tensor(name).dtype for name in file.keys()} == {np.dtype(np.float16)}  # noqa: SIM118
    losses = json.loads(notes["losses"])
    assert len(losses["own"]) == len(losses["shared"]) == 2 * 8
    assert Settings(**json.loads(notes["settings"])) == Settings(tokens=256)
    assert not list(tmp_path.glob("*.state"))
    tokenizer, model = commands.load(folder)
    with torch.no_grad(), dhsa.patched(model, dhsa.Config(boundaries="predictor", predictor=predictor)):
        assert torch.isfinite(model(tokens(1, 200)).logits).all()
    assert documents.prefix_of(tokenizer) == []


def test_what_was_learned_outlives_a_failure_to_save_it(folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    rng = np.random.default_rng(0)
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("".join(rng.choice(list("abcdefgh \n"), 400)))
    out, state = tmp_path / "made.safetensors", tmp_path / "made.state"
    options = ("--model", folder, "--text", *sorted(tmp_path.glob("*.txt")), "--out", out, "--tokens", 256)
    options += ("--held-out", 1, "--pieces", 2, "--threads", 1)

    def full(predictor, path, **how):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(dhsa.BoundaryPredictor, "save", full)
        assert run(*options) == 2
    assert re.search(r"--out: .*what was learned stays in \S*made\.state", capsys.readouterr().err.replace("\n", " "))
    assert state.exists()
    save, dtypes = dhsa.BoundaryPredictor.save, []

    def too_narrow(predictor, path, *, dtype, notes):
        dtypes.append(dtype)
        if dtype == "float16":
            raise ValueError("head.2.weight: holds numbers beyond float16; save as float32")
        save(predictor, path, dtype=dtype, notes=notes)

    monkeypatch.setattr(dhsa.BoundaryPredictor, "save", too_narrow)
    monkeypatch.setattr(loop._Learner, "step", None)  # nothing is learned again
    assert run(*options, "--dtype", "float16") == 2
    assert "save as float32" in capsys.readouterr().err
    assert state.exists()
    assert run(*options) == 0
    assert dtypes == ["float16", "float32"]
    assert not state.exists()
    assert len(json.loads(dhsa.BoundaryPredictor.load(out).notes["losses"])["own"]) == 2 * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--text", "no.txt"), "--text: .*no.txt"),
        (("--text", "short.txt"), "--text: too little: 50 characters in 1 documents"),
        (("--out", "made.bin"), "--out: expected a name that ends in .safetensors"),
        (("--out", "folder.safetensors"), "--out: folder.safetensors is not a regular file"),
        (("--out", "nowhere/made.safetensors"), "--out: there is no folder nowhere"),
        (("--model", "nowhere"), "--model: nowhere does not exist"),
        (("--rate", "-1"), "--rate: expected a number above 0"),
        (("--heads", "4"), "--heads: only the paper's network has attention heads; add --architecture attention"),
        (("--layers", "7"), r"layers: \[7\] are no attention layers"),
    ],
)
def test_the_command_refuses(folder, tmp_path, monkeypatch, capsys, args, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "short.txt").write_text("a b c d e " * 5)
    (tmp_path / "long.txt").write_text("a b c d e " * 300)
    options = {"--model": folder, "--text": "long.txt", "--out": "made.safetensors", "--tokens": 256}
    options |= dict([args])
    assert run(*(x for pair in options.items() for x in pair)) == 2
    assert re.search(rf"dhsa train-boundaries: {message}", capsys.readouterr().err)
