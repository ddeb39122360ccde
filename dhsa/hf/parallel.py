"""Context parallel: the ranks of a group divide the tokens of a prompt among them (`patch(group=...)`).

Hooks on the decoder, the part of the model that has the layers, hand it this rank's columns of the inputs and gather
its output. In between, `attend` takes the place of attention to the keys of one process, and `PartLayer` that of a
cache's layers. All ranks call the model with the same inputs, and get the same output. Who computes what is in
dhsa/distributed/layout.py, messages are in link.py and attention across ranks in attention.py.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import dhsa
from dhsa.config import Config
from dhsa.distributed.attention import Turn, exact
from dhsa.distributed.layout import REPLICATED, Layout, Run
from dhsa.distributed.link import GroupError, Link, process_group
from dhsa.distributed.sparse import METHODS, sparse
from dhsa.functional import RunStats

from . import break_even
from .compat import cache_in, cache_option
from .records import LayerRun
from .refusals import forward_only

__all__ = ["Parallel", "PartLayer", "shard"]

TIMEOUT = 300.0  # seconds
_HANDLES = "_dhsa_parallel"  # on the decoder and on the patched model
_by_group: weakref.WeakValueDictionary[Any, Parallel] = weakref.WeakValueDictionary()
_running = threading.local()  # .turn, during a call of the decoder; .keep, during one of the patched model
_SHARD = "_dhsa_shard"  # on a tensor of `shard`: (columns of the whole, rank, ranks)


# ---- the cache -------------------------------------------------------------------------------------------------------


class PartLayer(DynamicLayer):
    """A layer of a cache that holds one rank's part of the keys. It counts the tokens of all ranks."""

    is_croppable = False
    is_initialized: bool
    keys: Any
    values: Any

    def __init__(self, window: int | None, ranks: int) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        self.layout = Layout(ranks)
        self.cuts: dict[int, tuple[int, ...]] = {}  # of each batch row: `dhsa.distributed.sparse.edges_of`

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores what this rank keeps of new keys and values, and returns what it held and all new ones."""
        turn: Turn | None = getattr(_running, "turn", None)
        if turn is None:
            raise RuntimeError(
                "cache: holds one rank's part of the keys; use it only with the model, patched with the same group"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = key_states, value_states
        if self.keys.numel():
            keys, values = torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
        kept = sum(run.length for run in turn.layout.in_call(turn.rank, self.window))
        first = 0 if self.window is None else max(0, kept - self.window + 1)
        # Copies, where a view would hold the memory of keys that are not kept.
        whole = first == 0 and kept == keys.shape[2]
        self.keys, self.values = (x if whole else x[:, :, first:kept].clone() for x in (keys, values))
        self.layout = turn.layout
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return self.layout.columns

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.layout.columns + int(query_length), 0

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.layout, self.cuts = Layout(self.layout.ranks), {}

    def crop(self, *args: Any) -> None:
        raise NotImplementedError(
            "cache: the keys of a group of ranks cannot be cropped (assisted generation needs it)"
        )

    def _select(self, rows: Sequence[int]) -> None:
        if self.is_initialized:
            index = torch.tensor(rows)
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.layout = self.layout.reordered(rows)
        self.cuts = {new: self.cuts[old] for new, old in enumerate(rows) if old in self.cuts}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(torch.arange(self.layout.batch)[indices].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(self.layout.batch).repeat_interleave(repeats).tolist())


# ---- the model -------------------------------------------------------------------------------------------------------


class Parallel:
    """The part of one rank in a patched model: its link to the others, and the hooks."""

    def __init__(self, model: PreTrainedModel, group: Any, timeout: float | None) -> None:
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float))):
            raise TypeError(f"timeout: expected seconds or None, got {type(timeout).__name__}")
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout: expected seconds above 0, got {timeout}")
        if getattr(model, "_pp_stage", None) is not None:
            raise NotImplementedError(
                "group: the stages of a pipeline hand on the hidden states of all tokens; expected a model with all "
                "layers on each rank (pp_size=1)"
            )
        self.model = model
        self.decoder = decoder_of(model)
        self.link = Link(group, TIMEOUT if timeout is None else float(timeout))
        self.alike = True
        self.configs: tuple[Config, ...] = ()
        self.pairs: dict[int, int] = {}  # of a query of this rank and a key, for each layer in its last call

    def __deepcopy__(self, memo: dict[int, Any]) -> Parallel:
        return self  # a group cannot be copied

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("group: a model that is patched with a group cannot be pickled; unpatch it first")

    def begin(self, configs: Sequence[Config], said: Mapping[str, Any], reuse: bool = False) -> None:
        """Checks that all ranks have the same versions, model and configs. `said`: what the config and the model are,
        as the other ranks are told. `reuse`: whether layers take the lists of others."""
        if reuse:
            raise NotImplementedError("reuse: each layer of a group of ranks selects for itself; expected no `reuse`")
        for config in configs:
            refuse_config(config)
        self.configs = tuple(configs)
        facts = {
            "dhsa": dhsa.__version__,
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            **said,
            "weights": _weights(self.decoder),
            "machine": [
                dhsa.build_info()["isa"],
                dhsa.get_num_threads(),
                torch.get_num_threads(),
                torch.backends.cpu.get_cpu_capability(),
            ],
        }
        found = self.link.agree("patch", facts, frozenset(facts) - {"machine"})
        self.alike = all(one["machine"] == facts["machine"] for one in found)

    def end(self, error: BaseException | None = None) -> None:
        """To be called when the model is unpatched, with the exception that is the reason, if there is one."""
        if error is not None and not isinstance(error, GroupError):
            self.link.end(f"{self.link.name(self.link.rank)} raised {type(error).__name__}: {error}")
        self.link.close()

    def attach(self) -> None:
        self.detach(self.model)
        _by_group[self.link.group] = self
        handles = [
            self.decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            self.decoder.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        if self.model is not self.decoder:
            handles += [
                self.model.register_forward_pre_hook(self._before_model, with_kwargs=True),
                self.model.register_forward_hook(self._after_model, always_call=True),
            ]
        self.model.__dict__[_HANDLES] = handles

    @staticmethod
    def detach(model: torch.nn.Module) -> None:
        for handle in model.__dict__.pop(_HANDLES, ()):
            handle.remove()

    # ---- the patched model, with its head -------------------------------------------------------------------------

    def _before_model(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise NotImplementedError("group: a model that is compiled cannot divide a prompt among ranks")
        keep = _bound(module, args, kwargs).get("logits_to_keep", 0)
        _running.keep = keep if isinstance(keep, int) and keep > 0 else None
        if kwargs.get("output_hidden_states"):
            _running.keep = None

    def _after_model(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        _running.keep = None
        if output is not None and getattr(output, "logits", None) is not None:
            output.logits = self.same(output.logits)
        return output

    def same(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor that every rank computed of the same numbers: that of rank 0 where their machines differ."""
        return x if self.alike else self._of_first(x)

    def _of_first(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor of rank 0, on all ranks: where CPUs differ, so do their results, by rounding."""
        x = x.detach().contiguous()
        link = self.link
        if link.rank == 0:
            link.exchange(dict.fromkeys(link.others(), x), {}).done()
            return x
        return link.exchange({}, {0: torch.empty_like(x)}).take(0)

    # ---- the decoder ----------------------------------------------------------------------------------------------

    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if torch.compiler.is_compiling():
            raise NotImplementedError("group: a model that is compiled cannot divide a prompt among ranks")
        try:
            return (), self._divided(module, _bound(module, args, kwargs))
        except Exception as error:
            _running.turn = None
            if not isinstance(error, GroupError):
                self.link.end(f"{self.link.name(self.link.rank)} raised {type(error).__name__}: {error}")
            raise

    def _divided(self, module: torch.nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the decoder for this rank's columns."""
        x = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        if x is None or not isinstance(x, torch.Tensor):
            raise TypeError(f"input_ids: expected a tensor, got {type(x).__name__}")
        if given.get("return_dict") is False:
            raise NotImplementedError("return_dict=False: a group of ranks needs outputs with names")
        whole = getattr(x, _SHARD, None)
        if whole is not None and whole[1:] != (self.link.rank, self.link.size):
            raise ValueError(
                f"input_ids: is the shard of rank {whole[1]} of {whole[2]}, but this is rank {self.link.rank} of "
                f"{self.link.size}"
            )
        batch, columns = x.shape[0], x.shape[1] if whole is None else whole[0]
        cache = self._cache(module, given)
        past = Layout(self.link.size) if cache is None else cache.layers[0].layout
        if past.pieces and past.batch != batch:
            raise ValueError(f"input_ids: has {batch} rows, but those of the cache are {past.batch}")
        first, tokens = rows_of_mask(given.get("attention_mask"), batch, columns, past)
        layout = past.extended(tokens, **self._way(max(tokens), max(past.tokens, default=0) + max(tokens)))
        if whole is not None and (past.pieces or layout.pieces[-1].replicated or max(first)):
            raise NotImplementedError(
                "input_ids: a shard is for whole prompts without padding, longer than a short turn; pass all tokens"
            )
        turn = Turn(layout, self.link.rank)
        keep = getattr(_running, "keep", None)
        where = given.get("position_ids")
        self.link.agree(
            "model",
            {
                "the number of tokens": [batch, columns, list(tokens)],
                "the number of tokens in the cache": list(past.tokens),
                "the prompt": None if whole is not None else _digest(x, where),
                "the call": [keep, cache is not None, x.dtype.is_floating_point],
            },
        )
        wanted = torch.cat([torch.arange(run.start, run.stop) for run in turn.queries])
        index = (torch.tensor(first)[:, None] + wanted).clamp_(max=columns - 1)
        if where is None:
            where = torch.arange(past.columns, past.columns + columns)[None]
        for name, value in given.items():
            if name in _KNOWN or not isinstance(value, torch.Tensor) or value.ndim < 2:
                continue
            raise NotImplementedError(f"{name}: a group of ranks cannot divide this argument")
        for name in ("cache_position", "return_dict"):
            given.pop(name, None)
        if whole is None:
            x = x.gather(1, index if x.ndim == 2 else index[..., None].expand(-1, -1, x.shape[2]))
        given["input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"] = x
        given["position_ids"] = where.expand(batch, -1).gather(1, index)
        # Of four dimensions, so that transformers hands it on as it is. `attend` does not read it.
        given["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        if cache is not None:
            given.update(cache_option(module, cache))
        _running.turn, _running.first, _running.width = turn, first, columns
        _running.layers = () if cache is None else cache.layers
        return given

    def _way(self, tokens: int, keys: int) -> dict[str, Any]:
        """How a piece is divided. Parts begin with a block of queries where a block shares a list. Sparse layers do as
        much for a late block as for an early one; exact ones do more, so that each rank takes some of both."""
        sparse = [config for config in self.configs if tokens > 1 and config.leaves_out(tokens, keys)]
        unit = math.lcm(*(config.query_block for config in sparse))
        return {"unit": unit, "balanced": not sparse, "whole": not sparse}

    def _cache(self, module: torch.nn.Module, given: dict[str, Any]) -> Any:
        """The cache of this call with layers that hold a part of the keys; None if there is to be none."""
        cache = cache_in((), given)
        config: Any = module.config
        if cache is None:
            wanted = given.get("use_cache")
            if not (getattr(config, "use_cache", False) if wanted is None else wanted):
                return None
            cache = DynamicCache(config=config)
        if type(cache) is not DynamicCache:
            raise NotImplementedError(
                f"cache: expected a DynamicCache, which a group of ranks can divide, got {type(cache).__name__}"
            )
        if all(isinstance(layer, PartLayer) for layer in cache.layers) and cache.layers:
            layouts = {layer.layout for layer in cache.layers}
            if len(layouts) > 1:
                raise ValueError(
                    "cache: a call that failed left its layers with different tokens; begin with a new one"
                )
            if cache.layers[0].layout.ranks != self.link.size:
                raise ValueError(
                    f"cache: was divided among {cache.layers[0].layout.ranks} ranks, but the group has {self.link.size}"
                )
            return cache
        if cache.get_seq_length():
            raise ValueError("cache: holds tokens of a call without this group; begin with a new one")
        kinds = {DynamicLayer, DynamicSlidingWindowLayer}
        layers = DynamicCache(config=config).layers
        if other := [type(layer).__name__ for layer in layers if type(layer) not in kinds]:
            raise NotImplementedError(f"cache: a group of ranks cannot divide a {other[0]}")
        cache.layers = [PartLayer(getattr(layer, "sliding_window", None), self.link.size) for layer in layers]
        return cache

    def _after(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        turn: Turn | None = getattr(_running, "turn", None)
        _running.turn = None
        if output is None or turn is None:  # an exception
            error = sys.exc_info()[1]
            if error is not None and not isinstance(error, GroupError):
                self.link.end(f"{self.link.name(self.link.rank)} raised {type(error).__name__}: {error}")
            return output
        keep = getattr(_running, "keep", None)
        first, width = _running.first, _running.width
        output.last_hidden_state = self._all(turn, output.last_hidden_state, first, width, keep)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(self._all(turn, x, first, width, keep) for x in output.hidden_states)
        return output

    def _all(self, turn: Turn, x: torch.Tensor, first: Sequence[int], width: int, keep: int | None) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:  # a gradient would not reach the other ranks
            return forward_only(lambda y: self._gathered(turn, y, first, width, keep), x)
        return self._gathered(turn, x, first, width, keep)

    def _gathered(
        self, turn: Turn, x: torch.Tensor, first: Sequence[int], width: int, keep: int | None
    ) -> torch.Tensor:
        """The hidden states [B, columns, hidden] of all ranks as the model has them, or of the last `keep` columns.
        Columns of padding are zeros."""
        link, piece = self.link, turn.piece
        if piece.replicated:
            x = self.same(x)
        least = 0 if keep is None else max(0, width - keep)
        low = max(0, least - max(first))
        wanted = {
            rank: [
                Run(run.piece, max(run.start, low), run.stop)
                for run in (turn.queries if piece.replicated else (Run(0, *part) for part in piece.parts[rank]))
                if run.stop > low
            ]
            for rank in range(link.size)
        }
        held, offset = [], 0
        for run in turn.queries:
            start = max(run.start, low)
            if run.stop > start:
                held.append(x[:, offset + start - run.start : offset + run.length])
            offset += run.length
        out = x.new_zeros(x.shape[0], width - least, x.shape[2])
        others = [] if piece.replicated else link.others()
        mine = torch.cat(held, dim=1).contiguous() if held and wanted[link.rank] else x[:, :0].contiguous()
        counts = {rank: sum(run.length for run in wanted[rank]) for rank in range(link.size)}
        transfer = link.exchange(
            dict.fromkeys(others, mine) if counts[link.rank] else {},
            {rank: x.new_empty(x.shape[0], counts[rank], x.shape[2]) for rank in others if counts[rank]},
        )
        for rank in range(link.size):
            if rank == link.rank:
                part = mine
            elif counts[rank] and not piece.replicated:
                part = transfer.take(rank)
            else:
                continue
            offset = 0
            for run in wanted[rank]:
                _place(out, part[:, offset : offset + run.length], run, first, piece.tokens, least)
                offset += run.length
        transfer.done()
        return out

    # ---- the attention function -----------------------------------------------------------------------------------

    def attend(
        self,
        layer: int | None,
        config: Config,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        *,
        window: int | None,
        scale: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> Done:
        """Attention of this rank's queries to the keys of all ranks, into `out` [B, H, Lq, E]."""
        turn: Turn | None = getattr(_running, "turn", None)
        if turn is None:
            raise RuntimeError(
                "group: attention was called outside of a call of the decoder, so its tokens are not known"
            )
        past = turn.past.held(turn.rank, None if window is None else window - 1)
        expected = sum(run.length for run in past) + turn.columns
        if key.shape[2] != expected or query.shape[2] != turn.columns:
            raise RuntimeError(
                f"group: {query.shape[2]} queries and {key.shape[2]} keys, expected {turn.columns} and {expected}; the "
                "cache keeps other keys than the layer's window says"
            )
        sent, waited = self.link.sent, self.link.waited
        kept = _running.layers[layer] if layer is not None and layer < len(_running.layers) else None
        options: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap, "sinks": sinks}
        done, reason, dense = [], "", []
        for row in range(query.shape[0]):
            why = self._why_exact(turn, row, config, query, key, window, kept is not None)
            if why is not None:
                reason = reason or why
                dense.append(row)
                continue
            part = turn.rows([row])
            one = slice(row, row + 1)
            cuts = kept.cuts.get(row, ()) if kept is not None and window is None else ()
            stats = sparse(
                self.link, part, query[one], key[one], value[one], config, cuts=cuts, **options, out=out[one]
            )
            done.append((stats, part.pairs(window)))
            if kept is not None and window is None:
                kept.cuts[row] = (*cuts, part.layout.tokens[0])
        if dense:
            part, fallback = turn.rows(dense), break_even.fallback(config.skip)
            whole = len(dense) == query.shape[0]
            q, k, v = (x if whole else x[dense] for x in (query, key, value))
            target = out if whole else torch.empty_like(out[dense])
            stats = exact(self.link, part, q, k, v, fallback, **options, out=target)
            if not whole:
                out[dense] = target
            if window is not None and window < max(part.layout.tokens):
                stats = stats._replace(path="window")
            done.append((stats, part.pairs(window)))
        self.pairs[-1 if layer is None else layer] = sum(pairs for _, pairs in done)
        return Done(done, reason, self.link.sent - sent, self.link.waited - waited)

    def whole(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """During a call without a cache: tensors of the shapes that queries and keys of one process would have, for the
        row with most tokens. Only their shapes and dtypes are to be used."""
        count = max(_running.turn.piece.tokens)
        q, k = (x[:1, :, :1].expand(-1, -1, count, -1) for x in (query, key))
        return q, k

    def together(self, runs: Sequence[LayerRun]) -> list[LayerRun]:
        """The records of one call of the model by all ranks, which all call this: densities of all queries, seconds of
        the slowest rank, bytes of all ranks."""
        weighted, slowest = ("density", "skipped"), ("select_seconds", "attend_seconds", "wait_seconds")
        said = [
            {
                "pairs": self.pairs[run.layer],
                "sums": [getattr(run, name) * self.pairs[run.layer] for name in weighted],
                "seconds": [getattr(run, name) for name in slowest],
                "sent": run.sent_bytes,
            }
            for run in runs
        ]
        every = [one["runs"] for one in self.link.agree("records", {"runs": said}, frozenset())]
        found = []
        for run, *each in zip(runs, *every, strict=True):
            pairs = sum(one["pairs"] for one in each)
            sums = (math.fsum(part) for part in zip(*(one["sums"] for one in each), strict=True))
            seconds = map(max, zip(*(one["seconds"] for one in each), strict=True))
            found.append(
                run._replace(
                    **dict(zip(weighted, (part / pairs for part in sums), strict=True)),
                    **dict(zip(slowest, seconds, strict=True)),
                    sent_bytes=sum(one["sent"] for one in each),
                )
            )
        return found

    def _why_exact(
        self,
        turn: Turn,
        row: int,
        config: Config,
        query: torch.Tensor,
        key: torch.Tensor,
        window: int | None,
        cached: bool,
    ) -> str | None:
        """Why a row is attended to exactly: a reason of a record, "" if no key could be left out. None: it is not."""
        count, keys = turn.piece.tokens[row], turn.layout.tokens[row]
        if window is not None and cached:  # what the cache of one process would have
            keys = min(keys - count, window - 1) + count
        if count < 2 or not config.leaves_out(count, keys, window):
            return ""
        # Only their shapes count: those of one process.
        q = query[:1, :, :1].expand(-1, -1, count, -1)
        k = key[:1, :, :1].expand(-1, -1, keys, -1)
        return break_even.reason(config, q, k, window) or None


class Done(NamedTuple):
    """What a layer did in a call: of each part what was done and its pairs of a query and a key, why a part was exact
    although keys could be left out, the bytes that this rank sent, and the seconds that it waited."""

    parts: list[tuple[RunStats, int]]
    reason: str
    sent_bytes: int
    wait_seconds: float


_KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position")


def _bound(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by their names."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _place(
    out: torch.Tensor, part: torch.Tensor, run: Run, first: Sequence[int], tokens: Sequence[int], least: int
) -> None:
    """Writes the columns of a run of the piece to where the model has them."""
    if len(set(first)) == 1 and len(set(tokens)) == 1:
        out[:, first[0] + run.start - least : first[0] + run.stop - least] = part
        return
    for row, (begin, n) in enumerate(zip(first, tokens, strict=True)):
        start, stop = max(run.start, least - begin), min(run.stop, n)
        if start < stop:
            out[row, begin + start - least : begin + stop - least] = part[row, start - run.start : stop - run.start]


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside `model` that has its attention layers, which is called with the tokens. Raises ValueError if
    there is none."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "layer_idx", None), int)]
    found = [
        part
        for part in model.modules()
        if isinstance(part, PreTrainedModel) and layers and {*map(id, layers)} <= {*map(id, part.modules())}
    ]
    if not found:
        raise ValueError(f"group: {type(model).__name__} has no decoder whose tokens could be divided")
    decoder = found[-1]  # a module comes before its parts
    names = inspect.signature(type(decoder).forward).parameters
    if getattr(decoder.config, "is_encoder_decoder", False) or "position_ids" not in names:
        raise ValueError(f"group: {type(decoder).__name__} does not take the positions of its tokens")
    return decoder


def refuse_config(config: Config) -> None:
    """Raises NotImplementedError for what a group of ranks does not serve."""
    if config.exact:
        return
    if config.method not in METHODS:
        raise NotImplementedError(
            f"method: {config.method!r} selects by keys that other ranks hold; a group of ranks serves "
            f"{', '.join(METHODS)}"
        )
    if config.options.has_chunks and config.boundaries != "fixed":
        raise NotImplementedError(
            f"boundaries: a group of ranks cuts chunks of a fixed size; expected 'fixed', got {config.boundaries!r}"
        )
    if config.decode != "exact":
        raise NotImplementedError(
            f"decode: steps of a group of ranks attend to all keys; expected 'exact', got {config.decode!r}"
        )
    if config.share is not None:
        raise NotImplementedError(
            f"share: layers of a group of ranks share nothing; expected None, got {config.share!r}"
        )


def rows_of_mask(mask: Any, batch: int, columns: int, past: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the tokens of each row of a piece begin, and how many they are. Raises NotImplementedError for a mask of
    another kind than padding at an end of a row."""
    if mask is None:
        if not past.even:
            raise ValueError("attention_mask: expected the mask of all tokens, since the cached prompt was padded")
        return (0,) * batch, (columns,) * batch
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        got = f"{mask.ndim} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise NotImplementedError(f"attention_mask: a group of ranks takes a padding mask [B, L] or None, got {got}")
    if tuple(mask.shape) != (batch, past.columns + columns):
        raise ValueError(f"attention_mask: expected shape [{batch}, {past.columns + columns}], got {list(mask.shape)}")
    seen = mask.to(torch.bool).numpy()
    edges = np.diff(seen.astype(np.int8), axis=1, prepend=0)
    if ((edges == 1).sum(axis=1) > 1).any():
        row = int(np.flatnonzero((edges == 1).sum(axis=1) > 1)[0])
        raise NotImplementedError(f"attention_mask: row {row} has padding between its tokens, which a group refuses")
    if past.pieces and tuple(seen[:, : past.columns].sum(axis=1).tolist()) != past.tokens:
        raise ValueError("attention_mask: differs from the masks that the cached tokens came with")
    new = seen[:, past.columns :]
    tokens = tuple(new.sum(axis=1).tolist())
    if not max(tokens):
        raise ValueError("attention_mask: no row has a token")
    return tuple(np.where(new.any(axis=1), new.argmax(axis=1), 0).tolist()), tokens


def shard(inputs: Mapping[str, Any], group: Any) -> dict[str, Any]:
    """The part of a prompt that this rank computes, for `model(**inputs)` of a model patched with the same group.

    It saves the memory of `inputs_embeds`, or the reading of tokens that other ranks compute; ids alone take 8 bytes a
    token, so that the whole prompt on every rank costs little. `generate` needs the whole prompt.

    Args:
        inputs: what a tokenizer returns: "input_ids" or "inputs_embeds" of the whole prompt, the same on every rank,
            without padding.
        group: a ProcessGroup of backend gloo, or a DeviceMesh of one dimension.

    Returns:
        A dict of the arguments for this rank. The other arguments stay as they are.

    Raises:
        TypeError: `group` or an input is of another type. ValueError: no model is patched with this group.
        NotImplementedError: the prompt is padded, or so short that every rank computes all of it.
    """
    group = process_group(group)
    parallel = _by_group.get(group)
    if parallel is None:
        raise ValueError("group: no model is patched with it; call shard inside of `with patched(model, group=group)`")
    name = "input_ids" if inputs.get("inputs_embeds") is None else "inputs_embeds"
    x = inputs.get(name)
    if x is None or not isinstance(x, torch.Tensor) or x.ndim < 2:
        raise TypeError(f"{name}: expected a tensor [B, L], got {type(x).__name__}")
    batch, columns = x.shape[:2]
    first, tokens = rows_of_mask(inputs.get("attention_mask"), batch, columns, Layout(group.size()))
    layout = Layout(group.size()).extended(tokens, **parallel._way(columns, columns))
    if layout.pieces[0].replicated or max(first) or min(tokens) < columns:
        raise NotImplementedError(
            f"{name}: a shard is of a prompt without padding that is longer than {REPLICATED} tokens; pass all tokens"
        )
    part = torch.cat([x[:, run.start : run.stop] for run in layout.queries(group.rank())], dim=1)
    setattr(part, _SHARD, (columns, group.rank(), group.size()))
    return {**inputs, name: part}


def _digest(x: torch.Tensor, positions: torch.Tensor | None) -> str:
    made = hashlib.sha256(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    if positions is not None:
        made.update(positions.detach().contiguous().view(-1).numpy().tobytes())
    return made.hexdigest()[:32]


def _weights(model: torch.nn.Module) -> str:
    """A digest of a few numbers of each weight, which tells most other models and dtypes apart."""
    made = hashlib.sha256()
    for name, weight in model.named_parameters():
        weight = weight.to_local() if hasattr(weight, "to_local") else weight  # of a tensor-parallel model
        some = weight.detach().reshape(-1)[:: max(1, weight.numel() // 8)][:8].float().numpy()
        made.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + some.tobytes())
    return made.hexdigest()[:16]
