"""Means of fixed blocks of keys."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from dhsa._twin.attention import softmax
from dhsa._twin.blocks import Block as QueryBlock
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Block"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block(Method):
    """Fixed blocks of keys by the softmax of the block's mean query over the mean keys, summed over the heads of a set.

    Args:
        key_block: keys of a block, at least 1.

    Raises:
        TypeError, ValueError: naming the option.

    Source: the common baseline of block-sparse attention, as in the block selection of MInference (arXiv 2407.02490)
    and in MoBA (arXiv 2502.13189).
    """

    name: ClassVar[str] = "block"
    summary: ClassVar[str] = "fixed blocks by the softmax of the mean query over mean keys"
    source: ClassVar[str] = "MInference, arXiv 2407.02490; MoBA, arXiv 2502.13189"
    cost: ClassVar[str] = "G n / `key_block`"
    has_both_sides: ClassVar[bool] = True

    key_block: int = 128

    def __post_init__(self) -> None:
        self._keep_int("key_block", 1)

    @staticmethod
    def twin(block: QueryBlock) -> Segments | np.ndarray:
        """Fixed blocks of keys: per head a softmax of the mean query over the mean keys, summed over heads.

        The mean of the last block is of the keys up to the end of the candidates. A block without a finite mean is
        always selected, and left out of the softmax of its KV head. A mean query that is not finite is ignored.
        """
        o = block.options
        edges = np.arange(block.lo // o["key_block"] * o["key_block"], block.end, o["key_block"])
        edges = np.append(edges, block.end)
        means = np.stack([block.k[:, a:b].mean(axis=1) for a, b in itertools.pairwise(edges)], axis=1)
        finite = np.asarray(np.isfinite(means).all(axis=2))
        mass = np.zeros(len(edges) - 1)
        for h, query in enumerate(block.queries.mean(axis=1)):
            kv = h * len(block.k) // len(block.q)
            if np.isfinite(query).all() and finite[kv].any():
                s = o["scale"] * (means[kv][finite[kv]] @ query)
                s = s if o["softcap"] is None else o["softcap"] * np.tanh(s / o["softcap"])
                mass[finite[kv]] += softmax(s, axis=0)
        known = finite.all(axis=0)
        mass = np.where(known, mass, 0.0)
        return Segments(edges, np.where(known, mass, np.inf), mass)
