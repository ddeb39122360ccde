"""Sums along strided antidiagonals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from dhsa._twin.blocks import Block, block_edges, is_bad, logits, probabilities, sees, segments_of
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method, check_stride

__all__ = ["XAttention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class XAttention(Method):
    """Fixed blocks of keys by sums along strided antidiagonals of the logits. By default each head has lists of its
    own, as in the source.

    Args:
        key_block: keys of a block, at least 1.
        stride: every stride-th antidiagonal is summed: a divisor of key_block, at most 1024.

    Raises:
        TypeError, ValueError: naming the option.

    Source: XAttention, arXiv 2503.16428.
    """

    name: ClassVar[str] = "xattention"
    summary: ClassVar[str] = "fixed blocks by sums along strided antidiagonals"
    source: ClassVar[str] = "XAttention, arXiv 2503.16428"
    cost: ClassVar[str] = "Q G n / `stride`"
    heads: ClassVar[str] = "head"
    paper_fields: ClassVar[Mapping[str, Any]] = {"budget": None, "mass": 0.9, "key_block": 128, "stride": 8}

    key_block: int = 128
    stride: int = 8

    def __post_init__(self) -> None:
        self._keep_int("key_block", 1)
        self._keep_int("stride", 1)
        check_stride(self.stride, self.key_block)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Blocks of keys by the sums of strided antidiagonals. Source: XAttention, arXiv 2503.16428.

        Queries (from the block's first on) and keys (from key 0 on) are cut into groups of ``stride``. Missing members
        of a group, and keys at or above the block's end, count as zeros. The logit of two groups is the sum of the
        products of query ``stride - 1 - t`` and key ``t``, divided by ``stride`` (as in the source) and scaled. Each
        group of queries has a softmax over the groups of keys of which any key is visible to any of its queries. The
        probabilities are summed over the groups of queries and the heads, and over the groups of a block of keys. The
        sums are also the mass.
        """
        stride, dim = block.options["stride"], block.q.shape[2]
        runs, groups = -(-(block.stop - block.begin) // stride), -(-block.end // stride)
        first, at = block.start + np.arange(runs) * stride, np.arange(groups) * stride
        last, key_last = (np.minimum(x + stride, block.end) - 1 for x in (first, at))
        seen = sees((first, last), (at, key_last), block.options["window"])
        total = np.zeros(groups)
        for h in range(len(block.q)):
            rows, keys = np.zeros((runs * stride, dim)), np.zeros((groups * stride, dim))
            rows[: block.stop - block.begin] = block.queries[h]
            keys[: block.end] = block.keys_of(h)[: block.end]
            rows = rows.reshape(runs, stride, dim)[:, ::-1].reshape(runs, -1)
            total += probabilities(logits(rows, keys.reshape(groups, -1), block.options, 1 / stride), seen).sum(axis=0)
        edges = block_edges(block)
        score = np.add.reduceat(total, edges[:-1] // stride)
        return segments_of(edges, np.logical_or.reduceat(is_bad(block), edges[:-1]), score, score)
