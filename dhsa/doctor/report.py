"""The result of a check, Check and LayerCheck, and its plain-text table."""

from __future__ import annotations

from dataclasses import dataclass, field

from dhsa.config import Config, LayerConfigs

__all__ = ["HEADINGS", "Check", "LayerCheck", "cells"]

HEADINGS = ("layer", "kind", "path", "attended", "output error", "exact", "select", "attend", "")


@dataclass(frozen=True)
class LayerCheck:
    """One attention layer, exact and sparse.

    Attributes:
        layer: the layer's index, as in `LayerRun`.
        kind: "full" or "sliding", as in `LayerRun`.
        path: of the sparse run, as in `LayerRun`; "dense" and "window" are exact.
        why: where the path is exact, why nothing was left out; else "".
        density: of the sparse run, as in `LayerRun`.
        skipped: of the sparse run, as in `LayerRun`.
        output_error: |sparse - exact| / |exact| (L2) of the attention output. Both are computed from the inputs of this
            layer in the sparse run, so that errors of earlier layers do not count. 0 where nothing was left out.
        exact_seconds: of attention in the exact run.
        select_seconds: of selection in the sparse run.
        attend_seconds: of attention in the sparse run.
        not_finite: what holds NaN or inf in the sparse run, as in "NaN in v, output"; else "".
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
    """The result of `dhsa.check`. `print` it for a table.

    Attributes:
        config: the Config or LayerConfigs that was checked.
        shape: (batch, tokens) of the prompt.
        layers: a LayerCheck for each attention layer, in the order in which they ran.
        kl: for each row, the divergence of the next token's distribution in nats, exact || sparse.
        next_tokens: for each row, the most likely next token, (exact, sparse).
        agree: for each row, whether the two are the same.
        tail: the number of positions at each row's end that `tail_kl` and `tail_agree` are about.
        tail_kl: the mean divergence at these positions.
        tail_agree: the share of these positions whose most likely token is the same.
        exact_seconds: of the whole exact prefill.
        sparse_seconds: of the whole sparse prefill, without what the check itself computes.
        warnings: sentences on what is wrong, not sparse, or slow.
        notes: sentences for information.
        ok: whether the sparse prefill answers as the exact one does: everything is finite, the next tokens are the
            same, the divergence is small, and `dhsa.patch` accepts the config. Slow or exact layers do not count
            against it.
    """

    config: Config | LayerConfigs
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
        left = (1, 2, len(HEADINGS) - 1)  # columns of text; numbers are aligned to the right
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
        """Return the lines under the table."""
        rows, length = self.shape
        same = sum(self.agree)
        answer = ("agrees" if same else "differs") if rows == 1 else f"agrees in {same} of {rows} rows"
        worst = max(self.kl, key=lambda value: (value != value, value))  # NaN counts as the largest
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
    """Return the row of a layer in the table, in the order of HEADINGS."""
    return (
        str(layer.layer),
        layer.kind,
        layer.path,
        f"{layer.density:.1%}",
        "0" if layer.output_error == 0 else f"{layer.output_error:.2%}",
        *(f"{s * 1e3:,.1f} ms" for s in (layer.exact_seconds, layer.select_seconds, layer.attend_seconds)),
        "; ".join(text for text in (layer.not_finite, layer.why) if text),
    )
