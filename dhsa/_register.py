"""Registers attention implementation "dhsa" with transformers once both packages are imported, in either order, and
calls other functions once a module has been imported.

`import dhsa` must not import transformers, and a program that loads models by `attn_implementation="dhsa"` imports only
`dhsa`. So a finder on `sys.meta_path` notices when transformers' module of models has been imported, and then imports
`dhsa.hf`, which registers. Nothing else about imports changes: the module is found and loaded by the usual finders and
loaders, and a release of transformers that `dhsa.hf` does not support stays as usable as without this package.
"""

import contextlib
import importlib
import sys
import threading
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MODELS", "register_when_imported", "when_imported"]

MODELS = "transformers.modeling_utils"  # has the registry of attention functions, and needs torch anyway


def register_when_imported() -> None:
    """Registers now if transformers is already imported, else once it has been. Further calls do nothing."""
    when_imported(MODELS, _register, 'attn_implementation="dhsa" is not known until dhsa.hf is imported')


def when_imported(name: str, act: Callable[[ModuleType], object], otherwise: str) -> None:
    """Calls `act` with the module of this name: now if it is already imported, else once it has been. Further calls
    with the same arguments do nothing. If the module's loader takes no other function in the place of its own, a
    RuntimeWarning says so, and `otherwise`: what is amiss then."""
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(finder, _Awaiting) and finder.awaits(name, act) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting(name, act, otherwise))


def _register(_: ModuleType) -> None:
    if "dhsa.hf" in sys.modules:  # or another thread is importing it, and waits for this one
        return
    # A release that is not supported, or is partly imported: an explicit `import dhsa.hf` raises the error.
    with contextlib.suppress(Exception):
        importlib.import_module("dhsa.hf")


class _Awaiting:
    """A finder that delegates to the other finders, and calls a function once the awaited module has been executed."""

    def __init__(self, name: str, act: Callable[[ModuleType], object], otherwise: str) -> None:
        self._name, self._act, self._otherwise = name, act, otherwise
        self._asking = threading.local()  # against recursion: finders of other packages may delegate as well

    def awaits(self, name: str, act: Callable[[ModuleType], object]) -> bool:
        return (name, act) == (self._name, self._act)

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            specs = (
                f.find_spec(name, path, target) for f in sys.meta_path if f is not self and hasattr(f, "find_spec")
            )
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._asking.now = False
        if spec is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        # Sets an attribute of the module's loader instead of wrapping it, so its type and other attributes stay.
        def exec_module(module: ModuleType) -> None:
            # If this fails, the finder stays for the next attempt. This frame appears in the traceback, so the comment
            # of the line that is quoted there says where the error comes from.
            run(module)  # the module that dhsa waits for is imported here: an error below is not of dhsa
            if module.__name__ != self._name:
                return
            loader.__dict__.pop("exec_module", None)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self._act(module)

        try:
            run, loader.exec_module = loader.exec_module, exec_module
        except AttributeError:  # a loader without this function, or without attributes of its own
            warnings.warn(
                f"dhsa: the {type(loader).__name__} that loads {self._name} cannot be followed, so {self._otherwise}",
                RuntimeWarning,
                stacklevel=2,
            )
