"""What boundaries cost: the networks that score gaps, and the labels they are trained on, next to attention and to
torch. A part of `make bench` (bench_attention.py, section `boundaries`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from harness import check, interleave, row
from peers import GEMMA2, GEMMA3, Shape, at, inputs

import dhsa
from dhsa.training import Settings, networks, scores

LENGTH = 8192
WINDOW = 512
Rows = Iterator[dict[str, Any]]


def flop_of(network: torch.nn.Module) -> float:
    """Multiplications and additions of a gap of the compact network: each weight once."""
    return sum(2.0 * x.numel() for x in network.parameters())


def compact(shape: Shape, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    q, k, v = inputs(shape, LENGTH, dtype)
    channels = shape.kv_heads * shape.dim
    network = networks.build(Settings(), channels, 1.0, seed=0)
    predictor = dhsa.BoundaryPredictor.from_state_dict(network.folded())
    out = torch.empty_like(q)
    calls = {
        "compact": lambda: predictor.logits(k),
        "dense": lambda: dhsa.attention(q, k, v, out=out),
        "similarity": lambda: scores.similarity(k, 4),
    }
    timing = interleave(calls, repeats, threads)
    share = 1 / timing.ratio("compact", "dense")
    yield row(
        "boundaries",
        "compact network",
        dtype,
        at(shape, LENGTH),
        flop=flop_of(network) * LENGTH,
        timing=timing,
        ours="compact",
        checks=[check("of dense attention", share, 0.02, "%", at_most=True)],
        detail=f"{share:.2%} of the layer's dense attention; {flop_of(network) / 1e3:.0f} kFLOP a gap; similarity takes"
        f" {1 / timing.ratio('similarity', 'dense'):.2%}",
    )


def attention_network(shape: Shape, heads: int, repeats: int, threads: int) -> Rows:
    """The paper's network against its torch forward over windows, in pieces that stay in cache."""
    _, k, _ = inputs(shape, LENGTH, torch.float32)
    channels = shape.kv_heads * shape.dim
    network = networks.build(Settings(architecture="attention", heads=heads), channels, 1.0, seed=0).eval()
    predictor = dhsa.BoundaryPredictor.from_state_dict(network.folded(), heads=heads)
    rows = k[0].transpose(0, 1).reshape(LENGTH, channels)

    def forward() -> torch.Tensor:
        return torch.cat([network(rows[i : i + 1024 + 7]) for i in range(0, LENGTH - 7, 1024)])

    timing = interleave({"dhsa": lambda: predictor.logits(k), "torch": forward}, repeats, threads)
    yield row(
        "boundaries",
        f"paper's network, {heads} heads",
        torch.float32,
        at(shape, LENGTH),
        timing=timing,
        peer="torch",
        checks=[check("ratio", timing.ratio("dhsa", "torch"), 4.0, "x")],
        detail=f"largest difference {float((predictor.logits(k)[0, 3:-4] - forward()).abs().max()):.1e}",
    )


def labels(shape: Shape, dtype: torch.dtype, window: int | None, repeats: int, threads: int) -> Rows:
    q, k, v = inputs(shape, LENGTH, dtype)
    out = torch.empty_like(q)
    calls = {
        "labels": lambda: dhsa.attention_ratios(q, k, sliding_window=window),
        "dense": lambda: dhsa.attention(q, k, v, window=window, out=out),
    }
    timing = interleave(calls, repeats, threads)
    share = 1 / timing.ratio("labels", "dense")
    yield row(
        "boundaries",
        "labels" if window is None else f"labels, window {window}",
        dtype,
        at(shape, LENGTH),
        timing=timing,
        ours="labels",
        checks=[check("of its attention", share, 2.0, "%", at_most=True)],
        detail=f"{share:.2f} times the layer's attention",
    )


def rows(threads: int, repeats: int, dtypes: list[torch.dtype]) -> Rows:
    for dtype in dtypes:
        for shape in (GEMMA2, GEMMA3):
            yield from compact(shape, dtype, repeats, threads)
    if torch.float32 in dtypes:
        yield from attention_network(GEMMA3, 4, repeats, threads)
        yield from attention_network(GEMMA3, 8, repeats, threads)
        yield from attention_network(GEMMA2, 8, min(repeats, 3), threads)
    for dtype in dtypes:
        for window in (None, WINDOW):
            yield from labels(GEMMA3, dtype, window, repeats, threads)
