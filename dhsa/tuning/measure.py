"""The measurements of a tuning: candidates in each layer, how much each layer matters, and configs as a whole.

Memory: one layer's queries, keys and values at a time, and hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface

import dhsa
from dhsa import hf
from dhsa.config import Config, LayerConfigs
from dhsa.evaluation.engine import Engine
from dhsa.evaluation.settings import Setting, dense
from dhsa.hf.attention import recompute
from dhsa.tuning.candidates import EXACT, probe

__all__ = ["candidates_of_layers", "importance", "read", "whole"]

SCORED = 1024  # the most positions of a document whose distributions are compared
SCORED_OF_LAYERS = 256  # where one layer at a time is sparse


def read(engine: Engine, ids: list[int]) -> Any:
    """Return the last hidden states [length, size] of a document that is read by dense attention."""
    return engine.prefill(ids, dense())[0]


def candidates_of_layers(
    engine: Engine,
    ids: list[int],
    candidates: Mapping[str, Config],
    layers: Collection[int],
    keep: Callable[[int, dict[str, Any]], None],
) -> None:
    """Measure candidates on the queries, keys and values of each of `layers`, in a prefill by dense attention.

    Calls keep(layer, {"window": its sliding window or None, "exact": seconds, "candidates": {name: [squared relative
    error of the output, seconds]}}) as soon as a layer is measured. Errors are those of the second half of the
    document. A candidate that leaves nothing out in a layer is missing.
    """

    def see(layer: int, by: Callable[[Config], tuple[Any, hf.LayerRun]], window: int | None) -> None:
        if layer not in layers:
            return
        exact, run = by(EXACT)  # a second time, so that it finds what the candidates find in the CPU's caches
        made = {}
        for name, config in candidates.items():
            if config.leaves_out(len(ids), len(ids), window):
                out, of = by(config)
                if of.path == "sparse":
                    made[name] = [_error(out, exact), of.select_seconds + of.attend_seconds]
        keep(layer, {"window": window, "exact": run.attend_seconds, "candidates": made})

    with _watching(engine.model, see):
        engine.prefill(ids, dense())


def importance(
    engine: Engine, ids: list[int], layers: Collection[int], keep: Callable[[int, dict[str, Any]], None]
) -> None:
    """Make one layer at a time sparse, and measure what this changes in the model's predictions.

    Calls keep(layer, {"kl": of the predictions from those of dense attention, "error": squared relative error of the
    layer's output}) for each of `layers`. Layers in which the probe leaves nothing out have zeros.
    """
    reference = engine.remember(ids)
    config = probe(len(ids))
    for layer in sorted(layers):
        errors = [0.0]

        def see(
            index: int,
            by: Callable[[Config], tuple[Any, hf.LayerRun]],
            window: int | None,
            wanted: int = layer,
            errors: list[float] = errors,
        ) -> None:
            if index == wanted:
                errors.append(_error(by(config)[0], by(EXACT)[0]))

        with _watching(engine.model, see):
            hidden, _ = engine.prefill(
                ids, Setting(f"layer {layer}", LayerConfigs(default=EXACT, layers={layer: config}))
            )
        keep(layer, {"kl": _divergence(engine, hidden, reference, ids, SCORED_OF_LAYERS)[0], "error": errors[-1]})


def whole(
    engine: Engine, ids: list[int], reference: Any, configs: Config | LayerConfigs, layers: Collection[int]
) -> dict[str, float]:
    """Measure configs on a document: the mean KL divergence from dense attention in nats, the share of positions whose
    likeliest token is the same, and the seconds of `layers`, by these configs and by dense attention.

    reference: what `read` returned. Dense attention's seconds are measured in each layer just after those of its
    config, so that both find the machine in the same state.
    """
    exact = dict.fromkeys(layers, 0.0)

    def see(layer: int, by: Callable[[Config], tuple[Any, hf.LayerRun]], window: int | None) -> None:
        if layer in exact:
            exact[layer] = by(EXACT)[1].attend_seconds

    with _watching(engine.model, see):
        hidden, _ = engine.prefill(ids, Setting("configs", configs), replay=False)
    own = {run.layer: run.select_seconds + run.attend_seconds for run in dhsa.last_run(engine.model, "prefill")}
    kl, same = _divergence(engine, hidden, reference, ids, SCORED)
    return {
        "kl": kl,
        "agreement": same,
        "seconds": sum(own[layer] for layer in layers),
        "dense_seconds": sum(exact.values()),
    }


def _divergence(engine: Engine, hidden: Any, reference: Any, ids: list[int], most: int) -> tuple[float, float]:
    """Return (KL, agreement), the means over at most about `most` positions in the second half."""
    first = len(ids) // 2
    ((_, kl, same),) = engine.divergence([hidden], reference, ids, first, max(1, (len(ids) - first) // most))
    return max(0.0, float(kl.mean())), float(same.double().mean())


def _error(out: Any, exact: Any) -> float:
    """Return |out - exact|^2 / |exact|^2 of attention outputs [1, L, H, E], in the second half of the positions."""
    first = out.shape[1] // 2
    exact = exact[:, first:].double()
    norm = float(exact.square().sum())
    return float((out[:, first:].double() - exact).square().sum()) / norm if norm else 0.0


@contextmanager
def _watching(model: Any, see: Callable[..., None]) -> Iterator[None]:
    """Call see(layer, by, window) after each attention of a layer of `model`: by(config) computes the same by another
    config, and returns the output and its record.
    """
    inside = {id(module) for module in model.modules()}  # other threads may run other models at the same time

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        result = hf.attention_forward(module, q, k, v, mask, *rest, **options)
        layer = getattr(module, "layer_idx", None)
        if layer is not None and id(module) in inside:

            def by(config: Config) -> tuple[Any, hf.LayerRun]:
                return recompute(module, config, q, k, v, mask, *rest, **options)

            see(layer, by, options.get("sliding_window"))
        return result

    AttentionInterface.register(hf.IMPLEMENTATION, forward)
    try:
        yield
    finally:
        AttentionInterface.register(hf.IMPLEMENTATION, hf.attention_forward)
