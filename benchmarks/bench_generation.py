"""Decoding steps that select their keys, prompts in pieces, and the memory of a model; run by `make bench-generation`.
docs/GENERATION.md has the tables.

Sections:
    steps: a decoding step of one layer at a cache of 32K keys, random numbers.
    crossing: such steps at several lengths, to find from which length selecting keys is faster.
    in_model: the time that attention takes in a decoding step of the model.
    pieces: a prompt of 16K tokens in pieces of 2,048, against the same prompt at once.
    quality: a text continued token by token, with selected keys and with all keys.
    memory: what a prefill of 32K tokens takes beyond weights and cache.

All but the first two use Gemma 3 270M. What is compared takes turns in one process, and medians are reported; each
measurement of memory has a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, machine, write_json
from peers import GEMMA2, GEMMA3, Shape

import dhsa
from dhsa import _core, functional
from dhsa.hf.compat import cache_option

LLAMA3, SMALL = Shape(32, 8, 128), Shape(9, 3, 64)
CONTEXT, BUDGET, STEP_GOAL = 32768, 2048, 0.2
PROMPT, PIECE, PIECES_GOAL = 16384, 2048, 1.15
READ_ON = 256  # tokens after the prompt
JUDGED = 512  # last positions whose logits are compared
Row = dict[str, Any]


# ---- one layer -------------------------------------------------------------------------------------------------------


def steps(repeats: int) -> Iterator[Row]:
    for shape in (GEMMA3, GEMMA2, LLAMA3):
        for dtype in (torch.float32, torch.bfloat16):
            yield step(shape, dtype, repeats)


def crossing(repeats: int) -> Iterator[Row]:
    """The length from which a step that selects its keys is faster: STEP in dhsa/hf/break_even.py."""
    for shape in (GEMMA3, GEMMA2, LLAMA3, SMALL):
        for dtype in (torch.float32, torch.bfloat16):
            for budget in (512, BUDGET):
                found = {n: step(shape, dtype, repeats, int(n * budget), budget) for n in (1.5, 2, 3, 4, 6, 8)}
                times = ", ".join(f"{n:g}: {r['exact'] * 1e6:,.0f}/{r['chosen'] * 1e6:,.0f}" for n, r in found.items())
                yield {
                    "section": "crossing", "shape": str(shape), "dtype": str(dtype)[6:], "budget": budget,
                    "shares": {n: r["share"] for n, r in found.items()},
                    "text": f"{shape} {str(dtype)[6:]}, budget {budget:,}, budgets cached: exact/chosen us: {times}",
                }  # fmt: skip


def step(shape: Shape, dtype: torch.dtype, repeats: int, context: int = CONTEXT, budget: int = BUDGET) -> Row:
    config = dhsa.Config(budget=budget, decode="dhsa")
    generator = torch.Generator().manual_seed(0)

    def numbers(heads: int, length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, shape.dim, generator=generator).to(dtype)

    k, v = (numbers(shape.kv_heads, context + repeats) for _ in range(2))
    past = (_core.Past(),)
    prompt = config.replace(dense_tail=0)
    functional.run(numbers(shape.heads, 64), k[:, :, :context], v[:, :, :context], prompt, pasts=past)
    seconds: dict[str, list[float]] = {"exact": [], "chosen": [], "looked": [], "select": [], "attend": []}
    for n in range(context + 1, context + repeats + 1):
        q, keys, values = numbers(shape.heads, 1), k[:, :, :n], v[:, :, :n]
        for name, cfg, options in (
            ("exact", None, {}),
            ("chosen", config, {"pasts": past, "same": n - 1}),
            ("looked", config, {"pasts": past}),
        ):
            start = time.perf_counter()
            _, _, stats = functional.run(q, keys, values, cfg, **options)
            seconds[name].append(time.perf_counter() - start)
            if name == "chosen":
                seconds["select"].append(stats.select_seconds)
                seconds["attend"].append(stats.attend_seconds)
    told = {name: statistics.median(found) for name, found in seconds.items()}
    share = statistics.median(b / a for a, b in zip(seconds["exact"], seconds["chosen"], strict=True))
    kept = past[0].nbytes / (2 * shape.kv_heads * context * shape.dim * k.element_size())
    us = {name: f"{x * 1e6:,.0f}" for name, x in told.items()}
    text = (
        f"{shape} {str(dtype)[6:]}: exact {us['exact']} us, chosen {us['chosen']} ({us['select']} choosing,"
        f" {us['attend']} attending), {share:.2f} of exact; {us['looked']} where it looks at every key;"
        f" keeps {kept:.1%} of keys and values"
    )
    row = {"section": "steps", "shape": str(shape), "dtype": str(dtype)[6:], "share": share, "kept": kept, "text": text}
    return row | told | {"pass": share <= STEP_GOAL}


# ---- a model ---------------------------------------------------------------------------------------------------------


def read(model: Any, ids: torch.Tensor, piece: int) -> tuple[torch.Tensor, Any]:
    """Log-probabilities after the last tokens, and the cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    last = []
    for at in range(0, ids.shape[1], piece):
        hidden = model.model(
            ids[:, at : at + piece], **cache_option(model.model, cache), use_cache=True
        ).last_hidden_state
        last.append(hidden[0, -JUDGED:])
    hidden = torch.cat(last)[-JUDGED:]
    return torch.log_softmax(model.lm_head(hidden).float(), -1), cache


def attention_seconds(model: Any, step: str = "prefill") -> float:
    return sum(run.select_seconds + run.attend_seconds for run in dhsa.last_run(model, step))


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.exp() * (a - b)).sum(-1).mean())


def pieces(model: Any, ids: torch.Tensor, repeats: int) -> Iterator[Row]:
    ids = ids[:, :PROMPT]
    with dhsa.patched(model, dhsa.Config(budget=None)):
        dense, _ = read(model, ids, PROMPT)
    seconds: dict[int, list[float]] = {PROMPT: [], PIECE: []}
    found = {}
    with dhsa.patched(model, dhsa.Config(budget=BUDGET)):
        for _ in range(repeats):
            for size, times in seconds.items():
                start = time.perf_counter()
                found[size], _ = read(model, ids, size)
                times.append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(seconds[PROMPT], seconds[PIECE], strict=True))
    own, apart = divergence(dense, found[PROMPT]), divergence(found[PROMPT], found[PIECE])
    yield {
        "section": "pieces", "at_once": statistics.median(seconds[PROMPT]), "pieces": statistics.median(seconds[PIECE]),
        "ratio": ratio, "kl_at_once": own, "kl_pieces": divergence(dense, found[PIECE]), "kl_between": apart,
        "pass": ratio <= PIECES_GOAL and apart <= own,
        "text": f"{PROMPT:,} tokens at once {statistics.median(seconds[PROMPT]):.1f} s, in pieces of {PIECE:,}"
        f" {statistics.median(seconds[PIECE]):.1f} s: {ratio:.2f}; KL from dense {own:.4f} at once,"
        f" {divergence(dense, found[PIECE]):.4f} in pieces, {apart:.4f} between the two",
    }  # fmt: skip


def in_model(model: Any, ids: torch.Tensor, repeats: int) -> Iterator[Row]:
    """The time that the layers without a window take in a step of the model, where their keys are not in cache."""
    import copy

    with dhsa.patched(model, dhsa.Config(budget=BUDGET)):
        _, cache = read(model, ids[:, :CONTEXT], CONTEXT)
    configs = {"exact": dhsa.Config(budget=None), "chosen": dhsa.Config(budget=BUDGET, decode="dhsa")}
    found: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(2):
        for name, config in configs.items():
            mine = copy.deepcopy(cache)
            with dhsa.patched(model, config):
                for i in range(8 * repeats):
                    token = ids[:, CONTEXT + i : CONTEXT + i + 1]
                    model.model(token, **cache_option(model.model, mine), use_cache=True)
                    full = [run for run in dhsa.last_run(model, "decode") if run.kind == "full"]
                    if i >= 4:  # the first steps compute again what the prefill has freed
                        found[name].append(sum(run.select_seconds + run.attend_seconds for run in full))
    exact, chosen = (statistics.median(found[name]) for name in configs)
    yield {
        "section": "in_model", "exact": exact, "chosen": chosen, "share": chosen / exact, "layers": len(full),
        "pass": chosen / exact <= STEP_GOAL,
        "text": f"{len(full)} global layers, cache of {CONTEXT:,}: exact {exact * 1e3:.2f} ms a step, chosen"
        f" {chosen * 1e3:.2f}: {chosen / exact:.2f}",
    }  # fmt: skip


def quality(model: Any, ids: torch.Tensor, prompts: tuple[int, ...]) -> Iterator[Row]:
    """A prompt read by exact attention, then its continuation token by token, with all keys and with `budget` keys."""
    import copy

    for length in prompts:
        prompt, rest = ids[:, :length], ids[:, length : length + READ_ON + 1]
        with dhsa.patched(model, dhsa.Config(budget=None)):
            _, cache = read(model, prompt, length)
        results, taken = {}, {}
        for budget in (None, 512, 1024, 2048):
            mine = copy.deepcopy(cache)
            config = dhsa.Config(budget=None) if budget is None else dhsa.Config(budget=budget, decode="dhsa")
            logits, seconds = [], []
            with dhsa.patched(model, config):
                for i in range(READ_ON):
                    hidden = model.model(
                        rest[:, i : i + 1], **cache_option(model.model, mine), use_cache=True
                    ).last_hidden_state
                    logits.append(torch.log_softmax(model.lm_head(hidden[0]).float(), -1))
                    full = [r for r in dhsa.last_run(model, "decode") if r.kind == "full"]
                    seconds.append(sum(r.select_seconds + r.attend_seconds for r in full))
            results[budget], taken[budget] = torch.cat(logits), statistics.median(seconds[8:])
        targets = rest[0, 1:, None]
        for budget, found in results.items():
            if budget is None:
                continue
            dense = results[None]
            gain = (dense.gather(1, targets) - found.gather(1, targets)).double()
            ratio, error = float(gain.mean().exp()), float(gain.std() / len(gain) ** 0.5)
            agree = float((dense.argmax(-1) == found.argmax(-1)).float().mean())
            kl = divergence(dense, found)
            yield {
                "section": "quality", "prompt": length, "budget": budget, "perplexity_ratio": ratio, "error": error,
                "kl": kl, "agree": agree, "seconds": taken[budget], "exact_seconds": taken[None],
                "text": f"prompt {length:,}, budget {budget:,}: perplexity {ratio:.4f} +- {error:.4f} of exact steps',"
                f" KL {kl:.4f}, same next token {agree:.1%}; the three global layers take {taken[budget] * 1e3:.2f} ms"
                f" a step, exact {taken[None] * 1e3:.2f}",
            }  # fmt: skip


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(folder: str, ids: torch.Tensor, threads: int, lengths: tuple[int, ...]) -> Iterator[Row]:
    import bench_model

    files = {"model": folder, "ids": str(Path(folder, "ids.json"))}
    Path(files["ids"]).write_text(json.dumps(ids[0, : max(lengths)].tolist()))
    command = [sys.executable, str(Path(bench_model.__file__).resolve()), "--child"]
    for length in lengths:
        cache = (3 * length + 15 * 511) * 2 * 256 * 4 / 2**20  # MiB in fp32: three layers keep everything, 15 a window
        for work in ("eager", "dhsa sparse", "dhsa exact", "sdpa"):
            row: Row = {"section": "memory", "work": work, "length": length, "cache_mib": cache}
            if work == "eager" and 3 * 4 * 4 * length**2 > 16 * 2**30:  # scores, their softmax and a copy
                needs = 2 * 4 * 4 * length**2 / 2**30
                yield row | {
                    "text": f"{length:,} tokens, eager: not run, its scores and probabilities are {needs:.0f} GiB"
                }
                continue
            task = {**files, "work": work, "dtype": "float32", "length": length, "threads": threads, "profile": False}
            told = bench_model.in_child(command, task)
            beyond = told["added_mib"] - cache
            yield row | {
                "added_mib": told["added_mib"], "beyond_mib": beyond, "seconds": told["seconds"],
                "text": f"{length:,} tokens, {work}: {beyond:,.0f} MiB beyond weights and cache ({cache:,.0f} MiB),"
                f" {told['seconds']:.1f} s",
            }  # fmt: skip


# ---- the run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections = ("steps", "crossing", "in_model", "pieces", "quality", "memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds of a comparison (steps: eight times as many)")
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections), metavar="SECTION")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text (default: Python's language reference)")
    parser.add_argument("--json", type=Path, default=RESULTS / "generation.json")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    dhsa.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": machine(args.threads), "rows": []}
    if args.json.is_file():  # rows that this run does not measure stay
        old = json.loads(args.json.read_text())["rows"]
        report["rows"] = [row for row in old if row["section"] not in args.only]

    def take(rows: Iterator[Row]) -> None:
        for row in rows:
            verdict = {True: "  pass", False: "  MISS", None: ""}[row.get("pass")]
            print(f"{row['section']}: {row['text']}{verdict}", flush=True)
            report["rows"].append(row)
            write_json(args.json, report)

    if "steps" in args.only:
        take(steps(8 * args.repeats))
    if "crossing" in args.only:
        take(crossing(8 * args.repeats))
    if set(args.only) <= {"steps", "crossing"}:
        return
    from dhsa import commands

    tokenizer, model = commands.load(commands.find_model("gemma3"))
    ids = commands.tokenize(tokenizer, commands.read_text(args.text), CONTEXT + 1024)
    if "in_model" in args.only:
        take(in_model(model, ids, args.repeats))
    if "pieces" in args.only:
        take(pieces(model, ids, args.repeats))
    if "quality" in args.only:
        take(quality(model, ids, (8192, 16384)))
    if "memory" in args.only:
        with tempfile.TemporaryDirectory(prefix="dhsa-bench-") as folder:
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(folder)
            del model
            take(memory(folder, ids, args.threads, (8192, 32768)))


if __name__ == "__main__":
    main()
