"""A model's prefill by a setting, and what is computed from it: likelihoods and greedy answers, with seconds and
density.

Two measures reduce the cost of many settings on one prompt. The layers before the first one that a setting can make
sparse compute the same for all of them: their result is kept and replayed. And logits are computed only for the tokens
that are scored (likelihood.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

import dhsa
from dhsa import commands
from dhsa.commands import UserError
from dhsa.evaluation.cuts import cutting
from dhsa.evaluation.likelihood import divergence, likelihood
from dhsa.evaluation.settings import Setting, dense
from dhsa.hf.compat import cache_option, float32_products
from dhsa.hf.switching import STATE

__all__ = ["Engine", "Reading", "refusals", "weights_products", "work"]


@contextmanager
def weights_products(kind: str) -> Iterator[None]:
    """Have the model's own matrix products (not those of attention) use numbers rounded to "fp32" or "bf16"."""
    products = float32_products()
    if products is None:
        if kind != "fp32":
            raise UserError(
                f"--weights-products: products in {kind} need torch 2.9 or later, this is {torch.__version__}"
            )
        yield
        return
    before = products.fp32_precision
    products.fp32_precision = {"fp32": "ieee", "bf16": "bf16"}[kind]
    try:
        yield
    finally:
        products.fp32_precision = before


@contextmanager
def refusals(setting: Setting) -> Iterator[None]:
    """Turn a NotImplementedError into a UserError that names the setting."""
    try:
        yield
    except NotImplementedError as error:
        raise UserError(f"--methods: {setting.label}: {error}") from error


class Engine:
    """A model and its tokenizer. `layers`: the layers that may be sparse; None: all. `group`: of several processes that
    divide prompts among them and all make the same calls."""

    def __init__(self, model: Any, tokenizer: Any, layers: Iterable[int] | None = None, group: Any = None) -> None:
        self.model, self.tokenizer, self.group = model, tokenizer, group
        self.layers = None if layers is None else frozenset(layers)
        config = model.config.get_text_config()
        self.depth = config.num_hidden_layers
        kinds = getattr(config, "layer_types", None) or [None] * self.depth
        self.windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
        # Prompts are divided in other places where layers leave keys out, so a group replays none.
        self._blocks = None if group is not None else getattr(model.get_decoder(), "layers", None)
        self._prompt: tuple[int, ...] = ()
        self._kept: dict[int, Any] = {}  # for a number of first layers: their output for self._prompt
        self.prefix = self._special_prefix()

    def _special_prefix(self) -> list[int]:
        """Return the tokens that the tokenizer puts before a text."""
        plain = self.tokenizer("a", add_special_tokens=False).input_ids
        whole = self.tokenizer("a").input_ids
        return list(whole[: len(whole) - len(plain)]) if whole[-len(plain) :] == plain else []

    def encode(self, text: str) -> list[int]:
        """Return the tokens of the text, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    # ---- prefill -----------------------------------------------------------------------------------------------------

    def first_sparse(self, setting: Setting, length: int) -> int:
        """Return the first layer in which the setting may leave keys out; all before it are exact."""
        for layer in range(self.depth):
            if self.layers is not None and layer not in self.layers:
                continue
            config, window = setting.at(layer), self.windows[layer]
            if config.mass is not None or config.skip is not None:
                return layer
            limit = config.budget
            if limit is not None and length > limit and not (window is not None and window <= limit):
                return layer
        return self.depth

    def prefill(self, ids: list[int], setting: Setting, replay: bool = True) -> tuple[Any, dict[str, Any]]:
        """Return (last hidden states [length, size], the fields of a row that describe the work) of a prompt read by a
        setting. Without `replay` every layer is computed.
        """
        first = self.first_sparse(setting, len(ids))
        if self._prompt != tuple(ids):
            self._prompt, self._kept = tuple(ids), {}
        replayed = first if replay and not setting.dense and first in self._kept else 0
        forget_runs(self.model)
        shared = self._replaying(replayed) if replayed else self._keeping(first)
        with self._attending(setting), shared:
            start = time.perf_counter()
            out = self.model.get_decoder()(torch.tensor([ids], device="cpu"), use_cache=False)
            seconds = time.perf_counter() - start
            runs = self._runs()
        if any(r.path == "sparse" and r.layer < first for r in runs):
            self._kept.pop(first, None)  # exact by a rule that this file does not know: nothing is replayed
        return out.last_hidden_state[0], work(runs, seconds, replayed, setting.dense)

    def remember(self, ids: list[int]) -> Any:
        """Return the last hidden states of a prompt by dense attention, and keep what every layer computes: prefills of
        this prompt by other settings then begin at their first sparse layer.
        """
        self._prompt, self._kept = tuple(ids), {}
        with ExitStack() as stack:
            for first in range(1, self.depth + 1):
                stack.enter_context(self._keeping(first))
            stack.enter_context(self._attending(dense()))
            return self.model.get_decoder()(torch.tensor([ids], device="cpu"), use_cache=False).last_hidden_state[0]

    def _parallel(self) -> Any:
        """While the model is patched: what hf/parallel.py holds for a group; else None."""
        return self.model.__dict__[STATE].parallel

    def _runs(self) -> list[Any]:
        """What each layer did in the last prefill, of all processes."""
        runs, parallel = dhsa.last_run(self.model, "prefill"), self._parallel()
        return runs if parallel is None else parallel.together(runs)

    @contextmanager
    def _attending(self, setting: Setting) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(refusals(setting))
            try:
                stack.enter_context(dhsa.patched(self.model, setting.config, self.layers, group=self.group))
            except ValueError as error:  # a predictor that was trained for another model
                raise UserError(f"--methods: {setting.label}: {error}") from error
            for context in (torch.no_grad(), cutting(setting.cuts)):
                stack.enter_context(context)
            yield

    @contextmanager
    def _keeping(self, first: int) -> Iterator[None]:
        """Keep what the layers before `first` compute for the prompt."""
        if not first or self._blocks is None:
            yield
            return

        def keep(module: Any, args: Any, output: Any) -> None:
            self._kept[first] = output

        handle = self._blocks[first - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _replaying(self, first: int) -> Iterator[None]:
        """Have the layers before `first` return what was kept instead of computing it."""
        kept = self._kept[first]
        assert self._blocks is not None  # found when something was kept
        blocks = self._blocks[:first]
        try:
            for block in blocks:
                block.forward = lambda *args, **kwargs: kept
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    # ---- results from hidden states ----------------------------------------------------------------------------------

    def likelihood(self, hidden: Any, ids: list[int], first: int, best: bool = False) -> tuple[Any, Any]:
        """Return (log-likelihood float64, with `best` whether it is the most likely token) of ids[first:], each given
        all before.
        """
        with torch.no_grad():
            return likelihood(
                self.model, hidden[first - 1 : len(ids) - 1], torch.tensor(ids[first:], device="cpu"), best
            )

    def divergence(
        self, hidden: Sequence[Any], reference: Any, ids: list[int], first: int, every: int = 1
    ) -> list[tuple[Any, Any, Any]]:
        """Return, for each of `hidden`, (log-likelihood float64, KL from the reference float64, whether the likeliest
        token is the reference's) of the distributions that predict ids[first::every].

        hidden, reference: last hidden states [length, size] of prefills of `ids`. Logits are float32 whatever the
        dtype of the model: rounded to bf16 they are up to 0.06 from their values at 16 to 32, which alone is a KL of
        about 0.001.
        """
        states = [h[first - 1 : len(ids) - 1 : every] for h in (reference, *hidden)]
        # Numbers that are in bf16 already lose nothing in products of bf16, whose sums are float32.
        narrow = states[0].dtype == torch.bfloat16 and float32_products() is not None
        with torch.no_grad(), weights_products("bf16") if narrow else nullcontext():
            theirs, *own = (s.float() for s in states)
            return divergence(self.model, own, theirs, torch.tensor(ids[first::every], device="cpu"))

    # ---- answers through a cache -------------------------------------------------------------------------------------

    def read(self, ids: list[int], setting: Setting, after: Reading | None = None) -> Reading:
        """Return what a model holds that has read a prompt by a setting, or a further part of one that it has begun to
        read, whose cache then grows.
        """
        from transformers import DynamicCache

        decoder = self.model.get_decoder()
        cache = DynamicCache(config=self.model.config.get_text_config()) if after is None else after.cache
        forget_runs(self.model)
        with self._attending(setting):
            start = time.perf_counter()
            out = decoder(torch.tensor([ids], device="cpu"), **cache_option(decoder, cache), use_cache=True)
            seconds = time.perf_counter() - start
            done = work(self._runs(), seconds, 0, setting.dense) if after is None else after.work
        return Reading(cache, out.last_hidden_state[:, -1:], setting, done)

    def continuation(self, reading: Reading, tokens: int, enough: Callable[[str], bool] | None = None) -> str:
        """Return the greedy continuation of what was read, which its cache then holds, decoded as the setting decodes.

        Ends after `tokens`, at the model's end token, or once `enough` is true of the text.
        """
        ends = {e for e in _as_list(self.model.generation_config.eos_token_id) if e is not None}
        ends |= {self.tokenizer.eos_token_id} - {None}
        chosen: list[int] = []
        decoder, last = self.model.get_decoder(), reading.last
        with self._attending(reading.setting):
            held, parallel = cache_option(decoder, reading.cache), self._parallel()
            while True:
                token = commands.logits(self.model, last).argmax(-1)
                token = token if parallel is None else parallel.same(token)
                if int(token) in ends:
                    break
                chosen.append(int(token))
                if len(chosen) == tokens or (enough and enough(self.text(chosen))):
                    break
                last = decoder(token, **held, use_cache=True).last_hidden_state
        return self.text(chosen)

    def answer(self, reading: Reading, ids: list[int]) -> tuple[Any, Any]:
        """Return (log-likelihood float64, whether it is the most likely token) of each of `ids` after what was read.

        They go through the cache at once and by exact attention, as in decoding with `Config(decode="exact")`. The
        cache then holds all of them but the last.
        """
        states, decoder = [reading.last[0]], self.model.get_decoder()
        if len(ids) > 1:
            with self._attending(dense()):
                piece = torch.tensor([ids[:-1]], device="cpu")
                held = cache_option(decoder, reading.cache)
                states.append(decoder(piece, **held, use_cache=True).last_hidden_state[0])
        with torch.no_grad():
            return likelihood(self.model, torch.cat(states), torch.tensor(ids, device="cpu"), best=True)

    def copied(self, reading: Reading) -> Reading:
        """Return a reading with a cache of its own."""
        return reading._replace(cache=copy.deepcopy(reading.cache))

    def text(self, ids: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def generate(
        self, ids: list[int], setting: Setting, tokens: int, enough: Callable[[str], bool] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Return (`continuation` of a prompt read by a setting, the fields of a row that describe the work)."""
        reading = self.read(ids, setting)
        return self.continuation(reading, tokens, enough), reading.work


class Reading(NamedTuple):
    """What a model holds that has read a prompt: its cache, the last hidden state [1, 1, size], the setting by which it
    has read, and the fields of a row that describe the work of the first part.
    """

    cache: Any
    last: Any
    setting: Setting
    work: dict[str, Any]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def forget_runs(model: Any) -> None:
    """Delete records of earlier calls, which would otherwise be taken for those of replayed layers."""
    for module in model.modules():
        module.__dict__.pop("_dhsa_runs", None)


def work(runs: list[Any], seconds: float, replayed: int, dense: bool) -> dict[str, Any]:
    """Return the fields of a row that describe a prefill.

    Of the layers that were sparse (where none was, those without a window): their mean realised density, the share of
    their tiles that `Config.skip` left out, and their seconds of selection and attention. Of the whole prefill: its
    seconds, without the `replayed` layers.
    """
    sparse = [] if dense else [r for r in runs if r.path == "sparse"]
    shown = sparse or [r for r in runs if r.kind == "full"]
    return {
        "density": sum(r.density for r in shown) / len(shown) if shown else 1.0,
        "skipped": sum(r.skipped for r in shown) / len(shown) if shown else 0.0,
        "sparse_layers": len(sparse),
        "select_seconds": sum(r.select_seconds for r in shown),
        "attend_seconds": sum(r.attend_seconds for r in shown),
        "prefill_seconds": seconds,
        "replayed_layers": replayed,
    }
