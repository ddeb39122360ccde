"""longbench: the data sets of LongBench (arXiv 2308.14508), LongBench v2 (arXiv 2412.15204) and LongBench Pro (arXiv
2601.02872), as they are published, each with its metric.

A record of the first version has `input`, `context`, `answers`, `dataset` and `all_classes`. One of v2 has `context`,
`question`, `choice_A` to `choice_D` and `answer`, a letter; its metric is accuracy. One of Pro has `context`,
`question_nonthinking`, `secondary_task`, `language` and `answer`, a list; its tasks have six metrics, see `PRO`. Files
are JSON lines, or a list of records.

The wording of the prompts is this project's (in Pro, the record's own question), so scores cannot be compared with
published tables. With a chat template, a prompt is what the user says; examples and code to be continued are never put
into a chat, as in LongBench. A prompt longer than asked for loses its middle, as in LongBench. Without --longbench a
sample in the format of the first version is made from the texts: from which of several paragraphs does a sentence come?
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dhsa.commands import UserError
from dhsa.evaluation import answers, metrics, texts
from dhsa.evaluation.prompts import Frame
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Context, Item

DENSE = True
VERSION = 1
SAMPLE = "paragraphs-sample"
V2 = "v2"


class Kind(NamedTuple):
    """How records of a data set are asked and scored. `prompt` contains {context}, {input} and, where the answer begins
    with words of it, {begun} before these.
    """

    prompt: str
    tokens: int
    score: Callable[[str, str, list[str]], float]
    line: bool = False  # only the first line of an answer counts: more examples may follow
    chat: bool = True  # whether it is put into a chat


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


_QUESTION = "{context}\n\nA question about the text above, and its short answer.\nQuestion: {input}\n{begun}Answer:"
_SUMMARY = "{context}\n\nA summary of the text above in one page:\n"
_CHINESE = "{context}\n\n根据上文回答问题。\n问题：{input}\n{begun}回答："

KINDS: dict[str, Kind] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"), Kind(_QUESTION, 64, _f1)
    ),
    "triviaqa": Kind(
        "Questions about passages, each with its answer.\n\n{context}\n\n{input}", 32, _f1, line=True, chat=False
    ),
    "gov_report": Kind(_SUMMARY, 512, _rouge),
    "multi_news": Kind(_SUMMARY, 512, _rouge),
    "qmsum": Kind("{context}\n\nFrom the minutes of the meeting above.\nQuery: {input}\n{begun}Answer:", 512, _rouge),
    "samsum": Kind("Dialogues, each with a summary.\n\n{context}\n\n{input}", 128, _rouge, line=True, chat=False),
    "trec": Kind("Questions, each with its type.\n\n{context}\n{input}", 64, metrics.accuracy, line=True, chat=False),
    "lsht": Kind("新闻及其类别。\n\n{context}\n{input}", 64, metrics.accuracy, line=True, chat=False),
    "passage_count": Kind(
        "{context}\n\nSome paragraphs above repeat others. How many different ones are there?\n"
        "{begun}Different ones, in number:",
        32,
        _number,
    ),
    "passage_retrieval_en": Kind(
        "{context}\n\nAn abstract of one of the paragraphs above:\n{input}\n\n{begun}It is an abstract of Paragraph",
        32,
        _number,
    ),
    "passage_retrieval_zh": Kind("{context}\n\n以下是上文某一段落的摘要：\n{input}\n\n{begun}它出自段落", 32, _number),
    "multifieldqa_zh": Kind(_CHINESE, 64, _f1_chinese),
    "dureader": Kind(_CHINESE, 128, _rouge_chinese),
    "vcsum": Kind("{context}\n\n以上会议记录的总结：", 512, _rouge_chinese),
    "lcc": Kind("{context}", 64, _code, chat=False),
    "repobench-p": Kind("{context}{input}", 64, _code, chat=False),
    SAMPLE: Kind("{context}\n\nA sentence from above:\n{input}\n\n{begun}It stands in Paragraph", 8, _number),
    V2: Kind(
        "{context}\n\nA question about the text above, with one right answer of four.\nQuestion: {input}\n\n"
        "{begun}The letter of the right answer is",
        8,
        metrics.choice,
    ),
}

_PRO_PROMPT, _PRO_TOKENS = "{context}\n\n\n\n{input}", 1024

# By the number of a secondary task of LongBench Pro: its metric, of the answer's lines and the references.
PRO: dict[str, Callable[[list[str], list[str]], float]] = {
    **dict.fromkeys(("T1.1", "T1.2"), metrics.ndcg),
    **dict.fromkeys(("T2.1", "T2.2", "T6.3"), metrics.pairs_in_order),
    **dict.fromkeys(("T3.1", "T3.2", "T11.1", "T11.2"), metrics.first_line_equal),
    **dict.fromkeys(("T5.1", "T5.2", "T6.2", "T7.1", "T7.2", "T7.3", "T9.1", "T9.2"), metrics.lines_f1),
    **dict.fromkeys(("T6.1", "T8.1", "T8.2", "T8.3", "T10.1", "T10.2"), metrics.lines_found),
}
SUMMARIES = ("T4.1", "T4.2")  # the mean of ROUGE-L and a similarity of embeddings there, ROUGE-L alone here


def items(context: Context) -> list[Item]:
    args, engine = context.args, context.engine
    frame = Frame(engine)
    made = []
    for length in args.lengths["longbench"]:
        for name, number, record in _records(context, length):
            dataset, prompt, tokens, chat, asked, references = _read(record, name, f"{name}:{number}")
            said, _, begun = prompt.partition("{begun}")
            said = said.replace("{input}", asked).replace("{context}", record["context"])
            if frame.chat and chat:
                head, tail = frame.head(), frame.tail("", begun)
                said = said.rstrip("\n")
            else:
                head, tail, said = engine.prefix, [], said + begun
            ids = head + _without_middle(engine.encode(said), length - len(head) - len(tail)) + tail
            facts = {"length": length, "dataset": dataset, "answer": references}
            facts["answer_tokens"] = min(tokens, args.answer_tokens or tokens)
            made.append(Item(f"{name}:{number}", ids, facts, record))
    return made


def _read(record: dict[str, Any], name: str, place: str) -> tuple[str, str, int, bool, str, list[str]]:
    """Return (data set, prompt, tokens of an answer, whether it may be a chat, what is asked, references)."""
    if "choice_A" in record:
        choices = [f"choice_{letter}" for letter in "ABCD"]
        _check(record, ("context", "question", "answer", *choices), place)
        asked = "\n".join([record["question"], *(f"({field[-1]}) {record[field]}" for field in choices)])
        return V2, KINDS[V2].prompt, KINDS[V2].tokens, True, asked, [record["answer"]]
    if "question_nonthinking" in record:
        _check(record, ("context", "question_nonthinking", "secondary_task"), place)
        dataset = record["secondary_task"]
        if _pro(dataset) not in (*PRO, *SUMMARIES):
            raise UserError(f"--longbench: {place}: no secondary task {dataset!r} in LongBench Pro")
        references = _references(record, "answer", place)
        return dataset, _PRO_PROMPT, _PRO_TOKENS, True, record["question_nonthinking"], references
    dataset = record.get("dataset") or name.removesuffix("_e")
    kind = KINDS.get(dataset.removesuffix("_e"))
    if kind is None or dataset == V2:
        raise UserError(f"--longbench: no data set {dataset!r}; there are {', '.join(KINDS)}")
    _check(record, ("input", "context"), place)
    references = _references(record, "answers", place)
    return dataset, kind.prompt, kind.tokens, kind.chat, record["input"], references


def _check(record: dict[str, Any], fields: tuple[str, ...], place: str) -> None:
    if missing := [field for field in fields if not isinstance(record.get(field), str)]:
        raise UserError(f"--longbench: {place}: no {missing[0]}")


def _references(record: dict[str, Any], field: str, place: str) -> list[str]:
    held = record.get(field)
    if not isinstance(held, list) or not held or not all(isinstance(text, str) for text in held):
        raise UserError(f"--longbench: {place}: no {field}")
    return held


def _pro(dataset: str) -> str:
    """The number of a secondary task, as "T3.2"."""
    return dataset.partition(" ")[0]


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
        files += sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--longbench: no .jsonl or .json file in {', '.join(map(str, args.longbench))}")
    for path in files:
        for number, record in enumerate(_file(path)[: args.samples], 1):
            yield path.stem, number, record


def _file(path: Path) -> list[dict[str, Any]]:
    if path.suffix != ".json":
        return texts.jsonl(path, "--longbench")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--longbench: {path}: {error}") from error
    if not isinstance(held, list) or not all(isinstance(record, dict) for record in held):
        raise UserError(f"--longbench: {path}: expected a list of records")
    return held


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


def graded(dataset: str) -> bool:
    """Whether the metric of a data set says if a question was answered, not how similar a text is."""
    kind = KINDS.get(dataset.removesuffix("_e"))
    if kind is None:
        return _pro(dataset) not in SUMMARIES
    return kind.score not in (_rouge, _rouge_chinese, _code)


def score(text: str, record: dict[str, Any]) -> float:
    """Return the score of an answer by the metric of the record's data set; where the references are alternatives, the
    best one over them.
    """
    dataset = record["dataset"]
    if _pro(dataset) in PRO:
        return PRO[_pro(dataset)](metrics.answer_lines(text), metrics.normalized_lines(record["answers"]))
    if _pro(dataset) in SUMMARIES:
        said = " ".join(text.lower().split())
        chinese = record.get("language") == "Chinese"
        references = metrics.normalized_lines(record["answers"])
        return max(metrics.rouge_l(said, reference, chinese=chinese) for reference in references)
    kind = KINDS[dataset.removesuffix("_e")]
    text = metrics.first_line(text) if kind.line else text
    classes = record.get("all_classes") or []
    return max(kind.score(text, reference, classes) for reference in record["answers"])


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    record = {**item.data, "dataset": item.facts["dataset"], "answers": item.facts["answer"]}
    yield from answers.measure(engine, item, settings, lambda text: score(text, record))


def tables(rows: list[dict[str, Any]]) -> list[str]:
    return answers.tables(rows, "LongBench, its metrics in percent", "dataset")


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    return []
