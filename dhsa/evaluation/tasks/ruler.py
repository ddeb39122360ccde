"""ruler: the thirteen subtasks of RULER (arXiv 2404.06654), with the sizes, instructions, answer prefixes, numbers of
answer tokens and scores of its generator (github.com/NVIDIA/RULER). The code was written for this project.

With a chat template, the instruction is what the user says, and the answer prefix is the beginning of the model's
answer, as there. A prompt and its answer together have at most `length` tokens; as much text as fits is taken. The
score is the share of the reference strings in the greedy answer ("string match all"), for the two tasks of questions 1
where any of them occurs ("string match part"). Decoding ends when the score is 1, which more text cannot change.

Prompts of a seed are not NVIDIA's, but of the same kind and length, except:

- Keys of needles are two words of the texts joined by a hyphen, and the words of cwe are words of the texts; NVIDIA's
  are adjectives, nouns and verbs of a package. Essays are the texts of --text.
- Sentences of essays are told apart by their marks, without a trained splitter.
- The size of a subtask's first prompt is the largest that fits. Of later ones that would be too long with it, it is
  some percent less; NVIDIA's steps are of 10 to 500 words, lines or documents.
- In cwe, the solved example is an earlier turn of the chat. NVIDIA writes the template twice.
- What NVIDIA shuffles alike for all prompts (words, documents, needles) is shuffled for each prompt.
- The solved example of vt has about 500 tokens, as there, but in prompts of fewer than 4,096 tokens, for which RULER
  was not made, about an eighth of the prompt, and at least five lines of noise.
- qa_1 and qa_2 need files that are named by --squad and --hotpotqa, and are left out without them.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dhsa.commands import UserError
from dhsa.evaluation import answers, texts
from dhsa.evaluation.metrics import any_found, share_found
from dhsa.evaluation.prompts import Frame, largest
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Context, Item

DENSE = True
VERSION = 2

_FULL = 4096  # tokens from which on RULER's own sizes are used
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_DEPTHS = [round(100 * step / 39) for step in range(40)]  # percent


class Sample(NamedTuple):
    """A question: what the user says, how the answer begins, the references, and solved examples before it."""

    said: str
    begun: str
    references: list[str]
    earlier: tuple[tuple[str, str], ...] = ()


class Draw(NamedTuple):
    """Which prompt is made: of how many tokens, the number of the sample, and what is drawn from."""

    length: int
    number: int
    rng: random.Random


class Source:
    """What prompts are made of: the words of the texts in their order, and different ones of 4 to 10 letters."""

    def __init__(self, context: Context, length: int) -> None:
        text = texts.stream(context.engine, context.groups, 2 * length)
        self.essay = text.split()
        every = "\n".join(text for group in context.groups for _, text in group)
        self.words = sorted({word.lower() for word in re.findall(r"\b[a-zA-Z]{4,10}\b", every)})
        if len(self.words) < 64:
            raise UserError(f"--text: {len(self.words)} different words, ruler needs at least 64")
        self.questions: dict[str, Questions] = {}

    def some(self, rng: random.Random, count: int) -> list[str]:
        """Return `count` different words."""
        if count > len(self.words):
            raise UserError(f"--text: {len(self.words)} different words, and a prompt needs {count}; name more texts")
        return rng.sample(self.words, count)


# ---- needles ---------------------------------------------------------------------------------------------------------


def magic_number(rng: random.Random) -> str:
    """Return seven digits."""
    return str(rng.randint(10**6, 10**7 - 1))


def uuid_text(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _drawn(kind: str, source: Source, rng: random.Random) -> str:
    if kind == "words":
        return "-".join(source.some(rng, 2))
    return magic_number(rng) if kind == "numbers" else uuid_text(rng)


@dataclass(frozen=True)
class Needles:
    """Needles in a text ("noise" or "essay"), or among others of their kind ("needle")."""

    hay: str = "essay"
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def make(self, source: Source, size: int, draw: Draw) -> Sample:
        rng = draw.rng
        held: dict[str, list[str]] = {}
        while len(held) < self.keys:
            key = _drawn(self.key_kind, source, rng)
            held[key] = [_drawn(self.value_kind, source, rng) for _ in range(self.values)]
        needles = [self._needle(key, value) for key, values in held.items() for value in values]
        rng.shuffle(needles)
        context = self._context(needles, source, size, rng)
        asked = rng.sample(list(held), self.asked)
        who = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        one = self.asked * self.values == 1
        kind = self.value_kind.removesuffix("s") if one else self.value_kind
        hidden = f"A special magic {kind} is" if one else f"Some special magic {kind} are"
        what = f"What {'is' if one else 'are all'} the special magic {kind} for {who} mentioned in the provided text?"
        said = (
            f"{hidden} hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
            f"afterwards.\n{context}\n{what}"
        )
        begun = f" The special magic {kind} for {who} mentioned in the provided text {'is' if one else 'are'}"
        return Sample(said, begun, [value for key in asked for value in held[key]])

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _context(self, needles: list[str], source: Source, size: int, rng: random.Random) -> str:
        if self.hay == "essay":
            return within_essay(needles, source, size, rng)
        if self.hay == "noise":
            lines = [_NOISE] * size
        else:
            kinds = self.key_kind, self.value_kind
            lines = [self._needle(*(_drawn(kind, source, rng) for kind in kinds)) for _ in range(size)]
        for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def within_essay(needles: list[str], source: Source, size: int, rng: random.Random) -> str:
    """Return the first `size` words of the texts (again from the first, where there are fewer), with needles between
    sentences at random depths of 40.
    """
    words = itertools.islice(itertools.cycle(source.essay), size)
    sentences = re.split(r"(?<=[.!?])\s", " ".join(words))
    places = sorted(len(sentences) * depth // 100 for depth in rng.sample(_DEPTHS, len(needles)))
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        sentences.insert(place, needle)
    return " ".join(sentences)


# ---- other synthetic tasks -------------------------------------------------------------------------------------------


class Variables:
    """A chain of five variables, each assigned to the next one, between lines of noise; all that hold the value are
    asked for. A solved chain stands before it.
    """

    hops = 4

    def make(self, source: Source, size: int, draw: Draw) -> Sample:
        length, rng = draw.length, draw.rng
        said, begun, names = self._chain(size, 5, rng)
        example, solved, found = self._chain(self._example_size(length), 3, rng)
        return Sample(f"{example}{solved} {' '.join(found)}\n\n{said}", begun, names)

    def _chain(self, size: int, letters: int, rng: random.Random) -> tuple[str, str, list[str]]:
        names: dict[str, None] = {}
        while len(names) <= self.hops:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        chain, value = list(names), rng.randrange(10000, 99999)
        steps = [f"VAR {chain[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(chain))]
        lines = [_NOISE] * size
        for count, (place, step) in enumerate(zip(sorted(rng.sample(range(size), len(steps))), steps, strict=True)):
            lines.insert(place + count, step)
        said = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            + "\n".join(lines)
            + f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        )
        begun = (
            f" Answer: According to the chain(s) of variable assignment in the text above, {len(chain)} variables are "
            f"assigned the value {value}, they are: "
        )
        return said, begun, chain

    def _example_size(self, length: int) -> int:
        # A line of noise has 23 tokens, and what is around them about 150.
        room = 500 if length >= _FULL else length // 8
        return max(self.hops + 1, (room - 150) // 23)


class CommonWords:
    """A numbered list in which ten words occur often and all others seldom; the ten are asked for. `size` is the number
    of different words. A short solved list stands before it.
    """

    common = 10

    def make(self, source: Source, size: int, draw: Draw) -> Sample:
        full, rng = draw.length >= _FULL, draw.rng
        said, begun, often = self._list(source.some(rng, size), *((30, 3) if full else (6, 1)), rng)
        of_example = source.some(rng, 40 if full else 20)
        example, solved, found = self._list(of_example, *((10, 3) if full else (3, 1)), rng)
        solved += " " + " ".join(f"{number}. {word}" for number, word in enumerate(found, 1))
        return Sample(said, begun, often, ((example, solved),))

    def _list(self, words: list[str], often: int, seldom: int, rng: random.Random) -> tuple[str, str, list[str]]:
        common = words[: self.common]
        listed = common * often + words[self.common :] * seldom
        rng.shuffle(listed)
        said = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            "that appear most often.\n"
            + " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
            + "\nQuestion: What are the 10 most common words in the above list?"
        )
        return said, " Answer: The top 10 words that appear most often in the list are:", common


class FrequentWords:
    """Made-up words whose frequencies fall as 1 / rank^2 (a zeta distribution). The first rank is noise; the three
    words that follow are asked for. `size` is the number of words, were none rounded away.
    """

    def make(self, source: Source, size: int, draw: Draw) -> Sample:
        length, rng = draw.length, draw.rng
        words: dict[str, None] = {"...": None}
        while len(words) < max(8, (length - SUBTASKS["fwe"].tokens) // 50):
            words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        share = 6 / math.pi**2  # of rank 1: 1 / zeta(2)
        coded = [word for rank, word in enumerate(words, 1) for _ in range(int(size * share / rank**2))]
        rng.shuffle(coded)
        said = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(coded)}\nQuestion: Do not provide any explanation. Please ignore the "
            "dots '....'. What are the three most frequently appeared words in the above coded text?"
        )
        begun = " Answer: According to the coded text above, the three most frequently appeared words are:"
        return Sample(said, begun, list(words)[1:4])


# ---- questions about documents ---------------------------------------------------------------------------------------


class Question(NamedTuple):
    """A question, its answers, the number of documents that it is about, and of others from the same article."""

    asked: str
    answers: list[str]
    about: list[int]
    near: list[int]


class Questions(NamedTuple):
    asked: list[Question]
    documents: list[str]


def squad(path: Path) -> Questions:
    """Return the questions of a file of SQuAD 1.1 or 2.0 that have an answer."""
    held = _json(path, "--squad")
    try:
        articles = [[(p["context"], p["qas"]) for p in article["paragraphs"]] for article in held["data"]]
        documents = sorted({text for paragraphs in articles for text, _ in paragraphs})
        number = {text: place for place, text in enumerate(documents)}
        asked = [
            Question(
                qa["question"],
                [answer["text"] for answer in qa["answers"]],
                [number[text]],
                sorted({number[other] for other, _ in paragraphs} - {number[text]}),
            )
            for paragraphs in articles
            for text, qas in paragraphs
            for qa in qas
            if not qa.get("is_impossible") and qa["answers"]
        ]
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--squad: {path}: not the format of SQuAD: {error!r}") from error
    return _some(asked, documents, path, "--squad")


def hotpotqa(path: Path) -> Questions:
    """Return the questions of a file of HotpotQA, in its "distractor" setting."""
    held = _json(path, "--hotpotqa")
    try:
        found = [(d["question"], d["answer"], [f"{t}\n{''.join(p)}" for t, p in d["context"]]) for d in held]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"--hotpotqa: {path}: not the format of HotpotQA: {error!r}") from error
    documents = sorted({text for *_, own in found for text in own})
    number = {text: place for place, text in enumerate(documents)}
    asked = [Question(question, [answer], [number[text] for text in own], []) for question, answer, own in found]
    return _some(asked, documents, path, "--hotpotqa")


def _json(path: Path, option: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{option}: {path}: {error}") from error


def _some(asked: list[Question], documents: list[str], path: Path, option: str) -> Questions:
    if not asked:
        raise UserError(f"{option}: {path}: no question with an answer")
    return Questions(asked, documents)


@dataclass(frozen=True)
class Documents:
    """A question of a file about some of `size` documents, which are numbered."""

    file: str

    def make(self, source: Source, size: int, draw: Draw) -> Sample:
        asked, documents = source.questions[self.file]
        question = asked[draw.number % len(asked)]
        if size < len(documents):
            near = question.near
            if len(near) > (more := max(0, size - len(question.about))):
                near = draw.rng.sample(near, more)
            taken = [*question.about, *near]
            others = sorted(set(range(len(documents))).difference(taken))
            taken += draw.rng.sample(others, min(len(others), max(0, size - len(taken))))
            chosen = [documents[place] for place in taken]
        else:
            chosen = list(itertools.islice(itertools.cycle(documents), size))
        draw.rng.shuffle(chosen)
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(chosen, 1))
        rule = (
            "Answer the question based on the given documents. Only give me the answer and do not output any other "
            "words."
        )
        said = f"{rule}\n\nThe following are given documents.\n\n{context}\n\n{rule}\n\nQuestion: {question.asked}"
        return Sample(said, " Answer:", question.answers)


# ---- the task --------------------------------------------------------------------------------------------------------


class Maker(Protocol):
    def make(self, source: Source, size: int, draw: Draw) -> Sample: ...


class Subtask(NamedTuple):
    """What makes the samples of a size, the least size, the most tokens of an answer, and its score."""

    maker: Maker
    least: int
    tokens: int
    score: Callable[[str, list[str]], float] = share_found


SUBTASKS = {
    "niah_single_1": Subtask(Needles(hay="noise"), 1, 128),
    "niah_single_2": Subtask(Needles(), 1, 128),
    "niah_single_3": Subtask(Needles(value_kind="uuids"), 1, 128),
    "niah_multikey_1": Subtask(Needles(keys=4), 1, 128),
    "niah_multikey_2": Subtask(Needles(hay="needle"), 1, 128),
    "niah_multikey_3": Subtask(Needles(hay="needle", key_kind="uuids", value_kind="uuids"), 1, 128),
    "niah_multivalue": Subtask(Needles(values=4), 1, 128),
    "niah_multiquery": Subtask(Needles(keys=4, asked=4), 1, 128),
    "vt": Subtask(Variables(), Variables.hops + 1, 30),
    "cwe": Subtask(CommonWords(), CommonWords.common, 120),
    "fwe": Subtask(FrequentWords(), 83, 50),  # from 83 words on, ranks 4 and 5 differ
    "qa_1": Subtask(Documents("squad"), 1, 32, any_found),
    "qa_2": Subtask(Documents("hotpotqa"), 1, 32, any_found),
}


def items(context: Context) -> list[Item]:
    args = context.args
    source = Source(context, max(args.lengths["ruler"]))
    for name, read in (("squad", squad), ("hotpotqa", hotpotqa)):
        if (path := getattr(args, name)) is not None:
            source.questions[name] = read(path)
    made = []
    for length in args.lengths["ruler"]:
        for kind in _asked(args.subtasks, source):
            size = None
            tokens = min(SUBTASKS[kind].tokens, args.answer_tokens or SUBTASKS[kind].tokens)
            for number in range(args.samples):
                sample, ids, size = _fitting(context.engine, source, kind, length, number, tokens, size)
                facts = {"length": length, "kind": kind, "answer_tokens": tokens, "answer": sample.references}
                made.append(Item(f"{kind}/{length}/{number}", ids, facts))
    return made


def _asked(named: list[str] | None, source: Source) -> list[str]:
    """Return the subtasks of --subtasks, or all of which the questions were given."""
    for kind in named or ():
        if kind not in SUBTASKS:
            raise UserError(f"--subtasks: no subtask {kind!r}; there are {', '.join(SUBTASKS)}")
    found = []
    for kind in named or SUBTASKS:
        maker = SUBTASKS[kind].maker
        if isinstance(maker, Documents) and maker.file not in source.questions:
            if named:
                raise UserError(f"--subtasks: {kind} needs a file of questions, --{maker.file} FILE")
            continue
        found.append(kind)
    return found


def _fitting(
    engine: Any, source: Source, kind: str, length: int, number: int, tokens: int, size: int | None
) -> tuple[Sample, list[int], int]:
    """Return (sample, its tokens, the size to begin with) of a size that leaves room for the answer: `size` or, where
    that does not fit, some percent less. Without `size`, it is the largest that fits.
    """
    room, subtask = length - tokens, SUBTASKS[kind]

    def made(size: int) -> tuple[Sample, list[int]]:
        draw = Draw(length, number, random.Random(f"ruler {kind} {length} {number}"))
        sample = subtask.maker.make(source, size, draw)
        return sample, Frame(engine, sample.earlier).whole(sample.said, sample.begun)

    if size is None:
        size = largest(lambda size: len(made(size)[1]), subtask.least, room)
    tried = size
    while len((found := made(tried))[1]) > room:
        if tried == subtask.least:
            raise UserError(f"--lengths: {length} tokens are too few for {kind}, at least {len(found[1]) + tokens}")
        tried = max(subtask.least, tried - max(1, tried // 100))
    return *found, size


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    score = SUBTASKS[item.facts["kind"]].score

    def of(text: str) -> float:
        return score(text, item.facts["answer"])

    yield from answers.measure(engine, item, settings, of, lambda text: of(text) == 1)


def tables(rows: list[dict[str, Any]]) -> list[str]:
    return answers.tables(rows, "RULER, its scores in percent", "kind")


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    return []
