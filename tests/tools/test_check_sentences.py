"""The doctor's sentences, each on a model or prompt that provokes it, and the rules behind them on numbers alone."""

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SPARSE, WINDOW, build, tokens  # noqa: E402
from weights import compact_weights  # noqa: E402

import dhsa  # noqa: E402
from dhsa.doctor.findings import Facts, findings  # noqa: E402
from dhsa.doctor.report import Check, LayerCheck  # noqa: E402


def one(sentences, part):
    """The only sentence that holds `part`."""
    (found,) = (s for s in sentences if part in s)
    return found


def test_prompt_within_the_budget():
    found = dhsa.check(build("gemma2", "dhsa"), tokens(1, 96), SPARSE)
    assert found.warnings == [
        "Nothing was left out in any layer: this prompt is no test of sparse attention.",
        "Layers 0-3 ran exact: the prompt's 96 keys are within the budget of 96.",
    ]
    assert found.notes == []
    assert found.ok
    longer = dhsa.check(build("gemma2", "dhsa"), tokens(1, 120), SPARSE)
    assert not any("the prompt's" in w for w in longer.warnings)
    mass = dhsa.Config(budget=None, mass=0.9, floor=200)
    assert "within the floor of 200" in one(dhsa.check(build("llama"), tokens(1, 150), mass).warnings, "ran exact")


def test_window_within_the_budget_is_a_note():
    found = dhsa.check(build("gemma2"), tokens(1, 300), SPARSE)
    sentence = one(found.notes, "ran exact")
    assert sentence == f"Layers 0, 2 ran exact: a window of {WINDOW} keys is within the budget of 96."
    assert found.layers[0].why == f"a window of {WINDOW} keys is within the budget of 96"
    assert not any("ran exact" in w or "Nothing" in w for w in found.warnings)
    small = SPARSE.replace(budget=48, local=16)
    assert not any("window" in s for s in dhsa.check(build("gemma2"), tokens(1, 300), small).notes)


def test_everything_in_the_dense_tail():
    model, ids = build("llama"), tokens(1, 300)
    sentence = one(dhsa.check(model, ids, SPARSE.replace(dense_tail=200)).warnings, "dense_tail")
    assert sentence.startswith("Layers 0-3 ran exact: every query that sees more than the budget of 96 keys")
    less = dhsa.check(model, ids, SPARSE.replace(dense_tail=172))  # block 96..127 is the only one that may be sparse
    assert {layer.path for layer in less.layers} == {"sparse"}
    more = dhsa.check(model, ids, SPARSE.replace(dense_tail=173))
    assert {layer.path for layer in more.layers} == {"dense"}
    assert "dense_tail" in more.layers[0].why


def test_masks_that_fall_back():
    model, ids = build("gemma2"), tokens(1, 300)
    gap = torch.ones(1, 300, dtype=torch.long)
    gap[:, 100:120] = 0
    found = dhsa.check(model, ids, SPARSE, attention_mask=gap)
    assert "the mask has queries that see 2 separate intervals of keys" in one(found.warnings, "Layer")
    prefix = torch.ones(300, 300).tril().bool()
    prefix[:, :60] = True
    found = dhsa.check(model, ids, SPARSE, attention_mask=prefix.expand(1, 1, 300, 300))
    assert one(found.warnings, "Layer") == (
        "Layers 0-3 ran exact: the mask is neither causal nor a sliding window (a span seen from both sides?), nor is "
        "a stretch of it that has 256 queries and sees 97 keys."
    )
    assert found.ok
    assert found.tail_kl == 0
    shorter = torch.ones(300, 300).tril().bool()
    shorter[:, :40] = True
    found = dhsa.check(model, ids, SPARSE, attention_mask=shorter.expand(1, 1, 300, 300))
    assert {x.path for x in found.layers} == {"sparse"}
    assert all(0 < x.output_error < 1 for x in found.layers)
    causal = torch.ones(300, 300).tril().bool().expand(1, 1, 300, 300)
    found = dhsa.check(model, ids, SPARSE, attention_mask=causal)
    assert {x.path for x in found.layers} == {"sparse"}
    assert not any("mask" in s for s in found.warnings)


def test_bidirectional_attention_is_a_note():
    model, ids = build("gemma3", use_bidirectional_attention=True), tokens(1, 300)
    found = dhsa.check(model, ids, SPARSE.replace(method="xattention"))
    assert found.ok
    assert {x.path for x in found.layers} <= {"dense", "window"}
    assert "method='xattention' selects keys for causal attention only" in one(found.notes, "bidirectional")
    found = dhsa.check(model, ids, SPARSE)
    assert [x.path for x in found.layers] == ["window", "sparse"] * 2
    assert "32 keys on each side are within the budget of 96" in one(found.notes, "ran exact")


def test_layers_that_were_not_asked_for_are_a_note():
    found = dhsa.check(build("llama"), tokens(1, 300), SPARSE, layers=[1])
    assert one(found.notes, "ran exact") == "Layers 0, 2-3 ran exact: it is not among layers=."


def test_nan_is_traced_to_its_layer():
    model, ids = build("llama"), tokens(1, 300)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[0, 0] = torch.nan
    found = dhsa.check(model, ids, SPARSE)
    assert found.warnings[0] == "NaN first seen in layer 2, in v, output; the exact run has it there too."
    assert [x.not_finite for x in found.layers] == ["", "", "NaN in v, output", "NaN in q, k, v, output"]
    assert not found.ok
    assert found.agree == (False,)
    assert "NaN in v, output" in str(found)


def test_nan_that_attention_makes():
    model, ids = build("llama"), tokens(1, 300)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(model.model.layers[1].self_attn, name).weight.mul_(1e25)
    found = dhsa.check(model, ids, SPARSE)
    expected = "NaN first seen in layer 1, in attention's output, while q, k and v were finite; the exact run"
    assert found.warnings[0].startswith(expected)
    assert not found.ok


def test_nan_after_the_last_attention():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 3] = torch.nan
    found = dhsa.check(model, tokens(1, 300), SPARSE)
    sentence = "run's logits hold NaN or inf, though every attention layer was finite."
    assert found.warnings[:2] == [f"The exact {sentence}", f"The sparse {sentence}"]
    assert not found.ok
    with torch.no_grad():
        model.lm_head.weight[5, 3] = 0
    assert not any("NaN" in w for w in dhsa.check(model, tokens(1, 300), SPARSE).warnings)


def test_words_that_are_ruled_out_are_no_fault():
    model = build("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([3]), -torch.inf))
    found = dhsa.check(model, tokens(1, 300), EXACT)
    assert found.ok
    assert found.kl == (0.0,)


def test_another_answer_names_the_layers_that_lost_most():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    blind = dhsa.Config(method="window", budget=8, sink=1, local=4, query_block=16, dense_tail=0)
    found = dhsa.check(model, tokens(2, 300), blind)
    assert not found.ok
    assert found.tail_kl > 0.1
    worst = max(found.layers, key=lambda layer: layer.output_error)
    sentence = one(found.warnings, "largest output errors")
    assert f"The largest output errors are those of layer {worst.layer} ({worst.output_error:.0%})" in sentence
    assert "KL over the last 64 positions" in sentence
    row = found.agree.index(False)
    exact, sparse = found.next_tokens[row]
    assert f"The next token of row {row} is {sparse} in place of {exact};" in one(found.warnings, f"of row {row} ")


def predictor(layers, shared=False, channels=32):
    state = {f"layers.{i}.{name}": w for i in layers for name, w in compact_weights(channels, seed=i).items()}
    return dhsa.BoundaryPredictor.from_state_dict(state | (compact_weights(channels) if shared else {}))


def test_layers_without_a_boundary_network():
    model, ids = build("llama"), tokens(1, 300)
    config = SPARSE.replace(boundaries="predictor", predictor=predictor([1, 3]))
    with pytest.raises(ValueError, match=r"networks of layers \[1, 3\] only"):
        dhsa.patch(model, config)
    found = dhsa.check(model, ids, config)
    assert [x.path for x in found.layers] == ["dense", "sparse"] * 2
    assert one(found.warnings, "network").startswith("Layers 0, 2 ran exact: the predictor has no network for them")
    assert not found.ok
    found = dhsa.check(model, ids, config, layers=[1])
    assert not any("network" in w for w in found.warnings)
    assert [x.path for x in found.layers] == ["dense", "sparse", "dense", "dense"]


def test_layers_cut_by_the_network_for_all():
    config = SPARSE.replace(boundaries="predictor", predictor=predictor([0, 1, 3], shared=True))
    found = dhsa.check(build("llama"), tokens(1, 300), config)
    assert one(found.notes, "predictor").startswith("Layer 2: the predictor has no network of its own")
    assert {x.path for x in found.layers} == {"sparse"}
    alone = config.replace(predictor=predictor([], shared=True))
    assert not any("predictor" in s for s in dhsa.check(build("llama"), tokens(1, 300), alone).notes)


def test_a_predictor_of_another_model_is_refused_before_any_work():
    other = dhsa.BoundaryPredictor.from_state_dict(compact_weights(32), model={"model_type": "gemma3_text"})
    config, steps = SPARSE.replace(boundaries="predictor", predictor=other), []
    with pytest.raises(ValueError, match="trained for a model with model_type 'gemma3_text'"):
        dhsa.check(build("llama"), tokens(1, 200), config, advance=lambda: steps.append(1))
    assert steps == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converted_dtypes(dtype):
    dhsa.set_isa("scalar")
    model = build("llama").to(dtype)
    name = str(dtype).removeprefix("torch.")
    assert one(dhsa.check(model, tokens(1, 200), SPARSE).warnings, "converted").startswith(
        f"{name} has no products of its own in the instruction set in use (scalar): converted to float32"
    )
    assert not any("converted" in w for w in dhsa.check(model.float(), tokens(1, 200), SPARSE).warnings)


def test_own_implementation_is_a_note():
    ids = tokens(1, 200)
    for name in ("eager", "sdpa"):
        model = build("llama", name)
        assert f'own attention implementation is "{name}"' in one(dhsa.check(model, ids, SPARSE).notes, "own")
        with dhsa.patched(model, SPARSE):
            assert f'own attention implementation is "{name}"' in one(dhsa.check(model, ids).notes, "own")
    assert not any("own" in s for s in dhsa.check(build("llama", "dhsa"), ids, SPARSE).notes)


def test_slow_selection():
    """The oracle computes every product of dense attention, twice, to choose."""
    model, ids = build("llama"), tokens(1, 1200)
    tries = (dhsa.check(model, ids, SPARSE.replace(method="oracle")) for _ in range(3))  # a busy machine may upset one
    assert any("Selection takes" in warning for found in tries for warning in found.warnings)


LAYER = LayerCheck(0, "full", "sparse", "", 0.5, 0.0, 0.1, 1.0, 0.1, 0.5, "")
GOOD = Check(SPARSE, (1, 300), [LAYER], (0.01,), ((3, 3),), (True,), 64, 0.01, 1.0, 2.0, 1.0)
FACTS = Facts("dhsa", "float32", "amx", ("float32",), ("",), None, (True, True))


@pytest.mark.parametrize(
    ("layer", "check", "facts", "expected", "ok"),
    [
        ({}, {}, {}, None, True),
        ({"select_seconds": 0.17}, {}, {}, "Selection takes 25%", True),
        ({"select_seconds": 0.16}, {}, {}, None, True),
        ({"attend_seconds": 0.95}, {}, {}, "took 1,050.0 ms, exact attention 1,000.0 ms", True),
        ({}, {"kl": (0.11,)}, {}, "KL of the next token is 0.11 nats, more than 0.1. The largest", False),
        ({}, {"tail_kl": 0.11}, {}, "KL over the last 64 positions is 0.11 nats", False),
        ({}, {"agree": (False,), "next_tokens": ((3, 4),)}, {}, "The next token is 4 in place of 3; KL 0.01", False),
        ({}, {}, {"exact_fault": (7, "inf in k")}, "inf in k of layer 7 in the exact run; the sparse run stays", False),
        ({"not_finite": "inf in v"}, {}, {}, "inf first seen in layer 0, in v; the exact run stays finite", False),
        (
            {"not_finite": "inf in v"}, {}, {"exact_fault": (2, "NaN in k")},
            "inf first seen in layer 0, in v; the exact run has NaN in k first in layer 2.", False,
        ),
        ({}, {}, {"products": ("bfloat16",)}, "float32 has no products of its own", True),
    ],
)  # fmt: skip
def test_rules(layer, check, facts, expected, ok):
    given = dataclasses.replace(GOOD, layers=[dataclasses.replace(LAYER, **layer)], **check)
    warnings, notes, good = findings(given, dataclasses.replace(FACTS, **facts))
    assert good == ok
    assert notes == []
    assert len(warnings) == (expected is not None)
    assert all(expected in warning for warning in warnings)


def test_a_float32_precision_that_is_not_served_is_noted():
    facts = dataclasses.replace(FACTS, isa="avx512bf16", precision="high", precisions=("highest", "medium"))
    warnings, notes, good = findings(GOOD, facts)
    assert good
    assert (warnings, len(notes)) == ([], 1)
    assert 'float32 precision "high" has no effect on attention in the instruction set in use (avx512bf16)' in notes[0]
    for other in ({"precision": "medium"}, {"dtype": "bfloat16", "products": ("float32", "bfloat16")}):
        assert findings(GOOD, dataclasses.replace(facts, **other))[1] == []
