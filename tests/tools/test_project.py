"""What a public project has is there and agrees with itself: versions, make targets, Pythons, licence, links."""

import re
import tomllib
from pathlib import Path

import pytest

import dhsa

yaml = pytest.importorskip("yaml", reason="needs the test extra: PyYAML, which comes with transformers")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def targets():
    """{target: its recipe} of the Makefile."""
    rules = re.findall(r"^([a-z][a-z-]*):[^=\n]*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.M)
    return dict(rules)


def steps(workflow):
    for job in WORKFLOWS[workflow]["jobs"].values():
        for step in job["steps"]:
            yield job, step


def test_workflows_call_targets_that_the_makefile_has():
    called = set()
    for workflow in WORKFLOWS:
        for job, step in steps(workflow):
            for target in re.findall(r"^\s*make (\S+)", step.get("run", ""), re.M):
                if target == "${{":
                    called |= {row["target"] for row in job["strategy"]["matrix"]["include"]}
                else:
                    called.add(target)
    # `make docs` is named by the workflow of the documentation.
    assert called == {"lint", "docs", "test", "test-oldest", "test-newest", "test-debug", "wheels", "release-check"}
    assert called - {"docs"} <= set(targets())


def test_workflows_test_every_python_that_is_promised_with_both_compilers():
    matrix = WORKFLOWS["tests"]["jobs"]["suite"]["strategy"]["matrix"]
    assert matrix == {"python": PYTHONS, "compiler": ["gcc", "clang"]}
    promised = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if re.search(r"Python :: 3\.\d+$", c)]
    assert promised == PYTHONS
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"


def test_linters_have_one_version():
    pinned = dict(line.split("==") for line in PROJECT["dependency-groups"]["lint"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    used = {name for hook in hooks for name in hook["additional_dependencies"]}
    assert {"ruff", "clang-format"} <= {name.partition("==")[0] for name in used}
    assert used <= {f"{name}=={version}" for name, version in pinned.items()}


def test_make_lint_runs_every_linter():
    recipe = targets()["lint"]
    for linter in (
        "ruff check",
        "ruff format --check",
        "clang-format --dry-run --Werror",
        "mypy",
        "pyright",
        "CITATION",
    ):
        assert linter in recipe, linter
    assert "vendor.github-workflows .github/workflows/*.yml" in recipe


def test_licence_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n" in text
    assert "Version 2.0, January 2004" in text
    assert [int(n) for n in re.findall(r"^   (\d)\. ", text, re.M)] == list(range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert PROJECT["project"]["license-files"] == ["LICENSE", "NOTICE"]
    for name in PROJECT["project"]["license-files"]:
        assert (ROOT / name).is_file()


def test_changelog_is_kept():
    """Headings as Keep a Changelog has them; the package's version is released there or still to be."""
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[?([^\]\s]+)\]?(?: - \d{4}-\d{2}-\d{2})?$", text, re.M)
    assert versions[0] == "Unreleased"
    assert dhsa.__version__ in versions or f"Version {dhsa.__version__} will be" in text
    assert set(re.findall(r"^### (\w+)$", text, re.M)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security",
    }  # fmt: skip


def test_contributing_names_what_there_is():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"`make ([a-z-]+)", text))
    assert {"test", "lint", "test-debug", "lab"} <= named
    assert named - {"docs"} <= set(targets())
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    for path in (
        "tests/tiny.py",
        "tests/kinds.py",
        "tests/hf/test_kinds.py",
        "tests/c/test_kernels.c",
        "csrc/kernels/kernels.inc",
    ):
        assert path in text or Path(path).name in text, path
        assert (ROOT / path).is_file(), path
