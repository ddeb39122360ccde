"""Texts to train on: documents read, split into those for training and those held out, and packed into pieces."""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dhsa.commands import UserError

__all__ = ["LEAST_TOKENS", "Text", "pack", "prefix_of", "python_documents", "read_documents", "split"]

LEAST_TOKENS = 128  # of a piece: shorter ones have few gaps with a label
HELD_OUT = 0.125  # of the documents, by length


@dataclass(frozen=True)
class Text:
    """Pieces of text as tokens.

    Attributes:
        train: the pieces to train on.
        held_out: the pieces to measure scores on.
        source: where the text comes from, for the model card.
    """

    train: list[list[int]]
    held_out: list[list[int]]
    source: str

    def digest(self) -> str:
        """Return a hash that identifies the text."""
        return hashlib.sha256(repr((self.train, self.held_out)).encode()).hexdigest()[:16]


def python_documents() -> list[str]:
    """Return Python's own documentation as a list of documents.

    These are the topics of its language reference, and the docstrings of the standard library, one document for each
    module. They are free to use and available wherever Python is.
    """
    documents: list[str] = []
    try:
        from pydoc_data.topics import topics

        documents += list(topics.values())
    except ImportError:  # some distributions leave it out
        pass
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        nodes = (n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        texts = [f"{getattr(n, 'name', path.stem)}\n{doc}" for n in nodes if (doc := ast.get_docstring(n))]
        if texts:
            documents.append("\n\n".join(texts))
    return documents


def read_documents(paths: Sequence[Path]) -> list[str]:
    """Read UTF-8 files, one document for each.

    Args:
        paths: the files.

    Raises:
        UserError: a file cannot be read.
    """
    documents = []
    for path in paths:
        try:
            documents.append(path.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise UserError(f"--text: {error}") from error
    return documents


def split(documents: Iterable[str], seed: int, share: float = HELD_OUT) -> tuple[list[str], list[str]]:
    """Split documents into those to train on and those held out.

    Whole documents are held out at random until they make up `share` of all text. A single document is cut, and its end
    is held out.

    Args:
        documents: the texts.
        seed: of the random choice.
        share: of the text, by length, to hold out.

    Returns:
        (documents to train on, documents held out).
    """
    documents = [d for d in documents if d.strip()]
    if len(documents) == 1:
        at = int(len(documents[0]) * (1 - share))
        return [documents[0][:at]], [documents[0][at:]]
    wanted = share * sum(map(len, documents))
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    held: set[int] = set()
    size = 0
    for i in order[:-1]:  # one is always left to learn from
        if size >= wanted:
            break
        held.add(i)
        size += len(documents[i])
    return ([d for i, d in enumerate(documents) if i not in held], [documents[i] for i in sorted(held)])


def prefix_of(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before a text."""
    plain, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return list(whole[: len(whole) - len(plain)]) if whole[-len(plain) :] == plain else []


def pack(tokenizer: Any, documents: Iterable[str], tokens: int, limit: int | None = None) -> list[list[int]]:
    """Join documents and cut them into pieces of equal length.

    Args:
        tokenizer: of the model, from transformers.
        documents: the texts.
        tokens: the length of a piece. Each begins with the tokens that the tokenizer puts before a text.
        limit: the most pieces. None: no limit.
    """
    prefix = prefix_of(tokenizer)
    room = tokens - len(prefix)
    pieces: list[list[int]] = []
    rest: list[int] = []
    for document in documents:
        rest += tokenizer(document + "\n\n", add_special_tokens=False).input_ids
        while len(rest) >= room:
            pieces.append(prefix + rest[:room])
            rest = rest[room:]
            if limit is not None and len(pieces) == limit:
                return pieces
    if len(rest) + len(prefix) >= LEAST_TOKENS and not (pieces and len(rest) < room // 4):
        pieces.append(prefix + rest)
    return pieces
