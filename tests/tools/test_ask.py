"""`python -m dhsa ask` on tiny models of random weights: the text goes through the model once, answers are those of a
prompt read whole, and the folder of saved texts is listed, limited and emptied."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

for name in ("torch", "transformers", "rich", "safetensors"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny import build  # noqa: E402

import dhsa  # noqa: E402
from dhsa import __main__ as command_line  # noqa: E402
from dhsa import ask, commands  # noqa: E402

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}<answer>"


def save(folder, family="gemma2", template=None):
    """A model of `tiny.py` with a tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {chr(c): c - 32 for c in range(32, 127)} | {"\n": 95, "<unk>": 96}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    build(family).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a model without a template, of one with a template, text)"""
    folder = tmp_path_factory.mktemp("ask")
    text = folder / "a book.txt"
    text.write_text("".join(chr(int(c)) for c in np.random.default_rng(0).integers(33, 127, 700)))
    return save(folder / "plain"), save(folder / "chat", "qwen3", TEMPLATE), text


@pytest.fixture
def passed(monkeypatch):
    """[(tokens, ...)] that went through each model that was loaded; and the models."""
    seen, load = [], commands.load

    def loaded(*args):
        tokenizer, model = load(*args)
        seen.append([])
        model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: seen[-1].append(ids[0].shape[1]))
        seen.model, seen.tokenizer = model, tokenizer
        return tokenizer, model

    class Seen(list):
        model = tokenizer = None

    seen = Seen()
    monkeypatch.setattr(commands, "load", loaded)
    return seen


@pytest.fixture
def command(made, tmp_path, monkeypatch, capsys):
    """command(...) -> (exit status, printed lines), with folder tmp_path / "kept" and a small budget."""
    monkeypatch.setattr(ask, "PIECE", 256)

    def run(*args, text=made[2], model=made[0], cache=tmp_path / "kept"):
        argv = ["ask", "--model", model, "--text", text, "--cache", cache, "--new-tokens", 12, *args]
        argv += [] if {"--exact", "--budget", "--config"} & set(args) else ["--budget", 96]
        status = command_line.main([str(a) for a in argv])
        return status, capsys.readouterr()

    return run


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "kept").iterdir())


@pytest.mark.parametrize("templated", [False, True])
def test_the_text_is_read_once(templated, made, command, passed, tmp_path):
    model = made[templated]
    status, first = command("What?", model=model)
    assert status == 0
    assert "reading 7" in first.out
    assert sum(passed[0]) > 700
    assert max(passed[0]) == 256
    (name,) = kept(tmp_path)
    assert re.fullmatch(r"a-book-[0-9a-f]{12}\.prompt\.safetensors", name)
    status, second = command("What?", model=model)
    assert status == 0
    assert "reading" not in second.out
    assert re.search(r"7\d\d tokens of .* opened in 0\.\d\d s", second.out)
    tail = "What?</><answer>" if templated else "Question: What?\nAnswer:"
    assert passed[1] == [len(tail)] + [1] * 11
    answers = [re.split(r"opened in .* s\.\n|tokens/s 0:00:00\s*\n", said.out)[-1] for said in (first, second)]
    assert re.sub(r"[\d.]+ tokens/s", "", answers[0]) == re.sub(r"[\d.]+ tokens/s", "", answers[1])
    # The answer of the whole prompt in one piece, exact.
    text = made[2].read_text()
    head = f"<user>{text}\n\n" if templated else f"{text}\n\n"
    ids = passed.tokenizer(head + tail, return_tensors="pt").input_ids
    status, exact = command("What?", "--exact", model=model)
    with torch.no_grad():
        out = build("qwen3" if templated else "gemma2").generate(ids, max_new_tokens=12, do_sample=False)
    expected = passed.tokenizer.decode(out[0, ids.shape[1] :])
    assert expected.split("\n\n")[0] in exact.out
    assert len(kept(tmp_path)) == 2  # the configuration is part of what a text is kept by


def test_configs_of_a_file(made, command, passed, tmp_path):
    exact, layer = dhsa.Config(budget=None), dhsa.Config(budget=96, dense_tail=0, break_even=0)
    for name, layers in (("one", {1: layer}), ("two", {3: layer})):
        dhsa.LayerConfigs(default=exact, layers=layers).save(tmp_path / f"{name}.json")
        assert command("What?", "--config", tmp_path / f"{name}.json")[0] == 0
        assert [run.path for run in dhsa.last_run(passed.model, "prefill")].count("sparse") == 1
    assert len(kept(tmp_path)) == 2  # the configs are part of what a text is kept by
    dhsa.LayerConfigs(default=exact, layers={}, model={"head_dim": 5}).save(tmp_path / "other.json")
    status, said = command("What?", "--config", tmp_path / "other.json")
    assert status == 2
    assert "--model: config: made for a model with head_dim 5, but this one has 32" in said.err


@pytest.mark.parametrize(
    "change",
    [
        {"args": ("--bits", "8")},
        {"args": ("--dtype", "bfloat16")},
        {"args": ("--budget", "128")},
        {"args": ("--method", "window")},
        {"args": ("--tokens", "300")},
        {"model": 1},
        {"text": "other"},
    ],
    ids=str,
)
def test_what_a_text_is_kept_by(change, made, command, passed, tmp_path):
    command("What?")
    text = tmp_path / "other.txt"
    text.write_text(made[2].read_text() + "!")
    options = {"model": made[1]} if "model" in change else {"text": text} if "text" in change else {}
    for known in (False, True):
        status, said = command("What?", *change.get("args", ()), **options)
        assert status == 0
        assert ("opened in" in said.out) == known
    assert len(kept(tmp_path)) == 2
    assert (sum(passed[1]) > 300) > (sum(passed[2]) > 300)


def in_a_terminal(monkeypatch, *lines):
    """Gives the lines as input, then the end of the file. A KeyboardInterrupt among them is raised."""
    given = iter(lines)

    def asked(prompt):
        line = next(given, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)


def test_questions_in_a_terminal(command, passed, monkeypatch):
    in_a_terminal(monkeypatch, "Why?", "", "Who?")
    status, said = command()
    assert status == 0
    assert said.out.count("tokens/s\n") >= 2
    counts = [n for n in passed[0] if n not in (1, 256)]
    assert counts[1:] == [len("Question: Why?\nAnswer:"), len("Question: Who?\nAnswer:")]  # the first ends the text
    monkeypatch.undo()


def test_each_question_is_asked_of_the_text_alone(command, passed, monkeypatch):
    in_a_terminal(monkeypatch, "Who?", "Why?")
    _, several = command("What?")
    in_a_terminal(monkeypatch, KeyboardInterrupt)
    _, one = command("Why?")
    answer = re.split(r"opened in .* s\.\n", one.out)[1].split("tokens,")[0]
    assert answer.strip()
    assert answer.strip() in several.out


def test_an_interrupted_answer_leads_to_the_next_question(command, passed, monkeypatch):
    count, original = [], ask._Prompt.question

    def question(self, text):
        count.append(text)
        if len(count) == 1:
            raise KeyboardInterrupt
        return original(self, text)

    monkeypatch.setattr(ask._Prompt, "question", question)
    in_a_terminal(monkeypatch, "Why?")
    status, said = command("What?")
    assert (status, count) == (0, ["What?", "Why?"])
    assert "tokens/s" in said.out


def test_a_text_deleted_between_questions_is_read_again(command, passed, monkeypatch, tmp_path):
    in_a_terminal(monkeypatch, "Why?")
    asked = input

    def deleted(prompt):
        for path in (tmp_path / "kept").iterdir():
            path.unlink()
        return asked(prompt)

    monkeypatch.setattr("builtins.input", deleted)
    status, said = command("What?")
    assert status == 0
    assert said.out.count("tokens/s\n") >= 2
    assert sum(passed[0]) > 2 * 700
    assert kept(tmp_path) == []


def test_a_text_that_is_too_large_is_not_written(command, passed, monkeypatch, tmp_path):
    from dhsa.hf import saved

    command("What?")
    (path,) = (tmp_path / "kept").iterdir()
    size = path.stat().st_size
    assert "opened in" in command("What?", "--max-size", (size - 1) / 1e9)[1].out  # what is saved may be used
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(saved, "_pieces", lambda *_: (pytest.fail("it is written") for _ in "1"))
        status, said = command("What?", "--max-size", (size - 1) / 1e9)
    assert status == 0
    assert "The text is not saved: it takes " in said.out
    assert "tokens/s" in said.out
    command("What?", "--max-size", (size + 1) / 1e9)
    assert [each.stat().st_size for each in (tmp_path / "kept").iterdir()] == [size]


def test_a_cache_that_eight_bits_cannot_hold(command, passed, monkeypatch, tmp_path):
    read = ask._read

    def infinite(*args):
        cache = read(*args)
        cache.layers[1].values[0, 0, 7, 3] = torch.inf
        return cache

    monkeypatch.setattr(ask, "_read", infinite)
    status, said = command("What?", "--bits", "8")
    assert status == 0
    assert "The text is not saved: bits: layers.1.values has numbers that are not finite" in said.out
    assert "tokens/s" in said.out
    assert kept(tmp_path) == []


@pytest.mark.parametrize("where", ["reading", "saving"])
def test_ctrl_c_leaves_no_half_file(where, made, command, passed, monkeypatch, tmp_path):
    from dhsa.hf import compat, saved

    with monkeypatch.context() as patch:
        if where == "reading":
            patch.setattr(compat, "cache_option", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        else:
            patch.setattr(saved, "_pieces", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        status, said = command("What?")
    assert (status, said.err) == (130, "dhsa ask: stopped\n")
    assert not (tmp_path / "kept").exists() or kept(tmp_path) == []
    assert command("What?")[0] == 0
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"!" + b[41:]])
def test_a_damaged_file_is_replaced(damage, command, passed, tmp_path):
    command("What?")
    (path,) = (tmp_path / "kept").iterdir()
    data = path.read_bytes()
    path.write_bytes(damage(data))
    status, said = command("--list")
    assert (status, "damaged" in said.out) == (0, True)
    status, said = command("What?")
    assert status == 0
    assert re.search(
        r"a-book-\w+\.prompt\.safetensors: (is cut short|has metadata).*; the text is read again\.", said.out
    )
    assert sum(passed[-1]) > 700
    assert path.read_bytes() == data
    assert "opened in" in command("What?")[1].out


def test_a_damaged_index_is_an_error_of_the_user(command, passed, tmp_path):
    from dhsa.hf.saved import read_header

    dhsa.Config(budget=96, break_even=0).save(tmp_path / "sparse.json")
    command("What?" * 40, "--config", tmp_path / "sparse.json")
    (path,) = (tmp_path / "kept").iterdir()
    data = bytearray(path.read_bytes())
    with open(path, "rb") as file:
        _, entries = read_header(file)
    entry = next(e for name, e in entries.items() if ".index." in name)
    data[entry.start] ^= 1
    path.write_bytes(data)
    status, said = command("What?" * 40, "--config", tmp_path / "sparse.json")
    assert status == 2
    assert re.search(r"dhsa ask: .*the key index of a layer is damaged.*delete it by --forget", said.err)


def test_a_folder_that_cannot_be_made(command, passed, tmp_path):
    (tmp_path / "file").write_text("")
    status, said = command("What?", cache=tmp_path / "file")
    assert status == 0
    assert "The text is not saved: " in said.out
    assert "tokens/s" in said.out
    assert (tmp_path / "file").read_text() == ""


def test_list_and_forget(made, command, passed, tmp_path):
    assert "No saved texts in " in command("--list")[1].out
    command("What?")
    command("What?", "--bits", "8")
    (tmp_path / "kept" / "model.safetensors").write_bytes(b"of someone else")
    names = [name.removesuffix(ask.SUFFIX) for name in kept(tmp_path) if name.endswith(ask.SUFFIX)]
    said = command("--list")[1].out
    assert all(name in said for name in names)
    assert said.count("702") == 2
    assert "plain" in said
    assert len(passed) == 2  # neither loads a model
    status, said = command("--forget", names[0])
    assert (status, said.out) == (0, f"Deleted {names[0]}.\n")
    assert kept(tmp_path) == sorted([names[1] + ask.SUFFIX, "model.safetensors"])
    status, said = command("--forget", names[0])
    assert (status, "--forget: no saved text" in said.err) == (2, True)
    assert command("--forget", "all")[0] == 0
    assert command("--forget", "all")[0] == 0
    assert kept(tmp_path) == ["model.safetensors"]


def test_the_oldest_are_deleted_first(made, command, passed, tmp_path):
    texts = []
    for i in range(3):
        texts.append(tmp_path / f"t{i}.txt")
        texts[-1].write_text(made[2].read_text()[i:])
        command("What?", text=texts[-1])
        (path,) = (tmp_path / "kept").glob(f"t{i}-*")
        os.utime(path, (1000 + i, 1000 + i))
    size = max(path.stat().st_size for path in (tmp_path / "kept").iterdir())
    assert "opened in" in command("What?", text=texts[0])[1].out  # which is then the latest
    command("What?", "--max-size", 3.5 * size / 1e9)
    assert [name.split("-")[0] for name in kept(tmp_path)] == ["a", "t0", "t2"]
    status, said = command("What?", "--bits", "8", "--max-size", "0")
    assert status == 0
    assert re.search(r"The text is not saved: it takes [\d.]+ MB, --max-size is 0\.0 MB", said.out)
    assert [name.split("-")[0] for name in kept(tmp_path)] == ["a", "t0", "t2"]


def test_files_that_are_being_written_are_no_saved_texts(command, passed, tmp_path):
    command("What?")
    (name,) = kept(tmp_path)
    part = tmp_path / "kept" / f".123.{name}"  # the name that a process writes to
    part.write_bytes(bytes(10**7))
    assert ".123." not in command("--list")[1].out
    command("What?", "--bits", "8", "--max-size", "0.009")
    assert len(kept(tmp_path)) == 3
    assert command("--forget", part.name.removesuffix(ask.SUFFIX))[0] == 2
    assert command("--forget", "all")[0] == 0
    assert kept(tmp_path) == [part.name]


def test_files_that_another_process_deletes(command, passed, monkeypatch, tmp_path):
    for budget in (96, 97):
        command("What?", "--budget", budget)
    folder, notes = tmp_path / "kept", ask._notes
    names = [name.removesuffix(ask.SUFFIX) for name in kept(tmp_path)]

    def deleted(path):
        found = notes(path)
        for each in folder.iterdir():
            each.unlink()
        return found

    monkeypatch.setattr(ask, "_notes", deleted)
    status, said = command("--list")
    assert (status, kept(tmp_path)) == (0, [])
    assert all(name in said.out for name in names)
    (folder / f"other{ask.SUFFIX}").write_bytes(bytes(100))
    ask._trim(folder, 100, folder / f"gone{ask.SUFFIX}")
    assert kept(tmp_path) == [f"other{ask.SUFFIX}"]
    ask._trim(folder, 99, folder / f"gone{ask.SUFFIX}")
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no question; give one, or run the command in a terminal"),
        (["  "], "the question is empty"),
        (["What?", "--text", "no/such/file"], "--text: .*No such file"),
        (["What?", "--text", "empty.txt"], "--text: is empty"),
        (["What?", "--model", "no/such/model"], "--model: no/such/model does not exist"),
        (["What?", "--budget", "2"], "2 is less than 4"),
        (["What?", "--method", "magic"], "invalid choice: 'magic'"),
        (["What?", "--bits", "4"], "invalid choice: 4"),
        (["What?", "--max-size", "-1"], "-1 is no size in GB"),
        (["What?", "--max-size", "nan"], "nan is no size in GB"),
        (["What?", "--tokens", "0"], "0 is less than 1"),
        (["--forget", "name"], "--forget: no saved text 'name'"),
        (["--forget", "name", "--list"], "argument --list: not allowed with argument --forget"),
        (["What?", "--exact", "--budget", "96"], "--exact: leaves no key out, so there is neither --budget nor"),
        (["What?", "--exact", "--method", "rows"], "--exact: leaves no key out, so there is neither --budget nor"),
    ],
)
def test_bad_command_lines(args, message, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    try:
        status, said = command(*args)
    except SystemExit as stopped:  # argparse's own
        status, said = stopped.code, capsys.readouterr()
    assert status == 2
    assert re.search(message, said.err)
    assert "Traceback" not in said.err


def test_templates_that_cannot_be_used(tmp_path, command, made):
    for template, message in (
        ("{{ raise_exception('no') }}", "refuses a single message"),
        ("hello", "leaves out or changes"),
    ):
        model = save(tmp_path / message[:4], "llama", template)
        status, said = command("What?", model=model)
        assert (status, message in said.err) == (2, True)


def test_as_a_process(made, tmp_path):
    argv = [sys.executable, "-m", "dhsa", "ask", "--model", made[1], "--text", made[2], "--new-tokens", "5", "What?"]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for known in (False, True):
        done = subprocess.run([*map(str, argv)], capture_output=True, text=True, timeout=300, env=env, check=False)
        assert done.returncode == 0, done.stderr
        assert ("opened in" in done.stdout) == known
    assert len(list((tmp_path / "dhsa" / "prompts").iterdir())) == 1
