"""Pictures of several methods side by side, and of a text's tokens: what they show is what the lists or chunks hold."""

import html
import itertools
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the demo extra: matplotlib")

import dhsa
from dhsa.plot import chunks_html, key_shares, mass_kept, plot_methods, plot_selection, tokens_html

LENGTH, SIZE = 300, 32
CONFIG = dhsa.Config(heads="group", budget=96, query_block=SIZE, sink=8, local=40, dense_tail=0)


@pytest.fixture
def text(make_qkv):
    """(selections by method, mass [nq, Lk]) of random queries after 20 earlier keys."""
    q, k, _ = make_qkv(1, 2, 1, LENGTH - 20, LENGTH, 16)
    q *= 3
    seen = np.arange(LENGTH) <= np.arange(20, LENGTH)[:, None]
    s = np.where(seen, np.einsum("hqd,kd->hqk", q[0], k[0, 0]) / 4, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p = (p / p.sum(-1, keepdims=True)).mean(0)
    mass = np.stack([p[i : i + SIZE].mean(0) for i in range(0, len(p), SIZE)])
    return {m: dhsa.select(q, k, CONFIG.replace(method=m)) for m in ("rows", "window")}, mass


def listed(selection, block):
    return selection.indices[selection.indptr[block] : selection.indptr[block + 1]]


def test_mass_kept_sums_what_is_listed(text):
    selections, mass = text
    for selection in selections.values():
        want = [mass[i][listed(selection, i)].sum() for i in range(9)]
        np.testing.assert_allclose(mass_kept(selection, mass), want)
    assert mass_kept(selections["rows"], mass).mean() > mass_kept(selections["window"], mass).mean() + 0.05
    np.testing.assert_allclose(mass_kept(selections["rows"], mass)[:2], 1)  # within the budget: everything
    for bad in (mass[1:], mass[:, 1:], mass[0]):
        with pytest.raises(ValueError, match=r"^mass: expected shape \[9, 300\]"):
            mass_kept(selections["rows"], bad)
    with pytest.raises(IndexError, match="head 1"):
        mass_kept(selections["rows"], mass, head=1)


def test_maps_side_by_side(text, tmp_path):
    selections, mass = text
    figure = plot_methods(selections, tmp_path / "maps.png", mass=mass, config=CONFIG, columns=2)
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    shown = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title().partition("\n")[0] for axis in shown] == ["dense attention", "rows", "window"]
    assert f"{mass_kept(selections['rows'], mass).mean():.1%}" in shown[1].get_title()
    shares, edges = key_shares(selections["rows"], bins=256)
    image = np.asarray(shown[1].images[0].get_array())
    # Every key is its own bin or one of two: what is left out, and only that, is white.
    ends = np.minimum(20 + (np.arange(9) + 1) * SIZE, LENGTH)
    past = edges[:-1] < ends[:, None]
    np.testing.assert_array_equal((image == 1).all(-1), (shares == 0) & past)
    dense = np.asarray(shown[0].images[0].get_array())
    assert len({tuple(c) for c in dense[~past]}) == 1
    with pytest.raises(ValueError, match="at least one"):
        plot_methods({}, mass=mass)
    with pytest.raises(ValueError, match=r"^mass"):
        plot_methods(selections, mass=mass[:, 1:])


def test_tokens_are_shaded_by_why_they_are_seen(text):
    selections, mass = text
    tokens = [f"<t{i}>" for i in range(LENGTH)]
    tokens[5] = "a\nb"
    page = tokens_html(tokens, selections, 7, mass=mass, config=CONFIG)
    boxes = page.split("<b>")[1:]
    assert len(boxes) == 3
    end = 20 + 8 * SIZE
    for name, box in zip(selections, boxes[1:], strict=True):
        spans = re.findall(r'<span style="([^"]*)">(.*?)</span>', box)
        assert [word for _, word in spans[:2]] == ["&lt;t0&gt;", "&lt;t1&gt;"]
        assert spans[5][1] == "a↵<br>b"
        assert len(spans) == end
        inside = np.isin(np.arange(end), listed(selections[name], 7))
        grey = np.array(["color:#b4b0a6" in style for style, _ in spans])
        np.testing.assert_array_equal(grey, ~inside)
        kinds = [style.partition(";")[0] for style, _ in spans]
        assert set(kinds[:8]) == {"background:#c3d4e3"}
        assert set(kinds[end - 40 :]) == {"background:#cfe0c8"}
        missed = np.array(["border-bottom" in style for style, _ in spans])
        lost = mass[7, :end][~inside]
        assert (missed & ~inside).sum() == missed.sum() > 0
        assert 0.4 * lost.sum() < mass[7, :end][missed].sum() <= lost.sum() / 2
        assert mass[7, :end][missed].min() >= mass[7, :end][~inside & ~missed].max()
        assert f"{name}: 96 of {end} keys, {mass_kept(selections[name], mass)[7]:.1%}" in box
    for block in (-1, 9):
        with pytest.raises(IndexError, match=f"block {block}: the mass has 9 blocks"):
            tokens_html(tokens, selections, block, mass=mass, config=CONFIG)
    with pytest.raises(ValueError, match="tokens: expected 300, got 299"):
        tokens_html(tokens[1:], selections, 7, mass=mass, config=CONFIG)


@pytest.mark.parametrize("window", [None, 90])
def test_selections_on_both_sides(make_qkv, window, tmp_path):
    """No key is in the future; local keys lie around their block; the share of each block is that of the mask."""
    q, k, _ = make_qkv(1, 2, 1, LENGTH - 20, LENGTH, 16)
    selection = dhsa.select(q, k, CONFIG, window=window, causal=False)
    figure = plot_selection(selection, tmp_path / "both.png", config=CONFIG)
    assert (tmp_path / "both.png").stat().st_size > 10_000
    seen = selection.mask(causal=True)[0, 0]
    visible = np.abs(np.arange(LENGTH) - np.arange(20, LENGTH)[:, None]) < (window or 1000)
    blocks = range(0, len(seen), SIZE)
    want = [seen[i : i + SIZE].sum() / visible[i : i + SIZE].sum() for i in blocks]
    main, side = (next(a for a in figure.axes if a.get_xlabel().startswith(x)) for x in ("key", "share"))
    np.testing.assert_allclose([bar.get_width() for bar in side.patches], want)
    assert not any("future" in text.get_text() for text in figure.legends[0].get_texts())
    image = np.asarray(main.images[0].get_array())
    shares, edges = key_shares(selection)
    assert len(edges) == LENGTH + 1
    np.testing.assert_array_equal((image == 1).all(-1), shares == 0)
    forced = np.isclose(image, (0.64, 0.70, 0.76), atol=0.01).all(-1)
    for i in range(1, 8):
        middle = 20 + i * SIZE + SIZE // 2
        assert forced[i, middle - 20 : middle + 20].all()
        assert forced[i].sum() == 40 + (8 if window is None or i < 3 else 0)
    tokens = [f"t{i}" for i in range(LENGTH)]
    mass = np.full((9, LENGTH), 1 / LENGTH)
    box = tokens_html(tokens, {"both": selection}, 4, mass=mass, config=CONFIG).split("<b>")[2]
    styles = re.findall(r'<span style="([^"]*)">', box)
    assert len(styles) == LENGTH
    green = [i for i, style in enumerate(styles) if style.startswith("background:#cfe0c8")]
    assert green == list(range(20 + 4 * SIZE + SIZE // 2 - 20, 20 + 4 * SIZE + SIZE // 2 + 20))


def test_tokens_are_coloured_by_chunk():
    tokens = ["<b>", " a", "&", "  b", "\n", " c", '"', "d", " e", "f"]
    cuts = {"one & <two>": [0, 3, 4, 5, 6, 9, 10], "padded": np.array([0, 4, 4, 10, 10], np.int32)}
    page = chunks_html(tokens, cuts)
    boxes = page.split('<div style="min-width:0">')[1:]
    assert len(boxes) == 2
    chunks = r'<span style="background:(#[0-9a-f]{6})" title="([^"]*)">(.*?)</span>'
    first, second = (re.findall(chunks, box) for box in boxes)
    # Markup in a text or a name is shown, not obeyed.
    assert boxes[0].startswith("<b>one &amp; &lt;two&gt;: 6 chunks</b>")
    assert [text for *_, text in first] == [
        "&lt;b&gt;<wbr>·a&amp;", "<wbr>··b", "↵<br>", "<wbr>·c", "&quot;d<wbr>·e", "f",
    ]  # fmt: skip
    assert [title for _, title, _ in first[:2]] == ["chunk 0: tokens 0 to 2", "chunk 1: token 3"]
    colours = [colour for colour, *_ in first]
    assert all(a != b for a, b in itertools.pairwise(colours))
    # Padding is no chunk, and takes no colour from one.
    assert boxes[1].startswith("<b>padded: 2 chunks</b>")
    assert [title for _, title, _ in second] == ["chunk 0: tokens 0 to 3", "chunk 1: tokens 4 to 9"]
    assert second[0][0] != second[1][0]
    # Nothing of the text is lost.
    plain = html.unescape(re.sub("<[^>]*>", "", "".join(text for *_, text in second)))
    assert plain.replace("·", " ").replace("↵", "\n") == "".join(tokens)


@pytest.mark.parametrize(
    ("cuts", "kind", "message"),
    [
        (
            [0, 2],
            ValueError,
            r"^boundaries\['x'\]: expected one row of positions from 0 to 3 .* shape \[2\], \[0, 2\]",
        ),
        ([1, 3], ValueError, r"got shape \[2\], \[1, 3\]"),
        ([0, 2, 1, 3], ValueError, r"that never fall, got shape \[4\], \[0, 2, 1, 3\]"),
        (np.array([0, 2, 1, 3], np.uint8), ValueError, r"that never fall"),
        ([[0, 3]], ValueError, r"got shape \[1, 2\]"),
        ([3], ValueError, r"got shape \[1\], \[3\]"),
        ([0.0, 3.0], TypeError, r"^boundaries\['x'\]: expected integers, got float64"),
    ],
)
def test_chunks_that_do_not_cut_the_text(cuts, kind, message):
    with pytest.raises(kind, match=message):
        chunks_html(["a", "b", "c"], {"x": cuts})
