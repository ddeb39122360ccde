"""`python -m dhsa run`: programs run as Python runs them, with "dhsa" known to transformers and a default
configuration; among them lm_eval and `transformers serve`."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

import dhsa

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
SHOW = "import sys; print(__name__, sys.argv, sys.path[0], __file__, flush=True); sys.exit(7)"


def python(*arguments, cwd, timeout=300):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout, check=False)


def dhsa_run(*arguments, cwd, timeout=300):
    return python("-m", "dhsa", "run", *arguments, cwd=cwd, timeout=timeout)


def same(cwd, ours, plain):
    """Runs both, and compares status and output. Of a script by its full path, which it is then called by."""
    got, want = dhsa_run(*ours, cwd=cwd), python(*plain, cwd=cwd)
    assert (got.returncode, got.stdout) == (want.returncode, want.stdout), got.stderr
    return got


# ---- programs as Python runs them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-m", "--budget", "3", "--", "x", "--help"], ["--", "-h"]])
def test_script(tmp_path, arguments):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "show.py").write_text(SHOW)
    got = same(tmp_path, ["here/show.py", *arguments], [tmp_path / "here" / "show.py", *arguments])
    assert got.returncode == 7
    assert str(tmp_path / "here") in got.stdout


def test_a_linked_script_finds_the_modules_beside_the_file(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "show.py").write_text("import beside\n" + SHOW)
    (tmp_path / "there" / "beside.py").write_text("")
    (tmp_path / "link.py").symlink_to(tmp_path / "there" / "show.py")
    assert same(tmp_path, ["link.py"], [tmp_path / "link.py"]).returncode == 7


def test_module_package_folder_and_zip_file(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("import sys; print(sys.argv)")
    (tmp_path / "pack" / "show.py").write_text(SHOW)
    (tmp_path / "pack" / "__main__.py").write_text("from pack import show")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("__main__.py", SHOW)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__main__.py").write_text(SHOW)
    assert same(tmp_path, ["-m", "pack.show", "-m", "a"], ["-m", "pack.show", "-m", "a"]).returncode == 7
    assert same(tmp_path, ["--budget", "9", "-m", "pack"], ["-m", "pack"]).returncode == 7
    for name in ("all.zip", "folder"):
        assert same(tmp_path, [name, "a"], [tmp_path / name, "a"]).returncode == 7


def test_installed_command(tmp_path):
    got = dhsa_run("pytest", "--version", cwd=tmp_path)
    assert (got.returncode, got.stdout) == (0, f"pytest {pytest.__version__}\n")
    assert dhsa_run("pytest", "nothing.py", cwd=tmp_path).returncode == pytest.ExitCode.USAGE_ERROR


def test_exceptions_and_statuses(tmp_path):
    (tmp_path / "fails.py").write_text("def f():\n    raise KeyError('mine')\nf()")
    got = dhsa_run("fails.py", cwd=tmp_path)
    assert got.returncode == 1
    assert got.stderr.endswith("KeyError: 'mine'\n")
    for code, status in (("import sys; sys.exit('no')", 1), ("import sys; sys.exit()", 0), ("", 0)):
        (tmp_path / "ends.py").write_text(code)
        assert same(tmp_path, ["ends.py"], ["ends.py"]).returncode == status


def test_an_interrupted_program_ends_as_without_us(tmp_path):
    (tmp_path / "waits.py").write_text(
        # A shell that runs the tests in the background may have them ignore the signal.
        "import os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print('ready', flush=True)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)"
    )
    got = same(tmp_path, ["waits.py"], ["waits.py"])
    assert got.returncode == -signal.SIGINT
    assert got.stderr.endswith("KeyboardInterrupt\n")
    assert "dhsa run: stopped" not in got.stderr


def test_processes_of_the_program(tmp_path):
    """multiprocessing imports the main module anew, by its name or its file."""
    (tmp_path / "workers.py").write_text(
        textwrap.dedent("""
            import multiprocessing
            def double(x):
                return 2 * x
            if __name__ == "__main__":
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    print(pool.map(double, [1, 2]))
        """)
    )
    assert same(tmp_path, ["workers.py"], ["workers.py"]).stdout == "[2, 4]\n"
    assert same(tmp_path, ["-m", "workers"], ["-m", "workers"]).stdout == "[2, 4]\n"


def test_torch_is_not_imported_for_a_program_without_it(tmp_path):
    (tmp_path / "light.py").write_text("import sys; print([x for x in ('torch', 'transformers') if x in sys.modules])")
    assert dhsa_run("--replace-sdpa", "light.py", cwd=tmp_path).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.py"], "nothing.py: is no file, and no command of an installed package; a module is run by -m"),
        (["-m", "no.such"], "-m no.such: No module named 'no'"),
        (["-m", "nosuch"], "-m nosuch: there is no module of this name"),
        (["--exact", "--budget", "9", "a.py"], "--exact: leaves no key out, so there is no --budget"),
        (["--config", "missing.json", "a.py"], "--config: [Errno 2] No such file or directory: 'missing.json'"),
        (["--config", "bad.json", "a.py"], "--config: bad.json: no JSON: Expecting value"),
        (["--config", "unknown.json", "a.py"], "--config: unknown.json: Config has no field 'bugdet'"),
        (["--config", "list.json", "a.py"], "--config: list.json: expected an object of JSON, got list"),
        (["--config", "forced.json", "--budget", "9", "a.py"], "--budget: budget: sink + local = 5 + 5 exceed"),
        (["--config", "share.json", "a.py"], "--config: share='selections' needs hooks on the model, which only dhsa."),
        (["--config", "decode.json", "a.py"], "--config: decode='dhsa' needs hooks on the model"),
        (["--config", "predictor.json", "a.py"], "--config: boundaries='predictor' needs networks that belong to the"),
        (["--config", "layers.json", "a.py"], "--config: decode='dhsa' needs hooks on the model"),
        (["--config", "layers.json", "--budget", "9", "a.py"], "--budget: the file of --config has a budget for each"),
        (["--budget", "0", "a.py"], "argument --budget: 0 is less than 1"),
        (["--budget", "many", "a.py"], "argument --budget: invalid int value: 'many'"),
        ([], "name a program to run"),
        (["-m"], "name a program to run"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    (tmp_path / "a.py").write_text("print('ran')")
    files = {
        "bad": "budget",
        "unknown": '{"bugdet": 9}',
        "list": "[]",
        "forced": '{"sink": 5, "local": 5}',
        "share": '{"share": "selections"}',
        "decode": '{"decode": "dhsa"}',
        "predictor": '{"method": "dhsa", "boundaries": "predictor"}',
    }
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    layers = {1: dhsa.Config(decode="dhsa")}
    dhsa.LayerConfigs(default=dhsa.Config(), layers=layers).save(tmp_path / "layers.json")
    got = dhsa_run(*arguments, cwd=tmp_path)
    assert got.returncode == 2
    assert message in got.stderr
    assert "Traceback" not in got.stderr
    assert got.stdout == ""


# ---- models ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

torch.manual_seed(0)
config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
ids = torch.arange(900)[None] % 97
with torch.no_grad():
    found = {}
    for name in ("dhsa", "sdpa"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name).eval()
        found[name] = model.config._attn_implementation
        model(ids)
        if name == "dhsa":
            import dhsa.hf
            run = dhsa.last_run(model)
            found["paths"] = [layer.path for layer in run]
            found["density"] = run[0].density
            found["patched"] = dhsa.patch(model) and model.__dict__["_dhsa_state"].config.to_dict()
print(found)
"""


def test_the_default_configuration(tmp_path):
    pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    (tmp_path / "program.py").write_text(PROGRAM)

    def found(*options):
        done = dhsa_run(*options, "program.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return eval(done.stdout), done.stderr

    plain, said = found()
    assert (plain["dhsa"], plain["sdpa"]) == ("dhsa", "sdpa")
    assert (plain["paths"], plain["patched"]) == (["dense"] * 2, dhsa.Config().to_dict())
    assert "scaled_dot_product_attention" not in said
    config = dhsa.Config(budget=128, method="block", key_block=32, break_even=0)
    (tmp_path / "block.json").write_text(json.dumps(config.to_dict()))
    sparse, _ = found("--config", "block.json")
    assert sparse["paths"] == ["sparse"] * 2
    assert sparse["density"] < 0.5
    assert sparse["patched"] == config.to_dict()
    more, _ = found("--config", "block.json", "--budget", "512")
    assert sparse["density"] < more["density"] < 1
    exact, said = found("--exact", "--replace-sdpa")
    assert (exact["paths"], exact["patched"]) == (["dense"] * 2, dhsa.Config(budget=None).to_dict())
    mass = dhsa.Config(mass=0.9, floor=600, skip=1e-4, method="block", break_even=0)
    (tmp_path / "mass.json").write_text(json.dumps(mass.to_dict()))
    both, _ = found("--exact", "--config", "mass.json")
    assert both["paths"] == ["dense"] * 2
    assert both["patched"] == dhsa.Config(budget=None, skip=1e-4, method="block", break_even=0).to_dict()
    assert said.endswith("dhsa run: scaled_dot_product_attention: 2 calls served, 0 passed on to torch\n")


def test_replaced_in_a_program_that_imports_nothing_of_ours(tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    (tmp_path / "program.py").write_text(
        "import torch\n"
        "q = torch.randn(1, 2, 200, 16)\n"
        "torch.nn.functional.scaled_dot_product_attention(q, q, q)\n"
        "torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)\n"
    )
    done = dhsa_run("--replace-sdpa", "program.py", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.endswith(
        "1 calls served, 1 passed on to torch:\n  1  dropout_p: is not 0, and there is no dropout\n"
    )


def test_releases_that_are_not_supported_stay_usable(tmp_path):
    """Packages of these names without what is expected of them: their import goes on, and a line says what is amiss."""
    for package in ("torch", "transformers", "transformers/cli", "transformers/cli/serving"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("value = 7\n")
    for module in ("modeling_utils", "cli/serving/model_manager"):
        (tmp_path / "transformers" / f"{module}.py").write_text("value = 7\n")
    (tmp_path / "program.py").write_text(
        "import torch, transformers.modeling_utils, transformers.cli.serving.model_manager as manager\n"
        "print(torch.value, transformers.modeling_utils.value, manager.value)\n"
    )
    got = dhsa_run("--replace-sdpa", "program.py", cwd=tmp_path)
    assert (got.returncode, got.stdout) == (0, "7 7 7\n"), got.stderr
    sdpa, implementation = got.stderr.splitlines()
    assert sdpa.startswith("dhsa run: scaled_dot_product_attention is not replaced: ")
    assert implementation.startswith("dhsa run: attention implementation 'dhsa' is not available: ")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a Llama of random weights and a tokenizer of words."""
    transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(90))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


SPARSE = dhsa.Config(budget=64, query_block=16, sink=4, local=16, dense_tail=0, break_even=0)


def test_lm_eval(tmp_path, tiny_model):
    """A local task, by attention that lm_eval has never heard of."""
    pytest.importorskip("lm_eval", reason="needs lm_eval")
    texts = [" ".join(f"w{(i * i + j) % 90}" for i in range(600)) for j in range(3)]
    (tmp_path / "texts.json").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "words.yaml").write_text(
        textwrap.dedent(f"""
            task: words_of_mine
            dataset_path: json
            dataset_kwargs: {{data_files: {{test: {tmp_path / "texts.json"}}}}}
            test_split: test
            output_type: loglikelihood_rolling
            doc_to_text: ""
            doc_to_target: "{{{{text}}}}"
            metric_list:
              - metric: word_perplexity
        """)
    )
    (tmp_path / "sparse.json").write_text(json.dumps(SPARSE.to_dict()))

    def perplexity(runner, attention, *options):
        name = "-".join((attention, *options)).replace(".", "_")
        arguments = ["-m", "lm_eval", "--model", "hf", "--tasks", "words_of_mine", "--include_path", tmp_path]
        arguments += ["--model_args", f"pretrained={tiny_model},attn_implementation={attention},dtype=float32"]
        arguments += ["--device", "cpu", "--batch_size", "1", "--output_path", tmp_path / name]
        done = runner(*options, *arguments, cwd=tmp_path)
        if done.returncode != 0:
            return done.stderr
        (written,) = (tmp_path / name).rglob("results*.json")
        return json.loads(written.read_text())["results"]["words_of_mine"]["word_perplexity,none"]

    eager = perplexity(python, "eager")
    assert isinstance(eager, float), eager
    assert '"dhsa"' in perplexity(python, "dhsa")  # is not known without us
    assert perplexity(dhsa_run, "dhsa", "--exact") == pytest.approx(eager, rel=1e-4)
    sparse = perplexity(dhsa_run, "dhsa", "--config", "sparse.json")
    assert sparse != pytest.approx(eager, rel=1e-4)
    assert sparse == pytest.approx(eager, rel=0.5)


def test_transformers_serve(tmp_path, tiny_model):
    """`transformers serve --attn-implementation dhsa` answers the client of openai on this machine."""
    for needed in ("fastapi", "uvicorn", "typer"):
        pytest.importorskip(needed, reason=f"needs {needed}")
    openai = pytest.importorskip("openai", reason="needs openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dhsa", "run", "--exact", "transformers", "serve", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--attn-implementation", "dhsa", "--dtype", "float32", "--device", "cpu"]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=out, stderr=out)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        text = " ".join(f"w{i * i % 90}" for i in range(300))
        answer = client.chat.completions.create(
            model=str(tiny_model),
            messages=[{"role": "user", "content": text}],
            max_tokens=5,
            temperature=0.0,
            stream=False,
        )
        said = answer.choices[0].message.content
        streamed = client.chat.completions.create(
            model=str(tiny_model),
            messages=[{"role": "user", "content": text}],
            max_tokens=5,
            temperature=0.0,
            stream=True,
        )
        pieces = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager").eval()
    ids = tokenizer(text + " ", return_tensors="pt").input_ids
    want = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :])
    assert said.split() == pieces.split() == want.split() != [], log.read_text()
