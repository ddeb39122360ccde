"""`attn_implementation="dhsa"` after a bare `import dhsa`, whichever of dhsa and transformers is imported first; in
processes of their own, since an import happens once."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

BUILD = """
from transformers import AutoModelForCausalLM, LlamaConfig
sizes = dict(vocab_size=19, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation="dhsa").eval()
import torch
assert torch.equal(model.generate(torch.ones(1, 9, dtype=torch.long), max_new_tokens=2, do_sample=False)[:, :9],
                   torch.ones(1, 9, dtype=torch.long))
import dhsa
assert len(dhsa.last_run(model)) == 1
assert not any("dhsa" in type(finder).__module__ for finder in sys.meta_path), "the finder stays behind"
"""


def run(code):
    code = "import sys\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_dhsa_first():
    run(
        """
        import dhsa
        assert not any(name.split(".")[0] in ("torch", "transformers") for name in sys.modules)
        import transformers
        assert "dhsa.hf" not in sys.modules  # so far only its front, which needs no torch
        """
        + textwrap.indent(BUILD, " " * 8)
        + """
        import transformers.modeling_utils as awaited
        from importlib.machinery import SourceFileLoader
        assert type(awaited.__loader__) is SourceFileLoader and "exec_module" not in vars(awaited.__loader__)
        assert "class PreTrainedModel" in awaited.__loader__.get_source(awaited.__name__)
        """
    )


def test_transformers_first():
    run("import transformers.modeling_utils, dhsa\nassert 'dhsa.hf' in sys.modules\n" + BUILD)


def test_another_order_of_the_parts():
    run("import dhsa.hf\n" + BUILD)
    run("import dhsa\nfrom transformers.models.llama.modeling_llama import LlamaModel\nimport dhsa.hf\n" + BUILD)


def test_imported_anew():
    """Reloaded, and forgotten and imported again: one finder, not one for each."""
    run(
        """
        import importlib, dhsa
        importlib.reload(dhsa)
        awaiting = [finder for finder in sys.meta_path if "dhsa" in type(finder).__module__]
        assert len(awaiting) == 1
        """
        + textwrap.indent(BUILD, " " * 8)
    )


def test_finders_that_ask_the_others_too():
    run(
        """
        class Asking:
            def find_spec(self, name, path=None, target=None):
                if name != "transformers.modeling_utils" or getattr(self, "busy", False):
                    return None
                self.busy = True
                try:
                    found = [f.find_spec(name, path, target) for f in sys.meta_path if f is not self]
                    return next(spec for spec in found if spec is not None)
                finally:
                    self.busy = False
        sys.meta_path.insert(0, Asking())
        import dhsa
        sys.meta_path.insert(0, Asking())
        """
        + textwrap.indent(BUILD, " " * 8)
    )


def test_a_loader_that_cannot_be_followed(tmp_path):
    """It takes no attributes. It loads as ever, and a warning says what is amiss."""
    (tmp_path / "awaited.py").write_text("value = 7\n")
    run(
        f"""
        import warnings
        from importlib.machinery import PathFinder
        from dhsa._register import when_imported
        class Slots:
            __slots__ = ("loader",)
            def create_module(self, spec):
                return self.loader.create_module(spec)
            def exec_module(self, module):
                self.loader.exec_module(module)
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "awaited":
                    found = PathFinder.find_spec(name, path, target)
                    slots = Slots()
                    slots.loader, found.loader = found.loader, slots
                    return found
        sys.path.insert(0, {str(tmp_path)!r})
        sys.meta_path.insert(0, Finder())
        called = []
        when_imported("awaited", called.append, "nothing is appended")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import awaited
        assert awaited.value == 7 and not called
        told = [str(w.message) for w in caught if w.category is RuntimeWarning]
        assert told == ["dhsa: the Slots that loads awaited cannot be followed, so nothing is appended"], told
        """
    )


def test_threads():
    run(
        """
        import threading, importlib, dhsa
        names = ["transformers.modeling_utils"] * 4  # others import each other in circles, which threads cannot share
        start, failed = threading.Barrier(4), []
        def work(name):
            start.wait()
            try:
                importlib.import_module(name)
            except BaseException as error:
                failed.append(error)
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        [thread.start() for thread in threads]
        [thread.join(120) for thread in threads]
        assert not failed and not any(thread.is_alive() for thread in threads), failed
        """
        + textwrap.indent(BUILD, " " * 8)
    )


@pytest.mark.parametrize("blocked", ["transformers", "transformers.modeling_utils", "torch"])
def test_what_cannot_be_imported_stays_an_ordinary_error(blocked):
    run(
        f"""
        sys.modules[{blocked!r}] = None
        import dhsa
        assert dhsa.Config(budget=64).budget == 64
        try:
            import transformers.modeling_utils
        except ImportError:
            pass
        else:
            raise AssertionError("imported")
        """
    )


def test_a_failed_import_of_models_can_be_tried_again():
    run(
        """
        import dhsa, builtins
        real = builtins.__import__
        def failing(name, *args, **kwargs):
            if name == "torch" or name.startswith("torch."):
                raise ImportError("not yet")
            return real(name, *args, **kwargs)
        builtins.__import__ = failing
        try:
            import transformers.modeling_utils
        except ImportError:
            pass
        else:
            raise AssertionError("imported")
        finally:
            builtins.__import__ = real
        assert "dhsa.hf" not in sys.modules
        for name in [n for n in sys.modules if n.split(".")[0] == "transformers"]:
            del sys.modules[name]  # it keeps that there was no torch
        """
        + textwrap.indent(BUILD, " " * 8)
    )


def test_a_transformers_that_does_not_fit_is_left_alone(tmp_path):
    """Of another version: its import goes on; an import of `dhsa.hf` says what is missing."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (tmp_path / "transformers" / "modeling_utils.py").write_text("value = 7\n")
    run(
        f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import dhsa
        import transformers.modeling_utils
        assert transformers.modeling_utils.value == 7
        try:
            import dhsa.hf
        except ImportError as error:
            assert "AttentionInterface" in str(error) and "dhsa[hf]" in str(error)
        else:
            raise AssertionError("imported")
        """
    )


def test_an_error_while_transformers_is_imported(tmp_path):
    """Such as of a user's own profile.py, which torch takes for the standard library's: the one line of this package in
    the traceback says that the error is not its own."""
    (tmp_path / "profile.py").write_text("raise RuntimeError('a profile of my own')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import dhsa; import transformers.modeling_utils"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stderr.rstrip().endswith("RuntimeError: a profile of my own")
    assert done.stderr.count("_register.py") == done.stderr.count("an error below is not of dhsa") <= 1
