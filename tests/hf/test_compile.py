"""Compiled and exported models: the same bits as the model run as it is, in one graph, and what that graph asks for
when it runs. Whole models are traced here, which takes seconds each, so they are two layers deep and few."""

import copy
import gc
import io
import shutil

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, FAMILIES, SPARSE, WINDOW, Layer, build, padded, qkv, tokens  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import masking_utils  # noqa: E402

import dhsa  # noqa: E402
import dhsa.hf  # noqa: E402
from dhsa.hf import handles, tracing  # noqa: E402
from dhsa.hf.compat import GRAPHS, cache_option, packed_mask_function  # noqa: E402
from dhsa.hf.masks import MAX_INTERVALS, key_range_mask, ranges_of  # noqa: E402

pytestmark = pytest.mark.skipif(not GRAPHS, reason="graphs hold dhsa's operators from torch 2.13 on")
LENGTHS = [300, 171, 70]
SLIDES = [family for family in FAMILIES if family != "llama"]


@pytest.fixture(autouse=True)
def _no_grad():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


def small(family, **changes):
    """A sliding layer and a full one where the family has both."""
    if family in SLIDES:
        changes["layer_types"] = ["sliding_attention", "full_attention"]
    return build(family, num_hidden_layers=2, **changes)


def compiled(model, backend="eager"):
    return torch.compile(model, fullgraph=True, dynamic=True, backend=backend)


def graphs():
    return counters["stats"]["unique_graphs"]


def noted(model):
    return [run._replace(select_seconds=0, attend_seconds=0) for run in dhsa.last_run(model)]


def forget(model):
    for module in model.modules():
        module.__dict__.pop("_dhsa_runs", None)


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "masked", "cached", "backend"),
    [
        ("gemma2", True, True, "eager"),
        ("gemma3", False, False, "eager"),  # without cache and mask, transformers suspects packed sequences
        ("llama", False, True, "eager"),
        ("qwen3", True, False, "aot_eager"),
    ],
)
def test_one_graph_serves_every_length_padding_and_config(family, masked, cached, backend):
    model = small(family)
    graph = compiled(model, backend)
    calls = [{"input_ids": tokens(2, n)} for n in (300, 171)]
    if masked:
        calls += [
            dict(zip(("input_ids", "attention_mask"), padded(LENGTHS, 300, s), strict=True)) for s in ("left", "right")
        ]
        calls[0]["attention_mask"] = torch.ones(2, 300, dtype=torch.long)
        calls[1]["attention_mask"] = torch.ones(2, 171, dtype=torch.long)
        calls[3]["attention_mask"][2, 20:30] = 0  # a gap: queries of two intervals
    paths = set()
    for call in calls:
        reference = model(**call, use_cache=cached).logits
        for config in (EXACT, SPARSE):
            with dhsa.patched(model, config):
                expected = model(**call, use_cache=cached).logits
                runs = noted(model)
                forget(model)
                got = graph(**call, use_cache=cached).logits
                assert torch.equal(got, expected)
                assert noted(model) == runs
            paths |= {(config.budget, run.path) for run in runs}
            if config is EXACT:
                real = call.get("attention_mask", torch.ones_like(call["input_ids"])).bool()
                torch.testing.assert_close(got[real], reference[real], rtol=0, atol=2e-5)
    assert (SPARSE.budget, "sparse") in paths
    assert graphs() == 1
    if family == "llama":  # unpatched, also when compiled
        forget(model)
        assert torch.equal(graph(**call, use_cache=cached).logits, reference)
        assert dhsa.last_run(model) == []


def test_decoding_with_a_static_cache():
    """`generate` compiles decode steps itself, and calls of the model may be compiled with such a cache as well."""
    model = dhsa.patch(small("llama"), SPARSE)
    ids, mask = padded([150, 90], 150, "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids, **options)
    compiling = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    compiling._compile_all_devices = True  # on the CPU transformers does so only when told
    got = model.generate(ids, **options, cache_implementation="static", compile_config=compiling)
    assert torch.equal(got, expected)
    assert graphs() > 0

    model, logits = dhsa.patch(small("gemma3"), SPARSE), []
    for run in (model, compiled(model)):
        cache = transformers.StaticCache(model.config, max_cache_len=160)
        cache.early_initialization(2, model.config.num_key_value_heads, model.config.head_dim, torch.float32, "cpu")
        logits.append([run(ids, attention_mask=mask, **cache_option(model, cache)).logits])
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits[-1].append(run(tokens(2, 1), attention_mask=longer, **cache_option(model, cache)).logits)
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_layers_compiled_one_by_one_share_a_graph():
    """One graph for several layers must find each one's own config and records."""
    model = dhsa.patch(build("llama"), SPARSE, layers=[1, 3])
    ids = tokens(1, 200)
    expected = model(ids, use_cache=False).logits
    runs = noted(model)
    forget(model)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="eager")
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert noted(model) == runs
    assert [run.path for run in runs] == ["dense", "sparse"] * 2
    assert graphs() == 1


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_stands_alone(strict):
    model = dhsa.patch(small("gemma3"), SPARSE, layers=[1])
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("length", min=2, max=2048)}
    program = torch.export.export(
        Logits(model), padded([300, 171], 300, "left"), strict=strict, dynamic_shapes=(sizes, sizes)
    )
    calls = [padded(LENGTHS, 300, "right"), padded([40, 9], 40, "left")]
    expected = [Logits(model)(*call) for call in calls]
    dhsa.unpatch(model)
    forget(model)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    program = torch.export.load(file).module()
    for call, want in zip(calls, expected, strict=True):
        assert torch.equal(program(*call), want)
    assert dhsa.last_run(model) == []


# ---- the attention operator ------------------------------------------------------------------------------------------


class Attend(torch.nn.Module):
    """The smallest module with attention in it: its queries, keys and values are views, as models make them."""

    def __init__(self, length=200):
        super().__init__()
        self.attention = Layer()
        x = torch.randn(1, length, 8, 16, generator=torch.Generator().manual_seed(1))
        self.x = torch.nn.Buffer(x)

    def forward(self, mask=None, **kwargs):
        q, k, v = (self.x * 1.5).split([4, 2, 2], dim=2)
        out, _ = dhsa.hf.attention_forward(
            self.attention, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, **kwargs
        )
        return out + 1

    def configure(self, config):
        self.attention.__dict__[dhsa.hf.switching.STATE] = dhsa.hf.switching.State(config, None, ())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor():
    model = Attend()
    model.configure(SPARSE)
    expected = model(softcap=3.0, scaling=0.3)
    assert torch.equal(torch.compile(model, fullgraph=True)(softcap=3.0, scaling=0.3), expected)
    assert dhsa.last_run(model)[0].path == "sparse"


def test_a_copied_module_gets_records_of_its_own():
    for patched in (False, True):
        model = Attend()
        if patched:
            handles.note(model.attention)
        expected = model()
        for _ in range(2):
            assert torch.equal(compiled(model)(), expected)
        twin = copy.deepcopy(model)
        twin.configure(SPARSE)
        forget(model)
        for _ in range(2):
            assert not torch.equal(compiled(twin)(), expected)
        assert [run.path for run in dhsa.last_run(twin)] == ["sparse"]
        assert dhsa.last_run(model) == []
        assert graphs() == 2
        counters.clear()
        torch._dynamo.reset()


def test_a_module_that_is_gone_is_an_error():
    model, (q, k, v) = Attend(), qkv()
    compiled(model)()
    handle = torch.tensor(handles.number_of(model.attention))
    arguments = (q, k, v, None, handle, None, None, None, None, None)
    torch.ops.dhsa.attention(*arguments)
    del model
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists; compile the model again"):
        torch.ops.dhsa.attention(*arguments)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"dropout": 0.1}, "no attention dropout"),
        ({"s_aux": torch.zeros(1, 4, 1, 1)}, "one logit for each query head"),
        ({"position_bias": torch.zeros(1, 4, 200, 200)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions=True"),
    ],
)
def test_what_is_refused_is_refused_in_a_graph(kwargs, match):
    with pytest.raises(torch._dynamo.exc.Unsupported, match=match):
        compiled(Attend())(**kwargs)
    with pytest.raises(NotImplementedError, match=match):  # a graph that may break comes to the ordinary function
        torch.compile(Attend(), backend="eager")(**kwargs)
    with pytest.raises(NotImplementedError, match=match):
        torch.export.export(Attend(), (), kwargs, strict=False)


def test_gradients_are_refused_in_a_graph():
    model = Attend()
    model.x = torch.nn.Parameter(model.x)
    program = torch.export.export(model, (), strict=False).module()
    with torch.enable_grad():
        with pytest.raises(torch._dynamo.exc.Unsupported, match="no backward pass"):
            compiled(model)()
        with pytest.raises(NotImplementedError, match="no backward pass"):
            program().sum().backward()


def test_a_predictor_cannot_be_exported():
    model = Attend()
    model.configure(dhsa.Config(boundaries="predictor"))
    with pytest.raises(NotImplementedError, match=r"torch\.export: .*predictor"):
        torch.export.export(model, (), strict=False)


def test_every_field_of_a_config_survives_export():
    for config in (dhsa.Config(), dhsa.Config.paper(theta=-torch.inf), SPARSE.replace(method="dhsa"), EXACT):
        layer = Layer(3, is_causal=False)
        layer.__dict__[dhsa.hf.switching.STATE] = dhsa.hf.switching.State(config, None, ())
        thawed = tracing.thawed(tracing._frozen(layer, None))
        assert (thawed.layer_idx, thawed.is_causal) == (3, False)
        assert thawed.__dict__[dhsa.hf.switching.STATE].config_for(3) == config
        assert tracing.thawed(tracing._frozen(layer, True)).is_causal


def test_only_what_is_traced_goes_through_operators(monkeypatch):
    model, expected = Attend(), Attend()()
    with FlopCounterMode(display=False):  # any dispatch mode: it sees operators only
        assert torch.equal(model(), expected)
    assert [run.path for run in dhsa.last_run(model)] == ["dense"]
    with FakeTensorMode() as fake:
        q, k, v = (fake.from_tensor(t) for t in qkv(q_len=9, k_len=20))
        out, _ = dhsa.hf.attention_forward(Layer(), q, k, v, None)
        assert (tuple(out.shape), out.is_contiguous()) == ((1, 9, 4, 16), True)
    monkeypatch.setattr(dhsa.hf.attention, "traced_attention", None)
    monkeypatch.setattr(dhsa.hf.masks, "traced_ranges", None)
    assert torch.equal(model(), expected)
    key_range_mask(2, 30, 30, attention_mask=torch.arange(30)[None].repeat(2, 1) > 3)


def test_operators_keep_the_rules_of_torch_library():
    layer = Layer()
    frozen = tracing._frozen(layer, None)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = qkv(batch=2, q_len=70, dtype=dtype)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        mask = torch.arange(70)[None].repeat(2, 1) > 3
        for rest in ((None, None, None, None), (0.3, 16, 2.0, True)):
            torch.library.opcheck(torch.ops.dhsa.attention.default, (q, k, v, mask, None, frozen, *rest))
    handle = torch.tensor(handles.number_of(layer))
    torch.library.opcheck(torch.ops.dhsa.attention.default, (q, k, v, None, handle, None, None, None, None, False))
    offset = torch.tensor(2)
    ranges = torch.ops.dhsa.key_ranges.default
    torch.library.opcheck(ranges, (mask, offset, None, None, 2, 0, 50, 70, 0, 16))
    follows, rows = torch.ones(1, 70, dtype=torch.bool), torch.ones(70, 70, dtype=torch.bool).tril()
    torch.library.opcheck(ranges, (None, None, follows, rows[tracing.probes(70)][None], 2, 0, 70, 70, 0, None))
    torch.library.opcheck(torch.ops.dhsa.intervals.default, (rows[None, None].expand(2, -1, -1, -1),))


# ---- masks -----------------------------------------------------------------------------------------------------------


def traced(batch_size, q_length, kv_length, mask_function=masking_utils.causal_mask_function, **kwargs):
    """The mask that a graph computes, as ranges; None stays None."""
    arguments = {"q_offset": 0, "kv_offset": 0, "attention_mask": None, "local_size": None} | kwargs
    bidirectional = arguments.pop("allow_is_bidirectional_skip", None) is not None
    skip, vmap = arguments.pop("allow_is_causal_skip", True), arguments.pop("use_vmap", False)
    arguments |= {"allow_is_causal_skip": skip, "use_vmap": vmap, "bidirectional": bidirectional}
    table = tracing.traced_ranges(batch_size, q_length, kv_length, mask_function=mask_function, **arguments)
    if table is None:
        return None
    assert table.shape[1] in (1, MAX_INTERVALS)
    return ranges_of(table, batch_size, q_length, kv_length, None)


def same(shape, **kwargs):
    """Asserts that a graph's mask is the ordinary one."""
    ordinary = key_range_mask(*shape, **kwargs)
    got = traced(*shape, **kwargs)
    if ordinary is None and got is not None:  # a window that cuts nothing off: not known before the graph runs
        batch, q_length, kv_length = shape
        ordinary = torch.tensor([[[0, kv_length - q_length + i + 1] for i in range(q_length)]] * batch)[:, None].int()
    if ordinary is None:
        assert got is None
        return
    expected = ranges_of(ordinary, *shape, None)
    assert got.shape == expected.shape
    assert (got == expected).all()


@pytest.mark.parametrize("window", [None, 1, 7, WINDOW])
@pytest.mark.parametrize("padding", [None, "left", "gaps"])
def test_a_graphs_mask_is_the_ordinary_one(window, padding):
    kwargs = {}
    if window is not None:
        kwargs = {
            "mask_function": masking_utils.sliding_window_causal_mask_function(window),
            "local_size": window,
        }
    for q_length, kv_length, q_offset, kv_offset in [
        (40, 40, 0, 0),
        (40, 70, 0, 0),  # a static cache, as long as it will be
        (1, 70, torch.tensor(33), 0),
        (9, 70, torch.tensor(33), 0),
        (9, 42, 33, 0),
        (1, 34, 33, 0),
        (12, 18, 33, 27),  # the keys that a sliding cache has kept
    ]:
        mask = None
        if padding is not None:
            mask = torch.ones(3, int(q_offset) + q_length, dtype=torch.bool)
            mask[1, :5], mask[2, :29] = False, False
            if padding == "gaps":
                mask[1, 7:9], mask[1, 31:33] = False, False
        kwargs |= {"q_offset": q_offset, "kv_offset": kv_offset, "attention_mask": mask}
        same((3, q_length, kv_length), **kwargs)
        if padding != "gaps" or q_length == 1:  # evaluated as a pattern of any kind, a query that is padding sees keys
            same((3, q_length, kv_length), **kwargs, allow_is_causal_skip=False)


def test_graphs_of_other_patterns():
    left = torch.tensor([0, 3])
    chunked = masking_utils.chunked_causal_mask_function(16, left)
    same((2, 50, 50), mask_function=chunked, local_size=16)
    same((2, 9, 24), mask_function=chunked, local_size=16, q_offset=40, kv_offset=25)
    positions = torch.cat([torch.arange(9), torch.arange(30), torch.arange(11)]).expand(2, -1).clone()
    positions[1] = torch.arange(50)
    packed = packed_mask_function
    numbers = (positions.diff(prepend=positions[:, :1] - 1) != 1).cumsum(-1)
    for inner, window in [
        (masking_utils.causal_mask_function, None),
        (masking_utils.sliding_window_causal_mask_function(7), 7),
    ]:
        pattern = packed(inner, positions, numbers)
        same((2, 50, 50), mask_function=pattern, local_size=window, allow_is_causal_skip=False)
    groups = torch.full((2, 50), -1)
    groups[0, 10:18], groups[1, 5:9], groups[1, 30:41] = 0, 0, 1
    pictures = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(groups))
    same((2, 50, 50), mask_function=pictures, allow_is_causal_skip=False)
    same(
        (2, 50, 50),
        mask_function=masking_utils.and_masks(pictures, lambda b, h, q, k: k != 3),
        allow_is_causal_skip=False,
        use_vmap=True,
    )
    same((2, 50, 50), mask_function=masking_utils.bidirectional_mask_function, allow_is_causal_skip=False)
    same(
        (2, 50, 50),
        mask_function=masking_utils.sliding_window_bidirectional_mask_function(7),
        local_size=7,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
    )


def test_a_pattern_that_is_not_what_it_seems_is_refused():
    strided = masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0)
    with pytest.raises(NotImplementedError, match="cannot compile this pattern"):
        traced(1, 20, 20, strided)
