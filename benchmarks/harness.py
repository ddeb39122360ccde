"""What every benchmark here shares: timing in turns beside the machine's peak, rows with goals, a table, a JSON file.

Machines are noisy and their clocks drift, so nothing is compared across runs: contestants take turns in one process, a
peer's call is set against our calls right before and after it, and the multiply-add peak is measured on both sides of
every timed call. What is reported are medians. Not here: what is measured (bench_*.py), pictures and documents
(report.py).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dhsa
from dhsa import commands

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
RESULTS = Path(__file__).resolve().parent / "results"
_SETTLE = 0.01  # seconds: torch's threads go on spinning for a moment, and would slow whatever comes next


# ---- timing ----------------------------------------------------------------------------------------------------------


def peak(threads: int) -> float:
    """The momentary peak of float32 multiply-adds, GFLOP/s. Shares of every dtype refer to it."""
    return statistics.median(dhsa._core.fma_peak(threads) for _ in range(3))


@dataclass
class Timing:
    """Samples of calls that took turns: seconds of one call, and the peak (GFLOP/s) around that very sample."""

    seconds: dict[str, list[float]]
    peaks: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, ours: str, peer: str) -> float:
        """How many times longer `peer` takes: each of its samples against the mean of ours before and after it."""
        a, b = self.seconds[ours], self.seconds[peer]
        return statistics.median(b[i] / statistics.mean(a[i : i + 2]) for i in range(len(b)))

    def share(self, name: str, flop: float) -> float:
        """Share of the peak, sample by sample."""
        pairs = zip(self.seconds[name], self.peaks[name], strict=True)
        return statistics.median(flop / s / 1e9 / p for s, p in pairs)

    def peak(self, name: str) -> float:
        return statistics.median(self.peaks[name])


def interleave(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    threads: int,
    *,
    fewer: dict[str, int] | None = None,
    inner: int = 1,
    warm: bool = True,
) -> Timing:
    """Runs the calls in turn, `repeats` rounds, and the first (ours) once more at the end.

    fewer: calls that run in the first so many rounds only, because they take minutes. inner: calls in one sample, for
    those of microseconds. warm: whether each runs once before (compiling, touching memory, starting threads).
    """
    if warm:
        for call in calls.values():
            call()
    rounds = [
        [name for name in calls if i < min(repeats, (fewer or {}).get(name, repeats))] for i in range(repeats)
    ] + [[next(iter(calls))]]
    timing = Timing({name: [] for name in calls}, {name: [] for name in calls})
    for name in (name for names in rounds for name in names):
        call = calls[name]
        time.sleep(_SETTLE)
        before = peak(threads)
        start = time.perf_counter()
        for _ in range(inner):
            call()
        seconds = (time.perf_counter() - start) / inner
        time.sleep(_SETTLE)
        timing.seconds[name].append(seconds)
        timing.peaks[name].append((before + peak(threads)) / 2)
    return timing


# ---- rows ------------------------------------------------------------------------------------------------------------


def check(measure: str, value: float, goal: float, unit: str, *, at_most: bool = False) -> dict[str, Any]:
    """A goal and whether it is reached. unit: "x" (a ratio), "%" (a share, from 0 to 1), or what to print after it."""
    return {
        "measure": measure,
        "value": value,
        "goal": goal,
        "unit": unit,
        "at_most": at_most,
        "pass": value <= goal if at_most else value >= goal,
    }


def row(
    section: str,
    work: str,
    dtype: torch.dtype | str,
    shape: str,
    seconds: float | None = None,
    *,
    flop: float | None = None,
    timing: Timing | None = None,
    ours: str = "dhsa",
    peer: str | None = None,
    checks: Iterable[dict[str, Any]] = (),
    detail: str = "",
    **more: Any,
) -> dict[str, Any]:
    """One line of the table. With a `timing`, seconds, share of peak, peer's seconds and ratio come from there."""
    dtype_name = DTYPES[str(dtype).removeprefix("torch.")] if isinstance(dtype, torch.dtype) else dtype
    result: dict[str, Any] = {"section": section, "work": work, "dtype": dtype_name, "shape": shape}
    if timing is not None:
        seconds = timing.median(ours)
        if flop is not None:
            result |= {
                "share_of_peak": timing.share(ours, flop),
                "peak_gflops": timing.peak(ours),
                "peak_of": "fp32",
            }
        if peer is not None:
            result |= {"peer": peer, "peer_seconds": timing.median(peer), "ratio": timing.ratio(ours, peer)}
        result["samples"] = timing.seconds
    result["seconds"] = seconds
    if flop is not None and seconds:
        result["gflops"] = flop / seconds / 1e9
    checks = [c for c in checks if c is not None]
    return (
        result | {"checks": checks, "pass": all(c["pass"] for c in checks) if checks else None, "detail": detail} | more
    )


HEADINGS = ("work", "dtype", "shape", "time", "GFLOP/s", "of peak", "peer", "ratio", "goal", "")


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, never in exponents."""
    if not math.isfinite(value) or value == 0:
        return str(value)
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def duration(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{number(seconds * factor)} {unit}"
    raise AssertionError


def _with_unit(value: float, unit: str) -> str:
    return {"x": f"{value:.2f}x", "%": f"{value * 100:.0f} %"}.get(unit) or f"{number(value)} {unit}"


def goal_text(checks: list[dict[str, Any]]) -> str:
    """Each goal; what was measured is said too where no other column says it."""
    parts = []
    for c in checks:
        limit = {"x": f"{c['goal']:g}x", "%": f"{c['goal'] * 100:g} %"}.get(c["unit"]) or f"{c['goal']:g} {c['unit']}"
        said = "" if c["measure"] in ("ratio", "of peak") else f" ({_with_unit(c['value'], c['unit'])})"
        parts.append(
            f"{'' if c['measure'] == 'ratio' else c['measure'] + ' '}{'≤' if c['at_most'] else '≥'} {limit}{said}"
        )
    return ", ".join(parts)


def verdict(r: dict[str, Any]) -> str:
    return "ERROR" if r.get("error") else {True: "pass", False: "MISS", None: ""}[r.get("pass")]


def cells(r: dict[str, Any]) -> list[str]:
    """The row as text, one for each of HEADINGS. The printed table and the document share it."""
    share = r.get("share_of_peak")
    peer = f"{r['peer']} {duration(r['peer_seconds'])}" if r.get("peer") else ""
    of = " of fp32" if r.get("peak_of") == "fp32" and r["dtype"] != "fp32" else ""
    return [
        r["work"],
        r["dtype"],
        r.get("shape", ""),
        duration(r["seconds"]) if r.get("seconds") else "",
        number(r["gflops"]) if r.get("gflops") else "",
        f"{share * 100:.0f} %{of}" if share is not None else "",
        peer,
        f"{r['ratio']:.2f}x" if r.get("ratio") else "",
        r["error"] if r.get("error") else goal_text(r.get("checks", [])),
        verdict(r),
    ]


_WIDTHS = (26, 5, 15, 9, 8, 13, 14, 8)


def line(values: Iterable[str]) -> str:
    values = list(values)
    padded = [
        v.ljust(w) if i in (0, 1, 2, 6) else v.rjust(w) for i, (v, w) in enumerate(zip(values, _WIDTHS, strict=False))
    ]
    return "  ".join([*padded, *(v for v in values[len(_WIDTHS) :] if v)]).rstrip()


# ---- runs ------------------------------------------------------------------------------------------------------------


def machine(threads: int) -> dict[str, Any]:
    here = Path(__file__).resolve().parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
        commit = told.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return {
        "cpu": commands.cpu_name(),
        "threads": threads,
        "isa": dhsa.build_info()["isa"],
        "dhsa": dhsa.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "fma_peak": peak(threads),
    }


@dataclass
class Job:
    """Something that yields rows; `name` is what progress shows."""

    section: str
    name: str
    rows: Callable[[], Iterator[dict[str, Any]]]


def run_jobs(jobs: list[Job], path: Path, head: dict[str, Any], add: bool = False) -> dict[str, Any]:
    """Runs jobs one after another, shows their rows and writes them to `path` as they come. One that fails becomes a
    row that says so; the others go on. With `add`, rows that `path` holds stay unless they are measured again."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    kept = json.loads(path.read_text(encoding="utf-8")) if add and path.exists() else {"rows": [], "seconds": 0.0}
    report: dict[str, Any] = {**head, "complete": False, "rows": kept["rows"]}
    console = Console(highlight=False)
    console.print(Text(line(HEADINGS), style="bold"), soft_wrap=True)
    started = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=job.name)
            try:
                for r in job.rows():
                    _add(report, r, path, console)
            except KeyboardInterrupt:
                raise
            except Exception as error:  # a peer that cannot compile must not cost an hour's other rows
                said = (str(error).strip().splitlines() or [""])[0]
                r = row(job.section, job.name, "", "", error=f"{type(error).__name__}: {said}")
                _add(report, r | {"traceback": traceback.format_exc(), "pass": False}, path, console)
            progress.advance(task)
    report |= {"complete": True, "seconds": kept.get("seconds", 0.0) + time.perf_counter() - started}
    write_json(path, report)
    judged = [r["pass"] for r in report["rows"] if r["pass"] is not None]
    console.print(
        f"{sum(judged)} of {len(judged)} rows pass; {report['seconds']:.0f} s; written to {path}", soft_wrap=True
    )
    return report


def _add(report: dict[str, Any], r: dict[str, Any], path: Path, console: Any) -> None:
    from rich.text import Text

    key = [r[x] for x in ("section", "work", "dtype", "shape")]
    for i, old in enumerate(report["rows"]):
        if [old[x] for x in ("section", "work", "dtype", "shape")] == key:
            report["rows"][i] = r
            break
    else:
        report["rows"].append(r)
    write_json(path, report)
    style = {"MISS": "yellow", "ERROR": "red"}.get(verdict(r), "")
    console.print(Text(line(cells(r)), style=style), soft_wrap=True)
    if r.get("detail"):
        console.print(Text("  " + r["detail"], style="dim"), soft_wrap=True)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Replaced as a whole, so that a reader or an interruption never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(report, indent=1), encoding="utf-8")
    os.replace(part, path)
