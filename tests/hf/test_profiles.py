"""`dhsa.hf.find_head_sizes`: heads get as many keys as the attention mass says, and files keep them."""

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import build, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa import hf  # noqa: E402
from dhsa.hf.profiles import _least, _lost  # noqa: E402

SMALL = {"budget": 40, "sink": 4, "local": 8, "query_block": 16, "dense_tail": 0, "break_even": 0}


def test_the_choice_loses_the_least_mass():
    rng = np.random.default_rng(0)
    sizes = np.array([10, 20, 40])
    lost = np.sort(rng.random((5, 3)))[:, ::-1]
    lost[:, 1] = np.minimum(lost[:, 1], (2 * lost[:, 0] + lost[:, 2]) / 3)  # convex: a rate then finds the best
    picked = _least(lost, sizes, 22)
    assert sizes[picked].mean() <= 22
    cost = lost[np.arange(5), picked].sum()
    for other in itertools.product(range(3), repeat=5):
        if sizes[list(other)].sum() <= sizes[picked].sum():
            assert cost <= lost[np.arange(5), list(other)].sum() + 1e-12


@pytest.mark.parametrize("method", ["moa", "tca"])
def test_lost_mass_is_what_lists_leave_out(method):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 128, 16, generator=generator), torch.randn(1, 2, 128, 16, generator=generator)
    config = dhsa.Config(method=method, **SMALL)
    sizes = np.array([12, 30, 128])
    got = _lost(3 * q, k, config, sizes, scale=None, softcap=None)
    s = 3 * q[0].double() @ k[0].double().repeat_interleave(2, 0).mT / 4
    p = s.masked_fill(torch.ones(128, 128, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    want = np.zeros((4, 3))
    for i in (4, 5, 6, 7):
        end = 16 * (i + 1)
        mass = p[:, end - 16 : end, :end].mean(1).numpy()
        for h, (j, size) in itertools.product(range(4), enumerate(sizes)):
            keys = [*range(4), *range(end - 8, end)]
            free = [key for key in range(end) if key not in keys]
            free.sort(key=lambda key: -key if method == "moa" else -mass[h, key])
            keys += free[: max(0, size - 12)]
            want[h, j] += (1 - mass[h, keys].sum()) / 4
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("method", ["moa", "tca"])
def test_sizes_of_a_model_are_kept_in_a_file_with_its_name(method, tmp_path):
    model, ids = build("llama"), tokens(1, 150)
    with torch.no_grad():  # its heads attend to few keys each
        model.model.layers[0].self_attn.q_proj.weight.mul_(300)
    found = hf.find_head_sizes(model, ids, dhsa.Config(method=method, **SMALL), sizes=[12, 24, 40, 80])
    name = {"moa": "head_windows", "tca": "head_budgets"}[method]
    chosen = [getattr(found.at(layer), name) for layer in range(4)]
    assert all(len(one) == 4 for one in chosen)
    assert set(sum(chosen, ())) <= {12, 24, 40, 80}
    assert len(set(sum(chosen, ()))) > 1
    assert np.mean(chosen) == pytest.approx(found.notes["mean"], abs=0.05)
    assert found.notes["mean"] <= 40
    assert all(found.at(layer).budget == max(chosen[layer]) for layer in range(4))
    found.save(tmp_path / "sizes.json")
    assert dhsa.Config.load(tmp_path / "sizes.json") == found
    with torch.no_grad(), dhsa.patched(model, tmp_path / "sizes.json"):
        model(ids)
        assert {run.path for run in dhsa.last_run(model)} == {"sparse"}
    with pytest.raises(ValueError, match=r"^config: made for a model with"):
        dhsa.patch(build("gemma3"), tmp_path / "sizes.json")


def test_only_layers_without_a_window_are_measured():
    found = hf.find_head_sizes(build("gemma3"), tokens(1, 150), dhsa.Config(method="moa", **SMALL))
    assert sorted(found.layers) == [1, 3]


def test_what_it_cannot_measure_is_refused():
    model, ids = build("llama"), tokens(1, 150)
    config = dhsa.Config(method="moa", **SMALL)
    for wrong, message in (
        (dhsa.Config(), "config: expected method 'moa' or 'tca', got 'rows'"),
        (config.replace(heads="group"), "config: expected heads='head' and a budget, got 'group'"),
    ):
        with pytest.raises(ValueError, match=rf"^{message}"):
            hf.find_head_sizes(model, ids, wrong)
    with pytest.raises(TypeError, match=r"^config: expected a dhsa.Config, got LayerConfigs"):
        hf.find_head_sizes(model, ids, dhsa.LayerConfigs(default=config, layers={}))
    for bad, message in ((tokens(2, 150), "input_ids: expected a tensor"), (ids[:, :40], "input_ids: 40 tokens")):
        with pytest.raises(ValueError, match=rf"^{message}"):
            hf.find_head_sizes(model, bad, config)
    with pytest.raises(ValueError, match=r"^sizes: none is at most the budget of 40"):
        hf.find_head_sizes(model, ids, config, sizes=[64])
