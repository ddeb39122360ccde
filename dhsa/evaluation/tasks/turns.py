"""turns: several questions about one text, which is prefilled by a setting without any of them. Each question then
comes through the kept cache, as in `python -m dhsa ask`.

A method that selects keys by the queries of a question, or of the end of a prompt, does not see the question while it
reads the text here. A question's own tokens are a further piece of the prompt and are read by the setting; with
`dense_tail` of at least its length they see every key. Answers are decoded greedily, as the setting decodes, and scored
by the share of the reference that occurs in them; the right answer's log-likelihood is taken through the same cache.

Two kinds of texts: "kv", the object of the task `kv`, and "needles", RULER's numbers in essays. `--session turns` keeps
earlier questions in the cache, with their right answers, so that all methods have the same history; with `requests`,
every question comes directly after the text.

Source: SCBench (arXiv 2412.10319), its two modes and its kinds "Retr.KV" and needles; its data sets are not read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dhsa.commands import UserError
from dhsa.evaluation import answers, report
from dhsa.evaluation.pairing import estimate
from dhsa.evaluation.prompts import Frame, largest
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Context, Item, kv, ruler

DENSE = True
VERSION = 1
KINDS = ("kv", "needles")
TOKENS = {"kv": kv.TOKENS, "needles": 24}


class Turn(NamedTuple):
    """A question as the user asks it, how its answer begins, and the rest of the answer."""

    asked: str
    begun: str
    answer: str


class Tokens(NamedTuple):
    """The tokens of a question with what stands before it, and of its right answer."""

    question: list[int]
    answer: list[int]


def items(context: Context) -> list[Item]:
    args, engine = context.args, context.engine
    source = ruler.Source(context, max(args.lengths["turns"]))
    made = []
    for length in args.lengths["turns"]:
        for kind in KINDS:
            tokens = min(TOKENS[kind], args.answer_tokens or TOKENS[kind])
            for number in range(args.samples):
                name = f"{kind}/{length}/{number}" + ("" if args.session == "turns" else "/requests")

                def prompt(size: int, kind: str = kind, name: str = name) -> tuple[list[int], list[Turn], list[Tokens]]:
                    text, asked = _text(kind, source, size, args.turns, random.Random(f"turns {name}"))
                    return _pieces(engine, text, asked, args.session)

                def count(size: int, tokens: int = tokens) -> int:
                    ids, _, pieces = prompt(size)
                    return len(ids) + sum(len(p.question) + max(tokens, len(p.answer)) for p in pieces)

                least = args.turns if kind == "kv" else 1
                size = largest(count, least, length)
                while (taken := count(size)) > length:  # counts of tokens do not rise with every unit
                    if size == least:
                        raise UserError(f"--lengths: {length} tokens are too few for turns, at least {taken}")
                    size -= 1
                ids, asked, pieces = prompt(size)
                facts = {"length": length, "kind": kind, "session": args.session, "answer_tokens": tokens}
                facts["turns"] = [turn._asdict() for turn in asked]
                made.append(Item(name, ids, facts, pieces))
    return made


def _text(kind: str, source: ruler.Source, size: int, turns: int, rng: random.Random) -> tuple[str, list[Turn]]:
    """Return a text of `size` pairs or words, and questions about it."""
    if kind == "kv":
        held = kv.pairs(size, rng)
        chosen = rng.sample(held, turns)
        return f"{kv.TASK}{kv.written(held)}", [Turn(kv.asked(k), kv.BEGUN, f' "{v}"') for k, v in chosen]
    numbers: dict[str, str] = {}
    while len(numbers) < turns:
        numbers["-".join(source.some(rng, 2))] = ruler.magic_number(rng)
    needles = [ruler.NEEDLE.format(kind="numbers", key=key, value=value) for key, value in numbers.items()]
    rng.shuffle(needles)
    text = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the numbers afterwards.\n{ruler.within_essay(needles, source, size, rng)}"
    )
    said = "special magic number for {} mentioned in the provided text"
    return text, [
        Turn(f"What is the {said.format(key)}?", f"The {said.format(key)} is", f" {value}")
        for key, value in numbers.items()
    ]


def _pieces(engine: Any, text: str, asked: list[Turn], session: str) -> tuple[list[int], list[Turn], list[Tokens]]:
    """Return (tokens of the text, the questions, their tokens)."""
    frame = Frame(engine)
    pieces: list[Tokens] = []
    for turn in asked:
        question = turn.asked if frame.chat else f"{turn.asked}\n"
        # The last token of the answer before was not read yet, see `Engine.answer`.
        before = pieces[-1].answer[-1:] + engine.encode(frame.between()) if session == "turns" and pieces else []
        pieces.append(Tokens(before + frame.tail(question, turn.begun), engine.encode(turn.answer)))
    return frame.head(f"{text}\n\n"), asked, pieces


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    for setting in settings:
        reading = engine.read(item.ids, setting)
        found, work = [], reading.work
        for turn, piece in zip(item.facts["turns"], item.data, strict=True):
            own = reading if item.facts["session"] == "turns" else engine.copied(reading)
            own = engine.read(piece.question, setting, own)
            wanted = {"answer": turn["answer"].strip(' "'), "answer_tokens": item.facts["answer_tokens"]}
            found.append(answers.answered(engine, own, piece.answer, wanted))
            if item.facts["session"] == "turns":
                reading = own
        facts = {name: sum(of[name] for of in found) / len(found) for name in ("score", "loglik")}
        yield setting, {**facts, "texts": [of["text"] for of in found], "found": found, **work}


def tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for session, some in report.grouped(rows, "session"):
        what = "of one conversation" if session == "turns" else "each directly after the text"
        title = f"Questions after a text was read, {what}"
        lines += answers.tables(some, f"{title}, answered in percent", "kind")
        for length, same in report.grouped(some, "length"):
            lines += [f"### {title}, up to {length:,} tokens: answered in percent, by turn", "", *_by_turn(same)]
        lines += answers.closeness(some, title)
    return lines


def _by_turn(rows: list[dict[str, Any]]) -> list[str]:
    most = max(len(r["found"]) for r in rows)
    body = []
    for (given, method), same in report.grouped(rows, "given", "method"):
        of_turn = [[100 * r["found"][turn]["score"] for r in same if turn < len(r["found"])] for turn in range(most)]
        body.append([method, given or "all", *(report.number(estimate(values).mean, 1) for values in of_turn)])
    return report.markdown(["method", "budget", *(f"turn {turn + 1}" for turn in range(most))], body)


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    return []
