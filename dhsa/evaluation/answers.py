"""Code shared by the tasks whose answers are decoded: greedy decoding, scores from 0 to 1, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dhsa.evaluation import report
from dhsa.evaluation.pairing import estimate, paired
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Item

__all__ = ["measure", "tables"]


def measure(
    engine: Any, item: Item, settings: list[Setting], score: Callable[[str, Item], float], stop: str | None = None
) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Yield, for every setting, its score: the prompt is prefilled by the setting, the answer decoded exactly."""
    for setting in settings:
        text, work = engine.generate(item.ids, setting, item.facts["answer_tokens"], stop)
        yield setting, {"score": score(text, item), "text": text, **work}


def tables(rows: list[dict[str, Any]], title: str, part: str) -> list[str]:
    """Return, for each length, every method's score in percent by `part` (a field), the mean over prompts, and the
    difference to dense attention; then a comparison of each method with each other.
    """
    lines = []
    for length, some in report.grouped(rows, "length"):
        lines += [f"### {title}, up to {length:,} tokens", "", *_scores(some, part)]
        for given, same in report.grouped([r for r in some if r["method"] != "dense"], "given"):
            lines += report.duels(
                report.by_item(same, "score"),
                f"Paired differences at {report.budget_words(given)}: mean score in points, row minus column; bold "
                "beyond twice its standard error, positive where the row is better.",
                scale=100,
            )
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
