"""Settings: a method of selection, its options and a budget, named as on the command line and made into a Config.

A spec is `name[:field=value]...`: a method of `dhsa.Config` (or "paper" for `Config.paper()`, or "exact" for no
selection at all, of use with `exact:skip=0.001`), then fields of Config. `name:source` takes what the method's source
prescribes. Rules that hold for every method alike are here, so that a comparison cannot favour one by accident.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import dhsa
from dhsa import config as configs
from dhsa.loading import UserError

__all__ = ["DENSE", "METHODS", "Setting", "dense", "methods", "setting"]

DENSE = "dense"
METHODS = configs.METHODS
NAMES = (*METHODS, "paper", "exact")
_SLOW = ("oracle",)  # for study: left out unless asked for


@dataclasses.dataclass(frozen=True)
class Setting:
    """One column of a comparison: a label, what it was given (keys or mass, None for dense), and the Config."""

    label: str
    config: dhsa.Config
    budget: int | None = None
    mass: float | None = None

    @property
    def dense(self) -> bool:
        return self.label == DENSE

    @property
    def given(self) -> str:
        """The budget in words: "640", "mass 0.95", or "" for dense."""
        if self.mass is not None:
            return f"mass {self.mass:g}" + ("" if self.budget is None else f" <= {self.budget:,}")
        return "" if self.budget is None else f"{self.budget:,}"

    def fields(self) -> dict[str, Any]:
        """Every field of the Config as JSON can hold it; a predictor by the hash of its weights."""
        values = {f.name: getattr(self.config, f.name) for f in dataclasses.fields(self.config)}
        if values.get("predictor") is not None:
            values["predictor"] = _predictor_hash(values["predictor"])
        # JSON has no infinity.
        return {k: str(v) if isinstance(v, float) and abs(v) == float("inf") else v for k, v in values.items()}


def _predictor_hash(predictor: Any) -> str:
    digest = hashlib.sha256()
    for part in predictor._core_args:
        digest.update(part.tobytes() if hasattr(part, "tobytes") else repr(part).encode())
    return digest.hexdigest()[:16]


def dense() -> Setting:
    return Setting(DENSE, dhsa.Config(budget=None))


def methods(names: str) -> list[str]:
    """Specs of a comma-separated list, in order and without repeats; "all" stands for every method but slow ones."""
    specs: list[str] = []
    for name in (part.strip() for part in names.split(",")):
        if name in ("", DENSE):  # dense is always there
            continue
        specs += [m for m in METHODS if m not in _SLOW] if name == "all" else [name]
    if not specs:
        raise UserError(f"--methods: none given; there are {', '.join(NAMES)}")
    return list(dict.fromkeys(specs))


def setting(
    spec: str,
    budget: int | None,
    *,
    mass: float | None = None,
    dense_tail: int = 0,
    sink: int | None = None,
    local: int | None = None,
) -> Setting:
    """The setting of `spec` at a budget of keys or a share of mass.

    Forced keys are the same for all methods and take at most half of the budget: `sink` (None: Config's) at most a
    quarter, `local` (None: Config's) what is left of the half. What the spec itself says comes last and wins.
    Raises UserError for what there is not, or what Config refuses.
    """
    name, *words = spec.split(":")
    if name not in NAMES:
        raise UserError(f"--methods: no method {name!r}; there are {', '.join(NAMES)}")
    source = "source" in words
    asked = dict(_override(spec, word) for word in words if word != "source")
    base = dhsa.Config.paper() if name == "paper" else dhsa.Config()
    values: dict[str, Any] = {"budget": budget, "dense_tail": dense_tail}
    ceiling = asked.get("budget", budget)
    values["sink"] = base.sink if sink is None else sink
    values["local"] = base.local if local is None else local
    if isinstance(ceiling, int):
        values["sink"] = min(values["sink"], ceiling // 4)
        values["local"] = min(values["local"], ceiling // 2 - values["sink"])
    if mass is not None:
        values["mass"] = mass
    if source:
        del values["budget"]  # the source's own
    values = {**asked, "budget": None} if name == "exact" else values | asked
    try:
        config = _config(name, source, values)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--methods: {spec}: {error}") from error
    return Setting(spec, config, config.budget, config.mass)


def _override(spec: str, word: str) -> tuple[str, Any]:
    field, equals, text = word.partition("=")
    if not equals or field not in configs.FIELDS:
        raise UserError(f"--methods: {spec}: expected source or field=value with a field of dhsa.Config, got {word!r}")
    if text.lower() in ("none", "true", "false"):
        return field, {"none": None, "true": True, "false": False}[text.lower()]
    for kind in (int, float):
        try:
            return field, kind(text)
        except ValueError:
            pass
    return field, text


def _config(name: str, source: bool, values: dict[str, Any]) -> dhsa.Config:
    if name == "exact":
        return dhsa.Config(**values)
    if name == "paper":
        return dhsa.Config.paper(**values)
    return dhsa.Config.source(name, **values) if source else dhsa.Config(method=name, **values)
