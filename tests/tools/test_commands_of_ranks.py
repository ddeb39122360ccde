"""check, ask and eval under torchrun: two processes print once what one process prints, and refuse what they cannot do
together."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("torch", "transformers", "rich", "matplotlib"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import tiny  # noqa: E402

import dhsa  # noqa: E402
from dhsa import __main__ as command_line  # noqa: E402

TEXT = " ".join(str(n * n) for n in range(400))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a model, file of a text)"""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.build("gemma2").save_pretrained(folder / "model")
    tiny.character_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder / "model", folder / "text.txt"


def environment():
    path = os.pathsep.join([str(Path(dhsa.__file__).parents[1]), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path, "COLUMNS": "160"}


def torchrun(*args):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *start, "-m", "dhsa", *map(str, args)]


def both(args, tmp_path, good=True):
    """What a command prints in two processes, or what it says about an error, and whether it ended well."""
    done = subprocess.run(
        torchrun(*args), cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert good in (None, done.returncode == 0), done.stderr[-3000:]
    return done.stderr if good is False else done.stdout if good else (done.stdout, done.returncode == 0)


def one(args, capsys, good=True):
    status = command_line.main([str(arg) for arg in args])
    said = capsys.readouterr()
    assert good in (None, status == 0)
    return said.err if good is False else said.out if good else (said.out, status == 0)


def test_check(made, tmp_path, capsys):
    tiny.SPARSE.replace(break_even=0).save(tmp_path / "config.json")
    args = ["check", "--model", made[0], "--text", made[1], "--tokens", 300, "--config", tmp_path / "config.json"]
    several, alone = both(args, tmp_path, None), one(args, capsys, None)
    assert "1 threads in each of 2 processes" in several[0]
    assert several[1] == alone[1]

    def layers(text):  # layer, kind, path, density
        return re.findall(r"^\s+(\d+)\s+(full|sliding)\s+(\w+)\s+([\d.]+)%", text, re.M)

    assert [layer[2] for layer in layers(alone[0])] == ["window", "sparse"] * 2
    assert layers(several[0]) == layers(alone[0])


def test_ask(made, tmp_path, capsys, monkeypatch):
    args = ["ask", "What?", "--model", made[0], "--text", made[1], "--budget", 96, "--new-tokens", 8]
    several, alone = both(args, tmp_path), one([*args, "--cache", tmp_path / "kept"], capsys)
    assert several.count("reading") == 1
    assert "The text is not saved: each process has a part of its cache." in several

    def answer(text):
        return re.search(r"([^\n]*)\n8 tokens, [\d.]+ tokens/s", text)[1]

    assert answer(several) == answer(alone)


def test_ask_in_a_terminal(made, tmp_path, capsys):
    args = ["ask", "--model", made[0], "--text", made[1], "--exact", "--new-tokens", 8]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        torchrun(*args), cwd=tmp_path, env=environment(), stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    os.close(slave)
    os.write(master, b"What?\n\nAnd then?\n\x04")
    out, errors = process.communicate(timeout=300)
    os.close(master)
    assert process.returncode == 0, errors[-3000:]
    assert out.count("question>") == 4
    assert out.count("8 tokens, ") == 2


def test_eval(made, tmp_path, capsys):
    args = ["eval", "ppl,niah", "--model", made[0], "--text", made[1], "--lengths", 400, "--budget", 96]
    args += ["--methods", "rows,window", "--documents", 1, "--depths", 1, "--keys", 1, "--generate"]
    out = both([*args, "--out", "several"], tmp_path)
    assert out.count("The run took") == 1
    again = both([*args, "--out", "several"], tmp_path)
    assert "ppl: 3 of 3 results exist already" in again
    one([*args, "--out", tmp_path / "alone"], capsys)
    several, alone = (
        {(row["task"], row["item"], row["method"]): row for row in map(json.loads, text.splitlines())}
        for text in ((tmp_path / name / "results.jsonl").read_text() for name in ("several", "alone"))
    )
    assert len(alone) == 6
    assert several.keys() == alone.keys()
    for key, row in alone.items():
        assert several[key]["processes"] == 2
        assert several[key]["density"] == pytest.approx(row["density"], rel=1e-6)
        for name, value in row.items():
            if isinstance(value, float) and "seconds" not in name:
                assert several[key][name] == pytest.approx(value, rel=1e-2, abs=1e-4), (key, name)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo"], "dhsa demo: is to be started as one process"),
        (["demo-distributed"], "dhsa demo-distributed: is to be started as one process"),
        (["tune", "--kl", "0.1"], "dhsa tune: is to be started as one process"),
        (["train-boundaries", "--out", "x"], "dhsa train-boundaries: is to be started as one process"),
        (["ask", "What?", "--bits", "8"], "several processes save no text"),
        (["ask", "What?", "--cache", "x"], "several processes save no text"),
        (["eval", "table"], "table: is made by one process"),
        (["eval", "ppl,output"], "output: compares the layers of one process"),
        (["eval", "frontier"], "frontier: measures the seconds of one process"),
    ],
)
def test_what_several_processes_refuse(args, message, capsys, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert message in one(args, capsys, False)


def test_methods_that_several_processes_refuse(made, tmp_path):
    args = ["--model", made[0], "--text", made[1], "--budget", 96]
    said = both(["eval", "ppl", "--methods", "rows,dhsa", "--lengths", 300, *args], tmp_path, False)
    assert "dhsa eval: rank" in said
    assert "--methods: dhsa: method: 'dhsa' selects by keys that other ranks hold" in said
    said = both(["ask", "What?", "--method", "dhsa", *args], tmp_path, False)
    assert "dhsa ask: rank" in said
    assert "method: 'dhsa' selects by keys that other ranks hold" in said
