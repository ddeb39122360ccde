"""Transforms and recorders of torch that see operators only, tensors that are not what their memory says, and autocast:
served, or refused by a sentence that names what it was."""

import pytest

import dhsa

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")

from torch.autograd import forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

pytestmark = [  # prototypes and deprecated parts of torch, which people use all the same
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("torch.jit.TracerWarning", "DeprecationWarning", "UserWarning")
]
CONFIG = dhsa.Config(budget=16, query_block=8, sink=2, local=4, dense_tail=0)


def arrays(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 60, 16, generator=generator) for heads in (4, 2, 2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


Q, K, V = arrays()
SELECTION = dhsa.select(Q, K, CONFIG)
CALLS = {
    "attention": lambda x: dhsa.attention(x, K, V),
    "attention, sparse": lambda x: dhsa.attention(x, K, V, CONFIG),
    "attention, key": lambda x: dhsa.attention(Q, x[:, :2], V),
    "attention, value": lambda x: dhsa.attention(Q, K, x[:, :2]),
    "attention, ranges": lambda x: dhsa.attention(Q, K, V, key_ranges=(x[0, :1, :, :2] > 9).int()),
    "sparse_attention": lambda x: dhsa.sparse_attention(x, K, V, SELECTION),
    "select": lambda x: dhsa.select(x, K, CONFIG).indices,
    "boundaries": lambda x: dhsa.boundaries(x[:, :2], CONFIG),
    "chunk_scores": lambda x: dhsa.chunk_scores(x, K, [[0, 30, 60]], query_block=8),
    "attention_ratios": lambda x: dhsa.attention_ratios(x, K),
    "boundary_ratios": lambda x: dhsa.boundary_ratios(x[0, 0, :16], window=2),
    "pick_boundaries": lambda x: dhsa.pick_boundaries(x[0, 0, :, 0], 3, theta=0.0, nms=2),
}


def forward_mode(function):
    def inner(x):
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(x, torch.ones_like(x)))

    return inner


TRANSFORMS = {
    r"torch\.jit\.trace cannot record": lambda f: lambda x: torch.jit.trace(f, (x,), check_trace=False)(x),
    r"torch\.vmap cannot transform": lambda f: lambda x: torch.vmap(f)(x[None]),
    r"torch\.func\.grad cannot transform": lambda f: torch.func.grad(lambda x: f(x).sum()),
    r"torch\.func\.jvp cannot transform": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    r"torch\.func\.functionalize cannot transform": lambda f: torch.func.functionalize(f),
    r"torch\.autograd\.forward_ad, which would be lost": forward_mode,
    "make_fx cannot record": lambda f: lambda x: make_fx(f)(x),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("sentence", TRANSFORMS)
def test_functions_refuse_what_sees_operators_only(sentence, name):
    call = CALLS[name]
    if name == "attention, ranges" and "forward_ad" in sentence:
        pytest.skip("comparisons have no derivative to lose")
    call(Q)
    with pytest.raises(NotImplementedError, match=rf"^\w+: (has a tangent of )?{sentence}") as raised:
        TRANSFORMS[sentence](call)(Q)
    assert "frame #" not in str(raised.value)


def test_what_a_transform_does_not_touch_is_served():
    want = dhsa.attention(Q, K, V)
    assert torch.equal(torch.vmap(lambda x: x + dhsa.attention(Q, K, V))(torch.zeros_like(Q)[None])[0], want)
    with forward_ad.dual_level():
        assert torch.equal(dhsa.attention(Q, K, V), want)
    with pytest.raises(
        NotImplementedError, match=r"^q: torch\.func\.jvp cannot transform"
    ):  # it wraps what is made in it
        torch.func.jvp(lambda x: x + dhsa.attention(Q, K, V), (Q,), (Q,))


def test_export_names_itself():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return dhsa.attention(q, k, v)

    with pytest.raises(NotImplementedError, match=r"^q: torch\.export cannot record"):
        torch.export.export(Module(), (Q, K, V), strict=False)


def test_the_functions_work_between_compiled_graphs():
    torch._dynamo.reset()
    graph = torch.compile(lambda q, k, v: 2 * dhsa.attention(q * 1, k, v), backend="eager")
    for _ in range(2):
        assert torch.equal(graph(Q, K, V), 2 * dhsa.attention(Q, K, V))


def test_modes_that_only_watch_are_served():
    from torch.utils.flop_counter import FlopCounterMode

    want = dhsa.attention(Q, K, V)
    with FlopCounterMode(display=False):
        assert torch.equal(dhsa.attention(Q, K, V), want)
    with torch.device("meta"):
        assert torch.equal(dhsa.attention(Q, K, V), want)


def test_tensors_that_are_not_their_memory():
    from torch._subclasses import FakeTensorMode
    from torch.masked import masked_tensor

    class Other(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    class Plain(torch.Tensor):
        pass

    mode = FakeTensorMode()
    strange = {
        "is a FakeTensor, which has a shape and no data": mode.from_tensor(Q),
        "is a MaskedTensor, which gives torch's operators": masked_tensor(Q, Q > 0),
        "is a Other, which gives torch's operators": Q.as_subclass(Other),
        "is a nested tensor": torch.nested.nested_tensor([Q[0], Q[0, :, :9]], layout=torch.jagged),
    }
    for sentence, x in strange.items():
        with pytest.raises(NotImplementedError, match=f"^q: {sentence}"):
            dhsa.attention(x, K, V)
        with pytest.raises(NotImplementedError, match=f"^attn: {sentence}"):
            dhsa.boundary_ratios(x, window=2)
    with pytest.raises(NotImplementedError, match=r"^q: is a nested tensor"):
        dhsa.attention(torch.nested.nested_tensor([Q[0], Q[0, :, :9]], layout=torch.strided), K, V)
    with mode, pytest.raises(NotImplementedError, match=r"^q: FakeTensorMode cannot run"):
        dhsa.attention(Q, K, V)
    with pytest.raises(TypeError, match=r"^q: expected a NumPy array, a torch tensor or a DLPack array, got Proxy"):
        torch.fx.symbolic_trace(lambda q: dhsa.attention(q, K, V))

    want = dhsa.attention(Q, K, V)
    assert torch.equal(dhsa.attention(Q.as_subclass(Plain), K, V), want)
    assert torch.equal(dhsa.attention(torch.nn.Parameter(Q, requires_grad=False), K, V), want)
    nothing = torch._efficientzerotensor(Q.shape)  # zeros without memory
    assert torch.equal(dhsa.attention(nothing, K, V), dhsa.attention(torch.zeros_like(Q), K, V))
    with pytest.raises(ValueError, match=r"^out: is a tensor of zeros that has no memory"):
        dhsa.attention(Q, K, V, out=nothing)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes_say_which_cast_to_make(dtype):
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(TypeError, match=f"^k: dtype is {name}, expected float32 as q; cast k to float32$"):
        dhsa.attention(Q, K.to(dtype), V.to(dtype))
    with pytest.raises(TypeError, match=f"^v: dtype is float32, expected {name} as q; cast v to {name}$"):
        dhsa.attention(Q.to(dtype), K.to(dtype), V)
    with pytest.raises(TypeError, match=f"^k: dtype is {name}, expected float32 as q; cast k to float32$"):
        dhsa.select(Q, K.to(dtype), CONFIG)
    with pytest.raises(TypeError, match=f"^out: dtype is {name}, expected float32 as q; make it with that$"):
        dhsa.attention(Q, K, V, out=torch.empty_like(Q, dtype=dtype))
