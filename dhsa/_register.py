"""Registers attention implementation "dhsa" with transformers once both packages are imported, in either order.

`import dhsa` must not import transformers, and a program that loads models by `attn_implementation="dhsa"` imports only
`dhsa`. So a finder on `sys.meta_path` notices when transformers' module of models has been imported, and then imports
`dhsa.hf`, which registers. Nothing else about imports changes: the module is found and loaded by the usual finders and
loaders, and a release of transformers that `dhsa.hf` does not support stays as usable as without this package.
"""

import contextlib
import importlib
import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_when_imported"]

_AWAITED = "transformers.modeling_utils"  # has the registry of attention functions, and needs torch anyway


def register_when_imported() -> None:
    """Registers now if transformers is already imported, else once it has been. Further calls do nothing."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Awaiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting())


def _register() -> None:
    if "dhsa.hf" in sys.modules:  # or another thread is importing it, and waits for this one
        return
    # A release that is not supported, or is partly imported: an explicit `import dhsa.hf` raises the error.
    with contextlib.suppress(Exception):
        importlib.import_module("dhsa.hf")


class _Awaiting:
    """A finder that delegates to the other finders, and registers once the awaited module has been executed."""

    def __init__(self) -> None:
        self._asking = threading.local()  # against recursion: finders of other packages may delegate as well

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AWAITED or getattr(self._asking, "now", False):
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
        # Sets an attribute of the module's loader instead of wrapping it, so its type and other attributes stay.
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # If this fails, the finder stays for the next attempt. This frame appears in the traceback, so the comment
            # of the line that is quoted there says where the error comes from.
            run(module)  # transformers.modeling_utils is imported here: an error below is not of dhsa
            if module.__name__ != _AWAITED:
                return
            loader.__dict__.pop("exec_module", None)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        with contextlib.suppress(AttributeError):  # a loader without attributes: users must import dhsa.hf
            loader.exec_module = exec_module
