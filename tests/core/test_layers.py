"""Who may use whom: arrows between the rooms run downward only, and no file uses another that uses it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A room may include what is below it, and itself.
ROOMS = ["core", "kernels", "chunk", "attend", "select", "select/methods", "label", "pipeline", "python"]
APART = {"attend": {"chunk"}, "chunk": {"attend"}}  # rooms of one height

# The same for dhsa/: a room may import those of lower layers, and those of its own unless it is one of ALONE. "dhsa" is
# the package itself with its public names, of which it imports some only when they are asked for.
LAYERS = [
    {"_typing"},
    {"_core"},
    {"_arrays", "_checkpoint", "_files", "_register", "_tensors", "_threads", "_twin"},
    {"_precision", "_safetensors"},
    {"methods", "predictor", "selection"},
    {"config", "reference"},
    {"functional", "labels", "selecting"},
    {"dhsa"},
    {"distributed"},
    {"hf", "plot", "sdpa"},
    {"commands", "growth"},
    {"ask", "demo", "doctor", "evaluation", "run", "training"},
    {"demo_distributed", "tuning"},
    {"__main__"},
]
ALONE = {
    "_core", "ask", "commands", "config", "demo", "demo_distributed", "doctor", "evaluation", "hf", "methods", "plot",
    "reference", "run", "sdpa", "training", "tuning",
}  # fmt: skip


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


# What the C standard library has, and intrinsics, which are those of kernels. Everything else is of one system.
STANDARD = {
    "assert", "errno", "float", "inttypes", "limits", "math", "sanitizer/asan_interface", "stdarg", "stdatomic",
    "stddef", "stdint", "stdio", "stdlib", "string", "time",
}  # fmt: skip
INTRINSICS = {"arm_neon", "cpuid", "immintrin"}


def test_what_differs_between_systems_is_behind_one_header():
    """Each system has its file of core/; kernels/cpu.c asks Linux for the tile registers, which no other has."""
    system = {"core/platform.h", "core/platform_posix.c", "core/platform_windows.c", "kernels/cpu.c"}
    found = set()
    for path in sources():
        name = path.relative_to(ROOT / "csrc").as_posix()
        headers = set(re.findall(r"^\s*#\s*include <([\w/]+)\.h>", path.read_text(), re.MULTILINE))
        if headers - STANDARD - {"kernels": INTRINSICS, "python": {"Python"}}.get(room(name), set()):
            found.add(name)
    assert found == system


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


def modules(folder):
    """{dotted name: file} of a folder of Python; a package goes by its own name. benchmarks/ is none."""
    found = {}
    for path in sorted([*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.pyi")]):
        parts = path.relative_to(ROOT if folder == "dhsa" else ROOT / folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(node):
    """All that runs of a module, whether at its top or later: not what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements(child)


def imported(name, path, names):
    """Which of `names` a file imports, at its top or anywhere else."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inside = {f"{base}.{alias.name}" for alias in node.names}
            found |= inside if inside <= names else {base, *inside}
    return (found & names) - {name}


def layer(name):
    room = name.split(".")[1] if "." in name else name
    found = [at for at, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{name}: no such room; enter it in LAYERS"
    return found[0], room


@pytest.mark.parametrize("folder", ["dhsa", "benchmarks"])
def test_no_module_imports_one_that_imports_it(folder):
    names = modules(folder)
    graph = {name: imported(name, path, names.keys()) for name, path in names.items()}
    assert sum(map(len, graph.values())) > (100 if folder == "dhsa" else 10)
    assert circle(graph) == []


def test_modules_import_only_what_is_below():
    names = modules("dhsa")
    arrows = set()
    for name, path in names.items():
        height, room = layer(name)
        for target in imported(name, path, names.keys()):
            below, other = layer(target)
            assert below <= height, f"{name} imports {target}, which is above it"
            assert below < height or other == room or room not in ALONE, f"{name} imports {target}, which is beside it"
            arrows.add((room, other))
    assert {("config", "predictor"), ("functional", "_core"), ("hf", "functional"), ("evaluation", "hf")} <= arrows
    assert {other for room, other in arrows if room == "reference"} == {"_twin", "methods", "reference"}
    assert {room for room, other in arrows if other == "reference"} == {"reference"}
    assert {other for room, other in arrows if room == "_twin"} == {"_twin"}


def test_imports_are_found(tmp_path):
    path = tmp_path / "b.py"
    later = "if TYPE_CHECKING:\n    import a.z\ndef f():\n    from ..a import y, z\n"
    path.write_text(f"import a.x, os\nfrom . import c\nfrom .d import name\nfrom p import d as e, c\n{later}")
    names = {"a.x", "a.z", "p", "p.c", "p.d", "q.a", "q.a.y", "q.p.b", "q.p.c", "q.p.d"}
    assert imported("q.p.b", path, names) == {"a.x", "p.c", "p.d", "q.p.c", "q.p.d", "q.a", "q.a.y"}
    path.write_text("from p import d, name\n")
    assert imported("q.p.b", path, names) == {"p", "p.d"}
