"""Reference boundaries: where the keys are cut into chunks, and the label the predictor is trained on.

Responsible for gap scores and picking; the representation of the chunks is in scores.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dhsa._twin.attention import softmax


def _channels(k: np.ndarray) -> np.ndarray:
    """[B, Hkv, L, D] -> [B, L, Hkv * D], head 0's channels first."""
    k = np.asarray(k).astype(np.float64)
    return k.transpose(0, 2, 1, 3).reshape(k.shape[0], k.shape[2], -1)


def similarity_scores(k, *, window: int = 4) -> np.ndarray:
    """Training-free boundary scores: minus the cosine of the mean key on either side of a gap.

    k [B, Hkv, L, D] -> float64 [B, L]. With KV heads concatenated, gap j (between keys j and j + 1) compares the mean
    of keys ``j - window + 1 .. j`` with that of ``j + 1 .. j + window``, fewer where the sequence ends. The cosine is
    ``a.b / max(|a| |b|, 1e-12)``, hence 0 if either mean is zero. Entry L - 1 is no gap and is -inf.
    """
    keys = _channels(k)
    length = keys.shape[1]
    scores = np.full(keys.shape[:2], -np.inf)
    with np.errstate(invalid="ignore", over="ignore"):
        for j in range(length - 1):
            left = keys[:, max(0, j - window + 1) : j + 1].mean(axis=1)
            right = keys[:, j + 1 : j + 1 + window].mean(axis=1)
            norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
            scores[:, j] = -(left * right).sum(axis=1) / np.maximum(norms, 1e-12)
    return scores


def _layer_norm(x, weight, bias, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * weight + bias


def predictor_logits(k, weights: Mapping[str, Any], *, heads: int, window: int = 4) -> np.ndarray:
    """The paper's boundary network (section on dynamic chunking) on the keys of one layer.

    k [B, Hkv, L, D] -> float64 [B, L]. Keys with KV heads concatenated have ``C = Hkv * D`` channels. For each gap j
    the ``2 * window`` tokens ``j - window + 1 .. j + window`` go through multi-head self-attention over themselves (as
    torch.nn.MultiheadAttention, no residual) and LayerNorm (eps 1e-5); the left and the right half are pooled to l and
    r: their mean, or with ``pool.gate.weight`` the sum weighted by a softmax of ``gate . token`` over the half; then
    ``[l, r, |l - r|, l * r, cos(l, r)]`` (cos with eps 1e-6) goes through ``Linear -> ReLU -> Linear``.
    The first ``window - 1`` and the last ``window`` gaps see less than a full window; their logit is -100.

    weights, in torch's layouts: ``enc.mha.in_proj_weight [3C, C]``, ``enc.mha.in_proj_bias``,
    ``enc.mha.out_proj.{weight,bias}``, ``enc.norm.{weight,bias}``, ``mlp.0.{weight [hidden, 4C + 1],bias}``,
    ``mlp.2.{weight [1, hidden],bias}``, optionally ``pool.gate.weight [1, C]``.
    """
    w = {name: np.asarray(value).astype(np.float64) for name, value in weights.items()}
    keys = _channels(k)
    batch, length, channels = keys.shape
    if w["enc.mha.in_proj_weight"].shape != (3 * channels, channels) or channels % heads:
        raise ValueError(
            f"weights: in_proj_weight is {w['enc.mha.in_proj_weight'].shape}, the keys have {channels} channels"
        )
    logits = np.full((batch, length), -100.0)
    for j in range(window - 1, length - window):
        x = keys[:, j - window + 1 : j + window + 1]  # [B, 2w, C]
        qkv = x @ w["enc.mha.in_proj_weight"].T + w["enc.mha.in_proj_bias"]
        qh, kh, vh = (
            part.reshape(batch, 2 * window, heads, -1).transpose(0, 2, 1, 3) for part in np.split(qkv, 3, axis=-1)
        )
        p = softmax(qh @ kh.transpose(0, 1, 3, 2) / np.sqrt(channels // heads), axis=-1)
        x = (p @ vh).transpose(0, 2, 1, 3).reshape(batch, 2 * window, channels)
        x = x @ w["enc.mha.out_proj.weight"].T + w["enc.mha.out_proj.bias"]
        x = _layer_norm(x, w["enc.norm.weight"], w["enc.norm.bias"])
        halves = []
        for half in (x[:, :window], x[:, window:]):
            if "pool.gate.weight" in w:
                gate = softmax(half @ w["pool.gate.weight"].reshape(-1), axis=1)
                halves.append((gate[:, :, None] * half).sum(axis=1))
            else:
                halves.append(half.mean(axis=1))
        l, r = halves
        norms = np.maximum(np.linalg.norm(l, axis=1), 1e-6) * np.maximum(np.linalg.norm(r, axis=1), 1e-6)
        cos = ((l * r).sum(axis=1) / norms)[:, None]
        features = np.concatenate([l, r, np.abs(l - r), l * r, cos], axis=1)
        hidden = np.maximum(features @ w["mlp.0.weight"].T + w["mlp.0.bias"], 0.0)
        logits[:, j] = hidden @ w["mlp.2.weight"].reshape(-1) + w["mlp.2.bias"].reshape(())
    return logits


def compact_logits(k, weights: Mapping[str, Any], *, window: int = 4) -> np.ndarray:
    """The compact boundary network, this project's, on the keys of one layer: k [B, Hkv, L, D] -> float64 [B, L].

    Keys with KV heads concatenated have ``C = Hkv * D`` channels. Each token on its own: ``z = project(k)``, of R
    numbers, and ``t = token([z, max(z, 0)])``, of M. Each run of ``window`` tokens: ``u``, the maximum of the first
    ``M // 2`` numbers of t and the mean of the others. Gap j compares l, the u of tokens ``j - window + 1 .. j``, with
    r, that of ``j + 1 .. j + window``: ``[|l - r|, l, r]`` goes through ``Linear -> ReLU -> Linear``.
    The first ``window - 1`` and the last ``window`` gaps see less than a full window; their logit is -100. A token
    whose t is not finite makes the gaps that see it NaN.

    weights, in torch's layouts: ``project.weight [R, C]``, ``token.weight [M, 2R]``, ``head.0.weight [N, 3M]``,
    ``head.2.weight [1, N]`` and the bias of each.
    """
    w = {name: np.asarray(value).astype(np.float64) for name, value in weights.items()}
    keys = _channels(k)
    if w["project.weight"].shape[1] != keys.shape[2]:
        raise ValueError(
            f"weights: project.weight is {w['project.weight'].shape}, the keys have {keys.shape[2]} channels"
        )
    with np.errstate(invalid="ignore"):
        z = keys @ w["project.weight"].T + w["project.bias"]
        t = np.concatenate([z, np.maximum(z, 0)], axis=-1) @ w["token.weight"].T + w["token.bias"]
    t[~np.isfinite(t).all(axis=-1)] = np.nan
    half, length = t.shape[2] // 2, t.shape[1]

    def pooled(tokens):
        return np.concatenate([tokens[:, :, :half].max(axis=1), tokens[:, :, half:].mean(axis=1)], axis=-1)

    logits = np.full(t.shape[:2], -100.0)
    for j in range(window - 1, length - window):
        l, r = pooled(t[:, j - window + 1 : j + 1]), pooled(t[:, j + 1 : j + window + 1])
        features = np.concatenate([np.abs(l - r), l, r], axis=-1)
        hidden = np.maximum(features @ w["head.0.weight"].T + w["head.0.bias"], 0)
        logits[:, j] = hidden @ w["head.2.weight"][0] + w["head.2.bias"][0]
    return logits


def pick_boundaries(
    scores, n: int, *, theta: float = -np.inf, nms: int = 0, instruction: int | None = None
) -> np.ndarray:
    """Greedy picking with non-maximum suppression: scores [L] -> int32 boundaries ``0 < ... < L``.

    Gaps with ``score > theta``, best first (equal scores: lower index first); one is accepted if it lies more than
    ``nms`` away from all accepted so far, until n are in; an accepted gap j makes ``j + 1`` a boundary. NaN scores and
    entry L - 1 (no gap: nothing follows) are never accepted. With an ``instruction`` of t tokens at the end, gap L - t
    is accepted first, whatever its score, counts among the n, and gaps after it are skipped.
    """
    scores = np.asarray(scores).astype(np.float64)
    if scores.ndim != 1 or not scores.size:
        raise ValueError(f"scores: expected a non-empty vector, got shape {scores.shape}")
    length = scores.shape[0]
    accepted: list[int] = []
    last = length - 1  # gaps from here on are skipped
    if instruction is not None:
        if not 1 <= instruction <= length:
            raise ValueError(f"instruction: expected 1 .. {length}, got {instruction}")
        last = length - instruction
        if last < length - 1:
            accepted.append(last)
    with np.errstate(invalid="ignore"):
        eligible = [j for j in range(min(last, length - 1)) if scores[j] > theta]
    for j in sorted(eligible, key=lambda j: (-scores[j], j)):
        if len(accepted) >= n:
            break
        if all(abs(j - a) > nms for a in accepted):
            accepted.append(j)
    return np.array([0, *(j + 1 for j in sorted(accepted)), length], np.int32)


def boundaries(
    k,
    *,
    kind: str = "similarity",
    chunk_size: int = 8,
    num_chunks: int | None = None,
    boundary_window: int = 4,
    theta: float | None = None,
    nms: int | None = None,
    query_block: int = 128,
    predictor: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Cuts the keys of each batch row into chunks: k [B, Hkv, L, D] -> int32 [B, C + 1], rows padded with L.

    kind "fixed": chunks of ``chunk_size``, the last one shorter. "similarity": ``similarity_scores`` picked with
    n = L // 8, nms 4, any theta. "predictor": ``predictor(k)`` gives logits [B, L] (bind ``predictor_logits`` to its
    weights), picked with n = (L // query_block) * 8, nms 8, theta 1.1; the first ``boundary_window - 1`` and the
    last ``boundary_window`` gaps never win. ``num_chunks`` (n), ``theta`` and ``nms`` override these.
    Picking n gaps makes n + 1 chunks.
    """
    length = np.shape(k)[2]
    if kind == "fixed":
        row = np.append(np.arange(0, length, chunk_size), length).astype(np.int32)
        return np.tile(row, (np.shape(k)[0], 1))
    if kind == "similarity":
        scores = similarity_scores(k, window=boundary_window)
        default_n, default_theta, default_nms = length // 8, -np.inf, 4
    elif kind == "predictor":
        if predictor is None:
            raise ValueError("predictor: needed for kind='predictor'")
        scores = np.array(predictor(np.asarray(k)), np.float64)
        scores[:, : boundary_window - 1] = -np.inf
        scores[:, max(0, length - boundary_window) :] = -np.inf
        default_n, default_theta, default_nms = length // query_block * 8, 1.1, 8
    else:
        raise ValueError(f"kind: expected 'similarity', 'fixed' or 'predictor', got {kind!r}")
    n = default_n if num_chunks is None else num_chunks
    theta = default_theta if theta is None else theta
    nms = default_nms if nms is None else nms
    rows = [pick_boundaries(row, n, theta=theta, nms=nms) for row in scores]
    out = np.full((len(rows), max(len(r) for r in rows)), length, np.int32)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def boundary_ratios(attn, *, window: int, sliding_window: int | None = None) -> np.ndarray:
    """The predictor's training label: how differently later queries attend to the two sides of a gap (the paper, v2).

    attn [L, L], the head-mean of a dense attention matrix -> float64 [L]. For gap j, the rows ``j + window .. L - 1``
    (in a sliding layer the first ``sliding_window`` of them) are summed over columns ``j - window + 1 .. j`` (past)
    and ``j + 1 .. j + window`` (future); the ratio is ``(max + 1e-6) / (min + 1e-6)``, given for
    ``2 * window - 1 <= j < L - 2 * window`` and 0 elsewhere.
    """
    a = np.asarray(attn).astype(np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"attn: expected a square matrix [L, L], got shape {a.shape}")
    length = a.shape[0]
    ratios = np.zeros(length)
    for j in range(2 * window - 1, length - 2 * window):
        stop = length if sliding_window is None else min(length, j + window + sliding_window)
        rows = a[j + window : stop]
        past = rows[:, j - window + 1 : j + 1].sum()
        future = rows[:, j + 1 : j + window + 1].sum()
        ratios[j] = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
    return ratios


def attention_ratios(
    q,
    k,
    *,
    window: int = 4,
    sliding_window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> np.ndarray:
    """``boundary_ratios`` of the head-mean of causal attention: q [B, H, L, D], k [B, Hkv, L, D] -> float64 [B, L].

    By its definition, through the [L, L] matrix.
    """
    q, k = np.asarray(q).astype(np.float64), np.asarray(k).astype(np.float64)
    _, heads, length, dim = q.shape
    factor = dim**-0.5 if scale is None else scale
    logits = factor * (q @ np.repeat(k, heads // k.shape[1], axis=1).transpose(0, 1, 3, 2))
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    distance = np.arange(length)[:, None] - np.arange(length)
    hidden = (distance < 0) | (distance >= (length if sliding_window is None else sliding_window))
    attn = softmax(np.where(hidden, -np.inf, logits), axis=-1).mean(axis=1)
    return np.stack([boundary_ratios(a, window=window, sliding_window=sliding_window) for a in attn])
