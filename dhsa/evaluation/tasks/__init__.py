"""The tasks by name, one file each, and the interface of a task.

A task makes items (prompts), measures settings on an item, and turns rows into tables and pictures:

- `items(context) -> list[Item]`;
- `measure(engine, item, settings) -> iterator of (setting, facts)`: facts are the fields of a row, as JSON can hold
them;
- `tables(rows) -> list of lines`: Markdown; `pictures(rows, folder) -> list of files`;
- `DENSE`: whether dense attention is one of its settings;
- `VERSION`: that of its rows. Raise it when a measurement changes, so that old rows are not used.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass, field
from typing import Any

__all__ = ["NAMES", "Context", "Item", "task"]

NAMES = ("ppl", "niah", "ruler", "longbench", "kv", "turns", "output", "frontier", "density")


@dataclass(frozen=True)
class Item:
    """One prompt.

    `name` is unique within its task. `facts` become fields of its rows and, with `ids`, part of their key. `data` is
    for the task's own use and is determined by the two. Without `due` the item is not measured; rows that exist are in
    the report.
    """

    name: str
    ids: list[int]
    facts: dict[str, Any] = field(default_factory=dict)
    data: Any = None
    due: bool = True


@dataclass(frozen=True)
class Context:
    """What tasks make items of: the engine, the arguments of the command, the texts (`texts.sources`)."""

    engine: Any
    args: argparse.Namespace
    groups: list[list[tuple[str, str]]]


def task(name: str) -> Any:
    """Return the module of a task."""
    return importlib.import_module(f"dhsa.evaluation.tasks.{name}")
