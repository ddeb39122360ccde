"""The tokens that the last queries of a prompt attend to, and no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from dhsa._twin.blocks import Block, is_bad, segments_of, steady_logits
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method
from dhsa.methods.vertical_slash import columns_and_diagonals

__all__ = ["TokenSparse"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSparse(Method):
    """Single keys by the attention of the prompt's last 64 queries, the same keys for all blocks: a layer drops the
    other tokens, and the next one has all of them again. It has no options of its own. In NumPy: for comparing what is
    selected.

    Source: Token Sparse Attention, arXiv 2602.03216, which drops tokens in some layers and restores them after each.
    """

    name: ClassVar[str] = "token_sparse"
    summary: ClassVar[str] = "the tokens that the prompt's last queries attend to, for all blocks"
    source: ClassVar[str] = "Token Sparse Attention, arXiv 2602.03216"
    cost: ClassVar[str] = "64 G keys, once for all blocks"
    in_core: ClassVar[bool] = False
    heads: ClassVar[str] = "head"
    paper_fields: ClassVar[Mapping[str, Any]] = {"budget": None, "mass": 0.99}

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """The score of a key, and its mass, is the probability that the last 64 queries give it, summed over them and
        the heads of the set. Source: Token Sparse Attention, arXiv 2602.03216.

        There, the tokens of least score whose scores add up to a small share are dropped, which is `Config.mass`, and
        a dropped token has no query either: its layer leaves it as it is. Here every query attends, to the tokens that
        are kept, its first and local ones. Which layers drop tokens is for `patch(layers=)` or `LayerConfigs` to say.
        """
        columns, _ = block.shared("columns", lambda: columns_and_diagonals(block, steady_logits))
        of_keys = columns[: block.end]
        return segments_of(np.arange(block.end + 1), is_bad(block), of_keys, of_keys)
