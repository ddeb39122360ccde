"""Every kind of causal language model that transformers knows, as a tiny model of random weights, and what becomes of
it: whether exact attention agrees with eager, in a padded batch too, what `generate` says, and what runs sparse.

`python tests/kinds.py` tries all of them on the installed release and writes docs/MODELS.md; test_kinds.py tries those
again that the page says are served, so that what a later release renames is met by a test that fails.
"""

import copy
import datetime
import inspect
import re
import sys
import textwrap
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from tiny import SIZES, padded, tokens  # noqa: E402

import dhsa  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "MODELS.md"
TOLERANCE = 1e-5  # of the largest logit; float32
EXACT = dhsa.Config(budget=None)
SPARSE = dhsa.Config(budget=48, sink=4, local=16, query_block=16, dense_tail=0, break_even=0)
LENGTH, WINDOW, MOST_WEIGHTS = 200, 64, 30_000_000
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {  # keys and values made of a latent vector, keys with a part that is turned
    "num_key_value_heads": SIZES["num_attention_heads"],
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
}
# What a kind needs beside the sizes that all share.
SIZES_OF = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": HYBRID | LATENT,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "bart": {"decoder_layers": 2, "decoder_attention_heads": 8, "decoder_ffn_dim": 64, "encoder_layers": 2},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": SIZES["num_attention_heads"]},
    # Of the default sizes its layers take 18 GB in some releases.
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 32,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
        "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    # The heads of its global layers are 512 wide unless they are told otherwise, and are refused then.
    "gemma4_text": {
        "global_head_dim": 32,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
        "hidden_size_per_layer_input": 16,
    },
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 4, "n_head": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID | LATENT,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": LATENT | {"num_layers": 1, "expert_ffn_hidden_size": 32, "ffn_hidden_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": LATENT,
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "sarvam_mla": LATENT,
    "youtu": LATENT,
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
HEAD = """# Models

This page is written by `python tests/kinds.py`. The program builds every kind of causal language model of the installed
transformers from its configuration class, with two layers of random weights in float32, and compares its output with
that of `attn_implementation="eager"`: the logits of a prompt of 200 tokens, those of a batch of two with padding on the
left, and those of six steps of `generate`. The numbers are the largest difference divided by the largest logit. The
last column has the paths of the layers with a sparse configuration. `tests/hf/test_kinds.py` repeats every row.

Small models of random weights show that a model's attention is computed correctly. They do not show its quality when
keys are left out.
"""


def build(kind):
    """A tiny model of model type `kind`, in eval mode, attention eager."""
    config = CONFIG_MAPPING[kind]
    known = set(inspect.signature(config.__init__).parameters) | set(getattr(config, "__dataclass_fields__", {}))
    sizes = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 64}
    sizes |= {name: value for name, value in EXPERTS.items() if name in known}
    sizes |= {name: value for name, value in {"sliding_window": WINDOW, "head_dim": 16}.items() if name in known}
    sizes |= SIZES_OF.get(kind, {})
    made = config(**sizes)
    with torch.device("meta"):  # some parts of some models do not heed these sizes
        sketch = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(made), attn_implementation="eager")
    if (weights := sum(p.numel() for p in sketch.parameters())) > MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights are too many for a test")
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases begin as ones or zeros, as if they were not there
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def outcomes(model):
    """Logits of a prompt, of a padded batch's tokens, of each step of `generate`."""
    ids, mask = padded([120, 80], 120, "left")
    steps = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return (
            model(tokens(1, LENGTH), use_cache=False).logits,
            model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()],
            torch.stack(model.generate(tokens(1, 80), **steps).logits),
        )


def compare(model):
    """(differences of a prompt, of a padded batch and of generate's steps, the paths that layers went when asked to be
    sparse). Whatever is refused raises as it does for a user."""
    expected = outcomes(model)
    with dhsa.patched(model, EXACT):
        got = outcomes(model)
        if not dhsa.last_run(model):
            raise ValueError("no layer calls the attention function")
    differences = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)]
    with dhsa.patched(model, SPARSE), torch.no_grad():
        model(tokens(1, LENGTH), use_cache=False)
        paths = sorted({run.path for run in dhsa.last_run(model)})
    return differences, paths


def sentence(error):
    """What a refusal says, short enough for a table."""
    return " ".join(str(error).split()).replace("|", "/")[:200]


def release():
    """The release of transformers that the page is of, as numbers."""
    return tuple(map(int, re.search(r"^transformers (\d+)\.(\d+)", PAGE.read_text(), re.MULTILINE).groups()))


def served():
    """{model type: the paths that its layers went when asked to be sparse}, as the page has it."""
    rows = re.findall(r"^\| `([^`]+)` \| \d[^|]*\|[^|]*\|[^|]*\| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    return {kind: paths.split(", ") for kind, paths in rows}


def refused():
    """{model type: what it says}, as the page has it."""
    part = PAGE.read_text().split("## Refused")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", part, re.MULTILINE))


def write():
    rows, no, untried = [], [], []
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            model = build(kind)
            outcomes(model)
        except Exception as error:  # whatever a model says that is not made of such sizes
            untried.append(f"`{kind}`")
            print(kind, "not tried:", error, file=sys.stderr)
            continue
        try:
            differences, paths = compare(model)
        except Exception as error:
            no.append(f"| `{kind}` | {sentence(error)} |")
            continue
        if max(differences) >= TOLERANCE:  # never seen, and never to be passed over
            raise SystemExit(f"{kind} differs from eager: {differences}")
        rows.append(f"| `{kind}` | " + " | ".join(f"{d:.0e}" for d in differences) + f" | {', '.join(paths)} |")
    of = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    parts = [
        HEAD,
        f"## Served: {len(rows)}\n\n{of}, {datetime.date.today()}\n",
        "| model type | prompt | padded batch | generate | asked to be sparse |\n|---|---|---|---|---|",
        "\n".join(rows),
        f"\n## Refused: {len(no)}\n\n| model type | what it says |\n|---|---|",
        "\n".join(no),
        "\n## Not tried\n\nNo model could be made of these sizes, or eager itself failed:\n",
        textwrap.fill(", ".join(untried) + ".", 118, break_long_words=False, break_on_hyphens=False),
    ]
    PAGE.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write()
