"""Libraries that know nothing of this package, while torch's function is replaced: their results are the same, and
their calls are served. The programs are those of benchmarks/bench_dropin.py, smaller."""

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_dropin  # noqa: E402

import dhsa  # noqa: E402

sys.path.pop(0)
ORIGINAL = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(bench_dropin.PROGRAMS))
def test_library(name, dtype, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    package, make = bench_dropin.PROGRAMS[name]
    pytest.importorskip(package)
    torch.manual_seed(0)
    program = make(dtype, small=True)
    want = program()
    with dhsa.replacing_sdpa() as counts:
        got = program()
    assert torch.nn.functional.scaled_dot_product_attention is ORIGINAL
    # Every call of a prompt, a text or a picture; decoding steps of `generate_batch` are torch's.
    least, passed = {
        "sentence-transformers": (2, {}),
        "timm": (12, {}),
        "diffusers": (2, {}),
        "generate_batch": (4, {"break-even"}),
    }[name]
    assert counts.served >= least
    assert {reason.partition(":")[0] for reason in counts.passed} <= set(passed)
    assert got.shape == want.shape
    assert got.isfinite().all()
    if name == "generate_batch":
        assert got.shape == (3, 4)
        if dtype == torch.float32:
            assert torch.equal(got, want)
        return
    assert want.std() > 1e-3
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
