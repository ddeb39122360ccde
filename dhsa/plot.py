"""Pictures of selections.

They show which keys each block of queries sees, how densely the keys were cut into chunks, several methods side by
side, and the tokens of a text, shaded by what a block of queries sees of them or coloured by chunk.

The module draws with matplotlib (extra `demo`), off screen, or writes HTML. It does not select anything.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dhsa._arrays import int_array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dhsa.config import Config
    from dhsa.selection import Selection

__all__ = ["chunks_html", "key_shares", "mass_kept", "plot_methods", "plot_selection", "tokens_html"]

_INK, _QUIET, _PAPER = "#1c2733", "#6b7885", "#fbfaf7"
_UNSEEN = "#ecebe6"  # keys in the future
_LEFT_OUT = "#ffffff"  # keys that could have been selected
_FORCED = (0.64, 0.70, 0.76)  # sink and local keys, selected regardless of scores
_BINS = 512
_STYLES = {  # by the reason why a token is on the list
    "sink": "background:#c3d4e3",
    "local": "background:#cfe0c8",
    "score": "background:#fbc78d",
    "left out": "color:#b4b0a6",
}
_CHUNKS = ("#c3d4e3", "#fbc78d", "#cfe0c8", "#e2cbe4")  # used in turn, so that neighbours differ
_MISSED = ";border-bottom:2px solid #d0342c"


def key_shares(
    selection: Selection, *, batch: int = 0, head: int = 0, bins: int = _BINS
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of each bin of keys that the list of every query block holds.

    Args:
        selection: a `dhsa.Selection`.
        batch: the batch item.
        head: which list of that item, counting the heads (or KV heads, or the one list of all heads) of the selection.
        bins: the most bins. With fewer keys than that, each key has its own bin.

    Returns:
        A tuple of the shares, float32 [nq, n], each from 0 to 1, and the edges, int64 [n + 1]: the first key of each
            bin, and the number of keys.

    Raises:
        IndexError: batch or head is out of range.
        ValueError: bins is below 1.
    """
    lists = _lists(selection, batch, head)
    blocks = len(lists)
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    keys = np.concatenate(lists)
    length = selection.k_len if selection.k_len is not None else int(selection.indices.max(initial=0)) + 1
    edges = np.unique(np.linspace(0, length, min(bins, max(length, 1)) + 1).astype(np.int64))
    block = np.repeat(np.arange(blocks), [len(x) for x in lists])
    where = block * (len(edges) - 1) + np.searchsorted(edges, keys, side="right") - 1
    counts = np.bincount(where, minlength=blocks * (len(edges) - 1)).reshape(blocks, -1)
    return (counts / np.diff(edges)).astype(np.float32), edges


def plot_selection(
    selection: Selection,
    path: str | Path | None = None,
    *,
    config: Config | None = None,
    batch: int = 0,
    head: int = 0,
    title: str = "Keys selected for each block of queries",
    subtitle: str | None = None,
) -> Figure:
    """Draw the lists of one batch item and head: query blocks downward, keys to the right.

    Above the map are the chunks per hundred keys along the sequence, if the selection knows its boundaries. To the
    right of it is the share of the visible keys that each block attends to.

    Args:
        selection: a `dhsa.Selection`.
        path: the file to write, PNG or another format that its ending names. None: no file.
        config: the Config that the selection was made with. Sink and local keys are then told apart from those that
            were selected by score.
        batch: the batch item.
        head: which list of that item, counting the heads (or KV heads, or the one list of all heads) of the selection.
        title: text above the picture.
        subtitle: smaller text above the picture. None: the numbers of keys, chunks, blocks and the share attended to.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
        IndexError: batch or head is out of range.
        OSError: `path` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("dhsa.plot needs matplotlib: pip install 'dhsa[demo]'") from error

    shares, edges = key_shares(selection, batch=batch, head=head)
    length = int(edges[-1])
    blocks = len(shares)
    attended, visible = _pairs(selection, batch, head, length)
    density = attended / np.maximum(visible, 1)

    figure = Figure(figsize=(11.5, 8.6), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 2, height_ratios=[1, 7], width_ratios=[8, 1], left=0.075, right=0.965, top=0.855, bottom=0.135, hspace=0.06,
        wspace=0.035,
    )  # fmt: skip
    chunks, unused = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[0, 1])
    unused.axis("off")
    main = figure.add_subplot(grid[1, 0])
    side = figure.add_subplot(grid[1, 1], sharey=main)

    main.imshow(
        _colours(shares, edges, selection, config),
        aspect="auto",
        interpolation="nearest",
        extent=(0, length, blocks, 0),
    )
    main.set_xlabel("key position (tokens)", color=_INK)
    main.set_ylabel(f"query block ({selection.query_block} queries each)", color=_INK)

    side.barh(np.arange(blocks) + 0.5, density, height=1.0, color="#c8553d", alpha=0.85, linewidth=0)
    side.set_xlim(0, 1)
    side.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    side.set_xlabel("share attended", color=_INK)
    side.tick_params(labelleft=False)

    boundaries = selection.boundaries
    if boundaries is not None:
        row = np.asarray(boundaries)[batch]
        cuts = np.unique(row[(row > 0) & (row < length)])
        coarse = np.linspace(0, length, min(128, max(1, length // 16)) + 1)
        per_hundred = np.histogram(cuts, coarse)[0] / np.diff(coarse) * 100
        chunks.fill_between(
            coarse, np.append(per_hundred, per_hundred[-1]), step="post", color="#3d6b8c", alpha=0.75, lw=0
        )
        chunks.set_ylim(0, max(1.0, per_hundred.max() * 1.15))
        chunks.set_ylabel("chunks per\n100 keys", color=_INK, fontsize=9)
        count = f"{len(cuts) + 1:,} chunks, "
    else:
        chunks.axis("off")
        count = ""
    chunks.set_xlim(0, length)
    chunks.tick_params(labelbottom=False)
    for axis in (main, side, chunks):
        axis.set_facecolor(_PAPER)
        axis.tick_params(colors=_QUIET, labelsize=9)
        for edge in axis.spines.values():
            edge.set_color("#c9c6bd")

    whole = attended.sum() / max(1, visible.sum())
    figure.text(0.075, 0.945, title, fontsize=17, fontweight="bold", color=_INK, va="center")
    if subtitle is None:
        budget = "" if config is None or config.budget is None else f", budget {config.budget:,}"
        subtitle = (
            f"{length:,} keys in {count}{blocks} query blocks{budget}; {whole:.0%} of the visible keys are attended to"
        )
    figure.text(0.075, 0.9, subtitle, fontsize=11, color=_QUIET, va="center")
    _legend(figure, config, selection.causal)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _lists(selection: Selection, batch: int, head: int) -> list[np.ndarray]:
    """Return the keys of each query block, for one batch item and head."""
    size, sets, blocks = selection.shape
    if not (0 <= batch < size and 0 <= head < sets):
        raise IndexError(f"batch {batch}, head {head}: the selection has shape {selection.shape}")
    first = (batch * sets + head) * blocks
    indptr = selection.indptr[first : first + blocks + 1]
    return [selection.indices[a:b] for a, b in itertools.pairwise(indptr)]


def _checked_mass(mass: Any, selection: Selection) -> np.ndarray:
    array = np.asarray(mass)
    blocks, length = selection.shape[2], selection.k_len
    if array.ndim != 2 or array.shape[0] != blocks or (length is not None and array.shape[1] != length):
        expected = f"[{blocks}, {'keys' if length is None else length}]"
        raise ValueError(f"mass: expected shape {expected}, got {list(array.shape)}")
    return array


def mass_kept(selection: Selection, mass: Any, *, batch: int = 0, head: int = 0) -> np.ndarray:
    """Return how much of its attention each query block pays to the keys on its list.

    Args:
        selection: a `dhsa.Selection`.
        mass: [nq, Lk], the attention that each block pays to each key: the mean probability over its queries and the
            heads that share the list, so that a row sums to 1.
        batch: the batch item.
        head: which list of that item, counting the heads (or KV heads, or the one list of all heads) of the selection.

    Returns:
        float64 [nq].

    Raises:
        IndexError: batch or head is out of range.
        ValueError: the shape of mass is another one.
    """
    array = _checked_mass(mass, selection)
    lists = _lists(selection, batch, head)
    return np.array([array[i, keys].sum(dtype=np.float64) for i, keys in enumerate(lists)])


def plot_methods(
    selections: Mapping[str, Selection],
    path: str | Path | None = None,
    *,
    mass: Any,
    config: Config | None = None,
    batch: int = 0,
    head: int = 0,
    columns: int = 4,
) -> Figure:
    """Draw maps of several selections of one text side by side, after a map of the attention itself.

    Query blocks run downward, keys to the right.

    Args:
        selections: a `dhsa.Selection` for each name.
        path: the file to write, PNG or another format that its ending names. None: no file.
        mass: [nq, Lk], as in `mass_kept`.
        config: a Config that the selections were made with. Sink and local keys are then told apart.
        batch: the batch item.
        head: which list of that item, counting the heads (or KV heads, or the one list of all heads) of the selection.
        columns: maps in a row.

    Returns:
        The matplotlib Figure.

    Raises:
        ImportError: matplotlib is not installed.
        IndexError: as in `mass_kept`.
        ValueError: as in `mass_kept`, or there are no selections, or columns is below 1.
        OSError: `path` cannot be written.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("dhsa.plot needs matplotlib: pip install 'dhsa[demo]'") from error
    if not selections or columns < 1:
        raise ValueError(f"selections: expected at least one, and one column; got {len(selections)} and {columns}")

    rows = -(-(len(selections) + 1) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * rows), facecolor=_PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(selections) + 1 :]:
        axis.axis("off")
    array = np.asarray(mass)
    for axis, name in zip(axes, [None, *selections], strict=False):
        if name is None:
            shares, edges = _binned(array)
            image = colormaps["magma_r"]((np.log10(np.maximum(shares, 1e-5)) + 5) / 4)[..., :3]
            ends = _ends(next(iter(selections.values())), array.shape[1])
            image[edges[:-1][None, :] >= ends[:, None]] = to_rgb(_UNSEEN)
            title = "dense attention\n(a key's share, 1e-5 to 0.1)"
        else:
            kept = mass_kept(selections[name], array, batch=batch, head=head)
            shares, edges = key_shares(selections[name], batch=batch, head=head, bins=256)
            image = _colours(shares, edges, selections[name], config)
            title = f"{name}\n{kept.mean():.1%} of the attention"
        axis.imshow(image, aspect="auto", interpolation="nearest", extent=(0, array.shape[1], len(array), 0))
        axis.set_title(title, fontsize=9, color=_INK)
        axis.tick_params(colors=_QUIET, labelsize=7)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _binned(mass: np.ndarray, bins: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Return the maximum of each bin of columns, and the edges of the bins.

    The maximum keeps a single important key visible among many unimportant ones.
    """
    edges = np.unique(np.linspace(0, mass.shape[1], min(bins, mass.shape[1]) + 1).astype(np.int64))
    return np.maximum.reduceat(mass, edges[:-1], axis=1), edges


def tokens_html(
    tokens: Sequence[str],
    selections: Mapping[str, Selection],
    block: int,
    *,
    mass: Any,
    config: Config,
    batch: int = 0,
    head: int = 0,
    height: int = 260,
) -> str:
    """Show a text as HTML, shaded by what one block of queries sees: a box for the attention itself and one a
    selection.

    Tokens on the list are shaded by the reason why they are on it: sink, local, or score. Tokens left out are grey. Of
    those, the ones with the most attention are underlined in red, as many as hold half of the attention that was lost.

    Args:
        tokens: the text's tokens as strings, one for each key.
        selections: a `dhsa.Selection` for each name.
        block: which block of queries.
        mass: [nq, Lk], as in `mass_kept`.
        config: a Config that the selections were made with, for `sink` and `local`.
        batch: the batch item.
        head: which list of that item, counting the heads (or KV heads, or the one list of all heads) of the selection.
        height: of a box, in pixels; boxes scroll.

    Raises:
        IndexError: batch, head or block is out of range.
        ValueError: the length of mass or tokens is another one.
    """
    row = np.asarray(mass)[block : block + 1]
    if block < 0 or not len(row):
        raise IndexError(f"block {block}: the mass has {len(np.asarray(mass))} blocks")
    row = row[0]
    if len(tokens) != len(row):
        raise ValueError(f"tokens: expected {len(row)}, got {len(tokens)}")
    words = [html.escape(t).replace("\n", "↵<br>") for t in tokens]
    strength = np.clip(np.log10(np.maximum(row, 1e-6)) / 3 + 1.5, 0, 1)  # from 10^-4.5 to 10^-1.5
    end = int(max((_ends(s, len(row))[block] for s in selections.values()), default=len(row)))
    boxes = [("dense attention", [f"background:rgba(190,60,60,{x:.2f})" if x >= 0.01 else "" for x in strength[:end]])]
    for name, selection in selections.items():
        kept = mass_kept(selection, mass, batch=batch, head=head)[block]
        keys = _lists(selection, batch, head)[block]
        why = np.full(end, "left out", object)
        why[keys] = "score"
        forced = np.arange(end)[np.isin(np.arange(end), keys)]
        why[forced[forced < config.sink]] = "sink"
        near, far = (int(x[block]) for x in _local(selection, len(row), config.local))
        why[forced[(forced >= near) & (forced < far)]] = "local"
        lost = np.flatnonzero(why == "left out")
        lost = lost[np.argsort(-row[lost], kind="stable")]
        missed = set(lost[np.cumsum(row[lost]) <= row[lost].sum() / 2].tolist())
        styles = [_STYLES[str(w)] + (_MISSED if i in missed else "") for i, w in enumerate(why)]
        boxes.append((f"{name}: {len(keys):,} of {end:,} keys, {kept:.1%} of the attention", styles))
    texts = {}
    for title, styles in boxes:
        spans = (f'<span style="{style}">{word}</span>' for word, style in zip(words, styles, strict=False))
        texts[title] = "".join(spans)
    return _boxes(texts, height)


def chunks_html(tokens: Sequence[str], boundaries: Mapping[str, Any], *, height: int = 260) -> str:
    """Show a text as HTML, its tokens coloured by chunk: one box for each way to cut it.

    Four colours alternate, so that neighbouring chunks differ. A space is shown as a middle dot, a line break as an
    arrow. Pointing at a chunk shows its number and its tokens.

    Args:
        tokens: the text's tokens as strings, one for each key.
        boundaries: int [C + 1] for each name, as a row of `dhsa.boundaries`: from 0 to the number of tokens, not
            decreasing. A repeated entry is an empty chunk, as in padding, and is not shown.
        height: of a box, in pixels; boxes scroll.

    Raises:
        TypeError: boundaries are no integers; the message names them.
        ValueError: boundaries do not fit the number of tokens; the message names them.
    """
    words = [re.sub(" +", _dots, html.escape(t)).replace("\n", "↵<br>") for t in tokens]
    texts = {}
    for name, given in boundaries.items():
        cuts = int_array(given, f"boundaries[{name!r}]", np.int64)
        if cuts.ndim != 1 or len(cuts) < 2 or cuts[0] != 0 or cuts[-1] != len(words) or (cuts[1:] < cuts[:-1]).any():
            raise ValueError(
                f"boundaries[{name!r}]: expected one row of positions from 0 to {len(words)} (the tokens) that never "
                f"fall, got shape {list(cuts.shape)}, {_few(cuts)}"
            )
        cuts = np.unique(cuts).tolist()
        spans = (
            f'<span style="background:{_CHUNKS[i % len(_CHUNKS)]}" title="chunk {i}: {_span(a, b)}">'
            f"{''.join(words[a:b])}</span>"
            for i, (a, b) in enumerate(itertools.pairwise(cuts))
        )
        texts[f"{name}: {len(cuts) - 1:,} chunks"] = "".join(spans)
    return _boxes(texts, height)


def _dots(spaces: re.Match[str]) -> str:
    """Return a run of spaces as visible dots, after a place where a line may break."""
    return "<wbr>" + "·" * len(spaces[0])


def _few(cuts: np.ndarray) -> str:
    return np.array2string(cuts, threshold=8, edgeitems=3, separator=", ")


def _span(start: int, stop: int) -> str:
    return f"token {start}" if stop - start == 1 else f"tokens {start} to {stop - 1}"


def _boxes(texts: Mapping[str, str], height: int) -> str:
    """Return titled boxes of HTML, two in a row. They set their own colours, so that they can be read on dark pages."""
    parts = (
        f'<div style="min-width:0"><b>{html.escape(title)}</b><div style="height:{height}px;overflow:auto;'
        f'border:1px solid #c9c6bd;padding:4px;font:10px/1.5 monospace;color:{_INK};background:{_PAPER}">'
        f"{text}</div></div>"
        for title, text in texts.items()
    )
    return f'<div style="display:grid;grid-template-columns:1fr 1fr;gap:10px">{"".join(parts)}</div>'


def _starts(selection: Selection, length: int) -> np.ndarray:
    """Return the position of the first query of each block."""
    offset = length - selection.q_len if selection.q_len is not None else 0
    starts: np.ndarray = offset + np.arange(selection.shape[2]) * selection.query_block
    return starts


def _ends(selection: Selection, length: int) -> np.ndarray:
    """Return the position after the last key that any query of each block sees: in causal attention, after its last
    query."""
    if not selection.causal:
        return np.full(selection.shape[2], length)
    ends: np.ndarray = np.minimum(_starts(selection, length) + selection.query_block, length)
    return ends


def _local(selection: Selection, length: int, local: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the local keys [start, stop) of each block."""
    starts = _starts(selection, length)
    stops = np.minimum(starts + selection.query_block, length)
    if selection.causal:
        return stops - local, stops
    first, end = np.zeros(len(starts), np.int64), np.full(len(starts), length)
    if selection.window is not None:
        width = min(selection.window, length)
        first, end = np.maximum(starts - width + 1, 0), np.minimum(stops - 1 + width, length)
    near = np.maximum(np.minimum(np.maximum((starts + stops) // 2 - local // 2, first), end - local), first)
    return near, np.minimum(near + local, end)


def _pairs(selection: Selection, batch: int, head: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each block, the (query, key) pairs on its list and those that causality and the window allow."""
    blocks = selection.shape[2]
    first = (batch * selection.shape[1] + head) * blocks
    indptr = selection.indptr[first : first + blocks + 1]
    keys = selection.indices[indptr[0] : indptr[-1]].astype(np.int64)
    window = length if selection.window is None else min(selection.window, length)
    ahead = 0 if selection.causal else window - 1  # how far after its position a query sees keys
    starts = _starts(selection, length)
    stops = np.minimum(starts + selection.query_block, length)
    block = np.repeat(np.arange(blocks), np.diff(indptr))
    queries = np.minimum(stops[block], keys + window) - np.maximum(starts[block], keys - ahead)
    attended = np.bincount(block, np.maximum(queries, 0), minlength=blocks)
    at = np.arange(length)
    visible = np.minimum(at + ahead + 1, length) - np.maximum(at - window + 1, 0)
    seen = np.concatenate([[0], np.cumsum(visible)])  # pairs of all earlier queries
    return attended, seen[stops] - seen[np.minimum(starts, length)]


def _colours(shares: np.ndarray, edges: np.ndarray, selection: Selection, config: Config | None) -> Any:
    """Return the RGB values of the map.

    Future keys are grey, forced keys have one colour, and the keys selected by score go from pale to strong.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    strength = np.where(shares > 0, 0.25 + 0.65 * shares, 0)
    image = colormaps["YlOrRd"](strength)[..., :3]
    image[shares == 0] = to_rgb(_LEFT_OUT)
    starts, stops = edges[:-1][None, :], edges[1:][None, :]
    ends = _ends(selection, int(edges[-1]))
    image[np.broadcast_to(starts >= ends[:, None], shares.shape)] = to_rgb(_UNSEEN)
    if config is not None and not config.exact:
        near, far = _local(selection, int(edges[-1]), config.local)
        forced = (stops <= config.sink) | ((starts >= near[:, None]) & (starts < far[:, None]))
        image[forced & (shares > 0)] = _FORCED
        # A block that sees every key (within the budget, or in the dense tail) has no keys selected by score.
        complete = ((shares == 1) | (stops > ends[:, None])).all(axis=1, keepdims=True)
        image[complete & (shares > 0)] = _FORCED
    return image


def _legend(figure: Figure, config: Config | None, causal: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colormaps["YlOrRd"](0.35), label="few of the keys here selected"),
        Patch(facecolor=colormaps["YlOrRd"](0.9), label="all of them"),
        Patch(facecolor=_LEFT_OUT, edgecolor="#c9c6bd", label="left out"),
    ]
    if causal:
        handles.append(Patch(facecolor=_UNSEEN, label="in the future"))
    if config is not None and not config.exact:
        handles.insert(0, Patch(facecolor=_FORCED, label="always in: sinks, local, blocks within budget or dense"))
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.068, 0.02), ncols=len(handles), frameon=False, fontsize=9,
        labelcolor=_INK, handlelength=1.2, columnspacing=1.6,
    )  # fmt: skip
