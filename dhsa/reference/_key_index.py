"""Reference of what is stored about a sequence's keys from call to call: where they were cut (csrc/chunk/key_index.c).

It defines which cuts stay, which go and which are added. Gap scores and picking are in dhsa/_twin/boundaries.py.
"""

from __future__ import annotations

import numpy as np

from dhsa._twin.boundaries import pick_boundaries

GROUP = 4  # chunks; what a decoding step adds begins a group of its own


class KeyIndex:
    """The cuts of one sequence's keys in one layer, which grow with it.

    A call has all keys so far. Unchanged keys keep their cuts; from the first changed key on, all cuts are removed. In
    a prefill, the keys that are not cut yet are cut. The gap before the first of them is a boundary already, and they
    get their share of the number of gaps to be picked for all keys. In a decoding step (arXiv 2510.24606) the current
    key is a chunk of its own, and the keys that earlier decoding steps added, or that replaced such keys, form one
    chunk. Keys that were added by calls which this object did not see are cut as those of a prompt.
    """

    def __init__(self) -> None:
        self.keys = np.zeros((0, 0, 0))
        self.edges = [0]

    def update(
        self, k: np.ndarray, scores: np.ndarray, *, n: int, theta: float, nms: int, step: bool = False
    ) -> list[int]:
        """k [Hkv, L, D]; scores: of gap j between keys j and j + 1, in a step among all keys but the last; n: the most
        gaps to pick for all L keys.

        Returns the boundaries, in a step with the empty chunks that fill up the prompt's last group of 4.
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
