"""Gates of `seer`: projections of pooled queries and keys, loaded, checked and saved."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dhsa import _safetensors
from dhsa._arrays import check_int, type_name
from dhsa._checkpoint import read_checkpoint
from dhsa._files import read_json

__all__ = ["POOLS", "Gate", "Gates", "load_gates", "rotated"]

POOLS = ("max", "min", "mean")
FORMAT = "dhsa.gates"
MAX_CONFIG_BYTES = 1 << 20  # of a model's config.json
_OURS = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(query|key)")
_THEIRS = re.compile(r"(?:.*\.)?layers\.(0|[1-9][0-9]{0,5})\.self_attn\.attn_gate\.mask_linear_([qk])\.weight")
_TYPE = re.compile(r"Q((?:max|min|avg)+)_K((?:max|min|avg)+)")


class Gate(NamedTuple):
    """The projections of one layer, float32 [heads, pools * D, R]. `query` has all query heads, or is None where
    queries are not projected; `key` has the KV heads or all query heads."""

    query: np.ndarray | None
    key: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Gates:
    """The gates of a model.

    Attributes:
        block: queries and keys of a block.
        query_pools, key_pools: how the vectors of a block become one: some of "max", "min" and "mean", side by side.
        layers: {index of a layer: its Gate}.
        inv_freq: float64 [D / 2], the frequencies of the model's rotary positions. Queries and keys are turned back to
            position 0 before they are pooled, and what is projected is turned to the first position of its block.
            None: they are pooled as they are.
        model: facts of the model that they were trained for, as `dhsa.hf.model_facts` has them; None: not known.
        notes: further text of the file.
    """

    block: int
    query_pools: tuple[str, ...]
    key_pools: tuple[str, ...]
    layers: Mapping[int, Gate]
    inv_freq: np.ndarray | None = None
    model: Mapping[str, Any] | None = None
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_int(self.block, "block", 1, 65536)
        for name, pools in (("query_pools", self.query_pools), ("key_pools", self.key_pools)):
            if not pools or len(set(pools)) < len(pools) or not set(pools) <= set(POOLS):
                raise ValueError(f"{name}: expected some of {', '.join(POOLS)}, got {', '.join(pools)}")
        if not self.layers:
            raise ValueError("layers: expected the gate of at least one layer")
        for layer, gate in self.layers.items():
            _check(layer, gate, len(self.query_pools), len(self.key_pools), self.inv_freq)

    def of(self, layer: int | None) -> Gate:
        """The gate of a layer; with None, of the only one. ValueError naming `layer` where there is none."""
        if layer is None and len(self.layers) == 1:
            return next(iter(self.layers.values()))
        if layer is None or layer not in self.layers:
            raise ValueError(f"layer: got {layer}, but the gates are those of layers {sorted(self.layers)}")
        return self.layers[layer]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the gates as safetensors, in place of what is at `path`. OSError if it cannot be written."""
        arrays: dict[str, np.ndarray] = {}
        for layer, gate in self.layers.items():
            arrays |= {f"layers.{layer}.{name}": x for name, x in gate._asdict().items() if x is not None}
        if self.inv_freq is not None:
            arrays["inv_freq"] = self.inv_freq
        told = {**self.notes, "format": FORMAT, "block": str(self.block)}
        told |= {"query_pools": ",".join(self.query_pools), "key_pools": ",".join(self.key_pools)}
        if self.model is not None:
            told["model"] = json.dumps(dict(self.model), sort_keys=True)
        made = {name: np.ascontiguousarray(x, "<f4") for name, x in arrays.items()}
        _safetensors.write(path, {name: ("F32", x.shape, [x.tobytes()]) for name, x in made.items()}, told)


def _check(layer: int, gate: Gate, query_pools: int, key_pools: int, inv_freq: np.ndarray | None) -> None:
    """ValueError for projections that do not fit each other."""
    for name, x in gate._asdict().items():
        if x is not None and (x.ndim != 3 or 0 in x.shape or not np.isfinite(x).all()):
            raise ValueError(
                f"layers.{layer}.{name}: expected finite numbers [heads, pools * D, R], got {list(x.shape)}"
            )
    key, query = gate.key, gate.query
    dim, rest = divmod(key.shape[1], key_pools)
    if rest:
        raise ValueError(f"layers.{layer}.key: {key.shape[1]} inputs are not {key_pools} pools of keys side by side")
    inputs, outputs = (query.shape[1:]) if query is not None else (query_pools * dim, query_pools * dim)
    if inputs != query_pools * dim or outputs != key.shape[2]:
        raise ValueError(
            f"layers.{layer}.query: expected {query_pools * dim} inputs and {key.shape[2]} outputs, as the keys have, "
            f"got {inputs} and {outputs}"
        )
    if query is not None and query.shape[0] % key.shape[0]:
        raise ValueError(f"layers.{layer}.key: its {key.shape[0]} heads do not divide the {query.shape[0]} of queries")
    if inv_freq is not None and (dim != 2 * len(inv_freq) or key.shape[2] != dim):
        raise ValueError(
            f"layers.{layer}.key: with {len(inv_freq)} rotary frequencies expected heads of {2 * len(inv_freq)} and as "
            f"many outputs, got {dim} and {key.shape[2]}"
        )


def load_gates(path: str) -> Gates:
    """The gates of a file: of `Gates.save`, or `attn_gate_weights.pth` of the source with the `config.json` beside it.
    A file is read once as long as it does not change; nothing in it is executed.

    Raises:
        OSError: it cannot be read. ValueError: it is damaged or of another kind. NotImplementedError: gates of a model
            with rotary positions of another kind. ImportError: the package `safetensors` is missing.
    """
    about = os.stat(path)
    return _load(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=8)
def _load(path: str, time: int, size: int) -> Gates:
    with open(path, "rb") as file:
        checkpoint = file.read(4) == b"PK\x03\x04"
    try:
        return _of_source(path) if checkpoint else _of_file(path)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise type(error)(f"gates: {path}: {error}") from None


def _of_file(path: str) -> Gates:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("gates need the package 'safetensors': pip install dhsa[predictor]") from error
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            told = file.metadata() or {}
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot be read as safetensors: {error}") from None
    if told.get("format") != FORMAT:
        raise ValueError(f"format: expected {FORMAT!r}, got {told.get('format')!r:.80}")
    inv_freq = arrays.pop("inv_freq", None)
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, x in arrays.items():
        if not (match := _OURS.fullmatch(name)) or x.dtype.kind != "f":
            raise ValueError(f"unknown tensor {name[:80]!r}; expected layers.N.query, layers.N.key and inv_freq")
        found.setdefault(int(match[1]), {})[match[2]] = x
    if inv_freq is not None and (inv_freq.ndim != 1 or not len(inv_freq) or not np.isfinite(inv_freq).all()):
        raise ValueError("inv_freq: expected finite numbers [D / 2]")
    model = json.loads(told["model"]) if "model" in told else None
    if model is not None and not isinstance(model, dict):
        raise ValueError(f"model: expected an object of JSON, got {type_name(model)}")
    named = ("format", "block", "query_pools", "key_pools", "model")
    return Gates(
        block=_number(told.get("block", ""), "block"),
        query_pools=tuple(told.get("query_pools", "").split(",")),
        key_pools=tuple(told.get("key_pools", "").split(",")),
        layers=_gates(found, "query", "key"),
        inv_freq=None if inv_freq is None else inv_freq.astype(np.float64),
        model=model,
        notes={name: text for name, text in told.items() if name not in named},
    )


def _number(text: str, name: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}: expected an int, got {text[:80]!r}")
    return int(text)


def _gates(found: dict[int, dict[str, np.ndarray]], query: str, key: str) -> dict[int, Gate]:
    if lacking := [layer for layer, of in found.items() if key not in of]:
        raise ValueError(f"lacks the projection of keys of layers {sorted(lacking)}")
    return {layer: Gate(of.get(query), of[key]) for layer, of in sorted(found.items())}


def _of_source(path: str) -> Gates:
    """Gates as the authors of SeerAttention save them."""
    beside = Path(path).with_name("config.json")
    config = read_json(beside, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ValueError(f"{beside}: expected an object of JSON, got {type_name(config)}")
    match = _TYPE.fullmatch(str(config.get("seerattn_gate_type")))
    if match is None:
        raise ValueError(
            f"{beside}: seerattn_gate_type: expected Q.._K.., got {config.get('seerattn_gate_type')!r:.80}"
        )
    query_pools, key_pools = (
        tuple("mean" if name == "avg" else name for name in re.findall("max|min|avg", part)) for part in match.groups()
    )
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, x in read_checkpoint(path, (".mask_linear_k.weight",)).items():
        if not (part := _THEIRS.fullmatch(name)):
            raise ValueError(f"unknown tensor {name[:80]!r}; expected those of attn_gate")
        found.setdefault(int(part[1]), {})[part[2]] = np.asarray(x, np.float32)
    block = check_int(config.get("seerattn_gate_block_size"), "seerattn_gate_block_size", 1, 65536)
    return Gates(block, query_pools, key_pools, _gates(found, "q", "k"), _frequencies(config))


def _frequencies(config: Mapping[str, Any]) -> np.ndarray:
    """The rotary frequencies of the model of a config.json; NotImplementedError for other kinds than the plain one and
    that of Llama 3."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    plain: np.ndarray = float(config.get("rope_theta", 10000.0)) ** -(np.arange(0, dim, 2) / dim)
    if kind == "default":
        return plain
    if kind != "llama3":
        raise NotImplementedError(f"rope_scaling: expected none, 'default' or 'llama3', got {kind!r:.80}")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the original length
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * plain / scaling["factor"] + smooth * plain


def rotated(x: np.ndarray, positions: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """Vectors x [n, D] turned to rotary positions [n], the halves of a head being the two coordinates; negative ones
    turn them back."""
    half, angles = x.shape[1] // 2, positions[:, None] * inv_freq
    one, two, cos, sin = x[:, :half], x[:, half:], np.cos(angles), np.sin(angles)
    return np.hstack([one * cos - two * sin, two * cos + one * sin])
