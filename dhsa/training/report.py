"""The results of a training: a table of scores, and the model card that is written beside the weights."""

from __future__ import annotations

import datetime
import math
import platform
from typing import Any

import dhsa
from dhsa.methods.gates import Gates
from dhsa.training.loop import Training
from dhsa.training.settings import Settings

__all__ = ["card", "mean_scores", "table"]

WHO = {
    "own": "own network",
    "shared": "shared network",
    "similarity": "similarity",
    "means": "means",
    "random": "random",
}
MEASURES = {"average_precision": "average precision", "recall": "recall"}


def present(training: Training) -> list[str]:
    """Return those of WHO that were measured."""
    first = next(iter(training.scores.values()))
    return [who for who in WHO if who in first]


def mean_scores(training: Training) -> dict[str, dict[str, float]]:
    """Return {who: {measure: mean over layers}}."""
    rows = training.scores.values()
    return {
        who: {m: _mean([row[who][m] for row in rows]) for m in MEASURES} for who in present(training)
    }  # fmt: skip


def _mean(values: list[float]) -> float:
    known = [x for x in values if not math.isnan(x)]
    return sum(known) / len(known) if known else float("nan")


def table(training: Training) -> Any:
    """Return a rich table: a row for each layer, and their means."""
    from rich.table import Table

    shown = Table(title="Held-out text: average precision / recall at the operating point")
    shown.add_column("layer")
    shown.add_column("best blocks" if isinstance(training.predictor, Gates) else "boundaries", justify="right")
    who = present(training)
    for name in who:
        shown.add_column(WHO[name], justify="right")
    for layer, row in training.scores.items():
        shown.add_row(str(layer), f"{row['positive']:.0%}", *(_pair(row[name]) for name in who))
    shown.add_section()
    means = mean_scores(training)
    shown.add_row("mean", "", *(_pair(means[name]) for name in who))
    return shown


def _pair(scores: dict[str, float]) -> str:
    return f"{scores['average_precision']:.3f} / {scores['recall']:.3f}"


def card(training: Training, settings: Settings, *, model: str, source: str, sizes: tuple[int, int], name: str) -> str:
    """Return the model card as Markdown. `sizes`: the numbers of tokens trained on and held out."""
    predictor, means, who = training.predictor, mean_scores(training), present(training)
    facts = ", ".join(f"{key} {value}" for key, value in (predictor.model or {}).items())
    losses = [
        f"{part}: {training.history[0][part]:.4f} to {training.history[-1][part]:.4f}" for part in training.history[0]
    ]
    if isinstance(predictor, Gates):
        about = [
            f'Gates of the method "seer" of `dhsa`, for {model} ({facts}).',
            "They score blocks of 64 keys for blocks of 64 queries. They contain no part of the model or of the text.",
        ]
        networks = f"- Networks: one for each of {len(predictor.layers)} layers"
        explained = [
            "Scores on the held-out text, by layer. The best blocks of a row are the 16 (at most a quarter) with the",
            "largest probability of a pair. Average precision is over all visible blocks; recall is the share of the",
            "the best blocks among as many that are ranked first.",
        ]
    else:
        about = [
            f"Boundary predictor for `dhsa` ({predictor.architecture} architecture), for {model} ({facts}).",
            "It scores the gaps between the keys of one attention layer. It contains no part of the model or of the "
            "text.",
        ]
        networks = f"- Networks: {'one for all layers' if predictor.shared else 'none for all layers'}" + (
            f", one for each of {len(predictor.layers)} layers" if predictor.layers else ""
        )
        explained = [
            "Scores on the held-out text, by layer. A boundary is a gap one side of which gets more than twice the",
            "other's attention from later tokens. Average precision is over all gaps; recall is the share of the",
            "boundaries that the labels would cut at (a quarter of the keys, more than 2 apart) that are cut at.",
        ]
    column = "best blocks" if isinstance(predictor, Gates) else "boundaries"
    lines = [
        f"# {name}",
        "",
        *about,
        "",
        f"- Made: {datetime.date.today().isoformat()} by `python -m dhsa train-boundaries`, dhsa {dhsa.__version__}, "
        f"Python {platform.python_version()}, in {training.seconds / 60:.1f} minutes"
        + (f", interrupted {training.resumed} times" if training.resumed else ""),
        f"- Text: {source}; {sizes[0]:,} tokens to train on, {sizes[1]:,} held out",
        networks,
        "- Settings: " + ", ".join(f"{key} {value}" for key, value in settings.fields().items()),
        f"- Loss of the first and the last piece: {'; '.join(losses)}",
        "",
        *explained,
        "",
        f"| layer | {column} | " + " | ".join(f"{WHO[name]}: {m}" for name in who for m in MEASURES.values()) + " |",
        "|" + "---|" * (2 + 2 * len(who)),
    ]
    for layer, row in training.scores.items():
        numbers = [f"{row[name][m]:.3f}" for name in who for m in MEASURES]
        lines.append(f"| {layer} | {row['positive']:.3f} | " + " | ".join(numbers) + " |")
    numbers = [f"{means[name][m]:.3f}" for name in who for m in MEASURES]
    lines.append("| mean | | " + " | ".join(numbers) + " |")
    return "\n".join(lines) + "\n"
