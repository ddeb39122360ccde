"""How many keys each head of a model needs: measured by the attention mass that lists of several lengths hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dhsa._arrays import check_int
from dhsa.config import Config, LayerConfigs

from .switching import as_config, model_facts
from .watching import watch_layers

__all__ = ["find_head_sizes", "masses"]

OPTIONS = {"moa": "head_windows", "tca": "head_budgets"}
PROBES = 4  # blocks of queries that are measured, evenly over the prompt's second half


def find_head_sizes(
    model: torch.nn.Module, input_ids: torch.Tensor, config: Config, *, sizes: Sequence[int] | None = None
) -> LayerConfigs:
    """Find how many keys each head of each layer needs, on a prompt that is read by exact attention.

    Of a few blocks of queries, the attention mass is measured that lists of several lengths hold: with method "moa" of
    the first and most recent keys, with "tca" of the keys of the most mass. Heads then get the lengths with which the
    mass that is lost, summed over all heads of all layers, is least, while their mean is at most `config.budget`.

    Args:
        model: a transformers model, or a module that wraps one, patched or not.
        input_ids: int [1, L], a prompt of the kind that the model is to read, longer than the budget.
        config: a Config with method "moa" or "tca", a budget, and heads="head".
        sizes: the lengths that a list may have, in keys. None: a quarter, a half, one, two and four budgets, at least
            the forced keys and at most L.

    Returns:
        LayerConfigs for this model, in which each layer without a sliding window has `head_windows` or
            `head_budgets`, and a budget that is the largest of them; `notes` has the share of mass that is held on
            average. Other layers follow `config`.

    Raises:
        TypeError: an argument of the wrong type; the message names it.
        ValueError: another method or `heads`, no budget, `input_ids` of several rows or no longer than the budget, or
            no size within the budget.

    Source: MoA, arXiv 2406.14909, and TCA-Attention, arXiv 2512.09238. MoA measures by gradients of the loss how much
    leaving a pair out matters; here the attention mass stands for it.
    """
    config = _checked(config)
    budget, option = config.budget, OPTIONS[config.method]
    assert budget is not None
    forced, length = config.sink + config.local, input_ids.shape[-1] if isinstance(input_ids, torch.Tensor) else 0
    if isinstance(input_ids, torch.Tensor) and length <= budget:
        raise ValueError(f"input_ids: {length:,} tokens are no more than the budget of {budget:,}")
    if sizes is None:
        sizes = [budget // 4, budget // 2, budget, 2 * budget, 4 * budget]
    found = {check_int(size, "sizes: a length", 1) for size in sizes}
    chosen = np.array(sorted({min(max(size, forced, 1), max(length, 1)) for size in found}))
    if not len(chosen) or chosen[0] > budget:
        raise ValueError(f"sizes: none is at most the budget of {budget:,}")
    lost: dict[int, np.ndarray] = {}

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Mapping[str, Any]) -> None:
        lost[layer] = _lost(q, k, config, chosen, **options)

    watch_layers(model, input_ids, see)
    if not lost:
        raise ValueError("model: has no layer without a sliding window")
    picked = _least(np.concatenate(list(lost.values())), chosen, budget)
    layers, at, held = {}, 0, []
    for layer, of in lost.items():
        mine = picked[at : at + len(of)]
        at += len(of)
        held += [1 - of[head, size] for head, size in enumerate(mine)]
        values = tuple(int(chosen[size]) for size in mine)
        layers[layer] = config.replace(budget=max(values), **{option: values})
    notes = {"held": round(float(np.mean(held)), 4), "mean": round(float(chosen[picked].mean()), 1)}
    return LayerConfigs(default=config, layers=layers, model=model_facts(model), notes=notes)


def _checked(config: object) -> Config:
    given = as_config(config)
    if not isinstance(given, Config):
        raise TypeError(f"config: expected a dhsa.Config, got {type(given).__name__}")
    if given.method not in OPTIONS:
        raise ValueError(f"config: expected method 'moa' or 'tca', got {given.method!r}")
    if given.heads != "head" or given.budget is None:
        raise ValueError(f"config: expected heads='head' and a budget, got {given.heads!r} and {given.budget}")
    return given


def masses(
    q: torch.Tensor, k: torch.Tensor, query_block: int, *, scale: float | None, softcap: float | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """For a few blocks of queries, evenly over the prompt's second half: the block, and float64 [H, end]: the attention
    mass of each key up to its end, the mean over its queries. Of the first batch item."""
    length = q.shape[2]
    blocks = -(-length // query_block)
    for i in sorted({blocks - 1 - i * (blocks // 2) // PROBES for i in range(PROBES)}):
        begin, end = i * query_block, min((i + 1) * query_block, length)
        keys = k[0, :, :end].double().repeat_interleave(q.shape[1] // k.shape[1], 0)
        s = q[0, :, begin:end].double() @ keys.mT * (q.shape[3] ** -0.5 if scale is None else scale)
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        after = torch.arange(end) > torch.arange(begin, end)[:, None]
        yield i, s.masked_fill(after, -math.inf).softmax(-1).mean(1)


def _lost(
    q: torch.Tensor, k: torch.Tensor, config: Config, sizes: np.ndarray, *, scale: float | None, softcap: float | None
) -> np.ndarray:
    """[H, sizes]: the share of attention mass that lists of these lengths leave out, the mean over the probes."""
    total = torch.zeros(q.shape[1], len(sizes), dtype=torch.float64)
    probes = 0
    for _, mass in masses(q, k, config.query_block, scale=scale, softcap=softcap):
        probes, end = probes + 1, mass.shape[1]
        first, last = min(config.sink, end), max(config.sink, end - config.local)
        rest = mass[:, first:last]
        rest = rest.flip(1) if config.method == "moa" else rest.sort(1, descending=True).values
        held = torch.nn.functional.pad(rest.cumsum(1), (1, 0))
        forced = mass.sum(1, keepdim=True) - rest.sum(1, keepdim=True)
        taken = torch.as_tensor(sizes - first - (end - max(first, last))).clamp(0, rest.shape[1])
        total += 1 - forced - held[:, taken]
    return (total / probes).numpy()


def _least(lost: np.ndarray, sizes: np.ndarray, mean: float) -> np.ndarray:
    """[n]: which size each of n heads gets, so that the sum of `lost` [n, sizes] is the least that one rate of loss
    for each key reaches while the mean size is at most `mean`."""
    low, high = 0.0, 1.0  # at a rate of 1 a key every head takes the least size
    best = np.zeros(len(lost), int)
    for _ in range(60):
        rate = (low + high) / 2
        picked = (lost + rate * sizes).argmin(axis=1)
        if sizes[picked].mean() <= mean:
            best, high = picked, rate
        else:
            low = rate
    return best
