"""What programs do with a model's attention besides plain prefill and decoding: calls that autograd records, gradients
asked for, right-padded prompts with an assistant; found by running transformers' own tests of its models."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SIZES, SPARSE, build, padded, qkv, tokens  # noqa: E402

import dhsa  # noqa: E402
import dhsa.hf  # noqa: E402
from dhsa.hf.compat import GRAPHS, cache_of, cache_option  # noqa: E402

REFUSAL = r'no backward pass.*torch\.no_grad.*attn_implementation="eager"'


# ---- autograd -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return build("gemma2", "dhsa")


@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["exact", "sparse"])
def test_inference_needs_no_no_grad(model, config):
    """A model in eval mode, whose parameters ask for gradients as they do after loading, and nobody said no_grad."""
    ids, mask = padded([150, 300], 300, "left")
    with dhsa.patched(model, config):
        for inputs in ({"input_ids": tokens(1, 300)}, {"input_ids": ids, "attention_mask": mask}):
            with torch.no_grad():
                expected = model(**inputs).logits
            got = model(**inputs).logits
            assert got.requires_grad
            assert torch.equal(got.detach(), expected)
            prefill = dhsa.last_run(model)
            assert any(run.path == "sparse" for run in prefill) == (config is SPARSE)


def test_generating_step_by_step_needs_no_no_grad(model):
    ids = tokens(2, 40)
    steps, cache = [], None
    for _ in range(4):
        out = model(ids if cache is None else steps[-1], **cache_option(model, cache), use_cache=True)
        cache = cache_of(out)
        steps.append(out.logits[:, -1:].argmax(-1))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[:, 40:]
    assert torch.equal(torch.cat(steps, 1), expected)


def test_gradients_through_attention_are_refused_not_lost(model):
    model = copy.deepcopy(model)
    loss = model(tokens(1, 30), labels=tokens(1, 30)).loss
    with pytest.raises(NotImplementedError, match=REFUSAL):
        loss.backward()
    assert model.model.layers[-1].self_attn.q_proj.weight.grad is None
    assert model.model.layers[0].mlp.up_proj.weight.grad is None
    # What lies above attention does have a gradient; asking for that alone goes through no attention, and is right.
    scale = model.model.norm.weight
    got = torch.autograd.grad(model(tokens(1, 30), labels=tokens(1, 30)).loss, scale)[0]
    model.set_attn_implementation("eager")
    expected = torch.autograd.grad(model(tokens(1, 30), labels=tokens(1, 30)).loss, scale)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_input_that_asks_for_gradients(which):
    module, inputs = torch.nn.Module(), list(qkv(dtype=torch.bfloat16))
    expected = dhsa.hf.attention_forward(module, *inputs, None)[0]
    inputs[which].requires_grad_()
    with pytest.raises(NotImplementedError, match=REFUSAL):  # a module is in training until it is told otherwise
        dhsa.hf.attention_forward(module, *inputs, None)
    out, weights = dhsa.hf.attention_forward(module.eval(), *inputs, None)
    assert weights is None
    assert out.is_contiguous()
    assert torch.equal(out.detach(), expected)
    with pytest.raises(NotImplementedError, match=REFUSAL):
        out.sum().backward()
    with pytest.raises(NotImplementedError, match="position_bias"):  # everything else is refused as before
        dhsa.hf.attention_forward(module, *inputs, None, position_bias=torch.zeros(4))


@pytest.mark.skipif(not GRAPHS, reason="graphs hold dhsa's operators from torch 2.13 on")
def test_compiled_inference_needs_no_no_grad():
    """Graphs are made together with their backward, which is refused when it runs, not when it is made."""
    model, ids = build("llama", "dhsa"), tokens(1, 40)
    expected = model(ids, use_cache=False).logits
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match=REFUSAL):
        got.sum().backward()
    exported = torch.export.export(model, (ids,), {"use_cache": False}).module()(ids, use_cache=False)
    torch.testing.assert_close(exported.logits, expected, rtol=0, atol=1e-5)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=REFUSAL):
        torch.compile(model.train(), fullgraph=True, backend="aot_eager")(ids, use_cache=False)


def test_arrays_that_ask_for_gradients_are_refused():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=r"q: requires grad.*torch\.no_grad"):
        dhsa.attention(q.requires_grad_(), k, v)


# ---- right padding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "real"), [("llama", 1), ("llama", 100), ("gemma3", 60), ("gemma3", 100)])
def test_right_padded_prompt_with_an_assistant(family, real):
    """Prompt and candidates are one call then: logits are read at the last position of the padding, in its middle."""
    model = build(family, "dhsa")
    ids, mask = padded([real], 110, "right")
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options["eos_token_id"] = SIZES["vocab_size"]  # never said; early releases look prompts up only where there is one
    eager = build(family)
    for one in (model, eager):
        one.generation_config.num_assistant_tokens = 3
    assert torch.equal(model.generate(ids, **options), eager.generate(ids, **options))
    # Against eager with the same helper: of early releases a helper changes what a model with windows says.
    for helper in ({"assistant_model": eager}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, **helper, **options), eager.generate(ids, **helper, **options))
