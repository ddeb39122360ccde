"""`python -m dhsa run`: another program, with attention implementation "dhsa" known to transformers and a default
configuration, in the same process; optionally with torch's scaled_dot_product_attention replaced too.

The program is run as Python would run it. What it imports is waited for, not imported here, so that programs without
torch start as fast as ever.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import importlib.util
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import get_importer
from types import ModuleType
from typing import Any

from dhsa._register import MODELS, when_imported
from dhsa.commands import UserError, at_least, read_config
from dhsa.config import Config, LayerConfigs

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Runs a program that knows nothing of dhsa: its transformers models may be loaded with attn_implementation='dhsa', "
    "and attend with the configuration given here. The options of this command stand before the program."
)
SERVER = "transformers.cli.serving.model_manager"
_UNSUPPORTED = (ImportError, AttributeError)  # from the import of a module for another release of torch or transformers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--budget", type=at_least(1), metavar="N", help="keys a block of queries may see; default: that of dhsa.Config")
    add("--exact", action="store_true", help="leave no key out")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="a file of Config.save or of dhsa tune, or JSON as json.dumps(config.to_dict()) writes it",
    )
    add(
        "--replace-sdpa",
        action="store_true",
        help="also serve the calls of torch's scaled_dot_product_attention, exactly, by any model; see "
        "dhsa.replace_sdpa. At the end a line on standard error counts them",
    )
    add("-m", dest="module", action="store_true", help="the program is the name of a module, as in python -m")
    # One argument of argparse, since two would lose a "--" between them.
    add(
        "program",
        nargs=argparse.REMAINDER,
        metavar="PROGRAM ...",
        help="a script, a folder or zip file with __main__.py, or an installed command, and its arguments",
    )


def run(args: argparse.Namespace) -> int:
    """Run the program of parsed arguments. Its exit status is that of the process."""
    config = _config(args)
    if not args.program:
        raise UserError("name a program to run, after the options of this command")
    name, *_ = args.program
    when_imported(MODELS, lambda _: _make_default(config), "--budget, --exact and --config have no effect")
    when_imported(SERVER, _admit, 'transformers serve does not accept attn_implementation="dhsa"')
    if args.replace_sdpa:
        when_imported("torch", lambda _: _replace(), "--replace-sdpa has no effect")
    sys.argv = args.program
    start = _module(name) if args.module else _program(name)
    start()
    return 0


# ---- the configuration -----------------------------------------------------------------------------------------------


def _config(args: argparse.Namespace) -> Config | LayerConfigs:
    config = Config() if args.config is None else read_config(args.config)
    if args.exact and args.budget is not None:
        raise UserError("--exact: leaves no key out, so there is no --budget")
    try:
        if args.exact:
            config = config.replace(budget=None, mass=None, floor=None)
        elif args.budget is not None:
            if isinstance(config, LayerConfigs):
                raise UserError("--budget: the file of --config has a budget for each layer")
            config = config.replace(budget=args.budget)
    except ValueError as error:
        raise UserError(f"--{'exact' if args.exact else 'budget'}: {error}") from error
    if isinstance(config, LayerConfigs) and config.reuse:
        raise UserError("--config: reuse needs hooks on the model, which only dhsa.patch(model) puts there")
    for one in (config.default, *config.layers.values()) if isinstance(config, LayerConfigs) else (config,):
        for name, plain in (("share", None), ("decode", "exact")):
            if (value := getattr(one, name)) != plain:
                raise UserError(
                    f"--config: {name}={value!r} needs hooks on the model, which only dhsa.patch(model) puts there"
                )
        if one.options.remembers:
            raise UserError(
                f"--config: method={one.method!r} needs hooks on the model, which only dhsa.patch(model) puts there"
            )
        if one.boundaries == "predictor":
            raise UserError(
                "--config: boundaries='predictor' needs networks that belong to the model and its layers, which only "
                "dhsa.patch(model) checks"
            )
    return config


def _make_default(config: Config | LayerConfigs) -> None:
    try:
        from dhsa.hf.switching import set_default
    except _UNSUPPORTED as error:
        print(f"dhsa run: attention implementation 'dhsa' is not available: {error}", file=sys.stderr)
        return
    set_default(config)


def _admit(module: ModuleType) -> None:
    """`transformers serve` has a list of attention implementations of its own, without those that are registered."""
    manager: Any = getattr(module, "ModelManager", None)
    check = getattr(manager, "_validate_args", None)
    if check is None:  # of another release
        return

    def check_others(self: Any) -> None:
        if self.attn_implementation != "dhsa":
            check(self)
            return
        self.attn_implementation = None
        try:
            check(self)
        finally:
            self.attn_implementation = "dhsa"

    manager._validate_args = check_others


def _replace() -> None:
    try:
        from dhsa.sdpa import replace_sdpa
    except _UNSUPPORTED as error:
        print(f"dhsa run: scaled_dot_product_attention is not replaced: {error}", file=sys.stderr)
        return
    counts = replace_sdpa()

    def report() -> None:
        reasons = "".join(f"\n  {number:,}  {reason}" for reason, number in counts.passed.most_common())
        print(
            f"dhsa run: scaled_dot_product_attention: {counts.served:,} calls served, {counts.passed.total():,} passed "
            f"on to torch{':' if reasons else ''}{reasons}",
            file=sys.stderr,
        )

    atexit.register(report)


# ---- the program -----------------------------------------------------------------------------------------------------


def _module(name: str) -> Callable[[], object]:
    """What runs the module of this name as __main__; UserError if there is none."""
    sys.argv[0] = "-m"  # as Python has it while it imports the packages that the module is in
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise UserError(f"-m {name}: {error}") from error
    if found is None:
        raise UserError(f"-m {name}: there is no module of this name")
    return functools.partial(runpy.run_module, name, run_name="__main__", alter_sys=True)


def _program(name: str) -> Callable[[], object]:
    """What runs a script, a folder, a zip file or an installed command; UserError if there is none of them."""
    commands = list(entry_points(group="console_scripts", name=name))
    if commands and not os.path.isfile(name):
        return functools.partial(_run_command, commands[0])
    if os.path.exists(name):
        return functools.partial(_run_path, name)
    raise UserError(f"{name}: is no file, and no command of an installed package; a module is run by -m {name}")


def _run_path(name: str) -> None:
    script = get_importer(name) is None  # folders and zip files are put on the path by runpy
    _replace_first_of_path(os.path.dirname(os.path.realpath(name)) if script else None)
    runpy.run_path(os.path.abspath(name), run_name="__main__")


def _run_command(command: EntryPoint) -> None:
    sys.argv[0] = shutil.which(command.name) or command.name
    _replace_first_of_path(os.path.dirname(sys.argv[0]) or None)
    sys.exit(command.load()())


def _replace_first_of_path(folder: str | None) -> None:
    """Put what Python would put at the beginning of sys.path in the place of the current folder, which is there because
    of `python -m dhsa`."""
    if not sys.flags.safe_path:
        sys.path[:1] = [] if folder is None else [folder]
