"""The task `frontier` of `python -m dhsa eval`: rows, the marking of what is beaten, tables and pictures.

The model has random weights; what is checked is that rows, times and marks are what they are said to be.
"""

import json
import math
import re

import pytest

for name in ("torch", "transformers", "rich", "matplotlib"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import torch  # noqa: E402
from test_evaluation import engine, evaluate, folder, rows_of  # noqa: E402, F401

import dhsa  # noqa: E402
from dhsa.commands import UserError  # noqa: E402
from dhsa.evaluation import report, runner, settings, tasks, texts  # noqa: E402
from dhsa.evaluation.tasks import frontier  # noqa: E402
from dhsa.evaluation.tasks.frontier import Point  # noqa: E402
from dhsa.hf import LayerRun  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "configs.json"
    fields = {"budget": 96, "sink": 4, "local": 16, "dense_tail": 8, "break_even": 0}
    path.write_text(json.dumps({"mine": {**fields, "heads": "head"}, "whole": {"budget": None}}))
    return path


ARGS = ("frontier", "--methods", "rows,window", "--budget", "96,160", "--lengths", "400", "--documents", "5")


# ---- the whole command -----------------------------------------------------------------------------------------------


def test_rows_resumed(folder, engine, named, tmp_path, capsys):  # noqa: F811
    args = [*ARGS, "--configs", named]
    assert evaluate(folder, tmp_path, *args, "--only", "quality") == 0
    assert "No time has been measured" in capsys.readouterr().out
    quality = rows_of(tmp_path)
    assert len(quality) == 5 * 7 == len({r["key"] for r in quality})
    assert [r["half"] for r in quality] == ["choice"] * 21 + ["held-out"] * 14
    assert [r["method"] for r in quality[:7]] == ["dense", "rows", "window", "rows", "window", "mine", "whole"]
    assert {(r["tokens"], r["scored"], r["part"]) for r in quality} == {(400, 200, "quality")}
    assert len({r["prompt"] for r in quality}) == len({r["item"] for r in quality}) == 5
    assert not list(tmp_path.glob("*.png"))

    # A row against the logits of transformers' own forward, in float64.
    row = next(r for r in quality if r["method"] == "mine")
    config = dhsa.Config(budget=96, sink=4, local=16, dense_tail=8, break_even=0, heads="head")
    assert row["config"] == settings.Setting("mine", config).fields()
    one, other = texts.halves(texts.sources(None))
    documents = [d for part, n in ((one, 3), (other, 2)) for d in texts.documents(engine, part, 400, count=n)]
    assert [runner.prompt_hash(d.ids) for d in documents] == [r["prompt"] for r in quality[::7]]
    ids = torch.tensor([documents[0].ids])
    with torch.no_grad():
        p = engine.model(ids).logits[0, 199:-1].double().log_softmax(-1)
        with dhsa.patched(engine.model, config):
            q = engine.model(ids).logits[0, 199:-1].double().log_softmax(-1)
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6)
    assert row["agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    for r in quality:
        assert (r["kl"], r["agreement"]) == (0, 1) if r["method"] in ("dense", "whole") else r["kl"] > 1e-5

    # Times are measured without the quality again, and stand beside it.
    assert evaluate(folder, tmp_path, *args, "--only", "time") == 0
    rows = rows_of(tmp_path)
    assert rows[: len(quality)] == quality
    times = rows[len(quality) :]
    assert [r["method"] for r in times] == ["dense", "rows", "window", "rows", "window", "mine", "whole"]
    for r in times:
        assert (r["part"], r["threads"], r["isa"]) == ("time", dhsa.get_num_threads(), dhsa.build_info()["isa"])
        assert (r["prompt"], len(r["rounds"]), r["repetitions"]) == (quality[0]["prompt"], 3, 3)
        select, attend, whole = (sorted(column)[1] for column in zip(*r["rounds"], strict=True))
        assert (r["select_seconds"], r["attend_seconds"], r["dense_seconds"]) == (select, attend, whole)
        assert r["share"] == sorted((s + a) / d for s, a, d in r["rounds"])[1] > 0
        assert (select > 0) == (r["method"] not in ("dense", "whole"))
    assert [r["share"] for r in times if r["method"] == "dense"] == [1]

    # The same command: nothing is left to do. A row that is lost is measured again, alone.
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if r is not rows[-2]))
    capsys.readouterr()
    assert evaluate(folder, tmp_path, *args) == 0
    assert "41 of 42 results exist already" in capsys.readouterr().out
    again = rows_of(tmp_path)
    assert again[:-1] == [r for r in rows if r is not rows[-2]]
    assert (again[-1]["key"], again[-1]["method"]) == (rows[-2]["key"], "mine")
    assert evaluate(folder, tmp_path, *args) == 0
    assert rows_of(tmp_path) == again
    # Other numbers of threads and rounds are other times, and the same quality.
    capsys.readouterr()
    assert evaluate(folder, tmp_path, *args, "--repetitions", "4") == 0
    assert "35 of 42 results exist already" in capsys.readouterr().out

    table = (tmp_path / "report.md").read_text()
    assert re.findall(r"^(All documents|Documents of the half .*):$", table, re.M) == [
        "All documents", "Documents of the half choice", "Documents of the half held-out",
    ]  # fmt: skip
    lines = re.findall(r"^\| (\w+) \| (all|96|160) \| (-|beaten|\*\*yes\*\*) \|.* (\d+) \|$", table, re.M)
    assert len(lines) == 21
    assert sorted({count for *_, count in lines}) == ["2", "3", "5"]
    assert re.search(
        r"^\| dense \| all \| \S+ \| 1.000 \| 0.000 \| \S+ \| 0 \| 100 \| 0 \| 100.00 % \| 5 \|$", table, re.M
    )
    assert re.search(rf"^Times: .*, {dhsa.get_num_threads()} threads, 4 rounds, dense attention", table, re.M)
    (picture,) = tmp_path.glob("*.png")
    assert picture.name.startswith(f"frontier_{folder.name}-")
    assert f"({picture.name})" in table
    assert picture.read_bytes()[:8] == PNG


def test_halves_of_the_documents(folder, tmp_path):  # noqa: F811
    for half, count in (("held-out", 2), ("choice", 3)):
        out = tmp_path / half
        assert evaluate(folder, out, *ARGS, "--half", half, "--only", "quality") == 0
        assert {(r["half"], r["part"]) for r in rows_of(out)} == {(half, "quality")}
        assert len({r["item"] for r in rows_of(out)}) == count
        assert re.findall(r"^(All|Documents of the half \S+)", (out / "report.md").read_text(), re.M) == [
            f"Documents of the half {half}:"
        ]
    ids = [{r["prompt"] for r in rows_of(tmp_path / half)} for half in ("held-out", "choice")]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--half", "half"], "invalid choice: 'half'"),
        (["--only", "kl"], "invalid choice: 'kl'"),
        (["--repetitions", "2"], "2 is less than 3"),
        (["--skip", "1"], "--skip: not with frontier"),
        (["--documents", "1", "--half", "held-out"], "--documents: the held-out half of 1 is none"),
        (["--configs", "no/such.json"], "--configs: no/such.json: .*No such file"),
    ],
)
def test_bad_command_lines(folder, args, message, tmp_path, capsys):  # noqa: F811
    try:
        code = evaluate(folder, tmp_path, "frontier", "--lengths", "400", *args)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "results.jsonl").exists()


# ---- times -----------------------------------------------------------------------------------------------------------


def test_seconds_are_those_of_the_same_layers():
    def run(layer, kind, path, select, attend):
        return LayerRun(layer, kind, "prefill", path, 1.0, select, attend, (1, 1, 1, 1), (1, 1, 1, 1))

    kinds = ["sliding", "full", "sliding", "full"]
    exact = {i: run(i, kind, "dense", 0.0, 10.0 * (i + 1)) for i, kind in enumerate(kinds)}
    paths = ["window", "sparse", "sparse", "dense"]  # a layer that slides and is sparse; a full one that is not
    own = {i: run(i, kinds[i], paths[i], 0.25, 1.0 + i) for i in range(4)}
    assert frontier._seconds(own, exact, None) == (0.75, 2 + 3 + 4, 20 + 30 + 40)
    assert frontier._seconds(own, exact, frozenset([0, 1])) == (0.25, 2, 20)
    assert frontier._seconds(exact, exact, None) == (0, 20 + 40, 20 + 40)
    slides = {i: r._replace(kind="sliding") for i, r in exact.items()}
    assert frontier._seconds(slides, slides, None) == (0, 100, 100)


def test_rounds_go_round_all_settings(engine, monkeypatch):  # noqa: F811
    """In turns, dense first, one round more than is counted, and no layer replayed."""
    order, prefill = [], engine.prefill

    def watched(ids, setting, **options):
        order.append(setting.label)
        made = prefill(ids, setting, **options)
        assert made[1]["replayed_layers"] == 0
        return made

    monkeypatch.setattr(engine, "prefill", watched)
    monkeypatch.setattr(frontier, "_load", iter([0.5, 9.0]).__next__)
    item = tasks.Item("x", list(range(1, 90)) * 4, {"part": "time", "repetitions": 3})
    made = list(frontier.measure(engine, item, [settings.setting(s, 96) for s in ("rows", "window")]))
    assert order == ["dense", "rows", "window"] * 4
    assert [(s.label, facts["load"]) for s, facts in made] == [("rows", 9.0), ("window", 9.0)]


def test_a_busy_machine_is_told():
    row = {"machine": "M", "isa": "avx2", "threads": 2, "repetitions": 3, "dense_seconds": 1.5, "load": 2.25}
    assert frontier._times_said([row]) == [
        "Times: M, avx2, 2 threads, 3 rounds, dense attention 1.500 s, load average 2.2.", "",
    ]  # fmt: skip
    assert "load average was above" in "".join(frontier._times_said([row, {**row, "load": 2.75}]))
    assert frontier._times_said([{**row, "load": None}])[0].endswith("dense attention 1.500 s.")


# ---- the frontier ----------------------------------------------------------------------------------------------------


def test_what_is_beaten():
    spread = {"a": 0.0, "b": 0.01, "c": 0.02}  # between documents: cancels in pairs

    def point(share, kl, noise=0.0):
        return Point(share, {name: kl + v + noise * n for n, (name, v) in enumerate(spread.items())})

    points = {
        "dense": Point(1.0, dict.fromkeys(spread, 0.0)),
        "fast": point(0.2, 0.3),
        "good": point(0.5, 0.02),
        "slower": point(0.6, 0.021),
        "as fast and worse": point(0.5, 0.03),
        "slower and better": point(0.7, 0.01),
        "within the error": point(0.8, 0.009, 0.01),  # 0.009, 0.019, 0.029 above: -0.001, 0.009, 0.019 worse
        "slower than dense": point(1.1, 0.02),
        "no time": point(math.nan, 0.5),
    }
    assert frontier.off_frontier(points) == {"slower", "as fast and worse", "slower than dense"}
    # On one document there is no error, so nothing is sure.
    assert frontier.off_frontier({n: Point(p.share, {"a": p.kl["a"]}) for n, p in points.items()}) == set()


def constructed():
    """Rows of two halves of two documents: "b" beats "c" on the documents for choosing, not on those held out."""
    base = {"model": "m/x:1", "dtype": "float32", "products": "fp32", "layers": "", "task": "frontier", "build": "b"}
    base |= {"length": 512, "tokens": 512, "config": {}, "machine": "M", "isa": "avx2", "threads": 2}
    kls = {"dense": [0, 0, 0, 0], "a": [0.5, 0.6, 0.5, 0.6], "b": [0.1, 0.2, 0.3, 0.2], "c": [0.2, 0.301, 0.3, 0.1]}
    shares = {"dense": 1.0, "a": 0.2, "b": 0.4, "c": 0.6}
    rows = []
    for name, values in kls.items():
        own = {**base, "method": name, "given": "" if name == "dense" else "64"}
        for n, kl in enumerate(values):
            facts = {"part": "quality", "half": frontier.HALVES[n // 2], "item": f"{n}", "nll": 2 + n + kl / 10}
            rows.append({**own, **facts, "kl": kl, "agreement": 1 - kl, "density": 0.25})
        times = {"select_seconds": 0.1, "attend_seconds": 0.2, "dense_seconds": 0.5, "load": 1.0}
        rows.append({**own, "part": "time", "item": "t", "share": shares[name], "repetitions": 3, **times})
    return rows


def test_tables_of_constructed_rows(tmp_path):
    lines = frontier.tables(constructed())
    marks = [re.findall(r"^\| (\w+) \| \S+ \| (\S+) \|", part, re.M) for part in "\n".join(lines).split("Documents of")]
    names = ["a", "b", "c", "dense"]  # by time
    everything, choice, held_out = (dict(m for m in part if m[0] in names) for part in marks)
    assert [list(part) for part in (everything, choice, held_out)] == [names] * 3
    assert [name for name in names if choice[name] == "beaten"] == ["c"]
    assert {*held_out.values(), *everything.values()} == {"**yes**"}
    row = next(line for line in lines if line.startswith("| b |"))
    # KL: mean of 0.1 0.2 0.3 0.2, its error; agreement; NLL a tenth of KL; density
    assert row == (
        "| b | 64 | **yes** | 0.400 | 0.100 | 0.200 | 0.2000 ± 0.0408 | 80.0 ± 4.1 | 0.0200 ± 0.0041 | 25.00 % | 4 |"
    )
    busy = [{**r, "load": 7.0} if r["part"] == "time" else r for r in constructed()]
    assert "load average was above" in "\n".join(frontier.tables(busy))
    # Times of two machines are two tables and two pictures; without times, or without quality, what there is.
    both = constructed() + [{**r, "threads": 1} for r in constructed() if r["part"] == "time"]
    assert sum(line.startswith("### Frontier") for line in frontier.tables(both)) == 2
    assert [p.name for p in frontier.pictures(both, tmp_path)] == [
        "frontier_m-x-1_float32_fp32_512.png", "frontier_m-x-1_float32_fp32_512_2.png",
    ]  # fmt: skip
    assert all(p.read_bytes()[:8] == PNG for p in tmp_path.glob("*.png"))
    quality = [r for r in constructed() if r["part"] == "quality"]
    assert "| b | 64 | - | - | - | - | 0.2000" in "\n".join(frontier.tables(quality))
    assert frontier.pictures(quality, tmp_path) == []
    assert "No quality has been measured." in frontier.tables([r for r in constructed() if r["part"] == "time"])
    assert len(report.newest(constructed())[0]) == len(constructed())


def test_the_picture_shows_what_is_beaten(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from dhsa.evaluation import pictures

    drawn, plot = [], Axes.plot

    def watched(self, x, y, *args, **options):
        drawn.append((list(x), list(y), options.get("markerfacecolor"), options.get("color")))
        return plot(self, x, y, *args, **options)

    monkeypatch.setattr(Axes, "plot", watched)
    spots = [
        pictures.Spot("rows", "64", 0.2, 0.5, 0.1, True),
        pictures.Spot("rows", "128", 0.4, 0.02, 0.03, True),  # an error beyond its value
        pictures.Spot("window", "64", 0.5, 0.7, math.nan, False),
        pictures.Spot("window", "128", 0.6, 0.03, 0.03, True),  # within its error of what is faster
    ]
    path = pictures.frontier(spots, tmp_path / "f.png", "title")
    assert path.read_bytes()[:8] == PNG
    assert drawn[0][:2] == ([20.0, 40.0], [0.5, 0.02])  # the line of the frontier
    hollow = [d for d in drawn if d[2] == pictures._PAPER and d[0]]
    assert [d[:2] for d in hollow] == [([50.0], [0.7])]
    filled = [d for d in drawn if d[2] is not None and d[2] == d[3] and d[0]]
    assert [d[:2] for d in filled] == [([20.0, 40.0], [0.5, 0.02]), ([60.0], [0.03])]


# ---- configs, chats, halves ------------------------------------------------------------------------------------------


def test_named_configs(tmp_path):
    path = tmp_path / "configs.json"
    path.write_text('{"a": {"budget": 512, "method": "window"}, "b": {"mass": 0.9, "budget": null}, "c": {}}')
    assert settings.named(path) == [
        settings.Setting("a", dhsa.Config(budget=512, method="window"), 512),
        settings.Setting("b", dhsa.Config(budget=None, mass=0.9), None, 0.9),
        settings.Setting("c", dhsa.Config(), dhsa.Config().budget),
    ]
    for text, message in [
        ("{", "--configs: .*configs.json: Expecting property name"),
        ("[]", "expected an object of named objects"),
        ("{}", "expected an object of named objects"),
        ('{"a": 3}', "expected an object of named objects"),
        ('{"dense": {}}', "a config cannot be named 'dense'"),
        ('{"a|b": {}}', r"a config cannot be named 'a\|b'"),
        ('{"a": {"budgte": 3}}', "configs.json: a: .*budgte"),
        ('{"a": {"budget": -3}}', "configs.json: a: budget: "),
        ('{"a": {"predictor": "no/such"}}', "--configs: .*configs.json: a: predictor: "),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            settings.named(path)


def test_configs_alone_and_beside_methods(folder, named, tmp_path, capsys):  # noqa: F811
    args = ["ppl", "--lengths", "300", "--documents", "1", "--configs", named]
    assert evaluate(folder, tmp_path, *args) == 0
    assert [r["method"] for r in rows_of(tmp_path)] == ["dense", "mine", "whole"]
    capsys.readouterr()
    assert evaluate(folder, tmp_path, *args, "--budget", "96") == 2
    assert "--budget and --mass are for --methods, and none is given" in capsys.readouterr().err
    named = tmp_path / "same.json"
    named.write_text('{"rows": {}}')
    assert evaluate(folder, tmp_path, *args[:-1], named, "--methods", "rows") == 2
    assert "rows is one of --methods as well" in capsys.readouterr().err


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'none' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


def test_chats_are_rendered_by_the_template(engine, tmp_path, monkeypatch):  # noqa: F811
    said = [{"role": "user", "content": "What?", "id": 3}, {"role": "assistant", "content": "That."}]
    text = "<user>What?\n<assistant>That.\n"
    files = {
        "a.json": said, "b.json": {"messages": said}, "c.json": [said, {"messages": said}],
    }  # fmt: skip
    for name, held in files.items():
        (tmp_path / name).write_text(json.dumps(held))
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(m) + "\n" for m in said))
    (tmp_path / "e.jsonl").write_text(json.dumps({"messages": said}) + "\n" + json.dumps({"text": "plain"}))
    groups = texts.sources([tmp_path])
    assert engine.tokenizer.chat_template is None
    with pytest.raises(UserError, match=r"--text: a\.json is a chat, and the model's tokenizer has no chat template"):
        texts.rendered(engine, groups)
    monkeypatch.setattr(engine.tokenizer, "chat_template", TEMPLATE)
    assert texts.rendered(engine, groups) == [
        [(name, text) for name in ("a.json", "b.json:1", "c.json:1", "c.json:2", "d.jsonl", "e.jsonl:1")]
        + [("e.jsonl:2", "plain")]
    ]
    # What every document begins with is not there twice.
    monkeypatch.setattr(engine, "prefix", engine.encode("<u"))
    assert texts.rendered(engine, groups)[0][0] == ("a.json", text[2:])
    (tmp_path / "a.json").write_text(json.dumps([{"role": "none", "content": ""}]))
    with pytest.raises(UserError, match=r"--text: a\.json: the model's chat template refuses it: no such role"):
        texts.rendered(engine, texts.sources([tmp_path / "a.json"]))
    for held, message in [
        ("{", "no JSON"),
        ("[]", "no text in .*a.json"),
        ("[3]", "a.json:1: expected a list of messages, got 3"),
        ('{"messages": []}', "a.json:1: expected a list of messages"),
        ('[{"role": "user", "content": "a"}, {"role": "user"}]', "message 2: expected an object with the strings role"),
        ('{"messages": [{"role": 1, "content": "a"}]}', "message 1: expected an object with the strings role"),
        ('{"a": 1}', "a.json:1: no context, text or messages"),
    ]:
        (tmp_path / "a.json").write_text(held)
        with pytest.raises(UserError, match=message):
            texts.sources([tmp_path / "a.json"])


def test_halves_share_no_text():
    lines = "".join(f"{n}\n" for n in range(100))
    one, other = texts.halves([[("a", "1"), ("b", "2"), ("c", "3")], [("book", lines)], [("x", "abcd")]])
    assert one[0] == [("a", "1"), ("c", "3")]
    assert other[0] == [("b", "2")]
    (first,), (second,) = one[1], other[1]
    assert (first[0], second[0]) == ("book, first half", "book, second half")
    assert first[1] + second[1] == lines
    assert first[1].endswith("\n")
    assert abs(len(first[1]) - len(second[1])) < 8
    assert (one[2], other[2]) == ([("x, first half", "ab")], [("x, second half", "cd")])
