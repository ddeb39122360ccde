"""Random weights of boundary networks, for the tests that need them. Not here: real ones (vectors.py)."""

import numpy as np


def random_weights(channels, hidden, gated=False, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "enc.mha.in_proj_weight": (3 * channels, channels),
        "enc.mha.in_proj_bias": (3 * channels,),
        "enc.mha.out_proj.weight": (channels, channels),
        "enc.mha.out_proj.bias": (channels,),
        "enc.norm.weight": (channels,),
        "enc.norm.bias": (channels,),
        "mlp.0.weight": (hidden, 4 * channels + 1),
        "mlp.0.bias": (hidden,),
        "mlp.2.weight": (1, hidden),
        "mlp.2.bias": (1,),
    }
    if gated:
        shapes["pool.gate.weight"] = (1, channels)
    return {name: rng.standard_normal(shape).astype(np.float32) / 4 for name, shape in shapes.items()}


def compact_weights(channels, width=6, pooled=5, hidden=7, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "project.weight": (width, channels),
        "project.bias": (width,),
        "token.weight": (pooled, 2 * width),
        "token.bias": (pooled,),
        "head.0.weight": (hidden, 3 * pooled),
        "head.0.bias": (hidden,),
        "head.2.weight": (1, hidden),
        "head.2.bias": (1,),
    }
    return {name: (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32) for name, shape in shapes.items()}
