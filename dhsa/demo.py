"""The demo: Gemma 3 270M prefills a long text by several attentions, and the results are compared.

`python -m dhsa demo` assembles the packaged weights, loads them with transformers in float32, runs every attention of
the comparison on the same tokens, prints one table and draws what one global layer selected. Then it shows how one call
of attention grows with the length of a prompt (growth.py). It works without a network. All numbers are measured in this
process with the default settings.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dhsa import commands, growth
from dhsa.commands import UserError

__all__ = ["NEW_TOKENS", "add_arguments", "following", "machine", "one_line", "run", "sparse_within"]

NEW_TOKENS = 16
_NEEDED = ("torch", "transformers", "rich", "matplotlib", "psutil")


@dataclass
class Result:
    """What was measured of one attention. Times are in seconds, memory in MiB. `density` is None where none is
    reported.
    """

    name: str
    detail: str
    prefill_seconds: float = math.nan
    attention_seconds: float = math.nan
    peak_mib: float = math.nan
    perplexity: float = math.nan
    density: float | None = None
    continuation: str = ""
    paths: tuple[str, ...] = field(default=())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text (default: Python's language reference)")
    parser.add_argument(
        "--tokens", type=commands.at_least(64), default=8192, metavar="N", help="prompt length (default: 8192)"
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="a GGUF file, a model folder, gemma3 or smollm2 (packaged weights; default: gemma3)",
    )
    parser.add_argument(
        "--budget",
        type=commands.at_least(4),
        default=2048,
        metavar="N",
        help="keys a block of queries may see (default: 2048)",
    )
    parser.add_argument(
        "--longest",
        type=commands.at_least(0),
        default=65536,
        metavar="N",
        help="the longest prompt of the comparison of lengths (default: 65536; 0: leave it out)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="the folder to write the pictures to (default: demo-output)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo for parsed arguments (see `add_arguments`) and return the exit status."""
    commands.prepare(_NEEDED, "the demo")
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 132)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {error}") from error
    text = commands.read_text(args.text)

    started = time.perf_counter()
    with commands.progress(console) as step, ExitStack() as held:
        with step(
            "assembling the packaged weights (the first time only)" if args.model is None else "finding the model"
        ):
            source = commands.find_model(args.model)
        with step(f"loading {source.name} into float32"):
            tokenizer, model = commands.load(source)
        with step("tokenizing"):
            ids = commands.tokenize(tokenizer, text, args.tokens)
        if args.model is None and int(ids[0, 0]) != tokenizer.bos_token_id:  # seen with transformers 5.5 to 5.17
            console.print(
                "This release of transformers omits the first token of a text for this file, so all perplexities are "
                "too high. A newer release reads the file correctly."
            )
        import torch

        import dhsa

        held.enter_context(torch.no_grad())
        length = ids.shape[1]
        rest_mib = _resident_mib()
        with step("warming up"):
            _prefill(model, ids[:, :64])
            with dhsa.patched(model, dhsa.Config(budget=None)):
                _prefill(model, ids[:, :64])
        layer = _picture_layer(model)
        captured: dict[str, Any] = {}
        results = []
        for result, config in _contestants(args.budget, model.config._attn_implementation):
            captures = captured if result.name == "dhsa, default" else None
            with step(f"{result.name}: prefill of {length:,} tokens", total=commands.model_layers(model)) as advance:
                cache, hidden = _measure(result, config, model, ids, advance, layer, captures)
            with step(f"{result.name}: perplexity of the second half"):
                result.perplexity = _perplexity(model, hidden, ids)
            with step(f"{result.name}: next {NEW_TOKENS} tokens"):
                with dhsa.patched(model, config) if config is not None else nullcontext():
                    chosen = following(model, cache, commands.logits(model, hidden[:, -1:]))
                result.continuation = tokenizer.decode(chosen)
            del cache, hidden
            results.append(result)
        with step("drawing"):
            picture = _draw(captured, layer, args)
        grown, shape = None, _layer(model, captured, results[1], length)
        if args.longest:
            del model
            lengths = growth.lengths_up_to(args.longest)
            title = f"one call of attention, {lengths[0]:,} to {lengths[-1]:,} tokens"
            with step(title, total=len(lengths)) as advance:
                grown = growth.measure(shape, sparse_within(args.budget), lengths, advance)

    console.print(_table(results, length, rest_mib))
    if all("sparse" not in r.paths for r in results):
        console.print(f"The prompt is within the budget of {args.budget:,} keys: no key was left out.")
    console.print(f"What layer {layer} selected: {picture}", soft_wrap=True, highlight=False)
    if grown is not None:
        console.print()
        console.print(growth.table(grown, shape, machine()))
        title = f"One call of attention, {shape.heads} heads on {shape.kv_heads} of {shape.dim}, {machine()}"
        path = growth.draw(grown, args.out / "growth.png", title)
        console.print(f"The same as a picture: {path}", soft_wrap=True, highlight=False)
    console.print(f"The demo took {time.perf_counter() - started:.0f} s.", highlight=False)
    return 0


def _contestants(budget: int, reference: str) -> list[tuple[Result, Any]]:
    """Return the attentions compared: a result to fill in, and the Config, or None for that of transformers."""
    import dhsa

    default = sparse_within(budget)
    paper = _within(dhsa.Config.paper(), budget)
    recent = default.replace(method="window")
    return [
        (Result(f"transformers {reference}", "every key, windows by mask"), None),
        (Result("dhsa, exact", "every key; sliding layers touch their window only"), dhsa.Config(budget=None)),
        (Result("dhsa, default", f"{default.boundaries} chunks, row scores, budget {budget:,}"), default),
        (Result("dhsa, paper", f"Config.paper(), budget {budget:,}"), paper),
        (Result("sinks + local", f"{recent.sink:,} first and {budget - recent.sink:,} latest keys"), recent),
    ]


def _within(config: Any, budget: int) -> Any:
    """Return the config at this budget, with forced keys that leave at least half of it to be selected."""
    return config.replace(budget=budget, sink=min(config.sink, budget // 4), local=min(config.local, budget // 4))


def sparse_within(budget: int) -> Any:
    """Return the default at this budget; sparse attention is shown even where it takes more time."""
    import dhsa

    return _within(dhsa.Config(break_even=0), budget)


def _layer(model: Any, captured: dict[str, Any], result: Result, length: int) -> growth.Layer:
    """Return the shape of the captured layer, and what of the prefill's seconds is not attention."""
    q, k = captured["q"], captured["k"]
    other = (result.prefill_seconds - result.attention_seconds) / length
    return growth.Layer(q.shape[1], k.shape[1], q.shape[3], q.dtype, commands.model_layers(model), other)


# ---- one measurement -------------------------------------------------------------------------------------------------


def _prefill(model: Any, ids: Any) -> tuple[Any, Any]:
    """Return (cache, last hidden states) of the decoder without its head, whose output would be far larger."""
    from dhsa.hf.compat import cache_of

    out = model.get_decoder()(ids, use_cache=True)
    return cache_of(out), out.last_hidden_state


def _measure(
    result: Result,
    config: Any,
    model: Any,
    ids: Any,
    advance: Callable[[], None],
    layer: int,
    captured: dict[str, Any] | None,
) -> tuple[Any, Any]:
    """Run a prefill by `config`, or by the model's own attention if None, and store seconds, memory and paths in
    `result`.
    """
    import dhsa

    with dhsa.patched(model, config) if config is not None else nullcontext():
        name = model.config._attn_implementation
        with _timed_attention(name, advance, layer, captured) as clock, _PeakMemory() as memory:
            start = time.perf_counter()
            cache, hidden = _prefill(model, ids)
            result.prefill_seconds = time.perf_counter() - start
        result.attention_seconds = clock[0]
        result.peak_mib = memory.added_mib
        if config is not None:
            runs = dhsa.last_run(model, "prefill")
            result.paths = tuple(r.path for r in runs)
            densities = [r.density for r in runs if r.kind == "full"]
            result.density = sum(densities) / len(densities) if densities else None
    return cache, hidden


@contextmanager
def _timed_attention(
    name: str, advance: Callable[[], None], layer: int, captured: dict[str, Any] | None
) -> Iterator[list[float]]:
    """Sum the seconds spent in attention implementation `name`, in the same way for dhsa and transformers.

    Keeps queries and keys of one layer if `captured` is given.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS[name]
    seconds = [0.0]

    def timed(module: Any, query: Any, key: Any, *rest: Any, **kwargs: Any) -> Any:
        if captured is not None and getattr(module, "layer_idx", None) == layer:
            captured.update(q=query, k=key, scale=kwargs.get("scaling"), softcap=kwargs.get("softcap"))
        start = time.perf_counter()
        out = original(module, query, key, *rest, **kwargs)
        seconds[0] += time.perf_counter() - start
        advance()
        return out

    AttentionInterface.register(name, timed)
    try:
        yield seconds
    finally:
        AttentionInterface.register(name, original)


class _PeakMemory:
    """The peak of resident memory, sampled every few milliseconds, above what was resident on entry."""

    def __enter__(self) -> _PeakMemory:
        _return_free_memory()
        self._base = self._peak = _resident_mib()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dhsa-demo-memory", daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, _resident_mib())

    def __exit__(self, *_: object) -> None:
        self._peak = max(self._peak, _resident_mib())
        self._done.set()
        self._thread.join()

    @property
    def added_mib(self) -> float:
        return self._peak - self._base


def _resident_mib() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def _return_free_memory() -> None:
    """Have the C library return freed pages, so that a run does not reuse memory of the one before."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _perplexity(model: Any, hidden: Any, ids: Any) -> float:
    """Return exp of the mean negative log-likelihood of the prompt's second half, each token given all before; logits
    are formed in slices.
    """
    length = ids.shape[1]
    total, first = 0.0, length // 2
    for start in range(first, length, commands.LOGIT_ROWS):
        stop = min(start + commands.LOGIT_ROWS, length)
        logits = commands.logits(model, hidden[0, start - 1 : stop - 1])
        chosen = logits.gather(1, ids[0, start:stop, None])[:, 0]
        total += float((logits.logsumexp(-1) - chosen).double().sum())
    return math.exp(total / (length - first))


def following(model: Any, cache: Any, logits: Any) -> list[int]:
    """Return the next tokens by greedy decoding with the cache of a prefill, given the logits [1, 1, vocabulary] of its
    last token. Ends after NEW_TOKENS or the model's end token.
    """
    from dhsa.hf.compat import cache_option

    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    chosen: list[int] = []
    while True:
        token = logits.argmax(-1)
        chosen.append(int(token))
        if chosen[-1] in ends or len(chosen) == NEW_TOKENS:
            return chosen
        logits = model(token, **cache_option(model, cache), use_cache=True).logits[:, -1:]


# ---- output ----------------------------------------------------------------------------------------------------------


def _picture_layer(model: Any) -> int:
    """Return the middle one of the layers without a window."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"] or list(range(len(kinds)))
    return full[len(full) // 2]


def _draw(captured: dict[str, Any], layer: int, args: argparse.Namespace) -> Path:
    """Draw what the default attention selected in one layer, selected again from its queries and keys."""
    import dhsa
    from dhsa.plot import plot_selection

    config = next(c for r, c in _contestants(args.budget, "") if r.name == "dhsa, default")
    q, k = captured["q"], captured["k"]
    selection = dhsa.select(q, k, config, scale=captured["scale"], softcap=captured["softcap"])
    path = args.out / "selection.png"
    model_name = "Gemma 3 270M" if args.model is None else args.model.stem
    plot_selection(
        selection, path, config=config, title=f"{model_name}, layer {layer}: the keys that each block of queries sees"
    )
    return path


def machine(threads: int | None = None) -> str:
    """Return what figures were measured on. `threads`: of all processes; None: those of this one."""
    import dhsa

    return f"float32, {threads or dhsa.get_num_threads()} threads, {dhsa.build_info()['isa']}"


def _table(results: list[Result], length: int, rest_mib: float) -> Any:
    from rich.table import Table

    table = Table(
        title=f"Prefill of {length:,} tokens in {machine()}",
        caption=(
            f"Peak memory: what prefill adds to the loaded {rest_mib:,.0f} MiB. Perplexity: of the second half. "
            "Attended: share of the visible keys in the layers without a window."
        ),
        caption_justify="left",
        title_style="bold",
        show_lines=True,
    )
    table.add_column("attention", min_width=17)
    for heading in ("prefill", "attention only", "peak memory", "perplexity", "attended"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"next {NEW_TOKENS} tokens", ratio=1)
    base = results[0]
    for r in results:
        table.add_row(
            f"[bold]{r.name}[/]\n[dim]{r.detail}[/]",
            f"{r.prefill_seconds:.2f} s\n[dim]{base.prefill_seconds / r.prefill_seconds:.2f}x[/]",
            f"{r.attention_seconds:.2f} s\n[dim]{base.attention_seconds / r.attention_seconds:.2f}x[/]",
            f"{r.peak_mib:,.0f} MiB",
            f"{r.perplexity:.3f}\n[dim]{(r.perplexity / base.perplexity - 1) * 100:+.2f} %[/]",
            "100 %" if r.density is None else f"{r.density * 100:.0f} %",
            one_line(r.continuation),
        )
    return table


def one_line(text: str) -> str:
    from rich.markup import escape

    return escape(text.replace("\n", "⏎"))
