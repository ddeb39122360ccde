"""The attention function of implementation "dhsa": one call of transformers becomes calls of the C core,
a stretch of plain attention each, and a record of what was done."""

from typing import Any

import numpy as np
import torch

from dhsa import functional
from dhsa.config import Config
from dhsa.functional import RunStats
from dhsa.selection import Selection

from . import break_even
from .caches import Memory, recall
from .compat import outside_graphs
from .masks import key_lists, least_stretch, ranges_of, segments
from .records import record
from .refusals import forward_only, gradients_wanted, refuse_unsupported
from .switching import DEFAULT, EXACT, STATE, State
from .tracing import traced_attention, tracing
from .transforms import cast, refuse_transforms

__all__ = ["attend", "attention_forward"]

FEW = 16  # so many query rows at most go another way in the core, with other bits


@outside_graphs
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
    dtype of float32, float16, bfloat16; on the CPU. Returns ([B, Lq, H, D] contiguous, None). Under torch.autocast they
    may be of several: they are cast to its dtype, which is also that of the result.

    `attention_mask`: None for plain attention (causal with the last query at the last key, within `sliding_window`;
    full if the module or `is_causal` says it is not causal), a range table of this package's mask function, a 2-D
    padding mask, or a complete 4-D mask; see `masks.ranges_of`. Queries that see no key give zeros. Stretches of
    plain causal or sliding attention inside a mask (padded, packed or static-cache prompts; long ones between or after
    spans that are seen from both sides) go through the model's config like an unmasked prompt; anything else is exact,
    also over keys with gaps between them.

    Raises NotImplementedError for what has no counterpart here: training, dropout, attention weights as output, sinks
    (s_aux), position biases, paged caches, cross-attention, masks whose rows are more than a few intervals, transforms
    of torch.func, forward-mode derivatives, torch.jit.trace. Of a module in eval mode the forward pass works with
    autograd too; a gradient that is asked for through it raises the same.
    """
    refuse_unsupported(module, query, key, value, attention_mask, dropout, s_aux, kwargs)
    query, key, value = cast(query, key, value)
    recorded = gradients_wanted(module, query, key, value)
    others = (attention_mask, scaling, sliding_window, softcap, is_causal)
    if tracing():
        return traced_attention(module, query, key, value, *others), None
    refuse_transforms(query=query, key=key, value=value, attention_mask=attention_mask)
    if recorded:
        return forward_only(lambda q, k, v: attend(module, q, k, v, *others), query, key, value), None
    return attend(module, query, key, value, *others), None


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool | None,
    in_graph: bool = False,
) -> torch.Tensor:
    """`attention_forward` of tensors that are really there, and of what is not refused. `in_graph`: as an operator."""
    batch, heads, q_len, dim = query.shape
    k_len = key.shape[2]
    layer = getattr(module, "layer_idx", None)
    state: State | None = module.__dict__.get(STATE)
    config = DEFAULT if state is None else state.config_for(layer)
    # Keys that slide out of a window take their chunks along: only layers that see everything keep them.
    memory, unseen = None, ""
    if sliding_window is None:
        memory, unseen = recall(module, query, key, config, None if state is None else state.sharing, in_graph)
    if q_len == 1 and (memory is None or config.decode == "exact"):
        config, memory, unseen = EXACT, None, ""
    if config.share == "selections" and q_len > 1:
        memory = None  # a layer that takes another's lists neither looks at its keys nor cuts them
    query, key, value = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (query, key, value))

    # The core writes into a view, so that the layout that transformers wants costs no copy.
    out = torch.empty((batch, q_len, heads, dim), dtype=query.dtype, device="cpu")
    view = out.transpose(1, 2)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap}
    stretches = _Stretches(state, memory, layer, sliding_window, unseen)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    padding = attention_mask is None or getattr(attention_mask, "ndim", 4) == 2  # says nothing of a window
    if not causal and padding and sliding_window is not None and q_len > 1:
        raise NotImplementedError(
            'attention_mask: bidirectional sliding-window attention needs a mask of four dimensions; "dhsa" was handed '
            + ("none" if attention_mask is None else "padding only")
        )
    if not causal:
        config, memory = EXACT, None  # an encoder's: no method is defined for it
    if attention_mask is None:
        window = sliding_window if causal else None
        if causal:
            where = (None, 0, q_len, 0, k_len)
            stats = stretches.run(where, query, key, value, config, window=window, out=view, **options)
        else:
            _, _, stats = functional.run(query, key, value, config, causal=False, out=view, **options)
        if memory is not None:
            memory.done(stats.path == "sparse")
        record(module, layer, sliding_window, query, key, [(stats, 1)], stretches.reason)
        return out

    ranges = ranges_of(attention_mask, batch, q_len, k_len, sliding_window, causal)
    if ranges.shape[1] > 1:
        done = _attend_to_intervals(query, key, value, ranges, view, options)
        record(module, layer, sliding_window, query, key, done)
        return out
    ranges = ranges[:, 0]
    parts = None if q_len == 1 and memory is None else segments(ranges, least_stretch(config), late=k_len - q_len)
    whole = (
        parts is not None
        and len(parts) == 1
        and parts[0].row in (None, 0)
        and parts[0].q_stop - parts[0].q_start == q_len
    )
    # Windows and tables too: only a call of their own has the very tiles, and so the bits, that a row has alone. And
    # short rows, which have a way of their own.
    apart = parts is not None and (
        not config.exact
        or config.skip is not None
        or any(p.window or p.ranged or p.q_stop - p.q_start == p.k_stop - p.k_start <= FEW for p in parts)
    )
    if not (whole or apart):
        # Nothing could be left out here, and the table itself says exactly who sees what, in one call.
        _, _, stats = functional.run(query, key, value, EXACT, key_ranges=ranges, out=view, **options)
        record(module, layer, sliding_window, query, key, [(stats, 1)])
        return out
    if not whole:
        out.zero_()
    exact = EXACT if config.skip is None else EXACT.replace(skip=config.skip)
    done = []
    assert parts is not None  # or one call would do
    for part in parts:
        rows = slice(None) if part.row is None else slice(part.row, part.row + 1)
        queries, keys = slice(part.q_start, part.q_stop), slice(part.k_start, part.k_stop)
        q, k, v = query[rows, :, queries], key[rows, :, keys], value[rows, :, keys]
        to = {"out": view[rows, :, queries], **options}
        if part.ranged:
            _, _, stats = functional.run(q, k, v, exact, key_ranges=part.table(ranges), **to)
        else:
            alone = part.q_stop - part.q_start == 1 < q_len  # a stretch of one query is no decoding step
            stats = stretches.run(part[:5], q, k, v, exact if alone else config, window=part.window, **to)
        done.append((stats, part.pairs * (batch if part.row is None else 1)))
    if memory is not None:
        memory.done(all(stats.path == "sparse" for stats, _ in done))
    record(module, layer, sliding_window, query, key, done, stretches.reason)
    return out


class _Stretches:
    """Attends in the stretches of plain attention of one call: exact where sparse would not pay, with what earlier
    calls left in the cache, and by what other layers of this forward found where they share. `reason`: of the first
    stretch that did not pay, else `unseen`, why keys of a cache are cut anew, if a stretch cut them, else ""."""

    def __init__(
        self, state: State | None, memory: Memory | None, layer: int | None, kind: int | None, unseen: str
    ) -> None:
        self._state, self._memory, self._layer, self._kind, self._unseen = state, memory, layer, kind, unseen
        self.reason = ""

    def run(
        self,
        where: tuple,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: Config,
        *,
        window: int | None,
        **options: Any,
    ) -> RunStats:
        """`functional.run` of stretch `where`, (row, q_start, q_stop, k_start, k_stop)."""
        if why := break_even.reason(config, q, k, window):
            self.reason = self.reason or why
            config = break_even.fallback(config.skip)
        elif not self.reason and not config.exact:
            self.reason = self._unseen
        if self._memory is not None and not config.exact:
            options |= self._memory.of(where[0], where[3])
        if self._state is not None and config.share is not None and q.shape[2] > 1:  # in a step each layer chooses
            return self._state.sharing.run(self._layer, self._kind, where, q, k, v, config, window=window, **options)
        return functional.run(q, k, v, config, window=window, **options)[2]


def _attend_to_intervals(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: np.ndarray,
    out: torch.Tensor,
    options: dict[str, Any],
) -> list[tuple[functional.RunStats, int]]:
    """Exact attention of queries that see several intervals of keys, `ranges` [B, m, Lq, 2], into `out`: by lists of
    keys, which skip the gaps that all queries of a row have, or else by one call for each interval, its result weighted
    by its share of the softmax's sum."""
    if (lists := key_lists(ranges, key.shape[2])) is not None:
        indptr, indices, spans = lists
        selection = Selection._trusted(indptr, indices, shape=(len(ranges), 1, 1), query_block=query.shape[2])
        _, _, stats = functional.run_selected(query, key, value, selection, key_ranges=spans, out=out, **options)
        return [(stats, 1)]
    total = lse = None
    done = []
    for j in range(ranges.shape[1]):
        table = np.ascontiguousarray(ranges[:, j])
        part, part_lse, stats = functional.run(query, key, value, EXACT, key_ranges=table, return_lse=True, **options)
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
