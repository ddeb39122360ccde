"""Speed of one decoding step (one query, a long cache), which memory bounds: seconds, GB/s of keys and values, the
share of what a plain read of the same bytes reaches, and the ratio to PyTorch's scaled_dot_product_attention.

Calls take turns in random order in one process, and medians are reported: the threads of PyTorch go on spinning after a
call, and slow down whichever call comes next. Correctness is tested in tests/core/test_decode.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import dhsa

SHAPES = [(8, 4, 256), (4, 1, 256), (32, 8, 128)]  # H, Hkv, D
DTYPES = ["float32", "bfloat16", "float16"]
SHARE_GOAL = 0.8
RATIO_GOAL = 1.0


def bench(shape: tuple[int, int, int], length: int, dtype: str, threads: int, repeats: int) -> dict:
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(length)
    cache = torch.empty(2, 1, kv_heads, length, dim, dtype=getattr(torch, dtype))
    for part in cache.view(-1, length, dim):
        part.copy_(torch.randn(length, dim, generator=generator))
    k, v = cache
    q = torch.randn(1, heads, 1, dim, generator=generator).to(cache.dtype)
    size = cache.numel() * cache.element_size()
    calls = {
        "dhsa": lambda: dhsa.attention(q, k, v),
        "read": lambda: dhsa._core.read_bandwidth(cache, threads),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }
    seconds = {name: [] for name in calls}
    for call in calls.values():
        call()  # thread start, first touch of memory
    order, turns = list(calls.items()), random.Random(0)
    for _ in range(repeats):
        turns.shuffle(order)
        for name, call in order:
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    ours, read, theirs = (statistics.median(seconds[name]) for name in calls)
    return {
        "row": f"decode {length // 1024}K, H {heads} / Hkv {kv_heads} / D {dim}, {dtype}",
        "seconds": ours,
        "gb_per_s": size / ours / 1e9,
        "read_gb_per_s": size / read / 1e9,
        "share_of_read": read / ours,
        "sdpa_seconds": theirs,
        "ratio": theirs / ours,
        "pass": read / ours >= SHARE_GOAL and theirs / ours >= RATIO_GOAL,
    }


def rows(threads: int, repeats: int) -> Iterator[dict]:
    """The same as rows of bench_attention.py's table."""
    from harness import check, row

    for dtype in DTYPES:
        for heads, kv_heads, dim in SHAPES:
            r = bench((heads, kv_heads, dim), 32768, dtype, threads, max(repeats, 15))
            checks = [
                check("of a plain read", r["share_of_read"], SHARE_GOAL, "share"),
                check("ratio", r["ratio"], RATIO_GOAL, "x"),
            ]
            yield row(
                "decode",
                "decode step, cache of 32K",
                getattr(torch, dtype),
                f"H{heads}/{kv_heads} D{dim} 32K",
                r["seconds"],
                checks=checks,
                detail=f"{r['gb_per_s']:.1f} GB/s; a plain read {r['read_gb_per_s']:.1f} GB/s",
                peer="sdpa",
                peer_seconds=r["sdpa_seconds"],
                ratio=r["ratio"],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dhsa.set_num_threads(args.threads)
    print(
        f"dhsa {dhsa.__version__} ({dhsa.build_info()['isa']}), torch {torch.__version__}, {args.threads} threads,"
        f" medians of {args.repeats} alternating runs; goals: share >= {SHARE_GOAL:.0%}, ratio >= {RATIO_GOAL}x"
    )
    results = []
    for dtype in [args.dtype] if args.dtype else DTYPES:
        for shape in SHAPES:
            r = bench(shape, args.length, dtype, args.threads, args.repeats)
            results.append(r)
            print(
                f"{r['row']:<48} {r['seconds'] * 1e3:8.2f} ms {r['gb_per_s']:6.1f} GB/s"
                f" {r['share_of_read']:6.1%} of a plain read ({r['read_gb_per_s']:.1f} GB/s)"
                f" | sdpa {r['sdpa_seconds'] * 1e3:8.2f} ms {r['ratio']:5.2f}x  {'pass' if r['pass'] else 'MISS'}",
                flush=True,
            )
    print(f"{sum(r['pass'] for r in results)} of {len(results)} rows pass")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        machine = {"cpu": platform.processor(), "threads": args.threads, "build": dhsa.build_info()}
        machine["torch"] = torch.__version__
        args.json.write_text(json.dumps({"machine": machine, "rows": results}, indent=1, default=str))


if __name__ == "__main__":
    main()
