"""Documents: text from files and folders (prose, source code, LongBench's .jsonl, chats), or Python's language
reference, as tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dhsa import commands
from dhsa.commands import UserError
from dhsa.evaluation.tasks import Context, Item

__all__ = ["Document", "document_items", "documents", "halves", "jsonl", "rendered", "sources", "stream"]

REFERENCE = "python-reference"

# What is read of a folder; a file that is named is read whatever its suffix.
_RECORDS = (".json", ".jsonl")
_PROSE = (".txt", ".md", ".rst")
_CODE = (
    ".c", ".cc", ".cpp", ".cs", ".go", ".h", ".hpp", ".hs", ".java", ".jl", ".js", ".kt", ".lua", ".ml", ".php", ".pl",
    ".py", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts",
)  # fmt: skip

Chat = list[dict[str, str]]  # messages: role and content


@dataclass(frozen=True)
class Document:
    """A name and its tokens, with the special tokens at the front."""

    name: str
    ids: list[int]


def sources(paths: list[Path] | None) -> list[list[tuple[str, str | Chat]]]:
    """Return (name, text or chat) pairs for each path, in the order of names; without paths, Python's reference as one
    text.

    A folder gives its files of prose, source code and records, but not those of its folders. A line of a .jsonl file
    gives its `messages` as a chat, its `context` or its `text`. A .json file is a chat (a list of messages), an object
    with `messages`, or a list of either. A .jsonl file whose lines are messages is one chat. A message is an object
    with the strings `role` and `content`.
    """
    if not paths:
        return [[(REFERENCE, commands.reference_text())]]
    found = []
    for path in paths:
        if path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in (*_RECORDS, *_PROSE, *_CODE))
            if not files:
                raise UserError(f"--text: no file of text, source code or records (.txt, .py, .jsonl, ...) in {path}")
        else:
            files = [path]
        found.append([text for file in files for text in _texts(file)])
        if not found[-1]:
            raise UserError(f"--text: no text in {path}")
    return found


def _texts(path: Path) -> Iterator[tuple[str, str | Chat]]:
    if path.suffix == ".jsonl":
        records: list[Any] = jsonl(path, "--text")
    elif path.suffix == ".json":
        try:
            held = json.loads(commands.read_text(path))
        except (ValueError, RecursionError) as error:
            raise UserError(f"--text: {path}: no JSON: {error}") from error
        records = held if isinstance(held, list) else [held]
    else:
        yield path.name, commands.read_text(path)
        return
    if records and isinstance(records[0], dict) and "role" in records[0]:
        yield path.name, _chat(records, f"{path}")
        return
    for number, record in enumerate(records, 1):
        place = f"{path}:{number}"
        messages = record.get("messages") if isinstance(record, dict) else record
        if messages is not None:
            yield f"{path.name}:{number}", _chat(messages, place)
            continue
        text = record.get("context") or record.get("text")
        if not isinstance(text, str):
            raise UserError(f"--text: {place}: no context, text or messages")
        yield f"{path.name}:{number}", text


def _chat(messages: Any, place: str) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"--text: {place}: expected a list of messages, got {json.dumps(messages)[:40]}")
    for number, message in enumerate(messages, 1):
        own = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(value, str) for value in own):
            raise UserError(f"--text: {place}: message {number}: expected an object with the strings role and content")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def rendered(engine: Any, groups: list[list[tuple[str, str | Chat]]]) -> list[list[tuple[str, str]]]:
    """Return `sources` with chats as text, by the template of the engine's tokenizer."""
    tokenizer = engine.tokenizer
    front = tokenizer.decode(engine.prefix)  # every document begins with it

    def text(name: str, held: str | Chat) -> str:
        if isinstance(held, str):
            return held
        if tokenizer.chat_template is None:
            raise UserError(f"--text: {name} is a chat, and the model's tokenizer has no chat template")
        try:
            made = tokenizer.apply_chat_template(held, tokenize=False)
        except Exception as error:  # whatever the template raises, as for roles that it does not know
            raise UserError(f"--text: {name}: the model's chat template refuses it: {error}") from error
        return made.removeprefix(front)

    return [[(name, text(name, held)) for name, held in group] for group in groups]


def halves(groups: list[list[tuple[str, str]]]) -> tuple[list[list[tuple[str, str]]], list[list[tuple[str, str]]]]:
    """Return every source in two parts that share no text: its texts in turn or, where it has only one, what is before
    and after the first end of a line in its second half.

    The parts depend neither on a model nor on the length and number of documents.
    """
    one, other = [], []
    for group in groups:
        if len(group) == 1:
            ((name, text),) = group
            middle = len(text) // 2
            middle = text.find("\n", middle) + 1 or middle
            group = [(f"{name}, first half", text[:middle]), (f"{name}, second half", text[middle:])]
        one.append(group[0::2])
        other.append(group[1::2])
    return one, other


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
