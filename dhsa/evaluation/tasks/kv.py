"""kv: the value of a key in a long JSON object of random UUIDs, at depths that are spread evenly.

Nothing tells the pair that is asked for from the others, and no pair can be guessed. The answer is decoded greedily and
scored by whether the value occurs in it; the right answer's log-likelihood is taken through the same cache.

Source: Lost in the Middle (arXiv 2307.03172), whose prompt this is; InfiniteBench (arXiv 2402.13718) has the same task.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dhsa.commands import UserError
from dhsa.evaluation import answers
from dhsa.evaluation.prompts import Frame, largest
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Context, Item
from dhsa.evaluation.tasks.ruler import uuid_text

DENSE = True
VERSION = 1
TOKENS = 64  # of an answer

TASK = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
BEGUN = "Corresponding value:"


def pairs(count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Return `count` pairs of UUIDs."""
    return [(uuid_text(rng), uuid_text(rng)) for _ in range(count)]


def written(held: list[tuple[str, str]]) -> str:
    """Return pairs as a JSON object, each on a line of its own."""
    return "{" + ",\n ".join(f'"{key}": "{value}"' for key, value in held) + "}"


def asked(key: str) -> str:
    return f'Key: "{key}"'


def items(context: Context) -> list[Item]:
    args, engine = context.args, context.engine
    frame, made = Frame(engine), []
    tokens = min(TOKENS, args.answer_tokens or TOKENS)
    for length in args.lengths["kv"]:
        count = None
        for number in range(args.samples):
            depth = (number + 0.5) / args.samples

            def prompt(count: int, number: int = number, depth: float = depth) -> tuple[list[int], str]:
                held = pairs(count, random.Random(f"kv {number}"))
                key, value = held[int(depth * count)]
                said = f"{TASK}{written(held)}\n\n{asked(key)}"
                return (frame.whole(said, BEGUN) if frame.chat else frame.whole(f"{said}\n{BEGUN}")), value

            if count is None:
                count = largest(lambda count: len(prompt(count)[0]), 1, length - tokens)
            used = count
            while len((found := prompt(used))[0]) > length - tokens:
                if used == 1:
                    raise UserError(f"--lengths: {length} tokens are too few for kv, at least {len(found[0]) + tokens}")
                used -= 1
            ids, value = found
            facts = {"length": length, "depth": depth, "pairs": used, "answer": value, "answer_tokens": tokens}
            made.append(Item(f"{length}/{depth:.0%}/{number}", ids, facts, engine.encode(f' "{value}"')))
    return made


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    for setting in settings:
        reading = engine.read(item.ids, setting)
        yield setting, {**answers.answered(engine, reading, item.data, item.facts), **reading.work}


def tables(rows: list[dict[str, Any]]) -> list[str]:
    rows = [{**r, "texts": [r["text"]], "at": f"{r['depth']:.0%}"} for r in rows]
    title = "Values of keys in a JSON object, found in percent by depth"
    return answers.tables(rows, title, "at") + answers.closeness(rows, "Values of keys")


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    return []
