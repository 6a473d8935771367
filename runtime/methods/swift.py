"""SWIFT (arXiv 2410.06916): the model drafts with some of its sub-layers, chosen on the fly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from ..batch import Batch, Draft
from ..cache import KVCache
from ..errors import CapacityError, RequestError
from ..model import Model
from ..plan import LayerPlan
from ..search import RandomSearch, matchness
from ..sequence import Sequence
from .base import Method
from .drafting import chain


@dataclass(frozen=True)
class Options:
    """`skip_attention` and `skip_mlp` fix the skip set by hand; without them it is searched for.

    A draft ends after `num_draft_tokens` or with the first token whose probability is below `threshold`. Every `window`
    generated tokens, candidates are scored on the last `window` tokens, for at most `search_budget` of the decoding
    time.
    """

    skip_attention: tuple[int, ...] = ()
    skip_mlp: tuple[int, ...] = ()
    num_draft_tokens: int = 7
    threshold: float = 0.8
    skip_ratio: float = 0.45
    window: int = 32
    max_score: float = 0.95
    max_tolerance_iter: int = 300
    max_opt_iter: int = 1000
    search_budget: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        for option, low, high in (
            ("num_draft_tokens", 1, 64),
            ("threshold", 0, 1),
            ("skip_ratio", 0, 1),
            ("window", 1, 1024),
            ("max_score", 0, 1),
            ("max_tolerance_iter", 1, 10**9),
            ("max_opt_iter", 0, 10**9),
            ("search_budget", 0, 1),
            ("seed", 0, 2**63),
        ):
            value = getattr(self, option)
            if not low <= value <= high:
                raise RequestError(f"method swift: option {option} expects {low} to {high}, got {value}")


class Swift(Method):
    """Confidence-aware drafting with the best skip set known, and the search for a better one."""

    name = "swift"

    def __init__(self, options: Options, num_layers: int) -> None:
        super().__init__(options, num_layers)
        self._options = options
        self._search = RandomSearch(
            num_layers,
            options.skip_ratio,
            options.max_score,
            options.max_tolerance_iter,
            options.max_opt_iter,
            options.seed,
        )
        fixed = options.skip_attention or options.skip_mlp
        self._fixed = self._full.without(options.skip_attention, options.skip_mlp) if fixed else None
        self._accumulated = 0
        self._budget_s = self._candidate_s = 0.0

    @property
    def plan(self) -> LayerPlan:
        return self._fixed or self._search.incumbent.plan

    def phase(self) -> str:
        frozen = self._fixed or self._search.finished or not self._options.search_budget
        return "acceleration" if frozen else "accumulation"

    def events(self) -> list[Mapping[str, Any]]:
        return list(self._search.events)

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        """Confidence-aware drafting (§4.2)."""
        return chain(model, cache, batch, self.plan, self._options.num_draft_tokens, self._options.threshold)[0]

    def observe(self, model: Model, cache: KVCache, sequences: list[Sequence], tokens: int, seconds: float) -> float:
        """Context-based layer-set optimisation (§4.1), once `window` tokens have come and the budget allows it."""
        if self.phase() == "acceleration":
            return 0.0
        # Until a candidate has been timed, it counts as a round.
        self._candidate_s = self._candidate_s or seconds
        if not self._due():
            self._accumulated += tokens
            self._budget_s += self._options.search_budget * seconds
        longest = max(sequences, key=lambda sequence: sequence.generated)
        if not self._due() or longest.generated <= self._options.window:
            return 0.0
        start = perf_counter()
        if self._optimise(model, cache, longest):
            self._accumulated = 0
        spent = perf_counter() - start
        self._budget_s -= spent
        return spent

    def _due(self) -> bool:
        """Whether a step has been earned; while no sequence is long enough for it, nothing more is saved up."""
        return self._accumulated >= self._options.window and self._budget_s >= 2 * self._candidate_s

    def _optimise(self, model: Model, cache: KVCache, sequence: Sequence) -> bool:
        """Score the incumbent on this window, then candidates while the budget lasts; False if no page was free."""
        start, scored = perf_counter(), 0
        try:
            self._search.remeasure(self._score(model, cache, sequence, self._search.incumbent.plan))
            while not self._search.finished:
                scored += 1
                candidate = self._search.suggest()
                self._search.record(candidate, self._score(model, cache, sequence, candidate), sequence.generated)
                spent = perf_counter() - start
                self._candidate_s = spent / (scored + 1)
                if spent + self._candidate_s > self._budget_s:
                    break
        except CapacityError:
            return False
        return True

    def _score(self, model: Model, cache: KVCache, sequence: Sequence, plan: LayerPlan) -> float:
        return matchness(model, cache, sequence.pages, sequence.tokens, self._options.window, plan)
