"""`python -m dhsa tune`: arguments, the order of the measurements, and the file of configs."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from dhsa import commands
from dhsa.commands import UserError, add_texts, at_least
from dhsa.config import Config, LayerConfigs
from dhsa.tuning.choose import Option, cheapest, closest, kept, total, uniform

__all__ = ["DESCRIPTION", "add_arguments", "run"]

DESCRIPTION = (
    "Measures many configurations in each layer of a model and writes a file with one for each layer: the fastest "
    "whose predictions stay as near to those of dense attention as --kl says, or the nearest in the share of dense "
    "attention's time that --time says. An interrupted run continues when the same command is given again, and a run "
    "for another target uses what was measured."
)
NEEDED = ("torch", "transformers", "rich")
VERSION = 1  # of the rows of a state file: raise it when a measurement changes, so that old rows are not used
SCREENED = 4  # layers in which all families are measured
KEPT = 8  # families that are then measured in all layers
SHORT = 2048  # tokens of the documents by which the layers' importance is measured
ROUNDS = 6  # the most configs that are measured as a whole
EXACT_NAME, DEFAULT = "exact", "default"  # names of candidates
NEAR = 0.93  # of the target, from which on a config is good enough


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="PATH", help="a GGUF file, a model folder, gemma3 or smollm2 (packaged); default: gemma3")
    kinds = ("float32", "bfloat16", "float16")
    add("--dtype", choices=kinds, default=kinds[0], help=f"of the weights; default: {kinds[0]}")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--kl", type=_positive, metavar="NATS", help="the most mean KL divergence from dense attention, as 0.02"
    )
    target.add_argument(
        "--time", type=_share, metavar="SHARE", help="the most time of attention, as a share of dense attention's: 0.5"
    )
    add(
        "--dense-or-sparse",
        type=at_least(256),
        metavar="N",
        help="give each layer either dense attention or the default configuration with N keys, nothing between",
    )
    add("--length", type=at_least(512), default=8192, metavar="N", help="tokens of a document; default: 8192")
    add_texts(parser, ".txt or .jsonl files or folders; default: Python's reference and its standard library's source")
    add("--documents", type=at_least(1), default=2, metavar="N", help="documents to measure on; default: 2")
    add("--held-out", type=at_least(0), default=2, metavar="N", help="documents to judge the result on; default: 2")
    add("--out", type=Path, metavar="FILE", help="the file to write; default: the model's name with .dhsa.json")
    add("--restart", action="store_true", help="discard what an earlier run measured")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no divergence above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of time, 0 < share < 1")
    return value


_positive.__name__ = _share.__name__ = "float"


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    commands.prepare(NEEDED, "tune")
    from rich.console import Console

    from dhsa.evaluation.store import Store

    console = Console(width=None if sys.stdout.isatty() else 132)
    source = commands.find_model(args.model)
    out = args.out or Path(f"{source.name if source.is_dir() else source.stem}.dhsa.json")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out: there is no folder {out.absolute().parent}")
    if out.exists() and not out.is_file():
        raise UserError(f"--out: {out} is not a regular file")
    state = out.with_suffix(".state.jsonl")
    if args.restart:
        state.unlink(missing_ok=True)
    store = Store(state)
    if store.rows:
        console.print(f"{len(store.rows)} measurements exist already in {state}.", highlight=False, soft_wrap=True)
    with commands.progress(console, remaining=True) as step:
        tuning = _Tuning(args, store, step)
        configs, table = tuning.result()
    try:
        configs.save(out)
    except OSError as error:
        raise UserError(f"--out: {error}") from error
    console.print(table)
    console.print(_described(configs), highlight=False)
    console.print(f'Use it:\n  dhsa.patch(model, "{out}")', highlight=False, soft_wrap=True)
    return 0


@dataclasses.dataclass(frozen=True)
class _Document:
    """The tokens of a document, and the hash by which it is named in the files."""

    name: str
    ids: list[int]
    hash: str


@dataclasses.dataclass(frozen=True)
class _Found:
    """The result of a search: the configs; the name of the candidate that is the best alike in all layers, and what it
    does (KL, share of time), if one keeps to the target; and the default at the budget with the nearest time."""

    configs: LayerConfigs
    alike: tuple[str, Option] | None
    default: Config


class _Tuning:
    """One run: what is measured is stored as it is measured, and read from the store where it exists."""

    def __init__(self, args: argparse.Namespace, store: Any, step: Callable[..., Any]) -> None:
        self.args, self.store, self.step = args, store, step
        source, tokenizer, model = commands.open_model(step, args.model, args.dtype)
        import torch
        import transformers

        import dhsa
        from dhsa import hf
        from dhsa.evaluation import runner, texts
        from dhsa.evaluation.engine import Engine

        self.engine = Engine(model, tokenizer)
        self.facts = hf.model_facts(model)
        self.made_by = {
            "model": runner.identity(source),
            "dtype": args.dtype,
            "isa": dhsa.build_info()["isa"],
            "threads": dhsa.get_num_threads(),
        }
        self.versions = {
            "dhsa": dhsa.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        self.build = runner.build_hash()
        with step("reading the text"):
            choice, others = texts.halves(_texts(args, self.engine))  # no text is in both
            self.known = self._documents(choice, args.length, args.documents)
            self.short = self._documents(choice, min(SHORT, args.length), args.documents)
            self.judges = self._documents(others, args.length, args.held_out) if args.held_out else []
        self._read: dict[str, Any] = {}  # what dense attention gave for a document
        self.tuned: list[int] = []  # the layers in which something can be left out
        self.configs: dict[str, Config] = {}  # by the names of candidates
        self.names: list[str] = []  # of those that are measured or interpolated

    def _documents(self, groups: Any, length: int, count: int) -> list[_Document]:
        from dhsa.evaluation import texts
        from dhsa.evaluation.runner import prompt_hash

        found = texts.documents(self.engine, groups, length, count=count, join=self.args.join or self.args.text is None)
        if len(found) < count:
            raise UserError(
                f"--text: {len(found)} documents of {length:,} tokens, {count} are needed; lower --length, --documents "
                "or --held-out, or give more text"
            )
        return [_Document(d.name, d.ids, prompt_hash(d.ids)) for d in found]

    def _key(self, stage: str, document: _Document, **others: Any) -> str:
        from dhsa.evaluation.store import digest

        about = {**self.made_by, "version": VERSION, "build": self.build, "stage": stage, "document": document.hash}
        return digest(about | others)

    # ---- measurements ------------------------------------------------------------------------------------------------

    def _layers(
        self, stage: str, document: _Document, layers: Sequence[int], measure: Callable[..., None], **others: Any
    ) -> dict[int, dict[str, Any]]:
        """Return {layer: what `measure` found}, measuring what is missing in the store."""
        keys = {layer: self._key(stage, document, layer=layer, **others) for layer in layers}
        missing = [layer for layer in layers if keys[layer] not in self.store]
        if missing:
            with self.step(f"{stage}: {document.name}, {len(missing)} layers", total=len(missing)) as advance:

                def keep(layer: int, found: dict[str, Any]) -> None:
                    self.store.add({"key": keys[layer], "stage": stage, "layer": layer, "found": found})
                    advance()

                measure(missing, keep)
        return {layer: self.store.rows[key]["found"] for layer, key in keys.items() if key in self.store}

    def _candidates(
        self, stage: str, document: _Document, layers: Sequence[int], candidates: Mapping[str, Config]
    ) -> dict[int, dict[str, Any]]:
        from dhsa.evaluation.settings import Setting
        from dhsa.tuning.measure import candidates_of_layers

        def measure(missing: Sequence[int], keep: Callable[..., None]) -> None:
            candidates_of_layers(self.engine, document.ids, candidates, missing, keep)

        fields = {name: Setting(name, config).fields() for name, config in candidates.items()}
        return self._layers(stage, document, layers, measure, candidates=fields)

    def _importance(self, document: _Document, layers: Sequence[int]) -> dict[int, dict[str, Any]]:
        from dhsa.evaluation.settings import Setting
        from dhsa.tuning.candidates import probe
        from dhsa.tuning.measure import importance

        def measure(missing: Sequence[int], keep: Callable[..., None]) -> None:
            importance(self.engine, document.ids, missing, keep)

        fields = Setting("probe", probe(len(document.ids))).fields()
        return self._layers("importance of layers", document, layers, measure, probe=fields)

    def _whole(self, configs: Config | LayerConfigs, documents: Sequence[_Document], what: str) -> Option:
        """Return (mean KL, seconds as a share of dense attention's) of configs on documents."""
        rows = self._rows(configs, documents, what)
        seconds = sum(row["seconds"] for row in rows) / sum(row["dense_seconds"] for row in rows)
        return Option(statistics.fmean(row["kl"] for row in rows), seconds)

    def _rows(
        self, configs: Config | LayerConfigs, documents: Sequence[_Document], what: str
    ) -> list[dict[str, float]]:
        from dhsa.evaluation.settings import Setting
        from dhsa.tuning.measure import read, whole

        fields = Setting(what, configs).fields()
        keys = [self._key("configs", document, config=fields, layers=self.tuned) for document in documents]
        missing = [(key, document) for key, document in zip(keys, documents, strict=True) if key not in self.store]
        if missing:
            with self.step(f"{what}: {len(missing)} documents", total=len(missing)) as advance:
                for key, document in missing:
                    if document.hash not in self._read:
                        self._read[document.hash] = read(self.engine, document.ids)
                    found = whole(self.engine, document.ids, self._read[document.hash], configs, self.tuned)
                    self.store.add({"key": key, "stage": "configs", "what": what, "found": found})
                    advance()
        return [self.store.rows[key]["found"] for key in keys]

    # ---- the choice --------------------------------------------------------------------------------------------------

    def result(self) -> tuple[LayerConfigs, Any]:
        """Return the configs, with notes of how they were found, and a table for the terminal."""
        layers = self._measured()
        found = self._search(layers)
        notes = self._notes(found)
        return dataclasses.replace(found.configs, notes=notes), _table(notes)

    def _measured(self) -> dict[int, dict[str, Option]]:
        """Return {layer: {name of a candidate: what it does}} for the layers in which something can be left out."""
        from dhsa.tuning import candidates

        first, *_ = self.known
        length, depth = len(first.ids), self.engine.depth
        families, sizes = candidates.families(), candidates.budgets(length)
        if self.args.dense_or_sparse is not None:
            families, sizes = families[:1], [self.args.dense_or_sparse]
        self.configs = {_name(config, size): config.replace(**_fitting(size)) for config in families for size in sizes}
        of = {name: name.rpartition(" ")[0] for name in self.configs}  # the family of each
        screened = sorted({round(i * (depth - 1) / (SCREENED - 1)) for i in range(SCREENED)})
        two = [sizes[len(sizes) // 3], sizes[-2]] if len(sizes) > 2 else sizes[:1]
        some = {name: self.configs[name] for name in self.configs if int(name.rpartition(" ")[2]) in two}
        rows = self._candidates("all families", first, screened, some)
        times = _times(rows.values(), some)
        points = {
            family: [
                (row["candidates"][name][0], times[row["window"], name])
                for row in rows.values()
                for name in (f"{family} {size}" for size in two)
                if all(f"{other} {name.rpartition(' ')[2]}" in row["candidates"] for other in set(of.values()))
            ]
            for family in dict.fromkeys(of.values())
        }
        good = set(kept(points, KEPT))
        good.add(_name(families[0], 0).rpartition(" ")[0])  # the default, to compare with
        measured = {name: config for name, config in self.configs.items() if of[name] in good}
        found = [self._candidates("candidates", document, range(depth), measured) for document in self.known]
        self.tuned = [layer for layer in range(depth) if all(rows.get(layer, {}).get("candidates") for rows in found)]
        if not self.tuned:
            raise UserError(f"--length: nothing can be left out of {length:,} tokens in any layer of this model")
        weights = [self._importance(document, self.tuned) for document in self.short]
        return self._options(found, _weights(weights, self.tuned), measured, of, sizes)

    def _options(
        self,
        found: list[dict[int, dict[str, Any]]],
        weights: dict[int, float],
        measured: Mapping[str, Config],
        of: Mapping[str, str],
        sizes: Sequence[int],
    ) -> dict[int, dict[str, Option]]:
        from dhsa.tuning import candidates

        windows = {layer: found[0][layer]["window"] for layer in self.tuned}
        seconds = _times([rows[layer] for rows in found for layer in self.tuned], measured)
        layers: dict[int, dict[str, Option]] = {}
        for layer in self.tuned:
            window = windows[layer]
            made = {EXACT_NAME: Option(0.0, seconds[window, EXACT_NAME])}
            for name in measured:
                if errors := [
                    rows[layer]["candidates"][name][0] for rows in found if name in rows[layer]["candidates"]
                ]:
                    made[name] = Option(weights[layer] * statistics.fmean(errors), seconds[window, name])
            for family in sorted({of[name] for name in measured}):
                for less, more in pairwise(sizes):
                    a, b = made.get(f"{family} {less}"), made.get(f"{family} {more}")
                    size = candidates.between(less, more)
                    if a is not None and b is not None and window is None:
                        name = f"{family} {size}"
                        self.configs[name] = self.configs[f"{family} {less}"].replace(**_fitting(size))
                        made[name] = Option(math.sqrt(a.kl * b.kl), math.sqrt(a.seconds * b.seconds))
            layers[layer] = made
        self.names = [name for name in self.configs if any(name in made for made in layers.values())]
        return layers

    def _search(self, layers: dict[int, dict[str, Option]]) -> _Found:
        """Return the best configs.

        What is measured as a whole corrects the estimates: the sum of what the layers add, and the seconds, each by a
        factor.
        """
        of = [layers[layer] for layer in self.tuned]
        exact = sum(made[EXACT_NAME].seconds for made in of)
        scale, speed = 1.0, 1.0
        best: tuple[LayerConfigs, Option] | None = None
        seen: set[tuple[str, ...]] = set()
        aim = 1.0  # of the target: less, after a config that missed it
        for turn in range(ROUNDS):
            choice = self._chosen(of, exact, aim / scale, aim / speed)
            if choice is None or tuple(choice) in seen:
                break
            seen.add(tuple(choice))
            configs = self._configs_of(layers, choice)
            found = self._whole(configs, self.known, f"choice {turn + 1}")
            if self._good(found) and (best is None or self._better(found, best[1])):
                best = configs, found
            if self._good(found) and self._closeness(found) >= NEAR:
                break
            estimate = total(of, choice)
            if estimate.kl > 0 and found.kl > 0:
                scale = found.kl / estimate.kl
            speed = found.seconds / (estimate.seconds / exact)
            if not self._good(found):
                aim *= 0.97
        single = self._best_single(layers, of, exact, scale, speed)
        if single is not None and self._good(single[1]) and (best is None or self._better(single[1], best[1])):
            best = self._configs_of(layers, [self._in_layer(made, single[0]) for made in of]), single[1]
        if best is None:
            if self.args.time is not None:
                least = min(o.seconds for o in uniform(of, self.names).values()) / exact * speed
                raise UserError(
                    f"--time: no choice takes {self.args.time:g} of dense attention's time at {self.args.length:,} "
                    f"tokens; the least is about {least:.2f}"
                )
            nothing = self._configs_of(layers, [EXACT_NAME] * len(of))
            best = nothing, self._whole(nothing, self.known, "dense attention")
        shares = {
            name: o.seconds / exact * speed for name, o in uniform(of, self.names).items() if name.startswith(DEFAULT)
        }
        near = min(shares, key=lambda name: abs(shares[name] - best[1].seconds))
        return _Found(best[0], single, self.configs[near])

    def _chosen(self, of: Sequence[Mapping[str, Option]], exact: float, kl: float, time: float) -> list[str] | None:
        """Return the choice for the target times `kl` or `time`, which correct the estimates."""
        if self.args.kl is not None:
            return cheapest(of, self.args.kl * kl)
        return closest(of, self.args.time * time * exact)

    def _good(self, found: Option) -> bool:
        return found.kl <= self.args.kl if self.args.kl is not None else found.seconds <= self.args.time

    def _closeness(self, found: Option) -> float:
        return found.kl / self.args.kl if self.args.kl is not None else found.seconds / self.args.time

    def _better(self, found: Option, other: Option) -> bool:
        return found.seconds < other.seconds if self.args.kl is not None else found.kl < other.kl

    def _in_layer(self, made: Mapping[str, Option], name: str) -> str:
        return name if name in made else EXACT_NAME

    def _best_single(
        self,
        layers: dict[int, dict[str, Option]],
        of: Sequence[Mapping[str, Option]],
        exact: float,
        scale: float,
        speed: float,
    ) -> tuple[str, Option] | None:
        """Return the candidate that is best in all layers alike, measured; None if none keeps to the target."""
        estimates = {
            name: Option(o.kl * scale, o.seconds / exact * speed) for name, o in uniform(of, self.names).items()
        }
        good = {name: o for name, o in estimates.items() if self._good(o)}
        if not good:
            return None
        name = min(good, key=lambda n: good[n].seconds if self.args.kl is not None else good[n].kl)
        configs = self._configs_of(layers, [self._in_layer(made, name) for made in of])
        return name, self._whole(configs, self.known, "the best alike in all layers")

    def _configs_of(self, layers: dict[int, dict[str, Option]], choice: Sequence[str]) -> LayerConfigs:
        """Return the configs of a choice; each with the number of keys from which it is faster than exact attention."""
        from dhsa.tuning.candidates import EXACT

        made = {}
        for layer, name in zip(self.tuned, choice, strict=True):
            if name == EXACT_NAME:
                made[layer] = EXACT
                continue
            share = layers[layer][name].seconds / layers[layer][EXACT_NAME].seconds
            least = min(self.args.length, 64 * math.ceil(share * self.args.length / 64))
            made[layer] = self.configs[name].replace(break_even=least)
        return LayerConfigs(default=EXACT, layers=made, model=self.facts)

    def _notes(self, found: _Found) -> dict[str, Any]:
        name = f"default, budget {found.default.budget:,}"
        rows: dict[str, tuple[Config | LayerConfigs, str]] = {
            "tuned": (found.configs, "the result"),
            name: (found.default, f"the {name}"),
        }
        alike = found.alike
        judged = {
            name: self._summary(self._rows(config, self.judges, f"{what}, held out"), self.judges)
            for name, (config, what) in rows.items()
            if self.judges
        }
        return {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": self.versions,
            **self.made_by,
            "length": self.args.length,
            "target": {"kl": self.args.kl} if self.args.kl is not None else {"time": self.args.time},
            "measured": {
                name: self._summary(self._rows(config, self.known, what), self.known)
                for name, (config, what) in rows.items()
            },
            "alike": None if alike is None else {"config": alike[0], "kl": alike[1].kl, "time": alike[1].seconds},
            "held_out": judged,
        }

    def _summary(self, rows: Sequence[Mapping[str, float]], documents: Sequence[_Document]) -> dict[str, Any]:
        return {
            "kl": statistics.fmean(row["kl"] for row in rows),
            "agreement": statistics.fmean(row["agreement"] for row in rows),
            "time": sum(row["seconds"] for row in rows) / sum(row["dense_seconds"] for row in rows),
            "documents": {document.hash: document.name for document in documents},
        }


def _texts(args: argparse.Namespace, engine: Any) -> list[list[tuple[str, str]]]:
    """Return the texts in groups from which documents are drawn in turn: without --text, prose and code."""
    from dhsa.evaluation import texts

    groups = texts.rendered(engine, texts.sources(args.text))
    return groups if args.text is not None else [*groups, commands.library_source()]


def _fitting(budget: int) -> dict[str, int]:
    """Return a budget, and forced keys that fit a budget smaller than the least of the candidates'."""
    fields = {"budget": budget}
    return fields if budget >= 256 else fields | {"sink": budget // 8, "local": budget // 4}


def _name(config: Config, budget: int) -> str:
    """Return the name of a candidate: its family, and its budget at the end."""
    cuts = f"{config.boundaries}-{config.chunk_size}" if config.boundaries == "fixed" else str(config.boundaries)
    rows = config.options.asked().get("rows")
    words = [config.method, cuts, str(config.heads), "rows=auto" if rows is None else f"rows={rows}"]
    if config == Config().replace(budget=config.budget, break_even=0):
        words = [DEFAULT]
    return f"{' '.join(words)} {budget}"


def _times(rows: Collection[Mapping[str, Any]], names: Iterable[str]) -> dict[tuple[int | None, str], float]:
    """Return {(window, name of a candidate or "exact"): seconds in a layer with this window}.

    Layers of one shape take nearly the same time. Candidates are compared with exact attention in the same layer, just
    before them, and the median of these shares is taken, so that what else runs on the machine hardly counts.
    """
    found: dict[tuple[int | None, str], float] = {}
    for window in {row["window"] for row in rows}:
        alike = [row for row in rows if row["window"] == window]
        exact = found[window, EXACT_NAME] = statistics.median(row["exact"] for row in alike)
        for name in names:
            if shares := [r["candidates"][name][1] / r["exact"] for r in alike if name in r["candidates"]]:
                found[window, name] = exact * statistics.median(shares)
    return found


def _weights(found: Sequence[Mapping[int, Mapping[str, float]]], layers: Sequence[int]) -> dict[int, float]:
    """Return {layer: KL for each unit of squared relative error}.

    A layer whose probe changed nothing has the median of the others.
    """
    weights = {}
    for layer in layers:
        kl = sum(rows[layer]["kl"] for rows in found)
        error = sum(rows[layer]["error"] for rows in found)
        if kl > 0 and error > 0:
            weights[layer] = kl / error
    middle = statistics.median(weights.values()) if weights else 1.0
    return {layer: weights.get(layer, middle) for layer in layers}


def _table(notes: Mapping[str, Any]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    target = ", ".join(f"{name} {value:g}" for name, value in notes["target"].items())
    table = Table(title=f"{notes['model']}, {notes['length']:,} tokens in {notes['dtype']}, {target}", box=SIMPLE_HEAD)
    for heading in ("", "documents", "KL from dense", "same likeliest token", "share of dense attention's time"):
        table.add_column(heading, justify="right" if heading else "left")
    for where, title in (("measured", "to measure on"), ("held_out", "held out")):
        for name, row in notes[where].items():
            cells = (f"{row['kl']:.4f}", f"{row['agreement']:.1%}", f"{row['time']:.2f}")
            table.add_row(f"{name}, {title}", str(len(row["documents"])), *cells)
    return table


def _described(configs: LayerConfigs) -> str:
    """Return one line for each Config, with its layers."""
    from dhsa.tuning.candidates import EXACT

    groups: dict[str, list[int]] = {}
    for layer, config in configs.layers.items():
        words = EXACT_NAME if config == EXACT else _name(config.replace(break_even=0), config.budget or 0)
        groups.setdefault(words, []).append(layer)
    return "\n".join(f"layers {', '.join(map(str, layers))}: {words}" for words, layers in groups.items())
