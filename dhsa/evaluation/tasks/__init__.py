"""The tasks by name, one file each, and what a task is.

A task makes items (prompts), measures settings on an item, and turns rows into tables and pictures:

- `items(context) -> list[Item]`;
- `measure(engine, item, settings) -> iterator of (setting, facts)`: facts are what a row says, as JSON can hold it;
- `tables(rows) -> list of lines`: Markdown; `pictures(rows, folder) -> list of files`;
- `DENSE`: is dense attention a setting of it?
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass, field
from typing import Any

__all__ = ["NAMES", "Context", "Item", "task"]

NAMES = ("ppl", "niah", "ruler", "longbench", "output")


@dataclass(frozen=True)
class Item:
    """One prompt. `name` is unique within its task; `facts` go into its rows and, with ids, into their key; `data` is
    the task's own, determined by the two."""

    name: str
    ids: list[int]
    facts: dict[str, Any] = field(default_factory=dict)
    data: Any = None


@dataclass(frozen=True)
class Context:
    """What tasks make items of: the engine, the command's arguments, the texts (`texts.sources`)."""

    engine: Any
    args: argparse.Namespace
    groups: list[list[tuple[str, str]]]


def task(name: str) -> Any:
    """The module of a task."""
    return importlib.import_module(f"dhsa.evaluation.tasks.{name}")
