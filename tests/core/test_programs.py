"""Builds and runs the programs of tests/c that use the core without Python: every kernel of every tier against scalar,
what the header promises, allocations that fail. The core is compiled once for all of them.

The kernels are compiled for 64-bit Arm too, where a cross compiler is installed, and run there where qemu-user is.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dhsa.methods import registry as METHODS

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "tests" / "c"
FLAGS = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-O2",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-pthread",
    f"-I{ROOT / 'csrc'}",
    f"-I{ROOT / 'csrc' / 'include'}",
]
KERNELS = [
    *sorted((ROOT / "csrc" / "kernels").glob("*.c")),
    *(ROOT / "csrc/core" / name for name in ("error.c", "platform_posix.c", "platform_windows.c", "threads.c")),
]
REST = [p for p in sorted((ROOT / "csrc").rglob("*.c")) if p.parent.name != "python" and p not in KERNELS]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """program(name, *flags): tests/c/NAME.c built with the core."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("core")
    commands = [compiler, *FLAGS, "-Werror", "-c", *KERNELS], [compiler, *FLAGS, "-c", *REST]
    halves = [subprocess.Popen(command, cwd=folder) for command in commands]
    assert [half.wait() for half in halves] == [0, 0]
    objects = sorted(folder.glob("*.o"))
    assert len(objects) == len(KERNELS + REST)

    def build(name, *flags):
        target = folder / Path(name).name
        command = [compiler, *FLAGS, PROGRAMS / f"{name}.c", *objects, "-o", target, "-lm", *flags]
        subprocess.run(command, check=True)
        return target

    return build


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", ["test_kernels", "test_score_kernels"])
def test_kernels_of_every_tier(program, name):
    told = run(program(name, "-Werror"))
    assert "scalar: " in told
    assert told.rstrip().endswith("0 differences")


@pytest.mark.parametrize("name", ["test_kernels", "test_score_kernels"])
def test_neon(tmp_path, name):
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-gcc to cross-compile with")
    target = tmp_path / "kernels"
    sources = [*KERNELS, PROGRAMS / f"{name}.c"]
    subprocess.run([compiler, *FLAGS, "-Werror", *sources, "-o", target, "-lm", "-static"], check=True)
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("compiled for Arm, but there is no qemu-aarch64 to run it")
    told = run(emulator, target)
    assert "neon: " in told
    assert told.rstrip().endswith("0 differences")


def test_what_the_header_promises(program):
    """tests/c/test_entries.c, in C, where nothing is checked before the entries do."""
    assert run(program("test_entries")).endswith("checks\n")


def test_split_products_of_fp32(program):
    """tests/c/test_precision.c: precision "high", also on the tier that has its products but takes fp32 instead."""
    told = run(program("test_precision", "-Werror"))
    assert told.rstrip().endswith("0 differences")


def test_threads(program):
    """tests/c/test_threads.c: what platform.h promises of an operating system, and the pool."""
    assert run(program("test_threads", "-Werror")).endswith("checks\n")


def test_descriptors_of_which_some_numbers_are_wrong(program):
    """tests/fuzz/descriptors.c for some seconds; `make test-debug` runs it with sanitizers, `make fuzz` for longer."""
    told = run(program("../fuzz/descriptors", "-Werror"), 0, 5)
    assert int(re.fullmatch(r"seed 0: (\d+) executions .* of which \d+ computed a result\n", told)[1]) > 1000


@pytest.mark.skipif(sys.platform != "linux", reason="the linker may not know --wrap")
def test_any_allocation_of_a_selection_may_fail(program):
    """tests/c/test_memory.c: one after the other, for every method; at least the list lengths and a workspace."""
    told = run(program("test_memory", "-Wl,--wrap=posix_memalign,--wrap=free"))
    counts = [int(word) for word in told.split() if word.isdigit()]
    assert len(counts) >= sum(method.in_core for method in METHODS.values())
    assert min(counts) >= 2
