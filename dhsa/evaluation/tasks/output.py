"""output: what a selection loses inside each layer, from the queries, keys and values of a dense prefill.

For each layer: the share of dense attention's mass on the selected keys; the relative error of the layer's attention
output (L2); and the agreement with the best possible list, which is the share of the selected keys that are among the
same number of keys with the most mass, without forced keys. It is computed block by block of queries during the dense
prefill, so that neither an L x L matrix nor the tensors of all layers are ever stored.

A list with little mass may still serve the model well, and the reverse. These numbers explain results; `ppl` and `niah`
measure them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import dhsa
from dhsa.commands import UserError
from dhsa.evaluation import report, texts
from dhsa.evaluation.cuts import Cuts
from dhsa.evaluation.engine import refusals
from dhsa.evaluation.pairing import estimate
from dhsa.evaluation.settings import Setting, dense
from dhsa.evaluation.tasks import Context, Item

DENSE = False
VERSION = 1


def items(context: Context) -> list[Item]:
    return texts.document_items(context, "output")


def measure(engine: Any, item: Item, settings: list[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    if shared := [setting for setting in settings if setting.config.share is not None]:
        raise UserError(
            f"--methods: {shared[0].label}: task output looks at each layer on its own, where nothing is shared; "
            "cuts=shared has the boundaries of share=boundaries"
        )
    first = {setting: engine.first_sparse(setting, len(item.ids)) for setting in settings}
    found: dict[Setting, list[dict[str, Any]]] = {setting: [] for setting in settings}
    cuts = {setting: Cuts(setting.cuts) for setting in settings if setting.cuts}

    def layer(index: int, q: Any, k: Any, v: Any, **options: Any) -> None:
        wanted = [s for s in settings if index >= first[s] and (engine.layers is None or index in engine.layers)]
        for setting, facts in losses(q, k, v, {s: s.at(index) for s in wanted}, cuts, **options).items():
            found[setting].append({"layer": index, **facts})

    with _watched(layer):
        engine.prefill(item.ids, dense())
    for setting in settings:
        rows = found[setting]
        seconds = {name: sum(r.pop(name) for r in rows) for name in ("select_seconds", "attend_seconds")}
        density = sum(r["density"] for r in rows) / len(rows) if rows else 1.0
        yield setting, {"layers_seen": rows, "density": density, "sparse_layers": len(rows), **seconds}


@contextmanager
def _watched(layer: Any) -> Iterator[None]:
    """Call layer(index, q, k, v, window=, scale=, softcap=, sinks=) before each attention of implementation "dhsa"."""
    from transformers import AttentionInterface

    from dhsa import hf
    from dhsa.hf.refusals import sinks_in

    def watching(module: Any, q: Any, k: Any, v: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        window = options.get("sliding_window")
        scale = options.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        sinks = sinks_in(q, options.get("s_aux"), options)
        own = {"window": window, "scale": scale, "softcap": options.get("softcap")}
        layer(module.layer_idx, q, k, v, **own, sinks=None if sinks is None else sinks.detach().float())
        return hf.attention_forward(module, q, k, v, mask, *rest, **options)

    AttentionInterface.register(hf.IMPLEMENTATION, watching)
    try:
        yield
    finally:
        AttentionInterface.register(hf.IMPLEMENTATION, hf.attention_forward)


def losses(
    q: Any,
    k: Any,
    v: Any,
    settings: Mapping[Setting, dhsa.Config],
    cuts: Mapping[Setting, Cuts] | None = None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None,
    sinks: Any = None,
) -> dict[Setting, dict[str, float]]:
    """Return {setting: mass, error, agreement, density and seconds} of one layer: q [1, H, L, D], k and v [1, Hkv, L,
    D].

    settings: with their Config in this layer; those that leave nothing out here are missing from the result. `cuts`:
    the boundaries of the settings that have their own, for all layers of a prompt. `sinks` [H] are in the outputs that
    are compared; masses are shares of the attention to keys.
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "window": window}
    exact = dhsa.attention(q, k, v, sinks=sinks, **options).float()
    norm = float(exact.norm())
    made: dict[Setting, dict[str, float]] = {}
    lists: dict[Setting, Any] = {}
    for setting, config in settings.items():
        own = (cuts or {}).get(setting)
        with refusals(setting):
            out, _, stats = (own or dhsa.functional).run(q, k, v, config, sinks=sinks, **options)
        if stats.path != "sparse":
            continue
        made[setting] = {
            "error": float((out.float() - exact).norm()) / norm if norm else 0.0,
            "density": stats.density,
            "select_seconds": stats.select_seconds,
            "attend_seconds": stats.attend_seconds,
        }
        lists[setting] = own.selection if own else dhsa.select(q, k, config, **options)
    for setting, (mass, agreement) in _against_best(q, k, lists, **options).items():
        made[setting] |= {"mass": mass, "agreement": agreement}
    return made


def _against_best(
    q: Any, k: Any, lists: dict[Setting, Any], *, window: int | None, scale: float, softcap: float | None
) -> dict[Setting, tuple[float, float]]:
    """Return {setting: (share of the mass kept, share of the listed keys that are among the best)}."""
    length, heads = q.shape[2], q.shape[1]
    q, k = q[0].float(), k[0].float().repeat_interleave(heads // k.shape[1], 0)
    kept = dict.fromkeys(lists, 0.0)
    shared = dict.fromkeys(lists, 0)
    for size in sorted({s.query_block for s in lists.values()}):
        same = {setting: s for setting, s in lists.items() if s.query_block == size}
        for block in range(-(-length // size)):
            first, last = block * size, min((block + 1) * size, length)
            mass = _block_mass(q[:, first:last], k[:, :last], first, window, scale, softcap)
            for setting, selection in same.items():
                sets, blocks = selection.shape[1:]
                of_set = mass.reshape(sets, heads // sets, last).sum(1)
                for s in range(sets):
                    row = s * blocks + block
                    listed = selection.indices[selection.indptr[row] : selection.indptr[row + 1]]
                    keys = torch.tensor(listed, dtype=torch.int64, device="cpu")
                    kept[setting] += float(of_set[s, keys].sum())
                    best = torch.zeros(last, dtype=torch.bool, device="cpu")
                    best[of_set[s].topk(len(keys)).indices] = True
                    shared[setting] += int(best[keys].sum())
    return {
        setting: (kept[setting] / (length * heads), shared[setting] / len(lists[setting].indices)) for setting in lists
    }


def _block_mass(q: Any, k: Any, first: int, window: int | None, scale: float, softcap: float | None) -> Any:
    """Return float64 [H, keys]: the sum of attention probabilities of a block's queries q [H, n, D], from position
    `first`.
    """
    s = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    position = torch.arange(first, first + q.shape[1], device="cpu")[:, None]
    key = torch.arange(k.shape[1], device="cpu")
    seen = key <= position
    if window is not None:
        seen &= key > position - window
    return s.masked_fill_(~seen, -torch.inf).softmax(-1).sum(1, dtype=torch.float64)


def tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for length, some in report.grouped(rows, "length"):
        lines += [f"### Inside the layers, documents of {length:,} tokens: mass kept / output error / agreement", ""]
        layers = sorted({entry["layer"] for r in some for entry in r["layers_seen"]})
        body = []
        for (given, method), same in report.grouped(some, "given", "method"):
            cells = [method, given]
            for layer in layers:
                seen = [entry for r in same for entry in r["layers_seen"] if entry["layer"] == layer]
                cells.append(
                    " / ".join(
                        report.number(estimate([e[n] for e in seen]).mean) for n in ("mass", "error", "agreement")
                    )
                    if seen
                    else "exact"
                )
            body.append([*cells, *report.work_cells(same)])
        lines += report.markdown(["method", "budget", *(f"layer {layer}" for layer in layers), *report.WORK], body)
    return lines


def pictures(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    return []
