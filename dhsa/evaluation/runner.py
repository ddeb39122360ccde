"""The run: the prompts of every task by every setting, dense first, except those that the store already holds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import dhsa
from dhsa.evaluation import tasks
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.store import Store, digest
from dhsa.evaluation.tasks import Context, Item

__all__ = ["build_hash", "identity", "key", "run"]


def build_hash() -> str:
    """Return a hash of the compiled core and the Python rules around it, which change what is selected."""
    from dhsa import _core, functional, selecting
    from dhsa.evaluation import cuts

    digest = hashlib.sha256()
    for path in (_core.__file__, functional.__file__, selecting.__file__, cuts.__file__):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]


def identity(source: Path) -> str:
    """Return a model's name with a hash of its size and parts of its content, to tell files of one name apart."""
    digest = hashlib.sha256()
    files = (
        [source] if source.is_file() else sorted(p for p in source.iterdir() if p.suffix in (".json", ".safetensors"))
    )
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return f"{source.stem if source.is_file() else source.name}:{digest.hexdigest()[:8]}"


def prompt_hash(ids: list[int]) -> str:
    return hashlib.sha256(np.asarray(ids, "<i8").tobytes()).hexdigest()[:16]


def key(base: dict[str, Any], task: str, item: Item, setting: Setting, build: str) -> str:
    """Return a key of all that a row depends on. Dense attention is exact, so its rows do not depend on the build."""
    return digest(
        {
            **{name: base[name] for name in ("model", "dtype", "products", "layers")},
            "version": tasks.task(task).VERSION,
            "task": task,
            "item": item.name,
            "prompt": prompt_hash(item.ids),
            "facts": item.facts,
            "method": "dense" if setting.dense else "sparse",
            "config": None if setting.dense else setting.fields(),
            "build": None if setting.dense else build,
        }
    )


def run(
    names: list[str],
    settings: list[Setting],
    context: Context,
    store: Store,
    base: dict[str, Any],
    step: Callable[..., Any],
    plan: Callable[[str, int, int], None] = lambda task, total, missing: None,
    build: str | None = None,
) -> list[dict[str, Any]]:
    """Measure what is missing of `names` x prompts x `settings`, and return all their rows, old and new.

    base: the fields of every row that describe the run: model, dtype, products, layers, threads. step: that of
    `commands.progress`. plan: called for each task with the number of measurements and how many of them are missing.
    build: what `build_hash` returns, of the first of several processes.
    """
    build = build or build_hash()
    rows = []
    for name in names:
        task = tasks.task(name)
        with step(f"{name}: making prompts"):
            items = task.items(context)
        wanted = [s for s in settings if task.DENSE or not s.dense]
        cells = [(item, [(s, key(base, name, item, s, build)) for s in wanted]) for item in items]
        prompts = sum(item.due for item in items)
        missing = sum(k not in store for item, keys in cells if item.due for _, k in keys)
        plan(name, prompts * len(wanted), missing)
        with step(f"{name}: {prompts} prompts, {len(wanted)} settings", total=max(missing, 1)) as advance:
            for item, keys in cells:
                due = {s: k for s, k in keys if item.due and k not in store}
                if due:
                    for setting, facts in task.measure(context.engine, item, list(due)):
                        store.add(_row(base, name, item, setting, due[setting], build, facts))
                        advance()
                # The label of a method may have changed, as from "rows" to "rows:query_block=128".
                rows += [{**store.rows[k], "method": s.label} for s, k in keys if k in store]
    return rows


def _row(
    base: dict[str, Any], task: str, item: Item, setting: Setting, key: str, build: str, facts: dict[str, Any]
) -> dict[str, Any]:
    return {
        "key": key,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **base,
        "build": build,
        "isa": dhsa.build_info()["isa"],
        "task": task,
        "item": item.name,
        "prompt": prompt_hash(item.ids),
        "tokens": len(item.ids),
        **item.facts,
        "method": setting.label,
        "budget": setting.budget,
        "mass": setting.mass,
        "given": setting.given,
        "config": setting.fields(),
        **facts,
    }
