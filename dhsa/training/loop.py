"""The training loop, of boundary predictors and of gates.

Pieces of text go through the model; gaps (of gates: blocks of queries) of all layers are collected in a pool of limited
size, and training steps take them in random order. After each piece a state is written to disk, from which an
interrupted run continues to the same weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dhsa import hf
from dhsa._files import replacing
from dhsa.commands import UserError
from dhsa.methods.gates import Gates
from dhsa.predictor import BoundaryPredictor
from dhsa.training.documents import Text
from dhsa.training.gates import GateCrop, gate_loss, gates_of, judge_gates, pool_gates
from dhsa.training.networks import build, focal_loss, soft_labels
from dhsa.training.scores import POSITIVE, score, similarity
from dhsa.training.settings import Settings
from dhsa.training.stream import LayerKeys, layer_keys

__all__ = ["Training", "train"]

SHARED = "shared"
WARM = 0.02  # the share of all pieces over which the cosine schedule rises


@dataclasses.dataclass
class Training:
    """The result of a training.

    Attributes:
        predictor: the BoundaryPredictor; of architecture "gate" the `dhsa.methods.gates.Gates`.
        history: the mean losses after each piece.
        scores: scores of each layer on held-out text, `scores[layer][who][measure]`, where who is "own", "shared",
            "similarity" or "random", of gates "own", "means" or "random"; and `scores[layer]["positive"]`, the share of
            gaps that are boundaries, of gates the share of blocks of keys that are to be found.
        seconds: the time it took.
        resumed: how often the run was continued after an interruption.
    """

    predictor: BoundaryPredictor | Gates
    history: list[dict[str, float]]
    scores: dict[int, dict[str, Any]]
    seconds: float
    resumed: int


@dataclasses.dataclass
class _Crop:
    layer: int
    keys: torch.Tensor  # [gaps + 2w - 1, C]
    labels: torch.Tensor  # [gaps]


class _Learner:
    """One network and its optimizer."""

    def __init__(self, settings: Settings, channels: Any, scale: Any, number: int) -> None:
        self.settings, self.channels, self.scale, self.number = settings, channels, scale, number
        self.network = build(settings, channels, scale, settings.seed * 4096 + number)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.rate)
        self.losses: list[float] = []  # of this piece

    def step(self, crop: _Crop | GateCrop, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.enable_grad():
            if isinstance(crop, GateCrop):
                loss = gate_loss(self.network, crop)
            else:
                gamma, weight = self.settings.gamma, self.settings.pos_weight
                loss = focal_loss(self.network(crop.keys), crop.labels, gamma=gamma, pos_weight=weight)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        return {
            "channels": self.channels, "scale": self.scale, "number": self.number,
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip

    @classmethod
    def restored(cls, settings: Settings, state: dict[str, Any]) -> _Learner:
        learner = cls(settings, state["channels"], state["scale"], state["number"])
        learner.network.load_state_dict(state["network"])
        learner.optimizer.load_state_dict(state["optimizer"])
        return learner


def _pool(model: Any, ids: list[int], settings: Settings, generator: np.random.Generator) -> list[Any]:
    """Return crops of all layers of one piece, in random order, no more of them than the settings allow."""
    if settings.architecture == "gate":
        return pool_gates(model, ids, settings, generator)
    w, crop = settings.window, settings.crop
    first, last = 2 * w - 1, len(ids) - 2 * w  # gaps that have a label
    starts = np.arange(first, max(last, first), crop)
    crops: list[_Crop] = []
    config = model.config.get_text_config()
    layers = config.num_hidden_layers if settings.layers is None else len(settings.layers)

    def visit(found: LayerKeys) -> None:
        rows = found.rows()
        if crops and rows.shape[1] != crops[0].keys.shape[1]:
            raise UserError(
                f"layers: keys of layer {found.layer} have {rows.shape[1]} channels, those of layer "
                f"{crops[0].layer} {crops[0].keys.shape[1]}: train layers of one width at a time"
            )
        labels = soft_labels(found.ratios.float())
        room = settings.pool_mib * 2**20 // (layers * (crop + 2 * w) * (rows.shape[1] + 1) * 4)
        if room < 1:
            raise UserError(f"pool_mib: {settings.pool_mib} MiB do not hold {crop} gaps of each of {layers} layers")
        chosen = starts if len(starts) <= room else np.sort(generator.choice(starts, room, replace=False))
        for a in chosen.tolist():
            b = min(a + crop, last)
            crops.append(_Crop(found.layer, rows[a - w + 1 : b + w].clone(), labels[a:b].clone()))

    layer_keys(model, ids, visit, window=w, layers=settings.layers)
    return [crops[i] for i in generator.permutation(len(crops))]


def _learners(settings: Settings, pool: list[Any]) -> dict[str, _Learner]:
    """Return new learners for the layers and the width of the first piece."""
    if settings.architecture == "gate":
        first: dict[int, GateCrop] = {crop.layer: crop for crop in pool}
        sizes = {layer: [c.queries.shape[1], c.keys.shape[1], c.queries.shape[2]] for layer, c in first.items()}
        return {str(i): _Learner(settings, sizes[i], first[i].inv_freq, i) for i in sorted(first)}
    rms: dict[str, float] = {}
    layers = sorted({crop.layer for crop in pool})
    for layer in layers:
        squares = [crop.keys.double().square().mean() for crop in pool if crop.layer == layer]
        rms[str(layer)] = float(torch.stack(squares).mean().sqrt()) or 1.0
    rms[SHARED] = math.sqrt(sum(x * x for x in rms.values()) / len(rms))
    names = [] if settings.networks == "shared" else [str(layer) for layer in layers]
    names += [] if settings.networks == "layers" else [SHARED]
    numbers = {name: 4095 if name == SHARED else int(name) for name in names}
    channels = pool[0].keys.shape[1]
    if settings.architecture == "attention" and channels % settings.heads:
        raise UserError(f"heads: {settings.heads} do not divide the {channels} channels of this model's keys")
    return {name: _Learner(settings, channels, rms[name], numbers[name]) for name in names}


def _rate(settings: Settings, done: float) -> float:
    """Return the learning rate of a step when the share `done` of the training is complete."""
    assert settings.rate is not None
    if settings.schedule == "constant":
        return settings.rate
    return settings.rate * min(1.0, (done + 1e-3) / WARM) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: Any,
    text: Text,
    settings: Settings | None = None,
    *,
    state: Path | None = None,
    advance: Callable[[], None] = lambda: None,
    keep: Callable[[Training], None] = lambda done: None,
) -> Training:
    """Train a boundary predictor on the keys of `model`, or gates of the method "seer" on its queries and keys.

    Args:
        model: a transformers model in eval mode on the CPU. It is left as it was.
        text: the pieces to train on and those to measure scores on, made by `pack`.
        settings: None: the default ones.
        state: a file that is written after each piece. If it exists at the start, the training continues from it. It is
            removed at the end.
        advance: called after each piece that was read, for training or for scores.
        keep: called with the result before the state is removed, to store it. If it raises, the error is raised here
            and the state stays, so that the same call only has to measure scores and call `keep` again.

    Raises:
        UserError: there is too little text; the model's attention cannot be read; the state is that of another
            training; weights are not finite; or the loss did not fall.
    """
    settings = Settings() if settings is None else settings
    if not text.train or not text.held_out:
        raise UserError("text: too little: at least one piece to train on and one held out are needed")
    if (longest := max(map(len, text.train + text.held_out))) > settings.tokens:
        raise UserError(
            f"text: a piece of {longest} tokens, but the settings say at most {settings.tokens}; pack it so"
        )
    start = time.perf_counter()
    identity = json.dumps([settings.fields(), text.digest(), hf.model_facts(model)], sort_keys=True)
    learners: dict[str, _Learner] = {}
    history: list[dict[str, float]] = []
    done, before, resumed = 0, 0.0, 0
    if state is not None and state.exists():
        try:
            _intact(state)
            kept = torch.load(state, weights_only=True)
            if kept["identity"] != identity:
                raise UserError(f"{state} is of a training with other settings, text or model: remove it to start anew")
            learners = {name: _Learner.restored(settings, s) for name, s in kept["learners"].items()}
            history, done, before, resumed = kept["history"], kept["done"], kept["seconds"], kept["resumed"] + 1
        except UserError:
            raise
        except Exception as error:  # torch.load, and restoring from what it found, raise almost anything
            what = (str(error).splitlines() or [""])[0][:200]
            raise UserError(
                f"{state} cannot be read as the state of a training ({type(error).__name__}: {what}): remove it to "
                "start anew"
            ) from error
        for _ in range(done):
            advance()
    total = settings.epochs * len(text.train)
    while done < total:
        epoch, at = divmod(done, len(text.train))
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(text.train))
        pool = _pool(model, text.train[order[at]], settings, np.random.default_rng([settings.seed, epoch, at, 1]))
        learners = learners or _learners(settings, pool)
        for i, crop in enumerate(pool):
            rate = _rate(settings, (done + i / len(pool)) / total)
            for name in (str(crop.layer), SHARED):
                if name in learners:
                    learners[name].step(crop, rate)
        history.append(_losses(learners))
        if not all(map(math.isfinite, history[-1].values())):
            raise UserError(f"training failed: the loss is no longer finite after {done + 1} pieces; try a lower rate")
        done += 1
        advance()
        if state is not None:
            _write(
                state, identity=identity, learners={n: x.state() for n, x in learners.items()}, history=history,
                done=done, seconds=before + time.perf_counter() - start, resumed=resumed,
            )  # fmt: skip
    predictor: BoundaryPredictor | Gates
    if settings.architecture == "gate":
        gates = {name: learner.network for name, learner in learners.items()}
        predictor = gates_of(model, gates)
        _check(predictor, history)
        found = judge_gates(model, text.held_out, gates, settings, advance)
        scores = {layer: _mean([row[layer] for row in found]) for layer in sorted(found[0])}
    else:
        predictor = _predictor(model, settings, learners)
        _check(predictor, history)
        scores = _judge(model, text.held_out, predictor, settings, advance)
    finished = Training(predictor, history, scores, before + time.perf_counter() - start, resumed)
    keep(finished)
    if state is not None:
        state.unlink(missing_ok=True)
    return finished


def _losses(learners: dict[str, _Learner]) -> dict[str, float]:
    """Return the mean losses of this piece: of the networks of single layers, and of the one for all."""
    found: dict[str, list[float]] = {}
    for name, learner in learners.items():
        found.setdefault(SHARED if name == SHARED else "own", []).extend(learner.losses)
        learner.losses = []
    return {who: sum(losses) / len(losses) for who, losses in found.items()}


def _intact(path: Path) -> None:
    """Verify the checksums, which torch.load does not: a training must not continue from damaged weights."""
    if torch.serialization.get_crc32_options():  # else torch.save writes none
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    while member.read(1 << 20):
                        pass


def _write(path: Path, **contents: Any) -> None:
    try:
        with replacing(path) as part:  # so that no incomplete state is left
            torch.save(contents, part)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError where the disk is full
        raise UserError(f"{path}: the state of the training cannot be written: {error}") from error


def _predictor(model: Any, settings: Settings, learners: dict[str, _Learner]) -> BoundaryPredictor:
    weights = {}
    for name, learner in learners.items():
        prefix = "" if name == SHARED else f"layers.{name}."
        for parameter, value in learner.network.folded().items():
            if not torch.isfinite(value).all():
                raise UserError(f"training failed: {prefix}{parameter} is not finite; try a lower rate")
            weights[prefix + parameter] = value
    return BoundaryPredictor.from_state_dict(
        weights,
        heads=settings.heads if settings.architecture == "attention" else None,
        window=settings.window,
        model=hf.model_facts(model),
    )


def _check(predictor: BoundaryPredictor | Gates, history: list[dict[str, float]]) -> None:
    """Raise UserError unless the loss of the last pieces is below that of the first."""
    few = max(1, len(history) // 8)
    for who in history[0]:
        first, last = history[0][who], sum(h[who] for h in history[-few:]) / few
        if len(history) > 1 and not last < first:
            raise UserError(
                f"training failed: the loss of the {who} networks did not fall, {first:.4f} at first and {last:.4f} at "
                "the end; try more text, more epochs or another rate"
            )


def _judge(
    model: Any, pieces: list[list[int]], predictor: BoundaryPredictor, settings: Settings, advance: Callable[[], None]
) -> dict[int, dict[str, Any]]:
    """Return scores of the trained predictor and of two baselines, layer by layer, means over the held-out pieces."""
    rows: dict[int, list[dict[str, Any]]] = {}
    random = np.random.default_rng(settings.seed)

    def visit(found: LayerKeys) -> None:
        ratios = found.ratios.numpy()
        who = {"similarity": similarity(found.keys, settings.window), "random": random.random(len(ratios), np.float32)}
        if found.layer in predictor.layers:
            who["own"] = predictor.layer(found.layer).logits(found.keys)[0].numpy()
        if predictor.shared:
            who["shared"] = predictor.logits(found.keys)[0].numpy()
        row: dict[str, Any] = {name: score(scores, ratios) for name, scores in who.items()}
        row["positive"] = float((ratios[ratios > 0] > POSITIVE).mean())
        rows.setdefault(found.layer, []).append(row)

    for ids in pieces:
        layer_keys(model, ids, visit, window=settings.window, layers=settings.layers)
        advance()
    return {layer: _mean(found) for layer, found in sorted(rows.items())}


def _mean(rows: list[Any]) -> Any:
    """Return the means of dicts of dicts of numbers. NaN, from text without positives, is left out."""
    if isinstance(rows[0], dict):
        return {name: _mean([row[name] for row in rows]) for name in rows[0]}
    known = [x for x in rows if not math.isnan(x)]
    return sum(known) / len(known) if known else float("nan")
