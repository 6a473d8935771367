"""What every method is: a drafter under the shared round of `speculate`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, ClassVar
from weakref import ref

import torch
from torch import Tensor

from ...loaders.config import ModelConfig
from ...loaders.weights import Weights
from ..batch import Batch, Draft, Round, Tally
from ..cache import KVCache
from ..calibration import Encode
from ..errors import RequestError
from ..merging import Build
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Recipe
from ..rows import Rows
from ..sequence import Sequence
from ..stepwise import Stepwise


class Method:
    """Plain decoding, and the places where a method differs from it.

    One instance serves one engine and one set of options, over all requests: what it learns belongs to it and to nobody
    else. Built as `Method(options, num_layers)`, or by `fit` where a method needs more of the model's shape.
    """

    name: ClassVar[str]
    # The frozen dataclass of its options; `name:key=value,…` gives its fields.
    options: ClassVar[type[Any]]
    lossless: bool = True
    # Values of `model_type` whose checkpoints are made for this method, which no other method runs; none: dense models.
    checkpoints: ClassVar[tuple[str, ...]] = ()
    # Whether sampled drafts are accepted by rejection sampling instead of by equality under shared noise.
    rejection: bool = False

    # Whether drafts are trees, and the rounds of a new sequence in which every kind of pass occurs.
    tree: bool = False
    period: int = 1

    # Whether drafts are made with matrices in eight bits, which an engine then has beside its own.
    quantised: bool = False

    # Whether it edits the weights an engine is loaded with, which then serves no other method.
    edits: ClassVar[bool] = False

    def __init__(self, options: Any, num_layers: int) -> None:
        self._full = LayerPlan.full(num_layers)
        # What is worth telling about what was learnt and was not told yet, oldest first.
        self.events: list[Mapping[str, Any]] = []

    @classmethod
    def fit(cls, options: Any, config: ModelConfig) -> Method:
        """An instance for a model of this shape.

        Raises:
            RequestError: the options do not fit it.
        """
        return cls(options, config.num_layers)

    @property
    def plan(self) -> LayerPlan:
        """What a draft step runs, for the statistics."""
        return self._full

    @property
    def target(self) -> LayerPlan:
        """The pass that has the last word on every generated token: for a lossless method, the full model."""
        return self._full

    @property
    def prompt(self) -> LayerPlan:
        """The pass that reads a prompt."""
        return self.target

    def prompt_pass(self, model: Model, cache: KVCache, rows: Rows) -> Tensor:
        """The pass over rows of a prompt, which caches them: the residual stream [R, H] after it."""
        return model.forward(rows, cache, self.prompt)

    @property
    def plain_prompts(self) -> bool:
        """Whether `prompt_pass` is all that a prompt needs: then one may be over the prompts of several sequences."""
        return True

    @property
    def prompt_kind(self) -> Hashable:
        """What a prompt's keys and values depend on besides its tokens, where prompts are plain."""
        return self.prompt if type(self).prompt_pass is Method.prompt_pass else ref(self)

    @property
    def widest(self) -> int:
        """Draft tokens a sequence has in a round at most, those of a tree all counted."""
        return 0

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        """Up to k draft tokens for every sequence; fewer, or none, is always allowed."""
        return no_draft(batch)

    def prepare(self, model: Model, encode: Encode | None) -> Stepwise[None]:
        """Run once, before the first request: check what needs the model, look at text, measure what needs a clock.

        Others take their turns wherever it yields. `encode` makes token ids of text where there is a tokenizer.
        """
        yield from ()

    def rehearse(self, model: Model, cache: KVCache) -> None:
        """Run once, for a warm-up, every kind of pass that neither drafts nor has the last word."""

    def admits(self, running: list[Sequence]) -> bool:
        """Whether a new sequence may join those `running` now; a method may hold it back for a few rounds."""
        return True

    def unites(self, sequences: list[Sequence]) -> bool:
        """Whether these sequences, of several requests, may share the next round."""
        return True

    def edit(
        self, config: ModelConfig, weights: Weights, build: Build, encode: Encode | None
    ) -> tuple[ModelConfig, Weights]:
        """Called first of all, where `edits`: the model to be served instead. `build` prepares one to be tried out."""
        return config, weights

    def findings(self, sequence: Sequence) -> list[Mapping[str, Any]]:
        """What was found before the first request, or decided for this sequence; told with its result."""
        return []

    def observe(self, model: Model, cache: KVCache, done: Round) -> float:
        """Learn from a finished round; returns the seconds spent."""
        return self.count(model, cache, done.tally)

    def count(self, model: Model, cache: KVCache, tally: Tally) -> float:
        """Learn from what a round came to, which is all that is known of one the device ran alone; as `observe`."""
        return 0.0

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        """How the device runs the next round alone, but for `choosing`; None where the method needs the host for it."""
        return None

    def recipes(self, sequences: list[Sequence]) -> list[Recipe]:
        """Every recipe that rounds of these sequences may come to, of skip sets those that are known by now."""
        recipe = self.recipe(sequences)
        return [recipe] if recipe else []

    def memory(self, sequence: Sequence) -> Tensor | None:
        """The tensor, of one shape for every sequence, that the recipe's steps read and change of this one; or None."""
        return None

    @property
    def remembered(self) -> Tensor | None:
        """Tokens of other texts that the recipe's `ngrams` look in, int32 [remember] on the host, or None."""
        return None

    @property
    def threshold(self) -> float:
        """The probability below which a draft of the device ends."""
        return 0.0

    @property
    def limit(self) -> int:
        """The tokens a draft of the device has at most, where its recipe is `limited`."""
        return self.widest

    def phase(self) -> str:
        """What the method is doing, for the timeline of a run."""
        return "decode"

    def tell(self) -> list[Mapping[str, Any]]:
        """The events so far, which are told once, to the request in whose rounds they came about."""
        told = list(self.events)
        self.events.clear()
        return told

    def notes(self, executed_skips: int) -> list[str]:
        """What a reader of a request's figures must know; it did not run `executed_skips` sub-layers."""
        return []


def expect_layers(method: str, num_layers: int, least: int = 2) -> None:
    """Refuse a model of fewer layers, with a RequestError."""
    if num_layers < least:
        raise RequestError(f"method {method}: expected a model of at least {least} layers, got {num_layers}")


def sampled(sequences: list[Sequence]) -> bool:
    """Whether any of the sequences draws its tokens."""
    return any(not sequence.params.greedy for sequence in sequences)


def no_draft(batch: Batch) -> Draft:
    """A round without a draft is plain decoding."""
    tokens = torch.empty(len(batch), 0, dtype=torch.int64, device=batch.device)
    return Draft(tokens, torch.zeros(len(batch), dtype=torch.int64, device=batch.device))
