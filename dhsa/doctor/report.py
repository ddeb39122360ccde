"""What a check found: Check and LayerCheck, and the plain-text table of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from dhsa.config import Config

__all__ = ["HEADINGS", "Check", "LayerCheck", "cells"]

HEADINGS = ("layer", "kind", "path", "attended", "output error", "exact", "select", "attend", "")


@dataclass(frozen=True)
class LayerCheck:
    """One attention layer, exact and sparse.

    Attributes:
        layer, kind, path, density, skipped: of the sparse run, as in `LayerRun`; "dense" and "window" are exact.
        why: where the path is exact, why nothing was left out; else "".
        output_error: |sparse - exact| / |exact| (L2) of the attention output, both computed from what this layer was
            given in the sparse run, so that errors of earlier layers do not count. 0 where nothing was left out.
        exact_seconds: attention in the exact run. select_seconds, attend_seconds: in the sparse run.
        not_finite: "" or what holds NaN or inf in the sparse run, as in "NaN in v, output".
    """

    layer: int
    kind: str
    path: str
    why: str
    density: float
    skipped: float
    output_error: float
    exact_seconds: float
    select_seconds: float
    attend_seconds: float
    not_finite: str


@dataclass(frozen=True)
class Check:
    """What `dhsa.check` found. `print` it for a table.

    Attributes:
        config: the one that was checked.
        shape: (batch, tokens) of the prompt.
        layers: a LayerCheck for each attention layer, in the order in which they ran.
        kl: of each row, the divergence of the next token's distribution in nats, exact || sparse.
        next_tokens: of each row, the most likely next token, (exact, sparse).
        agree: of each row, whether the two are the same.
        tail: how many positions at each row's end the next two are about.
        tail_kl: mean divergence there. tail_agree: share of equal most likely tokens there.
        exact_seconds, sparse_seconds: of the whole prefills; what the check itself computes beside them is not counted.
        warnings: sentences on what is wrong, or not sparse, or slow.
        notes: sentences for information.
        ok: the sparse prefill answers as the exact one does: everything finite, the same next tokens, a small
            divergence, and a config that `dhsa.patch` takes. Slow or exact layers do not count against it.
    """

    config: Config
    shape: tuple[int, int]
    layers: list[LayerCheck]
    kl: tuple[float, ...]
    next_tokens: tuple[tuple[int, int], ...]
    agree: tuple[bool, ...]
    tail: int
    tail_kl: float
    tail_agree: float
    exact_seconds: float
    sparse_seconds: float
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ok: bool = True

    def __str__(self) -> str:
        table = [HEADINGS, *(cells(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEADINGS))]
        left = (1, 2, len(HEADINGS) - 1)  # words; numbers go to the right
        lines = [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        return "\n".join([*lines, "", *self.summary()])

    def summary(self) -> list[str]:
        """What stands under the table, a line each."""
        rows, length = self.shape
        same = sum(self.agree)
        answer = ("agrees" if same else "differs") if rows == 1 else f"agrees in {same} of {rows} rows"
        worst = max(self.kl, key=lambda value: (value != value, value))  # a NaN is the worst
        return [
            f"Next token {answer}; KL {worst:.4g} nats{' at most' if rows > 1 else ''}. Last {self.tail} positions: "
            f"KL {self.tail_kl:.4g} nats on average, most likely token the same in {self.tail_agree:.0%}.",
            f"Prefill of {f'{rows} x ' if rows > 1 else ''}{length:,} tokens: exact {self.exact_seconds:.2f} s, "
            f"sparse {self.sparse_seconds:.2f} s.",
            *(f"warning: {warning}" for warning in self.warnings),
            *(f"note: {note}" for note in self.notes),
            "ok" if self.ok else "not ok",
        ]


def cells(layer: LayerCheck) -> tuple[str, ...]:
    """A layer's row of the table, in the order of HEADINGS."""
    return (
        str(layer.layer),
        layer.kind,
        layer.path,
        f"{layer.density:.1%}",
        "0" if layer.output_error == 0 else f"{layer.output_error:.2%}",
        *(f"{s * 1e3:,.1f} ms" for s in (layer.exact_seconds, layer.select_seconds, layer.attend_seconds)),
        "; ".join(text for text in (layer.not_finite, layer.why) if text),
    )
