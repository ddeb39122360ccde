"""Builds and runs tests/c/test_kernels.c: every kernel of every tier against scalar, buffers ending at guard pages.

For this CPU always; for 64-bit Arm where a cross compiler is installed, and run there too where qemu-user is.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-O2",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
]
SOURCES = [
    *sorted((ROOT / "csrc" / "kernels").glob("*.c")),
    ROOT / "csrc/core/error.c",
    ROOT / "csrc/core/threads.c",
    ROOT / "tests/c/test_kernels.c",
]


def build(compiler, target, *extra):
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run([compiler, *FLAGS, *includes, *map(str, SOURCES), "-o", str(target), "-lm", *extra], check=True)
    return target


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("0 differences")
    return done.stdout


def test_kernels_of_every_tier(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    assert "scalar: " in run(build(compiler, tmp_path / "kernels"))


def test_neon(tmp_path):
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-gcc to cross-compile with")
    program = build(compiler, tmp_path / "kernels", "-static")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("compiled for Arm, but there is no qemu-aarch64 to run it")
    assert "neon: " in run(emulator, program)
