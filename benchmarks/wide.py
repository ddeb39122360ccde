"""Rows of bench_attention.py for heads of 512 numbers, and for encoders, whose tokens see those on both sides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from harness import check, interleave, row
from peers import Shape, at, flop, inputs, sdpa

import dhsa

GEMMA4 = Shape(8, 2, 512)  # the global layers of Gemma 4
ENCODERS = (Shape(12, 12, 64), Shape(3, 1, 256))  # ModernBERT base's heads, and EmbeddingGemma's
GOALS = {8192: 2.5, 32768: 8.0}  # of a sparse bidirectional call against SDPA, in float32
Rows = Iterator[dict[str, Any]]


def wide(shape: Shape, length: int, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    """Dense attention of wide heads against SDPA, which repeats keys and values there, and against heads of 256."""
    half = Shape(shape.heads, shape.kv_heads, shape.dim // 2)
    q, k, v = inputs(shape, length, dtype)
    narrow = inputs(half, length, dtype)
    out, narrow_out = torch.empty_like(q), torch.empty_like(narrow[0])
    timing = interleave(
        {
            "dhsa": lambda: dhsa.attention(q, k, v, out=out),
            "sdpa": lambda: sdpa(q, k, v),
            "half": lambda: dhsa.attention(*narrow, out=narrow_out),
        },
        repeats,
        threads,
    )
    rate = 2 * timing.ratio("dhsa", "half")  # twice the work of heads half as wide
    yield row(
        "wide",
        "dense causal, wide heads",
        dtype,
        at(shape, length),
        flop=flop(shape, length),
        timing=timing,
        peer="sdpa",
        checks=[
            check("ratio", timing.ratio("dhsa", "sdpa"), 1.3, "x"),
            check("GFLOP/s of half the width", rate, 0.85, "%"),
        ],
    )


def both_sides(shape: Shape, length: int, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    """The whole sparse call of an encoder, selection included, against SDPA without a mask."""
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)
    stats: list[Any] = []
    timing = interleave(
        {
            "dhsa": lambda: stats.append(dhsa.functional.run(q, k, v, dhsa.Config(), causal=False, out=out)[2]),
            "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        },
        repeats,
        threads,
        fewer={"sdpa": 1 if length > 16384 else repeats},
        warm=length <= 8192,
    )
    work = 4.0 * shape.heads * shape.dim * length * length
    goal = GOALS.get(length) if dtype == torch.float32 else None
    yield row(
        "sides",
        "bidirectional DHSA call",
        dtype,
        at(shape, length),
        flop=work * stats[-1].density,
        timing=timing,
        peer="sdpa",
        checks=[check("ratio", timing.ratio("dhsa", "sdpa"), goal, "x") if goal else None],
        detail=f"density {stats[-1].density:.3f}",
        density=stats[-1].density,
        length=length,
    )
