# The C extension, for type checkers. Private: arguments of functions are positional, outputs are arrays made by the
# caller. What their ranges are is said where they are checked, in csrc/.
from typing import Any, Literal

import numpy.typing as npt

from dhsa._typing import SupportsDLPack

Array = npt.NDArray[Any] | SupportsDLPack

class Config:
    """A configuration that has been parsed and checked; immutable. `num_chunks` None: the number that measured best for
    the length; `floor` None: sink + local; `stride` None: none. See dhsa.Config, which makes one of its fields."""
    def __new__(
        cls,
        *,
        method: str = "rows",
        budget: int | None = None,
        mass: float | None = None,
        floor: int | None = None,
        query_block: int = 64,
        sink: int = 0,
        local: int = 0,
        dense_tail: int = 0,
        heads: str = "group",
        boundaries: str = "similarity",
        chunk_size: int = 8,
        num_chunks: int | Literal["paper"] | None = None,
        boundary_window: int = 4,
        theta: float = ...,
        nms: int = 0,
        predictor: tuple[Any, ...] | None = None,
        rows: int = 1,
        quantized: bool = False,
        shortlist: int = 0,
        pooling: str = "mean",
        key_block: int = 128,
        stride: int | None = None,
    ) -> Config: ...
    @property
    def method(self) -> str: ...
    @property
    def budget(self) -> int | None: ...
    @property
    def mass(self) -> float | None: ...
    @property
    def floor(self) -> int: ...
    @property
    def query_block(self) -> int: ...
    @property
    def sink(self) -> int: ...
    @property
    def local(self) -> int: ...
    @property
    def dense_tail(self) -> int: ...
    @property
    def heads(self) -> str: ...
    @property
    def boundaries(self) -> str: ...
    @property
    def chunk_size(self) -> int: ...
    @property
    def num_chunks(self) -> int | Literal["paper"] | None: ...
    @property
    def boundary_window(self) -> int: ...
    @property
    def theta(self) -> float: ...
    @property
    def nms(self) -> int: ...
    @property
    def predictor(self) -> tuple[Any, ...] | None: ...
    @property
    def rows(self) -> int: ...
    @property
    def quantized(self) -> bool: ...
    @property
    def shortlist(self) -> int: ...
    @property
    def pooling(self) -> str: ...
    @property
    def key_block(self) -> int: ...
    @property
    def stride(self) -> int | None: ...
    @property
    def exact(self) -> bool: ...
    @property
    def exact_up_to(self) -> int: ...
    def leaves_out(self, q_len: int, k_len: int, window: int | None, causal: bool, /) -> bool: ...
    def num_gaps(self, length: int, /) -> int: ...

# The limits of csrc/include/dhsa.h.
MAX_LENGTH: int
MAX_HEAD_DIM: int
MAX_VALUE_DIM: int
MAX_THREADS: int
MAX_STRIDE: int
DECODE_ROWS: int

class KeyIndex:
    def __new__(cls) -> KeyIndex: ...
    def __deepcopy__(self, memo: Any, /) -> KeyIndex: ...
    @classmethod
    def from_bytes(cls, bytes: bytes | memoryview, /) -> KeyIndex: ...
    def to_bytes(self) -> bytes: ...
    @property
    def boundaries(self) -> list[int]: ...
    @property
    def nbytes(self) -> int: ...

Past = KeyIndex  # its former name

class Buffer:
    def __new__(cls, shape: tuple[int, ...], dtype: str, /) -> Buffer: ...
    def __dlpack__(
        self,
        *,
        stream: None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def attend_dense(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    causal: bool,
    key_ranges: Array | None,
    num_threads: int,
    skip: float | None,
    sinks: Array | None,
    precision: int,
    /,
) -> float: ...
def attend_sparse(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    causal: bool,
    key_ranges: Array | None,
    num_threads: int,
    skip: float | None,
    sinks: Array | None,
    precision: int,
    indptr: Array,
    indices: Array,
    shape: tuple[int, int, int],
    query_block: int,
    /,
) -> tuple[float, float]: ...
def prefill(
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array | None,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    causal: bool,
    key_ranges: Array | None,
    num_threads: int,
    skip: float | None,
    sinks: Array | None,
    precision: int,
    config: Config,
    boundaries: Array | None,
    key_indexes: tuple[KeyIndex, ...] | None,
    same: int,
    keep_means: int,
    /,
) -> tuple[int, float, float, float, float]: ...
def similarity_scores(k: Array, window: int, scores: Array, num_threads: int, /) -> None: ...
def predictor_logits(predictor: tuple[Any, ...], k: Array, logits: Array, num_threads: int, /) -> None: ...
def pick_boundaries(
    scores: Array, n: int, theta: float, nms: int, instruction: int | None, boundaries: Array, /
) -> int: ...
def boundaries_capacity(config: Config, length: int, /) -> int: ...
def boundaries(k: Array, config: Config, boundaries: Array, counts: Array, num_threads: int, /) -> None: ...
def attention_ratios(
    q: Array,
    k: Array,
    window: int,
    sliding_window: int | None,
    scale: float | None,
    softcap: float | None,
    ratios: Array,
    num_threads: int,
    /,
) -> None: ...
def chunk_scores(
    q: Array,
    k: Array,
    boundaries: Array,
    config: Config,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    causal: bool,
    scores: Array,
    num_threads: int,
    /,
) -> None: ...
def select_plan(
    q: Array,
    k: Array,
    config: Config,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    causal: bool,
    indptr: Array,
    /,
) -> None: ...
def select(
    q: Array,
    k: Array,
    boundaries: Array | None,
    config: Config,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    causal: bool,
    indptr: Array,
    indices: Array,
    num_threads: int,
    /,
) -> None: ...
def chunk_means(
    k: Array, edges: Array, means: tuple[Array, Array, Array | None, Array], num_threads: int, /
) -> None: ...
def select_blocks(
    q: Array,
    k: Array,
    boundaries: Array | None,
    chunks: tuple[Array, Array, Array | None, Array] | None,
    groups: tuple[Array, Array, Array | None, Array] | None,
    config: Config,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    first: int,
    blocks: int,
    indptr: Array,
    indices: Array,
    num_threads: int,
    /,
) -> None: ...
def isa_set(name: str, /) -> None: ...
def isa_current() -> str: ...
def build_info() -> dict[str, Any]: ...
def cpu_count() -> int: ...
def fma_peak(num_threads: int, /) -> float: ...
def read_bandwidth(array: Array, num_threads: int, /) -> float: ...
