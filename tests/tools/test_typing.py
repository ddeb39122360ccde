"""The calls of tests/typing/accepted.py run, and the types that they are annotated with are those that come out.

That type checkers agree, and that they refuse the calls of refused.py, is checked by `make lint`.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "typing"


@pytest.fixture(scope="module")
def accepted():
    spec = importlib.util.spec_from_file_location("accepted", FOLDER / "accepted.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_calls_that_type_checkers_accept_run_and_return_what_they_say(accepted, make_qkv):
    accepted.arrays(*make_qkv(1, 4, 2, 1024, 1024, 32))
    accepted.halves(*make_qkv(1, 4, 2, 96, 96, 32, np.float16))
    for return_lse in (False, True):
        accepted.undecided(*make_qkv(1, 2, 2, 64, 64, 32), return_lse)
    accepted.settings()


def test_torch_tensors_fit_the_protocol_of_arrays(torch):
    """The members of the protocol, which checkers see in torch's own annotations, are there in torch's tensors."""
    from dhsa._typing import DLPackArray

    members = {name for base in DLPackArray.__mro__ for name in vars(base) if name in ("shape", "dtype")}
    members |= {name for base in DLPackArray.__mro__ for name in vars(base) if name.startswith("__dlpack")}
    assert members == {"shape", "dtype", "__dlpack__", "__dlpack_device__"}
    tensor = torch.zeros(2, 3)
    assert all(hasattr(tensor, name) for name in members)
    assert isinstance(tensor.shape, tuple)
    assert isinstance(tensor.__dlpack_device__(), tuple)
