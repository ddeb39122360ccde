"""Reference methods of selection: what each one scores, for one block of queries and one set of heads.

Responsible for units and their scores alone; forced keys, budgets, exact blocks and windows are the same for all and
lie in _selection.py. A method is one function here, entered in METHODS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dhsa._twin import blocks as _peers
from dhsa._twin.attention import check, softmax
from dhsa._twin.scores import block_scores, boundary_rows, candidates, chunk_means, head_sets, row_scores
from dhsa._twin.selection import Selection, Units, is_exact, selection_of, take


class Block(NamedTuple):
    """What a method may look at to score units for one query block and the heads of one set, all float64."""

    q: np.ndarray  # [Hs, Lq, D]: all queries of the set's heads
    k: np.ndarray  # [Hkvs, Lk, D]: all keys of their KV heads; head h reads k[h * Hkvs // Hs]
    index: int  # of the query block
    begin: int  # its queries are q[:, begin:stop] ...
    stop: int
    start: int  # ... at positions from this one on
    lo: int  # its candidates are keys [lo, end)
    end: int
    room: int  # the most keys of its list, forced ones counted
    group_q: np.ndarray  # [Hg, Lq, D]: all queries of the heads that read k, be they of the set or not
    options: dict[str, Any]  # of method_lists, None replaced by what it stands for; "edges": chunks of the batch row

    @property
    def queries(self) -> np.ndarray:
        """[Hs, n, D]: the block's own."""
        return self.q[:, self.begin : self.stop]

    def keys_of(self, h: int) -> np.ndarray:
        """[Lk, D]: the keys that head h of the set reads."""
        return self.k[h * len(self.k) // len(self.q)]


def _scored(edges, finite, score, mass=None) -> Units:
    """Units of which those without a finite key are to be taken in any case."""
    if mass is not None:
        mass = np.where(finite, mass, 0.0)
    return Units(edges, np.where(finite, score, np.inf), mass)


# The coarse look of "rows": chunks of what it scores, units of a group, and how many times fewer rows.
UNIT, UNITS_OF_GROUP, COARSER = 4, 4, 8


def _row_scores(block: Block, edges, rows: int, by_length: bool, live):
    """Row scores, mass and finite means of chunks ``edges``, 0 and True where not live; by_length of rounded means."""
    o = block.options
    score, mass, finite = np.zeros(len(live)), np.zeros(len(live)), np.ones(len(live), bool)
    means = chunk_means(block.k[None, :, : block.end], edges)[0]
    score[live], mass[live], finite[live] = row_scores(
        block.queries, means[:, live], rows, o["query_block"], o["scale"], o["softcap"], range(len(block.q)),
        len(block.q) // len(block.k), by_length, np.diff(edges)[live] if by_length else None,
    )  # fmt: skip
    return score, mass, finite


def _shortlist(block: Block, cuts: np.ndarray) -> np.ndarray:
    """Which chunks a coarse look leaves: whole groups of 16, as good as the best of their four units."""
    o = block.options
    groups = np.append(cuts[:-1][:: UNIT * UNITS_OF_GROUP], cuts[-1])
    edges = np.minimum(np.append(cuts[:-1][::UNIT], cuts[-1]), block.end)
    live = np.maximum(edges[:-1], block.lo) < edges[1:]
    score, _, finite = _row_scores(block, edges, -(-o["rows"] // COARSER), True, live)
    score[~finite], score[~live] = np.inf, -np.inf
    best = np.maximum.reduceat(score, np.arange(0, len(score), UNITS_OF_GROUP))
    best[(groups[:-1] < o["sink"]) | (groups[1:] > block.end - o["local"])] = np.inf
    keys = np.maximum(np.minimum(groups[1:], block.end) - np.maximum(groups[:-1], block.lo), 0)
    chosen, held = np.zeros(len(best), bool), 0
    for g in np.lexsort((-np.arange(len(best)), -best)):
        if held < o["shortlist"] and keys[g] > 0:
            chosen[g], held = True, held + keys[g]
    return np.repeat(chosen, UNIT * UNITS_OF_GROUP)[: len(cuts) - 1]


def rows(block: Block) -> Units:
    """Row scores on chunks, see ``chunk_scores``, by_length of means rounded to bf16; the mass of a chunk is the sum of
    its row probabilities. With more candidates than ``shortlist``, only chunks on one are scored (not with ``mass``).
    """
    o = block.options
    edges = np.minimum(o["edges"], block.end)  # a chunk that straddles the block's end is cut there
    candidate = np.maximum(edges[:-1], block.lo) < edges[1:]
    live = candidate.copy()
    if 0 < o["shortlist"] < block.end - block.lo and o["mass"] is None:
        live &= _shortlist(block, o["edges"]) | (edges[1:] < o["edges"][1:])
    score, mass, _ = _row_scores(block, edges, o["rows"], o["by_length"], live)
    finite = np.isfinite(chunk_means(block.k[None, :, : block.end], edges)[0]).all(axis=(0, 2))
    score[~live] = -np.inf
    score[~finite & candidate], mass[~finite] = np.inf, 0.0
    return Units(edges, score, mass)


def dhsa(block: Block) -> Units:
    """The paper's score on chunks, see ``chunk_scores``."""
    o = block.options
    edges = o["edges"]
    live = np.maximum(edges[:-1], block.lo) < np.minimum(edges[1:], block.end)
    score = np.full(len(live), -np.inf)
    means = chunk_means(block.k[None], edges)[0]
    value, finite = block_scores(
        block.queries, means[:, live], np.diff(edges)[live], o["pooling"], range(len(block.q)),
        len(block.q) // len(block.k),
    )  # fmt: skip
    score[live] = np.where(finite, value, np.inf)
    return Units(edges, score)


def window(block: Block) -> Units:
    """No scores at all: of equal units the recent ones are taken first."""
    return Units(np.array([0, block.end]), np.zeros(1))


def fixed_blocks(block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of the ``key_block`` blocks of keys that hold candidates, cut at the end, their mean keys [Hkvs, C, D] and
    which are finite [Hkvs, C]."""
    size = block.options["key_block"]
    edges = np.append(np.arange(block.lo // size * size, block.end, size), block.end)
    means = np.stack([block.k[:, a:b].mean(axis=1) for a, b in itertools.pairwise(edges)], axis=1)
    return edges, means, np.isfinite(means).all(axis=2)


def logits(products: np.ndarray, options: dict[str, Any]) -> np.ndarray:
    """Products of queries and keys, scaled and softcapped."""
    s = options["scale"] * products
    return s if options["softcap"] is None else options["softcap"] * np.tanh(s / options["softcap"])


def block(block: Block) -> Units:
    """Fixed blocks of keys: per head a softmax of the mean query over the mean keys, summed over heads.

    The mean of the last block is of the keys up to the query block's end. A block without a finite mean is taken in any
    case and left out of the softmax of its KV head; a mean query that is not finite says nothing.
    """
    edges, means, finite = fixed_blocks(block)
    mass = np.zeros(len(edges) - 1)
    for h, query in enumerate(block.queries.mean(axis=1)):
        kv = h * len(block.k) // len(block.q)
        if np.isfinite(query).all() and finite[kv].any():
            mass[finite[kv]] += softmax(logits(means[kv][finite[kv]] @ query, block.options), axis=0)
    return _scored(edges, finite.all(axis=0), mass, mass)


def power(block: Block) -> Units:
    """Blocks of ``query_block`` keys, counted back from the query block itself (distance 0), in the order of how many
    hops of power-of-two length their distance takes; of equal ones the nearer come first."""
    size = block.options["query_block"]
    most = -(-block.start // size)
    distance = np.arange(most, -1, -1)
    edges = np.append(np.maximum(block.start - distance * size, 0), block.end)
    return Units(edges, -np.array([int(d).bit_count() for d in distance], np.float64))


METHODS: dict[str, Callable[[Block], Units | np.ndarray]] = {
    "rows": rows,
    "dhsa": dhsa,
    "window": window,
    "block": block,
    "power": power,
    "vertical_slash": _peers.vertical_slash,
    "xattention": _peers.xattention,
    "proxy": _peers.proxy,
    "hisa": _peers.hisa,
    "oracle": _peers.oracle,
}


def method_blocks(
    method: str,
    q,
    k,
    *,
    boundaries=None,
    budget: int | None = 2048,
    mass: float | None = None,
    floor: int | None = None,
    query_block: int = 64,
    sink: int = 16,
    local: int = 128,
    dense_tail: int = 64,
    heads: str = "group",
    key_block: int = 128,
    stride: int | None = None,
    pooling: str = "mean",
    rows: int | None = None,
    by_length: bool = True,
    shortlist: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Iterator[tuple[Block, Units | np.ndarray | None]]:
    """Every list in CSR order: its Block and what the method makes of it (None where the block is exact).

    A method gives Units, from which ``take`` picks, or the list itself. Arguments are those of ``dhsa.Config`` and of
    ``dhsa.select``; boundaries int [B, C + 1] or [C + 1] for the methods of chunks.
    """
    q, k = np.asarray(q).astype(np.float64), np.asarray(k).astype(np.float64)
    check(q, k)
    q_len, k_len, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    edges = None if boundaries is None else boundary_rows(boundaries, len(q), k_len)
    options = {
        "query_block": query_block, "key_block": key_block, "stride": stride, "pooling": pooling, "softcap": softcap,
        "rows": max(1, query_block // (2 if by_length else 4)) if rows is None else rows, "by_length": by_length,
        "shortlist": max(8192, 4 * (budget or 0)) if shortlist is None else shortlist,
        "window": window, "sink": sink, "local": local,
        "scale": q.shape[3] ** -0.5 if scale is None else scale, "budget": budget, "mass": mass,
    }  # fmt: skip
    least = budget if mass is None else sink + local if floor is None else floor
    rule = "block" if method == "dhsa" else "rows"
    for b in range(len(q)):
        if edges is not None:
            options = {**options, "edges": edges[b]}
        for members in head_sets(heads, q.shape[1], k.shape[1]):
            kv = slice(members[0] // group, members[-1] // group + 1)
            for i in range(-(-q_len // query_block)):
                exact = is_exact(i, q_len, k_len, query_block, least, dense_tail, window)
                lo, end = candidates(i, q_len, k_len, query_block, window, "rows" if exact else rule)
                room = end - lo if exact or budget is None else min(budget, end - lo)
                begin = i * query_block
                here = Block(
                    q[b, list(members)], k[b, kv], i, begin, min(begin + query_block, q_len), k_len - q_len + begin,
                    lo, end, room, q[b, kv.start * group : kv.stop * group], options,
                )  # fmt: skip
                with np.errstate(invalid="ignore", over="ignore"):
                    yield here, None if exact else METHODS[method](here)


def method_lists(method: str, q, k, **options: Any) -> Selection:
    """The selection of a method: ``method_blocks`` and then ``take``; arguments as there."""
    lists = []
    for here, found in method_blocks(method, q, k, **options):
        if found is None:
            found = np.arange(here.lo, here.end)
        elif isinstance(found, Units):
            bounds = {name: here.options[name] for name in ("sink", "local", "mass")}
            found = take(found, here.lo, here.end, budget=here.room, floor=options.get("floor"), **bounds)
        lists.append(found)
    size, q_len, k_len = here.options["query_block"], np.shape(q)[2], np.shape(k)[2]
    sets = len(head_sets(options.get("heads", "group"), np.shape(q)[1], np.shape(k)[1]))
    edges = options.get("boundaries")
    edges = None if edges is None else boundary_rows(edges, len(q), k_len)
    return selection_of(lists, (len(q), sets, -(-q_len // size)), size, q_len, k_len, edges)
