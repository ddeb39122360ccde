"""Log-likelihoods of given tokens from last hidden states, without storing whole rows of logits.

With a large vocabulary, computing logits takes as much time as half the model, most of it for memory access. Here they
are computed in blocks that stay in the cache, some rows of the sequence by a part of the vocabulary, and summed at
once.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["likelihood"]

_ROWS, _WORDS = 1024, 2048


def likelihood(model: Any, hidden: Any, target: Any, best: bool = False) -> tuple[Any, Any]:
    """Return (log-likelihood float64 [n] of each target, whether it is the most likely token, bool [n], or None).

    hidden [n, size]: the states that predict target [n]. The second result is None unless `best`. Of equal largest
    logits the lowest token counts, as in greedy decoding. Not for models that change logits by more than a final
    softcap.
    """
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    made = [
        _rows(head, softcap, hidden[i : i + _ROWS], target[i : i + _ROWS], best) for i in range(0, len(target), _ROWS)
    ]
    values, hits = zip(*made, strict=True)
    return torch.cat(values), torch.cat(hits) if best else None


def _rows(head: Any, softcap: float | None, hidden: Any, target: Any, best: bool) -> tuple[Any, Any]:
    words = head.weight.shape[0]
    at, numbers = hidden.device, torch.float32
    chosen = torch.empty(len(hidden), dtype=numbers, device=at)
    top = torch.full((len(hidden),), -torch.inf, dtype=numbers, device=at)
    where = torch.zeros(len(hidden), dtype=torch.int64, device=at)
    sums = []
    space = torch.empty(len(hidden) * min(_WORDS, words), dtype=hidden.dtype, device=at)
    for start in range(0, words, _WORDS):
        weight = head.weight[start : start + _WORDS]
        room = space[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        logits = torch.mm(hidden, weight.T, out=room).float()  # no copy for float32
        if head.bias is not None:
            logits += head.bias[start : start + _WORDS]
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        here = torch.nonzero((target >= start) & (target < start + len(weight)))[:, 0]
        chosen[here] = logits[here, target[here] - start]
        if best:
            most, index = logits.max(-1)
            better = most > top
            where = torch.where(better, index + start, where)
            top = torch.where(better, most, top)
        else:
            most = logits.amax(-1)
        sums.append(most + logits.sub_(most[:, None]).exp_().sum(-1).log())
    total = torch.stack(sums).double().logsumexp(0)
    return chosen.double() - total, where == target if best else None
