"""The guide to adding a method, followed to the letter in a copy of the checkout: its files and lines are put in place,
the extension is built, and the command of the page runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "howto" / "method.md").read_text()


def files():
    """{path: contents} of the files that the page prints."""
    return dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def replacements():
    """[(path, lines to replace, lines in their place)] of the page's list of changes."""
    (changes,) = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    found = []
    for part in re.split(r"^--- a/", changes, flags=re.MULTILINE)[1:]:
        path, *hunks = re.split(r"^@@\n", part, flags=re.MULTILINE)
        for hunk in hunks:
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
            found.append((path.split("\n")[0], old, new))
    return found


def test_the_guide_to_the_letter(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    for name in ("csrc", "dhsa", "tests", "setup.py", "pyproject.toml", "README.md"):
        place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        place(ROOT / name, tmp_path / name)
    assert sorted(files()) == ["csrc/select/methods/stripes.c", "dhsa/methods/stripes.py"]
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    assert len(replacements()) == 5
    for name, old, new in replacements():
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1, f"{name}: {old!r}"
        (tmp_path / name).write_text(text.replace(old, new))

    def run(*command, **variables):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), **variables}
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    # Nothing is optimized, which takes a third of the time: what is asked is whether it builds and is right.
    run("setup.py", "-q", "build_ext", "--inplace", DHSA_DEBUG_BUILD="gdb")
    (arguments,) = re.findall(r'^make test ARGS="(.*)"$', PAGE, re.MULTILINE)
    ran = run("-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments.split())
    assert int(re.search(r"(\d+) passed", ran).group(1)) > 100
    for code in re.findall(r"^```python\n(import dhsa\n.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        run("-c", code)
    # What the page gives is as tidy as the project.
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(tmp_path / "dhsa/methods")], check=True)
