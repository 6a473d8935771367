"""ConfLayers (arXiv 2604.14612): the model drafts without the layers that say little of the text at hand."""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

import numpy as np

from ..batch import Batch, Draft, Tally
from ..budget import Budget
from ..cache import KVCache
from ..confidence import confidence
from ..errors import CapacityError
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Recipe
from ..search import initial_plan
from ..sequence import Sequence
from .base import Method, expect_layers, no_draft
from .checked import Acceptance, Checked, DraftTokens, DraftWeights, Share, Within
from .drafting import Drafting, by_set, grow

# Neighbours a layer is held against: two, and up to so many more where confidence bends most, at the last layer.
NEIGHBOURS, WIDENING = 2, 5
# Draft tokens accepted in a round on average, above which a set may be good enough to stop looking.
ENOUGH = 4

NOTHING_TO_SKIP = (
    "nothing to skip: no layer's confidence is low enough for spread, so nothing was drafted and rounds were plain"
)


@dataclass(frozen=True)
class Options(Checked, method="conflayers"):
    """Left out of the draft are the layers, but for the first and the last, whose confidence is more than `spread`
    standard deviations of their neighbours' below their mean, on the last `window` generated tokens.

    A set drafts for `interval` rounds, half of them where fewer than one token a round is accepted, or is replaced at
    once if it has less than the share `skip_ratio` of the layers; always once `search_budget` of the decoding time pays
    for the next one. Of `max_opt_iter` sets the best is kept, or the first that has more than four tokens a round and
    the share `max_score` of the draft accepted. A draft ends after `num_draft_tokens` or with the first token whose
    probability is below `threshold`; `tree` adds siblings, up to `max_nodes` nodes. With `draft_weights` int8 matrices
    draft in eight bits.
    """

    spread: Annotated[float, Within(0, 100)] = 0.25
    skip_ratio: Share = 0.4
    window: Annotated[int, Within(1, 1024)] = 32
    interval: Annotated[int, Within(1, 10**9)] = 30
    max_opt_iter: Annotated[int, Within(0, 10**9)] = 100
    max_score: Share = 0.95
    num_draft_tokens: DraftTokens = 7
    threshold: Share = 0.8
    tree: bool = False
    max_nodes: Annotated[int, Within(1, 64)] = 32
    draft_weights: DraftWeights = "own"
    acceptance: Acceptance = "coupled"
    search_budget: Share = 0.05


class ConfLayers(Method):
    """Drafting with the latest set, tried for some rounds; at last with the best of them."""

    name = "conflayers"
    options = Options

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        # Less has no bend, and nothing a layer could be held against.
        expect_layers("conflayers", num_layers, 4)
        self._options = options
        self.tree = options.tree
        self.rejection = options.acceptance == "rejection"
        self.quantised = options.draft_weights == "int8"
        self._how = Drafting(
            options.num_draft_tokens,
            options.threshold,
            self.rejection,
            options.tree,
            options.max_nodes,
            quantised=self.quantised,
        )
        self._least = int((num_layers - 2) * options.skip_ratio) + 1
        self._plan = initial_plan(num_layers)
        self._best: tuple[LayerPlan, float] | None = None
        self._sets = 0
        self._finished = not (options.max_opt_iter and options.search_budget)
        self._budget = Budget(options.search_budget)
        self._last_s = 0.0
        self._begin()

    @property
    def plan(self) -> LayerPlan:
        return self._plan

    @property
    def widest(self) -> int:
        return self._options.max_nodes if self.tree else self._options.num_draft_tokens

    @property
    def threshold(self) -> float:
        return self._how.threshold

    def phase(self) -> str:
        return "acceleration" if self._finished else "accumulation"

    def notes(self, executed_skips: int) -> list[str]:
        return [] if self._how.pays(self._plan) else [NOTHING_TO_SKIP]

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        """Confidence-aware drafting, as SWIFT's."""
        return grow(model, cache, batch, self._plan, self._how)[0] if self._how.pays(self._plan) else no_draft(batch)

    def rehearse(self, model: Model, cache: KVCache) -> None:
        window = self._options.window
        with cache.lent(window + 1) as pages:
            confidence(model, cache, pages, [0] * (window + 1), window)

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        if not self._how.pays(self._plan):
            return Recipe(self._full, self._full)
        return by_set(self._full, self._how, sequences, self._plan if self._finished else None)

    def count(self, model: Model, cache: KVCache, tally: Tally) -> float:
        """Judge the set after its rounds, and take the next one from the confidence of the layers (§3)."""
        self._rounds += 1
        self._tries += len(tally.sequences)
        self._deep += sum(tally.depth)
        self._accepted += sum(tally.accepted)
        self._budget.earn(tally.draft_s + tally.verify_s)
        longest = max(tally.sequences, key=lambda sequence: sequence.generated)
        if longest.generated <= self._options.window or not self._due():
            return 0.0
        start = perf_counter()
        self._judge()
        if not self._finished:
            try:
                with model.mark("search", 1, self._options.window):
                    window = self._options.window
                    found = confidence(model, cache, longest.pages, longest.tokens, window)
            except CapacityError:
                return 0.0
            layers = [attention + mlp for attention, mlp in zip(found[2:-2:2], found[3:-2:2], strict=True)]
            self._adopt(low(layers, self._options.spread))
        self._last_s = perf_counter() - start
        self._budget.spend(self._last_s)
        self._tell(longest.generated)
        self._begin()
        return self._last_s

    def _begin(self) -> None:
        """Rounds of the set, over all sequences of them; the depth of their drafts, and what was accepted."""
        self._rounds = self._tries = self._deep = self._accepted = 0

    @property
    def _is_small(self) -> bool:
        return len(self._plan.skipped_attention) < self._least

    def _due(self) -> bool:
        if self._finished or self._budget.seconds < self._last_s:
            return False
        if not self._sets or self._is_small:
            return True
        wanted = self._options.interval
        return self._rounds >= wanted or (2 * self._rounds >= wanted and self._accepted < self._tries)

    def _judge(self) -> None:
        if not self._sets or self._is_small or not self._tries:
            return
        accepted = self._accepted / self._tries
        if accepted > ENOUGH and self._accepted > self._options.max_score * self._deep:
            self._finished = True
        elif self._best is None or accepted > self._best[1]:
            self._best = self._plan, accepted

    def _adopt(self, skipped: list[int]) -> None:
        self._plan = self._full.without(skipped, skipped)
        self._sets += 1
        if self._sets >= self._options.max_opt_iter:
            self._finished = True
            if self._best is not None:
                self._plan = self._best[0]

    def _tell(self, tokens: int) -> None:
        self.events.append(
            {
                "kind": "final" if self._finished else "confidence",
                "iteration": self._sets,
                "skip_attention": list(self._plan.skipped_attention),
                "skip_mlp": list(self._plan.skipped_mlp),
                "accepted_per_round": self._accepted / self._tries,
                "tokens": tokens,
                "seconds": self._last_s,
            }
        )


def low(confidences: Ordered[float], spread: float) -> list[int]:
    """The layers to skip, `confidences` being those of layers 1 to L − 2, of both sub-layers together (§3).

    A layer is skipped whose confidence is below the mean of its neighbours' less `spread` of their deviations. Where
    the curve of confidence bends more, and in later layers, more neighbours count.
    """
    values = np.asarray(confidences, dtype=np.float64)
    values = (values - values.mean()) / (values.std() + 1e-6)
    bend = _centred(np.gradient(np.gradient(values)))
    skipped = list[int]()
    for i, value in enumerate(values):
        around = (NEIGHBOURS + int(WIDENING * bend[i] * (i + 1) / (len(values) + 2))) // 2
        others = np.concatenate([values[max(0, i - around) : i], values[i + 1 : i + around + 1]])
        if value < others.mean() - spread * others.std():
            skipped.append(i + 1)
    return skipped


def _centred(values: np.ndarray) -> np.ndarray:
    """Stretched to have their mean at a half, and as much of 0 to 1 as that allows."""
    above, below = values.max() - values.mean(), values.mean() - values.min()
    if np.isclose(above, -below):  # Nothing but roundings of a straight curve.
        return np.full_like(values, 0.5)
    return 0.5 + (values - values.mean()) * min(0.5 / above, 0.5 / below)
