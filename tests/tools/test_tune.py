"""`python -m dhsa tune`: the choice from numbers, the measurements beside computations of their own, and the command on
a tiny model: its file, its target, and that it goes on where it was stopped."""

import json
import random
import re
from itertools import product

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")
pytest.importorskip("rich", reason="needs the demo extra: rich")

from tiny import build, character_tokenizer  # noqa: E402

import dhsa  # noqa: E402
from dhsa import __main__ as command_line  # noqa: E402
from dhsa import commands, hf  # noqa: E402
from dhsa.evaluation.engine import Engine  # noqa: E402
from dhsa.evaluation.settings import Setting  # noqa: E402
from dhsa.evaluation.store import Store  # noqa: E402
from dhsa.tuning import candidates, choose, measure  # noqa: E402
from dhsa.tuning import command as tuning  # noqa: E402
from dhsa.tuning.choose import Option  # noqa: E402

EXACT = dhsa.Config(budget=None)
LENGTH = 640

# ---- the choice ------------------------------------------------------------------------------------------------------


def random_layers(seed, layers=5, names=6):
    chance = random.Random(seed)
    made = [
        {f"c{i}": Option(chance.uniform(0.1, 3), chance.uniform(0.1, 3)) for i in range(names)} for _ in range(layers)
    ]
    return [of | {"exact": Option(0.0, 4.0)} for of in made]


@pytest.mark.parametrize("seed", range(20))
def test_a_choice_is_the_best_of_all_that_keep_to_its_target(seed):
    layers = random_layers(seed)
    every = [choose.total(layers, choice) for choice in product(*layers)]
    for target in (0.3, 1.5, 4.0):
        made = choose.total(layers, choose.cheapest(layers, target))
        assert made.kl <= target
        assert made.seconds == pytest.approx(min(o.seconds for o in every if o.kl <= target), rel=1e-12)
    for target in (3.0, 8.0, 15.0):
        choice = choose.closest(layers, target)
        within = [o.kl for o in every if o.seconds <= target]
        assert (choice is None) == (not within)
        if choice is not None:
            made = choose.total(layers, choice)
            assert made.seconds <= target
            assert made.kl == pytest.approx(min(within), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_choice_among_very_many_is_nearly_the_best(seed):
    """Of thirty layers not every sum is kept: what is chosen is no slower than a part in a hundred of the best."""
    layers = random_layers(seed, layers=30, names=12)
    for target in (20.0, 45.0, 80.0):
        made = choose.total(layers, choose.cheapest(layers, target))
        rates = [10**exponent for exponent in np.linspace(-3, 3, 400)]
        hull = [[min(of, key=lambda name: of[name].kl + rate * of[name].seconds) for of in layers] for rate in rates]
        sums = [choose.total(layers, choice) for choice in hull]
        assert made.kl <= target
        assert made.seconds <= 1.01 * min(o.seconds for o in sums if o.kl <= target)
        # By weak duality no choice at all is faster than this.
        bound = max(o.seconds + (o.kl - target) / rate for o, rate in zip(sums, rates, strict=True))
        assert made.seconds <= 1.01 * bound


def test_extremes():
    layers = random_layers(1)
    assert choose.cheapest(layers, 0.0) == ["exact"] * 5
    fastest = [min(of, key=lambda name: of[name].seconds) for of in layers]
    assert choose.cheapest(layers, 1e9) == fastest
    assert choose.closest(layers, 1e9) == ["exact"] * 5
    assert choose.closest(layers, 0.01) is None
    lacking = [layers[0], {"exact": Option(0.0, 4.0)}]
    made = choose.uniform(lacking, ["c1"])["c1"]
    assert made == Option(layers[0]["c1"].kl, layers[0]["c1"].seconds + 4.0)


def test_what_is_on_the_frontier_in_most_places_is_kept():
    points = {
        "once": [(9.0, 9.0), (1.0, 9.0), (9.0, 9.0)],
        "always": [(1.0, 1.0), (5.0, 5.0), (1.0, 1.0)],
        "never": [(1.2, 1.2), (5.6, 5.6), (1.1, 1.1)],
        "twice": [(0.9, 1.2), (9.0, 9.0), (1.2, 0.8)],
    }
    assert choose.kept(points, 9) == ["always", "twice", "once"]
    assert choose.kept(points, 2) == ["always", "twice"]


def test_the_candidates_do_not_depend_on_defaults():
    default, *others = candidates.families()
    assert default == dhsa.Config(budget=256, break_even=0)
    assert len(set(others)) == len(others) == 24
    for config in others:
        asked = set(config._asked) | set(config.options.asked())
        assert asked >= {"budget", "heads", "boundaries", "query_block", "sink", "local", "dense_tail", "rows"}
    assert len({tuning._name(config, 256) for config in (default, *others)}) == 25
    assert candidates.budgets(8192) == [256, 512, 1024, 2048, 4096]
    assert candidates.budgets(600) == [128, 256]
    assert candidates.between(256, 512) == 368


# ---- measurements ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Llama of random weights with a tokenizer of single characters, and a text beside it."""
    path = tmp_path_factory.mktemp("tiny")
    character_tokenizer().save_pretrained(path / "model")
    build("llama").save_pretrained(path / "model")
    chance = random.Random(3)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(1, 7))) for _ in range(60)]
    (path / "text.txt").write_text(" ".join(chance.choices(words, k=3000)))
    return path


@pytest.fixture(scope="module")
def engine(folder):
    tokenizer, model = commands.load(folder / "model")
    return Engine(model, tokenizer)


def prompt(engine, length=LENGTH):
    return engine.encode("".join(random.Random(5).choices("abcdef ghij", k=length)))


def outputs(model, config, ids):
    """The input of each layer's output projection, as float64: what its attention gives."""
    found = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args, i=i: found.__setitem__(i, args[0].double()))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad(), dhsa.patched(model, config):
        logits = model(torch.tensor([ids])).logits[0].double()
    for hook in hooks:
        hook.remove()
    return found, logits


def test_candidates_are_measured_on_the_inputs_of_dense_attention(engine):
    ids = prompt(engine)
    config = dhsa.Config(budget=100, sink=8, local=32, break_even=0, dense_tail=0)
    found = {}
    measure.candidates_of_layers(
        engine, ids, {"a": config, "wide": config.replace(budget=LENGTH)}, [0, 2], found.__setitem__
    )
    assert set(found) == {0, 2}
    dense, _ = outputs(engine.model, EXACT, ids)
    for layer in (0, 2):  # one layer alone sees the inputs that dense attention gives it
        own, _ = outputs(engine.model, dhsa.LayerConfigs(default=EXACT, layers={layer: config}), ids)
        gap = (own[layer] - dense[layer])[:, LENGTH // 2 :].square().sum() / dense[layer][
            :, LENGTH // 2 :
        ].square().sum()
        row = found[layer]
        assert row["window"] is None
        assert set(row["candidates"]) == {"a"}  # the other leaves nothing out
        assert row["candidates"]["a"][0] == pytest.approx(float(gap), rel=1e-4)
        assert row["candidates"]["a"][1] > 0
        assert row["exact"] > 0
    assert not any(hf.switching.STATE in module.__dict__ for module in engine.model.modules())


def test_importance_is_what_one_sparse_layer_changes(engine):
    ids = prompt(engine)
    config, found = candidates.probe(LENGTH), {}
    measure.importance(engine, ids, [1, 3], found.__setitem__)
    dense, expected = outputs(engine.model, EXACT, ids)
    for layer in (1, 3):
        own, logits = outputs(engine.model, dhsa.LayerConfigs(default=EXACT, layers={layer: config}), ids)
        half = slice(LENGTH // 2 - 1, LENGTH - 1)
        p, q = expected[half].log_softmax(-1), logits[half].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)[:: (LENGTH - LENGTH // 2) // measure.SCORED_OF_LAYERS].mean()
        gap = (own[layer] - dense[layer])[:, LENGTH // 2 :].square().sum() / dense[layer][
            :, LENGTH // 2 :
        ].square().sum()
        assert found[layer]["error"] == pytest.approx(float(gap), rel=1e-4)
        assert found[layer]["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-7)
        assert found[layer]["kl"] > 0


def test_layers_that_are_remembered_change_no_bit(engine):
    ids, config = prompt(engine), candidates.probe(LENGTH)
    reference = engine.remember(ids)
    setting = Setting("layer 2", dhsa.LayerConfigs(default=EXACT, layers={2: config}))
    hidden, work = engine.prefill(ids, setting)
    assert work["replayed_layers"] == 2
    again, work = engine.prefill(ids, setting, replay=False)
    assert work["replayed_layers"] == 0
    assert torch.equal(hidden, again)
    assert torch.equal(reference, measure.read(engine, ids))
    assert not torch.equal(hidden, reference)


def test_configs_as_a_whole(engine):
    ids = prompt(engine)
    reference = measure.read(engine, ids)
    config = candidates.probe(LENGTH)
    found = measure.whole(engine, ids, reference, config, [0, 1, 2, 3])
    assert min(found["seconds"], found["dense_seconds"]) > 0
    runs = dhsa.last_run(engine.model, "prefill")
    assert found["seconds"] == pytest.approx(sum(run.select_seconds + run.attend_seconds for run in runs))
    assert found["kl"] > 0
    assert 0 < found["agreement"] <= 1
    same = measure.whole(engine, ids, reference, EXACT, [0, 1, 2, 3])
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert same["agreement"] == 1


# ---- the command -----------------------------------------------------------------------------------------------------


def tune(folder, out, *args, length=LENGTH):
    argv = ["tune", "--model", folder / "model", "--text", folder / "text.txt", "--length", length, "--out", out]
    return command_line.main([str(a) for a in (*argv, "--documents", 1, "--held-out", 1, *args)])


def rows_of(state):
    return [json.loads(line) for line in state.read_text().splitlines()]


def test_the_target_is_kept_to_and_the_file_is_used(folder, tmp_path, capsys):
    out = tmp_path / "tuned.json"
    assert tune(folder, out, "--kl", 0.002) == 0
    said = capsys.readouterr().out
    assert "KL from dense" in said
    assert re.search(r"layers [\d, ]+: ", said)
    configs = dhsa.Config.load(out)
    notes = configs.notes
    assert notes["target"] == {"kl": 0.002}
    assert 0 <= notes["measured"]["tuned"]["kl"] <= 0.002
    assert set(notes["measured"]["tuned"]["documents"]).isdisjoint(notes["held_out"]["tuned"]["documents"])
    assert notes["versions"]["dhsa"] == dhsa.__version__
    # Measured again, it has the same divergence on the text.
    tokenizer, model = commands.load(folder / "model")
    assert configs.model == hf.model_facts(model)
    engine = Engine(model, tokenizer)
    ids = engine.encode((folder / "text.txt").read_text())[:LENGTH]
    found = measure.whole(engine, ids, measure.read(engine, ids), configs, range(4))
    assert found["kl"] == pytest.approx(notes["measured"]["tuned"]["kl"], abs=1e-9)
    with torch.no_grad(), dhsa.patched(model, out):
        model(torch.tensor([ids]))
        for run in dhsa.last_run(model):
            assert (run.path == "sparse") == (configs.at(run.layer) != candidates.EXACT)
    for config in configs.layers.values():
        assert config == candidates.EXACT or 0 < config.break_even <= LENGTH

    # Another target takes what was measured, and more time is no worse.
    before = rows_of(out.with_suffix(".state.jsonl"))
    assert tune(folder, out, "--kl", 0.5) == 0
    assert "measurements exist already" in capsys.readouterr().out
    after = rows_of(out.with_suffix(".state.jsonl"))
    assert after[: len(before)] == before
    assert {row["stage"] for row in after[len(before) :]} <= {"configs"}


def test_each_layer_is_dense_or_sparse(folder, tmp_path, capsys):
    out = tmp_path / "tuned.json"
    assert tune(folder, out, "--kl", 0.002, "--dense-or-sparse", 256) == 0
    configs = dhsa.Config.load(out)
    for config in configs.layers.values():
        assert config.exact or config.replace(break_even=None) == dhsa.Config(budget=256)
    measured = [row["found"]["candidates"] for row in rows_of(out.with_suffix(".state.jsonl")) if "layer" in row
                and "candidates" in row["found"]]  # fmt: skip
    assert measured
    assert {name for found in measured for name in found} == {"default 256"}
    capsys.readouterr()
    assert tune(folder, out, "--kl", 10, "--dense-or-sparse", 640) == 2
    assert "nothing can be left out of 640 tokens" in capsys.readouterr().err


def by_the_numbers(layers, name):
    """What a candidate does in all layers, by the measured numbers."""
    return choose.uniform(list(layers.values()), [name])[name]


def test_no_candidate_alike_in_all_layers_is_better(folder, tmp_path, monkeypatch):
    """Nor is the default at any budget, at the same time on the text, by the numbers that the choice is made from."""
    seen = {}
    options = tuning._Tuning._options

    def spy(self, *args):
        seen["self"], seen["layers"] = self, options(self, *args)
        return seen["layers"]

    monkeypatch.setattr(tuning._Tuning, "_options", spy)
    assert tune(folder, tmp_path / "tuned.json", "--kl", 0.01) == 0
    layers = seen["layers"]
    of = list(layers.values())
    names = [name for name in seen["self"].names if name.startswith("default ")]
    assert names
    for name in seen["self"].names:
        alike = by_the_numbers(layers, name)
        chosen = choose.closest(of, alike.seconds)
        assert chosen is not None
        assert choose.total(of, chosen).kl <= alike.kl * (1 + 1e-9) + 1e-12


class Stopped(Exception):
    pass


def test_it_goes_on_after_an_interruption_at_any_point(folder, tmp_path, monkeypatch):
    """Whatever was measured before is not measured again, and in the end there is the same file as without."""
    add = Store.add
    out = tmp_path / "tuned.json"
    state = out.with_suffix(".state.jsonl")
    stops, finished, before = 0, False, []
    while not finished:
        left = [3]  # more rows, then it is stopped while it writes the next

        def add_some(self, row, left=left):
            if left[0] == 0:
                with open(self.path, "ab") as file:
                    file.write(b'{"key": "half a row')
                raise Stopped
            left[0] -= 1
            add(self, row)

        monkeypatch.setattr(Store, "add", add_some)
        try:
            assert tune(folder, out, "--kl", 0.002) == 0
            finished = True
        except Stopped:
            stops += 1
            assert not out.exists()
        rows = [
            json.loads(line) for line in state.read_text().splitlines() if line.startswith('{"key"') and line[-1] == "}"
        ]
        assert rows[: len(before)] == before
        before = rows
    assert stops >= 4
    keys = [row["key"] for row in before]
    assert len(keys) == len(set(keys))
    monkeypatch.setattr(Store, "add", add)
    first = dhsa.Config.load(out)
    assert tune(folder, out, "--kl", 0.002) == 0  # all is there
    again = dhsa.Config.load(out)
    assert again == first
    assert again.notes["measured"] == first.notes["measured"]


def test_a_share_of_time(folder, tmp_path, capsys):
    """Times of a tiny model hang on the machine: what is written keeps to the target, or the least share is named."""
    out = tmp_path / "tuned.json"
    status = tune(folder, out, "--time", 0.9, length=1500)
    if status == 0:
        notes = dhsa.Config.load(out).notes
        assert notes["measured"]["tuned"]["time"] <= 0.9
    else:
        assert status == 2
        assert "--time: no choice takes 0.9" in capsys.readouterr().err
    assert tune(folder, out, "--time", 0.0001, length=1500) == 2
    assert re.search(r"--time: no choice takes 0\.0001 .* the least is about \d+\.\d\d", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "one of the arguments --kl --time is required"),
        (("--kl", 0.1, "--time", 0.5), "not allowed with argument"),
        (("--kl", 0), "0 is no divergence above 0"),
        (("--kl", "nan"), "nan is no divergence above 0"),
        (("--time", 1), "1 is no share of time"),
        (("--length", 100), "100 is less than 512"),
        (("--kl", 0.1, "--dense-or-sparse", 100), "100 is less than 256"),
        (("--kl", 0.1, "--out", "no/such/file.json"), "--out: there is no folder"),
        (("--kl", 0.1, "--documents", 50), "50 documents"),
        (("--kl", 0.1, "--model", "no/such/model"), "--model: no/such/model does not exist"),
    ],
)
def test_bad_command_lines(folder, tmp_path, capsys, args, message):
    try:
        status = tune(folder, tmp_path / "out.json", *args)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    said = capsys.readouterr().err
    assert message.replace("50 documents", "are needed") in said
    assert not list(tmp_path.iterdir())
