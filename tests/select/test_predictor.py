"""BoundaryPredictor: loading from every file it reads, refusing every file it should, and its logits on the vectors.

Not here: training, and the network's numbers step by step (test_select.py).
"""

import pickle
import zipfile

import numpy as np
import pytest
import vectors
from weights import random_weights

import dhsa

SMALL = dhsa.Config(budget=48, query_block=16, sink=4, local=16, dense_tail=0)


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("case", vectors.params("predict"))
def test_predictor_vectors(case):
    inputs = case.inputs
    predictor = dhsa.BoundaryPredictor.from_state_dict(
        inputs["weights"], heads=inputs["heads"], window=inputs["window"]
    )
    logits = predictor.logits(inputs["k"])
    np.testing.assert_allclose(logits[0], case.expected["logits"], rtol=1e-4, atol=1e-4)
    picked = dhsa.pick_boundaries(
        logits[0], inputs["num_chunks"], theta=inputs["theta"], nms=inputs["nms"], instruction=inputs["instruction"]
    )
    np.testing.assert_array_equal(picked, case.expected["boundaries"])


def module(torch, tensors):
    """A torch module whose parameters are these, as training leaves it."""
    whole = torch.nn.Module()
    for name, x in tensors.items():
        *path, last = name.split(".")
        part = whole
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, torch.nn.Module())
            part = getattr(part, step)
        part.register_parameter(last, torch.nn.Parameter(x))
    return whole


@pytest.mark.parametrize("gated", [False, True])
def test_predictor_files(torch, tmp_path, gated):
    pytest.importorskip("safetensors", reason="needs the predictor extra: safetensors")
    weights = random_weights(16, 12, gated)
    predictor = dhsa.BoundaryPredictor.from_state_dict(weights, heads=4, window=3)
    assert (predictor.channels, predictor.heads, predictor.hidden, predictor.window) == (16, 4, 12, 3)
    assert predictor.gated is gated
    k = normal(2, 2, 40, 8)
    want = predictor.logits(k)
    assert want.shape == (2, 40)
    assert want.dtype == np.float32
    assert (want[:, :2] == -100).all()
    assert (want[:, -3:] == -100).all()
    assert np.ptp(want[:, 2:-3]) > 0
    predictor.save(tmp_path / "p.safetensors")
    loaded = dhsa.BoundaryPredictor.load(tmp_path / "p.safetensors")
    assert (loaded.heads, loaded.window) == (4, 3)
    np.testing.assert_array_equal(loaded.logits(k), want)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(predictor)).logits(k), want)
    tensors = {name: torch.from_numpy(x) for name, x in weights.items()}
    ordered = module(torch, tensors).state_dict()  # an OrderedDict that carries metadata
    nested = {"epoch": 3, "model": {f"module.{name}": x for name, x in tensors.items()}, "best": [0.5, None, "x"]}
    transposed = {**tensors, "mlp.0.weight": tensors["mlp.0.weight"].T.contiguous().T}  # strides other than the shape's
    parameters = {name: torch.nn.Parameter(x) for name, x in tensors.items()}
    for number, contents in enumerate((tensors, ordered, nested, transposed, parameters)):
        path = tmp_path / f"{number}.pt"
        torch.save(contents, path)
        with pytest.raises(ValueError, match=r"^heads: not stored"):
            dhsa.BoundaryPredictor.load(path)
        loaded = dhsa.BoundaryPredictor.load(path, heads=4, window=3)
        np.testing.assert_array_equal(loaded.logits(k), want)
        assert np.array_equal(loaded.logits(torch.from_numpy(k)).numpy(), want)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        torch.save({name: x.to(dtype) for name, x in tensors.items()}, tmp_path / "narrow.pt")
        loaded = dhsa.BoundaryPredictor.load(tmp_path / "narrow.pt", heads=4)
        for name, x in loaded.state_dict().items():
            np.testing.assert_array_equal(x, tensors[name].to(dtype).float().numpy())


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (exec, (f"open({str(self.marker)!r}, 'w')",))


def test_checkpoint_code_is_never_executed(torch, tmp_path):
    marker = tmp_path / "executed"
    tensors = {name: torch.from_numpy(x) for name, x in random_weights(8, 4).items()}
    torch.save({**tensors, "extra": Evil(marker)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"asks for (builtins|__builtin__)\.exec"):
        dhsa.BoundaryPredictor.load(tmp_path / "evil.pt", heads=2)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(ValueError, match="only tensors and plain containers"):
        dhsa.BoundaryPredictor.load(tmp_path / "module.pt", heads=2)
    assert not marker.exists()


def rewrite(source, target, change):
    """Copies a checkpoint with its members passed through change(name, data) -> data or None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def test_damaged_checkpoints(torch, tmp_path):
    tensors = {name: torch.from_numpy(x) for name, x in random_weights(8, 4).items()}
    good = tmp_path / "good.pt"
    torch.save(tensors, good)

    def load(path):
        return dhsa.BoundaryPredictor.load(path, heads=2)

    load(good)
    bad = tmp_path / "bad.pt"
    with pytest.raises(ValueError, match="holds 100 bytes"):
        load(rewrite(good, bad, lambda name, data: data[:100] if "/data/" in name else data))
    with pytest.raises(ValueError, match="lacks good/data/"):
        load(rewrite(good, bad, lambda name, data: None if name.endswith("/data/3") else data))
    with pytest.raises(ValueError, match=r"no single data\.pkl"):
        load(rewrite(good, bad, lambda name, data: None if name.endswith("data.pkl") else data))
    with pytest.raises(ValueError, match="refused as a checkpoint"):
        load(rewrite(good, bad, lambda name, data: data[: len(data) // 2] if name.endswith("data.pkl") else data))
    bad.write_bytes(good.read_bytes()[:1000])
    with pytest.raises(ValueError, match="refused as a checkpoint"):
        load(bad)
    torch.save(tensors, bad, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="neither safetensors nor"):
        load(bad)
    torch.save({"weights": 3}, bad)
    with pytest.raises(ValueError, match="holds no state dict"):
        load(bad)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # calls a storage type
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",  # makes a tensor of nothing
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",  # sets an attribute of a class
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # asks for os.system, the short way
        b"\x80\x02cbuiltins\ngetattr\n.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # refers to a storage by a string
        b"\x80\x02((((.",
        b"\x80\x02X\xff\xff\xff\x7fabc.",  # claims 2 GiB of text
        b"not a pickle",
        b"",
    ],
)
def test_malformed_pickles(tmp_path, program):
    with zipfile.ZipFile(tmp_path / "p.pt", "w") as archive:
        archive.writestr("p/data.pkl", program)
    with pytest.raises(ValueError, match="refused as a checkpoint"):
        dhsa.BoundaryPredictor.load(tmp_path / "p.pt", heads=2)


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (5, 2), (2, 1)),
        (3, (8,), (1,)),
        (0, (2**40,), (0,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, [2], (1,)),
    ],
)
def test_checkpoint_tensors_stay_inside_their_storage(offset, shape, stride):
    from dhsa._checkpoint import rebuild_tensor

    storage = np.arange(8, dtype=np.float32)
    assert rebuild_tensor(storage, 2, (2, 3), (3, 1)).tolist() == [[2, 3, 4], [5, 6, 7]]
    with pytest.raises(pickle.UnpicklingError):
        rebuild_tensor(storage, offset, shape, stride)


def test_predictor_is_immutable():
    weights = random_weights(8, 4)
    predictor = dhsa.BoundaryPredictor.from_state_dict(weights, heads=2)
    k = normal(1, 1, 20, 8)
    want = predictor.logits(k)
    weights["mlp.2.weight"][:] = 0  # copies were made
    predictor.state_dict()["mlp.2.weight"][:] = 0
    np.testing.assert_array_equal(predictor.logits(k), want)
    with pytest.raises(AttributeError, match="immutable"):
        predictor.heads = 4
    with pytest.raises(TypeError, match="from_state_dict"):
        dhsa.BoundaryPredictor()


def test_predictor_boundaries_in_attention(make_qkv):
    predictor = dhsa.BoundaryPredictor.from_state_dict(random_weights(16, 8), heads=4)
    q, k, v = make_qkv(1, 4, 2, 100, 100, 8)
    config = SMALL.replace(boundaries="predictor", predictor=predictor, theta=-1.0)
    cuts = dhsa.boundaries(k, config)
    want = dhsa.pick_boundaries(predictor.logits(k)[0], 100 // 16 * 8, theta=-1.0, nms=8)
    np.testing.assert_array_equal(cuts[0], want)
    assert len(want) > 3
    out = dhsa.attention(q, k, v, config)
    np.testing.assert_array_equal(out, dhsa.sparse_attention(q, k, v, dhsa.select(q, k, config)))
