"""Seconds of what `make fuzz` does for longer: random calls against the NumPy twin, and changed files.

A failure names the seed and the number with which tests/fuzz repeats it. descriptors.c is run by test_programs.py.
"""

import numpy as np
import pytest
from fuzz import differential, files

import dhsa


def test_random_calls():
    counts = differential.run(0, 8)
    assert counts.total() > 20


def test_a_call_that_differs_is_told(monkeypatch):
    attention = dhsa.attention

    def other(*args, **options):
        result = attention(*args, **options)
        return (result[0] + np.float32(0.1), *result[1:]) if isinstance(result, tuple) else result

    monkeypatch.setattr(dhsa, "attention", other)
    monkeypatch.setattr(differential, "DTYPES", ["float32"])
    monkeypatch.setattr(differential, "SHARES", [differential.exact])
    with pytest.raises(
        AssertionError, match=r"--seed 3 --first 0 --count 1: exact \{'tier': (.|\n)*Not equal to tolerance"
    ):
        differential.run(3, 60, count=1)


def test_changed_files():
    counts = files.run(0, 8)
    assert counts.total() > 20
    assert any("refused" in name for name in counts)


def test_a_file_that_gives_another_exception_is_told(monkeypatch):
    def use(path):
        if path.parent.name != "whole":
            raise KeyError("weight")

    monkeypatch.setattr(files, "opening_of", lambda path: use)
    with pytest.raises(AssertionError, match=r"--seed 3 --first 0 --count 1: .*: KeyError: 'weight'"):
        files.run(3, 60, count=1)
