"""Models whose weights are divided among ranks: by heads (tensor parallel), where each rank selects for its own heads,
by layers (pipeline parallel), and by heads while another group divides the prompt (context parallel)."""

from inspect import signature

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")
pytest.importorskip("transformers.distributed", reason="needs a release with DistributedConfig")

import ranks  # noqa: E402
import tiny  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf import attention  # noqa: E402

SPARSE = tiny.SPARSE.replace(break_even=0)


def sparse_of(model, config=SPARSE):
    """Logits, and the lists of each layer as [head][block]."""
    seen, run = [], attention.functional.run

    def noted(q, k, v, config=None, **options):
        names = ("window", "scale", "softcap")
        made = dhsa.select(q, k, config, **{name: options.get(name) for name in names})
        _, sets, nq = made.shape
        ends = made.indptr.tolist()
        seen.append([[made.indices[ends[s * nq + i] : ends[s * nq + i + 1]].tolist() for i in range(nq)]
                     for s in range(sets)])  # fmt: skip
        return run(q, k, v, config, **options)

    attention.functional.run = noted
    try:
        with torch.no_grad(), dhsa.patched(model, config):
            return model(tiny.tokens(1, 300), use_cache=False).logits, seen
    finally:
        attention.functional.run = run


def load(path, **sizes):
    from transformers import AutoModelForCausalLM

    if "tp_size" in signature(DistributedConfig).parameters:
        options = {"distributed_config": DistributedConfig(**sizes)}
    else:  # transformers 5.5
        options = {"tp_plan": "auto"}
    return AutoModelForCausalLM.from_pretrained(path, **options)


def tensor_parallel(rank, size, path):
    return sparse_of(load(path, tp_size=size))


def test_lists_of_tensor_parallel_ranks_are_those_of_one_process(tmp_path):
    model = tiny.build("llama")
    model.save_pretrained(tmp_path / "model")
    found = ranks.run(2, tensor_parallel, tmp_path, str(tmp_path / "model"))
    expected, lists = sparse_of(model)
    assert [type(outcome) for outcome in found] == [tuple, tuple], found
    for logits, _ in found:
        torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
    assert [a + b for a, b in zip(found[0][1], found[1][1], strict=True)] == lists
    assert all(heads[0] != heads[2] for heads in lists)


@pytest.mark.parametrize("name", ["heads", "boundaries"])
def test_lists_that_need_all_heads_are_refused(name, tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "model")
    changed = {"heads": {"heads": "all"}, "boundaries": {"boundaries": "similarity"}}[name]
    for said in ranks.run(2, refused, tmp_path, str(tmp_path / "model"), SPARSE.replace(**changed)):
        assert said.startswith(f"NotImplementedError: {name}: each rank of a tensor-parallel model has some heads"), (
            said
        )


def refused(rank, size, path, config):
    model = load(path, tp_size=size)
    dhsa.patch(model, config.replace(budget=None))  # exact: nothing is selected
    dhsa.patch(model, config)


# ---- layers on several ranks -----------------------------------------------------------------------------------------

STAGES = "pp_size" in signature(DistributedConfig).parameters
by_layers = pytest.mark.skipif(not STAGES, reason="needs a release with pipeline parallel")


def pipeline(rank, size, path):
    model = load(path, pp_size=size)
    found = sparse_of(model)
    try:
        dhsa.patch(model, tiny.EXACT, group=torch.distributed.group.WORLD)
    except NotImplementedError as error:
        message = str(error)
    with torch.no_grad(), dhsa.patched(model, tiny.EXACT):
        tokens = model.generate(tiny.tokens(1, 100), max_new_tokens=8, do_sample=False, pad_token_id=0)
    return *found, tokens, message


@by_layers
def test_the_stages_of_a_pipeline_do_what_one_process_does(tmp_path):
    model = tiny.build("gemma2")
    model.save_pretrained(tmp_path / "model")
    found = ranks.run(2, pipeline, tmp_path, str(tmp_path / "model"))
    expected, lists = sparse_of(model)
    with torch.no_grad(), dhsa.patched(model, tiny.EXACT):
        tokens = model.generate(tiny.tokens(1, 100), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert [type(outcome) for outcome in found] == [tuple, tuple], found
    for logits, _, generated, message in found:
        torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
        assert torch.equal(generated, tokens)
        assert message.startswith("group: the stages of a pipeline")
    assert [layer for one in found for layer in one[1]] == lists


# ---- heads on some ranks, tokens on others ---------------------------------------------------------------------------


def mesh_of_two(rank, size, config):
    """Logits of a model whose heads are divided by one dimension of a mesh, and its prompt by the other."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    model = tiny.build("llama")
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    for layer in model.model.layers:
        plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
        plan |= {
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
        parallelize_module(layer, mesh["tp"], plan)
    ids = tiny.tokens(1, 300)
    with dhsa.patched(model, config, group=mesh["cp"], timeout=60):
        logits = model(ids, use_cache=False).logits
        run = dhsa.last_run(model)[0]
        tokens = model.generate(ids[:, :150], max_new_tokens=6, do_sample=False, pad_token_id=0)
    return logits, tokens, run


@pytest.mark.parametrize("config", [tiny.EXACT, SPARSE], ids=["exact", "sparse"])
def test_context_and_tensor_parallel_on_a_mesh(config, tmp_path):
    found = ranks.run(4, mesh_of_two, tmp_path, config)
    model = tiny.build("llama")
    with torch.no_grad(), dhsa.patched(model, config):
        logits = model(tiny.tokens(1, 300), use_cache=False).logits
        tokens = model.generate(tiny.tokens(1, 300)[:, :150], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert [type(outcome) for outcome in found] == [tuple] * 4, found
    for of_rank, generated, run in found:
        torch.testing.assert_close(of_rank, logits, rtol=2e-5, atol=2e-5)
        assert torch.equal(generated, tokens)
        assert run.query_shape[1] == 2  # of four heads
        assert 140 <= run.query_shape[2] <= 160  # of 300 tokens
