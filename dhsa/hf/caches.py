"""What is kept of a layer's keys beside the cache that holds them: where they were cut, and the means of their chunks.

A `_core.Past` for each batch row lies on the cache's own layer object, so it lives and dies with the cache, two caches
never share one, and a deep copy of a cache brings its own along. A Past looks at every key before it relies on it:
cropping, reordering beams and refilling a cache need no notice. Only where the cache still holds the very tensor that
the layer saw last, and grew it by appending, is a part of a large cache's keys looked at in each call, since writes
through NumPy or `.data` leave no trace on a tensor. How a call learns which cache it belongs to: a hook
before the attention module's forward, which patching installs, sees the cache among its arguments; attention functions
are not handed it.
"""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from dhsa import _core
from dhsa.config import Config

from .compat import GRAPHS, cache_in

__all__ = ["COMPILED", "UNHOOKED", "UNSEEN", "Memory", "recall", "restore", "stored", "unwatch", "watch"]

_HOOK = "_dhsa_hook"  # on a watched module
_KEPT = "_dhsa_kept"  # on a cache's layer

# .entry, written before a watched module's forward: (weak reference to the module, weak reference to its cache or None
# if it was called without one, how many keys are as the layer saw them).
_running = threading.local()
_told: weakref.WeakSet[Any] = weakref.WeakSet()  # of patched models that were warned of a cache that was not seen

UNSEEN = (
    "no cache was seen among the arguments of the attention module, so that what earlier calls found of the keys is "
    "not used"
)
UNHOOKED = (
    "the attention module was not called as module(...), so that its cache was not seen and what earlier calls found "
    "of the keys is not used"
)
COMPILED = "compiled graphs keep nothing of a cache's keys from call to call"


class Kept:
    """Of one cache layer: a Past for each stretch of keys that was attended to, and the tensor that held them."""

    def __init__(self) -> None:
        self.pasts: dict[tuple[int, int], Any] = {}  # by batch row and first key
        self.stored: dict[tuple[int, int], memoryview] = {}  # the same in a file, of which none was needed yet
        self.file = ""
        self.batch = 0
        self.tensor: weakref.ref | None = None
        self.version: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        twin = Kept()  # with no tensor of its own, so that it looks at the first keys it sees
        twin.batch = self.batch
        twin.pasts = {at: copy.deepcopy(past, memo) for at, past in self.pasts.items()}
        twin.stored, twin.file = dict(self.stored), self.file
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, ())  # pickled caches do not need this package; what is missing is made anew

    def at(self, at: tuple[int, int]) -> Any:
        """What is kept of a stretch of keys, if anything is, else None."""
        if at in self.stored:
            try:
                self.pasts[at] = _core.Past.from_bytes(self.stored[at])
            except ValueError as error:
                raise ValueError(f"{self.file}: damaged in what it keeps of a layer's chunks: {error}") from None
            del self.stored[at]
        return self.pasts.get(at)

    def unchanged(self, layer: Any) -> int:
        """How many keys of `layer` are those of the last call for certain."""
        seen: Any = None if self.tensor is None else self.tensor()
        keys: Any = getattr(layer, "keys", None)
        if seen is None or keys is not seen or self.version != _version(seen):
            return 0
        return int(seen.shape[-2])


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _place_of(cache: Any, module: torch.nn.Module) -> tuple[Any, str] | None:
    """The object and the name of its attribute that hold the Kept of `module`: the cache's own layer, or the cache, for
    a module that has no layer there since it reads another's keys. None if the module does not say which it is."""
    layers, index = getattr(cache, "layers", None) or (), getattr(module, "layer_idx", None)
    if cache is None or not isinstance(index, int):
        return None
    return (layers[index], _KEPT) if index < len(layers) else (cache, f"{_KEPT}_{index}")


def _kept_at(place: tuple[Any, str] | None) -> Kept | None:
    kept = None if place is None else getattr(*place, None)
    return kept if isinstance(kept, Kept) else None


def _before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():  # nothing of this belongs into a graph
        return
    cache = cache_in(args, kwargs)
    place = _place_of(cache, module)
    kept = _kept_at(place)
    same = 0 if kept is None or place is None else kept.unchanged(place[0])
    _running.entry = (weakref.ref(module), None if cache is None else _reference(cache), same)


def _reference(cache: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(cache)
    except TypeError:  # a user's own class with __slots__; held until the attention function has run
        return lambda: cache


def watch(module: torch.nn.Module, hook: Callable[..., None] = _before_forward) -> None:
    """Has `hook` called before every forward of `module` until `unwatch`; without one, lets `recall` know the caches
    that an attention module is called with."""
    if _HOOK not in module.__dict__:
        module.__dict__[_HOOK] = module.register_forward_pre_hook(hook, with_kwargs=True)


def unwatch(module: torch.nn.Module) -> None:
    if (hook := module.__dict__.pop(_HOOK, None)) is not None:
        hook.remove()


class Memory:
    """What one call of a layer may use of earlier ones: `of(...)` is what `functional.run` is to be told."""

    def __init__(self, kept: Kept, key: torch.Tensor, same: int, keep: bool, held: bool) -> None:
        self._kept, self._key, self._same, self._keep, self._held = kept, key, same, keep, held
        self._used: dict[tuple[int, int], Any] = {}

    def of(self, row: int | None, k_start: int) -> dict[str, Any]:
        """For queries of batch row `row` (None: of all) that attend to the keys from `k_start` on."""
        rows = range(self._kept.batch) if row is None else (row,)
        found = {at: self._used.get(at) or self._kept.at(at) or _core.Past() for at in ((r, k_start) for r in rows)}
        self._used |= found
        return {"pasts": tuple(found.values()), "same": max(0, self._same - k_start), "keep": self._keep}

    def done(self, sparse: bool) -> None:
        """The call is over; `sparse`: no part of it was exact, so that every Past has seen its keys."""
        kept = self._kept
        if self._used:  # those that met another first key are of no use any more
            kept.pasts, kept.stored = self._used, {}
        kept.tensor = weakref.ref(self._key) if sparse and self._held else None
        kept.version = _version(self._key)


def recall(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, config: Config, patched: Any, in_graph: bool
) -> tuple[Memory | None, str]:
    """The memory of the cache that `module` is running with, if `config` has a use for one (None without chunks, or
    where the keys are in no cache), and, of a patched model, why keys that came from a cache have to be cut anew, else
    "". `patched`: an object of the model's patch, which is warned of once, or None. `in_graph`: whether this is a call
    of an operator in a graph, which runs no hooks."""
    entry = getattr(_running, "entry", None)
    _running.entry = None
    if config.exact or not config.options.has_chunks:
        return None, ""
    place, same, hooked = None, 0, entry is not None and entry[0]() is module
    if entry is not None and hooked and entry[1] is not None:
        place, same = _place_of(entry[1](), module), entry[2]
    if place is None:
        reason = ""
        if patched is not None and key.shape[2] > query.shape[2]:
            # Before torch 2.13 compiled graphs cannot be told from calls past the hooks.
            reason = UNSEEN if hooked else COMPILED if in_graph or not GRAPHS else UNHOOKED
            if reason is not COMPILED and _HOOK in module.__dict__ and patched not in _told:
                _told.add(patched)
                warnings.warn(
                    f"dhsa: {type(module).__name__} attends to {key.shape[2]:,} keys with {query.shape[2]:,} queries, "
                    f"but {reason}; dhsa.last_run names this reason for each layer",
                    RuntimeWarning,
                    stacklevel=2,
                )
        # Whoever decodes without a cache in sight has its chunks made for the step.
        return (_fresh(key) if query.shape[2] == 1 and key.shape[2] > 1 else None), reason
    kept = _kept_at(place)
    if kept is None or kept.batch != key.shape[0]:
        kept = Kept()
        kept.batch = key.shape[0]
        setattr(*place, kept)
        same = 0
    held = getattr(place[0], "keys", None) is key
    if not held or (kept.tensor is not None and kept.tensor() is key):  # static caches write into the tensor they have
        same = 0
    # Means are worth their memory to whoever comes back: a step, or the next piece of a prompt that comes in pieces.
    keep = config.decode == "dhsa" or key.shape[2] > query.shape[2]
    return Memory(kept, key, min(same, key.shape[2]), keep, held), ""


def _fresh(key: torch.Tensor) -> Memory:
    kept = Kept()
    kept.batch = key.shape[0]
    return Memory(kept, key, 0, False, False)


# ---- in files --------------------------------------------------------------------------------------------------------


def stored(layer: Any) -> dict[tuple[int, int], bytes]:
    """What is kept beside a cache's layer, as bytes, by batch row and first key."""
    kept = getattr(layer, _KEPT, None)
    if not isinstance(kept, Kept):
        return {}
    written = {at: past.to_bytes() for at, past in kept.pasts.items()}
    return written | {at: bytes(part) for at, part in kept.stored.items()}


def restore(layer: Any, batch: int, parts: dict[tuple[int, int], memoryview], file: str) -> None:
    """Puts beside a layer what `stored` returned of one with the same keys. It is read from `parts` when needed."""
    kept = Kept()
    kept.batch, kept.stored, kept.file = batch, parts, file
    kept.tensor, kept.version = weakref.ref(layer.keys), _version(layer.keys)
    setattr(layer, _KEPT, kept)
