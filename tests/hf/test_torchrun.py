"""The program of the guide for two machines, as the guide runs it: by torchrun, with torch's own store."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

import tiny  # noqa: E402

import dhsa  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "two-machines.md"


def test_the_program_of_the_guide(tmp_path):
    program = re.search(r'^```python title="ask.py"\n(.*?)^```', PAGE.read_text(encoding="utf-8"), re.M | re.S)
    model, tokenizer = tiny.build("llama"), tiny.character_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = " ".join(str(n * n) for n in range(120))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "ask.py").write_text(program[1])
    environment = {
        **os.environ, "MODEL": str(tmp_path / "model"), "TEXT": str(tmp_path / "text.txt"), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join([str(Path(dhsa.__file__).parents[1]), *sys.path]),
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ask.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad(), dhsa.patched(model, dhsa.Config()):
        expected = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    assert tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :]) in done.stdout
    assert set(re.findall(r"rank (\d) sent [\d,]+ bytes", done.stdout)) == {"0", "1"}
