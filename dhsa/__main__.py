"""The command line, `python -m dhsa COMMAND`: parses arguments and calls the command."""

import argparse
import json
import sys
from collections.abc import Sequence

import dhsa
from dhsa import ask, demo, demo_distributed
from dhsa import run as running
from dhsa.commands import UserError, several_processes
from dhsa.doctor import command as doctor
from dhsa.evaluation import command as evaluation
from dhsa.training import command as training
from dhsa.tuning import command as tuning

ALONE = ("demo", "demo-distributed", "tune", "train-boundaries")  # commands that torchrun does not start


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` (default: the process's own) and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dhsa", description="Dynamic Hierarchical Sparse Attention for language models, on any CPU."
    )
    parser.add_argument("--version", action="version", version=f"dhsa {dhsa.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo.add_arguments(
        commands.add_parser(
            "demo",
            help="prefill a long text with a real model, by several attentions, and compare",
            description=(
                "Prefills a long text with Gemma 3 270M by transformers' own attention, by dhsa exact, default and the "
                "paper's, and by sinks + local keys at the same budget; prints a table, draws what one layer selected."
            ),
        )
    )
    demo_distributed.add_arguments(
        commands.add_parser(
            "demo-distributed",
            help="read one prompt in several processes, and compare with one",
            description=demo_distributed.DESCRIPTION,
        )
    )
    ask.add_arguments(
        commands.add_parser(
            "ask",
            help="answer questions about a long text, which the model reads only once",
            description=ask.DESCRIPTION,
        )
    )
    doctor.add_arguments(
        commands.add_parser(
            "check",
            help="read a prompt exact and sparse: what each layer did, and does the model answer the same",
            description=doctor.DESCRIPTION,
        )
    )
    evaluation.add_arguments(
        commands.add_parser(
            "eval",
            help="what a model loses by each method of selection: perplexity, needles, RULER, LongBench, outputs",
            description=evaluation.DESCRIPTION,
        )
    )
    tuning.add_arguments(
        commands.add_parser(
            "tune",
            help="find a configuration for each layer of a model: the fastest that keeps its predictions",
            description=tuning.DESCRIPTION,
        )
    )
    training.add_arguments(
        commands.add_parser(
            "train-boundaries",
            help="train the network that cuts keys into chunks, on a model and text of yours",
            description=training.DESCRIPTION,
        )
    )
    running.add_arguments(
        commands.add_parser(
            "run",
            help="run a program that does not import dhsa, with attn_implementation='dhsa' known to its transformers",
            description=running.DESCRIPTION,
        )
    )
    commands.add_parser("info", help="how the core was built and which instruction sets this CPU has")
    args = parser.parse_args(argv)
    if args.command == "info":
        print(json.dumps(dhsa.build_info(), indent=2))
        return 0
    try:
        if args.command in ALONE and several_processes():
            raise UserError("is to be started as one process; torchrun may start check, ask, eval, and programs (run)")
        modules = {
            "demo": demo,
            "demo-distributed": demo_distributed,
            "ask": ask,
            "check": doctor,
            "eval": evaluation,
            "train-boundaries": training,
            "tune": tuning,
            "run": running,
        }
        return modules[args.command].run(args)
    except UserError as error:
        print(f"dhsa {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.command == "run":  # it is the program's: the process ends as if Python had run it
            raise
        print(f"dhsa {args.command}: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
