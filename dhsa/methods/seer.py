"""Fixed blocks of keys by a trained gate of pooled queries and keys."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from dhsa._arrays import type_name
from dhsa._twin.blocks import Block, bad_blocks, block_edges, fixed, fixed_logits, probabilities, segments_of
from dhsa._twin.selection import Segments
from dhsa.methods.base import Method
from dhsa.methods.gates import Gate, Gates, load_gates, rotated

__all__ = ["Seer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seer(Method):
    """Fixed blocks of keys by the softmax of a gate: the block's queries and the keys of each block are pooled,
    projected and multiplied. The projections are trained for a model so that the gate agrees with the largest
    probabilities between a block of queries and a block of keys. In NumPy: for comparing what is selected.

    `python -m dhsa train-boundaries --architecture gate` trains gates for a model, and the gates that the authors
    publish for prompts are read as well. Without trained gates the idea does not work: with `gates=None` the pools are
    means and nothing is projected, and the method selects what "block" selects.

    Args:
        gates: the path of a file of gates: of the command, or `attn_gate_weights.pth` of the source with its
            `config.json` beside it. A path that is not absolute is relative to the working directory. None: untrained.
        layer: the layer whose gate is used. `patch` fills it in; with arrays it must be given.
        key_block: keys of a block, at least 1; that of the gates, which are trained for blocks of one size, and so is
            `Config.query_block`.

    Raises:
        TypeError, ValueError: naming the option. OSError: the file cannot be read.

    Source: SeerAttention, arXiv 2410.13276.
    """

    name: ClassVar[str] = "seer"
    summary: ClassVar[str] = "fixed blocks by a trained gate of pooled queries and keys"
    source: ClassVar[str] = "SeerAttention, arXiv 2410.13276"
    cost: ClassVar[str] = "G n / `key_block`, and 4 D products for each block of keys once"
    in_core: ClassVar[bool] = False
    heads: ClassVar[str] = "head"
    paper_fields: ClassVar[Mapping[str, Any]] = {"key_block": 64, "query_block": 64}

    gates: str | None = None
    layer: int | None = None
    key_block: int = 64

    def __post_init__(self) -> None:
        if self.gates is not None:
            if not isinstance(self.gates, (str, os.PathLike)):
                raise TypeError(f"gates: expected a path or None, got {type_name(self.gates)}")
            object.__setattr__(self, "gates", os.fsdecode(self.gates))
        self._keep_int("layer", 0, 999_999)
        self._keep_int("key_block", 1)

    def core(self, *, query_block: int, budget: int | None) -> dict[str, Any]:
        if self.gates is not None:
            block = load_gates(self.gates).block
            for name, value in (("key_block", self.key_block), ("query_block", query_block)):
                if value != block:
                    raise ValueError(f"{name}: got {value}, but the gates were trained for blocks of {block}")
        return {}

    @property
    def made_for(self) -> Mapping[str, Any] | None:
        return None if self.gates is None else load_gates(self.gates).model

    def of_layer(self, layer: int) -> Seer:
        if self.gates is None or self.layer is not None:
            return self
        load_gates(self.gates).of(layer)
        return dataclasses.replace(self, layer=layer)

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """Per head the softmax of the gate over the blocks of keys, summed over the heads of the set; also the mass.
        Source: SeerAttention, arXiv 2410.13276, and the code of its authors.

        Queries and keys are turned back to rotary position 0 where the gates say so, and pooled: of a block of vectors,
        the mean, the largest or the smallest numbers, or several of these side by side. A projection for each head
        follows; then both are turned to the first position of their blocks, and multiplied. Blocks that end early are
        pooled over what they have.

        There, a threshold or a number of blocks decides; here `Config.mass` or the budget. The authors turn positions
        from the first token of a row; here position 0 is the first key of the call.
        """
        o = block.options
        gates = None if o["gates"] is None else load_gates(o["gates"])
        gate = None if gates is None else gates.of(o["layer"])
        heads = block.sets * len(block.q)
        bounds = {"scale": o["scale"], "softcap": o["softcap"]}
        if gate is not None:
            _check(gate, heads, block.k.shape[2], gates)
            bounds = {"scale": gate.key.shape[2] ** -0.5, "softcap": None}
        edges, bad = block_edges(block), bad_blocks(block)
        total, seen = np.zeros(len(edges) - 1), edges[1:] > block.lo
        for h in range(len(block.q)):
            head = block.set_index * len(block.q) + h
            keys = _keys(block, h, head, heads, gates, gate)
            finite = np.asarray(np.isfinite(keys).all(axis=1))
            at = np.arange(block.start, block.start + block.stop - block.begin)
            weight = None if gate is None or gate.query is None else gate.query[head]
            pools = ("mean",) if gates is None else gates.query_pools
            query = _projected(block.queries[h], at, [0, len(at)], pools, weight, gates)
            logits = fixed_logits(fixed(query), fixed(np.where(finite[:, None], keys, 0.0)), bounds)
            total += probabilities(logits, seen & finite)[0]
        return segments_of(edges, bad, total, total)


def _check(gate: Gate, heads: int, dim: int, gates: Gates | None) -> None:
    assert gates is not None
    if (gate.query is not None and len(gate.query) != heads) or heads % len(gate.key):
        own = len(gate.key if gate.query is None else gate.query)
        raise ValueError(f"gates: trained for {own} query heads, but the layer has {heads}")
    if gate.key.shape[1] != dim * len(gates.key_pools):
        raise ValueError(
            f"gates: trained for heads of {gate.key.shape[1] // len(gates.key_pools)} numbers, but the layer has {dim}"
        )


def _keys(block: Block, h: int, head: int, heads: int, gates: Gates | None, gate: Gate | None) -> np.ndarray:
    """[blocks of keys, R]: what the gate makes of the keys that head h of the set reads."""
    kv, size = h * len(block.k) // len(block.q), block.options["key_block"]
    own = kv if gate is None else head * len(gate.key) // heads
    weight = None if gate is None else gate.key[own]
    pools = ("mean",) if gates is None else gates.key_pools
    keys, n = block.k[kv], block.end // size
    whole = block.shared(
        ("gate", kv, own),
        lambda: _projected(keys, np.arange(len(keys)), range(0, len(keys) + 1, size), pools, weight, gates),
    )[:n]
    if block.end % size == 0:
        return np.asarray(whole)
    rest = np.arange(n * size, block.end)
    return np.vstack([whole, _projected(keys[rest], rest, [0, len(rest)], pools, weight, gates)])


def _projected(
    x: np.ndarray, at: np.ndarray, edges: Any, pools: tuple[str, ...], weight: np.ndarray | None, gates: Gates | None
) -> np.ndarray:
    """[runs, R]: vectors x [n, D] at positions `at`, pooled over the runs between `edges`, and projected."""
    turn = None if gates is None else gates.inv_freq
    plain = x if turn is None else rotated(x, -at, turn)
    runs = list(zip(edges, list(edges)[1:], strict=False))
    pooled = np.array([np.concatenate([getattr(plain[a:b], pool)(axis=0) for pool in pools]) for a, b in runs])
    made = pooled.reshape(len(runs), len(pools) * x.shape[1])
    if weight is not None:
        made = np.einsum("ni,io->no", made, weight.astype(np.float64))  # no BLAS: its sums depend on its threads
    return made if turn is None else rotated(made, np.array([at[a] for a, _ in runs]), turn)
