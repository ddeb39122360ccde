"""Numbers by which a compiled graph finds its attention modules again, to ask them for config and records when it
runs."""

import itertools
import weakref

import torch

__all__ = ["HANDLE", "note", "number_of", "waiting"]

HANDLE = "_dhsa_handle"  # on the attention modules of patched models

_modules: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_numbers: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()
_next = itertools.count(1)


class _Handle:
    """A module's number as a tensor. Dynamo makes tensors inputs of a graph and numbers constants of it: this way one
    graph serves all layers that are alike. A copied or unpickled module has None in its place, until it is patched."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.number = torch.tensor(number_of(module))

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()


def number_of(module: torch.nn.Module) -> int:
    """The number of a module, its own as long as the process lives."""
    number = _numbers.get(module)
    if number is None:
        number = _numbers[module] = next(_next)
        _modules[number] = module
    return number


def note(module: torch.nn.Module) -> None:
    """Sees to it that the module has a handle."""
    if module.__dict__.get(HANDLE) is None:
        module.__dict__[HANDLE] = _Handle(module)


def waiting(number: int) -> torch.nn.Module:
    """The module with this number. RuntimeError if there is none any more."""
    module = _modules.get(number)
    if module is None:
        raise RuntimeError(
            "dhsa::attention: the attention module that this graph was compiled for no longer exists; "
            "compile the model again, or use torch.export for a graph that stands alone"
        )
    return module
