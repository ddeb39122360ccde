"""The differences between the supported releases, transformers 5.5 to 5.24 and torch 2.6 to 2.14.

Where possible, a difference is recognized by signatures and attributes of what is installed, not by a version number.
So a release in between, or a later one that keeps the same conventions, works as well. The rest of the package asks
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
    "gguf_options",
    "outside_graphs",
    "packed_mask_function",
    "reads_mask",
    "reads_text",
]

# Attributes that transformers sets in a config for the attention implementation, and that are not settings of the
# model. The second was used up to 5.19. It stayed where a part of a model has its own config, which later calls skip.
SWITCHING = ("_attn_implementation", "_attn_implementation_internal", "_attn_was_changed")
OLDEST = "5.5"  # as in the metadata of the package
GRAPHS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)  # whether compiled graphs contain our operators


def _refuse_older() -> None:
    """Raises ImportError for transformers before 5.4.

    5.4 changed the arguments of mask functions: `q_length` and `q_offset` replace the tensor `cache_position`. This is
    recognized by the signature of transformers' own mask function. (5.5 is the oldest release that is tested: 5.4
    cannot make a configuration of OLMo 2.)
    """
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(
            f"transformers {__version__} is older than {OLDEST}, the oldest release that dhsa supports: "
            f"pip install 'transformers>={OLDEST}'"
        )


# Models whose layers read the mask tensor themselves and expect [batch, heads or 1, queries, keys]: Doge adds its own
# values to it, DeepSeek 4 appends columns for compressed keys. No attribute or signature shows this.
_READS_MASK = ("doge", "deepseek_v4")


def reads_mask(model: torch.nn.Module) -> str | None:
    """The name of a model type in `model` whose layers read the mask tensor themselves; None if there is none.

    These are the types of the table, and every model that selects keys by an indexer of its own and writes the
    selection into the mask (DeepSeek 3.2, GLM 5, HunYuan 4 and others, up to 5.24). All of them name the module
    `indexer`. A layer without one has None there, or no such attribute.
    """
    kind = type(model).__name__
    for module in model.modules():  # a module comes before its parts, so the last config seen applies to it
        kind = getattr(getattr(module, "config", None), "model_type", None) or kind
        if kind in _READS_MASK or isinstance(getattr(module, "indexer", None), torch.nn.Module):
            return kind
    return None


# Settings of the models of pictures and sounds, one of which the config of each of their attention modules has.
_OF_PICTURES_AND_SOUNDS = ("image_size", "patch_size", "num_channels", "num_mel_bins", "conv_dim")


def reads_text(module: torch.nn.Module) -> bool:
    """Whether an attention module's tokens are those of a text, and not parts of a picture or a sound.

    Recognized by its config: a vocabulary and none of the settings of pictures and sounds. A module without a config is
    taken for one of text.
    """
    config = getattr(module, "config", None)
    if config is None:
        return True
    return hasattr(config, "vocab_size") and not any(hasattr(config, name) for name in _OF_PICTURES_AND_SOUNDS)


def cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of an attention module's call, or None.

    Attention modules receive it as `past_key_values=` up to 5.23 and as `cache=` from 5.24 on; a few models pass it by
    position. It is recognized by its methods. Of the two caches of an encoder-decoder model, this is the one of
    self-attention.
    """
    for value in (*kwargs.values(), *args):
        if isinstance(value, Cache) or _is_like_a_cache(value):
            return getattr(value, "self_attention_cache", value)
    return None


def _is_like_a_cache(value: Any) -> bool:
    """Whether `value` has the methods of a cache that models use: it need not derive from transformers' class."""
    kind = type(value)
    return hasattr(kind, "update") and hasattr(kind, "get_seq_length")


def cache_option(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that passes `cache` to a call of `model`.

    It is `past_key_values=` up to 5.23 and `cache=` from 5.24 on, where `past_key_values=` gives a deprecation warning
    until 5.40 removes it. Recognized by the signature of `forward`.
    """
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output: its attribute `cache` from 5.24 on, `past_key_values` before."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


def packed_mask_function(mask_function: Any, position_ids: Any, numbers: Any) -> Any:
    """transformers' mask function of packed texts. `numbers` [B, L] is the number of the text of each token.

    Up to 5.22, a mask of the texts is added to the pattern. From 5.23 on, positions begin at 0 in each text as well: in
    5.23 one function does both, in 5.24 two functions are composed. Recognized by the functions that exist.
    """
    from transformers import masking_utils

    if (compose := getattr(masking_utils, "packed_sequence_compatibility_function", None)) is not None:
        return compose(mask_function, position_ids, numbers)
    if (remap := getattr(masking_utils, "remap_positions_for_packed_sequence", None)) is not None:
        mask_function = remap(mask_function, position_ids)
    return masking_utils.and_masks(mask_function, masking_utils.packed_sequence_mask_function(numbers))


def exporting() -> bool:
    """Whether torch.export traces this call. Only torch 2.7 and later can tell; before, exporting is not supported."""
    asked = getattr(torch.compiler, "is_exporting", None)
    return asked is not None and asked()


def float32_products() -> Any:
    """The object whose attribute `fp32_precision` sets how float32 matrices are multiplied on the CPU. None before
    torch 2.9, where they are multiplied in float32 unless the user asks otherwise."""
    return getattr(torch.backends.mkldnn, "matmul", None)


def gguf_options() -> dict[str, Any]:
    """Options with which `from_pretrained` makes plain weights of those of a GGUF file.

    Releases that have `GgufConfig` leave them in the blocks of the file if the package `kernels` is installed.
    """
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def outside_graphs(function: Callable) -> Callable:
    """`function`; before torch 2.13, marked so that torch.compile leaves it out of its graphs.

    Earlier releases cannot write an attention module into a graph as this package does. There a compiled model runs the
    function between its graphs, with the same result, and `fullgraph=True` and torch.export raise torch's error.
    Recognized by the version, since no signature shows it.
    """
    return function if GRAPHS else torch.compiler.disable(function)


_refuse_older()
