"""Programs that know nothing of dhsa, with torch's scaled_dot_product_attention and with `dhsa.replacing_sdpa()`.

Four libraries with models of random weights: sentence-transformers (BERT, texts of many lengths), timm (a vision
transformer), diffusers (a transformer block of Stable Diffusion 1.5) and transformers' continuous batching
(`generate_batch`). Whatever is not installed is left out. Whole calls of the library take turns with and without the
replacement; the table has the medians of each and of their quotients, what was served, and how far results differ. A
goal of 1x: none may become slower. `--lengths` measures single calls of few queries or keys instead, by which
`dhsa.sdpa.LEAST` is set.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from harness import DTYPES, Timing, duration, interleave

import dhsa

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(500)))
Program = Callable[[], Any]


# ---- the libraries: each maker gives a call of the library, which returns what is to be compared ---------------------


def sentences(dtype: torch.dtype, small: bool = False) -> Program:
    """Embeddings of 32 texts of 100 to 500 words by a BERT of the size of MiniLM-L6, padded in batches of 16."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    try:
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError:
        from sentence_transformers.models import Pooling, Transformer
    layers, texts = (2, 6) if small else (6, 32)
    with tempfile.TemporaryDirectory() as folder:
        splitter = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
        splitter.pre_tokenizer = pre_tokenizers.Whitespace()
        splitter.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, model_max_length=512, **names)
        tokenizer.save_pretrained(folder)
        sizes = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
        config = BertConfig(vocab_size=len(WORDS), num_hidden_layers=layers, **sizes)
        BertModel(config).save_pretrained(folder)
        reader = Transformer(folder)
    model = SentenceTransformer(modules=[reader, Pooling(384)], device="cpu").to(dtype)
    lengths = torch.randint(100, 500, (texts,)).tolist()
    said = [" ".join(WORDS[i] for i in torch.randint(4, len(WORDS), (n,)).tolist()) for n in lengths]
    return lambda: model.encode(said, batch_size=16, convert_to_tensor=True, show_progress_bar=False)


def pictures(dtype: torch.dtype, small: bool = False) -> Program:
    """Class logits of 8 pictures by ViT-S/16: 197 tokens."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224" if small else "vit_small_patch16_224").eval().to(dtype)
    batch = torch.randn(2 if small else 8, 3, 224, 224).to(dtype)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        return model(batch)

    return call


def diffusers_block(dtype: torch.dtype, small: bool = False) -> Program:
    """The largest transformer block of Stable Diffusion 1.5 (8 heads of 40) on latents of 64 x 64, or 16 x 16, and 120
    tokens of text, of which one prompt has 40."""
    from diffusers.models.attention import BasicTransformerBlock

    block = BasicTransformerBlock(dim=320, num_attention_heads=8, attention_head_dim=40, cross_attention_dim=768)
    block = block.eval().to(dtype)
    hidden = torch.randn(2, 256 if small else 4096, 320).to(dtype)
    text = torch.randn(2, 120, 768).to(dtype)
    mask = torch.zeros(2, 1, 120, dtype=dtype)
    mask[1, :, 40:] = -10000.0  # as the pipelines of diffusers write it

    @torch.inference_mode()
    def call() -> torch.Tensor:
        return block(hidden, encoder_hidden_states=text, encoder_attention_mask=mask)

    return call


def continuous_batching(dtype: torch.dtype, small: bool = False) -> Program:
    """Tokens that `generate_batch` adds to 6 prompts of 600 to 1,600 tokens, packed 2,048 tokens at a time."""
    import transformers

    transformers.logging.set_verbosity_error()
    size = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=101, num_hidden_layers=2 if small else 8, head_dim=64, max_position_embeddings=4096,
            pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.1, **size,
        )
    )  # fmt: skip
    model = model.eval().to(dtype)
    model.set_attn_implementation("sdpa")
    settings = model.generation_config
    settings.max_new_tokens, settings.do_sample, settings.eos_token_id, settings.pad_token_id = 4, False, -1, 0
    lengths = (150, 260, 90) if small else (600, 1600, 900, 1200, 700, 1500)
    prompts = [torch.randint(2, 101, (n,)).tolist() for n in lengths]
    batches = transformers.ContinuousBatchingConfig(
        max_memory_percent=0.2, num_blocks=8 if small else 32, max_batch_tokens=256 if small else 2048
    )

    def call() -> torch.Tensor:
        found = model.generate_batch(
            inputs=prompts,
            generation_config=settings,
            continuous_batching_config=batches,
            progress_bar=False,
            warmup=False,
        )
        return torch.tensor([found[name].generated_tokens for name in sorted(found)])

    return call


# The package of each, its maker, and what it does.
PROGRAMS: dict[str, tuple[str, Callable[..., Program]]] = {
    "sentence-transformers": ("sentence_transformers", sentences),
    "timm": ("timm", pictures),
    "diffusers": ("diffusers", diffusers_block),
    "generate_batch": ("transformers", continuous_batching),
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(program: Program, repeats: int, threads: int) -> tuple[Timing, dhsa.SdpaCounts, float]:
    """Times of both, what became of the calls of one program, and how far the two results differ."""
    found: dict[str, Any] = {}
    counts = None

    def ours() -> None:
        nonlocal counts
        with dhsa.replacing_sdpa() as counts:
            found["dhsa"] = program()

    def torchs() -> None:
        found["torch"] = program()

    timing = interleave({"dhsa": ours, "torch": torchs}, repeats, threads)
    assert counts is not None
    return timing, counts, float((found["dhsa"].double() - found["torch"].double()).abs().max())


def libraries(only: list[str], dtypes: list[str], repeats: int, threads: int) -> None:
    print(f"| {'library':<22} | dtype    | {'torch':>9} | {'dhsa':>9} | ratio | served | passed on | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for name in only:
        package, make = PROGRAMS[name]
        if find_spec(package) is None:
            print(f"| {name:<22} | not installed |")
            continue
        for dtype in dtypes:
            torch.manual_seed(0)
            timing, counts, far = measure(make(getattr(torch, dtype)), repeats, threads)
            print(
                f"| {name:<22} | {dtype:<8} | {duration(timing.median('torch')):>9} |"
                f" {duration(timing.median('dhsa')):>9} | {timing.ratio('dhsa', 'torch'):.2f}x |"
                f" {counts.served} | {counts.passed.total()} | {far:.1e} |",
                flush=True,
            )


def lengths(dtypes: list[str], repeats: int, threads: int) -> None:
    """Quotients of torch's time and ours for single calls, ours with nothing passed on."""
    shapes = [(n, n) for n in (16, 32, 48, 64, 96, 128, 256)] + [(16, 256), (32, 256), (64, 256), (256, 48), (256, 96)]
    original = torch.nn.functional.scaled_dot_product_attention
    print("| dtype | B | D | " + " | ".join(f"{a} x {b}" for a, b in shapes) + " |")
    for dtype in dtypes:
        for batch, dim in [(1, 64), (16, 64), (1, 128), (16, 32)]:
            cells = []
            for q_len, k_len in shapes:
                q, k, v = (
                    torch.randn(batch, n, 12, dim).to(getattr(torch, dtype)).transpose(1, 2)
                    for n in (q_len, k_len, k_len)
                )
                with torch.inference_mode(), dhsa.replacing_sdpa(break_even=0):
                    ours = torch.nn.functional.scaled_dot_product_attention
                    calls = {"dhsa": lambda: ours(q, k, v), "torch": lambda: original(q, k, v)}  # noqa: B023
                    cells.append(interleave(calls, repeats, threads, inner=10).ratio("dhsa", "torch"))
            print(f"| {dtype} | {batch} | {dim} | " + " | ".join(f"{c:.2f}" for c in cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: float32 and bfloat16")
    parser.add_argument("--only", choices=PROGRAMS, action="append", metavar="LIBRARY", help=", ".join(PROGRAMS))
    parser.add_argument("--lengths", action="store_true", help="single calls of few queries or keys")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    dhsa.set_num_threads(args.threads)
    print(
        f"dhsa {dhsa.__version__} ({dhsa.build_info()['isa']}), torch {torch.__version__}, {args.threads} threads,"
        f" medians of {args.repeats} alternating runs; goal: ratio >= 1x",
        flush=True,
    )
    dtypes = args.dtype or ["float32", "bfloat16"]
    if args.lengths:
        lengths(dtypes, args.repeats, args.threads)
    else:
        libraries(args.only or list(PROGRAMS), dtypes, args.repeats, args.threads)


if __name__ == "__main__":
    main()
