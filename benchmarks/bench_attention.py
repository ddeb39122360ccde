"""Speed and memory of one attention call, compared with PyTorch and with the machine; run by `make bench`.

Rows are the goals of this project. Each states seconds, GFLOP/s of visible pairs (4 H D a pair), the share of the
multiply-add peak measured around that very call, the ratio to a peer that was timed in turns with it, and pass or MISS.
Correctness is tested in tests/.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_boundaries
import torch
from growth import growth_rows, memory_rows
from harness import DTYPES, RESULTS, Job, check, interleave, machine, row, run_jobs
from peers import GEMMA2, GEMMA3, Shape, at, flex, flop, inputs, sdpa, tokens
from wide import ENCODERS, GEMMA4, both_sides, wide

import dhsa

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SOFTCAP = 50.0
CONFIGS = {"Config()": dhsa.Config(), "faithful()": dhsa.Config.faithful(), "fast()": dhsa.Config.fast()}
OVER_SDPA = {  # goals of the whole call of Config.faithful(), 2,048 keys, against SDPA of the same dtype
    FP32: {8192: 2.5, 16384: 4.8, 32768: 9.5, 65536: 18.0},
    BF16: {8192: 2.8, 16384: 4.8, 32768: 9.0, 65536: 16.0},
}
OVER_EXACT = {8192: 1.6, 16384: 2.8, 32768: 5.0, 65536: 9.0}  # the same in bf16 against our own exact attention
# The same of a run with `--isa avx2`, in every dtype; and that of dense attention there.
OVER_SDPA_AVX2 = {8192: 2.4, 16384: 4.6, 32768: 9.0}
DENSE_AVX2 = 1.2
# What holds PyTorch and its libraries to AVX2. They read it when they are loaded.
AVX2_PEERS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
CHART_LENGTHS = (1024, 2048, 4096)  # the chart's points below those of OVER_EXACT
SHARED = (Shape(8, 4, 128), Shape(8, 2, 128))  # two and four query heads for a KV head
Rows = Iterator[dict[str, Any]]


def _avx2() -> bool:
    return dhsa.build_info()["isa"] == "avx2"


def dense(shape: Shape, length: int, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)
    timing = interleave(
        {"dhsa": lambda: dhsa.attention(q, k, v, out=out), "sdpa": lambda: sdpa(q, k, v)}, repeats, threads
    )
    work = flop(shape, length)
    large = shape.dim == 256
    goal = {FP32: 1.15 if large else 1.0, BF16: 1.8 if large else 1.5, FP16: 1.5}[dtype]
    if _avx2():
        goal = DENSE_AVX2
    yield row(
        "dense",
        "dense causal",
        dtype,
        at(shape, length),
        flop=work,
        timing=timing,
        peer="sdpa",
        checks=[
            check("ratio", timing.ratio("dhsa", "sdpa"), goal, "x"),
            check("of peak", timing.share("dhsa", work), 0.80, "%") if dtype == FP32 and large else None,
        ],
    )


def softcapped(shape: Shape, length: int, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)
    timing = interleave(
        {
            "dhsa": lambda: dhsa.attention(q, k, v, softcap=SOFTCAP, out=out),
            "plain": lambda: dhsa.attention(q, k, v, out=out),
            "flex": flex(q, k, v, softcap=SOFTCAP),
        },
        repeats,
        threads,
        fewer={"flex": min(repeats, 3)},
    )
    yield row(
        "softcap",
        f"dense, softcap {SOFTCAP:g}",
        dtype,
        at(shape, length),
        flop=flop(shape, length),
        timing=timing,
        peer="flex",
        checks=[
            check("ratio", timing.ratio("dhsa", "flex"), {FP32: 1.5, BF16: 4.0}[dtype], "x"),
            check("over no softcap", 1 / timing.ratio("dhsa", "plain") - 1, 0.08, "%", at_most=True),
        ],
    )


def windowed(shape: Shape, length: int, window: int, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)
    timing = interleave(
        {
            "dhsa": lambda: dhsa.attention(q, k, v, window=window, out=out),
            "flex": flex(q, k, v, window=window),
        },
        repeats,
        threads,
        fewer={"flex": min(repeats, 3)},
    )
    work = flop(shape, length, window)
    yield row(
        "window",
        f"window {window}",
        dtype,
        at(shape, length),
        flop=work,
        timing=timing,
        peer="flex",
        checks=[
            check("ratio", timing.ratio("dhsa", "flex"), {FP32: 1.7, BF16: 3.0}[dtype], "x"),
            check("of peak", timing.share("dhsa", work), 0.65, "%") if window == 512 and dtype == FP32 else None,
        ],
    )


def executor(shape: Shape, length: int, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    """The executor on the token lists that DHSA makes: GFLOP/s beside those of our own dense attention."""
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)
    for name, config in CONFIGS.items():
        selection = dhsa.select(q, k, config)
        density = selection.density()
        timing = interleave(
            {
                "dhsa": lambda: dhsa.sparse_attention(q, k, v, selection, out=out),  # noqa: B023
                "dense": lambda: dhsa.attention(q, k, v, out=out),
            },
            repeats,
            threads,
        )
        relative = density * timing.ratio("dhsa", "dense")
        yield row(
            "executor",
            f"lists of {name}",
            dtype,
            at(shape, length),
            flop=flop(shape, length) * density,
            timing=timing,
            checks=[check("of dense GFLOP/s", relative, 0.85, "%")],
            density=density,
        )


def whole(shape: Shape, length: int, dtype: torch.dtype, chart: bool, repeats: int, threads: int) -> Rows:
    """The whole sparse calls, selection included, exact attention and SDPA in turns; with `chart`, flex_attention."""
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)
    stats: dict[str, list[Any]] = {name: [] for name in CONFIGS}

    def sparse(name: str) -> None:
        stats[name].append(dhsa.functional.run(q, k, v, CONFIGS[name], out=out)[2])

    calls: dict[str, Any] = {name: functools.partial(sparse, name) for name in CONFIGS}
    calls |= {"exact": lambda: dhsa.attention(q, k, v, out=out), "sdpa": lambda: sdpa(q, k, v)}
    if chart:
        try:
            calls["flex"] = flex(q, k, v)
        except Exception as error:  # for example without a compiler; the other curves are still drawn
            print(f"  no flex_attention: {error}")
    long = length > 8192
    if long:  # warm all but the peers, whose threads and code are warm from shorter rows, and who take minutes
        small = [x[:, :, :1024] for x in (q, k, v)]
        for name in CONFIGS:
            calls[name]()
        sdpa(*small)
        if "flex" in calls:
            flex(*small)()
    once = 1 if length > 16384 else 2
    few = 1 if length > 32768 else 2
    timing = interleave(
        calls,
        repeats,
        threads,
        fewer={"sdpa": few if long else repeats, "exact": 2 if long else repeats, "flex": once},
        warm=not long,
    )
    for name, found in stats.items():
        found = found[1:]
        share = statistics.median(s.select_seconds / (s.select_seconds + s.attend_seconds) for s in found)
        attended = flop(shape, length) * found[-1].density
        attending = statistics.median(s.attend_seconds for s in found)
        over_exact = timing.ratio(name, "exact")
        goals = OVER_SDPA_AVX2 if _avx2() else OVER_SDPA[dtype]
        judged = name == "faithful()" and length in OVER_EXACT
        yield row(
            "whole",
            name,
            dtype,
            at(shape, length),
            flop=attended,
            timing=timing,
            ours=name,
            peer="sdpa",
            checks=[
                check("ratio", timing.ratio(name, "sdpa"), goals[length], "x") if judged and length in goals else None,
                check("over exact", over_exact, OVER_EXACT[length], "x")
                if judged and dtype == BF16 and not _avx2()
                else None,
            ],
            detail=f"{over_exact:.2f}x exact, density {found[-1].density:.3f}, selection {share:.1%} of the call,"
            f" executor alone {attended / attending / 1e9:.0f} GFLOP/s",
            over_exact=over_exact,
            density=found[-1].density,
            selection_share=share,
            length=length,
            series={_SERIES.get(n, n): timing.median(n) for n in calls} if chart and name == "Config()" else None,
        )


_SERIES = {"Config()": "dhsa"}  # the names of curves in report.py


def selecting(shape: Shape, length: int, dtype: torch.dtype, threads: int) -> Rows:
    """Selection's share of the whole call, without a peer: up to lengths where one would take an hour."""
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)
    stats: list[Any] = []
    timing = interleave(
        {"dhsa": lambda: stats.append(dhsa.functional.run(q, k, v, dhsa.Config(), out=out)[2])}, 3, threads
    )
    share = statistics.median(s.select_seconds / (s.select_seconds + s.attend_seconds) for s in stats)
    yield row(
        "selecting",
        "selection's share",
        dtype,
        at(shape, length),
        flop=flop(shape, length) * stats[-1].density,
        timing=timing,
        checks=[check("selection", share, 0.10, "%", at_most=True) if dtype == FP32 else None],
        detail=f"selection {share:.1%} of the call",
        selection_share=share,
        length=length,
    )


def scaling(shape: Shape, length: int, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    q, k, v = inputs(shape, length, dtype)
    out = torch.empty_like(q)

    def on(n: int) -> None:
        dhsa.set_num_threads(n)
        dhsa.attention(q, k, v, out=out)

    try:
        timing = interleave(
            {"dhsa": lambda: on(threads), "1 thread": lambda: on(1)}, repeats, threads, fewer={"1 thread": 3}
        )
    finally:
        dhsa.set_num_threads(threads)
    ratio = timing.ratio("dhsa", "1 thread")
    yield row(
        "scaling",
        f"dense, 1 to {threads} threads",
        dtype,
        at(shape, length),
        flop=flop(shape, length),
        timing=timing,
        peer="1 thread",
        checks=[check("ratio", ratio, 1.85, "x") if threads == 2 else None],
    )


def short(shape: Shape, length: int, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    q, k, v = inputs(shape, length, dtype)
    timing = interleave(
        {"dhsa": lambda: dhsa.attention(q, k, v), "sdpa": lambda: sdpa(q, k, v)},
        repeats * 3,
        threads,
        inner=max(1, 2**22 // length**2),
    )
    yield row(
        "short",
        "dense, short",
        dtype,
        at(shape, length),
        flop=flop(shape, length),
        timing=timing,
        peer="sdpa",
        checks=[check("ratio", timing.ratio("dhsa", "sdpa"), 1.0, "x")],
    )


def overhead(shape: Shape, dtype: torch.dtype, repeats: int, threads: int) -> Rows:
    """One query over one key: what is left is the call itself."""
    q, k, v = inputs(shape, 1, dtype)
    timing = interleave(
        {"dhsa": lambda: dhsa.attention(q, k, v), "sdpa": lambda: sdpa(q, k, v)},
        repeats,
        threads,
        inner=1000,
    )
    microseconds = timing.median("dhsa") * 1e6
    yield row(
        "short",
        "call overhead",
        dtype,
        at(shape, 1),
        timing=timing,
        peer="sdpa",
        checks=[check("time", microseconds, 20, "us", at_most=True)],
    )


def decode_rows(threads: int, repeats: int, dtypes: list[torch.dtype]) -> Rows:
    """The rows of bench_decode.py."""
    import bench_decode

    names = {DTYPES[str(d).removeprefix("torch.")] for d in dtypes}
    yield from (r for r in bench_decode.rows(threads, repeats) if r["dtype"] in names)


def jobs_of(args: argparse.Namespace, dtypes: list[torch.dtype]) -> list[Job]:
    jobs: list[Job] = []
    threads, repeats = args.threads, args.repeats
    top = 8192 if args.quick else args.max_length
    least = 8192 if args.quick else args.min_length
    wanted = [n for n in (4096, 8192, 16384, 32768, 65536) if least <= n <= top]
    charted = [n for n in CHART_LENGTHS if n >= args.min_length]

    def add(section: str, function: Any, shape: Shape, *given: Any) -> None:
        name = " ".join(
            DTYPES.get(str(x).removeprefix("torch."), str(x))
            for x in (shape, *given[:-2])
            if not isinstance(x, (bool, float, type(None)))
        )
        jobs.append(Job(section, f"{section} {name}", lambda: function(shape, *given)))

    def times(length: int) -> int:
        return repeats if length <= 8192 else max(3, math.ceil(repeats * 8192 / length))

    for dtype in dtypes:
        for shape in (GEMMA2, GEMMA3):
            for length in (n for n in wanted if n <= 16384) if dtype != FP16 else (8192,):
                add("dense", dense, shape, length, dtype, times(length), threads)
        if dtype == FP16:
            continue
        grid = [(dim, kv) for dim in (64, 128, 256) for kv in (8, 4, 2, 1) if (dim, kv) != GEMMA2[:0:-1]]  # done above
        for dim, kv_heads in grid if not args.quick else ((64, 4), (128, 4)):
            add("dense", dense, Shape(8, kv_heads, dim), 4096, dtype, repeats, threads)
        add("wide", wide, GEMMA4, 4096, dtype, repeats, threads)
        for shape in ENCODERS:
            for length in (n for n in wanted if n in (8192, 32768)):
                add("sides", both_sides, shape, length, dtype, times(length), threads)
        for shape in (GEMMA2, GEMMA3):
            add("softcap", softcapped, shape, 8192, dtype, repeats, threads)
        for shape in (GEMMA2, GEMMA3):
            for length in (n for n in wanted if n in (8192, 16384)):
                for window in (512, 4096):
                    add("window", windowed, shape, length, window, dtype, times(length), threads)
        for shape in (GEMMA2, GEMMA3):
            add("executor", executor, shape, 8192 if args.quick else 16384, dtype, 3, threads)
        for length in (*charted, *(n for n in wanted if n in OVER_EXACT)):
            for shape in (GEMMA2, GEMMA3, *SHARED) if length in OVER_EXACT else (GEMMA3,):
                if length <= 32768 or shape == GEMMA3:
                    add("whole", whole, shape, length, dtype, shape == GEMMA3, times(length), threads)
        for length in (8192, 16384, 32768, 65536, 131072) if not args.quick else (8192,):
            for shape in (GEMMA2, GEMMA3):
                if args.min_length <= length <= 2 * args.max_length:
                    add("selecting", selecting, shape, length, dtype, threads)
        for shape in (GEMMA2, GEMMA3):
            for length in (128, 512):
                add("short", short, shape, length, dtype, repeats, threads)
        add("short", overhead, GEMMA3, dtype, repeats, threads)
        if dtype == FP32 and threads > 1:
            add("scaling", scaling, GEMMA2, 8192, dtype, repeats, threads)
    if importlib.util.find_spec("bench_decode"):
        jobs.append(Job("decode", "decode", lambda: decode_rows(threads, repeats, dtypes)))
    kept = [d for d in dtypes if d != FP16]
    jobs.append(Job("boundaries", "boundaries", lambda: bench_boundaries.rows(threads, repeats, kept)))
    if not args.quick:
        if BF16 in dtypes:
            lengths = [n for n in (16384, 32768, 65536, 131072) if n <= args.max_length * 2]
            jobs.append(Job("growth", "growth", lambda: growth_rows(GEMMA3, lengths, BF16, threads)))
        for length in (n for n in (32768, 131072) if args.min_length <= n <= args.max_length * 2):
            for dtype in (d for d in dtypes if d != FP16):
                for shape in (GEMMA2, GEMMA3):
                    name = f"memory {shape} {tokens(length)}"
                    jobs.append(Job("memory", name, lambda s=shape, n=length, d=dtype: memory_rows(s, n, d, threads)))
    return [job for job in jobs if not args.only or job.section in args.only]


SECTIONS = (
    "dense",
    "softcap",
    "window",
    "executor",
    "whole",
    "wide",
    "sides",
    "selecting",
    "boundaries",
    "short",
    "scaling",
    "decode",
    "growth",
    "memory",
)


def main() -> None:
    short_names = {v: k for k, v in DTYPES.items()}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a row; fewer, but at least 3, for long ones")
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES, *short_names], default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--max-length", type=int, default=65536, help="leave out longer rows")
    parser.add_argument(
        "--min-length", type=int, default=0, help="leave out shorter rows where there are several lengths"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep the rows of an earlier run that this one does not measure"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="ROWS", help="only these rows")
    parser.add_argument("--quick", action="store_true", help="8K rows (and the chart's short ones) in two minutes")
    parser.add_argument("--isa", choices=["avx2"], help="hold dhsa and its peers to AVX2, as most laptops have it")
    parser.add_argument(
        "--json", type=Path, help="default: benchmarks/results/attention.json, with the --isa or 'quick' in its name"
    )
    args = parser.parse_args()
    if args.isa and any(os.environ.get(name) != value for name, value in AVX2_PEERS.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2_PEERS)
    if args.isa:
        dhsa.set_isa(args.isa)
    if args.quick:
        args.repeats = min(args.repeats, 3)
    kind = "".join(f"-{word}" for word in (args.isa, "quick" if args.quick else None) if word)
    args.json = args.json or RESULTS / f"attention{kind}.json"
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    dhsa.set_num_threads(args.threads)
    dtypes = [getattr(torch, short_names.get(name, name)) for name in args.dtype]
    told = machine(args.threads)
    print(
        f"dhsa {dhsa.__version__} ({told['isa']}), torch {torch.__version__}, {args.threads} threads, {told['cpu']};"
        f" medians of {args.repeats} interleaved rounds (3 for long rows); FMA peak {told['fma_peak']:.0f} GFLOP/s"
    )
    report = run_jobs(jobs_of(args, dtypes), args.json, {"machine": told, "repeats": args.repeats}, args.add)
    try:
        from report import draw

        print(f"chart: {draw(report, args.json.with_suffix('.png'))}")
    except (ImportError, ValueError) as error:
        print(f"no chart: {error}")


if __name__ == "__main__":
    main()
