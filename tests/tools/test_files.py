"""Files that are damaged, hostile or cut short by a full disk: errors with sentences, in bounded memory and time."""

import argparse
import io
import json
import os
import pickle
import resource
import signal
import struct
import threading
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import dhsa
from dhsa import _checkpoint
from dhsa._checkpoint import find_state_dict, rebuild_tensor
from dhsa._files import replacing
from dhsa.commands import UserError
from dhsa.evaluation.store import Store


def checkpoint(path, program):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", program)
    return path


def refused(path):
    start = time.perf_counter()
    tracemalloc.start()  # the peak of this process may be higher already
    try:
        with pytest.raises(ValueError, match=r"refused as a checkpoint|holds no state dict"):
            dhsa.BoundaryPredictor.load(path, heads=4)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 10


def shared_tuples():
    value = ()
    for _ in range(200):
        value = (value, value)
    return value


def hidden_tuples():
    """As shared_tuples, each tuple hidden from a look at the opcode before it is stored."""
    program = b")q\x00"
    for i in range(200):
        program += b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86}bq" + bytes([i + 1])
    return b"\x80\x02}" + program + b"Ns."


def copies(one):
    """A dict of 20,000 items, memo 0, a class, memo 1, and 300 programs `one` that each make a copy of the dict."""
    names = [f"a{i}".encode() for i in range(20000)]
    items = b"".join(b"X" + struct.pack("<I", len(name)) + name + b"K\x00" for name in names)
    return b"\x80\x02]}q\x00(" + items + b"uccollections\nOrderedDict\nq\x01]" + one * 300 + b"."


PROGRAMS = {
    "ordered dicts": copies(b"h\x01h\x00\x85Ra"),
    "attributes of ordered dicts": copies(b"h\x01)Rh\x00ba"),
    "attributes of functions": copies(b"ctorch._utils\n_rebuild_tensor_v2\nh\x00ba"),
    "hidden tuples": hidden_tuples(),
    "memo index": b"\x80\x02}r" + struct.pack("<I", (1 << 30) // 16) + b".",
    "decimal memo index": b"\x80\x02}p67108864\n.",
    "byte array": b"\x80\x05\x96" + struct.pack("<Q", 1 << 32) + b".",
    "tuple as a key": b"\x80\x02}" + pickle.dumps(shared_tuples(), 2)[2:-1] + b"Ns.",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_pickles_out_of_proportion(tmp_path, name):
    refused(checkpoint(tmp_path / "x.pt", PROGRAMS[name]))


def test_dicts_that_share_their_values(tmp_path):
    inner = {f"a{i}": 0 for i in range(1500)}
    middle = {f"b{i}": inner for i in range(1500)}
    refused(checkpoint(tmp_path / "x.pt", pickle.dumps({f"c{i}": middle for i in range(1500)})))
    assert find_state_dict({"x": {"y": {"z.anchor": 1}}}, ("anchor",), 3) == {"z.anchor": 1}
    assert find_state_dict({"x": {"y": {"z": {"anchor": 1}}}}, ("anchor",), 3) is None


def test_encrypted_zip(tmp_path):
    file = io.BytesIO()
    checkpoint(file, b"\x80\x02}.")
    raw = bytearray(file.getvalue())
    raw[6] |= 1
    raw[raw.rfind(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.pt").write_bytes(raw)
    refused(tmp_path / "x.pt")


@pytest.mark.parametrize("number", ["1" * 5000, "01", "\u0661", "1000000"])
def test_numbers_of_layers(number):
    """A layer has one number: 01 and 1 would be two networks of one layer."""
    shared = {n: w for n, w in dhsa.BoundaryPredictor.default().state_dict().items() if not n.startswith("layers.")}
    own = {f"layers.{number}.{name}": weight for name, weight in shared.items()}
    with pytest.raises(ValueError, match=r"state_dict: unknown parameters layers\.") as caught:
        dhsa.BoundaryPredictor.from_state_dict(shared | own)
    assert len(str(caught.value)) < 1200


def test_many_unknown_names():
    weights = dhsa.BoundaryPredictor.default().state_dict()
    many = {f"x{i}": np.ones(1, np.float32) for i in range(1000)}
    with pytest.raises(ValueError, match=r"unknown parameters x0, x1, .*, x7 and 992 others; expected"):
        dhsa.BoundaryPredictor.from_state_dict(weights | many)


def test_offsets_before_the_file(tmp_path):
    file = io.BytesIO()
    checkpoint(file, b"\x80\x02}.")
    raw = bytearray(file.getvalue())
    end = raw.rfind(b"PK\x05\x06")
    raw[end + 16 : end + 20] = struct.pack("<I", 1 << 31)  # where the directory is said to begin
    (tmp_path / "x.pt").write_bytes(raw)
    refused(tmp_path / "x.pt")


def test_tensors_over_one_storage_are_views():
    storage = np.arange(12, dtype=np.float32)
    assert all(np.shares_memory(rebuild_tensor(storage, 0, (3, 4), (4, 1)), storage) for _ in range(3))


def test_deep_metadata(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    weights = dhsa.BoundaryPredictor.default().state_dict()
    save_file(weights, tmp_path / "x.safetensors", metadata={"model": "[" * 200000, "window": "4"})
    with pytest.raises(ValueError, match="expected a JSON object") as caught:
        dhsa.BoundaryPredictor.load(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 1000


def test_tensors_over_one_storage_are_bounded_together(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    weight = torch.zeros(1024)
    torch.save({f"layers.{i}.mlp.0.weight": weight for i in range(100)}, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 32 << 10
    assert len(_checkpoint.read_checkpoint(str(tmp_path / "x.pt"), ("mlp.0.weight",))) == 100
    monkeypatch.setattr(_checkpoint, "MAX_STORAGE_BYTES", 99 * 4096)
    with pytest.raises(ValueError, match="its tensors take more than 405504 bytes"):
        _checkpoint.read_checkpoint(str(tmp_path / "x.pt"), ("mlp.0.weight",))


@pytest.fixture
def room():
    """Sets how large a file may become; writes beyond it are cut short, then refused, as on a full disk."""
    held, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size=None: resource.setrlimit(resource.RLIMIT_FSIZE, (held[0] if size is None else size, held[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, held)
    signal.signal(signal.SIGXFSZ, handler)


def test_short_write_of_a_row(tmp_path, room):
    path = tmp_path / "results.jsonl"
    store = Store(path)
    store.add({"key": "first"})
    whole = path.read_bytes()
    room(len(whole) + 30)
    with pytest.raises(UserError, match="--out"):
        store.add({"key": "torn", "x": "y" * 50})
    room()
    assert path.read_bytes() == whole
    assert "torn" not in store
    store.add({"key": "after"})
    assert list(Store(path).rows) == ["first", "after"]


def test_every_byte_of_a_row_counts(tmp_path):
    """A report is made of what rows say: one that says another thing than was measured is damage, whatever it is."""
    path = tmp_path / "results.jsonl"
    row = {"key": "a", "task": "ppl", "nll": 2.5, "facts": {"hit": True, "words": ["é", None]}}
    Store(path).add(row)
    assert Store(path).rows == {"a": row}
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for at in range(len(whole) - 1):
        raw = bytearray(whole)
        raw[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(raw)
        store = Store(path)
        assert not store.rows or {name: store.rows["a"][name] for name in row} == row  # besides: a sum's other name
        refused += store.damaged > 0
    assert refused > 0.9 * len(whole)
    path.write_text(json.dumps(row) + "\n")  # of an earlier version, which wrote no sums
    assert Store(path).rows == {"a": row}


def test_deeply_nested_row_is_damage(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"key": "a"}) + "\n" + "[" * 200000 + "\n")
    store = Store(path)
    assert list(store.rows) == ["a"]
    assert store.damaged == 1


def test_a_failed_save_leaves_the_old_file(tmp_path, room):
    path = tmp_path / "x.safetensors"
    predictor = dhsa.BoundaryPredictor.default()
    predictor.save(path)
    whole = path.read_bytes()
    room(1000)
    with pytest.raises(OSError, match="cannot be written"):
        predictor.save(path)
    room()
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / "x.safetensors"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(OSError, match=f"{name.name}: is not a regular file"):
            dhsa.BoundaryPredictor.default().save(name)
    assert sorted(tmp_path.iterdir()) == sorted([path, link])
    assert path.is_fifo() if kind == "pipe" else path.is_dir()


def test_a_report_that_cannot_be_written(tmp_path):
    pytest.importorskip("rich")
    from dhsa.evaluation import command

    (tmp_path / "report.md").mkdir()
    with pytest.raises(UserError, match="--out: the report cannot be written"):
        command._report([], argparse.Namespace(out=tmp_path), None)
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize("contents", [b"", bytes(100), b"hello", "half", "other"])
def test_damaged_training_state(tmp_path, contents):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tiny import build

    from dhsa import training

    state = tmp_path / "x.state"
    torch.save({"a": 1}, state)
    if contents != "other":
        state.write_bytes(state.read_bytes()[:300] if contents == "half" else contents)
    pieces = [[i % 90 + 1 for i in range(200)]]
    with pytest.raises(UserError, match=r"cannot be read as the state of a training.*remove it"):
        training.train(build("llama"), training.Text(pieces, pieces, ""), training.Settings(tokens=256), state=state)
    assert state.exists()


def test_a_bit_of_a_training_state_that_fell_over(tmp_path):
    """torch.load does not look at the checksums: the training would go on from other weights."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tiny import build

    from dhsa import training

    class Enough(Exception):
        pass

    def stop(done):
        raise Enough

    state, pieces = tmp_path / "x.state", [[i % 90 + 1 for i in range(100)]]
    args = build("llama"), training.Text(pieces, pieces, ""), training.Settings(tokens=128, epochs=1)
    with pytest.raises(Enough):
        training.train(*args, state=state, keep=stop)
    with pytest.raises(Enough):
        training.train(*args, state=state, keep=stop)
    weights = next(iter(torch.load(state, weights_only=True)["learners"].values()))["network"]
    number = next(x for x in weights.values() if x.numel() > 4).numpy().tobytes()
    raw = bytearray(state.read_bytes())
    raw[raw.index(number)] ^= 1
    state.write_bytes(raw)
    with pytest.raises(UserError, match=r"cannot be read as the state of a training.*Bad CRC-32.*remove it"):
        training.train(*args, state=state, keep=stop)
    raw[raw.index(b"data.pkl")] ^= 1
    state.write_bytes(raw)
    with pytest.raises(UserError, match=r"cannot be read as the state of a training.*remove it"):
        training.train(*args, state=state, keep=stop)


def test_threads_that_replace_one_file(tmp_path):
    """Both write at the same time; the file is that of the one that ends last, and nothing else is left."""
    both, path = threading.Barrier(2), tmp_path / "x"

    def write(data):
        with replacing(path) as part:
            part.write_bytes(data[:1])
            both.wait(60)
            with open(part, "ab") as file:
                file.write(data[1:])
            both.wait(60)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, (b"a" * 1000, b"b" * 2000)))
    assert path.read_bytes() in (b"a" * 1000, b"b" * 2000)
    assert list(tmp_path.iterdir()) == [path]
