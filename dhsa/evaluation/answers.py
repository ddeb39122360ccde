"""Code shared by the tasks whose answers are decoded: greedy decoding, scores from 0 to 1, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dhsa.evaluation import report
from dhsa.evaluation.metrics import share_found
from dhsa.evaluation.pairing import estimate, paired
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Item

__all__ = ["answered", "closeness", "measure", "tables"]


def measure(
    engine: Any,
    item: Item,
    settings: list[Setting],
    score: Callable[[str], float],
    enough: Callable[[str], bool] | None = None,
) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Yield, for every setting, its score: the prompt is prefilled by the setting, the answer decoded exactly.

    Decoding ends once `enough` is true of the text, for scores that more text cannot change.
    """
    for setting in settings:
        text, work = engine.generate(item.ids, setting, item.facts["answer_tokens"], enough)
        yield setting, {"score": score(text), "text": text, **work}


def answered(engine: Any, reading: Any, right: list[int], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the greedy answer after what was read, whether the reference (`facts["answer"]`) occurs in it, and the
    log-likelihood of the right answer, whose tokens but the last the cache then holds.
    """

    def score(text: str) -> float:
        return share_found(text, [facts["answer"]])

    text = engine.continuation(engine.copied(reading), facts["answer_tokens"], lambda text: score(text) == 1)
    values, best = engine.answer(reading, right)
    return {"score": score(text), "text": text, "loglik": float(values.sum()), "likeliest": bool(best.all())}


def tables(rows: list[dict[str, Any]], title: str, part: str) -> list[str]:
    """Return, for each length, every method's score in percent by `part` (a field), the mean over prompts, and the
    difference to dense attention; then a comparison of each method with each other.
    """
    lines = []
    for length, some in report.grouped(rows, "length"):
        lines += [f"### {title}, up to {length:,} tokens", "", *_scores(some, part)]
        lines += report.duels_by_budget(
            some,
            "score",
            "mean score in points, row minus column; bold beyond twice its standard error, positive where the row is "
            "better.",
            scale=100,
        )
    return lines


def closeness(rows: list[dict[str, Any]], title: str) -> list[str]:
    """Return, for each length, how close each method's answers are to those of dense attention: whether they are the
    same texts, and the log-likelihood of the right answer. Rows have `loglik` and `texts`, a list.
    """
    lines = []
    for length, some in report.grouped(rows, "length"):
        dense = {r["item"]: r for r in some if r["method"] == "dense"}
        body = []
        for (given, method), same in report.grouped(some, "given", "method"):
            both = [(r, dense[r["item"]]) for r in same if r["item"] in dense]
            alike = [100.0 * (a == b) for r, other in both for a, b in zip(r["texts"], other["texts"], strict=True)]
            diff = paired({r["item"]: r["loglik"] for r in same}, {name: r["loglik"] for name, r in dense.items()})
            cells = [method, given or "all", report.number(estimate(alike).mean, 1)]
            cells.append(report.number(estimate([r["loglik"] for r in same]).mean))
            body.append([*cells, "0" if method == "dense" else report.shown(diff)])
        head = ["method", "budget", "same answer as dense, %", "log-likelihood", "less dense's, nats"]
        lines += [f"### {title}, up to {length:,} tokens: answers beside dense attention's", ""]
        lines += report.markdown(head, body)
    return lines


def _scores(rows: list[dict[str, Any]], part: str) -> list[str]:
    dense = report.by_item([r for r in rows if r["method"] == "dense"], "score").get("dense", {})
    parts = list(dict.fromkeys(r[part] for r in rows))
    body = []
    for (given, method), same in report.grouped(rows, "given", "method"):
        cells = [method, given or "all"]
        cells += [report.number(100 * estimate([r["score"] for r in same if r[part] == p]).mean, 1) for p in parts]
        cells.append(report.number(100 * estimate([r["score"] for r in same]).mean, 1))
        diff = paired({r["item"]: 100 * r["score"] for r in same}, {k: 100 * v for k, v in dense.items()})
        cells.append("0" if method == "dense" else report.shown(diff, 1))
        body.append([*cells, *report.work_cells(same)])
    return report.markdown(["method", "budget", *parts, "mean", "less dense's", *report.WORK], body)
