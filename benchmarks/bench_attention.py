"""Speed of one attention call against PyTorch, in one process, alternating, medians; run by `make bench`.

Rows: dense causal against scaled_dot_product_attention (sdpa), window 512 against compiled flex_attention, the whole
sparse call (selection included) against sdpa, and the memory that a 32K sparse call needs. Each row states
GFLOP/s of visible pairs (4 H D a pair), the share of the FMA peak measured in between, the ratio, and pass or miss.
It times; correctness is the tests' business.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import dhsa

SHAPES = {"Gemma 2 2B": (8, 4, 256), "Gemma 3 270M": (4, 1, 256)}  # H, Hkv, D
SPARSE_GOALS = {8192: 1.8, 16384: 3.3, 32768: 6.0}


def visible_pairs(length: int, window: int | None) -> int:
    w = min(window or length, length)
    return w * (w + 1) // 2 + (length - w) * w


def inputs(shape, length, dtype):
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(length + heads)
    return [torch.randn(1, h, length, dim, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


def goal_of(dtype, goal):
    """Goals are stated for fp32; the other dtypes are measured only."""
    return goal if dtype == torch.float32 else None


def alternate(calls: dict, repeats: int, threads: int) -> tuple[dict, float]:
    """Runs every call in turn, `repeats` times; returns median seconds of each and the median FMA peak (GFLOP/s)."""
    seconds = {name: [] for name in calls}
    peaks = []
    for call in calls.values():
        call()  # compile, first touch of memory, thread start
    for _ in range(repeats):
        peaks.append(statistics.median(dhsa._core.fma_peak(threads) for _ in range(5)))
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}, statistics.median(peaks)


def row(name, flop, ours, theirs, peer, peak, goal, theirs_flop=None):
    ratio = theirs / ours
    return {
        "row": name,
        "seconds": ours,
        "gflops": flop / ours / 1e9,
        "share_of_peak": flop / ours / 1e9 / peak,
        "peak_gflops": peak,
        "peer": peer,
        "peer_seconds": theirs,
        "peer_gflops": (theirs_flop or flop) / theirs / 1e9,
        "ratio": ratio,
        "goal": goal,
        "pass": None if goal is None else ratio >= goal,
    }


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def bench_dense(name, shape, length, repeats, threads, dtype):
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)
    seconds, peak = alternate(
        {"dhsa": lambda: dhsa.attention(q, k, v, out=out), "sdpa": lambda: sdpa(q, k, v)}, repeats, threads
    )
    flop = 4 * shape[0] * shape[2] * visible_pairs(length, None)
    return row(
        f"dense {length // 1024}K, {name}", flop, seconds["dhsa"], seconds["sdpa"], "sdpa", peak, goal_of(dtype, 1.0)
    )


def bench_window(name, shape, length, window, repeats, threads, dtype):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)

    def sliding(b, h, i, j):
        return (j <= i) & (j > i - window)

    mask = create_block_mask(sliding, None, None, length, length, device="cpu")
    flex = torch.compile(flex_attention)
    with torch.no_grad():
        seconds, peak = alternate(
            {
                "dhsa": lambda: dhsa.attention(q, k, v, window=window, out=out),
                "flex": lambda: flex(q, k, v, block_mask=mask, enable_gqa=True),
            },
            repeats,
            threads,
        )
    flop = 4 * shape[0] * shape[2] * visible_pairs(length, window)
    return row(
        f"window {window} at {length // 1024}K, {name}",
        flop,
        seconds["dhsa"],
        seconds["flex"],
        "flex",
        peak,
        goal_of(dtype, 1.5),
    )


def bench_sparse(name, shape, length, repeats, threads, goal, dtype):
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)
    config = dhsa.Config()
    stats = []

    def ours():
        stats.append(dhsa.functional.run(q, k, v, config, out=out)[2])

    seconds, peak = alternate({"dhsa": ours, "sdpa": lambda: sdpa(q, k, v)}, repeats, threads)
    flop = 4 * shape[0] * shape[2] * visible_pairs(length, None)
    attended = flop * stats[-1].density
    result = row(
        f"sparse {config.budget} at {length // 1024}K, {name}",
        attended,
        seconds["dhsa"],
        seconds["sdpa"],
        "sdpa",
        peak,
        goal_of(dtype, goal),
        flop,
    )
    selection = statistics.median(s.select_seconds for s in stats[1:])
    executor = statistics.median(s.attend_seconds for s in stats[1:])
    result |= {
        "density": stats[-1].density,
        "selection_seconds": selection,
        "selection_share": selection / (selection + executor),
        "executor_gflops": attended / executor / 1e9,
    }
    return result


MEMORY_PROBE = """
import resource, sys, numpy as np, dhsa
length, heads, kv_heads, dim, threads = map(int, sys.argv[1:])
dhsa.set_num_threads(threads)
rng = np.random.default_rng(0)
q = rng.standard_normal((1, heads, length, dim), dtype=np.float32)
k = rng.standard_normal((1, kv_heads, length, dim), dtype=np.float32)
v = rng.standard_normal((1, kv_heads, length, dim), dtype=np.float32)
out = np.ones_like(q)
dhsa.attention(q[:, :, :256], k[:, :, :256], v[:, :, :256])
# The high-water mark must start from here: what making the inputs took is not the call's.
open("/proc/self/clear_refs", "w").write("5")
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
dhsa.attention(q, k, v, dhsa.Config(), out=out)
print(peak() - before)
"""


def bench_memory(name, shape, length, threads):
    command = [sys.executable, "-c", MEMORY_PROBE, *map(str, (length, *shape, threads))]
    kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {
        "row": f"extra memory, sparse {length // 1024}K, {name}",
        "mib": kib / 1024,
        "goal_mib": 64,
        "pass": kib <= 64 * 1024,
    }


def show(result):
    mark = {True: "pass", False: "MISS", None: ""}[result["pass"]]
    if "mib" in result:
        print(f"{result['row']:<38} {result['mib']:8.1f} MiB  (goal <= {result['goal_mib']} MiB)  {mark}", flush=True)
        return
    print(
        f"{result['row']:<38} {result['seconds'] * 1e3:9.1f} ms {result['gflops']:6.0f} GFLOP/s"
        f" {result['share_of_peak']:6.1%} of fp32 peak"
        f" | {result['peer']} {result['peer_seconds'] * 1e3:9.1f} ms {result['peer_gflops']:6.0f} GFLOP/s"
        f" | {result['ratio']:5.2f}x" + (f" (goal {result['goal']}x) {mark}" if mark else ""),
        flush=True,
    )
    if "density" in result:
        print(
            f"{'':<38} density {result['density']:.3f}, selection {result['selection_share']:.1%} of the call,"
            f" executor alone {result['executor_gflops']:.0f} GFLOP/s",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--quick", action="store_true", help="only 8K rows")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/attention.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dhsa.set_num_threads(args.threads)
    print(
        f"dhsa {dhsa.__version__} ({dhsa.build_info()['isa']}), torch {torch.__version__}, {args.threads} threads,"
        f" {args.dtype}, medians of {args.repeats} alternating runs"
    )
    results = []
    dtype = getattr(torch, args.dtype)

    def add(result):
        results.append(result)
        show(result)

    for name, shape in SHAPES.items():
        add(bench_dense(name, shape, 8192, args.repeats, args.threads, dtype))
    for name, shape in SHAPES.items():
        add(bench_window(name, shape, 8192, 512, args.repeats, args.threads, dtype))
    for length, goal in SPARSE_GOALS.items():
        if args.quick and length > 8192:
            continue
        # The long ones take PyTorch tens of seconds each.
        repeats = max(3, math.ceil(args.repeats * 8192 / length))
        for name, shape in SHAPES.items():
            add(bench_sparse(name, shape, length, repeats, args.threads, goal, dtype))
    if sys.platform == "linux" and dtype == torch.float32:
        for name, shape in SHAPES.items():
            add(bench_memory(name, shape, 32768, args.threads))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpu": platform.processor(),
        "threads": args.threads,
        "build": dhsa.build_info(),
        "torch": torch.__version__,
    }
    machine["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    args.json.write_text(json.dumps({"machine": machine, "rows": results}, indent=1, default=str))
    judged = [r["pass"] for r in results if r["pass"] is not None]
    print(f"{sum(judged)} of {len(judged)} rows pass; written to {args.json}")


if __name__ == "__main__":
    main()
