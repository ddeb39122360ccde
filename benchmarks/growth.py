"""How cost grows with length: seconds per query of the executor, and memory beside inputs and output."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from harness import check, interleave, row
from peers import Shape, at, flop, inputs, tokens

import dhsa


def growth_rows(shape: Shape, lengths: list[int], dtype: torch.dtype, threads: int) -> Iterator[dict[str, Any]]:
    """The executor's time per query at one budget, every length in turn."""
    calls, densities = {}, {}
    for length in lengths:
        q, k, v = inputs(shape, length, dtype)
        selection = dhsa.select(q, k, dhsa.Config())
        densities[length] = selection.density()
        calls[tokens(length)] = partial(dhsa.sparse_attention, q, k, v, selection, out=torch.empty_like(q))
    timing = interleave(calls, 5, threads)
    each = {length: timing.median(tokens(length)) / length * 1e6 for length in lengths}
    for length in lengths:
        attended = densities[length] * (length + 1) / 2
        # Shown beside: a block of the last queries sees every key, and the first blocks have fewer than the budget.
        yield row(
            "growth",
            "executor, per query",
            dtype,
            at(shape, length),
            flop=flop(shape, length) * densities[length],
            timing=timing,
            ours=tokens(length),
            checks=[check(f"against {tokens(lengths[0])}", each[length] / each[lengths[0]], 1.1, "x", at_most=True)]
            if length > lengths[0]
            else [],
            detail=f"{each[length]:.2f} us a query, {attended:.0f} keys a query attended to,"
            f" {each[length] * 1e3 / attended:.3f} ns a pair",
        )


_PROBE = """
import sys, torch, dhsa
length, heads, kv_heads, dim, threads = map(int, sys.argv[2:])
dtype = getattr(torch, sys.argv[1])
torch.set_num_threads(threads)
dhsa.set_num_threads(threads)
q, k, v = (torch.empty(1, h, length, dim, dtype=dtype).normal_() for h in (heads, kv_heads, kv_heads))
out = torch.ones_like(q)
dhsa.attention(q[:, :, :256], k[:, :, :256], v[:, :, :256])
# Resets the high-water mark: memory that was used to make the inputs does not count.
open("/proc/self/clear_refs", "w").write("5")
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
dhsa.attention(q, k, v, dhsa.Config(), out=out)
print(peak() - before)
"""


def memory_rows(shape: Shape, length: int, dtype: torch.dtype, threads: int) -> Iterator[dict[str, Any]]:
    """What one sparse call needs beside its inputs and its output, in a process of its own; Linux only."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-c", _PROBE, name, *map(str, (length, *shape, threads))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    mib = int(done.stdout) / 1024
    key_mib = shape.kv_heads * length * shape.dim * dtype.itemsize / 2**20
    goal = 64 if length <= 32768 else key_mib / 4
    yield row(
        "memory",
        "extra memory, whole call",
        dtype,
        at(shape, length),
        checks=[check("peak", mib, goal, "MiB", at_most=True)],
        detail=f"K alone takes {key_mib:.0f} MiB" if length > 32768 else "",
    )
