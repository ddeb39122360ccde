"""`python -m dhsa check`: arguments, progress and the table around `dhsa.check`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dhsa import commands
from dhsa.commands import UserError, at_least
from dhsa.config import Config, LayerConfigs

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Reads the start of a text with a model twice, by exact and by sparse attention, and reports for each layer what "
    "was left out, its error and its time, and whether the answer is the same. The exit status is 1 if it is not."
)
NEEDED = ("torch", "transformers", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="a GGUF file, a folder, gemma3 or smollm2; default: gemma3")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text; default: Python's language reference")
    parser.add_argument("--tokens", type=at_least(64), default=8192, metavar="N", help="prompt length; default: 8192")
    parser.add_argument(
        "--budget", type=at_least(4), default=2048, metavar="N", help="keys a block of queries may see; default: 2048"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a file of Config.save or of dhsa tune, in place of --budget"
    )
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=kinds, default=kinds[0], help=f"of the weights; default: {kinds[0]}")


def run(args: argparse.Namespace) -> int:
    """Run the check for parsed arguments. Return 0 if the sparse prefill answers as the exact one, 1 if it does not."""
    commands.prepare(NEEDED, "check")
    text = commands.read_text(args.text)
    config = Config(budget=args.budget) if args.config is None else commands.read_config(args.config)
    with commands.ranks() as ranks:
        return _run(args, text, config, ranks)


def _run(args: argparse.Namespace, text: str, config: Config | LayerConfigs, ranks: commands.Ranks) -> int:
    console = ranks.console(132)
    with commands.progress(console) as step:
        source, tokenizer, model = commands.open_model(step, args.model, args.dtype)
        with step("tokenizing"):
            ids = commands.tokenize(tokenizer, text, args.tokens)
        import dhsa

        total = 2 * commands.model_layers(model)
        with step(f"prefill of {ids.shape[1]:,} tokens, exact and sparse", total=total) as advance:
            try:
                found = dhsa.check(model, ids, config, group=ranks.group, advance=advance)
            except (ValueError, NotImplementedError) as error:
                raise UserError(str(error)) from error
    attends = f"budget {args.budget:,}" if args.config is None else args.config.name
    console.print(_table(found, source.name, args.dtype, attends, 1 if ranks.link is None else ranks.link.size))
    for line in found.summary():
        console.print(line, highlight=False, markup=False, soft_wrap=True, style=_style(line))
    return 0 if found.ok else 1


def _style(line: str) -> str | None:
    return {"warning": "yellow", "not ok": "bold red", "ok": "bold green"}.get(line.partition(":")[0])


def _table(found: Any, name: str, dtype: str, attends: str, processes: int) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    import dhsa
    from dhsa.doctor.report import HEADINGS, cells

    table = Table(
        title=f"{name}, {found.shape[1]:,} tokens in {dtype}, {attends}, "
        f"{dhsa.get_num_threads()} threads{f' in each of {processes} processes' if processes > 1 else ''}, "
        f"{dhsa.build_info()['isa']}",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    for i, heading in enumerate(HEADINGS):
        words = i in (1, 2, len(HEADINGS) - 1)
        table.add_column(heading, justify="left" if words else "right", no_wrap=i < len(HEADINGS) - 1)
    for layer in found.layers:
        table.add_row(*cells(layer), style=None if layer.path == "sparse" else "dim")
    return table
