"""Selections by the NumPy definition of any method: its twin over all blocks, batch items and sets of heads. They are
the reference of methods in the core, and what runs of the others.

Forced keys, budgets, exact blocks and windows are the same for all methods and are defined in dhsa/_twin/selection.py.
The scores of a method are defined by `twin` of its class in dhsa/methods/.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dhsa._twin.attention import check
from dhsa._twin.blocks import Block, is_bad, segments_of
from dhsa._twin.scores import boundary_rows, candidates, head_sets
from dhsa._twin.selection import Segments, Selection, is_exact, selection_of, topk
from dhsa.methods import registry

METHODS: dict[str, Callable[[Block], Segments | np.ndarray]] = {name: method.twin for name, method in registry.items()}


def method_blocks(
    method: str,
    q,
    k,
    *,
    boundaries=None,
    budget: int | None = 1024,
    mass: float | None = None,
    floor: int | None = None,
    query_block: int = 64,
    sink: int = 16,
    local: int = 128,
    dense_tail: int = 64,
    heads: str = "group",
    key_block: int | None = None,
    stride: int | None = None,
    pooling: str = "mean",
    rows: int | None = None,
    shortlist: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    causal: bool = True,
    v=None,
    key_scores=None,
    state=None,
    **own: Any,
) -> Iterator[tuple[Block, Segments | np.ndarray | None]]:
    """For every list in CSR order, its Block and the result of the method (None where the block is exact).

    The result is Segments, from which ``topk`` selects, or the list itself. Arguments are those of ``dhsa.Config`` and
    of ``dhsa.select``; boundaries int [B, C + 1] or [C + 1] for the methods of chunks; v for methods that read values;
    key_scores [B, 1, Hkv or H, Lk], in place of the scores of the method; state: of a method that remembers, which is
    read; own: options that only methods in NumPy have.

    Raises NotImplementedError with causal=False for a method that is for causal attention only, TypeError for an
    unknown option.
    """
    kind = registry[method]
    if not causal and not kind.has_both_sides and key_scores is None:
        raise NotImplementedError(f"causal: method {method} selects for causal attention only")
    if unknown := set(own) - set(kind.options()):
        raise TypeError(f"{min(unknown)}: method {method} has no such option")
    if not kind.in_core:  # the options that are arguments above, and those that are not given
        given = {"key_block": key_block, "stride": stride, "rows": rows}
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        own = defaults | {name: value for name, value in given.items() if name in defaults and value is not None} | own
    q, k = np.asarray(q).astype(np.float64), np.asarray(k).astype(np.float64)
    check(q, k)
    q_len, k_len, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    edges = None if boundaries is None else boundary_rows(boundaries, len(q), k_len)
    least = budget if mass is None else sink + local if floor is None else floor
    options = {
        "query_block": query_block, "key_block": 128 if key_block is None else key_block,
        "stride": stride, "pooling": pooling, "softcap": softcap,
        "rows": (max(1, query_block // 4) if method == "hisa" else (query_block + 1) // 2) if rows is None else rows,
        "shortlist": max(4096, 4 * (budget or 0)) if shortlist is None else shortlist,
        "window": window, "causal": causal, "sink": sink, "local": local,
        "scale": q.shape[3] ** -0.5 if scale is None else scale, "budget": budget, "mass": mass,
        "floor": sink + local if floor is None else floor,
        **own,
    }  # fmt: skip
    v = None if v is None else np.asarray(v).astype(np.float64)
    scores = None
    if key_scores is not None:
        scores = np.asarray(key_scores).astype(np.float64)
        scores = np.repeat(scores, q.shape[1] // scores.shape[1], axis=1)
    rule = "block" if method == "dhsa" and key_scores is None else "rows"
    for b in range(len(q)):
        if edges is not None:
            options = {**options, "edges": edges[b]}
        sets = head_sets(heads, q.shape[1], k.shape[1])
        for at, members in enumerate(sets):
            kv = slice(members[0] // group, members[-1] // group + 1)
            heads_of_set = slice(members[0], members[-1] + 1)
            memo: dict[Any, Any] = {}
            for i in range(-(-q_len // query_block)):
                exact = is_exact(i, q_len, k_len, query_block, least, dense_tail, window, causal)
                lo, end = candidates(i, q_len, k_len, query_block, window, "rows" if exact else rule, causal)
                room = end - lo if exact or budget is None else min(budget, end - lo)
                begin = i * query_block
                here = Block(
                    q[b, heads_of_set], k[b, kv], i, begin, min(begin + query_block, q_len), k_len - q_len + begin,
                    lo, end, room, q[b, kv.start * group : kv.stop * group], options, None if v is None else v[b, kv],
                    memo, at, len(sets), b, state,
                )  # fmt: skip
                if exact:
                    yield here, None
                elif scores is not None:
                    of_keys = scores[b, heads_of_set, :end].sum(axis=0)
                    yield here, segments_of(np.arange(end + 1), is_bad(here), of_keys, of_keys)
                else:
                    with np.errstate(invalid="ignore", over="ignore"):
                        yield here, METHODS[method](here)


def method_lists(method: str, q, k, *, query_block: int = 64, state=None, **options: Any) -> Selection:
    """The selection of a method: ``method_blocks`` and then ``topk``; arguments as there. The state is updated."""
    lists = []
    if state is not None:
        q, k = np.asarray(q).astype(np.float64), np.asarray(k).astype(np.float64)
        state.open(q, k)
        options["state"] = state
    for here, found in method_blocks(method, q, k, query_block=query_block, **options):
        if found is None:
            found = np.arange(here.lo, here.end)
        elif isinstance(found, Segments):
            bounds = {name: here.options[name] for name in ("sink", "local", "mass")}
            found = topk(
                found, here.lo, here.end, budget=here.room, floor=options.get("floor"), middle=here.middle, **bounds
            )
        lists.append(found)
    q_len, k_len = np.shape(q)[2], np.shape(k)[2]
    sets = len(head_sets(options.get("heads", "group"), np.shape(q)[1], np.shape(k)[1]))
    edges = options.get("boundaries")
    edges = None if edges is None else boundary_rows(edges, len(q), k_len)
    shape = (len(q), sets, -(-q_len // query_block))
    made = selection_of(lists, shape, query_block, q_len, k_len, edges, options.get("causal", True))
    if state is not None:
        state.update(q, k, made, options)
    return made
