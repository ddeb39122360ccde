"""The configs that are tried in each layer: families of settings, each at several budgets.

Every field that matters is given, so that a file does not depend on defaults. A new method or option is tried once it
has a line here.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from dhsa.config import Config

__all__ = ["EXACT", "between", "budgets", "families", "probe"]

EXACT = Config(budget=None)
_COMMON = {"query_block": 64, "sink": 16, "local": 128, "dense_tail": 64, "break_even": 0}
_CUTS: tuple[dict[str, Any], ...] = (
    {"boundaries": "similarity"},
    {"boundaries": "fixed", "chunk_size": 2},
    {"boundaries": "fixed", "chunk_size": 4},
    {"boundaries": "fixed", "chunk_size": 8},
)
_ROWS = (16, 32, 64)
_LEAST, _MOST = 256, 4096  # budgets


def families() -> list[Config]:
    """Return the settings without a budget of their own (they have the smallest); the first is the default of
    `dhsa.Config`.
    """
    made = [Config().replace(budget=_LEAST, break_even=0)]
    for heads, cuts, rows in product(("group", "head"), _CUTS, _ROWS):
        fields = {"method": "rows", "budget": _LEAST, "heads": heads, "rows": rows}
        made.append(Config.from_dict({**fields, **cuts, **_COMMON}))
    return list(dict.fromkeys(made))


def budgets(length: int) -> list[int]:
    """Return the budgets that are measured for documents of `length` tokens: powers of two up to half of it, at least
    two of them.
    """
    found = [_LEAST]
    while 2 * found[-1] <= min(_MOST, length // 2):
        found.append(2 * found[-1])
    return found if len(found) > 1 else [_LEAST // 2, _LEAST]


def between(less: int, more: int) -> int:
    """Return the budget half way between two that are measured, in whole sixteens: it is not measured but
    interpolated.
    """
    return round((less * more) ** 0.5 / 16) * 16


def probe(length: int) -> Config:
    """Return the config by which one layer at a time is made sparse, so that the predictions change more than by
    rounding.
    """
    budget = max(32, length // 12)
    return Config(
        method="rows", budget=budget, sink=budget // 8, local=budget // 4, heads="group", rows=16, query_block=64,
        boundaries="fixed", chunk_size=4, dense_tail=0, break_even=0,
    )  # fmt: skip
