"""Single keys by their cosine with the queries that are least like their mean."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from dhsa._twin.blocks import Block, Fixed, fixed, is_bad
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Quoka"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quoka(Method):
    """Single keys by their cosine with the few queries of a block that are least like its mean query: these attend to
    more keys, and more strongly. In NumPy: for comparing what is selected.

    Args:
        rows: queries of a block that are kept, at least 1; at most all of them are.

    Raises:
        TypeError, ValueError: naming the option.

    Source: QUOKA, arXiv 2602.08722.
    """

    name: ClassVar[str] = "quoka"
    summary: ClassVar[str] = "single keys by their cosine with the queries farthest from the mean"
    source: ClassVar[str] = "QUOKA, arXiv 2602.08722"
    cost: ClassVar[str] = "`rows` n, and Q G"
    in_core: ClassVar[bool] = False
    has_mass: ClassVar[bool] = False

    rows: int = 16

    def __post_init__(self) -> None:
        self._keep_int("rows", 1)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Each head keeps its ``rows`` queries of the lowest cosine with its mean query, of equal ones the later. They
        are divided by their norms, and the first, the second, and so on of all heads of a KV head are averaged. The
        score of a key is its largest cosine with one of these means, the mean over the KV heads of the set. Source:
        QUOKA, arXiv 2602.08722.

        There, the queries are those of a piece of a prompt that is read in pieces; here, those of a block. Queries
        that are not finite are not kept; a head without any other does not count.
        """
        group = len(block.q) // len(block.k)
        score = np.zeros(block.end)
        for kv in range(len(block.k)):
            kept = [_farthest(block.queries[h], block.options["rows"])
                    for h in range(kv * group, (kv + 1) * group)]  # fmt: skip
            least = min((len(rows) for rows in kept if len(rows)), default=0)
            if least == 0:
                continue
            rows = fixed(np.mean([rows[:least] for rows in kept if len(rows)], axis=0))
            keys = block.shared(("unit keys", kv), functools.partial(_fixed_unit, block.k[kv]))[: block.end]
            products = (rows.whole @ keys.whole.T) * rows.scale[:, None] * keys.scale
            score += np.where(np.isnan(products), 0.0, products).max(axis=0)
        return Segments(np.arange(block.end + 1), np.where(is_bad(block), np.inf, score))


def _unit(x: np.ndarray) -> np.ndarray:
    """Vectors x [n, D] divided by their norms; those of norm 0 stay."""
    norms = np.sqrt((x**2).sum(axis=1, keepdims=True))
    return x / np.where(norms > 0, norms, 1.0)


def _fixed_unit(x: np.ndarray) -> Fixed:
    return fixed(_unit(x))


def _farthest(queries: np.ndarray, rows: int) -> np.ndarray:
    """The `rows` finite queries of the lowest cosine with their mean, as unit vectors, the farthest first."""
    finite = queries[np.isfinite(queries).all(axis=1)]
    if not len(finite):
        return finite
    unit = _unit(finite)
    cosine = (unit * _unit(finite.mean(axis=0, keepdims=True))).sum(axis=1)
    return unit[np.lexsort((-np.arange(len(unit)), cosine))[:rows]]
