"""Gates of the method "seer" in torch, for training: pooled queries and keys of a model, labels, network and loss.

The same gates in NumPy, dhsa/methods/seer.py, select by them afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dhsa import hf
from dhsa.commands import UserError
from dhsa.hf.watching import watch_layers
from dhsa.methods.gates import POOLS, Gate, Gates
from dhsa.training.scores import average_precision
from dhsa.training.settings import Settings

__all__ = ["BLOCK", "GateCrop", "GateNetwork", "gate_loss", "gates_of", "judge_gates", "pool_gates"]

BLOCK = 64  # queries and keys of a block
FEW = 16  # blocks that scores are measured on: those of a budget of 1,024 keys


@dataclass
class GateCrop:
    """Neighbouring blocks of queries of one layer, with all blocks of keys of the piece."""

    layer: int
    queries: torch.Tensor  # [n, H, D]: means of blocks, at rotary position 0 where `inv_freq` is known
    first: int  # the number of the first of these blocks
    keys: torch.Tensor  # [m, Hkv, pools * D]
    labels: torch.Tensor  # [H, n, m]: rows sum to 1
    inv_freq: torch.Tensor | None  # [D / 2]


def _turned(x: torch.Tensor, at: torch.Tensor, inv_freq: torch.Tensor | None) -> torch.Tensor:
    """Vectors x [..., n, D] turned to rotary positions [n]; as they are without frequencies."""
    if inv_freq is None:
        return x
    angles = at[:, None].double() * inv_freq.double()
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, two = x.chunk(2, dim=-1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


class GateNetwork(nn.Module):
    """A projection of the mean query for each head, and one of the pooled keys for each KV head. It begins as a gate of
    mean queries and mean keys."""

    def __init__(self, heads: int, kv_heads: int, dim: int, inv_freq: torch.Tensor | None) -> None:
        super().__init__()
        self.inv_freq = inv_freq
        one = torch.eye(dim, dtype=torch.float32, device="cpu")
        self.query = nn.Parameter(one.repeat(heads, 1, 1))
        parts = [one if pool == "mean" else torch.zeros_like(one) for pool in POOLS]
        self.key = nn.Parameter(torch.cat(parts).repeat(kv_heads, 1, 1))

    def forward(self, queries: torch.Tensor, first: int, keys: torch.Tensor) -> torch.Tensor:
        """Return the logits [H, n, m] of n blocks of queries, from number `first` on, and m blocks of keys; -inf where
        the keys come later.

        Args:
            queries: [n, H, D].
            first: the number of the first block.
            keys: [m, Hkv, pools * D].
        """
        rows, columns = first + torch.arange(len(queries)), torch.arange(len(keys))
        q = _turned(torch.einsum("nhd,hdr->hnr", queries, self.query), rows * BLOCK, self.inv_freq)
        k = _turned(torch.einsum("mgi,gir->gmr", keys, self.key), columns * BLOCK, self.inv_freq)
        s = q @ k.repeat_interleave(len(q) // len(k), 0).mT * q.shape[2] ** -0.5
        return s.masked_fill(columns > rows[:, None], -torch.inf)


def gate_loss(network: GateNetwork, crop: GateCrop) -> torch.Tensor:
    """Return the KL divergence of the gate's softmax from the labels, the mean over heads and blocks of queries."""
    logs = network(crop.queries, crop.first, crop.keys).log_softmax(-1)
    seen = crop.labels > 0
    return (
        torch.where(seen, crop.labels * (crop.labels.clamp_min(1e-30).log() - logs.masked_fill(~seen, 0.0)), 0.0)
        .sum(-1)
        .mean()
    )


def _labels(q: torch.Tensor, k: torch.Tensor, scale: float | None, softcap: float | None) -> torch.Tensor:
    """[H, n, m]: the largest probability between each block of queries and each of keys, divided by the row's sum. The
    queries q [H, L, D] and keys k [Hkv, L, D] of whole blocks. Source: SeerAttention, arXiv 2410.13276."""
    blocks = q.shape[1] // BLOCK
    made = torch.zeros(len(q), blocks, blocks)
    after = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
    for i in range(blocks):
        end = (i + 1) * BLOCK
        s = q[:, i * BLOCK : end] @ k[:, :end].repeat_interleave(len(q) // len(k), 0).mT
        s = s * (q.shape[2] ** -0.5 if scale is None else scale)
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        s[..., i * BLOCK :].masked_fill_(after, -torch.inf)
        made[:, i, : i + 1] = s.softmax(-1).unflatten(-1, (i + 1, BLOCK)).amax((1, 3))
    return made / made.sum(-1, keepdim=True)


def _frequencies(model: Any, dim: int) -> torch.Tensor | None:
    """The rotary frequencies of a model whose positions are those of the plain kind or of Llama 3; else None."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    found, kind = getattr(rotary, "inv_freq", None), getattr(rotary, "rope_type", "default")
    if (
        found is None
        or not isinstance(found, torch.Tensor)
        or 2 * found.numel() != dim
        or kind not in ("default", "llama3")
    ):
        return None
    return found.detach().float().clone()


def _see(model: Any, ids: list[int], layers: Iterable[int] | None, visit: Callable[[GateCrop], None]) -> None:
    """Read tokens by exact attention, and call `visit` with a crop of all blocks of each layer without a window."""
    wanted, seen = None if layers is None else frozenset(layers), set()
    length = len(ids) // BLOCK * BLOCK
    own: list[Exception] = []

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> None:
        seen.add(layer)
        if (wanted is not None and layer not in wanted) or not length:
            return
        q, k = q[0, :, :length].float(), k[0, :, :length].float()
        turn = _frequencies(model, q.shape[2])
        plain_q, plain_k = (_turned(x, -torch.arange(length), turn) for x in (q, k))
        blocks = plain_k.unflatten(1, (-1, BLOCK))
        pooled = {"max": blocks.amax(2), "min": blocks.amin(2), "mean": blocks.mean(2)}
        keys = torch.cat([pooled[pool] for pool in POOLS], dim=-1).transpose(0, 1)
        queries = plain_q.unflatten(1, (-1, BLOCK)).mean(2).transpose(0, 1)
        try:
            visit(GateCrop(layer, queries, 0, keys, _labels(q, k, options["scale"], options["softcap"]), turn))
        except Exception as error:
            own.append(error)
            raise

    try:
        watch_layers(model.get_decoder(), torch.tensor([ids], device="cpu"), see)
    except (NotImplementedError, TypeError, ValueError) as error:
        if own:
            raise
        raise UserError(f"model: its attention cannot be read: {error}") from error
    if wanted is not None and (missing := sorted(wanted - seen)):
        raise UserError(f"layers: {missing} have no attention without a window here; there are {sorted(seen)}")
    if not seen:
        raise UserError(f"model: {type(model).__name__} has no layer of causal attention without a window, so no gates")


def pool_gates(model: Any, ids: list[int], settings: Settings, generator: np.random.Generator) -> list[GateCrop]:
    """Return crops of all layers of one piece, in random order, no more of them than the settings allow. The first
    quarter of the blocks of queries, which see few keys, is left out, as in the source."""
    some = max(1, settings.crop // BLOCK)
    made: list[GateCrop] = []
    config = model.config.get_text_config()
    layers = config.num_hidden_layers if settings.layers is None else len(settings.layers)

    def visit(found: GateCrop) -> None:
        blocks, n = len(found.keys), len(found.queries)
        starts = np.arange(max(1, n // 4), n, some)
        size = 4 * (found.labels.shape[0] * some * blocks + found.queries[0].numel() * some)
        room = (settings.pool_mib * 2**20 // layers - 4 * found.keys.numel()) // size
        if room < 1:
            raise UserError(f"pool_mib: {settings.pool_mib} MiB do not hold {some} blocks of each of {layers} layers")
        chosen = starts if len(starts) <= room else np.sort(generator.choice(starts, room, replace=False))
        for a in chosen.tolist():
            part = slice(a, min(a + some, n))
            labels = found.labels[:, part].clone()
            made.append(GateCrop(found.layer, found.queries[part].clone(), a, found.keys, labels, found.inv_freq))

    _see(model, ids, settings.layers, visit)
    if not made:
        raise UserError(f"text: a piece of {len(ids)} tokens has too few blocks of {BLOCK}; expected at least 2")
    return [made[i] for i in generator.permutation(len(made))]


def gates_of(model: Any, networks: dict[str, GateNetwork]) -> Gates:
    """Return trained networks as Gates. UserError if a number is not finite."""
    layers, inv_freq = {}, None
    for name, network in networks.items():
        query, key = network.query.detach(), network.key.detach()
        if not (torch.isfinite(query).all() and torch.isfinite(key).all()):
            raise UserError(f"training failed: the gate of layer {name} is not finite; try a lower rate")
        layers[int(name)] = Gate(query.numpy().copy(), key.numpy().copy())
        inv_freq = None if network.inv_freq is None else network.inv_freq.double().numpy()
    return Gates(BLOCK, ("mean",), POOLS, layers, inv_freq, hf.model_facts(model))


def judge_gates(
    model: Any,
    pieces: list[list[int]],
    networks: dict[str, GateNetwork],
    settings: Settings,
    advance: Callable[[], None],
) -> list[dict[int, dict[str, Any]]]:
    """Return, for each held-out piece, {layer: scores of the gate, of means without a gate, and of random numbers}: how
    well they find, in each row that sees more, the 16 blocks of keys with the largest labels."""
    random = np.random.default_rng(settings.seed)
    rows: list[dict[int, dict[str, Any]]] = []

    def visit(found: GateCrop) -> None:
        if str(found.layer) not in networks:
            return
        own, n = networks[str(found.layer)], len(found.queries)
        plain = GateNetwork(own.query.shape[0], own.key.shape[0], own.query.shape[1], own.inv_freq)
        few = min(FEW, max(1, n // 4))
        with torch.no_grad():
            logits = {name: net(found.queries, 0, found.keys) for name, net in (("own", own), ("means", plain))}
        seen = torch.isfinite(logits["own"])[:, few:]
        logits["random"] = torch.from_numpy(random.random(logits["own"].shape, np.float32))
        wanted = _best(found.labels[:, few:], seen, few)
        row: dict[str, Any] = {}
        for name, x in logits.items():
            p = x[:, few:].masked_fill(~seen, -torch.inf).softmax(-1)
            common = float((_best(p, seen, few) & wanted).sum() / wanted.sum())
            precision = average_precision(p[seen].double().numpy(), wanted[seen].numpy())
            row[name] = {"average_precision": precision, "recall": common}
        row["positive"] = float(wanted.sum() / seen.sum())
        rows[-1][found.layer] = row

    for ids in pieces:
        rows.append({})
        _see(model, ids, settings.layers, visit)
        advance()
    return rows


def _best(x: torch.Tensor, seen: torch.Tensor, few: int) -> torch.Tensor:
    """bool like x [H, n, m]: the `few` largest of what is seen in each row."""
    best = x.masked_fill(~seen, -torch.inf).topk(few, dim=-1).indices
    return torch.zeros_like(seen).scatter_(-1, best, torch.ones_like(best, dtype=torch.bool))
