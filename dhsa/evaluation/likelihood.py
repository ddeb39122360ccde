"""Log-likelihoods of given tokens from last hidden states, and how far one distribution is from another, without
storing whole rows of logits.

With a large vocabulary, computing logits takes as much time as half the model, most of it for memory access. Here they
are computed in blocks that stay in the cache, some rows of the sequence by a part of the vocabulary, and summed at
once. Nothing here is for models that change logits by more than a final softcap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["divergence", "likelihood"]

_ROWS, _WORDS = 1024, 2048


def likelihood(model: Any, hidden: Any, target: Any, best: bool = False) -> tuple[Any, Any]:
    """Return (log-likelihood float64 [n] of each target, whether it is the most likely token, bool [n], or None).

    hidden [n, size]: the states that predict target [n]. The second result is None unless `best`. Of equal largest
    logits the lowest token counts, as in greedy decoding.
    """
    values, hits = [], []
    for i in range(0, len(target), _ROWS):
        wanted = target[i : i + _ROWS]
        seen, chosen = _Seen(wanted, best), torch.empty_like(wanted, dtype=torch.float32)
        for start, (logits,) in _blocks(model, hidden[i : i + _ROWS]):
            _pick(chosen, logits, wanted, start)
            seen.add(logits, start)
        values.append(chosen.double() - seen.total())
        hits.append(seen.where == wanted)
    return torch.cat(values), torch.cat(hits) if best else None


def divergence(model: Any, states: Sequence[Any], reference: Any, target: Any) -> list[tuple[Any, Any, Any]]:
    """Return, for each of `states`, (log-likelihood float64 [n] of each target, KL float64 [n], whether its likeliest
    token is that of `reference`, bool [n]).

    states, reference: [n, size] each, the states that predict target [n]. With p from `reference` and q from one of
    `states`, KL is the sum over the whole vocabulary of p (log p - log q), in nats. Of equal largest logits the lowest
    token counts.
    """
    made: list[list[tuple[Any, Any, Any]]] = [[] for _ in states]
    for i in range(0, len(target), _ROWS):
        wanted = target[i : i + _ROWS]
        p, others = _Seen(wanted), [_Other(wanted) for _ in states]
        for start, (theirs, *own) in _blocks(model, *(s[i : i + _ROWS] for s in (reference, *states))):
            gaps = [theirs - logits for logits in own]
            weights, sums = p.add(theirs, start)
            for other, logits, gap in zip(others, own, gaps, strict=True):
                _pick(other.chosen, logits, wanted, start)
                other.seen.add(logits, start)
                other.gaps.append(gap.mul_(weights).sum(-1).double() / sums)
        shares, total = torch.stack(p.sums).softmax(0), p.total()
        for other, parts in zip(others, made, strict=True):
            gap, own_total = (shares * torch.stack(other.gaps)).sum(0), other.seen.total()
            parts.append((other.chosen.double() - own_total, gap - total + own_total, p.where == other.seen.where))
    joined = []
    for parts in made:
        values, kl, same = zip(*parts, strict=True)
        joined.append((torch.cat(values), torch.cat(kl), torch.cat(same)))
    return joined


class _Other:
    """What `divergence` collects of one of its states."""

    def __init__(self, target: Any) -> None:
        self.seen, self.chosen = _Seen(target), torch.empty_like(target, dtype=torch.float32)
        self.gaps: list[Any] = []  # of each block of the vocabulary: the mean difference of the logits, weighted by p


class _Seen:
    """What has been seen of one distribution, block by block of the vocabulary: the logarithm of each block's sum of
    exp(logits), and with `best` the likeliest token.
    """

    def __init__(self, target: Any, best: bool = True) -> None:
        self.sums: list[Any] = []  # float64 [rows] of each block
        self.where = torch.zeros_like(target)
        self._top = torch.full_like(target, -torch.inf, dtype=torch.float32) if best else None

    def add(self, logits: Any, start: int) -> tuple[Any, Any]:
        """Return (exp(logits - the largest of them), their sums, float64 [rows]). `logits` is overwritten."""
        if self._top is None:
            most = logits.amax(-1)
        else:
            most, index = logits.max(-1)
            better = most > self._top
            self.where = torch.where(better, index + start, self.where)
            self._top = torch.where(better, most, self._top)
        weights = logits.sub_(most[:, None]).exp_()
        sums = weights.sum(-1).double()
        self.sums.append(most.double() + sums.log())
        return weights, sums

    def total(self) -> Any:
        """The logarithm of the sum over the whole vocabulary, float64 [rows]."""
        return torch.stack(self.sums).logsumexp(0)


def _blocks(model: Any, *states: Any) -> Iterator[tuple[int, list[Any]]]:
    """Yield (first token, float32 [rows, tokens] logits of each of `states`) over parts of the vocabulary.

    The product is computed in the dtype of `states`. What was yielded is overwritten by the next block.
    """
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    words = head.weight.shape[0]
    spaces = [torch.empty(len(s) * min(_WORDS, words), dtype=s.dtype, device=s.device) for s in states]
    for start in range(0, words, _WORDS):
        weight = head.weight[start : start + _WORDS].to(states[0].dtype)
        made = []
        for state, space in zip(states, spaces, strict=True):
            room = space[: len(state) * len(weight)].view(len(state), len(weight))
            logits = torch.mm(state, weight.T, out=room).float()  # no copy for float32
            if head.bias is not None:
                logits += head.bias[start : start + _WORDS]
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            made.append(logits)
        yield start, made


def _pick(chosen: Any, logits: Any, target: Any, start: int) -> None:
    """Write the logits of the targets that are in this block into `chosen`."""
    here = torch.nonzero((target >= start) & (target < start + logits.shape[1]))[:, 0]
    chosen[here] = logits[here, target[here] - start]
