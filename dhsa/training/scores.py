"""How well the scores of gaps agree with the labels. NumPy only."""

from __future__ import annotations

import numpy as np

import dhsa
from dhsa import _core
from dhsa._threads import get_num_threads
from dhsa._typing import Array

__all__ = ["POSITIVE", "average_precision", "recall", "score", "similarity"]

POSITIVE = 2.0  # a gap with a larger ratio is a boundary; the soft label is 1/2 here


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the mean precision at each positive, in descending order of scores. Equal scores count as one step.

    Args:
        scores: [n].
        positive: bool [n].

    Returns:
        A float; NaN without positives.
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(positive[order])
    last = np.append(ordered[1:] != ordered[:-1], True)  # the end of each run of equal scores
    hits, seen = hits[last], np.flatnonzero(last) + 1
    if not hits[-1]:
        return float("nan")
    return float((np.diff(hits, prepend=0) * hits / seen).sum() / hits[-1])


def _picked(scores: np.ndarray, config: dhsa.Config) -> set[int]:
    length = len(scores)
    cuts = dhsa.pick_boundaries(scores, config._core.num_gaps(length), theta=-np.inf, nms=config._core.nms)
    return set(np.asarray(cuts)[1:-1].tolist())


def recall(scores: np.ndarray, ratios: np.ndarray) -> float:
    """Return the share of the boundaries that the labels would give which the scores give too.

    Both are picked as `Config()` picks boundaries for that number of keys.

    Args:
        scores: [L].
        ratios: [L], 0 where a gap has no label.
    """
    config = dhsa.Config()
    valid = ratios > 0
    wanted = _picked(np.where(valid, ratios, -np.inf), config)
    found = _picked(np.where(valid, scores, -np.inf), config)
    return len(wanted & found) / len(wanted) if wanted else float("nan")


def similarity(keys: Array, window: int) -> np.ndarray:
    """Return the scores of boundaries="similarity", [L].

    Args:
        keys: [1, Hkv, L, D].
        window: the number of keys on each side of a gap.
    """
    scores = np.empty((1, keys.shape[2]), np.float32)
    _core.similarity_scores(keys, window, scores, get_num_threads())
    return scores[0]


def score(scores: np.ndarray, ratios: np.ndarray) -> dict[str, float]:
    """Return {"average_precision", "recall"} of the gaps of one layer.

    Args:
        scores: [L].
        ratios: [L], 0 where a gap has no label.
    """
    valid = ratios > 0
    return {
        "average_precision": average_precision(scores[valid], ratios[valid] > POSITIVE),
        "recall": recall(scores, ratios),
    }
