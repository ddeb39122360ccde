"""Which layers of a model can take the lists of another one: measured by the keys that their lists have in common, or
by the attention mass that they hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from dhsa import functional
from dhsa._arrays import check_int
from dhsa.config import Config, LayerConfigs
from dhsa.selection import Selection

from .profiles import masses
from .switching import as_config, model_facts
from .watching import watch_layers

__all__ = ["find_anchors"]

Shares = dict[tuple[int, int], tuple[tuple[int, ...], float]]


def find_anchors(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    config: Config | None = None,
    *,
    anchors: int = 5,
    exact: Collection[int] | None = None,
    dense: bool = False,
) -> LayerConfigs:
    """Find the layers whose lists serve those after them, on a prompt that is read by exact attention.

    Every layer without a sliding window selects by `config`. Of two layers, each list of the later one is matched with
    the list of the earlier one that has the most of its keys, forced keys and exact blocks left out; heads of different
    layers do not correspond to each other. The share of keys that is found, summed over the layers, is then the most
    that `anchors` layers can reach if each layer takes the lists of the last anchor before it.

    With `dense` the anchors attend to all keys (HyLRA): layers that lose much become anchors, and the others attend to
    the keys that the last anchor before them has selected. What counts for a layer is then the attention mass that the
    matched lists hold in it, forced keys included, in four blocks of queries of the prompt's second half; an anchor
    loses none. So both matter, how few keys a layer needs and how alike it is to an earlier one.

    Args:
        model: a transformers model, or a module that wraps one, patched or not.
        input_ids: int [1, L], a prompt of the kind that the model is to read, longer than the budget.
        config: a Config without `share`. None: the default one.
        anchors: how many layers select, at least 1.
        exact: layers that are exact and neither select nor reuse. None: the first, as in Kascade; with `dense` none,
            since the first anchor is exact itself.
        dense: whether anchors attend to all keys.

    Returns:
        LayerConfigs with `reuse`, for this model; `notes` has the share of keys, with `dense` of mass, that each layer
            finds in its anchor's lists. Layers with a sliding window follow `config` and reuse nothing.

    Raises:
        TypeError: an argument of the wrong type; the message names it.
        ValueError: `input_ids` has several rows, or is so short that nothing is left out; `config` shares; or there are
            fewer layers than `anchors`.

    Source: Kascade, arXiv 2512.16391. There, similarity is the attention mass that the anchor's keys hold in the other
    layer, on exact top-k keys of single queries; here it is the share of the keys that `config` would select. With
    `dense`: HyLRA, arXiv 2602.00777, whose layers with full attention and layers that reuse top-k keys are found by
    dynamic programming over a profile as well. Only its abstract was at hand: that the profile is attention mass, that
    heads are matched, and that the number of anchors is given are choices made here.
    """
    chosen = as_config(config)
    if not isinstance(chosen, Config):
        raise TypeError(f"config: expected a dhsa.Config or None, got {type(chosen).__name__}")
    if chosen.share is not None:
        raise ValueError(f"config: shares {chosen.share} between layers; expected share=None")
    anchors = check_int(anchors, "anchors", 1)
    given = (() if dense else (0,)) if exact is None else exact
    exact = {check_int(layer, "exact: an index", 0) for layer in given}
    length = input_ids.shape[-1] if isinstance(input_ids, torch.Tensor) else 0
    if isinstance(input_ids, torch.Tensor) and not chosen.leaves_out(length, length):
        raise ValueError(f"input_ids: {length:,} tokens are so few that `config` leaves nothing out")
    shares = _shares(model, input_ids, chosen, exact, dense)
    layers = sorted({layer for _, layer in shares})
    if len(layers) < anchors:
        raise ValueError(f"anchors: got {anchors}, but {len(layers)} layers without a sliding window leave keys out")
    reuse = {}
    notes = {}
    for anchor, layer in _best(layers, {pair: share for pair, (_, share) in shares.items()}, anchors):
        heads, share = shares[anchor, layer]
        if layer != anchor:
            reuse[layer] = (anchor, heads)
            notes[str(layer)] = round(share, 4)
    configs = {layer: Config(budget=None) for layer in sorted(exact)}
    of = {anchor for anchor, _ in reuse.values()}
    # A dense anchor that serves no layer needs no lists.
    configs |= {layer: Config(budget=None) for layer in layers if dense and layer not in reuse and layer not in of}
    return LayerConfigs(
        default=chosen,
        layers=configs,
        model=model_facts(model),
        notes={"shares": notes},
        reuse=reuse,
        dense_anchors=tuple(sorted(of)) if dense else (),
    )


def _shares(model: Any, input_ids: torch.Tensor, config: Config, exact: Collection[int], dense: bool) -> Shares:
    """For each layer without a window and each such layer up to it: which list of the earlier one each list of the
    later one is, and the share of its keys, or of its attention mass, that it finds there."""
    found: dict[int, Selection] = {}
    shares: Shares = {}
    if dense:
        config = config.replace(dense_tail=0)  # so that the probes are no exact blocks

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> None:
        if layer in exact:
            return
        values = v if config.options.reads_values else None
        mine = found[layer] = functional.select(q, k, config, v=values, **options)
        for earlier, lists in found.items():
            heads, share = _matched(lists, mine, config)
            if dense:
                share = 1.0 if earlier == layer else _held(q, k, lists._taken(heads), config, **options)
            shares[earlier, layer] = heads, share

    watch_layers(model, input_ids, see)
    return shares


def _held(
    q: torch.Tensor, k: torch.Tensor, lists: Selection, config: Config, *, scale: float | None, softcap: float | None
) -> float:
    """The share of attention mass that lists hold, the mean over heads and the probes of `masses`."""
    _, sets, blocks = lists.shape
    held = []
    for i, mass in masses(q, k, config.query_block, scale=scale, softcap=softcap):
        for head, row in enumerate(mass.numpy()):
            at = (head * sets // len(mass)) * blocks + i
            held.append(float(row[lists.indices[lists.indptr[at] : lists.indptr[at + 1]]].sum()))
    return sum(held) / len(held)


def _matched(earlier: Selection, later: Selection, config: Config) -> tuple[tuple[int, ...], float]:
    """For each list of `later`, the list of `earlier` with the most of its keys, the first of equal ones; and the share
    of all keys of `later` that are found so. Forced keys and exact blocks do not count."""
    _, sets, blocks = later.shape
    common = np.zeros((later.shape[1], earlier.shape[1]), np.int64)
    total = 0
    for i in range(blocks):
        mine, others = (_free(selection, i, config) for selection in (later, earlier))
        if mine is None or others is None:
            continue
        common += (mine @ others.T).astype(np.int64)  # whole numbers: exact
        total += int(mine.sum())
    heads = common.argmax(axis=1)
    share = common[np.arange(sets), heads].sum() / total if total else 0.0
    return tuple(int(head) for head in heads), float(share)


def _free(selection: Selection, i: int, config: Config) -> np.ndarray | None:
    """float32 [lists, keys]: which keys that are not forced the lists of block i hold; None for an exact block."""
    _, sets, blocks = selection.shape
    end = min((i + 1) * selection.query_block, selection.k_len or 0)
    held = np.zeros((sets, end), np.float32)
    for s in range(sets):
        row = s * blocks + i
        held[s, selection.indices[selection.indptr[row] : selection.indptr[row + 1]]] = 1
    if held.all():
        return None
    held[:, : config.sink] = 0
    held[:, max(0, end - config.local) :] = 0
    return held


def _best(layers: list[int], shares: dict[tuple[int, int], float], anchors: int) -> list[tuple[int, int]]:
    """(anchor, layer) of each layer: the choice of `anchors` anchors, the first layer among them, with the largest sum
    of shares, each layer taking the last anchor before it."""
    n = len(layers)
    worth = np.full((anchors + 1, n + 1), -np.inf)  # [anchors used, layers served]
    before = np.zeros((anchors + 1, n + 1), int)
    worth[0, 0] = 0
    for used in range(1, anchors + 1):
        for end in range(1, n + 1):
            for start in range(end):
                gained = sum(shares[layers[start], layer] for layer in layers[start:end])
                if worth[used - 1, start] + gained > worth[used, end]:
                    worth[used, end], before[used, end] = worth[used - 1, start] + gained, start
    pairs, end = [], n
    for used in range(anchors, 0, -1):
        start = int(before[used, end])
        pairs += [(layers[start], layer) for layer in layers[start:end]]
        end = start
    return sorted(pairs, key=lambda pair: pair[1])
