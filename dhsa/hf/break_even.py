"""`Config.break_even`: which calls of a patched model run exact although their config would leave keys out, because
selecting and gathering the keys takes longer than it saves. This is decided before every stretch of plain attention.

By default a cost model decides. benchmarks/bench_break_even.py measures its coefficients and prints them in the form
that they have here; run it on an idle machine to measure them again. The model counts what a call would do (pairs
attended and visible, queries and keys), so it applies to whole prompts, windows, and pieces of a prompt on a cache.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from dhsa import _core
from dhsa._precision import precision_in_use
from dhsa.config import Config
from dhsa.methods.rows import GROUP

__all__ = ["LEAST_SECONDS", "LEAST_SHARE", "Costs", "fallback", "reason", "seconds", "work"]

# A call is sparse if that is expected to save at least this, as a share of the exact call and in seconds. So the errors
# of the model, and costs for each call and each list that it does not count, do not make a patched model slower. Of
# 623 measurements by bench_break_even.py (float32 and bfloat16, as COSTS), the rule leaves 273 sparse. Of these, 271
# take at most as long as exact attention, the other two 2 and 3 % longer.
LEAST_SHARE = 0.08
LEAST_SECONDS = 250e-6


class Costs(NamedTuple):
    """Costs for one dtype. `product`: the seconds that exact attention takes for one (query, key) pair, divided by
    head_dim. The others are in units of such a pair: one pair of a selected key; gathering one key of a list; scoring
    one chunk, or group of chunks, for one row; cutting and averaging one key of a KV head."""

    product: float
    pair: float
    gather: float
    score: float
    key: float


# float32, and bfloat16 multiplied by vector instructions: one thread of an AMD EPYC (Zen 4) with AVX512-BF16 and
# AVX512-VNNI, 2026-12-01, two runs of the benchmark. In the median they miss a call's quotient of sparse and exact by 2
# and 3 %. All these calls had blocks of 64 queries, so that only pair + gather / 64 was measured, 1.07 and 0.99;
# `gather` is an estimate from executors with one and with two heads for a list. Lengths from which sparse prefill was
# faster there: 1.7 to 2.5 budgets in float32, 1.8 to 2.8 in bfloat16. bfloat16 and float16 multiplied by tile
# registers: fitted on an Intel Xeon with AMX, November 2026, to calls of an earlier default; only `score` is an
# estimate, from the instructions of a power.
COSTS = {
    "float32": Costs(product=40.5e-12, pair=0.885, gather=12.0, score=0.437, key=0.0),
    "bfloat16 by vectors": Costs(product=20.7e-12, pair=0.803, gather=12.0, score=0.843, key=0.0),
    "bfloat16": Costs(product=6.34e-12, pair=0.424, gather=84.0, score=0.8, key=1.33),
    "float16": Costs(product=7.95e-12, pair=0.438, gather=79.1, score=0.8, key=24.0),
}


# How many budgets of keys a cache must hold for a decoding step that selects keys to be faster, by bench_generation.py
# (section crossing): 2.5 to 4 in float32, 3 to 5 in 16 bits, more with head_dim 64. Where the keys and values of a
# cache take fewer bytes than STEP_BYTES, both take some 100 microseconds, and the config is followed.
STEP = {"float32": 3, "bfloat16": 4, "float16": 4}
STEP_BYTES = 2 << 20


def reason(config: Config, q: torch.Tensor, k: torch.Tensor, window: int | None, *, causal: bool = True) -> str:
    """The reason why attention of q to k, the last query at the last key, runs exact although `config` leaves keys out,
    as a sentence; "" if it does not run exact. `causal`: False of bidirectional attention."""
    k_len = k.shape[2]
    step = q.shape[2] == 1 and causal and not config.exact
    if config.break_even == 0 or not (step or config.leaves_out(q.shape[2], k_len, window, causal=causal)):
        return ""
    if config.break_even is not None:
        if k_len >= config.break_even:
            return ""
        return f"break-even: {k_len:,} keys are fewer than the {config.break_even:,} of break_even"
    if config.method != "rows" or config.mass is not None:
        return ""  # not measured
    if step:
        least = STEP[str(q.dtype).removeprefix("torch.")] * config.exact_up_to
        if config.exact_up_to >= k_len or k_len >= least or 2 * k[:1].numel() * k.element_size() < STEP_BYTES:
            return ""
        return f"break-even: {k_len:,} keys are fewer than the {least:,} from which a step that selects keys is faster"
    exact, sparse = seconds(config, q, k, window, causal=causal)
    if exact - sparse >= max(LEAST_SHARE * exact, LEAST_SECONDS):
        return ""
    return (
        f"break-even: leaving all but {config.budget:,} of {k_len:,} keys out would take about {sparse / exact:.2f} "
        "times as long" + (", which saves too little" if sparse < exact else "")
    )


@functools.lru_cache(maxsize=64)
def fallback(skip: float | None) -> Config:
    """The config of a call that runs exact."""
    return Config(budget=None, skip=skip)


def seconds(
    config: Config, q: torch.Tensor, k: torch.Tensor, window: int | None, *, causal: bool = True
) -> tuple[float, float]:
    """The estimated seconds of an exact and of a sparse call on the machine of COSTS, for one row of the batch: a row
    must not be treated differently in a batch than alone. On other machines only their quotient is meaningful."""
    costs = COSTS[_multiplied_as(str(q.dtype).removeprefix("torch."), _core.isa_current(), precision_in_use())]
    kept, visible, listed, scored, keys = work(config, q.shape[2], k.shape[2], window, causal=causal)
    group = q.shape[1] // k.shape[1]
    sparse = costs.pair * kept + costs.gather * listed / sharing(config, group)
    if config.share != "selections":  # else nearly all layers use the selection of another
        sparse += costs.score * scored + costs.key * keys / group
    unit = q.shape[1] * q.shape[3] * costs.product
    return visible * unit, sparse * unit


def sharing(config: Config, group: int) -> int:
    """The heads that gather the keys of a list once, of a `group` of heads with the same keys."""
    return 1 if config.heads == "head" else group


class Work(NamedTuple):
    """Counts of a sparse call for each head: pairs attended to, visible pairs, keys in all lists of its blocks,
    products of a row and a chunk or group of chunks, keys of the sequence."""

    kept: int
    visible: int
    listed: float
    scored: float
    keys: int


def work(config: Config, q_len: int, k_len: int, window: int | None, *, causal: bool = True) -> Work:
    width = k_len if window is None else window
    if not causal:
        kept = q_len * min(2 * width - 1, k_len, config.exact_up_to)
        visible = _pairs_of_sides(q_len, k_len, width)
        scored = _scored(config, k_len, min(visible, q_len * (config._core.shortlist or k_len)), visible)
        return Work(kept, visible, kept / config.query_block, scored, k_len)
    block = config.query_block
    tail = q_len - (q_len - config.dense_tail) // block * block if config.dense_tail else 0
    kept = _pairs(tail, k_len, width) + _pairs(q_len - tail, k_len - tail, min(width, config.exact_up_to))
    visible, most = _pairs(q_len, k_len, width), config._core.shortlist or k_len
    # Queries with more candidates than the shortlist score groups too.
    late = min(q_len, max(0, k_len - most)) if width > most else 0
    scored = _scored(config, k_len, _pairs(q_len, k_len, min(width, most)), _pairs(late, k_len, width))
    return Work(kept, visible, kept / block, scored, k_len)


def _scored(config: Config, k_len: int, fine: float, coarse: float) -> float:
    """The products of a row and a chunk for `fine` pairs of a query and a key, and of a row and a group of chunks for
    `coarse` ones."""
    core = config._core
    chunk = core.chunk_size if config.boundaries == "fixed" else k_len / (core.num_gaps(k_len) + 1)
    return (fine + coarse / GROUP) / chunk * min(1, core.rows / config.query_block)


def _pairs(q_len: int, k_len: int, width: int) -> int:
    """Causal pairs of the last `q_len` of `k_len` positions within `width`."""
    past = k_len - q_len
    rising = min(max(0, width - past), q_len)  # queries whose window reaches back to the first key
    return rising * (2 * past + rising + 1) // 2 + (q_len - rising) * width


def _pairs_of_sides(q_len: int, k_len: int, width: int) -> int:
    """Pairs of the last `q_len` of `k_len` positions that are nearer to each other than `width`."""
    width = min(width, k_len)
    after = min(q_len, width - 1)  # queries whose window reaches beyond the last key
    later = (q_len - after) * (width - 1) + after * (after - 1) // 2  # keys after their query
    return _pairs(q_len, k_len, width) + later


@functools.lru_cache(maxsize=64)
def _multiplied_as(dtype: str, isa: str, precision: str) -> str:
    """The entry of COSTS: float32 for 16-bit numbers that the instruction set in use converts, and bfloat16 for float32
    at the precision "medium", where that is served."""
    if dtype == "float32" and precision == "medium" and precision in _core.build_info()["float32_precisions"]:
        dtype = "bfloat16"
    if dtype not in _core.build_info()["products"]:
        return "float32"
    return "bfloat16 by vectors" if dtype == "bfloat16" and isa == "avx512bf16" else dtype
