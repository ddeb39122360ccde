"""Single keys by their attention mass, of those that some head of the layer before wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np

from dhsa._twin.blocks import Block, is_bad, probabilities, sees, segments_of, steady_logits
from dhsa._twin.selection import Segments, Selection, topk
from dhsa.methods.base import Method

__all__ = ["Cascade", "Spatten"]


class Cascade:
    """What the layers of a prompt have left so far: for each batch item and block of queries the keys that were on some
    list of the layer before, and the sums of their probabilities, if a layer has one list. Give one object to the
    layers of a prompt, in their order."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], np.ndarray] = {}  # ascending keys
        self.sums: dict[tuple[int, int], np.ndarray] = {}  # [end]
        self._shape: tuple[int, ...] | None = None

    def open(self, q: np.ndarray, k: np.ndarray) -> None:
        shape = len(q), q.shape[2], k.shape[2]
        if self._shape not in (None, shape):
            raise ValueError(
                f"state: of a prompt with [B, Lq, Lk] = {list(self._shape or ())}, expected {list(shape)}; each prompt "
                "needs a new one"
            )
        self._shape = shape

    def update(self, q: np.ndarray, k: np.ndarray, found: Selection, options: Mapping[str, Any]) -> None:
        batch, sets, blocks = found.shape
        self.kept = {
            (b, i): np.unique(np.concatenate([found.row(b, s, i) for s in range(sets)]))
            for b in range(batch)
            for i in range(blocks)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spatten(Method):
    """Single keys by their exact attention mass, as "oracle", but in cascade: in a model, keys that no head of a layer
    has on its list for a block of queries are no candidates of that block in any later layer. It has no options of its
    own. In NumPy: for comparing what is selected.

    Layers with sliding windows of one width have a cascade of their own, and so have the others. A layer whose block is
    exact hands all keys on. In a prompt that is read in pieces, the first layer of each piece has all keys again.

    With one list for each head (the default) a later layer chooses among the keys that several heads wanted, and its
    lists have the budget's length as long as there are so many. With heads="all" a layer can hand on no more keys than
    its budget: give later layers smaller ones, by `dhsa.LayerConfigs`. That is the setting of the source, which prunes
    little in the first layers and most in the last ones.

    Source: SpAtten, arXiv 2012.09852. It computes the attention of every key that is left and prunes afterwards, so
    that `cost` counts all of it.
    """

    name: ClassVar[str] = "spatten"
    summary: ClassVar[str] = "single keys by their attention mass, of those that a head of the layer before wanted"
    source: ClassVar[str] = "SpAtten, arXiv 2012.09852"
    cost: ClassVar[str] = "2 Q G n, n those that are left"
    in_core: ClassVar[bool] = False
    has_mass: ClassVar[bool] = False
    remembers: ClassVar[Literal["", "layers", "calls"]] = "layers"
    heads: ClassVar[str] = "head"
    paper_fields: ClassVar[Mapping[str, Any]] = {"heads": "all"}

    def new_state(self) -> Cascade:
        return Cascade()

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """The score of a candidate is its probability, summed over the block's queries and the heads of the set, in a
        softmax over the candidates that are left. If the layer has one list for all heads, the sums of the layers
        before it are added. Forced keys, and keys that are not finite, are candidates in any case; if fewer candidates
        are left than the budget has room for, the list is shorter. Source: SpAtten, arXiv 2012.09852.

        There, probabilities are summed over all queries, all heads and all layers so far, and a token that is pruned
        once is gone for all queries, its own included. Here lists belong to blocks of queries, so sums and pruned keys
        do as well, and every query stays. Lists of single heads rank by their own probabilities alone, which
        is the source's second step, its local pruning of values. Heads are not pruned, and numbers are not read in
        two steps of precision (its other two parts).
        """
        at, keys = block.start + np.arange(block.stop - block.begin), np.arange(block.end)
        bad, o = is_bad(block), block.options
        left = np.ones(block.end, bool)
        if block.state is not None and (kept := block.state.kept.get((block.batch, block.index))) is not None:
            forced = (keys < o["sink"]) | (keys >= block.end - o["local"])
            left = bad | forced
            left[kept] = True
        seen = sees((at, at), (keys, keys), o["window"]) & left
        score = np.zeros(block.end)
        for h in range(len(block.q)):
            s = steady_logits(block.queries[h], block.keys_of(h)[: block.end], o)
            score += probabilities(s, seen).sum(axis=0)
        if block.state is not None and block.sets == 1:
            score = score + block.state.sums.get((block.batch, block.index), 0.0)
            block.state.sums[block.batch, block.index] = score
        score = np.where(left, score, -np.inf)
        room = min(block.room, int(left[block.lo :].sum()))
        found = segments_of(np.arange(block.end + 1), bad, score, score)
        return topk(found, block.lo, block.end, budget=room, sink=o["sink"], local=o["local"])
