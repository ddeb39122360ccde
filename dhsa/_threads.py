"""How many threads a call uses: the number set, else that of torch, else the CPUs that this process may use."""

from __future__ import annotations

import sys

from dhsa import _core
from dhsa._arrays import check_int

MAX_THREADS = _core.MAX_THREADS

_chosen: int | None = None
_cpus = _core.cpu_count()


def set_num_threads(n: int | None) -> None:
    """Set how many threads every call of this process uses. Results do not depend on it.

    Args:
        n: 1 to 1024. None: back to the default, which is the number of torch where torch is imported, else the CPUs
            that this process may use.

    Raises:
        TypeError: `n` is not an int.
        ValueError: `n` is out of range.
    """
    global _chosen
    _chosen = None if n is None else check_int(n, "n", 1, MAX_THREADS)


def get_num_threads() -> int:
    """Return how many threads the next call will use; see `set_num_threads`."""
    if _chosen is not None:
        return _chosen
    torch = sys.modules.get("torch")
    if torch is not None:
        try:
            return min(int(torch.get_num_threads()), MAX_THREADS)
        except AttributeError:  # torch is being imported
            pass
    return min(_cpus, MAX_THREADS)
