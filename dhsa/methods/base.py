"""The base class of methods of selection: their own options, their source, and their definition in NumPy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from dhsa import _core
from dhsa._arrays import check_int

if TYPE_CHECKING:
    import numpy as np

    from dhsa._twin.blocks import Block
    from dhsa._twin.selection import Segments

__all__ = ["MAX_OPTION", "Method", "check_stride"]

MAX_OPTION = 2**31 - 1  # the largest value of an int option, as for fields of Config

_M = TypeVar("_M", bound="Method")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method of selection. A subclass has a file of its own in `dhsa.methods`, and its own options as fields, all
    with defaults. The C file of the same name in `csrc/select/methods/` computes it.

    Attributes of the class:
        name: the name in `Config.method`.
        summary: what its lists are made of, in one line.
        source: the paper, or "this project".
        cost: the cost of selection for one block of queries, in products of two vectors of D numbers for each set of
            heads. n is the number of candidate keys, Q the `query_block`, G the heads of a set.
        has_chunks: whether it selects chunks, and so needs boundaries.
        has_mass: whether its scores are shares of attention mass, so that `Config.mass` may be used.
        reads_keys: whether its lists depend on the values of queries and keys, and not on positions alone.
        has_both_sides: whether it serves bidirectional attention, in which a block selects keys on both sides of it.
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
    reads_keys: ClassVar[bool] = True
    has_both_sides: ClassVar[bool] = False
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
        return {name: getattr(self, name) for name in self.options()}

    @staticmethod
    def twin(block: Block) -> Segments | np.ndarray:
        """The method in NumPy float64: scores of segments of keys, or the list itself, for one block of queries."""
        raise NotImplementedError

    def _keep_int(self, name: str, low: int) -> None:
        """Converts an option that is not None to int. Raises TypeError or ValueError that names it."""
        if (value := getattr(self, name)) is not None:
            object.__setattr__(self, name, check_int(value, name, low, MAX_OPTION))


def check_stride(stride: int, key_block: int) -> None:
    """Raises ValueError for a stride that does not fit blocks of `key_block` keys."""
    if stride > _core.MAX_STRIDE or key_block % stride:
        raise ValueError(
            f"stride: got {stride}, expected a divisor of key_block = {key_block}, at most {_core.MAX_STRIDE}"
        )
