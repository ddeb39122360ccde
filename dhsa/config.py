"""Config: what every method of selection has in common, and the method with its own options, in one frozen object.
LayerConfigs: a Config for each layer of a model. Both are written to files of JSON and read from them.

What the choices do is in csrc/ and, readable, in dhsa.reference; the options of a method are in dhsa/methods/.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from dhsa import _core, methods
from dhsa._arrays import check_choice, check_int, check_number, type_name
from dhsa._files import read_json, replacing
from dhsa.methods.base import MAX_OPTION, Method
from dhsa.methods.dhsa import POOLINGS
from dhsa.methods.naming import OPTIONS, method_of, only_of, refuse_others
from dhsa.methods.rows import MIN_SHORTLIST
from dhsa.predictor import BoundaryPredictor

__all__ = [
    "BOUNDARIES",
    "DECODES",
    "FIELDS",
    "HEADS",
    "MAX_QUERY_BLOCK",
    "OPTIONS",
    "POOLINGS",
    "SCORES",
    "SHARED",
    "Config",
    "LayerConfigs",
]

BOUNDARIES = ("similarity", "fixed", "predictor")
_OF_SIMILARITY = ("num_chunks", "boundary_window", "theta", "nms")
SCORES = ("rows", "block")
HEADS = ("group", "all", "head")
DECODES = ("exact", "dhsa")
SHARED = ("boundaries", "selections")

MAX_QUERY_BLOCK = 65536

FORMAT, VERSION = "dhsa.config", 1  # of files
MAX_FILE_BYTES = 4 << 20  # a file of 1,000 layers has 600 KB
_KEYS = ("format", "version", "config", "layers", "model", "notes", "reuse", "dense_anchors")
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")  # no leading zeros: two names would be one layer
# The fields by which keys are cut, which layers that share boundaries must have in common.
_CUTS = ("method", "boundaries", "chunk_size", "num_chunks", "boundary_window", "theta", "nms", "predictor")

# Fields that were there before, and what to write in their place.
_GONE = {
    "score": "write method='rows' for score='rows', and method='dhsa' for score='block'",
    "by_length": "method='rows' always counts a chunk as often as it has keys; leave it out",
}


class _Derived:
    """What is made of a Config's fields. A class of its own, since annotations in the dataclass would be fields."""

    _asked: frozenset[str]  # the fields that were given, not defaulted
    _core: _core.Config  # what the C core takes


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Config(_Derived):
    """How the keys that each block of queries attends to are found. Frozen; make variants with `replace`.

    The default is what measured best without training: a list for each head, by the scores of pairs of neighbouring
    queries for pairs of neighbouring keys. `Config.fast` and `Config.faithful` are further points of the same trade of
    time for closeness to exact attention; `dhsa tune` finds those of a model.

    Args:
        method: how keys are found: the name of a method in `dhsa.methods.registry`, or an instance of its class, which
            holds its own options, for example `dhsa.methods.XAttention(stride=8)`. The attribute is always the name;
            `options` is the instance. With a name, the options may be given as further keyword arguments, and they are
            read as attributes, for example `config.stride`. `Config.source` gives the settings of the methods' sources.
        budget: the number of keys that a block of queries may see, forced ones (`sink`, `local`) included, 1 to
            2**31 - 1. None: all of them, so attention is exact unless there is a `mass`.
        mass: in place of a number of keys, the share of each block's estimated attention mass that its keys are to
            hold, above 0 up to 1. Forced keys count first, then keys are taken, best first, until they hold it.
            `budget` is then the largest number of keys (None: no limit). Not for methods whose scores are not shares of
            mass (`has_mass` of its class).
        floor: with `mass`, the smallest number of keys. None: sink + local.
        query_block: queries that share one selection, 1 to 65536.
        sink: the number of keys at the start of the sequence that are always selected.
        local: the number of most recent candidate keys that are always selected; in bidirectional attention, of those
            around the middle of the block. `sink + local` must not exceed the budget. Where the defaults would, they
            are reduced: sink to at most a quarter of the budget, local to at most a half, and each to at most what the
            other leaves.
        dense_tail: blocks that hold one of the last `dense_tail` queries see every key (0: none). The paper computes an
            instruction at the end of the prompt densely. Bidirectional attention has none.
        heads: which heads share a selection: "group" (those of one KV head), "all", or "head" (none). None: the
            method's own default, "head" for "rows" and most others. In decoding steps the heads of a KV head share one,
            since each key is read once then.
        boundaries: how keys are cut into chunks: "similarity" (where the cosine similarity of neighbouring means is
            low; no training), "fixed" (every `chunk_size` keys), "predictor" (a trained network, see `predictor`).
            None: "fixed" under "rows", else "similarity"; also "similarity" where one of its options (`num_chunks`,
            `boundary_window`, `theta`, `nms`) is given.
        chunk_size: keys in a chunk for boundaries="fixed". None: 2 under "rows", else 8.
        num_chunks: the largest number of gaps to cut at (there is one chunk more). With L keys, None is L // 4 under
            "rows" (8192 from 32K keys on, L // 8 from 64K on), else L // 8; with the paper's network it is
            (L // query_block) * 8. "paper" is that number with any boundaries.
        boundary_window: tokens on each side of a gap that its similarity is computed from.
        theta: a gap is cut only if its score exceeds this. None: -inf, with the paper's network 1.1.
        nms: a gap is cut only if it lies more than this many keys from every cut with a better score. None: 2 under
            "rows", else 4; with the paper's network 8.
        predictor: a BoundaryPredictor, for boundaries="predictor". None: `BoundaryPredictor.default()`, the weights for
            Gemma 3 270M that come with the package. In a patched model each layer uses its own network where there is
            one; elsewhere the network for all layers is used.
        skip: tiles of keys are left out in which every probability is less than `skip` times the largest that its row
            has met in the keys before, 0 < skip < 1. None: none. It works with any method and with exact attention, but
            not for as few rows as in a decoding step. Tiles (128 keys; 256 where 16-bit numbers are multiplied without
            conversion) are left out for a group of rows at a time, so what is left out depends on the instruction set,
            but always stays below that bound.
        decode: what a patched model does in decoding steps. "exact": the new token attends to all keys. "dhsa": it
            attends to `budget` of them, in layers without a sliding window (the paper's decoding). The prompt's chunks
            are then kept beside the cache, generated tokens form one more chunk, and the current token its own. Only
            for methods of chunks, and for "retrieval", which keeps an index in place of chunks. A compiled model does
            not see its cache: each of its steps computes the chunks again, which saves nothing.
        share: what the layers of a patched model share in a forward pass. "boundaries": the first sparse layer cuts
            keys, and the others use its boundaries (where their keys are the same positions). "selections": the first
            sparse layer of each kind (full, or sliding of one width) selects, and the others of that kind use its
            lists. None: each layer cuts and selects for itself. Shared boundaries save next to nothing; shared lists
            save a tenth (float32) to a third (bfloat16) of a call at 16K. They cost nothing measurable over three
            layers of Gemma 3 270M, but 4 to 7 % of perplexity over the thirty of SmolLM2 (docs/EVALUATION.md).
            `dhsa.select` and `dhsa.boundaries`, which work on one layer, ignore it; `dhsa.attention` raises a
            ValueError. Compiled models do not share.
        break_even: the number of keys below which a call of a patched model runs exact, because leaving keys out would
            cost more time than it saves. 0: none. None: from measured costs, by dtype, shape, budget and query_block,
            for method="rows" with a budget (dhsa/hf/break_even.py). Functions that take arrays ignore it.

    Raises:
        TypeError: an unknown name, or a value of the wrong type. ValueError: a value out of range. Both name the field.

    Source: arXiv 2510.24606; `skip`: BLASST, arXiv 2512.12087; "similarity" and "rows" are this project's.
    """

    method: str = "rows"
    options: Method = dataclasses.field(default=methods.Rows(), init=False)
    budget: int | None = 1024
    mass: float | None = None
    floor: int | None = None
    query_block: int = 64
    sink: int = 16
    local: int = 128
    dense_tail: int = 64
    heads: Literal["group", "all", "head"] | None = None
    boundaries: Literal["similarity", "fixed", "predictor"] | None = None
    chunk_size: int | None = None
    num_chunks: int | Literal["paper"] | None = None
    boundary_window: int = 4
    theta: float | None = None
    nms: int | None = None
    predictor: BoundaryPredictor | None = None
    skip: float | None = None
    decode: Literal["exact", "dhsa"] = "exact"
    share: Literal["boundaries", "selections"] | None = None
    break_even: int | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            method: Literal[
                "rows",
                "dhsa",
                "window",
                "block",
                "vertical_slash",
                "xattention",
                "proxy",
                "hisa",
                "power",
                "oracle",
                "flexprefill",
                "stem",
                "quoka",
                "sparge",
                "sale",
                "hip",
                "hyper",
                "token_sparse",
                "moa",
                "tca",
                "spatten",
                "seer",
                "retrieval",
            ]
            | Method = "rows",
            budget: int | None = 1024,
            mass: float | None = None,
            floor: int | None = None,
            query_block: int = 64,
            sink: int | None = None,
            local: int | None = None,
            dense_tail: int = 64,
            heads: Literal["group", "all", "head"] | None = None,
            boundaries: Literal["similarity", "fixed", "predictor"] | None = None,
            chunk_size: int | None = None,
            num_chunks: int | Literal["paper"] | None = None,
            boundary_window: int = 4,
            theta: float | None = None,
            nms: int | None = None,
            predictor: BoundaryPredictor | None = None,
            skip: float | None = None,
            decode: Literal["exact", "dhsa"] = "exact",
            share: Literal["boundaries", "selections"] | None = None,
            break_even: int | None = None,
            rows: int | None = None,
            shortlist: int | None = None,
            pooling: Literal["mean", "mean_sqrt"] = "mean",
            key_block: int = 128,
            stride: int | None = None,
            tau: float = 0.1,
            beta: float = 0.2,
            decay: float = 0.7,
            similarity: float = 0.3,
            bits: int = 4,
            threshold: float = 0.0,
            reach: int = 256,
            seed: int = 0,
            head_windows: tuple[int, ...] = (),
            head_budgets: tuple[int, ...] = (),
            gates: str | os.PathLike[str] | None = None,
            layer: int | None = None,
            every: int = 4,
            links: int = 64,
            probes: int = 16,
        ) -> None: ...

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        options = self.__dict__.pop("_given")
        keep("options", options)
        if self.heads is None:
            keep("heads", options.heads)
        if self.boundaries is None:
            keep("boundaries", "similarity" if self._asked & set(_OF_SIMILARITY) else options.boundaries)
        if self.chunk_size is None:
            keep("chunk_size", options.chunk_size)
        if self.budget is not None:
            keep("budget", check_int(self.budget, "budget", 1, MAX_OPTION))
        keep("query_block", check_int(self.query_block, "query_block", 1, MAX_QUERY_BLOCK))
        for name, low in (("sink", 0), ("local", 0), ("dense_tail", 0), ("chunk_size", 1), ("boundary_window", 1)):
            keep(name, check_int(getattr(self, name), name, low, MAX_OPTION))
        forced = self.sink + self.local
        if self.budget is not None and forced > self.budget:
            raise ValueError(
                f"budget: sink + local = {self.sink} + {self.local} exceed the budget of {self.budget}; "
                "forced keys count in the budget, so lower sink or local with it"
            )
        if self.mass is not None:
            keep("mass", check_number(self.mass, "mass"))
            if not 0 < self.mass <= 1:
                raise ValueError(f"mass: expected a share above 0, at most 1, got {self.mass}")
            if not options.has_mass:
                raise ValueError(
                    f"mass: the scores of method={self.method!r} are no shares of attention mass; give a budget"
                )
        if self.floor is not None:
            if self.mass is None:
                raise ValueError("floor: is the least number of keys where `mass` decides, but mass is None")
            keep("floor", check_int(self.floor, "floor", forced, self.budget or MAX_OPTION))
        if self.num_chunks != "paper" and self.num_chunks is not None:
            if isinstance(self.num_chunks, str):
                raise ValueError(f"num_chunks: expected an int, 'paper' or None, got {self.num_chunks!r}")
            keep("num_chunks", check_int(self.num_chunks, "num_chunks", 1, MAX_OPTION))
        if self.skip is not None:
            keep("skip", check_number(self.skip, "skip", "a number above 0 and below 1"))
            if not 0 < self.skip < 1:
                raise ValueError(f"skip: expected a number above 0 and below 1, got {self.skip}")
        check_choice(self.decode, "decode", DECODES)
        if self.decode == "dhsa" and not (options.has_chunks or options.remembers == "calls"):
            raise ValueError(
                f'decode: "dhsa" chooses among chunks, which method={self.method!r} has not; '
                'take "exact", or method "rows", "dhsa" or "retrieval"'
            )
        if self.share is not None:
            check_choice(self.share, "share", SHARED)
            if self.decode == "dhsa" and options.remembers == "calls":
                raise ValueError(
                    f"share: with decode='dhsa' each layer of method={self.method!r} keeps an index; expected None"
                )
            if self.share == "boundaries" and not options.has_chunks:
                raise ValueError(f"share: method={self.method!r} cuts no chunks, so there are no boundaries to share")
        if self.break_even is not None:
            keep("break_even", check_int(self.break_even, "break_even", 0, MAX_OPTION))
        if self.theta is not None:
            keep("theta", check_number(self.theta, "theta", "a finite number or -inf"))
            if not (math.isfinite(self.theta) or self.theta == -math.inf):
                raise ValueError(f"theta: expected a finite number or -inf, got {self.theta}")
        if self.nms is not None:
            keep("nms", check_int(self.nms, "nms", 0, MAX_OPTION))
        check_choice(self.boundaries, "boundaries", BOUNDARIES)
        check_choice(self.heads, "heads", HEADS)
        if self.predictor is not None and not isinstance(self.predictor, BoundaryPredictor):
            raise TypeError(f"predictor: expected a dhsa.BoundaryPredictor, got {type_name(self.predictor)}")
        if self.boundaries == "predictor" and self.predictor is None:
            keep("predictor", BoundaryPredictor.default())
        self._prepare()

    def _prepare(self) -> None:
        """Parse and check the fields once, for the C core."""
        own: dict[str, Any] = {"rows": max(1, self.query_block // 4), "shortlist": None}
        own |= self.options.core(query_block=self.query_block, budget=self.budget)
        if self.budget is None:
            own["shortlist"] = 0  # all keys: nothing to choose from
        elif own["shortlist"] is None:
            own["shortlist"] = max(MIN_SHORTLIST, 4 * self.budget)
        # The paper's network is picked from as the paper says, ours as similarity is.
        network = self.predictor if self.boundaries == "predictor" else None
        paper = network is not None and network.architecture == "attention"
        core = _core.Config(
            # Of a method in NumPy the core knows the bounds of lists only, as of any causal method that has a mass.
            method=self.method if self.options.in_core else "oracle",
            budget=self.budget,
            mass=self.mass,
            floor=self.floor,
            query_block=self.query_block,
            sink=self.sink,
            local=self.local,
            dense_tail=self.dense_tail,
            heads=self.heads or self.options.heads,
            boundaries=self.boundaries or self.options.boundaries,
            chunk_size=self.chunk_size or self.options.chunk_size,
            num_chunks="paper" if paper and self.num_chunks is None else self.num_chunks,
            boundary_window=self.boundary_window,
            theta=self.theta if self.theta is not None else (1.1 if paper else -math.inf),
            nms=self.nms if self.nms is not None else 8 if paper else 2 if self.method == "rows" else 4,
            # None also where there are networks of single layers only: selecting.py refuses these where keys are cut.
            predictor=network._args() if network is not None and network.shared else None,
            **own,
        )
        object.__setattr__(self, "_core", core)

    @property
    def exact(self) -> bool:
        """Whether no key is ever left out: neither a budget nor a mass."""
        return self._core.exact

    @property
    def exact_up_to(self) -> int:
        """Keys up to which a block of queries sees all that are visible to it: the budget, or the floor where a mass
        decides."""
        return self._core.exact_up_to

    @property
    def cuts(self) -> str:
        """How keys are cut into chunks, as a text that is the same for all configs that cut them alike."""
        if self.boundaries == "fixed":
            return f"{self.method}: fixed, chunk_size={self._core.chunk_size}"
        values: dict[str, Any] = {name: getattr(self, name) for name in _OF_SIMILARITY}
        if self.num_chunks == "paper" or self.boundaries == "predictor":
            values["query_block"] = self.query_block
        if self.predictor is not None and self.boundaries == "predictor":
            values["predictor"] = self.predictor.digest
        return f"{self.method}: {self.boundaries}, " + ", ".join(f"{name}={value}" for name, value in values.items())

    def leaves_out(self, q_len: int, k_len: int, window: int | None = None, *, causal: bool = True) -> bool:
        """Whether attention of the last `q_len` of `k_len` positions leaves a visible key out for some query.

        Args:
            q_len: queries, 0 to 2**30 - 1.
            k_len: keys, 0 to 2**30 - 1.
            window: the layer's sliding window in keys. None: none.
            causal: False: of bidirectional attention.

        Raises:
            TypeError: an argument of the wrong type; the message names it.
            ValueError: an argument out of range; the message names it.
        """
        return self._core.leaves_out(q_len, k_len, window, causal)

    def __getattr__(self, name: str) -> Any:
        # Only for what is no attribute: options of the method, and what is not there.
        options = self.__dict__.get("options")
        if options is not None and name in type(options).options():
            return getattr(options, name)
        if name in OPTIONS:
            raise AttributeError(
                f"{name}: {only_of(name)}; this Config has method={self.method!r}", name=name, obj=self
            )
        if name in _GONE:
            raise AttributeError(f"{name}: is gone; {_GONE[name]}", name=name, obj=self)
        raise AttributeError(f"'Config' object has no attribute {name!r}", name=name, obj=self)

    def __repr__(self) -> str:
        words = [f"{name}={value!r}" for name, value in self._differing().items()]
        return f"Config({', '.join(words)})"

    def __reduce__(self) -> tuple:
        return _rebuild, ({**self._asked_values(), "method": self.options},)

    def _asked_values(self) -> dict[str, Any]:
        """The fields that were given, not defaulted, but for the method's."""
        return {name: getattr(self, name) for name in FIELDS if name in self._asked}

    def _differing(self) -> dict[str, Any]:
        """What differs from the default: method, its options, other fields."""
        found: dict[str, Any] = {} if self.method == "rows" else {"method": self.method}
        found |= self.options.asked()
        asked = self._asked_values()
        for name, value in asked.items():
            others = {other: asked[other] for other in asked if other != name}
            _fit_defaults(others)  # a default may depend on what else was asked for
            if value != others.get(name, getattr(Config, name)):
                found[name] = value
        return found

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields or options of the method changed, validated again. Unknown names raise TypeError.

        Another `method` begins with its own default options; the fields that all methods have keep their values.
        """
        _check_names(changes)
        kept: dict[str, Any] = self._asked_values()
        own = {name: changes.pop(name) for name in list(changes) if name in OPTIONS}
        method: Any = changes.pop("method", self.method)
        if method == self.method:
            refuse_others(type(self.options), own)
            method, own = dataclasses.replace(self.options, **own), {}
        return Config(**{**kept, **changes, **own, "method": method})

    def to_dict(self, *, predictor: str | None = None) -> dict[str, Any]:
        """What differs from the default as a plain dict of str, int, float, bool and None, for JSON and command lines;
        `Config.from_dict` makes the same Config of it.

        Args:
            predictor: the path of the file that `self.predictor` was saved to, where it is not the one that comes with
                the package.

        Raises:
            ValueError: the Config has a predictor of its own, and `predictor` is None.
        """
        return _plain(self._differing(), predictor)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The Config of `to_dict`; a predictor is loaded from its path.

        Raises:
            TypeError, ValueError: as Config does. OSError: a predictor's file cannot be read.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values: expected a dict, got {type_name(values)}")
        values = dict(values)
        if values.get("theta") == "-inf":
            values["theta"] = -math.inf
        if isinstance(values.get("predictor"), str):
            values["predictor"] = BoundaryPredictor.load(values["predictor"])
        return cls(**values)

    def save(self, path: str | os.PathLike[str], *, predictor: str | None = None) -> None:
        """Write this Config to a file of JSON, in place of what is at `path`. The file has every field, so that it says
        the same if a default changes.

        Args:
            path: the file. `Config.load` reads it, and `patch` takes its path in place of a Config.
            predictor: as in `to_dict`. A path that is not absolute is relative to the folder of the file.

        Raises:
            ValueError: as in `to_dict`. OSError: the file cannot be written; what was there stays.
        """
        _write(path, {"config": _all_fields(self, predictor)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Config | LayerConfigs:
        """Read a file that `save` wrote: a Config, or LayerConfigs where it has one for each layer. A file that has
        nothing but a dict of `to_dict` is read as well.

        The file is not trusted: nothing in it is executed, and what is unknown, of another version or out of range is
        refused. It may name the file of a predictor, which is read.

        Raises:
            ValueError: the file is damaged, has a name or a version that is unknown, a value that Config refuses, or
                more than 4 MiB. OSError: it, or a file that it names, cannot be read.
        """
        try:
            return _read(read_json(path, MAX_FILE_BYTES), os.path.dirname(os.fspath(path)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    @classmethod
    def source(cls, method: str, **overrides: Any) -> Config:
        """The setting that a method's source names, as far as it is known; `overrides` are fields of Config and options
        of the method.

        Raises:
            TypeError, ValueError: an unknown method, or as Config does.
        """
        check_choice(method, "method", tuple(methods.registry))
        return cls(**{"method": method, **methods.registry[method].paper_fields, **overrides})

    @classmethod
    def fast(cls, **overrides: Any) -> Config:
        """The default's keys, but in one list for the heads of a KV head and by chunks of about four keys that are cut
        where neighbours differ: less time than the default, further from exact attention (docs/SELECTION.md).
        `overrides` are fields of Config and options of the method."""
        return cls(**{"heads": "group", "boundaries": "similarity", **overrides})

    @classmethod
    def faithful(cls, **overrides: Any) -> Config:
        """Twice the default's keys: nearer to exact attention, and slower. `overrides` are fields of Config and options
        of the method."""
        return cls(**{"budget": 2048, **overrides})

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


FIELDS = tuple(field.name for field in dataclasses.fields(Config) if field.init)


def _rebuild(values: dict[str, Any]) -> Config:
    return Config(**values)


def _check_names(names: Any) -> None:
    for name in names:
        if name in _GONE:
            raise TypeError(f"{name}: is gone; {_GONE[name]}")
        if name not in FIELDS and name not in OPTIONS:
            known = (*FIELDS, *OPTIONS)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; the fields are {', '.join(known)}"
            raise TypeError(f"Config has no field '{name}'{hint}")


_generated_init: Any = Config.__init__


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
    own = {name: values.pop(name) for name in list(values) if name in OPTIONS}
    options = method_of(values.pop("method", "rows"), own)
    # Fields that None leaves to others (a method's own) stay so in variants.
    asked = frozenset(name for name in values if values[name] is not None or getattr(Config, name) is not None)
    _fit_defaults(values)
    object.__setattr__(self, "_asked", asked)
    object.__setattr__(self, "_given", options)
    _generated_init(self, **values, method=options.name)


Config.__init__ = _init  # type: ignore[method-assign]


# ---- a Config for each layer -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LayerConfigs:
    """A Config for each layer of a model. `patch`, `patched`, `check` and the commands take it in place of a Config;
    `python -m dhsa tune` finds one.

    Args:
        default: the Config of the layers that are not in `layers`, and of attention outside of layers.
        layers: {index of a layer: its Config}.
        model: what the configs were made for, as `dhsa.hf.model_facts` returns it. A model of which one of these facts
            is another is refused. None: any model that has all of `layers`.
        notes: anything that JSON can hold, for example how the configs were found. It has no effect, and equal configs
            with other notes are equal.
        reuse: {index of a layer: (index of an earlier layer, heads)}: the layer does not select, but takes the lists of
            the earlier one, its anchor. `heads` says which list of the anchor each list of the layer is, as
            (0, 0, 3, ...); None: the same. A layer whose anchor has no lists in a call (it ran exact, or as another
            part of the mask) selects for itself. In decoding steps lists are reused with `Config.decode` "dhsa".
            Source: Kascade, arXiv 2512.16391; `dhsa.hf.find_anchors` finds them.
        dense_anchors: anchors that attend to all keys themselves; their lists are for the layers that reuse them.
            Source: HyLRA, arXiv 2602.00777.

    `share` must be the same in all of them. With "boundaries", the fields by which keys are cut must be the same as
    well; with "selections", all that leave keys out must be equal. Layers that are exact may have any. With `reuse`,
    `share` is None.

    Raises:
        TypeError: an argument of the wrong type; the message names it.
        ValueError: a layer's index is negative, the configs cannot share what `share` says, or an anchor is not an
            earlier layer that selects for itself.
    """

    default: Config
    layers: Mapping[int, Config]
    model: Mapping[str, Any] | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    reuse: Mapping[int, tuple[int, tuple[int, ...] | None]] = dataclasses.field(default_factory=dict)
    dense_anchors: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.default, Config):
            raise TypeError(f"default: expected a dhsa.Config, got {type_name(self.default)}")
        named = (("layers", self.layers), ("model", self.model), ("notes", self.notes), ("reuse", self.reuse))
        for name, value in named:
            if not isinstance(value, Mapping) and not (name == "model" and value is None):
                raise TypeError(f"{name}: expected a dict, got {type_name(value)}")
        layers = {}
        for layer, config in self.layers.items():
            if not isinstance(config, Config):
                raise TypeError(f"layers: expected a dhsa.Config for layer {layer}, got {type_name(config)}")
            layers[check_int(layer, "layers: an index", 0, 999_999)] = config
        object.__setattr__(self, "layers", MappingProxyType(dict(sorted(layers.items()))))
        object.__setattr__(self, "notes", MappingProxyType(dict(self.notes)))
        if self.model is not None:
            object.__setattr__(self, "model", MappingProxyType(dict(self.model)))
        _check_sharing([self.default, *layers.values()])
        object.__setattr__(self, "reuse", MappingProxyType(_checked_reuse(self.reuse)))
        object.__setattr__(self, "dense_anchors", _checked_dense(self.dense_anchors, self.reuse))
        if self.reuse and self.share is not None:
            raise ValueError(f"reuse: layers that share {self.share} take them from the first one; share must be None")
        if self.reuse and (other := {c.method for c in (self.default, *layers.values()) if c.options.remembers}):
            raise ValueError(f"reuse: method={min(other)!r} uses what it found before; lists of its layers are its own")

    @property
    def share(self) -> str | None:
        """`Config.share`, which all of the configs have in common."""
        return self.default.share

    def at(self, layer: int | None) -> Config:
        """The Config of a layer; of attention outside of layers for None."""
        return self.default if layer is None else self.layers.get(layer, self.default)

    def replace(self, **changes: Any) -> LayerConfigs:
        """A copy in which every Config has these changes; see `Config.replace`."""
        return dataclasses.replace(
            self,
            default=self.default.replace(**changes),
            layers={layer: config.replace(**changes) for layer, config in self.layers.items()},
        )

    def save(self, path: str | os.PathLike[str], *, predictor: str | None = None) -> None:
        """Write these configs to a file of JSON, as `Config.save` does; `Config.load` reads it.

        Args:
            path: the file.
            predictor: the path of the file that the network of all configs was saved to, as in `Config.save`.

        Raises:
            ValueError: as in `Config.save`; or the configs have different networks.
            TypeError: `model` or `notes` has what JSON cannot hold. OSError: the file cannot be written.
        """
        own = {config.predictor for config in (self.default, *self.layers.values())} - {None}
        if predictor is not None and len(own - {BoundaryPredictor.default()}) > 1:
            raise ValueError("predictor: the configs have different networks, a file holds one")
        found: dict[str, Any] = {
            "config": _all_fields(self.default, predictor),
            "layers": {str(layer): _all_fields(config, predictor) for layer, config in self.layers.items()},
        }
        if self.model is not None:
            found["model"] = dict(self.model)
        if self.notes:
            found["notes"] = dict(self.notes)
        if self.reuse:
            found["reuse"] = {str(layer): {"layer": of, "heads": heads} for layer, (of, heads) in self.reuse.items()}
        if self.dense_anchors:
            found["dense_anchors"] = list(self.dense_anchors)
        _write(path, found)

    def __hash__(self) -> int:
        return hash((self.default, tuple(self.layers.items()), tuple(self.reuse.items()), self.dense_anchors))

    def __repr__(self) -> str:
        model = "" if self.model is None else f", model={dict(self.model)}"
        reuse = f", reuse={dict(self.reuse)}" if self.reuse else ""
        reuse += f", dense_anchors={self.dense_anchors}" if self.dense_anchors else ""
        return f"LayerConfigs(default={self.default}, layers={dict(self.layers)}{model}{reuse})"

    def __reduce__(self) -> tuple:
        model = None if self.model is None else dict(self.model)
        args = self.default, dict(self.layers), model, dict(self.notes), dict(self.reuse), self.dense_anchors
        return _rebuild_layers, args


def _rebuild_layers(
    default: Config, layers: Any, model: Any, notes: Any, reuse: Any = MappingProxyType({}), dense: tuple[int, ...] = ()
) -> Any:
    return LayerConfigs(default=default, layers=layers, model=model, notes=notes, reuse=reuse, dense_anchors=dense)


def _checked_reuse(reuse: Mapping[Any, Any]) -> dict[int, tuple[int, tuple[int, ...] | None]]:
    """`LayerConfigs.reuse`, in the order of layers; TypeError or ValueError naming what is wrong."""
    made: dict[int, tuple[int, tuple[int, ...] | None]] = {}
    for layer, value in reuse.items():
        index = check_int(layer, "reuse: an index", 0, 999_999)
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"reuse: expected (layer, heads) for layer {index}, got {value!r:.80}")
        anchor = check_int(value[0], f"reuse: the anchor of layer {index}", 0, 999_999)
        heads = value[1]
        if heads is not None:
            if not isinstance(heads, (tuple, list)) or not heads:
                raise TypeError(f"reuse: expected a tuple of lists or None for layer {index}, got {heads!r:.80}")
            heads = tuple(check_int(head, f"reuse: a list for layer {index}", 0, 999_999) for head in heads)
        if anchor >= index:
            raise ValueError(f"reuse: the anchor of layer {index} must be an earlier layer, got {anchor}")
        made[index] = (anchor, heads)
    for layer, (anchor, _) in made.items():
        if anchor in made:
            raise ValueError(f"reuse: layer {anchor}, the anchor of layer {layer}, reuses lists itself")
    return dict(sorted(made.items()))


def _checked_dense(layers: Any, reuse: Mapping[int, tuple[int, tuple[int, ...] | None]]) -> tuple[int, ...]:
    """`LayerConfigs.dense_anchors`, ascending; TypeError or ValueError naming what is wrong."""
    if not isinstance(layers, (tuple, list)):
        raise TypeError(f"dense_anchors: expected a tuple of layers, got {layers!r:.80}")
    made = sorted({check_int(layer, "dense_anchors: an index", 0, 999_999) for layer in layers})
    if other := sorted(set(made) - {anchor for anchor, _ in reuse.values()}):
        raise ValueError(f"dense_anchors: no layer reuses the lists of {other}; expected anchors of `reuse`")
    return tuple(made)


def _check_sharing(configs: Iterable[Config]) -> None:
    """Raises ValueError for configs of layers that cannot share what they are to share."""
    shares = {config.share for config in configs}
    if len(shares) > 1:
        raise ValueError(
            f"share: layers share with each other, so it is the same for all; got {sorted(map(repr, shares))}"
        )
    if shares == {None}:
        return
    sparse = list({config: None for config in configs if not config.exact})
    names = _CUTS if shares == {"boundaries"} else (*FIELDS, "options")
    for config in sparse[1:]:
        if other := [name for name in names if getattr(config, name) != getattr(sparse[0], name)]:
            raise ValueError(
                f"share: {config.share} of one layer serve the others, so that {', '.join(other)} must be the same in "
                "all layers that leave keys out"
            )


# ---- files -----------------------------------------------------------------------------------------------------------


def _plain(values: dict[str, Any], predictor: str | None) -> dict[str, Any]:
    """Fields as JSON can hold them; ValueError for a network that has no path."""
    if (network := values.pop("predictor", None)) is not None and network is not BoundaryPredictor.default():
        if predictor is None:
            raise ValueError(
                "predictor: a network cannot be stored in a dict; save it and give its path as `predictor`"
            )
        values["predictor"] = str(predictor)
    if values.get("theta") == -math.inf:
        values["theta"] = "-inf"  # JSON has none
    return values


def _all_fields(config: Config, predictor: str | None) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in FIELDS} | dataclasses.asdict(config.options)
    return _plain(values, predictor)


def _write(path: str | os.PathLike[str], values: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=1, allow_nan=False)
    with replacing(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def _read(found: Any, folder: str) -> Config | LayerConfigs:
    """What a file holds. TypeError or ValueError that says what is wrong."""
    if not isinstance(found, dict):
        raise ValueError(f"expected an object of JSON, got {type_name(found)}")
    if "format" not in found:
        return Config.from_dict(found)
    if found["format"] != FORMAT:
        raise ValueError(f"format: expected {FORMAT!r}, got {str(found['format'])[:80]!r}")
    version = found.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise ValueError(f"version: this release reads {VERSION}, got {str(version)[:80]}")
    if unknown := sorted(set(found) - set(_KEYS)):
        raise ValueError(f"{unknown[0][:80]!r} is not known; a file has {', '.join(_KEYS)}")
    if "config" not in found:
        raise ValueError("config: is missing")
    network = functools.cache(lambda name: BoundaryPredictor.load(os.path.join(folder, name)))  # once for all layers
    config = _read_config(found["config"], network)
    if "layers" not in found:
        if other := {"reuse", "dense_anchors"} & set(found):
            raise ValueError(f"{max(other)}: is between the layers of a file that has layers")
        return config
    layers = {}
    if not isinstance(found["layers"], dict):
        raise ValueError(f"layers: expected an object, got {type_name(found['layers'])}")
    for name, values in found["layers"].items():
        if not _LAYER.fullmatch(name):
            raise ValueError(f"layers: expected indices, got {name[:80]!r}")
        try:
            layers[int(name)] = _read_config(values, network)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name}: {error}") from error
    reuse = {}
    if not isinstance(found.get("reuse", {}), dict):
        raise ValueError(f"reuse: expected an object, got {type_name(found['reuse'])}")
    for name, of in found.get("reuse", {}).items():
        if not _LAYER.fullmatch(name):
            raise ValueError(f"reuse: expected indices, got {name[:80]!r}")
        if not isinstance(of, dict) or set(of) != {"layer", "heads"}:
            raise ValueError(f"reuse: expected an object of layer and heads for layer {name}")
        reuse[int(name)] = (of["layer"], of["heads"])
    return LayerConfigs(
        default=config,
        layers=layers,
        model=found.get("model"),
        notes=found.get("notes", {}),
        reuse=reuse,
        dense_anchors=found.get("dense_anchors", ()),
    )


def _read_config(values: Any, network: Callable[[str], BoundaryPredictor]) -> Config:
    if isinstance(values, dict) and isinstance(values.get("predictor"), str):
        values = {**values, "predictor": network(values["predictor"])}
    return Config.from_dict(values)
