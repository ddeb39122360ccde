"""The table of methods: what each of them answers at the same density, by task, length and subtask, beside dense
attention and beside the first of the methods.

The first method is measured at every budget, the others at the first budget. A budget is the number of keys of a block
of queries, but each query sees only those before it, so blocks of other sizes give other densities at one budget. So
the budgets of the others are set, for each length, to what gives the first one's density on a document
(`tasks/density.py`). The table states the density on the prompts themselves.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dhsa._files import replacing
from dhsa.commands import UserError
from dhsa.evaluation import report, runner
from dhsa.evaluation import settings as settings_of
from dhsa.evaluation.pairing import Estimate, estimate, paired
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.store import Store
from dhsa.evaluation.tasks import Context, longbench

__all__ = ["METHODS", "TASKS", "run", "write"]

METHODS = "rows,dhsa,block,window,xattention,vertical_slash,proxy,hisa"
TASKS = ("ruler", "longbench", "niah", "kv", "turns")
CLOSE = 0.01  # of the density that is to be met, relative
TRIES = 5


# ---- measuring -------------------------------------------------------------------------------------------------------


def run(
    names: Sequence[str],
    specs: Sequence[str],
    fixed: Sequence[Setting],
    context: Context,
    store: Store,
    base: dict[str, Any],
    step: Callable[..., Any],
    plan: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """Measure what is missing, length by length, and return all rows.

    names: of TASKS. specs: methods, the first of which the others are compared with. fixed: settings that are measured
    as they are.
    """
    rows = []
    for length in sorted({length for name in names for length in context.args.lengths[name]}):
        own = [name for name in names if length in context.args.lengths[name]]
        here = dataclasses.replace(context, args=_only(context.args, length))
        made = [settings_of.dense(), *_settings(here, specs, store, base, step), *fixed]
        rows += runner.run(own, list(dict.fromkeys(made)), here, store, base, step, plan)
    return rows


def _only(args: argparse.Namespace, length: int) -> argparse.Namespace:
    own = copy.copy(args)
    own.lengths = {name: [length] for name in (*args.lengths, "density")}
    return own


def _settings(
    context: Context, specs: Sequence[str], store: Store, base: dict[str, Any], step: Callable[..., Any]
) -> list[Setting]:
    """Return the settings of a length: the first method at every budget, the others at the first one's density."""
    args = context.args
    if not specs:
        return []
    options = {"dense_tail": args.dense_tail, "sink": args.sink, "local": args.local}

    def density(setting: Setting) -> float:
        return runner.run(["density"], [setting], context, store, base, step)[0]["density"]

    ours = [settings_of.setting(specs[0], budget, **options) for budget in args.budget]
    if len(specs) == 1:
        return ours
    wanted = density(ours[0])
    return [*ours, *(_matched(spec, ours[0], wanted, density, options) for spec in specs[1:])]


def _matched(
    spec: str, ours: Setting, wanted: float, density: Callable[[Setting], float], options: Mapping[str, Any]
) -> Setting:
    """Return the setting of a method whose density is that of `ours`, under the budget of that one as its name."""
    budget, found = ours.budget or 0, math.nan
    for _ in range(TRIES):
        setting = dataclasses.replace(settings_of.setting(spec, budget, **options), budget=ours.budget)
        found = density(setting)
        if abs(found / wanted - 1) <= CLOSE:
            return setting
        budget = max(16, round(budget * wanted / found))
    raise UserError(
        f"--methods: {spec}: no budget gives the density of {ours.label} at {ours.given} keys, {wanted:.4f}, within "
        f"{CLOSE:.0%}; the last one gives {found:.4f}"
    )


# ---- writing ---------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A method at a budget."""

    method: str
    given: str

    @property
    def title(self) -> str:
        return f"{self.method} {self.given}".strip()


def write(rows: Sequence[dict[str, Any]], folder: Path, command: str) -> tuple[Path, list[str], list[Path]]:
    """Write table.md and its pictures of these rows into `folder`; return (its path, its lines, the pictures)."""
    kept, mixed = report.newest([row for row in rows if row["task"] in TASKS])
    lines = ["# Methods at equal density", "", f"Made by `{command}`.", ""]
    if mixed:
        lines += [f"**Rows of several builds of the core stand side by side here: {', '.join(mixed)}.**", ""]
    drawn: list[Path] = []
    for (model, dtype, products, layers), some in report.grouped(kept, "model", "dtype", "products", "layers"):
        lines += [f"## {model}, {dtype}" + ("" if products == "fp32" else f", weights' products in {products}")]
        lines += ["", *([f"Sparse layers: {layers}.", ""] if layers else [])]
        for name in TASKS:
            for length, own in report.grouped([r for r in some if r["task"] == name], "length"):
                made, pictures = _of_task(name, length, own, folder)
                lines += [*made, *(line for path in pictures for line in (f"![{path.stem}]({path.name})", ""))]
                drawn += pictures
    lines += [
        "Scores are in percent, differences in points, ±: one standard error of paired differences over prompts; bold "
        "beyond twice of it. The mean is that of the parts that dense attention solves in at least half of the cases; "
        "the others are marked by † and shown, but what they lose says little. Density: (query, key) pairs attended "
        "over pairs visible, in the layers that were sparse; keys: those that a block of queries may see.",
        "",
    ]
    path = folder / "table.md"
    with replacing(path) as part:
        part.write_text("\n".join(lines), encoding="utf-8")
    return path, lines, drawn


def _of_task(name: str, length: int, rows: list[dict[str, Any]], folder: Path) -> tuple[list[str], list[Path]]:
    from dhsa.evaluation import pictures

    values: dict[Column, dict[str, dict[str, float]]] = {}  # scores by column, part and prompt
    for row in rows:
        parts = values.setdefault(Column(row["method"], row["given"]), {})
        score = float(row["found"]) if name == "niah" else row["score"]
        parts.setdefault(_part(name, row), {})[row["item"]] = 100 * score
    columns = sorted(values, key=lambda column: column.method != settings_of.DENSE)
    every = list(dict.fromkeys(part for column in columns for part in values[column]))
    every.sort(key=_order(name))
    dense = values.get(Column(settings_of.DENSE, ""), {})
    weak = [part for part in every if part in dense and _graded(name, part) and _mean(dense[part]).mean < 50]
    solved = [part for part in every if part not in weak]
    names = {part: part + (" †" if part in weak else "") for part in every}
    titles = [column.title for column in columns]

    body = [[names[part], *(report.number(_mean(values[c].get(part, {})).mean, 1) for c in columns)] for part in every]
    means = [_over([_mean(values[c].get(part, {})) for part in solved]).mean for c in columns]
    body.append(["**mean**", *(report.number(mean, 1) for mean in means)])
    if dense and means[0]:
        body.append(["of dense's, %", *(report.number(100 * mean / means[0], 1) for mean in means)])
    body += _work(rows, columns)
    head = f"### {_TITLES[name]}, {length:,} tokens"
    lines = [head, "", *report.markdown([_PARTS[name], *titles], body)]
    ours = [c for c in columns if c.method != settings_of.DENSE]
    if dense:
        beside = {column: dense for column in ours}
        lines += _differences("Less dense, points:", names, solved, values, beside, _PARTS[name])
    if ours:
        of_first = {c.given: c for c in ours if c.method == ours[0].method}
        beside = {c: values[of_first.get(c.given, ours[0])] for c in ours if c.method != ours[0].method}
        if beside:
            title = f"Less {ours[0].method} at the same budget, else at its first, points:"
            lines += _differences(title, names, solved, values, beside, _PARTS[name])
    if all("loglik" in row for row in rows):
        lines += _likelihoods(rows, columns)
    grid = {column.title: {names[p]: _mean(values[column].get(p, {})).mean for p in every} for column in columns}
    model = "".join(c if c.isalnum() or c in "-." else "_" for c in rows[0]["model"])
    path = folder / f"table_{model}_{rows[0]['dtype']}_{name}_{length}.png"
    return lines, [pictures.grid(grid, path, f"{_TITLES[name]}, {length:,} tokens: score in percent")]


_TITLES = {
    "ruler": "RULER",
    "longbench": "LongBench",
    "niah": "Needles, found by likelihood",
    "kv": "Values of keys in a JSON object",
    "turns": "Questions after a text was read",
}
_PARTS = {"ruler": "subtask", "longbench": "data set", "niah": "depth", "kv": "depth", "turns": "text"}


def _part(name: str, row: Mapping[str, Any]) -> str:
    if name == "ruler":
        return row["kind"]
    if name == "longbench":
        return row["dataset"]
    if name == "turns":
        return f"{row['kind']}, {row['session']}"
    fifth = min(4, int(5 * row["depth"]))
    return f"{20 * fifth} to {20 * fifth + 20} %"


def _order(name: str) -> Callable[[str], Any]:
    """How parts are sorted: depths by their number, others as they came."""
    return (lambda part: int(part.split()[0])) if name in ("niah", "kv") else (lambda part: 0)


def _graded(name: str, part: str) -> bool:
    """Whether a score is the share of cases that were solved; similarities to a text are not."""
    return name != "longbench" or longbench.graded(part)


def _mean(values: Mapping[str, float]) -> Estimate:
    return estimate(list(values.values()))


def _over(parts: Sequence[Estimate]) -> Estimate:
    """Return the mean of the means of parts, each of which counts alike, and its error over prompts."""
    if not parts:
        return Estimate(math.nan, math.nan, 0)
    error = math.sqrt(math.fsum(part.error**2 for part in parts)) / len(parts)
    return Estimate(math.fsum(part.mean for part in parts) / len(parts), error, sum(part.count for part in parts))


def _cell(found: Estimate, digits: int = 1) -> str:
    if not found.count or math.isnan(found.mean):
        return "-"
    text = f"{found.mean:+.{digits}f}" + ("" if math.isnan(found.error) else f" ± {found.error:.{digits}f}")
    return f"**{text}**" if found.sure else text


def _differences(
    title: str,
    names: Mapping[str, str],
    solved: Sequence[str],
    values: Mapping[Column, Mapping[str, Mapping[str, float]]],
    beside: Mapping[Column, Mapping[str, Mapping[str, float]]],
    head: str,
) -> list[str]:
    """Return a table of each column less the one beside it, part by part and as a mean."""
    found = {c: {p: paired(values[c].get(p, {}), other.get(p, {})) for p in names} for c, other in beside.items()}
    body = [[names[part], *(_cell(of[part]) for of in found.values())] for part in names]
    body.append(["**mean**", *(_cell(_over([of[part] for part in solved])) for of in found.values())])
    return [title, "", *report.markdown([head, *(c.title for c in found)], body)]


def _work(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> list[list[str]]:
    """Return the lines that say what each column attended to: prompts, keys of a block, realised density."""
    own = [[r for r in rows if (r["method"], r["given"]) == column] for column in columns]
    keys = [sorted({r["config"].get("budget") or 0 for r in of}) for of in own]
    return [
        ["prompts", *(f"{len(of)}" for of in own)],
        ["keys", *(" to ".join(f"{k:,}" for k in {of[0]: 0, of[-1]: 0}) if any(of) else "all" for of in keys)],
        ["density, %", *(report.number(100 * estimate([r["density"] for r in of]).mean, 2) for of in own)],
    ]


def _likelihoods(rows: Sequence[dict[str, Any]], columns: Sequence[Column]) -> list[str]:
    likely = {c: {r["item"]: r["loglik"] for r in rows if (r["method"], r["given"]) == c} for c in columns}
    dense = likely.get(Column(settings_of.DENSE, ""), {})
    body = [
        ["log-likelihood", *(report.number(_mean(likely[c]).mean) for c in columns)],
        [
            "less dense's",
            *("0" if c.method == settings_of.DENSE else _cell(paired(likely[c], dense), 3) for c in columns),
        ],
    ]
    return ["Of the right answer, in nats:", "", *report.markdown(["", *(c.title for c in columns)], body)]
