"""Pictures of results, drawn by matplotlib off screen: curves of loss against budget, KL against time, heat maps of
needles, grids of scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dhsa._files import replacing

__all__ = ["Spot", "curves", "frontier", "grid", "heatmaps"]

_INK, _QUIET, _PAPER = "#1c2733", "#6b7885", "#fbfaf7"
_COLOURS = (
    "#c8553d", "#3d6b8c", "#5f8f4e", "#8c6bb1", "#d9a441", "#3aa6a0", "#a0522d", "#d46fa5", "#6b7885", "#1c2733",
)  # fmt: skip
_MARKS = "osD^vP*X<>"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    return figure


def _style(axis: Any) -> None:
    axis.set_facecolor(_PAPER)
    axis.tick_params(colors=_QUIET, labelsize=9)
    for edge in axis.spines.values():
        edge.set_color("#c9c6bd")


def curves(data: Mapping[str, Sequence[tuple[float, float, float, float]]], path: Path, title: str) -> Path:
    """Draw loss against budget (left) and against realised density (right): a line for each method, with one standard
    error.

    data: for each method, points (budget or NaN, density, mean log ratio, its standard error).
    """
    figure = _figure(12.5, 5.6)
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.07, right=0.83, top=0.87, bottom=0.12, wspace=0.06)
    budgets = sorted({p[0] for points in data.values() for p in points if not math.isnan(p[0])})
    for place, (name, points) in enumerate(data.items()):
        style = {
            "color": _COLOURS[place % len(_COLOURS)], "marker": _MARKS[place % len(_MARKS)], "markersize": 5,
            "linewidth": 1.6, "capsize": 2, "linestyle": "-" if place < len(_COLOURS) else "--",
        }  # fmt: skip
        for axis, column in ((left, 0), (right, 1)):
            some = sorted(p for p in points if not math.isnan(p[column]))
            some.sort(key=lambda p: p[column])
            if not some:
                continue
            x = [p[column] * (100 if column else 1) for p in some]
            y = [(math.exp(p[2]) - 1) * 100 for p in some]
            bars = [0 if math.isnan(p[3]) else p[3] * 100 for p in some]
            axis.errorbar(x, y, bars, label=name if axis is right else None, **style)
    for axis, label in ((left, "budget, keys"), (right, "realised density of the sparse layers, %")):
        _style(axis)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label, color=_INK)
        axis.axhline(0, color=_QUIET, linewidth=0.8)
        axis.grid(axis="y", color="#e4e1d8", linewidth=0.6)
        axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    left.set_xticks(budgets, [f"{b:,.0f}" for b in budgets])
    left.minorticks_off()
    # Losses span orders of magnitude; those of a good method are near zero and of either sign.
    left.set_yscale("symlog", linthresh=0.5)
    low, high = left.get_ylim()
    ticks = [v for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000) for v in (-step, step)]
    left.set_yticks([0, *(v for v in ticks if low <= v <= high)])
    left.minorticks_off()
    left.yaxis.set_major_formatter(lambda v, _: f"{v:+g}" if v else "0")
    left.set_ylabel("perplexity above dense, %", color=_INK)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(0.84, 0.5), frameon=False, fontsize=9)
    figure.text(0.07, 0.93, title, fontsize=13, fontweight="bold", color=_INK)
    with replacing(path) as part:
        figure.savefig(part, dpi=130)
    return path


class Spot(NamedTuple):
    """One setting: time as a share of dense attention's, KL > 0 with its standard error (or NaN), and whether no other
    setting beats it.
    """

    method: str
    budget: str
    share: float
    kl: float
    error: float
    best: bool


def frontier(spots: Sequence[Spot], path: Path, title: str) -> Path:
    """Draw KL (logarithmic) against time: a line for each method through its budgets. Settings on the frontier are
    filled, those that are beaten are hollow; a grey line joins the filled ones that have the least KL in their time.
    """
    methods: dict[str, list[Spot]] = {}
    for spot in sorted(spots, key=lambda spot: spot.share):
        methods.setdefault(spot.method, []).append(spot)
    figure = _figure(12.5, max(5.6, 1.2 + 0.21 * len(methods)))
    axis = figure.subplots()
    figure.subplots_adjust(left=0.07, right=0.7, top=0.9, bottom=0.1)
    best = sorted((spot for spot in spots if spot.best), key=lambda spot: (spot.share, spot.kl))
    least = [spot for n, spot in enumerate(best) if all(spot.kl < other.kl for other in best[:n])]
    axis.plot([100 * s.share for s in least], [s.kl for s in least], color="#c9c6bd", linewidth=6, zorder=1)
    for place, (name, own) in enumerate(methods.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        line = "-" if place < len(_COLOURS) else "--"
        x, y = [100 * spot.share for spot in own], [spot.kl for spot in own]
        # A bar that reached zero would have no end on this axis.
        low, high = (
            [0 if math.isnan(spot.error) else min(spot.error, most * spot.kl) for spot in own]
            for most in (0.9, math.inf)
        )
        axis.errorbar(x, y, [low, high], color=colour, linewidth=1.2, capsize=2, linestyle=line, zorder=2)
        mark = {"marker": _MARKS[place % len(_MARKS)], "color": colour, "linestyle": "none", "markersize": 6}
        for filled in (True, False):
            some = [spot for spot in own if spot.best == filled]
            face = colour if filled else _PAPER
            axis.plot([100 * s.share for s in some], [s.kl for s in some], markerfacecolor=face, zorder=3, **mark)
        axis.plot([], [], label=name, **{**mark, "linestyle": line})
        for spot in own:
            if spot.budget:
                place_of = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 7, "color": _QUIET}
                axis.annotate(spot.budget, (100 * spot.share, spot.kl), **place_of)
    _style(axis)
    axis.set_yscale("log")
    axis.set_xlim(0, max(105, axis.get_xlim()[1]))
    axis.axvline(100, color=_QUIET, linewidth=0.8, linestyle=":")
    axis.grid(which="both", color="#e4e1d8", linewidth=0.6)
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:.0e}"[0] in "25" else "")
    axis.tick_params(which="minor", colors=_QUIET, labelsize=9)
    axis.set_xlabel("selecting and attending, % of dense attention's time", color=_INK)
    axis.set_ylabel("KL from dense, nats", color=_INK)
    figure.legend(loc="center left", bbox_to_anchor=(0.71, 0.5), frameon=False, fontsize=8)
    figure.text(0.07, 0.94, title, fontsize=13, fontweight="bold", color=_INK)
    with replacing(path) as part:
        figure.savefig(part, dpi=130)
    return path


def heatmaps(
    panels: Mapping[str, Mapping[tuple[float, int], tuple[float, str]]], path: Path, title: str, label: str
) -> Path:
    """Draw panels of depth (downward) by length (to the right).

    panels: for each title, cells {(depth, length): (value, text in the cell)}; values are at most zero, lower is worse.
    """
    lengths = sorted({length for cells in panels.values() for _, length in cells})
    depths = sorted({depth for cells in panels.values() for depth, _ in cells})
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    width, height = 1.2 + columns * (1.0 + 0.62 * len(lengths)), 1.5 + lines * (0.9 + 0.24 * len(depths))
    figure = _figure(max(width, 6.0), max(height, 3.5))
    axes = np.atleast_2d(figure.subplots(lines, columns, squeeze=False))
    worst = min((value for cells in panels.values() for value, _ in cells.values()), default=0.0)
    worst = max(min(worst, -0.5), -20.0)
    image = None
    for axis, (name, cells) in zip(axes.flat, panels.items(), strict=False):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for (depth, length), (value, text) in cells.items():
            r, c = depths.index(depth), lengths.index(length)
            grid[r, c] = value
            axis.text(c, r, text, ha="center", va="center", fontsize=7, color=_INK)
        image = axis.imshow(grid, cmap="RdYlGn", alpha=0.75, vmin=worst, vmax=0, aspect="auto")
        axis.set_title(name, fontsize=9, color=_INK)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        _style(axis)
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(title, fontsize=11, fontweight="bold", color=_INK)
    figure.supxlabel("tokens", fontsize=9, color=_QUIET)
    figure.supylabel("depth of the needle", fontsize=9, color=_QUIET)
    figure.tight_layout(rect=(0, 0, 0.89, 0.98))
    if image is not None:
        bar = figure.colorbar(image, cax=figure.add_axes((0.9, 0.15, 0.012, 0.7)))
        bar.set_label(label, fontsize=8, color=_INK)
        bar.ax.tick_params(labelsize=7)
    with replacing(path) as part:
        figure.savefig(part, dpi=130)
    return path


def grid(columns: Mapping[str, Mapping[str, float]], path: Path, title: str) -> Path:
    """Draw scores from 0 to 100 as coloured cells with their numbers.

    columns: for each title, {line: score}; NaN leaves a cell empty. All have the same lines.
    """
    lines = list(next(iter(columns.values())))
    values = np.array([[column[line] for column in columns.values()] for line in lines], float)
    figure = _figure(2.6 + 0.95 * len(columns), 2.0 + 0.32 * len(lines))
    axis = figure.subplots()
    axis.imshow(np.ma.masked_invalid(values), cmap="RdYlGn", alpha=0.75, vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=_INK)
    axis.set_xticks(range(len(columns)), list(columns), rotation=30, ha="right")
    axis.set_yticks(range(len(lines)), lines)
    _style(axis)
    axis.set_title(title, fontsize=11, fontweight="bold", color=_INK)
    figure.tight_layout()
    with replacing(path) as part:
        figure.savefig(part, dpi=130)
    return path
