"""Documents: text from files and folders (.txt, or LongBench's .jsonl), or Python's language reference, as tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dhsa import commands
from dhsa.commands import UserError
from dhsa.evaluation.tasks import Context, Item

__all__ = ["Document", "document_items", "documents", "jsonl", "sources", "stream"]

REFERENCE = "python-reference"


@dataclass(frozen=True)
class Document:
    """A name and its tokens, with the special tokens at the front."""

    name: str
    ids: list[int]


def sources(paths: list[Path] | None) -> list[list[tuple[str, str]]]:
    """Return (name, text) pairs for each path, in the order of names; without paths, Python's reference as one text.

    A folder gives its .txt and .jsonl files; a .jsonl file gives the `context` of each line (`text` where there is
    none).
    """
    if not paths:
        return [[(REFERENCE, commands.reference_text())]]
    found = []
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".jsonl"))
            if not files:
                raise UserError(f"--text: no .txt or .jsonl file in {path}")
        else:
            files = [path]
        found.append([text for file in files for text in _texts(file)])
    return found


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix != ".jsonl":
        yield path.name, commands.read_text(path)
        return
    for number, record in enumerate(jsonl(path, "--text"), 1):
        text = record.get("context") or record.get("text")
        if not isinstance(text, str):
            raise UserError(f"--text: {path}:{number}: no context")
        yield f"{path.name}:{number}", text


def jsonl(path: Path, option: str) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines."""
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise UserError(f"{option}: {path}:{number}: expected a JSON object")
                    records.append(record)
    except OSError as error:
        raise UserError(f"{option}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option}: {path}:{len(records) + 1}: no JSON: {error}") from error
    return records


def document_items(context: Context, task: str) -> list[Item]:
    """The documents that the command line asks for, as prompts of a task: of each of its lengths."""
    args = context.args
    return [
        Item(document.name, document.ids, {"length": length})
        for length in args.lengths[task]
        for document in documents(
            context.engine, context.groups, length, count=args.documents, skip=args.skip, join=args.join
        )
    ]


def documents(
    engine: Any, groups: list[list[tuple[str, str]]], length: int, *, count: int, skip: int = 0, join: bool = False
) -> list[Document]:
    """Return `count` documents of exactly `length` tokens, after `skip` others, drawn from the sources in turn.

    A text gives one document, its first tokens; texts that are too short are skipped. `join`: the texts of a source are
    joined in their order, separated by an empty line, and cut into documents without overlap. This is always done with
    a source of a single text.
    """
    room = length - len(engine.prefix)
    makers = [
        _joined(engine, group, room) if join or len(group) == 1 else _single(engine, group, room) for group in groups
    ]
    made: list[Document] = []
    while makers and len(made) < skip + count:
        for maker in list(makers):
            document = next(maker, None)
            if document is None:
                makers.remove(maker)
            elif len(made) < skip + count:
                made.append(document)
    if len(made) <= skip:
        hint = "" if join else "; --join makes documents of several texts"
        raise UserError(f"--text: {len(made)} documents of {length:,} tokens, and {skip} are to be skipped{hint}")
    return made[skip:]


def _single(engine: Any, group: list[tuple[str, str]], room: int) -> Iterator[Document]:
    for name, text in group:
        ids = engine.encode(text[: 24 * room])[:room]
        if len(ids) == room:
            yield Document(name, engine.prefix + ids)


def _joined(engine: Any, group: list[tuple[str, str]], room: int) -> Iterator[Document]:
    held: list[int] = []
    first, cut = group[0][0], 0
    for name, text in group:
        if not held:
            first, cut = name, 0
        held += engine.encode(text + "\n\n")
        while len(held) >= room:
            yield Document(f"{first}+{cut}", engine.prefix + held[:room])
            held, first, cut = held[room:], name, cut + 1


def stream(engine: Any, groups: list[list[tuple[str, str]]], tokens: int) -> str:
    """Return text of at least about `tokens` tokens from the sources, one text after the other, or all there is."""
    parts, size = [], 0
    for group in groups:
        for _, text in group:
            parts.append(text.strip())
            size += len(text)
            if size > 8 * tokens:
                return "\n\n".join(parts)
    return "\n\n".join(parts)
