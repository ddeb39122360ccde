"""The base class of methods of selection: their own options, their source, and their definition in NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

from dhsa import _core
from dhsa._arrays import check_float, check_int, type_name

if TYPE_CHECKING:
    import numpy as np

    from dhsa._twin.blocks import Block
    from dhsa._twin.selection import Segments, Selection

__all__ = ["MAX_OPTION", "Method", "State", "check_stride", "of_list"]

MAX_OPTION = 2**31 - 1  # the largest value of an int option, as for fields of Config

_M = TypeVar("_M", bound="Method")


class State(Protocol):
    """What a method that `remembers` has found out in earlier layers or calls."""

    def open(self, q: np.ndarray, k: np.ndarray) -> None:
        """Called before the lists of q [B, H, Lq, D] and k [B, Hkv, Lk, D] are made. ValueError naming `state` if they
        are of another prompt."""

    def update(self, q: np.ndarray, k: np.ndarray, found: Selection, options: Mapping[str, Any]) -> None:
        """Called after they were made; options: those of `method_blocks`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method of selection. A subclass has a file of its own in `dhsa.methods`, and its own options as fields, all
    with defaults. The C file of the same name in `csrc/select/methods/` computes it; where there is none (`in_core` is
    False), `twin` itself does, in NumPy. Such a method is for comparing what is selected. It is slow, and its time says
    nothing about the cost of its source.

    Attributes of the class:
        name: the name in `Config.method`.
        summary: what its lists are made of, in one line.
        source: the paper, or "this project".
        cost: the cost of selection for one block of queries, in products of two vectors of D numbers for each set of
            heads. n is the number of candidate keys, Q the `query_block`, G the heads of a set.
        has_chunks: whether it selects chunks, and so needs boundaries.
        has_mass: whether its scores are shares of attention mass, so that `Config.mass` may be used.
        in_core: whether the C core computes it.
        reads_values: whether its lists depend on the values, so that `dhsa.select` needs them.
        reads_keys: whether its lists depend on the values of queries and keys, and not on positions alone.
        has_both_sides: whether it serves bidirectional attention, in which a block selects keys on both sides of it.
        remembers: of what it uses results: "" of nothing but the call, "layers" of earlier layers of the same prompt,
            "calls" of earlier calls of a layer, whose keys a cache holds. See `new_state`.
        heads: the default of `Config.heads`.
        boundaries, chunk_size: the defaults of these fields of Config.
        paper_fields: the setting of its source as far as it is known: its own options and fields of Config.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    has_chunks: ClassVar[bool] = False
    has_mass: ClassVar[bool] = True
    in_core: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    reads_keys: ClassVar[bool] = True
    has_both_sides: ClassVar[bool] = False
    remembers: ClassVar[Literal["", "layers", "calls"]] = ""
    heads: ClassVar[str] = "group"
    boundaries: ClassVar[str] = "similarity"
    chunk_size: ClassVar[int] = 8
    paper_fields: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def paper(cls: type[_M]) -> _M:
        """The method with the options of its source; `Config.source` adds the fields that are not the method's own."""
        return cls(**{name: value for name, value in cls.paper_fields.items() if name in cls.options()})

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of its own options."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def asked(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def core(self, *, query_block: int, budget: int | None) -> dict[str, Any]:
        """The options as the C core takes them. A method in which None stands for a value that depends on `query_block`
        or `budget` passes that value.

        Raises:
            ValueError: an option does not fit `query_block` or `budget`; the message names it.
        """
        return {name: getattr(self, name) for name in self.options()} if self.in_core else {}

    @property
    def made_for(self) -> Mapping[str, Any] | None:
        """Facts of the only model that the options are for, as `dhsa.hf.model_facts` has them; None: of any."""
        return None

    def of_layer(self, layer: int) -> Method:
        """The method in a layer of a model; another one where its options differ from layer to layer.

        Raises:
            ValueError: there are none for this layer; the message names the option.
        """
        return self

    def new_state(self) -> State:
        """An empty state for `dhsa.select(state=)`, of a method that `remembers`.

        Raises:
            TypeError: the method uses nothing but the call.
        """
        raise TypeError(f"state: method={self.name!r} uses nothing of earlier layers or calls; expected None")

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """The method in NumPy float64: scores of segments of keys, or the list itself, for one block of queries."""
        raise NotImplementedError

    def _keep_int(self, name: str, low: int, high: int = MAX_OPTION) -> None:
        """Converts an option that is not None to int. Raises TypeError or ValueError that names it."""
        if (value := getattr(self, name)) is not None:
            object.__setattr__(self, name, check_int(value, name, low, high))

    def _keep_ints(self, name: str, low: int) -> None:
        """Converts an option to a tuple of ints. Raises TypeError or ValueError that names it."""
        values = getattr(self, name)
        if not isinstance(values, (tuple, list)):
            raise TypeError(f"{name}: expected a tuple of ints, got {type_name(values)}")
        made = tuple(check_int(value, f"{name}[{i}]", low, MAX_OPTION) for i, value in enumerate(values))
        object.__setattr__(self, name, made)

    def _keep_float(self, name: str, low: float, high: float) -> None:
        """Converts an option to float. Raises TypeError or ValueError that names it."""
        object.__setattr__(self, name, check_float(getattr(self, name), name, low, high))


def of_list(values: tuple[int, ...], name: str, block: Block) -> int | None:
    """The value for the list of a block, of an option that has one for each list of a layer, or one for all, or none;
    ValueError if it has another number of them."""
    if not values:
        return None
    if len(values) not in (1, block.sets):
        raise ValueError(f"{name}: got {len(values)} values, but the layer has {block.sets} lists")
    return values[block.set_index % len(values)]


def check_stride(stride: int, key_block: int) -> None:
    """Raises ValueError for a stride that does not fit blocks of `key_block` keys."""
    if stride > _core.MAX_STRIDE or key_block % stride:
        raise ValueError(
            f"stride: got {stride}, expected a divisor of key_block = {key_block}, at most {_core.MAX_STRIDE}"
        )
