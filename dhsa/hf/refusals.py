"""What the attention function does not support: every argument that would otherwise be ignored raises here."""

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "NO_BACKWARD",
    "check_contents",
    "check_padding",
    "forward_only",
    "gradients_wanted",
    "refuse_unsupported",
    "sinks_in",
]

NO_BACKWARD = (
    '"dhsa" has no backward pass: run the model under torch.no_grad() or torch.inference_mode(), or train it with '
    'attn_implementation="eager"'
)


def refuse_unsupported(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    """Raises NotImplementedError for every argument that would otherwise be ignored, ValueError for shapes."""
    other = 'use attn_implementation="eager"'
    if dropout:
        raise NotImplementedError(
            f'"dhsa" has no attention dropout, got dropout={dropout}: call model.eval(), or {other}'
        )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(f'output_attentions=True: "dhsa" never forms the attention weights; {other}')
    for name in ("position_bias", "head_mask", "cache", "block_table", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'{name}: "dhsa" does not know this argument and cannot ignore it; {other}')
    packs = [kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k")]
    # One text is not packed; of several, the mask says where they end.
    if attention_mask is None and any(cuts is not None and len(cuts) != 2 for cuts in packs):
        raise NotImplementedError(
            'cu_seq_lens_q: "dhsa" finds where packed texts begin by position_ids; give the model position_ids that '
            "begin at 0 in each text"
        )
    if _is_cross_attention(module):
        raise NotImplementedError(
            f'"dhsa" does self-attention only, {type(module).__name__} is cross-attention, or a decoder\'s attention '
            f"that does not say that it is causal; {other}"
        )
    if query.ndim != 4 or key.ndim != 4 or query.shape[2] > key.shape[2]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: "
            "expected [B, H, Lq, D] and [B, Hkv, Lk, D] with Lq <= Lk"
        )


def sinks_in(query: torch.Tensor, s_aux: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The sinks [H] among the arguments, which models call `s_aux` or `sinks`; None if there are none.

    Raises TypeError if they are no tensor of floating-point numbers, NotImplementedError for another shape (sinks of
    each token, for example)."""
    given = {name: x for name, x in (("s_aux", s_aux), ("sinks", kwargs.get("sinks"))) if x is not None}
    for name, x in given.items():
        if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a tensor of floating-point numbers, got {got}")
        if x.ndim != 1 or x.shape[0] != query.shape[1]:
            raise NotImplementedError(
                f"{name}: expected one logit for each query head, shape [{query.shape[1]}], got {list(x.shape)}; "
                '"dhsa" has no other attention sinks, use attn_implementation="eager"'
            )
    if len(given) > 1:
        raise ValueError("s_aux and sinks: expected one of them, got both")
    return next(iter(given.values()), None)


def check_padding(mask: Any, batch: int | None = None) -> None:
    """Raises TypeError or ValueError if `mask` is not a padding mask [batch, keys], the only kind that a pattern is
    combined with."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(
            f"attention_mask: expected a tensor, got {type(mask).__name__}"
            + (
                "; a BlockMask is for flex_attention, give its contents as a 4-D bool mask"
                if _is_block_mask(mask)
                else ""
            )
        )
    check_contents(mask)
    if mask.ndim != 2 or (batch is not None and mask.shape[0] not in (1, batch)):
        raise ValueError(
            f"attention_mask: expected padding of shape [{'batch' if batch is None else batch}, keys] or a complete "
            f"mask of 4 dimensions [batch, 1, queries, keys], got shape {tuple(mask.shape)}"
        )


def check_contents(mask: torch.Tensor) -> None:
    """Raises ValueError if the values of a mask cannot be read."""
    if mask.is_meta:
        raise ValueError("attention_mask: is on device 'meta', where tensors have no contents; expected one on the CPU")
    if mask.layout is not torch.strided:
        raise ValueError(f"attention_mask: expected a dense tensor, got one of layout {mask.layout}")


def _is_block_mask(mask: Any) -> bool:
    return type(mask).__name__ == "BlockMask"


def gradients_wanted(module: torch.nn.Module, *inputs: torch.Tensor) -> bool:
    """Whether autograd records this call. Raises NotImplementedError if the module is in training mode, where a
    backward pass follows. In eval mode it may be inference without no_grad, as in many tutorials: see `forward_only`,
    and `dhsa::no_backward` in graphs.
    """
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in inputs):
        return False
    if getattr(module, "training", True):
        raise NotImplementedError(NO_BACKWARD)
    return True


def forward_only(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`function(*inputs)` as a step that autograd records and whose gradient raises NotImplementedError. With a
    detached result, everything before this step would silently get wrong gradients."""
    return _ForwardOnly.apply(function, *inputs)


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        raise NotImplementedError(NO_BACKWARD)


def _is_cross_attention(module: torch.nn.Module) -> bool:
    """Whether the keys come from other tokens than the queries. Models show this by an attribute, by a class of its
    own, or (Bart, Whisper and later ones) by one class for all attention, which in a decoder is causal only for
    self-attention. Lengths do not show it: an encoder may receive keys of a prefix, and a decoder as many tokens as its
    encoder."""
    if getattr(module, "is_cross_attention", False) or "CrossAttention" in type(module).__name__:
        return True
    return bool(getattr(module, "is_decoder", False)) and not getattr(module, "is_causal", True)
