"""Makes attention implementation "dhsa" known to transformers once both packages are imported, in either order; and
whatever else is to be done once a module has been imported.

`import dhsa` must not import transformers, and a harness that loads models by `attn_implementation="dhsa"` imports no
more than `dhsa`. So the import of transformers' module of models is waited for, and `dhsa.hf`, which registers, is
imported right after it. Nothing else about imports changes: the module is found and loaded by whoever would have done
it, and a transformers that `dhsa.hf` cannot work with stays as usable as without this package.
"""

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MODELS", "register_when_imported", "when_imported"]

MODELS = "transformers.modeling_utils"  # what has the register of attention functions, and needs torch anyway


def register_when_imported() -> None:
    """Registers now if transformers is imported already, else as soon as it has been. Calling it again does nothing."""
    when_imported(MODELS, _register)


def when_imported(name: str, act: Callable[[ModuleType], object]) -> None:
    """Calls `act` with the module of this name: now if it is imported already, else as soon as it has been. Doing so
    again with the same two does nothing."""
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(finder, _Awaiting) and finder.awaits(name, act) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting(name, act))


def _register(_: ModuleType) -> None:
    if "dhsa.hf" in sys.modules:  # or another thread is at it, and would wait for this one
        return
    # A transformers of another version, or half imported: an `import dhsa.hf` of the user's own says what is wrong.
    with contextlib.suppress(Exception):
        importlib.import_module("dhsa.hf")


class _Awaiting:
    """A finder that finds nothing itself: it lets the others find the awaited module, and is told when it has run."""

    def __init__(self, name: str, act: Callable[[ModuleType], object]) -> None:
        self._name, self._act = name, act
        self._asking = threading.local()  # finders like this one, of other packages, ask all others too: no circles

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
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        # On the loader that this module got, not around it: its type, and all else that is asked of it, stay.
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # If it fails, this finder is still there for the next attempt. A frame of its own cannot be left out of a
            # traceback, so the line that is quoted there says whose error it is.
            run(module)  # transformers.modeling_utils is imported here: an error below is not of dhsa
            if module.__name__ != self._name:
                return
            loader.__dict__.pop("exec_module", None)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self._act(module)

        with contextlib.suppress(AttributeError):  # of a loader that takes no attributes: `import dhsa.hf` is left
            loader.exec_module = exec_module
