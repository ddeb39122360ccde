"""BoundaryPredictor: the weights of the paper's boundary network, loaded, checked and saved; computed in C.

Reads safetensors and the authors' PyTorch checkpoints, the latter by `_checkpoint.py` without executing anything in
them. Not here: training, and picking boundaries from the logits (functional.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from dhsa import _core
from dhsa._arrays import Array, check_int, empty, kind_of, to_numpy, type_name
from dhsa._checkpoint import read_checkpoint
from dhsa._threads import get_num_threads

DEFAULT_WINDOW = 4

# In the order that _core takes them. The shapes are in terms of C (channels = Hkv * D) and N (hidden).
PARAMETERS: dict[str, tuple[str, ...]] = {
    "enc.mha.in_proj_weight": ("3C", "C"),
    "enc.mha.in_proj_bias": ("3C",),
    "enc.mha.out_proj.weight": ("C", "C"),
    "enc.mha.out_proj.bias": ("C",),
    "enc.norm.weight": ("C",),
    "enc.norm.bias": ("C",),
    "pool.gate.weight": ("1", "C"),
    "mlp.0.weight": ("N", "4C+1"),
    "mlp.0.bias": ("N",),
    "mlp.2.weight": ("1", "N"),
    "mlp.2.bias": ("1",),
}
GATE = "pool.gate.weight"  # only with gated pooling
ANCHOR = "enc.mha.in_proj_weight"


class BoundaryPredictor:
    """The boundary network of arXiv 2510.24606: is there a topic boundary between keys j and j + 1?

    A window of 2w keys around each gap goes through multi-head self-attention and LayerNorm; its two halves are pooled
    (mean, or a softmax-gated sum), compared, and scored by a small MLP. Weights are float32 and immutable.

    Attributes:
        channels: C, the width it was trained for: KV heads times head_dim of the model.
        heads: heads of its self-attention (they divide C; not stored in the weights themselves).
        hidden: width of the MLP.
        window: w, keys on each side of a gap.
        gated: whether the halves are pooled by a gate.

    Made by `load` and `from_state_dict`.
    """

    __slots__ = ("_core_args", "_weights", "channels", "gated", "heads", "hidden", "window")

    channels: int
    heads: int
    hidden: int
    window: int
    gated: bool
    _weights: dict[str, np.ndarray]
    _core_args: tuple[Any, ...]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("use BoundaryPredictor.load or BoundaryPredictor.from_state_dict")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a BoundaryPredictor is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a BoundaryPredictor is immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple:
        return _rebuild, (self.state_dict(), self.heads, self.window)

    def __repr__(self) -> str:
        pooling = "gated" if self.gated else "mean"
        return (
            f"BoundaryPredictor(channels={self.channels}, heads={self.heads}, hidden={self.hidden}, "
            f"window={self.window}, pooling={pooling!r})"
        )

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Array], *, heads: int, window: int = DEFAULT_WINDOW
    ) -> BoundaryPredictor:
        """A predictor from arrays under their PyTorch parameter names; they are copied to float32.

        Args:
            state_dict: `enc.mha.in_proj_weight` [3C, C], `enc.mha.in_proj_bias` [3C], `enc.mha.out_proj.weight` [C, C],
                `enc.mha.out_proj.bias` [C], `enc.norm.weight`, `enc.norm.bias` [C], `mlp.0.weight` [hidden, 4C + 1],
                `mlp.0.bias` [hidden], `mlp.2.weight` [1, hidden], `mlp.2.bias` [1] and, with gated pooling,
                `pool.gate.weight` [1, C]. A common prefix (`module.`) is allowed.
            heads: heads of the self-attention, which must divide C.
            window: keys on each side of a gap.

        Raises:
            TypeError: not a mapping, or no float array. ValueError: a parameter is missing, unknown, not finite or of
            the wrong shape; the message names it and the shape expected.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping of names to arrays, got {type_name(state_dict)}")
        heads = check_int(heads, "heads", 1, 65536)
        window = check_int(window, "window", 1, 4096)
        weights = _strip_prefix(state_dict)
        missing = [name for name in PARAMETERS if name not in weights and name != GATE]
        if missing:
            raise ValueError(f"state_dict: lacks {', '.join(missing)}")
        unknown = [str(name) for name in weights if name not in PARAMETERS]
        if unknown:
            raise ValueError(f"state_dict: unknown parameters {', '.join(unknown)}; expected {', '.join(PARAMETERS)}")
        arrays = {name: _float32(weights[name], name) for name in PARAMETERS if name in weights}
        channels = _size(arrays, ANCHOR, 1)
        hidden = _size(arrays, "mlp.0.weight", 0)
        sizes = {"C": channels, "3C": 3 * channels, "4C+1": 4 * channels + 1, "N": hidden, "1": 1}
        for name, array in arrays.items():
            expected = tuple(sizes[size] for size in PARAMETERS[name])
            if array.shape != expected:
                raise ValueError(
                    f"{name}: expected shape {list(expected)} ([{', '.join(PARAMETERS[name])}] with C = {channels}, "
                    f"N = {hidden}), got {list(array.shape)}"
                )
        if channels % heads:
            raise ValueError(f"heads: {heads} heads do not divide the {channels} channels of {ANCHOR}")
        self = object.__new__(cls)
        core_args = (heads, window, *(arrays.get(name) for name in PARAMETERS))
        for name, value in (
            ("channels", channels),
            ("heads", heads),
            ("hidden", hidden),
            ("window", window),
            ("gated", GATE in arrays),
            ("_weights", arrays),
            ("_core_args", core_args),
        ):
            object.__setattr__(self, name, value)
        return self

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], heads: int | None = None, window: int | None = None
    ) -> BoundaryPredictor:
        """A predictor from a file: safetensors, or a PyTorch checkpoint (`.pt`, the authors' state dict).

        Checkpoints are read without torch and without running code from them: anything in one but tensors and plain
        containers is refused. Reading safetensors needs the package `safetensors`.

        Args:
            path: the file; which kind it is comes from its contents, not its name.
            heads: heads of the self-attention. None: what `save` stored; required where nothing is stored.
            window: keys on each side of a gap. None: what `save` stored, else 4.

        Raises:
            OSError: cannot be read. ValueError: damaged, of an unknown kind, or as in `from_state_dict`. ImportError:
            no `safetensors`.
        """
        path = os.fspath(path)
        with open(path, "rb") as file:
            magic = file.read(16)
        stored: dict[str, str] = {}
        if magic[:4] == b"PK\x03\x04":
            state_dict: Mapping[str, Array] = read_checkpoint(path, ANCHOR)
        elif len(magic) > 8 and magic[8:9] == b"{":
            state_dict, stored = _read_safetensors(path)
        else:
            raise ValueError(
                f"{path}: neither safetensors nor a PyTorch checkpoint in zip format (torch >= 1.6); "
                "older checkpoints cannot be read safely, save them again"
            )
        if heads is None:
            if "heads" not in stored:
                raise ValueError(
                    f"heads: not stored in {path}; give the number of attention heads (4 or 8 in the paper)"
                )
            heads = _stored_int(stored, "heads", path)
        if window is None:
            window = _stored_int(stored, "window", path) if "window" in stored else DEFAULT_WINDOW
        return cls.from_state_dict(state_dict, heads=heads, window=window)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes safetensors with the weights and, as metadata, `heads` and `window`. Needs the package
        `safetensors`."""
        metadata = {"heads": str(self.heads), "window": str(self.window)}
        _safetensors().save_file(self._weights, os.fspath(path), metadata=metadata)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The weights under their parameter names, float32, as copies."""
        return {name: array.copy() for name, array in self._weights.items()}

    def logits(self, k: Array) -> Array:
        """The score of every gap.

        Args:
            k: keys [B, Hkv, L, D] with Hkv * D = channels; float32, float16 or bfloat16; NumPy, torch CPU or DLPack.

        Returns:
            float32 [B, L] of the kind of `k`: entry j scores the gap between keys j and j + 1. The first w - 1 and the
            last w gaps, whose windows are not full, are -100.

        Raises:
            TypeError, ValueError: naming `k`, or the predictor where its width does not fit.
        """
        kind = kind_of(k, "k")
        k = kind.accept(k, "k")
        if len(k.shape) != 4:
            raise ValueError(f"k: expected 4 dimensions [B, Hkv, L, D], got {len(k.shape)}")
        out = empty((k.shape[0], k.shape[2]), np.float32, "k")
        _core.predictor_logits(self._core_args, k, out, get_num_threads())
        return kind.result(out)


def _rebuild(state_dict: dict[str, np.ndarray], heads: int, window: int) -> BoundaryPredictor:
    return BoundaryPredictor.from_state_dict(state_dict, heads=heads, window=window)


def _strip_prefix(state_dict: Mapping[str, Array]) -> dict[str, Array]:
    """The mapping with a prefix common to all names (as wrappers add) removed."""
    names = [name for name in state_dict if isinstance(name, str)]
    for name in names:
        if name.endswith(ANCHOR):
            prefix = name[: -len(ANCHOR)]
            if prefix and len(names) == len(state_dict) and all(other.startswith(prefix) for other in names):
                return {other[len(prefix) :]: value for other, value in state_dict.items()}
    return dict(state_dict)


def _float32(value: Array, name: str) -> np.ndarray:
    if type(value).__module__.partition(".")[0] == "torch" and getattr(value, "is_floating_point", bool)():
        value = value.detach().float()  # NumPy has no bfloat16
    array = to_numpy(value, name)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: expected floating point numbers, got {array.dtype}")
    array = np.array(array, dtype=np.float32, order="C", copy=True)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds numbers that are not finite in float32")
    array.setflags(write=False)
    return array


def _size(arrays: dict[str, np.ndarray], name: str, axis: int) -> int:
    shape = arrays[name].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{name}: expected shape [{', '.join(PARAMETERS[name])}], got {list(shape)}")
    return shape[axis]


def _stored_int(stored: dict[str, str], name: str, path: str) -> int:
    try:
        return int(stored[name])
    except ValueError:
        raise ValueError(f"{name}: {path} stores {stored[name]!r}, expected an int") from None


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("safetensors files need the package 'safetensors': pip install dhsa[predictor]") from error
    return safetensors.numpy


def _read_safetensors(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    _safetensors()
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors (float32, float16 or float64): {error}") from None
