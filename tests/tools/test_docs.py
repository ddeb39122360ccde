"""The documentation: the code of its pages runs as printed, its reference has every public name, and its table of
settings is that of Config. That the site builds without warnings is checked by `make docs`.

Models named on the pages are replaced by a small one of random weights; figures are not tested.
"""

import dataclasses
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
from packaging.version import Version
from pages import code_of, small_models
from weights import compact_weights

import dhsa
from dhsa.methods import registry

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
ELSEWHERE = "howto/method.md"  # in test_add_method.py: its code needs the method that it adds
REFERENCE = {name: text for name, text in PAGES.items() if name.startswith("reference/")}
PUBLIC = ("dhsa.hf", "dhsa.methods", "dhsa.plot", "dhsa.reference", "dhsa.training")
# Modules whose public names are those of `dhsa`, and modules behind the command line.
OTHERS = {
    "ask", "commands", "config", "demo", "demo_distributed", "distributed", "doctor", "evaluation", "functional",
    "growth", "labels", "predictor", "run", "sdpa", "selecting", "selection", "tuning",
}  # fmt: skip


def documented():
    """Every name that a page of the reference renders."""
    return re.findall(r"^::: (\S+)$", "\n".join(REFERENCE.values()), re.M)


def resolve(name):
    """The object of a dotted name."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if code_of(text) and name != ELSEWHERE])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    pytest.importorskip("safetensors", reason="needs the predictor extra: safetensors")
    pytest.importorskip("matplotlib", reason="needs the demo extra: matplotlib")
    small_models(monkeypatch)
    monkeypatch.chdir(tmp_path)
    words = ("keys", "queries", "are", "cut", "into", "chunks", "where", "neighbours", "differ", "and", "of", "each")
    (tmp_path / "prompt.txt").write_text(" ".join(words[(i * i + i // 7) % len(words)] for i in range(1000)))
    dhsa.BoundaryPredictor.from_state_dict(compact_weights(16)).save("mine.safetensors")
    names = {}
    for code in code_of(PAGES[page]):
        if Version(transformers.__version__) < Version("5.24"):  # as the page says
            code = re.sub(r", cache=cache, ", ", past_key_values=cache, ", code)
        exec(compile(code, page, "exec"), names)


def test_pages_with_code_are_found():
    assert sum(bool(code_of(text)) for text in PAGES.values()) >= 5


def test_the_reference_has_every_public_name():
    names = documented()
    assert len(names) == len(set(names)) > 50
    pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    pytest.importorskip("rich", reason="needs the demo extra: rich")
    objects = [resolve(name) for name in names]
    missing = [f"dhsa.{name}" for name in set(dhsa.__all__) - {"reference"} if f"dhsa.{name}" not in names]
    for module in map(importlib.import_module, PUBLIC):
        assert module.__all__
        for name in module.__all__:
            value = getattr(module, name)
            if f"{module.__name__}.{name}" not in names and not any(value is found for found in objects):
                missing.append(f"{module.__name__}.{name}")
    assert not missing


def test_every_module_is_public_or_known_not_to_be():
    found = {module.name for module in pkgutil.iter_modules(dhsa.__path__) if not module.name.startswith("_")}
    assert found - OTHERS == {name.removeprefix("dhsa.") for name in PUBLIC}
    for name in PUBLIC:
        assert f"`{name}`" in REFERENCE["reference/index.md"]


def test_the_files_that_the_architecture_names_are_there():
    """By their path in the checkout, or by their name alone."""
    root = DOCS.parent
    files = [
        path.relative_to(root).as_posix()
        for folder in ("csrc", "dhsa", "tests", "benchmarks")
        for path in (root / folder, *(root / folder).rglob("*"))
    ]
    named = {
        (page, name.rstrip("/"))
        for page, text in PAGES.items()
        if page.startswith(("ARCHITECTURE", "architecture/"))
        for name in re.findall(r"`([\w/]+(?:/|\.(?:c|h|inc|py)))`", text)
        if "NAME" not in name
    }
    assert len(named) > 60
    assert not [pair for pair in sorted(named) if not any(f"/{file}".endswith(f"/{pair[1]}") for file in files)]


def test_the_table_of_settings():
    section = PAGES["howto/model.md"].partition("## Settings")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \| .+ \|$", section, re.M)
    printed = {}
    for names, values in rows:
        names, values = re.findall(r"`(\w+)`", names), [v.strip(" `") for v in values.split(",")]
        printed.update(zip(names, values, strict=True))
    fields = {f.name for f in dataclasses.fields(dhsa.Config)}
    expected = {"budget", "query_block", "sink", "local", "dense_tail", "heads", "boundaries", "method", "mass"}
    assert expected <= set(printed)
    assert set(printed) <= fields
    for name, value in printed.items():
        assert str(getattr(dhsa.Config(), name)) == value.strip('"'), name


def table_of_methods():
    rows = ["| `method=` | what it takes | cost | its options | source |", "|---|---|---|---|---|"]
    for name, method in registry.items():
        options = ", ".join(f"`{f.name}={f.default!r}`" for f in dataclasses.fields(method)) or "none"
        link = f'[`"{name}"`][dhsa.methods.{method.__name__}]'
        rows.append(f"| {link} | {method.summary} | {method.cost} | {options} | {method.source} |")
    return "\n".join(rows)


def test_the_table_of_methods_is_the_registry():
    """What the page is to hold is printed where it does not."""
    assert table_of_methods() in REFERENCE["reference/methods.md"]


def test_the_commands_are_those_of_the_parser(capsys):
    from dhsa.__main__ import main

    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    ([a-z-]+)(?:\s|$)", capsys.readouterr().out, re.M))
    assert {"demo", "check", "eval"} <= commands
    assert commands == set(re.findall(r"^\| `python -m dhsa ([a-z-]+)` \|", REFERENCE["reference/commands.md"], re.M))
