"""The readable NumPy float64 twin of the C core: what every step computes, written as plainly as possible.

It is meant to be correct and easy to read: tests compare the C core with it, and it is part of the documentation.
It is not fast, and it builds Lq x Lk matrices. It needs NumPy only and never calls the extension.

Shapes throughout: q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, E], H = G * Hkv; query i sits at key position
i + (Lk - Lq). Inputs are arrays of any float dtype; everything is computed and returned in float64. "The paper" is
Dynamic Hierarchical Sparse Attention, arXiv 2510.24606.
"""

from dhsa._twin.attention import attention, masked_attention, selection_mask, sparse_attention
from dhsa._twin.boundaries import (
    attention_ratios,
    boundaries,
    boundary_ratios,
    compact_logits,
    pick_boundaries,
    predictor_logits,
    similarity_scores,
)
from dhsa._twin.scores import chunk_means, chunk_scores
from dhsa._twin.selection import Prefill, Segments, Selection, density, prefill, select, select_from_scores, topk
from dhsa.methods.lists import METHODS, Block, method_blocks, method_lists
from dhsa.reference._key_index import KeyIndex
from dhsa.reference._skip import Grouping, skip_mask

__all__ = [
    "METHODS",
    "Block",
    "Grouping",
    "KeyIndex",
    "Prefill",
    "Segments",
    "Selection",
    "attention",
    "attention_ratios",
    "boundaries",
    "boundary_ratios",
    "chunk_means",
    "chunk_scores",
    "compact_logits",
    "density",
    "masked_attention",
    "method_blocks",
    "method_lists",
    "pick_boundaries",
    "predictor_logits",
    "prefill",
    "select",
    "select_from_scores",
    "selection_mask",
    "similarity_scores",
    "skip_mask",
    "sparse_attention",
    "topk",
]
