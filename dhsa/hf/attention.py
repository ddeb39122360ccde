"""The attention function of implementation "dhsa". A call of transformers is planned as a list of stretches, the C core
computes each of them, and a record of the call is stored."""

import dataclasses
from time import perf_counter
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from dhsa import _core, functional
from dhsa.config import Config
from dhsa.functional import RunStats
from dhsa.selection import Selection

from . import break_even
from .caches import Memory, States, recall, states_of
from .compat import outside_graphs, reads_text
from .given import are_given, scores_of
from .masks import MaskPart, key_lists, least_stretch, mask_parts, ranged_rows, ranges_of, two_sided
from .records import RUNS, LayerRun, last_run, record
from .refusals import forward_only, gradients_wanted, refuse_unsupported, sinks_in
from .switching import EXACT, STATE, State, config_of
from .tracing import traced_attention, tracing
from .transforms import cast, refuse_transforms

__all__ = ["DENSE_ANCHOR", "NO_INDEX", "attend", "attention_forward", "one_sided", "recompute"]

NO_INDEX = "decode: no query of the prompt is in an index of this cache, so the step attends to all keys"
DENSE_ANCHOR = "reuse: the layer attends to all keys, and selects for others"


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

    query [B, H, Lq, D]; key [B, Hkv, Lk, D] and value [B, Hkv, Lk, E], not repeated over a group. The last stride is 1,
    the others are free. All have one dtype, float32, float16 or bfloat16, and are on the CPU. Returns ([B, Lq, H, E]
    contiguous, None). Under torch.autocast the dtypes may differ: all are cast to that of autocast, which the result
    has as well. `s_aux` (or `sinks`) [H]: a logit for each query head that joins the softmax and has no value.

    `attention_mask` is None for plain attention: causal with the last query at the last key, within `sliding_window`,
    or full if the module or `is_causal` says that it is not causal. Otherwise it is a range table of this package's
    mask function, a 2-D padding mask, or a complete 4-D mask; see `masks.ranges_of`. Queries that see no key give
    zeros. A mask may contain stretches of plain causal or sliding-window attention: padded, packed or static-cache
    prompts, or long stretches between spans of bidirectional attention. The model's config applies to these as to an
    unmasked prompt. So it does where every token of a text sees all tokens on both sides of it, or those within a
    symmetric window, if the method of selection serves both sides; queries that are padding then give zeros. Everything
    else is exact.

    Raises NotImplementedError for what is not supported: training, dropout, attention weights as output, sinks of
    another shape, position biases, paged caches, cross-attention, masks with more than a few intervals a query,
    transforms of torch.func, forward-mode derivatives, torch.jit.trace. The forward pass of a module in eval mode also
    works while autograd records; computing a gradient through it raises NotImplementedError.
    """
    refuse_unsupported(module, query, key, value, attention_mask, dropout, kwargs)
    sinks = sinks_in(query, s_aux, kwargs)
    query, key, value = cast(query, key, value)
    inputs = (query, key, value) if sinks is None else (query, key, value, sinks)
    recorded = gradients_wanted(module, *inputs)
    others = (attention_mask, scaling, sliding_window, softcap, is_causal)
    if tracing():
        return traced_attention(module, query, key, value, *others, sinks), None
    refuse_transforms(query=query, key=key, value=value, attention_mask=attention_mask, sinks=sinks)
    if recorded:
        return forward_only(lambda q, k, v, s=None: attend(module, q, k, v, *others, sinks=s), *inputs), None
    return attend(module, query, key, value, *others, sinks=sinks), None


def recompute(module: torch.nn.Module, config: Config, *args: Any, **options: Any) -> tuple[torch.Tensor, LayerRun]:
    """`attention_forward` of a module of a patched model by another config: its result and its record. The module keeps
    its own config and the record of its last call."""
    notes = module.__dict__
    state, runs = notes[STATE], notes.pop(RUNS, None)
    notes[STATE] = dataclasses.replace(state, config=config, layers=None, own={})
    try:
        out, _ = attention_forward(module, *args, **options)
        return out, last_run(module)[0]
    finally:
        notes[STATE] = state
        notes.pop(RUNS, None)
        if runs is not None:
            notes[RUNS] = runs


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
    sinks: torch.Tensor | None = None,
    in_graph: bool = False,
) -> torch.Tensor:
    """`attention_forward` for real tensors whose arguments were checked. `in_graph`: whether an operator calls it."""
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    layer = getattr(module, "layer_idx", None)
    state: State | None = module.__dict__.get(STATE)
    config = config_of(module)
    if state is not None and state.parallel is not None:
        if in_graph:
            raise NotImplementedError("group: a model that is compiled cannot divide a prompt among ranks")
        return _among_ranks(module, state.parallel, config, query, key, value, scaling, sliding_window, softcap,
                            is_causal, sinks)  # fmt: skip
    # Chunks are stored for layers without a window only: keys that leave a window take their chunks with them.
    memory, unseen = None, ""
    indexed = config.options.remembers == "calls" and config.decode == "dhsa" and sliding_window is None
    indexed = indexed and not config.exact
    states = states_of(module) if indexed and not in_graph else None
    if sliding_window is None:
        memory, unseen = recall(module, query, key, config, None if state is None else state.sharing, in_graph)
    if q_len == 1 and (memory is None or config.decode == "exact") and not indexed:
        config, memory, unseen = EXACT, None, ""
    if config.share == "selections" and q_len > 1:
        memory = None  # a layer that uses another layer's lists does not cut its keys
    reused = state is not None and not in_graph and state.reuse_of(layer)[0] and not config.exact
    if state is not None and not reused and state.dense_anchor(layer):
        config, memory, unseen = EXACT, None, ""
    if reused:
        memory, unseen = None, ""  # lists come from another layer, or are selected so that others can take them
    given = None if config.exact else scores_of(batch, q_len, k_len, sliding_window)
    if given is not None:
        memory, unseen = None, ""  # single keys are scored, so none are cut
    query, key, value = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (query, key, value))

    # The core writes into a view, so that the layout that transformers expects needs no copy.
    out = torch.empty((batch, q_len, heads, value.shape[3]), dtype=query.dtype, device="cpu")
    view = out.transpose(1, 2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        _refuse_half_a_mask(attention_mask, q_len, sliding_window)
        memory = None
    hindrance = one_sided(module, config, q_len, k_len)
    stretches = plan(
        attention_mask,
        batch,
        q_len,
        k_len,
        sliding_window,
        causal,
        config,
        alone=memory is None and not reused and not indexed,
        sides=not hindrance,
        heads=heads,
    )
    parts = [stretch.part for stretch in stretches]
    if sum((s.q_stop - s.q_start) * (batch if s.row is None else 1) for s in parts) < batch * q_len:
        out.zero_()  # queries outside all stretches see no key
    options = {"scale": scaling, "softcap": softcap, "sinks": None if sinks is None else sinks.detach().float()}
    runner = _Runner(state, memory, states, layer, sliding_window, config, unseen, hindrance, given, in_graph, options)
    done = []
    for stretch in stretches:
        s = stretch.part
        inputs = query, key, value, view
        if not s.covers(q_len, k_len):
            rows = slice(None) if s.row is None else slice(s.row, s.row + 1)
            queries, keys = slice(s.q_start, s.q_stop), slice(s.k_start, s.k_stop)
            inputs = (query[rows, :, queries], key[rows, :, keys], value[rows, :, keys], view[rows, :, queries])
        pairs = s.pairs * (batch if s.row is None else 1)
        done += [(stats, pairs) for stats in runner.run(stretch, q_len, *inputs)]
    if memory is not None:
        plain = all(stretch.way == "plain" for stretch in stretches)
        memory.done(plain and all(stats.path == "sparse" for stats, _ in done))
    record(module, layer, sliding_window, query, key, done, runner.reason)
    return out


def _among_ranks(
    module: torch.nn.Module,
    parallel: Any,
    config: Config,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    is_causal: bool | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attend` in a model that is patched with a group: `query` has this rank's tokens, and the keys are on all ranks.
    The mask was read when the tokens were divided."""
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise NotImplementedError("group: bidirectional attention is not divided among ranks; expected a causal layer")
    if are_given():
        raise NotImplementedError("key_scores: the ranks of a group select by the scores of their method alone")
    query, key, value = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (query, key, value))
    batch, heads, q_len, _ = query.shape
    out = torch.empty((batch, q_len, heads, value.shape[3]), dtype=query.dtype, device="cpu")
    layer = getattr(module, "layer_idx", None)
    done = parallel.attend(
        layer, config, query, key, value, out.transpose(1, 2), window=sliding_window, scale=scaling, softcap=softcap,
        sinks=None if sinks is None else sinks.detach().float(),
    )  # fmt: skip
    record(module, layer, sliding_window, query, key, *done)
    return out


class Stretch(NamedTuple):
    """A part of a call that is computed at once. `way` is one of

    - "plain": causal within a window; the config applies;
    - "sides": every query sees the keys on both sides of it within a window; the config applies;
    - "full": every query sees every key;
    - "ranged": one interval of keys for each query, `table` [B, n, 2];
    - "listed": several intervals, `table` is (indptr, indices, spans) of `masks.key_lists`;
    - "joined": several intervals, `table` [B, m, n, 2]: one call for each, the results weighted by their shares of the
      softmax's sum.

    Intervals are relative to the first key of the part. `of_sides`: whether the part is bidirectional attention that
    runs exact."""

    way: Literal["plain", "sides", "full", "ranged", "listed", "joined"]
    part: MaskPart
    table: Any = None
    of_sides: bool = False


def plan(
    attention_mask: torch.Tensor | None,
    batch: int,
    q_len: int,
    k_len: int,
    sliding_window: int | None,
    causal: bool,
    config: Config,
    *,
    alone: bool,
    sides: bool,
    heads: int | None = None,
) -> list[Stretch]:
    """The stretches of a call, in order. `alone`: nothing is stored about the keys of earlier calls. `sides`: whether
    bidirectional attention may leave keys out. `heads`: those of the queries.

    Queries that see no key are in no stretch, nor is padding where bidirectional attention leaves keys out.
    """
    whole = MaskPart(None, 0, q_len, 0, k_len, sliding_window if causal else None, 1)
    if attention_mask is None:
        if causal:
            return [Stretch("plain", whole)]
        if sides and q_len == k_len and config.leaves_out(q_len, k_len, causal=False):
            return [Stretch("sides", whole)]
        return [Stretch("full", whole, of_sides=True)]
    ranges = ranges_of(attention_mask, batch, q_len, k_len, sliding_window, causal, heads)
    if ranges.shape[1] > 1:
        if (lists := key_lists(ranges, k_len)) is not None:
            return [Stretch("listed", whole, lists)]
        return [Stretch("joined", whole, ranges)]
    ranges = ranges[:, 0]
    if q_len == k_len > 1 and (found := two_sided(ranges)) is not None:
        return [stretch for part in found for stretch in _two_sided_stretches(part, ranges, config, sides)]
    parts = None if q_len == 1 and alone else mask_parts(ranges, least_stretch(config), late=k_len - q_len)
    one = (
        parts is not None
        and len(parts) == 1
        and parts[0].row in (None, 0)
        and parts[0].q_stop - parts[0].q_start == q_len
    )
    # Windows and tables too: only in a call of its own does a row get the tiles, and so the bits, that it has alone.
    # And short rows, which the C core computes by another path.
    apart = parts is not None and (
        not config.exact
        or config.skip is not None
        or any(p.window or p.ranged or p.q_stop - p.q_start == p.k_stop - p.k_start <= _core.DECODE_ROWS for p in parts)
    )
    if parts is None or not (one or apart):
        # No key could be left out here, and one call with the table computes exactly what the mask says.
        return [Stretch("ranged", whole, ranges)]
    return [Stretch("ranged", p, p.table(ranges)) if p.ranged else Stretch("plain", p) for p in parts]


def _two_sided_stretches(part: MaskPart, ranges: np.ndarray, config: Config, sides: bool) -> list[Stretch]:
    """The stretches of the tokens of a batch row (or of all rows, if they are alike) that see each other."""
    tokens = part.q_stop - part.q_start
    if sides and config.leaves_out(tokens, tokens, part.window, causal=False):
        return [Stretch("sides", part)]
    # Exact: padding sees what the mask says too. Each row is a call of its own, and has the bits that it has alone.
    rows = ranged_rows(ranges, part.row)
    return [Stretch("ranged", row, row.table(ranges), of_sides=True) for row in rows]


def one_sided(module: torch.nn.Module, config: Config, q_len: int, k_len: int) -> str:
    """Why bidirectional attention of `module` runs exact whatever `config` says, as a reason of a record; else "". The
    lengths are those of the call."""
    if config.exact:
        return ""
    if not config.options.has_both_sides:
        return f"bidirectional: method={config.method!r} selects keys for causal attention only"
    if not reads_text(module):
        return "bidirectional: attention between the parts of a picture or a sound runs exact"
    if q_len != k_len:
        return f"bidirectional: attention of {q_len:,} queries to {k_len:,} keys, not as many, runs exact"
    return ""


def _refuse_half_a_mask(attention_mask: torch.Tensor | None, q_len: int, sliding_window: int | None) -> None:
    """Raises NotImplementedError for a bidirectional window that the mask does not express."""
    if sliding_window is not None and q_len > 1 and getattr(attention_mask, "ndim", 2) == 2:
        raise NotImplementedError(
            'attention_mask: bidirectional sliding-window attention needs a mask of four dimensions; "dhsa" received '
            + ("none" if attention_mask is None else "padding only")
        )


class _Runner:
    """Computes the stretches of one call: exact where sparse attention would take longer, with what earlier calls
    stored about the keys, and with what other layers of this forward pass found if `Config.share` is set.

    `reason`: why a stretch ran exact although keys could be left out (of several, the first). Else `unseen`, the reason
    why the keys of a cache are cut again, if a stretch cut them. Else ""."""

    def __init__(
        self,
        state: State | None,
        memory: Memory | None,
        states: States | None,
        layer: int | None,
        kind: int | None,
        config: Config,
        unseen: str,
        hindrance: str,
        given: np.ndarray | None,
        in_graph: bool,
        options: dict[str, Any],
    ) -> None:
        self._state, self._memory, self._layer, self._kind, self._unseen = state, memory, layer, kind, unseen
        self._hindrance, self._given, self._in_graph, self._states = hindrance, given, in_graph, states
        self._config, self._options = config, options
        self._exact = EXACT if config.skip is None else EXACT.replace(skip=config.skip)
        self.reason = ""

    def run(
        self,
        stretch: Stretch,
        q_len: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> list[RunStats]:
        """Computes one stretch, into `out`. `q_len`: the number of queries of the whole call."""
        options: dict[str, Any] = {**self._options, "out": out}
        self.reason = self.reason or self._why_exact(stretch, q.shape[2], k.shape[2])
        if stretch.way == "sides":
            return [self._chosen(stretch.part, q, k, v, self._config, causal=False, **options)]
        if stretch.way == "full":
            return [functional.run(q, k, v, self._exact, causal=False, **options)[2]]
        if stretch.way == "ranged":
            return [functional.run(q, k, v, self._exact, key_ranges=stretch.table, **options)[2]]
        if stretch.way == "listed":
            indptr, indices, spans = stretch.table
            selection = Selection._trusted(indptr, indices, shape=(len(q), 1, 1), query_block=q.shape[2])
            return [functional.run_selected(q, k, v, selection, key_ranges=spans, **options)[2]]
        if stretch.way == "joined":
            return _attend_to_intervals(q, k, v, stretch.table, out, self._options)
        alone = q.shape[2] == 1 < q_len  # a stretch of one query is no decoding step
        return [self._chosen(stretch.part, q, k, v, self._exact if alone else self._config, **options)]

    def _why_exact(self, stretch: Stretch, q_len: int, k_len: int) -> str:
        """The reason why a stretch runs exact although the config would leave keys out; else ""."""
        if stretch.way in ("plain", "sides"):
            return ""
        if stretch.of_sides:
            return self._hindrance if self._config.leaves_out(k_len, k_len, self._kind, causal=False) else ""
        if not self._config.leaves_out(q_len, k_len, self._kind):
            return ""
        several = stretch.way in ("listed", "joined")
        of = "gives queries several intervals of keys" if several else "is neither causal nor a sliding window"
        return f"mask: a part of it {of}, which runs exact"

    def _chosen(
        self,
        s: MaskPart,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        config: Config,
        *,
        causal: bool = True,
        **options: Any,
    ) -> RunStats:
        """Attention to the keys that `config` selects: causal, or with causal=False on both sides."""
        if why := break_even.reason(config, q, k, s.window, causal=causal):
            self.reason = self.reason or why
            config = break_even.fallback(config.skip)
        elif not self.reason and not config.exact and causal:
            self.reason = self._unseen
        if self._memory is not None and not config.exact and causal:
            options |= self._memory.of(s.row, s.k_start)
        options["causal"] = causal
        if self._given is not None and not config.exact and q.shape[2] > 1:
            if s.k_stop > self._given.shape[2]:
                raise ValueError(f"key_scores: got {self._given.shape[2]} scores, but the call has {s.k_stop} keys")
            rows = slice(None) if s.row is None else slice(s.row, s.row + 1)
            scores = self._given[rows, :, s.k_start : s.k_stop]
            return functional.run(q, k, v, config, window=s.window, key_scores=scores, **options)[2]
        if self._state is not None and self._layer is not None and not config.exact and causal and not self._in_graph:
            part, of = self._state.reuse_of(self._layer)
            if part:
                del options["causal"]
                where = s[:5]
                if self._state.dense_anchor(self._layer):
                    self.reason = self.reason or DENSE_ANCHOR
                    options["dense"] = self._exact
                sharing = self._state.sharing
                return sharing.reuse(self._layer, of, where, q, k, v, config, window=s.window, **options)
        if self._state is not None and config.share is not None and q.shape[2] > 1:  # steps share nothing
            where = s[:5]
            sharing = self._state.sharing
            return sharing.run(self._layer, self._kind, where, q, k, v, config, window=s.window, **options)
        remembers = config.options.remembers if not config.exact and causal else ""
        if self._in_graph and (remembers == "layers" or (remembers == "calls" and config.decode == "dhsa")):
            raise NotImplementedError(
                f"method: {config.method!r} uses what it found in earlier {remembers}, which a model that is compiled, "
                "exported or run under a TorchDispatchMode (such as FlopCounterMode) does not show; run it without "
                "these, or take another method"
            )
        if remembers == "layers" and self._state is not None:
            where = s[:5]
            del options["causal"]
            sharing = self._state.sharing
            return sharing.cascade(self._layer, self._kind, where, q, k, v, config, window=s.window, **options)
        if remembers == "calls" and config.decode == "dhsa" and s.window is None:
            return self._indexed(s, q, k, v, config, **options)
        return functional.run(q, k, v, config, window=s.window, **options)[2]

    def _indexed(
        self, s: MaskPart, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: Config, **options: Any
    ) -> RunStats:
        """Attention to the keys that a method selects by its index of earlier calls, which this call extends. Without
        an index a decoding step is exact."""
        state = None
        if self._states is not None:
            at = (config.options, config.heads, s.row or 0, s.k_start, len(q))
            state = self._states.setdefault(at, config.options.new_state())
        if q.shape[2] == 1:
            config = config.replace(dense_tail=0)
        seen: dict[str, Any] = {name: options[name] for name in ("scale", "softcap", "causal")} | {"window": s.window}
        rest = {name: options[name] for name in ("sinks", "out")}
        begin, seconds = perf_counter(), 0.0
        keys = queries = np.zeros(0)
        if state is not None and (q.shape[2] == 1 or not config.leaves_out(q.shape[2], k.shape[2])):
            queries, keys = (t.detach().double().numpy() for t in (q, k))
            state.open(queries, keys)
        leaves_out = config.leaves_out(q.shape[2], k.shape[2], s.window)
        if q.shape[2] == 1 and leaves_out and (state is None or not state.holds(len(q))):
            self.reason = self.reason or NO_INDEX
            leaves_out = False
        if not leaves_out:
            if state is not None:
                state.update(queries, keys, None, seen)
                seconds = perf_counter() - begin
            stats = functional.run(q, k, v, self._exact, **seen, **rest)[2]
            return stats._replace(select_seconds=stats.select_seconds + seconds)
        selection = functional.select(q, k, config, state=state, **seen)
        seconds = perf_counter() - begin
        del seen["causal"]
        _, _, stats = functional.run_selected(q, k, v, selection, skip=config.skip, **seen, **rest)
        return stats._replace(select_seconds=seconds)


def _attend_to_intervals(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: np.ndarray,
    out: torch.Tensor,
    options: dict[str, Any],
) -> list[RunStats]:
    """Exact attention of queries that see several intervals of keys, `ranges` [B, m, Lq, 2], into `out`. Each interval
    is one call, and its result is weighted by its share of the softmax's sum. Only the first call has the sinks, which
    count once."""
    total = lse = None
    done = []
    for j in range(ranges.shape[1]):
        table = np.ascontiguousarray(ranges[:, j])
        if j == 1:
            options = {**options, "sinks": None}
        part, part_lse, stats = functional.run(query, key, value, EXACT, key_ranges=table, return_lse=True, **options)
        done.append(stats)
        if total is None:
            total, lse = part.float(), part_lse
            continue
        both = torch.logaddexp(lse, part_lse)
        nothing = both == -torch.inf  # neither interval has a key; the difference of the two would be NaN
        old, new = ((one - both).exp_().masked_fill_(nothing, 0)[..., None] for one in (lse, part_lse))
        total = total * old + part * new
        lse = both
    out.copy_(total)
    return done
