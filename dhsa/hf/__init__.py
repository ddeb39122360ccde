"""Hugging Face transformers 5.x: attention implementation "dhsa", and switching a model's attention to it and back.

Importing this package registers "dhsa" with transformers, for `from_pretrained(..., attn_implementation="dhsa")`.
A `dhsa.Config` decides how prompts are attended to; decoding steps are exact by default.

- attention.py: the attention function that transformers calls; break_even.py decides which calls run exact.
- masks.py: attention masks as intervals of keys. refusals.py: errors for what is not supported.
- transforms.py: transforms of torch and autocast. tracing.py, operator.py: compiled and exported models.
- switching.py: `patch` and `unpatch`. wrappers.py: models inside other modules. handles.py: modules in graphs.
- anchors.py: which layers can take the lists of others. profiles.py: how many keys heads need. Both by watching.py.
- caches.py: what is stored about the keys of a cache. sharing.py: results that layers share. records.py: `last_run`.
- given.py: scores of keys from outside the model.
- saved.py: `save_cache` and `load_cache`.
- compat.py: the differences between releases of transformers.

Attention itself is computed by functional.py and the C core; nothing numeric happens here.
"""

try:
    import torch  # noqa: F401
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(
        f"{error}; dhsa's transformers integration needs its extra: pip install 'dhsa[hf]'", name=error.name
    ) from error

from . import operator as operator  # registers what graphs call
from .anchors import find_anchors
from .attention import attention_forward
from .given import key_scores
from .masks import key_range_mask
from .profiles import find_head_sizes
from .records import LayerRun, last_run
from .saved import SavedCache, load_cache, save_cache
from .switching import IMPLEMENTATION, model_facts, patch, patched, unpatch

__all__ = [
    "IMPLEMENTATION",
    "LayerRun",
    "SavedCache",
    "attention_forward",
    "find_anchors",
    "find_head_sizes",
    "key_scores",
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
