"""A rank of a group that dies, stalls or runs something else: every other rank ends with an error that names it."""

import os
import signal
import time

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

import ranks  # noqa: E402
import tiny  # noqa: E402

import dhsa  # noqa: E402

EXACT, CULPRIT = tiny.EXACT, 1
LIMIT = 4.0  # seconds that ranks wait for each other


def world():
    return torch.distributed.group.WORLD


def failing(rank, size, fault, config, timeout):
    """What a rank says, and after how many seconds, when one rank is struck by `fault` in its third layer."""
    model = tiny.build("gemma2")
    if rank == CULPRIT:
        model.model.layers[2].register_forward_pre_hook(lambda *_: fault())
    with dhsa.patched(model, config, group=world(), timeout=timeout):
        torch.distributed.barrier()
        start = time.monotonic()
        try:
            model(tiny.tokens(1, 200))
        except dhsa.GroupError as error:
            return str(error), time.monotonic() - start
    return "no error", 0.0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def refuse():
    raise ValueError("the third layer is not to be run")


@pytest.mark.parametrize("config", [EXACT, tiny.SPARSE.replace(break_even=0)], ids=["exact", "sparse"])
def test_a_rank_that_dies_is_named(config, tmp_path):
    found = ranks.run(3, failing, tmp_path, die, config, 60.0, lost=[CULPRIT])
    assert found[CULPRIT] is None
    for rank in (0, 2):
        message, seconds = found[rank]
        assert "rank 1 closed its connection: its process ended" in message, message
        assert seconds < 30


def test_a_rank_that_stalls_is_named(tmp_path):
    found = ranks.run(4, failing, tmp_path, stop, EXACT, LIMIT, lost=[CULPRIT])
    assert found[CULPRIT] is None
    for rank in (0, 2, 3):
        message, seconds = found[rank]
        assert "rank 1 sent nothing for 4 seconds" in message, message
        assert seconds < 4 * LIMIT + 20


def test_a_rank_that_raises_is_named_with_its_reason(tmp_path):
    found = ranks.run(3, failing, tmp_path, refuse, EXACT, 60.0)
    assert found[CULPRIT] == "ValueError: the third layer is not to be run"
    for rank in (0, 2):
        message, seconds = found[rank]
        assert "rank 1 raised ValueError: the third layer is not to be run" in message, message
        assert seconds < 30


def different(rank, size, what):
    other = rank == CULPRIT
    config, prompt = EXACT, tiny.tokens(1, 150)
    model = tiny.build("llama")
    if other and what == "weights":
        model.model.layers[1].mlp.up_proj.weight.data.add_(1e-3)
    if other and what == "config":
        config = tiny.SPARSE
    if other and what == "dhsa":
        dhsa.__version__ = "0.0.1"
    if other and what == "prompt":
        prompt[0, 17] = 5
    if other and what == "length":
        prompt = prompt[:, :140]
    try:
        with dhsa.patched(model, config, group=world(), timeout=60):
            model(prompt)
    except dhsa.GroupError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", "patch: config is "),
        ("weights", "patch: weights is "),
        ("dhsa", "patch: dhsa is "),
        ("prompt", "model: the prompt is "),
        ("length", "model: the number of tokens is "),
    ],
)
def test_a_rank_with_something_else_is_named(what, message, tmp_path):
    found = ranks.run(3, different, tmp_path, what)
    assert len(set(found)) == 1
    assert message in found[0]
    assert "on rank 0, but rank 1 has " in found[0]


def missing(rank, size):
    """A rank that never patches its model."""
    if rank == CULPRIT:
        time.sleep(600)
    try:
        dhsa.patch(tiny.build("llama"), EXACT, group=world(), timeout=LIMIT)
    except dhsa.GroupError as error:
        return str(error)
    return "no error"


def test_a_rank_that_does_not_come_is_named(tmp_path):
    found = ranks.run(3, missing, tmp_path, lost=[CULPRIT])
    for rank in (0, 2):
        assert "rank 1 sent nothing for 4 seconds" in found[rank]
