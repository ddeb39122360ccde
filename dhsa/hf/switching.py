"""Switching a model's attention to implementation "dhsa" and back, and the state that a patched model has."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dhsa.config import Config, LayerConfigs
from dhsa.predictor import TRAIN

from .caches import unwatch, watch
from .compat import SWITCHING, reads_mask
from .handles import HANDLE, note
from .refusals import check_padding
from .sharing import HOOKS, Sharing, attach, attach_one, attached, detach
from .wrappers import unwrapped

if TYPE_CHECKING:
    from .parallel import Parallel

__all__ = [
    "DEFAULT",
    "EXACT",
    "IMPLEMENTATION",
    "STATE",
    "State",
    "as_config",
    "attention_modules",
    "by_config",
    "config_of",
    "model_facts",
    "own_networks",
    "patch",
    "patched",
    "set_default",
    "unpatch",
]

IMPLEMENTATION = "dhsa"
EXACT = Config(budget=None)
DEFAULT: Config | LayerConfigs = (
    Config()
)  # of models that are not patched, and of `patch` without a config; see `set_default`
Wrapped = TypeVar("Wrapped", bound=torch.nn.Module)  # a transformers model, or a module around one
TUNE = "python -m dhsa tune --model MODEL --out FILE"
STATE = "_dhsa_state"  # on a patched model and on its modules
# The config objects of patched models, by their id, and the open blocks of `patched` of a model, the innermost last.
_copies: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_blocks: weakref.WeakKeyDictionary[torch.nn.Module, list[_Block]] = weakref.WeakKeyDictionary()
FACTS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


class Entry(NamedTuple):
    """What `patch` may change of a module: one of its configs, its State (`old` None: it had none), or the Sharing that
    its hooks are for."""

    module: torch.nn.Module
    name: str
    old: Any
    new: Any


@dataclass(frozen=True)
class State:
    """What `patch` stores on a model: its Config or LayerConfigs, its layers, the implementation that its configs named
    before, and all that `unpatch` restores."""

    config: Config | LayerConfigs
    layers: frozenset[int] | None
    former: tuple[tuple[Any, str | None], ...]
    own: Mapping[int, Config] = field(default_factory=dict)  # for layers that have a boundary network of their own
    sharing: Sharing = field(default_factory=Sharing)
    parallel: Parallel | None = None  # of a model that is patched with a group
    entries: tuple[Entry, ...] = ()
    edits: tuple[tuple[Any, Any, dict[str, Any]], ...] = ()  # (config before, the model's copy, its values at first)

    def config_for(self, layer: int | None) -> Config:
        if self.layers is not None and layer not in self.layers:
            return EXACT
        if layer is not None and layer in self.own:
            return self.own[layer]
        return self.config.at(layer) if isinstance(self.config, LayerConfigs) else self.config

    @property
    def needs_forward(self) -> bool:
        """Whether layers use what other layers of a forward pass found, so that hooks must show where it begins."""
        given = self.config
        if isinstance(given, Config):
            return given.share is not None or given.options.remembers == "layers"
        configs = (given.default, *given.layers.values())
        return bool(given.reuse) or given.share is not None or any(c.options.remembers == "layers" for c in configs)

    def reuse_of(self, layer: int | None) -> tuple[bool, tuple[int, tuple[int, ...] | None] | None]:
        """Whether a layer takes part in `LayerConfigs.reuse`; its anchor and heads, or None if it is an anchor."""
        if not isinstance(self.config, LayerConfigs) or layer is None:
            return False, None
        of = self.config.reuse.get(layer)
        return of is not None or any(layer == anchor for anchor, _ in self.config.reuse.values()), of

    def dense_anchor(self, layer: int | None) -> bool:
        """Whether a layer attends to all keys and selects for others (`LayerConfigs.dense_anchors`)."""
        return isinstance(self.config, LayerConfigs) and layer in self.config.dense_anchors


def config_of(module: torch.nn.Module) -> Config:
    """The Config of an attention module, patched or not. Raises ValueError if the configs of `set_default` are for
    another model than that of the module, RuntimeError if the module was put into a patched model."""
    layer = getattr(module, "layer_idx", None)
    state: State | None = module.__dict__.get(STATE)
    if state is not None:
        return state.config_for(layer)
    if id(getattr(module, "config", None)) in _copies and _may_attend(module):
        raise RuntimeError(
            f"{type(module).__name__} (layer {layer}) was put into the model after dhsa.patch, which did not see it; "
            "call dhsa.patch again"
        )
    if not isinstance(DEFAULT, LayerConfigs):
        return DEFAULT
    if layer is not None and DEFAULT.model is not None:
        _refuse_other_model(DEFAULT.model, module)
    return DEFAULT.at(layer)


def as_config(config: object) -> Config | LayerConfigs:
    """What the argument `config` of `patch` stands for. Raises TypeError for what is none, and as `Config.load`."""
    if config is None:
        return DEFAULT
    if isinstance(config, (str, os.PathLike)):
        return Config.load(config)
    if not isinstance(config, (Config, LayerConfigs)):
        raise TypeError(
            "config: expected a dhsa.Config, dhsa.LayerConfigs, the path of a file of them, or None, got "
            f"{type(config).__name__}"
        )
    return config


def by_config(config: Config | LayerConfigs, layers: Iterable[int]) -> dict[Config, list[int]]:
    """The layers of each Config."""
    found: dict[Config, list[int]] = {}
    for layer in layers:
        found.setdefault(config.at(layer) if isinstance(config, LayerConfigs) else config, []).append(layer)
    return found


def patch(
    model: Wrapped,
    config: Config | LayerConfigs | str | os.PathLike[str] | None = None,
    layers: Iterable[int] | None = None,
    *,
    group: Any = None,
    timeout: float | None = None,
) -> Wrapped:
    """Switch the attention of `model` to this package, in place, and return the model.

    Patching a patched model replaces config and layers. The config is kept on the model, so that `generate` and
    pipelines need no additional arguments. `unpatch` undoes it, and `with patched(model, config):` does both.

    transformers stores the implementation in `model.config`, an object that models built from one config share. Until
    `unpatch`, `model` has its own copy of it, so that no other model is switched. A part of a patched model
    (`model.model`) may be patched as well, and must be unpatched first. A module that wraps one transformers model (a
    PEFT model, a compiled one) stands for that model.

    Args:
        model: a transformers model, or a module that wraps one.
        config: a `dhsa.Config`, or `dhsa.LayerConfigs` with one for each layer, or the path of a file of either. None:
            the default one. `Config(budget=None)` is exact.
        layers: the indices of the layers that may be sparse; the others are exact. None: all.
        group: a ProcessGroup of torch.distributed with backend gloo, or a DeviceMesh of one dimension: its ranks divide
            the tokens of each prompt among them, and every rank calls the model with the same inputs (context
            parallel). All ranks must patch the same model with the same config. None: this process computes all.
        timeout: with `group`, the seconds after which a rank that sends nothing is given up. None: 300.

    Raises:
        dhsa.GroupError: with `group`, another rank has another model, config or version, ended, or sends nothing.
        NotImplementedError: with `group`, what its ranks cannot divide; of a tensor-parallel model, lists that depend
            on all heads.
        TypeError: `model` neither is nor wraps a transformers model, or `config` is no Config.
        ValueError: a layer does not exist; the boundary predictor or the configs of layers were made for another model;
            the predictor lacks the network of a layer; the model cannot change its attention implementation; or as
            `Config.load`. The model is left as it was.
        OSError: the file of the config cannot be read.
    """
    given, model = model, unwrapped(model)
    parallel = None
    if group is not None:
        from .parallel import Parallel  # torch.distributed is needed for nothing else

        parallel = Parallel(model, group, timeout)
    elif timeout is not None:
        raise ValueError("timeout: is how long ranks wait for each other; give a group, or leave it out")
    try:
        _patch(model, config, layers, parallel)
    except BaseException as error:
        if parallel is not None:
            parallel.end(error)  # so that the other ranks can say why
        raise
    return given


def _patch(
    model: PreTrainedModel,
    config: Config | LayerConfigs | str | os.PathLike[str] | None,
    layers: Iterable[int] | None,
    parallel: Parallel | None,
) -> None:
    config = as_config(config)
    present = {m.layer_idx for m in attention_modules(model) if isinstance(getattr(m, "layer_idx", None), int)}
    chosen = None
    if layers is not None:
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"layers: expected layer indices or None, got {layers!r}")
        chosen = frozenset(_index(layer) for layer in layers)
        if missing := sorted(chosen - present):
            raise ValueError(f"layers: {missing} not in this model, whose layers are {_span(present)}")
    if isinstance(config, LayerConfigs):
        if config.model is not None:
            _refuse_other_model(config.model, model)
        if missing := sorted((set(config.layers) | set(config.reuse)) - present):
            raise ValueError(f"config: has configs of layers {missing}, but those of this model are {_span(present)}")
    own: dict[int, Config] = {}
    for one, of in by_config(config, present if chosen is None else chosen).items():
        own |= own_networks(model, one, of)
    if (kind := reads_mask(model)) is not None:
        raise ValueError(
            f'model: the layers of {kind!r} read the mask tensor themselves, which "dhsa" does not make; '
            'use attn_implementation="eager"'
        )
    if any(getattr(c, "output_attentions", False) for c in _configs(model)):
        raise ValueError(
            'model.config.output_attentions is True: "dhsa" never forms the attention weights; set it to False'
        )

    if heads_are_divided(model):
        for one in by_config(config, present if chosen is None else chosen):
            _refuse_all_heads(one)

    current: State | None = model.__dict__.get(STATE)
    before = _implementations(model)
    if current is not None and _on_top(current):
        former, entries, edits = current.former, current.entries, current.edits
    else:
        entries, edits = _own_configs(model)
        former = _implementations(model)
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        # transformers may only log a warning that it does not switch the whole model or a part of it.
        for part in (m for m in model.modules() if isinstance(m, PreTrainedModel)):
            if part.config._attn_implementation != IMPLEMENTATION and (part is model or _has_layers(part)):
                raise ValueError(f"{type(part).__name__} does not support changing its attention implementation")
    except Exception:
        if current is None or entries is not current.entries:
            _put_back(e for e in entries if e.new is not None)
        _restore(before)
        raise
    state = State(config, chosen, former, own, parallel=parallel, entries=entries, edits=edits)
    if parallel is not None:
        try:
            said = {
                "config": repr(config),
                "layers": None if chosen is None else sorted(chosen),
                "model": _facts(model),
            }
            reuse = isinstance(config, LayerConfigs) and bool(config.reuse)
            parallel.begin(list({state.config_for(layer): None for layer in sorted(present)}), said, reuse)
        except BaseException:
            if current is None or entries is not current.entries:
                _put_back(e for e in entries if e.new is not None)
            _restore(before)
            raise
    install(model, state)


def heads_are_divided(model: torch.nn.Module) -> bool:
    """Whether the model is tensor parallel, so that each rank has some of its heads."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return True
    weights = (weight for module in attention_modules(model) for weight in module.parameters())
    return any(place.is_shard() for weight in weights for place in getattr(weight, "placements", ()))


def _refuse_all_heads(config: Config) -> None:
    """Raises NotImplementedError for lists that depend on all heads of a layer."""
    why = "each rank of a tensor-parallel model has some heads of a layer, and would select otherwise than one process"
    if config.exact:
        return
    if (config.heads or config.options.heads) == "all":
        raise NotImplementedError(f"heads: {why}; expected 'head' or 'group', got 'all'")
    if config.options.has_chunks and config.boundaries != "fixed":
        raise NotImplementedError(f"boundaries: {why}; expected 'fixed', got {config.boundaries!r}")


def set_default(config: Config | LayerConfigs) -> None:
    """Makes `config` that of models that are loaded as "dhsa" and not patched, and of `patch` without a config. It must
    neither share between layers, nor have a method that remembers, nor choose keys in decoding steps, which need the
    hooks that `patch` puts on a model, nor have a predictor, whose networks `patch` compares with the model and gives
    to its layers."""
    global DEFAULT
    DEFAULT = config


def model_facts(model: torch.nn.Module) -> dict[str, Any]:
    """Return the properties that identify the model that a boundary predictor or configs of layers were made for.

    Args:
        model: a transformers model, or a module that wraps one.

    Returns:
        A dict of "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads" and
        "head_dim".
    """
    return _facts(unwrapped(model))


def _facts(module: torch.nn.Module) -> dict[str, Any]:
    text: Any = getattr(module, "config", None)
    if isinstance(text, PreTrainedConfig):
        text = text.get_text_config()
    return {name: getattr(text, name, None) for name in FACTS}


def _other_facts(noted: Mapping[str, Any], module: torch.nn.Module) -> str:
    """In what the model of `module` differs from the one that something was made for, in words; "" if in nothing."""
    have = _facts(module)
    other = [name for name in FACTS if name in noted and noted[name] != have[name]]
    if not other:
        return ""
    made = ", ".join(f"{name} {noted[name]!r}" for name in other)
    return f"for a model with {made}, but this one has " + ", ".join(f"{have[name]!r}" for name in other)


def _refuse_other_model(noted: Mapping[str, Any], module: torch.nn.Module) -> None:
    if other := _other_facts(noted, module):
        raise ValueError(f"config: made {other}; make one for it: {TUNE}")


def own_networks(model: PreTrainedModel, config: Config, layers: Iterable[int]) -> dict[int, Config]:
    """The configs of layers whose boundaries come from a network of their own, or whose method has options for each
    layer. Raises ValueError for those of another model, which would be meaningless, and for layers without any."""
    if config.options.made_for is not None and (other := _other_facts(config.options.made_for, model)):
        raise ValueError(f"method: {config.method!r} has options that were trained {other}; train them for it")
    if found := {layer: own for layer in layers if (own := config.options.of_layer(layer)) is not config.options}:
        return {layer: config.replace(method=own) for layer, own in found.items()}
    predictor = config.predictor
    if config.boundaries != "predictor" or predictor is None:
        return {}
    if predictor.model is not None and (other := _other_facts(predictor.model, model)):
        raise ValueError(f"predictor: trained {other}; train one for it: {TRAIN}")
    if not predictor.layers:
        return {}
    if not predictor.shared and (bare := sorted(set(layers) - set(predictor.layers))):
        raise ValueError(
            f"predictor: has networks of layers {list(predictor.layers)} only, none of {bare}; leave those exact by "
            f"layers={list(predictor.layers)}, or train one for all layers: {TRAIN}"
        )
    return {layer: config.replace(predictor=predictor.layer(layer)) for layer in layers}


def unpatch(model: Wrapped) -> Wrapped:
    """Give `model` the attention implementation that it had before `patch`, and return the model.

    The records that `last_run` reads are kept.

    Args:
        model: a patched model, or a module that wraps one.

    Raises:
        TypeError: `model` neither is nor wraps a transformers model.
        ValueError: `model` is not patched, or a part of it was patched later.
    """
    given, model = model, unwrapped(model)
    state: State | None = model.__dict__.get(STATE)
    if state is None:
        raise ValueError("model: not patched")
    if not _on_top(state):
        raise ValueError("model: a part of it, or a model that it is a part of, was patched later; unpatch that first")
    _take_off(model, state)
    return given


@contextmanager
def patched(
    model: Wrapped,
    config: Config | LayerConfigs | str | os.PathLike[str] | None = None,
    layers: Iterable[int] | None = None,
    *,
    group: Any = None,
    timeout: float | None = None,
) -> Iterator[Wrapped]:
    """`patch` for the duration of a with statement. Afterwards the model is as it was: patched by an outer one, or not
    at all.

    A model has one configuration at a time. So blocks for one model must nest, and all be in one thread. Where several
    threads use a model, patch it once, before they start.

    Args:
        model: as in `patch`.
        config: as in `patch`.
        layers: as in `patch`.
        group: as in `patch`.
        timeout: as in `patch`.

    Raises:
        TypeError, ValueError: as `patch`.
        RuntimeError: at its beginning, if a block for `model` is open in another thread; at its end, if a block that
            began later is still open. The model then keeps the configuration of that block until it ends.
    """
    given, model = model, unwrapped(model)
    blocks = _blocks.setdefault(model, [])
    block = _Block.of(model)
    if any(other.thread != block.thread for other in blocks):
        raise RuntimeError(
            "model: another thread is inside of a block of dhsa.patched for this model, which can have one "
            "configuration at a time; patch it once, before the threads start, or give each thread a copy"
        )
    patch(model, config, layers, group=group, timeout=timeout)
    state: State = model.__dict__[STATE]
    blocks.append(block)
    failed = False
    try:
        yield given
    except BaseException as error:
        failed = True
        if state.parallel is not None:
            state.parallel.end(error)
        raise
    finally:  # also if the model was unpatched or switched to another implementation in the block
        place = blocks.index(block)
        blocks.remove(block)
        if place == len(blocks):
            block.restore(model, state)
        else:
            later = blocks[place]
            later.outer, later.before, later.states = block.outer, block.before, block.states
            if not failed:
                raise RuntimeError(
                    "model: a block of dhsa.patched has ended before one that began later, whose configuration the "
                    "model has had since; blocks for one model must nest"
                )


class _Block:
    """A block of `patched`: its thread, and what the model goes back to at its end."""

    def __init__(self, outer: State | None, before: tuple[tuple[Any, str | None], ...], states: dict[Any, State]):
        self.thread = threading.get_ident()
        self.outer, self.before, self.states = outer, before, states

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Block:
        outer: State | None = model.__dict__.get(STATE)
        states = {m: m.__dict__[STATE] for m in model.modules() if STATE in m.__dict__}
        return cls(outer, _implementations(model) if outer is not None else (), states)

    def restore(self, model: PreTrainedModel, state: State) -> None:
        outer = self.outer
        if outer is None or state.entries is not outer.entries:
            _take_off(model, state)
        else:
            for module, name, _, new in outer.entries:
                if new is not None:
                    module.__dict__[name] = new
            for module in model.modules():
                if module not in self.states:
                    _forget(module)
                else:
                    module.__dict__[STATE] = self.states[module]
                    note(module)
            install(model, outer)
        _restore(self.before)


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that may call the attention function, by their layer index, or by their name if they have none (vision
    towers)."""
    return [m for m in model.modules() if _may_attend(m)]


def _may_attend(module: torch.nn.Module) -> bool:
    return hasattr(module, "layer_idx") or "Attention" in type(module).__name__


def install(model: torch.nn.Module, state: State) -> None:
    detach(model)
    _detach_parallel(model)
    if state.parallel is not None:
        state.parallel.attach()
    if state.needs_forward:
        attach(model, state.sharing)
    for module in (model, *attention_modules(model)):
        module.__dict__[STATE] = state
        note(module)
        _watch(module)


def _watch(module: torch.nn.Module) -> None:
    """Installs the hooks: on attention modules for their caches, on a patched model for the masks it is called with."""
    if hasattr(module, "layer_idx"):
        watch(module)
    elif isinstance(module, PreTrainedModel):
        watch(module, _check_mask)


def _check_mask(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Runs before a patched model's forward. A mask of another type would fail in transformers with a message about
    NumPy or attributes, before it reaches the attention function. A dict has a mask for each kind of layer."""
    mask = kwargs.get("attention_mask")
    if torch.compiler.is_compiling():  # the graph checks tensors when it runs
        if mask is not None and not isinstance(mask, (torch.Tensor, dict)):
            check_padding(mask)
        return
    if mask is None and len(args) > (place := _place_of_mask(type(module).forward)):
        mask = args[place]
    if mask is None:
        return
    if isinstance(mask, dict) and not any(getattr(c, "layer_types", None) for c in _configs(module)):
        raise TypeError(
            f"attention_mask: expected a tensor, got {type(mask).__name__}; the layers of {type(module).__name__} are "
            "of one kind and take one mask"
        )
    for one in mask.values() if isinstance(mask, dict) else (mask,):
        if one is not None and not (isinstance(one, torch.Tensor) and one.ndim == 4):
            check_padding(one)


@functools.lru_cache(maxsize=256)
def _place_of_mask(forward: Callable[..., Any]) -> int:
    """The position of the mask among the arguments of a model's `forward`; beyond all of them if it takes none."""
    names = list(inspect.signature(forward).parameters)[1:]
    return names.index("attention_mask") if "attention_mask" in names else sys.maxsize


def _detach_parallel(model: torch.nn.Module) -> None:
    state: State | None = model.__dict__.get(STATE)
    if state is not None and state.parallel is not None:
        state.parallel.detach(model)
        state.parallel.end()


def _uninstall(model: torch.nn.Module) -> None:
    detach(model)
    _detach_parallel(model)
    for module in model.modules():
        _forget(module)


def _forget(module: torch.nn.Module) -> None:
    for name in (STATE, HANDLE):
        module.__dict__.pop(name, None)
    unwatch(module)


def _take_off(model: PreTrainedModel, state: State) -> None:
    """Restores `model` to what it was before the patch that made `state`; later changes of its configs stay."""
    _restore(state.former)  # other models may hold these configs
    _uninstall(model)
    for before, own, first in state.edits:
        _copies.pop(id(own), None)
        for name, value in _contents(own).items():
            if name not in first or first[name] != value:
                before.__dict__[name] = value
    _put_back(state.entries)


def _put_back(entries: Iterable[Entry]) -> None:
    for module, name, old, _ in entries:
        if old is None:
            module.__dict__.pop(name, None)
        elif name == HOOKS:
            attach_one(module, old)
        else:
            module.__dict__[name] = old
        if name == STATE and old is not None:  # of an earlier patch of a part
            note(module)
            _watch(module)


def _on_top(state: State) -> bool:
    """Whether no later patch covers any part of what this one covers."""
    covered = {id(m) for e in state.entries[:1] for m in (e.module, *attention_modules(e.module))}
    return all(
        e.module.__dict__.get(STATE) is state for e in state.entries if e.name == STATE and id(e.module) in covered
    )


def _has_layers(model: torch.nn.Module) -> bool:
    return any(hasattr(module, "layer_idx") for module in model.modules())


def _own_configs(model: PreTrainedModel) -> tuple[tuple[Entry, ...], tuple[tuple[Any, Any, dict[str, Any]], ...]]:
    """Gives `model` copies of its config objects. Modules that shared a config share its copy."""
    old = _configs(model)
    copies = copy.deepcopy(old)  # one call, so that shared parts stay shared
    own = {id(a): b for a, b in zip(old, copies, strict=True)}
    entries = []
    for module in model.modules():
        entries.append(Entry(module, STATE, module.__dict__.get(STATE), None))
        if (sharing := attached(module)) is not None:
            entries.append(Entry(module, HOOKS, sharing, None))
        for name, value in vars(module).items():
            if id(value) in own:
                entries.append(Entry(module, name, value, own[id(value)]))
    for module, name, _, new in entries:
        if new is not None:
            module.__dict__[name] = new
    _copies.update((id(b), b) for b in copies)
    edits = tuple((a, b, copy.deepcopy(_contents(b))) for a, b in zip(old, copies, strict=True))
    return tuple(entries), edits


def _contents(config: Any) -> dict[str, Any]:
    """The values of a config itself, without its attention implementation."""
    return {
        name: value
        for name, value in vars(config).items()
        if not isinstance(value, PreTrainedConfig) and name not in SWITCHING
    }


def _implementations(model: PreTrainedModel) -> tuple[tuple[Any, str | None], ...]:
    return tuple((c, c._attn_implementation) for c in _configs(model))


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config object of a model, a parent before its parts."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if id(config) in found:
            return
        found[id(config)] = config
        for name in getattr(config, "sub_configs", {}):
            if (part := getattr(config, name, None)) is not None:
                visit(part)

    visit(model.config)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            visit(module.config)
    return list(found.values())


def _restore(former: tuple[tuple[Any, str | None], ...]) -> None:
    for config, implementation in former:  # setting a parent sets its parts, which come later in the list
        config._attn_implementation = implementation


def _index(layer: Any) -> int:
    if isinstance(layer, bool) or not hasattr(layer, "__index__"):
        raise TypeError(f"layers: expected layer indices, got {layer!r}")
    return operator.index(layer)


def _span(present: set[int]) -> str:
    return f"0..{max(present)}" if present == set(range(len(present))) and present else str(sorted(present))
