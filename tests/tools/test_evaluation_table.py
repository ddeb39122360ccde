"""`python -m dhsa eval table`: the table of methods. Its numbers are computed by hand from rows that are made here;
then it is run with a tiny model, killed and resumed."""

import json
import math
import re

import numpy as np
import pytest

for name in ("torch", "transformers", "rich", "matplotlib"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

from test_evaluation import evaluate, folder, rows_of  # noqa: E402, F401

from dhsa.evaluation import pairing, settings, store, table  # noqa: E402

BASE = {"model": "m:1", "dtype": "bfloat16", "products": "fp32", "layers": "", "build": "b", "tokens": 90}


def row(task, item, method, given, score, **facts):
    config = {"budget": None if method == "dense" else int(given.replace(",", "")) + 8 * (method == "block")}
    own = {
        "task": task,
        "item": item,
        "method": method,
        "given": given,
        "config": config,
        "score": score,
        "length": 4096,
    }
    return {**BASE, **own, "density": 1.0 if method == "dense" else 0.25, **facts}


def scores(task, **parts):
    """Rows of scores {part: {column: [score of each prompt]}}."""
    field = {"ruler": "kind", "longbench": "dataset"}[task]
    return [
        row(task, f"{part}/{n}", *column, score, **{field: part})
        for part, columns in parts.items()
        for column, values in columns.items()
        for n, score in enumerate(values)
    ]


DENSE, OURS, MORE, BLOCK = ("dense", ""), ("rows", "1,024"), ("rows", "2,048"), ("block", "1,024")


def lines_of(text, title):
    """The cells of the table that follows a title, by the name of the line."""
    body = text.partition(title)[2].strip().partition("\n\n")[0].split("\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body]
    return {line[0]: line[1:] for line in cells if line[0] != "---"}


def test_the_table_by_hand(tmp_path):
    rows = scores(
        "ruler",
        vt={DENSE: [1, 0.6, 1], OURS: [1, 0.8, 0.9], MORE: [1, 0.6, 1], BLOCK: [0.2, 0.4, 0.3]},
        cwe={DENSE: [0.2, 0.6, 0.1], OURS: [1, 1, 1], MORE: [0, 0, 0], BLOCK: [0, 0, 0]},
        fwe={DENSE: [1, 1, 1], OURS: [1, 1, 0], MORE: [1, 1, 1], BLOCK: [0, 1, 0]},
    )
    path, lines, drawn = table.write(rows, tmp_path, "a command")
    text = path.read_text()
    assert text == "\n".join(lines)
    found = lines_of(text, "### RULER, 4,096 tokens")
    assert found["subtask"] == ["dense", "rows 1,024", "rows 2,048", "block 1,024"]
    assert found["vt"] == ["86.7", "90.0", "86.7", "30.0"]
    assert found["cwe †"] == ["30.0", "100.0", "0.0", "0.0"]  # shown, marked, and not in the mean
    assert found["fwe"] == ["100.0", "66.7", "100.0", "33.3"]
    assert found["**mean**"] == ["93.3", "78.3", "93.3", "31.7"]
    assert found["of dense's, %"] == ["100.0", "83.9", "100.0", "33.9"]
    assert found["prompts"] == ["9"] * 4
    assert found["keys"] == ["all", "1,024", "2,048", "1,032"]
    assert found["density, %"] == ["100.00", "25.00", "25.00", "25.00"]

    less = lines_of(text, "Less dense, points:")
    assert less["subtask"] == ["rows 1,024", "rows 2,048", "block 1,024"]
    diffs = {part: [100 * (a - b) for a, b in zip(one, two, strict=True)] for part, one, two in [
        ("vt", [0.2, 0.4, 0.3], [1, 0.6, 1]), ("fwe", [0, 1, 0], [1, 1, 1])]}  # fmt: skip
    errors = {part: np.std(values, ddof=1) / math.sqrt(3) for part, values in diffs.items()}
    assert less["vt"][2] == f"**{np.mean(diffs['vt']):+.1f} ± {errors['vt']:.1f}**"
    assert less["fwe"][2] == f"{np.mean(diffs['fwe']):+.1f} ± {errors['fwe']:.1f}"
    mean, error = np.mean(list(diffs.values())), math.hypot(*errors.values()) / 2
    assert abs(mean) > 2 * error
    assert less["**mean**"][2] == f"**{mean:+.1f} ± {error:.1f}**"
    assert less["vt"][1] == less["fwe"][1] == "+0.0 ± 0.0"
    # The other methods beside the first one at the same budget.
    ours = lines_of(text, "Less rows at the same budget, else at its first, points:")
    assert ours["subtask"] == ["block 1,024"]
    beside = [100 * (a - b) for a, b in zip([0.2, 0.4, 0.3], [1, 0.8, 0.9], strict=True)]
    assert ours["vt"] == [f"**{np.mean(beside):+.1f} ± {np.std(beside, ddof=1) / math.sqrt(3):.1f}**"]
    assert [p.name for p in drawn] == ["table_m_1_bfloat16_ruler_4096.png"]
    assert drawn[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert f"({drawn[0].name})" in text


def test_what_is_marked_and_what_is_missing(tmp_path):
    """Similarities to a summary are below one half as a rule; a prompt alone has no error; prompts may be missing."""
    rows = scores("longbench", multi_news={DENSE: [0.2], OURS: [0.1]}, v2={DENSE: [0.0], OURS: [1.0]})
    rows += scores("ruler", vt={DENSE: [1, 1, 0.5], OURS: [1]})
    text = "\n".join(table.write(rows, tmp_path, "a command")[1])
    found = lines_of(text, "### LongBench, 4,096 tokens")
    assert list(found)[1:4] == ["multi_news", "v2 †", "**mean**"]
    assert found["**mean**"] == ["20.0", "10.0"]
    less = lines_of(text.partition("### LongBench")[2], "Less dense, points:")
    assert (less["multi_news"], less["v2 †"]) == (["-10.0"], ["+100.0"])
    ruler = text.partition("### LongBench")[0]
    assert lines_of(ruler, "### RULER, 4,096 tokens")["prompts"] == ["3", "1"]
    assert lines_of(ruler, "Less dense, points:")["vt"] == ["+0.0"]
    assert "Less rows" not in text  # there is no other method


def test_depths_and_likelihoods(tmp_path):
    rows = []
    for task, facts in (("niah", {"found": True}), ("kv", {})):
        for n, depth in enumerate((0.05, 0.15, 0.95)):
            for column, likely in ((DENSE, -1.0), (OURS, -1.5 - n)):
                rows.append(row(task, f"{n}", *column, 1.0, depth=depth, loglik=likely, **facts))
    text = "\n".join(table.write(rows, tmp_path, "a command")[1])
    for part in text.partition("### Values of keys"):
        if "Of the right answer" in part:
            assert re.findall(r"^\| (\d+ to \d+ %) \|", part, re.M)[:2] == ["0 to 20 %", "80 to 100 %"]
            cells = lines_of(part, "Of the right answer, in nats:")
            assert cells["log-likelihood"] == ["-1.000", "-2.500"]
            assert cells["less dense's"] == ["0", f"**-1.500 ± {1 / math.sqrt(3):.3f}**"]
    assert text.count("Of the right answer") == 2


def test_the_mean_of_parts():
    parts = [pairing.Estimate(1.0, 0.3, 4), pairing.Estimate(4.0, 0.4, 5)]
    mean, error, count = table._over(parts)
    assert (mean, error, count) == (2.5, pytest.approx(0.25), 9)
    assert math.isnan(table._over([*parts, pairing.Estimate(1.0, math.nan, 1)]).error)
    assert table._cell(table._over([])) == "-"


def test_a_table_is_made_resumed_and_written_again(folder, tmp_path, capsys):  # noqa: F811
    """Methods whose blocks differ get the first one's density. A killed run goes on."""
    (tmp_path / "configs.json").write_text(json.dumps({"mine": {"budget": 200}}))
    args = [
        "table,ruler,turns",
        "--methods",
        "rows,window,rows:query_block=256",
        "--budget",
        "128,512",
        "--samples",
        "1",
    ]
    args += ["--lengths", "2048", "--subtasks", "niah_single_2,fwe", "--answer-tokens", "4", "--turns", "2"]
    args += ["--configs", tmp_path / "configs.json", "--dense-tail", "0"]
    assert evaluate(folder, tmp_path, *args) == 0
    rows = rows_of(tmp_path)
    assert {r["task"] for r in rows} == {"density", "ruler", "turns"}
    columns = ["dense", "rows 128", "rows 512", "window 128", "rows:query_block=256 128", "mine 200"]
    text = (tmp_path / "table.md").read_text()
    found = lines_of(text, "### RULER, 2,048 tokens")
    assert found["subtask"] == columns
    assert [name.removesuffix(" †") for name in list(found)[1:3]] == ["niah_single_2", "fwe"]
    prompts = [r for r in rows if r["task"] == "ruler"]
    assert len(prompts) == 2 * len(columns)
    density = {r["method"]: r["density"] for r in rows if r["task"] == "density"}  # the last try of each method
    for method in ("window", "rows:query_block=256"):
        assert density[method] == pytest.approx(density["rows"], rel=0.01)
    budgets = {r["method"]: r["config"]["budget"] for r in prompts if r["given"] == "128"}
    assert budgets["rows"] == 128 < budgets["rows:query_block=256"] - 20
    assert int(found["keys"][4]) == budgets["rows:query_block=256"]
    assert "### Questions after a text was read, 2,048 tokens" in text

    file = tmp_path / "results.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-2]) + lines[-2][:50])
    capsys.readouterr()
    assert evaluate(folder, tmp_path, *args) == 0
    assert list(store.Store(file).rows) == [r["key"] for r in rows]
    assert "10 of 12 results exist already" in capsys.readouterr().out  # of turns
    (tmp_path / "table.md").unlink()
    assert evaluate("no/such/model", tmp_path, "table,report") == 0
    again = (tmp_path / "table.md").read_text()
    assert again.partition("\n## ")[2] == text.partition("\n## ")[2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["table,ppl"], "no task 'ppl' beside table; there are ruler"),
        (["table", "--mass", "0.9"], "--mass: table compares methods at the density"),
        (["table", "--methods", "rows,nope"], "no method 'nope'"),
        (["table,kv", "--methods", "rows,exact", "--budget", "128", "--lengths", "1024"], "exact: no budget gives the"),
    ],
)
def test_bad_tables(folder, args, message, tmp_path, capsys):  # noqa: F811
    assert evaluate(folder, tmp_path, *args) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_tables_settings_are_those_of_config():
    """The default dense tail of a table is that of Config, so that the first method is the default of users."""
    made = settings.setting("rows", 1024, dense_tail=settings.dhsa.Config().dense_tail)
    assert made.config == settings.dhsa.Config(break_even=0)
