"""Builds and runs tests/c/test_arena.c: with red zones, address sanitizer stops what leaves a part of an arena.

`make test-debug` runs the array tests in a core that is built like this.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc/core/error.c", ROOT / "csrc/core/platform_posix.c", ROOT / "tests/c/test_arena.c"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("arena") / "arena"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address"]
    flags += ["-DDHSA_RED_ZONE=1024", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    done = subprocess.run([compiler, *flags, *map(str, SOURCES), "-o", str(target)], capture_output=True, text=True)
    if "asan" in done.stderr:
        pytest.skip("the C compiler has no address sanitizer")
    assert done.returncode == 0, done.stderr
    return target


def run(program, way):
    clean = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "ASAN_OPTIONS")}
    return subprocess.run([str(program), way], capture_output=True, text=True, timeout=60, env=clean)


def test_every_byte_of_a_part_is_there(program):
    done = run(program, "good")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


@pytest.mark.parametrize("way", ["next", "zone", "empty", "last"])
def test_a_byte_beyond_a_part_stops_the_program(program, way):
    done = run(program, way)
    assert done.returncode != 0
    assert "use-after-poison" in done.stderr
    assert "test_arena.c" in done.stderr
