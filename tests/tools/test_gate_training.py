"""Training gates of `seer` by the loop of boundary predictors; tiny models."""

import numpy as np
import pytest

for name in ("torch", "transformers", "rich", "safetensors"):
    pytest.importorskip(name, reason=f"needs the demo extra: {name}")

import torch  # noqa: E402
from test_evaluation import folder  # noqa: E402, F401
from tiny import build, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa import __main__ as command_line  # noqa: E402
from dhsa import reference  # noqa: E402
from dhsa.commands import UserError  # noqa: E402
from dhsa.methods.gates import load_gates  # noqa: E402
from dhsa.training import documents, gates, loop  # noqa: E402
from dhsa.training.settings import Settings  # noqa: E402

SMALL = Settings(architecture="gate", tokens=512, epochs=3, rate=3e-3)


def text(train=3, held_out=1, length=512):
    """Few words that return, so that attention has something to find."""
    pieces = [(tokens(1, length, seed=i)[0] % 7 + 2).tolist() for i in range(train + held_out)]
    return documents.Text(pieces[:train], pieces[train:], "random tokens")


@pytest.fixture(scope="module")
def sharp():
    """Heads that attend to few keys."""
    model = build("llama", num_hidden_layers=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def done(sharp):
    return loop.train(sharp, text(), SMALL)


def crops(model, ids):
    found = {}
    gates._see(model, ids, None, lambda crop: found.setdefault(crop.layer, crop))
    return found


def test_labels_are_the_largest_probabilities_between_blocks(sharp):
    ids = text().train[0]
    with torch.no_grad():
        attentions = sharp.model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    for layer, crop in crops(sharp, ids).items():
        p = attentions[layer][0].unflatten(-1, (8, 64)).amax(-1).unflatten(1, (8, 64)).amax(2)
        torch.testing.assert_close(crop.labels, p / p.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
        assert crop.inv_freq is not None


def test_the_network_in_torch_and_the_method_agree(sharp, done, tmp_path):
    done.predictor.save(tmp_path / "g.safetensors")
    ids, seen = text().train[0], {}
    with torch.no_grad():
        dhsa.hf.watching.watch_layers(
            sharp.model, torch.tensor([ids]), lambda layer, q, k, v, o: seen.setdefault(layer, (q.clone(), k.clone()))
        )
    for layer, crop in crops(sharp, ids).items():
        gate = done.predictor.of(layer)
        network = gates.GateNetwork(4, 2, 16, crop.inv_freq)
        network.load_state_dict({"query": torch.from_numpy(gate.query), "key": torch.from_numpy(gate.key)})
        with torch.no_grad():
            want = network(crop.queries, 0, crop.keys).softmax(-1)
        q, k = (x.numpy() for x in seen[layer])
        options = {"gates": str(tmp_path / "g.safetensors"), "layer": layer, "key_block": 64, "heads": "head"}
        blocks = reference.method_blocks(
            "seer", q, k, budget=100, query_block=64, dense_tail=0, sink=0, local=0, **options
        )
        for at, (here, found) in enumerate(blocks):
            if found is not None:
                row = want[at // 8, at % 8, : here.index + 1].numpy()
                np.testing.assert_allclose(found.score, row, rtol=2e-3, atol=1e-6)


def test_training_finds_the_blocks_better_than_means(done):
    assert done.history[-1]["own"] < done.history[0]["own"]
    for row in done.scores.values():
        assert row["own"]["recall"] > row["random"]["recall"]
    own, means = (np.mean([row[who]["average_precision"] for row in done.scores.values()]) for who in ("own", "means"))
    assert own > means


def test_a_patched_model_has_the_gate_of_each_layer(sharp, done, tmp_path):
    path = tmp_path / "g.safetensors"
    done.predictor.save(path)
    config = dhsa.Config(method="seer", gates=path, budget=128, sink=4, local=32, dense_tail=16)
    ids = torch.tensor([text().held_out[0]])
    with torch.no_grad(), dhsa.patched(sharp, config):
        got = sharp(ids).logits
        assert {run.path for run in dhsa.last_run(sharp)} == {"sparse"}
        configs = [layer.self_attn.__dict__["_dhsa_state"].config_for(i) for i, layer in enumerate(sharp.model.layers)]
        assert [one.layer for one in configs] == [0, 1]
    with torch.no_grad(), dhsa.patched(sharp, config.replace(gates=None)):
        assert not torch.equal(sharp(ids).logits, got)
    with pytest.raises(ValueError, match=r"^method: 'seer' has options that were trained for a model with"):
        dhsa.patch(build("qwen3"), config)
    some = loop.train(sharp, text(), Settings(**SMALL.fields() | {"layers": (1,), "epochs": 2}))
    some.predictor.save(path)
    with pytest.raises(ValueError, match=r"^layer: got 0, but the gates are those of layers \[1\]"):
        dhsa.patch(sharp, config)


def test_an_interrupted_training_continues_to_the_same_gates(sharp, done, tmp_path):
    state, steps = tmp_path / "s.state", []

    def stop():
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(sharp, text(), SMALL, state=state, advance=stop)
    again = loop.train(sharp, text(), SMALL, state=state)
    assert again.resumed == 1
    for layer, gate in done.predictor.layers.items():
        np.testing.assert_array_equal(again.predictor.of(layer).query, gate.query)
        np.testing.assert_array_equal(again.predictor.of(layer).key, gate.key)


def test_only_layers_without_a_window_have_gates():
    assert sorted(crops(build("gemma3"), text().train[0])) == [1, 3]


def test_what_cannot_be_trained_is_refused(sharp):
    with pytest.raises(ValueError, match=r"^networks: each layer has gates of its own; expected 'layers', got 'both'"):
        Settings(architecture="gate", networks="both")
    with pytest.raises(UserError, match=r"^text: a piece of 100 tokens has too few blocks of 64"):
        loop.train(sharp, text(length=100), SMALL)
    with pytest.raises(UserError, match=r"^layers: \[7\] have no attention without a window"):
        loop.train(sharp, text(), Settings(**SMALL.fields() | {"layers": (0, 7)}))
    with pytest.raises(UserError, match=r"^pool_mib: 1 MiB do not hold"):
        loop.train(sharp, text(), Settings(**SMALL.fields() | {"pool_mib": 1, "crop": 2**20}))


def test_the_command(folder, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "g.safetensors"
    for i in range(6):
        line = f"The clerk of ship {i} wrote a letter. "
        (tmp_path / f"{i}.txt").write_text(line * 20, "utf-8")
    words = ["train-boundaries", "--model", folder, "--text", *sorted(tmp_path.glob("*.txt")), "--out", out]
    words += ["--tokens", 512, "--held-out", 1, "--threads", 1, "--architecture", "gate", "--epochs", 4]
    words = list(map(str, words))
    assert command_line.main([*words, "--dtype", "float16"]) == 2
    assert "--dtype: float16 says nothing about gates" in capsys.readouterr().err
    assert command_line.main(words) == 0
    assert load_gates(str(out)).notes["text"].startswith("0.txt, 1.txt")
    assert 'Gates of the method "seer"' in out.with_suffix(".md").read_text("utf-8")
    assert 'method="seer", gates=' in capsys.readouterr().err
