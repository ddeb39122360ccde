"""ruler: the tasks of RULER (arXiv 2404.06654) that need no data set, generated here by its definitions.

Multi-key, multi-value and multi-query needles; variable tracking; common and frequent words. The wording of the prompts
is this project's, in the form of a text to be completed, since a small base model does not follow instructions. The
score is RULER's: the share of the reference strings that occur in the greedy answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from dhsa.commands import UserError
from dhsa.evaluation import answers
from dhsa.evaluation.haystack import Haystack
from dhsa.evaluation.metrics import share_found
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Context, Item

DENSE = True
VERSION = 1

_NEEDLE = "The lucky number of {} is {}."
_SCENE = "Somewhere in the text below, lucky numbers are mentioned. They are asked for at its end.\n\n"


def items(context: Context) -> list[Item]:
    args, engine = context.args, context.engine
    haystack = Haystack(engine, context.groups, max(args.lengths["ruler"]))
    made = []
    for length in args.lengths["ruler"]:
        for kind, (make, tokens) in KINDS.items():
            for number in range(args.samples):
                rng = random.Random(f"ruler {kind} {length} {number}")
                ids, wanted = make(haystack, length, rng)
                facts = {"length": length, "kind": kind, "answer_tokens": min(tokens, args.answer_tokens or tokens)}
                made.append(Item(f"{kind}/{length}/{number}", ids, {**facts, "answer": wanted}, wanted))
    return made


def _needles(
    haystack: Haystack, length: int, rng: random.Random, keys: int, values: int, asked: int
) -> tuple[list[int], list[str]]:
    """Return `keys` keys of `values` numbers each at random depths; `asked` of the keys are asked for."""
    names = [name.capitalize() for name in rng.sample(_enough(haystack, keys), keys)]
    numbers = iter(rng.sample(range(1_000_000, 10_000_000), keys * values))
    of = {name: [str(next(numbers)) for _ in range(values)] for name in names}
    hidden = [(rng.random(), " " + _NEEDLE.format(name, n)) for name in names for n in of[name]]
    chosen = names[:asked]
    who = " and ".join(filter(None, [", ".join(chosen[:-1]), chosen[-1]]))
    verb = "lucky number of {} mentioned in the text is" if asked * values == 1 else (
        "lucky numbers of {} mentioned in the text are"
    )  # fmt: skip
    start = rng.randrange(len(haystack.sentences))
    ids = haystack.prompt(length, hidden, _SCENE, f"\n\nThe {verb.format(who)}", start)
    return ids, [n for name in chosen for n in of[name]]


def _enough(haystack: Haystack, count: int) -> list[str]:
    if len(haystack.words) < count:
        raise UserError(f"--text: {len(haystack.words)} different words, ruler needs at least {count}")
    return haystack.words


def _multi_key(haystack: Haystack, length: int, rng: random.Random) -> tuple[list[int], list[str]]:
    return _needles(haystack, length, rng, keys=4, values=1, asked=1)


def _multi_value(haystack: Haystack, length: int, rng: random.Random) -> tuple[list[int], list[str]]:
    return _needles(haystack, length, rng, keys=1, values=4, asked=1)


def _multi_query(haystack: Haystack, length: int, rng: random.Random) -> tuple[list[int], list[str]]:
    return _needles(haystack, length, rng, keys=4, values=1, asked=4)


def _variables(haystack: Haystack, length: int, rng: random.Random) -> tuple[list[int], list[str]]:
    """Return one chain of four assignments: a number is assigned to a variable, which is assigned to the next one, and
    so on; all five variables are asked for. A short solved chain of another number stands before it as an example.
    """
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

    def names(count: int) -> list[str]:
        found: dict[str, None] = {}
        while len(found) < count:
            found["".join(rng.choice(letters) for _ in range(5))] = None
        return list(found)

    def chain(of: list[str], value: int) -> list[str]:
        return [f"VAR {of[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in pairwise(of)]

    *example, a, b, c, d, e = names(8)
    real = [a, b, c, d, e]
    first, second = rng.sample(range(10000, 100000), 2)
    question = "\n\nThe variables that hold the value {} are"
    solved = " ".join(chain(example, first)) + question.format(first) + f" {', '.join(example)}.\n\n"
    depths = sorted(rng.random() for _ in real)  # a variable is assigned before it is used
    hidden = [(depth, " " + line) for depth, line in zip(depths, chain(real, second), strict=True)]
    start = rng.randrange(len(haystack.sentences))
    return haystack.prompt(length, hidden, solved, question.format(second), start), real


def _listing(engine: Any, words: list[str]) -> list[int]:
    return [token for number, word in enumerate(words, 1) for token in engine.encode(f" {number}. {word}")]


def _common_words(haystack: Haystack, length: int, rng: random.Random) -> tuple[list[int], list[str]]:
    """Return a numbered list in which ten words occur 30 times each and all others 3 times; the ten are asked for.

    In shorter lists they occur 10 times and once, or 4 times and once. A short solved list stands before it as an
    example.
    """
    engine = haystack.engine
    question = "\nThe {} most common words in the list above are:"
    pool = rng.sample(_enough(haystack, 64), len(haystack.words))
    small, common, rare = pool[:5], pool[5:15], pool[15:]
    example = small[:2] * 4 + small[2:]
    rng.shuffle(example)
    head = _listing(engine, example) + engine.encode(question.format(2) + f" 1. {small[0]} 2. {small[1]}\n\n")
    tail = engine.encode(question.format(10))
    room = length - len(engine.prefix) - len(head) - len(tail)
    fitting = [n for n in ((30, 3), (10, 1), (4, 1)) if len(_listing(engine, common * n[0])) <= 0.8 * room]
    if not fitting:
        raise UserError(f"--lengths: {length} tokens are too few for common words")
    often, seldom = fitting[0]
    words = common * often
    # As many rare words as fit: their number is found by bisection, then the list is shuffled.
    low, high = 0, len(rare)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if len(_listing(engine, words + rare[:middle] * seldom)) <= room else (low, middle - 1)
        )
    words = words + rare[:low] * seldom
    rng.shuffle(words)
    return engine.prefix + head + _listing(engine, words)[:room] + tail, common


def _frequent_words(haystack: Haystack, length: int, rng: random.Random) -> tuple[list[int], list[str]]:
    """Return made-up words whose frequencies fall as 1 / rank^2 (a zeta distribution). The first rank is noise; the
    three words that follow are asked for.
    """
    engine = haystack.engine
    made: dict[str, None] = {}
    while len(made) < 200:
        made["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6))] = None
    names = ["...", *made]
    weights = [rank**-2.0 for rank in range(1, len(names) + 1)]
    head = engine.encode("Read this coded text and count its words; the dots do not count.\n\n")
    tail = engine.encode("\n\nThe three words that occur most often in the coded text are:")
    room = length - len(engine.prefix) - len(head) - len(tail)
    if room < 64:
        raise UserError(f"--lengths: {length} tokens are too few for frequent words")
    pieces = {name: engine.encode(f" {name}") for name in names}
    ids: list[int] = []
    counts = dict.fromkeys(names, 0)
    while True:
        name = rng.choices(names, weights)[0]
        if len(ids) + len(pieces[name]) > room:
            break
        ids += pieces[name]
        counts[name] += 1
    ranked = sorted(made, key=lambda name: -counts[name])  # by the words drawn, not by their expected frequency
    return engine.prefix + head + ids + tail, ranked[:3]


# By name: the function that makes (prompt, references), and the most tokens of an answer.
KINDS = {
    "multi-key": (_multi_key, 32),
    "multi-value": (_multi_value, 64),
    "multi-query": (_multi_query, 64),
    "variables": (_variables, 48),
    "common words": (_common_words, 96),
    "frequent words": (_frequent_words, 48),
}


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    yield from answers.measure(engine, item, settings, lambda text, item: share_found(text, item.data))


def tables(rows: list[dict[str, Any]]) -> list[str]:
    return answers.tables(rows, "RULER, share of the reference strings found in percent", "kind")


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    return []
