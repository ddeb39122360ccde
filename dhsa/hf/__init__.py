"""Hugging Face transformers 5.x: attention implementation "dhsa", and switching a model's attention to it and back.

Importing this package registers "dhsa" with transformers, for `from_pretrained(..., attn_implementation="dhsa")`.
Prefill goes through a `dhsa.Config`, sparse where it says so; decode steps are exact by default. attention.py is what
transformers calls, masks.py reads its masks, refusals.py says no, transforms.py looks what surrounds a call,
switching.py patches models, wrappers.py finds them in other modules, caches.py keeps what is known of a cache's keys,
saved.py writes caches to files and opens them,
sharing.py hands on what layers share, records.py notes what they did; tracing.py and operator.py are what compiled and
exported models call instead; compat.py has what differs between the releases of transformers, and refuses those that
are too old. What is computed is functional.py's and the C core's; nothing numeric happens here.
"""

try:
    import torch  # noqa: F401
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(
        f"{error}; dhsa's transformers integration needs its extra: pip install 'dhsa[hf]'", name=error.name
    ) from error

from . import operator as operator  # registers what graphs call
from .attention import attention_forward
from .masks import key_range_mask
from .records import LayerRun, last_run
from .saved import SavedCache, load_cache, save_cache
from .switching import IMPLEMENTATION, model_facts, patch, patched, unpatch

__all__ = [
    "IMPLEMENTATION",
    "LayerRun",
    "SavedCache",
    "attention_forward",
    "last_run",
    "load_cache",
    "model_facts",
    "patch",
    "patched",
    "save_cache",
    "unpatch",
]

AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, key_range_mask)
