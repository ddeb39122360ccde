"""Makes a release, but for publishing it: `make release`, on a commit that has a tag and no changes beside it.

Everything is made from what git keeps under the tag: the source distribution and the wheels (tools/wheels.py). Then the
tests of README.md run on the wheel of this machine. Before that, version, tag, changelog and documentation must agree;
`--check` stops there. dist/ then has the files and SHA256SUMS, and notes.md what the changelog says of the version.
"""

import argparse
import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "release"


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def version_of(root):
    """dhsa.__version__, read without an import."""
    for node in ast.parse((root / "dhsa" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return ast.literal_eval(node.value)
    raise SystemExit("dhsa/__init__.py: no __version__")


def sections(changelog):
    """[(heading, text)] of the versions of CHANGELOG.md, newest first."""
    parts = re.split(r"^## (.+)$", changelog, flags=re.M)
    return list(zip(parts[1::2], (text.strip() for text in parts[2::2]), strict=True))


def disagreements(root, tag):
    """Sentences about what does not fit the tag in a checkout, and the notes of the release."""
    version, found = version_of(root), []
    if tag != f"v{version}":
        found.append(f"the tag is {tag or 'missing'}, dhsa/__init__.py has version {version}")
    changes = sections((root / "CHANGELOG.md").read_text(encoding="utf-8"))
    notes = ""
    for heading, text in changes:
        if heading == "[Unreleased]" and text:
            found.append("CHANGELOG.md: there are changes under [Unreleased]")
        if re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", heading):
            notes = text
    if not notes:
        found.append(f"CHANGELOG.md: no section '## [{version}] - date' with changes")
    # Headings that name versions say so in brackets and have a date, newest first.
    released = [tuple(map(int, m.groups())) for m in (re.match(r"\[(\d+)\.(\d+)\.(\d+)\]", h) for h, _ in changes) if m]
    if released != sorted(released, reverse=True):
        found.append("CHANGELOG.md: versions are not in order, newest first")
    if f"`{version}`" not in (root / "docs" / "howto" / "install.md").read_text(encoding="utf-8"):
        found.append(f"docs/howto/install.md: does not name version `{version}`")
    return found, notes


def incomplete(dist, version, tags):
    """Sentences about files that are missing from a folder, or not of this version."""
    names = sorted(path.name for path in dist.iterdir() if path.suffix in (".whl", ".gz"))
    wanted = [
        rf"dhsa-{re.escape(version)}\.tar\.gz",
        *(rf"dhsa-{re.escape(version)}-cp311-abi3-.*\b{t}\.whl" for t in tags),
    ]
    found = [f"{dist}: no file {want}" for want in wanted if not any(re.fullmatch(want, name) for name in names)]
    return found + [f"{dist}: {name} is of another version" for name in names if not name.startswith(f"dhsa-{version}")]


def stop_on(found):
    if found:
        sys.exit("\n".join(found))


def readme_works(source, installed):
    """Runs the tests of README.md on the installed wheel."""
    folder = BUILD / "readme"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("dhsa", "csrc", "build", "dist"))
    env = {**os.environ, "PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
    where = [sys.executable, "-c", "import dhsa, dhsa._core; print(dhsa.__file__, dhsa._core.__file__)"]
    told = subprocess.run(where, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout
    assert told.count(str(installed)) == 2, told
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/tools/test_readme.py"]
    subprocess.run(command, cwd=folder, env=env, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--check", action="store_true", help="only check what must agree, and write notes.md")
    parser.add_argument("--dist", type=Path, help="with --check: a folder that must have every file of the release")
    arguments = parser.parse_args()
    from wheels import TARGETS

    if changes := git("status", "--porcelain", "--untracked-files=no"):
        sys.exit(f"there are changes that are not committed:\n{changes}")
    tag = next((tag for tag in git("tag", "--points-at", "HEAD").split() if tag.startswith("v")), "")
    found, notes = disagreements(ROOT, tag)
    if arguments.dist:
        found += incomplete(arguments.dist, version_of(ROOT), TARGETS)
    stop_on(found)
    (ROOT / "notes.md").write_text(notes + "\n", encoding="utf-8")
    if arguments.check:
        return
    shutil.rmtree(BUILD, ignore_errors=True)
    source = BUILD / "source"
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", tag], cwd=ROOT, capture_output=True, check=True).stdout
    (BUILD / "source.tar").write_bytes(archive)
    shutil.unpack_archive(BUILD / "source.tar", source)
    # Files carry the time of the commit, so that the same commit makes the same archives.
    env = {**os.environ, "SOURCE_DATE_EPOCH": git("log", "-1", "--format=%ct", tag)}
    if (ROOT / "build" / "pythons").exists():
        (source / "build").mkdir()
        (source / "build" / "pythons").symlink_to(ROOT / "build" / "pythons")
    subprocess.run([sys.executable, "tools/wheels.py"], cwd=source, env=env, check=True)
    readme_works(source, source / "build" / "wheels" / "manylinux_2_28_x86_64" / "installed")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    shutil.copytree(source / "dist", ROOT / "dist")
    stop_on(incomplete(ROOT / "dist", version_of(ROOT), TARGETS))
    sums = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted((ROOT / "dist").iterdir())]
    (ROOT / "dist" / "SHA256SUMS").write_text("".join(sums))
    print(
        "".join(sums),
        f"dist/ has {len(sums)} files of {tag}; publish them, notes.md is what the changelog says",
        sep="",
    )


if __name__ == "__main__":
    main()
