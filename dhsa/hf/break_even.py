"""`Config.break_even`: which calls of a patched model run exact although their config would leave keys out, because
choosing the keys and gathering them takes longer than it saves. Asked before every stretch of plain attention.

By default a model of costs decides, its coefficients measured by benchmarks/bench_break_even.py, which prints them as
they stand here; to do it again, run it on a quiet machine and paste. It knows what a call would do (pairs attended and
visible, queries and keys), so it serves whole prompts, windows, and pieces of a prompt on a cache alike.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from dhsa import _core
from dhsa.config import Config

__all__ = ["NOISE", "WORTH", "Costs", "fallback", "reason", "seconds", "work"]

# A loss that is worth another path, as a share of the exact call and in seconds: more than what measuring cannot tell
# from nothing, and than what nobody would notice in a prefill.
NOISE = 0.1
WORTH = 500e-6


class Costs(NamedTuple):
    """Of one dtype. product: seconds of one product of a query with a key and one of a probability with a value, per
    number of head_dim, in exact attention. The rest in pairs of exact attention: a pair kept; a listed key gathered for
    a KV head, whose heads share it; a visible pair's part in scoring chunks; a key of a KV head cut and averaged."""

    product: float
    pair: float
    gather: float
    score: float
    key: float


# One thread of an Intel Xeon with AVX-512 and AMX, 501 calls on a machine busy with other work, November 2026. In the
# median they miss a call's quotient of sparse and exact by 2 % in float32, by 5 % in the others, also at query blocks
# and groups that were not fitted (32 and 128 queries; 1 and 8 heads); but float32 with one head a group takes up to 1.5
# times of what they say, and stays sparse for it. Measured lengths from which whole prompts pay: 1.2 to 1.9 budgets in
# float32; 2 to 3.7 in bfloat16 and float16, whose exact attention is so much faster, 3.4 to 6 with two heads a group.
COSTS = {
    "float32": Costs(product=30.1e-12, pair=0.933, gather=12.4, score=0.0821, key=23.4),
    "bfloat16": Costs(product=6.34e-12, pair=0.424, gather=84.0, score=0.45, key=1.33),
    "float16": Costs(product=7.95e-12, pair=0.438, gather=79.1, score=0.421, key=24.0),
}


# Budgets in a cache from which a decoding step that chooses its keys pays, by bench_generation.py (section crossing):
# 2.5 to 4 in float32, 3 to 5 in 16 bits, more with heads of 64. Where the keys and values of a cache are fewer bytes
# than STEP_BYTES, either way takes some 100 microseconds, and what was asked for is done.
STEP = {"float32": 3, "bfloat16": 4, "float16": 4}
STEP_BYTES = 2 << 20


def reason(config: Config, q: torch.Tensor, k: torch.Tensor, window: int | None) -> str:
    """Why causal attention of q to k, the last query at the last key, runs exact although `config` leaves keys out, in
    words; "" if it does not."""
    k_len = k.shape[2]
    step = q.shape[2] == 1 and not config.exact
    if config.break_even == 0 or not (step or config.leaves_out(q.shape[2], k_len, window)):
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
        return f"break-even: {k_len:,} keys are fewer than the {least:,} from which a step that chooses its keys pays"
    exact, sparse = seconds(config, q, k, window)
    if sparse - exact <= max(NOISE * exact, WORTH):
        return ""
    return (
        f"break-even: leaving all but {config.budget:,} of {k_len:,} keys out would take about {sparse / exact:.2f} "
        "times as long"
    )


@functools.lru_cache(maxsize=64)
def fallback(skip: float | None) -> Config:
    """The config of a call that had better be exact."""
    return Config(budget=None, skip=skip)


def seconds(config: Config, q: torch.Tensor, k: torch.Tensor, window: int | None) -> tuple[float, float]:
    """What an exact and a sparse call take on the machine of COSTS, for each row of the batch, since a row must not be
    treated otherwise in company than alone. On other machines their quotient is what counts."""
    costs = COSTS[_multiplied_as(str(q.dtype).removeprefix("torch."), _core.isa_current())]
    kept, visible, listed, keys = work(config, q.shape[2], k.shape[2], window)
    group = q.shape[1] // k.shape[1]
    sparse = costs.pair * kept + costs.gather * listed / group
    if config.share != "selections":  # nearly all layers use another's
        sparse += costs.score * visible + costs.key * keys / group
    unit = q.shape[1] * q.shape[3] * costs.product
    return visible * unit, sparse * unit


class Work(NamedTuple):
    """What a sparse call does for each head: pairs attended to, of those visible; keys on its blocks' lists; keys."""

    kept: int
    visible: int
    listed: float
    keys: int


def work(config: Config, q_len: int, k_len: int, window: int | None) -> Work:
    width = k_len if window is None else window
    block = config.query_block
    tail = q_len - (q_len - config.dense_tail) // block * block if config.dense_tail else 0
    kept = _pairs(tail, k_len, width) + _pairs(q_len - tail, k_len - tail, min(width, config.exact_up_to))
    return Work(kept, _pairs(q_len, k_len, width), kept / block, k_len)


def _pairs(q_len: int, k_len: int, width: int) -> int:
    """Causal pairs of the last `q_len` of `k_len` positions within `width`."""
    past = k_len - q_len
    rising = min(max(0, width - past), q_len)  # queries that see every key before them
    return rising * (2 * past + rising + 1) // 2 + (q_len - rising) * width


@functools.lru_cache(maxsize=64)
def _multiplied_as(dtype: str, isa: str) -> str:
    """float32 for 16-bit numbers that the instruction set in use converts first."""
    return dtype if dtype in _core.build_info()["products"] else "float32"
