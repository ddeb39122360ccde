"""Modules around a transformers model: patched, unpatched, read and checked as the model inside."""

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SPARSE, build, tokens  # noqa: E402

import dhsa  # noqa: E402
import dhsa.hf  # noqa: E402
from dhsa.hf.compat import GRAPHS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
SPARSE = SPARSE.replace(break_even=0)


class Holder(torch.nn.Module):
    """One's own module: a model and something on top of it."""

    def __init__(self, model, **others):
        super().__init__()
        self.encoder = model
        for name, other in others.items():
            setattr(self, name, other)

    def forward(self, *args, **kwargs):
        return self.encoder(*args, **kwargs)


class Transformer(torch.nn.Module):
    """The first module of sentence-transformers, which holds the model as `auto_model`."""

    def __init__(self, model):
        super().__init__()
        self.auto_model = model

    def forward(self, *args, **kwargs):
        return self.auto_model(*args, **kwargs)


class Sentences(torch.nn.Sequential):
    """As sentence-transformers: a sequence of modules, each of which is handed what the one before made."""

    def forward(self, **inputs):
        for module in self:
            inputs = module(**inputs) if isinstance(inputs, dict) and "input_ids" in inputs else module(inputs)
        return inputs


def distributed(model):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return torch.nn.parallel.DistributedDataParallel(model)


def adapted(model):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval()


WRAPPERS = {
    "PEFT": adapted,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": torch.nn.DataParallel,
    "DistributedDataParallel": distributed,
    "one's own": Holder,
    "one's own, of one's own": lambda model: Holder(Holder(model), head=torch.nn.Linear(2, 2)),
    "twice the same": lambda model: Holder(model, again=model),
    "the model and a part of it": lambda model: Holder(model, part=model.model, first=model.model.layers[0]),
    "sentence-transformers": lambda model: Sentences(Transformer(model), torch.nn.Identity()),
}


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_stands_for_its_model(name):
    if name == "torch.compile" and not GRAPHS:
        pytest.skip("torch before 2.13 fails to compile some of these models, whatever attends")
    model, ids = build("llama"), tokens(1, 200)
    wrapper = WRAPPERS[name](model)
    inner = dhsa.hf.wrappers.unwrapped(wrapper)
    assert inner is model or name == "PEFT"
    want = wrapper(input_ids=ids).logits

    assert dhsa.patch(wrapper, EXACT) is wrapper
    assert inner.config._attn_implementation == "dhsa"
    got = wrapper(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert [run.path for run in dhsa.last_run(wrapper)] == ["dense"] * 4
    with dhsa.patched(wrapper, SPARSE, layers=[1, 2]) as same:
        assert same is wrapper
        sparse = wrapper(input_ids=ids).logits
        assert [run.path for run in dhsa.last_run(wrapper)] == ["dense", "sparse", "sparse", "dense"]
    assert not torch.equal(sparse, got)
    assert torch.equal(wrapper(input_ids=ids).logits, got)
    assert dhsa.hf.model_facts(wrapper) == dhsa.hf.model_facts(inner)
    assert dhsa.unpatch(wrapper) is wrapper
    assert inner.config._attn_implementation == "eager"
    assert torch.equal(wrapper(input_ids=ids).logits, want)
    with pytest.raises(ValueError, match="model: not patched"):
        dhsa.unpatch(wrapper)

    found, expected = dhsa.check(wrapper, ids, SPARSE), dhsa.check(inner, ids, SPARSE)
    assert found.kl == expected.kl
    assert [layer.path for layer in found.layers] == ["sparse"] * 4


def test_wrappers_of_none_or_several_say_what_to_pass():
    several = Holder(build("llama"), others=torch.nn.ModuleList([build("llama")]))
    for call in (
        dhsa.patch,
        dhsa.unpatch,
        lambda model: dhsa.patched(model).__enter__(),
        lambda model: dhsa.check(model, tokens(1, 50)),
    ):
        with pytest.raises(
            TypeError,
            match=r"^model: Holder holds 2 transformers models; pass one of model\.encoder, model\.others\[0\]$",
        ):
            call(several)
        with pytest.raises(
            TypeError, match=r"^model: expected a transformers PreTrainedModel, got Linear, which wraps none"
        ):
            call(torch.nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"^model: expected a transformers PreTrainedModel, got int$"):
            call(3)
    dhsa.unpatch(dhsa.patch(several.others[0]))


def test_what_is_no_module_says_what_to_pass():
    class Pipeline:
        def __init__(self, model):
            self.model = model

    with pytest.raises(
        TypeError, match=r"^model: expected a transformers PreTrainedModel, got Pipeline; pass its \.model$"
    ):
        dhsa.patch(Pipeline(build("llama")))
    with pytest.raises(TypeError, match=r"^model: expected a transformers PreTrainedModel, got Pipeline$"):
        dhsa.patch(Pipeline("llama"))


def test_a_check_does_not_leave_virtual_tokens_out():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    wrapper = peft.get_peft_model(build("llama"), settings).eval()
    with pytest.raises(ValueError, match=r"puts virtual tokens before the prompt.*pass model\.get_base_model\(\)"):
        dhsa.check(wrapper, tokens(1, 150), SPARSE)
    assert dhsa.check(wrapper.get_base_model(), tokens(1, 150), SPARSE).layers
