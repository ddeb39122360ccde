"""How long a prompt takes that several machines read together (dhsa/distributed): a prediction from compute rates,
which a short calibration of this machine measures or a file gives, and from a network's bandwidth and latency.

    python benchmarks/scaling.py --bandwidth 1000 --latency 0.2 --budget 2048 --json scaling.json

Layers are simulated one after another. Every machine has a clock. A message leaves when its sender has computed what is
in it and its receiver waits for it, and takes the latency and the time in which the busier one of the two moves all its
bytes of that exchange. The network of a machine sends and receives at once. Bytes are those of
docs/howto/two-machines.md, which `last_run` counts; tests/tools/test_scaling.py compares the two. One number of them
depends on the text: how many keys of another machine some block selects. --fetched gives their share; else blocks are
taken to select independently of each other, which is the most that can be.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import dhsa
from dhsa import functional
from dhsa.distributed.layout import split
from dhsa.hf import break_even
from dhsa.methods.rows import GROUP

Parts = Sequence[Sequence[tuple[int, int]]]  # of each rank, [start, stop) of its tokens
Traffic = dict[tuple[int, int], int]  # {(sender, receiver): bytes}
Fetched = Callable[[int, int], float]  # (holder, rank) -> rows of keys that are sent, summed over the KV heads

EXACT = dhsa.Config(budget=None)
LENGTHS = [131_072, 262_144, 524_288, 1_048_576]
MACHINES = [1, 2, 4, 8, 16, 32, 64]
FACTS = 250  # bytes that a rank says to each other one about a call


class Shape(NamedTuple):
    """What of a model decides its time. `kind`: its model_type. `windows`: of each layer, None where it sees all
    keys."""

    name: str
    kind: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    windows: tuple[int | None, ...]

    @property
    def weights(self) -> int:
        """The numbers in the matrices of a layer, each of which is multiplied once for a token."""
        return self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.dim + 3 * self.hidden * self.intermediate


SHAPES = {
    "gemma2-2b": Shape("Gemma 2 2B", "gemma2", 2304, 9216, 8, 4, 256, (4096, None) * 13),
    "llama-8b": Shape("Llama 8B", "llama", 4096, 14336, 32, 8, 128, (None,) * 32),
}


def shape_of(config: Any, name: str) -> Shape:
    """The shape of a model with this config of transformers."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return Shape(
        name,
        config.model_type,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds),
    )


# ---- bytes -----------------------------------------------------------------------------------------------------------


def parts_of(config: dhsa.Config, length: int, ranks: int) -> Parts:
    """Which tokens each rank computes and holds, as hf/parallel.py divides them."""
    if config.leaves_out(length, length):
        return split(length, ranks, config.query_block, balanced=False)
    return split(length, ranks, 1, balanced=True)


def count(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def dense_bytes(parts: Parts, row: int, window: int | None) -> Traffic:
    """Of an exact layer: `row` bytes for each key of a rank that a query of another one sees."""
    found: Traffic = {}
    for r, mine in enumerate(parts):
        for t, theirs in enumerate(parts):
            if r == t or not theirs:
                continue
            seen: list[tuple[int, int]] = []
            for first, last in theirs:
                low = 0 if window is None else max(0, first - window + 1)
                seen = _joined([*seen, (low, last)])
            keys = sum(max(0, min(b, d) - max(a, c)) for a, b in mine for c, d in seen)
            if keys:
                found[r, t] = row * keys
    return found


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges without overlaps."""
    found: list[tuple[int, int]] = []
    for a, b in sorted(ranges):
        if found and a <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], b))
        else:
            found.append((a, b))
    return found


class SparseBytes(NamedTuple):
    """The three exchanges of a layer that selects: means of chunks, which keys are wanted, and their rows."""

    means: Traffic
    wanted: Traffic
    rows: Traffic

    def total(self) -> Traffic:
        found: Traffic = {}
        for part in self:
            for pair, size in part.items():
                found[pair] = found.get(pair, 0) + size
        return found


def sparse_bytes(
    parts: Parts, shape: Shape, config: dhsa.Config, itemsize: int, length: int, fetched: Fetched
) -> SparseBytes:
    """Of a layer that selects among all keys, with each rank's tokens in one run."""
    has_chunks, shortlist = config.options.has_chunks, config._core.shortlist
    means: Traffic = {}
    wanted: Traffic = {}
    rows: Traffic = {}
    for r, mine in enumerate(parts):
        for t in range(r + 1, len(parts)):
            if not mine or not parts[t]:
                continue
            keys = count(mine)
            if has_chunks:
                chunks = -(-keys // config._core.chunk_size)
                size = chunks * (shape.dim + 5)
                if 0 < shortlist < length and config.mass is None:
                    size += -(-chunks // GROUP) * (shape.dim + 9)
                means[r, t] = shape.kv_heads * size
            wanted[t, r] = shape.kv_heads * -(-keys // 8)
            if some := round(fetched(r, t)):
                rows[r, t] = some * 2 * shape.dim * itemsize
    return SparseBytes(means, wanted, rows)


def independent(parts: Parts, shape: Shape, config: dhsa.Config) -> Fetched:
    """The rows that are sent if the lists of blocks are drawn independently of each other, of all earlier keys."""
    block, budget = config.query_block, config.exact_up_to
    heads = {"head": shape.heads // shape.kv_heads, "group": 1, "all": 1}[config.heads or config.options.heads]

    def rows(holder: int, rank: int) -> float:
        missed = 0.0  # logarithm of the chance that no list has a key
        for first, last in parts[rank]:
            for start in range(first, last, block):
                missed += heads * math.log1p(-min(1 - 1e-12, budget / (start + block)))
        return shape.kv_heads * count(parts[holder]) * -math.expm1(missed)

    return rows


# ---- time ------------------------------------------------------------------------------------------------------------


class Rates(NamedTuple):
    """How fast a machine computes. `other`: the seconds of a token in a layer, without attention. `exact`, `select` and
    `attend`: the seconds of attention, of selecting and of attending to what was selected, as multiples of what
    `dhsa.hf.break_even` estimates."""

    other: float
    exact: float
    select: float
    attend: float
    dtype: str = "float32"


class Network(NamedTuple):
    """bandwidth: bytes a second in each direction of a machine. latency: seconds of a message."""

    bandwidth: float
    latency: float


class Prediction(NamedTuple):
    """seconds: of the prefill. waits: of them, the most that a machine waits for others. sent: bytes of the machine
    that sends most. held: bytes of keys and values of the machine that holds most."""

    seconds: float
    waits: float
    sent: int
    held: int


def exchange(clocks: Sequence[float], sizes: Traffic, network: Network) -> tuple[list[float], list[float]]:
    """When each rank has received what others send at their `clocks`, and when what it sends has arrived."""
    out, into = [0] * len(clocks), [0] * len(clocks)
    for (r, t), size in sizes.items():
        out[r] += size
        into[t] += size
    received, handed = list(clocks), list(clocks)
    for r, t in sizes:
        moved = max(out[r], into[t]) / network.bandwidth
        at = max(clocks[r], clocks[t]) + network.latency + moved
        received[t], handed[r] = max(received[t], at), max(handed[r], at)
    return received, handed


def predict(
    shape: Shape,
    config: dhsa.Config,
    length: int,
    ranks: int,
    rates: Rates,
    network: Network,
    fetched: Callable[[Parts], Fetched] | None = None,
) -> Prediction:
    """The prefill of one prompt of `length` tokens by `ranks` machines. `fetched`: of the parts, how many rows are
    sent; None: `independent`."""
    itemsize = getattr(torch, rates.dtype).itemsize
    parts = parts_of(config, length, ranks)
    row = 2 * shape.kv_heads * shape.dim * itemsize
    of_rows = independent(parts, shape, config) if fetched is None else fetched(parts)
    clocks, waits, sent = [0.0] * ranks, [0.0] * ranks, [0] * ranks
    known: dict[int | None, Any] = {}

    def wait(arrivals: Sequence[float]) -> None:
        for r, at in enumerate(arrivals):
            waits[r] += max(0.0, at - clocks[r])
            clocks[r] = max(clocks[r], at)

    def spend(seconds: Sequence[float]) -> None:
        for r, some in enumerate(seconds):
            clocks[r] += some

    def meet(sizes: Traffic) -> None:
        for arrivals in exchange(clocks, sizes, network):
            wait(arrivals)

    others = [count(part) * rates.other for part in parts]
    first = shape.hidden * (shape.heads + 2 * shape.kv_heads) * shape.dim / shape.weights  # before attention
    meet({(r, t): FACTS for r in range(ranks) for t in range(ranks) if r != t})
    for window in shape.windows:
        if window not in known:
            known[window] = _layer(shape, config, length, parts, rates, row, itemsize, window, of_rows)
        layer = known[window]
        spend([some * first for some in others])
        if isinstance(layer, _Exact):
            received, handed = exchange(clocks, layer.sizes, network)
            spend(layer.own)
            wait(received)
            spend(layer.rest)
            wait(handed)
            total = layer.sizes
        else:
            for sizes, seconds in zip(layer.sizes, layer.seconds, strict=True):
                meet(sizes)
                spend(seconds)
            total = layer.sizes.total()
        for (r, _), size in total.items():
            sent[r] += size
        spend([some * (1 - first) for some in others])
    last = max(r for r in range(ranks) if parts[r] and max(b for _, b in parts[r]) == length)
    head = {(last, t): shape.hidden * itemsize for t in range(ranks) if t != last}
    meet(head)
    tokens = max(count(part) for part in parts)
    held = sum(row * (tokens if window is None else min(tokens, window - 1)) for window in shape.windows)
    return Prediction(max(clocks), max(waits), max(sent), held)


class _Exact(NamedTuple):
    """Of a layer: what is sent, the seconds of attention to a rank's own keys, and of that to others'."""

    sizes: Traffic
    own: list[float]
    rest: list[float]


class _Sparse(NamedTuple):
    """Of a layer: what is sent, and the seconds after each of the three exchanges."""

    sizes: SparseBytes
    seconds: tuple[list[float], list[float], list[float]]


def _layer(
    shape: Shape, config: dhsa.Config, length: int, parts: Parts, rates: Rates, row: int, itemsize: int,
    window: int | None, fetched: Fetched,
) -> _Exact | _Sparse:  # fmt: skip
    costs = break_even.COSTS[rates.dtype]
    unit = shape.heads * shape.dim * costs.product
    if not is_sparse(shape, config, rates.dtype, length, window):
        every, own = [], []
        for mine in parts:
            every.append(sum(pairs_of(run, (0, run[1]), window) for run in mine))
            own.append(sum(pairs_of(q, k, window) for q in mine for k in mine))
        seconds = [pairs * unit * rates.exact for pairs in own]
        rest = [(pairs - few) * unit * rates.exact for pairs, few in zip(every, own, strict=True)]
        return _Exact(dense_bytes(parts, row, window), seconds, rest)
    nothing = [0.0] * len(parts)
    select, attend = list(nothing), list(nothing)
    group = shape.heads // shape.kv_heads
    for r, ((a, b), *_) in ((r, part) for r, part in enumerate(parts) if part):
        work = break_even.work(config, b - a, b, window)
        select[r] = (costs.score * work.scored + costs.key * (b - a) / group) * unit * rates.select
        gathered = costs.gather * work.listed / break_even.sharing(config, group)
        attend[r] = (costs.pair * work.kept + gathered) * unit * rates.attend
    if window is None:
        return _Sparse(sparse_bytes(parts, shape, config, itemsize, length, fetched), (select, nothing, attend))
    # A layer with a window sends the window's keys first, and those of the group of chunks in which it begins.
    wide = window + GROUP * config._core.chunk_size if config.options.has_chunks else window
    return _Sparse(SparseBytes(dense_bytes(parts, row, wide), {}, {}), (select, nothing, attend))


def is_sparse(shape: Shape, config: dhsa.Config, dtype: str, length: int, window: int | None) -> bool:
    """Whether a layer leaves keys out of a prompt."""
    if not config.leaves_out(length, length, window):
        return False
    x = torch.empty(1, 1, 1, shape.dim, dtype=getattr(torch, dtype))
    q, k = (x.expand(-1, heads, length, -1) for heads in (shape.heads, shape.kv_heads))  # shapes without memory
    return not break_even.reason(config, q, k, window)


def pairs_of(queries: tuple[int, int], keys: tuple[int, int], window: int | None) -> int:
    """Causal pairs of a query and a key in these ranges, within a window."""
    at = np.arange(*queries)
    low = keys[0] if window is None else np.maximum(keys[0], at - window + 1)
    return int(np.maximum(np.minimum(keys[1], at + 1) - low, 0).sum())


# ---- rates of this machine -------------------------------------------------------------------------------------------


def calibrate(shape: Shape, config: dhsa.Config, dtype: str, tokens: int = 8192, rounds: int = 3) -> Rates:
    """Measures this machine by a few calls of the sizes of a layer, each time the median of `rounds`. `tokens`: of the
    calls of attention, more than the budget."""
    if not config.leaves_out(tokens, tokens):
        raise ValueError(f"tokens: {tokens:,} are within the budget of {config.budget:,}, so nothing would be selected")
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    other = statistics.median(_without_attention(shape, kind, rounds))
    few = min(tokens // 2, 1024)  # the last queries, so that calls are short
    q = torch.randn(1, shape.heads, few, shape.dim, generator=generator).to(kind)
    k, v = (torch.randn(1, shape.kv_heads, tokens, shape.dim, generator=generator).to(kind) for _ in range(2))
    costs = break_even.COSTS[dtype]
    unit = shape.heads * shape.dim * costs.product
    found: dict[str, list[float]] = {"exact": [], "select": [], "attend": []}
    work, group = break_even.work(config, few, tokens, None), shape.heads // shape.kv_heads
    gathered = costs.gather * work.listed / break_even.sharing(config, group)
    expected = {
        "exact": work.visible * unit,
        "select": (costs.score * work.scored + costs.key * work.keys / group) * unit,
        "attend": (costs.pair * work.kept + gathered) * unit,
    }
    for number in range(1 + rounds):
        whole = _timed(lambda: functional.run(q, k, v, EXACT))
        stats = functional.run(q, k, v, config)[2]
        if number:  # the first round touches memory
            found["exact"].append(whole)
            found["select"].append(stats.select_seconds)
            found["attend"].append(stats.attend_seconds)
    factors = {name: statistics.median(some) / expected[name] for name, some in found.items()}
    return Rates(other, **factors, dtype=dtype)


def _without_attention(shape: Shape, dtype: torch.dtype, rounds: int, tokens: int = 512) -> Iterator[float]:
    """The seconds of a token in one layer of random weights, without attention."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        shape.kind, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.dim, num_hidden_layers=1, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    model = AutoModel.from_config(config, dtype=dtype).eval()
    ids = torch.arange(tokens)[None] % 64
    with torch.inference_mode(), dhsa.patched(model, EXACT):
        for number in range(1 + rounds):
            whole = _timed(lambda: model(ids, use_cache=False))
            if number:
                yield (whole - sum(run.attend_seconds for run in dhsa.last_run(model))) / tokens


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- the program -----------------------------------------------------------------------------------------------------


def shape_named(name: str) -> Shape:
    if name in SHAPES:
        return SHAPES[name]
    from transformers import AutoConfig

    return shape_of(AutoConfig.from_pretrained(name), Path(name).name)


def table(rows: list[dict[str, Any]]) -> str:
    head = ("model", "attention", "tokens", "machines", "seconds", "speed-up", "waits", "sent", "keys and values")
    cells = [head]
    for r in rows:
        cells.append(
            (
                r["model"],
                r["attention"],
                f"{r['length']:,}",
                str(r["machines"]),
                f"{r['seconds']:,.0f}" if r["seconds"] >= 100 else f"{r['seconds']:.3g}",
                f"{r['speed_up']:.2f}",
                f"{r['waits'] / r['seconds']:.0%}",
                f"{r['sent'] / 1e9:,.3f} GB",
                f"{r['held'] / 1e9:,.2f} GB",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--bandwidth", type=float, required=True, help="of a machine's network, in Mbit/s, in each direction")
    add("--latency", type=float, required=True, help="of a message, in milliseconds")
    add("--models", nargs="+", default=list(SHAPES), metavar="NAME", help=f"{', '.join(SHAPES)}, or model folders")
    add("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="tokens of the prompt")
    add("--machines", type=int, nargs="+", default=MACHINES, metavar="N")
    add("--budget", type=int, default=2048, help="of the sparse prediction; default: 2048")
    add("--fetched", type=float, metavar="SHARE", help="of another machine's keys that some block of a machine selects")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the calibration; default: float32")
    add("--threads", type=int, help="of the calibration; default: all cores")
    add("--rates", type=Path, metavar="FILE", help="compute rates of an earlier --save-rates; nothing is measured")
    add("--save-rates", type=Path, metavar="FILE", help="write the measured rates, JSON, one entry for each model")
    add("--json", type=Path, metavar="FILE", help="write the predictions")
    args = parser.parse_args(argv)
    if args.bandwidth <= 0 or args.latency < 0:
        parser.error("--bandwidth: expected more than 0, --latency: 0 or more")
    if args.fetched is not None and not 0 <= args.fetched <= 1:
        parser.error(f"--fetched: expected a share of 0 to 1, got {args.fetched:g}")
    if args.rates and (args.dtype or args.threads):
        parser.error("--rates: nothing is measured, so there is neither --dtype nor --threads")
    if args.threads:
        torch.set_num_threads(args.threads)
        dhsa.set_num_threads(args.threads)
    network = Network(args.bandwidth * 1e6 / 8, args.latency * 1e-3)
    sparse = dhsa.Config(budget=args.budget)
    given = json.loads(args.rates.read_text(encoding="utf-8")) if args.rates else {}
    measured: dict[str, Any] = {}
    rows = []
    for name in args.models:
        shape = shape_named(name)
        if args.rates and name not in given:
            parser.error(f"--rates: {args.rates} has no rates of {name}, but of {', '.join(given)}")
        tokens = max(8192, 4 * args.budget)
        rates = Rates(**given[name]) if name in given else calibrate(shape, sparse, args.dtype or "float32", tokens)
        measured[name] = rates._asdict()
        print(
            f"{shape.name}, {rates.dtype}: {rates.other * 1e6:,.1f} us for a token in a layer without attention; "
            f"attention takes {rates.exact:.2f} (exact), {rates.select:.2f} (select), {rates.attend:.2f} (attend) of "
            "the times of dhsa/hf/break_even.py"
        )
        for label, config in (("exact", EXACT), (f"budget {args.budget:,}", sparse)):
            for length in args.lengths:
                alone = predict(shape, config, length, 1, rates, network).seconds
                for machines in args.machines:
                    made = predict(shape, config, length, machines, rates, network, share_of(shape, args.fetched))
                    facts = {"model": shape.name, "attention": label, "length": length, "machines": machines}
                    rows.append({**facts, **made._asdict(), "speed_up": alone / made.seconds})
    print(table(rows))
    if args.save_rates:
        args.save_rates.write_text(json.dumps(measured, indent=1), encoding="utf-8")
    if args.json:
        told = {"bandwidth": network.bandwidth, "latency": network.latency, "rates": measured, "rows": rows}
        args.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


def share_of(shape: Shape, share: float | None) -> Callable[[Parts], Fetched] | None:
    """The same share of the keys of every earlier rank."""
    if share is None:
        return None
    return lambda parts: lambda holder, rank: share * shape.kv_heads * count(parts[holder])


if __name__ == "__main__":
    main()
