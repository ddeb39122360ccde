"""What all tests share: the process-wide settings are put back after every test, and makers of arrays and
of tiny models.

Not here: reference vectors (vectors.py) and what the models are (tiny.py).
"""

import numpy as np
import pytest

import dhsa
from dhsa import _core


def pytest_report_header():
    """The releases that this run is of."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("numpy", "torch", "transformers", "safetensors"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return f"dhsa {dhsa.__version__} ({_core.isa_current()}), " + ", ".join(found)


# Files that take longest, or have a test that does. Where processes share the files, these come first, so that none of
# them is left to one process at the end.
LONGEST = ("test_notebook", "test_generate", "test_compile", "test_register", "test_programs", "test_add_method")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if hasattr(item, "callspec") and "tier" in item.callspec.params:
            item.add_marker("every_tier")
    if hasattr(config, "workerinput"):  # one of pytest-xdist's processes
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def restore_settings():
    """Threads and instruction set are process-wide; a test that changes them must not change the next one's meaning."""
    isa = _core.isa_current()
    yield
    dhsa.set_num_threads(None)
    dhsa.set_float32_precision(None)
    if _core.isa_current() != isa:
        dhsa.set_isa(isa)


@pytest.fixture
def tier(request):
    """The instruction set tier that a test with the mark `every_tier` of tiers.py runs on."""
    dhsa.set_isa(request.param)
    return request.param


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs the hf extra: torch")


@pytest.fixture
def make_qkv():
    """make_qkv(b, h, hkv, lq, lk, d, dtype=np.float32, seed=0) -> q, k, v of standard normal numbers."""

    def make(b, h, hkv, lq, lk, d, dtype=np.float32, seed=0):
        rng = np.random.default_rng(seed)
        shapes = [(b, h, lq, d), (b, hkv, lk, d), (b, hkv, lk, d)]
        return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)

    return make


@pytest.fixture(scope="module")
def models():
    """models(family): a tiny model of tiny.py, built when first asked for; tests leave it unpatched."""
    from tiny import build

    made = {}

    def get(family):
        if family not in made:
            made[family] = build(family)
        assert made[family].config._attn_implementation == "eager"
        return made[family]

    return get
