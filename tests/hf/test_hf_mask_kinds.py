"""Masks as they come in the field: changed behind a tensor's back, of any kind and shape; two-sided windows, packs."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SIZES, SPARSE, Layer, build, masked_softmax, qkv, tokens  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf import attention_forward  # noqa: E402
from dhsa.hf.compat import cache_option  # noqa: E402
from dhsa.hf.masks import key_range_mask  # noqa: E402

CAUSAL = torch.ones(200, 200, dtype=torch.bool).tril()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def additive(visible, hidden=-torch.inf, dtype=torch.float32):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, hidden)


@pytest.mark.parametrize("how", ["data", "numpy", "in place"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_that_changes_is_read_again(kind, how):
    q, k, v = qkv(q_len=200)
    first, second = CAUSAL, CAUSAL & (torch.arange(200) >= 50)
    second = second | torch.eye(200, dtype=torch.bool)
    mask, other = (first.clone(), second) if kind == "bool" else (additive(first), additive(second))
    mask, other, layer = mask[None, None], other[None, None], Layer()
    out, _ = attention_forward(layer, q, k, v, mask)
    torch.testing.assert_close(out.transpose(1, 2).double(), masked_softmax(q, k, v, first), rtol=0, atol=1e-5)
    if how == "data":
        mask.data.copy_(other)
    elif how == "numpy":
        mask.numpy()[...] = other.numpy()
    else:
        mask.copy_(other)
    out, _ = attention_forward(layer, q, k, v, mask)
    torch.testing.assert_close(out.transpose(1, 2).double(), masked_softmax(q, k, v, second), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", ["-1e4", "-6e4", "min / 2", "min", "-inf"])
def test_numbers_that_mean_hidden(dtype, hidden):
    least = torch.finfo(dtype).min
    number = {"min / 2": least / 2, "min": least}.get(hidden) or float(hidden)
    q, k, v = qkv(q_len=200)
    out, _ = attention_forward(Layer(), q, k, v, additive(CAUSAL, number, dtype)[None, None])
    torch.testing.assert_close(out.transpose(1, 2).double(), masked_softmax(q, k, v, CAUSAL), rtol=0, atol=1e-5)


def test_other_numbers_are_a_bias():
    with pytest.raises(NotImplementedError, match="adds no bias to scores"):
        attention_forward(Layer(), *qkv(q_len=200), additive(CAUSAL, -100.0)[None, None])


def test_masks_of_other_kinds_are_refused_by_name():
    from torch.nn.attention.flex_attention import create_block_mask

    model, ids = build("llama"), tokens(2, 200)
    block = create_block_mask(lambda b, h, q, k: q >= k, B=None, H=None, Q_LEN=200, KV_LEN=200, device="cpu")
    with dhsa.patched(model, EXACT):
        for mask, error, words in [
            (block, TypeError, "attention_mask: expected a tensor, got BlockMask; a BlockMask is for flex_attention"),
            (CAUSAL.tolist(), TypeError, "attention_mask: expected a tensor, got list"),
            (CAUSAL[None].expand(2, 200, 200), ValueError, r"attention_mask: expected padding .* \(2, 200, 200\)"),
            (CAUSAL, ValueError, r"attention_mask: expected padding .* got shape \(200, 200\)"),
            ({"full_attention": CAUSAL}, TypeError, "got dict; the layers of LlamaForCausalLM are of one kind"),
            (torch.ones(2, 200, device="meta"), ValueError, "attention_mask: is on device 'meta'"),
            (torch.ones(2, 200).to_sparse(), ValueError, "attention_mask: expected a dense tensor, got one of layout"),
            (np.ones((2, 200)), TypeError, "attention_mask: expected a tensor, got ndarray"),
        ]:
            with pytest.raises(error, match=words):
                model(ids, attention_mask=mask)
            with pytest.raises(error, match=words):
                model(ids, mask)
        assert model(ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()
    with pytest.raises(TypeError, match="expected a tensor, got BlockMask"):
        attention_forward(Layer(), *qkv(q_len=200), block)
    for mask in (CAUSAL[None, None].to("meta"), torch.ones(1, 200, device="meta")):
        with pytest.raises(ValueError, match="attention_mask: is on device 'meta'"):
            attention_forward(Layer(), *qkv(q_len=200), mask)
    with pytest.raises(ValueError, match=r"expected a dense tensor, got one of layout torch\.sparse_coo"):
        attention_forward(Layer(), *qkv(q_len=200), CAUSAL[None, None].to_sparse())
    two = build("gemma3")
    with dhsa.patched(two, EXACT), pytest.raises(TypeError, match="attention_mask: expected a tensor, got list"):
        two(ids, attention_mask={"full_attention": [1]})


def test_4d_masks_of_another_width_or_for_other_heads():
    """A cache with a window holds the last keys only, so that a mask of all keys would hide the wrong ones."""
    model, ids = build("gemma2"), tokens(1, 200)
    window = CAUSAL.triu(1 - model.config.sliding_window)
    masks = {"full_attention": CAUSAL[None, None], "sliding_attention": window[None, None]}

    def continued():
        cache = DynamicCache(config=model.config)
        model(
            ids[:, :120], attention_mask={k: m[..., :120, :120] for k, m in masks.items()}, **cache_option(model, cache)
        )
        more = {kind: m[..., 120:, :] for kind, m in masks.items()}
        return model(ids[:, 120:], attention_mask=more, **cache_option(model, cache))

    with pytest.raises(RuntimeError, match="must match the size"):
        continued()
    with dhsa.patched(model, EXACT), pytest.raises(ValueError, match=r"attention_mask: expected shape \[1, 1, 80, "):
        continued()
    q, k, v = qkv(q_len=200)
    wrong = q.shape[1] + 1
    for mask in (CAUSAL[None, None].repeat(1, wrong, 1, 1), additive(CAUSAL)[None, None].expand(1, wrong, 200, 200)):
        with pytest.raises(ValueError, match=f"expected shape .*1 or {wrong - 1}, 200, 200"):
            attention_forward(Layer(), q, k, v, mask)
    with pytest.raises(ValueError, match="attention_mask: expected shape"):
        attention_forward(Layer(), q, k, v, torch.nn.functional.pad(CAUSAL, (0, 7))[None, None])


@pytest.mark.parametrize("kind", ["list", "BlockMask"])
def test_masks_of_other_kinds_are_refused_by_name_in_a_compiled_model(kind):
    from torch.nn.attention.flex_attention import create_block_mask

    torch._dynamo.reset()
    mask = [[1] * 200] * 2
    if kind == "BlockMask":
        mask = create_block_mask(lambda b, h, q, k: q >= k, B=None, H=None, Q_LEN=200, KV_LEN=200, device="cpu")
    model = dhsa.patch(build("llama"), EXACT)
    with torch.no_grad(), pytest.raises(TypeError, match=f"attention_mask: expected a tensor, got {kind}"):
        torch.compile(model, backend="eager")(tokens(2, 200), attention_mask=mask)


def test_a_mask_that_ends_before_the_keys_hides_the_rest():
    """As transformers has it for sdpa: what a mask does not reach is padding."""
    sdpa = transformers.masking_utils.sdpa_mask
    for length, first in ((30, 0), (30, 40), (50, 40), (60, 0)):
        options = {"batch_size": 1, "q_length": 40, "kv_length": 90, "q_offset": first + 50, "kv_offset": first}
        mask = torch.ones(1, length, dtype=torch.bool)
        table = key_range_mask(**options, attention_mask=mask)
        seen = torch.zeros(40, 90, dtype=torch.bool)
        want = sdpa(**options, attention_mask=mask, allow_is_causal_skip=False)
        for interval in table[0]:
            key = torch.arange(90)
            seen |= (key >= interval[:, :1]) & (key < interval[:, 1:])
        known = torch.arange(first + 50, first + 90) < length
        known[-1] = False
        assert seen[~known].equal(want[0, 0][~known])


@pytest.mark.parametrize("lengths", [[1, 600], [2, 600], [70, 600], [1, 1, 600], [600, 1, 600], [600, 1, 1]])
def test_a_short_text_among_long_ones_leaves_them_sparse(lengths):
    model = build("llama")
    ids = torch.cat([tokens(1, n, seed=n) for n in lengths], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with dhsa.patched(model, SPARSE.replace(break_even=0)):
        got = model(ids, position_ids=positions, use_cache=False).logits[0]
        runs = dhsa.last_run(model)
        alone = torch.cat([model(tokens(1, n, seed=n), use_cache=False).logits[0] for n in lengths])
    assert {run.path for run in runs} == {"sparse"}
    assert all(run.density < 0.6 for run in runs)
    torch.testing.assert_close(got, alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("lengths", [[300], [120, 180]])
def test_packs_with_the_arguments_of_flash_attention(lengths):
    model = build("llama")
    ids = torch.cat([tokens(1, n, seed=n) for n in lengths], 1)
    cuts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    flash = {"cu_seq_lens_q": cuts, "cu_seq_lens_k": cuts, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with dhsa.patched(model, EXACT):
        got = model(ids, position_ids=positions, use_cache=False, **flash).logits[0]
    want = torch.cat([model(tokens(1, n, seed=n), use_cache=False).logits[0] for n in lengths])
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    flash["cu_seq_lens_q"] = flash["cu_seq_lens_k"] = cuts.tolist()
    with dhsa.patched(model, EXACT):
        assert model(ids, position_ids=positions, use_cache=False, **flash).logits[0].equal(got)
        if len(lengths) > 1:  # where the texts begin is said nowhere else
            with pytest.raises(NotImplementedError, match="give the model position_ids that begin at 0 in each text"):
                model(ids, use_cache=False, **flash)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_padding_of_a_layer_that_is_not_causal_is_all_that_it_hides(dtype):
    """A padding mask says nothing of order: that is the module's, or `is_causal`'s."""
    q, k, v = qkv(q_len=200)
    mask = torch.ones(len(q), 200, dtype=dtype)
    mask[:, 150:] = 0
    visible = mask[0].bool()[None].expand(200, 200)
    want = masked_softmax(q, k, v, visible)[:, :, :150]
    for layer, options in ((Layer(is_causal=False), {}), (Layer(), {"is_causal": False})):
        out, _ = attention_forward(layer, q, k, v, mask, **options)
        torch.testing.assert_close(out.transpose(1, 2)[:, :, :150].double(), want, rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"needs a mask of four dimensions; .* received padding only"):
        attention_forward(Layer(is_causal=False), q, k, v, mask, sliding_window=8)


@pytest.mark.parametrize("kind", ["full_attention", "minimax_m3_sparse"])
def test_models_with_an_indexer_of_their_own_are_refused_by_name(kind):
    """The indexer writes its choice into the mask tensor; layers that have none are as any others."""
    if not hasattr(transformers, "MiniMaxM3VLTextConfig"):
        pytest.skip("this transformers has no MiniMax M3")
    config = transformers.MiniMaxM3VLTextConfig(
        **{**SIZES, "num_hidden_layers": 2, "head_dim": 16}, layer_types=[kind] * 2, mlp_layer_types=["dense"] * 2
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if kind == "full_attention":
        with dhsa.patched(model, EXACT):
            model(tokens(1, 40))
            assert len(dhsa.last_run(model)) == 2
    else:
        with pytest.raises(ValueError, match=r"layers of 'minimax_m3_vl_text' read the mask tensor themselves"):
            dhsa.patch(model)
        assert model.config._attn_implementation == "eager"


def test_models_that_read_the_mask_themselves_are_refused_by_name():
    model = transformers.DogeForCausalLM(
        transformers.DogeConfig(**{**SIZES, "num_hidden_layers": 1, "keep_window_size": 16})
    )
    with pytest.raises(ValueError, match=r"layers of 'doge' read the mask tensor themselves.*eager"):
        dhsa.patch(model)


# ---- an encoder that is handed a cache -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize("padding", [None, [80, 50]])
def test_queries_of_an_encoder_see_the_whole_cache(padding, length):
    """BERT as `generate` runs it: its mask is made without the cache, whose keys transformers then does not count."""
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(7)
    model = transformers.BertLMHeadModel._from_config(config, attn_implementation="eager").eval()
    ids = tokens(2, 80 + length)
    mask = None if padding is None else (torch.arange(80 + length) >= 80 - torch.tensor(padding)[:, None]).long()

    def pieces():
        cache, logits = transformers.DynamicCache(), []
        for first, last in ((0, 80), (80, 80 + length)):
            seen = {} if mask is None else {"attention_mask": mask[:, :last]}
            logits.append(
                model(ids[:, first:last], use_cache=True, **seen, **dhsa.hf.compat.cache_option(model, cache)).logits
            )
        assert cache.get_seq_length() == 80 + length
        return logits[1]

    with torch.no_grad():
        expected = pieces()
        for configured in (EXACT, SPARSE):
            with dhsa.patched(model, configured):
                got = pieces()
                assert {run.key_shape[2] for run in dhsa.last_run(model)} == {80 + length}
            torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["Align", "Clap", "Splinter"])
def test_encoders_whose_layers_do_not_say_so_are_not_causal(name):
    """Their attention modules have no `is_causal`: the mask alone says that every token sees all the others."""
    model_type = {"Align": "align_text_model", "Clap": "clap_text_model", "Splinter": "splinter"}[name]
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    config = transformers.AutoConfig.for_model(
        model_type, vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.1,
    )  # fmt: skip
    model_class = getattr(transformers, f"{name}Model" if name == "Splinter" else f"{name}TextModel")
    torch.manual_seed(7)
    model, ids = model_class._from_config(config, attn_implementation="eager").eval(), tokens(1, 60)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        with dhsa.patched(model, EXACT):
            torch.testing.assert_close(model(ids).last_hidden_state, expected, rtol=0, atol=2e-5)
            assert len(dhsa.last_run(model)) == 2


def test_a_mask_that_rules_selection_out_is_the_reason():
    model, ids = build("llama"), tokens(1, 300)
    gap = torch.ones(300, 300, dtype=torch.bool).tril()
    gap[200:, 50:60] = False
    odd = torch.ones(300, 300, dtype=torch.bool).tril()
    odd[:, :150] = torch.arange(300)[:, None] >= torch.arange(150)[None] // 2 * 2  # pairs that see one another
    with dhsa.patched(model, SPARSE):
        for mask, words in ((gap, "several intervals of keys"), (odd, "neither causal nor a sliding window")):
            model(ids, attention_mask=mask[None, None])
            assert all(run.reason.startswith("mask: ") and words in run.reason for run in dhsa.last_run(model))
        model(ids)
        assert {(run.path, run.reason) for run in dhsa.last_run(model)} == {("sparse", "")}
