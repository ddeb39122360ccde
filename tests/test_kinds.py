"""The models of docs/MODELS.md, each tried again: what the page says is served agrees with eager on this release."""

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

import kinds  # noqa: E402

SERVED = kinds.served()


def test_the_page_has_the_models_that_the_readme_names():
    named = {"gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
    assert named <= set(SERVED)
    assert len(SERVED) >= 50


@pytest.mark.filterwarnings("ignore")  # of the models' own code
@pytest.mark.parametrize("kind", SERVED)
def test_a_kind_agrees_with_eager(kind):
    if kind not in kinds.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} does not know {kind}")
    model = kinds.build(kind)
    prompt, batch, same, paths = kinds.compare(model)
    assert max(prompt, batch) < kinds.TOLERANCE
    assert same
    assert paths
