"""Reads the shared reference vectors and says what agreement with them means.

Responsible for turning each file into named cases (inputs shaped for the public API, expected results) and for the
comparison of selected keys; which code is run on them is up to the tests. Without the vectors the tests are skipped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "vectors"


@dataclass(frozen=True)
class Case:
    """One case: ``inputs`` are arrays and keywords as the API names them, ``expected`` what must come out."""

    name: str
    inputs: dict[str, Any]
    expected: dict[str, Any]


def params(kind: str) -> list:
    """pytest parameters, a Case each, of "select", "predict", "label" or "attend"; a skipped one if there are none."""
    files = sorted(FOLDER.glob(f"{kind}_*.npz"))
    if kind == "select":  # attend files carry a selection of their own, with fewer KV heads than query heads
        files += sorted(FOLDER.glob("attend_*.npz"))
    if not files:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no reference vectors in {FOLDER}"))]
    return [pytest.param(_READERS[kind](path), id=path.stem) for path in files]


def _load(path: Path) -> dict[str, Any]:
    with np.load(path) as data:
        return {key: data[key].item() if data[key].ndim == 0 else data[key] for key in data.files}


def _window(value: int) -> int | None:
    return None if value < 0 else int(value)


def _select(path: Path) -> Case:
    """inputs: q, k [1, H, L, D] fp32, boundaries int32 [1, C + 1], query_block, budget, local, window, pooling.

    Block score, one selection for all heads, no sinks, no dense tail. expected: indices, see ``check_indices``.
    """
    z = _load(path)
    pooling = {"avgpool": "mean", "avgpool_norm": "mean_sqrt"}[z.get("pooling", "avgpool_norm")]
    return Case(
        path.stem,
        {
            "q": z["q"][None].astype(np.float32),
            "k": z["k"][None].astype(np.float32),
            "boundaries": z["boundaries"][None].astype(np.int32),
            "query_block": z["block"],
            "budget": z["budget"],
            "local": z["local"],
            "window": _window(z["window"]),
            "pooling": pooling,
        },
        {"indices": z["indices"]},
    )


def _predict(path: Path) -> Case:
    """inputs: k [1, Hkv, L, D] fp32, weights by name, heads, window, num_chunks, theta, nms, instruction.

    expected: logits [L], boundaries.
    """
    z = _load(path)
    weights = {key[3:].replace("__", "."): value for key, value in z.items() if key.startswith("w__")}
    return Case(
        path.stem,
        {
            "k": z["key"][None],
            "weights": weights,
            "heads": z["heads"],
            "window": z["window"],
            "num_chunks": z["num_chunks"],
            "theta": z["theta"],
            "nms": z["nms"],
            "instruction": _window(z["instruction"]),
        },
        {"logits": z["logits"], "boundaries": z["boundaries"]},
    )


def _label(path: Path) -> Case:
    """inputs: attn [L, L], window, sliding_window; expected: ratios float64 [L]."""
    z = _load(path)
    sliding = int(z["sliding_window"]) if z["sliding"] else None
    return Case(
        path.stem, {"attn": z["attn"], "window": z["window"], "sliding_window": sliding}, {"ratios": z["ratios"]}
    )


def _attend(path: Path) -> Case:
    """inputs: q [1, H, L, D], k, v [1, Hkv, L, D] fp32, indptr, indices, shape, query_block, scale, window.

    One list for all heads, padding removed. expected: out [1, H, L, D], lse [1, H, L], float64.
    """
    z = _load(path)
    length = z["q"].shape[1]
    rows = [np.unique(row[row < min(length, (i + 1) * z["block"])]) for i, row in enumerate(z["indices"])]
    return Case(
        path.stem,
        {
            **{name: z[name][None].astype(np.float32) for name in "qkv"},
            "indptr": np.cumsum([0] + [len(row) for row in rows]).astype(np.int64),
            "indices": np.concatenate(rows).astype(np.int32),
            "shape": (1, 1, len(rows)),
            "query_block": z["block"],
            "scale": z["scale"],
            "window": _window(z["window"]),
        },
        {"out": z["out"][None], "lse": z["lse"][None]},
    )


_READERS = {"select": _select, "predict": _predict, "label": _label, "attend": _attend}


def check_indices(case: Case, indptr, indices) -> None:
    """Asserts that a selection (CSR of one batch row and one head set) is a select case's.

    Blocks whose prefix is no longer than the budget must be taken whole (the vectors pad these). Elsewhere the keys
    must be the expected ones, but for the choice inside one chunk that only partly fits.
    """
    expected, edges = case.expected["indices"], case.inputs["boundaries"][0]
    budget, block, length = case.inputs["budget"], case.inputs["query_block"], case.inputs["k"].shape[2]
    assert len(indptr) == len(expected) + 1
    for i, row in enumerate(expected):
        keys = np.asarray(indices[indptr[i] : indptr[i + 1]])
        end = min((i + 1) * block, length)
        assert (np.diff(keys) > 0).all(), f"{case.name} block {i}: indices not ascending and unique"
        if end <= budget:
            np.testing.assert_array_equal(keys, np.arange(end), err_msg=f"{case.name} block {i}")
            continue
        wanted = np.unique(row[row < end])
        assert len(keys) == len(wanted), f"{case.name} block {i}: {len(keys)} keys, expected {len(wanted)}"
        differing = np.setxor1d(keys, wanted)
        chunks = np.unique(np.searchsorted(edges, differing, side="right") - 1)
        assert len(chunks) <= 1, f"{case.name} block {i}: differs in chunks {chunks}, keys {differing}"


def check_follows_scores(selection, scores, edges, *, end_of, sink: int, local: int, tol: float = 0.0) -> None:
    """Asserts that no key left out scores higher, by more than tol, than one freely chosen.

    scores [B, S, nq, C] (-inf: no candidate key), edges int [B, C + 1], ``end_of(i)`` the end of block i's candidates.
    Independent of how a selector ranks, so it also serves where rounding may swap near ties.
    """
    batch, sets, blocks = selection.shape
    for b in range(batch):
        of = np.searchsorted(edges[b], np.arange(edges[b][-1]), side="right") - 1
        for s in range(sets):
            for i in range(blocks):
                r = (b * sets + s) * blocks + i
                keys = selection.indices[selection.indptr[r] : selection.indptr[r + 1]]
                end = end_of(i)
                free = keys[(keys >= sink) & (keys < end - local)]
                left = np.setdiff1d(np.arange(end), keys)
                if len(free) and len(left):
                    worst, best = scores[b, s, i, of[free]].min(), scores[b, s, i, of[left]].max()
                    assert worst >= best - tol, f"row {(b, s, i)}: took {worst}, left {best}"
