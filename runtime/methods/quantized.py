"""Drafts by the model itself in eight bits, with all of its sub-layers or without some.

Self-speculation with quantised weights: ML-SpecQD (arXiv 2503.13565), SubSpec (2509.18344); with a skip set it is two
of the strategies that CAS-Spec (2510.26843) builds drafts from, in one draft.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..batch import Batch, Draft
from ..cache import KVCache
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Recipe
from ..sequence import Sequence
from .base import Method
from .checked import Acceptance, Checked, DraftTokens, Share, Vocabulary
from .drafting import Drafting, by_set, grow


@dataclass(frozen=True)
class Options(Checked, method="quantized"):
    """Drafts of `num_draft_tokens` by the model in eight bits, without the attention of layers `skip_attention` and the
    MLP of layers `skip_mlp`.

    A draft ends early with the first token whose probability is below `threshold`. Drafts are made of the `draft_vocab`
    tokens of the lowest ids, 0 being the vocabulary.
    """

    num_draft_tokens: DraftTokens = 7
    threshold: Share = 0.0
    skip_attention: tuple[int, ...] = ()
    skip_mlp: tuple[int, ...] = ()
    draft_vocab: Vocabulary = 0
    acceptance: Acceptance = "coupled"


class Quantized(Method):
    """Every round drafts with the same sub-layers in eight bits."""

    name = "quantized"
    options = Options
    quantised = True

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        self.rejection = options.acceptance == "rejection"
        self._plan = self._full.without(options.skip_attention, options.skip_mlp)
        self._how = Drafting(
            options.num_draft_tokens,
            options.threshold,
            self.rejection,
            vocabulary=options.draft_vocab,
            quantised=True,
        )

    @property
    def plan(self) -> LayerPlan:
        return self._plan

    @property
    def widest(self) -> int:
        return self._how.num_draft_tokens

    @property
    def threshold(self) -> float:
        return self._how.threshold

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        return grow(model, cache, batch, self._plan, self._how)[0]

    def recipe(self, sequences: list[Sequence]) -> Recipe:
        return by_set(self._full, self._how, sequences, self._plan)
