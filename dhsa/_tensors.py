"""What the functions for torch's tensors share, with transformers and without: autocast, and the contents of masks.
Needs torch."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["autocast", "autocast_dtype", "one_interval", "visible"]

# An additive mask hides a key with -inf, or with a finite number so low that its probability is 0: the smallest one of
# a dtype or half of it, -1e9, or -1e4, which is -9984 in bfloat16. Any other value that is not 0 is a bias.
_HIDDEN = -9984.0


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which torch's `scaled_dot_product_attention` computes with `x`: that of autocast, if it is on."""
    if not torch.is_autocast_enabled("cpu") or not x.is_floating_point() or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype("cpu")


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as autocast casts the inputs of `scaled_dot_product_attention`."""
    return tuple(x.to(autocast_dtype(x)) for x in tensors) if torch.is_autocast_enabled("cpu") else tensors


def visible(mask: torch.Tensor) -> np.ndarray | None:
    """Which keys a bool or an additive mask lets be seen, bool of its shape; None if it has other values (a bias)."""
    mask = mask.detach() if mask.requires_grad else mask
    if mask.dtype == torch.bool:
        seen: np.ndarray = mask.cpu().numpy()
        return seen
    # NumPy compares several times faster than torch, but knows no bfloat16.
    values: np.ndarray = (mask if mask.dtype in (torch.float32, torch.float64) else mask.float()).cpu().numpy()
    seen = values == 0
    return seen if np.count_nonzero(seen) + np.count_nonzero(values <= _HIDDEN) == values.size else None


def one_interval(seen: np.ndarray) -> np.ndarray | None:
    """int32 [R, 2], the interval of keys that each row of `seen` bool [R, Lk] has; None if a row has several."""
    table = np.zeros((len(seen), 2), np.int32)
    start, stop = table.T
    start[:] = seen.argmax(1)  # 0 of a row that sees nothing
    if not start.any():
        end = seen.argmin(1)
        stop[:] = np.where(seen[np.arange(len(seen)), end], seen.shape[1], end)
        return table if np.count_nonzero(seen) == int(stop.sum(dtype=np.int64)) else None
    stop[:] = start + seen.sum(1, dtype=np.int32)
    begins = np.count_nonzero(seen[:, 0]) + np.count_nonzero(seen[:, 1:] > seen[:, :-1])
    return table if begins == np.count_nonzero(stop > start) else None
