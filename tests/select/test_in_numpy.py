"""Methods that run in NumPy: the property that defines each of them, by data that only it gets right. What they share
with all methods is tested in test_methods.py.
"""

import numpy as np
import pytest

import dhsa
from dhsa import functional
from dhsa._twin.blocks import fixed
from dhsa.methods.flexprefill import divergence

BASE = {"budget": 40, "query_block": 16, "sink": 0, "local": 8, "dense_tail": 0, "heads": "head"}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lists(selection):
    return [selection.indices[a:b].tolist() for a, b in zip(selection.indptr, selection.indptr[1:], strict=False)]


def last(q, k, method, **options):
    """The keys of the last block."""
    config = dhsa.Config(**BASE | {"method": method} | options)
    return set(lists(dhsa.select(q, k, config, **({"v": k} if config.options.reads_values else {})))[-1])


def softmax(s):
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)


def causal_softmax(q, k):
    """Probabilities [H, Lq, Lk] of one batch item, float64."""
    q, k = q[0].astype(np.float64), np.repeat(k[0].astype(np.float64), q.shape[1] // k.shape[1], axis=0)
    s = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[2])
    at = np.arange(k.shape[1] - q.shape[1], k.shape[1])
    return softmax(np.where(np.arange(k.shape[1]) <= at[:, None], s, -np.inf))


def test_products_in_fixed_point_are_exact():
    """So no order of summation, and no number of threads of a BLAS library, changes a bit."""
    a, b = fixed(normal(7, 576).astype(np.float64)), fixed(1e6 * normal(9, 576, seed=1).astype(np.float64))
    assert np.abs(a.whole).max() == np.abs(b.whole).max() == 2**20
    exact = [[sum(int(x) * int(y) for x, y in zip(u, v, strict=True)) for v in b.whole] for u in a.whole]
    np.testing.assert_array_equal(a.whole @ b.whole.T, np.array(exact, np.float64))
    np.testing.assert_allclose(a.whole * a.scale[:, None], normal(7, 576), atol=5e-6)
    bad = fixed(np.array([[1.0, np.nan], [np.inf, 1.0], [0.0, 0.0]]))
    assert np.isnan(bad.whole).tolist() == [[True, True], [True, True], [False, False]]


def test_a_method_in_numpy_reports_its_time_and_serves_16_bits():
    torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
    q, k, v = (torch.from_numpy(normal(1, 2, 200, 8, seed=s)).bfloat16() for s in range(3))
    config = dhsa.Config(**BASE | {"method": "quoka"})
    out, _, stats = functional.run(q, k, v, config)
    assert out.dtype == torch.bfloat16
    assert stats.path == "sparse"
    assert stats.select_seconds > 0
    with pytest.raises(NotImplementedError, match=r"^key_ranges: "):
        functional.run(q, k, v, config, key_ranges=np.zeros((1, 200, 2), np.int32))
    for bad, message in ((k[:, :, :, :7], "k: "), (k[:, :, :100], "q: 200 queries are more than the 100 keys")):
        with pytest.raises(ValueError, match=rf"^{message}"):
            functional.run(q, bad, v, config)


# ---- flexprefill -----------------------------------------------------------------------------------------------------


def test_flexprefill_is_blocks_or_columns_and_diagonals():
    q, k = normal(1, 2, 150, 8), normal(1, 1, 183, 8, seed=1)
    for bounds in ({}, {"sink": 4, "local": 0}):
        config = dhsa.Config(**BASE | bounds | {"method": "flexprefill", "key_block": 12, "tau": 0})
        slash = dhsa.select(q, k, config.replace(method="vertical_slash"))
        assert dhsa.select(q, k, config) == slash
        block = dhsa.select(q, k, config.replace(method="block", key_block=12))
        assert dhsa.select(q, k, config.replace(tau=1)) == block != slash


def test_flexprefill_takes_blocks_where_means_say_all():
    """All queries alike, all keys of a block alike: the estimate is exact. Then keys that differ inside of blocks."""
    q = np.repeat(normal(1, 1, 1, 8), 128, axis=2)
    k = np.repeat(normal(1, 1, 64, 8, seed=1), 8, axis=2)
    config = dhsa.Config(**BASE | {"method": "flexprefill", "key_block": 8, "tau": 0.3})
    blocks = config.replace(method="block", key_block=8)
    assert dhsa.select(q, k, config) == dhsa.select(q, k, blocks)
    k[:, :, ::8] *= 30
    assert dhsa.select(q, k, config) == dhsa.select(q, k, config.replace(method="vertical_slash"))


def test_flexprefill_under_a_mass_takes_the_fewest_columns_and_diagonals():
    q, k = normal(1, 1, 64, 8), normal(1, 1, 200, 8, seed=1)
    config = dhsa.Config(method="flexprefill", tau=0, mass=0.5, budget=None, sink=0, local=0, floor=0, dense_tail=0)
    got = lists(dhsa.select(q, k, config))[0]
    p = causal_softmax(q, k)[0]
    columns, diagonals = p.sum(axis=0), np.zeros(200)
    for row in range(64):
        diagonals[: 137 + row] += p[row, 136 + row :: -1]
    want = set()
    for parts, keys in ((columns, lambda j: [j]), (diagonals, lambda d: range(max(0, 136 - d), 200 - d))):
        held = 0.0
        for j in np.argsort(-parts):
            if held >= 0.5 * parts.sum():
                break
            held += parts[j]
            want |= set(keys(j))
    assert got == sorted(want)


def test_divergence_is_that_of_jensen_and_shannon():
    p, q = np.array([0.5, 0.5, 0]), np.array([0, 0, 1.0])
    assert divergence(p, p) == 0
    assert divergence(p, q) == pytest.approx(np.sqrt(np.log(2)))
    m = (p + (q + p) / 2) / 2
    kl = [sum(a * np.log(a / b) for a, b in zip(x, m, strict=True) if a > 0) for x in (p, (p + q) / 2)]
    assert divergence(p, (p + q) / 2) == pytest.approx(np.sqrt(sum(kl) / 2))


# ---- stem ------------------------------------------------------------------------------------------------------------


def test_stem_prefers_large_values_and_shortens_later_lists():
    q, k = np.zeros((1, 1, 200, 8), np.float32), normal(1, 1, 200, 8, seed=1)
    v = np.ones((1, 1, 200, 8), np.float32)
    v[:, :, 48:64] *= 3
    config = dhsa.Config(**BASE | {"method": "stem", "key_block": 16, "decay": 0.5, "heads": "group"})
    got = lists(dhsa.select(q, k, config, v=v))
    assert set(range(52, 64)) <= set(got[-1])  # 20 keys, of which 8 are local
    assert set(range(48, 64)).isdisjoint(lists(dhsa.select(q, k, config.replace(beta=0), v=v))[-1])
    for i, keys in enumerate(got):
        end = min(16 * (i + 1), 200)
        assert len(keys) == (end if end <= 40 else np.ceil(40 * (1 - 0.5 * end / 200)))
    with pytest.raises(ValueError, match=r"^v: method='stem' reads the values"):
        dhsa.select(q, k, config)
    with pytest.raises(ValueError, match=r"^v: expected \[B, Hkv, Lk\] = \[1, 1, 200\] as k, got \[1, 1, 199\]"):
        dhsa.select(q, k, config, v=v[:, :, 1:])
    v[0, 0, 100] = np.nan
    assert 100 in lists(dhsa.select(q, k, config, v=v))[-1]


def test_stem_scores_are_logits_plus_the_logarithm_of_norms():
    q, k, v = normal(1, 2, 64, 8), normal(1, 1, 320, 8, seed=1), 3 * normal(1, 1, 320, 8, seed=2)
    config = dhsa.Config(
        method="stem", key_block=8, beta=1.5, decay=1, budget=40, query_block=64, sink=0, local=0, dense_tail=0
    )
    means = k[0, 0].reshape(40, 8, 8).mean(axis=1)
    norms = np.linalg.norm(v[0, 0], axis=1).reshape(40, 8).mean(axis=1)
    score = sum(means @ q[0, h].mean(axis=0) / np.sqrt(8) + 1.5 * np.log(norms) for h in range(2))
    want = sorted(8 * b + i for b in np.argsort(-score)[:5] for i in range(8))
    assert lists(dhsa.select(q, k, config, v=v)) == [want]


# ---- quoka -----------------------------------------------------------------------------------------------------------


def test_quoka_keeps_the_queries_that_are_unlike_their_mean():
    """Fifteen queries look along one axis and one along another: with one kept query, that one decides."""
    q, k = np.zeros((1, 1, 128, 8), np.float32), 0.1 * normal(1, 1, 128, 8, seed=1)
    q[..., 0] = 1
    q[0, 0, 120] = np.eye(8)[1]
    common, rare = range(10, 40), range(50, 80)
    k[0, 0, common, 0] += 5
    k[0, 0, rare, 1] += 5
    assert set(rare) <= last(q, k, "quoka", rows=1)
    assert not set(rare) & last(q[:, :, :112], k[:, :, :112], "quoka", rows=1)  # a block without such a query
    assert set(rare) <= last(q, k, "quoka", rows=16, budget=128 - 8)


def test_quoka_ranks_keys_by_cosine():
    q, k = normal(1, 2, 16, 8), normal(1, 1, 100, 8, seed=1)
    unit = q[0] / np.linalg.norm(q[0], axis=2, keepdims=True)
    mean = q[0].mean(axis=1)
    cosine = np.einsum("hnd,hd->hn", unit, mean / np.linalg.norm(mean, axis=1, keepdims=True))
    kept = np.mean([unit[h][np.argsort(cosine[h])[:3]] for h in range(2)], axis=0)
    score = (kept @ (k[0, 0] / np.linalg.norm(k[0, 0], axis=1, keepdims=True)).T).max(axis=0)
    options = {"heads": "group", "local": 0, "budget": 30, "rows": 3}
    assert last(q, k, "quoka", **options) == set(np.argsort(-score)[:30].tolist())


# ---- sparge ----------------------------------------------------------------------------------------------------------


def test_sparge_takes_blocks_that_are_not_alike_and_ranks_the_others():
    q = np.ones((1, 1, 128, 8), np.float32)
    k = np.repeat(np.linspace(-1, -0.5, 16, dtype=np.float32), 8)[None, None, :, None] * np.ones(8, np.float32)
    k[0, 0, 24:32] *= np.where(np.arange(8) % 2, 1, -1)[:, None]  # their mean is zero
    options = {"key_block": 8, "budget": 40, "local": 0}
    got = last(q, k, "sparge", **options)
    assert got == {*range(24, 32), *range(96, 128)}  # the best of the others are the last ones
    k[0, 0, 96:] -= 1
    assert last(q, k, "sparge", **options) == {*range(24, 32), *range(64, 96)}
    assert last(q, k, "sparge", **options, similarity=0) == {*range(24, 32), *range(64, 96)}  # the mean 0 is best
    k[0, 0, 24:32] -= 2
    assert not set(range(24, 32)) & last(q, k, "sparge", **options, similarity=0)


def test_sparge_asks_each_query_where_queries_are_not_alike():
    """Two opposite queries have no mean; under a mass such a block sees all keys."""
    q = np.ones((1, 1, 128, 8), np.float32)
    q[:, :, 1::2] *= -1
    k = np.full((1, 1, 128, 8), 0.01, np.float32)
    k[0, 0, 16:24], k[0, 0, 40:48] = 2, -2
    got = last(q, k, "sparge", key_block=8, budget=16, local=0)
    assert got == {*range(16, 24), *range(40, 48)}
    assert last(q, k, "sparge", key_block=8, budget=None, mass=0.5, local=0, floor=0) == set(range(128))


# ---- sale ------------------------------------------------------------------------------------------------------------


def test_sale_of_8_bits_ranks_blocks_by_the_largest_relative_weight():
    q, k = normal(1, 1, 16, 8), normal(1, 1, 160, 8, seed=1)
    s = (q[0, 0] @ k[0, 0].T) / np.sqrt(8)
    at = np.arange(144, 160)
    s[np.arange(160) > at[:, None]] = -np.inf
    near = np.zeros(160, bool)
    near[:4] = near[152:] = True
    base = np.where(near, s, -np.inf).max(axis=1, keepdims=True)
    score = (s - base).max(axis=0).reshape(20, 8).max(axis=1)
    options = {"key_block": 8, "sink": 4, "local": 8, "bits": 8, "budget": 44}
    want = {*range(4), *range(152, 160)}
    for b in np.argsort(-score):
        want |= set(range(8 * b, 8 * b + 8)) if len(want | set(range(8 * b, 8 * b + 8))) <= 44 else set()
    got = last(q, k, "sale", **options)
    assert len(got & want) >= 40  # the last block may be taken in part
    few = last(q, k, "sale", **options | {"budget": 160, "threshold": 0.999})
    best = {8 * b + i for b in np.flatnonzero(score >= np.log(0.999)) for i in range(8)}
    exact = {*best, *range(4), *range(152, 160)}
    assert few == exact if len(exact) < 160 else True
    assert 12 <= len(last(q, k, "sale", **options | {"threshold": 1.0})) <= 44


def test_sale_with_few_bits_is_an_estimate():
    q, k = normal(1, 1, 128, 32), normal(1, 1, 128, 32, seed=1)
    exact, rough, rougher = (last(q, k, "sale", key_block=1, bits=bits) for bits in (8, 4, 2))
    assert len(exact & rough) > len(exact & rougher)
    assert exact != rough


# ---- hip -------------------------------------------------------------------------------------------------------------


def test_hip_finds_the_top_where_neighbours_are_alike():
    """Logits with one smooth peak: every middle key leads towards it."""
    q = np.ones((1, 1, 512, 4), np.float32)
    k = -np.abs(np.arange(512) - 203)[None, None, :, None] / 100 * np.ones(4, np.float32)
    got = last(q, k.astype(np.float32), "hip", budget=32, local=0, key_block=1)
    assert got == set(range(187, 219)) or got == set(range(188, 220))
    assert len(got) == 32


def test_hip_loses_a_needle_that_no_middle_key_shows():
    q = np.ones((1, 1, 512, 4), np.float32)
    for place in range(192, 208):
        k = np.zeros((1, 1, 512, 4), np.float32)
        k[0, 0, place] = 5
        assert place not in last(q, k, "hip", budget=32, local=0, key_block=1)
        assert place in last(q, k, "oracle", budget=32, local=0)


# ---- hyper -----------------------------------------------------------------------------------------------------------


def test_hyper_takes_the_keys_of_the_queries_hash():
    q, k = normal(1, 1, 256, 16), normal(1, 1, 256, 16, seed=1)
    direction = normal(16, seed=2)
    q[0, 0, -16:] = direction
    same = np.arange(7, 240, 10)
    k[0, 0, same] = 3 * direction
    got = last(q, k, "hyper", bits=12, reach=24, budget=40)
    assert set(same.tolist()) <= got
    k[0, 0, same] = -3 * direction
    assert not set(same.tolist()) <= last(q, k, "hyper", bits=12, reach=24, budget=40)
    k = normal(1, 1, 256, 16, seed=1)
    assert last(q, k, "hyper", reach=24, seed=1) != last(q, k, "hyper", reach=24, seed=2)


# ---- token_sparse ----------------------------------------------------------------------------------------------------


def test_token_sparse_keeps_the_same_tokens_for_all_blocks():
    q, k = normal(1, 1, 200, 8), normal(1, 1, 200, 8, seed=1)
    columns = causal_softmax(q, k)[0, -64:].sum(axis=0)
    config = dhsa.Config(**BASE | {"method": "token_sparse"})
    for i, keys in enumerate(lists(dhsa.select(q, k, config))):
        end = min(16 * (i + 1), 200)
        if end > 40:
            best = np.argsort(-columns[: end - 8])[:32].tolist()
            assert keys == sorted([*best, *range(end - 8, end)])


# ---- moa and tca -----------------------------------------------------------------------------------------------------


def test_moa_gives_each_head_a_window_of_its_own():
    q, k = normal(2, 4, 150, 8), normal(2, 2, 150, 8, seed=1)
    config = dhsa.Config(**BASE | {"method": "moa", "head_windows": [10, 20, 30, 40], "sink": 4})
    got = lists(dhsa.select(q, k, config))
    for row, keys in enumerate(got):
        end, size = min(16 * (row % 10 + 1), 150), 10 * (row // 10 % 4 + 1)
        recent = max(size - 4, 8)
        assert keys == (list(range(end)) if end <= 40 else [*range(4), *range(end - recent, end)])
    plain = dhsa.select(q, k, config.replace(head_windows=()))
    assert plain == dhsa.select(q, k, config.replace(method="window"))
    assert config.options.head_windows == (10, 20, 30, 40)
    with pytest.raises(ValueError, match=r"^head_windows: got 4 values, but the layer has 2 lists"):
        dhsa.select(q, k, config.replace(heads="group"))


def test_tca_gives_each_head_a_budget_of_its_own():
    q, k = normal(1, 2, 16, 8), normal(1, 1, 100, 8, seed=1)
    config = dhsa.Config(**BASE | {"method": "tca", "head_budgets": (12, 30), "local": 0})
    got = lists(dhsa.select(q, k, config))
    for head, size in enumerate((12, 30)):
        score = k[0, 0] @ q[0, head].mean(axis=0)
        assert got[head] == sorted(np.argsort(-score)[:size].tolist())
    one = lists(dhsa.select(q, k, config.replace(head_budgets=(12,))))
    assert [len(keys) for keys in one] == [12, 12]


def test_a_step_with_chunks_of_one_key_takes_what_a_perfect_index_would():
    """RetrievalAttention's keys, and so the upper bound of its index: those of the largest products."""
    q, k = normal(1, 1, 1, 32), normal(1, 1, 400, 32, seed=1)
    config = dhsa.Config(chunk_size=1, shortlist=0, budget=40, sink=0, local=0, dense_tail=0)
    best = set(np.argsort(-(k[0, 0] @ q[0, 0, 0]))[:40].tolist())
    assert len(best & set(lists(dhsa.select(q, k, config))[0])) >= 38  # products of 8 bits


@pytest.mark.parametrize(("method", "option", "error", "message"), [
    ("flexprefill", {"tau": -0.1}, ValueError, "tau: expected 0 to 1, got -0.1"),
    ("flexprefill", {"tau": "a"}, TypeError, "tau: expected a number, got str"),
    ("stem", {"beta": float("nan")}, ValueError, "beta: expected 0 to 10, got nan"),
    ("stem", {"decay": 0}, ValueError, "decay: expected 0.01 to 1, got 0"),
    ("quoka", {"rows": 0}, ValueError, "rows: expected 1 to"),
    ("sparge", {"similarity": True}, TypeError, "similarity: expected a number, got bool"),
    ("sale", {"bits": 1}, ValueError, "bits: expected 2 to 8, got 1"),
    ("sale", {"threshold": 2}, ValueError, "threshold: expected 0 to 1, got 2"),
    ("hip", {"key_block": 0}, ValueError, "key_block: expected 1 to"),
    ("hyper", {"bits": 17}, ValueError, "bits: expected 1 to 16, got 17"),
    ("hyper", {"reach": 1.5}, TypeError, "reach: expected an int, got float"),
    ("hyper", {"seed": -1}, ValueError, "seed: expected 0 to"),
    ("token_sparse", {"rows": 3}, TypeError, "rows: is an option of method='rows' and"),
    ("moa", {"head_windows": 5}, TypeError, "head_windows: expected a tuple of ints, got int"),
    ("moa", {"head_windows": (5, 0)}, ValueError, r"head_windows\[1\]: expected 1 to"),
    ("moa", {"head_windows": (1025,)}, ValueError, "head_windows: 1025 keys are more than the budget of 1024"),
    ("tca", {"head_budgets": (1025,)}, ValueError, "head_budgets: 1025 keys are more than the budget of 1024"),
    ("quoka", {"mass": 0.5}, ValueError, "mass: the scores of method='quoka' are no shares"),
])  # fmt: skip
def test_bad_options_are_refused_by_name(method, option, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        dhsa.Config(method=method, **option)


# ---- spatten ---------------------------------------------------------------------------------------------------------


def test_spatten_has_the_lists_of_the_oracle_in_a_first_layer_and_fewer_keys_to_choose_from_later():
    q, k = normal(1, 2, 64, 8), normal(1, 1, 200, 8, seed=1)
    config = dhsa.Config(**BASE | {"method": "spatten"})
    state = config.options.new_state()
    first = dhsa.select(q, k, config, state=state)
    assert first == dhsa.select(q, k, config) == dhsa.select(q, k, config.replace(method="oracle"))
    union = [set(lists(first)[i]) | set(lists(first)[4 + i]) for i in range(4)]
    q2, k2 = normal(1, 2, 64, 8, seed=2), normal(1, 1, 200, 8, seed=3)
    got = dhsa.select(q2, k2, config, state=state)
    p = np.exp((q2[0].astype(float) @ k2[0, 0].T.astype(float)) / np.sqrt(8))
    at = np.arange(136, 200)
    for head in range(2):
        for i in range(4):
            end = 136 + 16 * (i + 1)
            local = np.arange(200) >= end - 8
            local &= np.arange(200) < end
            left = np.isin(np.arange(200), list(union[i])) | local
            rows = np.where(left & (np.arange(200) <= at[16 * i : 16 * i + 16, None]), p[head, 16 * i : 16 * i + 16], 0)
            mass = (rows / rows.sum(axis=1, keepdims=True)).sum(axis=0)
            best = [j for j in np.argsort(-mass) if left[j] and not local[j]][:32]
            want = sorted([*best, *np.flatnonzero(local & left)])
            assert lists(got)[4 * head + i] == want


def test_spatten_with_one_list_adds_the_sums_of_earlier_layers():
    """A key that mattered in the first layer stays ahead of one that matters a little in the second."""
    q = np.zeros((1, 1, 16, 8), np.float32)
    q[..., 0] = 1
    one, two = (np.zeros((1, 1, 100, 8), np.float32) for _ in range(2))
    one[0, 0, [3, 50], 0] = 20
    two[0, 0, [50, 60], 0] = 3, 4
    config = dhsa.Config(**BASE | {"method": "spatten", "heads": "all", "budget": 40})
    smaller = config.replace(budget=9)
    state = config.options.new_state()
    assert {3, 50} <= set(lists(dhsa.select(q, one, config, state=state))[-1])
    got = lists(dhsa.select(q, two, smaller, state=state))[-1]
    assert 50 in got  # more than key 60 in the sum of both layers
    assert 60 in lists(dhsa.select(q, two, smaller))[-1]


def test_spatten_loses_no_key_that_is_not_finite():
    q, k = normal(1, 1, 16, 8), normal(1, 1, 100, 8, seed=1)
    config = dhsa.Config(**BASE | {"method": "spatten"})
    state = config.options.new_state()
    gone = next(j for j in range(90) if j not in lists(dhsa.select(q, k, config, state=state))[-1])
    k[0, 0, gone, 2] = np.nan
    assert gone in lists(dhsa.select(q, k, config, state=state))[-1]


# ---- retrieval -------------------------------------------------------------------------------------------------------


def test_retrieval_finds_the_keys_of_earlier_queries_that_were_alike():
    """A key unlike the query's neighbours in the text is found only if a query like it was indexed."""
    q, k = normal(1, 1, 256, 16), 0.1 * normal(1, 1, 256, 16, seed=1)
    rare = np.eye(16)[3].astype(np.float32)
    q[..., 3] = -1
    q[0, 0, 240:] = 4 * rare
    k[0, 0, [20, 33], :] = 8 * rare
    options = {"every": 4, "links": 4, "probes": 2, "local": 16}
    assert not {20, 33} & last(q, k, "retrieval", **options) - set(range(216, 256))
    q[0, 0, 100] = rare  # a multiple of `every`
    assert {20, 33} <= last(q, k, "retrieval", **options)
    q[0, 0, 100], q[0, 0, 101] = q[0, 0, 99], rare
    assert not {20, 33} & last(q, k, "retrieval", **options)


def test_retrieval_with_all_links_and_probes_is_the_oracle():
    q, k = normal(1, 2, 128, 8), normal(1, 1, 128, 8, seed=1)
    config = dhsa.Config(**BASE | {"method": "retrieval", "every": 1, "links": 128, "probes": 128, "local": 16})
    got, best = (lists(dhsa.select(q, k, config.replace(method=m))) for m in ("retrieval", "oracle"))
    for i in (3, 7):  # what lies before the block is found whole, and the block itself is local
        assert got[i] == best[i]
        assert got[8 + i] == best[8 + i]


def test_retrieval_goes_on_from_an_index_of_earlier_calls():
    q, k = normal(1, 2, 200, 8), normal(1, 1, 200, 8, seed=1)
    config = dhsa.Config(**BASE | {"method": "retrieval", "every": 2, "links": 6, "probes": 3})
    whole = lists(dhsa.select(q, k, config))
    state = config.options.new_state()
    dhsa.select(q[:, :, :96], k[:, :, :96], config, state=state)
    rest = lists(dhsa.select(q[:, :, 96:], k, config, state=state))
    assert rest == whole[6:13] + whole[19:]
    assert rest != lists(dhsa.select(q[:, :, 96:], k, config))
    part = state.parts[0, 1]
    assert part.at.tolist() == list(range(0, 200, 2))
    s = q[0, 1, 150] @ k[0, 0, :151].T
    assert set(part.links[75].tolist()) == set(np.argsort(-s)[:6].tolist())
    k[:, :, 70] += 1  # keys from there on are others
    state.open(q.astype(float), k.astype(float))
    assert state.parts[0, 1].at.tolist() == list(range(0, 70, 2))
