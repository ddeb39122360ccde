"""Queries, keys and values of the layers of a model that reads a prompt by exact attention, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface

from dhsa.config import Config

from .attention import attention_forward
from .switching import IMPLEMENTATION, patched
from .wrappers import unwrapped

__all__ = ["watch_layers"]

See = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], None]


@torch.no_grad()
def watch_layers(model: torch.nn.Module, input_ids: torch.Tensor, see: See) -> None:
    """Call see(layer, q, k, v, {"scale": ..., "softcap": ...}) for each layer with plain causal attention, without a
    sliding window.

    Raises:
        ValueError: `input_ids` is no tensor [1, L].
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or len(input_ids) != 1:
        got = f"shape {list(input_ids.shape)}" if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids: expected a tensor [1, L], got {got}")
    inside = {id(module) for module in model.modules()}  # other threads may run other models at the same time

    def forward(module: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        layer = getattr(module, "layer_idx", None)
        plain = options.get("sliding_window") is None and mask is None and q.shape[2] == k.shape[2]
        if id(module) in inside and layer is not None and plain:
            see(layer, q, k, v, {"scale": options.get("scaling"), "softcap": options.get("softcap")})
        return attention_forward(module, q, k, v, mask, *rest, **options)

    body = unwrapped(model)
    if hasattr(body, "get_decoder"):
        body = body.get_decoder()  # without logits of all positions
    with patched(model, Config(budget=None)):
        AttentionInterface.register(IMPLEMENTATION, forward)
        try:
            body(input_ids, use_cache=False)
        finally:
            AttentionInterface.register(IMPLEMENTATION, attention_forward)
