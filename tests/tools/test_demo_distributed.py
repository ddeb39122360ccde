"""`python -m dhsa demo-distributed` on a tiny model: two processes read what one reads, and the table says what each
sent and holds."""

import pytest

for name in ("torch", "transformers", "rich"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import tiny  # noqa: E402

from dhsa import __main__ as command_line  # noqa: E402
from dhsa import demo_distributed  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    tiny.build("llama").save_pretrained(folder)
    tiny.character_tokenizer().save_pretrained(folder)
    return folder


def test_the_table(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(" ".join(str(n * n) for n in range(200)))
    args = ["demo-distributed", "--model", model, "--text", tmp_path / "text.txt", "--tokens", 512, "--budget", 96]
    assert command_line.main([str(arg) for arg in args]) == 0
    out = capsys.readouterr().out
    assert "One prompt of 512 tokens" in out
    assert out.count("the same") == 2
    assert out.count("of one") == 4
    assert "exact" in out
    assert "budget 96" in out


def test_what_is_measured(model):
    ids = tiny.tokens(1, 200)
    configs = {"exact": tiny.EXACT, "sparse": tiny.SPARSE.replace(break_even=0)}
    (one,) = demo_distributed.measure(model, ids.tolist(), configs, 1, 1)
    two = demo_distributed.measure(model, ids.tolist(), configs, 2, 1)
    row = 4 * 2 * 2 * 16 * 4  # of a token: layers, keys and values, KV heads, numbers, bytes
    hidden = 64 * 4
    for name in configs:
        assert one[name].held == 200 * row
        assert one[name].sent == 0
        assert sum(each[name].held for each in two) == 200 * row
        assert max(each[name].held for each in two) <= 112 * row
        assert all(each[name].tokens == one[name].tokens for each in two)
        assert len(one[name].tokens) == 16
    # In exact layers, rows of keys and values that the other's queries see; the facts of the call; a hidden state.
    late = max(each["exact"].sent for each in two)
    assert 100 * row <= late <= 200 * row + hidden + 1000
    # Means of the chunks first, then rows that some block chose: of so short a prompt nearly all.
    assert 100 * row / 4 < max(each["sparse"].sent for each in two) < 1.5 * late


def one_fails(group, which):
    if group.rank() == which:
        raise ValueError("this one fails")
    group.barrier().wait()


def test_a_process_that_fails_ends_all():
    with pytest.raises(Exception, match="this one fails"):
        demo_distributed.together(one_fails, (1,), 2, 1)
