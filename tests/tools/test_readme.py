"""The README: its code runs as printed, the files it names exist, and it stays short.

Models named there are replaced by small ones; its figures are those of the machine it names and are not tested.
"""

import argparse
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from pages import code_of, small_models

import dhsa
from dhsa import ask
from dhsa import run as running

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = code_of(TEXT)


def test_snippet_on_a_model(monkeypatch):
    pytest.importorskip("torch", reason="needs the hf extra: torch")
    pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    model = small_models(monkeypatch)
    monkeypatch.chdir(ROOT)
    (code,) = (s for s in SNIPPETS if "from_pretrained" in s)
    names = {}
    exec(code, names)
    assert names["model"] is model
    runs = dhsa.last_run(model, "prefill")
    assert [(r.kind, r.path) for r in runs] == [("sliding", "window"), ("full", "sparse")]
    assert model.config._attn_implementation != "dhsa"  # patched for the with statement only


def test_command_about_a_text():
    parser = argparse.ArgumentParser()
    ask.add_arguments(parser)
    (line,) = re.findall(r"^`python -m dhsa ask (.*)`$", TEXT, re.M)
    assert parser.parse_args(shlex.split(line)).text.name == "book.txt"


def test_snippet_on_arrays():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, 2500, 16), dtype=np.float32) for h in (2, 1, 1))
    (code,) = (s for s in SNIPPETS if "dhsa.select" in s)
    names = {"q": q, "k": k, "v": v, "dhsa": dhsa}
    exec(code, names)
    assert names["out"].shape == q.shape
    assert 0 < names["selection"].density() < 1
    assert np.array_equal(names["out"], dhsa.attention(q, k, v, dhsa.Config(budget=1024)))


def test_command_that_runs_a_program():
    parser = argparse.ArgumentParser()
    running.add_arguments(parser)
    (line,) = re.findall(r"^`python -m dhsa run (.*)`$", TEXT, re.M)
    args = parser.parse_args(shlex.split(line))
    assert args.replace_sdpa


def test_every_snippet_is_run():
    assert len(SNIPPETS) == 2


def test_files_named_exist():
    named = re.findall(r"`((?:docs|notebooks|benchmarks)/[\w./]+)`|\]\((docs/[^)#]+)", TEXT)
    assert len(named) > 5
    for name in named:
        path = name[0] or name[1]
        assert (ROOT / path).exists(), path


def test_it_fits_on_two_screens():
    lines = TEXT.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120


def test_its_first_commands_are_demo_and_test():
    assert re.findall(r"^make (\w+)", TEXT, re.M)[:2] == ["demo", "test"]
