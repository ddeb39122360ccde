"""Caches in files: what follows a loaded cache is what would have followed in the process that made it, appending
leaves the file and the keys where they are, and files that are not what they should be are refused."""

import copy
import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the hf extra: transformers")

from tiny import EXACT, SPARSE, build, padded, tokens  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf import saved  # noqa: E402
from dhsa.hf.compat import cache_option  # noqa: E402

STEPS = SPARSE.replace(decode="dhsa")
CONFIGS = {"exact": EXACT, "sparse": SPARSE, "sparse steps": STEPS, "eager": None}
LENGTH = 420


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def read(model, ids, pieces=(LENGTH,), **options):
    """A cache into which the ids were read, in pieces that end at these places."""
    cache, start = transformers.DynamicCache(config=model.config), 0
    for end in pieces:
        model(ids[:, start:end], **cache_option(model, cache), **{k: v[:, :end] for k, v in options.items()})
        start = end
    return cache


def generated(model, ids, cache, new=8, **options):
    """Ids and the logits of each step."""
    out = model.generate(
        ids, **cache_option(model, cache), max_new_tokens=new, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def made(config="sparse", family="llama", dtype=torch.float32, **changes):
    model = build(family, **changes).to(dtype)
    return model if CONFIGS[config] is None else dhsa.patch(model, CONFIGS[config])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(model, ids, path): a file of Gemma 2, which has both kinds of layers; tests do not change it."""
    with torch.no_grad():
        model, ids = made("sparse steps", "gemma2"), tokens(1, LENGTH)
        path = tmp_path_factory.mktemp("saved") / "one.safetensors"
        dhsa.save_cache(read(model, ids), path, model=model, tokens=ids)
    return model, ids, path


# ---- what follows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", [1, 30, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "qwen2"])
@pytest.mark.parametrize("config", CONFIGS)
def test_what_follows_is_that_of_the_unbroken_run(config, family, dtype, question, tmp_path):
    """To the bit. The prompt came in pieces, so that it is cut elsewhere than a whole one would be: cuts are kept."""
    model, ids = made(config, family, dtype), tokens(1, LENGTH)
    cache = read(model, ids, (200, 333, LENGTH))
    path = tmp_path / "prompt.safetensors"
    dhsa.save_cache(cache, path, model=model, tokens=ids)
    prompt = torch.cat([ids, tokens(1, question, seed=5)], 1)
    expected = generated(model, prompt, cache)
    loaded = dhsa.load_cache(path, model, prompt=prompt)
    assert isinstance(loaded, transformers.DynamicCache)
    assert loaded.get_seq_length() == LENGTH
    torch.testing.assert_close(loaded.tokens, ids, rtol=0, atol=0)
    found = generated(model, prompt, loaded)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert found[1].std() > 0.01
    assert loaded.get_seq_length() == cache.get_seq_length() == LENGTH + question + 7
    if config == "sparse steps":
        paths = [run.path for run in dhsa.last_run(model)]
        assert (
            paths == ["sparse" if run.kind == "full" else "window" for run in dhsa.last_run(model)] or "sparse" in paths
        )


@pytest.mark.parametrize("config", ["exact", "sparse steps"])
def test_padded_batches(config, tmp_path):
    model = made(config)
    ids, mask = padded([LENGTH, 371], LENGTH, "left")
    cache = transformers.DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=positions, **cache_option(model, cache))
    dhsa.save_cache(cache, tmp_path / "batch", model=model, tokens=ids)
    prompt = torch.cat([ids, tokens(2, 20, seed=5)], 1)
    whole = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], 1)
    expected = generated(model, prompt, cache, attention_mask=whole)
    found = generated(model, prompt, dhsa.load_cache(tmp_path / "batch", model), attention_mask=whole)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 3, "num_beams": 4}], ids=str)
def test_beams(one, options):
    """Reordered caches lie elsewhere, and go on there."""
    model, ids, path = one
    prompt, found = torch.cat([ids, tokens(1, 9, seed=5)], 1), []
    for cache in (read(model, ids), dhsa.load_cache(path, model)):
        cache.batch_repeat_interleave(options["num_beams"])
        found.append(model.generate(prompt, **cache_option(model, cache), max_new_tokens=8, do_sample=False, **options))
    torch.testing.assert_close(*found)
    assert found[0].shape == (options.get("num_return_sequences", 1), LENGTH + 17)


def test_copies_and_crops_go_on_by_themselves(one):
    _, ids, path = one
    llama = made("sparse")
    cache = read(llama, ids)
    other = path.with_name("llama")
    dhsa.save_cache(cache, other, model=llama, tokens=ids)
    loaded = dhsa.load_cache(other, llama)
    twin = copy.deepcopy(loaded)
    first, second = (torch.cat([ids, tokens(1, 12, seed=seed)], 1) for seed in (5, 6))
    expected = [generated(llama, prompt, read(llama, ids))[1] for prompt in (first, second)]
    assert not torch.equal(*expected)
    torch.testing.assert_close(generated(llama, first, loaded)[1], expected[0])
    torch.testing.assert_close(generated(llama, second, twin)[1], expected[1])
    loaded.crop(LENGTH - loaded.get_seq_length())
    assert loaded.get_seq_length() == LENGTH
    torch.testing.assert_close(generated(llama, second, loaded)[1], expected[1])


def test_two_caches_of_a_file_are_two(one):
    model, ids, path = one
    before = path.read_bytes()
    one, two = dhsa.load_cache(path, model), dhsa.load_cache(path, model)
    first, second = (torch.cat([ids, tokens(1, 12, seed=seed)], 1) for seed in (5, 6))
    expected = generated(model, second, read(model, ids))[1]
    generated(model, first, one)
    torch.testing.assert_close(generated(model, second, two)[1], expected, rtol=0, atol=0)
    assert path.read_bytes() == before
    path.with_name("copy").write_bytes(before)
    three = dhsa.load_cache(path.with_name("copy"), model)
    path.with_name("copy").unlink()  # what is mapped stays
    torch.testing.assert_close(generated(model, second, three)[1], expected, rtol=0, atol=0)


# ---- where keys lie --------------------------------------------------------------------------------------------------


def test_appending_copies_nothing_until_the_room_is_used_up(one):
    model, _, path = one
    layer = dhsa.load_cache(path, model).layers[1]
    assert type(layer) is saved.RoomyLayer
    at, before = layer.keys.data_ptr(), layer.keys.clone()
    room = saved._room(LENGTH)
    new = torch.randn(1, 2, room + 1, 32)
    for i in range(room):
        keys, _ = layer.update(new[:, :, i : i + 1], -new[:, :, i : i + 1])
        assert keys is layer.keys
        assert keys.data_ptr() == at
    layer.update(new[:, :, room:], -new[:, :, room:])
    assert layer.keys.data_ptr() != at
    torch.testing.assert_close(layer.keys, torch.cat([before, new], 2), rtol=0, atol=0)
    torch.testing.assert_close(layer.values[:, :, LENGTH:], -new, rtol=0, atol=0)
    at = layer.keys.data_ptr()
    layer.update(new[:, :, :1], new[:, :, :1])
    assert layer.keys.data_ptr() == at
    assert layer.get_seq_length() == LENGTH + room + 2


def test_what_was_appended_is_not_overwritten(one):
    """After a crop, and by a shallow copy: neither earlier views nor the other cache change."""
    model, _, path = one
    loaded = dhsa.load_cache(path, model)
    layer = loaded.layers[1]
    new = torch.randn(3, 1, 2, 4, 32)
    before, _ = layer.update(new[0], -new[0])
    kept = before.clone()
    layer.crop(-2)
    layer.update(new[1], -new[1])
    torch.testing.assert_close(before, kept, rtol=0, atol=0)
    expected = torch.cat([kept[:, :, :-2], new[1]], 2)
    torch.testing.assert_close(layer.keys, expected, rtol=0, atol=0)
    at = layer.keys.data_ptr()
    twin = copy.copy(layer)
    layer.update(new[0], -new[0])
    assert layer.keys.data_ptr() == at  # where the end is its own, nothing is copied
    twin.update(new[2], -new[2])
    torch.testing.assert_close(layer.keys, torch.cat([expected, new[0]], 2), rtol=0, atol=0)
    torch.testing.assert_close(twin.keys, torch.cat([expected, new[2]], 2), rtol=0, atol=0)
    torch.testing.assert_close(twin.values[:, :, LENGTH + 2 :], torch.cat([-new[1], -new[2]], 2), rtol=0, atol=0)


def test_inference_mode_and_gradients(one):
    model, _, path = one
    with torch.inference_mode():
        loaded = dhsa.load_cache(path, model)
        layer = loaded.layers[1]
        layer.update(torch.randn(1, 2, 200, 32), torch.randn(1, 2, 200, 32))
    layer.update(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32))
    with torch.enable_grad():
        new = torch.randn(1, 2, 1, 32, requires_grad=True)
        keys, _ = layer.update(new, new)
        assert keys.requires_grad
        keys[:, :, -1].sum().backward()
    assert new.grad.sum() == 64
    assert layer.get_seq_length() == LENGTH + 202


def test_what_is_known_of_chunks_is_kept(tmp_path):
    model, ids = made("sparse steps"), tokens(1, LENGTH)
    cache = read(model, ids, (300, LENGTH))
    kept = [next(iter(layer._dhsa_kept.key_indexes.values())) for layer in cache.layers]
    dhsa.save_cache(cache, tmp_path / "one", model=model, tokens=ids)
    loaded = dhsa.load_cache(tmp_path / "one", model)
    dhsa.save_cache(loaded, tmp_path / "two", model=model, tokens=ids)  # before any of it was needed
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    again = dhsa.load_cache(tmp_path / "two", model)
    assert [layer._dhsa_kept.at((0, 0)).to_bytes() for layer in again.layers] == [index.to_bytes() for index in kept]
    assert len(kept[0].boundaries) > 20
    assert again.layers[0]._dhsa_kept.unchanged(again.layers[0]) == LENGTH


def test_another_config_cuts_loaded_keys_anew(tmp_path):
    model, ids, more = made("sparse steps"), tokens(1, LENGTH), tokens(1, 1, seed=3)
    cache = read(model, ids)
    dhsa.save_cache(cache, tmp_path / "one", model=model, tokens=ids)
    for layer in cache.layers:
        del layer._dhsa_kept
    with dhsa.patched(model, STEPS.replace(chunk_size=16)):
        loaded = dhsa.load_cache(tmp_path / "one", model)
        found, expected = (model(more, **cache_option(model, c)).logits for c in (loaded, cache))
        assert dhsa.last_run(model, "decode")[0].path == "sparse"
    assert torch.equal(found, expected)


def test_after_generate_the_last_token_is_not_in_the_cache(tmp_path):
    model, ids, cache = made("sparse steps"), tokens(1, LENGTH), transformers.DynamicCache()
    out = generated(model, ids, cache, new=10)[0]
    with pytest.raises(
        ValueError, match=r"tokens: \[1, 430\] ids, but layer 0 .* 429 tokens of 1 seq.*all but the last"
    ):
        dhsa.save_cache(cache, tmp_path / "x", model=model, tokens=out)
    dhsa.save_cache(cache, tmp_path / "x", model=model, tokens=out[:, :-1])
    expected = generated(model, out, cache)
    found = generated(model, out, dhsa.load_cache(tmp_path / "x", model))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_another_attention_may_go_on(one):
    """What was read sparse may be continued exact, as in one process."""
    model, ids, path = one
    assert dhsa.load_cache(path, model).attention == repr(STEPS)
    prompt = torch.cat([ids, tokens(1, 12, seed=5)], 1)
    cache = read(model, ids)
    with dhsa.patched(model, EXACT):
        expected = generated(model, prompt, cache)[1]
        torch.testing.assert_close(generated(model, prompt, dhsa.load_cache(path, model))[1], expected, rtol=0, atol=0)


def test_the_attention_that_read_it_is_noted(tmp_path, monkeypatch):
    from dhsa.hf import switching

    ids = tokens(1, 40)

    def noted(model):
        dhsa.save_cache(read(model, ids, (40,)), tmp_path / "x", model=model, tokens=ids)
        return dhsa.load_cache(tmp_path / "x", model).attention

    assert noted(build("llama", "sdpa")) == "sdpa"
    model = build("llama", "dhsa")
    assert noted(model) == repr(dhsa.Config())
    monkeypatch.setattr(switching, "DEFAULT", SPARSE)  # as `python -m dhsa run` does
    assert noted(model) == repr(SPARSE)
    assert noted(dhsa.patch(model, STEPS)) == repr(STEPS)
    assert noted(dhsa.patch(model, STEPS, layers=[2, 0])) == f"{STEPS!r} in layers [0, 2]"
    assert noted(dhsa.patch(model, STEPS, layers=[])) == f"{STEPS!r} in layers []"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bits(dtype, tmp_path):
    model, ids = made("sparse steps", "gemma2", dtype), tokens(1, LENGTH)
    cache = read(model, ids)
    dhsa.save_cache(cache, tmp_path / "plain", model=model, tokens=ids)
    dhsa.save_cache(cache, tmp_path / "small", model=model, tokens=ids, bits=8)
    loaded = dhsa.load_cache(tmp_path / "small", model)
    for layer, other in zip(loaded.layers, cache.layers, strict=True):
        assert layer.keys.dtype == dtype
        for x, y in ((layer.keys, other.keys), (layer.values, other.values)):
            x, y = x.float(), y.float()
            most = y.abs().amax(-1, keepdim=True)
            assert ((x - y).abs() <= most * (1 / 254 + 1e-6 + (dtype == torch.bfloat16) / 256)).all()
            assert 1e-4 < (x - y).norm() / y.norm() < 0.01
    sizes = [sum(e.stop - e.start for n, e in entries(tmp_path / name).items() if n.startswith("layers.1.keys"))
             for name in ("plain", "small")]  # fmt: skip
    rows = LENGTH + saved._room(LENGTH)
    assert sizes == [2 * rows * 32 * dtype.itemsize, 2 * LENGTH * 36]
    prompt = torch.cat([ids, tokens(1, 12, seed=5)], 1)
    expected, found = generated(model, prompt, cache)[1][0], generated(model, prompt, loaded)[1][0]
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_numbers_that_eight_bits_cannot_hold(tmp_path):
    model, ids = made("exact"), tokens(1, 40)
    cache = read(model, ids, (40,))
    cache.layers[2].values[0, 0, 7, 3] = torch.inf
    with pytest.raises(ValueError, match=r"bits: layers\.2\.values has numbers that are not finite"):
        dhsa.save_cache(cache, tmp_path / "x", model=model, tokens=ids, bits=8)
    assert not list(tmp_path.iterdir())
    dhsa.save_cache(cache, tmp_path / "x", model=model, tokens=ids)
    assert dhsa.load_cache(tmp_path / "x", model).layers[2].values[0, 0, 7, 3] == torch.inf
    cache.layers[2].values[:] = 0
    dhsa.save_cache(cache, tmp_path / "x", model=model, tokens=ids, bits=8)
    assert not dhsa.load_cache(tmp_path / "x", model).layers[2].values.any()


# ---- the file --------------------------------------------------------------------------------------------------------


def entries(path):
    with open(path, "rb") as file:
        return saved.read_header(file)[1]


def test_the_library_of_the_format_reads_it(one):
    model, ids, path = one
    safetensors = pytest.importorskip("safetensors", reason="needs the predictor extra: safetensors")
    loaded = dhsa.load_cache(path, model)
    with safetensors.safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(entries(path))
        torch.testing.assert_close(file.get_tensor("tokens"), ids)
        for i, layer in enumerate(loaded.layers):
            held = file.get_tensor(f"layers.{i}.keys")
            torch.testing.assert_close(held[:, :, : layer.keys.shape[2]], layer.keys, rtol=0, atol=0)
            assert not held[:, :, layer.keys.shape[2] :].any()
        assert json.loads(file.metadata()["dhsa"])["format"] == saved.FORMAT


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=repr)
def test_a_file_is_whole_or_not_there(error, one, tmp_path, monkeypatch):
    model, ids, path = one
    cache, count = read(model, ids), []

    def pieces(held, room):
        count.append(1)
        if len(count) == 4:
            raise error
        yield from original(held, room)

    original = saved._pieces
    monkeypatch.setattr(saved, "_pieces", pieces)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        dhsa.save_cache(cache, tmp_path / "x", model=model, tokens=ids)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x").write_bytes(path.read_bytes())
    count.clear()
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        dhsa.save_cache(cache, tmp_path / "x", model=model, tokens=ids)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.lm_head.weight.mul_(1.001), "other weights"),
        (lambda m: m.model.layers[3].mlp.down_proj.weight.add_(1e-3), "other weights"),
        (lambda m: setattr(m.config, "rope_theta", 7.5), r"rope_theta=None, expected 7\.5"),
        (lambda m: m.to(torch.bfloat16), "other weights|dtype"),
    ],
)
def test_a_changed_model_is_another(change, message, tmp_path):
    model, ids = build("llama"), tokens(1, 40)
    dhsa.save_cache(read(model, ids, (40,)), tmp_path / "x", model=model, tokens=ids)
    dhsa.load_cache(tmp_path / "x", build("llama", "sdpa"))
    change(model)
    with pytest.raises(ValueError, match=rf"^{tmp_path / 'x'}: was made with a model .*({message})"):
        dhsa.load_cache(tmp_path / "x", model)
    with pytest.raises(ValueError, match="was made with a LlamaForCausalLM, expected a Gemma2ForCausalLM"):
        dhsa.load_cache(tmp_path / "x", build("gemma2"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls transformers by names of before
def test_adapters_are_part_of_a_model(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    ids = tokens(1, 40)
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    dhsa.save_cache(read(model, ids, (40,)), tmp_path / "x", model=model, tokens=ids)
    dhsa.load_cache(tmp_path / "x", model)
    with pytest.raises(ValueError, match="other weights"):
        dhsa.load_cache(tmp_path / "x", build("llama"))
    with model.disable_adapter(), pytest.raises(ValueError, match="other weights"):
        dhsa.load_cache(tmp_path / "x", model)


def test_another_prompt(one):
    model, ids, path = one
    other = ids.clone()
    other[0, 17] += 1
    with pytest.raises(
        ValueError, match=rf"another prompt: token 17 of row 0 is {ids[0, 17]}, expected {ids[0, 17] + 1}"
    ):
        dhsa.load_cache(path, model, prompt=other)
    with pytest.raises(
        ValueError, match=r"holds \[1, 420\] tokens, expected a prompt that begins.* got \[1, 419\] ids"
    ):
        dhsa.load_cache(path, model, prompt=ids[:, :-1])
    with pytest.raises(ValueError, match=r"got \[2, 420\] ids"):
        dhsa.load_cache(path, model, prompt=ids.repeat(2, 1))
    assert dhsa.load_cache(path, model, prompt=ids[0].tolist()).get_seq_length() == LENGTH


# ---- files that are not what they should be --------------------------------------------------------------------------


NO_FILE = "is cut short, was changed or is no safetensors file, expected a whole one: "


def parts_of(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header, body):
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + body


def with_about(data, change):
    """The file with other metadata, whose checksum is right."""
    import hashlib

    header, body = parts_of(data)
    about = json.loads(header["__metadata__"]["dhsa"])
    about = change(about) or about
    text = json.dumps(about)
    header["__metadata__"] |= {"dhsa": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return joined(header, body)


def refused(tmp_path, model, data, message=""):
    path = tmp_path / "bad"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        dhsa.load_cache(path, model)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 500


def test_cut_short_or_longer(one, tmp_path):
    model, _, path = one
    data = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 500, 5000, len(data) // 2, len(data) - 1):
        refused(tmp_path, model, data[:size], NO_FILE)
    refused(tmp_path, model, data + b"\0", NO_FILE)


def test_a_file_that_is_replaced_while_it_is_opened(one, tmp_path, monkeypatch):
    """The header that was checked is not that of the file that is open."""
    import safetensors

    model, _, path = one
    data, bad, opening = path.read_bytes(), tmp_path / "bad", safetensors.safe_open
    bad.write_bytes(data)
    (tmp_path / "new").write_bytes(data)

    def replaced(*args, **kwargs):
        os.replace(tmp_path / "new", bad)
        return opening(*args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", replaced)
    with pytest.raises(ValueError, match=f"^{bad}: was replaced while it was opened"):
        dhsa.load_cache(bad, model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUF" + bytes(100), NO_FILE),
        ((2).to_bytes(8, "little") + b"{}", "without metadata of dhsa"),
        ((2).to_bytes(8, "little") + b"[]", NO_FILE),
        ((2).to_bytes(8, "little") + b"\xff\xff", NO_FILE),
        ((5).to_bytes(8, "little") + b"[NaN]", NO_FILE),
        ((8).to_bytes(8, "little") + b'{"a":1}' + b" ", NO_FILE),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, NO_FILE),
        ((2**63).to_bytes(8, "little") + bytes(100), NO_FILE),
        (joined({"__metadata__": {"dhsa": 3}}, b""), NO_FILE),
        (joined({"__metadata__": {"dhsa": "["}}, b""), "metadata that cannot be read"),
        (joined({"__metadata__": {"dhsa": "[]"}}, b""), "metadata that cannot be read"),
        (joined({"__metadata__": {"dhsa": '{"format": 1}'}}, b""), "metadata that were changed"),
        (joined({"__metadata__": {"dhsa": '{"format": 1e3}'}}, b""), "metadata that cannot be read"),
        (joined({"__metadata__": {"dhsa": '{"format": 2}'}}, b""), "of format 2, expected 1.*a newer version"),
    ],
)
def test_no_such_file(data, message, one, tmp_path):
    refused(tmp_path, one[0], data, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["tokens"].update(shape=[1, 421]), NO_FILE),
        (lambda h: h["tokens"].update(shape=[-1, 420]), NO_FILE),
        (lambda h: h["tokens"].update(shape=[True, 420]), NO_FILE),
        (lambda h: h["tokens"].update(shape=[2**40] * 8), NO_FILE),
        (lambda h: h["tokens"].update(shape=420), NO_FILE),
        (lambda h: h["tokens"].update(shape=[420]), r"of I64 \[420\], expected I64 \[1, 420\]"),
        (lambda h: h["tokens"].update(dtype="F64"), "of F64"),
        (lambda h: h["tokens"].update(dtype=["I64"]), NO_FILE),
        (lambda h: h["tokens"].update(data_offsets=[0, 3360]), NO_FILE),
        (lambda h: h["tokens"].update(data_offsets=[2**63, 2**63 + 3360]), NO_FILE),
        (lambda h: h["tokens"].pop("dtype"), NO_FILE),
        (lambda h: h.update(tokens=list(h["tokens"].values())), NO_FILE),
        (lambda h: h.update(more={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "metadata say nothing"),
        (lambda h: h.update(note=h.pop("tokens")), "no tensor 'tokens'"),
        (lambda h: h["__metadata__"].pop("sha256"), "metadata that were changed"),
        (lambda h: h["__metadata__"].update(dhsa=h["__metadata__"]["dhsa"].replace("420", "419")), "were changed"),
    ],
)
def test_changed_headers(change, message, one, tmp_path):
    model, _, path = one
    header, body = parts_of(path.read_bytes())
    change(header)
    refused(tmp_path, model, joined(header, body), message)


def test_changed_ids(one, tmp_path):
    model, _, path = one
    data, at = bytearray(path.read_bytes()), entries(path)["tokens"].start
    data[at] ^= 1
    refused(tmp_path, model, bytes(data), "token ids that were changed")


@pytest.mark.parametrize("part", [0, 0.3, 0.6, 0.999])
def test_a_changed_index_is_refused_when_it_is_needed(part, one, tmp_path):
    model, ids, path = one
    data = bytearray(path.read_bytes())
    entry = next(e for name, e in entries(path).items() if ".index." in name)
    data[entry.start + int(part * (entry.stop - entry.start))] ^= 1
    (tmp_path / "bad").write_bytes(data)
    loaded = dhsa.load_cache(tmp_path / "bad", model)
    told = f"^{tmp_path / 'bad'}: the key index of a layer is damaged: its bytes are not those of its checksum"
    with pytest.raises(ValueError, match=told):
        dhsa.save_cache(loaded, tmp_path / "again", model=model, tokens=ids)
    with pytest.raises(ValueError, match=told):
        generated(model, torch.cat([ids, ids[:, :2]], 1), loaded)


def test_an_index_that_is_none_is_refused_when_it_is_needed(one, tmp_path):
    """Its checksum is right, but its bytes are no key index."""
    import hashlib

    model, ids, path = one
    data = bytearray(path.read_bytes())
    name, entry = next((name, e) for name, e in entries(path).items() if ".index." in name)
    layer, row, start = (int(n) for n in name.split(".") if n.isdecimal())
    data[entry.start : entry.stop] = bytes(entry.stop - entry.start)

    def change(about):
        (at,) = (at for at in about["layers"][layer]["index"] if at[:2] == [row, start])
        at[2] = hashlib.sha256(bytes(entry.stop - entry.start)).hexdigest()

    (tmp_path / "bad").write_bytes(with_about(bytes(data), change))
    loaded = dhsa.load_cache(tmp_path / "bad", model)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'bad'}: the key index of a layer is damaged: (?!its bytes)"):
        generated(model, torch.cat([ids, ids[:, :2]], 1), loaded)


def leaves(value, at=()):
    if isinstance(value, dict):
        for key in value:
            yield (*at, key)
            yield from leaves(value[key], (*at, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield (*at, i)
            yield from leaves(value[i], (*at, i))


VALUES = (-1, 0, 1, 3, 419, 2**31, 2**70, 1.5, True, "x", None, [], {}, [1, 2], [[0, 0], [0, 0]])


def opened(path, model):
    """The cache of a file, or None if it is refused by a sentence that names it."""
    try:
        return dhsa.load_cache(path, model)
    except ValueError as refusal:
        said = str(refusal)
    assert said.startswith(f"{path}: ")
    assert "unpack" not in said
    return None


def test_metadata_changed_on_purpose(one, tmp_path):
    """Every entry is replaced by every kind of value: the file is refused, or the cache works."""
    model, ids, path = one
    data = path.read_bytes()
    about = json.loads(parts_of(data)[0]["__metadata__"]["dhsa"])
    places = [at for at in leaves(about) if at[:2] != ("model", "config")]
    assert len(places) > 40
    refusals = 0
    prompt = torch.cat([ids, ids[:, :3]], 1)
    for at in places:
        for value in VALUES:

            def change(about, at=at, value=value):
                *way, last = at
                for step in way:
                    about = about[step]
                about[last] = value

            (tmp_path / "bad").write_bytes(with_about(data, change))
            loaded = opened(tmp_path / "bad", model)
            if loaded is None:
                refusals += 1
                continue
            said = repr(about)
            change(about_now := json.loads(json.dumps(about)))
            same = repr(about_now) == said
            assert same or at[-1] in ("attention", "window", "index", "cuts", 0, 1) or value is True, (at, value)
            generated(model, prompt, loaded, new=1)
    assert refusals > 0.9 * len(places) * len(VALUES) - 30


def test_random_bytes(one, tmp_path):
    """A header with any of its bytes changed gives a sentence or a cache."""
    model, _, path = one
    data, rng = path.read_bytes(), np.random.default_rng(0)
    size = 8 + int.from_bytes(data[:8], "little")
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(0, size)] = rng.integers(0, 256)
        (tmp_path / "bad").write_bytes(changed)
        opened(tmp_path / "bad", model)


def test_what_is_no_file(one, tmp_path):
    model, ids, _ = one
    with pytest.raises(FileNotFoundError, match="nothing"):
        dhsa.load_cache(tmp_path / "nothing", model)
    with pytest.raises(ValueError, match="is not a regular file"):
        dhsa.load_cache(tmp_path, model)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a regular file"):
        dhsa.load_cache(tmp_path / "pipe", model)
    with pytest.raises(OSError, match="not a regular file"):
        dhsa.save_cache(read(model, ids), tmp_path / "pipe", model=model, tokens=ids)
    with pytest.raises(FileNotFoundError):
        dhsa.save_cache(read(model, ids), tmp_path / "no" / "folder", model=model, tokens=ids)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_arguments_of_load(one):
    model, _, path = one
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got str"):
        dhsa.load_cache(path, "model")
    with pytest.raises(TypeError, match="NoneType"):
        dhsa.load_cache(None, model)
    with pytest.raises(TypeError, match=r"prompt: expected ids \[B, L\], got str"):
        dhsa.load_cache(path, model, prompt="text")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cache": None}, TypeError, "cache: expected a transformers DynamicCache, got NoneType"),
        ({"cache": ()}, TypeError, "cache: expected a transformers DynamicCache, got tuple"),
        ({"cache": "static"}, TypeError, "cache: expected a transformers DynamicCache, got StaticCache"),
        ({"cache": "empty"}, ValueError, "cache: is empty"),
        ({"cache": "quantized"}, NotImplementedError, "cache: layer 1 is a BaseQuantized"),
        ({"cache": "float64"}, NotImplementedError, r"keys of layer 0 are torch.float64, expected one of bfloat16, fl"),
        (
            {"cache": "mixed"},
            NotImplementedError,
            "cache: has layers of torch.float16, torch.float32, expected one dtype",
        ),
        ({"cache": "meta"}, NotImplementedError, "keys of layer 0 are on meta, expected cpu"),
        ({"cache": "values"}, ValueError, "layer 0 holds 40 keys and 39 values"),
        ({"model": None}, TypeError, "model: expected a transformers PreTrainedModel, got NoneType"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: .* which wraps none"),
        ({"tokens": None}, TypeError, r"tokens: expected ids \[B, L\], got NoneType"),
        ({"tokens": "text"}, TypeError, r"tokens: expected ids \[B, L\], got str"),
        ({"tokens": torch.zeros(1, 40)}, TypeError, "tokens: expected ids of an integer dtype, got torch.float32"),
        ({"tokens": torch.zeros(1, 40, dtype=torch.bool)}, TypeError, "integer dtype, got torch.bool"),
        ({"tokens": torch.zeros(1, 1, 40, dtype=torch.long)}, ValueError, r"got shape \[1, 1, 40\]"),
        ({"tokens": []}, (TypeError, ValueError), "tokens: expected ids"),
        ({"tokens": torch.zeros(1, 39, dtype=torch.long)}, ValueError, r"\[1, 39\] ids, but layer 0 .* 40 tokens"),
        ({"tokens": torch.zeros(2, 40, dtype=torch.long)}, ValueError, r"\[2, 40\] ids, but layer 0 .* of 1 seq"),
        ({"bits": 4}, ValueError, "bits: got 4, expected 8 or None"),
        ({"bits": True}, ValueError, "bits: got True"),
        ({"bits": "8"}, ValueError, "bits: got '8'"),
        ({"path": 3.5}, TypeError, "path|float"),
    ],
)
def test_arguments_of_save(change, error, message, tmp_path):
    model, ids = made("eager"), tokens(1, 40)
    cache = read(model, ids, (40,))
    first = cache.layers[0]
    if change.get("cache") == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    elif change.get("cache") == "empty":
        cache = transformers.DynamicCache(config=model.config)
    elif change.get("cache") == "quantized":
        cache.layers[1] = type("BaseQuantizedLayer", (type(first),), {})()
    elif change.get("cache") == "float64":
        first.keys = first.keys.double()
    elif change.get("cache") == "mixed":
        first.keys, first.values = first.keys.half(), first.values.half()
    elif change.get("cache") == "meta":
        first.keys = first.keys.to("meta")
    elif change.get("cache") == "values":
        first.values = first.values[:, :, 1:]
    elif "cache" in change:
        cache = change["cache"]
    values = {
        "path": tmp_path / "x",
        "model": model,
        "tokens": ids,
        **{k: v for k, v in change.items() if k != "cache"},
    }
    with pytest.raises(error, match=message):
        dhsa.save_cache(cache, values.pop("path"), **values)
    assert not list(tmp_path.iterdir())
