# The C extension, for type checkers. Private: arguments are positional, outputs are arrays made by the caller.
from typing import Any

Array = Any
BoundaryConfig = tuple[int, int, int, int, float, int, tuple[Any, ...] | None]
ScoreConfig = tuple[int, int, int, int, int]
SelectConfig = tuple[int, int, float, int, int, int, int, int, int, ScoreConfig]

# The limits of csrc/include/dhsa.h.
MAX_LENGTH: int
MAX_HEAD_DIM: int
MAX_THREADS: int
MAX_STRIDE: int
DECODE_ROWS: int

class Past:
    def __new__(cls) -> Past: ...
    def __deepcopy__(self, memo: Any, /) -> Past: ...
    @property
    def boundaries(self) -> list[int]: ...
    @property
    def nbytes(self) -> int: ...

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
    boundary_config: BoundaryConfig,
    select_config: SelectConfig,
    boundaries: Array | None,
    pasts: tuple[Past, ...] | None,
    same: int,
    keep: int,
    /,
) -> tuple[int, float, float, float, float]: ...
def similarity_scores(k: Array, window: int, scores: Array, num_threads: int, /) -> None: ...
def predictor_logits(predictor: tuple[Any, ...], k: Array, logits: Array, num_threads: int, /) -> None: ...
def pick_boundaries(
    scores: Array, n: int, theta: float, nms: int, instruction: int | None, boundaries: Array, /
) -> int: ...
def boundaries_capacity(boundary_config: BoundaryConfig, length: int, /) -> int: ...
def boundaries(
    k: Array, boundary_config: BoundaryConfig, boundaries: Array, counts: Array, num_threads: int, /
) -> None: ...
def boundary_ratios(
    attn: Array, window: int, sliding_window: int | None, ratios: Array, num_threads: int, /
) -> None: ...
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
    score_config: ScoreConfig,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    scores: Array,
    num_threads: int,
    /,
) -> None: ...
def select_plan(
    q: Array,
    k: Array,
    select_config: SelectConfig,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    indptr: Array,
    /,
) -> None: ...
def select(
    q: Array,
    k: Array,
    boundaries: Array | None,
    select_config: SelectConfig,
    scale: float | None,
    softcap: float | None,
    window: int | None,
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
