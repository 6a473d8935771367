"""LayerSkip (arXiv 2404.16710): the first layers draft, the rest verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..batch import Batch, Draft, Exit
from ..cache import KVCache
from ..errors import RequestError
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Recipe
from ..sequence import Sequence
from .base import Method, expect_layers, no_draft, sampled
from .checked import Acceptance, Checked, DraftTokens, Share, Vocabulary, Within
from .drafting import Drafting, grow


@dataclass(frozen=True)
class Options(Checked, method="layerskip"):
    """Drafts of `num_draft_tokens` by the first `exit_layer` layers, the final norm and the head.

    Without `exit_layer` that is two thirds of them. A draft ends early with a token less probable than `threshold`, 0
    being never. With `reuse`, verification starts from the streams the draft left after the exit layer; without it, it
    is a full pass. `verify` false is plain early exit, which is lossy. Drafts are made of the `draft_vocab` tokens of
    the lowest ids, 0 being the vocabulary.
    """

    exit_layer: Annotated[int | None, Within(1, 512)] = None
    num_draft_tokens: DraftTokens = 6
    threshold: Share = 0.0
    reuse: bool = True
    verify: bool = True
    draft_vocab: Vocabulary = 0
    acceptance: Acceptance = "coupled"


class LayerSkip(Method):
    """Self-drafting and self-verification with one cache: both passes share the keys and values of the early layers."""

    name = "layerskip"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        expect_layers("layerskip", num_layers)
        layer = options.exit_layer or max(1, 2 * num_layers // 3)
        if layer >= num_layers:
            raise RequestError(f"method layerskip: option exit_layer expects 1 to {num_layers - 1}, got {layer}")
        self._options, self._layer = options, layer
        self.lossless = options.verify
        self.rejection = options.acceptance == "rejection"

    @property
    def plan(self) -> LayerPlan:
        return self._full.early_exit(self._layer)

    @property
    def target(self) -> LayerPlan:
        return self._full if self._options.verify else self.plan

    @property
    def widest(self) -> int:
        return self._options.num_draft_tokens if self._options.verify else 0

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        options = self._options
        if not options.verify:
            return Recipe(self.plan, self.plan)
        return Recipe(
            self._full,
            self.plan,
            options.num_draft_tokens,
            confident=options.threshold > 0,
            reuse=options.reuse,
            rejection=self.rejection and sampled(sequences),
            vocabulary=options.draft_vocab,
        )

    @property
    def threshold(self) -> float:
        return self._options.threshold

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        if not self._options.verify:
            return no_draft(batch)
        options = self._options
        how = Drafting(options.num_draft_tokens, options.threshold, self.rejection, vocabulary=options.draft_vocab)
        draft, states = grow(model, cache, batch, self.plan, how)
        return draft._replace(exit=Exit(self._layer, states)) if self._options.reuse else draft
