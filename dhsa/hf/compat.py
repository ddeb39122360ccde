"""What differs between the supported releases, transformers 5.5 to 5.24 and torch 2.6 to 2.14, and how it is seen.

Everything here looks at what is installed, at signatures and attributes, where they tell, and not at version numbers:
so a release in between, or a later one that keeps the same conventions, is served as well. The rest of the package asks
this module and names no release. tests/hf/test_compat.py runs on the oldest and on the newest releases.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, __version__
from transformers.masking_utils import sdpa_mask

__all__ = [
    "GRAPHS",
    "OLDEST",
    "SWITCHING",
    "cache_in",
    "cache_of",
    "cache_option",
    "exporting",
    "float32_products",
    "outside_graphs",
    "packed_mask_function",
    "reads_mask",
]

# What transformers notes in a config when the attention implementation is set, and is no content of it. The second name
# was used up to 5.19, and stayed where a part of a model has a config of its own: later settings pass over that part.
SWITCHING = ("_attn_implementation", "_attn_implementation_internal", "_attn_was_changed")
OLDEST = "5.5"  # what the metadata of the package promises
GRAPHS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # whether compiled graphs hold our operators


def _refuse_older() -> None:
    """Raises ImportError for transformers before 5.4, where nothing works.

    5.4 changed what mask functions are called with: `q_length` and `q_offset` in place of the tensor `cache_position`.
    Recognized by the signature of transformers' own mask function. (5.5 is the oldest that is tested: 5.4 cannot make a
    configuration of OLMo 2.)
    """
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(
            f"transformers {__version__} is older than {OLDEST}, the oldest release that dhsa supports: "
            f"pip install 'transformers>={OLDEST}'"
        )


# Models whose layers read the mask tensor themselves and expect [batch, heads or 1, queries, keys]: Doge adds its own
# values to it. No attribute or signature tells.
_READS_MASK = ("doge",)


def reads_mask(model: torch.nn.Module) -> str | None:
    """The name of a model type in `model` whose layers read the mask tensor themselves; None if there is none.

    Beside those of the table, every model that picks keys by an indexer of its own (DeepSeek 3.2, GLM 5, HunYuan 4 and
    others, up to 5.24), which writes its choice into the mask. All of them call the module `indexer`; a layer without
    one (of a kind that sees everything) has None there, or no such attribute.
    """
    kind = type(model).__name__
    for module in model.modules():  # what is inside another comes after it, so the last config is its own or around it
        kind = getattr(getattr(module, "config", None), "model_type", None) or kind
        if kind in _READS_MASK or isinstance(getattr(module, "indexer", None), torch.nn.Module):
            return kind
    return None


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of an attention module's call, or None.

    Attention modules are handed it as `past_key_values=` up to 5.23 and as `cache=` from 5.24 on; a few models pass it
    by position. It is recognized by what it is. Of the pair of caches of an encoder-decoder, the one of self-attention.
    """
    for value in (*kwargs.values(), *args):
        if isinstance(value, Cache) or _is_like_a_cache(value):
            return getattr(value, "self_attention_cache", value)
    return None


def _is_like_a_cache(value: Any) -> bool:
    """Whether it has what the models use of a cache: a user's own class need not derive from transformers'."""
    kind = type(value)
    return hasattr(kind, "update") and hasattr(kind, "get_seq_length")


def cache_option(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that hands `cache` to a call of `model`.

    `cache=` from 5.24 on, where `past_key_values=` gives a deprecation warning until 5.40 removes it, and
    `past_key_values=` before. Recognized by the signature of `forward`.
    """
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output: its attribute `cache` from 5.24 on, `past_key_values` before."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def packed_mask_function(mask_function: Any, position_ids: Any, numbers: Any) -> Any:
    """transformers' mask function of packed texts, `numbers` [B, L] saying which text a token is of.

    Up to 5.22 a mask of the texts is added to the pattern; 5.23 also counts positions anew in each text, both by one
    function, 5.24 by two that are composed. Recognized by the functions that are there.
    """
    from transformers import masking_utils

    if (compose := getattr(masking_utils, "packed_sequence_compatibility_function", None)) is not None:
        return compose(mask_function, position_ids, numbers)
    if (remap := getattr(masking_utils, "remap_positions_for_packed_sequence", None)) is not None:
        mask_function = remap(mask_function, position_ids)
    return masking_utils.and_masks(mask_function, masking_utils.packed_sequence_mask_function(numbers))


def exporting() -> bool:
    """Whether torch.export traces this call. torch 2.7 brought the question; before it, exporting is not supported."""
    asked = getattr(torch.compiler, "is_exporting", None)
    return asked is not None and asked()


def float32_products() -> Any:
    """The settings whose `fp32_precision` says how float32 matrices are multiplied on the CPU, or None before torch
    2.9, where they are multiplied as they are unless the user asks otherwise."""
    return getattr(torch.backends.mkldnn, "matmul", None)


def outside_graphs(function: Callable) -> Callable:
    """`function`, or before torch 2.13 the same as one that torch.compile leaves out of its graphs.

    Earlier releases cannot write an attention module into a graph as the package does, so that there a compiled model
    runs the function between its graphs, with the same result; `fullgraph=True` and torch.export raise torch's error.
    Recognized by the version, as no signature tells.
    """
    return function if GRAPHS else torch.compiler.disable(function)


_refuse_older()
