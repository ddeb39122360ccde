"""The boundary networks in torch, for training, and the loss.

The same networks in C, compact.c and predictor.c, run them afterwards. Parameters have the same names, and only a state
dict passes from one to the other.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dhsa.training.gates import GateNetwork
from dhsa.training.settings import Settings

__all__ = ["AttentionNetwork", "CompactNetwork", "build", "focal_loss", "soft_labels"]


# Whatever the process's default device and dtype are: the C core reads these weights.
_HERE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def _scores(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden, **_HERE), nn.ReLU(), nn.Linear(hidden, 1, **_HERE))


class CompactNetwork(nn.Module):
    """This project's network: a narrow projection of every key, pooled on either side of a gap.

    `scale`: keys are divided by it. The state dict that `folded` returns includes this division in the projection.
    """

    def __init__(self, channels: int, *, width: int, pooled: int, hidden: int, window: int, scale: float = 1.0) -> None:
        super().__init__()
        self.window, self.scale = window, scale
        self.project = nn.Linear(channels, width, **_HERE)
        self.token = nn.Linear(2 * width, pooled, **_HERE)
        self.head = _scores(3 * pooled, hidden)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the logits [T - 2w + 1] of the gaps that have w keys on either side.

        Args:
            keys: [T, C].
        """
        z = self.project(keys / self.scale)
        t = self.token(torch.cat([z, F.relu(z)], dim=1))
        runs = t.unfold(0, self.window, 1)
        half = t.shape[1] // 2
        u = torch.cat([runs[:, :half].amax(-1), runs[:, half:].mean(-1)], dim=1)
        left, right = u[: -self.window], u[self.window :]
        return self.head(torch.cat([(left - right).abs(), left, right], dim=1))[:, 0]

    def folded(self) -> dict[str, torch.Tensor]:
        """Return the state dict of a network for keys as they are, with the division by the key scale folded in."""
        state = {name: value.detach().clone() for name, value in self.state_dict().items()}
        state["project.weight"] /= self.scale
        return state


class AttentionNetwork(nn.Module):
    """The paper's network (BoundarySimilarityAttn), with the authors' parameter names."""

    def __init__(self, channels: int, *, heads: int, hidden: int, window: int, gated: bool = False) -> None:
        super().__init__()
        self.window = window
        self.enc = nn.Module()
        self.enc.mha = nn.MultiheadAttention(channels, heads, batch_first=True, **_HERE)
        self.enc.norm = nn.LayerNorm(channels, **_HERE)
        if gated:
            self.pool = nn.Module()
            self.pool.gate = nn.Linear(channels, 1, bias=False, **_HERE)
        self.mlp = _scores(4 * channels + 1, hidden)

    def _pooled(self, half: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "pool"):
            return half.mean(dim=1)
        return (self.pool.gate(half).softmax(dim=1) * half).sum(dim=1)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the logits [T - 2w + 1] of the gaps that have w keys on either side.

        Args:
            keys: [T, C].
        """
        windows = keys.unfold(0, 2 * self.window, 1).transpose(1, 2)
        x = self.enc.norm(self.enc.mha(windows, windows, windows, need_weights=False)[0])
        left, right = self._pooled(x[:, : self.window]), self._pooled(x[:, self.window :])
        norms = left.norm(dim=1).clamp_min(1e-6) * right.norm(dim=1).clamp_min(1e-6)
        cosine = ((left * right).sum(dim=1) / norms)[:, None]
        return self.mlp(torch.cat([left, right, (left - right).abs(), left * right, cosine], dim=1))[:, 0]

    def folded(self) -> dict[str, torch.Tensor]:
        """Return the state dict."""
        return {name: value.detach().clone() for name, value in self.state_dict().items()}


def build(settings: Settings, channels: Any, scale: Any, seed: int) -> Any:
    """Make a network with new weights, which depend on the seed only (of a gate: on nothing).

    Args:
        settings: architecture and sizes.
        channels: KV heads times head_dim of the model; of a gate query heads, KV heads and head_dim.
        scale: root mean square of the numbers of a key; of a gate its rotary frequencies or None.
        seed: of the weights.
    """
    if settings.architecture == "gate":
        heads, kv_heads, dim = channels
        return GateNetwork(heads, kv_heads, dim, scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        assert settings.hidden is not None  # Settings fills in a width
        if settings.architecture == "compact":
            return CompactNetwork(
                channels,
                width=settings.width,
                pooled=settings.pooled,
                hidden=settings.hidden,
                window=settings.window,
                scale=scale,
            )
        return AttentionNetwork(
            channels, heads=settings.heads, hidden=settings.hidden, window=settings.window, gated=settings.gated
        )


def soft_labels(ratios: torch.Tensor) -> torch.Tensor:
    """Return sigmoid(2 (log(ratio + 1e-6) - log 2)), which is 1/2 where one side of the gap gets twice the other's
    attention.

    Args:
        ratios: of `dhsa.attention_ratios`.
    """
    return torch.sigmoid(2 * (torch.log(ratios + 1e-6) - math.log(2)))


def focal_loss(logits: torch.Tensor, labels: torch.Tensor, *, gamma: float, pos_weight: float) -> torch.Tensor:
    """Return the focal binary cross-entropy of soft labels.

    The loss of each gap is multiplied by (1 - p_t)^gamma, where p_t is the probability given to the label, so that gaps
    that are already right count little.

    Args:
        logits: of the network.
        labels: from 0 to 1.
        gamma: the exponent.
        pos_weight: factor of the positive part.
    """
    p = torch.sigmoid(logits)
    loss = F.binary_cross_entropy_with_logits(
        logits, labels, pos_weight=logits.new_tensor(pos_weight), reduction="none"
    )
    return ((1 - (p * labels + (1 - p) * (1 - labels))) ** gamma * loss).mean()
