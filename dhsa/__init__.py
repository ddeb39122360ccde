"""dhsa: Dynamic Hierarchical Sparse Attention on any CPU.

This module only collects the public names; see the modules named below for the code. Importing it needs NumPy alone.
The integration with transformers (`patch`, `unpatch`, `patched`, `last_run`, `save_cache`, `load_cache`, `shard`,
`GroupError`; module `dhsa.hf`), `check` (module `dhsa.doctor`), `scaled_dot_product_attention` and its replacement in
torch (module `dhsa.sdpa`), `dhsa.training` and `dhsa.reference` are imported when they are first used. `dhsa.hf` is
also imported as soon as the program imports transformers' models, so that these know `attn_implementation="dhsa"`.
"""

from typing import TYPE_CHECKING, Any

from dhsa import methods as methods
from dhsa._register import register_when_imported
from dhsa.config import Config, LayerConfigs
from dhsa.functional import (
    attention,
    boundaries,
    build_info,
    chunk_scores,
    get_float32_precision,
    get_num_threads,
    pick_boundaries,
    select,
    set_float32_precision,
    set_isa,
    set_num_threads,
    sparse_attention,
)
from dhsa.labels import attention_ratios, boundary_ratios
from dhsa.predictor import BoundaryPredictor
from dhsa.selection import Selection

if TYPE_CHECKING:
    from dhsa import hf as hf
    from dhsa import reference as reference
    from dhsa import training as training
    from dhsa.distributed.link import GroupError
    from dhsa.doctor.run import check
    from dhsa.hf import last_run, load_cache, patch, patched, save_cache, unpatch
    from dhsa.hf.parallel import shard
    from dhsa.sdpa import SdpaCounts, replace_sdpa, replacing_sdpa, restore_sdpa, scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = [
    "BoundaryPredictor",
    "Config",
    "GroupError",
    "LayerConfigs",
    "SdpaCounts",
    "Selection",
    "attention",
    "attention_ratios",
    "boundaries",
    "boundary_ratios",
    "build_info",
    "check",
    "chunk_scores",
    "get_float32_precision",
    "get_num_threads",
    "last_run",
    "load_cache",
    "patch",
    "patched",
    "pick_boundaries",
    "reference",
    "replace_sdpa",
    "replacing_sdpa",
    "restore_sdpa",
    "save_cache",
    "scaled_dot_product_attention",
    "select",
    "set_float32_precision",
    "set_isa",
    "set_num_threads",
    "shard",
    "sparse_attention",
    "unpatch",
]

# The module of each name that needs transformers, and the names that need torch alone.
_HOME = {
    "check": "dhsa.doctor.run",
    "GroupError": "dhsa.distributed.link",
    "shard": "dhsa.hf.parallel",
    **dict.fromkeys(("last_run", "load_cache", "patch", "patched", "save_cache", "unpatch"), "dhsa.hf"),
}
_SDPA = ("SdpaCounts", "replace_sdpa", "replacing_sdpa", "restore_sdpa", "scaled_dot_product_attention")


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOME or name in _SDPA:
        try:
            if name in _HOME:
                importlib.import_module("dhsa.hf")  # its ImportError says what to install
            value = getattr(importlib.import_module(_HOME.get(name, "dhsa.sdpa")), name)
        except ImportError as error:
            return _refusal(name, error)
        globals()[name] = value
        return value
    if name in ("hf", "reference", "training"):
        return importlib.import_module(f"dhsa.{name}")
    raise AttributeError(f"module 'dhsa' has no attribute {name!r}")


def _refusal(name: str, error: ImportError) -> Any:
    """Return a substitute for a function that cannot be imported.

    Looking the name up must not fail, or a star import and `help(dhsa)` would need torch. Calling it raises an error
    that says what is missing.
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ImportError(str(error), name=error.name, path=error.path) from error

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = f"Not available: {error}"
    return refuse


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_imported()
