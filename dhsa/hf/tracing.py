"""Calls that are traced (torch.compile, torch.export, make_fx) instead of run, and what the graph then contains.

If `tracing()` is true, attention.py and masks.py call this module. It writes calls of the operators of operator.py into
the graph, which run the same functions when the graph runs. Dynamo must be able to trace everything here: no NumPy, no
branch on a tensor's contents or on a length that may vary.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import and_masks, causal_mask_function, sdpa_mask

from dhsa._arrays import torch_tangent
from dhsa.config import Config

from .compat import exporting, reads_text
from .handles import HANDLE, number_of
from .refusals import check_padding
from .switching import EXACT, STATE, State, config_of

__all__ = ["probes", "thawed", "traced_attention", "traced_ranges", "tracing"]

_AND = and_masks().__code__  # all functions that `and_masks` makes have this code


def tracing() -> bool:
    """Whether this call becomes part of a graph, or runs under a dispatch mode, which sees operators only."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


# ---- attention -------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _exporting() -> bool:
    return exporting()


@torch.compiler.assume_constant_result
def _derivative() -> str | None:
    """The active transform of torch.func that computes derivatives, which the operator does not have; else None."""
    if torch._C._functorch.maybe_current_level() is None:
        return None
    kinds = torch._C._functorch.TransformType
    names = {kinds.Grad: "grad", kinds.Jvp: "jvp"}
    stack = torch._C._functorch.get_interpreter_stack() or []
    return next((names[part.key()] for part in stack if part.key() in names), None)


# Dynamo guards the constant by the module itself: a graph with it works for one layer only.
_number_of = torch.compiler.assume_constant_result(number_of)


@torch.compiler.assume_constant_result
def _frozen(module: torch.nn.Module, is_causal: bool | None) -> str:
    """The attributes of a module that attention reads, as they are now, as strings that a saved program can contain."""
    layer = getattr(module, "layer_idx", None)
    config = config_of(module)
    if config.predictor is not None:
        raise NotImplementedError(
            'torch.export: boundaries="predictor" cannot be written into a program; patch the model with others'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal and not reads_text(module):  # what the program does not contain about the module
        config = EXACT if config.skip is None else EXACT.replace(skip=config.skip)
    return json.dumps({"layer": layer, "is_causal": bool(causal), "config": config.to_dict()})


class _Layer:
    """A module for the attention function, made from the strings of `_frozen`."""

    def __init__(self, words: str) -> None:
        facts = json.loads(words)
        self.layer_idx, self.is_causal = facts["layer"], facts["is_causal"]
        self.__dict__[STATE] = State(Config.from_dict(facts["config"]), None, ())


@functools.lru_cache(maxsize=1024)
def thawed(words: str) -> Any:
    """The stand-in for the module that `words` were made from; the same one in every call."""
    return _Layer(words)


def traced_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attention.attend` as one operator of the graph.

    In a compiled model it reads the module at every run, so that `patch`, `unpatch` and `last_run` work as usual. In an
    exported model, or one traced with fake tensors, the settings of the module are fixed and nothing is recorded.
    """
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        check_padding(attention_mask)
    if transform := _derivative():
        raise NotImplementedError(
            f'query: torch.func.{transform} finds no derivative of the operator "dhsa::attention"; '
            'use attn_implementation="eager"'
        )
    if not torch.compiler.is_compiling():  # under a dispatch mode, where the operator would fail with a dual tensor
        for name, tensor in (("query", query), ("key", key), ("value", value), ("sinks", sinks)):
            if tensor is not None and (tangent := torch_tangent(tensor)):
                raise NotImplementedError(f'{name}: {tangent}; use attn_implementation="eager"')
    handle = frozen = None
    if type(query) is not torch.Tensor or _exporting():
        frozen = _frozen(module, is_causal)
    else:
        noted = getattr(module, HANDLE, None)  # models that were loaded as "dhsa" and never patched have none
        handle = torch.tensor(_number_of(module), device="cpu") if noted is None else noted.number
    return torch.ops.dhsa.attention(
        query, key, value, attention_mask, handle, frozen, scaling, sliding_window, softcap, is_causal, sinks
    )


# ---- masks -----------------------------------------------------------------------------------------------------------


def probes(q_length: int) -> torch.Tensor:
    """The queries whose whole rows are compared with a pattern: the first, the last, two between."""
    return torch.arange(4, device="cpu") * (q_length - 1) // 3


def traced_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: torch.Tensor | None,
    local_size: int | None,
    allow_is_causal_skip: bool,
    use_vmap: bool,
    bidirectional: bool,
) -> torch.Tensor | None:
    """`key_range_mask` as operators of the graph: None where the shapes alone say that the mask is plain, else a range
    table, with as many intervals as padding may need.

    In transformers' own causal patterns (plain, sliding, chunked, each also packed), every query sees one interval that
    ends at itself. Where it begins follows from one value for each key: whether the next query sees the key. Any other
    pattern is evaluated in full, as transformers does for sdpa, and read when the graph runs.
    """
    # Two numbers, since static caches count in a tensor, whose contents are not known yet.
    offset, start = (q_offset, -kv_offset) if isinstance(q_offset, torch.Tensor) else (None, q_offset - kv_offset)
    causal = mask_function is causal_mask_function and local_size is None
    if causal and attention_mask is None and offset is None and allow_is_causal_skip and not use_vmap:
        if start + q_length == kv_length:
            return None
    elif causal and attention_mask is not None and not use_vmap:
        return torch.ops.dhsa.key_ranges(
            attention_mask, offset, None, None, batch_size, start, q_length, kv_length, kv_offset, None
        )
    if use_vmap or bidirectional or not (causal or getattr(mask_function, "__code__", None) is _AND):
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
        )
        return torch.ops.dhsa.intervals(mask)

    def visible(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        batch = torch.arange(batch_size, device="cpu")[:, None, None, None]
        return mask_function(batch, torch.zeros_like(batch[:1]), q[None, None, :, None], k[None, None])[:, 0]

    keys = torch.arange(kv_length, device="cpu") + kv_offset
    follows = visible(keys, (keys - 1).clamp(min=kv_offset)[:, None])[..., 0]
    rows = visible(probes(q_length) + q_offset, keys[None])
    return torch.ops.dhsa.key_ranges(
        attention_mask, offset, follows, rows, batch_size, start, q_length, kv_length, kv_offset, local_size
    )
