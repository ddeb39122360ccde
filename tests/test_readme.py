"""The README's word: its Python runs as printed, its table of settings is the Config that there is, its files exist.

Models named there are replaced by tiny ones; its timings are those of the machine it names and are not tested.
"""

import argparse
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from weights import compact_weights

import dhsa
from dhsa.training import command as training

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


def test_snippet_on_a_model(monkeypatch):
    torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    config = transformers.Gemma2Config(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=64, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    asked = []

    class Tokenizer:
        def __call__(self, text, return_tensors):
            assert return_tensors == "pt"
            return {"input_ids": torch.tensor([[2 + ord(c) % 120 for c in text[:3000]]])}

    def give(value):
        return lambda name, **kwargs: asked.append(name) or value

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", give(model))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", give(Tokenizer()))
    monkeypatch.chdir(ROOT)
    (code,) = (s for s in SNIPPETS if "from_pretrained" in s)
    exec(code, {})
    assert len(asked) == 2
    runs = dhsa.last_run(model, "prefill")
    assert [(r.kind, r.path) for r in runs] == [("sliding", "window"), ("full", "sparse")]
    assert model.config._attn_implementation == "dhsa"  # the snippet's last patch is for good


def test_snippet_on_arrays():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, 2500, 16), dtype=np.float32) for h in (2, 1, 1))
    (code,) = (s for s in SNIPPETS if "dhsa.select" in s)
    names = {"q": q, "k": k, "v": v, "dhsa": dhsa}
    exec(code, names)
    assert names["out"].shape == q.shape
    assert names["lse"].shape == (1, 2, 2500)
    assert 0 < names["selection"].density() < 1


def test_snippet_on_a_predictor(tmp_path, monkeypatch):
    pytest.importorskip("safetensors", reason="needs the predictor extra: safetensors")
    monkeypatch.chdir(tmp_path)
    dhsa.BoundaryPredictor.from_state_dict(compact_weights(16)).save("mine.safetensors")
    (code,) = (s for s in SNIPPETS if "mine.safetensors" in s)
    config = eval(code, {"dhsa": dhsa})
    assert (config.boundaries, config.predictor.channels) == ("predictor", 16)
    (command,) = re.findall(r"^python -m (dhsa train-boundaries .*)$", TEXT, re.M)
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    assert str(parser.parse_args(command.split()[2:]).out) == "mine.safetensors"


def test_every_snippet_is_run():
    assert len(SNIPPETS) == 3


def test_table_of_settings():
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \| .+ \|$", TEXT, re.M)
    printed = {}
    for names, values in rows:
        names, values = re.findall(r"`(\w+)`", names), [v.strip(" `") for v in values.split(",")]
        printed.update(zip(names, values, strict=True))
    fields = {f.name for f in dataclasses.fields(dhsa.Config)}
    expected = {"budget", "query_block", "sink", "local", "dense_tail", "heads", "boundaries", "method", "mass"}
    assert expected <= set(printed)
    assert set(printed) <= fields
    for name, value in printed.items():
        assert str(getattr(dhsa.Config(), name)) == value.strip('"'), name


def test_files_named_exist():
    for name in re.findall(r"`((?:docs|notebooks|benchmarks)/[\w./]+)`|\]\((docs/[^)]+)\)", TEXT):
        path = name[0] or name[1]
        assert (ROOT / path).exists(), path
