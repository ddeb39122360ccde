"""Pictures and tables from what the benchmarks wrote: `make bench-report` rewrites docs/PERFORMANCE.md from the JSON.

In the document, text between `<!-- name -->` and `<!-- /name -->` is made here and nowhere else, so that no number is
ever typed by hand. Not here: measuring.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import HEADINGS, RESULTS, cells, number
from peers import tokens

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "PERFORMANCE.md"
PICTURE = ROOT / "docs" / "images" / "attention_time.png"

_INK, _QUIET, _PAPER = "#1c2733", "#6b7885", "#fbfaf7"
_CURVES = {  # key in a row's series: label, colour, line
    "flex": ("flex_attention", "#b08a3e", "-"),
    "sdpa": ("SDPA", "#8a5a83", "-"),
    "exact": ("dhsa, exact", "#2f7f86", "-"),
    "dhsa": ("dhsa, sparse", "#c4472b", "-"),
}


# ---- the chart -------------------------------------------------------------------------------------------------------


def curves(report: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Per dtype and contestant (length, seconds), ascending, of every row that carries a series."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for r in report["rows"]:
        for name, seconds in (r.get("series") or {}).items():
            found.setdefault(r["dtype"], {}).setdefault(name, []).append((r["length"], seconds))
    return {dtype: {name: sorted(points) for name, points in by.items()} for dtype, by in found.items()}


def draw(report: dict[str, Any], path: Path) -> Path:
    """Seconds of one attention call against length, one panel a dtype, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    found = curves(report)
    if not found:
        raise ValueError("no row carries a series to draw: run the rows called whole")
    shape = next(r["shape"].rsplit(" ", 1)[0] for r in report["rows"] if r.get("series"))
    told = report["machine"]
    with plt.rc_context({"font.family": "sans-serif", "font.size": 10, "text.color": _INK, "axes.edgecolor": _QUIET}):
        figure, axes = plt.subplots(
            1, len(found), figsize=(5.6 * len(found), 4.9), sharey=True, squeeze=False, facecolor=_PAPER
        )
        figure.subplots_adjust(left=0.07, right=0.895, top=0.80, bottom=0.09, wspace=0.36)
        for axis, (dtype, by) in zip(axes[0], found.items(), strict=True):
            axis.set(facecolor=_PAPER, xscale="log", yscale="log")
            axis.set_title({"fp32": "float32", "bf16": "bfloat16"}.get(dtype, dtype), loc="left", weight="bold")
            for name, (_, colour, style) in _CURVES.items():
                if points := by.get(name):
                    x, y = zip(*points, strict=True)
                    axis.plot(x, y, style, color=colour, lw=2.2, marker="o", ms=4, mec=_PAPER, mew=0.8, clip_on=False)
            lengths = sorted({n for points in by.values() for n, _ in points})
            axis.xaxis.set_major_locator(FixedLocator(lengths))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}K"))
            axis.yaxis.set_major_formatter(FuncFormatter(_seconds))
            axis.yaxis.set_minor_locator(NullLocator())
            axis.tick_params(colors=_QUIET, length=0, labelleft=True)
            axis.grid(color=_INK, alpha=0.09, lw=0.8)
            for side in axis.spines.values():
                side.set_visible(False)
        low, high = axes[0][0].get_ylim()
        for axis, by in zip(axes[0], found.values(), strict=True):
            _label_ends(axis, by, low, high)
        figure.text(0.07, 0.945, "Seconds of one causal attention call", fontsize=14, weight="bold", va="center")
        figure.text(
            0.07,
            0.893,
            f"{shape}, {told['threads']} threads, {told['isa']}; sparse: Config(), 1,024 keys, selection included;"
            " against tokens, both axes logarithmic",
            color=_QUIET,
            va="center",
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, facecolor=_PAPER)
        plt.close(figure)
    return path


def _seconds(value: float, _: Any = None) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 0.999:
            return f"{value * factor:g} {unit}"
    return f"{value:g} s"


def _label_ends(axis: Any, by: dict[str, list[tuple[int, float]]], low: float, high: float) -> None:
    """Each curve's name and last seconds right of its end, pushed apart where they would overlap."""
    span, longest = math.log(high / low), max(points[-1][0] for points in by.values())
    ends = sorted((math.log(points[-1][1] / low) / span, name) for name, points in by.items() if name in _CURVES)
    gap, at = 0.095, [height for height, _ in ends]
    for _ in range(100):  # neighbours that are too close push each other apart, equally
        for i in range(len(at) - 1):
            push = max(0.0, gap - (at[i + 1] - at[i])) / 2
            at[i] -= push
            at[i + 1] += push
    for y, (_, name) in zip(at, ends, strict=True):
        last, seconds = by[name][-1]
        label, colour, _ = _CURVES[name]
        # A curve may end before the others: a peer that has no memory for the longest.
        where = "" if last == longest else f" at {last // 1024}K"
        axis.annotate(
            f"{label}\n{_short(seconds)}{where}",
            xy=(1.0, y),
            xycoords="axes fraction",
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            linespacing=1.15,
            annotation_clip=False,
        )


def _short(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


# ---- the document ----------------------------------------------------------------------------------------------------

TITLES = {
    "dense": "Dense causal",
    "softcap": "Dense causal with softcap",
    "window": "Sliding window",
    "executor": "Sparse executor alone, on the lists of a configuration",
    "whole": "Whole sparse call, selection included",
    "wide": "Heads of 512",
    "sides": "Bidirectional DHSA call, selection included",
    "selecting": "The share of it that selection takes",
    "boundaries": "Boundary networks and their labels, 8K",
    "decode": "Decoding",
    "short": "Short inputs",
    "scaling": "Scaling",
    "growth": "Growth with length",
    "memory": "Memory beside inputs and output",
}


def markdown(headings: list[str] | tuple[str, ...], rows: list[list[str]]) -> str:
    """A table; columns that are empty in every row are left out."""
    keep = [i for i in range(len(headings)) if any(r[i] for r in rows)]
    lines = ["| " + " | ".join(headings[i] for i in keep) + " |", "|" + "---|" * len(keep)]
    return "\n".join(lines + ["| " + " | ".join(r[i].replace("|", "/") for i in keep) + " |" for r in rows])


def prose(text: str) -> str:
    """`text` in lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def machine_text(report: dict[str, Any]) -> str:
    m = report["machine"]
    return (
        f"{m['date']}, {m['cpu']}, {m['threads']} threads, tier `{m['isa']}` (multiply-add peak of fp32"
        f" {m['fma_peak']:.0f} GFLOP/s), torch {m['torch']}, dhsa {m['dhsa']}"
        + (f" at {m['commit']}" if m["commit"] else "")
    )


def attention_tables(report: dict[str, Any]) -> str:
    judged = [r["pass"] for r in report["rows"] if r["pass"] is not None]
    parts = [
        prose(
            f"Measured {machine_text(report)}. {sum(judged)} of {len(judged)} rows reach their"
            f" goals. The run took {report['seconds'] / 60:.0f} minutes."
        )
    ]
    for section in [*TITLES, *sorted({r["section"] for r in report["rows"]} - TITLES.keys())]:
        if not (rows := [r for r in report["rows"] if r["section"] == section]):
            continue
        parts.append(f"**{TITLES.get(section, section)}**")
        if section == "whole":
            parts.append(markdown((*HEADINGS, "against exact", "selecting"), [[*cells(r), *_whole(r)] for r in rows]))
        else:
            parts.append(markdown(HEADINGS, [cells(r) for r in rows]))
        if section == "growth":
            parts.append("\n".join(f"- {r['shape']}: {r['detail']}" for r in rows if r.get("detail")))
    return "\n\n".join(parts)


def _whole(r: dict[str, Any]) -> list[str]:
    return ["", ""] if r.get("error") else [f"{r['over_exact']:.2f}x", f"{r['selection_share']:.0%}"]


def model_tables(report: dict[str, Any]) -> str:
    rows = [r for r in report["rows"] if r["section"] == "model" and not r.get("error")]
    lengths = sorted({r["length"] for r in rows})
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for r in rows:
        lines.setdefault(f"{r['work']}, {r['dtype']}", {})[r["length"]] = r

    def seconds(r: dict[str, Any] | None) -> str:
        return "" if r is None else f"{number(r['seconds'])} s" + (f" ({r['ratio']:.1f}x)" if r.get("ratio") else "")

    def memory(r: dict[str, Any] | None) -> str:
        if r is None:
            return ""
        total = f"{r['peak_mib']:,.0f}"
        return f"{total} in all" if r.get("added_mib") is None else f"{r['added_mib']:,.0f} / {total}"

    heads = [f"{tokens(n)} tokens" for n in lengths]
    parts = [
        prose(f"Measured {machine_text(report)}; text: {report['text']}."),
        markdown(
            ["prefill (against sdpa of the dtype)", *heads],
            [[name, *(seconds(by.get(n)) for n in lengths)] for name, by in lines.items()],
        ),
        markdown(
            ["peak memory in MiB (added by prefill / in all)", *heads],
            [[name, *(memory(by.get(n)) for n in lengths)] for name, by in lines.items()],
        ),
    ]
    for r in (r for r in report["rows"] if r["section"] == "profile" and not r.get("error")):
        total = r["seconds"]
        parts.append(
            f"Where the time of a sparse prefill of {tokens(r['length'])} tokens goes, {r['dtype']} ({total:.1f} s"
            " under the profiler):"
        )
        parts.append(
            markdown(["part", "seconds", "share"], [[k, f"{s:.2f}", f"{s / total:.0%}"] for k, s in r["parts"].items()])
        )
        named = ", ".join(f"`{k}` {s / total:.0%}" for k, s in r["operators"].items())
        parts.append(prose(f"PyTorch's operators by their own time: {named}."))
    return "\n\n".join(parts)


def replaced(text: str, name: str, content: str) -> str:
    """`text` with what stands between the two comments of `name` replaced."""
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.S)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one place between <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda m: f"{m[1]}\n{content.strip()}\n\n{m[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--attention",
        type=Path,
        nargs="+",
        default=[RESULTS / "attention.json", RESULTS / "attention-avx2.json"],
        help="files of bench_attention.py, NAME.json as for --model; the picture is made from attention.json",
    )
    parser.add_argument(
        "--model",
        type=Path,
        nargs="+",
        default=[RESULTS / "model.json"],
        help="files of bench_model.py; a file NAME.json is written where the document says <!-- NAME -->",
    )
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    tables: list[tuple[Path, str, Callable[[dict[str, Any]], str]]] = [
        *((path, path.stem, attention_tables) for path in args.attention),
        *((path, path.stem, model_tables) for path in args.model),
    ]
    for path, name, make in tables:
        if not path.exists():
            print(f"{path}: not there, its part of the document stays as it is")
            continue
        report = json.loads(path.read_text(encoding="utf-8"))
        if not report["complete"]:
            raise SystemExit(f"{path}: its run did not finish")
        content = make(report)
        if name == "attention":
            where = os.path.relpath(draw(report, args.picture), args.document.parent)
            content = f"![Seconds of one attention call against its length]({where})\n\n{content}"
        text = args.document.read_text(encoding="utf-8")
        args.document.write_text(replaced(text, name, content), encoding="utf-8")
        print(f"{args.document}: {name}")


if __name__ == "__main__":
    main()
