"""Changed files of predictors (safetensors and PyTorch checkpoints), of configurations and of kept caches: each is
refused with a sentence, or what was loaded from it can be used.

With PYTHONPATH=tests:tests/select, as `make fuzz` has it: python -m fuzz.files --seconds 60. It prints the seed and how
many files of each kind were opened. A file depends on the seed and its number only: --seed 7 --first 1234 --count 1.
"""

import collections
import hashlib
import itertools
import json
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
from fuzz.arguments import parsed
from weights import compact_weights, random_weights

import dhsa

try:
    import safetensors.numpy
except ImportError:
    safetensors = None
try:
    import torch
    import transformers

    from dhsa.hf.compat import cache_option
except ImportError:
    torch = transformers = None

MOST_SECONDS, MOST_BYTES = 20, 1 << 30  # of one file, and of memory beyond that of the first ones
NUMBERS = [0, 1, -1, 2, 7, 8, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**64, 10**30, 0.5, "x", None, [], {}]


def opening_of(path):
    """How a file of this name is opened and used."""
    if path.suffix == ".json":
        return lambda changed: dhsa.Config.load(changed)
    if path.stem.startswith("cache"):
        return CACHE.use
    return use_predictor


def use_predictor(path):
    predictor = dhsa.BoundaryPredictor.load(path, heads=None if path.suffix == ".safetensors" else 2)
    for network in ([predictor] if predictor.shared else []) + [predictor.layer(i) for i in predictor.layers]:
        if network.channels <= 4096:
            keys = np.ones((1, 1, 2 * min(network.window, 50) + 3, network.channels), np.float32)
            if network.channels <= 576:
                network.logits(keys)


class Cache:
    """A kept cache of a small model of random weights, and what is done with one that opens."""

    def __init__(self):
        self.model = None

    def make(self, path):
        from tiny import SPARSE, build, tokens

        self.model, ids = dhsa.patch(build("gemma2"), SPARSE.replace(decode="dhsa")), tokens(1, 300)
        self.prompt = ids
        cache = transformers.DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(ids, **cache_option(self.model, cache))
        dhsa.save_cache(cache, path, model=self.model, tokens=ids)

    def use(self, path):
        cache = dhsa.load_cache(path, self.model)
        with torch.no_grad():
            self.model(self.prompt[:, :1], **cache_option(self.model, cache))


CACHE = Cache()


def write_all(folder):
    """Whole files of every kind that the installed packages can write."""
    attention = random_weights(16, 5, gated=True)
    config = dhsa.Config(budget=100, method="xattention", stride=8)
    config.save(folder / "config.json")
    layers = {0: dhsa.Config(budget=None), 3: config.replace(budget=50)}
    dhsa.LayerConfigs(default=config, layers=layers, notes={"found": [1, 2.5]}).save(folder / "layers.json")
    if safetensors is not None:
        shared = dhsa.BoundaryPredictor.from_state_dict(compact_weights(16), notes={"settings": "{}"})
        shared.save(folder / "compact.safetensors")
        dhsa.BoundaryPredictor.from_state_dict(attention, heads=2).save(folder / "attention.safetensors")
        weights = {f"layers.{i}.{name}": x for i in (0, 3) for name, x in compact_weights(16, seed=i).items()}
        safetensors.numpy.save_file(weights, folder / "of_layers.safetensors", {"window": "3"})
    if torch is not None:
        state = {name: torch.from_numpy(x) for name, x in attention.items()}
        torch.save(state, folder / "state.pt")
        torch.save({"model": {f"module.{name}": x.half() for name, x in state.items()}, "epoch": 3}, folder / "run.pt")
        CACHE.make(folder / "cache.safetensors")
    return {path: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- changes ---------------------------------------------------------------------------------------------------------


def scattered(rng, data):
    """Any bytes: changed, cut off, left out, doubled, put in between."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at, size = int(rng.integers(len(data) + 1)), int(rng.integers(1, 17))
        what = int(rng.integers(7))
        if what <= 2 and at < len(data):
            data[at] = int(rng.integers(256)) if what else data[at] ^ (1 << int(rng.integers(8)))
        elif what == 3 and rng.random() < 0.3:
            del data[at:]
        elif what == 4:
            del data[at : at + size]
        elif what == 5:
            data[at:at] = data[at : at + size]
        else:
            data[at:at] = rng.bytes(size)
    return bytes(data)


def one(rng, values):
    return values[int(rng.integers(len(values)))]


def changed_value(rng, value):
    """JSON of which one value, wherever it is, is another one, gone, or there twice."""
    places = []

    def walk(container):
        for key in container if isinstance(container, dict) else range(len(container)):
            places.append((container, key))
            if isinstance(container[key], (dict, list)):
                walk(container[key])

    walk(value)
    if not places:
        return value
    container, key = one(rng, places)
    what = rng.random()
    if what < 0.15:
        del container[key]
    elif what < 0.25 and isinstance(container, dict):
        container[str(one(rng, NUMBERS))] = container[key]
    elif what < 0.5 and isinstance(container[key], (int, float)):
        container[key] += one(rng, [-1, 1, 2, 1000, 0.5])
    else:
        container[key] = one(rng, NUMBERS)
    return value


def header_of(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def changed_header(rng, data):
    """safetensors of which values of the header are others; that of a cache with the checksum of its metadata."""
    header, body = header_of(data)
    about = header.get("__metadata__", {})
    if "dhsa" in about and rng.random() < 0.6:
        text = json.dumps(changed_value(rng, json.loads(about["dhsa"])))
        about |= {"dhsa": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    else:
        header = changed_value(rng, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def changed_member(rng, data, folder):
    """A checkpoint of which a member of the archive is changed, with the right checksum."""
    source, target = folder / "source", folder / "target"
    source.write_bytes(data)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        chosen = one(rng, old.namelist()) if rng.random() < 0.3 else next(n for n in old.namelist() if "data.pkl" in n)
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, scattered(rng, content) if name == chosen else content)
    return target.read_bytes()


def changed(rng, path, data, folder):
    if rng.random() < 0.4:
        return scattered(rng, data)
    if path.suffix == ".json":
        return json.dumps(changed_value(rng, json.loads(data))).encode()
    return changed_header(rng, data) if path.suffix == ".safetensors" else changed_member(rng, data, folder)


# ---- all -------------------------------------------------------------------------------------------------------------


def most_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def run(seed, seconds, first=0, count=None):
    """Opens changed files until the time is over; returns how many of each kind, refused or not."""
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numbers of weights that overflow
        folder = Path(name)
        (folder / "whole").mkdir()
        files = write_all(folder / "whole")
        for path in files:
            opening_of(path)(path)
        before, end = most_memory(), time.monotonic() + seconds
        for number in itertools.count(first) if count is None else range(first, first + count):
            if time.monotonic() > end:
                break
            rng = np.random.default_rng([seed, number])
            path = one(rng, list(files))
            bad = folder / path.name
            bad.write_bytes(changed(rng, path, files[path], folder))
            what, start = f"--seed {seed} --first {number} --count 1: {path.name}", time.process_time()
            try:
                opening_of(path)(bad)
                counts[f"{path.name}, opened"] += 1
            except (ValueError, OSError):
                counts[f"{path.name}, refused"] += 1
            except Exception as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
            assert time.process_time() - start < MOST_SECONDS, f"{what}: took {time.process_time() - start:.0f} s"
            assert most_memory() - before < MOST_BYTES, f"{what}: takes {most_memory() - before} bytes"
    return counts


def main():
    given = parsed(__doc__.partition("\n")[0])
    counts = run(given.seed, given.seconds, given.first, given.count)
    print(f"seed {given.seed}: {counts.total()} files ({dict(sorted(counts.items()))})")


if __name__ == "__main__":
    main()
