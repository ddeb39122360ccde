"""Training boundary predictors: `python -m dhsa train-boundaries`, and the same from Python.

`documents.py`: texts, split and packed. `stream.py`: a model's keys and labels, layer by layer. `networks.py`: what
is trained, in torch. `loop.py`: the training itself, with resumption. `scores.py`: how good gaps are that were found.
`report.py`: table and card. Needs the extras `hf` (torch, transformers) and `demo` (rich); what is trained runs in C.
"""

from importlib import import_module
from typing import Any

# Imported when first used: the command line knows this package without torch.
_HOME = {
    "AttentionNetwork": "networks",
    "CompactNetwork": "networks",
    "LayerKeys": "stream",
    "Settings": "settings",
    "Text": "documents",
    "Training": "loop",
    "average_precision": "scores",
    "build": "networks",
    "focal_loss": "networks",
    "layer_keys": "stream",
    "pack": "documents",
    "python_documents": "documents",
    "read_documents": "documents",
    "recall": "scores",
    "score": "scores",
    "similarity": "scores",
    "soft_labels": "networks",
    "split": "documents",
    "train": "loop",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dhsa.training' has no attribute {name!r}")
    return getattr(import_module(f"dhsa.training.{_HOME[name]}"), name)
