"""Modules that hold a transformers model and call it: adapters (PEFT), torch.compile, DistributedDataParallel,
sentence-transformers, user classes. Patching one patches the model inside, at any depth."""

from typing import Any

import torch
from transformers import PreTrainedModel

__all__ = ["unwrapped"]


def unwrapped(model: Any) -> PreTrainedModel:
    """`model` itself or the one transformers model that it wraps. Raises TypeError, with a sentence about what to pass,
    if there is none, or if there are several of which none contains the others."""
    if isinstance(model, PreTrainedModel):
        return model
    got = type(model).__name__
    if not isinstance(model, torch.nn.Module):
        inner = getattr(model, "model", None)
        advice = "; pass its .model" if isinstance(inner, torch.nn.Module) and _outermost(inner, "") else ""
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {got}{advice}")
    found = _outermost(model, "model")
    if not found:
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {got}, which wraps none")
    if len(found) > 1:
        raise TypeError(f"model: {got} holds {len(found)} transformers models; pass one of {', '.join(found)}")
    return next(iter(found.values()))


def _outermost(module: torch.nn.Module, name: str) -> dict[str, PreTrainedModel]:
    """The transformers models in `module` that are not inside another one, each once, by their path from `module`."""
    found: dict[str, PreTrainedModel] = {}
    seen: set[int] = set()

    def visit(module: torch.nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, PreTrainedModel):
            found[name] = module
            return
        for key, child in module.named_children():
            visit(child, f"{name}[{key}]" if key.isdecimal() else f"{name}.{key}")

    visit(module, name)
    parts = {id(part) for model in found.values() for part in model.modules() if part is not model}
    return {name: model for name, model in found.items() if id(model) not in parts}
