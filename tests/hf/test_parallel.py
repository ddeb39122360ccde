"""A prompt that the ranks of a group divide among them, beside the same prompt in one process."""

import pytest

torch = pytest.importorskip("torch", reason="needs the hf extra: torch")
pytest.importorskip("transformers", reason="needs the hf extra: transformers")

import ranks  # noqa: E402
import tiny  # noqa: E402

import dhsa  # noqa: E402
from dhsa.hf.compat import cache_of, cache_option  # noqa: E402

EXACT = tiny.EXACT
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
LENGTHS = {1: (97,), 2: (97, 200), 3: (66, 130), 4: (1, 5, 131)}


def world():
    return torch.distributed.group.WORLD


def batch(kind, length):
    """Inputs of a model: "one" prompt, or "padded" prompts of different lengths, padded on the left."""
    if kind == "one":
        return {"input_ids": tiny.tokens(1, length)}
    ids, mask = tiny.padded([length, length // 2 + 1, max(1, length - 7)], length, "left")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def logits_of(rank, size, families, config, lengths):
    found = {}
    for family in families:
        model = tiny.build(family)
        with dhsa.patched(model, config, group=world(), timeout=60):
            for kind in ("one", "padded"):
                for length in lengths:
                    inputs = batch(kind, length)
                    logits = model(**inputs, use_cache=False).logits
                    last = model(**inputs, use_cache=False, logits_to_keep=2).logits
                    found[family, kind, length] = logits, last
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_exact_logits_are_those_of_one_process(size, tmp_path):
    found = ranks.run(
        size, logits_of, tmp_path, tiny.FAMILIES if size == 2 else ["gemma2", "qwen3"], EXACT, LENGTHS[size]
    )
    for (family, kind, length), (logits, last) in found[0].items():
        model, inputs = tiny.build(family), batch(kind, length)
        with dhsa.patched(model, EXACT), torch.no_grad():
            expected = model(**inputs).logits
        real = inputs.get("attention_mask", torch.ones(expected.shape[:2])).bool()
        torch.testing.assert_close(logits[real], expected[real], **CLOSE)
        torch.testing.assert_close(last[real[:, -2:]], logits[:, -2:][real[:, -2:]], **CLOSE)
        for other in found[1:]:
            assert torch.equal(other[family, kind, length][0], logits)
            assert torch.equal(other[family, kind, length][1], last)


def generated(rank, size, families, pieces, steps):
    """Tokens that follow a batch, greedily and by beams, and logits of a prompt in pieces and of what follows it."""
    found = {}
    for family in families:
        model = tiny.build(family)
        with dhsa.patched(model, EXACT, group=world() if size else None, timeout=60 if size else None):
            inputs = {k: v for k, v in batch("padded", 120).items() if k != "position_ids"}
            asked = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
            found[family, "tokens"] = model.generate(**inputs, **asked)
            found[family, "beams"] = model.generate(**batch("one", 90), **asked, num_beams=3)
            found[family, "logits"], held = in_pieces(model, pieces)
            found[family, "held"] = held
    return found


def in_pieces(model, pieces):
    cache, at, logits, ids = None, 0, [], tiny.tokens(1, sum(pieces), seed=3)
    for n in pieces:
        out = model(ids[:, at : at + n], use_cache=True, **cache_option(model, cache))
        cache, at = cache_of(out), at + n
        logits.append(out.logits)
    return torch.cat(logits, 1), [layer.keys.shape[2] for layer in cache.layers]


PIECES = (100, 70, 1, 1, 20, 90, 1)


@pytest.mark.parametrize("size", [2, 3])
def test_a_divided_cache_grows_as_that_of_one_process(size, tmp_path):
    families = ["gemma2", "qwen3"]
    found = ranks.run(size, generated, tmp_path, families, PIECES, 12)
    with torch.no_grad():
        expected = generated(0, 0, families, PIECES, 12)
    for family in families:
        for one in found:
            for name in ("tokens", "beams"):
                assert torch.equal(one[family, name], expected[family, name]), (family, name)
            assert torch.equal(one[family, "logits"], found[0][family, "logits"])
        torch.testing.assert_close(found[0][family, "logits"], expected[family, "logits"], **CLOSE)
        full = [one[family, "held"][1::2] for one in found]
        assert [sum(column) for column in zip(*full, strict=True)] == [sum(PIECES)] * 2
        assert max(map(max, full)) - min(map(min, full)) <= 64 + 2  # parts of all pieces, and a keeper of short ones
        assert all(n <= tiny.WINDOW - 1 for one in found for n in one[family, "held"][::2])


def shards(rank, size):
    model = tiny.build("gemma3")
    prompt = {"input_ids": tiny.tokens(1, 150)}
    with dhsa.patched(model, EXACT, group=world(), timeout=60):
        part = dhsa.shard(prompt, world())
        whole, of_part = model(**prompt).logits, model(**part).logits
        embeds = {"inputs_embeds": model.get_input_embeddings()(prompt["input_ids"])}
        of_embeds = model(**dhsa.shard(embeds, world())).logits
        for wrong in ({"input_ids": tiny.tokens(1, 40)}, batch("padded", 150)):
            with pytest.raises(NotImplementedError, match="without padding"):
                dhsa.shard(wrong, world())
    with pytest.raises(ValueError, match="no model is patched"):
        dhsa.shard(prompt, world())
    return whole, of_part, of_embeds, part["input_ids"].shape[1]


def test_a_shard_stands_for_its_prompt(tmp_path):
    found = ranks.run(3, shards, tmp_path)
    assert sum(one[3] for one in found) == 150
    for whole, *others, _ in found:
        for logits in others:
            assert torch.equal(logits, whole)


def messages(rank, size):
    """The messages of what is refused."""
    model, said = tiny.build("gemma2"), []
    group, ids = world(), tiny.tokens(1, 100)

    def refused(act):
        try:
            act()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing")

    from transformers import StaticCache

    for method in (
        lambda: dhsa.patch(model, EXACT, group="world"),
        lambda: dhsa.patch(model, EXACT, timeout=3),
        lambda: dhsa.patch(model, EXACT, group=group, timeout=-1),
        lambda: dhsa.patch(model, SPARSE.replace(method="oracle"), group=group),
        lambda: dhsa.patch(model, SPARSE.replace(boundaries="similarity"), group=group),
        lambda: dhsa.patch(model, SPARSE.replace(decode="dhsa"), group=group),
        lambda: dhsa.patch(model, SPARSE.replace(share="selections"), group=group),
        lambda: dhsa.patch(model, dhsa.LayerConfigs(default=SPARSE, layers={}, reuse={3: (1, None)}), group=group),
    ):
        refused(method)
    with dhsa.patched(model, EXACT, group=group, timeout=60):
        holes = torch.ones(1, 100, dtype=torch.long)
        holes[0, 40:50] = 0
        static = StaticCache(config=model.config, max_cache_len=200)
        cache = cache_of(model(ids, use_cache=True))
        refused(lambda: model(ids, attention_mask=holes))
        refused(lambda: model(ids, attention_mask=torch.ones(1, 1, 100, 100, dtype=torch.bool).tril()))
        refused(lambda: model(ids, **cache_option(model, static)))
        refused(lambda: cache.crop(-3))
        with dhsa.hf.key_scores(torch.ones(1, 1, 100)):
            refused(lambda: model(ids))
        refused(lambda: model.model.layers[0].self_attn(torch.zeros(1, 4, 64), (torch.ones(1, 4, 32),) * 2, None))
    refused(lambda: model(ids, **cache_option(model, cache)))
    return said


def test_what_is_not_served_is_refused_by_name(tmp_path):
    expected = [
        "TypeError: group: expected a ProcessGroup",
        "ValueError: timeout: is how long ranks wait",
        "ValueError: timeout: expected seconds above 0",
        "NotImplementedError: method: 'oracle' selects",
        "NotImplementedError: boundaries: a group of ranks cuts",
        "NotImplementedError: decode: steps of a group",
        "NotImplementedError: share: layers of a group",
        "NotImplementedError: reuse: each layer of a group",
        "NotImplementedError: attention_mask: row 0 has padding between",
        "NotImplementedError: attention_mask: a group of ranks takes",
        "NotImplementedError: cache: expected a DynamicCache",
        "NotImplementedError: cache: the keys of a group of ranks cannot be cropped",
        "NotImplementedError: key_scores: the ranks of a group",
        "RuntimeError: group: attention was called outside",
        "RuntimeError: cache: holds one rank's part",
    ]
    for said in ranks.run(2, messages, tmp_path):
        assert len(said) == len(expected)
        for message, begin in zip(said, expected, strict=True):
            assert message.startswith(begin), message


# ---- sparse attention ------------------------------------------------------------------------------------------------

SPARSE = tiny.SPARSE.replace(break_even=0)


def watch():
    """Notes the lists that this rank makes, one dict for each call of a layer: {(head set, block): keys}."""
    from dhsa.distributed import sparse

    seen, made = [], sparse._lists

    def lists(at, query, keys, config, *others):
        indptr, indices = made(at, query, keys, config, *others)
        first, last = at.queries[torch.distributed.get_rank()]
        seen.append(by_block(indptr, indices, (first - at.past) // config.query_block, last - first, config))
        return indptr, indices

    sparse._lists = lists
    return seen


def by_block(indptr, indices, first, queries, config):
    blocks = -(-queries // config.query_block)
    return {
        (at // blocks, first + at % blocks): indices[indptr[at] : indptr[at + 1]].tolist()
        for at in range(len(indptr) - 1)
    }


def sparse_of(rank, size, families, config, pieces):
    found = {}
    for family in families:
        model, seen = tiny.build(family), watch()
        with dhsa.patched(model, config, group=world(), timeout=60):
            whole = model(tiny.tokens(1, LONG, seed=4), use_cache=False).logits
            lists, runs = list(seen), dhsa.last_run(model)
            logits, _ = in_pieces(model, pieces)
            padded = model(**batch("padded", 260), use_cache=False).logits
        found[family] = {"whole": whole, "lists": lists, "runs": runs, "pieces": logits, "padded": padded}
    return found


def of_one(family, config, pieces):
    """The same in one process, the lists as `dhsa.select` makes them of the queries and keys of a layer."""
    from dhsa.hf import attention

    model, seen, run = tiny.build(family), [], attention.functional.run

    def noted(q, k, v, config=None, **options):
        if config is not None and config.leaves_out(q.shape[2], k.shape[2], options.get("window")):
            names = ("window", "scale", "softcap")
            made = dhsa.select(q, k, config, **{name: options.get(name) for name in names})
            seen.append(by_block(made.indptr, made.indices, 0, q.shape[2], config))
        return run(q, k, v, config, **options)

    with dhsa.patched(model, config), torch.no_grad():
        attention.functional.run = noted
        try:
            whole = model(tiny.tokens(1, LONG, seed=4), use_cache=False).logits
        finally:
            attention.functional.run = run
        runs = dhsa.last_run(model)
        logits, _ = in_pieces(model, pieces)
        padded = model(**batch("padded", 260), use_cache=False).logits
    return {"whole": whole, "lists": seen, "runs": runs, "pieces": logits, "padded": padded}


LONG = 300
CONFIGS = {
    "default": SPARSE,
    "shortlist": SPARSE.replace(shortlist=128, heads="group", chunk_size=3),
    "mass": SPARSE.replace(mass=0.8, heads="all"),
    "window": SPARSE.replace(method="window"),
    "narrow": SPARSE.replace(budget=40, local=16),  # layers with a window leave keys out too
}


@pytest.mark.parametrize(
    ("size", "name"),
    [(2, "default"), (2, "narrow"), (3, "shortlist"), (3, "mass"), (3, "window"), (4, "default"), (4, "narrow")],
)
def test_sparse_attention_is_that_of_one_process(size, name, tmp_path):
    config, families, pieces = CONFIGS[name], ["gemma2", "qwen3"], (150, 1, 1, 110, 99)
    found = ranks.run(size, sparse_of, tmp_path, families, config, pieces)
    for family in families:
        expected = of_one(family, config, pieces)
        real = batch("padded", 260)["attention_mask"].bool()
        every = [one[family] for one in found]
        for one in every:
            for what in ("whole", "pieces", "padded"):
                rows = real if what == "padded" else slice(None)
                torch.testing.assert_close(one[what][rows], expected[what][rows], **CLOSE)
                assert torch.equal(one[what], every[0][what])
        assert expected["lists"]
        for layer, lists in enumerate(expected["lists"]):
            assert {at: keys for one in every for at, keys in one["lists"][layer].items()} == lists
        for layer, run in enumerate(expected["runs"]):
            mine = [one["runs"][layer] for one in every]
            assert {one.path for one in mine} == {run.path}
            # Of a rank, its own queries; the earlier ones see fewer keys.
            assert min(one.density for one in mine) <= run.density + 1e-9 <= max(one.density for one in mine) + 2e-9


def sizes(size, family, config):
    """The bytes that each rank sends in a call of LONG tokens, for each layer, by the formulas of the documentation."""
    expected = of_one(family, config, (1,))
    model = tiny.build(family)
    kv_heads, dim = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    row = 2 * dim * 4 * kv_heads
    block, sparse = config.query_block, any(run.path == "sparse" for run in expected["runs"])
    unit = block if sparse else 1
    units = -(-LONG // unit)
    parts = [(units * r // size * unit, min(LONG, units * (r + 1) // size * unit)) for r in range(size)]
    lists = iter(expected["lists"])
    found = []
    for run in expected["runs"]:
        sent = [0] * size
        layer = next(lists) if run.path == "sparse" and run.kind == "full" else None
        for r, t in ((r, t) for r in range(size) for t in range(size) if r < t):
            (a, b), (first, last) = parts[r], parts[t]
            if run.kind == "sliding":
                sent[r] += row * max(0, b - max(a, first - tiny.WINDOW + 1))
            elif layer is None:
                sent[r] += row * (b - a)
            else:
                chunks = (b - a) // config.chunk_size
                shortlist = config._core.shortlist
                sent[r] += kv_heads * chunks * (dim + 5)  # a mean, its factor and its state
                sent[r] += kv_heads * chunks // 4 * (dim + 9) if 0 < shortlist < LONG else 0  # and a spread
                sent[t] += kv_heads * -(-(b - a) // 8)  # a bit for each key
                for h in range(kv_heads):
                    chosen = {
                        key
                        for (s, i), keys in layer.items()
                        if first <= i * block < last and s * kv_heads // run.query_shape[1] == h
                        for key in keys
                    }
                    sent[r] += row // kv_heads * len([key for key in chosen if a <= key < b])
        found.append(sent)
    return found


@pytest.mark.parametrize("shortlist", [0, 128])
def test_bytes_sent_are_those_of_the_formula(shortlist, tmp_path):
    config = SPARSE.replace(shortlist=shortlist)
    found = ranks.run(3, sparse_of, tmp_path, ["gemma3"], config, (1,))
    sent = [[one["gemma3"]["runs"][layer].sent_bytes for one in found] for layer in range(4)]
    assert sent == sizes(3, "gemma3", config)
    assert all(sum(layer) > 0 for layer in sent)


def checked(rank, size, family, config):
    """A check by `group=`, and one of a model that is patched with it; of one row and of a padded batch."""
    model, ids = tiny.build(family), tiny.tokens(1, LONG, seed=4)
    padded, mask = tiny.padded([LONG, 120], LONG, "left")
    found = [dhsa.check(model, ids, config, **({"group": world(), "timeout": 60} if size else {}))]
    with dhsa.patched(model, config, group=world() if size else None):
        found.append(dhsa.check(model, padded, attention_mask=mask))
        if size:
            assert dhsa.shard({"input_ids": ids}, world())["input_ids"].shape[1] < LONG  # patched as before
    return found


@pytest.mark.parametrize("name", ["default", "skip"])
def test_a_check_among_ranks_finds_what_one_process_finds(name, tmp_path):
    config = SPARSE.replace(skip=0.05) if name == "skip" else SPARSE
    found = ranks.run(3, checked, tmp_path, "gemma2", config)
    expected = checked(0, 0, "gemma2", config)
    for number, one in enumerate(expected):
        for of in (check[number] for check in found):
            assert of.shape == one.shape
            assert of.next_tokens == one.next_tokens
            assert of.ok == one.ok
            assert of.tail_kl == pytest.approx(one.tail_kl, rel=1e-2, abs=1e-7)
            for mine, theirs in zip(of.layers, one.layers, strict=True):
                assert (mine.layer, mine.kind, mine.path, mine.why) == (
                    theirs.layer, theirs.kind, theirs.path, theirs.why,
                )  # fmt: skip
                assert mine.output_error == pytest.approx(theirs.output_error, rel=1e-3)
                assert mine.density == pytest.approx(theirs.density, rel=1e-6)
        assert found[0][number] == found[1][number] == found[2][number]
    assert any(layer.path == "sparse" and layer.output_error > 0 for layer in expected[0].layers)


# ---- other dtypes ----------------------------------------------------------------------------------------------------


def narrow(rank, size, dtype, config):
    """Logits of a whole prompt and of one in pieces, and tokens, of a model in 16 bits."""
    model = tiny.build("gemma2").to(dtype)
    with dhsa.patched(model, config, group=world() if size else None, timeout=60 if size else None):
        whole = model(tiny.tokens(1, LONG, seed=4), use_cache=False).logits
        pieces, _ = in_pieces(model, (150, 1, 1, 110))
        padded = model(**batch("padded", 260), use_cache=False).logits
    return whole, pieces, padded[batch("padded", 260)["attention_mask"].bool()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("config", [EXACT, SPARSE], ids=["exact", "sparse"])
def test_models_in_16_bits_err_as_one_process_does(dtype, config, tmp_path):
    """Beside the same model in float32, the logits of three ranks have the error of those of one process."""
    found = ranks.run(3, narrow, tmp_path, dtype, config)
    with torch.no_grad():
        one, exact = narrow(0, 0, dtype, config), narrow(0, 0, torch.float32, config)
    for i, (of_one, of_float32) in enumerate(zip(one, exact, strict=True)):
        error = (of_one - of_float32).float().norm()
        for of_rank in found:
            assert of_rank[i].dtype == dtype
            assert torch.equal(of_rank[i], found[0][i])
            assert (of_rank[i] - of_float32).float().norm() <= 1.3 * error
            assert (of_rank[i] - of_one).float().norm() <= 1.5 * error
