"""Single keys that a hash puts near the queries."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from dhsa._twin.blocks import Block, fixed, is_bad
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method

__all__ = ["Hyper"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyper(Method):
    """Single keys by how many queries of the block have them near in the order of a locality-sensitive hash. In NumPy:
    for comparing what is selected.

    Args:
        bits: of the hash, 1 to 16: on which side of as many random planes a vector lies.
        reach: keys that are near a query, in the order of the hash, at least 1.
        seed: of the planes, 0 to 2**31 - 1.

    Raises:
        TypeError, ValueError: naming the option.

    Source: HyperAttention, arXiv 2310.05869.
    """

    name: ClassVar[str] = "hyper"
    summary: ClassVar[str] = "single keys that a locality-sensitive hash puts near the queries"
    source: ClassVar[str] = "HyperAttention, arXiv 2310.05869"
    cost: ClassVar[str] = "`bits` Q G, and `bits` keys once for all blocks"
    in_core: ClassVar[bool] = False
    has_mass: ClassVar[bool] = False
    heads: ClassVar[str] = "head"

    bits: int = 8
    reach: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        self._keep_int("bits", 1, 16)
        self._keep_int("reach", 1)
        self._keep_int("seed", 0)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Hashes are ordered by the Gray code, in which neighbours differ in one bit. The candidates are sorted by it,
        later keys of one hash after earlier ones, and a query stands in the middle of the keys of its own hash. The
        ``reach`` keys around it are near it. The score of a key is the number of rows, over the block's queries and the
        heads of the set, that it is near to. Source: HyperAttention, arXiv 2310.05869.

        There, queries are sorted as well, and blocks of sorted queries attend to the keys at the same place; since
        queries of one list are neighbours in the text here, each looks its place up. A causal mask is halved again and
        again there; here the candidates end with the block. The other part of the source, keys that are sampled at
        random and whose weights are scaled up to stand for all others, is left out: attention over a list has no
        weights beside those of the softmax. The planes come from a fixed generator of random numbers.
        """
        o, dim = block.options, block.k.shape[2]
        score = np.zeros(block.end)
        bad = is_bad(block)
        planes = block.shared(
            "planes", lambda: fixed(np.random.RandomState(o["seed"]).standard_normal((o["bits"], dim)))
        )
        for h in range(len(block.q)):
            kv = h * len(block.k) // len(block.q)
            places = block.shared(("hash", kv), functools.partial(_places, block.k[kv], planes))[block.lo : block.end]
            order = np.argsort(places, kind="stable")
            queries = block.queries[h]
            own = _places(queries[np.isfinite(queries).all(axis=1)], planes)
            middle = (np.searchsorted(places[order], own, "left") + np.searchsorted(places[order], own, "right")) // 2
            begin = np.clip(middle - o["reach"] // 2, 0, max(0, len(order) - o["reach"]))
            counts = np.zeros(len(order) + 1)
            np.add.at(counts, begin, 1)
            np.add.at(counts, np.minimum(begin + o["reach"], len(order)), -1)
            score[block.lo + order] += np.cumsum(counts)[:-1]
        return Segments(np.arange(block.end + 1), np.where(bad, np.inf, score))


def _places(x: np.ndarray, planes) -> np.ndarray:
    """The places of the hashes of vectors x [n, D] in the order of the Gray code; of those that are not finite, 0."""
    vectors = fixed(x)
    code = ((vectors.whole @ planes.whole.T) > 0) @ (1 << np.arange(len(planes.whole)))
    shift = 1
    while shift < len(planes.whole):  # from Gray code to number
        code ^= code >> shift
        shift *= 2
    return code
