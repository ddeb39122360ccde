"""The length from which sparse prefill is faster: exact against sparse calls of `dhsa.functional.run`, with selection,
by length, and the coefficients of dhsa/hf/break_even.py fitted to them.

Calls take turns in one process. Each number is the median of ratios of calls that follow one another. Measured are
whole prompts, up to a length from which sparse is always faster; then pieces of a prompt on a cache of earlier keys;
then prompts as small as those of tests. Correctness is tested in tests/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dhsa
from dhsa import functional
from dhsa.hf import break_even

SHAPES = [(4, 1, 256), (8, 4, 256), (32, 8, 128), (9, 3, 64)]  # H, Hkv, D
DTYPES = ["float32", "bfloat16", "float16"]
BUDGETS = [256, 512, 1024, 2048]
STEPS = [1.125, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8]  # lengths, in budgets
PIECES = [(128, 2), (512, 2), (512, 4), (2048, 2)]  # queries, and keys in budgets
SMALL = [(100, 32), (200, 96), (300, 48), (300, 96), (400, 48), (600, 128), (600, 400)]  # length, budget
SMALL_SHAPES = [(4, 2, 16), (4, 2, 32)]
ENOUGH = 2  # lengths in a row at which sparse wins before the longer ones are left out
PATIENCE = 4.0  # seconds, after which three rounds are enough
EXACT = dhsa.Config(budget=None)


def measure(
    shape: tuple[int, int, int], q_len: int, k_len: int, dtype: str, config: dhsa.Config, repeats: int
) -> dict[str, Any]:
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(k_len)
    q = torch.randn(1, heads, q_len, dim, generator=generator).to(getattr(torch, dtype))
    k, v = (torch.randn(1, kv_heads, k_len, dim, generator=generator).to(q.dtype) for _ in range(2))
    out = torch.empty_like(q)
    seconds: dict[str, list[float]] = {"exact": [], "sparse": [], "select": []}
    # With one thread, CPU time: what other processes take in between is not counted.
    clock = time.thread_time if dhsa.get_num_threads() == 1 else time.perf_counter
    begun = time.perf_counter()
    for i in range(repeats + 1):
        if i > 3 and time.perf_counter() - begun > PATIENCE:
            break
        for name, some in (("exact", EXACT), ("sparse", config)):
            start = clock()
            stats = functional.run(q, k, v, some, out=out)[2]
            took = clock() - start
            if i:  # the first round touches memory
                seconds[name].append(took)
                if name == "sparse":
                    assert stats.path == "sparse"
                    seconds["select"].append(stats.select_seconds / (stats.select_seconds + stats.attend_seconds))
    # Each sparse call is compared with the exact call just before it.
    ratios = np.divide(seconds["sparse"], seconds["exact"])
    total, select = statistics.median(ratios), statistics.median(seconds["select"])
    made = {"shape": shape, "dtype": dtype, "budget": config.budget, "q_len": q_len, "k_len": k_len}
    made |= {"sparse_over_exact": total, "select_over_exact": select * total}
    made["exact_seconds"] = statistics.median(seconds["exact"])
    exact, sparse = break_even.seconds(config, q, k, None)
    chosen = bool(break_even.reason(config, q, k, None))
    return made | {"predicted": sparse / exact, "exact_chosen": chosen, "spread": _spread(ratios)}


def _spread(values: Any) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for dtype in [args.dtype] if args.dtype else DTYPES:
        for shape in SHAPES:
            for budget in BUDGETS:
                config, wins = dhsa.Config(budget=budget), 0
                for step in STEPS:
                    length = int(step * budget)
                    if config.leaves_out(length, length, None) and wins < ENOUGH:
                        row = measure(shape, length, length, dtype, config, args.repeats)
                        wins = wins + 1 if row["sparse_over_exact"] < 1 else 0
                        yield row | {"part": "whole"}
                for q_len, more in PIECES:
                    k_len = max(int(more * budget), q_len + budget // 2)
                    if config.leaves_out(q_len, k_len, None):
                        yield measure(shape, q_len, k_len, dtype, config, args.repeats) | {"part": "piece"}
        for shape in SMALL_SHAPES:
            for length, budget in SMALL:
                config = dhsa.Config(budget=budget, sink=4, local=16, query_block=32, dense_tail=16)
                yield measure(shape, length, length, dtype, config, 4 * args.repeats) | {"part": "small"}


def crossing(found: list[dict[str, Any]]) -> str:
    """The length from which sparse is faster at all longer ones measured, between two of them."""
    after = next((i for i in range(len(found)) if all(r["sparse_over_exact"] < 1 for r in found[i:])), None)
    if after is None:
        return f"> {found[-1]['k_len']:,}"
    if after == 0:
        return f"< {found[0]['k_len']:,}"
    (x, fx), (y, fy) = ((r["k_len"], r["sparse_over_exact"] - 1) for r in found[after - 1 : after + 1])
    return f"{x + (y - x) * fx / (fx - fy):,.0f}"


def slowest(found: list[dict[str, Any]], most: int = 10) -> list[tuple[float, dict[str, Any]]]:
    """The rows that lose most by the rule, and their time in exact calls: 1 where the rule chooses exact attention."""
    chosen = [(1.0 if r["exact_chosen"] else r["sparse_over_exact"], r) for r in found]
    return sorted(chosen, key=lambda x: -x[0])[:most]


def fit(found: list[dict[str, Any]]) -> tuple[break_even.Costs, list[float]]:
    """A dtype's entry of break_even.COSTS, and its relative error in each row. The fit minimizes the squares of the
    relative errors; no cost is negative."""
    sides, products = [], []
    for r in found:
        heads, kv_heads, dim = r["shape"]
        config, group = dhsa.Config(budget=r["budget"]), heads // kv_heads
        work = break_even.work(config, r["q_len"], r["k_len"], None)
        left, shared = r["sparse_over_exact"] * work.visible, break_even.sharing(config, group)
        sides.append([x / left for x in (work.kept, work.listed / shared, work.scored, work.keys / group)])
        products.append(r["exact_seconds"] / (work.visible * heads * dim))
    a, one = np.array(sides), np.ones(len(found))
    best = min(
        (_solved(a, one, list(some)) for n in range(1, 5) for some in itertools.combinations(range(4), n)),
        key=lambda x: float(((a @ x - one) ** 2).sum()) if (x >= 0).all() else np.inf,
    )
    return break_even.Costs(statistics.median(products), *best.tolist()), (a @ best - 1).tolist()


def _solved(a: np.ndarray, b: np.ndarray, some: list[int]) -> np.ndarray:
    x = np.zeros(a.shape[1])
    x[some] = np.linalg.lstsq(a[:, some], b, rcond=None)[0]
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--json", type=Path, help="append the rows here, line by line")
    parser.add_argument("--report", action="store_true", help="measure nothing, only say what is in --json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dhsa.set_num_threads(args.threads)
    isa = dhsa.build_info()["isa"]
    print(f"dhsa {dhsa.__version__} ({isa}), {args.threads} thread(s); sparse / exact, less is faster")
    found = [json.loads(row) for row in args.json.read_text().splitlines()] if args.report else []
    for r in [] if args.report else rows(args):
        found.append(r)
        shape = "{:>2}/{} D{:<3}".format(*r["shape"])
        print(
            f"{r['dtype']:<9} {shape} budget {r['budget']:>5,} {r['q_len']:>6,} x {r['k_len']:>6,}  exact"
            f" {r['exact_seconds'] * 1e3:9.3f} ms  sparse {r['sparse_over_exact']:5.2f} +- {r['spread']:4.2f}"
            f" (selection {r['select_over_exact']:4.2f}; rule {r['predicted']:4.2f})",
            flush=True,
        )
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(r) + "\n")
    print("\nsparse pays from, by budget")
    for dtype in dict.fromkeys(r["dtype"] for r in found):
        for shape in SHAPES:
            whole = [r for r in found if (r["dtype"], *r["shape"], r["part"]) == (dtype, *shape, "whole")]
            by = {b: [r for r in whole if r["budget"] == b] for b in BUDGETS}
            line = ", ".join(f"{b:,}: {crossing(some)}" for b, some in by.items() if some)
            print(f"{dtype:<9} {shape[0]:>2}/{shape[1]} D{shape[2]:<3}  {line}")
    print("\nslowest by the rule, over exact (1: the rule chooses exact)")
    for ratio, r in slowest(found):
        shape = "{}/{} D{}".format(*r["shape"])
        print(
            f"{ratio:5.2f}  {r['dtype']:<9} {shape:<10} budget {r['budget']:>5,} {r['q_len']:>6,} x {r['k_len']:>6,}"
            f"  exact {r['exact_seconds'] * 1e3:.3f} ms"
        )
    print("\nCOSTS")
    for dtype in dict.fromkeys(r["dtype"] for r in found):
        costs, missed = fit([r for r in found if r["dtype"] == dtype and r["part"] != "small"])
        values = ", ".join(f"{name}={value:.3g}" for name, value in costs._asdict().items())
        print(f'    "{dtype}": Costs({values}),  # misses by {statistics.median(map(abs, missed)):.0%} in the median')


if __name__ == "__main__":
    main()
