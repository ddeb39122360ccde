"""Config: every choice of the method in one frozen, validated object, and the paper's preset.

Not here: what the choices do (functional.py and the C core; docs in reference.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from typing import Any, Literal

from dhsa._arrays import check_int, type_name
from dhsa.predictor import BoundaryPredictor

# Positions are the C enums of dhsa.h.
BOUNDARIES = ("similarity", "fixed", "predictor")
SCORES = ("rows", "block")
POOLINGS = ("mean", "mean_sqrt")
HEADS = ("group", "all", "head")

PAPER_GAPS_PER_BLOCK = 8
MAX_QUERY_BLOCK = 65536


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
    _predictor_args: tuple[Any, ...] | None
    _score_args: tuple[int, int, int, int, int]
    _select_args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_CoreArgs):
    """How the keys that each block of queries attends to are found. Frozen; make variants with `replace`.

    The default is what measured best without training: row scores over chunks cut by key similarity.

    Args:
        budget: keys a block of queries may see, forced ones (`sink`, `local`) counted; None: exact attention.
        query_block: queries that share one selection, 1 to 65536.
        sink: the first keys of the sequence, always selected.
        local: the most recent candidate keys, always selected. `sink + local` must not exceed the budget. Where the
            defaults would, a quarter and a half of the budget take their place, at most what the other leaves.
        dense_tail: blocks that hold one of the last `dense_tail` queries see every key (0: none). The paper computes an
            instruction at the prompt's end densely.
        heads: which heads share a selection: "group" (those of one KV head), "all", or "head" (none).
        boundaries: how keys are cut into chunks: "similarity" (at dips of the cosine between neighbouring means, no
            training), "fixed" (every `chunk_size` keys), "predictor" (the paper's trained network, see `predictor`).
        chunk_size: keys in a chunk for boundaries="fixed".
        num_chunks: the most gaps to cut at (so one chunk more). None: L // 8 for "similarity", the paper's
            (L // query_block) * 8 for "predictor"; "paper" asks for the latter with "similarity" too. L is the number
            of keys.
        boundary_window: tokens on each side of a gap that the similarity looks at.
        theta: a gap's score must exceed it. None: -inf for "similarity", 1.1 for "predictor".
        nms: a gap must lie more than this many keys from every better one. None: 4 for "similarity", 8 for "predictor".
        score: "rows" (softmax over chunk means for small groups of queries and each head, squared and summed) or
            "block" (the paper's: mean query of the block times mean key of the chunk).
        rows: mean queries that a full block is reduced to for score="rows", 1 to query_block. None: query_block // 4.
        pooling: for score="block": "mean", or "mean_sqrt" (the paper's: the mean times the square root of the length).
        predictor: a BoundaryPredictor, for boundaries="predictor".

    Raises:
        TypeError: an unknown name, or a value of the wrong type. ValueError: a value out of range. Both name the field.

    Source: arXiv 2510.24606; "similarity" and "rows" are this project's.
    """

    budget: int | None = 2048
    query_block: int = 128
    sink: int = 128
    local: int = 256
    dense_tail: int = 64
    heads: Literal["group", "all", "head"] = "group"
    boundaries: Literal["similarity", "fixed", "predictor"] = "similarity"
    chunk_size: int = 8
    num_chunks: int | Literal["paper"] | None = None
    boundary_window: int = 4
    theta: float | None = None
    nms: int | None = None
    score: Literal["rows", "block"] = "rows"
    rows: int | None = None
    pooling: Literal["mean", "mean_sqrt"] = "mean"
    predictor: BoundaryPredictor | None = None

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        if self.budget is not None:
            keep("budget", check_int(self.budget, "budget", 1))
        keep("query_block", check_int(self.query_block, "query_block", 1, MAX_QUERY_BLOCK))
        for name, low in (("sink", 0), ("local", 0), ("dense_tail", 0), ("chunk_size", 1), ("boundary_window", 1)):
            keep(name, check_int(getattr(self, name), name, low, 2**31 - 1))
        if self.budget is not None and self.sink + self.local > self.budget:
            raise ValueError(
                f"budget: sink + local = {self.sink} + {self.local} exceed the budget of {self.budget}; "
                "forced keys count in the budget, so lower sink or local with it"
            )
        if self.num_chunks != "paper" and self.num_chunks is not None:
            if isinstance(self.num_chunks, str):
                raise ValueError(f"num_chunks: expected an int, 'paper' or None, got {self.num_chunks!r}")
            keep("num_chunks", check_int(self.num_chunks, "num_chunks", 1, 2**31 - 1))
        if self.theta is not None:
            if isinstance(self.theta, (bool, str)):
                raise TypeError(f"theta: expected a number, got {type_name(self.theta)}")
            try:
                keep("theta", float(self.theta))
            except TypeError:
                raise TypeError(f"theta: expected a number, got {type_name(self.theta)}") from None
            except OverflowError:
                raise ValueError("theta: expected a finite number or -inf, got an int beyond every float") from None
            if not (math.isfinite(self.theta) or self.theta == -math.inf):
                raise ValueError(f"theta: expected a finite number or -inf, got {self.theta}")
        if self.nms is not None:
            keep("nms", check_int(self.nms, "nms", 0, 2**31 - 1))
        if self.rows is not None:
            keep("rows", check_int(self.rows, "rows", 1, self.query_block))
        kind = check_choice(self.boundaries, "boundaries", BOUNDARIES)
        score = check_choice(self.score, "score", SCORES)
        pooling = check_choice(self.pooling, "pooling", POOLINGS)
        heads = check_choice(self.heads, "heads", HEADS)
        if self.predictor is not None and not isinstance(self.predictor, BoundaryPredictor):
            raise TypeError(f"predictor: expected a dhsa.BoundaryPredictor, got {type_name(self.predictor)}")
        if self.boundaries == "predictor" and self.predictor is None:
            raise ValueError("predictor: boundaries='predictor' needs one (dhsa.BoundaryPredictor.load)")

        learned = self.boundaries == "predictor"
        rows = self.rows if self.rows is not None else max(1, self.query_block // 4)
        keep("_kind", kind)
        keep("_theta", self.theta if self.theta is not None else (1.1 if learned else -math.inf))
        keep("_nms", self.nms if self.nms is not None else (8 if learned else 4))
        keep("_predictor_args", self.predictor._core_args if learned and self.predictor is not None else None)
        keep("_score_args", (score, pooling, heads, self.query_block, rows))
        budget = self.budget if self.budget is None else min(self.budget, 2**63 - 1)  # more than any length is all keys
        keep("_select_args", (budget, self.sink, self.local, self.dense_tail, self._score_args))

    def _num_chunks(self, length: int) -> int:
        """The most gaps to cut at for `length` keys."""
        if isinstance(self.num_chunks, int):
            return self.num_chunks
        if self.num_chunks == "paper" or self.boundaries == "predictor":
            return length // self.query_block * PAPER_GAPS_PER_BLOCK
        return length // 8

    def _boundary_args(self, length: int) -> tuple:
        """The boundary config of _core for `length` keys."""
        return (
            self._kind,
            self.chunk_size,
            self._num_chunks(length),
            self.boundary_window,
            self._theta,
            self._nms,
            self._predictor_args,
        )

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed, validated again. Unknown names raise TypeError."""
        return Config(**{name: getattr(self, name) for name in self._asked} | changes)

    @classmethod
    def paper(cls, **overrides: Any) -> Config:
        """The setting of the paper's first version: query blocks of 256, 128 local keys, one selection for all heads,
        block scores with sqrt(length) pooling, (L // 256) * 8 gaps more than 8 apart.

        Boundaries come from `predictor=` if one is given, else from key similarity with the same number of gaps.
        `overrides` are fields of Config. Source: arXiv 2510.24606v1.
        """
        values: dict[str, Any] = {
            "query_block": 256,
            "local": 128,
            "heads": "all",
            "score": "block",
            "pooling": "mean_sqrt",
            "num_chunks": "paper",
            "nms": 8,
        }
        budget = overrides.get("budget", cls.budget)
        if isinstance(budget, int) and budget < 2 * values["local"]:
            values["local"] = max(budget // 2, 0)
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
    asked = frozenset(values)
    _fit_defaults(values)
    object.__setattr__(self, "_asked", asked)
    _generated_init(self, **values)


Config.__init__ = _init  # type: ignore[method-assign]
