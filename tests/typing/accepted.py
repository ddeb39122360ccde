"""Calls that type checkers are to accept, and the types they are to see in the results. Checked by `make lint`, and run
by tests/tools/test_typing.py, where `assert_type` does nothing: the comparisons say that the types are true."""

from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import dhsa

Float32 = npt.NDArray[np.float32]
Float16 = npt.NDArray[np.float16]


class Tensor:
    """An array of another library, as far as type checkers know one by its DLPack methods."""

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def dtype(self) -> object:
        raise NotImplementedError

    def __dlpack__(self, *, stream: object = None, copy: bool | None = None) -> object:
        raise NotImplementedError

    def __dlpack_device__(self) -> tuple[int, int]:
        raise NotImplementedError


def arrays(q: Float32, k: Float32, v: Float32) -> None:
    """NumPy arrays: the dtype of the result is that of q, log-sum-exps are float32."""
    config = dhsa.Config(budget=256, sink=16, local=64)
    out = dhsa.attention(q, k, v, config)
    assert_type(out, Float32)
    assert out.dtype == np.float32
    assert_type(dhsa.attention(q, k, v, out=out), Float32)
    pair = dhsa.attention(q, k, v, window=64, softcap=30.0, return_lse=True)
    assert_type(pair, tuple[Float32, Float32])
    assert [x.dtype for x in pair] == [np.float32, np.float32]

    with_sinks = dhsa.attention(q, k, v, sinks=np.zeros(q.shape[1], np.float32), causal=False, return_lse=True)
    assert_type(with_sinks, tuple[Float32, Float32])

    selection = dhsa.select(q, k, config, causal=True)
    assert_type(selection, dhsa.Selection)
    assert_type(selection.causal, bool)
    assert_type(selection.density(), float)
    assert_type(selection.shape, tuple[int, int, int])
    assert_type(dhsa.sparse_attention(q, k, v, selection), Float32)
    out, lse = dhsa.sparse_attention(q, k, v, selection, skip=0.01, return_lse=True)
    assert_type(lse, Float32)
    assert lse.dtype == np.float32

    cuts = dhsa.boundaries(k, config)
    assert_type(cuts, npt.NDArray[np.int32])
    assert cuts.dtype == np.int32
    ratios = dhsa.attention_ratios(q, k)
    assert_type(ratios, npt.NDArray[np.float64])
    assert ratios.dtype == np.float64
    picked = dhsa.pick_boundaries(np.zeros(64), 8, theta=0.0, nms=2)
    assert_type(picked, npt.NDArray[np.int32])
    assert picked.dtype == np.int32
    assert_type(dhsa.pick_boundaries([0.5, 1.5, 0.0], 1, theta=0.0, nms=0), npt.NDArray[np.int32])
    again = dhsa.Selection.from_indices([0, 2], [0, 1], shape=(1, 1, 1), query_block=2)
    assert_type(again, dhsa.Selection)
    assert_type(again.mask(), npt.NDArray[np.bool_])
    assert again.mask().dtype == np.bool_


def halves(q: Float16, k: Float16, v: Float16) -> None:
    """float16 results have float32 log-sum-exps."""
    out, lse = dhsa.attention(q, k, v, return_lse=True)
    assert_type(out, Float16)
    assert_type(lse, Float32)
    assert out.dtype == np.float16
    assert lse.dtype == np.float32


def undecided(q: Float32, k: Float32, v: Float32, return_lse: bool) -> None:
    """Where `return_lse` is only known when the program runs, the result is one or the other."""
    result = dhsa.attention(q, k, v, return_lse=return_lse)
    assert_type(result, Float32 | tuple[Float32, Any])
    assert isinstance(result, tuple) is return_lse


def other_library(q: Tensor, k: Tensor, v: Tensor, config: dhsa.Config) -> None:
    """Results are arrays of the library of q. This is not run: torch's tensors are, in other tests."""
    assert_type(dhsa.attention(q, k, v), Tensor)
    assert_type(dhsa.attention(q, k, v, config, return_lse=True), tuple[Tensor, Tensor])
    assert_type(dhsa.sparse_attention(q, k, v, dhsa.select(q, k, config)), Tensor)
    assert_type(dhsa.boundaries(k, config), Tensor)
    assert_type(dhsa.attention_ratios(q, k), Tensor)


def settings() -> None:
    """What is not an array."""
    assert_type(dhsa.Config(method="dhsa").replace(budget=None), dhsa.Config)
    layers = dhsa.LayerConfigs(default=dhsa.Config(), layers={3: dhsa.Config(budget=512)})
    assert_type(layers.at(3), dhsa.Config)
    assert_type(layers.replace(skip=0.01), dhsa.LayerConfigs)
    assert_type(dhsa.get_num_threads(), int)
    assert_type(dhsa.build_info(), dict[str, Any])
    assert_type(dhsa.__version__, str)
