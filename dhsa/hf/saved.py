"""Caches in files, so that a prompt is read once: `save_cache` and `load_cache`.

A file is in the safetensors format. It holds the keys and values of each layer, their key indexes and the ids of the
tokens. Its metadata describe these tensors and the model. Keys and values are mapped into memory copy-on-write, with
room for new ones behind them: they are not read before they are attended to, and the file never changes. Nothing in a
file is executed, and all sizes, offsets and descriptions are checked before they are used.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dhsa._safetensors import WIDTHS, Entry, read_header, write

from . import switching
from .caches import InFile, restore, stored
from .compat import SWITCHING
from .switching import IMPLEMENTATION, STATE
from .wrappers import unwrapped

__all__ = ["SavedCache", "load_cache", "save_cache"]

FORMAT = 1
ROOM = 1024  # the most tokens that a file has room for behind its own; beyond, they are copied once and have room again
DTYPES = {"float32": (torch.float32, "F32"), "float16": (torch.float16, "F16"), "bfloat16": (torch.bfloat16, "BF16")}
MAX_LENGTH, MAX_SIZE = 2**31 - 1, 2**20
SAMPLES, RUN = 4, 16  # of each weight, so many runs of so many numbers make the fingerprint
# Settings that say nothing of what a model computes.
_INCIDENTAL = {*SWITCHING, "_name_or_path", "transformers_version", "architectures", "use_cache", "attn_implementation"}


class SavedCache(DynamicCache):
    """The cache that `load_cache` returns: a transformers `DynamicCache`.

    Attributes:
        tokens: int64 [B, L], the ids of the tokens whose keys and values it held when it was saved.
        attention: the attention by which these were read: "sdpa" or another of transformers' names, or the text of a
            `dhsa.Config`, and of the layers that it was for if it was not for all of them.
    """

    def __init__(self, layers: list[Any], tokens: torch.Tensor, attention: str) -> None:
        super().__init__()
        self.layers = layers
        self.layer_class_to_replicate = None
        self.tokens = tokens
        self.attention = attention


@dataclass
class _Room:
    """Memory [B, Hkv, room, D] whose first `filled` rows of each head are in use: by a layer, by a shallow copy of it
    that shares this object, or by views from before the layer was cropped."""

    memory: torch.Tensor
    filled: int


class RoomyLayer(DynamicLayer):
    """A layer with room behind its keys and values. New ones are written there, where `DynamicLayer` copies all of them
    in each step. `keys` and `values` are views of the beginning of that memory. What was once written there is not
    overwritten: after `crop`, the next keys and values go to a new memory."""

    _key_room: _Room | None = None
    _value_room: _Room | None = None

    def hold(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Begin with the first `length` keys and values of [B, Hkv, room, D]."""
        self.lazy_initialization(keys, values)
        self._key_room, self._value_room = _Room(keys, length), _Room(values, length)
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plain = torch.compiler.is_compiling() or not self.is_initialized or not self.get_seq_length()
        if plain or (torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)):
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self._key_room = _append(self.keys, self._key_room, key_states)
        self.values, self._value_room = _append(self.values, self._value_room, value_states)
        return self.keys, self.values


def _append(held: torch.Tensor, room: _Room | None, new: torch.Tensor) -> tuple[torch.Tensor, _Room]:
    """`held` and then `new`, along dimension 2, and the memory in which both lie: `room`, if `held` is all that is in
    use of it and the rest is large enough."""
    length, total = held.shape[2], held.shape[2] + new.shape[2]
    if room is None or total > room.memory.shape[2] or length != room.filled or not _begins(room.memory, held):
        with torch.inference_mode(False):  # a tensor of inference mode could not be written to after it
            room = _Room(held.new_empty((*held.shape[:2], total + _room(total), held.shape[3])), length)
        room.memory[:, :, :length] = held
    room.memory[:, :, length:total] = new
    room.filled = total
    return room.memory[:, :, :total], room


def _begins(memory: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether `held` is still the beginning of `memory`: reordered beams and selected rows lie elsewhere."""
    same = held.data_ptr() == memory.data_ptr() and held.stride() == memory.stride()
    return same and held.shape[:2] == memory.shape[:2]


def _room(length: int) -> int:
    return min(ROOM, length // 8 + 64)


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_cache(
    cache: Any, path: str | os.PathLike[str], *, model: torch.nn.Module, tokens: Any, bits: int | None = None
) -> None:
    """Write a cache to a file, so that `load_cache` can open it in another process.

    The file is written under another name and renamed when it is complete. What `dhsa` has stored about the keys (their
    chunk boundaries, and the means of chunks) is saved with it.

    Args:
        cache: a transformers `DynamicCache`, of layers that keep all keys or those of a sliding window; on the CPU, in
            float32, float16 or bfloat16. It stays as it is.
        path: the file.
        model: the model that made the cache, or a module that wraps it. Its config and a sample of each weight (of a
            tensor subclass, as packages for quantization have: only its shape and dtype) are noted, so that a file is
            not used with another model.
        tokens: int [B, L] (or [L] for a batch of one), the ids of the tokens whose keys and values the cache holds,
            padding included. After `generate` these are all but the last one: `out[:, :-1]`.
        bits: 8: keys and values are rounded to 8-bit integers, with a factor for each token and KV head. The file is
            about half as large, or a quarter for float32, and chunk boundaries are not saved. None: not rounded.

    Raises:
        TypeError: an argument of the wrong type (a static cache, for example); the message names it.
        ValueError: `tokens` are not those of the cache; the message names what differs. Or a number is not finite, with
            `bits`; or the cache was loaded from a file in which a key index is damaged.
        NotImplementedError: the cache has layers of another kind (quantized, of linear attention), or lies on another
            device.
        OSError: the file cannot be written.
    """
    write_cache(cache, path, model=model, tokens=tokens, bits=bits)


def write_cache(
    cache: Any,
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module,
    tokens: Any,
    bits: int | None = None,
    notes: Mapping[str, str] | None = None,
    max_bytes: int | None = None,
) -> None:
    """`save_cache` with further entries of the metadata, whose names there begin with "note.", and with a largest size
    of the file, above which it raises `TooLargeError` and writes nothing."""
    _refuse_big_endian()
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list) or not isinstance(cache, DynamicCache):
        raise TypeError(f"cache: expected a transformers DynamicCache, got {type(cache).__name__}")
    if bits not in (None, 8) or isinstance(bits, bool):
        raise ValueError(f"bits: got {bits!r}, expected 8 or None")
    path = os.fspath(path)
    made_by = fingerprint(model)
    ids = _ids(tokens, "tokens")
    described = [_describe(i, layer, ids.shape) for i, layer in enumerate(layers)]
    full = [layer.keys for layer, about in zip(layers, described, strict=True) if about["size"]]
    if not full:
        raise ValueError("cache: is empty, expected one that a prompt was read into")
    if len({keys.dtype for keys in full}) > 1:
        raise NotImplementedError(
            f"cache: has layers of {_listed({str(keys.dtype) for keys in full})}, expected one dtype"
        )
    room = _room(ids.shape[1])
    names = {dtype: (name, code) for name, (dtype, code) in DTYPES.items()}
    name, code = names[full[0].dtype]
    tensors: dict[str, tuple[str, tuple[int, ...], Any]] = {}
    parts: dict[str, tuple[str, tuple[int, ...], Any]] = {}
    for i, (layer, about) in enumerate(zip(layers, described, strict=True)):
        if not about["size"]:
            continue
        heads, length, *_ = about["size"]
        about["room"] = room if about["kind"] == "full" and bits is None else 0
        for which in ("keys", "values"):
            held = getattr(layer, which).detach()[:, :, -length:]
            entry = f"layers.{i}.{which}"
            if bits is None:
                shape = (held.shape[0], heads, length + about["room"], held.shape[3])
                tensors[entry] = (code, shape, _pieces(held, about["room"]))
            else:
                scale = _scale(held, entry)
                parts[f"{entry}.scale"] = ("F32", tuple(scale.shape), [_bytes(scale)])
                tensors[entry] = ("I8", tuple(held.shape), _rounded(held, scale))
        found, about["cuts"] = stored(layer) if bits is None and about["kind"] == "full" else ({}, None)
        about["index"] = [[*at, hashlib.sha256(written).hexdigest()] for at, written in found.items()]
        for (row, start), written in found.items():
            parts[f"layers.{i}.index.{row}.{start}"] = ("U8", (len(written),), [written])
    tensors |= {"tokens": ("I64", tuple(ids.shape), [_bytes(ids)]), **parts}
    about = {
        "format": FORMAT,
        "batch": ids.shape[0],
        "length": ids.shape[1],
        "dtype": name,
        "bits": bits,
        "layers": described,
        "model": made_by,
        "attention": attention_of(model),
        "tokens": digest(ids),
    }
    text = json.dumps(about)
    noted = {f"note.{key}": value for key, value in (notes or {}).items()}
    write(path, tensors, {"dhsa": text, "sha256": hashlib.sha256(text.encode()).hexdigest(), **noted}, max_bytes)


def _refuse_big_endian() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("files of caches need a machine whose byte order is little-endian")


def _ids(value: Any, name: str) -> torch.Tensor:
    """`value` as int64 [B, L]; TypeError or ValueError that names the argument."""
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected ids [B, L], got {type(value).__name__}") from None
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"{name}: expected ids of an integer dtype, got {ids.dtype}")
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"{name}: expected ids [B, L], got shape {list(ids.shape)}")
    return ids.detach().to("cpu", torch.int64).contiguous()


def _describe(i: int, layer: Any, shape: torch.Size) -> dict[str, Any]:
    """What a file says of a layer: its kind, window and size [Hkv, length, key width, value width]."""
    kind = {DynamicLayer: "full", RoomyLayer: "full", DynamicSlidingWindowLayer: "sliding"}.get(type(layer))
    if type(layer).__name__ == "DummyLayer":  # of layers without keys of their own; no such class before 5.20
        return {"kind": "none", "window": None, "size": None}
    if kind is None:
        raise NotImplementedError(
            f"cache: layer {i} is a {type(layer).__name__}; layers that can be saved are DynamicLayer and "
            "DynamicSlidingWindowLayer"
        )
    window = layer.sliding_window if kind == "sliding" else None
    if not layer.is_initialized or layer.keys is None or layer.keys.numel() == 0:
        return {"kind": kind, "window": window, "size": None}
    keys, values, seen = layer.keys, layer.values, int(layer.get_seq_length())
    if seen != shape[1] or keys.shape[0] != shape[0]:
        raise ValueError(
            f"tokens: [{shape[0]}, {shape[1]}] ids, but layer {i} of the cache holds {seen} tokens of {keys.shape[0]} "
            "sequences; give the ids of just these (after `generate`, all but the last one)"
        )
    for which, tensor in (("keys", keys), ("values", values)):
        if tensor.device.type != "cpu":
            raise NotImplementedError(f"cache: {which} of layer {i} are on {tensor.device}, expected cpu")
        if tensor.dtype not in {dtype for dtype, _ in DTYPES.values()}:
            raise NotImplementedError(
                f"cache: {which} of layer {i} are {tensor.dtype}, expected one of {_listed(DTYPES)}"
            )
    length = seen if window is None else min(seen, max(window - 1, 1))  # more are there while steps may be taken back
    if keys.shape[2] < length or values.shape[2] != keys.shape[2]:
        raise ValueError(f"cache: layer {i} holds {keys.shape[2]} keys and {values.shape[2]} values, expected {length}")
    return {"kind": kind, "window": window, "size": [keys.shape[1], length, keys.shape[3], values.shape[3]]}


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _pieces(held: torch.Tensor, room: int) -> Iterator[Any]:
    """The bytes of [B, Hkv, L, D], with `room` more rows of zeros after those of each head."""
    for row in held:
        for head in row:
            yield _bytes(head)
            yield room * head.shape[1] * head.element_size()


def _scale(held: torch.Tensor, name: str) -> torch.Tensor:
    """The factors by which the rows of [B, Hkv, L, D] are rounded to 8 bits, float32 [B, Hkv, L]."""
    scale = held.abs().amax(-1).float() / 127
    if not torch.isfinite(scale).all():
        raise ValueError(f"bits: {name} has numbers that are not finite, which 8 bits cannot hold; expected bits=None")
    return scale


def _rounded(held: torch.Tensor, scale: torch.Tensor) -> Iterator[Any]:
    """The bytes of [B, Hkv, L, D] in 8 bits."""
    divisor = scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    for row in range(held.shape[0]):
        for head in range(held.shape[1]):
            yield _bytes((held[row, head] / divisor[row, head]).round_().to(torch.int8))


# ---- what a file is of -----------------------------------------------------------------------------------------------


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """What a file notes of a model: its config, and a hash over the names, shapes and dtypes of its weights and over a
    sample of the numbers of each that is no tensor subclass."""
    inner = unwrapped(model)
    hashed = hashlib.sha256()
    for name, weight in inner.state_dict().items():
        if not isinstance(weight, torch.Tensor):
            continue
        if weight.device.type == "meta":
            raise ValueError(f"model: weight {name} is on the meta device, expected weights that are loaded")
        hashed.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        if type(weight) in (torch.Tensor, torch.nn.Parameter):  # packages keep packed numbers in subclasses
            flat = weight.detach().reshape(-1)
            for at in range(0, flat.numel(), max(RUN, -(-flat.numel() // SAMPLES))):
                hashed.update(_bytes(flat[at : at + RUN].cpu()))
    for module in inner.modules():  # which adapters are at work
        if isinstance(off := getattr(module, "disable_adapters", None), bool):
            hashed.update(
                f"{off} {getattr(module, 'active_adapters', None)} {getattr(module, 'merged', None)};".encode()
            )
    values = json.loads(json.dumps(_content(inner.config.to_dict()), default=str))
    return {"kind": type(inner).__name__, "config": values, "weights": hashed.hexdigest()}


def _content(values: Any) -> Any:
    """A config's settings without those that say nothing of what it computes."""
    if isinstance(values, dict):
        return {str(key): _content(value) for key, value in values.items() if key not in _INCIDENTAL}
    return [_content(value) for value in values] if isinstance(values, (list, tuple)) else values


def attention_of(model: torch.nn.Module) -> str:
    """What `SavedCache.attention` says of a model."""
    inner = unwrapped(model)
    name, state = inner.config._attn_implementation, inner.__dict__.get(STATE)
    if name != IMPLEMENTATION:
        return str(name)
    if state is None:
        return repr(switching.DEFAULT)
    return repr(state.config) if state.layers is None else f"{state.config!r} in layers {sorted(state.layers)}"


def digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(repr(tuple(ids.shape)).encode() + bytes(_bytes(ids))).hexdigest()


def _refuse_other_model(about: dict[str, Any], model: torch.nn.Module) -> None:
    noted, mine = about["model"], fingerprint(model)
    if noted["kind"] != mine["kind"]:
        raise ValueError(f"was made with a {str(noted['kind'])[:80]}, expected a {mine['kind']}, as the model is")
    if json.dumps(noted["config"], sort_keys=True) != json.dumps(mine["config"], sort_keys=True):  # a NaN is itself
        both = {**noted["config"], **mine["config"]}
        names = [n for n in sorted(both) if noted["config"].get(n, "") != mine["config"].get(n, "")]
        name = names[0] if names else "a setting"
        raise ValueError(
            f"was made with a model whose config has {name}={str(noted['config'].get(name))[:80]}, expected "
            f"{str(mine['config'].get(name))[:80]}, as this model has"
            + (f" (and {len(names) - 1} settings more differ)" if len(names) > 1 else "")
        )
    if noted["weights"] != mine["weights"]:
        raise ValueError("was made with a model of other weights than this one, expected the same")


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_cache(path: str | os.PathLike[str], model: torch.nn.Module, *, prompt: Any = None) -> SavedCache:
    """Open a cache that `save_cache` wrote.

    To continue the prompt, call `model.generate(ids, cache=cache)` (before transformers 5.24, `past_key_values=cache`),
    where `ids` are `cache.tokens` and the tokens that follow. Each call of `load_cache` returns an independent cache,
    so several questions about one text can be asked.

    Keys and values are mapped into memory, not read. While the cache is in use, the file may be replaced or deleted,
    but it must not be written to: the numbers would change, and if it became shorter, the operating system would end
    the process. Files with 8 bits are read and decoded at once.

    Args:
        path: the file.
        model: the model that made it, or a module that wraps it: of the same config and weights.
        prompt: int [B, N] (or [N]), ids that have to begin with those of the file. None: not checked.

    Returns:
        The cache, with the ids of its tokens as `tokens`.

    Raises:
        TypeError: an argument of the wrong type; the message names it.
        ValueError: the file is damaged, of a newer format, or of another model or prompt; the message names the file,
            what was found and what was expected.
        OSError: the file cannot be read.
    """
    path = os.fspath(path)
    asked = None if prompt is None else _ids(prompt, "prompt")
    unwrapped(model)
    with torch.inference_mode(False), torch.no_grad(), _naming(path):
        about, entries, mapped = _open(path)
        _refuse_other_model(about, model)
        tokens = _copy(mapped, entries["tokens"], torch.int64)
        if digest(tokens) != about["tokens"]:
            raise ValueError("has token ids that were changed, expected those of its metadata")
        if asked is not None:
            _refuse_other_prompt(tokens, asked)
        layers = [_layer(i, each, about, entries, mapped, path) for i, each in enumerate(about["layers"])]
    return SavedCache(layers, tokens, about["attention"])


class _naming:
    """Names the file in a ValueError."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if type(error) is ValueError and not str(error).startswith(("model: ", f"{self._path}: ")):
            raise ValueError(f"{self._path}: {error}") from None


def _open(path: str) -> tuple[dict[str, Any], dict[str, Entry], mmap.mmap]:
    """What a file says, checked; where its tensors lie; and the file, mapped."""
    _refuse_big_endian()
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
        raise ValueError("is not a regular file, expected one that save_cache wrote")
    with open(path, "rb") as file:
        metadata, entries = read_header(file)
        about = _about(metadata)
        expected = dict(_expected(about))
        for name, (dtype, shape) in expected.items():
            if name not in entries:
                raise ValueError(f"has no tensor {name!r}, expected it by its metadata")
            found = entries[name]
            fits = len(found.shape) == 1 if shape is None else found.shape == shape
            if found.dtype != dtype or not fits:
                raise ValueError(
                    f"has tensor {name!r} of {found.dtype} {list(found.shape)}, expected {dtype} "
                    f"{'of one dimension' if shape is None else list(shape)} by its metadata"
                )
            if dtype in ("F32", "F16", "BF16") and found.start % WIDTHS[dtype]:
                raise ValueError(f"has tensor {name!r} at byte {found.start}, expected a multiple of {WIDTHS[dtype]}")
        if others := sorted(entries.keys() - expected.keys()):
            raise ValueError(f"has tensor {others[0][:80]!r}, of which its metadata say nothing")
        return about, entries, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _about(metadata: dict[str, str]) -> dict[str, Any]:
    if "dhsa" not in metadata:
        raise ValueError("is a safetensors file without metadata of dhsa, expected one that save_cache wrote")
    try:
        about = json.loads(metadata["dhsa"])
        if type(about["format"]) is not int:
            raise TypeError
    except (ValueError, RecursionError, TypeError, KeyError):
        raise ValueError("has metadata that cannot be read, expected those that save_cache writes") from None
    if about["format"] != FORMAT:
        raise ValueError(
            f"is of format {about['format']}, expected {FORMAT}, which this version of dhsa reads"
            + ("; a newer version has written it" if about["format"] > FORMAT else "")
        )
    if metadata.get("sha256") != hashlib.sha256(metadata["dhsa"].encode()).hexdigest():
        raise ValueError("has metadata that were changed, expected those of its checksum")
    try:
        _check(about)
    except (TypeError, KeyError, AttributeError):
        raise ValueError("has metadata that are not complete, expected those that save_cache writes") from None
    return about


def _check(about: dict[str, Any]) -> None:
    """ValueError for a number that cannot be; TypeError, KeyError or AttributeError for what is no such thing."""

    def number(value: Any, name: str, most: int = MAX_SIZE, least: int = 1) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"has {name} {str(value)[:40]!r} in its metadata, expected {least} to {most}")
        return value

    batch = number(about["batch"], "batch")
    length = number(about["length"], "length", MAX_LENGTH)
    if about["dtype"] not in DTYPES or about["bits"] not in (None, 8):
        raise ValueError(
            f"has dtype {str(about['dtype'])[:40]} and bits {str(about['bits'])[:40]}, which are not known"
        )
    noted = about["model"]
    if not isinstance(noted["config"], dict) or not all(isinstance(noted[n], str) for n in ("kind", "weights")):
        raise TypeError
    if not isinstance(about["attention"], str) or not isinstance(about["tokens"], str):
        raise TypeError
    if not isinstance(about["layers"], list) or not 1 <= len(about["layers"]) <= 4096:
        raise TypeError
    for layer in about["layers"]:
        kind, size = layer["kind"], layer["size"]
        if kind not in ("full", "sliding", "none") or (kind == "none" and size is not None):
            raise ValueError(f"has a layer of kind {str(kind)[:40]!r}, which is not known")
        window = number(layer["window"], "window", MAX_LENGTH) if kind == "sliding" else length + 1
        if size is None:
            continue
        if not isinstance(size, list) or len(size) != 4:
            raise TypeError
        heads, held, *widths = size
        number(heads, "heads")
        if number(held, "length of a layer", length) != min(length, max(window - 1, 1)):
            raise ValueError(
                f"has a layer of {held} keys, expected {min(length, max(window - 1, 1))} of {length} tokens"
            )
        for width in widths:
            number(width, "width")
        number(layer["room"], "room", MAX_LENGTH - length, 0)
        if not isinstance(layer.get("cuts"), str | None):
            raise TypeError
        seen = set()
        for at in layer["index"]:
            if not isinstance(at, list) or len(at) != 3 or not re.fullmatch("[0-9a-f]{64}", at[2]):
                raise TypeError
            seen.add((number(at[0], "row", batch - 1, 0), number(at[1], "start", length, 0)))
        if len(seen) != len(layer["index"]):
            raise ValueError("names an index twice in its metadata")


def _expected(about: dict[str, Any]) -> Iterator[tuple[str, tuple[str, tuple[int, ...] | None]]]:
    """Name, dtype and shape (None: any length) of each tensor that a file must have."""
    yield "tokens", ("I64", (about["batch"], about["length"]))
    for i, layer in enumerate(about["layers"]):
        if layer["size"] is None:
            continue
        heads, held, *widths = layer["size"]
        for which, width in zip(("keys", "values"), widths, strict=True):
            shape = (about["batch"], heads, held + layer["room"])
            yield f"layers.{i}.{which}", ("I8" if about["bits"] else DTYPES[about["dtype"]][1], (*shape, width))
            if about["bits"]:
                yield f"layers.{i}.{which}.scale", ("F32", shape)
        for row, start, _ in layer["index"]:
            yield f"layers.{i}.index.{row}.{start}", ("U8", None)


def _tensor(mapped: mmap.mmap, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(mapped, dtype=dtype, count=math.prod(entry.shape), offset=entry.start).view(entry.shape)


def _copy(mapped: mmap.mmap, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(mapped[entry.start : entry.stop]), dtype=dtype).view(entry.shape)


def _refuse_other_prompt(tokens: torch.Tensor, prompt: torch.Tensor) -> None:
    length = tokens.shape[1]
    if prompt.shape[0] != tokens.shape[0] or prompt.shape[1] < length:
        raise ValueError(
            f"holds [{tokens.shape[0]}, {length}] tokens, expected a prompt that begins with them, got "
            f"{list(prompt.shape)} ids"
        )
    if not torch.equal(prompt[:, :length], tokens):
        row, at = map(int, (prompt[:, :length] != tokens).nonzero()[0])
        raise ValueError(
            f"holds {length} tokens of another prompt: token {at} of row {row} is {int(tokens[row, at])}, "
            f"expected {int(prompt[row, at])}"
        )


def _layer(
    i: int, about: dict[str, Any], whole: dict[str, Any], entries: dict[str, Entry], mapped: mmap.mmap, path: str
) -> Any:
    """The layer of a cache that a file describes."""
    if about["kind"] == "none":
        from transformers.cache_utils import DummyLayer

        return DummyLayer()
    layer = DynamicSlidingWindowLayer(about["window"]) if about["kind"] == "sliding" else RoomyLayer()
    if about["size"] is None:
        return layer
    held, dtype, name = about["size"][1], DTYPES[whole["dtype"]][0], f"layers.{i}"
    if whole["bits"]:
        room = _room(held) if about["kind"] == "full" else 0
        keys, values = (_decoded(mapped, entries, f"{name}.{which}", dtype, room) for which in ("keys", "values"))
    else:
        keys, values = (_tensor(mapped, entries[f"{name}.{which}"], dtype) for which in ("keys", "values"))
    if isinstance(layer, RoomyLayer):
        layer.hold(keys, values, held)
        written = {}
        for row, at, checksum in about["index"]:
            entry = entries[f"{name}.index.{row}.{at}"]
            written[row, at] = InFile(path, memoryview(mapped)[entry.start : entry.stop], checksum)
        if written:
            restore(layer, whole["batch"], written, about.get("cuts"))  # files of 0.1 do not say
    else:
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        layer.cumulative_length = whole["length"]
    return layer


def _decoded(mapped: mmap.mmap, entries: dict[str, Entry], name: str, dtype: torch.dtype, room: int) -> torch.Tensor:
    """[B, Hkv, L + room, D] of numbers that were rounded to 8 bits."""
    whole, scale = _tensor(mapped, entries[name], torch.int8), _copy(mapped, entries[f"{name}.scale"], torch.float32)
    batch, heads, length, width = whole.shape
    out = torch.empty((batch, heads, length + room, width), dtype=dtype)
    for row in range(batch):
        for head in range(heads):
            torch.mul(whole[row, head], scale[row, head, :, None], out=out[row, head, :length])
    return out
