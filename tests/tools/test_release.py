"""tools/wheels.py and tools/release.py: what a release must agree with is checked, and what is promised of platforms is
the same everywhere. The wheels themselves are built and checked by `make wheels`, which takes too long for a test.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

import dhsa

ROOT = Path(__file__).resolve().parents[2]
CHANGELOG = (
    "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-12-01\n\n### Added\n\n- One.\n\n## [1.1.0] - 2026-11-01\n"
)


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


@pytest.fixture
def checkout(tmp_path):
    """A checkout of a version 1.2.0 whose parts agree."""
    for name, text in {
        "dhsa/__init__.py": '"""dhsa."""\n\n__version__ = "1.2.0"\n',
        "CHANGELOG.md": CHANGELOG,
        "docs/howto/install.md": "This page is of version `1.2.0`.\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_release_that_agrees(checkout):
    from release import disagreements

    assert disagreements(checkout, "v1.2.0") == ([], "### Added\n\n- One.")


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("dhsa/__init__.py", "1.2.0", "1.2.1", "the tag is v1.2.0, dhsa/__init__.py has version 1.2.1"),
        ("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- Two.\n", "there are changes under [Unreleased]"),
        ("CHANGELOG.md", " - 2026-12-01", "", "no section '## [1.2.0] - date'"),
        ("CHANGELOG.md", "### Added\n\n- One.\n", "", "no section '## [1.2.0] - date' with changes"),
        ("CHANGELOG.md", "[1.1.0]", "[1.3.0]", "versions are not in order"),
        ("docs/howto/install.md", "`1.2.0`", "`1.1.0`", "does not name version `1.2.0`"),
    ],
)
def test_a_release_that_does_not(checkout, name, old, new, told):
    from release import disagreements

    text = (checkout / name).read_text()
    assert old in text
    (checkout / name).write_text(text.replace(old, new))
    found, _ = disagreements(checkout, "v1.2.0")
    assert any(told in sentence for sentence in found), found


def test_a_commit_without_a_tag(checkout):
    from release import disagreements

    assert disagreements(checkout, "")[0] == ["the tag is missing, dhsa/__init__.py has version 1.2.0"]


def test_files_of_a_release(tmp_path):
    from release import incomplete
    from wheels import TARGETS

    names = [f"dhsa-1.2.0-cp311-abi3-{tag}.whl" for tag in TARGETS]
    # As cibuildwheel names what auditwheel repaired.
    names[0] = "dhsa-1.2.0-cp311-abi3-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"
    for name in ["dhsa-1.2.0.tar.gz", "dhsa-1.2.0-cp314-cp314t-win_amd64.whl", *names]:
        (tmp_path / name).touch()
    assert incomplete(tmp_path, "1.2.0", TARGETS) == []
    (tmp_path / names[1]).rename(tmp_path / names[1].replace("1.2.0", "1.1.0"))
    found = incomplete(tmp_path, "1.2.0", TARGETS)
    assert len(found) == 2
    assert "no file" in found[0]
    assert list(TARGETS)[1] in found[0]
    assert found[1].endswith("is of another version")


def test_documented_platforms_are_those_that_are_built():
    from wheels import TARGETS

    page = (ROOT / "docs" / "howto" / "install.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| .* \| `((?:many|musl|mac|win)\w+)` \|", page, re.M) == list(TARGETS)
    run = page.partition("## What was run where")[2]
    assert [row for row in re.findall(r"^\| `(\w+)`", run, re.M)] == list(TARGETS)
    assert f"version `{dhsa.__version__}`" in page


def test_the_workflow_builds_every_platform():
    from wheels import TARGETS

    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    jobs = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())["jobs"]
    machines = jobs["wheels"]["strategy"]["matrix"]["os"]
    arm = [name for name in machines if name.endswith("-arm") or re.fullmatch(r"macos-\d+", name)]
    assert len(machines) == 6  # two of each system; those of Linux build for glibc and for musl
    assert len(arm) == 3
    assert len(TARGETS) == 8
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert build["build"][0] == "cp311-*"  # builds the wheel of the limited API, before Pythons that only test it
    assert "skip" not in build
    tests = re.findall(r"tests/\S+\.py", build["test-command"])
    assert len(tests) >= 4
    assert all((ROOT / name).is_file() for name in tests)
    assert "dhsa" not in build["test-sources"]  # else the checkout would be tested
    for name in ("attest-build-provenance", "attest-sbom"):
        assert any(name in step.get("uses", "") for step in jobs["release"]["steps"])


def test_pyconfig_of_other_platforms_suffices(tmp_path):
    """The extension compiles with the pyconfig.h that setup.py writes when it cross-compiles."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform == "win32":
        pytest.skip("no C compiler for a POSIX system")
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    (config,) = re.findall(r'^PYCONFIG = """\\\n(.*?)"""', text, re.M | re.S)
    shutil.copytree(sysconfig.get_path("include"), tmp_path / "include")
    (tmp_path / "include" / "pyconfig.h").write_text(config)
    flags = ["-std=c11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-DPy_LIMITED_API=0x030B0000"]
    flags += [f"-I{tmp_path / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    sources = sorted((ROOT / "csrc" / "python").glob("*.c"))
    assert sources
    done = subprocess.run([compiler, *flags, *map(str, sources)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
