"""What is stored about the keys of a cache from call to call: where they were cut, and the means of their chunks.

A `_core.KeyIndex` for each batch item is an attribute of the cache's own layer object. So it exists as long as the
cache, two caches never share one, and a deep copy of a cache has its own. A KeyIndex compares every key before it uses
what it stored about it, so cropping, reordering beams and refilling a cache need no notification. If the cache still
holds the same tensor that the layer saw last, and it grew by appending, then only a part of a large cache's keys is
compared in each call. A part is compared even so, because writes through NumPy or `.data` leave no trace on a tensor.
Attention functions do not receive the cache. `patch` installs a hook before the attention module's forward, which finds
the cache among its arguments.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dhsa import _core
from dhsa.config import Config

from .compat import GRAPHS, cache_in

__all__ = [
    "COMPILED",
    "UNHOOKED",
    "UNSEEN",
    "InFile",
    "Memory",
    "States",
    "recall",
    "restore",
    "states_of",
    "stored",
    "unwatch",
    "watch",
]

_HOOK = "_dhsa_hook"  # on a watched module
_KEPT = "_dhsa_kept"  # on a cache's layer
_STATES = "_dhsa_states"  # on a cache's layer

# .entry, written before a watched module's forward: (weak reference to the module, weak reference to its cache or None
# if it was called without one, how many keys are unchanged since the layer's last call).
_running = threading.local()
_told: weakref.WeakSet[Any] = weakref.WeakSet()  # of patched models, those for which the warning was given

UNSEEN = (
    "no cache was seen among the arguments of the attention module, so what earlier calls stored about the keys is "
    "not used"
)
UNHOOKED = (
    "the attention module was not called as module(...), so its cache was not seen and what earlier calls stored "
    "about the keys is not used"
)
COMPILED = "compiled graphs store nothing about a cache's keys from call to call"


class InFile(NamedTuple):
    """A KeyIndex in a file, as bytes that are read when it is first needed."""

    path: str
    data: memoryview
    sha256: str

    def read(self) -> memoryview:
        """The bytes; ValueError if they are not those of the checksum."""
        if hashlib.sha256(self.data).hexdigest() != self.sha256:
            raise self.damaged("its bytes are not those of its checksum")
        return self.data

    def damaged(self, why: object) -> ValueError:
        return ValueError(f"{self.path}: the key index of a layer is damaged: {why}")


class Kept:
    """What is stored for one cache layer: a KeyIndex for each stretch of keys that was attended to, and the tensor that
    held the keys."""

    def __init__(self) -> None:
        self.key_indexes: dict[tuple[int, int], Any] = {}  # by batch row and first key
        self.stored: dict[tuple[int, int], InFile] = {}  # those of a loaded cache that were not used yet
        self.batch = 0
        self.cuts: str | None = None  # of the Config by which keys were cut; None: not known, of a loaded cache
        self.tensor: weakref.ref | None = None
        self.version: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        twin = Kept()  # without a tensor, so that all keys of its first call are compared
        twin.batch, twin.cuts = self.batch, self.cuts
        twin.stored = dict(self.stored)
        twin.key_indexes = {at: copy.deepcopy(index, memo) for at, index in self.key_indexes.items()}
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, ())  # pickled caches do not need this package; what is missing is computed again

    def at(self, at: tuple[int, int]) -> Any:
        """The KeyIndex for a batch row and first key; None if there is none."""
        if (written := self.stored.get(at)) is not None:
            data = written.read()
            try:
                self.key_indexes[at] = _core.KeyIndex.from_bytes(data)
            except ValueError as error:
                raise written.damaged(error) from None
            del self.stored[at]
        return self.key_indexes.get(at)

    def unchanged(self, layer: Any) -> int:
        """How many keys of `layer` are known to be those of the last call."""
        seen: Any = None if self.tensor is None else self.tensor()
        keys: Any = getattr(layer, "keys", None)
        if seen is None or keys is not seen or self.version != _version(seen):
            return 0
        return int(seen.shape[-2])


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class States(dict[Any, Any]):
    """The states of methods that remember earlier calls, for one cache layer: by method, batch row and first key."""

    def __deepcopy__(self, memo: dict[int, Any]) -> States:
        return States({at: copy.deepcopy(state, memo) for at, state in self.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return (dict, ())  # as Kept


def states_of(module: torch.nn.Module) -> States | None:
    """The States of the cache that `module` is running with; None if none was seen. To be called before `recall`."""
    entry = getattr(_running, "entry", None)
    if entry is None or entry[0]() is not module or entry[1] is None:
        return None
    if (place := _place_of(entry[1](), module, _STATES)) is None:
        return None
    if not isinstance(getattr(*place, None), States):
        setattr(*place, States())
    found: States = getattr(*place)
    return found


def _place_of(cache: Any, module: torch.nn.Module, name: str = _KEPT) -> tuple[Any, str] | None:
    """The object and the name of its attribute that hold the Kept of `module`: the cache's own layer, or the cache if
    the module has no layer there because it reads the keys of another. None if the module has no layer index."""
    layers, index = getattr(cache, "layers", None) or (), getattr(module, "layer_idx", None)
    if cache is None or not isinstance(index, int):
        return None
    return (layers[index], name) if index < len(layers) else (cache, f"{name}_{index}")


def _kept_at(place: tuple[Any, str] | None) -> Kept | None:
    kept = None if place is None else getattr(*place, None)
    return kept if isinstance(kept, Kept) else None


def _before_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():  # none of this must become part of a graph
        return
    cache = cache_in(args, kwargs)
    place = _place_of(cache, module)
    kept = _kept_at(place)
    same = 0 if kept is None or place is None else kept.unchanged(place[0])
    _running.entry = (weakref.ref(module), None if cache is None else _reference(cache), same)


def _reference(cache: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(cache)
    except TypeError:  # a class with __slots__: a strong reference, held until the attention function has run
        return lambda: cache


def watch(module: torch.nn.Module, hook: Callable[..., None] = _before_forward) -> None:
    """Installs `hook` before every forward of `module`, until `unwatch`. The default one records the cache that an
    attention module is called with, for `recall`."""
    if _HOOK not in module.__dict__:
        module.__dict__[_HOOK] = module.register_forward_pre_hook(hook, with_kwargs=True)


def unwatch(module: torch.nn.Module) -> None:
    if (hook := module.__dict__.pop(_HOOK, None)) is not None:
        hook.remove()


class Memory:
    """What one call of a layer may use of earlier ones. `of(...)` gives the arguments for `functional.run`."""

    def __init__(self, kept: Kept, key: torch.Tensor, same: int, keep: bool, held: bool) -> None:
        self._kept, self._key, self._same, self._keep, self._held = kept, key, same, keep, held
        self._used: dict[tuple[int, int], Any] = {}

    def of(self, row: int | None, k_start: int) -> dict[str, Any]:
        """The arguments for queries of batch row `row` (None: all rows) that attend to the keys from `k_start` on."""
        rows = range(self._kept.batch) if row is None else (row,)
        places = ((r, k_start) for r in rows)
        found = {at: self._used.get(at) or self._kept.at(at) or _core.KeyIndex() for at in places}
        self._used |= found
        return {"key_indexes": tuple(found.values()), "same": max(0, self._same - k_start), "keep_means": self._keep}

    def done(self, sparse: bool) -> None:
        """To be called after the call. `sparse`: no part of it was exact, so that every KeyIndex has seen its keys."""
        kept = self._kept
        if self._used:  # those with another first key are not needed any more
            kept.key_indexes, kept.stored = self._used, {}
        kept.tensor = weakref.ref(self._key) if sparse and self._held else None
        kept.version = _version(self._key)


def recall(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, config: Config, patched: Any, in_graph: bool
) -> tuple[Memory | None, str]:
    """A Memory for the cache that `module` is running with, and a reason.

    The Memory is None if `config` does not use chunks, or if the keys are in no cache. The reason says, in a patched
    model, why keys that came from a cache have to be cut again; else it is "". `patched`: an object of the model's
    patch, for which a warning is given once, or None. `in_graph`: whether an operator in a graph makes this call; hooks
    do not run there."""
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
            # Before torch 2.13, compiled graphs cannot be distinguished from calls that bypass the hooks.
            reason = UNSEEN if hooked else COMPILED if in_graph or not GRAPHS else UNHOOKED
            if reason is not COMPILED and _HOOK in module.__dict__ and patched not in _told:
                _told.add(patched)
                warnings.warn(
                    f"dhsa: {type(module).__name__} attends to {key.shape[2]:,} keys with {query.shape[2]:,} queries, "
                    f"but {reason}; dhsa.last_run names this reason for each layer",
                    RuntimeWarning,
                    stacklevel=2,
                )
        # In a decoding step whose cache was not seen, the chunks are made for this step alone.
        return (_fresh(key) if query.shape[2] == 1 and key.shape[2] > 1 else None), reason
    kept = _kept_at(place)
    if kept is None or kept.batch != key.shape[0] or kept.cuts not in (None, config.cuts):
        kept = Kept()
        kept.batch = key.shape[0]
        setattr(*place, kept)
        same = 0
    kept.cuts = config.cuts
    held = getattr(place[0], "keys", None) is key
    if not held or (kept.tensor is not None and kept.tensor() is key):  # static caches write into the tensor they have
        same = 0
    # Means are stored only for what uses them again: a decoding step, or the next piece of a prompt given in pieces.
    keep = config.decode == "dhsa" or key.shape[2] > query.shape[2]
    return Memory(kept, key, min(same, key.shape[2]), keep, held), ""


def _fresh(key: torch.Tensor) -> Memory:
    kept = Kept()
    kept.batch = key.shape[0]
    return Memory(kept, key, 0, False, False)


# ---- saved caches ----------------------------------------------------------------------------------------------------


def stored(layer: Any) -> tuple[dict[tuple[int, int], bytes], str | None]:
    """The key indexes on a cache's layer as bytes, by batch row and first key; and `Config.cuts` of the Config they
    are for, None if it is not known. ValueError for one of a loaded cache that was not used yet and is damaged."""
    kept = getattr(layer, _KEPT, None)
    if not isinstance(kept, Kept):
        return {}, None
    made = {at: index.to_bytes() for at, index in kept.key_indexes.items()}
    return made | {at: bytes(written.read()) for at, written in kept.stored.items()}, kept.cuts


def restore(layer: Any, batch: int, written: dict[tuple[int, int], InFile], cuts: str | None) -> None:
    """Puts key indexes that `stored` returned for a layer with the same keys on `layer`. Each is read when it is first
    used."""
    kept = Kept()
    kept.batch, kept.stored, kept.cuts = batch, written, cuts
    kept.tensor, kept.version = weakref.ref(layer.keys), _version(layer.keys)
    setattr(layer, _KEPT, kept)
