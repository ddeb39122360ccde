"""density: the share of visible (query, key) pairs that a setting attends to, on one document of each length. The table
of methods takes it to give all of them the same density.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dhsa.evaluation import report, texts
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Context, Item

DENSE = False
VERSION = 1


def items(context: Context) -> list[Item]:
    made = []
    for length in context.args.lengths["density"]:
        (document,) = texts.documents(context.engine, context.groups, length, count=1, join=True)
        made.append(Item(document.name, document.ids, {"length": length}))
    return made


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    for setting in settings:
        _, work = engine.prefill(item.ids, setting)
        yield setting, work


def tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for length, some in report.grouped(rows, "length"):
        body = [
            [method, given, f"{same[-1]['config'].get('budget')}", *report.work_cells(same)]
            for (given, method), same in report.grouped(some, "given", "method")
        ]
        lines += [f"### Density, a document of {length:,} tokens", ""]
        lines += report.markdown(["method", "budget", "keys of a block", *report.WORK], body)
    return lines


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    return []
