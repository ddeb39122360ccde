"""`python -m dhsa eval`: arguments, the run, and the output. The other modules of this package do the work."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from dhsa import commands
from dhsa.commands import UserError, add_texts, at_least
from dhsa.config import Config
from dhsa.evaluation import table
from dhsa.methods import registry

__all__ = ["DESCRIPTION", "add_arguments", "run"]

LENGTHS = {
    "ppl": [8192],
    "niah": [1024, 2048, 4096, 8192],
    "ruler": [4096, 8192],
    "longbench": [8192],
    "kv": [4096, 8192],
    "turns": [8192],
    "output": [8192],
    "frontier": [8192, 16384],
}
TASKS = tuple(LENGTHS)
ALONE = ("frontier",)  # not part of "all": its seconds need a machine that does nothing else
TABLE, TABLE_LENGTH = "table", 8192
BUDGETS = [640, 1152, 2176]

# --quick: values in place of defaults, so that what is given on the command line still holds.
QUICK = {
    "methods": "rows,dhsa,window",
    "budget": [512],
    "documents": 2,
    "depths": 2,
    "keys": 1,
    "samples": 1,
    "answer_tokens": 4,
    "turns": 2,
}
QUICK_LENGTH = 768
DEFAULTS = {"methods": "all", "documents": 12, "depths": 10, "keys": 5, "samples": 10, "turns": 5, "dense_tail": 0}
TABLE_DEFAULTS = {"methods": table.METHODS, "budget": [1024, 2048], "depths": 5, "dense_tail": Config().dense_tail}
_NEEDED = ("torch", "transformers", "rich", "matplotlib")

DESCRIPTION = (
    "Reads the same prompts by every method at every budget and reports what each loses against dense attention. Rows "
    "are appended to OUT/results.jsonl; the same command, given again, continues where the last one stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "tasks",
        metavar="TASKS",
        help=f"comma-separated: {', '.join(TASKS)}; all: all but {', '.join(ALONE)}; {TABLE}: all methods at the "
        f"density of the first, by {', '.join(table.TASKS)} or those named beside it; report: only the tables again",
    )
    add("--model", metavar="PATH", help="a GGUF file, a model folder, gemma3 or smollm2 (packaged; default: gemma3)")
    add(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model (default: float32)"
    )
    add(
        "--weights-products",
        choices=("fp32", "bf16"),
        default="fp32",
        help="dtype of the model's own matrix products, in dense runs too; bf16 is faster (default: fp32)",
    )
    add(
        "--methods",
        metavar="A,B",
        help="methods with overrides, as rows,rows:query_block=64,window; dense is always measured (default: all)",
    )
    add(
        "--configs",
        type=Path,
        metavar="FILE",
        help="JSON, {name: {field of Config: value}}: configs measured as they are, beside --methods or without",
    )
    add("--budget", type=_ints(16), metavar="N,M", help="keys a block of queries may see (default: 640,1152,2176)")
    add(
        "--mass",
        type=_shares,
        default=[],
        metavar="P,Q",
        help="shares of mass, in place of or beside --budget, for the methods that estimate mass",
    )
    add("--sink", type=at_least(0), metavar="N", help="first keys, always selected; at most a quarter of the budget")
    add("--local", type=at_least(0), metavar="N", help="latest keys, always selected; both at most half of the budget")
    add(
        "--dense-tail",
        type=at_least(0),
        metavar="N",
        help="last queries whose blocks see all keys (default: 0, so that a question's own queries are sparse too; "
        f"{TABLE}: {TABLE_DEFAULTS['dense_tail']}, as in Config)",
    )
    add("--layers", type=_layers, metavar="I,J", help="layers that may be sparse, as 5,11 or 0-9 (default: all)")
    add("--lengths", type=_ints(128), metavar="N,M", help="tokens of a prompt (default: each task's own)")
    add_texts(
        parser, "files or folders of prose, source code, .jsonl, chats (.json, .jsonl) (default: Python's reference)"
    )
    add("--documents", type=at_least(1), metavar="N", help="ppl, output, frontier: documents read (default: 12)")
    add("--skip", type=at_least(0), default=0, metavar="N", help="ppl, output: documents left out before them")
    add(
        "--half",
        choices=("choice", "held-out", "both"),
        default="both",
        help="frontier: read the documents to choose settings by, or those held out (default: both)",
    )
    add(
        "--only",
        choices=("quality", "time"),
        help="frontier: measure only quality, which a busy machine does not change, or only time (default: both)",
    )
    add("--repetitions", type=at_least(3), default=3, metavar="N", help="frontier: rounds of time (default: 3)")
    add("--depths", type=at_least(1), metavar="N", help="niah: depths of the needle (default: 10)")
    add("--keys", type=at_least(1), metavar="N", help="niah: needles at each depth (default: 5)")
    add("--generate", action="store_true", help="niah: decode the answer too, beside its likelihood")
    add(
        "--samples",
        type=at_least(1),
        metavar="N",
        help="ruler, longbench, kv, turns: prompts of each kind or file (default: 10)",
    )
    add("--turns", type=at_least(1), metavar="N", help="turns: questions about a text (default: 5)")
    add(
        "--session",
        choices=("turns", "requests"),
        default="turns",
        help="turns: whether earlier questions stay in the cache, with the right answers, or each question comes first "
        "after the text (default: turns)",
    )
    add(
        "--subtasks",
        type=_names,
        metavar="A,B",
        help="ruler: which of its thirteen (default: all, qa_1 and qa_2 where their files are given)",
    )
    add("--squad", type=Path, metavar="FILE", help="ruler: questions of qa_1, a .json file in the format of SQuAD")
    add("--hotpotqa", type=Path, metavar="FILE", help="ruler: questions of qa_2, a .json file in that of HotpotQA")
    add(
        "--answer-tokens",
        type=at_least(1),
        metavar="N",
        help="ruler, longbench, kv, turns: the most tokens of an answer (default: the task's)",
    )
    add(
        "--longbench",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="LongBench's .jsonl files (default: a sample of --text)",
    )
    add("--quick", action="store_true", help="every task with few and short prompts, within two minutes")
    add("--out", type=Path, default=Path("eval-output"), metavar="DIR", help="(default: eval-output)")


def _ints(low: int) -> Any:
    def parse(text: str) -> list[int]:
        return list(dict.fromkeys(at_least(low)(part) for part in text.split(",")))

    parse.__name__ = "int"
    return parse


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _shares(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    for value in values:
        if not 0 < value <= 1:
            raise argparse.ArgumentTypeError(f"{value:g} is no share of mass, 0 < mass <= 1")
    return values


_shares.__name__ = "float"


def _layers(text: str) -> list[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


_layers.__name__ = "layers"


def run(args: argparse.Namespace) -> int:
    """Run the evaluation for parsed arguments (see `add_arguments`) and return the exit status."""
    commands.prepare(_NEEDED, "eval")
    names, of_table = _tasks(args.tasks)
    if commands.several_processes():
        _refuse(args, names, of_table)
    with commands.ranks() as ranks:
        return _run(args, names, of_table, ranks)


def _refuse(args: argparse.Namespace, names: list[str], of_table: bool) -> None:
    """Raise UserError for what several processes do not serve; the methods are checked where settings are made."""
    if of_table:
        raise UserError(f"{TABLE}: is made by one process; the rows of several are no part of it")
    if "output" in names:
        raise UserError("output: compares the layers of one process; leave it out, or run it without torchrun")
    if "frontier" in names and args.only != "quality":
        raise UserError(
            "frontier: measures the seconds of one process; give --only quality, or run it without torchrun"
        )


def _run(args: argparse.Namespace, names: list[str], of_table: bool, ranks: commands.Ranks) -> int:
    from dhsa.evaluation import report, runner
    from dhsa.evaluation import settings as settings_of
    from dhsa.evaluation.store import Follower, Store

    console = ranks.console(160)
    if ranks.first:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out: {error}") from error
    path = args.out / "results.jsonl"
    store = Store(path, report.whole) if ranks.first else None
    present = ranks.told(None if store is None else list(store.rows))
    store = Follower(path, present) if store is None else store
    if names == ["report"]:
        if not ranks.first:
            return 0
        if not store.rows:
            raise UserError(f"--out: no results in {store.path}")
        if store.damaged:
            console.print(f"{store.damaged} damaged lines of {store.path} were skipped.", highlight=False)
        return _report(store.rows.values(), args, console, of_table)
    _resolve(args, of_table)
    specs, named = _specs(args, settings_of)
    settings = _settings(args, specs, named, settings_of)  # for the table too, whose methods are checked by it
    if ranks.group is not None:
        settings_of.refuse_in_group(settings)
    names = names or [name for name in table.TASKS if name != "longbench" or args.longbench]

    from dhsa.evaluation.engine import weights_products

    started = time.perf_counter()
    with commands.progress(console, remaining=True) as step:
        prepared = _prepare(args, store, step, console, ranks)
        with weights_products(args.weights_products):
            if of_table:
                rows = table.run(names, specs, named, *prepared)
            else:
                context, store, base, step, plan = prepared
                build = ranks.told(runner.build_hash())
                rows = runner.run(names, settings, context, store, base, step, plan, build)
    if not ranks.first:
        return 0
    if store.damaged:
        console.print(f"{store.damaged} damaged lines of {store.path} were skipped.", highlight=False)
    status = _report(rows, args, console, of_table)
    console.print(f"The run took {time.perf_counter() - started:.0f} s.", highlight=False)
    return status


def _tasks(text: str) -> tuple[list[str], bool]:
    """Return (the tasks, or "report" alone; whether the table of methods is made)."""
    every = [name for name in TASKS if name not in ALONE]
    names = list(dict.fromkeys(name for part in text.split(",") for name in (every if part == "all" else [part])))
    of_table = TABLE in names
    names = [name for name in names if name != TABLE]
    if names == ["report"]:
        return names, of_table
    known = table.TASKS if of_table else TASKS
    for name in names:
        if name not in known:
            beside = f" beside {TABLE}" if of_table else ""
            raise UserError(f"no task {name!r}{beside}; there are {', '.join(known)}, all, {TABLE}, and report")
    return names, of_table


def _resolve(args: argparse.Namespace, of_table: bool = False) -> None:
    """Fill in the defaults that depend on other arguments."""
    defaults = {**DEFAULTS, **(TABLE_DEFAULTS if of_table else {}), **(QUICK if args.quick else {})}
    if of_table and args.mass:
        raise UserError(f"--mass: {TABLE} compares methods at the density of a --budget; take --configs for a mass")
    if args.configs and args.methods is None:
        defaults["methods"] = ""
    if args.mass or defaults["methods"] == "":
        defaults["budget"] = []
    for name, value in {"budget": BUDGETS, **defaults}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    usual = {name: [TABLE_LENGTH] for name in TASKS} if of_table else LENGTHS
    args.lengths = {name: args.lengths or ([QUICK_LENGTH] if args.quick else usual[name]) for name in TASKS}


def _specs(args: argparse.Namespace, settings_of: Any) -> tuple[list[str], list[Any]]:
    """Return (the methods, the settings of --configs)."""
    named = settings_of.named(args.configs) if args.configs else []
    specs = settings_of.methods(args.methods) if args.methods or not named else []
    if not specs and (args.budget or args.mass):
        raise UserError("--budget and --mass are for --methods, and none is given")
    if twice := [setting.label for setting in named if setting.label in specs]:
        raise UserError(f"--configs: {args.configs}: {twice[0]} is one of --methods as well")
    return specs, named


def _settings(args: argparse.Namespace, specs: list[str], named: list[Any], settings_of: Any) -> list[Any]:
    """Return dense attention, then every method at every budget, without duplicates."""
    options = {"dense_tail": args.dense_tail, "sink": args.sink, "local": args.local}
    made = [settings_of.dense()]
    for budget in args.budget:
        made += [settings_of.setting(spec, budget, **options) for spec in specs]
    without = ("paper", "exact", *(name for name, method in registry.items() if not method.has_mass))
    able = [spec for spec in specs if spec.partition(":")[0] not in without]
    if args.mass and not able:
        raise UserError(f"--mass: the scores of {', '.join(specs)} are no shares of attention mass; give --budget")
    for mass in args.mass:
        made += [settings_of.setting(spec, None, mass=mass, **options) for spec in able]
    return list(dict.fromkeys([*made, *named]))


def _prepare(args: argparse.Namespace, store: Any, step: Any, console: Any, ranks: commands.Ranks) -> tuple[Any, ...]:
    """Return what `runner.run` takes after tasks and settings: (context, store, fields of every row, step, plan)."""
    import dhsa
    from dhsa.evaluation import runner, texts
    from dhsa.evaluation.engine import Engine
    from dhsa.evaluation.tasks import Context

    read = texts.sources(args.text)
    source, tokenizer, model = commands.open_model(step, args.model, args.dtype)
    missing = sorted(set(args.layers or ()) - set(range(commands.model_layers(model))))
    if missing:
        raise UserError(f"--layers: {missing} not in this model of {commands.model_layers(model)} layers")
    base = {
        "model": runner.identity(source),
        "dtype": args.dtype,
        "products": args.weights_products,
        "layers": "" if args.layers is None else ",".join(map(str, args.layers)),
        "threads": dhsa.get_num_threads(),
    }
    if ranks.link is not None:
        base["processes"] = ranks.link.size
    base = ranks.told(base)
    engine = Engine(model, tokenizer, args.layers, ranks.group)

    def plan(task: str, total: int, missing: int) -> None:
        if missing < total:
            console.print(f"{task}: {total - missing} of {total} results exist already.", highlight=False)

    return Context(engine, args, texts.rendered(engine, read)), store, base, step, plan


def _report(rows: Any, args: argparse.Namespace, console: Any, of_table: bool = False) -> int:
    from rich.markdown import Markdown

    from dhsa.evaluation import report

    command = "python -m dhsa " + " ".join(shlex.quote(a) for a in sys.argv[1:])
    try:
        path, lines, drawn = (table if of_table else report).write(list(rows), args.out, command)
    except OSError as error:
        raise UserError(f"--out: the report cannot be written: {error}") from error
    console.print(Markdown("\n".join(line for line in lines if not line.startswith("!["))))
    for name in (path, *drawn, args.out / "results.jsonl"):
        console.print(f"{name}", soft_wrap=True, highlight=False)
    return 0
