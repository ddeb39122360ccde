"""`seer`: gates of pooled queries and keys, their files, and those of the source."""

import json

import numpy as np
import pytest

import dhsa
from dhsa import reference
from dhsa.methods.gates import Gate, Gates, _frequencies, load_gates, rotated

pytest.importorskip("safetensors", reason="needs the predictor extra: safetensors")

BLOCK, DIM = 16, 8
CONFIG = {"method": "seer", "budget": 48, "sink": 0, "local": 16, "dense_tail": 0, "query_block": BLOCK}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gates(layers=1, heads=2, kv=1, rope=True, pools=("max", "min", "mean"), width=DIM, **more):
    made = {
        layer: Gate(normal(heads, DIM, width, seed=layer), normal(kv, len(pools) * DIM, width, seed=layer + 50))
        for layer in range(layers)
    }
    inv_freq = 100.0 ** -(np.arange(0, DIM, 2) / DIM) if rope else None
    return Gates(BLOCK, ("mean",), pools, made, inv_freq, **more)


def config(path, **more):
    return dhsa.Config(**CONFIG | {"gates": str(path), "key_block": BLOCK} | more)


def by_hand(q, k, held, layer=0):
    """The score of each block of keys for the last block of queries and each head: the source's forward pass."""
    heads, length = q.shape[1], k.shape[2]

    def rope(x, at):
        angles = np.outer(at, held.inv_freq)
        z = (x[:, : DIM // 2] + 1j * x[:, DIM // 2 :]) * np.exp(1j * angles)
        return np.hstack([z.real, z.imag])

    gate, found = held.layers[layer], []
    for h in range(heads):
        kv = h * k.shape[1] // heads
        plain_q, plain_k = (rope(x.astype(float), -np.arange(length)) for x in (q[0, h], k[0, kv]))
        blocks = plain_k.reshape(-1, BLOCK, DIM)
        pooled = np.hstack(
            [{"max": blocks.max, "min": blocks.min, "mean": blocks.mean}[p](axis=1) for p in held.key_pools]
        )
        keys = rope(pooled @ gate.key[h * len(gate.key) // heads], np.arange(0, length, BLOCK))
        query = rope(plain_q[-BLOCK:].mean(axis=0, keepdims=True) @ gate.query[h], np.array([length - BLOCK]))
        s = (query @ keys.T)[0] / np.sqrt(keys.shape[1])
        found.append(np.exp(s - s.max()) / np.exp(s - s.max()).sum())
    return np.array(found)


def test_blocks_are_ranked_as_the_source_ranks_them(tmp_path):
    held, q, k = gates(), normal(1, 2, 128, DIM), normal(1, 1, 128, DIM, seed=1)
    held.save(tmp_path / "g.safetensors")
    got = dhsa.select(q, k, config(tmp_path / "g.safetensors"))
    for head, scores in enumerate(by_hand(q, k, held)):
        best = np.argsort(-scores[:7])[:2]
        want = sorted([*(BLOCK * b + i for b in best for i in range(BLOCK)), *range(112, 128)])
        row = head * 8 + 7
        assert got.indices[got.indptr[row] : got.indptr[row + 1]].tolist() == want


def test_without_gates_it_is_the_method_block():
    q, k = normal(2, 4, 150, 8), normal(2, 2, 183, 8, seed=1)
    options = {
        "budget": 40,
        "query_block": 16,
        "sink": 4,
        "local": 8,
        "dense_tail": 8,
        "heads": "head",
        "key_block": 12,
    }
    for bounds in ({}, {"budget": None, "mass": 0.6}):
        one = dhsa.Config(**options | bounds | {"method": "seer"})
        assert dhsa.select(q, k, one) == dhsa.select(q, k, one.replace(method="block", key_block=12))


def test_parts_of_a_block_are_pooled_over_what_they_have(tmp_path):
    held, q, k = gates(), normal(1, 2, 100, DIM), normal(1, 1, 100, DIM, seed=1)
    held.save(tmp_path / "g.safetensors")
    one = config(tmp_path / "g.safetensors", budget=20, local=0, query_block=BLOCK)
    options = {"gates": one.gates, "layer": None, "key_block": BLOCK, "heads": "head", "sink": 0, "local": 0}
    blocks = list(reference.method_blocks("seer", q, k, budget=20, query_block=BLOCK, dense_tail=0, **options))
    last, found = blocks[6]
    assert (last.end, len(found.score)) == (100, 7)
    again = list(
        reference.method_blocks(
            "seer", q[:, :, :96], k[:, :, :96], budget=20, query_block=BLOCK, dense_tail=0, **options
        )
    )[5][1]
    np.testing.assert_array_equal(again.score, blocks[5][1].score)
    assert found.mass.sum() == pytest.approx(1)


def test_turning_back_undoes_turning():
    x, at = normal(5, DIM).astype(float), np.array([0, 3, 70, 900, 8000])
    inv_freq = 10000.0 ** -(np.arange(0, DIM, 2) / DIM)
    np.testing.assert_allclose(rotated(rotated(x, at, inv_freq), -at, inv_freq), x, atol=1e-12)
    np.testing.assert_array_equal(rotated(x, np.zeros(5), inv_freq), x)


def test_files_are_read_as_they_were_written(tmp_path):
    held = gates(layers=3, kv=2, model={"model_type": "llama"}, notes={"text": "prose"})
    held.save(tmp_path / "g.safetensors")
    read = load_gates(str(tmp_path / "g.safetensors"))
    assert (read.block, read.query_pools, read.key_pools) == (BLOCK, ("mean",), ("max", "min", "mean"))
    assert (read.model, read.notes) == ({"model_type": "llama"}, {"text": "prose"})
    np.testing.assert_allclose(read.inv_freq, held.inv_freq, rtol=1e-7)
    for layer, gate in held.layers.items():
        np.testing.assert_array_equal(read.of(layer).query, gate.query)
        np.testing.assert_array_equal(read.of(layer).key, gate.key)
    assert load_gates(str(tmp_path / "g.safetensors")) is read
    gates(layers=2).save(tmp_path / "g.safetensors")
    assert sorted(load_gates(str(tmp_path / "g.safetensors")).layers) == [0, 1]


@pytest.mark.parametrize("double", [True, False])
def test_gates_of_the_source_are_read(tmp_path, double):
    """A PyTorch checkpoint in bfloat16 with the names of the authors' modules, and the config beside it."""
    torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
    weights = {}
    for layer in range(2):
        part = f"model.layers.{layer}.self_attn.attn_gate.mask_linear"
        weights[f"{part}_k.weight"] = torch.from_numpy(
            normal(2, 3 * DIM if double else DIM, DIM, seed=layer)
        ).bfloat16()
        if double:
            weights[f"{part}_q.weight"] = torch.from_numpy(normal(4, DIM, DIM, seed=layer + 9)).bfloat16()
    torch.save(weights, tmp_path / "attn_gate_weights.pth")
    told = {
        "seerattn_gate_type": "Qavg_Kmaxminavg" if double else "Qavg_Kavg", "seerattn_gate_block_size": 64,
        "hidden_size": 4 * DIM, "num_attention_heads": 4, "rope_theta": 500.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(told))
    read = load_gates(str(tmp_path / "attn_gate_weights.pth"))
    assert (read.block, read.query_pools) == (64, ("mean",))
    assert read.key_pools == (("max", "min", "mean") if double else ("mean",))
    np.testing.assert_allclose(read.inv_freq, 500.0 ** -np.array([0, 0.25, 0.5, 0.75]))
    for layer in range(2):
        gate = read.of(layer)
        key = weights[f"model.layers.{layer}.self_attn.attn_gate.mask_linear_k.weight"]
        np.testing.assert_array_equal(gate.key, key.float().numpy())
        assert (gate.query is not None) == double
    one = dhsa.Config(**CONFIG | {"query_block": 64, "gates": str(tmp_path / "attn_gate_weights.pth"), "layer": 1})
    q, k = normal(1, 4, 300, DIM), normal(1, 2, 300, DIM, seed=1)
    assert dhsa.select(q, k, one) != dhsa.select(q, k, one.replace(gates=None, layer=None))
    (tmp_path / "config.json").write_text(json.dumps(told | {"rope_scaling": {"rope_type": "yarn", "factor": 4}}))
    (tmp_path / "attn_gate_weights.pth").touch()
    with pytest.raises(NotImplementedError, match=r"rope_scaling: expected none, 'default' or 'llama3', got 'yarn'"):
        load_gates(str(tmp_path / "attn_gate_weights.pth"))


def test_frequencies_are_those_of_the_model():
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    from tiny import LLAMA3_ROPE
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(head_dim=32, rope_parameters=LLAMA3_ROPE)
    want = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].numpy()
    told = {"head_dim": 32, "rope_theta": LLAMA3_ROPE["rope_theta"], "rope_scaling": LLAMA3_ROPE}
    np.testing.assert_allclose(_frequencies(told), want, rtol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "g.safetensors"
    gates(layers=2).save(path)
    q, k = normal(1, 2, 128, DIM), normal(1, 1, 128, DIM, seed=1)
    with pytest.raises(ValueError, match=r"^layer: got None, but the gates are those of layers \[0, 1\]"):
        dhsa.select(q, k, config(path))
    with pytest.raises(ValueError, match=r"^layer: got 5, but the gates"):
        dhsa.select(q, k, config(path, layer=5))
    for name in ("query_block", "key_block"):
        with pytest.raises(ValueError, match=rf"^{name}: got 32, but the gates were trained for blocks of 16"):
            config(path, **{name: 32})
    with pytest.raises(ValueError, match=r"^gates: trained for 2 query heads, but the layer has 4"):
        dhsa.select(normal(1, 4, 128, DIM), k, config(path, layer=0))
    with pytest.raises(ValueError, match=r"^gates: trained for heads of 8 numbers, but the layer has 6"):
        dhsa.select(q[..., :6], k[..., :6], config(path, layer=0))
    with pytest.raises(TypeError, match=r"^gates: expected a path or None, got int"):
        dhsa.Config(method="seer", gates=3)
    with pytest.raises(FileNotFoundError):
        config(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      rest")
    with pytest.raises(ValueError, match=r"^gates: .*bad.safetensors: "):
        config(tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"^layers.0.query: expected 8 inputs and 5 outputs"):
        Gates(BLOCK, ("mean",), ("mean",), {0: Gate(normal(2, 8, 4), normal(1, 8, 5))})
    with pytest.raises(ValueError, match=r"^key_pools: expected some of max, min, mean, got median"):
        Gates(BLOCK, ("mean",), ("median",), {0: Gate(None, normal(1, 8, 8))})
    with pytest.raises(ValueError, match=r"^layers.0.key: with 3 rotary frequencies expected heads of 6"):
        Gates(BLOCK, ("mean",), ("mean",), {0: Gate(None, normal(1, 8, 8))}, np.ones(3))
