"""`Config.share`, `LayerConfigs.reuse` and methods that go from layer to layer: layers of one forward pass use the
boundaries of chunks or the selection that another layer found, or what it left.

Hooks on the model show which calls belong to one forward pass: they note where it begins and ends. Results are stored
only in between, and are not shared between threads, models or copies of a model, nor kept after an exception.
"""

from __future__ import annotations

import threading
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from dhsa import functional
from dhsa.config import Config
from dhsa.functional import RunStats
from dhsa.selection import Selection

__all__ = ["HOOKS", "Sharing", "attach", "attach_one", "attached", "detach"]

HOOKS = "_dhsa_hooks"  # on the models inside a patched model whose layers share


class _Found(NamedTuple):
    """Boundaries, a Selection or the state of a method, and the layer that found it."""

    layer: int
    value: Any


class Sharing:
    """The results of the forward passes of one patched model that are running now. There is a stack for each thread,
    since a model may contain others (a language model in a multimodal one), of which the innermost has the layers."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple:
        return Sharing, ()  # no forward pass of a copy is running

    @property
    def _stack(self) -> list[tuple[torch.nn.Module, dict]]:
        return self._local.__dict__.setdefault("stack", [])

    def enter(self, module: torch.nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._close(module)  # KeyboardInterrupt ends a forward without calling hooks
            self._stack.append((module, {}))

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._close(module)

    def _close(self, module: torch.nn.Module) -> None:
        stack = self._stack
        at = next((i for i, (other, _) in enumerate(stack) if other is module), len(stack))
        del stack[at:]

    def run(
        self,
        layer: int | None,
        kind: int | None,
        where: tuple,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: Config,
        *,
        window: int | None,
        out: torch.Tensor,
        causal: bool = True,
        sinks: torch.Tensor | None = None,
        key_indexes: tuple[Any, ...] | None = None,
        same: int = 0,
        keep_means: bool = True,
        **options: Any,
    ) -> RunStats:
        """`functional.run`, with the result of an earlier layer of this forward if there is one.

        layer: the layer's index. kind: its sliding window. where: which stretch (row, q_start, q_stop, k_start, k_stop)
        of the layer's queries and keys q and k are; lengths alone would not distinguish two rows of a batch.
        """
        held = self._stack[-1][1] if self._stack else None
        known: dict[str, Any] = {"key_indexes": key_indexes, "same": same, "keep_means": keep_means}
        seen: dict[str, Any] = {"window": window, "causal": causal, **options}
        run: dict[str, Any] = {**seen, "sinks": sinks, "out": out}
        if held is None or layer is None or not config.leaves_out(q.shape[2], k.shape[2], window, causal=causal):
            return functional.run(q, k, v, config, **run, **known)[2]
        cuts_only = config.share == "boundaries"
        row, *stretch = where
        row = row or 0  # a single row is named by either
        key = (row, *stretch[2:], k.shape) if cuts_only else (row, *stretch, kind, window, causal, q.shape, k.shape)
        found: _Found | None = held.get(key)
        start = perf_counter()
        if found is None or layer <= found.layer:  # the same layer again: another forward pass
            if cuts_only and key_indexes is not None:  # these have the boundaries of earlier keys
                stats = functional.run(q, k, v, config, **run, **known)[2]
                held[key] = _Found(layer, _padded([index.boundaries for index in key_indexes], k.shape[2]))
                return stats
            values = v if config.options.reads_values else None
            made = functional.boundaries(k, config) if cuts_only else functional.select(q, k, config, v=values, **seen)
            found = held[key] = _Found(layer, made)
        seconds = perf_counter() - start
        if cuts_only:
            _, _, stats = functional.run(q, k, v, config, boundaries=found.value, **run, **known)
        else:
            del run["causal"]  # the selection remembers it
            _, _, stats = functional.run_selected(q, k, v, found.value, skip=config.skip, **run)
        return stats._replace(select_seconds=stats.select_seconds + seconds)

    def cascade(
        self,
        layer: int | None,
        kind: int | None,
        where: tuple,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: Config,
        *,
        window: int | None,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
        **options: Any,
    ) -> RunStats:
        """`functional.run` of a layer whose method goes on from what the layers before it left. `kind`, `where` as in
        `run`."""
        held = self._stack[-1][1] if self._stack else None
        seen: dict[str, Any] = {"window": window, **options}
        if held is None or layer is None or not config.leaves_out(q.shape[2], k.shape[2], window):
            return functional.run(q, k, v, config, **seen, sinks=sinks, out=out)[2]
        row, *stretch = where
        key = (config.method, row or 0, *stretch, kind, window, len(q), q.shape[2], k.shape[2])
        found: _Found | None = held.get(key)
        start = perf_counter()
        begins = found is None or layer <= found.layer  # the same layer again: another forward pass
        state = config.options.new_state() if found is None or begins else found.value
        selection = functional.select(q, k, config, state=state, **seen)
        held[key] = _Found(layer, state)
        seconds = perf_counter() - start
        _, _, stats = functional.run_selected(q, k, v, selection, skip=config.skip, **seen, sinks=sinks, out=out)
        return stats._replace(select_seconds=seconds)

    def reuse(
        self,
        layer: int,
        of: tuple[int, tuple[int, ...] | None] | None,
        where: tuple,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: Config,
        *,
        window: int | None,
        out: torch.Tensor,
        sinks: torch.Tensor | None = None,
        dense: Config | None = None,
        **options: Any,
    ) -> RunStats:
        """`functional.run` of a layer that takes the lists of its anchor, `of` = (layer, which list each of its lists
        is); or, with `of` None, of an anchor, whose lists are stored. `dense`: the exact config of an anchor that
        attends to all keys. `where` as in `run`. A single query is a decoding step, which selects for itself alone."""
        held = self._stack[-1][1] if self._stack else None
        if q.shape[2] == 1:
            config = config.replace(dense_tail=0)
        seen: dict[str, Any] = {"window": window, **options}
        if held is None or not config.leaves_out(q.shape[2], k.shape[2], window):
            return functional.run(q, k, v, config if dense is None else dense, **seen, sinks=sinks, out=out)[2]
        row, *stretch = where
        key = (layer if of is None else of[0], row or 0, *stretch, window, len(q), q.shape[2], k.shape[2])
        start = perf_counter()
        known: Selection | None = None if of is None else held.get(key)
        values = v if config.options.reads_values else None
        selection = functional.select(q, k, config, v=values, **seen) if known is None else known
        if of is None:
            held[key] = selection
        elif known is not None and of[1] is not None:
            if max(of[1]) >= selection.shape[1]:
                raise ValueError(
                    f"reuse: layer {layer} takes list {max(of[1])} of layer {of[0]}, which has {selection.shape[1]}"
                )
            selection = selection._taken(of[1])
        seconds = perf_counter() - start
        if dense is not None:
            stats = functional.run(q, k, v, dense, **seen, sinks=sinks, out=out)[2]
            return stats._replace(select_seconds=stats.select_seconds + seconds)
        _, _, stats = functional.run_selected(q, k, v, selection, skip=config.skip, **seen, sinks=sinks, out=out)
        return stats._replace(select_seconds=seconds)


def _padded(rows: list[list[int]], length: int) -> np.ndarray:
    """Rows of boundaries as one array, the shorter ones padded with the number of keys."""
    most = max(map(len, rows))
    return np.array([row + [length] * (most - len(row)) for row in rows], np.int32)


def attach(model: torch.nn.Module, sharing: Sharing) -> None:
    """Installs hooks that tell `sharing` where every forward of `model` and of the models in it begins and ends."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            attach_one(part, sharing)


def attach_one(part: PreTrainedModel, sharing: Sharing) -> None:
    part.__dict__[HOOKS] = (
        sharing,
        part.register_forward_pre_hook(sharing.enter),
        part.register_forward_hook(sharing.leave, always_call=True),
    )


def attached(part: torch.nn.Module) -> Sharing | None:
    """The Sharing that `attach` was called with."""
    return part.__dict__.get(HOOKS, (None,))[0]


def detach(model: torch.nn.Module) -> None:
    for part in model.modules():
        for handle in part.__dict__.pop(HOOKS, ())[1:]:
            handle.remove()
