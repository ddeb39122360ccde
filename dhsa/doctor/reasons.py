"""Why a call left no key out although its config might have: the rules of hf/attention.py and of the core, in words.

The core decides block by block (dhsa_span_exact in csrc/select/span.c); `Config.leaves_out` answers the same question
for whole calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dhsa.config import Config
from dhsa.hf import break_even
from dhsa.hf.attention import one_sided
from dhsa.hf.masks import MaskPart, least_stretch, mask_parts, ranges_of, two_sided

__all__ = ["Reason", "reason"]


class Reason(NamedTuple):
    """Why a call was exact.

    `kind` is "config", "causal", "mask", "short", "window", "tail", "break-even" or "other"; run.py adds "layers",
    "network" and "anchor". `text` is the reason in words that continue "Layer 3 ran exact: ".
    """

    kind: str
    text: str


def reason(
    module: torch.nn.Module,
    config: Config,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    window: int | None,
    causal: bool,
) -> Reason:
    """Return the reason of a prefill call that was not sparse, given the arguments of the attention function."""
    if config.exact:
        return Reason("config", "the config is exact, with neither a budget nor a mass")
    batch, q_len, k_len = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        whole = MaskPart(None, 0, q_len, 0, k_len, None, 1)
        return _plain(config, query, key, window) if causal else _of_sides(module, config, query, key, whole)
    ranges = ranges_of(mask, batch, q_len, k_len, window, causal)
    if ranges.shape[1] > 1:
        return Reason("mask", f"the mask has queries that see {ranges.shape[1]} separate intervals of keys")
    if q_len == k_len > 1 and (found := two_sided(ranges[:, 0])):
        part = max(found, key=lambda part: part.k_stop - part.k_start)
        return _of_sides(module, config, query, key, part)
    least = least_stretch(config)
    parts = mask_parts(ranges[:, 0], least, late=k_len - q_len)
    if not parts:
        return Reason("mask", "the mask hides every key")
    plain = [part for part in parts if not part.ranged]
    if not plain:
        assert least is not None  # its config leaves keys out, or another reason was found above
        return Reason(
            "mask",
            "the mask is neither causal nor a sliding window (a span seen from both sides?), nor is a stretch of it "
            f"that has {least.queries:,} queries and sees {least.keys:,} keys",
        )
    part = max(plain, key=lambda part: part.k_stop - part.k_start)  # the longest one of a padded or packed prompt
    return _plain(config, *_of_part(query, key, part), part.window)


def _of_part(query: torch.Tensor, key: torch.Tensor, part: MaskPart) -> tuple[torch.Tensor, torch.Tensor]:
    row = slice(None) if part.row is None else slice(part.row, part.row + 1)
    return query[row, :, part.q_start : part.q_stop], key[row, :, part.k_start : part.k_stop]


def _of_sides(
    module: torch.nn.Module, config: Config, query: torch.Tensor, key: torch.Tensor, part: MaskPart
) -> Reason:
    """Return the reason for bidirectional attention between the tokens of `part`."""
    if hindrance := one_sided(module, config, query.shape[2], key.shape[2]):
        return Reason("causal", hindrance)
    query, key = _of_part(query, key, part)
    name, least, tokens = "budget" if config.mass is None else "floor", config.exact_up_to, key.shape[2]
    if tokens <= least:
        return Reason("short", f"the text's {tokens:,} keys are within the {name} of {least:,}")
    if not config.leaves_out(tokens, tokens, part.window, causal=False):
        assert part.window is not None  # without one, all blocks have all keys
        return Reason("window", f"{part.window - 1:,} keys on each side are within the {name} of {least:,}")
    if does_not_pay := break_even.reason(config, query, key, part.window, causal=False):
        return Reason("break-even", does_not_pay)
    return Reason("other", "every block of queries saw all its keys")


def _plain(config: Config, query: torch.Tensor, key: torch.Tensor, window: int | None) -> Reason:
    """Return the reason for causal attention within `window`, where the last query is at the last key."""
    q_len, k_len = query.shape[2], key.shape[2]
    name, least = "budget" if config.mass is None else "floor", config.exact_up_to
    if k_len <= least:
        return Reason("short", f"the prompt's {k_len:,} keys are within the {name} of {least:,}")
    if window is not None and window <= least:
        return Reason("window", f"a window of {window:,} keys is within the {name} of {least:,}")
    if not config.leaves_out(q_len, k_len, window):
        tail = f"a block of the last {config.dense_tail:,} queries (dense_tail)"
        return Reason("tail", f"every query that sees more than the {name} of {least:,} keys is in {tail}")
    if does_not_pay := break_even.reason(config, query, key, window):
        return Reason("break-even", does_not_pay)
    return Reason("other", "every block of queries saw all its keys")
