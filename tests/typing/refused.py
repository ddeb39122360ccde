"""Calls that type checkers are to refuse: each line names the error that mypy and pyright report there, and both report
a comment that they do not need. Checked by `make lint`; nothing here is run."""

import numpy as np
import numpy.typing as npt

import dhsa

Float32 = npt.NDArray[np.float32]


def arguments(q: Float32, k: Float32, v: Float32) -> None:
    dhsa.attention([[0.0]], k, v)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    dhsa.attention(q, k, v, "paper")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    dhsa.attention(q, k, v, windows=4)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    dhsa.attention(q, k)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    dhsa.select(q, k)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    dhsa.sparse_attention(q, k, v, dhsa.Config())  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    dhsa.set_num_threads("4")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def results(q: Float32, k: Float32, v: Float32) -> None:
    out, lse = dhsa.attention(q, k, v)
    one: Float32 = dhsa.attention(q, k, v, return_lse=True)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    halves: npt.NDArray[np.float16] = dhsa.attention(q, k, v)  # type: ignore[arg-type]  # pyright: ignore[reportAssignmentType]
    print(out, lse, one, halves)


def settings(selection: dhsa.Selection) -> None:
    dhsa.Config(method="rowz")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    dhsa.Config(budgets=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    dhsa.Selection.from_indices([0], [], shape=(1, 1), query_block=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    selection.densities()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
