"""Builds dhsa._core: every C file under csrc/, with a plain C compiler, into one limited-API extension.

Each instruction set tier raises its own compiler target inside its source file, so no file needs flags of its own
and one binary holds every tier. Metadata and dependencies live in pyproject.toml.
"""

import os
from glob import glob

from setuptools import Extension, setup

# DHSA_DEBUG_BUILD=1, for `make test-debug`: sanitizers, assertions, and red zones between the parts of every arena
# (csrc/core/arena.h). Zones are wide since what is laid out in strides may overrun its part by a stride.
# "gdb": symbols, and nothing optimized.
DEBUG = ["-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DDHSA_RED_ZONE=65536", "-UNDEBUG"]
debug = {"1": DEBUG, "gdb": ["-g3", "-O0"]}.get(os.environ.get("DHSA_DEBUG_BUILD", ""), [])

core = Extension(
    "dhsa._core",
    sources=sorted(glob("csrc/**/*.c", recursive=True)),
    depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True)),
    include_dirs=["csrc", "csrc/include"],
    define_macros=[("Py_LIMITED_API", "0x030B0000"), ("_GNU_SOURCE", None)],
    # No -ffast-math: infinities and NaN have a meaning here. Contraction into FMA is written by hand where wanted.
    extra_compile_args=[
        "-std=c11",
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        *debug,
    ],
    extra_link_args=["-pthread", *debug],
    libraries=["m"],
    py_limited_api=True,
)

setup(ext_modules=[core], options={"bdist_wheel": {"py_limited_api": "cp311"}})
