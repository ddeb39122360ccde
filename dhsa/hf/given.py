"""Scores of keys from outside the model: those given to `key_scores` take the place of what methods compute."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from dhsa._arrays import to_numpy
from dhsa._typing import ArrayLike

__all__ = ["are_given", "key_scores", "scores_of"]

_given: contextvars.ContextVar[np.ndarray | None] = contextvars.ContextVar("dhsa_key_scores", default=None)


@contextmanager
def key_scores(scores: ArrayLike) -> Iterator[None]:
    """Within the block, the layers of any model with this package's attention select the keys of prompts by `scores`,
    in place of what the method of their Config computes. All else stays: the budget, forced keys, exact blocks and
    layers. Decoding steps, which attend to one new token each, are not affected. The block is that of one thread (or
    task of asyncio): in a thread that is started within it, run the model by ``contextvars.copy_context().run``.

    Scores say how important each token of the prompt is. They may come from a smaller draft model with the same
    tokenizer, whose attention tells what the answer will need.

    Args:
        scores: real numbers [B, n, L] for a prompt of L tokens, finite. B may be 1: for all rows of a batch. n is 1
            (for all heads), or the number of KV heads or of query heads of each layer. Positions are those of the keys
            of a call, padding included.

    Raises:
        TypeError: `scores` is no array of real numbers.
        ValueError: it has other dimensions, or a number that is not finite; within the block, where a call has more
            keys than scores, or another batch.
        NotImplementedError: within the block, where the cache of a layer with a sliding window holds only the last
            keys of the prompt.

    Source: SpecKV and SpecPC, arXiv 2506.08373, which drop keys of the cache and tokens of the prompt by the attention
    of a draft model. Here nothing is dropped: a key that one layer or block leaves out is there for the others.
    """
    array = to_numpy(scores, "key_scores")
    if array.dtype.kind not in "fiu":
        raise TypeError(f"key_scores: expected real numbers, got {array.dtype}")
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"key_scores: expected 3 dimensions [B, n, L], got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("key_scores: expected finite numbers, got a NaN or infinity")
    token = _given.set(np.array(array, np.float64))
    try:
        yield
    finally:
        _given.reset(token)


def are_given() -> bool:
    """Whether a block of `key_scores` is open."""
    return _given.get() is not None


def scores_of(batch: int, q_len: int, k_len: int, window: int | None) -> np.ndarray | None:
    """The scores that were given for a call, [B, n, L]; None if none were, or in a decoding step."""
    scores = _given.get()
    if scores is None or q_len == 1:
        return None
    if scores.shape[0] not in (1, batch):
        raise ValueError(f"key_scores: got a batch of {scores.shape[0]}, expected 1 or {batch}, that of the call")
    if window is not None and q_len < k_len < scores.shape[2]:
        raise NotImplementedError(
            "key_scores: the cache of a layer with a sliding window holds only the last keys; give the prompt in one "
            "call"
        )
    return np.broadcast_to(scores, (batch, *scores.shape[1:]))
