"""Reference of what is kept of a sequence's keys from call to call: where they were cut (csrc/chunk/past.c).

Responsible for which cuts stay, which go and which are added; gap scores and picking are in dhsa/_twin/boundaries.py.
"""

from __future__ import annotations

import numpy as np

from dhsa._twin.boundaries import pick_boundaries

GROUP = 16  # chunks; what a decoding step adds begins a group of its own


class Past:
    """The cuts of one sequence's keys in one layer, which grow with it.

    A call brings all keys so far. Those that are as they were keep their cuts; from the first that differs on,
    everything is forgotten. In a prefill the keys that are not cut yet are cut, the gap before the first of them being
    a boundary already; of the gaps that are to be picked for all keys they get their share. In a decoding step (arXiv
    2510.24606) the current key is a chunk of its own, and what came by such steps before it, or took the place of such,
    is one; but keys that came in calls which this object did not see are cut as a prompt's.
    """

    def __init__(self) -> None:
        self.keys = np.zeros((0, 0, 0))
        self.edges = [0]

    def follow(
        self, k: np.ndarray, scores: np.ndarray, *, n: int, theta: float, nms: int, step: bool = False
    ) -> list[int]:
        """k [Hkv, L, D]; scores: of gap j between keys j and j + 1, in a step among all keys but the last; n: the most
        gaps to pick for all L keys.

        Returns the boundaries, in a step with the empty chunks that fill up the prompt's last group of 16.
        """
        length, before, cuts = k.shape[1], self.keys.shape[1], len(self.edges)
        end = length - step
        again = 0
        while again < min(before, end) and np.array_equal(self.keys[:, again], k[:, again], equal_nan=True):
            again += 1
        self.edges = [edge for edge in self.edges if edge <= again]
        generated = step and cuts > 1 and len(self.edges) == cuts and end <= before
        start = self.edges[-1]
        if not generated and start < end:
            region = scores[start:end].astype(np.float64)
            if start > 0:
                region[:nms] = -np.inf
            share = -(-min(n, end) * (end - start) // end)
            self.edges += [int(x) + start for x in pick_boundaries(region, share, theta=theta, nms=nms)[1:]]
        self.keys = np.array(k)
        if not step:
            return list(self.edges)
        padding = -(len(self.edges) - 1) % GROUP
        return self.edges + [self.edges[-1]] * padding + [end, length]
