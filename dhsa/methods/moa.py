"""The first and the most recent keys, as many as each head needs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from dhsa._twin.blocks import Block
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method, of_list

__all__ = ["Moa"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moa(Method):
    """The first and the most recent keys, as `window`, but each head has a window of its own. `dhsa.hf.find_head_sizes`
    finds them for a model. In NumPy: for comparing what is selected.

    Args:
        head_windows: the length of each list of a layer in keys, first ones included; or one length for all; at most
            the budget. None given: the budget. Forced keys are taken in any case.

    Raises:
        TypeError, ValueError: naming the option.

    Source: MoA, arXiv 2406.14909. There, windows grow with the prompt by a line of their own for each head, found by
    gradients; here they have a length, found by the attention mass that they hold.
    """

    name: ClassVar[str] = "moa"
    summary: ClassVar[str] = "the first and the most recent keys, as many as each head needs"
    source: ClassVar[str] = "MoA, arXiv 2406.14909"
    cost: ClassVar[str] = "none"
    in_core: ClassVar[bool] = False
    has_mass: ClassVar[bool] = False
    reads_keys: ClassVar[bool] = False
    heads: ClassVar[str] = "head"

    head_windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._keep_ints("head_windows", 1)

    def core(self, *, query_block: int, budget: int | None) -> dict[str, Any]:
        if budget is not None and max(self.head_windows, default=0) > budget:
            raise ValueError(f"head_windows: {max(self.head_windows)} keys are more than the budget of {budget}")
        return {}

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """The first ``sink`` candidates, the local ones, and of the others the most recent, ``head_windows`` in all.
        Source: MoA, arXiv 2406.14909."""
        o = block.options
        size = min(of_list(o["head_windows"], "head_windows", block) or block.room, block.room)
        keys = np.arange(block.lo, block.end)
        forced = (keys < o["sink"]) | (keys >= block.end - o["local"])
        rest = keys[~forced]
        return np.sort(np.append(keys[forced], rest[len(rest) - max(0, size - int(forced.sum())) :]))
