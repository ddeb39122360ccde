"""Settings: every choice of a training, validated, in one object that is stored with the weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from dhsa._arrays import check_int
from dhsa.config import check_choice
from dhsa.predictor import ARCHITECTURES, DEFAULT_WINDOW

__all__ = ["NETWORKS", "SCHEDULES", "Settings"]

NETWORKS = ("both", "layers", "shared")
SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a boundary predictor, or the gates of the method "seer", are trained.

    Args:
        architecture: of boundary predictors "compact" (this project's) or "attention" (the paper's); "gate": gates
            (SeerAttention, arXiv 2410.13276), of which `window`, `width`, `pooled`, `hidden`, `heads`, `gated`,
            `gamma` and `pos_weight` say nothing.
        networks: "layers" (one for each layer), "shared" (one for all) or "both". None: "both" for "compact", "shared"
            for "attention", as in the paper; "layers" for "gate", which has no others.
        layers: the layers whose keys are trained on. None: all.
        window: the number of keys on each side of a gap.
        width: of the compact network: numbers of a key after the projection.
        pooled: of the compact network: numbers of a key that are pooled.
        hidden: units of the MLP. None: 32 for "compact", 128 for "attention".
        heads: of the paper's network: attention heads.
        gated: of the paper's network: whether the halves are pooled by a gate.
        tokens: the most tokens of a piece of text (`pack` makes the pieces). Attention does not go beyond a piece.
        epochs: how often the text is read.
        rate: Adam's learning rate. None: the paper's 1e-4 for "attention", 3e-3 for "compact", 1e-3 for "gate".
        schedule: "constant" or "cosine" (rising over the first 2 %, then falling to 0). None: the paper's "constant"
            for "attention", "cosine" for the others.
        crop: neighbouring gaps of a training step; of gates, neighbouring queries.
        gamma: exponent of the focal binary cross-entropy.
        pos_weight: factor of the positive part of the loss.
        pool_mib: the most memory, in MiB, that keys of a piece may take (none are written to disk). Where a piece has
            more, gaps are left out at random, as many of each layer.
        seed: of weights, order and split. The same seed, text, model, machine and number of threads give the same
            weights.

    Raises:
        TypeError: a field has the wrong type; the message names it.
        ValueError: a field is out of range; the message names it.

    Source: arXiv 2510.24606 for labels, loss and the defaults of "attention"; the rest is this project's.
    """

    architecture: str = "compact"
    networks: str | None = None
    layers: tuple[int, ...] | None = None
    window: int = DEFAULT_WINDOW
    width: int = 32
    pooled: int = 32
    hidden: int | None = None
    heads: int = 4
    gated: bool = False
    tokens: int = 8192
    epochs: int = 2
    rate: float | None = None
    schedule: str | None = None
    crop: int = 256
    gamma: float = 2.0
    pos_weight: float = 1.3
    pool_mib: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        def default(name: str, value: Any) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        check_choice(self.architecture, "architecture", (*ARCHITECTURES, "gate"))
        kind = self.architecture
        default("networks", {"compact": "both", "attention": "shared", "gate": "layers"}[kind])
        default("hidden", 128 if kind == "attention" else 32)
        default("rate", {"compact": 3e-3, "attention": 1e-4, "gate": 1e-3}[kind])
        default("schedule", "constant" if kind == "attention" else "cosine")
        check_choice(self.networks, "networks", NETWORKS)
        if kind == "gate" and self.networks != "layers":
            raise ValueError(f"networks: each layer has gates of its own; expected 'layers', got {self.networks!r}")
        check_choice(self.schedule, "schedule", SCHEDULES)
        for name, low, high in (
            ("window", 1, 64), ("width", 1, 4096), ("pooled", 2, 4096), ("hidden", 1, 65536), ("heads", 1, 65536),
            ("tokens", 64, 2**24), ("epochs", 1, 10**6), ("crop", 1, 2**20), ("pool_mib", 1, 2**20),
            ("seed", 0, 2**31 - 1),
        ):  # fmt: skip
            check_int(getattr(self, name), name, low, high)
        for name in ("rate", "pos_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if not self.gamma >= 0:
            raise ValueError(f"gamma: expected a number of at least 0, got {self.gamma}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted({check_int(i, "layers", 0) for i in self.layers})))
            if not self.layers:
                raise ValueError("layers: expected at least one, got none")

    def fields(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        values = dataclasses.asdict(self)
        return values | {"layers": None if self.layers is None else list(self.layers)}
