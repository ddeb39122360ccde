"""What is kept of keys from call to call (`_core.KeyIndex`): cuts against the NumPy twin over random histories, results
against calls that keep nothing, memory, misuse."""

import copy
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import dhsa
from dhsa import _core, functional, reference

ROWS = dhsa.Config(boundaries="similarity", budget=64, sink=4, local=16, query_block=16, dense_tail=0)
CONFIGS = {
    "rows": ROWS,
    "rows, shortlist": ROWS.replace(shortlist=96),
    "few rows": ROWS.replace(rows=4, heads="all"),
    "heads of a group": ROWS.replace(shortlist=96, heads="group"),
    "paper's score": ROWS.replace(method="dhsa"),
    "fixed": ROWS.replace(boundaries="fixed", chunk_size=5),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def keys_and_values(length, batch=1, heads=2, dim=16, seed=0):
    return normal(batch, heads, length, dim, seed=seed), normal(batch, heads, length, dim, seed=seed + 1)


def run(q, k, v, config, *key_indexes, **options):
    out, _, stats = functional.run(q, k, v, config, key_indexes=key_indexes or None, **options)
    return out, stats


def scores_of(k, config):
    scores = np.empty((1, k.shape[2]), np.float32)
    _core.similarity_scores(k, config.boundary_window, scores, 1)
    return scores[0]


def padded(rows, length):
    most = max(map(len, rows))
    return np.array([row + [length] * (most - len(row)) for row in rows], np.int32)


def expected(q, k, v, config, *key_indexes):
    """The call from the cuts that the key_indexes came to, without anything else that they keep."""
    if q.shape[2] == 1:
        rows = {"rows": 1} if config.method == "rows" else {}
        half = {"shortlist": max(config.shortlist // 2, config.budget)} if getattr(config, "shortlist", None) else {}
        heads = "group" if config.heads == "head" else config.heads  # the heads of a KV head share a list in steps
        config = config.replace(query_block=1, dense_tail=0, heads=heads, **rows, **half)
    cuts = padded([index.boundaries for index in key_indexes], k.shape[2])
    return dhsa.sparse_attention(q, k, v, dhsa.select(q, k, config, boundaries=cuts))


@pytest.mark.parametrize("name", CONFIGS)
def test_one_call_is_as_without(name):
    config = CONFIGS[name]
    k, v = keys_and_values(500, batch=2)
    q = normal(2, 4, 500, 16, seed=5)
    key_indexes = _core.KeyIndex(), _core.KeyIndex()
    plain, _ = run(q, k, v, config)
    for _ in range(2):  # the second time nothing is cut or averaged
        kept, stats = run(q, k, v, config, *key_indexes)
        np.testing.assert_array_equal(kept, plain)
        assert stats.path == "sparse"
        assert stats.density < 0.5
    np.testing.assert_array_equal(padded([p.boundaries for p in key_indexes], 500), dhsa.boundaries(k, config))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_and_steps(name, dtype):
    config = CONFIGS[name]
    k, v = (x.astype(dtype) for x in keys_and_values(700, batch=2))
    key_indexes = _core.KeyIndex(), _core.KeyIndex()
    for at, end in ((0, 150), (150, 151), (151, 152), (152, 400), (400, 433), *((i, i + 1) for i in range(433, 470))):
        q = normal(2, 4, end - at, 16, seed=end).astype(dtype)
        before = [index.boundaries for index in key_indexes]
        out, stats = run(q, k[:, :, :end], v[:, :, :end], config, *key_indexes)
        assert stats.path == "sparse"
        np.testing.assert_array_equal(out, expected(q, k[:, :, :end], v[:, :, :end], config, *key_indexes))
        for index, old in zip(key_indexes, before, strict=True):
            new = index.boundaries
            assert new[0] == 0
            assert new[-1] == end
            assert new == sorted(new)
            prompt = 150 if at < 152 else 400 if at < 400 else 433  # where the last piece before this step ended
            if end - at == 1:
                assert new[-3:-1] == [min(prompt, at), at]
            # What a prompt was cut into stays, whatever comes after it.
            stay = [edge for edge in old if edge <= (150 if at <= 152 else at if end - at > 1 else 433)]
            assert list(dict.fromkeys(new))[: len(set(stay))] == list(dict.fromkeys(stay))


@pytest.mark.parametrize("boundaries", ["similarity", "predictor"])
def test_gaps_of_a_later_piece_score_as_among_all(boundaries):
    """With so many gaps to pick that spacing alone decides, pieces are cut where one call cuts, but where they meet;
    with few, each piece has its share."""
    k, v = keys_and_values(300, heads=1, dim=256)
    q = normal(1, 2, 300, 256, seed=3)

    def thirds(config):
        index = _core.KeyIndex()
        for at, end in ((0, 100), (100, 200), (200, 300)):
            run(q[:, :, at:end], k[:, :, :end], v[:, :, :end], config, index)
        return [[edge for edge in index.boundaries if at < edge < at + 100] for at in (0, 100, 200)]

    full = ROWS.replace(nms=2, boundaries=boundaries, num_chunks=300)
    at_once = [int(edge) for edge in dhsa.boundaries(k, full)[0]]
    for at, part in zip((0, 100, 200), thirds(full), strict=True):
        # A choice moves its neighbours' choices, so far from where pieces meet they agree again.
        inside = [edge for edge in at_once if at + 30 < edge < at + 70]
        assert len(inside) > 8
        assert inside == [edge for edge in part if at + 30 < edge < at + 70]
    assert [len(part) for part in thirds(full.replace(num_chunks=None))] == [25, 25, 25]


@st.composite
def histories(draw):
    """Calls on one growing sequence: pieces, steps, crops, and keys that turn into others."""
    calls = []
    length = draw(st.integers(70, 120))
    calls.append(("piece", 0, length))
    for _ in range(draw(st.integers(1, 8))):
        kind = draw(st.sampled_from(["piece", "step", "step", "step", "crop", "change", "exact"]))
        if kind in ("piece", "exact"):
            more = draw(st.integers(2, 60))
            calls.append((kind, length, length + more))
            length += more
        elif kind == "step":
            calls.append((kind, length, length + 1))
            length += 1
        elif kind == "crop":
            length = max(70, length - draw(st.integers(1, 40)))
            calls.append((kind, length, length))
        else:
            calls.append((kind, draw(st.integers(0, length - 1)), length))
    calls.append(("step", length, length + 1))
    return calls


@settings(max_examples=60, deadline=None)
@given(histories(), st.integers(0, 2**16), st.booleans())
def test_cuts_are_the_twins(calls, seed, shortlist):
    config = CONFIGS["rows, shortlist" if shortlist else "rows"]
    rng = np.random.default_rng(seed)
    k, v = keys_and_values(0)
    index, twin = _core.KeyIndex(), reference.KeyIndex()
    for kind, at, end in calls:
        if kind == "change":  # the keys from `at` on are another sequence's
            k, v = k.copy(), v.copy()
            k[:, :, at:] = rng.standard_normal(k[:, :, at:].shape, dtype=np.float32)
            continue
        k, v = k[:, :, :at], v[:, :, :at]
        if kind == "crop":
            continue
        fresh = rng.standard_normal((2, *k.shape[:2], end - at, k.shape[3]), dtype=np.float32)
        k, v = np.concatenate([k, fresh[0]], 2), np.concatenate([v, fresh[1]], 2)
        if kind == "exact":  # a call that the object does not see
            continue
        q = rng.standard_normal((1, 4, end - at, 16), dtype=np.float32)
        out, stats = run(q, k, v, config, index)
        assert stats.path == "sparse"
        found = twin.update(
            k[0],
            scores_of(k[:, :, : end - (kind == "step")], config),
            n=config._core.num_gaps(end),
            theta=-np.inf,
            nms=2,
            step=kind == "step",
        )
        assert index.boundaries == found
        np.testing.assert_array_equal(out, expected(q, k, v, config, index))


def test_a_long_answer_is_one_chunk():
    """Beyond what one sum of rows takes, and against means that are made at once."""
    config = ROWS.replace(local=8)
    k, v = keys_and_values(900)
    index = _core.KeyIndex()
    run(normal(1, 4, 200, 16), k[:, :, :200], v[:, :, :200], config, index)
    for end in range(201, 900):
        q = normal(1, 4, 1, 16, seed=end)
        out, _ = run(q, k[:, :, :end], v[:, :, :end], config, index)
    assert index.boundaries[-3:] == [200, 898, 899]
    late = copy.deepcopy(index)  # a copy sums up anew
    again, _ = run(q, k[:, :, :899], v[:, :, :899], config, late)
    np.testing.assert_array_equal(again, out)


def test_a_copy_goes_its_own_way():
    k, v = keys_and_values(400)
    index = _core.KeyIndex()
    run(normal(1, 4, 300, 16), k[:, :, :300], v[:, :, :300], ROWS, index)
    twin, cuts = copy.deepcopy(index), index.boundaries
    assert twin.boundaries == cuts
    assert abs(twin.nbytes - index.nbytes) < 1000
    q = normal(1, 4, 100, 16, seed=9)
    other, _ = keys_and_values(400, seed=20)
    other[:, :, :300] = k[:, :, :300]
    mine, _ = run(q, k, v, ROWS, index)
    its, _ = run(q, other, v, ROWS, twin)
    assert index.boundaries[: len(cuts)] == twin.boundaries[: len(cuts)] == cuts
    assert index.boundaries != twin.boundaries
    np.testing.assert_array_equal(mine, expected(q, k, v, ROWS, index))
    np.testing.assert_array_equal(its, expected(q, other, v, ROWS, twin))


def test_keys_said_to_be_the_same_are_trusted_where_there_are_many():
    """Some of them are looked at: one that changed is overlooked until its turn comes, other keys all over are not."""
    k, v = keys_and_values(1200, dim=256)
    index = _core.KeyIndex()
    run(normal(1, 4, 900, 256), k[:, :, :900], v[:, :, :900], ROWS, index)
    cuts = index.boundaries
    changed = k.copy()
    changed[:, :, 500] += 1
    run(normal(1, 4, 300, 256), changed, v, ROWS, index, same=900)
    assert index.boundaries[: len(cuts)] == cuts
    run(normal(1, 4, 300, 256), k + 1, v, ROWS, index, same=1200)
    assert index.boundaries[: len(cuts)] != cuts


def test_means_may_be_let_go():
    k, v = keys_and_values(4000, dim=64)
    index, slim = _core.KeyIndex(), _core.KeyIndex()
    for at, end in ((0, 3000), (3000, 4000)):
        q = normal(1, 4, end - at, 64, seed=end)
        kept, _ = run(q, k[:, :, :end], v[:, :, :end], ROWS, index)
        let_go, _ = run(q, k[:, :, :end], v[:, :, :end], ROWS, slim, keep_means=False)
        np.testing.assert_array_equal(let_go, kept)
    assert index.boundaries == slim.boundaries
    assert slim.nbytes < index.nbytes / 4
    assert index.nbytes < 0.5 * k.nbytes


def test_exact_calls_leave_it_alone():
    k, v = keys_and_values(60)
    index = _core.KeyIndex()
    assert run(normal(1, 4, 60, 16), k, v, ROWS, index)[1].path == "dense"
    assert index.boundaries == []
    assert index.nbytes == 0


def test_other_shapes_and_dtypes_begin_anew():
    index = _core.KeyIndex()
    for dim, dtype in ((16, "float32"), (16, "float16"), (32, "float16")):
        k, v = (x.astype(dtype) for x in keys_and_values(200, dim=dim))
        q = normal(1, 4, 200, dim).astype(dtype)
        np.testing.assert_array_equal(run(q, k, v, ROWS, index)[0], run(q, k, v, ROWS)[0])


def test_nan_is_seen_by_who_may():
    k, v = keys_and_values(300)
    index = _core.KeyIndex()
    k[0, 0, 250] = np.nan
    run(normal(1, 4, 299, 16), k[:, :, :299], v[:, :, :299], ROWS, index)
    out, _ = run(normal(1, 4, 1, 16), k, v, ROWS, index)
    assert np.isnan(out[0, :2]).all()
    assert np.isfinite(out[0, 2:]).all()
    k[0, 0, 250] = 1  # a key that is a number again
    out, _ = run(normal(1, 4, 1, 16), k, v, ROWS, index)
    assert np.isfinite(out).all()


def test_bits_do_not_depend_on_threads():
    k, v = keys_and_values(1500, heads=1, dim=64)
    outs = []
    threads = dhsa.get_num_threads()
    try:
        for n in (1, 2, 3):
            dhsa.set_num_threads(n)
            index = _core.KeyIndex()
            run(normal(1, 4, 1400, 64), k[:, :, :1400], v[:, :, :1400], ROWS.replace(shortlist=256), index)
            outs.append(
                [
                    run(normal(1, 4, 1, 64, seed=e), k[:, :, :e], v[:, :, :e], ROWS.replace(shortlist=256), index)[0]
                    for e in range(1401, 1420)
                ]
            )
    finally:
        dhsa.set_num_threads(threads)
    np.testing.assert_array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])


def test_misuse():
    k, v = keys_and_values(200, batch=2)
    q = normal(2, 4, 200, 16)
    index = _core.KeyIndex()
    with pytest.raises(ValueError, match="key_indexes: expected a tuple of 2, one a batch item, or None"):
        run(q, k, v, ROWS, index)
    with pytest.raises(RuntimeError, match="key_indexes: in use by another call"):
        run(q, k, v, ROWS, index, index)
    with pytest.raises(TypeError, match="key_indexes: expected objects of type KeyIndex"):
        run(q, k, v, ROWS, index, None)
    with pytest.raises(ValueError, match="key_indexes: method window has no chunks to keep"):
        run(q, k, v, ROWS.replace(method="window"), index, _core.KeyIndex())
    with pytest.raises(ValueError, match="same: expected at least 0, got -1"):
        run(q, k, v, ROWS, index, _core.KeyIndex(), same=-1)
    with pytest.raises(TypeError, match="takes no arguments"):
        _core.KeyIndex(1)
    run(q, k, v, ROWS, index, _core.KeyIndex())  # and none of this has left it busy


def test_two_threads_cannot_share_one():
    k, v = keys_and_values(6000, dim=64)
    q = normal(1, 4, 6000, 64)
    index = _core.KeyIndex()
    found, refused = [], []

    def work():
        for _ in range(3):
            try:
                found.append(run(q, k, v, ROWS, index)[0])
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    plain = run(q, k, v, ROWS)[0]
    assert set(refused) <= {"key_indexes: in use by another call"}
    assert found
    assert all(np.array_equal(out, plain) for out in found)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(0, 2**16))
def test_given_boundaries_take_the_place_of_cuts(pieces, seed):
    """As another layer's are where layers share: whatever was kept of other cuts."""
    config = CONFIGS["rows, shortlist"]
    rng = np.random.default_rng(seed)
    k, v = keys_and_values(100 + sum(pieces), seed=seed)
    index, at = _core.KeyIndex(), 0
    for more in (100, *pieces):
        end = at + more
        inner = np.sort(rng.choice(np.arange(1, end), min(end // 5, end - 1), replace=False))
        cuts = np.array([[0, *inner, end, end, end]], np.int32)
        own = rng.random() < 0.5  # in turns with cuts of its own
        q = normal(1, 4, more, 16, seed=end)
        options = {} if own else {"boundaries": cuts}
        out, _ = run(q, k[:, :, :end], v[:, :, :end], config, index, **options)
        if not own:
            assert index.boundaries == [0, *inner, end]
        np.testing.assert_array_equal(out, expected(q, k[:, :, :end], v[:, :, :end], config, index))
        at = end


def test_former_names():
    k, v = keys_and_values(300)
    q, index, other = normal(1, 4, 300, 16), _core.KeyIndex(), _core.KeyIndex()
    want, _ = run(q, k, v, ROWS, index, keep_means=False)
    with pytest.warns(DeprecationWarning, match="now named key_indexes and keep_means"):
        out, _, _ = functional.run(q, k, v, ROWS, pasts=(other,), keep=False)
    np.testing.assert_array_equal(out, want)
    assert other.boundaries == index.boundaries
    assert other.nbytes == index.nbytes
