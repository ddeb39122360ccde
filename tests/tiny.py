"""Tiny models of random weights, prompts and tensors that the tests of the transformers integration share.

Every model has windows smaller than its prompts, grouped heads and, where its family has one, a softcap, at values at
which dropping any of them would show. Import it after torch and transformers are known to be there.
"""

import threading

import torch
import transformers

import dhsa

EXACT = dhsa.Config(budget=None)
SPARSE = dhsa.Config(budget=96, sink=8, local=32, query_block=32, dense_tail=16, break_even=0)
WINDOW = 64
FAMILIES = ["gemma2", "gemma3", "llama", "qwen2", "qwen3"]
IMAGES = "gemma3 with images"  # the whole model: vision tower, projector, text
ALL_FAMILIES = [*FAMILIES, "gemma", "mistral", "phi3", "smollm3", "olmo2", IMAGES]
WIDE_WINDOW = 160  # where every layer slides; beyond the budget of SPARSE, so that such models are sparse at all
IMAGE_TOKEN, IMAGE_TOKENS = 100, 16  # no word of the vocabulary; how many stand for an image

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}

# Llama 3.1's, its bands moved to where 2,048 positions have some of all three.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
# Phi 4 mini's: three quarters of each head turn, by factors of their own beyond the original length.
PHI3_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0, 1.1, 1.3, 1.8, 2.5, 4.0],
}


def build(family, implementation="eager", **changes):
    layer_types = ["sliding_attention", "full_attention"] * 2
    gemma = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": WINDOW, "layer_types": layer_types}
    slides = {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": layer_types}
    if family == IMAGES:
        config = _with_images({**SIZES, **gemma, **changes})
    else:
        kind, own = {
            "gemma": (transformers.GemmaConfig, {"head_dim": 32}),
            "gemma2": (
                transformers.Gemma2Config,
                {**gemma, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0},
            ),
            "gemma3": (transformers.Gemma3TextConfig, gemma),
            "llama": (transformers.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
            "mistral": (transformers.MistralConfig, {"head_dim": 24, "sliding_window": WIDE_WINDOW}),
            "olmo2": (transformers.Olmo2Config, {}),
            "phi3": (
                transformers.Phi3Config,
                {"rope_parameters": PHI3_ROPE, "original_max_position_embeddings": 32, "sliding_window": WIDE_WINDOW},
            ),
            "qwen2": (transformers.Qwen2Config, slides),
            "qwen3": (transformers.Qwen3Config, {**slides, "head_dim": 32}),
            # one layer each with and without a window, with and without rotation
            "smollm3": (transformers.SmolLM3Config, {**slides, "no_rope_layers": [1, 1, 0, 0]}),
        }[family]
        config = kind(**{**SIZES, **own, **changes})
    torch.manual_seed(7)
    make = transformers.AutoModelForImageTextToText if family == IMAGES else transformers.AutoModelForCausalLM
    model = make.from_config(config, attn_implementation=implementation)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norms and biases begin as ones or zeros, an image's projection as zero: as if they were not there.
            if weight.ndim == 1 or "mm_input_projection" in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return model.eval()


def _with_images(text):
    """8 x 8 patches an image, of which each 2 x 2 become one of its tokens."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text),
        vision_config=transformers.SiglipVisionConfig(**vision, image_size=32, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=3,
        eoi_token_index=4,
    )


def character_tokenizer():
    """A tokenizer with one token for each printable ASCII character, and one for a newline."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {chr(c): c - 32 for c in range(32, 127)} | {"<unk>": 95, "\n": 96}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def tokens(batch, length, seed=0):
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def qkv(batch=1, heads=4, kv_heads=2, q_len=96, k_len=None, dim=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    k_len = q_len if k_len is None else k_len
    q = torch.randn(batch, heads, q_len, dim, generator=g)
    k, v = (torch.randn(batch, kv_heads, k_len, dim, generator=g) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


class Layer(torch.nn.Module):
    """The little of an attention module that the attention function looks at."""

    def __init__(self, layer_idx=0, is_causal=True):
        super().__init__()
        self.layer_idx, self.is_causal = layer_idx, is_causal


def masked_softmax(q, k, v, visible, scale=None, softcap=None):
    """Attention in float64 from a [.., Lq, Lk] bool mask; zeros where a query sees nothing."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    return s.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num() @ v


def padded(lengths, size, side):
    ids, mask = torch.zeros(len(lengths), size, dtype=torch.long), torch.zeros(len(lengths), size, dtype=torch.long)
    for row, n in enumerate(lengths):
        where = slice(size - n, size) if side == "left" else slice(0, n)
        ids[row, where], mask[row, where] = tokens(1, n, seed=row)[0], 1
    return ids, mask


def same_in_threads(calls, expected, times=5):
    """Asserts that calls side by side, each made several times in its own thread, give what is expected of each."""
    got = [[] for _ in calls]

    def work(call, results):
        with torch.no_grad():  # is set for each thread
            results.extend(call() for _ in range(times))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, got, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, first in zip(got, expected, strict=True):
        assert len(results) == times
        assert all(torch.equal(one, first) for one in results)
