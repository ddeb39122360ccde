"""What a prompt costs that several processes of this machine read together (dhsa/distributed): time beside one process
with all threads, bytes beside the formula of docs/howto/two-machines.md, and how evenly work is divided.

    python benchmarks/bench_parallel.py cost --model gemma3 --tokens 16384      # two processes of one thread
    python benchmarks/bench_parallel.py bytes balance --tokens 65536            # one layer of random tensors, 4 ranks
    python benchmarks/bench_parallel.py bytes --tokens 65536 --model gemma3     # one layer of that model

Times are medians of rounds in which one process and several take turns. Balance is in pairs of a query and a key, and
in CPU seconds, which do not depend on how the processes share the cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import scaling
import torch

import dhsa
from dhsa import commands, demo
from dhsa.demo_distributed import measure, together
from dhsa.distributed import sparse
from dhsa.distributed.attention import Turn, exact
from dhsa.distributed.layout import Layout
from dhsa.distributed.link import Link

SECTIONS = ("cost", "bytes", "balance")
GOALS = {"cost": 1.10, "bytes": 1 / 3, "sparse balance": 1.10}
EXACT = dhsa.Config(budget=None)
Tensors = tuple[int, int, int, int] | str  # H, Hkv, D and the length of random ones, or a file


def verdict(value: float, goal: float | None) -> str:
    return "" if goal is None else f"  goal {goal:.2f}: {'pass' if value <= goal else 'MISS'}"


# ---- one layer -------------------------------------------------------------------------------------------------------


def tensors(of: Tensors) -> tuple[torch.Tensor, torch.Tensor, float | None, float | None]:
    """Queries [1, H, L, D], keys [1, Hkv, L, D], scale and softcap. Keys are taken for values, too."""
    if isinstance(of, str):
        held = torch.load(of)
        return held["q"], held["k"], held["scale"], held["softcap"]
    heads, kv_heads, dim, length = of
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, length, dim, generator=generator)
    return q, torch.randn(1, kv_heads, length, dim, generator=generator), None, None


def layer(group: Any, of: Tensors, config: dhsa.Config) -> dict[str, Any]:
    """What a rank sent and computed in a layer that sees all keys. `rows`: of each other rank that it fetched."""
    q, k, scale, softcap = tensors(of)
    length, link = q.shape[2], Link(group, 600.0)
    selects = config.leaves_out(length, length)
    layout = Layout(link.size).extended(
        (length,), unit=config.query_block if selects else 1, balanced=not selects, whole=False
    )
    turn = Turn(layout, link.rank)
    mine_q, mine_k = (torch.cat([x[:, :, a.start : a.stop] for a in turn.queries], dim=2) for x in (q, k))
    out = torch.empty_like(mine_q)
    options = {"window": None, "scale": scale, "softcap": softcap, "sinks": None, "out": out}
    rows: list[int] = []
    wanted = sparse._wanted

    def noted(*args: Any) -> Any:
        found = wanted(*args)
        rows.append(len(found))
        return found

    sparse._wanted = noted
    group.barrier().wait()
    cpu = time.process_time()
    if selects:
        sparse.sparse(link, turn, mine_q, mine_k, mine_k, config, cuts=(), **options)
    else:
        exact(link, turn, mine_q, mine_k, mine_k, config, **options)
    cpu = time.process_time() - cpu
    sparse._wanted = wanted
    link.close()
    heads = k.shape[1]
    fetched = [sum(rows[i : i + heads]) for i in range(0, len(rows), heads)]
    return {
        "sent": link.sent,
        "cpu": cpu,
        "pairs": turn.pairs(None),
        "rows": dict(zip(map(str, link.others()), fetched, strict=False)),
        "shape": [q.shape[1], heads, q.shape[3], length],
    }


def layer_bytes(args: argparse.Namespace, of: Tensors, config: dhsa.Config) -> list[dict[str, Any]]:
    """The bytes that ranks counted in a layer, by the formula, and of gathering all keys and values."""
    found = together(layer, (of, config), args.ranks, 1)
    heads, kv_heads, dim, length = found[0]["shape"]
    shape = scaling.Shape("layer", "", 1, 1, heads, kv_heads, dim, (None,))
    parts = scaling.parts_of(config, length, args.ranks)
    made = scaling.sparse_bytes(
        parts, shape, config, 4, length, lambda holder, rank: found[rank]["rows"][str(holder)]
    ).total()
    whole = 2 * kv_heads * dim * 4 * length
    rows = []
    for rank, one in enumerate(found):
        formula = sum(size for (r, _), size in made.items() if r == rank)
        rows.append({"rank": rank, "sent": one["sent"], "formula": formula})
        print(f"  rank {rank} sent {one['sent']:>13,} bytes, formula {formula:>13,}")
    sent = sum(one["sent"] for one in found)
    gathered = (args.ranks - 1) * whole
    needed = sum(scaling.dense_bytes(scaling.parts_of(EXACT, length, args.ranks), whole // length, None).values())
    share = sent / gathered
    goal = verdict(share, GOALS["bytes"])
    print(f"  all sent {share:.3f} of gathering keys and values{goal}; {sent / needed:.3f} of what exact layers send")
    seen = sum(sum(one["rows"].values()) for one in found)
    could = kv_heads * sum(scaling.count(parts[r]) * (args.ranks - 1 - r) for r in range(args.ranks))
    print(f"  of the keys of earlier ranks, {seen / could:.1%} were selected by some block")
    return [*rows, {"share_of_gathering": share, "share_of_exact": sent / needed, "fetched": seen / could}]


def balance(args: argparse.Namespace, of: Tensors, config: dhsa.Config) -> list[dict[str, Any]]:
    rows = []
    for name, one in (("exact", EXACT), ("sparse", config)):
        found = [together(layer, (of, one), args.ranks, 1) for _ in range(args.rounds)]
        cpu = [statistics.median(run[rank]["cpu"] for run in found) for rank in range(args.ranks)]
        pairs = [one["pairs"] for one in found[0]]
        most, of_pairs = (max(x) / statistics.mean(x) for x in (cpu, pairs))
        each = ", ".join(f"{some:.2f}" for some in cpu)
        goal = verdict(most, GOALS.get(f"{name} balance"))
        print(f"  {name}: CPU seconds {each}; most / mean {most:.3f}, of visible pairs {of_pairs:.3f}{goal}")
        rows.append({"attention": name, "cpu": cpu, "pairs": pairs, "most": most})
    return rows


def capture(args: argparse.Namespace, config: dhsa.Config, path: Path) -> str:
    """The file of queries and keys of the middle full layer of a model that reads a text by `config`."""
    _, tokenizer, model = commands.open_model(lambda *_: nullcontext(), args.model, "float32")
    ids = commands.tokenize(tokenizer, commands.read_text(args.text), args.tokens)
    captured: dict[str, Any] = {}
    with torch.inference_mode(), dhsa.patched(model, config):
        name = model.config._attn_implementation
        with demo._timed_attention(name, lambda: None, demo._picture_layer(model), captured):
            model.get_decoder()(ids, use_cache=False)
    kept = {name: captured[name].float().contiguous() for name in ("q", "k")}
    torch.save({**kept, "scale": captured["scale"], "softcap": captured["softcap"]}, path)
    print(f"  layer {demo._picture_layer(model)} of {args.model}, {ids.shape[1]:,} tokens")
    return str(path)


# ---- a model ---------------------------------------------------------------------------------------------------------


def cost(args: argparse.Namespace, configs: dict[str, dhsa.Config], folder: Path) -> list[dict[str, Any]]:
    """Several processes that share the threads of one, in turns with that one."""
    source, tokenizer, model = commands.open_model(lambda *_: nullcontext(), args.model, "float32")
    ids = commands.tokenize(tokenizer, commands.read_text(args.text), args.tokens).tolist()
    path = source
    if source.is_file():
        path = folder / "model"
        model.save_pretrained(path)
    del model
    found: dict[int, list[Any]] = {1: [], args.processes: []}
    for _ in range(args.rounds):
        for processes, runs in found.items():
            runs.append(measure(path, ids, configs, processes, max(1, args.threads // processes)))
    rows = []
    for name in configs:
        alone, several = (
            [max(one[name].seconds for one in run) for run in found[processes]] for processes in (1, args.processes)
        )
        ratio = statistics.median(b / a for a, b in zip(alone, several, strict=True))
        last = found[args.processes][-1]
        same = all(one[name].tokens == found[1][-1][0][name].tokens for one in last)
        held = max(one[name].held for one in last) / found[1][-1][0][name].held
        print(
            f"  {name}: one process {statistics.median(alone):.2f} s, {args.processes} processes "
            f"{statistics.median(several):.2f} s, ratio {ratio:.3f}{verdict(ratio, GOALS['cost'])}; keys and values "
            f"{held:.3f} of one; tokens {'the same' if same else 'OTHERS'}; sent "
            f"{', '.join(f'{one[name].sent:,}' for one in last)} bytes"
        )
        rows.append({"attention": name, "one": alone, "several": several, "ratio": ratio, "held": held, "same": same})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("sections", nargs="+", choices=SECTIONS)
    add("--model", help="a GGUF file, a model folder, gemma3 or smollm2; bytes and balance: default random tensors")
    add("--text", type=Path, help="a UTF-8 text; default: Python's language reference")
    add("--tokens", type=int, default=16384)
    add("--budget", type=int, default=2048)
    add("--processes", type=int, default=2, help="of cost")
    add("--threads", type=int, default=dhsa.get_num_threads(), help="of cost, of all processes")
    add("--ranks", type=int, default=4, help="of bytes and balance")
    add("--heads", type=int, nargs=3, default=[4, 1, 64], metavar=("H", "HKV", "D"), help="of random tensors")
    add("--rounds", type=int, default=3)
    add("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    commands.prepare(("torch", "transformers"), "this benchmark")
    config = demo.sparse_within(args.budget)
    results: dict[str, Any] = {"isa": dhsa.build_info()["isa"], "cpu": commands.cpu_name(), **vars(args)}
    with tempfile.TemporaryDirectory() as name:
        of: Tensors = (*args.heads, args.tokens)
        if args.model is not None and set(args.sections) - {"cost"}:
            of = capture(args, config, Path(name) / "layer")
        for section in args.sections:
            print(f"{section}, {args.tokens:,} tokens, budget {args.budget:,}")
            if section == "cost":
                results[section] = cost(args, {"exact": EXACT, "sparse": config}, Path(name))
            else:
                results[section] = {"bytes": layer_bytes, "balance": balance}[section](args, of, config)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
