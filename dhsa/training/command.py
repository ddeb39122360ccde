"""`python -m dhsa train-boundaries`: arguments, progress and files around the training loop."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from dhsa import commands
from dhsa._files import replacing
from dhsa.commands import UserError, at_least

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Trains a boundary predictor on the keys of a model that reads a text (or, with --architecture gate, the gates of "
    "method seer on its queries and keys), and writes it with a model card that states its scores. Keys and labels are "
    "processed layer by layer: they are never written to disk, and at most --pool-mib of them stay in memory. An "
    "interrupted run continues when the same command is given again."
)
NEEDED = ("torch", "transformers", "safetensors", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command. Those with a default of None take the default of Settings."""
    parser.add_argument("--model", help="a GGUF file, a model folder, gemma3 or smollm2; default: gemma3")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="UTF-8 files, a document each; default: Python's own documentation"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the .safetensors file to write; the model card goes beside it, .md"
    )
    parser.add_argument("--architecture", choices=("compact", "attention", "gate"), default="compact")
    parser.add_argument(
        "--networks", choices=("both", "layers", "shared"), help="one for each layer, one for all, or both"
    )
    parser.add_argument("--layers", type=int, nargs="+", help="layers to train on; default: all")
    parser.add_argument("--tokens", type=at_least(64), default=8192, help="tokens of a piece; default: 8192")
    parser.add_argument("--pieces", type=at_least(1), help="the most pieces to train on")
    parser.add_argument("--held-out", type=at_least(1), default=4, help="the most pieces to measure scores on")
    parser.add_argument("--epochs", type=at_least(1), default=2)
    parser.add_argument("--rate", type=float, help="Adam's learning rate; default: 3e-3, of the paper's network 1e-4")
    parser.add_argument("--schedule", choices=("constant", "cosine"))
    parser.add_argument("--heads", type=at_least(1), help="of the paper's network; default: 4")
    parser.add_argument("--hidden", type=at_least(1), help="units of the MLP")
    parser.add_argument("--pool-mib", type=at_least(1), default=256, help="most memory for keys, in MiB")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the weights in the file")
    parser.add_argument("--threads", type=at_least(1), help="default: all CPUs")
    parser.add_argument("--restart", action="store_true", help="discard the state of an interrupted run")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    commands.prepare(NEEDED, "train-boundaries")
    import torch
    from rich.console import Console

    import dhsa
    from dhsa import training
    from dhsa.training import report

    if args.heads is not None and args.architecture != "attention":
        raise UserError("--heads: only the paper's network has attention heads; add --architecture attention")
    gate = args.architecture == "gate"
    for name, given in (("hidden", args.hidden), ("dtype", None if args.dtype == "float32" else args.dtype)):
        if gate and given is not None:
            raise UserError(f"--{name}: {given} says nothing about gates; leave it out")
    try:
        settings = training.Settings(
            architecture=args.architecture,
            networks=args.networks,
            layers=None if args.layers is None else tuple(args.layers),
            tokens=args.tokens,
            epochs=args.epochs,
            rate=args.rate,
            schedule=args.schedule,
            heads=args.heads or training.Settings.heads,
            hidden=args.hidden,
            pool_mib=args.pool_mib,
            seed=args.seed,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--{str(error).replace('_', '-')}") from error
    if args.out.suffix != ".safetensors":
        raise UserError(f"--out: expected a name that ends in .safetensors, got {args.out}")
    if not args.out.parent.is_dir():
        raise UserError(f"--out: there is no folder {args.out.parent}")
    if args.out.exists() and not args.out.is_file():  # before, not after hours of training
        raise UserError(f"--out: {args.out} is not a regular file")
    dhsa.set_num_threads(args.threads)
    torch.set_num_threads(dhsa.get_num_threads())
    console = Console(stderr=True)
    with commands.progress(console, remaining=True) as step:
        _, tokenizer, model = commands.open_model(step, args.model, "float32")
        with step("reading the text"):
            text = read(args, tokenizer)
        state = args.out.with_suffix(".state")
        if args.restart:
            state.unlink(missing_ok=True)
        if state.exists():
            console.print(f"continuing from {state}")
        total = settings.epochs * len(text.train) + len(text.held_out)
        with step(
            f"{len(text.train)} pieces, {settings.epochs} epochs, {len(text.held_out)} for scores", total
        ) as advance:
            done = training.train(
                model, text, settings, state=state, advance=advance, keep=lambda done: save(args, done, settings, text)
            )
    Console().print(report.table(done))
    used = f'boundaries="predictor", predictor=dhsa.BoundaryPredictor.load("{args.out}")'
    if gate:
        used = f'method="seer", gates="{args.out}"'
    console.print(
        f"{done.seconds:.0f} s; {args.out} ({args.out.stat().st_size / 1024:.0f} KiB) and its card "
        f"{args.out.with_suffix('.md').name}. Use it:\n"
        f"  dhsa.Config({used})",
        highlight=False,
        soft_wrap=True,  # to be copied
    )
    return 0


def save(args: argparse.Namespace, done: Any, settings: Any, text: Any) -> None:
    """Write the predictor, or the gates, and the model card."""
    from dhsa.methods.gates import Gates
    from dhsa.training import report

    sizes = (sum(map(len, text.train)), sum(map(len, text.held_out)))
    losses = {who: [round(h[who], 5) for h in done.history] for who in done.history[0]}
    notes = {"settings": json.dumps(settings.fields()), "losses": json.dumps(losses), "text": text.source}
    name = Path(args.model or "gemma3").name
    described = report.card(done, settings, model=name, source=text.source, sizes=sizes, name=args.out.name)
    try:
        if isinstance(done.predictor, Gates):
            dataclasses.replace(done.predictor, notes=notes).save(args.out)
        else:
            done.predictor.save(args.out, dtype=args.dtype, notes=notes)
        with replacing(args.out.with_suffix(".md")) as part:
            part.write_text(described, encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: weights beyond float16
        raise UserError(
            f"--out: {error}; what was learned stays in {args.out.with_suffix('.state')}, and the same command, given "
            "again, saves it"
        ) from error


def read(args: argparse.Namespace, tokenizer: object):
    """Return the text that the command line names, packed."""
    from dhsa.training import Text, pack, python_documents, read_documents, split

    documents = python_documents() if args.text is None else read_documents(args.text)
    if args.text is None:
        source = "Python's language reference and the docstrings of its standard library (PSF License)"
    else:
        source = ", ".join(path.name for path in args.text[:8]) + (" and others" if len(args.text) > 8 else "")
    learn, judge = split(documents, args.seed)
    text = Text(
        pack(tokenizer, learn, args.tokens, args.pieces), pack(tokenizer, judge, args.tokens, args.held_out), source
    )
    if not text.train or not text.held_out:
        raise UserError(
            f"--text: too little: {sum(map(len, documents)):,} characters in {len(documents)} documents, of which an "
            "eighth is held out and must make a piece of at least 128 tokens"
        )
    return text
