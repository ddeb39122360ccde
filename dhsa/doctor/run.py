"""`check`: one prompt by exact and by sparse prefill, observed layer by layer. The model is left as it was.

Both runs use this package's attention, so that no memory grows with the square of the prompt's length. In each layer
that left keys out, exact attention is also computed from the same inputs. The findings are in findings.py.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from dhsa import functional, hf
from dhsa.config import Config, LayerConfigs
from dhsa.doctor.findings import Facts, findings
from dhsa.doctor.reasons import Reason, reason
from dhsa.doctor.report import Check, LayerCheck
from dhsa.hf.masks import key_range_mask
from dhsa.hf.wrappers import unwrapped

__all__ = ["TAIL", "check"]

TAIL = 64  # the number of last positions whose distributions are compared
_WATCHED = "dhsa_watched"  # a separate implementation, so that other models are not observed
_WATCH = "_dhsa_watch"  # an attribute of every module of a model that is checked
_EXACT = Config(budget=None)


def check(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    config: Config | LayerConfigs | str | os.PathLike[str] | None = None,
    *,
    attention_mask: torch.Tensor | None = None,
    layers: Iterable[int] | None = None,
    group: Any = None,
    timeout: float | None = None,
    advance: Callable[[], None] | None = None,
) -> Check:
    """Read a prompt by exact and by sparse prefill and report what differs: `print(dhsa.check(model, input_ids))`.

    This takes two prefills, and exact attention once more in the layers that were sparse. Memory is linear in the
    length of the prompt. The model is run in eval mode without gradients, and left exactly as it was, patched or not.

    Args:
        model: a transformers model with a language modelling head, on the CPU, or a module that wraps one.
        input_ids: int64 or int32 [B, L], L at least 2.
        config: the Config to check, or LayerConfigs, or the path of a file of either. None: that of a patched model,
            else the default.
        attention_mask: None, [B, L] of 1 (a token) and 0 (padding), or a complete 4-D mask as transformers takes it.
        layers: the layers that may be sparse, as for `patch`. None: all; for a patched model and a config of None,
            those that it was patched with.
        group: as in `patch`: its ranks divide the prompt among them, and all call `check` with the same arguments and
            get the same report, with the seconds of the slowest rank. None: that of a model that is patched with one.
        timeout: as in `patch`.
        advance: called after each attention layer of either run.

    Returns:
        A `Check`. Its `warnings` are sentences; its `ok` says whether the sparse prefill answers as the exact one.

    Raises:
        TypeError: as in `patch`; the message names the argument.
        ValueError: as in `patch`, except that layers without a boundary network run exact and are reported.
        NotImplementedError: the model asks for attention that this package does not have, or, with a group, for what
            its ranks cannot divide.
        GroupError: as in `patch`.
    """
    model = _readable(model)
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: {type(model).__name__} has no language modelling head")
    ids, mask = _checked(model, input_ids, attention_mask)
    state: hf.switching.State | None = model.__dict__.get(hf.switching.STATE)
    if group is None and state is not None and state.parallel is not None:
        group, timeout = state.parallel.link.group, timeout or state.parallel.link.timeout
    own = model.config._attn_implementation if state is None else state.former[0][1]
    if config is None and state is not None:
        config, layers = state.config, state.layers if layers is None else layers
    config = hf.switching.as_config(config)
    prompt = _Prompt(ids, mask, _positions(ids, mask))
    among: dict[str, Any] = {"group": group, "timeout": timeout}

    with _untouched(model), torch.no_grad():
        with hf.patched(model, _EXACT, layers, **among):  # a first call, whose time is not measured; also checks layers
            chosen = model.__dict__[hf.switching.STATE].layers
            _last_logits(model, head, _Prompt(ids[:, :TAIL], None, torch.zeros_like(ids[:, :1])))
        chosen, unserved, shared = _served(model, config, chosen)
        exact = _Watch(advance)
        exact_logits, exact_seconds = _prefill(model, head, prompt, _EXACT, None, exact, among)
        sparse = _Watch(advance, unserved, compare=True)
        sparse_logits, sparse_seconds = _prefill(model, head, prompt, config, chosen, sparse, among)
        if not exact.calls:
            raise ValueError(f"model: no layer of {type(model).__name__} called the attention function it names")
        kl, same, tokens = _compared(exact_logits, sparse_logits)

    result = Check(
        config=config,
        shape=(ids.shape[0], ids.shape[1]),
        layers=[_layer(a, b) for a, b in zip(exact.calls, sparse.calls, strict=True)],
        kl=tuple(kl[:, -1].tolist()),
        next_tokens=tokens,
        agree=tuple(same[:, -1].tolist()),
        tail=kl.shape[1],
        tail_kl=float(kl.mean()),
        tail_agree=float(same.double().mean()),
        exact_seconds=exact_seconds,
        sparse_seconds=sparse_seconds,
    )
    info = functional.build_info()
    facts = Facts(
        implementation=own,
        dtype=exact.calls[0].dtype,
        isa=info["isa"],
        products=tuple(info["products"]),
        reasons=tuple(call.reason.kind for call in sparse.calls),
        exact_fault=next(((call.run.layer, call.fault) for call in exact.calls if call.fault), None),
        logits_finite=(bool((exact_logits < torch.inf).all()), bool((sparse_logits < torch.inf).all())),
        unserved=unserved,
        shared=shared,
        precision=info["float32_precision"],
        precisions=tuple(info["float32_precisions"]),
    )
    warnings, notes, ok = findings(result, facts)
    return dataclasses.replace(result, warnings=warnings, notes=notes, ok=ok)


# ---- the prompt ------------------------------------------------------------------------------------------------------


class _Prompt(NamedTuple):
    """What the model reads, and the positions [B, n] of each row whose logits are needed, ascending."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor


def _readable(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model without its wrapper; ValueError if the wrapper changes the prompt."""
    inner = unwrapped(model)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"model: {type(model).__name__} puts virtual tokens before the prompt, which a check would leave out; pass "
            "model.get_base_model() to check the model without them"
        )
    return inner


def _checked(model: PreTrainedModel, ids: Any, mask: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the checked arguments. The contents of a 4-D mask are checked where it is read (hf/masks.py)."""
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"input_ids: expected an int64 or int32 tensor, got {got}")
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"input_ids: expected shape [B, L] with L at least 2, got {list(ids.shape)}")
    words = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if words is not None and not ((ids >= 0) & (ids < words)).all():
        raise ValueError(f"input_ids: expected 0 to {words - 1}, got {int(ids.min())} to {int(ids.max())}")
    if mask is None:
        return ids, None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask: expected a tensor or None, got {type(mask).__name__}")
    if mask.ndim == 4:
        return ids, mask
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected shape {list(ids.shape)} or 4 dimensions, got {list(mask.shape)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask: expected 1 for tokens and 0 for padding, got other values")
    if not mask.any(dim=1).all():
        raise ValueError("attention_mask: has a row of padding only")
    return ids, mask.long()


def _positions(ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return int64 [B, n]: the positions of the last tokens of each row, n at most TAIL and the same for all rows."""
    real = torch.ones_like(ids) if mask is None or mask.ndim == 4 else mask
    n = min(TAIL, int(real.sum(1).min()))
    return torch.stack([row.nonzero()[-n:, 0] for row in real])


# ---- prefill, observed -----------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """One attention call: its record (hf/records.py), why it was exact, what is not finite in it, and the norms of its
    error and of exact attention."""

    run: hf.LayerRun
    reason: Reason
    fault: str
    dtype: str
    error: float = 0.0
    norm: float = 0.0


class _Watch:
    """Replaces the attention function in the modules of one model, for one prefill.

    `compare`: find out why each call was exact, or compute exact attention as well. `aside`: the seconds that these
    additional steps took.
    """

    def __init__(self, advance: Callable[[], None] | None, unserved: tuple[int, ...] = (), compare: bool = False):
        self.calls: list[_Call] = []
        self.aside = 0.0
        self._advance, self._unserved, self._compare = advance, unserved, compare

    def __call__(self, module: torch.nn.Module, q: Any, k: Any, v: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        out, weights = hf.attention_forward(module, q, k, v, mask, *rest, **options)
        start = perf_counter()
        run = hf.last_run(module)[0]
        state: hf.switching.State = module.__dict__[hf.switching.STATE]
        why, error, norm = Reason("", ""), 0.0, 0.0
        if self._compare:
            skips = state.config_for(getattr(module, "layer_idx", None)).skip is not None
            if run.path == "sparse" or (run.skipped if state.parallel is None else skips):  # alike on all ranks
                exact, _ = hf.attention.recompute(module, _EXACT, q, k, v, mask, *rest, **options)
                exact = exact.float()
                error, norm = float((out.float() - exact).norm()), float(exact.norm())
            if run.path != "sparse":
                why = self._why(run, state, module, q, k, mask, options)
        fault = _fault(q=q, k=k, v=v, output=out)
        self.calls.append(_Call(run, why, fault, str(q.dtype).removeprefix("torch."), error, norm))
        self.aside += perf_counter() - start
        if self._advance is not None:
            self._advance()
        return out, weights

    def _why(
        self,
        run: hf.LayerRun,
        state: hf.switching.State,
        module: torch.nn.Module,
        q: Any,
        k: Any,
        mask: Any,
        options: dict[str, Any],
    ) -> Reason:
        layer = getattr(module, "layer_idx", None)
        config = state.config.at(layer) if isinstance(state.config, LayerConfigs) else state.config
        if not config.exact and state.layers is not None and layer not in state.layers:
            if layer in self._unserved:
                return Reason("network", "the predictor has no network for it")
            return Reason("layers", "it is not among layers=")
        if run.reason == hf.attention.DENSE_ANCHOR:
            return Reason("anchor", "it attends to all keys, and selects for other layers (dense_anchors)")
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if state.parallel is not None:  # it has read the mask
            q, k = state.parallel.whole(q, k)
            mask = None
        return reason(module, config, q, k, mask, options.get("sliding_window"), causal)


def _fault(**tensors: torch.Tensor) -> str:
    """Return "NaN in v, output", "inf in k" or ""."""
    bad = {name: tensor for name, tensor in tensors.items() if not bool(tensor.isfinite().all())}
    nan = any(bool(tensor.isnan().any()) for tensor in bad.values())
    return f"{'NaN' if nan else 'inf'} in {', '.join(bad)}" if bad else ""


def _of_all(parallel: Any, calls: list[_Call], seconds: float) -> tuple[list[_Call], float]:
    """The calls and the seconds of a prefill whose queries the ranks of a group have divided among them: errors of all
    queries, what is not finite on any rank, and the seconds of the slowest."""
    runs = parallel.together([call.run for call in calls])
    said = [[call.error**2, call.norm**2, call.fault] for call in calls]
    every = parallel.link.agree("check", {"calls": said, "seconds": seconds}, frozenset())
    found = []
    for call, run, *each in zip(calls, runs, *(one["calls"] for one in every), strict=True):
        error, norm = (math.fsum(one[i] for one in each) ** 0.5 for i in (0, 1))
        fault = next((one[2] for one in each if one[2]), "")
        found.append(call._replace(run=run, fault=fault, error=error, norm=norm))
    return found, max(one["seconds"] for one in every)


def _watched(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
    return module.__dict__[_WATCH](module, *args, **options)


AttentionInterface.register(_WATCHED, _watched)
AttentionMaskInterface.register(_WATCHED, key_range_mask)


def _prefill(
    model: PreTrainedModel,
    head: torch.nn.Module,
    prompt: _Prompt,
    config: Config | LayerConfigs,
    layers: Iterable[int] | None,
    watch: _Watch,
    among: dict[str, Any],
) -> tuple[torch.Tensor, float]:
    """Return (logits, seconds without the additional steps) of the prompt by a config. `among`: the options of `patch`
    for a group."""
    with hf.patched(model, config, layers, **among):
        model.set_attn_implementation(_WATCHED)  # the with statement restores the former one
        for module in hf.switching.attention_modules(model):
            module.__dict__[_WATCH] = watch
        start = perf_counter()
        logits = _last_logits(model, head, prompt)
        seconds = perf_counter() - start - watch.aside
        parallel = model.__dict__[hf.switching.STATE].parallel
        if parallel is not None:
            watch.calls, seconds = _of_all(parallel, watch.calls, seconds)
        return logits, seconds


def _last_logits(model: PreTrainedModel, head: torch.nn.Module, prompt: _Prompt) -> torch.Tensor:
    """Return the logits at the prompt's positions, float32 [B, n, vocabulary].

    The head is given the hidden states of these positions only. The model scales and caps its logits as usual, but the
    logits of the whole prompt are never formed.
    """

    def pick(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (args[0][torch.arange(len(prompt.ids), device="cpu")[:, None], prompt.positions],)

    options = {}
    if prompt.mask is not None and prompt.mask.ndim == 2:  # as `generate` counts positions
        options["position_ids"] = (prompt.mask.cumsum(-1) - 1).clamp(min=0)
    handle = head.register_forward_pre_hook(pick)
    try:
        made = model(input_ids=prompt.ids, attention_mask=prompt.mask, use_cache=False, **options).logits
    finally:
        handle.remove()
    if made.shape[:2] != prompt.positions.shape:
        raise ValueError(f"model: the logits of {type(model).__name__} do not come from its output embeddings")
    return made.float()


@contextmanager
def _untouched(model: PreTrainedModel) -> Iterator[None]:
    """Run the model in eval mode; afterwards restore modes, config objects and records of earlier runs.

    This holds whatever attention implementation the check uses meanwhile.
    """
    modules = list(model.modules())
    training = [module for module in modules if module.training]
    configs = [
        (m, name, value) for m in modules for name, value in vars(m).items() if isinstance(value, PreTrainedConfig)
    ]
    runs = [(m, m.__dict__.pop(hf.records.RUNS)) for m in modules if hf.records.RUNS in m.__dict__]
    model.eval()
    try:
        yield
    finally:
        for module in modules:
            for name in (hf.records.RUNS, _WATCH):
                module.__dict__.pop(name, None)
        for module, kept in runs:
            module.__dict__[hf.records.RUNS] = kept
        for module, name, value in configs:
            module.__dict__[name] = value
        for module in training:
            module.training = True


def _served(
    model: PreTrainedModel, config: Config | LayerConfigs, chosen: frozenset[int] | None
) -> tuple[frozenset[int] | None, tuple[int, ...], tuple[int, ...]]:
    """Return (layers that may be sparse, those of `chosen` without a boundary network, those cut by the one for all
    layers).

    ValueError if the networks belong to another model.
    """
    present = {m.layer_idx for m in hf.switching.attention_modules(model) if getattr(m, "layer_idx", None) is not None}
    wanted = frozenset(present) if chosen is None else chosen
    unserved: set[int] = set()
    shared: set[int] = set()
    for one, layers in hf.switching.by_config(config, wanted).items():
        hf.switching.own_networks(model, one, ())
        predictor = one.predictor
        if one.boundaries == "predictor" and predictor is not None and predictor.layers:
            (shared if predictor.shared else unserved).update(set(layers) - set(predictor.layers))
    return wanted - unserved if unserved else chosen, tuple(sorted(unserved)), tuple(sorted(shared))


# ---- results ---------------------------------------------------------------------------------------------------------


def _layer(exact: _Call, sparse: _Call) -> LayerCheck:
    run = sparse.run
    return LayerCheck(
        layer=run.layer,
        kind=run.kind,
        path=run.path,
        why=sparse.reason.text,
        density=run.density,
        skipped=run.skipped,
        output_error=sparse.error / sparse.norm if sparse.norm else 0.0,
        exact_seconds=exact.run.attend_seconds,
        select_seconds=run.select_seconds,
        attend_seconds=run.attend_seconds,
        not_finite=sparse.fault,
    )


def _compared(
    exact: torch.Tensor, sparse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[tuple[int, int], ...]]:
    """Return the divergence float64 [B, n] in nats, whether the most likely token is the same [B, n], and the most
    likely last tokens of each row. Where logits hold NaN, these are NaN and False.
    """
    kl = torch.empty(exact.shape[:2], dtype=torch.float64, device="cpu")
    same = torch.empty(exact.shape[:2], dtype=torch.bool, device="cpu")
    for b, i in torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in exact.shape[:2])).reshape(-1, 2).tolist():
        p, q = exact[b, i].double().log_softmax(-1), sparse[b, i].double().log_softmax(-1)
        # A token with a logit of -inf adds nothing.
        kl[b, i] = torch.where(p == -torch.inf, 0, p.exp() * (p - q)).sum().clamp(min=0)
        same[b, i] = p.argmax() == q.argmax() and not kl[b, i].isnan()
    tokens = zip(exact[:, -1].argmax(-1).tolist(), sparse[:, -1].argmax(-1).tolist(), strict=True)
    return kl, same, tuple(tokens)
