"""ppl: how well a model predicts the second half of long documents, teacher-forced, in one prefill of each.

The whole document goes through one prefill, so the queries of the scored tokens see a selection too. The mean negative
log-likelihood (NLL) of the second half is compared, document by document, as a ratio of perplexities.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dhsa.evaluation import report, texts
from dhsa.evaluation.pairing import paired
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Context, Item

DENSE = True


def items(context: Context) -> list[Item]:
    args = context.args
    return [
        Item(document.name, document.ids, {"length": length})
        for length in args.lengths["ppl"]
        for document in texts.documents(
            context.engine, context.groups, length, count=args.documents, skip=args.skip, join=args.join
        )
    ]


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    first = len(item.ids) // 2
    for setting in settings:
        hidden, work = engine.prefill(item.ids, setting)
        values, _ = engine.likelihood(hidden, item.ids, first)
        yield setting, {"scored": len(values), "nll": -float(values.mean()), **work}


def tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for length, some in report.grouped(rows, "length"):
        lines += [f"### Perplexity of the second half, documents of {length:,} tokens", ""]
        lines += _ratios(some)
        for given, same in report.grouped([r for r in some if r["method"] != "dense"], "given"):
            lines += report.duels(
                report.by_item(same, "nll"),
                f"Paired differences at {report.budget_words(given)}: mean log ratio of perplexities in percent, row "
                "over column; bold beyond twice its standard error, negative where the row's method is better.",
                scale=100,
            )
    return lines


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    dense = report.by_item([r for r in rows if r["method"] == "dense"], "nll").get("dense", {})
    body = []
    for (given, method), same in report.grouped(rows, "given", "method"):
        values = {r["item"]: r["nll"] for r in same}
        diff = paired(values, dense)
        ratio = math.exp(diff.mean)
        cells = [method, given or "all"]
        cells.append("1" if method == "dense" else f"{ratio:.4f} ± {report.number(ratio * diff.error, 4)}")
        cells.append(f"{math.exp(sum(values.values()) / len(values)):.3f}")
        body.append([*cells, *report.work_cells(same)])
    return report.markdown(["method", "budget", "ratio to dense", "perplexity", *report.WORK], body)


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    from dhsa.evaluation import pictures as draw

    made = []
    for length, some in report.grouped(rows, "length"):
        dense = report.by_item([r for r in some if r["method"] == "dense"], "nll").get("dense", {})
        curves: dict[str, list[tuple[float, float, float, float]]] = {}
        for (_, method), same in report.grouped([r for r in some if r["method"] != "dense"], "given", "method"):
            diff = paired({r["item"]: r["nll"] for r in same}, dense)
            if diff.count:
                density = sum(r["density"] for r in same) / len(same)
                budget = same[0]["budget"] if same[0]["mass"] is None else math.nan
                curves.setdefault(method, []).append((budget or math.nan, density, diff.mean, diff.error))
        if curves:
            title = f"Perplexity ratio to dense, second half of {length:,} tokens, {len(dense)} documents"
            made.append(draw.curves(curves, folder / f"ppl_{length}.png", title))
    return made
