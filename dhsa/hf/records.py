"""Records of what attention layers did in their last calls. They are kept on the modules; `last_run` reads them."""

from typing import Literal, NamedTuple

import torch

from dhsa import functional

__all__ = ["RUNS", "LayerRun", "last_run", "record"]

RUNS = "_dhsa_runs"  # on every attention module that ran


class LayerRun(NamedTuple):
    """What one attention layer did in its last call.

    Attributes:
        layer: the layer's index.
        kind: "full" or "sliding".
        step: "prefill" or "decode" (one query).
        path: "dense", "window", "sparse" (some query attended to a selection of its keys) or "decode" (a decoding step
            that attended to all of them).
        density: (query, key) pairs attended to, divided by pairs visible under mask and window. 1 on exact paths.
        select_seconds: seconds of choosing the keys.
        attend_seconds: seconds of attention.
        query_shape: [B, H, Lq, D].
        key_shape: [B, Hkv, Lk, D].
        skipped: see `dhsa.Config.skip`; 0 without.
        reason: why the call, or part of it, was exact although keys could be left out (`dhsa.Config.break_even`, or a
            mask), or why keys that a cache holds had to be cut again; else "".
        sent_bytes: the bytes that this rank sent to others for this call, of a model patched with a group; else 0.
        wait_seconds: the seconds that this rank waited for others in this call.
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
    sent_bytes: int = 0
    wait_seconds: float = 0.0


def record(
    module: torch.nn.Module,
    layer: int | None,
    sliding_window: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    done: list[tuple[functional.RunStats, int]],
    reason: str = "",
    sent_bytes: int = 0,
    wait_seconds: float = 0.0,
) -> None:
    """Store a record of a call on the module. Several stretches give one record, with densities weighted by pairs."""
    paths = {stats.path for stats, _ in done}
    # A range table has no window, but in a sliding layer its rows are windows (and spans of images).
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
        sent_bytes=sent_bytes,
        wait_seconds=wait_seconds,
    )
    runs = module.__dict__.setdefault(RUNS, {})
    runs.pop(step, None)
    runs[step] = run  # the last item of the dict is the last call


def last_run(model: torch.nn.Module, step: Literal["prefill", "decode"] | None = None) -> list[LayerRun]:
    """Return what each attention layer of `model` did in its last call, in the order of the layers.

    Args:
        model: a model, or a module that contains one.
        step: "prefill" or "decode": only the last call of that kind (after `generate`, the last call was a decoding
            step). None: the last call of either kind.

    Returns:
        A list of LayerRun. Layers that did not run through this package are left out, so the list may be empty.

    Raises:
        TypeError: `model` is no torch module.
        ValueError: `step` is another value.
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
