"""Who may use whom: arrows between the rooms run downward only, and no file uses another that uses it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may include what is below it, and itself.
ROOMS = ["core", "kernels", "chunk", "attend", "select", "select/methods", "label", "pipeline", "python"]
APART = {"attend": {"chunk"}, "chunk": {"attend"}}  # rooms of one height


def includes(path):
    return re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)


def sources():
    return sorted(
        p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".c", ".h", ".inc"} and "include" not in p.parts
    )


def room(name):
    return name.rpartition("/")[0]


def test_the_core_includes_only_what_is_below():
    arrows = set()
    for path in sources():
        name = path.relative_to(ROOT / "csrc").as_posix()
        assert room(name) in ROOMS, f"{name}: no such room"
        for target in includes(path):
            if target == "dhsa.h":
                continue
            assert (ROOT / "csrc" / target).is_file(), f"{name} includes {target}, which is not there"
            assert ROOMS.index(room(target)) <= ROOMS.index(room(name)), f"{name} includes {target}, which is above it"
            assert room(target) not in APART.get(room(name), ()), f"{name} includes {target}, which is beside it"
            arrows.add((room(name), room(target)))
    assert {("python", "core"), ("pipeline", "select"), ("select", "chunk"), ("attend", "kernels")} <= arrows


def circle(graph):
    """A way round in {name: names}, or []."""
    done = set()

    def visit(name, way):
        if name in way:
            return way[way.index(name) :]
        if name not in done:
            for target in graph.get(name, ()):
                if found := visit(target, [*way, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def test_a_circle_is_found():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def symbols():
    """{file: what it defines for others}, {file: what of that it names}; by the text, so that no build is needed."""
    texts = {p.relative_to(ROOT / "csrc").as_posix(): p.read_text() for p in sources() if p.suffix == ".c"}
    texts = {name: re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL) for name, text in texts.items()}
    pattern = r"^(?!static|extern|typedef)[a-z][\w \*]*\b(dhsa_\w+)(?:\([^;{]*\)\s*\{| = \{)"
    return texts, {name: set(re.findall(pattern, text, re.MULTILINE)) for name, text in texts.items()}


@pytest.mark.parametrize("what", ["headers", "functions"])
def test_no_file_of_the_core_uses_one_that_uses_it(what):
    if what == "headers":
        graph = {p.relative_to(ROOT / "csrc").as_posix(): includes(p) for p in sources()}
        graph = {name: [t for t in targets if t != "dhsa.h"] for name, targets in graph.items()}
    else:
        texts, defined = symbols()
        home = {symbol: name for name, those in defined.items() for symbol in those}
        assert len(home) > 120
        graph = {
            name: {home[s] for s in set(re.findall(r"\bdhsa_\w+", text)) if s in home and home[s] != name}
            for name, text in texts.items()
        }
        for name, targets in graph.items():
            for target in targets:
                assert ROOMS.index(room(target)) <= ROOMS.index(room(name)), f"{name} calls {target}, which is above it"
    assert circle(graph) == []
