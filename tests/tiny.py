"""Tiny models of random weights, prompts and tensors that the tests of the transformers integration share.

Every model has windows smaller than its prompts, grouped heads and, where its family has one, a softcap, at values at
which dropping any of them would show. Import it after torch and transformers are known to be there.
"""

import torch
import transformers

import dhsa

EXACT = dhsa.Config(budget=None)
SPARSE = dhsa.Config(budget=96, sink=8, local=32, query_block=32, dense_tail=16)
WINDOW = 64
FAMILIES = ["gemma2", "gemma3", "llama", "qwen2", "qwen3"]

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


def build(family, implementation="eager", **changes):
    layer_types = ["sliding_attention", "full_attention"] * 2
    gemma = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": WINDOW, "layer_types": layer_types}
    qwen = {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": layer_types}
    config = {
        "gemma2": lambda: transformers.Gemma2Config(
            **{**SIZES, **gemma, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0, **changes}
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(**{**SIZES, **gemma, **changes}),
        "llama": lambda: transformers.LlamaConfig(**{**SIZES, **changes}),
        "qwen2": lambda: transformers.Qwen2Config(**{**SIZES, **qwen, **changes}),
        "qwen3": lambda: transformers.Qwen3Config(**{**SIZES, **qwen, "head_dim": 32, **changes}),
    }[family]()
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.eval()


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
