"""Long prompts made of real sentences with given texts hidden among them, of an exact number of tokens.

Each piece is tokenized by itself, so that a prompt has exactly the length asked for and the same tokens for every
method and every run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dhsa.commands import UserError
from dhsa.evaluation import texts

__all__ = ["Haystack"]


class Haystack:
    """The sentences of the texts as tokens."""

    def __init__(self, engine: Any, groups: list[list[tuple[str, str]]], tokens: int) -> None:
        """Collect enough sentences for prompts of `tokens` tokens."""
        self.engine = engine
        text = texts.stream(engine, groups, 2 * tokens)
        pieces = [piece for piece in re.split(r"(?<=[.!?])(?=\s)", text) if piece.strip()]
        self.sentences = [ids for ids in map(engine.encode, pieces) if ids]
        if sum(map(len, self.sentences)) < 64:
            raise UserError("--text: too short for hidden texts")

    def prompt(
        self, length: int, hidden: Sequence[tuple[float, str]], head: list[int], tail: list[int], start: int = 0
    ) -> list[int]:
        """Return `length` tokens: `head`, sentences with each of `hidden` (depth 0 to 1, text) among them, and `tail`.

        A hidden text follows the last sentence that ends at or before its depth. `start`: the number of the first
        sentence, modulo the number of sentences; after the last one the first follows.
        """
        needles = [(depth, self.engine.encode(text)) for depth, text in sorted(hidden, key=lambda pair: pair[0])]
        room = length - len(head) - len(tail) - sum(len(ids) for _, ids in needles)
        if room < 0:
            raise UserError(f"--lengths: {length} tokens are too few for this prompt, at least {length - room}")
        ids, used, number = list(head), 0, start
        for depth, needle in needles:
            while True:
                sentence = self.sentences[number % len(self.sentences)]
                if used + len(sentence) > depth * room:
                    break
                ids += sentence
                used, number = used + len(sentence), number + 1
            ids += needle
        while used < room:
            sentence = self.sentences[number % len(self.sentences)][: room - used]
            ids += sentence
            used, number = used + len(sentence), number + 1
        return ids + tail
