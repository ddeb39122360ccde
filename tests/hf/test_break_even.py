"""`Config.break_even`: calls of a patched model that would not pay run exact, and say so; no others do."""

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SPARSE, build, padded, qkv, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa import _core, functional  # noqa: E402
from dhsa.doctor.reasons import reason as in_words  # noqa: E402
from dhsa.evaluation import settings  # noqa: E402
from dhsa.hf import break_even  # noqa: E402
from dhsa.hf.compat import cache_option  # noqa: E402

DTYPES = ["float32", "bfloat16", "float16"]
SHAPES = [(4, 1, 256), (8, 4, 256), (32, 8, 128), (9, 3, 64)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def shaped(shape, q_len, k_len=None, dtype="float32", batch=1):
    """q and k of any size, without the memory."""
    heads, kv_heads, dim = shape
    one = torch.zeros(1, dtype=getattr(torch, dtype))
    return one.expand(batch, heads, q_len, dim), one.expand(batch, kv_heads, k_len or q_len, dim)


def exact_again(config, *args, window=None):
    return bool(break_even.reason(config, *args, window))


# ---- a length that was given -----------------------------------------------------------------------------------------


def test_below_the_given_length_calls_run_exact():
    model, ids = build("gemma2"), tokens(1, 400)
    with dhsa.patched(model, EXACT):
        exact = model(ids).logits
    with dhsa.patched(model, SPARSE.replace(break_even=401)):
        assert torch.equal(model(ids).logits, exact)
        runs = dhsa.last_run(model)
    assert [r.path for r in runs] == ["window", "dense"] * 2
    why = "break-even: 400 keys are fewer than the 401 of break_even"
    assert [r.reason for r in runs] == ["", why] * 2  # windows within the budget are exact in any case
    assert [(r.density, r.select_seconds) for r in runs] == [(1.0, 0.0)] * 4
    for enough in (400, 1, 0):
        with dhsa.patched(model, SPARSE.replace(break_even=enough)):
            assert not torch.equal(model(ids).logits, exact)
            assert [(r.path, r.reason) for r in dhsa.last_run(model)] == [("window", ""), ("sparse", "")] * 2


def test_exact_configs_and_short_prompts_have_no_reason():
    model = build("llama")
    for config, length in ((EXACT.replace(break_even=1000), 400), (SPARSE.replace(break_even=1000), 60)):
        with dhsa.patched(model, config):
            model(tokens(1, length))
            assert [(r.path, r.reason) for r in dhsa.last_run(model)] == [("dense", "")] * 4


def test_each_row_of_a_batch_and_each_piece_of_a_prompt_decides_for_itself():
    model = build("llama")
    ids, mask = padded([400, 200], 400, "left")
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with dhsa.patched(model, SPARSE.replace(break_even=300)):
        together = model(ids, attention_mask=mask, position_ids=position_ids).logits
        runs = dhsa.last_run(model)
        assert [r.path for r in runs] == ["sparse"] * 4
        assert {r.reason for r in runs} == {"break-even: 200 keys are fewer than the 300 of break_even"}
        alone = model(tokens(1, 200, seed=1)).logits
        assert {r.path for r in dhsa.last_run(model)} == {"dense"}
        torch.testing.assert_close(together[1, 200:], alone[0], rtol=0, atol=1e-5)
        cache = transformers.DynamicCache(config=model.config)
        said = []
        for piece in tokens(1, 400).split(200, dim=1):
            model(piece, **cache_option(model, cache))
            said.append({(r.path, bool(r.reason)) for r in dhsa.last_run(model)})
    assert said == [{("dense", True)}, {("sparse", False)}]


def test_the_config_of_exact_calls_keeps_skip():
    model, ids = build("llama"), tokens(1, 600)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(20)  # random weights would attend to everything
    with dhsa.patched(model, SPARSE.replace(break_even=1000, skip=0.5)):
        model(ids)
        assert all(r.path == "dense" and r.skipped > 0 for r in dhsa.last_run(model))


def test_config():
    assert dhsa.Config().break_even is None
    assert dhsa.Config(break_even=3).replace(budget=64).break_even == 3
    with pytest.raises(TypeError, match="break_even: expected an int"):
        dhsa.Config(break_even=1.5)
    with pytest.raises(ValueError, match=r"break_even: .*-1"):
        dhsa.Config(break_even=-1)


def test_functions_do_as_they_are_told():
    q, k, v = qkv(q_len=400)
    config = SPARSE.replace(break_even=10**6)
    assert torch.equal(dhsa.attention(q, k, v, config), dhsa.attention(q, k, v, SPARSE))
    assert functional.run(q, k, v, config)[2].path == "sparse"
    assert dhsa.select(q, k, config).density() < 1


# ---- measured costs --------------------------------------------------------------------------------------------------


def test_the_rule_compares_what_calls_do(monkeypatch):
    """By hand: blocks of 64, all 1,024 queries of 2 heads in one group, a budget of 128, no tail."""
    config = dhsa.Config(budget=128, dense_tail=0)
    q, k = shaped((2, 1, 8), 1024)
    kept, visible = 128 * 129 // 2 + (1024 - 128) * 128, 1024 * 1025 // 2
    assert break_even.work(config, 1024, 1024, None) == (kept, visible, kept / 64, visible / 4, 1024)
    costs = break_even.Costs(product=1e-9, pair=2.0, gather=32.0, score=0.25, key=10.0)
    monkeypatch.setattr(break_even, "COSTS", {"float32": costs})
    sparse = 2 * kept + 32 * kept / 64 + visible / 16 + 10 * 1024 / 2
    assert break_even.seconds(config, q, k, None) == pytest.approx((visible * 16e-9, sparse * 16e-9))
    # Layers that take another's lists choose nothing.
    shared = break_even.seconds(config.replace(share="selections"), q, k, None)[1]
    assert shared == pytest.approx((2 * kept + 32 * kept / 64) * 16e-9)
    # Heads that share lists gather their keys once; fewer rows score less; a shortlist of 256 keys, and groups of 8.
    together = break_even.work(config.replace(heads="group"), 1024, 1024, None)
    assert together == break_even.work(config, 1024, 1024, None)
    grouped = break_even.seconds(config.replace(heads="group"), q, k, None)[1]
    assert grouped == pytest.approx((sparse - 32 * kept / 128) * 16e-9)
    late = (257 + 1024) * 768 // 2
    listed = (256 * 257 // 2 + 768 * 256) / 4 + late / 16
    assert break_even.work(config.replace(shortlist=256), 1024, 1024, None).scored == listed
    assert break_even.work(config.replace(shortlist=256, rows=16), 1024, 1024, None).scored == listed / 2

    assert not exact_again(config, q, k)
    monkeypatch.setattr(break_even, "COSTS", {"float32": costs._replace(pair=6.1)})
    said = break_even.reason(config, q, k, None)
    assert said.startswith("break-even: leaving all but 128 of 1,024 keys out would take about 1.62")
    assert said.endswith(" times as long")
    for other in ({"break_even": 0}, {"method": "window"}, {"method": "dhsa"}, {"mass": 0.9}, {"budget": 1024}):
        assert not exact_again(config.replace(**other), q, k)
    assert not exact_again(config, q, k, window=128)  # exact in any case
    # What would save less than a twelfth, or too little time to be sure of it, is exact: here 5 % of 8.4 ms, 0.3 ms.
    for pair, product, ratio in ((3.25, 1e-9, "0.95"), (2.0, 1e-12, "0.66")):
        monkeypatch.setattr(break_even, "COSTS", {"float32": costs._replace(pair=pair, product=product)})
        said = break_even.reason(config, q, k, None)
        assert said.endswith(f" would take about {ratio} times as long, which saves too little")


@pytest.mark.parametrize(
    ("q_len", "k_len", "window"),
    [(1000, 1000, None), (300, 1000, None), (1000, 1000, 400), (300, 1000, 400), (1000, 1000, 2000)],
)
@pytest.mark.parametrize("tail", [0, 1, 64, 200])
def test_work_is_what_calls_report(q_len, k_len, window, tail):
    config = dhsa.Config(budget=192, dense_tail=tail, query_block=16, sink=4, local=32)
    q, k, v = qkv(q_len=q_len, k_len=k_len)
    work = break_even.work(config, q_len, k_len, window)
    density = functional.run(q, k, v, config, window=window)[2].density
    # A block's own keys are on its list and seen by some of its queries only.
    assert density == pytest.approx(work.kept / work.visible, rel=0.06)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("budget", [256, 512, 1024, 2048])
def test_long_prompts_are_sparse(dtype, shape, budget):
    """Where sparse won by far when it was measured."""
    config = dhsa.Config(budget=budget)
    assert not exact_again(config, *shaped(shape, 8 * budget, dtype=dtype))
    assert not exact_again(config, *shaped(shape, 2048, 16 * budget + 2048, dtype=dtype))
    # and the longer the prompt, the more so
    lengths = range(budget + 128, 16 * budget, 64)
    times = [break_even.seconds(config, *shaped(shape, length, dtype=dtype), None) for length in lengths]
    quotients = [sparse / exact for exact, sparse in times]
    assert quotients == sorted(quotients, reverse=True)


def test_the_measured_costs():
    """bfloat16 and float16 have fast exact attention, so gathering weighs more; see the table of the benchmark."""
    assert set(break_even.COSTS) == {*DTYPES, "bfloat16 by vectors"}
    config = dhsa.Config(budget=2048)
    for dtype in ("bfloat16", "float16"):
        if dtype in _core.build_info()["products"]:
            assert exact_again(config, *shaped((8, 4, 256), 3072, dtype=dtype))
            assert not exact_again(config, *shaped((4, 1, 256), 8192, dtype=dtype))


def test_a_row_of_a_batch_is_treated_as_alone():
    config = dhsa.Config(budget=512)
    for length in range(640, 1600, 64):
        alone, together = (shaped((8, 4, 256), length, dtype="bfloat16", batch=batch) for batch in (1, 16))
        assert exact_again(config, *alone) == exact_again(config, *together)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_block", [16, 32, 64])
def test_small_prompts_run_exact(dtype, query_block):
    """Costs of a call and of a list, which the model does not count, are large there: sparse is slower at most."""
    for shape in [(4, 2, 16), (4, 2, 32), (4, 1, 24), (4, 4, 32)]:
        for length in range(140, 420, 20):
            q, k = shaped(shape, length, dtype=dtype)
            for budget in (32, 48, 96, 128):
                config = dhsa.Config(budget=budget, query_block=query_block)
                assert exact_again(config, q, k) == config.leaves_out(length, length, None)


def test_without_products_of_their_own_16_bit_numbers_cost_what_float32_does():
    config, q, k = dhsa.Config(budget=256), *shaped((8, 4, 256), 1024, dtype="bfloat16")
    before = _core.isa_current()
    try:
        dhsa.set_isa("scalar")
        assert break_even.seconds(config, q, k, None) == break_even.seconds(config, q.float(), k.float(), None)
    finally:
        dhsa.set_isa(before)


# ---- who says so -----------------------------------------------------------------------------------------------------


def test_the_doctor_says_why():
    model, ids = build("llama"), tokens(1, 400)
    check = dhsa.check(model, ids, SPARSE.replace(break_even=500))
    assert {layer.why for layer in check.layers} == {"break-even: 400 keys are fewer than the 500 of break_even"}
    assert any("Layers 0-3 ran exact: break-even: 400 keys are fewer" in note for note in check.notes)
    assert any("Nothing was left out in any layer" in warning for warning in check.warnings)
    assert check.ok
    q, k = shaped((4, 2, 16), 400)
    assert in_words(model, SPARSE.replace(break_even=500), q, k, None, None, True).kind == "break-even"


def test_evaluation_measures_sparse_in_any_case():
    assert settings.setting("rows", 96).config.break_even == 0
    assert settings.setting("rows:break_even=700", 96).config.break_even == 700
    assert settings.setting("xattention:source", 96).config.break_even == 0
    assert settings.setting("paper", 512).config.break_even == 0


# ---- decoding steps --------------------------------------------------------------------------------------------------


def test_steps_on_short_caches_run_exact():
    steps = dhsa.Config(budget=1024, decode="dhsa")
    for dtype, budgets in (("float32", 3), ("bfloat16", 4), ("float16", 4)):
        for shape in SHAPES:
            assert exact_again(steps, *shaped(shape, 1, budgets * 1024 - 1, dtype))
            assert not exact_again(steps, *shaped(shape, 1, budgets * 1024, dtype))
            assert not exact_again(steps.replace(break_even=0), *shaped(shape, 1, 2048, dtype))
            assert exact_again(steps.replace(break_even=5000), *shaped(shape, 1, 4999, dtype))
        assert not exact_again(steps, *shaped(SHAPES[0], 1, 1024, dtype))  # nothing is left out
        assert not exact_again(dhsa.Config(budget=64, decode="dhsa"), *shaped(SHAPES[0], 1, 190, dtype))
    assert not exact_again(EXACT, *shaped(SHAPES[0], 1, 2000))


def test_a_step_that_does_not_pay_says_so():
    model, ids = build("llama"), tokens(1, 300)
    config = SPARSE.replace(decode="dhsa", break_even=310)
    with dhsa.patched(model, config):
        model.generate(ids, max_new_tokens=6, do_sample=False)
        assert {(r.path, r.reason) for r in dhsa.last_run(model, "decode")} == {
            ("decode", "break-even: 305 keys are fewer than the 310 of break_even")
        }
        model.generate(ids, max_new_tokens=20, do_sample=False)
        assert {(r.path, r.reason) for r in dhsa.last_run(model, "decode")} == {("sparse", "")}
