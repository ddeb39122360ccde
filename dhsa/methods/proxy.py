"""Scores of a proxy head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from dhsa._twin.blocks import Block, block_edges, coarse, is_bad, logits, probabilities, sees, segments_of
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method, check_stride

__all__ = ["Proxy"]

PROXY_RUN = 16  # queries of a mean row, in the estimate of a head's mass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proxy(Method):
    """Fixed blocks of keys in the order of their scores for the mean of the heads, the proxy. Each head determines how
    many of them it needs. By default each head has lists of its own, as in the source.

    Args:
        key_block: keys of a block, at least 1.
        stride: every stride-th query and key takes part: a divisor of key_block, at most 1024.

    Raises:
        TypeError, ValueError: naming the option.

    Source: ProxyAttn, arXiv 2509.24745.
    """

    name: ClassVar[str] = "proxy"
    summary: ClassVar[str] = "fixed blocks in the order of a proxy head"
    source: ClassVar[str] = "ProxyAttn, arXiv 2509.24745"
    cost: ClassVar[str] = "Q n / `stride`^2, and Q G n / (16 `key_block`)"
    heads: ClassVar[str] = "head"
    paper_fields: ClassVar[Mapping[str, Any]] = {"budget": None, "mass": 0.95, "heads": "head", "stride": 4}

    key_block: int = 128
    stride: int = 4

    def __post_init__(self) -> None:
        self._keep_int("key_block", 1)
        self._keep_int("stride", 1)
        check_stride(self.stride, self.key_block)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Blocks of keys by the scores of a proxy head. Source: ProxyAttn, arXiv 2509.24745.

        The proxy of a list is the mean of its heads' queries and of their keys. If each head has a list of its own, the
        proxy is the mean of the whole KV group: heads differ more in how many keys they need than in which. Every
        ``stride``-th query of the block, from its first on, and every ``stride``-th key, from key 0 on, are used. There
        is a softmax over the visible ones, and the largest probability of such a pair is the score of a block of keys.

        The mass is estimated for each head, which is our reading of the source: the mass of a block of keys is what the
        head's own mean rows of 16 queries give to its mean key (``coarse``). So a list takes blocks in the proxy's
        order until they hold the requested share of this mass.
        """
        stride = block.options["stride"]
        rows = block.group_q[:, block.begin : block.stop : stride].mean(axis=0)
        keys = block.k[:, : block.end : stride].mean(axis=0)
        at = np.arange(block.start, block.start + block.stop - block.begin, stride)
        key_at = np.arange(0, block.end, stride)
        p = probabilities(logits(rows, keys, block.options), sees((at, at), (key_at, key_at), block.options["window"]))
        edges = block_edges(block)
        bad = np.logical_or.reduceat(is_bad(block), edges[:-1])
        return segments_of(
            edges, bad, np.maximum.reduceat(p.max(axis=0), edges[:-1] // stride), coarse(block, PROXY_RUN)
        )
