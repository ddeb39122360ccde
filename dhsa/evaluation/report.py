"""Markdown made from rows: what the tables of all tasks share, and the report as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dhsa._files import replacing
from dhsa.evaluation import tasks
from dhsa.evaluation.pairing import Estimate, paired

__all__ = [
    "WORK",
    "budget_words",
    "by_item",
    "duels",
    "duels_by_budget",
    "grouped",
    "markdown",
    "newest",
    "number",
    "whole",
    "work_cells",
    "write",
]

WORK = ["documents", "tokens", "density", "selection, s", "attention, s"]


def write(rows: Iterable[dict[str, Any]], folder: Path, command: str) -> tuple[Path, list[str], list[Path]]:
    """Write report.md and its pictures of these rows into `folder`; return (its path, its lines, the pictures)."""
    rows, mixed = newest(rows)
    lines = ["# Evaluation", "", f"Made by `{command}`.", ""]
    if mixed:
        lines += [f"**Rows of several builds of the core stand side by side here: {', '.join(mixed)}.**", ""]
    drawn: list[Path] = []
    for (model, dtype, products, layers), some in grouped(rows, "model", "dtype", "products", "layers"):
        lines += [f"## {model}, {dtype}" + ("" if products == "fp32" else f", weights' products in {products}")]
        lines += ["", *([f"Sparse layers: {layers}.", ""] if layers else [])]
        for name in tasks.NAMES:
            if own := [r for r in some if r["task"] == name]:
                task = tasks.task(name)
                lines += task.tables(own)
                made = task.pictures(own, folder)
                lines += [line for path in made for line in (f"![{path.stem}]({path.name})", "")]
                drawn += made
    lines += [
        "Density: (query, key) pairs attended over pairs visible, in the layers that were sparse; the seconds are of "
        "those layers too, a prompt each (where none was: of the layers without a window). ±: one standard error over "
        "prompts.",
        "",
    ]
    path = folder / "report.md"
    with replacing(path) as part:
        part.write_text("\n".join(lines), encoding="utf-8")
    return path, lines, drawn


def whole(row: Mapping[str, Any]) -> bool:
    """Whether a row has the fields that the report tells rows apart by."""
    names = ("model", "dtype", "products", "task", "item", "method", "given")
    return (
        all(type(row.get(name)) is str for name in names)
        and {"layers", "build", "config"} <= row.keys()
        and type(row.get("length")) is int
        and _rank(row["given"]) >= (0, 0.0)
    )


def newest(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the last row of every prompt, method and budget, and the methods whose remaining rows come from several
    builds, whose averages would mix these.
    """
    last: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        place = tuple(row[k] for k in ("model", "dtype", "products", "layers", "task", "item", "method", "given"))
        last[(*place, row["length"])] = row
    builds: dict[tuple, set] = {}
    for row in last.values():
        if row["method"] != "dense":
            builds.setdefault((row["task"], row["method"], row["given"], row["length"]), set()).add(
                (row["build"], str(row["config"]))
            )
    mixed = sorted({f"{task} {method} {given}" for (task, method, given, _), of in builds.items() if len(of) > 1})
    return list(last.values()), mixed


def grouped(rows: Sequence[dict[str, Any]], *names: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Yield (value or values of the named fields, rows with them); budgets in ascending order, others in order of
    occurrence.
    """
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    order = sorted(
        found, key=lambda key: [_rank(value) if n == "given" else 0 for n, value in zip(names, key, strict=True)]
    )
    for key in order:
        yield (key[0] if len(key) == 1 else key), found[key]


def _rank(given: str) -> tuple[int, float]:
    """Order dense first, then budgets of keys, then shares of mass."""
    if not given:
        return 0, 0.0
    if given.startswith("mass"):
        return 2, float(given.split()[1])
    return 1, float(given.replace(",", ""))


def by_item(rows: Sequence[dict[str, Any]], field: str) -> dict[str, dict[str, float]]:
    """Return {method: {prompt: value}}."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["item"]] = row[field]
    return found


def budget_words(given: str) -> str:
    return f"a share of {given}" if given.startswith("mass") else f"a budget of {given} keys"


def number(value: float, digits: int = 3) -> str:
    return "-" if value != value else f"{value:.{digits}f}"


def work_cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the cells under WORK: how much was attended to, and the seconds it took."""
    count = len(rows)

    def mean(name: str) -> float:
        return sum(r[name] for r in rows) / count

    tokens = sum(r["tokens"] for r in rows)
    density = f"{mean('density') * 100:.2f} %"
    if any(r.get("skipped") for r in rows):
        density += f", {mean('skipped') * 100:.1f} % skipped"
    return [f"{count}", f"{tokens:,}", density, number(mean("select_seconds")), number(mean("attend_seconds"))]


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table; every column except the first is aligned to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)] + [""]


def duels_by_budget(rows: list[dict[str, Any]], value: str, caption: str, *, scale: float = 1.0) -> list[str]:
    """At each budget, `duels` over a field of the rows of all methods but dense; the caption says what is compared."""
    lines = []
    for given, same in grouped([r for r in rows if r["method"] != "dense"], "given"):
        heading = f"Paired differences at {budget_words(given)}: {caption}"
        lines += duels(by_item(same, value), heading, scale=scale)
    return lines


def duels(values: Mapping[str, Mapping[str, float]], caption: str, *, scale: float = 1.0) -> list[str]:
    """Return a table of every method against every other, on the prompts that both read; empty for fewer than two
    methods.
    """
    names = list(values)
    if len(names) < 2:
        return []

    def cell(a: str, b: str) -> str:
        if a == b:
            return ""
        diff = paired(values[a], values[b])
        text = f"{diff.mean * scale:+.3g} ± {diff.error * scale:.2g}" if diff.count > 1 else number(diff.mean * scale)
        return f"**{text}**" if diff.sure else text

    return [caption, "", *markdown(["", *names], [[a, *(cell(a, b) for b in names)] for a in names])]


def shown(estimate: Estimate, digits: int = 3) -> str:
    """Return mean ± standard error."""
    return f"{number(estimate.mean, digits)} ± {number(estimate.error, digits)}"
