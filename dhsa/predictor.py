"""BoundaryPredictor: the weights of boundary networks, loaded, checked and saved. The networks are computed in C.

There are two architectures, the paper's and a compact one, and a predictor has one network for all layers, one for each
layer, or both. It reads safetensors and the authors' PyTorch checkpoints; the latter by `_checkpoint.py`, which does
not execute anything in them. Training is in training/; picking boundaries from the logits is in selecting.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from dhsa import _core
from dhsa._arrays import check_int, check_rank, empty, kind_of, to_numpy, type_name
from dhsa._checkpoint import read_checkpoint
from dhsa._files import replacing
from dhsa._threads import get_num_threads
from dhsa._typing import ArrayLike, ArrayT

DEFAULT_WINDOW = 4
SHIPPED = "gemma-3-270m.safetensors"  # in dhsa/weights, with a model card
TRAIN = "python -m dhsa train-boundaries --model MODEL --text FILES --out FILE"


class Architecture(NamedTuple):
    """A kind of network.

    parameters: their names, in the order in which _core takes them, and shapes in terms of letters whose values follow
    from the weights. optional: the parameters that may be missing. heads: whether it has attention heads.
    """

    parameters: dict[str, tuple[str, ...]]
    optional: tuple[str, ...] = ()
    heads: bool = False

    @property
    def anchor(self) -> str:
        """The parameter by which the architecture is recognised; it has C columns."""
        return next(iter(self.parameters))


ARCHITECTURES = {
    "attention": Architecture(
        {
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
        },
        optional=("pool.gate.weight",),
        heads=True,
    ),
    "compact": Architecture(
        {
            "project.weight": ("R", "C"),
            "project.bias": ("R",),
            "token.weight": ("M", "2R"),
            "token.bias": ("M",),
            "head.0.weight": ("N", "3M"),
            "head.0.bias": ("N",),
            "head.2.weight": ("1", "N"),
            "head.2.bias": ("1",),
        }
    ),
}
# The parameter and axis whose size gives the value of each letter.
SIZES = {
    "attention": {"C": ("enc.mha.in_proj_weight", 1), "N": ("mlp.0.weight", 0)},
    "compact": {
        "C": ("project.weight", 1),
        "R": ("project.weight", 0),
        "M": ("token.weight", 0),
        "N": ("head.0.weight", 0),
    },
}
ANCHORS = tuple(architecture.anchor for architecture in ARCHITECTURES.values())
_STORED = ("architecture", "heads", "window", "model", "format")  # metadata of a file other than notes
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(.+)")  # no leading zeros: two names would be one layer


class BoundaryPredictor:
    """Networks that score whether there is a boundary between keys j and j + 1.

    "attention" is the network of arXiv 2510.24606: a window of 2w keys around each gap goes through multi-head
    self-attention and LayerNorm; its two halves are pooled (mean, or a softmax-gated sum), compared, and scored by a
    small MLP. "compact" is this project's: each key is projected once to a few numbers, which are pooled (maximum or
    mean) on either side of the gap, compared and scored by a small MLP. It takes less than 0.1 MFLOP a gap at 1,024
    channels. Weights are float32 and immutable.

    A BoundaryPredictor is made by `load`, `default` or `from_state_dict`.

    Attributes:
        architecture: "attention" or "compact".
        channels: C, the width it was trained for: KV heads times head_dim of the model.
        heads: heads of its self-attention, which divide C (they are not stored in the weights themselves). None for
            "compact".
        hidden: width of the MLP.
        window: w, the number of keys on each side of a gap.
        gated: whether the halves are pooled by a gate. False for "compact".
        layers: the layers that have a network of their own, ascending; see `layer`.
        shared: whether there is a network for all layers, which `logits` computes.
        model: what is known of the model it was trained for ("model_type", "num_hidden_layers", ...), or None.
        notes: the other metadata of its file, str to str. A training writes "settings" and "losses" (JSON) and "text".
    """

    __slots__ = (
        "_core_args", "_layers", "_weights", "architecture", "channels", "gated", "heads", "hidden", "layers", "model",
        "notes", "shared", "window",
    )  # fmt: skip

    architecture: str
    channels: int
    heads: int | None
    hidden: int
    window: int
    gated: bool
    layers: tuple[int, ...]
    shared: bool
    model: dict[str, Any] | None
    notes: dict[str, str]
    _weights: dict[str, np.ndarray]
    _layers: dict[int, BoundaryPredictor]
    _core_args: tuple[Any, ...] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("use BoundaryPredictor.load, BoundaryPredictor.default or BoundaryPredictor.from_state_dict")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a BoundaryPredictor is immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a BoundaryPredictor is immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.state_dict(), self.heads, self.window, self.model, self.notes)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights and of what else decides the scores, in hexadecimal digits."""
        return _digest(self)

    def __repr__(self) -> str:
        inside = f"heads={self.heads}, " if self.architecture == "attention" else ""
        pooling = f", pooling={'gated' if self.gated else 'mean'!r}" if self.architecture == "attention" else ""
        layers = f", layers={self.layers}" if self.layers else ""
        return (
            f"BoundaryPredictor({self.architecture!r}, channels={self.channels}, {inside}hidden={self.hidden}, "
            f"window={self.window}{pooling}{layers})"
        )

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, ArrayLike],
        *,
        heads: int | None = None,
        window: int = DEFAULT_WINDOW,
        model: Mapping[str, Any] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> BoundaryPredictor:
        """Make a predictor from arrays under their PyTorch parameter names. They are copied to float32.

        Args:
            state_dict: for "attention", `enc.mha.in_proj_weight` [3C, C], `enc.mha.in_proj_bias` [3C],
                `enc.mha.out_proj.weight` [C, C], `enc.mha.out_proj.bias` [C], `enc.norm.weight` [C], `enc.norm.bias`
                [C], `mlp.0.weight` [N, 4C + 1], `mlp.0.bias` [N], `mlp.2.weight` [1, N], `mlp.2.bias` [1] and, with
                gated pooling, `pool.gate.weight` [1, C]. For "compact", `project.weight` [R, C], `token.weight` [M,
                2R], `head.0.weight` [N, 3M], `head.2.weight` [1, N] and the bias of each. Networks of single layers
                have the same names after `layers.<number>.`. A prefix common to all names (`module.`) is allowed.
            heads: heads of the self-attention, which must divide C. Required for "attention", None for "compact".
            window: the number of keys on each side of a gap.
            model: kept as the attribute `model`.
            notes: kept as the attribute `notes`.

        Raises:
            TypeError: `state_dict` is not a mapping of names to arrays of floating point numbers.
            ValueError: a parameter is missing, unknown, not finite or of the wrong shape. The message names it and the
                shape expected.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping of names to arrays, got {type_name(state_dict)}")
        if model is not None and not isinstance(model, Mapping):
            raise TypeError(f"model: expected a mapping or None, got {type_name(model)}")
        if notes is not None and not isinstance(notes, Mapping):
            raise TypeError(f"notes: expected a mapping or None, got {type_name(notes)}")
        window = check_int(window, "window", 1, 4096)
        parts: dict[int | None, dict[str, ArrayLike]] = {}
        for name, value in _strip_prefix(state_dict).items():
            match = _LAYER.fullmatch(name) if isinstance(name, str) else None
            layer, name = (int(match[1]), match[2]) if match else (None, name)
            parts.setdefault(layer, {})[name] = value
        networks = {layer: _network(weights, layer, heads, window) for layer, weights in parts.items()}
        if not networks:
            raise ValueError(f"state_dict: is empty; expected the parameters of one of {', '.join(ARCHITECTURES)}")
        first = networks[next(iter(networks))]
        for layer, network in networks.items():
            for name in ("architecture", "channels"):
                if getattr(network, name) != getattr(first, name):
                    raise ValueError(
                        f"state_dict: networks of one {name} expected, but layer {layer} has "
                        f"{getattr(network, name)!r}, not {getattr(first, name)!r}"
                    )
        own = {layer: networks[layer] for layer in sorted(layer for layer in networks if layer is not None)}
        shared = networks.get(None)
        fields = {
            name: getattr(shared or first, name) for name in cls.__slots__ if name not in ("layers", "model", "notes")
        }
        if own:
            fields["_weights"] = {} if shared is None else fields["_weights"]
            fields["_core_args"] = None if shared is None else fields["_core_args"]
        return _make(
            **fields | {"shared": shared is not None, "layers": tuple(own), "_layers": own},
            model=None if model is None else dict(model),
            notes=dict(notes or {}),
        )

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], heads: int | None = None, window: int | None = None
    ) -> BoundaryPredictor:
        """Load a predictor from a file: safetensors, or a PyTorch checkpoint (`.pt`, the authors' state dict).

        Checkpoints are read without torch and without running code from them; one that holds anything but tensors and
        plain containers is refused. Reading safetensors needs the package `safetensors`.

        Args:
            path: the file. Its kind is recognised from its contents, not its name.
            heads: heads of the self-attention. None: those that `save` stored; required where none are stored and the
                network is the paper's.
            window: the number of keys on each side of a gap. None: the one that `save` stored, else 4.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is damaged or of an unknown kind, or as in `from_state_dict`.
            ImportError: the package `safetensors` is missing.
        """
        path = os.fspath(path)
        with open(path, "rb") as file:
            magic = file.read(16)
        stored: dict[str, str] = {}
        if magic[:4] == b"PK\x03\x04":
            state_dict: Mapping[str, ArrayLike] = read_checkpoint(path, ANCHORS)
        elif len(magic) > 8 and magic[8:9] == b"{":
            state_dict, stored = _read_safetensors(path)
        else:
            raise ValueError(
                f"{path}: neither safetensors nor a PyTorch checkpoint in zip format (torch >= 1.6); "
                "older checkpoints cannot be read safely, save them again"
            )
        if heads is None and any(name.endswith(ANCHORS[0]) for name in state_dict):
            if "heads" not in stored:
                raise ValueError(
                    f"heads: not stored in {path}; give the number of attention heads (4 or 8 in the paper)"
                )
            heads = _stored_int(stored, "heads", path)
        if window is None:
            window = _stored_int(stored, "window", path) if "window" in stored else DEFAULT_WINDOW
        notes = {name: text for name, text in stored.items() if name not in _STORED}
        return cls.from_state_dict(
            state_dict, heads=heads, window=window, model=_stored_model(stored, path), notes=notes
        )

    @classmethod
    def default(cls) -> BoundaryPredictor:
        """Return the predictor that comes with this package: for Gemma 3 270M, with a model card in `dhsa/weights`.

        Raises:
            ImportError: the package `safetensors` is missing.
        """
        return _shipped()

    def layer(self, index: int) -> BoundaryPredictor:
        """Return the network of one layer: its own if it has one, else the one for all layers.

        Args:
            index: the layer.

        Raises:
            TypeError: `index` is no int.
            ValueError: there is neither network.
        """
        index = check_int(index, "index", 0)
        if index in self._layers:
            return self._layers[index]
        if not self.shared:
            raise ValueError(f"index: there are networks of layers {_listed(self.layers)} only, not of {index}")
        return self if not self.layers else _make(**{name: getattr(self, name) for name in self.__slots__} | _ALONE)

    def save(
        self, path: str | os.PathLike[str], *, dtype: str = "float32", notes: Mapping[str, str] | None = None
    ) -> None:
        """Write the weights as safetensors.

        `heads`, `window`, `model` and `notes` are stored as metadata. Needs the package `safetensors`.

        Args:
            path: the file to write.
            dtype: of the weights in the file, "float32" or "float16" (half the size; numbers are rounded).
            notes: further metadata, added to the predictor's own `notes`.

        Raises:
            ValueError: `dtype` is another one, or a weight is too large for it.
            OSError: the file cannot be written.
            ImportError: the package `safetensors` is missing.
        """
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype: expected 'float32' or 'float16', got {dtype!r}")
        metadata = {**self.notes, **(notes or {}), "architecture": self.architecture, "window": str(self.window)}
        if self.heads is not None:
            metadata["heads"] = str(self.heads)
        if self.model is not None:
            metadata["model"] = json.dumps(self.model, sort_keys=True)
        with np.errstate(over="ignore"):  # reported below, with the name
            weights = {name: array.astype(dtype) for name, array in self.state_dict().items()}
        for name, array in weights.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name}: holds numbers beyond {dtype}; save as float32")
        writer = _safetensors()
        import safetensors

        with replacing(path) as part:
            try:
                writer.save_file(weights, os.fspath(part), metadata=metadata)
            except safetensors.SafetensorError as error:
                raise OSError(f"{os.fspath(path)}: cannot be written: {error}") from error

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of the weights under their parameter names, as float32 arrays."""
        own = {name: array.copy() for name, array in self._weights.items()}
        for layer, network in self._layers.items():
            own |= {f"layers.{layer}.{name}": array for name, array in network.state_dict().items()}
        return own

    @overload
    def logits(self, k: npt.NDArray[Any]) -> npt.NDArray[np.float32]: ...
    @overload
    def logits(self, k: ArrayT) -> ArrayT: ...
    def logits(self, k: Any) -> Any:
        """Score every gap by the network for all layers (`layer(i).logits` uses that of one layer).

        Each row of a batch is scored independently. Padding is not recognised, its keys are treated like others: pass
        only the keys of real tokens, as a patched model does.

        Args:
            k: keys [B, Hkv, L, D] with Hkv * D = channels; float32, float16 or bfloat16; NumPy, torch CPU or DLPack.

        Returns:
            float32 [B, L] of the kind of `k`: entry j scores the gap between keys j and j + 1. The first w - 1 and the
                last w gaps, whose windows are not full, are -100; so are all gaps of an input shorter than two windows.

        Raises:
            TypeError: naming `k`.
            ValueError: naming `k`, or the predictor where its width does not fit or it has networks of single layers
                only.
        """
        kind = kind_of(k, "k")
        k = kind.accept(k, "k")
        check_rank(k, "k", "[B, Hkv, L, D]")
        out = empty((k.shape[0], k.shape[2]), np.float32, "k")
        _core.predictor_logits(self._args(), k, out, get_num_threads())
        return kind.result(out)

    def _args(self) -> tuple[Any, ...]:
        """Return the arguments that _core takes."""
        if self._core_args is None:
            raise ValueError(
                f"predictor: has networks of layers {_listed(self.layers)} only; take one of them by .layer(number)"
            )
        return self._core_args


_ALONE: dict[str, Any] = {"layers": (), "_layers": {}}


def _make(**fields: Any) -> BoundaryPredictor:
    self = object.__new__(BoundaryPredictor)
    for name, value in fields.items():
        object.__setattr__(self, name, value)
    return self


def _network(
    state_dict: Mapping[str, ArrayLike], layer: int | None, heads: int | None, window: int
) -> BoundaryPredictor:
    """Return one network, checked."""
    where = "state_dict" if layer is None else f"state_dict: layer {layer}"
    kind = next((kind for kind, a in ARCHITECTURES.items() if a.anchor in state_dict), None)
    if kind is None:  # the most similar one, for the message about what is missing
        kind = max(ARCHITECTURES, key=lambda kind: len(ARCHITECTURES[kind].parameters.keys() & state_dict.keys()))
    parameters = ARCHITECTURES[kind].parameters
    if missing := [name for name in parameters if name not in state_dict and name not in ARCHITECTURES[kind].optional]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    if unknown := [str(name)[:80] for name in state_dict if name not in parameters]:
        few = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} others" if len(unknown) > 8 else "")
        raise ValueError(f"{where}: unknown parameters {few}; expected {', '.join(parameters)}")
    arrays = {name: _float32(state_dict[name], name) for name in parameters if name in state_dict}
    letters = {letter: _size(arrays, kind, name, axis) for letter, (name, axis) in SIZES[kind].items()}
    for name, array in arrays.items():
        expected = tuple(_dimension(size, letters) for size in parameters[name])
        if array.shape != expected:
            given = ", ".join(f"{letter} = {size}" for letter, size in letters.items())
            raise ValueError(
                f"{name}: expected shape {list(expected)} ([{', '.join(parameters[name])}] with {given}), "
                f"got {list(array.shape)}"
            )
    channels = letters["C"]
    if ARCHITECTURES[kind].heads:
        if heads is None:
            raise ValueError("heads: needed for the paper's network (4 or 8 in the paper)")
        heads = check_int(heads, "heads", 1, 65536)
        if channels % heads:
            raise ValueError(f"heads: {heads} heads do not divide the {channels} channels of {ANCHORS[0]}")
    elif heads is not None:
        raise ValueError(f"heads: the compact network has no attention heads; expected None, got {heads}")
    ordered = tuple(arrays.get(name) for name in parameters)
    return _make(
        architecture=kind,
        channels=channels,
        heads=heads,
        hidden=letters["N"],
        window=window,
        gated="pool.gate.weight" in arrays,
        shared=True,
        model=None,
        notes={},
        _weights=arrays,
        _core_args=(window, *ordered) if heads is None else (heads, window, *ordered),
        **_ALONE,
    )


def _dimension(size: str, letters: dict[str, int]) -> int:
    """Return the number that "3C", "4C+1", "N" or "1" stands for."""
    found = re.fullmatch(r"(\d*)([A-Z]?)(\+\d+)?", size)
    assert found is not None  # sizes are those of ARCHITECTURES
    times, letter, plus = found.groups()
    return int(times or 1) * letters.get(letter, 1) + int(plus or 0)


@functools.cache
def _shipped() -> BoundaryPredictor:
    with resources.as_file(resources.files("dhsa") / "weights" / SHIPPED) as path:
        return BoundaryPredictor.load(path)


def _rebuild(
    state_dict: dict[str, np.ndarray],
    heads: int | None,
    window: int,
    model: dict[str, Any] | None,
    notes: dict[str, str],
) -> BoundaryPredictor:
    return BoundaryPredictor.from_state_dict(state_dict, heads=heads, window=window, model=model, notes=notes)


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


def _strip_prefix(state_dict: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """Return the mapping without a prefix that all names have in common, as wrapper modules add one."""
    names = [name for name in state_dict if isinstance(name, str)]
    for name in names:
        for anchor in ANCHORS:
            if name.endswith(anchor):
                prefix = re.sub(r"layers\.\d+\.$", "", name[: -len(anchor)])
                if prefix and len(names) == len(state_dict) and all(other.startswith(prefix) for other in names):
                    return {other[len(prefix) :]: value for other, value in state_dict.items()}
    return dict(state_dict)


def _float32(value: Any, name: str) -> np.ndarray:
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


def _size(arrays: dict[str, np.ndarray], kind: str, name: str, axis: int) -> int:
    shape = arrays[name].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{name}: expected shape [{', '.join(ARCHITECTURES[kind].parameters[name])}], got {list(shape)}"
        )
    return int(shape[axis])


def _stored_int(stored: dict[str, str], name: str, path: str) -> int:
    try:
        return int(stored[name])
    except ValueError:
        raise ValueError(f"{name}: {path} stores {stored[name][:80]!r}, expected an int") from None


def _stored_model(stored: dict[str, str], path: str) -> dict[str, Any] | None:
    if "model" not in stored:
        return None
    try:
        model = json.loads(stored["model"])
    except (ValueError, RecursionError):
        model = None
    if not isinstance(model, dict):
        raise ValueError(f"model: {path} stores {stored['model'][:80]!r}, expected a JSON object")
    return model


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


@functools.lru_cache(maxsize=256)
def _digest(predictor: BoundaryPredictor) -> str:
    found = hashlib.sha256(repr((predictor.heads, predictor.window)).encode())
    for name, array in sorted(predictor.state_dict().items()):
        found.update(repr((name, array.shape, str(array.dtype))).encode() + array.tobytes())
    return found.hexdigest()
