"""Boundaries for comparison that no Config offers: those of the training label itself, and those of one layer for all
layers.

`label`: a layer's keys are cut at the gaps whose label is highest, as many and as far apart as the boundaries of the
Config would be. The label is computed from the layer's own attention, which costs more than sparse attention saves. It
is what a perfect predictor would give, and so an upper bound for trained predictors. `shared`: boundaries are found
once, in the first layer that leaves keys out, and all later layers use them. `shared-label`: both.

Only the boundaries differ from an ordinary run; scores, lists and attention are the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np

import dhsa
from dhsa import functional
from dhsa.functional import RunStats

__all__ = ["WORDS", "Cuts", "cutting", "label_boundaries"]

WORDS = ("label", "shared", "shared-label")

_run = functional.run  # `cutting` replaces the function of that name


def label_boundaries(q: Any, k: Any, config: dhsa.Config, **layer: Any) -> np.ndarray:
    """Return the boundaries with the highest labels, int32 [B, C + 1] as `dhsa.boundaries`.

    `layer`: its sliding_window, scale and softcap.
    """
    ratios = np.asarray(dhsa.attention_ratios(q, k, window=config.boundary_window, **layer))
    # Ratio 0 means that the gap has no label.
    scores = np.where(ratios > 0, np.log(np.where(ratios > 0, ratios, 1)), -np.inf)
    length = k.shape[2]
    core = config._core
    rows = [dhsa.pick_boundaries(s, core.num_gaps(length), theta=core.theta, nms=core.nms) for s in scores]
    made = np.full((len(rows), max(map(len, rows))), length, np.int32)
    for row, picked in zip(made, rows, strict=True):
        row[: len(picked)] = picked
    return made


class Cuts:
    """The boundaries of the layers of one prefill, by one of WORDS or, with "", as the Config says."""

    def __init__(self, word: str) -> None:
        self.word, self.label, self.shared = word, "label" in word, word.startswith("shared")
        self.selection: Any = None  # of the last sparse call
        self._first: Any = None

    def boundaries(self, q: Any, k: Any, config: dhsa.Config, window: int | None, **layer: Any) -> Any:
        """Return the boundaries of a layer that is sparse."""
        if self._first is not None:
            return self._first
        cuts = label_boundaries(q, k, config, sliding_window=window, **layer) if self.label else None
        if cuts is None:
            cuts = dhsa.boundaries(k, config)
        if self.shared:
            self._first = cuts
        return cuts

    def run(
        self, q: Any, k: Any, v: Any, config: dhsa.Config | None = None, **options: Any
    ) -> tuple[Any, Any, RunStats]:
        """`dhsa.functional.run` with these boundaries. Calls that leave no key out neither use nor set them."""
        layer: dict[str, Any] = {name: options.get(name) for name in ("scale", "softcap", "window")}
        causal = options.get("causal", True)
        ranged = options.get("key_ranges") is not None  # exact, or refused there
        if ranged or config is None or not config.leaves_out(q.shape[2], k.shape[2], layer["window"], causal=causal):
            return _run(q, k, v, config, **options)
        if not causal:
            raise NotImplementedError(f"cuts={self.word}: is for causal attention, and a layer has keys on both sides")
        if self.label and options.get("sinks") is not None:
            raise NotImplementedError("cuts=label: labels are of attention without sinks, which this model has (s_aux)")
        start = perf_counter()
        cuts = self.boundaries(q, k, config, **layer)
        self.selection = dhsa.select(q, k, config, boundaries=cuts, **layer)
        chosen = perf_counter()
        kept: dict[str, Any] = {name: options[name] for name in ("out", "return_lse", "sinks") if name in options}
        made = dhsa.sparse_attention(q, k, v, self.selection, **layer, **kept)
        done = perf_counter()
        out, lse = made if options.get("return_lse") else (made, None)
        return out, lse, RunStats("sparse", self.selection.density(), chosen - start, done - chosen)


@contextmanager
def cutting(word: str) -> Iterator[None]:
    """Have one prefill of a patched model cut its keys by `word`; "" changes nothing."""
    if not word:
        yield
        return
    functional.run = Cuts(word).run
    try:
        yield
    finally:
        functional.run = _run
