"""frontier: what settings lose against the time they take, and which of them no other one beats.

Two kinds of rows. Quality: as in ppl, every setting reads every document, and the distributions it gives for the second
half are compared with those of dense attention. Time: all settings read one document of each length in turns, several
times; the seconds are those that attention itself reports (`dhsa.last_run`), summed over the layers that may be sparse.
Quality does not depend on what else the machine does, so the two may be measured on different occasions.

The documents are in two halves: those that settings are chosen by, and those held out.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import dhsa
from dhsa.commands import UserError, cpu_name
from dhsa.evaluation import report, texts
from dhsa.evaluation.pairing import Estimate, estimate, paired
from dhsa.evaluation.runner import build_hash, prompt_hash
from dhsa.evaluation.settings import Setting, dense
from dhsa.evaluation.tasks import Context, Item, ppl

__all__ = ["DENSE", "HALVES", "VERSION", "Point", "items", "measure", "off_frontier", "pictures", "tables"]

DENSE = True
VERSION = 1
HALVES: tuple[str, ...] = ("choice", "held-out")


# ---- what is read ----------------------------------------------------------------------------------------------------


def items(context: Context) -> list[Item]:
    """For each length, the document of time, which is the first of the choice half, then those of quality: of
    `--documents`, one half (and what is left over of an odd number) from each half of the texts.
    """
    args = context.args
    if args.skip:
        raise UserError("--skip: not with frontier; --half says which documents are read")
    counts = dict(zip(HALVES, (args.documents - args.documents // 2, args.documents // 2), strict=True))
    wanted = [half for half in HALVES if args.half in (half, "both") and counts[half]]
    if not wanted:
        raise UserError(f"--documents: the held-out half of {args.documents} is none")
    groups = dict(zip(HALVES, texts.halves(context.groups), strict=True))

    def drawn(half: str, length: int, count: int) -> Iterator[tuple[str, list[int]]]:
        for document in texts.documents(context.engine, groups[half], length, count=count, join=args.join):
            # Files of several folders may have one name.
            yield f"{document.name} #{prompt_hash(document.ids)[:6]}", document.ids

    made = []
    for length in args.lengths["frontier"]:
        ((name, ids),) = drawn(HALVES[0], length, 1)
        facts = {"length": length, "part": "time", "repetitions": args.repetitions, **_machine()}
        place = f"{facts['machine']}, {facts['isa']}, {facts['threads']}"
        made.append(Item(f"time: {name} on {place}", ids, facts, due=args.only != "quality"))
        for half in wanted:
            facts = {"length": length, "part": "quality", "half": half}
            made += [
                Item(f"{half}: {name}", ids, facts, due=args.only != "time")
                for name, ids in drawn(half, length, counts[half])
            ]
    return made


def _machine() -> dict[str, Any]:
    """What seconds depend on, beside the setting and the prompt; those of dense attention, too."""
    return {
        "machine": cpu_name(),
        "isa": dhsa.build_info()["isa"],
        "threads": dhsa.get_num_threads(),
        "build": build_hash(),
    }


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    yield from (_times if item.facts["part"] == "time" else ppl.measure)(engine, item, settings)


def _times(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Each round goes once round dense attention and all settings; one prefill of each before the first round is not
    counted.
    """
    baseline = dense()
    turns = [baseline, *(s for s in settings if not s.dense)]
    rounds: dict[Setting, list[tuple[float, float, float]]] = {s: [] for s in turns}
    before = _load()
    for number in range(1 + item.facts["repetitions"]):
        exact: dict[int, Any] = {}
        for setting in turns:
            engine.prefill(item.ids, setting, replay=False)
            runs = {r.layer: r for r in dhsa.last_run(engine.model, "prefill")}
            exact = exact or runs
            if number:
                rounds[setting].append(_seconds(runs, exact, engine.layers))
    after = _load()
    for setting in settings:
        own = rounds[setting]
        select, attend, whole = (median(column) for column in zip(*own, strict=True))
        yield (
            setting,
            {
                "select_seconds": select,
                "attend_seconds": attend,
                "dense_seconds": whole,
                # Of each round for itself, so that a clock that drifts from round to round cancels.
                "share": median((s + a) / d for s, a, d in own),
                "rounds": [list(times) for times in own],
                "load": None if before is None or after is None else max(before, after),
            },
        )


def _seconds(
    runs: Mapping[int, Any], exact: Mapping[int, Any], layers: frozenset[int] | None
) -> tuple[float, float, float]:
    """Return the seconds of selecting, of attending, and of dense attention in the layers that may be sparse: those of
    `layers` (None: all) without a window, and those that were sparse.
    """
    able = [r for r in runs.values() if layers is None or r.layer in layers]
    shown = [r for r in able if r.kind == "full" or r.path == "sparse"] or able
    return (
        sum(r.select_seconds for r in shown),
        sum(r.attend_seconds for r in shown),
        sum(exact[r.layer].attend_seconds for r in shown),
    )


def _load() -> float | None:
    """The number of runnable processes over the last minute; None where the system does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# ---- the frontier ----------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A setting: its time as a share of dense attention's (NaN: not measured), and its KL on each prompt."""

    share: float
    kl: Mapping[str, float]


def off_frontier(points: Mapping[Any, Point]) -> set[Any]:
    """Return the names of those that another one beats: it is no slower, and its KL is lower by more than twice the
    standard error of the paired difference. On fewer than two prompts nothing is beaten.
    """

    def beats(one: Point, other: Point) -> bool:
        gain = paired(other.kl, one.kl)
        return one.share <= other.share and gain.mean > 0 and gain.sure

    return {name for name, point in points.items() if any(beats(other, point) for other in points.values())}


class _Line(NamedTuple):
    """A row of the table, a point of the picture."""

    method: str
    given: str
    rows: list[dict[str, Any]]  # of quality
    time: dict[str, Any] | None
    off: bool

    @property
    def share(self) -> float:
        return math.nan if self.time is None else self.time["share"]

    @property
    def kl(self) -> Estimate:
        return estimate([r["kl"] for r in self.rows])


def _lines(quality: Sequence[dict[str, Any]], times: Sequence[dict[str, Any]]) -> list[_Line]:
    """Return the settings in the order of their time; those without one last."""
    time = {(r["given"], r["method"]): r for r in times}
    rows = dict(report.grouped(list(quality), "given", "method"))
    points = {
        name: Point(time[name]["share"] if name in time else math.nan, {r["item"]: r["kl"] for r in of})
        for name, of in rows.items()
    }
    off = off_frontier(points)
    lines = []
    for given, method in rows:
        name = (given, method)
        lines.append(_Line(method, given, rows[name], time.get(name), name in off))
    return sorted(lines, key=lambda line: (line.time is None, line.share))


def _occasions(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield (rows of quality, rows of time) for each machine, tier and number of threads that times come from."""
    quality = [r for r in rows if r["part"] == "quality"]
    times = [r for r in rows if r["part"] == "time"]
    if not times and quality:
        yield quality, []
    for _, own in report.grouped(times, "machine", "isa", "threads"):
        yield quality, own


# ---- tables and pictures ---------------------------------------------------------------------------------------------


def tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for length, some in report.grouped(rows, "length"):
        for quality, times in _occasions(some):
            lines += [f"### Frontier, documents of {length:,} tokens", "", *_times_said(times)]
            if not quality:
                lines += ["No quality has been measured.", ""]
            present = [half for half in HALVES if any(r["half"] == half for r in quality)]
            if len(present) > 1:
                lines += ["All documents:", "", *_table(quality, times)]
            for half in present:
                own = [r for r in quality if r["half"] == half]
                lines += [f"Documents of the half {half}:", "", *_table(own, times)]
    return [*lines, *_EXPLAINED] if lines else []


_EXPLAINED = [
    "A config is beaten if another one takes no more time and its KL is lower by more than twice the standard "
    "error of the difference, document by document. Time: selecting and attending, as a share of the seconds of dense "
    "attention in the same layers, the median of the rounds' shares; seconds are medians over rounds. KL, top-1 "
    "agreement and the difference of negative log-likelihoods (nats) are against dense attention, ± one standard error "
    "over documents.",
    "",
]


def _times_said(times: Sequence[dict[str, Any]]) -> list[str]:
    if not times:
        return ["No time has been measured.", ""]
    first, loads = times[0], [r["load"] for r in times if r["load"] is not None]
    said = f"Times: {first['machine']}, {first['isa']}, {first['threads']} threads, {first['repetitions']} rounds"
    said += f", dense attention {report.number(median(r['dense_seconds'] for r in times))} s"
    said += f", load average {max(loads):.1f}." if loads else "."
    lines = [said, ""]
    # One process counts as up to one for each of its threads, and an average is never exact.
    if loads and max(loads) > first["threads"] + 0.5:
        lines += ["**The load average was above this process's threads: other work may have slowed the times.**", ""]
    return lines


def _table(quality: Sequence[dict[str, Any]], times: Sequence[dict[str, Any]]) -> list[str]:
    baseline = {r["item"]: r["nll"] for r in quality if r["method"] == "dense"}
    body = []
    for line in _lines(quality, times):
        exact = line.method == "dense"
        state = "-" if line.time is None else "beaten" if line.off else "**yes**"
        seconds = ["-"] * 3
        if line.time is not None:
            names = ("select_seconds", "attend_seconds")
            seconds = [f"{line.share:.3f}", *(report.number(line.time[name]) for name in names)]
        loss = paired({r["item"]: r["nll"] for r in line.rows}, baseline)
        density = estimate([100 * r["density"] for r in line.rows]).mean
        measured = ["0", "100", "0"] if exact else [*ppl.closeness_cells(line.rows), report.shown(loss, 4)]
        cells = [line.method, line.given or "all", state, *seconds, *measured]
        body.append([*cells, f"{density:.2f} %", f"{len(line.rows)}"])
    head = ["config", "budget", "frontier", "time / dense", "selection, s", "attention, s", *ppl.CLOSENESS]
    return report.markdown([*head, "NLL less dense's", "density", "documents"], body)


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    from dhsa.evaluation import pictures as draw

    made = []
    for length, some in report.grouped(rows, "length"):
        for number, (quality, times) in enumerate(_occasions(some), 1):
            points = [
                draw.Spot(line.method, line.given, line.share, line.kl.mean, line.kl.error, not line.off)
                for line in _lines(quality, times)
                if line.time is not None and line.kl.mean > 0
            ]
            if not points:
                continue
            first = some[0]
            name = "_".join(str(first[k]) for k in ("model", "dtype", "products", "layers") if first[k])
            name = re.sub(r"[^\w.+-]+", "-", f"frontier_{name}_{length}") + ("" if number == 1 else f"_{number}")
            documents = len({r["item"] for r in quality})
            title = f"{first['model'].partition(':')[0]}, {first['dtype']}, {length:,} tokens, {documents} documents"
            made.append(draw.frontier(points, folder / f"{name}.png", title))
    return made
