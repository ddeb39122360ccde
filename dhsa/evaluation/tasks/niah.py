"""niah: a needle in a haystack. A fact is hidden at some depth of a long text; the prompt ends where the wording of the
fact begins again, and the model has to complete it. With a chat template, the user asks for this, and the wording of
the fact is the beginning of the model's answer.

One prefill of prompt and answer gives two measurements. The first is the difference of the answer's log-likelihood to
that of dense attention. The second is `found`: greedy decoding gives the answer exactly if each of its tokens is the
most likely one after those before it, so no decoding is needed. The queries of the answer are sparse too, which is
stricter than decoding, where they see every key; `--generate` decodes as well.

Source: the test is Greg Kamradt's; needles and questions are this project's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dhsa.evaluation import report
from dhsa.evaluation.haystack import Haystack
from dhsa.evaluation.pairing import estimate, paired
from dhsa.evaluation.prompts import Frame
from dhsa.evaluation.settings import Setting
from dhsa.evaluation.tasks import Context, Item

DENSE = True
VERSION = 1

_INSTRUMENTS = ["bassoon", "harp", "oboe", "cello", "banjo", "tuba", "zither", "harmonica", "trombone", "mandolin"]
_CITIES = ["Lisbon", "Nairobi", "Quito", "Oslo", "Hanoi", "Tunis", "Bergen", "Lima", "Dakar", "Porto"]
_METALS = ["copper", "silver", "golden", "iron", "bronze", "marble", "wooden", "crystal"]
_THINGS = ["lantern", "anchor", "feather", "compass", "violin", "ladder", "mirror", "kettle"]

_ASKED = "How does this sentence from the text above end? {}"


def _digits(rng: random.Random) -> str:
    return str(rng.randrange(10000, 100000))


# (kind, needle, question, value): each key takes the next kind, with its own value.
KINDS = (
    ("pass key", "The pass key is {}. Remember it. {} is the pass key.", "The pass key is", _digits),
    (
        "instrument",
        "Dorothea's favourite instrument has always been the {}.",
        "Dorothea's favourite instrument has always been the",
        lambda rng: rng.choice(_INSTRUMENTS),
    ),
    (
        "ship",
        "The ship Marianne sails under the registration number {}.",
        "The ship Marianne sails under the registration number",
        _digits,
    ),
    (
        "city",
        "The treasure of Captain Orlov lies buried near {}.",
        "The treasure of Captain Orlov lies buried near",
        lambda rng: rng.choice(_CITIES),
    ),
    (
        "words",
        "The secret words of the vault are {}.",
        "The secret words of the vault are",
        lambda rng: f"{rng.choice(_METALS)} {rng.choice(_THINGS)}",
    ),
)


def items(context: Context) -> list[Item]:
    args, engine = context.args, context.engine
    haystack, frame = Haystack(engine, context.groups, max(args.lengths["niah"])), Frame(engine)
    made = []
    for length in args.lengths["niah"]:
        for number in range(args.keys):
            kind, needle, question, draw = KINDS[number % len(KINDS)]
            value = draw(random.Random(f"niah {number}"))
            answer = engine.encode(f" {value}")
            said, begun = (_ASKED.format(question), question) if frame.chat else (question, "")
            tail = frame.tail(f"\n\n{said}", begun)
            # Another part of the text for every key, the same for all depths, so that depths differ in nothing else.
            start = number * len(haystack.sentences) // args.keys
            for step in range(args.depths):
                depth = (step + 0.5) / args.depths
                needle_at = (depth, " " + needle.replace("{}", value))
                ids = haystack.prompt(length, [needle_at], frame.head(), tail, start)
                facts = {"length": length, "depth": depth, "kind": kind, "answer": value}
                if args.generate:
                    facts["generate"] = True
                made.append(Item(f"{length}/{depth:.0%}/{number}", ids, facts, answer))
    return made


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    whole = item.ids + item.data
    for setting in settings:
        hidden, work = engine.prefill(whole, setting)
        values, best = engine.likelihood(hidden, whole, len(item.ids), best=True)
        facts = {"loglik": float(values.sum()), "found": bool(best.all()), **work}
        if item.facts.get("generate"):
            text, _ = engine.generate(item.ids, setting, len(item.data))
            facts |= {"text": text, "said": text.strip().startswith(item.facts["answer"])}
        yield setting, facts


def tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for length, some in [("all lengths", rows), *report.grouped(rows, "length")]:
        if length != "all lengths" and len({r["length"] for r in rows}) < 2:
            continue
        title = length if isinstance(length, str) else f"{length:,} tokens"
        lines += [f"### Needles, {title}", "", *_found(some)]
        if isinstance(length, str):
            lines += report.duels_by_budget(
                some,
                "loglik",
                "mean log-likelihood of the answer in nats, row minus column; bold beyond twice its standard error, "
                "positive where the row is better.",
            )
    return lines


def _found(rows: list[dict[str, Any]]) -> list[str]:
    dense = {r["item"]: r for r in rows if r["method"] == "dense"}
    likely = {name: r["loglik"] for name, r in dense.items()}
    body = []
    for (given, method), same in report.grouped(rows, "given", "method"):
        found = {r["item"] for r in same if r["found"]}
        theirs = {name for name in (r["item"] for r in same) if name in dense and dense[name]["found"]}
        cells = [method, given or "all", f"{len(found)} of {len(same)}", f"{len(found & theirs)} of {len(theirs)}"]
        if any("said" in r for r in same):
            cells[2] += f" ({sum(r.get('said', False) for r in same)} said)"
        cells.append(report.number(estimate([r["loglik"] for r in same]).mean))
        diff = paired({r["item"]: r["loglik"] for r in same}, likely)
        cells.append("0" if method == "dense" else report.shown(diff))
        body.append([*cells, *report.work_cells(same)])
    head = ["method", "budget", "found", "of those dense finds", "log-likelihood", "less dense's, nats"]
    return report.markdown([*head, *report.WORK], body)


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    from dhsa.evaluation import pictures as draw

    plain = [r for r in rows if r["method"] == "dense"]
    dense = {r["item"]: r["loglik"] for r in plain}
    made = []
    for given, same in report.grouped([r for r in rows if r["method"] != "dense"], "given"):
        panels: dict[str, dict[tuple[float, int], tuple[float, str]]] = {}
        for (method, depth, length), few in report.grouped(plain + same, "method", "depth", "length"):
            diff = paired({r["item"]: r["loglik"] for r in few}, dense)
            found = f"{sum(r['found'] for r in few)}/{len(few)}"
            panels.setdefault(method, {})[depth, length] = (min(diff.mean, 0.0), found)
        name = given.replace(",", "").replace(" ", "_").replace("<=", "to")
        title = f"Needles at {report.budget_words(given)}: found (in the cells), log-likelihood against dense"
        made.append(draw.heatmaps(panels, folder / f"niah_{name}.png", title, "log-likelihood less dense's, nats"))
    return made
