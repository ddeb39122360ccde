"""Every kind of language model and encoder of text that transformers knows, as a tiny model of random weights, and what
becomes of it: whether exact attention agrees with eager, in padded batches, with caches and in pieces too, what
`generate` says, and what runs sparse.

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
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from kinds_sizes import EXPERTS, OF_TOWERS, SIZES_OF, TOWER, WINDOW  # noqa: E402
from tiny import SIZES, padded, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf.compat import cache_of, cache_option  # noqa: E402

PAGE = Path(__file__).parents[1] / "docs" / "MODELS.md"
TOLERANCE = 3e-5  # of the largest logit; float32. The error of eager itself is as large in Gemma 4
EXACT = dhsa.Config(budget=None)
SPARSE = dhsa.Config(budget=48, sink=4, local=16, query_block=16, dense_tail=0, break_even=0)
LENGTH, MOST_WEIGHTS = 200, 50_000_000


def _names(*parts):
    return set().union(*(getattr(modeling_auto, f"MODEL_FOR_{part}_MAPPING_NAMES", {}) for part in parts))


CAUSAL = sorted(_names("CAUSAL_LM"))
PICTURES = sorted(_names("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM") - set(CAUSAL))
# Decoders that are turned into encoders by their config, by the name of their row.
VARIANTS = {
    "gemma3_text, bidirectional": (
        "gemma3_text",
        {"use_bidirectional_attention": True, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "llama, bidirectional": ("llama", {"is_causal": False}),
}
ENCODERS = sorted(
    (_names("MASKED_LM", "TEXT_ENCODING") | {"embedding_gemma2", "openai_privacy_filter"}) - {*CAUSAL, *PICTURES}
)
ENCODERS += [name for name, (kind, _) in VARIANTS.items() if kind in CONFIG_MAPPING]
GROUPS = {
    "Causal language models": CAUSAL,
    "Models of text and pictures or sounds": PICTURES,
    "Encoders of text": ENCODERS,
}
OUTCOMES = ["prompt", "padded", "generate", "static cache", "in pieces"]
OF_ENCODERS = ["prompt", "padded left", "padded right"]
HEAD = """# Models

This page is written by `python tests/kinds.py`. The program builds every kind of causal language model, of model of
text and pictures or sounds and of encoder of text of the installed transformers from its configuration class, with a
few layers of random weights in float32, and compares its output with that of `attn_implementation="eager"`: the logits
of a prompt of 200 tokens, those of a batch of two with padding on the left (of encoders, on the right too), those of
six steps of `generate`, also with a static cache, and those of a prompt given in three pieces. All prompts are text.
The numbers are the largest difference divided by the largest logit; "-" means that the model's own code cannot do this.
The last column has the paths of the layers with a sparse configuration. `tests/hf/test_kinds.py` repeats every row.

Small models of random weights show that a model's attention is computed correctly. They do not show its quality when
keys are left out.
"""


def _known(config):
    """The settings that a config class takes."""
    return set(inspect.signature(config.__init__).parameters) | set(getattr(config, "__dataclass_fields__", {}))


def _sizes(config, kind, default=None):
    """Small values for the settings of a config class; of a model of several parts, a dict for each part."""
    known = _known(config)
    parts = getattr(config, "sub_configs", {})
    if parts and ("vocab_size" not in known or any("text" in name for name in parts)):
        default = config() if default is None else default
        sizes = {name: SIZES[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in known}
        for name, declared in parts.items():
            if (part := getattr(default, name, None)) is not None:
                sizes[name] = _sizes(type(part), part.model_type, part)
                if declared is transformers.AutoConfig:
                    sizes[name]["model_type"] = part.model_type
        return sizes | SIZES_OF.get(kind, {})
    if "vocab_size" not in known or known & OF_TOWERS:
        return {name: value for name, value in TOWER.items() if name in known} | SIZES_OF.get(kind, {})
    sizes = {**SIZES, "num_hidden_layers": 2, "intermediate_size": 64}
    own = {**EXPERTS, "sliding_window": WINDOW, "head_dim": 16}
    sizes |= {name: value for name, value in own.items() if name in known}
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        sizes["rope_parameters"] = {**rope, "mrope_section": [4, 2, 2]}
    return sizes | SIZES_OF.get(kind, {})


def _maker(kind):
    """The class of transformers that makes a model of this kind."""
    if kind in CAUSAL:
        return transformers.AutoModelForCausalLM
    for part, maker in (
        ("IMAGE_TEXT_TO_TEXT", "AutoModelForImageTextToText"),
        ("MULTIMODAL_LM", "AutoModelForMultimodalLM"),
        ("MASKED_LM", "AutoModelForMaskedLM"),
        ("TEXT_ENCODING", "AutoModelForTextEncoding"),
    ):
        if kind in _names(part):
            return getattr(transformers, maker)
    return transformers.AutoModel


def build(name):
    """A tiny model of the row `name`, in eval mode, attention eager."""
    kind, changes = VARIANTS.get(name, (name, {}))
    config = CONFIG_MAPPING[kind]
    made, maker = config(**{**_sizes(config, kind), **changes}), _maker(kind)
    with torch.device("meta"):  # some parts of some models do not heed these sizes
        sketch = maker.from_config(copy.deepcopy(made), attn_implementation="eager")
    if (weights := sum(p.numel() for p in sketch.parameters())) > MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights are too many for a test")
    torch.manual_seed(7)
    model = maker.from_config(made, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1 and weight.is_floating_point():
                # norms, biases and sinks begin as ones or zeros, as if they were not there
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def _prompt(model):
    return model(tokens(1, LENGTH), use_cache=False).logits


def _padded(model, side="left", **options):
    ids, mask = padded([120, 80], 120, side)
    return model(ids, attention_mask=mask, **options)[0][mask.bool()]


def _generate(model, **options):
    steps = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return torch.stack(model.generate(tokens(1, 80), **steps, **options).logits)


def _pieces(model):
    ids, cache, logits = tokens(1, LENGTH), None, []
    for begin, end in ((0, 70), (70, 150), (150, LENGTH)):
        given = {} if cache is None else cache_option(model, cache)
        out = model(ids[:, begin:end], use_cache=True, **given)
        cache = cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, 1)


STEPS = {
    "prompt": _prompt,
    "padded": lambda model: _padded(model, use_cache=False),
    "generate": _generate,
    "static cache": lambda model: _generate(model, cache_implementation="static"),
    "in pieces": _pieces,
}
STEPS_OF_ENCODERS = {
    "prompt": lambda model: model(tokens(1, LENGTH))[0],
    "padded left": lambda model: _padded(model, "left"),
    "padded right": lambda model: _padded(model, "right"),
}
MAY_FAIL = {"static cache", "in pieces"}  # of which not every model is capable


def outcomes(model, name):
    """{what was asked: the logits, or None where the model's own code cannot do it}."""
    found = {}
    for step, function in (STEPS_OF_ENCODERS if name in ENCODERS else STEPS).items():
        try:
            with torch.no_grad():
                found[step] = function(model)
        except Exception:
            if step not in MAY_FAIL:
                raise
            found[step] = None
    return found


def compare(model, name, expected=None):
    """({what was asked: difference, or None}, the paths that layers went when asked to be sparse). Whatever is refused
    raises as it does for a user."""
    expected = outcomes(model, name) if expected is None else expected
    steps = STEPS_OF_ENCODERS if name in ENCODERS else STEPS
    differences = dict.fromkeys(expected)
    with dhsa.patched(model, EXACT):
        for step, wanted in expected.items():
            if wanted is not None:
                with torch.no_grad():
                    got = steps[step](model)
                differences[step] = float((got - wanted).abs().max() / wanted.abs().max())
        if not dhsa.last_run(model):
            raise ValueError("no layer calls the attention function")
    with dhsa.patched(model, SPARSE), torch.no_grad():
        model(tokens(1, LENGTH), **({} if name in ENCODERS else {"use_cache": False}))
        paths = sorted({run.path for run in dhsa.last_run(model)})
    return differences, paths


def when_refused(model):
    """Whether `patch` itself refuses a model, or a call of it."""
    try:
        with dhsa.patched(model, EXACT):
            return "call"
    except (TypeError, ValueError):
        return "patch"


def sentence(error):
    """What a refusal says, short enough for a table."""
    return " ".join(str(error).split()).replace("|", "/")[:200]


def release():
    """The release of transformers that the page is of, as numbers."""
    return tuple(map(int, re.search(r"^transformers (\d+)\.(\d+)", PAGE.read_text(), re.MULTILINE).groups()))


def _rows():
    """The cells of every table row of the page that begins with a kind."""
    return [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*", PAGE.read_text(), re.M)
    ]


def served():
    """{name of a row: the paths that its layers went when asked to be sparse}, as the page has it."""
    return {cells[0].strip("`"): cells[-1].split(", ") for cells in _rows() if re.match(r"\d", cells[1])}


def refused():
    """{name of a row: (when, what it says)}, as the page has it."""
    return {cells[0].strip("`"): (cells[1], cells[2]) for cells in _rows() if cells[1] in ("patch", "call")}


def _cell(difference):
    return "-" if difference is None else f"{difference:.0e}"


def try_all(names):
    """(rows of a table, refusals, names of those that could not be tried)."""
    rows, no, untried = [], [], []
    for name in names:
        try:
            model = build(name)
            expected = outcomes(model, name)
        except Exception as error:  # whatever a model says that is not made of such sizes
            untried.append(f"`{name}`")
            print(name, "not tried:", sentence(error), file=sys.stderr)
            continue
        try:
            differences, paths = compare(model, name, expected)
        except Exception as error:
            no.append(f"| `{name}` | {when_refused(model)} | {sentence(error)} |")
            continue
        worst = max(d for d in differences.values() if d is not None)
        if not worst < TOLERANCE:  # never to be passed over
            raise SystemExit(f"{name} differs from eager: {differences}")
        rows.append(f"| `{name}` | {' | '.join(map(_cell, differences.values()))} | {', '.join(paths)} |")
    return rows, no, untried


def write():
    of = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    parts, all_no, all_untried = [HEAD, f"{of}, {datetime.date.today()}"], [], []
    for title, names in GROUPS.items():
        rows, no, untried = try_all(names)
        columns = ["model type", *(OF_ENCODERS if names is ENCODERS else OUTCOMES), "asked to be sparse"]
        parts += [
            f"\n## {title}: {len(rows)}\n",
            f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}",
            "\n".join(rows),
        ]
        all_no += no
        all_untried += untried
    parts += [
        f"\n## Refused: {len(all_no)}\n\nBy `patch`, or by a call of the patched model.\n",
        "| model type | by | what it says |\n|---|---|---|",
        "\n".join(all_no),
        "\n## Not tried\n\nNo model could be made of these sizes, or eager itself failed on text alone:\n",
        textwrap.fill(", ".join(all_untried) + ".", 118, break_long_words=False, break_on_hyphens=False),
    ]
    PAGE.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    write()
