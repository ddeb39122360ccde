"""Padded batches: a row is what it is alone, bit for bit, in prefill, in pieces of a prompt and in decoding steps, and
what is padded is not even looked at.

The attention function is asked rather than a model, whose linear layers may give other bits for other batch sizes.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SPARSE, WINDOW, Layer, padded, qkv, tokens  # noqa: E402
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function  # noqa: E402

import dhsa  # noqa: E402
import dhsa.hf  # noqa: E402
from dhsa.hf.masks import key_lists, key_range_mask, ranges_of  # noqa: E402


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def attend(layer, q, k, v, padding, window, cache):
    """The attention function as a layer calls it whose cache holds all keys of k but the last of q's, under the mask
    that transformers then asks for. `cache`: None for none, "dynamic" or "static"."""
    q_len, k_len = q.shape[2], k.shape[2]
    offset, first = k_len - q_len, 0
    if cache == "dynamic" and window is not None:
        first = max(0, offset - window + 1)  # a sliding cache has let go of the others
        k, v = k[:, :, first:], v[:, :, first:]
    if cache == "static":
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 33)) for x in (k, v))
    mask = key_range_mask(
        len(q),
        q_len,
        k.shape[2],
        torch.tensor(offset) if cache == "static" else offset,
        first,
        causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        attention_mask=padding,
        local_size=window,
    )
    return dhsa.hf.attention_forward(layer, q, k, v, mask, sliding_window=window)[0]


def layer_with(config):
    layer = Layer()
    dhsa.hf.switching.install(layer, dhsa.hf.switching.State(config, None, ()))
    return layer


def case(seed):
    """A random call: (layer, q, k, v, padding, window, cache)."""
    rng = np.random.default_rng(seed)
    dtype = [torch.float32, torch.bfloat16, torch.float16][rng.integers(3)]
    heads, kv_heads = [(4, 2), (4, 1), (8, 2), (3, 3), (8, 1)][rng.integers(5)]
    dim, length, batch = int(rng.choice([16, 24, 80])), int(rng.choice([40, 130, 300, 500])), int(rng.integers(2, 5))
    lengths = [length, *(int(rng.integers(1, [20, length][rng.integers(2)] + 1)) for _ in range(batch - 1))]
    if not rng.integers(8):
        lengths = [length] * batch  # nothing is padded
    q_len = [length, 1, int(rng.integers(2, length))][seed % 3]  # a prompt, a step, a piece of a prompt
    side = "right" if q_len == length and rng.integers(2) else "left"
    q, k, v = qkv(batch, heads, kv_heads, length, length, dim, seed, dtype)
    layer = layer_with([EXACT, SPARSE, SPARSE.replace(method="window")][rng.integers(3)])
    window = [None, None, 7, WINDOW, 200][rng.integers(5)]
    cache = ["dynamic", "static"][rng.integers(2)]
    return layer, q[:, :, length - q_len :], k, v, padded(lengths, length, side)[1].bool(), window, cache


def rows_alone(layer, q, k, v, padding, window, cache):
    """(row, which of the queries are tokens, what these give without the other rows and the padding)."""
    for row, real in enumerate(padding):
        own = real[-q.shape[2] :]
        if own.any():
            one = q[row : row + 1, :, own], k[row : row + 1, :, real], v[row : row + 1, :, real]
            yield row, own, attend(layer, *one, None, window, cache)[0]


@pytest.mark.parametrize("seed", range(90))
def test_a_row_has_the_bits_of_the_row_alone(seed):
    """Also of a few tokens beside hundreds, which go another way in the core."""
    call = case(seed)
    out = attend(*call)
    assert out.isfinite().all()
    for row, own, alone in rows_alone(*call):
        assert torch.equal(out[row, own], alone)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 60000.0])
@pytest.mark.parametrize("seed", range(9))
def test_padding_is_not_looked_at(seed, poison):
    """Padded queries, keys and values of any value change no bit, and no selection picks them."""
    layer, q, k, v, padding, window, cache = case(seed)
    clean = attend(layer, q, k, v, padding, window, cache)
    hidden = ~padding[:, None, :, None]
    k, v = k.masked_fill(hidden, poison), v.masked_fill(hidden, -poison)
    q = q.masked_fill(hidden[:, :, -q.shape[2] :], poison)
    out = attend(layer, q, k, v, padding, window, cache)
    for row, real in enumerate(padding[:, -q.shape[2] :]):
        assert torch.equal(out[row, real], clean[row, real])
    assert bool(hidden.any()) == (len({int(n) for n in padding.sum(1)}) > 1)


@pytest.mark.parametrize("method", ["rows", "dhsa", "window", "block", "vertical_slash", "power", "oracle"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_selection_picks_a_padded_key(side, method):
    """Padded keys that would draw all attention; with a budget, every method's lists are those of the row alone."""
    layer = layer_with(SPARSE.replace(method=method))
    q, k, v = qkv(batch=2, q_len=400)
    padding = padded([400, 260], 400, side)[1].bool()
    mean = q[1, :, padding[1]].mean(dim=(0, 1))
    k[1, :, ~padding[1]] = 1000 * mean / mean.norm()
    v[1, :, ~padding[1]] = torch.nan
    out = attend(layer, q, k, v, padding, None, None)
    assert dhsa.last_run(layer)[0].path == "sparse"
    for row, own, alone in rows_alone(layer, q, k, v, padding, None, None):
        assert torch.equal(out[row, own], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_steps_after_a_padded_prompt(window, dtype):
    """Ten steps, over a window that rolls: the padding moves out of it."""
    layer, lengths = layer_with(SPARSE), [WINDOW + 8, WINDOW - 5, 9, 1]
    for cache in ("dynamic", "static"):
        for step in range(10):
            length = lengths[0] + step
            _, k, v = qkv(batch=4, q_len=1, k_len=lengths[0] + 10, dtype=dtype)
            q = qkv(batch=4, q_len=1, seed=step, dtype=dtype)[0]
            padding = padded([n + step for n in lengths], length, "left")[1].bool()
            call = layer, q, k[:, :, :length], v[:, :, :length], padding, window, cache
            out = attend(*call)
            for row, own, alone in rows_alone(*call):
                assert torch.equal(out[row, own], alone)


# ---- padding between tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len", [1, 3, 160])
def test_gaps_cost_nothing_and_leave_no_trace(q_len, dtype):
    """Steps after prompts that were padded on the right, turns of a conversation padded each: the keys that are there
    give the bits that they give without the gaps, whatever lies in the gaps."""
    layer, length = layer_with(SPARSE), 900
    q, k, v = qkv(batch=3, heads=4, kv_heads=1, q_len=q_len, k_len=length, dim=32, dtype=dtype)
    padding = torch.ones(3, length, dtype=torch.bool)
    padding[0, 500:700] = padding[1, 20:21] = padding[1, 100:640] = padding[1, 0] = False
    k, v = (x.masked_fill(~padding[:, None, :, None], torch.nan) for x in (k, v))
    out = attend(layer, q, k, v, padding, None, "dynamic")
    assert {r.density for r in dhsa.last_run(layer)} == {1.0}
    for row, own, alone in rows_alone(layer_with(EXACT), q, k, v, padding, None, "dynamic"):
        assert own.all()
        assert torch.equal(out[row], alone)


@pytest.mark.parametrize("seed", range(20))
def test_lists_of_keys_say_what_the_intervals_say(seed):
    rng = np.random.default_rng(seed)
    length, window = int(rng.integers(20, 60)), [None, 9][seed % 2]
    padding = torch.from_numpy(rng.random((3, length // 4)) < 0.6).repeat_interleave(4, 1)
    length = padding.shape[1]
    padding[:, 4:8], padding[0, :4], padding[0, 8:12] = False, True, True  # a gap at least
    ranges = ranges_of(padding, 3, length, length, window)
    indptr, indices, spans = key_lists(ranges, length)
    j = np.arange(length)
    for row in range(3):
        keys = indices[indptr[row] : indptr[row + 1]]
        assert (np.diff(keys) > 0).all()
        for query in range(length):
            start, stop = spans[row, query]
            expected = {key for a, b in ranges[row, :, query] for key in j[a:b]}
            assert set(keys[(keys >= start) & (keys < stop)]) == expected


def test_gaps_that_queries_do_not_share_have_no_list():
    table = np.zeros((1, 2, 2, 2), np.int32)
    table[0, :, 0] = [[0, 2], [5, 9]]
    table[0, :, 1] = [[0, 9], [0, 0]]
    assert key_lists(table, 9) is None


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [EXACT, SPARSE])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
def test_rows_go_on_as_they_do_alone(models, family, cache, config):
    """Logits of a left-padded prompt and of the steps after it, past the window of the longer rows and up to that of
    the shortest."""
    model, lengths, size = models(family), [230, 140, WINDOW - 6], 230
    ids, mask = padded(lengths, size, "left")
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "cache_implementation": cache,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with dhsa.patched(model, config):
        got = model.generate(ids, attention_mask=mask, **options)
        assert ("sparse" in {r.path for r in dhsa.last_run(model, "prefill")}) == (config is SPARSE)
        for row, n in enumerate(lengths):
            alone = model.generate(tokens(1, n, seed=row), **options)
            assert torch.equal(got.sequences[row, size:], alone.sequences[0, n:])
            for step, logits in enumerate(got.logits):
                torch.testing.assert_close(logits[row], alone.logits[step][0], rtol=0, atol=2e-5)
