"""Hugging Face transformers 5.x: attention implementation "dhsa", and switching a model's attention to it and back.

Importing this module registers "dhsa" with transformers, for `from_pretrained(..., attn_implementation="dhsa")`.
Prefill goes through a `dhsa.Config`, sparse where it says so; decode steps are exact. How masks are read is in
hf_masks.py, what is computed in functional.py and the C core; nothing numeric happens here.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
except ImportError as error:
    raise ImportError(
        f"{error}; dhsa's transformers integration needs its extra: pip install 'dhsa[hf]'", name=error.name
    ) from error

from . import functional
from .config import Config
from .hf_masks import key_range_mask, ranges_of, segments
from .predictor import TRAIN

__all__ = ["IMPLEMENTATION", "LayerRun", "attention_forward", "last_run", "patch", "patched", "unpatch"]

IMPLEMENTATION = "dhsa"

_EXACT = Config(budget=None)
_DEFAULT = Config()
_STATE = "_dhsa_state"  # on a patched model and on its modules
_RUNS = "_dhsa_runs"  # on every attention module that ran
_FACTS = ("model_type", "num_hidden_layers", "hidden_size", "num_key_value_heads", "head_dim")


class LayerRun(NamedTuple):
    """What one attention layer did in its last call.

    `layer`: its index. `kind`: "full" or "sliding". `step`: "prefill" or "decode" (one query). `path`: "dense",
    "window", "sparse" (some block of queries saw a selection of its keys) or "decode". `density`: (query, key) pairs
    attended over pairs visible under mask and window, 1 on exact paths. Seconds: choosing the keys, and attending to
    them. `skipped`: see `dhsa.Config.skip`, 0 without. `query_shape` is [B, H, Lq, D], `key_shape` [B, Hkv, Lk, D].
    """

    layer: int
    kind: Literal["full", "sliding"]
    step: Literal["prefill", "decode"]
    path: Literal["dense", "window", "sparse", "decode"]
    density: float
    select_seconds: float
    attend_seconds: float
    query_shape: tuple[int, int, int, int]
    key_shape: tuple[int, int, int, int]
    skipped: float = 0.0


@dataclass(frozen=True)
class _State:
    """What `patch` leaves on a model: how it is to attend, and which implementation its configs named."""

    config: Config
    layers: frozenset[int] | None
    former: tuple[tuple[Any, str | None], ...]
    own: Mapping[int, Config] = field(default_factory=dict)  # of layers that have a boundary network of their own

    def config_for(self, layer: int | None) -> Config:
        if self.layers is not None and layer not in self.layers:
            return _EXACT
        return self.own.get(layer, self.config)


# ---- the attention function ------------------------------------------------------------------------------------------


@torch.compiler.disable
def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of implementation "dhsa", in the signature that transformers calls.

    query [B, H, Lq, D]; key, value [B, Hkv, Lk, D], not repeated over a group, of any strides whose last is 1; one
    dtype of float32, float16, bfloat16; on the CPU. Returns ([B, Lq, H, D] contiguous, None).

    `attention_mask`: None for plain attention (causal with the last query at the last key, within `sliding_window`;
    full if the module or `is_causal` says it is not causal), a range table of this package's mask function, a 2-D
    padding mask, or a complete 4-D mask; see `hf_masks.ranges_of`. Queries that see no key give zeros. Stretches of
    plain causal or sliding attention inside a mask (padded, packed or static-cache prompts) go through the model's
    config like an unmasked prompt; anything else is exact, also over keys with gaps between them.

    Raises NotImplementedError for what has no counterpart here: gradients, dropout, attention weights as output, sinks
    (s_aux), position biases, paged caches, cross-attention, masks whose rows are more than a few intervals.
    """
    _refuse_unsupported(module, query, key, value, attention_mask, dropout, s_aux, kwargs)
    batch, heads, q_len, dim = query.shape
    k_len = key.shape[2]
    layer = getattr(module, "layer_idx", None)
    state: _State | None = module.__dict__.get(_STATE)
    config = _DEFAULT if state is None else state.config_for(layer)
    if q_len == 1:
        config = _EXACT
    query, key, value = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (query, key, value))

    # The core writes into a view, so that the layout that transformers wants costs no copy.
    out = torch.empty((batch, q_len, heads, dim), dtype=query.dtype)
    view = out.transpose(1, 2)
    options = {"scale": scaling, "softcap": softcap}
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if not causal and sliding_window is not None and q_len > 1:
            raise NotImplementedError(
                'attention_mask: bidirectional sliding-window attention needs a mask; "dhsa" was handed none'
            )
        if not causal or q_len == 1:
            config = _EXACT
        window = sliding_window if causal else None
        _, _, stats = functional.run(query, key, value, config, causal=bool(causal), window=window, out=view, **options)
        _record(module, layer, sliding_window, query, key, [(stats, 1)])
        return out, None

    ranges = ranges_of(attention_mask, batch, q_len, k_len, sliding_window)
    if ranges.shape[1] > 1:
        done = _attend_to_intervals(query, key, value, ranges, view, options)
        _record(module, layer, sliding_window, query, key, done)
        return out, None
    ranges = ranges[:, 0]
    parts = None if q_len == 1 else segments(ranges)
    whole = (
        parts is not None
        and len(parts) == 1
        and parts[0].row in (None, 0)
        and parts[0].q_stop - parts[0].q_start == q_len
    )
    # Windows too: only a call of their own has the very tiles, and so the bits, that a row has alone.
    apart = parts is not None and (not config._exact or config.skip is not None or any(p.window for p in parts))
    if not (whole or apart):
        # Nothing could be left out here, and the table itself says exactly who sees what, in one call.
        _, _, stats = functional.run(query, key, value, _EXACT, key_ranges=ranges, out=view, **options)
        _record(module, layer, sliding_window, query, key, [(stats, 1)])
        return out, None
    if not whole:
        out.zero_()
    done = []
    for row, q_start, q_stop, k_start, k_stop, window, pairs in parts:
        rows = slice(None) if row is None else slice(row, row + 1)
        _, _, stats = functional.run(
            query[rows, :, q_start:q_stop],
            key[rows, :, k_start:k_stop],
            value[rows, :, k_start:k_stop],
            config if q_stop - q_start > 1 else _EXACT,
            window=window,
            out=view[rows, :, q_start:q_stop],
            **options,
        )
        done.append((stats, pairs * (batch if row is None else 1)))
    _record(module, layer, sliding_window, query, key, done)
    return out, None


def _attend_to_intervals(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: np.ndarray,
    out: torch.Tensor,
    options: dict[str, float | None],
) -> list[tuple[functional.RunStats, int]]:
    """Exact attention of queries that see several intervals of keys, `ranges` [B, m, Lq, 2], into `out`: one call for
    each, its result weighted by its share of the softmax's sum."""
    total = lse = None
    done = []
    for j in range(ranges.shape[1]):
        table = np.ascontiguousarray(ranges[:, j])
        part, part_lse, stats = functional.run(query, key, value, _EXACT, key_ranges=table, return_lse=True, **options)
        done.append((stats, 1))
        if total is None:
            total, lse = part.float(), part_lse
            continue
        both = torch.logaddexp(lse, part_lse)
        nothing = both == -torch.inf  # neither interval has a key: the difference of the two would be NaN
        old, new = ((one - both).exp_().masked_fill_(nothing, 0)[..., None] for one in (lse, part_lse))
        total = total * old + part * new
        lse = both
    out.copy_(total)
    return done


def _refuse_unsupported(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    s_aux: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Everything that would otherwise be dropped in silence."""
    other = 'use attn_implementation="eager"'
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise NotImplementedError(
            '"dhsa" has no backward pass: run the model under torch.no_grad() or torch.inference_mode()'
        )
    if dropout:
        raise NotImplementedError(
            f'"dhsa" has no attention dropout, got dropout={dropout}: call model.eval(), or {other}'
        )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(f'output_attentions=True: "dhsa" never forms the attention weights; {other}')
    for name, sinks in (("s_aux", s_aux), ("sinks", kwargs.get("sinks"))):
        if sinks is not None:
            raise NotImplementedError(f'{name}: "dhsa" has no learned attention sinks; {other}')
    for name in ("position_bias", "head_mask", "cache", "block_table", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'{name}: "dhsa" does not know this argument and cannot ignore it; {other}')
    if attention_mask is None and any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k")):
        raise NotImplementedError('cu_seq_lens_q: "dhsa" reads packed sequences from position_ids; leave it out')
    if _is_cross_attention(module):
        raise NotImplementedError(
            f'"dhsa" does self-attention only, {type(module).__name__} is cross-attention, or a decoder\'s attention '
            f"that does not say that it is causal; {other}"
        )
    if query.ndim != 4 or key.ndim != 4 or query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: "
            "expected [B, H, Lq, D] and [B, Hkv, Lk, D] with Lq <= Lk"
        )


def _is_cross_attention(module: torch.nn.Module) -> bool:
    """Whether the keys come from other tokens than the queries do, by what the models have to tell it: a mark, a class
    of its own, or (Bart, Whisper and those after them) one class for all, which in a decoder is causal only for itself.
    Lengths tell nothing: an encoder may be handed keys of a prefix, and a decoder as many tokens as its encoder."""
    if getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__:
        return True
    return bool(getattr(module, "is_decoder", False)) and not getattr(module, "is_causal", True)


def _record(
    module: torch.nn.Module,
    layer: int | None,
    sliding_window: int | None,
    query: torch.Tensor,
    key: torch.Tensor,
    done: list[tuple[functional.RunStats, int]],
) -> None:
    """Notes on the module what its call did; several stretches become one record, their densities weighted by pairs."""
    paths = {stats.path for stats, _ in done}
    # A table of ranges has no window of its own, but in a sliding layer its rows are windows.
    exact = "window" if "window" in paths or (sliding_window is not None and sliding_window < key.shape[2]) else "dense"
    decode = query.shape[2] == 1
    step = "decode" if decode else "prefill"
    total = sum(pairs for _, pairs in done)
    run = LayerRun(
        layer=-1 if layer is None else layer,
        kind="full" if sliding_window is None else "sliding",
        step=step,
        path="decode" if decode else "sparse" if "sparse" in paths else exact,
        density=sum(stats.density * pairs for stats, pairs in done) / total if total else 1.0,
        select_seconds=sum(stats.select_seconds for stats, _ in done),
        attend_seconds=sum(stats.attend_seconds for stats, _ in done),
        query_shape=tuple(query.shape),
        key_shape=tuple(key.shape),
        skipped=sum(stats.skipped * pairs for stats, pairs in done) / total if total else 0.0,
    )
    runs = module.__dict__.setdefault(_RUNS, {})
    runs.pop(step, None)
    runs[step] = run  # the last one inserted is the last one run


# ---- switching models ------------------------------------------------------------------------------------------------


def patch(model: PreTrainedModel, config: Config | None = None, layers: Iterable[int] | None = None) -> PreTrainedModel:
    """Switches the attention of `model` to this package, in place, and returns the model.

    `config`: a `dhsa.Config` for prefill, the default one if None; `Config(budget=None)` is exact. `layers`: the
    indices of the layers that may be sparse, all if None; the others are exact. Patching a patched model replaces
    config and layers.

    The config lives on the model, so that `generate` and pipelines need no extra arguments. `unpatch` undoes it, and
    `with patched(model, config):` does both. transformers notes the implementation in `model.config`, an object that
    models built from one config share: `model` gets its own copy of it, for good, so that no other model is switched.

    Raises TypeError if `model` is no transformers model or `config` no Config, ValueError if a layer index does not
    exist, boundaries are to come from a predictor that was trained for another model or lacks a network of a layer, or
    the model cannot change its attention implementation (it is left as it was).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    config = _DEFAULT if config is None else config
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a dhsa.Config or None, got {type(config).__name__}")
    present = {m.layer_idx for m in _attention_modules(model) if isinstance(getattr(m, "layer_idx", None), int)}
    chosen = None
    if layers is not None:
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise TypeError(f"layers: expected layer indices or None, got {layers!r}")
        chosen = frozenset(_index(layer) for layer in layers)
        if missing := sorted(chosen - present):
            raise ValueError(f"layers: {missing} not in this model, whose layers are {_span(present)}")
    own = _own_networks(model, config, present if chosen is None else chosen)
    if any(getattr(c, "output_attentions", False) for c in _configs(model)):
        raise ValueError(
            'model.config.output_attentions is True: "dhsa" never forms the attention weights; set it to False'
        )

    current: _State | None = model.__dict__.get(_STATE)
    if current is None:
        _own_configs(model)
    former = _implementations(model) if current is None else current.former
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        # transformers may refuse by a logged warning only.
        if model.config._attn_implementation != IMPLEMENTATION:
            raise ValueError(f"{type(model).__name__} does not support changing its attention implementation")
    except Exception:
        if current is None:
            _restore(former)
        raise
    _install(model, _State(config, chosen, former, own))
    return model


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What tells apart the models whose keys a boundary predictor was trained on."""
    text = model.config.get_text_config()
    return {name: getattr(text, name, None) for name in _FACTS}


def _own_networks(model: PreTrainedModel, config: Config, layers: Iterable[int]) -> dict[int, Config]:
    """The configs of layers whose boundaries come from a network of their own; ValueError for networks of another
    model, which would cut without complaint where it makes no sense, and for layers that have none."""
    predictor = config.predictor
    if config.boundaries != "predictor" or predictor is None:
        return {}
    if predictor.model is not None:
        have = model_facts(model)
        if other := [name for name in _FACTS if name in predictor.model and predictor.model[name] != have[name]]:
            raise ValueError(
                "predictor: trained for a model with "
                + ", ".join(f"{name} {predictor.model[name]!r}" for name in other)
                + ", but this one has "
                + ", ".join(f"{have[name]!r}" for name in other)
                + f"; train one for it: {TRAIN}"
            )
    if not predictor.layers:
        return {}
    if not predictor.shared and (bare := sorted(set(layers) - set(predictor.layers))):
        raise ValueError(
            f"predictor: has networks of layers {list(predictor.layers)} only, none of {bare}; leave those exact by "
            f"layers={list(predictor.layers)}, or train one for all layers: {TRAIN}"
        )
    return {layer: config.replace(predictor=predictor.layer(layer)) for layer in layers}


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Gives `model` back the attention implementation that it had before `patch`, and returns the model.

    What `last_run` tells stays. Raises TypeError if `model` is no transformers model, ValueError if it is not patched.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    state: _State | None = model.__dict__.get(_STATE)
    if state is None:
        raise ValueError("model: not patched")
    _restore(state.former)
    _uninstall(model)
    return model


@contextmanager
def patched(
    model: PreTrainedModel, config: Config | None = None, layers: Iterable[int] | None = None
) -> Iterator[PreTrainedModel]:
    """`patch` for the length of a with statement; afterwards the model is as it was, patched by an outer one or not at
    all."""
    outer: _State | None = getattr(model, "__dict__", {}).get(_STATE)
    before = _implementations(model) if outer is not None else None
    patch(model, config, layers)
    if before is None:
        before = model.__dict__[_STATE].former
    try:
        yield model
    finally:  # whatever happened to the model inside, be it unpatched or switched to another implementation
        _restore(before)
        _uninstall(model)
        if outer is not None:
            _install(model, outer)


def last_run(model: torch.nn.Module, step: Literal["prefill", "decode"] | None = None) -> list[LayerRun]:
    """What each attention layer of `model` did in its last call, in the order of the layers.

    `step`: only the last prefill, or only the last decode step (after `generate`, the last call was a decode step);
    None: whichever came last. Layers that did not run through this package are left out, so the list may be empty.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    if step not in (None, "prefill", "decode"):
        raise ValueError(f'step: expected "prefill", "decode" or None, got {step!r}')
    found = []
    for module in model.modules():
        runs: dict[str, LayerRun] = module.__dict__.get(_RUNS, {})
        run = next(reversed(runs.values()), None) if step is None else runs.get(step)
        if run is not None:
            found.append(run)
    return sorted(found, key=lambda run: run.layer)


def _attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that may call the attention function: by their index, or, without one (vision towers), by their name."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") or "Attention" in type(m).__name__]


def _install(model: torch.nn.Module, state: _State) -> None:
    for module in (model, *_attention_modules(model)):
        module.__dict__[_STATE] = state


def _uninstall(model: torch.nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop(_STATE, None)


def _own_configs(model: PreTrainedModel) -> None:
    """Gives `model` config objects that no other model holds, alike among its modules as they were."""
    old = _configs(model)
    own = {id(a): b for a, b in zip(old, copy.deepcopy(old), strict=True)}  # one call, so that shared parts stay shared
    for module in model.modules():
        for name, value in vars(module).items():
            if id(value) in own:
                module.__dict__[name] = own[id(value)]


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
    return layer.__index__()


def _span(present: set[int]) -> str:
    return f"0..{max(present)}" if present == set(range(len(present))) and present else str(sorted(present))


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, key_range_mask)
