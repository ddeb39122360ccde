"""A model's keys and their labels, layer by layer, while the model reads a text. Nothing is kept, and no attention
matrix is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

import dhsa
from dhsa import hf
from dhsa.commands import UserError
from dhsa.hf import masks
from dhsa.hf.refusals import sinks_in

__all__ = ["LayerKeys", "layer_keys"]


@dataclass(frozen=True)
class LayerKeys:
    """The keys and labels of one layer. They are valid only until the visitor returns; copy what is to be kept.

    Attributes:
        layer: the layer's index.
        keys: [1, Hkv, L, D], as the attention of the layer sees them.
        ratios: [L], of `dhsa.attention_ratios`.
    """

    layer: int
    keys: torch.Tensor
    ratios: torch.Tensor

    def rows(self) -> torch.Tensor:
        """Return float32 [L, Hkv * D], the KV heads side by side."""
        return self.keys[0].transpose(0, 1).reshape(self.keys.shape[2], -1).float()


def layer_keys(
    model: Any,
    ids: list[int],
    visit: Callable[[LayerKeys], None],
    *,
    window: int,
    layers: Iterable[int] | None = None,
) -> None:
    """Read tokens with `model`, by exact attention, and call `visit` in each layer.

    Args:
        model: a transformers model on the CPU.
        ids: the tokens.
        visit: called with the LayerKeys of each layer.
        window: the number of keys on each side of a gap.
        layers: the layers to visit. None: all.

    Raises:
        UserError: the model's attention cannot be reached; it is not causal self-attention, for which labels have no
            meaning; or its logits are not finite.
    """
    wanted, gap_window = None if layers is None else frozenset(layers), window
    seen: set[int] = set()
    own: list[Exception] = []  # errors of the visitor, not of the model
    inside = {id(module) for module in model.modules()}  # other threads may run other models at the same time

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        layer = getattr(module, "layer_idx", None) if id(module) in inside else None
        if layer is not None:
            seen.add(layer)
        if layer is not None and (wanted is None or layer in wanted):
            plain, window = _plain(module, query, key, mask, options.get("sliding_window"))
            if not plain:
                raise UserError(f"model: layer {layer} is not plain causal self-attention; it has no labels")
            if sinks_in(query, options.get("s_aux"), options) is not None:
                raise UserError(
                    f"model: layer {layer} has attention sinks, which labels do not count; it has no labels"
                )
            try:
                ratios = dhsa.attention_ratios(
                    query,
                    key,
                    window=gap_window,
                    sliding_window=window,
                    scale=options.get("scaling"),
                    softcap=options.get("softcap"),
                )
            except ValueError as error:
                raise UserError(f"model: layer {layer}: {error}") from error
            try:
                visit(LayerKeys(layer, key, ratios[0]))
            except Exception as error:
                own.append(error)
                raise
        return hf.attention_forward(module, query, key, value, mask, **options)

    try:
        # no_grad, not inference_mode: networks are trained on what a visitor keeps.
        with torch.no_grad(), dhsa.patched(model, dhsa.Config(budget=None)):
            AttentionInterface.register(hf.IMPLEMENTATION, forward)
            try:
                model.get_decoder()(torch.tensor([ids], device="cpu"), use_cache=False)
            finally:
                AttentionInterface.register(hf.IMPLEMENTATION, hf.attention_forward)
    except (NotImplementedError, TypeError, ValueError) as error:
        if own:
            raise
        raise UserError(f"model: its attention cannot be read: {error}") from error
    if wanted is not None and (missing := sorted(wanted - seen)):
        raise UserError(f"layers: {missing} are no attention layers of this model; there are {sorted(seen)}")
    if not seen:
        raise UserError(f"model: {type(model).__name__} never called an attention function; it has no labels")


def _plain(module: Any, query: Any, key: Any, mask: Any, sliding_window: int | None) -> tuple[bool, int | None]:
    """Return whether every query sees all keys up to its own, possibly within a window, and that window."""
    if query.shape[2] != key.shape[2] or not getattr(module, "is_causal", True):
        return False, None
    if mask is None:
        return True, sliding_window
    ranges = masks.ranges_of(mask, query.shape[0], query.shape[2], key.shape[2], sliding_window)
    parts = masks.mask_parts(ranges[:, 0], late=0) if ranges.shape[1] == 1 else None
    if not parts or len(parts) > 1 or parts[0].ranged or parts[0].k_start:
        return False, None
    if parts[0].q_stop - parts[0].q_start != query.shape[2]:
        return False, None
    return True, parts[0].window
