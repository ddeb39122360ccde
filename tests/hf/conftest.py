"""Fixtures of several files of this folder. torch and transformers are imported when one is used, since the files skip
themselves without them."""

import pytest


@pytest.fixture
def seen():
    """(layer, q, k, v, options, out) of each attention call of a model whose implementation is "dhsa"."""
    from transformers import AttentionInterface

    from dhsa import hf

    calls = []

    def watching(module, q, k, v, mask, **options):
        out, _ = hf.attention_forward(module, q, k, v, mask, **options)
        layer = {"window": options.get("sliding_window"), "scale": options["scaling"]}
        calls.append((module.layer_idx, q, k, v, layer, out.transpose(1, 2)))
        return out, None

    AttentionInterface.register("dhsa", watching)
    yield calls
    AttentionInterface.register("dhsa", hf.attention_forward)
