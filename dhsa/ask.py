"""`python -m dhsa ask`: questions about a text that the model reads only once.

The text goes through the model as the first part of a prompt. Its cache is saved in a folder, so that later questions,
also those of a later process, begin where the text ends. Each question is answered on a cache of its own.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dhsa import commands
from dhsa._safetensors import TooLargeError, read_header
from dhsa.commands import UserError, at_least
from dhsa.config import Config, LayerConfigs
from dhsa.methods import registry

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Reads a text with a model and answers questions about it. What the model computes for the text is saved, so that "
    "the text is read once and later questions are answered at once. In a terminal, the command waits for the next "
    "question after each answer."
)
SUFFIX = ".prompt.safetensors"
BUDGET, METHOD = 2048, "rows"
PIECE = 2048  # tokens of the text that go through the model at once
GB = 10**9
MAX_SIZE = 20 * GB  # of all saved texts
PATIENCE = 7 * 24 * 3600.0  # seconds for which other ranks wait for a question
_NEEDED = ("torch", "transformers", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("question", nargs="?", help="the question; without one, it is asked for in the terminal")
    add("--text", type=Path, metavar="FILE", help="a UTF-8 text; default: Python's language reference")
    add("--model", metavar="PATH", help="a GGUF file, a model folder, gemma3 or smollm2 (packaged); default: gemma3")
    kinds = ("float32", "bfloat16", "float16")
    add("--dtype", choices=kinds, default=kinds[0], help=f"of the weights; default: {kinds[0]}")
    add("--tokens", type=at_least(1), metavar="N", help="read only the first N tokens of the text")
    add("--new-tokens", type=at_least(1), default=256, metavar="N", help="the most tokens of an answer; default: 256")
    add("--budget", type=at_least(4), metavar="N", help=f"keys a block of queries may see; default: {BUDGET}")
    add("--method", choices=tuple(registry), help=f"how these keys are selected; default: {METHOD}")
    add("--exact", action="store_true", help="attend to every key, in place of --budget and --method")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="a file of Config.save or of dhsa tune, in place of --budget, --method and --exact",
    )
    add("--bits", type=int, choices=(8,), help="save the cache in 8 bits: smaller, slower to open, and rounded")
    add(
        "--cache",
        type=Path,
        metavar="DIR",
        help="the folder of saved texts; default: dhsa/prompts in $XDG_CACHE_HOME or ~/.cache",
    )
    add(
        "--max-size",
        type=_gigabytes,
        metavar="GB",
        help="the most that saved texts may take; those not used for longest are deleted first; default: 20",
    )
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--list", action="store_true", help="list the saved texts, and do nothing else")
    alone.add_argument(
        "--forget", metavar="NAME", help="delete a saved text by its name in --list, or all, and do nothing else"
    )


def _gigabytes(text: str) -> int:
    value = float(text)
    if not 0 <= value < 10**9:
        raise argparse.ArgumentTypeError(f"{text} is no size in GB")
    return int(value * GB)


_gigabytes.__name__ = "float"


def run(args: argparse.Namespace) -> int:
    """Run the command for parsed arguments (see `add_arguments`) and return the exit status."""
    commands.prepare(_NEEDED, "ask")
    if args.exact and (args.budget is not None or args.method is not None):
        raise UserError("--exact: leaves no key out, so there is neither --budget nor --method")
    saving = args.cache is not None or args.bits is not None or args.max_size is not None
    if commands.several_processes() and saving and not args.list and args.forget is None:
        raise UserError("--cache, --bits, --max-size: several processes save no text, each has a part of its cache")
    with commands.ranks() as ranks:
        return _run(args, ranks)


def _run(args: argparse.Namespace, ranks: commands.Ranks) -> int:
    console = ranks.console(132)
    folder = args.cache or commands.cache_folder() / "prompts"
    if args.list or args.forget is not None:
        if args.list:
            _show(folder, console)
        elif ranks.first:
            _forget(folder, args.forget, console)
        return 0
    waits = ranks.told(sys.stdin.isatty())
    if args.question is None and not waits:
        raise UserError("no question; give one, or run the command in a terminal")
    if args.question is not None and not args.question.strip():
        raise UserError("the question is empty")
    text = commands.read_text(args.text)
    config = _config(args)

    with commands.progress(console) as step:
        source, tokenizer, model = commands.open_model(step, args.model, args.dtype)
        with step("tokenizing"):
            prompt = _Prompt(tokenizer, text, args.tokens)
    if (most := getattr(model.config.get_text_config(), "max_position_embeddings", None)) and len(prompt) > most:
        console.print(f"The text has {len(prompt):,} tokens; the model was made for {most:,}.", highlight=False)
    import dhsa

    try:
        dhsa.patch(model, config, group=ranks.group)
    except ValueError as error:
        raise UserError(f"--model: {error}") from error
    except NotImplementedError as error:  # of a group
        raise UserError(str(error)) from error
    if ranks.group is None:
        fresh = _reader(model, prompt, folder, args, source.name, console)
    else:
        fresh = functools.partial(_copied, _read(model, prompt, console), prompt)
        console.print("The text is not saved: each process has a part of its cache.", highlight=False)
    question = args.question
    while True:
        if question:
            try:
                try:
                    cache = fresh()
                except FileNotFoundError:  # another process has deleted it
                    fresh = _reader(model, prompt, folder, args, source.name, console)
                    continue
                _answer(model, tokenizer, cache, prompt, question, args.new_tokens, console, ranks.first)
            except ValueError as error:  # what is stored about the keys is read when it is first used
                if SUFFIX not in str(error):
                    raise
                raise UserError(f"{error}; delete it by --forget, and the text is read again") from error
            except KeyboardInterrupt:
                if not waits or ranks.group is not None:
                    raise
                print()
        if not waits:
            return 0
        question = ranks.told(_next_question() if ranks.first else None, PATIENCE)
        if question is None:
            return 0


def _next_question() -> str | None:
    """What is asked in the terminal, "" for an empty line, or None if there are no more questions."""
    try:
        return input("\nquestion> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _config(args: argparse.Namespace) -> Config | LayerConfigs:
    if args.config is not None:
        if args.exact or args.budget is not None or args.method is not None:
            raise UserError("--config: its file says what --exact, --budget and --method would; leave them out")
        return commands.read_config(args.config)
    method: Any = args.method or METHOD
    return Config(method=method, budget=None if args.exact else args.budget or BUDGET)


# ---- the prompt ------------------------------------------------------------------------------------------------------


class _Prompt:
    """The parts of a prompt: `ids` int64 [1, L], what all questions about the text have in common, and what follows."""

    def __init__(self, tokenizer: Any, text: str, tokens: int | None) -> None:
        self._tokenizer = tokenizer
        self.templated = getattr(tokenizer, "chat_template", None) is not None
        if tokens is not None:
            text = _first_tokens(tokenizer, text, tokens)
        if not text.strip():
            raise UserError("--text: is empty")
        before, after = f"{text}\n\n", "\nAnswer:"
        if self.templated:
            before, after = commands.chat_parts(tokenizer, before + commands.CHAT_MARK)
        self._after = after
        ids = tokenizer(before, add_special_tokens=not self.templated).input_ids
        if not self.templated and ids[-1] in (tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)):
            ids = ids[:-1]  # what follows is not another text
        import torch

        self.ids = torch.tensor([ids])

    def __len__(self) -> int:
        return int(self.ids.shape[1])

    def question(self, text: str) -> Any:
        """The ids of a question and of what stands after it, int64 [1, n]."""
        import torch

        whole = (text if self.templated else f"Question: {text}") + self._after
        return torch.tensor([self._tokenizer(whole, add_special_tokens=False).input_ids])


def _first_tokens(tokenizer: Any, text: str, tokens: int) -> str:
    """The beginning of a text that has `tokens` tokens."""
    ids = tokenizer(commands.beginning(text, tokens), add_special_tokens=False).input_ids
    return text if len(ids) <= tokens else tokenizer.decode(ids[:tokens])


# ---- reading ---------------------------------------------------------------------------------------------------------


def _reader(
    model: Any, prompt: _Prompt, folder: Path, args: argparse.Namespace, model_name: str, console: Any
) -> Callable[[], Any]:
    """A function that returns a cache of the text for one question, made from a saved file or by reading the text."""
    import dhsa
    from dhsa.hf.saved import write_cache

    text_name = "Python's language reference" if args.text is None else str(args.text)
    path = folder / (_name(model, prompt, args) + SUFFIX)

    def opened() -> Any:
        return dhsa.load_cache(path, model, prompt=prompt.ids)

    if path.exists():
        start = time.perf_counter()
        try:
            cache = opened()
        except (ValueError, OSError) as error:
            console.print(f"{error}; the text is read again.", highlight=False, markup=False, soft_wrap=True)
        else:
            with suppress(OSError):  # in a folder that cannot be written, the order stays as it is
                os.utime(path)
            seconds = time.perf_counter() - start
            console.print(
                f"{len(prompt):,} tokens of {text_name} opened in {seconds:.2f} s.", highlight=False, markup=False
            )
            del cache
            return opened
    cache = _read(model, prompt, console)
    most = MAX_SIZE if args.max_size is None else args.max_size
    try:
        folder.mkdir(parents=True, exist_ok=True)
        notes = {"model": model_name, "text": text_name}
        write_cache(cache, path, model=model, tokens=prompt.ids, bits=args.bits, notes=notes, max_bytes=most)
        _trim(folder, most, path)
    except TooLargeError as error:
        why = f"it takes {_size(error.size)}, --max-size is {_size(most)}"
    except (OSError, NotImplementedError, ValueError) as error:  # ValueError: numbers that 8 bits cannot hold
        why = str(error)
    else:
        return opened
    console.print(f"The text is not saved: {why}", highlight=False, markup=False, soft_wrap=True)
    return lambda: _copied(cache, prompt)


def _copied(cache: Any, prompt: _Prompt) -> Any:
    twin = copy.deepcopy(cache)
    twin.tokens = prompt.ids
    return twin


def _name(model: Any, prompt: _Prompt, args: argparse.Namespace) -> str:
    """The name of a saved text: that of its file, and a hash of all that its keys and values depend on."""
    from dhsa.hf.saved import FORMAT, attention_of, digest, fingerprint

    parts = [FORMAT, digest(prompt.ids), fingerprint(model), attention_of(model), args.bits]
    code = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    stem = "reference" if args.text is None else re.sub(r"[^\w.-]+", "-", args.text.stem).strip(".-")[:60]
    return f"{stem or 'text'}-{code}"


def _read(model: Any, prompt: _Prompt, console: Any) -> Any:
    """The cache of a model that has read the text."""
    import torch
    from transformers import DynamicCache

    from dhsa.hf.compat import cache_option

    cache, decoder = DynamicCache(config=model.config), model.get_decoder()
    with (
        torch.no_grad(),
        commands.progress(console, remaining=True, rate="tokens") as step,
        step(f"reading {len(prompt):,} tokens", len(prompt)) as advance,
    ):
        for piece in prompt.ids.split(PIECE, 1):
            decoder(piece, **cache_option(decoder, cache), use_cache=True)
            advance(piece.shape[1])
    return cache


# ---- answering -------------------------------------------------------------------------------------------------------


def _answer(
    model: Any,
    tokenizer: Any,
    cache: Any,
    prompt: _Prompt,
    question: str,
    new_tokens: int,
    console: Any,
    shown: bool,
) -> None:
    """Prints the answer token by token if it is to be `shown`, then its speed."""
    import torch
    from transformers import StoppingCriteriaList, TextStreamer

    from dhsa.hf.compat import cache_option

    ids = torch.cat([cache.tokens, prompt.question(question)], 1)
    stops = StoppingCriteriaList()
    if not prompt.templated:  # a model without a template goes on with questions of its own

        def next_question(ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.tensor(["\n\n" in tokenizer.decode(row[start:]).lstrip() for row in ids])

        start = ids.shape[1]
        stops.append(next_question)
    started = time.perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_option(model, cache),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if shown else None,
        stopping_criteria=stops,
    )
    count, seconds = out.shape[1] - ids.shape[1], time.perf_counter() - started
    console.print(f"{count} tokens, {count / seconds:.1f} tokens/s", style="dim", highlight=False)


# ---- saved texts -----------------------------------------------------------------------------------------------------


def _saved(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files of saved texts and their status, the one that was used last first. Other processes may delete them at
    any time."""
    found = []
    for path in folder.glob(f"*{SUFFIX}") if folder.is_dir() else ():
        if not path.name.startswith("."):  # as the files that are being written
            with suppress(OSError):  # another process has deleted it
                found.append((path, path.stat()))
    return sorted(found, key=lambda one: (one[1].st_mtime, one[0]), reverse=True)


def _trim(folder: Path, most: int, keep: Path) -> None:
    """Deletes the saved texts not used for longest, other than `keep`, until all take no more than `most` bytes."""
    left = most
    for path, status in sorted(_saved(folder), key=lambda one: one[0] != keep):
        left -= status.st_size
        if left < 0 and path != keep:
            path.unlink(missing_ok=True)


def _size(count: int) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 10 else f"{count / 10**6:.1f} MB"


def _show(folder: Path, console: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    found = _saved(folder)
    if not found:
        console.print(f"No saved texts in {folder}.", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table(title=escape(str(folder)), title_style="bold")
    for heading in ("name", "text", "model", "tokens", "size", "last used"):
        table.add_column(heading, justify="right" if heading in ("tokens", "size") else "left", overflow="fold")
    for path, status in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.st_mtime))
        text, model, tokens = _notes(path)
        name = path.name.removesuffix(SUFFIX)
        table.add_row(escape(name), escape(text), escape(model), tokens, _size(status.st_size), used)
    console.print(table)


def _notes(path: Path) -> tuple[str, str, str]:
    """The text, the model and the number of tokens that a file names."""
    try:
        with open(path, "rb") as file:
            metadata, entries = read_header(file)
        return metadata["note.text"], metadata["note.model"], f"{entries['tokens'].shape[-1]:,}"
    except (OSError, ValueError, LookupError):
        return "damaged", "", ""


def _forget(folder: Path, name: str, console: Any) -> None:
    paths = {path.name.removesuffix(SUFFIX): path for path, _ in _saved(folder)}
    if name != "all" and name not in paths:
        raise UserError(f"--forget: no saved text {name!r} in {folder}; --list shows the names")
    for each in paths if name == "all" else [name]:
        paths[each].unlink(missing_ok=True)
        console.print(f"Deleted {each}.", highlight=False, markup=False, soft_wrap=True)
