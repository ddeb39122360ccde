"""What surrounds a call of the attention function: transforms and recorders of torch, which it must not pass by in
silence, and autocast, which it follows."""

import torch

from dhsa._arrays import torch_obstacle

__all__ = ["cast", "refuse_transforms"]


def refuse_transforms(**tensors: object) -> None:
    """NotImplementedError for a call, not part of a graph, whose arguments are not what they seem or whose result
    would not be: `dhsa._arrays.torch_obstacle` says which. What is no tensor is passed over."""
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and (obstacle := torch_obstacle(tensor)):
            other = "torch.export or " if torch.jit.is_tracing() else ""
            raise NotImplementedError(f'{name}: {obstacle}; use {other}attn_implementation="eager"')


def cast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value as attention takes them, all of one dtype: under autocast its own, as
    `scaled_dot_product_attention` casts them. TypeError for mixed dtypes outside it."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{name}: dtype is {_name(tensor)}, expected {_name(query)} as query; cast {name} to {_name(query)} "
                "(keep the cache in the dtype of the model), or run the model under torch.autocast"
            )
    return query, key, value


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
