"""SWIFT (arXiv 2410.06916): the model drafts with some of its sub-layers, chosen on the fly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Annotated

from ..batch import Batch, Draft, Tally
from ..budget import Budget
from ..cache import KVCache
from ..calibration import Encode
from ..confidence import confidence
from ..errors import CapacityError, RequestError
from ..model import Model
from ..plan import LayerPlan
from ..recipe import Recipe
from ..search import Drift, Incumbent, Search, matchness
from ..sequence import Sequence
from ..skip_sets import SkipSet
from ..stepwise import Stepwise
from .base import Method, no_draft
from .checked import Acceptance, Checked, DraftWeights, OneOf, Share, Vocabulary, Within
from .drafting import Drafting, by_set, grow

# The adaptive threshold's goal and its step.
TARGET, STEP = 0.9, 0.01
# Drafts as long as this and the newest token fill a tile of the CPU.
NUM_DRAFT_TOKENS = 7

NOTHING_TO_SKIP = (
    "nothing to skip: skip_ratio or set leaves the draft every sub-layer, so nothing was drafted and rounds were plain"
)


@dataclass(frozen=True)
class Options(Checked, method="swift"):
    """`skip_attention` and `skip_mlp` fix the skip set by hand, `set` names a file of `skipjack tune`; without them it
    is searched for.

    A draft ends after `num_draft_tokens` (0: as many as the file of `set` says, or 7) or with the first token whose
    probability is below `threshold`, which `adaptive` moves to keep nine of ten drafts accepted (Draft & Verify, arXiv
    2309.08168). `tree` adds siblings, up to `max_nodes` nodes. Drafts are made of the `draft_vocab` tokens of the
    lowest ids, 0 being the vocabulary, and with `draft_weights` int8 by matrices in eight bits. Every `window`
    generated tokens, candidates are scored on the last `window` tokens, or with `score_on` first on the first ones of
    the answer, for at most `search_budget` of the decoding time; every `bayes_interval`-th is Bayesian. The set to
    start from and the first candidate leave out the sub-layers of least confidence (ConfLayers, arXiv 2604.14612)
    unless `first` is random. A finished search resumes when the acceptance rate falls by the share `restart_drop`; 0
    never does.
    """

    skip_attention: tuple[int, ...] = ()
    skip_mlp: tuple[int, ...] = ()
    set: str = ""
    num_draft_tokens: Annotated[int, Within(0, 64)] = 0
    threshold: Share = 0.8
    adaptive: bool = False
    tree: bool = False
    max_nodes: Annotated[int, Within(1, 64)] = 32
    draft_vocab: Vocabulary = 0
    draft_weights: DraftWeights = "own"
    acceptance: Acceptance = "coupled"
    skip_ratio: Share = 0.45
    window: Annotated[int, Within(1, 1024)] = 32
    score_on: Annotated[str, OneOf(("last", "first"))] = "last"
    max_score: Share = 0.95
    max_tolerance_iter: Annotated[int, Within(1, 10**9)] = 300
    max_opt_iter: Annotated[int, Within(0, 10**9)] = 1000
    first: Annotated[str, OneOf(("confidence", "random"))] = "confidence"
    bayes_interval: Annotated[int, Within(0, 10**9)] = 25
    restart_drop: Share = 0.3
    search_budget: Share = 0.02
    seed: Annotated[int, Within(0, 2**63)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.set and (self.skip_attention or self.skip_mlp):
            raise RequestError("method swift: expected either set or skip_attention and skip_mlp, got both")


class Swift(Method):
    """Confidence-aware drafting with the best skip set known, and the search for a better one."""

    name = "swift"
    options = Options

    def __init__(
        self, options: Options, num_layers: int, affords: Callable[[float], bool] = lambda seconds: True
    ) -> None:
        """`affords`: whether a search may take so many seconds now, besides what the budget allows."""
        super().__init__(options, num_layers)
        self._options, self._affords = options, affords
        self.tree = options.tree
        self._saved = SkipSet.load(Path(options.set)) if options.set else None
        if self._saved and self._saved.num_layers != num_layers:
            raise RequestError(f"{options.set}: expected a set for {num_layers} layers, got {self._saved.num_layers}")
        saved = self._saved
        self._search = Search(
            num_layers,
            options.skip_ratio,
            options.max_score,
            options.max_tolerance_iter,
            options.max_opt_iter,
            options.seed,
            options.bayes_interval,
            Incumbent(self._full.without(saved.skip_attention, saved.skip_mlp), saved.score) if saved else None,
        )
        self.events = self._search.events
        fixed = options.skip_attention or options.skip_mlp
        self._fixed = self._full.without(options.skip_attention, options.skip_mlp) if fixed else None
        self.quantised = options.draft_weights == "int8"
        # Rounds without a draft are those of plain decoding, its draws included.
        self.rejection = options.acceptance == "rejection" and (self.quantised or self.plan.skipped > 0)
        self._how = Drafting(
            options.num_draft_tokens or (saved and saved.num_draft_tokens) or NUM_DRAFT_TOKENS,
            options.threshold,
            self.rejection,
            options.tree,
            options.max_nodes,
            options.draft_vocab,
            quantised=self.quantised,
        )
        self._accepted_share = TARGET
        self._drift = Drift(options.restart_drop)
        # Draft steps of the latest round that drafted: with another number, another share is accepted of the same text.
        self._steps = 0
        self._started = options.first == "random" or saved is not None
        self._accumulated = 0
        self._budget = Budget(options.search_budget)
        self._candidate_s = 0.0

    @property
    def plan(self) -> LayerPlan:
        return self._fixed or self._search.incumbent.plan

    @property
    def drafts(self) -> bool:
        """Whether a draft by the set costs less than the model."""
        return self._how.pays(self.plan)

    @property
    def widest(self) -> int:
        return self._options.max_nodes if self.tree else self._how.num_draft_tokens

    def phase(self) -> str:
        frozen = self._fixed or self._search.finished or not self._options.search_budget
        return "acceleration" if frozen else "accumulation"

    def notes(self, executed_skips: int) -> list[str]:
        return [] if self.drafts else [NOTHING_TO_SKIP]

    def prepare(self, model: Model, encode: Encode | None) -> Stepwise[None]:
        if self._saved:
            self._saved.check(model.config, model.fingerprint, Path(self._options.set))
        yield from ()

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        """Confidence-aware drafting (§4.2)."""
        return grow(model, cache, batch, self.plan, self._how)[0] if self.drafts else no_draft(batch)

    def rehearse(self, model: Model, cache: KVCache) -> None:
        window = self._options.window
        with cache.lent(window + 1) as pages:
            matchness(model, cache, pages, [0] * (window + 1), window, self._full)
            confidence(model, cache, pages, [0] * (window + 1), window)

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        if not self.drafts:
            return Recipe(self._full, self._full)
        settled = self.plan if self.phase() == "acceleration" else None
        recipe = by_set(self._full, self._how, sequences, settled)
        return replace(recipe, confident=True) if self._options.adaptive else recipe

    @property
    def threshold(self) -> float:
        return self._how.threshold

    def count(self, model: Model, cache: KVCache, tally: Tally) -> float:
        """Context-based layer-set optimisation (§4.1), once `window` tokens have come and the budget allows it."""
        depth, accepted = sum(tally.depth), sum(tally.accepted)
        if self._options.adaptive and depth:
            self._adapt(accepted / depth)
        steps = tally.recipe.num_draft_tokens if tally.recipe else self._how.num_draft_tokens
        if depth and steps != self._steps:
            self._steps = steps
            self._drift.reset()
        longest = max(tally.sequences, key=lambda sequence: sequence.generated)
        if self.phase() == "acceleration":
            if not self._fixed and self._options.search_budget and self._drift.observe(depth, accepted):
                self._search.resume(longest.generated)
                self._drift.reset()
            return 0.0
        # Until a candidate has been timed, it counts as a round.
        seconds = tally.draft_s + tally.verify_s
        self._candidate_s = self._candidate_s or seconds
        if not self._due():
            self._accumulated += sum(tally.emitted)
            self._budget.earn(seconds)
        if not self._started and self._affords(self._candidate_s):
            return self._start(model, cache, longest)
        if not self._due() or longest.generated <= self._options.window or not self._affords(self._budget.seconds):
            return 0.0
        start = perf_counter()
        with model.mark("search", 1, self._options.window):
            if self._optimise(model, cache, longest):
                self._accumulated = 0
                self._drift.reset()
        spent = perf_counter() - start
        self._budget.spend(spent)
        return spent

    def _adapt(self, share: float) -> None:
        """Move the threshold so that `TARGET` of a draft's depth is accepted (Draft & Verify, §3.3, of chains)."""
        self._accepted_share = 0.5 * self._accepted_share + 0.5 * share
        wanted = self._how.threshold + (STEP if self._accepted_share < TARGET else -STEP)
        moved = 0.9 * self._how.threshold + 0.1 * wanted
        self._how = replace(self._how, threshold=min(1.0, max(0.0, moved)))

    def _start(self, model: Model, cache: KVCache, sequence: Sequence) -> float:
        """Draft without the sub-layers that say least of the text so far: a pass on credit, instead of any scores."""
        start = perf_counter()
        try:
            with model.mark("search", 1, self._options.window):
                self._search.start(self._confidence(model, cache, sequence), sequence.generated)
        except CapacityError:
            return 0.0
        self._started = True
        spent = perf_counter() - start
        self._budget.spend(spent)
        return spent

    def _due(self) -> bool:
        """Whether a step has been earned; while no sequence is long enough for it, nothing more is saved up."""
        return self._accumulated >= self._options.window and self._budget.seconds >= 2 * self._candidate_s

    def _optimise(self, model: Model, cache: KVCache, sequence: Sequence) -> bool:
        """Score the incumbent on this window, then candidates while the budget lasts; False if no page was free.

        In a trial, the set that was replaced is scored instead of candidates.
        """
        start, scored, spent, search = perf_counter(), 0, 0.0, self._search
        try:
            score = self._score(model, cache, sequence, search.incumbent.plan)
            replaced = self._score(model, cache, sequence, search.trial.replaced.plan) if search.trial else -1.0
            search.remeasure(score, replaced, sequence.generated)
            while not search.finished and search.trial is None:
                scored += 1
                before, leads = spent, search.begins and self._options.first == "confidence"
                candidate = search.suggest(self._confidence(model, cache, sequence) if leads else None)
                score = self._score(model, cache, sequence, candidate.plan)
                spent = perf_counter() - start
                search.record(candidate, score, sequence.generated, spent - before)
                self._candidate_s = spent / (scored + 1)
                if spent + self._candidate_s > self._budget.seconds:
                    break
        except CapacityError:
            return False
        return True

    def _score(self, model: Model, cache: KVCache, sequence: Sequence, plan: LayerPlan) -> float:
        return matchness(model, cache, sequence.pages, self._text(sequence), self._options.window, plan)

    def _confidence(self, model: Model, cache: KVCache, sequence: Sequence) -> list[float]:
        text = self._text(sequence)
        return confidence(model, cache, sequence.pages, text, min(self._options.window, len(text) - 1))

    def _text(self, sequence: Sequence) -> list[int]:
        """The tokens on the last of which a set is scored."""
        first = self._options.score_on == "first"
        return sequence.tokens[: len(sequence.prompt) + self._options.window + 1] if first else sequence.tokens
