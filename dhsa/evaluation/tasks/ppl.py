"""ppl: how well a model predicts the second half of long documents, teacher-forced, in one prefill of each.

The whole document goes through one prefill, so the queries of the scored tokens see a selection too. The mean negative
log-likelihood (NLL) of the second half is compared, document by document, as a ratio of perplexities. A ratio may be
near 1, or below, although the model predicts other tokens than with dense attention. So the distributions are compared
too: their mean KL divergence from those of dense attention, and how often both have the same likeliest token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dhsa.evaluation import report, texts
from dhsa.evaluation.pairing import estimate, paired
from dhsa.evaluation.settings import Setting, dense
from dhsa.evaluation.tasks import Context, Item

DENSE = True
VERSION = 2
_TOGETHER = 4  # settings that are compared with dense attention at once, whose logits are computed once for them
CLOSENESS = ["KL from dense", "top-1 agreement, %"]


def items(context: Context) -> list[Item]:
    return texts.document_items(context, "ppl")


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    first = len(item.ids) // 2
    reference, dense_work = engine.prefill(item.ids, dense())  # also where its own row exists already
    for start in range(0, len(settings), _TOGETHER):
        some = settings[start : start + _TOGETHER]
        read = [(reference, dense_work) if s.dense else engine.prefill(item.ids, s) for s in some]
        found = engine.divergence([hidden for hidden, _ in read], reference, item.ids, first)
        for setting, (_, work), (values, kl, same) in zip(some, read, found, strict=True):
            facts = {"nll": -float(values.mean()), "kl": float(kl.mean()), "agreement": float(same.double().mean())}
            yield setting, {"scored": len(values), **facts, **work}


def tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for length, some in report.grouped(rows, "length"):
        lines += [f"### Perplexity of the second half, documents of {length:,} tokens", ""]
        lines += _ratios(some)
        lines += report.duels_by_budget(
            some,
            "nll",
            "mean log ratio of perplexities in percent, row over column; bold beyond twice its standard error, "
            "negative where the row's method is better.",
            scale=100,
        )
    return lines


def _ratios(rows: list[dict[str, Any]]) -> list[str]:
    baseline = report.by_item([r for r in rows if r["method"] == "dense"], "nll").get("dense", {})
    body = []
    for (given, method), same in report.grouped(rows, "given", "method"):
        values = {r["item"]: r["nll"] for r in same}
        diff = paired(values, baseline)
        ratio = math.exp(diff.mean)
        cells = [method, given or "all"]
        cells.append("1" if method == "dense" else f"{ratio:.4f} ± {report.number(ratio * diff.error, 4)}")
        cells.append(f"{math.exp(sum(values.values()) / len(values)):.3f}")
        cells += ["0", "100"] if method == "dense" else closeness_cells(same)
        body.append([*cells, *report.work_cells(same)])
    return report.markdown(["method", "budget", "ratio to dense", "perplexity", *CLOSENESS, *report.WORK], body)


def closeness_cells(rows: list[dict[str, Any]]) -> list[str]:
    """Return the cells under CLOSENESS, with standard errors over documents; rows of earlier releases have none."""
    kl = estimate([r["kl"] for r in rows if "kl" in r])
    agreement = estimate([100 * r["agreement"] for r in rows if "agreement" in r])
    return [report.shown(kl, 4), report.shown(agreement, 1)]


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    from dhsa.evaluation import pictures as draw

    made = []
    for length, some in report.grouped(rows, "length"):
        baseline = report.by_item([r for r in some if r["method"] == "dense"], "nll").get("dense", {})
        curves: dict[str, list[tuple[float, float, float, float]]] = {}
        for (_, method), same in report.grouped([r for r in some if r["method"] != "dense"], "given", "method"):
            diff = paired({r["item"]: r["nll"] for r in same}, baseline)
            if diff.count:
                density = sum(r["density"] for r in same) / len(same)
                budget = same[0]["budget"] if same[0]["mass"] is None else math.nan
                curves.setdefault(method, []).append((budget or math.nan, density, diff.mean, diff.error))
        if curves:
            title = f"Perplexity ratio to dense, second half of {length:,} tokens, {len(baseline)} documents"
            made.append(draw.curves(curves, folder / f"ppl_{length}.png", title))
    return made
