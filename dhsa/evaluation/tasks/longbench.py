"""longbench: data sets in LongBench's published JSON lines (arXiv 2308.14508), each with its metric.

A record has `input`, `context`, `answers`, `length`, `dataset`, `all_classes`. The wording of the prompts is this
project's, in the form of a text to be completed, so scores cannot be compared with published tables. A prompt longer
than asked for loses its middle, as in LongBench. Without --longbench a sample in the same format is made from the
texts: from which of several paragraphs does a sentence come?
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dhsa.commands import UserError
from dhsa.evaluation import answers, metrics, texts
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Context, Item

DENSE = True
VERSION = 1
SAMPLE = "paragraphs-sample"


class Kind(NamedTuple):
    """How records of a data set are asked and scored. `prompt` contains {context} and {input}."""

    prompt: str
    tokens: int
    score: Callable[[str, str, list[str]], float]
    line: bool = False  # only the first line of an answer counts: more examples may follow


def _f1(answer: str, reference: str, classes: list[str]) -> float:
    return metrics.f1(answer, reference)


def _rouge(answer: str, reference: str, classes: list[str]) -> float:
    return metrics.rouge_l(answer, reference)


def _f1_chinese(answer: str, reference: str, classes: list[str]) -> float:
    return metrics.f1(answer, reference, chinese=True)


def _rouge_chinese(answer: str, reference: str, classes: list[str]) -> float:
    return metrics.rouge_l(answer, reference, chinese=True)


def _number(answer: str, reference: str, classes: list[str]) -> float:
    return metrics.number_share(answer, reference)


def _code(answer: str, reference: str, classes: list[str]) -> float:
    return metrics.edit_similarity(metrics.code_line(answer), reference)


_QUESTION = "{context}\n\nA question about the text above, and its short answer.\nQuestion: {input}\nAnswer:"
_SUMMARY = "{context}\n\nA summary of the text above in one page:\n"
_CHINESE = "{context}\n\n根据上文回答问题。\n问题：{input}\n回答："

KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), Kind(_QUESTION, 64, _f1)
    ),
    "triviaqa": Kind("Questions about passages, each with its answer.\n\n{context}\n\n{input}", 32, _f1, True),
    "gov_report": Kind(_SUMMARY, 512, _rouge),
    "multi_news": Kind(_SUMMARY, 512, _rouge),
    "qmsum": Kind("{context}\n\nFrom the minutes of the meeting above.\nQuery: {input}\nAnswer:", 512, _rouge),
    "samsum": Kind("Dialogues, each with a summary.\n\n{context}\n\n{input}", 128, _rouge, True),
    "trec": Kind("Questions, each with its type.\n\n{context}\n{input}", 64, metrics.accuracy, True),
    "lsht": Kind("新闻及其类别。\n\n{context}\n{input}", 64, metrics.accuracy, True),
    "passage_count": Kind("{context}\n\nSome paragraphs above repeat others. Different ones, in number:", 32, _number),
    "passage_retrieval_en": Kind(
        "{context}\n\nAn abstract of one of the paragraphs above:\n{input}\n\nIt is an abstract of Paragraph",
        32,
        _number,
    ),
    "passage_retrieval_zh": Kind("{context}\n\n以下是上文某一段落的摘要：\n{input}\n\n它出自段落", 32, _number),
    "multifieldqa_zh": Kind(_CHINESE, 64, _f1_chinese),
    "dureader": Kind(_CHINESE, 128, _rouge_chinese),
    "vcsum": Kind("{context}\n\n以上会议记录的总结：", 512, _rouge_chinese),
    "lcc": Kind("{context}", 64, _code),
    "repobench-p": Kind("{context}{input}", 64, _code),
    SAMPLE: Kind("{context}\n\nA sentence from above:\n{input}\n\nIt stands in Paragraph", 8, _number),
}


def items(context: Context) -> list[Item]:
    args, engine = context.args, context.engine
    made = []
    for length in args.lengths["longbench"]:
        for name, number, record in _records(context, length):
            dataset = record.get("dataset") or name.removesuffix("_e")
            kind = KINDS.get(dataset.removesuffix("_e"))
            if kind is None:
                raise UserError(f"--longbench: no data set {dataset!r}; there are {', '.join(KINDS)}")
            missing = [f for f in ("input", "context") if not isinstance(record.get(f), str)]
            if missing or not record.get("answers"):
                raise UserError(f"--longbench: {name}:{number}: no {(missing or ['answers'])[0]}")
            text = kind.prompt.replace("{input}", record["input"]).replace("{context}", record["context"])
            ids = engine.prefix + _without_middle(engine.encode(text), length - len(engine.prefix))
            facts = {"length": length, "dataset": dataset, "answer": record["answers"]}
            facts["answer_tokens"] = min(kind.tokens, args.answer_tokens or kind.tokens)
            made.append(Item(f"{name}:{number}", ids, facts, record))
    return made


def _without_middle(ids: list[int], room: int) -> list[int]:
    return ids if len(ids) <= room else ids[: room // 2] + ids[len(ids) - (room - room // 2) :]


def _records(context: Context, length: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (file, line, record) of the first `--samples` records of each file."""
    args = context.args
    if not args.longbench:
        for number in range(args.samples):
            yield SAMPLE, number + 1, _sample(context, length, number)
        return
    files = []
    for path in args.longbench:
        files += sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--longbench: no .jsonl file in {', '.join(map(str, args.longbench))}")
    for path in files:
        for number, record in enumerate(texts.jsonl(path, "--longbench")[: args.samples], 1):
            yield path.stem, number, record


def _sample(context: Context, length: int, number: int) -> dict[str, Any]:
    rng = random.Random(f"longbench {length} {number}")
    text = texts.stream(context.engine, context.groups, 4 * length)
    found = [" ".join(p.split()) for p in text.split("\n\n")]
    paragraphs = [p for p in found if len(re.findall(r"[.!?]", p)) >= 2]
    if len(paragraphs) < 4:
        paragraphs = re.findall(r".{1,400}(?:\s|$)", " ".join(found))
    first = rng.randrange(len(paragraphs))
    chosen: list[str] = []
    size, room = 0, length - 160
    while size < room and len(chosen) < len(paragraphs):
        paragraph = f"Paragraph {len(chosen) + 1}: {paragraphs[(first + len(chosen)) % len(paragraphs)]}"
        size += len(context.engine.encode(paragraph)) + 2
        if size > room and chosen:
            break
        chosen.append(paragraph)
    place = rng.randrange(len(chosen))
    sentences = re.split(r"(?<=[.!?])\s", chosen[place].partition(": ")[2])
    return {
        "input": rng.choice(sentences)[:300],
        "context": "\n\n".join(chosen),
        "answers": [f"Paragraph {place + 1}"],
        "length": length,
        "dataset": SAMPLE,
        "all_classes": None,
    }


def score(text: str, record: dict[str, Any]) -> float:
    """Return the best score over the answers of the record, by the metric of its data set."""
    kind = KINDS[(record["dataset"]).removesuffix("_e")]
    text = metrics.first_line(text) if kind.line else text
    classes = record.get("all_classes") or []
    return max(kind.score(text, reference, classes) for reference in record["answers"])


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    record = {**item.data, "dataset": item.facts["dataset"]}
    yield from answers.measure(engine, item, settings, lambda text, _: score(text, record))


def tables(rows: list[dict[str, Any]]) -> list[str]:
    return answers.tables(rows, "LongBench, its metrics in percent", "dataset")


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    return []
