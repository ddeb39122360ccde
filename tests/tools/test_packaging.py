"""What is handed on: a source distribution that holds everything its build reads, and metadata that says what is true.

Nothing is installed and no network is asked; that a wheel builds is shown by every installation.
"""

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import dhsa

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"csrc": {".c", ".h", ".inc"}, "dhsa": {".py", ".pyi", "py.typed"}, "tests": {".py", ".c"}}

# A licence has to come with what is licensed; the others are read by tests.
DOCUMENTS = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "NOTICE", "SECURITY.md", ".pre-commit-config.yaml",
)  # fmt: skip

pytest.importorskip("setuptools", reason="needs setuptools to make a source distribution")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Names in a source distribution of this checkout, without the leading folder."""
    folder = tmp_path_factory.mktemp("sdist")
    # A copy of the tracked kind of file: setuptools would otherwise read, and leave, lists of its own in the checkout.
    copy = folder / "checkout"
    copy.mkdir()
    for name in (".github", "csrc", "dhsa", "tests", "docs", "notebooks", "benchmarks", "tools"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and path.suffix not in (".so", ".pyc"):
                target = copy / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "Makefile", *DOCUMENTS):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(folder / "dist")], cwd=copy, check=True, timeout=120
    )
    (archive,) = (folder / "dist").glob("*.tar.gz")
    assert archive.name == f"dhsa-{dhsa.__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def test_source_distribution_holds_every_file_that_the_build_and_the_tests_read(sdist):
    wanted = {
        str(path.relative_to(ROOT))
        for folder, suffixes in (
            ("csrc", {".c", ".h", ".inc"}),
            ("dhsa", {".py", ".pyi", ".typed", ".safetensors", ".md"}),
            ("tests", {".py", ".c", ".h"}),
            ("tools", {".py", ".sh"}),
        )
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes or path.name in suffixes
    }
    assert len(wanted) > 50
    assert wanted <= sdist, sorted(wanted - sdist)
    assert {"README.md", "Makefile", "notebooks/quickstart.ipynb", "docs/ARCHITECTURE.md"} <= sdist
    assert {*DOCUMENTS, ".github/workflows/tests.yml"} <= sdist


def test_a_wheel_holds_every_module_and_the_weights(tmp_path):
    """By the step that collects a wheel's Python files and data; compiling is shown by every installation."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "build_py", "-d", tmp_path / "lib"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, timeout=120)
    made = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "dhsa").rglob("*")
        if path.suffix in {".py", ".pyi", ".typed", ".safetensors", ".md"} or path.name == "py.typed"
    }
    assert any(name.endswith(".safetensors") for name in wanted)
    assert wanted <= made, sorted(wanted - made)


def test_source_distribution_holds_nothing_built(sdist):
    assert not [name for name in sdist if name.endswith((".so", ".pyc", ".o"))]


def test_everything_that_c_files_include_makes_the_extension_build_again():
    """Else an edit of such a file leaves the old binary in place, and tests test what is no longer there."""
    text = (ROOT / "setup.py").read_text()
    included = {
        Path(name).suffix
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".c", ".h", ".inc"}
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M)
    }
    assert ".h" in included
    depends = re.search(r"depends=(.*)", text).group(1)
    assert not [suffix for suffix in included if f"*{suffix}" not in depends]


def test_extras_and_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"hf", "demo", "test"} <= set(project["optional-dependencies"])
    assert [re.split(r"[<>=]", name)[0] for name in project["dependencies"]] == ["numpy"]
