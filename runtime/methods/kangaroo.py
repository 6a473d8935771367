"""Kangaroo (arXiv 2404.18911): the first layers and a trained adapter draft, the rest verify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import Tensor

from ...loaders.adapter import adapter_config
from ...loaders.config import ModelConfig
from ..adapter import UNTRAINED, Adapter
from ..batch import Batch, Draft, Exit
from ..cache import KVCache
from ..calibration import Encode
from ..errors import RequestError
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Recipe
from ..rows import Rows
from ..sequence import Sequence
from ..stepwise import Stepwise
from .base import Method, expect_layers, sampled
from .checked import Acceptance, Checked, DraftTokens, Share, Vocabulary, Within
from .drafting import Drafting, grow

NO_TRAINING = (
    "the adapter is untrained, drawn at random: it serves tests and measurements, and its drafts are worth little"
)


@dataclass(frozen=True)
class Options(Checked, method="kangaroo"):
    """Drafts of `num_draft_tokens` by the first `exit_layer` layers and the `adapter` in a folder of config.json and
    model.safetensors, or an "untrained" one. A draft ends early with a token less probable than `threshold`, 0 being
    never. Drafts are made of the `draft_vocab` tokens of the lowest ids, 0 being the vocabulary.
    """

    adapter: str = ""
    exit_layer: Annotated[int, Within(1, 512)] = 2
    num_draft_tokens: DraftTokens = 6
    threshold: Share = 0.6
    draft_vocab: Vocabulary = 0
    acceptance: Acceptance = "coupled"


class Kangaroo(Method):
    """Double early exit: a draft leaves the model after a few layers, and ends with a token that is not sure."""

    name = "kangaroo"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        expect_layers("kangaroo", num_layers)
        if not options.adapter:
            raise RequestError(
                "method kangaroo: option adapter expects the folder of a trained adapter, with config.json and "
                f"model.safetensors, or {UNTRAINED}; got none"
            )
        if options.exit_layer >= num_layers:
            expected = f"1 to {num_layers - 1}, got {options.exit_layer}"
            raise RequestError(f"method kangaroo: option exit_layer expects {expected}")
        self._options = options
        self._adapter: Adapter | None = None
        self.rejection = options.acceptance == "rejection"

    @classmethod
    def fit(cls, options: Options, config: ModelConfig) -> Kangaroo:
        """As of every method.

        Raises:
            ConfigError, CheckpointError: there is no adapter in the folder, or it is not for this model.
        """
        method = cls(options, config.num_layers)
        if options.adapter != UNTRAINED:
            adapter_config(Path(options.adapter), config)
        return method

    @property
    def plan(self) -> LayerPlan:
        return self._full.early_exit(self._options.exit_layer)

    @property
    def widest(self) -> int:
        return self._options.num_draft_tokens

    @property
    def threshold(self) -> float:
        return self._options.threshold

    @property
    def adapter(self) -> Adapter:
        assert self._adapter is not None, "a method is prepared before its first request"
        return self._adapter

    def prepare(self, model: Model, encode: Encode | None) -> Stepwise[None]:
        self._adapter = Adapter.of(model, self._options.adapter)
        yield from ()

    def prompt_pass(self, model: Model, cache: KVCache, rows: Rows) -> Tensor:
        layer = self._options.exit_layer
        return model.forward(rows, cache, self._full.resume(layer), self.adapter.exit(model, cache, rows, self.plan))

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        options = self._options
        how = Drafting(
            options.num_draft_tokens,
            options.threshold,
            self.rejection,
            vocabulary=options.draft_vocab,
            adapter=self.adapter,
        )
        draft, states = grow(model, cache, batch, self.plan, how)
        return draft._replace(exit=Exit(options.exit_layer, states, self.adapter))

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        options = self._options
        return Recipe(
            self._full,
            self.plan,
            options.num_draft_tokens,
            confident=options.threshold > 0,
            reuse=True,
            rejection=self.rejection and sampled(sequences),
            vocabulary=options.draft_vocab,
            adapter=self.adapter,
        )

    def notes(self, executed_skips: int) -> list[str]:
        return [NO_TRAINING] if self._options.adapter == UNTRAINED else []
