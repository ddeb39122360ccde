"""`dhsa.scaled_dot_product_attention` against torch's function of that name, and what stands in the place of torch's
while it is replaced."""

import inspect
import pickle
import threading

import pytest

torch = pytest.importorskip("torch", reason="needs torch")

import torch.nn.functional as F  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import dhsa  # noqa: E402
from dhsa import _core, sdpa  # noqa: E402

ORIGINAL = F.scaled_dot_product_attention
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def torchs_own_again():
    yield
    assert F.scaled_dot_product_attention is ORIGINAL


def test_what_stands_in_its_place_can_be_pickled():
    with dhsa.replacing_sdpa():
        written = pickle.dumps(F.scaled_dot_product_attention)
        assert pickle.loads(written) is F.scaled_dot_product_attention
    assert pickle.loads(written) is ORIGINAL


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(*lead, lq=20, lk=20, d=16, dtype=torch.float32, seed=0):
    return tuple(normal(*lead, n, d, dtype=dtype, seed=seed + i) for i, n in enumerate((lq, lk, lk)))


def check(q, k, v, mask=None, **options):
    """Serves a call, and compares with torch's result in float64, its shape and dtype with torch's in the same."""
    got = dhsa.scaled_dot_product_attention(q, k, v, mask, **options)
    same = ORIGINAL(q, k, v, mask, **options)
    assert (got.shape, got.dtype, got.device) == (same.shape, same.dtype, same.device)
    exact_mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    exact = ORIGINAL(q.double(), k.double(), v.double(), exact_mask, **options)
    assert exact.numel() == 0 or exact.abs().max() > 0 or mask is not None or k.shape[-2] == 0
    torch.testing.assert_close(got.double(), exact, atol=TOLERANCE[q.dtype], rtol=TOLERANCE[q.dtype])
    return got


# ---- the function ----------------------------------------------------------------------------------------------------


def test_signature():
    """That of torch's documentation, of which the builtin has none to inspect."""
    parameters = inspect.signature(dhsa.scaled_dot_product_attention).parameters
    line = ORIGINAL.__doc__.splitlines()[0] + ORIGINAL.__doc__.splitlines()[1]
    inside = line[line.index("(") + 1 : line.index(")")]
    said = [part.strip().partition("=") for part in inside.split(",")]
    assert [name for name, _, _ in said] == list(parameters)
    for name, _, default in said[3:]:
        assert parameters[name].default == eval(default)
    keyword_only = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keyword_only == {"scale", "enable_gqa"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (1, 40), (40, 1), (33, 33), (17, 140), (140, 17), (200, 200)])
def test_lengths(dtype, causal, lq, lk):
    """Causality begins at the first key, whatever the lengths are."""
    check(*qkv(2, 3, lq=lq, lk=lk, dtype=dtype), is_causal=causal)


@pytest.mark.parametrize("lead", [(), (3,), (1,), (2, 3), (2, 3, 4), (2, 1, 3, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_dimensions(lead, causal):
    check(*qkv(*lead, lq=9, lk=21), is_causal=causal)


@pytest.mark.parametrize("lead", [(6,), (2, 6), (2, 3, 6)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads(lead, kv_heads):
    q = normal(*lead, 19, 16)
    k, v = (normal(*lead[:-1], kv_heads, 19, 16, seed=s) for s in (1, 2))
    check(q, k, v, enable_gqa=True)
    check(q, k, v, enable_gqa=True, is_causal=True)


@pytest.mark.parametrize(
    ("q", "k"), [((2, 4), (1, 4)), ((1, 4), (2, 4)), ((2, 4), (2, 1)), ((2, 4), (4,)), ((4,), (2, 4)), ((), (2, 4))]
)
def test_leading_dimensions_broadcast(q, k):
    check(normal(*q, 9, 8), normal(*k, 11, 8, seed=1), normal(*k, 11, 8, seed=2))


@pytest.mark.parametrize("scale", [None, 1, 0.3, 0.0, -0.5])
def test_scale(scale):
    check(*qkv(2, 2), scale=scale)


@pytest.mark.parametrize(
    "shape", [(20, 20), (1, 20), (20, 1), (1, 1, 1, 20), (2, 1, 1, 20), (2, 1, 20, 20), (1, 3, 20, 20), (2, 3, 20, 20)]
)
@pytest.mark.parametrize("kind", ["interval", "lower", "padding", "gaps"])
@pytest.mark.parametrize("additive", [None, torch.float32, torch.float16])
def test_masks(shape, kind, additive):
    """Of every shape that torch broadcasts, with rows that see nothing among them, which give zeros."""
    generator = torch.Generator().manual_seed(len(kind) + sum(shape))
    rows, keys = shape[-2:]
    if kind == "interval":
        ends = torch.randint(0, keys + 1, (2, *shape[:-1], 1), generator=generator).sort(0).values
        mask = (torch.arange(keys) >= ends[0]) & (torch.arange(keys) < ends[1])
    elif kind == "lower":
        mask = (torch.arange(keys)[None] <= torch.arange(rows)[:, None] - 2).expand(shape)
    elif kind == "padding":
        mask = (torch.arange(keys) < torch.randint(1, keys + 1, (*shape[:-2], 1, 1), generator=generator)).expand(shape)
    else:
        mask = (torch.rand((*shape[:-2], 1, keys), generator=generator) < 0.6).expand(shape)
        if keys == 20:
            assert (mask[..., 1:] > mask[..., :-1]).sum(-1).max() > 1
    q, k, v = qkv(2, 3, dtype=additive or torch.float32)
    if additive is not None:
        mask = torch.zeros(shape, dtype=additive).masked_fill(~mask, -torch.inf)
    got = check(q, k, v, mask)
    check(q, k, v, mask.contiguous())
    blind = ORIGINAL(q.float(), k.float(), torch.ones(2, 3, 20, 16), mask.float() if additive else mask)[..., 0] == 0
    assert not got[blind].any()


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, torch.finfo(torch.float16).min, -1e9, -1e4])
def test_finite_numbers_hide_keys_beside_others_that_are_seen(low):
    q, k, v = qkv(2, 2)
    lower = torch.ones(20, 20).tril().bool()
    check(q, k, v, torch.zeros(20, 20).masked_fill(~lower, low))
    if low < -7e4:
        return
    bf16 = torch.zeros(20, 20, dtype=torch.bfloat16).masked_fill(~lower, low)
    check(*(x.bfloat16() for x in (q, k, v)), bf16)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_heads_of_different_masks(kv_heads):
    q, k, v = normal(2, 4, 20, 16), normal(2, kv_heads, 20, 16, seed=1), normal(2, kv_heads, 20, 16, seed=2)
    lengths = torch.arange(8).reshape(2, 4, 1, 1) * 2 + 3
    check(q, k, v, (torch.arange(20) < lengths).expand(2, 4, 20, 20), enable_gqa=kv_heads == 2)
    gaps = torch.rand(2, 4, 1, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    check(q, k, v, gaps, enable_gqa=kv_heads == 2)
    check(*qkv(4), gaps[0].expand(4, 20, 20))  # of three dimensions


def test_a_long_mask_is_read_in_slices(monkeypatch):
    q, k, v = qkv(1, 2, lq=50, lk=70)
    mask = (torch.arange(70) > torch.arange(50)[:, None] - 9) & (torch.arange(70) <= torch.arange(50)[:, None] + 5)
    whole = dhsa.scaled_dot_product_attention(q, k, v, mask)
    monkeypatch.setattr(sdpa, "SLICE", 200)
    assert torch.equal(check(q, k, v, mask), whole)
    bias = torch.zeros(50, 70)
    bias[30, 3] = -1.0
    with pytest.raises(NotImplementedError, match="attn_mask: is a bias"):
        dhsa.scaled_dot_product_attention(q, k, v, bias)


LAYOUTS = {
    "plain": lambda b, h, n, d: normal(b, h, n, d),
    "heads inside": lambda b, h, n, d: normal(b, n, h, d).transpose(1, 2),
    "fused": lambda b, h, n, d: normal(b, n, 3, h, d).permute(2, 0, 3, 1, 4)[1],
    "batch inside": lambda b, h, n, d: normal(n, b, h, d).permute(1, 2, 0, 3),
    "dim outside": lambda b, h, n, d: normal(b, h, d, n).transpose(2, 3),
    "part": lambda b, h, n, d: normal(b, 2 * h, n + 3, d + 5)[:, ::2, 1:-2, 2:-3],
    "repeated": lambda b, h, n, d: normal(1, h, n, d).expand(b, h, n, d),
    "repeated keys": lambda b, h, n, d: normal(b, h, 1, d).expand(b, h, n, d),
}


@pytest.mark.parametrize("query", list(LAYOUTS))
@pytest.mark.parametrize("key", list(LAYOUTS))
def test_layouts(query, key):
    q, k = LAYOUTS[query](2, 3, 18, 8), LAYOUTS[key](2, 3, 18, 8)
    got = check(q, k, k.neg())
    if query not in ("repeated keys", "dim outside"):  # of which torch's result has the layout of other tensors
        assert got.stride() == ORIGINAL(q, k, k.neg()).stride()


def test_three_and_five_dimensions_of_any_layout():
    for x in (normal(9, 4, 8).transpose(0, 1), normal(2, 9, 3, 4, 8).permute(0, 2, 3, 1, 4)):
        assert check(x, x, x, is_causal=True).is_contiguous()


@pytest.mark.parametrize("width", [1, 8, 24])
def test_values_of_another_width(width):
    q, k, _ = qkv(2, 3)
    v = normal(2, 3, 20, width, seed=3)
    check(q, k, v)
    check(q, k, v, is_causal=True)


@pytest.mark.parametrize("lead", [(0, 3), (2, 0), (0,)])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_do(lead, causal):
    check(*qkv(*lead), is_causal=causal)


def test_no_queries_or_no_keys():
    check(*qkv(2, 3, lq=0))
    got = check(*qkv(2, 3, lk=0))  # zeros
    assert got.shape == (2, 3, 20, 16)
    assert not got.any()
    check(*qkv(2, 3, lk=0), torch.ones(20, 0, dtype=torch.bool))
    check(*qkv(2, 3, lq=0), torch.ones(0, 20, dtype=torch.bool))


def test_autocast():
    q, k, v = qkv(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = dhsa.scaled_dot_product_attention(q, k.half(), v), ORIGINAL(q, k, v)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_inputs_that_require_grad_without_recording():
    q, k, v = (x.requires_grad_() for x in qkv(2, 3))
    with torch.no_grad():
        assert not check(q, k, v).requires_grad
    with torch.inference_mode():
        check(q, k, v)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_anything_that_torch_takes(data):
    draw = data.draw
    lead = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    lq, lk, d = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.sampled_from([1, 5, 8, 16, 33]))
    group = draw(st.sampled_from([1, 2, 3]))
    dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 1000))
    q = normal(*lead[:-1], lead[-1] * group, lq, d, dtype=dtype, seed=seed)
    k, v = (normal(*lead, lk, d, dtype=dtype, seed=seed + i) for i in (1, 2))
    mask, causal = None, draw(st.booleans())
    if not causal and draw(st.booleans()):
        full = (*q.shape[:-1], lk)
        shape = tuple(n if draw(st.booleans()) else 1 for n in full)[draw(st.integers(0, len(full) - 2)) :]
        generator = torch.Generator().manual_seed(seed)
        if draw(st.booleans()):
            ends = torch.randint(0, shape[-1] + 1, (2, *shape[:-1], 1), generator=generator).sort(0).values
            mask = (torch.arange(shape[-1]) >= ends[0]) & (torch.arange(shape[-1]) < ends[1])
        else:
            mask = (torch.rand(*shape[:-2], 1, shape[-1], generator=generator) < 0.5).expand(shape)
        if draw(st.booleans()):
            mask = torch.zeros(shape, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    check(q, k, v, mask, is_causal=causal, enable_gqa=group > 1, scale=draw(st.sampled_from([None, 0.5])))


# ---- what is refused -------------------------------------------------------------------------------------------------

Q, K, V = qkv(2, 4)
BAD = {
    "list": ((Q.tolist(), K, V), {}, TypeError, "query: expected a torch tensor, got list"),
    "no value": ((Q, K, None), {}, TypeError, "value: expected a torch tensor, got NoneType"),
    "float64": ((Q.double(), K.double(), V.double()), {}, TypeError, "query: expected float32.*got float64"),
    "int": ((Q.int(), K.int(), V.int()), {}, TypeError, "query: expected float32.*got int32"),
    "complex": ((Q.cfloat(), K.cfloat(), V.cfloat()), {}, TypeError, "query: expected float32.*got complex64"),
    "mixed": ((Q, K.half(), V), {}, TypeError, "key: dtype is float16, expected float32 as query"),
    "one dimension": ((Q[0, 0, 0], K, V), {}, ValueError, "query: expected at least 2 dimensions, got 1"),
    "meta": ((Q.to("meta"), K, V), {}, ValueError, "query: expected a tensor on the CPU, got one on device 'meta'"),
    "sparse": ((Q.to_sparse(), K, V), {}, ValueError, "query: expected a dense tensor, got a torch.sparse_coo one"),
    "batch": ((Q, K[:1].expand(3, -1, -1, -1), V), {}, ValueError, r"key: the leading.*got \[2, 4\], \[3, 4\], \[2, 4"),
    "heads": ((Q, K[:, :2], V[:, :2]), {}, ValueError, "key: the leading dimensions.*do not broadcast"),
    "group": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, ValueError, "key: its heads do not divide.*got 3 and 4"),
    "two groups": ((Q, K[:, :2], V[:, :1]), {"enable_gqa": True}, NotImplementedError, "value: its number of heads"),
    "no heads": ((Q[0, 0], K[0, 0], V[0, 0]), {"enable_gqa": True}, ValueError, "enable_gqa: needs.*3 dimensions"),
    "key width": ((Q, K[..., :7], V), {}, ValueError, "key: its last dimension is not query's, got 7 and 16"),
    "value length": ((Q, K, V[:, :, :5]), {}, ValueError, "value: its length is not that of key, got 5 and 20"),
    "no width": ((Q[..., :0], K[..., :0], V[..., :0]), {}, ValueError, "query: its last dimension has size 0"),
    "dropout": ((Q, K, V), {"dropout_p": 0.1}, NotImplementedError, "dropout_p: is not 0.*got 0.1"),
    "dropout nan": ((Q, K, V), {"dropout_p": float("nan")}, NotImplementedError, "dropout_p: is not 0"),
    "dropout str": ((Q, K, V), {"dropout_p": "0"}, TypeError, "dropout_p: expected a number, got str"),
    "causal": ((Q, K, V), {"is_causal": 1}, TypeError, "is_causal: expected a bool, got int"),
    "gqa": ((Q, K, V), {"enable_gqa": "yes"}, TypeError, "enable_gqa: expected a bool, got str"),
    "scale str": ((Q, K, V), {"scale": "1"}, TypeError, "scale: expected a number, got str"),
    "scale bool": ((Q, K, V), {"scale": True}, TypeError, "scale: expected a number, got bool"),
    "scale nan": ((Q, K, V), {"scale": float("nan")}, ValueError, "scale: expected a finite number.*got nan"),
    "scale inf": ((Q, K, V), {"scale": float("inf")}, ValueError, "scale: expected a finite number.*got inf"),
    "mask beside": (
        (Q, K, V, torch.ones(20, 20, dtype=torch.bool)),
        {"is_causal": True},
        ValueError,
        "attn_mask: is given beside is_causal=True",
    ),
    "mask list": ((Q, K, V, [[True]]), {}, TypeError, "attn_mask: expected a torch tensor, got list"),
    "mask int": ((Q, K, V, torch.ones(20, 20).int()), {}, TypeError, "attn_mask: expected bool, float32 or.*got int32"),
    "mask double": ((Q, K, V, torch.zeros(20, 20).double()), {}, TypeError, "attn_mask: expected bool.*got float64"),
    "mask 1-D": ((Q, K, V, torch.ones(20).bool()), {}, ValueError, "attn_mask: expected at least 2 dimensions, got 1"),
    "mask keys": ((Q, K, V, torch.ones(20, 19).bool()), {}, ValueError, r"attn_mask: does not broadcast.*\[20, 19\]"),
    "mask batch": ((Q, K, V, torch.ones(3, 1, 20, 20).bool()), {}, ValueError, "attn_mask: does not broadcast"),
    "mask 5-D": ((Q, K, V, torch.ones(1, 1, 1, 20, 20).bool()), {}, ValueError, "attn_mask: does not broadcast"),
    "mask meta": ((Q, K, V, torch.ones(20, 20).bool().to("meta")), {}, ValueError, "attn_mask: expected a tensor on"),
    "bias": ((Q, K, V, normal(20, 20)), {}, NotImplementedError, "attn_mask: is a bias: expected 0"),
    "bias nan": ((Q, K, V, torch.full((20, 20), torch.nan)), {}, NotImplementedError, "attn_mask: is a bias"),
    "bias +inf": ((Q, K, V, torch.full((20, 20), torch.inf)), {}, NotImplementedError, "attn_mask: is a bias"),
    "finite row": (
        (Q, K, V, torch.full((20, 20), -1e9)),
        {},
        NotImplementedError,
        "attn_mask: is a bias: a query whose keys are all hidden needs -inf for each",
    ),
    "strided": (
        (Q, K, V, (torch.arange(20)[None] + torch.arange(20)[:, None]) % 2 == 0),
        {},
        NotImplementedError,
        "attn_mask: the keys of a query are several intervals, and differ among queries",
    ),
}

UNSAFE = ("mask meta", "value length")  # torch reads memory that is not there


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case):
    """Refused in a sentence that names the argument; while torch's function is replaced, torch has the last word."""
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        dhsa.scaled_dot_product_attention(*arguments, **options)

    if case in UNSAFE:
        return

    def outcome(function):
        try:
            return function(*arguments, **options)
        except Exception as raised:
            return type(raised), str(raised)

    torch.manual_seed(0)
    want = outcome(ORIGINAL)
    with dhsa.replacing_sdpa(break_even=0) as counts:
        torch.manual_seed(0)
        got = outcome(F.scaled_dot_product_attention)
    assert counts.served == 0
    assert counts.passed.total() == 1
    if isinstance(want, torch.Tensor) and not want.is_meta:
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    else:
        assert type(got) is type(want)
        assert got == want or isinstance(want, torch.Tensor)


def test_widths_above_the_core():
    x = normal(1, 1, 4, _core.MAX_HEAD_DIM + 1)
    with pytest.raises(NotImplementedError, match=f"query: its last dimension is above {_core.MAX_HEAD_DIM}, got"):
        dhsa.scaled_dot_product_attention(x, x, x)
    at_most = x[..., :-1]
    value = normal(1, 1, 4, _core.MAX_VALUE_DIM + 1)
    check(at_most, at_most, value[..., :-1])
    with pytest.raises(NotImplementedError, match=f"value: its last dimension is above {_core.MAX_VALUE_DIM}, got"):
        dhsa.scaled_dot_product_attention(at_most, at_most, value)


def test_recorded_calls_are_refused():
    q, k, v = qkv(2, 3)
    with pytest.raises(NotImplementedError, match="key: requires grad, and there is no backward pass; call under"):
        dhsa.scaled_dot_product_attention(q, k.requires_grad_(), v)
    k.requires_grad_(False)
    with pytest.raises(NotImplementedError, match="attn_mask: requires grad"):
        dhsa.scaled_dot_product_attention(q, k, v, torch.zeros(20, 20).requires_grad_())


def test_transforms_are_refused():
    q, k, v = qkv(2, 3)
    with pytest.raises(NotImplementedError, match=r"query: torch\.vmap cannot transform"):
        torch.vmap(dhsa.scaled_dot_product_attention)(q, k, v)
    with torch.nn.utils.parametrize.cached(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with torch.no_grad(), pytest.raises(NotImplementedError, match="query: has a tangent"):
            dhsa.scaled_dot_product_attention(dual, k, v)


# ---- in the place of torch's function --------------------------------------------------------------------------------


def served(*arguments, **options):
    return F.scaled_dot_product_attention(*arguments, **options)


def test_calls_are_served_and_counted():
    q, k, v = qkv(2, 3, lq=200, lk=200)
    with dhsa.replacing_sdpa() as counts:
        assert F.scaled_dot_product_attention is not ORIGINAL
        assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"
        assert F.scaled_dot_product_attention.__doc__ == ORIGINAL.__doc__
        got = served(q, k, value=v, is_causal=True, scale=0.2)
        assert (counts.served, dict(counts.passed)) == (1, {})
        served(q, k, v, None, 0.5)
        served(q.double(), k.double(), v.double())
        served(q.double(), k.double(), v.double())
    assert torch.equal(got, dhsa.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2))
    assert counts.served == 1
    assert counts.passed == {
        "dropout_p: is not 0, and there is no dropout": 1,
        "query: expected float32, float16 or bfloat16, got float64": 2,
    }
    assert repr(counts).startswith("SdpaCounts(served=1, passed={'query: expected float32")
    served(q, k, v)
    assert (counts.served, counts.passed.total()) == (1, 3)  # no longer counted


@pytest.mark.parametrize("dtype", DTYPES)
def test_short_calls_are_torchs(dtype):
    """Where torch takes no longer, by keys and queries; or by the number of keys that was asked for."""
    queries, keys = sdpa.LEAST[dtype]
    with dhsa.replacing_sdpa() as counts:
        served(*qkv(1, 2, lq=1000, lk=keys - 1, dtype=dtype))
        served(*qkv(1, 2, lq=queries - 1, lk=1000, dtype=dtype))
        assert counts.passed == {
            f"break-even: fewer than {keys} keys": 1,
            f"break-even: fewer than {queries} queries": 1,
        }
        served(*qkv(1, 2, lq=queries, lk=keys, dtype=dtype))
        assert counts.served == 1
    with dhsa.replacing_sdpa(break_even=50) as counts:
        served(*qkv(1, 2, lq=1, lk=50, dtype=dtype))
        served(*qkv(1, 2, lq=100, lk=49, dtype=dtype))
    assert (counts.served, dict(counts.passed)) == (1, {"break-even: fewer than 50 keys": 1})


def test_short_calls_under_autocast():
    """They are computed in its dtype, whose numbers of queries and keys decide."""
    queries, keys = sdpa.LEAST[torch.bfloat16]
    assert (queries, keys) < sdpa.LEAST[torch.float32]
    q, k, v = qkv(1, 2, lq=queries, lk=keys)
    with dhsa.replacing_sdpa() as counts:
        served(q, k, v)
        assert counts.passed == {f"break-even: fewer than {sdpa.LEAST[torch.float32][0]} queries": 1}
        with torch.autocast("cpu", torch.bfloat16):
            served(q, k, v)
            served(q[:, :, 1:], k, v)
    assert (counts.served, counts.passed[f"break-even: fewer than {queries} queries"]) == (1, 1)


def test_lasting_replacement():
    q, k, v = qkv(1, 2, lq=128, lk=128)
    counts = dhsa.replace_sdpa()
    try:
        served(q, k, v)
        assert dhsa.replace_sdpa(break_even=1000) is counts
        served(q, k, v)
        assert (counts.served, counts.passed.total()) == (1, 1)
    finally:
        dhsa.restore_sdpa()
    assert F.scaled_dot_product_attention is ORIGINAL
    with pytest.raises(ValueError, match="scaled_dot_product_attention: not replaced"):
        dhsa.restore_sdpa()
    assert dhsa.replace_sdpa() is not counts
    dhsa.restore_sdpa()


def test_nested_and_interleaved():
    q, k, v = qkv(1, 2, lq=128, lk=128)
    with dhsa.replacing_sdpa() as outer:
        function = F.scaled_dot_product_attention
        with dhsa.replacing_sdpa(break_even=500) as inner:
            assert F.scaled_dot_product_attention is function
            served(q, k, v)
            lasting = dhsa.replace_sdpa()
        served(q, k, v)
        dhsa.restore_sdpa()
        assert F.scaled_dot_product_attention is function
    assert (inner.served, inner.passed.total()) == (0, 1)
    assert (outer.served, outer.passed.total()) == (1, 1)
    assert (lasting.served, lasting.passed.total()) == (1, 0)
    first, second = dhsa.replacing_sdpa(), dhsa.replacing_sdpa()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert F.scaled_dot_product_attention is not ORIGINAL
    second.__exit__(None, None, None)


def test_undone_after_an_exception():
    with pytest.raises(KeyError, match="mine"), dhsa.replacing_sdpa():
        raise KeyError("mine")
    assert F.scaled_dot_product_attention is ORIGINAL


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), ("96", TypeError), (True, TypeError), (1.5, TypeError)])
def test_bad_break_even(value, error):
    for replace in (dhsa.replace_sdpa, lambda **options: dhsa.replacing_sdpa(**options).__enter__()):
        with pytest.raises(error, match="break_even: expected"):
            replace(break_even=value)
        assert F.scaled_dot_product_attention is ORIGINAL


def test_threads():
    """Blocks that overlap in threads: none ends another's, and no call is lost from the counts."""
    q, k, v = qkv(1, 1, lq=64, lk=100)
    want = dhsa.scaled_dot_product_attention(q, k, v)
    wrong, own = [], []
    barrier = threading.Barrier(4)

    def work():
        barrier.wait()
        for _ in range(20):
            with dhsa.replacing_sdpa() as counts:
                for _ in range(3):
                    if not torch.equal(F.scaled_dot_product_attention(q, k, v), want):
                        wrong.append(1)
                own.append(counts.served)

    with dhsa.replacing_sdpa() as all_calls:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert all_calls.served == 4 * 20 * 3
    assert min(own) >= 3


def test_another_replacement_above():
    """Of a package that puts its function over this one and never takes it away: it stays, and calls torch in the
    end."""
    q, k, v = qkv(1, 2, lq=128, lk=128)
    try:
        with dhsa.replacing_sdpa() as counts:
            ours = F.scaled_dot_product_attention

            def others(*arguments, **options):
                return ours(*arguments, **options)

            F.scaled_dot_product_attention = others
            served(q, k, v)
            assert counts.served == 1
        assert F.scaled_dot_product_attention is others
        assert torch.equal(served(q, k, v), ORIGINAL(q, k, v))
        with dhsa.replacing_sdpa() as again:
            served(q, k, v)
            served(q, k, v, None, 0.1)
            assert (again.served, again.passed.total()) == (1, 1)
        assert F.scaled_dot_product_attention is others
    finally:
        F.scaled_dot_product_attention = ORIGINAL


def test_an_argument_of_a_later_torch():
    q, k, v = qkv(1, 2, lq=128, lk=128)
    seen = []

    def later(query, key, value, novelty=None):
        seen.append(novelty)
        return ORIGINAL(query, key, value)

    F.scaled_dot_product_attention = later
    try:
        with dhsa.replacing_sdpa() as counts:
            served(q, k, v, novelty=3)
        assert F.scaled_dot_product_attention is later
    finally:
        F.scaled_dot_product_attention = ORIGINAL
    assert (seen, counts.served) == ([3], 0)
    assert list(counts.passed) == ["arguments: not those of dhsa.scaled_dot_product_attention"]


def test_gradients_are_torchs():
    q, k, v = qkv(1, 2, lq=128, lk=128)
    q.requires_grad_()
    with dhsa.replacing_sdpa() as counts:
        served(q, k, v).sum().backward()
        with torch.no_grad():
            served(q, k, v)
    assert q.grad is not None
    assert counts.served == 1
    assert list(counts.passed) == ["query: requires grad, and there is no backward pass"]


def test_backends_that_are_asked_for():
    q, k, v = qkv(1, 2, lq=128, lk=128)
    with dhsa.replacing_sdpa() as counts, sdpa_kernel(SDPBackend.MATH):
        got = served(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(got, ORIGINAL(q, k, v))
    assert list(counts.passed) == ["sdpa_kernel: some of torch's backends are ruled out"]


def test_modes_and_subclasses():
    """A mode sees the call as one of torch's function; a subclass of tensors, and a recorder, get torch's own."""
    q, k, v = qkv(1, 2, lq=128, lk=128)
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append(len(args))
            return func(*args, **(kwargs or {}))

    class Sub(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func is ORIGINAL)
            return super().__torch_function__(func, types, args, kwargs or {})

    with dhsa.replacing_sdpa() as counts:
        with torch.device("cpu"):
            served(q, k, v)
        with Mode():
            served(q, k, v)
        assert (counts.served, seen) == (2, [3])
        served(q.as_subclass(Sub), k, v)
        assert seen == [3, True]
        assert list(counts.passed) == ["query, key, value or attn_mask: of a class of its own"]
        graph = torch.fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v)).graph
        assert any(node.target is ORIGINAL for node in graph.nodes)
        from torch.fx.experimental.proxy_tensor import make_fx

        made = make_fx(lambda q, k, v: F.scaled_dot_product_attention(q, k, v))(q, k, v)
        assert any("scaled_dot_product" in str(node.target) for node in made.graph.nodes)
        before = counts.served
        torch.vmap(F.scaled_dot_product_attention)(q, k, v)
    assert counts.served == before


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_exported_graphs_keep_torchs_function():
    q, k, v = qkv(1, 2, lq=128, lk=128)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) + 1

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad(), dhsa.replacing_sdpa() as counts:
        compiled = torch.compile(attend, backend=backend, fullgraph=True)
        first = compiled(q, k, v)
        assert torch.equal(compiled(q, k, v), first)
        assert (counts.served, dict(counts.passed)) == (0, {"torch.compile: a graph keeps torch's function": 1})
        assert next(node.target for node in graphs[0].graph.nodes if node.op == "call_function") is ORIGINAL

        class Module(torch.nn.Module):
            def forward(self, q, k, v):
                return attend(q, k, v)

        program = torch.export.export(Module(), (q, k, v))
        assert (counts.served, counts.passed.total()) == (0, 2)
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), first)
        torch.testing.assert_close(program.module()(q, k, v), first)


def test_torchs_own_modules():
    """Of torch itself, those that call its function, which MultiheadAttention does not on its fast path."""
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = normal(2, 150, 32)
    padding = torch.arange(150) > torch.tensor([[149], [100]])
    with torch.no_grad():
        with dhsa.replacing_sdpa() as counts:
            layer(x, x, x, need_weights=False)
        assert (counts.served, counts.passed.total()) == (0, 0)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            want = layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
            with dhsa.replacing_sdpa() as counts:
                got = layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert counts.served == 1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
