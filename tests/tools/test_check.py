"""The doctor: its numbers against a computation of their own, models left as they were, what it refuses, its table and
command. Its sentences are in test_check_sentences.py."""

import dataclasses
import re
import threading

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SPARSE, build, masked_softmax, padded, tokens  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

import dhsa  # noqa: E402
from dhsa import __main__ as command_line  # noqa: E402
from dhsa import hf  # noqa: E402


def divergence(exact, sparse):
    exact, sparse = (torch.log_softmax(x.double(), -1) for x in (exact, sparse))
    return (exact.exp() * (exact - sparse)).sum(-1)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_numbers_of_the_whole_model(family):
    """Gemma 2 caps its logits after its head: the logits compared are the model's own."""
    model, ids = build(family), tokens(2, 400)
    with torch.no_grad():
        if family == "llama":
            model.lm_head.weight.mul_(8)  # logits lie far apart, so that what attention loses shows in them
        with dhsa.patched(model, EXACT):
            exact = model(ids).logits
        with dhsa.patched(model, SPARSE):
            sparse = model(ids).logits
            runs = dhsa.last_run(model)
    found = dhsa.check(model, ids, SPARSE)
    expected = divergence(exact[:, -64:], sparse[:, -64:])
    assert expected[:, -1].min() > 1e-6
    torch.testing.assert_close(torch.tensor(found.kl).double(), expected[:, -1], rtol=1e-3, atol=1e-9)
    assert found.tail == 64
    assert found.tail_kl == pytest.approx(float(expected.mean()), rel=1e-3)
    best = exact.argmax(-1), sparse.argmax(-1)
    assert found.next_tokens == tuple(zip(best[0][:, -1].tolist(), best[1][:, -1].tolist(), strict=True))
    assert found.agree == tuple((best[0] == best[1])[:, -1].tolist())
    assert found.tail_agree == pytest.approx(float((best[0] == best[1])[:, -64:].double().mean()))
    assert 0 < found.tail_agree < 1
    assert found.shape == (2, 400)
    assert [(x.layer, x.kind, x.path, x.density) for x in found.layers] == [
        (r.layer, r.kind, r.path, r.density) for r in runs
    ]
    for layer in found.layers:
        assert layer.exact_seconds > 0
        assert layer.attend_seconds > 0
        assert (layer.select_seconds > 0) == (layer.path == "sparse") == (layer.why == "") == (layer.output_error > 0)
        assert layer.not_finite == ""
    assert found.exact_seconds > sum(layer.exact_seconds for layer in found.layers)
    assert found.sparse_seconds > sum(layer.select_seconds + layer.attend_seconds for layer in found.layers)


def test_output_errors_are_each_layers_own(monkeypatch):
    """From the queries, keys and values that the sparse run gave each layer, in float64."""
    model, ids, expected = build("gemma2"), tokens(1, 300), []
    plain = hf.attention_forward

    def kept(module, q, k, v, mask, **options):
        out, _ = plain(module, q, k, v, mask, **options)
        i = torch.arange(300)
        visible = i[:, None] >= i
        if (window := options.get("sliding_window")) is not None:
            visible &= i[:, None] - i < window
        exact = masked_softmax(q, k, v, visible, options["scaling"], options["softcap"]).transpose(1, 2)
        expected.append(float((out - exact).norm() / exact.norm()))
        return out, None

    with torch.no_grad(), dhsa.patched(model, SPARSE), monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "dhsa", kept)
        model(ids)
    assert len(expected) == 4
    found = [layer.output_error for layer in dhsa.check(model, ids, SPARSE).layers]
    assert found[0] == found[2] == 0
    assert max(expected[0], expected[2]) < 1e-5
    assert found[1] == pytest.approx(expected[1], rel=1e-3)
    assert found[3] == pytest.approx(expected[3], rel=1e-3)
    assert found[3] > 0.05


def test_skipped_tiles_count_as_an_error():
    model, ids = build("llama"), tokens(1, 600)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
    found = dhsa.check(model, ids, EXACT.replace(skip=0.5))
    assert all(layer.path == "dense" and layer.skipped > 0 and layer.output_error > 0 for layer in found.layers)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_judged_at_their_own_ends(side):
    model, lengths = build("gemma2"), [300, 171]
    ids, mask = padded(lengths, 300, side)
    found = dhsa.check(model, ids, SPARSE, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = dhsa.check(model, tokens(1, length, seed=row), SPARSE)
        assert alone.kl[0] > 1e-6
        assert found.kl[row] == pytest.approx(alone.kl[0], rel=1e-2)
        assert found.next_tokens[row] == alone.next_tokens[0]
    assert found.tail == 64
    ids, mask = padded([300, 9], 300, side)
    assert dhsa.check(model, ids, SPARSE, attention_mask=mask.bool()).tail == 9


def test_exact_is_exact():
    found = dhsa.check(build("gemma3", "sdpa"), tokens(1, 200), EXACT)
    assert found.ok
    assert (found.kl, found.tail_kl, found.agree, found.tail_agree) == ((0.0,), 0.0, (True,), 1.0)
    assert {layer.output_error for layer in found.layers} == {0.0}
    assert any("Layers 0-3 ran exact: the config is exact" in warning for warning in found.warnings)


def test_no_tensor_grows_with_the_square_of_the_prompt_nor_with_its_logits():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    model, ids = build("gemma2", vocab_size=4000), tokens(1, 1500)
    with Largest() as seen:
        dhsa.check(model, ids, SPARSE)
    assert seen.numbers >= 64 * 4000  # it did watch
    assert seen.numbers < 1500**2 / 4


# ---- the model is left alone -----------------------------------------------------------------------------------------


def snapshot(model):
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[name, key] = value
            if isinstance(value, dict):
                found[name, key, "items"] = list(value.items())
            if isinstance(value, transformers.PreTrainedConfig):
                found[name, key, "implementation"] = value._attn_implementation
    return found


def same(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        simple = isinstance(value, (bool, int, float, str, list, tuple))
        assert after[key] == value if simple else after[key] is value, key


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_model_is_left_as_it_was(patched, training):
    model, ids, other = build("gemma3", "sdpa"), tokens(1, 200), SPARSE.replace(budget=80)
    if patched:
        dhsa.patch(model, SPARSE, layers=[3])
        with torch.no_grad():
            model.generate(ids, max_new_tokens=2)
    model.train(training)
    model.model.layers[1].eval()
    before, runs = snapshot(model), dhsa.last_run(model)
    dhsa.check(model, ids, other)
    same(before, snapshot(model))
    with pytest.raises(ValueError, match=r"layers: \[9\] not in this model"):
        dhsa.check(model, ids, other, layers=[9])

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dhsa.check(model, ids, other, advance=stop)
    same(before, snapshot(model))
    assert dhsa.last_run(model) == runs
    assert model.config._attn_implementation == ("dhsa" if patched else "sdpa")
    if patched:
        dhsa.unpatch(model)
        assert model.config._attn_implementation == "sdpa"


def test_a_patched_models_own_config_and_layers_are_checked():
    model, ids = build("gemma2"), tokens(1, 300)
    assert [x.path for x in dhsa.check(model, ids).layers] == ["window", "dense"] * 2  # the default: within the budget
    with dhsa.patched(model, SPARSE, layers=[3]):
        found = dhsa.check(model, ids)
        assert found.config is SPARSE
        assert [x.path for x in found.layers] == ["window", "dense", "window", "sparse"]
        assert [x.path for x in dhsa.check(model, ids, layers=[1]).layers] == ["window", "sparse", "window", "dense"]
        assert [x.path for x in dhsa.check(model, ids, SPARSE).layers] == ["window", "sparse", "window", "sparse"]


def test_other_models_run_on_meanwhile():
    """Progress comes layer by layer, and while it does, transformers' attention functions are what they were."""
    model, other, ids = build("gemma2"), dhsa.patch(build("llama"), SPARSE), tokens(1, 300)
    steps, paths = [], []

    def beside():
        with torch.no_grad():
            other(ids)
        paths.extend(run.path for run in dhsa.last_run(other))

    def advance():
        assert ALL_ATTENTION_FUNCTIONS["dhsa"] is hf.attention_forward
        steps.append(1)
        if len(steps) == 6:
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()

    found = dhsa.check(model, ids, SPARSE, advance=advance)
    assert len(steps) == 8
    assert paths == ["sparse"] * 4
    assert [x.path for x in found.layers] == ["window", "sparse"] * 2


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids: expected an int64 or int32 tensor, got list"),
        ({"input_ids": torch.zeros(1, 9)}, TypeError, r"input_ids: .* got torch\.float32"),
        ({"input_ids": tokens(1, 9)[0]}, ValueError, r"input_ids: expected shape \[B, L\].*got \[9\]"),
        ({"input_ids": tokens(1, 1)}, ValueError, r"L at least 2, got \[1, 1\]"),
        ({"input_ids": tokens(1, 9) + 97}, ValueError, "input_ids: expected 0 to 96"),
        ({"config": {"budget": 3}}, TypeError, r"config: expected a dhsa\.Config, .* or None, got dict"),
        ({"layers": "1"}, TypeError, "layers: expected layer indices"),
        ({"attention_mask": [1] * 9}, TypeError, "attention_mask: expected a tensor or None, got list"),
        ({"attention_mask": torch.ones(1, 8)}, ValueError, r"attention_mask: expected shape \[1, 9\] or 4 dimensions"),
        ({"attention_mask": torch.full((1, 9), 2)}, ValueError, "attention_mask: expected 1 for tokens and 0"),
        ({"attention_mask": torch.zeros(1, 9)}, ValueError, "attention_mask: has a row of padding only"),
        ({"attention_mask": torch.zeros(1, 1, 9, 9).int()}, TypeError, "4-D mask must be bool or additive"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: expected a transformers PreTrainedModel, got Linear"),
    ],
)
def test_bad_arguments(models, arguments, error, match):
    given = {"model": models("llama"), "input_ids": tokens(1, 9), **arguments}
    with pytest.raises(error, match=match):
        dhsa.check(**given)


def test_models_without_a_head_or_without_attention_of_ours(models, monkeypatch):
    with pytest.raises(ValueError, match="model: LlamaModel has no language modelling head"):
        dhsa.check(models("llama").model, tokens(1, 9))
    model = models("llama")

    class Still(torch.nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    for layer in model.model.layers:
        monkeypatch.setitem(layer._modules, "self_attn", Still())
    with pytest.raises(ValueError, match="no layer of LlamaForCausalLM called"):
        dhsa.check(model, tokens(1, 9))


# ---- table and command -----------------------------------------------------------------------------------------------


def test_table():
    found = dhsa.check(build("gemma2"), tokens(1, 300), SPARSE)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "kind", "path", "attended", "output", "error", "exact", "select", "attend"]
    for line, layer in zip(lines[2:6], found.layers, strict=True):
        assert line.split()[:4] == [str(layer.layer), layer.kind, layer.path, f"{layer.density:.1%}"]
        assert line.endswith(layer.why or "ms")
    assert f"KL {found.kl[0]:.4g} nats" in str(found)
    assert lines[-1] == "ok"
    assert [x.partition(": ")[2] for x in lines if x.startswith(("warning", "note"))] == found.warnings + found.notes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """save(model) -> folder: with a tokenizer of single characters."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    def save(model):
        folder = tmp_path_factory.mktemp("model")
        tokenizer = Tokenizer(WordLevel({chr(c): c - 32 for c in range(32, 127)} | {"<unk>": 95}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
        model.save_pretrained(folder)
        return folder

    return save


def command(*argv):
    pytest.importorskip("rich", reason="needs the demo extra: rich")
    return command_line.main([str(a) for a in ("check", *argv)])


def test_command(saved, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    folder = saved(build("gemma2"))
    argv = ("--model", folder, "--text", text, "--tokens", 400)
    assert command(*argv, "--budget", 200) == 0
    out = capsys.readouterr().out
    assert f"{folder.name}, 400 tokens in float32, budget 200" in out
    assert len(re.findall(r"full +dense", out)) == 2
    assert "note: Layers 0, 2 ran exact: a window of 64 keys is within the budget of 200." in out
    assert "note: Layers 1, 3 ran exact: break-even: leaving all but 200 of 400 keys out would take" in out
    assert out.splitlines()[-1] == "ok"
    assert command(*argv, "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert "warning: Layers 0-3 ran exact: the prompt's 400 keys are within the budget of 2,048." in out
    assert "400 tokens in bfloat16" in out

    configs = dhsa.LayerConfigs(default=dhsa.Config(budget=None), layers={1: dhsa.Config(budget=200, break_even=0)})
    configs.save(tmp_path / "layers.json")
    assert command(*argv, "--config", tmp_path / "layers.json") == 0
    out = capsys.readouterr().out
    assert "400 tokens in float32, layers.json" in out
    assert len(re.findall(r"full +sparse", out)) == 1
    dataclasses.replace(configs, model={"head_dim": 5}).save(tmp_path / "other.json")
    assert command(*argv, "--config", tmp_path / "other.json") == 2
    assert "config: made for a model with head_dim 5, but this one has 32" in capsys.readouterr().err
    assert command(*argv, "--config", tmp_path / "none.json") == 2
    assert "--config: [Errno 2]" in capsys.readouterr().err

    broken = build("gemma2")
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[:] = torch.nan
    assert command("--model", saved(broken), *argv[2:]) == 1
    out = capsys.readouterr().out
    assert "NaN first seen in layer 1, in k, output" in out
    assert out.splitlines()[-1] == "not ok"


def test_commands_refusals(capsys):
    assert command("--model", "no/such/model") == 2
    assert "--model: no/such/model does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command("--tokens", 3)
    assert stop.value.code == 2
    assert "3 is less than 64" in capsys.readouterr().err
