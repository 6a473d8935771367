"""Finding a set of sub-layers the model can draft without (SWIFT, arXiv 2410.06916, §4.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from . import gaussian
from .cache import KVCache
from .model import Model
from .plan import LayerPlan
from .rows import one_sequence

# The Gaussian process sees the most recent scores.
GP_POINTS = 300
# Windows a set that was swapped in has to stand at most, and what the newest one weighs in a score at least.
TRIAL, WEIGHT = 4, 1 / 8


def matchness(model: Model, cache: KVCache, pages: list[int], tokens: list[int], window: int, plan: LayerPlan) -> float:
    """Share of the last `window` tokens that `plan` predicts, teacher-forced, after the full model's own cache.

    One pass over the window on a fork of the sequence: the full model's keys and values before the window are shared,
    those of the window are the sub-network's own and are thrown away. `tokens` lie in `pages`, and more of them were
    generated than the window has.
    """
    start = len(tokens) - window - 1
    with cache.forked(pages, start, len(tokens)) as fork:
        rows = one_sequence(tokens[start:-1], start, fork, model.ops.prefill_tile, model.device)
        predicted = model.predict(model.forward(rows, cache, plan)).token
    return float((predicted == torch.tensor(tokens[start + 1 :], device=model.device)).float().mean())


class Candidate(NamedTuple):
    """A skip set to score: where it came from, the skipped dimensions of the search, and its plan."""

    kind: str
    skipped: tuple[int, ...]
    plan: LayerPlan


@dataclass
class Incumbent:
    """The best set so far: its score, averaged over the `windows` it was measured on since, and the `latest` one."""

    plan: LayerPlan
    score: float = -1.0
    latest: float = -1.0
    windows: int = 0

    def measured(self, score: float) -> None:
        """Take in the score on a new window. The one a set was chosen by does not count: it was a lucky one."""
        self.windows += 1
        self.latest = score
        self.score += max(WEIGHT, 1 / self.windows) * (score - self.score)


@dataclass
class Trial:
    """The incumbent against the set it `replaced`, for so many `windows` more; `lead` is by how much it did better.

    `since_improvement`: where the count goes on if the replaced set returns.
    """

    replaced: Incumbent
    since_improvement: int
    windows: int
    lead: float = 0.0


@dataclass
class Search:
    """Skip sets of a fixed size over the sub-layers of layers 1 to L - 2, the best one kept.

    `size` = int(D·ratio) of the D = 2(L - 2) sub-layers are skipped. Candidates are uniformly random, but the first may
    come from the confidence of the sub-layers, and every `bayes_interval`-th comes from a Gaussian process over those
    scored so far (0: none does). A candidate replaces the incumbent at once when it scores higher, and is on `trial`
    then: of many scores on one window the highest is a lucky one, so both sets are measured on the next windows, as
    many as the replaced one has stood for, before there are other candidates; and that one returns where it does
    better. The search is over when an incumbent past its trial scores above `max_score`, after `patience` candidates
    without improvement, or after `max_candidates`. `found` is a set to start from, as if a search had ended with it.
    """

    num_layers: int
    ratio: float
    max_score: float
    patience: int
    max_candidates: int
    seed: int
    bayes_interval: int = 25
    found: Incumbent | None = None
    incumbent: Incumbent = field(init=False)
    trial: Trial | None = None
    candidates: int = 0
    since_improvement: int = 0
    events: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        # What was scored, with its score: one list, for an interrupt may come between two statements.
        self._scored: list[tuple[list[int], float]] = []
        self._allowed = 0 if self.found else self.max_candidates
        self.incumbent = self.found or Incumbent(
            initial_plan(self.num_layers) if self.size else LayerPlan.full(self.num_layers)
        )

    @property
    def dimensions(self) -> int:
        return max(0, 2 * (self.num_layers - 2))

    @property
    def size(self) -> int:
        """Sub-layers a candidate skips."""
        return int(self.dimensions * self.ratio)

    @property
    def finished(self) -> bool:
        over = (
            self.incumbent.score > self.max_score
            or self.since_improvement >= self.patience
            or self.candidates >= self._allowed
        )
        return self.size == 0 or (self.trial is None and over)

    def resume(self, tokens: int) -> None:
        """Search again, for as many candidates more: the text is no longer what the incumbent was chosen on."""
        self.incumbent, self.trial = Incumbent(self.incumbent.plan), None
        self.since_improvement = 0
        self._allowed = self.candidates + self.max_candidates
        self._scored.clear()
        self.events.append({"kind": "restart", "iteration": self.candidates, "tokens": tokens})

    @property
    def begins(self) -> bool:
        """Whether no candidate has been scored since the search began or was resumed."""
        return not self._scored

    def start(self, confidence: Sequence[float], tokens: int) -> None:
        """Start from the set of this confidence, of a text of which `tokens` had been generated."""
        self.incumbent = Incumbent(self.suggest(confidence).plan)
        self.events.append({"kind": "start", "iteration": self.candidates, "tokens": tokens})

    def suggest(self, confidence: Sequence[float] | None = None) -> Candidate:
        """The next candidate; with the `confidence` of all 2L sub-layers, without those that have least."""
        if confidence is not None:
            own = [*confidence[2:-2:2], *confidence[3:-2:2]]
            kind, order = "confidence", np.argsort(own, kind="stable")
        elif self.bayes_interval and (self.candidates + 1) % self.bayes_interval == 0 and self._scored:
            points, scores = zip(*self._scored[-GP_POINTS:], strict=True)
            suggested = gaussian.suggest(np.array(points, dtype=float), np.array(scores), self._random)
            kind, order = "bayesian", np.argsort(-suggested, kind="stable")
        else:
            kind, order = "random", self._random.permutation(self.dimensions)
        skipped = tuple(sorted(int(i) for i in order[: self.size]))
        return Candidate(kind, skipped, plan_of(self.num_layers, list(skipped)))

    def remeasure(self, score: float, replaced: float = -1.0, tokens: int = 0) -> None:
        """The incumbent's score on a new window, and in a trial that of the set it replaced, when `tokens` had come."""
        self.incumbent.measured(score)
        trial = self.trial
        if trial is None:
            return
        trial.replaced.measured(replaced)
        trial.windows -= 1
        trial.lead += score - replaced
        if trial.lead < 0:
            self.incumbent, self.since_improvement, self.trial = trial.replaced, trial.since_improvement, None
            self.events.append({"kind": "return", "iteration": self.candidates, "tokens": tokens})
        elif trial.windows <= 0:
            self.trial = None

    def record(self, candidate: Candidate, score: float, tokens: int, seconds: float = 0.0) -> None:
        """A candidate's score, measured in `seconds` when `tokens` tokens had come; swaps it in if it is the best."""
        swapped = score > max(self.incumbent.score, self.incumbent.latest)
        self.candidates += 1
        self.since_improvement += 1
        self._scored.append(([int(i in candidate.skipped) for i in range(self.dimensions)], score))
        if swapped:
            windows = min(TRIAL, self.incumbent.windows)
            self.trial = Trial(self.incumbent, self.since_improvement, windows) if windows else None
            self.incumbent, self.since_improvement = Incumbent(candidate.plan, score, score), 0
        self.events.append(
            {
                "iteration": self.candidates,
                "kind": candidate.kind,
                "score": score,
                "best": self.incumbent.score,
                "swapped": swapped,
                "tokens": tokens,
                "seconds": seconds,
            }
        )


@dataclass
class Drift:
    """Whether a draft is accepted clearly less often than it used to be: the text has changed its subject.

    The accepted share of a draft's depth is a moving average over about ten rounds, held against the best it has been.
    """

    drop: float
    rate: float | None = None
    best: float = 0.0
    rounds: int = 0

    def observe(self, depth: int, accepted: int) -> bool:
        """Take in a round; True once the rate has fallen by the share `drop`."""
        if not depth or not self.drop:
            return False
        now = accepted / depth
        self.rate = now if self.rate is None else 0.9 * self.rate + 0.1 * now
        self.rounds += 1
        if self.rounds >= 10:
            self.best = max(self.best, self.rate)
        return self.rate < (1 - self.drop) * self.best

    def reset(self) -> None:
        """Forget: there is a new set, or a new text."""
        self.rate, self.best, self.rounds = None, 0.0, 0


def initial_plan(num_layers: int) -> LayerPlan:
    """Layers 1, 3, 5, … below L - 1 skipped, both sub-layers."""
    odd = range(1, num_layers - 1, 2)
    return LayerPlan.full(num_layers).without(attention=odd, mlp=odd)


def plan_of(num_layers: int, skipped: list[int]) -> LayerPlan:
    """The plan of a skip vector's ones: i below L - 2 is the attention of layer i + 1, the rest are MLPs."""
    inner = num_layers - 2
    return LayerPlan.full(num_layers).without(
        attention=[i + 1 for i in skipped if i < inner], mlp=[i - inner + 1 for i in skipped if i >= inner]
    )
