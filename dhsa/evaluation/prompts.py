"""What stands around the words of a prompt: the model's chat template where its tokenizer has one, else what the
tokenizer puts before a text. And how much text fits.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any

from dhsa.commands import CHAT_MARK, chat_parts

__all__ = ["Frame", "largest"]


def largest(count: Callable[[int], int], least: int, room: int) -> int:
    """Return the largest size of which `count`, which rises with it, gives at most `room`; at least `least`."""
    low, high = least, 2 * least
    while count(high) <= room:
        low, high = high, 2 * high
    return max(least, low + bisect.bisect_right(range(low, high), room, key=count) - 1)


class Frame:
    """The text before and after what a user says, and the tokens of whole prompts.

    `chat`: whether the tokenizer has a chat template. `earlier`: questions with their answers, which come first; where
    there is no template, each pair ends with a line's end.
    """

    def __init__(self, engine: Any, earlier: Sequence[tuple[str, str]] = ()) -> None:
        self._engine = engine
        self.chat = engine.tokenizer.chat_template is not None
        if self.chat:
            said = [text for pair in earlier for text in pair]
            self.before, self.after = chat_parts(engine.tokenizer, *said, CHAT_MARK)
        else:
            self.before, self.after = "".join(f"{question}{answer}\n" for question, answer in earlier), ""

    def between(self) -> str:
        """Return what stands between an answer and the next question."""
        return chat_parts(self._engine.tokenizer, *[CHAT_MARK] * 3)[2] if self.chat else "\n\n"

    def head(self, said: str = "") -> list[int]:
        """Return the tokens of a prompt up to and with the beginning of what the user says."""
        return ([] if self.chat else self._engine.prefix) + self._engine.encode(self.before + said)

    def tail(self, said: str, begun: str = "") -> list[int]:
        """Return the tokens of the rest: the end of what the user says, and the beginning of the answer."""
        return self._engine.encode(said + self.after + begun)

    def whole(self, said: str, begun: str = "") -> list[int]:
        """Return the tokens of a prompt in which the user says `said` and the answer begins with `begun`."""
        return self.head(said + self.after + begun)
