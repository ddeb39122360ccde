"""The models of docs/MODELS.md, each tried again: what the page says is served agrees with eager on this release and
goes the same paths, and what it says is refused is refused by those words."""

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

import kinds  # noqa: E402

SERVED, REFUSED = kinds.served(), kinds.refused()
pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own code


OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < kinds.release()


def built(kind):
    """A model of this kind, or a skipped test where a release before the page's has none that runs."""
    if not OLDER:
        return kinds.build(kind)
    try:
        model = kinds.build(kind)
        kinds.outcomes(model)
        model.set_attn_implementation("dhsa")  # not every model could be switched in every release
        assert model.config._attn_implementation == "dhsa"
        model.set_attn_implementation("eager")
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} cannot run {kind} itself, or not switch it: {error}")
    return model


def test_the_page_has_the_models_that_the_readme_names():
    named = {"gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
    assert all("sparse" in SERVED[kind] for kind in named)
    assert len(SERVED) >= 90
    assert {"doge", "hy_v4", "gpt_oss"} <= set(REFUSED)


@pytest.mark.parametrize("kind", SERVED)
def test_a_kind_agrees_with_eager(kind):
    differences, paths = kinds.compare(built(kind))
    assert max(differences) < kinds.TOLERANCE
    assert paths == SERVED[kind]


@pytest.mark.skipif(OLDER, reason="the page has the words of a later release of transformers")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_is_refused_in_these_words(kind):
    with pytest.raises((NotImplementedError, TypeError, ValueError)) as raised:
        kinds.compare(built(kind))
    assert kinds.sentence(raised.value) == REFUSED[kind]
