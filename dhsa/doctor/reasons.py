"""Why a call left no key out although its config might have: the rules of hf/attention.py and of the core, in words.

The core decides block by block (dhsa_span_exact in csrc/select/span.c); `Config.leaves_out` answers the same question
for whole calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dhsa.config import Config
from dhsa.hf import break_even
from dhsa.hf.masks import least_stretch, mask_parts, ranges_of

__all__ = ["Reason", "reason"]


class Reason(NamedTuple):
    """Why a call was exact.

    `kind` is "config", "causal", "mask", "short", "window", "tail", "break-even" or "other"; run.py adds "layers" and
    "network". `text` is the reason in words that continue "Layer 3 ran exact: ".
    """

    kind: str
    text: str


def reason(
    config: Config, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, window: int | None, causal: bool
) -> Reason:
    """Return the reason of a prefill call that was not sparse, given the arguments of the attention function."""
    if config.exact:
        return Reason("config", "the config is exact, with neither a budget nor a mass")
    batch, q_len, k_len = query.shape[0], query.shape[2], key.shape[2]
    if not causal:
        return Reason("causal", "attention is not causal")
    if mask is None:
        return _plain(config, query, key, window)
    ranges = ranges_of(mask, batch, q_len, k_len, window)
    if ranges.shape[1] > 1:
        return Reason("mask", f"the mask has queries that see {ranges.shape[1]} separate intervals of keys")
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
    row = slice(None) if part.row is None else slice(part.row, part.row + 1)
    return _plain(
        config, query[row, :, part.q_start : part.q_stop], key[row, :, part.k_start : part.k_stop], part.window
    )


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
