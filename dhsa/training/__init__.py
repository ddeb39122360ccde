"""Training of boundary predictors: `python -m dhsa train-boundaries`, and the same from Python.

`documents.py`: texts, split and packed. `stream.py`: a model's keys and labels, layer by layer. `networks.py`: the
networks in torch. `loop.py`: the training loop, which can be resumed. `scores.py`: how well gaps are scored.
`report.py`: table and model card. `gates.py`: gates of the method "seer", which the same loop trains. Needs the extras
`hf` (torch, transformers) and `demo` (rich). Trained networks run in C, gates in NumPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dhsa.training.documents import Text, pack, python_documents, read_documents, split
    from dhsa.training.loop import Training, train
    from dhsa.training.networks import AttentionNetwork, CompactNetwork, build, focal_loss, soft_labels
    from dhsa.training.scores import average_precision, recall, score, similarity
    from dhsa.training.settings import Settings
    from dhsa.training.stream import LayerKeys, layer_keys

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

__all__ = [
    "AttentionNetwork",
    "CompactNetwork",
    "LayerKeys",
    "Settings",
    "Text",
    "Training",
    "average_precision",
    "build",
    "focal_loss",
    "layer_keys",
    "pack",
    "python_documents",
    "read_documents",
    "recall",
    "score",
    "similarity",
    "soft_labels",
    "split",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dhsa.training' has no attribute {name!r}")
    return getattr(import_module(f"dhsa.training.{_HOME[name]}"), name)
