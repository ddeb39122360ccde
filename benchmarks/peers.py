"""Inputs of the benchmarks, and the attentions that ours is timed against."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"H{self.heads}/{self.kv_heads} D{self.dim}"


GEMMA2, GEMMA3 = Shape(8, 4, 256), Shape(4, 1, 256)  # Gemma 2 2B's heads, and Gemma 3 270M's


def tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def at(shape: Shape, length: int) -> str:
    return f"{shape} {tokens(length)}"


def visible_pairs(length: int, window: int | None = None) -> int:
    w = min(window or length, length)
    return w * (w + 1) // 2 + (length - w) * w


def flop(shape: Shape, length: int, window: int | None = None) -> float:
    """4 H D for each (query, key) pair that is visible: masked work is not counted, for anyone."""
    return 4.0 * shape.heads * shape.dim * visible_pairs(length, window)


def inputs(shape: Shape, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length + shape.heads)
    return [
        torch.randn(1, heads, length, shape.dim, generator=generator).to(dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Past its limit of recompilations torch would fall back, with a mere warning, to a function that is ten times
    # slower. Dynamic shapes need one compilation for all lengths, and were measured no slower than static ones.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.specialize_float = True  # a softcap that is a variable does not compile
    return torch.compile(flex_attention, dynamic=True)


def flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None = None, softcap: float | None = None
) -> Callable[[], Any]:
    """A call of compiled flex_attention; its block mask is made here, once, and its compiling is its first call's."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = q.shape[2]

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j <= i

    def sliding(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & (j > i - window)

    def capped(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return softcap * torch.tanh(s / softcap)

    mask = create_block_mask(causal if window is None else sliding, None, None, length, length, device="cpu")
    attend = _compiled()
    options = {"block_mask": mask, "enable_gqa": True, "score_mod": None if softcap is None else capped}
    return lambda: attend(q, k, v, **options)
