"""The formulas of benchmarks/scaling.py: bytes beside those that ranks count on tiny models, times beside sums by hand,
and the program itself on given rates."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

import ranks  # noqa: E402
import tiny  # noqa: E402

import dhsa  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 300
SPARSE = tiny.SPARSE.replace(break_even=0)
CONFIGS = {
    "exact": tiny.EXACT,
    "default": SPARSE.replace(shortlist=0),
    "shortlist": SPARSE.replace(shortlist=128),
    "window": SPARSE.replace(method="window"),
    "narrow": SPARSE.replace(budget=40, local=16),  # layers with a window leave keys out too
}


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    return scaling


def counted(rank, size, family, config):
    """The bytes that this rank sent in each layer, and how many rows it was sent by each other rank in each layer that
    selects among all keys."""
    from dhsa.distributed import sparse

    rows, wanted = [], sparse._wanted

    def noted(*args):
        found = wanted(*args)
        rows.append(len(found))
        return found

    sparse._wanted = noted
    model = tiny.build(family)
    with dhsa.patched(model, config, group=torch.distributed.group.WORLD, timeout=60):
        model(tiny.tokens(1, LENGTH, seed=4), use_cache=False)
        sent = [run.sent_bytes for run in dhsa.last_run(model)]
    heads = model.config.num_key_value_heads
    sums = [sum(rows[i : i + heads]) for i in range(0, len(rows), heads)]
    layers = [sums[i : i + size - 1] for i in range(0, len(sums), size - 1)]
    others = [other for other in range(size) if other != rank]
    return sent, [dict(zip(others, layer, strict=True)) for layer in layers]


@pytest.mark.parametrize(("size", "name"), [(2, "exact"), (4, "exact"), (3, "default"), (3, "shortlist"), (2, "window"),
                                            (4, "narrow")])  # fmt: skip
def test_bytes_are_those_that_ranks_count(scaling, size, name, tmp_path):
    config = CONFIGS[name]
    found = ranks.run(size, counted, tmp_path, "gemma3", config)
    shape = scaling.shape_of(tiny.build("gemma3").config, "tiny")
    parts = scaling.parts_of(config, LENGTH, size)
    row, selecting = 2 * shape.kv_heads * shape.dim * 4, 0
    for layer, window in enumerate(shape.windows):
        if window is None and config.leaves_out(LENGTH, LENGTH):
            asked = [rows[selecting] for _, rows in found]
            sizes = scaling.sparse_bytes(
                parts, shape, config, 4, LENGTH, lambda holder, rank, asked=asked: asked[rank][holder]
            ).total()
            selecting += 1
        else:
            made = scaling._layer(shape, config, LENGTH, parts, scaling.Rates(1, 1, 1, 1), row, 4, window, lambda *_: 0)
            sizes = made.sizes if isinstance(made, scaling._Exact) else made.sizes.total()
        for rank, (sent, _) in enumerate(found):
            assert sum(size for (r, _), size in sizes.items() if r == rank) == sent[layer], (layer, rank)
    assert sum(sum(sent) for sent, _ in found) > 0


def test_pairs_are_those_of_a_mask(scaling):
    for window in (None, 1, 5, 64):
        for a, b, c, d in ((0, 9, 0, 9), (8, 20, 0, 8), (3, 12, 6, 20), (5, 6, 7, 9), (10, 30, 0, 30)):
            seen = sum(k <= q and (window is None or k > q - window) for q in range(a, b) for k in range(c, d))
            assert scaling.pairs_of((a, b), (c, d), window) == seen


def test_an_exchange_takes_what_its_busier_end_takes(scaling):
    network = scaling.Network(bandwidth=100.0, latency=0.5)
    received, handed = scaling.exchange([0.0, 1.0, 4.0], {(0, 1): 200, (0, 2): 100}, network)
    assert received == [0.0, 1.0 + 0.5 + 3.0, 4.0 + 0.5 + 3.0]  # rank 0 sends 300 bytes
    assert handed == [7.5, 1.0, 4.0]


def test_machines_divide_the_work(scaling):
    shape = scaling.Shape("some", "llama", 256, 512, 8, 4, 32, (None, 512))
    rates = scaling.Rates(1e-6, 1.0, 1.0, 1.0)
    free = scaling.Network(1e18, 0.0)
    sparse = dhsa.Config(budget=1024)
    for config, least in ((tiny.EXACT, 3.99), (sparse, 3.0)):
        alone, four = (scaling.predict(shape, config, 1 << 15, n, rates, free) for n in (1, 4))
        assert least <= alone.seconds / four.seconds <= 4.0
        row = 2 * 4 * 32 * 4
        assert (alone.held, four.held) == (row * ((1 << 15) + 511), row * ((1 << 13) + 511))
        assert alone.sent == alone.waits == 0
    pairs = (1 << 15) * ((1 << 15) + 1) // 2
    costs = scaling.break_even.COSTS["float32"]
    windowed = scaling.pairs_of((0, 1 << 15), (0, 1 << 15), 512)
    expected = 2 * (1 << 15) * 1e-6 + (pairs + windowed) * 8 * 32 * costs.product
    assert scaling.predict(shape, tiny.EXACT, 1 << 15, 1, rates, free).seconds == pytest.approx(expected)
    # On a slow network a prompt takes as long as its bytes.
    slow = scaling.Network(1e5, 0.0)
    made = scaling.predict(shape, tiny.EXACT, 1 << 15, 2, rates, slow)
    assert made.seconds == pytest.approx(made.sent / 1e5, rel=0.1)
    latent = scaling.predict(shape, tiny.EXACT, 1 << 15, 2, rates, scaling.Network(1e18, 0.5))
    quick = scaling.predict(shape, tiny.EXACT, 1 << 15, 2, rates, free)
    assert latent.seconds >= quick.seconds + 0.99  # the facts of the call and the last hidden state are waited for


def test_independent_lists_select_all_keys_in_the_end(scaling):
    shape, config = scaling.SHAPES["llama-8b"], dhsa.Config(budget=1024)
    parts = scaling.parts_of(config, 1 << 16, 4)
    rows = scaling.independent(parts, shape, config)
    keys = (1 << 14) * shape.kv_heads
    assert 0 < rows(0, 1) <= keys
    few = scaling.independent(parts, shape, config.replace(budget=64, sink=4, local=16))
    assert few(0, 1) < rows(0, 1)


def test_the_program(scaling, tmp_path, capsys):
    rates = {"llama-8b": {"other": 1e-4, "exact": 1.0, "select": 1.0, "attend": 1.0, "dtype": "float32"}}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    args = ["--bandwidth", "1000", "--latency", "0.2", "--models", "llama-8b", "--lengths", "131072", "--machines", "1",
            "8", "--rates", str(tmp_path / "rates.json"), "--json", str(tmp_path / "out.json")]  # fmt: skip
    scaling.main(args)
    out = capsys.readouterr().out
    assert out.count("131,072") == 4
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["machines"] for row in rows] == [1, 8, 1, 8]
    assert rows[0]["speed_up"] == 1.0
    assert rows[1]["seconds"] < rows[0]["seconds"]
    scaling.main([*args, "--fetched", "0"])
    less = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert less[3]["sent"] < rows[3]["sent"]


def test_a_calibration(scaling):
    shape = scaling.Shape("some", "llama", 64, 96, 4, 2, 16, (None,))
    config = dhsa.Config(budget=64, sink=4, local=16, query_block=32, dense_tail=16, break_even=0)
    rates = scaling.calibrate(shape, config, "float32", tokens=512, rounds=1)
    assert rates.other > 0
    assert min(rates.exact, rates.select, rates.attend) > 0
    with pytest.raises(ValueError, match="tokens: 32 are within the budget"):
        scaling.calibrate(shape, config, "float32", tokens=32)


def test_a_benchmark_of_one_layer(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_parallel

    out = tmp_path / "out.json"
    bench_parallel.main(["bytes", "balance", "--tokens", "1024", "--budget", "96", "--ranks", "3", "--rounds", "1",
                         "--heads", "4", "2", "16", "--json", str(out)])  # fmt: skip
    said = capsys.readouterr().out
    assert "goal 0.33: " in said
    made = json.loads(out.read_text())
    *each, shares = made["bytes"]
    assert [one["sent"] for one in each] == [one["formula"] for one in each]
    assert sum(one["sent"] for one in each) > 0
    assert 0 < shares["fetched"] <= 1
    exact, sparse = made["balance"]
    assert max(exact["pairs"]) <= 1.01 * min(exact["pairs"])  # early and late parts
    assert len(sparse["cpu"]) == 3


def test_a_benchmark_of_a_model(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_parallel

    tiny.build("llama").save_pretrained(tmp_path / "model")
    tiny.character_tokenizer().save_pretrained(tmp_path / "model")
    args = ["cost", "bytes", "--model", tmp_path / "model", "--tokens", 512, "--budget", 96, "--rounds", 1]
    bench_parallel.main([*map(str, args), "--ranks", "2", "--json", str(tmp_path / "out.json")])
    made = json.loads((tmp_path / "out.json").read_text())
    assert [one["same"] for one in made["cost"]] == [True, True]
    assert all(0.5 <= one["held"] <= 0.6 for one in made["cost"])
    assert [one["sent"] for one in made["bytes"][:2]] == [one["formula"] for one in made["bytes"][:2]]
    assert "keys and values 0.5" in capsys.readouterr().out
