"""What the functions for torch's tensors share, with transformers and without: autocast. Needs torch."""

from __future__ import annotations

import torch

__all__ = ["autocast", "autocast_dtype"]


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which torch's `scaled_dot_product_attention` computes with `x`: that of autocast, if it is on."""
    if not torch.is_autocast_enabled("cpu") or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype("cpu")


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast casts the inputs of `scaled_dot_product_attention`."""
    return tuple(x.to(autocast_dtype(x)) for x in tensors) if torch.is_autocast_enabled("cpu") else tensors
