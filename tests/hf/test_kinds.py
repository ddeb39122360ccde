"""The models of docs/MODELS.md, each tried again: what the page says is served agrees with eager on this release and
goes the same paths, and what it says is refused is refused by those words."""

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

import kinds  # noqa: E402

import dhsa  # noqa: E402

SERVED, REFUSED = kinds.served(), kinds.refused()
pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own code


OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < kinds.release()


def built(name):
    """A model of this row, or a skipped test where a release before the page's has none that runs."""
    if not OLDER:
        return kinds.build(name)
    try:
        model = kinds.build(name)
        kinds.outcomes(model, name)
        with dhsa.patched(model):  # not every model could be switched in every release
            assert model.config._attn_implementation == "dhsa"
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} cannot run {name} itself, or not switch it: {error}")
    return model


def test_the_page_has_the_models_that_the_readme_names():
    named = {"gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
    named |= {"gemma3n_text", "gemma4_text", "gemma4", "gpt_oss", "granite_swa", "granitemoe_swa", "deepseek_v2"}
    named |= {"deepseek_v3", "glm4_moe_lite", "mimo_v2_flash", "minicpm3", "kimi_linear", "falcon_h1", "lfm2", "lfm3"}
    named |= {"lfm2_vl", "lfm3_vl", "qwen3_next", "qwen3_5", "qwen3_vl", "olmo3", "exaone4", "cohere2", "muse_glimmer"}
    named |= {"bert", "xlm-roberta", "modernbert", "eurobert", "jina_embeddings_v3", "nomic_bert", "embedding_gemma2"}
    named |= {"gemma3_text, bidirectional"}
    assert {name for name in named if "sparse" not in SERVED.get(name, ())} == set()
    assert len(SERVED) >= 200
    assert all(REFUSED[name][0] == "patch" for name in ("doge", "hy_v4", "falcon", "bloom", "mpt"))


@pytest.mark.parametrize("name", SERVED)
def test_a_kind_agrees_with_eager(name):
    differences, paths = kinds.compare(built(name), name)
    assert differences["prompt"] is not None
    assert max(d for d in differences.values() if d is not None) < kinds.TOLERANCE
    assert paths == SERVED[name]


@pytest.mark.skipif(OLDER, reason="the page has the words of a later release of transformers")
@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_is_refused_in_these_words(name):
    model, (when, words) = built(name), REFUSED[name]
    with pytest.raises((NotImplementedError, TypeError, ValueError)) as raised:
        kinds.compare(model, name)
    assert kinds.sentence(raised.value) == words
    if when == "patch":
        with pytest.raises(ValueError, match=r"does not support changing|read the mask tensor themselves"):
            dhsa.patch(model)
    else:
        with dhsa.patched(model):
            pass
