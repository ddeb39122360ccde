"""dhsa: Dynamic Hierarchical Sparse Attention on any CPU. Names only; the work is in the modules named below.

Importing needs NumPy alone. The transformers integration (`patch`, `unpatch`, `patched`, `last_run`; module `dhsa.hf`),
the doctor (`check`; `dhsa.doctor`), `dhsa.training` and the oracle `dhsa.reference` are imported when first used; the
first also as soon as the program imports transformers' models, so that these know `attn_implementation="dhsa"`.
"""

from typing import TYPE_CHECKING, Any

from dhsa._register import register_when_imported
from dhsa.config import Config
from dhsa.functional import (
    attention,
    attention_ratios,
    boundaries,
    boundary_ratios,
    build_info,
    chunk_scores,
    get_num_threads,
    pick_boundaries,
    select,
    set_isa,
    set_num_threads,
    sparse_attention,
)
from dhsa.predictor import BoundaryPredictor
from dhsa.selection import Selection

if TYPE_CHECKING:
    from dhsa import hf as hf
    from dhsa import reference as reference
    from dhsa import training as training
    from dhsa.doctor.run import check
    from dhsa.hf import last_run, patch, patched, unpatch

__version__ = "0.1.0"

__all__ = [
    "BoundaryPredictor",
    "Config",
    "Selection",
    "attention",
    "attention_ratios",
    "boundaries",
    "boundary_ratios",
    "build_info",
    "check",
    "chunk_scores",
    "get_num_threads",
    "last_run",
    "patch",
    "patched",
    "pick_boundaries",
    "reference",
    "select",
    "set_isa",
    "set_num_threads",
    "sparse_attention",
    "unpatch",
]

# Where each name that needs transformers is.
_HOME = {"check": "dhsa.doctor.run", **dict.fromkeys(("last_run", "patch", "patched", "unpatch"), "dhsa.hf")}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME:
        try:
            importlib.import_module("dhsa.hf")  # its error says what to install
            value = getattr(importlib.import_module(_HOME[name]), name)
        except ImportError as error:
            return _refusal(name, error)
        globals()[name] = value
        return value
    if name in ("hf", "reference", "training"):
        return importlib.import_module(f"dhsa.{name}")
    raise AttributeError(f"module 'dhsa' has no attribute {name!r}")


def _refusal(name: str, error: ImportError) -> Any:
    """A stand-in for a function that cannot be imported: asking for it must not fail, or a star import and
    `help(dhsa)` would need torch, but calling it says what is missing."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ImportError(str(error), name=error.name, path=error.path) from error

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = f"Not available: {error}"
    return refuse


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
