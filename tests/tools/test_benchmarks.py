"""The benchmarks' own arithmetic, and that what they measured reaches the document; nothing is timed seriously here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("rich")

import dhsa  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_ratio_sets_a_peer_against_the_calls_around_it():
    from harness import Timing

    # The machine slows to a half in the middle; the peer is always twice as slow as we are at that moment.
    timing = Timing({"a": [1.0, 1.0, 2.0, 2.0], "b": [2.0, 3.0, 4.0]}, {"a": [10.0, 10.0, 5.0, 5.0], "b": []})
    assert timing.ratio("a", "b") == 2.0
    assert timing.share("a", 5e9) == pytest.approx(0.5)


@pytest.mark.parametrize(("value", "at_most", "passes"), [(1.2, False, True), (0.9, False, False), (0.9, True, True)])
def test_a_check_knows_its_direction(value, at_most, passes):
    from harness import check

    assert check("ratio", value, 1.0, "x", at_most=at_most)["pass"] is passes


def test_interleave_takes_turns_and_ends_with_ours():
    from harness import interleave

    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in ("ours", "peer", "slow")}
    timing = interleave(calls, 3, 1, fewer={"slow": 1}, warm=False)
    assert seen == ["ours", "peer", "slow", "ours", "peer", "ours", "peer", "ours"]
    assert {name: len(s) for name, s in timing.seconds.items()} == {"ours": 4, "peer": 3, "slow": 1}


def test_visible_pairs_count_what_a_mask_leaves():
    from peers import visible_pairs

    for length, window in ((7, None), (7, 3), (7, 9), (1, 1)):
        w = window or length
        assert visible_pairs(length, window) == sum(1 for i in range(length) for j in range(i + 1) if j > i - w)


def test_a_job_that_fails_costs_no_other_row(tmp_path, capsys):
    from harness import Job, row, run_jobs

    def fails():
        yield row("dense", "before", torch.float32, "", 1.0)
        raise OSError("no such luck")

    good = Job("dense", "good", lambda: iter([row("dense", "good", torch.bfloat16, "", 2.0)]))
    run_jobs([Job("dense", "bad", fails), good], tmp_path / "r.json", {})
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["complete"]
    assert [r["work"] for r in report["rows"]] == ["before", "bad", "good"]
    assert "no such luck" in report["rows"][1]["error"]
    assert "no such luck" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    again = Job("dense", "good", lambda: iter([row("dense", "good", torch.bfloat16, "", 3.0)]))
    run_jobs([again], tmp_path / "r.json", {}, add=True)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(r["work"], r["seconds"]) for r in rows] == [("before", 1.0), ("bad", None), ("good", 3.0)]


def test_a_run_is_written_and_reaches_the_document(tmp_path):
    pytest.importorskip("matplotlib")
    results, document, picture = tmp_path / "attention.json", tmp_path / "P.md", tmp_path / "p.png"
    env = os.environ | {"PYTHONPATH": str(ROOT)}

    def script(name, *args):
        command = [sys.executable, str(ROOT / "benchmarks" / name), *map(str, args)]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=env).stdout

    short = ("bench_attention.py", "--quick", "--only", "short", "--dtype", "fp32", "--repeats", 1, "--json")
    script(*short, results)
    held = tmp_path / "attention-avx2.json"
    if "avx2" in dhsa.build_info()["isa_detected"]:
        script(*short, held, "--isa", "avx2")
        assert json.loads(held.read_text())["machine"]["isa"] == "avx2"
    report = json.loads(results.read_text())
    assert report["complete"]
    assert not [r["error"] for r in report["rows"] if r.get("error")]
    # The chart's rows take long; their shape is enough here.
    for length in (1024, 2048):
        series = {"dhsa": 1e-6 * length, "exact": 2e-6 * length, "sdpa": 2e-6 * length, "flex": 3e-6 * length}
        report["rows"].append(report["rows"][0] | {"work": "curve", "length": length, "series": series})
    results.write_text(json.dumps(report))
    original = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    document.write_text(original, encoding="utf-8")
    options = ("--attention", results, held, "--model", tmp_path / "none", "--document", document, "--picture", picture)
    script("report.py", *options)
    once = document.read_text(encoding="utf-8")
    script("report.py", *options)
    assert document.read_text(encoding="utf-8") == once
    assert picture.stat().st_size > 10_000
    assert len(re.findall(r"^\| dense, short \| fp32 \| H8/4 D256 128 \|", once, re.M)) == 1 + held.exists()
    outside = re.compile(r"<!-- (attention|attention-avx2) -->.*?<!-- /\1 -->", re.S)
    assert outside.sub("", once) == outside.sub("", original)
