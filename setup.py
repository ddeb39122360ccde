"""Builds dhsa._core: every C file under csrc/, with a plain C compiler, into one extension.

Each instruction set tier raises its own compiler target inside its source file, so no file needs flags of its own
and one binary holds every tier. The extension is of the limited API (one wheel for Python 3.11 and later), except for
free-threaded Python, which has none before 3.15. Metadata and dependencies live in pyproject.toml.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# DHSA_DEBUG_BUILD=1, for `make test-debug`: sanitizers, assertions, and red zones between the parts of every arena
# (csrc/core/arena.h). Zones are wide since what is laid out in strides may overrun its part by a stride.
# "threads", for `make test-threads`: the sanitizer of threads. "gdb": symbols, and nothing optimized.
# DHSA_FAULTS=1, with any of these or none: the module has a function, faults, by which allocations and starts of
# threads fail (csrc/core/faults.h).
DEBUG = ["-g1", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DDHSA_RED_ZONE=65536", "-UNDEBUG"]
THREADS = ["-g1", "-O1", "-fsanitize=thread", "-UNDEBUG"]
debug = {"1": DEBUG, "threads": THREADS, "gdb": ["-g3", "-O0"]}.get(os.environ.get("DHSA_DEBUG_BUILD", ""), [])
faults = [("DHSA_FAULTS", None)] if os.environ.get("DHSA_FAULTS") == "1" else []

# DHSA_TARGET, for `make wheels`: what to compile for with the compiler of the package ziglang, as its option -target
# names it. Windows always uses that compiler: Microsoft's has no C11 of GNU's kind, and GCC does not align the stack
# there as AVX needs it.
WINDOWS = {"win-amd64": "x86_64-windows-gnu", "win-arm64": "aarch64-windows-gnu"}
limited = not sysconfig.get_config_var("Py_GIL_DISABLED")
target = os.environ.get("DHSA_TARGET", "")
if sys.platform == "win32" and not (target := WINDOWS.get(sysconfig.get_platform(), "")):
    sys.exit(f"dhsa needs a 64-bit Python, this one is for {sysconfig.get_platform()}")
if target and not limited and sys.platform != "win32":
    sys.exit("DHSA_TARGET: needs a Python with the limited API, this one is free-threaded")

# All that the headers of the limited API ask pyconfig.h about a 64-bit target, where Python's own is for this machine.
PYCONFIG = """\
#ifdef _WIN32
#define MS_WIN32
#define MS_WIN64
#define MS_WINDOWS
#define HAVE_DECLSPEC_DLL
#define Py_ENABLE_SHARED 1
#define SIZEOF_LONG 4
#define SIZEOF_WCHAR_T 2
#else
#define SIZEOF_LONG 8
#define SIZEOF_WCHAR_T 4
#endif
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_SHORT 2
#define SIZEOF_INT 4
#define SIZEOF_LONG_LONG 8
#define SIZEOF_TIME_T 8
"""


class zig_build_ext(build_ext):
    """Compiles and links for `target` in one call of zig's C compiler."""

    def get_ext_filename(self, fullname):
        if sys.platform == "win32":
            return super().get_ext_filename(fullname)
        return fullname.replace(".", os.sep) + (".pyd" if "windows" in target else ".abi3.so")

    def build_extension(self, ext):
        made, folder = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        made.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-s", *ext.extra_compile_args]
        command += [f"-D{name}" + (f"={value}" if value else "") for name, value in ext.define_macros]
        command += [f"-I{name}" for name in ext.include_dirs] + [f"-I{self.headers(folder)}"]
        command += shlex.split(os.environ.get("CFLAGS", ""))
        command += [*ext.sources, "-o", str(made)]
        if "windows" in target:
            command.append(self.import_library(folder))
        elif "macos" in target:
            command.append("-Wl,-undefined,dynamic_lookup")  # Python's symbols are those of the process
        else:
            command.append("-lm")
        subprocess.run(command, check=True)
        if "windows" in target:  # zig leaves what links against the extension beside it
            for name in ("lib", "pdb"):
                made.with_suffix(f".{name}").unlink(missing_ok=True)

    def headers(self, folder):
        """Python's headers, with a pyconfig.h for the target unless they are its own."""
        own = Path(sysconfig.get_path("include"))
        if sys.platform == "win32":
            return own
        copy = folder / "include"
        for path in own.rglob("*.h"):
            to = copy / path.relative_to(own)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
        (copy / "pyconfig.h").write_text(PYCONFIG)
        return copy

    def import_library(self, folder):
        """What an extension for Windows is linked with: of the limited API, every symbol that Python 3.11 has."""
        if sys.platform == "win32":
            name = "python3" if limited else "python{}{}t".format(*sys.version_info)
            return str(Path(sys.base_prefix, "libs", name + ".lib"))
        import abi3info

        first = abi3info.models.PyVersion(3, 11)
        lines = ["LIBRARY python3.dll", "EXPORTS"]
        lines += [symbol.name for symbol, of in abi3info.FUNCTIONS.items() if of.added <= first]
        lines += [f"{symbol.name} DATA" for symbol, of in abi3info.DATAS.items() if of.added <= first]
        (folder / "python3.def").write_text("\n".join(lines) + "\n")
        machine = {"x86_64": "i386:x86-64", "aarch64": "arm64"}[target.partition("-")[0]]
        library = str(folder / "python3.lib")
        tool = [sys.executable, "-m", "ziglang", "dlltool", "-m", machine, "-d", str(folder / "python3.def")]
        subprocess.run([*tool, "-D", "python3.dll", "-l", library], check=True)
        return library


core = Extension(
    "dhsa._core",
    sources=sorted(glob("csrc/**/*.c", recursive=True)),
    depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True)),
    include_dirs=["csrc", "csrc/include"],
    # Python's headers for Windows are one set for both kinds of Python, which this macro tells apart.
    define_macros=[
        ("_GNU_SOURCE", None),
        ("Py_LIMITED_API", "0x030B0000") if limited else ("Py_GIL_DISABLED", "1"),
        *faults,
    ],
    # No -ffast-math: infinities and NaN have a meaning here. Contraction into FMA is written by hand where wanted.
    extra_compile_args=[
        "-std=c11",
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        "-fvisibility=hidden",
        *([] if "windows" in target else ["-pthread"]),
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        *debug,
    ],
    extra_link_args=["-pthread", *debug],
    libraries=["m"],
    py_limited_api=limited,
)

setup(
    ext_modules=[core],
    cmdclass={"build_ext": zig_build_ext} if target else {},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if limited else {},
)
