"""Transforms and recorders of torch, which the attention function refuses, and autocast, which it follows."""

import torch

from dhsa._arrays import torch_obstacle
from dhsa._tensors import autocast

__all__ = ["cast", "refuse_transforms"]


def refuse_transforms(**tensors: object) -> None:
    """Raises NotImplementedError for a call, not part of a graph, whose arguments or results a transform or a recorder
    changes: see `dhsa._arrays.torch_obstacle`. Arguments that are not tensors are skipped."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and (obstacle := torch_obstacle(tensor)):
            other = "torch.export or " if torch.jit.is_tracing() else ""
            raise NotImplementedError(f'{name}: {obstacle}; use {other}attn_implementation="eager"')


def cast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value in one dtype. Under autocast they are cast to its dtype, as in
    `scaled_dot_product_attention`. Raises TypeError for mixed dtypes otherwise."""
    query, key, value = autocast(query, key, value)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name}: dtype is {_name(tensor)}, expected {_name(query)} as query; cast {name} to {_name(query)} "
                "(keep the cache in the dtype of the model), or run the model under torch.autocast"
            )
    return query, key, value


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
