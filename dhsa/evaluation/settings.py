"""Settings: a method of selection, its options and a budget, named as on the command line and made into a Config.

A specification is `name[:field=value]...`. The name is a method of `dhsa.Config`, "paper" for `Config.paper()`, or
"exact" for no selection (useful with `exact:skip=0.001`). Then come fields of Config; `predictor=FILE` is loaded.
`config=FILE` has the configs of a file, as they are.
`name:source` uses what the method's source prescribes, and `cuts=WORD` boundaries that no Config offers (cuts.py). The
rules that are the same for all methods are here, so that no comparison favours one of them by accident.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dhsa
from dhsa import config as configs
from dhsa.commands import UserError
from dhsa.evaluation.cuts import WORDS
from dhsa.methods import registry

__all__ = ["DENSE", "METHODS", "Setting", "dense", "methods", "named", "refuse_in_group", "setting"]

DENSE = "dense"
METHODS = tuple(registry)
NAMES = (*METHODS, "paper", "exact")
# For comparison only: not part of "all".
_SLOW = ("oracle", *(name for name, method in registry.items() if not method.in_core))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One column of a comparison: a label, its budget (keys or mass, None for dense), the Config, and how it cuts keys
    if not as the Config says.
    """

    label: str
    config: dhsa.Config | dhsa.LayerConfigs
    budget: int | None = None
    mass: float | None = None
    cuts: str = ""

    @property
    def dense(self) -> bool:
        return self.label == DENSE

    @property
    def given(self) -> str:
        """The budget as text: "640", "mass 0.95", or "" for dense."""
        if self.mass is not None:
            return f"mass {self.mass:g}" + ("" if self.budget is None else f" <= {self.budget:,}")
        return "" if self.budget is None else f"{self.budget:,}"

    def at(self, layer: int) -> dhsa.Config:
        """Return the Config for one layer, for which a predictor may have a network of its own."""
        config = self.config.at(layer) if isinstance(self.config, dhsa.LayerConfigs) else self.config
        predictor = config.predictor
        if predictor is None or not predictor.layers:
            return config
        return config.replace(predictor=predictor.layer(layer))

    def fields(self) -> dict[str, Any]:
        """Return every field of the Config as JSON can hold it, with a predictor as the hash of its weights; and `cuts`
        if set. With a Config for each layer, those of the layers are in "layers".
        """
        if isinstance(self.config, dhsa.LayerConfigs):
            layers = {str(layer): _fields(config) for layer, config in self.config.layers.items()}
            found = {**_fields(self.config.default), "layers": layers}
            if self.config.reuse:
                found["reuse"] = {str(layer): of for layer, of in self.config.reuse.items()}
            return found
        values = _fields(self.config)
        if self.cuts:
            values["cuts"] = self.cuts
        return values


def _fields(config: dhsa.Config) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in configs.FIELDS}
    values |= dataclasses.asdict(config.options)
    if values.get("predictor") is not None:
        values["predictor"] = _predictor_hash(values["predictor"])
    # JSON has no infinity.
    return {k: str(v) if isinstance(v, float) and abs(v) == float("inf") else v for k, v in values.items()}


def _predictor_hash(predictor: Any) -> str:
    digest = hashlib.sha256(repr(predictor).encode())
    for name, weights in predictor.state_dict().items():
        digest.update(name.encode() + weights.tobytes())
    return digest.hexdigest()[:16]


def dense() -> Setting:
    return Setting(DENSE, dhsa.Config(budget=None))


def methods(names: str) -> list[str]:
    """Return the specifications of a comma-separated list, in order, without duplicates. "all": every method but slow
    ones.
    """
    specs: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name in ("", DENSE):  # dense is always measured
            continue
        specs += [m for m in METHODS if m not in _SLOW] if name == "all" else [name]
    if not specs:
        raise UserError(f"--methods: none given; there are {', '.join(NAMES)}")
    return list(dict.fromkeys(specs))


def named(path: Path) -> list[Setting]:
    """Return the settings of a JSON file, {name: {field of Config: value, ...}, ...}. Fields that are not given are
    those of Config. `predictor` is a file. Raises UserError for what is no such file and for what Config refuses.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--configs: {path}: {error}") from error
    if not isinstance(held, dict) or not held or not all(isinstance(fields, dict) for fields in held.values()):
        raise UserError(f'--configs: {path}: expected an object of named objects, as {{"name": {{"budget": 512}}}}')
    made = []
    for name, fields in held.items():
        if name == DENSE or "|" in name or not name.strip() or not name.isprintable():
            raise UserError(f"--configs: {path}: a config cannot be named {name!r}")
        values = dict(fields)
        if values.get("predictor") is not None:
            values["predictor"] = _load(f"{path}: {name}", str(values["predictor"]), "--configs")
        try:
            config = dhsa.Config(**values)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"--configs: {path}: {name}: {error}") from error
        made.append(Setting(name, config, config.budget, config.mass))
    return made


def refuse_in_group(settings: Iterable[Setting]) -> None:
    """Raise UserError for a setting that several processes do not serve."""
    from dhsa.hf.parallel import refuse_config

    for one in settings:
        if one.cuts:
            raise UserError(f"--methods: {one.label}: cuts={one.cuts} is of one process, which has all keys")
        if isinstance(one.config, dhsa.LayerConfigs):
            configs = [one.config.default, *one.config.layers.values()]
            if one.config.reuse:
                raise UserError(f"--methods: {one.label}: each layer of several processes selects for itself")
        else:
            configs = [one.config]
        for config in configs:
            try:
                refuse_config(config)
            except NotImplementedError as error:
                raise UserError(f"--methods: {one.label}: {error}") from error


def setting(
    spec: str,
    budget: int | None,
    *,
    mass: float | None = None,
    dense_tail: int = 0,
    sink: int | None = None,
    local: int | None = None,
) -> Setting:
    """Return the setting of `spec` at a budget of keys or a share of mass.

    Forced keys are the same for all methods and take at most half of the budget: `sink` (None: that of Config) at most
    a quarter, `local` (None: that of Config) the rest of the half. Fields in the specification itself override these.
    Raises UserError for unknown names and for what Config refuses.
    """
    if spec.startswith("config="):
        return _of_file(spec)
    name, *words = spec.split(":")
    if name not in NAMES:
        raise UserError(f"--methods: no method {name!r}; there are {', '.join(NAMES)}")
    source = "source" in words
    cuts = [word[5:] for word in words if word.startswith("cuts=")][-1:]
    asked = dict(_override(spec, word) for word in words if word != "source" and not word.startswith("cuts="))
    base = dhsa.Config.paper() if name == "paper" else dhsa.Config()
    values: dict[str, Any] = {"budget": budget, "dense_tail": dense_tail}
    values["break_even"] = 0  # loss is measured even where sparse attention takes more time
    ceiling = asked.get("budget", budget)
    values["sink"] = base.sink if sink is None else sink
    values["local"] = base.local if local is None else local
    if isinstance(ceiling, int):
        values["sink"] = min(values["sink"], ceiling // 4)
        values["local"] = min(values["local"], ceiling // 2 - values["sink"])
    if mass is not None:
        values["mass"] = mass
    if source:
        del values["budget"]  # as the source has them
    values = {**asked, "budget": None} if name == "exact" else values | asked
    try:
        config = _config(name, source, values)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--methods: {spec}: {error}") from error
    if asked.get("predictor") is not None and config.boundaries != "predictor":
        raise UserError(f"--methods: {spec}: predictor= needs boundaries=predictor, got {config.boundaries}")
    if cuts and config.boundaries == "fixed" and not asked.keys() & {"boundaries", "chunk_size"}:
        config = config.replace(boundaries="similarity")  # fixed ones are alike in all layers
    for word in cuts:
        _check_cuts(spec, word, config)
    return Setting(spec, config, config.budget, config.mass, "".join(cuts))


def _of_file(spec: str) -> Setting:
    """Return the setting of a file of configs, which has its own budgets."""
    try:
        config = dhsa.Config.load(spec.removeprefix("config="))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"--methods: {error}") from error
    if isinstance(config, dhsa.LayerConfigs):
        return Setting(spec, config)
    return Setting(spec, config, config.budget, config.mass)


def _check_cuts(spec: str, word: str, config: dhsa.Config) -> None:
    """Return why `cuts=word` is refused: it would have no effect, or an unexpected one."""
    problem = None
    if word not in WORDS:
        problem = f"cuts: expected one of {', '.join(WORDS)}, got {word!r}"
    elif not config.options.has_chunks or config.exact:
        problem = "cuts: only methods of chunks that have a budget or a mass cut keys"
    elif "label" in word and config.boundaries != "similarity":
        problem = f"cuts={word}: picks its own boundaries; boundaries={config.boundaries} is ignored, leave it out"
    elif config.boundaries == "fixed":
        problem = f"cuts={word}: has no effect on boundaries=fixed, which are the same in all layers"
    elif config.share is not None:
        problem = "cuts: not with share, which says by itself where layers cut"
    elif config.skip is not None:
        problem = "cuts: not with skip, whose share of tiles would go unreported"
    if problem:
        raise UserError(f"--methods: {spec}: {problem}")


def _override(spec: str, word: str) -> tuple[str, Any]:
    field, equals, text = word.partition("=")
    if not equals or field not in (*configs.FIELDS, *configs.OPTIONS):
        raise UserError(
            f"--methods: {spec}: expected source, cuts=WORD or field=value with a field of dhsa.Config, got {word!r}"
        )
    if field == "predictor":
        return field, _load(spec, text)
    if text.lower() in ("none", "true", "false"):
        return field, {"none": None, "true": True, "false": False}[text.lower()]
    for kind in (int, float):
        try:
            return field, kind(text)
        except ValueError:
            pass
    return field, text


@functools.cache
def _load(spec: str, path: str, option: str = "--methods") -> dhsa.BoundaryPredictor:
    try:
        return dhsa.BoundaryPredictor.load(path)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{option}: {spec}: predictor: {error}") from error


def _config(name: str, source: bool, values: dict[str, Any]) -> dhsa.Config:
    if name == "exact":
        return dhsa.Config(**values)
    if name == "paper":
        return dhsa.Config.paper(**values)
    return dhsa.Config.source(name, **values) if source else dhsa.Config(**{"method": name, **values})
