"""CLaSp (arXiv 2505.24196): the model drafts without some of its layers, chosen anew for the context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated

from ..batch import Batch, Draft, Round, Tally
from ..budget import Budget
from ..cache import KVCache
from ..errors import CapacityError, RequestError
from ..model import Model
from ..plan import LayerPlan
from ..programme import Programme, Unit, accepted_tokens, rehearse
from ..recipe import Recipe
from ..sequence import Sequence
from .base import Method, expect_layers, no_draft
from .checked import Acceptance, Checked, DraftTokens, DraftWeights, Share, Within
from .drafting import Drafting, by_set, grow


@dataclass(frozen=True)
class Options(Checked, method="clasp"):
    """`skip` layers are left out of the draft, 0 is a quarter of them; `keep_outer` protects the first and the last.

    A draft ends after `num_draft_tokens` or with the first token whose probability is below `threshold`. The layers are
    chosen in the first round, and again after `interval` rounds once `search_budget` of the decoding time pays for it.
    With `draft_weights` int8 they draft by matrices in eight bits.
    """

    skip: Annotated[int, Within(0, 10**9)] = 0
    num_draft_tokens: DraftTokens = 7
    threshold: Share = 0.7
    interval: Annotated[int, Within(1, 10**9)] = 64
    keep_outer: bool = False
    draft_weights: DraftWeights = "own"
    acceptance: Acceptance = "coupled"
    search_budget: Share = 0.05


class Clasp(Method):
    """Drafting with the layer set of the latest optimisation; before the first one, plain decoding."""

    name = "clasp"
    options = Options

    def __init__(self, options: Options, num_layers: int, clock: Callable[[], float] = perf_counter) -> None:
        super().__init__(options, num_layers)
        kept = 2 if options.keep_outer else 1
        expect_layers("clasp", num_layers, kept + 1)
        most = num_layers - kept
        if options.skip > most:
            raise RequestError(
                f"method clasp: option skip expects at most {most} of this model's {num_layers} layers, "
                f"got {options.skip}"
            )
        self.rejection = options.acceptance == "rejection"
        self._options = options
        self._skip = options.skip or max(1, num_layers // 4)
        self._clock = clock
        self.quantised = options.draft_weights == "int8"
        self._how = Drafting(options.num_draft_tokens, options.threshold, self.rejection, quantised=self.quantised)
        self._plan: LayerPlan | None = None
        self._budget = Budget(options.search_budget)
        self._rounds = 0
        self._last_s = 0.0
        self._programmes = 0

    @property
    def plan(self) -> LayerPlan:
        return self._plan or self._full

    @property
    def widest(self) -> int:
        return self._options.num_draft_tokens

    def phase(self) -> str:
        return "acceleration" if self._plan else "accumulation"

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        """Confidence-aware drafting, as SWIFT's."""
        draft = grow(model, cache, batch, self._plan, self._how)[0] if self._plan else no_draft(batch)
        return draft._replace(record=self._due())

    def rehearse(self, model: Model, cache: KVCache) -> None:
        rehearse(model, cache)

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        """By the mask: a set is replaced before a graph of its own, which would then be of no use, had paid."""
        return None if self._due() else by_set(self._full, self._how, sequences)

    def recipes(self, sequences: list[Sequence]) -> list[Recipe]:
        return [by_set(self._full, self._how, sequences)]

    @property
    def threshold(self) -> float:
        return self._how.threshold

    def count(self, model: Model, cache: KVCache, tally: Tally) -> float:
        self._rounds += 1
        self._budget.round(tally.draft_s + tally.verify_s, recorded=False)
        return 0.0

    def observe(self, model: Model, cache: KVCache, done: Round) -> float:
        """In-context layer optimisation at the sequences' newest accepted tokens, whose streams came free."""
        self._rounds += 1
        longer = self._budget.round(done.draft_s + done.verify_s, recorded=done.streams is not None)
        if done.streams is None:
            return 0.0
        start = self._clock()
        programme = Programme(
            layers(len(self._full.runs) // 2, self._options.keep_outer),
            self._skip,
            [tokens[-1] for tokens in accepted_tokens(done)],
        )
        try:
            with model.mark("search", len(done.batch), len(done.batch)):
                while not programme.finished:
                    programme.advance(model, cache)
        except CapacityError:
            programme = None
        seconds = self._clock() - start
        self._budget.spend(seconds)
        if programme is not None:
            self._last_s = seconds + longer
            self._adopt(programme, max(sequence.generated for sequence in done.batch.sequences), seconds)
        return seconds

    def _due(self) -> bool:
        if self._plan is None:
            return True
        return self._rounds >= self._options.interval and self._budget.seconds >= self._last_s

    def _adopt(self, programme: Programme, tokens: int, seconds: float) -> None:
        self._plan = self._full.skipping(programme.states[-1].skipped)
        self._rounds = 0
        self._programmes += 1
        self.events.append(
            {
                "kind": "programme",
                "iteration": self._programmes,
                "skip_attention": list(self._plan.skipped_attention),
                "skip_mlp": list(self._plan.skipped_mlp),
                "score": programme.states[-1].score / programme.streams.shape[1],
                "tokens": tokens,
                "seconds": seconds,
            }
        )


def layers(num_layers: int, keep_outer: bool) -> list[Unit]:
    """Whole layers of weight 1."""
    outer = (0, num_layers - 1) if keep_outer else ()
    return [Unit((2 * i, 2 * i + 1), 1, i in outer) for i in range(num_layers)]
