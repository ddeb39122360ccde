"""The operators of torch.library that graphs contain in place of this package's functions: `dhsa::attention`,
`dhsa::key_ranges` and `dhsa::intervals` for masks, and `dhsa::no_backward` as the gradient of attention, which raises.

Each runs the ordinary function at run time. Its fake implementation gives the shape of the result without running it.
Importing this file registers them, which is all that an exported program needs. tracing.py decides what a graph
contains.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .attention import attend
from .handles import waiting
from .masks import MAX_INTERVALS, causal_rows, padding_of, ranges_of, without_padding
from .refusals import NO_BACKWARD
from .tracing import probes, thawed

__all__: list[str] = []


@torch.library.custom_op("dhsa::attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    handle: torch.Tensor | None,
    frozen: str | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool | None,
    sinks: torch.Tensor | None = None,  # last, so that programs exported before it existed can be loaded
) -> torch.Tensor:
    if frozen is None:
        assert handle is not None  # a graph has either the handle or the words
        module = waiting(int(handle))
    else:
        module = thawed(frozen)
    return attend(module, query, key, value, mask, scaling, sliding_window, softcap, is_causal, sinks, in_graph=True)


@_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object) -> torch.Tensor:
    batch, heads, q_len, _dim = query.shape
    return query.new_empty((batch, q_len, heads, value.shape[3]))


@torch.library.custom_op(
    "dhsa::no_backward",
    mutates_args=(),
    # An explicit schema, because torch 2.6 infers one from typing.Sequence only.
    schema="(Tensor gradient, SymInt[] query, SymInt[] key, SymInt[] value) -> (Tensor, Tensor, Tensor)",
)
def _no_backward(
    gradient: torch.Tensor, query: Sequence[int], key: Sequence[int], value: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Graphs are made together with their backward pass, so the result has a shape; running it raises."""
    raise NotImplementedError(NO_BACKWARD)


@_no_backward.register_fake
def _(gradient: torch.Tensor, *shapes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return tuple(gradient.new_empty(shape) for shape in shapes)


def _keep_shapes(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.shapes = [tensor.shape for tensor in inputs[:3]]


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*torch.ops.dhsa.no_backward(gradient, *ctx.shapes), *[None] * 8)


_attention.register_autograd(_backward, setup_context=_keep_shapes)


@torch.library.custom_op("dhsa::key_ranges", mutates_args=())
def _key_ranges(
    attention_mask: torch.Tensor | None,
    offset: torch.Tensor | None,
    follows: torch.Tensor | None,
    rows: torch.Tensor | None,
    batch_size: int,
    start: int,
    q_length: int,
    kv_length: int,
    kv_offset: int,
    window: int | None,
) -> torch.Tensor:
    """The range table of causal attention. `start` + `offset`: the first query's key. `follows` [B or 1, Lk]: whether
    the query of a key sees the key before it; None if this is so everywhere. `rows` [B or 1, probes, Lk]: what the
    pattern says for a few queries, to verify the table."""
    first = start if offset is None else start + int(offset)
    begins = None
    if follows is not None:
        begins = np.where(follows.numpy(), 0, np.arange(kv_length))
        begins = np.maximum.accumulate(begins, axis=1)
    ranges = causal_rows(batch_size, q_length, kv_length, first, window, begins)
    if rows is not None:
        key, probed = np.arange(kv_length), ranges[:, probes(q_length).numpy(), :, None]
        said = (key >= probed[:, :, 0]) & (key < probed[:, :, 1])
        if not (said == rows.numpy()).all():
            raise NotImplementedError(
                'attention mask: "dhsa" cannot compile this pattern of transformers; give the model a 4-D mask, or do '
                "not compile it"
            )
    table = without_padding(ranges, padding_of(attention_mask, kv_offset, kv_length), first)
    return _roomy(table, 1 if attention_mask is None else MAX_INTERVALS)


@_key_ranges.register_fake
def _(attention_mask, offset, follows, rows, batch_size, start, q_length, *_):
    room = 1 if attention_mask is None else MAX_INTERVALS
    return torch.empty((batch_size, room, q_length, 2), dtype=torch.int32, device="cpu")


@torch.library.custom_op("dhsa::intervals", mutates_args=())
def _intervals(mask: torch.Tensor) -> torch.Tensor:
    """The range table of a complete mask [B, 1, Lq, Lk]."""
    batch, _, q_len, k_len = mask.shape
    return _roomy(ranges_of(mask, batch, q_len, k_len, None), MAX_INTERVALS)


@_intervals.register_fake
def _(mask: torch.Tensor) -> torch.Tensor:
    return torch.empty((mask.shape[0], MAX_INTERVALS, mask.shape[2], 2), dtype=torch.int32, device="cpu")


def _roomy(table: np.ndarray, room: int) -> torch.Tensor:
    """A range table filled up to `room` intervals: a graph must know its shape before it sees the mask."""
    out = torch.zeros((table.shape[0], room, *table.shape[2:]), dtype=torch.int32, device="cpu")
    out.numpy()[:, : table.shape[1]] = table
    return out
