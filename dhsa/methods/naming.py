"""From the name of a method and its options, as `Config` takes them, to a `Method`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dhsa._arrays import check_choice

from . import registry
from .base import Method

__all__ = ["OPTIONS", "method_of", "only_of", "refuse_others"]

# {option: the methods that have it}
OPTIONS: dict[str, tuple[str, ...]] = {}
for _method in registry.values():
    for _name in _method.options():
        OPTIONS[_name] = (*OPTIONS.get(_name, ()), _method.name)


def method_of(method: object, options: Mapping[str, Any]) -> Method:
    """The method with its options; TypeError or ValueError naming what is wrong."""
    if isinstance(method, Method):
        if options:
            raise TypeError(
                f"{min(options)}: give options to dhsa.methods.{type(method).__name__} or beside the name of a method, "
                "not both"
            )
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method: expected a name or an instance, got a class; write {method.__name__}()")
    kind = tuple(registry.values())[check_choice(method, "method", tuple(registry))]
    refuse_others(kind, options)
    return kind(**options)


def refuse_others(kind: type[Method], options: Mapping[str, Any]) -> None:
    """Raises TypeError for an option that the method does not have."""
    for name in options:
        if name not in kind.options():
            raise TypeError(f"{name}: {only_of(name)}; method={kind.name!r} has {_listed(kind.options())}")


def only_of(name: str) -> str:
    """Which methods have an option, as the predicate of a sentence."""
    return f"is an option of method={' and '.join(map(repr, OPTIONS[name]))}"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "no options of its own"
