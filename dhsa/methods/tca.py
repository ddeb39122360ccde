"""Single keys by the mean query, as many as each head needs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from dhsa._twin.blocks import Block, fixed, fixed_keys, fixed_logits, is_bad, probabilities, segments_of, shorter
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method, of_list

__all__ = ["Tca"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tca(Method):
    """Single keys by the softmax of the block's mean query, as many as each head needs. `dhsa.hf.find_head_sizes` finds
    these numbers for a model. In NumPy: for comparing what is selected.

    Args:
        head_budgets: the length of each list of a layer in keys, forced ones included; or one length for all; at most
            the budget. None given: the budget.

    Raises:
        TypeError, ValueError: naming the option.

    Source: TCA-Attention, arXiv 2512.09238: budgets of heads from one calibration. There, tokens are kept by a measure
    of redundancy inside of blocks of keys, whose definition was not at hand; the softmax of the mean query replaces it.
    """

    name: ClassVar[str] = "tca"
    summary: ClassVar[str] = "single keys by the mean query, as many as each head needs"
    source: ClassVar[str] = "TCA-Attention, arXiv 2512.09238"
    cost: ClassVar[str] = "G n"
    in_core: ClassVar[bool] = False
    has_mass: ClassVar[bool] = False
    heads: ClassVar[str] = "head"

    head_budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._keep_ints("head_budgets", 1)

    def core(self, *, query_block: int, budget: int | None) -> dict[str, Any]:
        if budget is not None and max(self.head_budgets, default=0) > budget:
            raise ValueError(f"head_budgets: {max(self.head_budgets)} keys are more than the budget of {budget}")
        return {}

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Per head a softmax of the mean query over the candidates, summed over the heads of the set; the best keys are
        taken, ``head_budgets`` in all with the forced ones. Source: TCA-Attention, arXiv 2512.09238."""
        total = np.zeros(block.end)
        bad = is_bad(block)
        seen = ~bad & (np.arange(block.end) >= block.lo)
        for h in range(len(block.q)):
            mean = fixed(block.queries[h].mean(axis=0, keepdims=True))
            logits = fixed_logits(mean, fixed_keys(block, h), block.options)
            total += probabilities(np.where(seen, logits, 0.0), seen)[0]
        segments = segments_of(np.arange(block.end + 1), bad, total, total)
        size = of_list(block.options["head_budgets"], "head_budgets", block)
        return segments if size is None else shorter(block, segments, size)
