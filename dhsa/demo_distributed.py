"""The demo of several processes: they read one prompt together, and one process reads it beside them.

`python -m dhsa demo-distributed` starts the processes on this machine, which share its cores. Each computes a part of
the tokens and keeps their keys and values (dhsa/hf/parallel.py). A table has the time, the bytes that each process
sent, the memory of its keys and values, and whether the tokens that follow are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dhsa import commands
from dhsa.demo import NEW_TOKENS, following, machine, one_line, sparse_within

__all__ = ["DESCRIPTION", "Reading", "add_arguments", "measure", "run", "together"]

DESCRIPTION = (
    "Reads one prompt in several processes of this machine, each of which computes and keeps a part of it, and in one "
    "process beside them: time, bytes sent, memory of keys and values, and whether the next tokens are the same."
)
_NEEDED = ("torch", "transformers", "rich")


class Reading(NamedTuple):
    """What one process did: seconds and bytes sent of the prefill, bytes of its keys and values after it, and the next
    tokens."""

    seconds: float
    sent: int
    held: int
    tokens: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", type=Path, metavar="FILE", help="a UTF-8 text (default: Python's language reference)")
    add("--tokens", type=commands.at_least(65), default=8192, metavar="N", help="prompt length (default: 8192)")
    add("--model", metavar="PATH", help="a GGUF file, a model folder, gemma3 or smollm2 (packaged; default: gemma3)")
    add(
        "--budget",
        type=commands.at_least(4),
        default=2048,
        metavar="N",
        help="keys a block of queries may see (default: 2048)",
    )
    add("--processes", type=commands.at_least(2), default=2, metavar="N", help="that read together (default: 2)")


def run(args: argparse.Namespace) -> int:
    """Run the demo for parsed arguments (see `add_arguments`) and return the exit status."""
    commands.prepare(_NEEDED, "the demo")
    from rich.console import Console

    import dhsa

    console = Console(width=None if sys.stdout.isatty() else 132)
    text = commands.read_text(args.text)
    started = time.perf_counter()
    threads = dhsa.get_num_threads()
    configs = {"exact": dhsa.Config(budget=None), f"budget {args.budget:,}": sparse_within(args.budget)}
    with commands.progress(console) as step, tempfile.TemporaryDirectory() as name:
        source, tokenizer, model = commands.open_model(step, args.model, "float32")
        with step("tokenizing"):
            ids = commands.tokenize(tokenizer, text, args.tokens)
        path = source
        if source.is_file():  # once, in place of a conversion in every process
            path = Path(name)
            with step("converting the model"):
                model.save_pretrained(path)
        del model
        found = {}
        for processes in (1, args.processes):
            several = "one process reads" if processes == 1 else f"{processes} processes read"
            with step(f"{several} {ids.shape[1]:,} tokens"):
                found[processes] = measure(path, ids.tolist(), configs, processes, max(1, threads // processes))
    console.print(_table(found, ids.shape[1], threads, tokenizer))
    console.print(f"The demo took {time.perf_counter() - started:.0f} s.", highlight=False)
    return 0


def measure(
    path: Path, ids: list[list[int]], configs: dict[str, Any], processes: int, threads: int
) -> list[dict[str, Reading]]:
    """Return, for each process, what it did by each config. `path`: a model folder. `threads`: of each process."""
    said = together(_read_by_all, (str(path), ids, configs), processes, threads)
    return [{name: Reading(*values) for name, values in one.items()} for one in said]


def together(function: Callable[..., Any], args: tuple[Any, ...], processes: int, threads: int) -> list[Any]:
    """Return what `function(group, *args)`, a function of a module, returned in each of several processes, as JSON can
    hold it. `group`: theirs, of backend gloo; None of one process. `threads`: of each process.

    An exception in one process ends all of them and is raised here.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (processes, threads, folder, function, args), nprocs=processes)
        return [json.loads(Path(folder, str(rank)).read_text(encoding="utf-8")) for rank in range(processes)]


def _process(
    rank: int, processes: int, threads: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """One of the processes, started by `together`."""
    import torch

    import dhsa

    torch.set_num_threads(threads)
    dhsa.set_num_threads(threads)
    group = None
    if processes > 1:
        if sys.platform != "win32":  # all are on this machine
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        store = torch.distributed.FileStore(str(Path(folder, "store")), processes)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        group = torch.distributed.group.WORLD
    with torch.inference_mode():
        made = json.dumps(function(group, *args))
    Path(folder, str(rank)).write_text(made, encoding="utf-8")
    if group is not None:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _read_by_all(group: Any, path: str, ids: list[list[int]], configs: dict[str, Any]) -> dict[str, Reading]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return {name: _read(model, torch.tensor(ids), config, group) for name, config in configs.items()}


def _read(model: Any, ids: Any, config: Any, group: Any) -> Reading:
    import dhsa
    from dhsa.hf.compat import cache_of
    from dhsa.hf.switching import STATE

    with dhsa.patched(model, config, group=group):
        parallel = model.__dict__[STATE].parallel
        model(ids[:, :128], logits_to_keep=1)  # touches the weights; the time of this call is not measured
        before = 0 if parallel is None else parallel.link.sent
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - start
        sent = 0 if parallel is None else parallel.link.sent - before
        cache = cache_of(out)
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        return Reading(seconds, sent, held, following(model, cache, out.logits[:, -1:]))


def _table(found: dict[int, list[dict[str, Reading]]], length: int, threads: int, tokenizer: Any) -> Any:
    from rich.table import Table

    table = Table(
        title=f"One prompt of {length:,} tokens, {machine(threads)}",
        caption="Sent: by each process during prefill. Keys and values: what each process keeps after it.",
        caption_justify="left",
        title_style="bold",
        show_lines=True,
    )
    for heading in ("attention", "processes", "prefill", "sent", "keys and values"):
        table.add_column(heading, justify="left" if heading == "attention" else "right", no_wrap=True)
    table.add_column(f"next {NEW_TOKENS} tokens", ratio=1)
    for name in found[1][0]:
        alone = found[1][0][name]
        for processes, every in found.items():
            several = [one[name] for one in every]
            seconds = max(one.seconds for one in several)
            same = all(one.tokens == alone.tokens for one in several)
            table.add_row(
                name,
                f"{processes}\n[dim]x {max(1, threads // processes)} threads[/]",
                f"{seconds:.2f} s\n[dim]{seconds / alone.seconds:.2f} of one[/]",
                "\n".join(f"{one.sent / 2**20:,.1f} MiB" for one in several),
                "\n".join(f"{one.held / 2**20:,.1f} MiB" for one in several),
                one_line(tokenizer.decode(alone.tokens)) if processes == 1 else "the same" if same else "others",
            )
    return table
