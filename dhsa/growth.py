"""How the time of one attention call grows with the length of a prompt: the demo's second table and picture.

A call is one layer of a model: queries and keys of its shape and dtype, of normal random numbers, whose values do not
change the time. An attention that would take too long at a length is not run there or beyond. From the seconds of the
calls follows what the prefill of a model would take if all its layers were global.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dhsa._files import replacing

__all__ = ["ATTENTIONS", "Growth", "Layer", "draw", "lengths_up_to", "measure", "table"]

ATTENTIONS = ("transformers sdpa", "dhsa, exact", "dhsa, default")
SHORTEST = 4096
# A call that is expected to take more seconds is left out; the whole comparison takes less than a minute.
MOST_SECONDS = 15.0
_STYLES = {
    "transformers sdpa": ("#6b7885", "s"),
    "dhsa, exact": ("#3d6b8c", "o"),
    "dhsa, default": ("#c8553d", "D"),
}


@dataclass(frozen=True)
class Layer:
    """The shape of a global layer: heads, KV heads, numbers of a head; and of its model: the layers, and the seconds
    that all but attention takes for each token.
    """

    heads: int
    kv_heads: int
    dim: int
    dtype: Any
    layers: int
    other_seconds: float


@dataclass(frozen=True)
class Growth:
    """Seconds of one call of each attention at each length, NaN where it was not run, and the share of the visible
    pairs that the default attended.
    """

    lengths: tuple[int, ...]
    seconds: dict[str, list[float]]
    density: list[float]

    def expected(self, name: str, place: int) -> float:
        """Return the seconds at a length, or, where they were not measured, those of the longest measured length
        times the square of the ratio of the lengths.
        """
        seconds = self.seconds[name]
        if not math.isnan(seconds[place]):
            return seconds[place]
        last = max((i for i in range(place) if not math.isnan(seconds[i])), default=None)
        return math.nan if last is None else seconds[last] * (self.lengths[place] / self.lengths[last]) ** 2


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """Return the lengths of the comparison: `longest` and its halves, at most five, none below 4,096 but the last."""
    lengths = [longest]
    while len(lengths) < 5 and lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    return tuple(reversed(lengths))


def measure(
    layer: Layer, config: Any, lengths: Sequence[int], advance: Callable[[], None], most_seconds: float = MOST_SECONDS
) -> Growth:
    """Return the seconds of a call of each attention at each length, the best of two where a call is short.

    config: the Config of the default. advance: called after every length.
    """
    import torch

    import dhsa

    generator = torch.Generator().manual_seed(0)
    grown = Growth(tuple(lengths), {name: [math.nan] * len(lengths) for name in ATTENTIONS}, [math.nan] * len(lengths))
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    calls = {
        "transformers sdpa": sdpa,
        "dhsa, exact": partial(dhsa.attention, config=dhsa.Config(budget=None)),
        "dhsa, default": partial(dhsa.attention, config=config),
    }
    for place, length in enumerate(lengths):
        qkv = [
            torch.randn(1, heads, length, layer.dim, generator=generator).to(layer.dtype)
            for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
        ]
        for name, call in calls.items():
            # NaN, of a length before which nothing is known, is not too long.
            if not grown.expected(name, place) > most_seconds:
                grown.seconds[name][place] = _best_of_two(partial(call, *qkv))
        grown.density[place] = dhsa.select(qkv[0], qkv[1], config).density()
        advance()
    return grown


def _best_of_two(call: Callable[[], Any]) -> float:
    """Return the seconds of a call, the second time if the first took less than a second."""
    seconds = math.inf
    for _ in range(2):
        start = time.perf_counter()
        call()
        seconds = min(seconds, time.perf_counter() - start)
        if seconds > 1:
            break
    return seconds


def _prefill(growth: Growth, layer: Layer, name: str, place: int) -> float:
    return layer.other_seconds * growth.lengths[place] + layer.layers * growth.expected(name, place)


def table(growth: Growth, layer: Layer, threads: str) -> Any:
    """Return a table for rich. threads: how the machine is described."""
    from rich.table import Table

    _, exact, default = ATTENTIONS
    made = Table(
        title=f"How one attention call grows: {layer.heads} heads on {layer.kv_heads} of {layer.dim}, {threads}",
        caption=(
            f"The last columns: prefill of a model like this one whose {layer.layers} layers were all global, by exact "
            "and by default attention. ~: computed from a shorter length, as growing with its square."
        ),
        caption_justify="left",
        title_style="bold",
    )
    made.add_column("tokens", justify="right")
    for name in ATTENTIONS:
        made.add_column(name, justify="right", no_wrap=True)
    for heading in ("attended", "default over exact", "all global: exact", "default", "gain"):
        made.add_column(heading, justify="right")
    for place, length in enumerate(growth.lengths):
        times = [_time(growth, name, place) for name in ATTENTIONS]
        one, other = growth.expected(exact, place), growth.expected(default, place)
        whole = [_prefill(growth, layer, name, place) for name in (exact, default)]
        sign = "~" if math.isnan(growth.seconds[exact][place]) else ""
        made.add_row(
            f"{length:,}",
            *times,
            f"{growth.density[place] * 100:.0f} %",
            f"{sign}{one / other:.1f}x",
            f"{sign}{whole[0]:.1f} s",
            f"{whole[1]:.1f} s",
            f"{sign}{whole[0] / whole[1]:.1f}x",
        )
    return made


def _time(growth: Growth, name: str, place: int) -> str:
    sign = "~" if math.isnan(growth.seconds[name][place]) else ""
    return f"{sign}{growth.expected(name, place):.2f} s"


def draw(growth: Growth, path: Path, title: str) -> Path:
    """Draw seconds against tokens, both axes logarithmic; lengths that were only computed are dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(8, 5), facecolor="#fbfaf7", layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_facecolor("#fbfaf7")
    places = range(len(growth.lengths))
    for name, (colour, mark) in _STYLES.items():
        run = [i for i in places if not math.isnan(growth.seconds[name][i])]
        rest = [i for i in places if i >= run[-1]]
        axis.plot(
            [growth.lengths[i] for i in run], [growth.seconds[name][i] for i in run], color=colour, marker=mark,
            label=name,
        )  # fmt: skip
        axis.plot(
            [growth.lengths[i] for i in rest], [growth.expected(name, i) for i in rest], color=colour, linestyle="--"
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(growth.lengths)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{int(x):,}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("tokens of the prompt")
    axis.set_ylabel("seconds of one call")
    axis.set_title(title, loc="left")
    axis.grid(True, color="#e3e0d8")
    axis.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return path
