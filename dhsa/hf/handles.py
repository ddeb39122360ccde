"""Numbers by which a compiled graph finds its attention modules when it runs, to read their config and store
records."""

import itertools
import weakref

import torch

__all__ = ["HANDLE", "note", "number_of", "waiting"]

HANDLE = "_dhsa_handle"  # on the attention modules of patched models

_modules: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_handles: weakref.WeakKeyDictionary[torch.nn.Module, "_Handle"] = weakref.WeakKeyDictionary()
_numbers = itertools.count(1)


class _Handle:
    """A module's number as a tensor. Dynamo makes tensors inputs of a graph but numbers constants of it, so with a
    tensor one graph works for all layers that are alike. A copied or unpickled module has None until it is patched."""

    def __init__(self) -> None:
        self.number = torch.tensor(next(_numbers), device="cpu")

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


def _handle_of(module: torch.nn.Module) -> _Handle:
    """The handle of a module, the same for its whole life."""
    handle = _handles.get(module)
    if handle is None:
        handle = _handles.setdefault(module, _Handle())
        _modules[int(handle.number)] = module
    return handle


def number_of(module: torch.nn.Module) -> int:
    """The number by which `waiting` finds the module again."""
    return int(_handle_of(module).number)


def note(module: torch.nn.Module) -> None:
    """Stores a module's handle on the module, where a graph reads it."""
    module.__dict__[HANDLE] = _handle_of(module)


def waiting(number: int) -> torch.nn.Module:
    """The module with this number. Raises RuntimeError if it no longer exists."""
    module = _modules.get(number)
    if module is None:
        raise RuntimeError(
            "dhsa::attention: the attention module that this graph was compiled for no longer exists; "
            "compile the model again, or use torch.export for a graph that needs no module"
        )
    return module
