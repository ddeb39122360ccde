"""Prefill of a real model: seconds, peak memory, and what is left beside attention; run by `make bench-model`.

Gemma 3 270M from its packaged GGUF file, dequantised as the demo does it, or another model, prefills a text by
transformers' SDPA, by dhsa exact, by dhsa sparse (`Config()`: what would not pay runs exact) and by dhsa sparse in a
compiled model, in fp32 and bf16: `use_cache` on and logits of the last token only, which is what `generate` does. Every
measurement has a process of its own, so that peak memory (the kernel's high-water mark, reset after loading and warming
up) is that prefill's alone. With `--llama PYTHON`, an interpreter that has llama-cpp-python, llama.cpp prefills the
same tokens from the same file with flash attention.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Job, check, machine, peak, row, run_jobs
from peers import tokens

import dhsa
from dhsa import commands, demo

COMPILED = "dhsa sparse, compiled"
SPARSE = dhsa.Config()
CONTESTANTS = {"sdpa": None, "dhsa exact": dhsa.Config(budget=None), "dhsa sparse": SPARSE, COMPILED: SPARSE}
LLAMA = "llama.cpp"
PROFILED = 8192
_ENOUGH = 20.0  # seconds: a process takes three samples, or fewer once they have taken this long


# ---- one process, one measurement ------------------------------------------------------------------------------------


def high_water_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def child(task: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(task["threads"])
    dhsa.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])).eval()
    ids = torch.tensor(json.loads(Path(task["ids"]).read_text())[: task["length"]])[None]
    if task["work"] == "eager":
        model.set_attn_implementation("eager")
    config = CONTESTANTS.get(task["work"])
    with nullcontext() if config is None else dhsa.patched(model, config):
        called = torch.compile(model) if task["work"] == COMPILED else model

        def prefill(ids: torch.Tensor) -> Any:
            return called(ids, use_cache=True, logits_to_keep=1)

        # What compiling takes is not part of a prefill. The sizes of the first two calls differ, so that torch compiles
        # for any size.
        start = time.perf_counter()
        for length in (64, 128) if called is not model else (64, 64):
            prefill(ids[:, :length])
        if called is not model:
            prefill(ids)
        warm = time.perf_counter() - start
        if task["profile"]:
            return _profile(model, lambda: prefill(ids))
        seconds, attention, peaks = [], [], [peak(task["threads"])]
        demo._return_free_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before, after = high_water_mib(), 0.0
        while not seconds or (len(seconds) < 3 and sum(seconds) < _ENOUGH):
            implementation = model.config._attn_implementation
            watched = demo._timed_attention(implementation, lambda: None, -1, None)
            # Eager is no function to wrap; in a compiled model attention is an operator of the graph.
            unknown = implementation == "eager" or called is not model
            with nullcontext([math.nan]) if unknown else watched as clock:
                start = time.perf_counter()
                prefill(ids)
                seconds.append(time.perf_counter() - start)
            attention.append(clock[0])
            after = after or high_water_mib()  # of the first prefill: later ones start with the memory that it left
            peaks.append(peak(task["threads"]))
    return {
        "samples": seconds,
        "seconds": statistics.median(seconds),
        "attention_seconds": statistics.median(attention),
        "compile_seconds": max(warm - statistics.median(seconds), 0.0) if called is not model else None,
        "added_mib": after - before,
        "peak_mib": after,
        "fma_peak": statistics.median(peaks),
    }


_LLAMA_CHILD = """
import json, sys, time
from llama_cpp import Llama
task = json.loads(sys.argv[1])
ids = json.load(open(task["ids"]))[: task["length"]]
def high_water():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
llm = Llama(task["gguf"], n_ctx=task["length"] + 64, n_batch=2048, n_threads=task["threads"],
            n_threads_batch=task["threads"], flash_attn=True, swa_full=False, verbose=False)
llm.eval(ids[:64])
seconds = []
while not seconds or (len(seconds) < 3 and sum(seconds) < task["enough"]):
    llm.reset()
    start = time.perf_counter()
    llm.eval(ids)
    seconds.append(time.perf_counter() - start)
print(json.dumps({"samples": seconds, "seconds": sorted(seconds)[len(seconds) // 2], "peak_mib": high_water()}))
"""


def in_child(command: list[str], task: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*command, json.dumps(task)], capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise RuntimeError(f"exit status {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- the profile -----------------------------------------------------------------------------------------------------


def _part(name: str, module: torch.nn.Module) -> str | None:
    """Which line of the profile a module without submodules counts in."""
    kind = type(module).__name__
    if name.endswith("lm_head"):
        return "lm_head (one token)"
    if isinstance(module, torch.nn.Linear):
        return "linear layers of attention" if "attn" in name else "linear layers of the MLP"
    for word, part in (("Norm", "RMS norms"), ("Rotary", "RoPE's tables"), ("Embedding", "embedding")):
        if word in kind:
            return part
    return None


@contextmanager
def _marked(model: torch.nn.Module) -> Iterator[None]:
    """Marks attention and every named part of the model for the profiler."""
    from torch.profiler import record_function
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    open_marks: list[Any] = []

    def enter(part: str) -> None:
        open_marks.append(record_function(f"part: {part}").__enter__())

    def leave(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    hooks = []
    for name, module in model.named_modules():
        if (part := _part(name, module)) is not None:
            hooks.append(module.register_forward_pre_hook(lambda *_, part=part: enter(part)))
            hooks.append(module.register_forward_hook(lambda *_: leave()))
    implementation = model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[implementation]

    def attention(*args: Any, **kwargs: Any) -> Any:
        with record_function("part: attention"):
            return original(*args, **kwargs)

    AttentionInterface.register(implementation, attention)
    try:
        yield
    finally:
        AttentionInterface.register(implementation, original)
        for hook in hooks:
            hook.remove()


def _profile(model: torch.nn.Module, prefill: Any) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    prefill()
    with _marked(model), profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        prefill()
        seconds = time.perf_counter() - start
    events = profiler.key_averages()
    parts = {e.key.removeprefix("part: "): e.cpu_time_total / 1e6 for e in events if e.key.startswith("part: ")}
    parts["the rest (rotation, activation, products, sums, cache, Python)"] = seconds - sum(parts.values())
    operators = [e for e in events if e.key.startswith("aten::") or e.key.startswith("mkldnn")]
    top = sorted(operators, key=lambda e: -e.self_cpu_time_total)[:8]
    return {
        "seconds": seconds,
        "parts": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "operators": {e.key: e.self_cpu_time_total / 1e6 for e in top},
    }


# ---- the run ---------------------------------------------------------------------------------------------------------


def jobs_of(args: argparse.Namespace, files: dict[str, str]) -> list[Job]:
    done: dict[tuple[str, str, int], float] = {}
    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    me = [sys.executable, str(Path(__file__).resolve()), "--child"]

    def measured(work: str, dtype: str, length: int) -> Iterator[dict[str, Any]]:
        task = {**files, "work": work, "dtype": dtypes.get(dtype), "length": length, "threads": args.threads}
        task |= {"profile": False, "enough": _ENOUGH}
        told = in_child([str(args.llama), "-c", _LLAMA_CHILD] if work == LLAMA else me, task)
        done[work, dtype, length] = seconds = told.pop("seconds")
        checks, more = [], {}
        if work == "dhsa sparse" and length >= 8192 and (theirs := done.get((LLAMA, "Q4_K_M", length))):
            checks.append(check("against llama.cpp", theirs / seconds, 1.0, "x"))
        if work != "sdpa" and (theirs := done.get(("sdpa", dtype, length))):
            more = {"peer": "sdpa", "peer_seconds": theirs, "ratio": theirs / seconds}
        memory = f"peak {told['peak_mib']:,.0f} MiB in all"
        if "added_mib" in told:
            spent = (
                f"attention {told['attention_seconds']:.2f} s"
                if told["compile_seconds"] is None
                else f"compiled in {told['compile_seconds']:.0f} s before"
            )
            memory = f"{told['added_mib']:,.0f} MiB added, {memory}, {spent}, FMA peak {told['fma_peak']:.0f} GFLOP/s"
        result = row("model", work, dtype, tokens(length), seconds, checks=checks, detail=memory, length=length)
        yield result | told | more

    def profiled(dtype: str, length: int) -> Iterator[dict[str, Any]]:
        task = {**files, "work": "dhsa sparse", "dtype": dtypes[dtype], "length": length, "threads": args.threads}
        told = in_child(me, task | {"profile": True})
        shares = ", ".join(f"{k} {s / told['seconds']:.0%}" for k, s in told["parts"].items())
        yield row("profile", "where the time goes", dtype, tokens(length), detail=shares, length=length) | told

    jobs = []
    for length in args.lengths:
        if args.llama is not None:
            jobs.append(Job("model", f"{LLAMA} {tokens(length)}", lambda n=length: measured(LLAMA, "Q4_K_M", n)))
        for dtype in args.dtype:
            for work in args.work:
                if work != "sdpa" or length <= args.sdpa_max:
                    name = f"{work} {dtype} {tokens(length)}"
                    jobs.append(Job("model", name, lambda w=work, d=dtype, n=length: measured(w, d, n)))
    for dtype in args.dtype:
        length = min(PROFILED, max(args.lengths))
        jobs.append(Job("profile", f"profile {dtype}", lambda d=dtype, n=length: profiled(d, n)))
    return jobs


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, metavar="FILE", help="a UTF-8 text (default: Python's language reference)")
    parser.add_argument(
        "--model", type=Path, metavar="PATH", help="another GGUF file, or a model folder (default: the packaged model)"
    )
    parser.add_argument("--work", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), help="only these")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], metavar="TOKENS")
    parser.add_argument("--sdpa-max", type=int, default=16384, metavar="TOKENS", help="no sdpa rows beyond this length")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--llama", type=Path, metavar="PYTHON", help="a Python that has llama-cpp-python: its rows too")
    parser.add_argument("--quick", action="store_true", help="4K only")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/model.json, or model-quick.json")
    args = parser.parse_args()
    if args.quick:
        args.lengths = [4096]
    args.json = args.json or RESULTS / f"model{'-quick' if args.quick else ''}.json"
    torch.set_num_threads(args.threads)
    if args.llama is not None and args.model is not None and args.model.is_dir():
        parser.error("--llama: llama.cpp reads GGUF files, not folders")
    source = args.model or commands.packaged_model()
    with tempfile.TemporaryDirectory(prefix="dhsa-bench-") as folder:
        if source.is_dir():
            from transformers import AutoTokenizer

            tokenizer, weights = AutoTokenizer.from_pretrained(source), str(source)
        else:
            # Read and dequantised once: the children then load it in a second; a GGUF file takes 15 seconds.
            tokenizer, model = commands.load(source)
            weights = folder
            # Its weights are float32 now, but some releases of transformers call it quantized, and do not save it.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(folder)
            del model
        ids = commands.tokenize(tokenizer, commands.read_text(args.text), max(args.lengths))[0].tolist()
        if len(ids) < max(args.lengths):
            parser.error(f"--text: only {len(ids)} tokens, --lengths asks for {max(args.lengths)}")
        files = {"model": weights, "ids": str(Path(folder, "ids.json")), "gguf": str(source)}
        Path(files["ids"]).write_text(json.dumps(ids))
        told = machine(args.threads)
        print(
            f"{source.name}, dhsa {dhsa.__version__} ({told['isa']}), torch {torch.__version__},"
            f" {args.threads} threads, {told['cpu']}; every row in a process of its own"
        )
        text = "Python's language reference" if args.text is None else args.text.name
        run_jobs(jobs_of(args, files), args.json, {"machine": told, "text": text, "model": source.name})


if __name__ == "__main__":
    main()
