"""What attention layers did in their last calls: noted on the modules, read by `last_run`."""

from typing import Literal, NamedTuple

import torch

from dhsa import functional

__all__ = ["RUNS", "LayerRun", "last_run", "record"]

RUNS = "_dhsa_runs"  # on every attention module that ran


class LayerRun(NamedTuple):
    """What one attention layer did in its last call.

    `layer`: its index. `kind`: "full" or "sliding". `step`: "prefill" or "decode" (one query). `path`: "dense",
    "window", "sparse" (some query saw a selection of its keys) or "decode" (a step that saw all of them). `density`:
    (query, key) pairs attended over pairs visible under mask and window, 1 on exact paths. Seconds: choosing the keys,
    and attending to them. `skipped`: see `dhsa.Config.skip`, 0 without. `query_shape` is [B, H, Lq, D], `key_shape`
    [B, Hkv, Lk, D]. `reason`: why it ran exact, or part of it, although keys could be left out
    (`dhsa.Config.break_even`), or why keys that a cache holds had to be cut anew; else "".
    """

    layer: int
    kind: Literal["full", "sliding"]
    step: Literal["prefill", "decode"]
    path: Literal["dense", "window", "sparse", "decode"]
    density: float
    select_seconds: float
    attend_seconds: float
    query_shape: tuple[int, int, int, int]
    key_shape: tuple[int, int, int, int]
    skipped: float = 0.0
    reason: str = ""


def record(
    module: torch.nn.Module,
    layer: int | None,
    sliding_window: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    done: list[tuple[functional.RunStats, int]],
    reason: str = "",
) -> None:
    """Notes on the module what its call did; several stretches become one record, their densities weighted by pairs."""
    paths = {stats.path for stats, _ in done}
    # A table of ranges has no window of its own, but in a sliding layer its rows are windows (and spans of pictures).
    windowed = "window" in paths or (sliding_window is not None and sliding_window < key.shape[2])
    exact: Literal["dense", "window"] = "window" if windowed else "dense"
    decode = query.shape[2] == 1
    step: Literal["prefill", "decode"] = "decode" if decode else "prefill"
    total = sum(pairs for _, pairs in done)
    run = LayerRun(
        layer=-1 if layer is None else layer,
        kind="full" if sliding_window is None else "sliding",
        step=step,
        path="sparse" if "sparse" in paths else "decode" if decode else exact,
        density=sum(stats.density * pairs for stats, pairs in done) / total if total else 1.0,
        select_seconds=sum(stats.select_seconds for stats, _ in done),
        attend_seconds=sum(stats.attend_seconds for stats, _ in done),
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        skipped=sum(stats.skipped * pairs for stats, pairs in done) / total if total else 0.0,
        reason=reason,
    )
    runs = module.__dict__.setdefault(RUNS, {})
    runs.pop(step, None)
    runs[step] = run  # the last one inserted is the last one run


def last_run(model: torch.nn.Module, step: Literal["prefill", "decode"] | None = None) -> list[LayerRun]:
    """What each attention layer of `model` did in its last call, in the order of the layers.

    `step`: only the last prefill, or only the last decode step (after `generate`, the last call was a decode step);
    None: whichever came last. Layers that did not run through this package are left out, so the list may be empty.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    if step not in (None, "prefill", "decode"):
        raise ValueError(f'step: expected "prefill", "decode" or None, got {step!r}')
    found = []
    for module in model.modules():
        runs: dict[str, LayerRun] = module.__dict__.get(RUNS, {})
        run = next(reversed(runs.values()), None) if step is None else runs.get(step)
        if run is not None:
            found.append(run)
    return sorted(found, key=lambda run: run.layer)
