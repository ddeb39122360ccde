"""Config: every choice of the method in one frozen, validated object, and the paper's preset.

Not here: what the choices do (functional.py and the C core; docs in reference.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from typing import Any, Literal

from dhsa import _core
from dhsa._arrays import check_int, type_name
from dhsa.predictor import BoundaryPredictor

# Positions are the C enums of dhsa.h.
BOUNDARIES = ("similarity", "fixed", "predictor")
METHODS = (
    "rows", "dhsa", "window", "block", "vertical_slash", "xattention", "proxy", "hisa", "power", "oracle",
)  # fmt: skip
SCORES = ("rows", "block")
POOLINGS = ("mean", "mean_sqrt")
HEADS = ("group", "all", "head")
DECODES = ("exact", "dhsa")
SHARED = ("boundaries", "selections")

SCORE_OF = {"rows": "rows", "dhsa": "block"}  # the methods of chunks
METHOD_OF = {score: method for method, score in SCORE_OF.items()}
NO_MASS = ("dhsa", "window", "vertical_slash", "power")  # scores that are no shares of attention mass
PER_HEAD = ("vertical_slash", "xattention", "proxy")  # as their sources have it
STRIDES = {"xattention": 8, "proxy": 4}

PAPER_GAPS_PER_BLOCK = 8
MIN_SHORTLIST = 8192  # keys; up to here scoring every chunk is cheap
MOST_SHORT_CHUNKS = 8192
MAX_QUERY_BLOCK = 65536


# What the sources of methods ask for, where it is not the default: see Config.source.
SOURCES: dict[str, dict[str, Any]] = {
    "xattention": {"budget": None, "mass": 0.9, "key_block": 128, "stride": 8},
    "proxy": {"budget": None, "mass": 0.95, "heads": "head", "stride": 4},
}


def _number(value: Any, name: str, expected: str = "a number") -> float:
    """`value` as a float; TypeError or ValueError naming the field otherwise."""
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name}: expected a number, got {type_name(value)}")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {type_name(value)}") from None
    except OverflowError:
        raise ValueError(f"{name}: expected {expected}, got an int beyond every float") from None


def check_choice(value: object, name: str, choices: tuple[str, ...]) -> int:
    """The position of `value` in `choices`; TypeError or ValueError naming the field otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {type_name(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return choices.index(value)


class _CoreArgs:
    """What the C core takes, made once from a Config's fields, so that a call costs no Python work beyond num_chunks.

    A class of its own, since annotations in the dataclass would be fields.
    """

    _asked: frozenset[str]  # the fields that were given, not defaulted
    _kind: int
    _theta: float
    _nms: int
    _paper_gaps: bool
    _score_args: tuple[int, int, int, int, int, int]
    _select_args: tuple[Any, ...]
    _exact: bool  # no key is ever left out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_CoreArgs):
    """How the keys that each block of queries attends to are found. Frozen; make variants with `replace`.

    The default is what measured best without training: row scores over chunks cut by key similarity.

    Args:
        method: how keys are found. "rows" (chunks; softmax over chunk means for small groups of queries and each head,
            squared and summed: this project's), "dhsa" (chunks; the paper's mean query of the block times mean key of
            the chunk), "window" (the first and the most recent keys: StreamingLLM), "block" (softmax of the block's
            mean query over the mean keys of fixed blocks), "vertical_slash" (MInference), "xattention", "proxy"
            (ProxyAttn), "hisa", "power" (PowerAttention), "oracle" (the exact scores, slow, for study).
            `Config.source` gives the settings of their sources.
        budget: keys a block of queries may see, forced ones (`sink`, `local`) counted, 1 to 2**31 - 1. None: all of
            them, so exact attention unless there is a `mass`.
        mass: in place of a number of keys, the share of each block's estimated attention mass that its keys are to
            hold, above 0 up to 1: keys are taken, best first, until they do, forced ones counted first. `budget` is
            then the most keys (None: no limit). Not for methods whose scores are no shares of mass: "dhsa",
            "window", "vertical_slash", "power".
        floor: with `mass`, the least keys. None: sink + local.
        query_block: queries that share one selection, 1 to 65536.
        sink: the first keys of the sequence, always selected.
        local: the most recent candidate keys, always selected. `sink + local` must not exceed the budget. Where the
            defaults would, a quarter and a half of the budget take their place, at most what the other leaves.
        dense_tail: blocks that hold one of the last `dense_tail` queries see every key (0: none). The paper computes an
            instruction at the prompt's end densely.
        heads: which heads share a selection: "group" (those of one KV head), "all", or "head" (none). None: the
            method's own, "head" for "vertical_slash", "xattention" and "proxy", else "group".
        boundaries: how keys are cut into chunks: "similarity" (at dips of the cosine between neighbouring means, no
            training), "fixed" (every `chunk_size` keys), "predictor" (a trained network, see `predictor`).
        chunk_size: keys in a chunk for boundaries="fixed".
        num_chunks: the most gaps to cut at (so one chunk more). None: L // 4 under "rows" (8192 from 32K keys on,
            L // 8 from 64K), L // 8 for plain row scores and under "dhsa"; with the paper's network its own
            (L // query_block) * 8, for which "paper" asks otherwise. L is the number of keys.
        boundary_window: tokens on each side of a gap that the similarity looks at.
        theta: a gap's score must exceed it. None: -inf, with the paper's network 1.1.
        nms: a gap must lie more than this many keys from every better one. None: 2 under "rows", 4 for plain row scores
            and under "dhsa"; with the paper's network 8.
        score: another name of two methods, kept: "rows" for "rows", "block" for "dhsa". Afterwards the name of the
            chunks' score, None for methods without chunks.
        rows: mean queries that a full block is reduced to for "rows" and "hisa", 1 to query_block. None:
            query_block // 2, for plain row scores and "hisa" query_block // 4.
        by_length: for "rows": a chunk counts in the softmax as often as it has keys, and its score is that of one key;
            means are rounded to bf16. False: plain row scores in float32, with defaults of their own. None: True,
            unless the method was named by `score="rows"`, as before there was a choice.
        shortlist: for "rows": where a block has more candidates, a coarse look at groups of 16 chunks leaves about this
            many keys, of which the chunks are then scored: the cost of a block no longer grows with the prompt. At
            least the budget; 0: never. None: 4 budgets, at least 8192; never under `mass`.
        pooling: for "dhsa": "mean", or "mean_sqrt" (the paper's: the mean times the square root of the length).
        key_block: keys of a block for "block", "xattention", "proxy" and "hisa".
        stride: of the samples of "xattention" and "proxy", a divisor of key_block. None: 8 and 4.
        predictor: a BoundaryPredictor, for boundaries="predictor". None: `BoundaryPredictor.default()`, the weights for
            Gemma 3 270M that come with the package. In a patched model each layer takes its own network where there is
            one; elsewhere the one for all layers is meant.
        skip: leaves out tiles of keys in which every probability is less than `skip` times the largest that its row has
            met in the keys before, 0 < skip < 1; None: none. Works with any method and with exact attention, not for so
            few rows as in a decoding step. By tile (128 keys, 256 where 16-bit numbers are multiplied as they are) for
            a group of rows at a time, so what is left out depends on the instruction set, but stays below that bound.
        decode: what a patched model does in decoding steps. "exact": the new token attends to all keys. "dhsa": to
            `budget` of them, in layers without a sliding window (the paper's decoding): the prompt's chunks are kept
            beside the cache, generated tokens form one more, and the current token its own. For methods of chunks. A
            compiled model does not see its cache: there each step makes the chunks anew, which is no gain.
        share: what the layers of a patched model take from one another in a forward. "boundaries": the first sparse
            layer cuts keys, the others use its cuts (where their keys are the same positions). "selections": the first
            sparse layer of each kind, full or sliding of one width, selects, the others of the kind attend by its
            lists. None: each finds its own. Shared cuts save next to nothing; shared lists a tenth (float32) to a third
            (bfloat16) of a call at 16K, for nothing measurable over three layers of Gemma 3 270M, but 4 to 7 % of
            perplexity over the thirty of SmolLM2 (docs/EVALUATION.md).
            `dhsa.select` and `boundaries` work on one layer all the same, `dhsa.attention` refuses. Compiled models
            do not share.
        break_even: keys below which a call of a patched model runs exact, because leaving keys out would cost
            more time than it saves; 0: none. None: by measured costs of dtype, shape, budget and query_block, for
            method="rows" with a budget (dhsa/hf/break_even.py). Functions that take arrays do as they are told.

    Raises:
        TypeError: an unknown name, or a value of the wrong type. ValueError: a value out of range. Both name the field.

    Source: arXiv 2510.24606; `skip`: BLASST, arXiv 2512.12087; "similarity" and "rows" are this project's.
    """

    method: Literal[
        "rows", "dhsa", "window", "block", "vertical_slash", "xattention", "proxy", "hisa", "power", "oracle"
    ] = "rows"
    budget: int | None = 2048
    mass: float | None = None
    floor: int | None = None
    query_block: int = 64
    sink: int = 16
    local: int = 128
    dense_tail: int = 64
    heads: Literal["group", "all", "head"] | None = None
    boundaries: Literal["similarity", "fixed", "predictor"] = "similarity"
    chunk_size: int = 8
    num_chunks: int | Literal["paper"] | None = None
    boundary_window: int = 4
    theta: float | None = None
    nms: int | None = None
    score: Literal["rows", "block"] | None = None
    rows: int | None = None
    by_length: bool | None = None
    shortlist: int | None = None
    pooling: Literal["mean", "mean_sqrt"] = "mean"
    key_block: int = 128
    stride: int | None = None
    predictor: BoundaryPredictor | None = None
    skip: float | None = None
    decode: Literal["exact", "dhsa"] = "exact"
    share: Literal["boundaries", "selections"] | None = None
    break_even: int | None = None

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        keep("method", METHODS[check_choice(self.method, "method", METHODS)])
        if self.score is not None:
            check_choice(self.score, "score", SCORES)
            if "method" in self._asked and METHOD_OF[self.score] != self.method:
                raise ValueError(
                    f"score: {self.score!r} is another name for method={METHOD_OF[self.score]!r}, "
                    f"but method is {self.method!r}"
                )
            keep("method", METHOD_OF[self.score])
        if self.by_length is None:
            keep("by_length", self.method == "rows" and self.score is None)
        elif not isinstance(self.by_length, bool):
            raise TypeError(f"by_length: expected a bool or None, got {type_name(self.by_length)}")
        elif self.by_length and self.method != "rows":
            raise ValueError(f'by_length: is a choice of method="rows", got method={self.method!r}')
        keep("score", SCORE_OF.get(self.method))
        if self.heads is None:
            keep("heads", "head" if self.method in PER_HEAD else "group")
        if self.budget is not None:
            keep("budget", check_int(self.budget, "budget", 1, 2**31 - 1))
        keep("query_block", check_int(self.query_block, "query_block", 1, MAX_QUERY_BLOCK))
        for name, low in (
            ("sink", 0), ("local", 0), ("dense_tail", 0), ("chunk_size", 1), ("boundary_window", 1), ("key_block", 1)
        ):  # fmt: skip
            keep(name, check_int(getattr(self, name), name, low, 2**31 - 1))
        if self.stride is not None:
            keep("stride", check_int(self.stride, "stride", 1, 2**31 - 1))
        else:
            keep("stride", STRIDES.get(self.method))
        if (
            self.stride is not None
            and self.method in STRIDES
            and (self.stride > _core.MAX_STRIDE or self.key_block % self.stride)
        ):
            raise ValueError(
                f"stride: got {self.stride}, expected a divisor of key_block = {self.key_block}, "
                f"at most {_core.MAX_STRIDE}"
            )
        forced = self.sink + self.local
        if self.budget is not None and forced > self.budget:
            raise ValueError(
                f"budget: sink + local = {self.sink} + {self.local} exceed the budget of {self.budget}; "
                "forced keys count in the budget, so lower sink or local with it"
            )
        if self.mass is not None:
            keep("mass", _number(self.mass, "mass"))
            if not 0 < self.mass <= 1:
                raise ValueError(f"mass: expected a share above 0, at most 1, got {self.mass}")
            if self.method in NO_MASS:
                raise ValueError(
                    f"mass: the scores of method={self.method!r} are no shares of attention mass; give a budget"
                )
        if self.floor is not None:
            if self.mass is None:
                raise ValueError("floor: is the least number of keys where `mass` decides, but mass is None")
            keep("floor", check_int(self.floor, "floor", forced, self.budget or 2**31 - 1))
        if self.num_chunks != "paper" and self.num_chunks is not None:
            if isinstance(self.num_chunks, str):
                raise ValueError(f"num_chunks: expected an int, 'paper' or None, got {self.num_chunks!r}")
            keep("num_chunks", check_int(self.num_chunks, "num_chunks", 1, 2**31 - 1))
        if self.skip is not None:
            keep("skip", _number(self.skip, "skip", "a number above 0 and below 1"))
            if not 0 < self.skip < 1:
                raise ValueError(f"skip: expected a number above 0 and below 1, got {self.skip}")
        check_choice(self.decode, "decode", DECODES)
        if self.decode == "dhsa" and self.method not in SCORE_OF:
            raise ValueError(
                f'decode: "dhsa" chooses among chunks, which method={self.method!r} has not; '
                'take "exact", or method "rows" or "dhsa"'
            )
        if self.share is not None:
            check_choice(self.share, "share", SHARED)
            if self.share == "boundaries" and self.score is None:
                raise ValueError(f"share: method={self.method!r} cuts no chunks, so there are no boundaries to share")
        if self.break_even is not None:
            keep("break_even", check_int(self.break_even, "break_even", 0, 2**31 - 1))
        if self.theta is not None:
            keep("theta", _number(self.theta, "theta", "a finite number or -inf"))
            if not (math.isfinite(self.theta) or self.theta == -math.inf):
                raise ValueError(f"theta: expected a finite number or -inf, got {self.theta}")
        if self.nms is not None:
            keep("nms", check_int(self.nms, "nms", 0, 2**31 - 1))
        if self.rows is not None:
            keep("rows", check_int(self.rows, "rows", 1, self.query_block))
        kind = check_choice(self.boundaries, "boundaries", BOUNDARIES)
        pooling = check_choice(self.pooling, "pooling", POOLINGS)
        heads = check_choice(self.heads, "heads", HEADS)
        if self.predictor is not None and not isinstance(self.predictor, BoundaryPredictor):
            raise TypeError(f"predictor: expected a dhsa.BoundaryPredictor, got {type_name(self.predictor)}")
        if self.boundaries == "predictor" and self.predictor is None:
            keep("predictor", BoundaryPredictor.default())
        # The paper's network is picked from as the paper says, ours as similarity is.
        paper = self.boundaries == "predictor" and self.predictor.architecture == "attention"
        rows = self.rows if self.rows is not None else max(1, self.query_block // (2 if self.by_length else 4))
        if self.shortlist is not None:
            keep("shortlist", check_int(self.shortlist, "shortlist", 0, 2**31 - 1))
            if 0 < self.shortlist < (self.budget or 0):
                raise ValueError(f"shortlist: {self.shortlist} keys are fewer than the budget of {self.budget}")
        keep("_kind", kind)
        keep("_paper_gaps", self.num_chunks == "paper" or paper)
        keep("_theta", self.theta if self.theta is not None else (1.1 if paper else -math.inf))
        keep("_nms", self.nms if self.nms is not None else 8 if paper else 2 if self.by_length else 4)
        score = SCORES.index(self.score or "rows")  # rules of candidates other than upstream's are those of rows
        keep(
            "_score_args",
            (score, pooling, heads, self.query_block, rows, int(bool(self.by_length))),
        )
        keep("_exact", self.budget is None and self.mass is None)
        # More than any length is all keys; where every block is exact, functional.py sets the budget.
        budget = 2**63 - 1 if self.budget is None else min(self.budget, 2**63 - 1)
        shortlist = max(MIN_SHORTLIST, min(4 * budget, 2**63 - 1)) if self.shortlist is None else self.shortlist
        floor = forced if self.floor is None else min(self.floor, 2**63 - 1)
        keep(
            "_select_args",
            (
                METHODS.index(self.method), budget, self.mass or 0.0, floor, self.sink, self.local, self.dense_tail,
                self.key_block, self.stride or 0, min(shortlist, 2**63 - 1), self._score_args,
            ),
        )  # fmt: skip

    def _leaves_out(self, q_len: int, k_len: int, window: int | None) -> bool:
        """Does causal attention of the last `q_len` of `k_len` positions leave keys out in some block? The core's rule
        (dhsa_span_exact): of the blocks before the dense tail the last one has the most candidates."""
        if self._exact:
            return False
        least = self._select_args[1] if self.mass is None else self._select_args[3]
        end = (q_len - self.dense_tail) // self.query_block * self.query_block if self.dense_tail else q_len
        return end > 0 and k_len - q_len + end > least and not (window is not None and window <= least)

    def _num_chunks(self, length: int) -> int:
        """The most gaps to cut at for `length` keys."""
        if isinstance(self.num_chunks, int):
            return self.num_chunks
        if self._paper_gaps:
            return length // self.query_block * PAPER_GAPS_PER_BLOCK
        # Means of chunks of 4 keys are an eighth of K's bytes in fp32, a quarter in bf16: past 32K keys that is enough.
        return max(length // 8, min(length // 4, MOST_SHORT_CHUNKS) if self.by_length else 0)

    def _boundary_args(self, length: int) -> tuple:
        """The boundary config of _core for `length` keys; ValueError if the predictor has no network for all layers."""
        return (
            self._kind,
            self.chunk_size,
            self._num_chunks(length),
            self.boundary_window,
            self._theta,
            self._nms,
            self.predictor._args() if self.boundaries == "predictor" and self.predictor is not None else None,
        )

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, validated again. Unknown names raise TypeError.

        `method` and `score` name one thing, so that a change of one lets go of the other.
        """
        kept = {name: getattr(self, name) for name in self._asked}
        for name, other in (("method", "score"), ("score", "method")):
            if name in changes and other not in changes:
                kept.pop(other, None)
        return Config(**kept | changes)

    @classmethod
    def source(cls, method: str, **overrides: Any) -> Config:
        """The setting that a method's source names, as far as it is known; `overrides` are fields of Config.

        Raises:
            TypeError, ValueError: an unknown method, or as Config does.
        """
        check_choice(method, "method", METHODS)
        return cls(**{"method": method, **SOURCES.get(method, {}), **overrides})

    @classmethod
    def paper(cls, **overrides: Any) -> Config:
        """The setting of the paper's first version: query blocks of 256, 128 local keys, one selection for all heads,
        block scores with sqrt(length) pooling, (L // 256) * 8 gaps more than 8 apart.

        Boundaries come from `predictor=` if one is given, else from key similarity with the same number of gaps.
        `overrides` are fields of Config. Source: arXiv 2510.24606v1.
        """
        values: dict[str, Any] = {
            "query_block": 256,
            "sink": 128,
            "local": 128,
            "heads": "all",
            "method": "dhsa",
            "pooling": "mean_sqrt",
            "num_chunks": "paper",
            "nms": 8,
        }
        budget = overrides.get("budget", cls.budget)
        if isinstance(budget, int) and budget < 256:
            values["local"], values["sink"] = max(budget // 2, 0), max(budget // 4, 0)
        if overrides.get("predictor") is not None:
            values["boundaries"] = "predictor"
        values.update(overrides)
        return cls(**values)


FIELDS = tuple(field.name for field in dataclasses.fields(Config))


def _check_names(names: Any) -> None:
    for name in names:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; the fields are {', '.join(FIELDS)}"
            raise TypeError(f"Config has no field '{name}'{hint}")


_generated_init = Config.__init__


def _fit_defaults(values: dict[str, Any]) -> None:
    """Shrinks a default `sink` and `local` into a budget that is smaller than both; what was asked for stays."""
    budget = values.get("budget", Config.budget)
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        return  # none, or an error that validation names
    forced = {name: values.get(name, getattr(Config, name)) for name in ("sink", "local")}
    if not all(isinstance(n, int) for n in forced.values()) or sum(forced.values()) <= budget:
        return
    for name, other, part in (("local", "sink", 2), ("sink", "local", 4)):
        if name not in values:
            left = budget - values[other] if other in values else budget
            values[name] = max(0, min(forced[name], budget // part, left))


@functools.wraps(_generated_init)
def _init(self: Config, **values: Any) -> None:
    _check_names(values)
    # Fields that None leaves to others (a method's own) stay so in variants.
    asked = frozenset(name for name in values if values[name] is not None or getattr(Config, name) is not None)
    _fit_defaults(values)
    object.__setattr__(self, "_asked", asked)
    _generated_init(self, **values)


Config.__init__ = _init  # type: ignore[method-assign]
