"""KnapSpec (arXiv 2602.20217): the model drafts without the sub-layers whose measured time is best saved."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Annotated, NamedTuple

import torch
from torch.nn import functional

from ...kernels.host import ints
from ..batch import Batch, Draft, Round, Tally
from ..budget import Budget
from ..cache import KVCache
from ..errors import CapacityError
from ..model import Model
from ..plan import LayerPlan
from ..programme import MAX_ROWS, Programme, Token, Unit, accepted_tokens, lay_states, rehearse
from ..recipe import Recipe
from ..sequence import Sequence
from .base import Method, no_draft
from .checked import Acceptance, Checked, DraftTokens, Share, Within
from .drafting import Drafting, by_set, grow

# The tokens of a window, the mean cosine below which a state is dropped, and the largest weight.
MAX_TOKENS, FLOOR, HEAVIEST = 16, 0.5, 5
# Every how many layers one is timed, and how often.
TIMED_EVERY, TIMINGS = 4, 3


@dataclass(frozen=True)
class Options(Checked, method="knapspec"):
    """A draft ends after the number of tokens that promises most, at most `num_draft_tokens`, or with the first token
    whose probability is below `threshold`.

    The set and that number are chosen on the tokens of `window_rounds` rounds, and again after `interval` rounds, for
    at most `search_budget` of the decoding time.
    """

    num_draft_tokens: DraftTokens = 7
    threshold: Share = 0.7
    interval: Annotated[int, Within(1, 10**9)] = 64
    window_rounds: Annotated[int, Within(1, 1024)] = 5
    acceptance: Acceptance = "coupled"
    search_budget: Share = 0.05


class Costs(NamedTuple):
    """Seconds of one attention block, one MLP and the head, for one row."""

    attention: float
    mlp: float
    head: float

    @property
    def weights(self) -> tuple[int, int]:
        """Integer weights of an attention block and an MLP; the cheaper has 1."""
        cheaper = max(min(self.attention, self.mlp), 1e-9)
        attention, mlp = (min(HEAVIEST, max(1, round(cost / cheaper))) for cost in (self.attention, self.mlp))
        return attention, mlp

    def of(self, plan: LayerPlan) -> float:
        """Seconds of one row's pass."""
        attention = sum(sublayer % 2 == 0 for sublayer in plan.sublayers)
        return attention * self.attention + (len(plan.sublayers) - attention) * self.mlp + self.head


class Choice(NamedTuple):
    """A skip set, how many tokens to draft with it (0: do not draft), and the speed-up that promises.

    `alpha` is the share of the window's tokens on which the set agreed with the full model.
    """

    plan: LayerPlan
    num_draft_tokens: int
    speedup: float
    alpha: float
    weights: tuple[int, int]


class KnapSpec(Method):
    """Drafting with the latest choice; the next one is worked out between rounds, a slice at a time."""

    name = "knapspec"
    options = Options

    def __init__(self, options: Options, num_layers: int, clock: Callable[[], float] = perf_counter) -> None:
        super().__init__(options, num_layers)
        self.rejection = options.acceptance == "rejection"
        self._options = options
        self._how = Drafting(options.num_draft_tokens, options.threshold, self.rejection)
        self._clock = clock
        self._choice: Choice | None = None
        self._budget = Budget(options.search_budget)
        self._rounds = 0
        self._window: list[list[Token]] = []
        self._tokens: list[Token] = []
        self._work: Generator[None, None, Choice] | None = None
        self._spent = self._step_s = 0.0
        self._programmes = 0

    @property
    def plan(self) -> LayerPlan:
        return self._choice.plan if self._choice else self._full

    @property
    def widest(self) -> int:
        return self._options.num_draft_tokens

    def phase(self) -> str:
        return "acceleration" if self._choice else "accumulation"

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        """Confidence-aware drafting, as SWIFT's."""
        draft = no_draft(batch)
        if self.limit:
            how = replace(self._how, num_draft_tokens=self.limit)
            draft = grow(model, cache, batch, self.plan, how)[0]
        return draft._replace(record=self._due())

    def rehearse(self, model: Model, cache: KVCache) -> None:
        for x in rehearse(model, cache):
            model.predict(x, tile=model.ops.tile_of(len(x)))

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        """By the mask: sets and lengths are replaced too soon for graphs of their own. A window is the host's."""
        if self._due():
            return None
        return by_set(self._full, self._how, sequences, limited=True) if self.limit else Recipe(self._full, self._full)

    def recipes(self, sequences: list[Sequence]) -> list[Recipe]:
        return [Recipe(self._full, self._full), by_set(self._full, self._how, sequences, limited=True)]

    @property
    def threshold(self) -> float:
        return self._how.threshold

    @property
    def limit(self) -> int:
        return self._choice.num_draft_tokens if self._choice else 0

    def observe(self, model: Model, cache: KVCache, done: Round) -> float:
        """Gather a window when the next choice is due."""
        if done.streams is not None and self._gathered(done):
            self._tokens, self._window = newest(self._window), []
            self._work = choose_set(model, cache, self._tokens, self._options.num_draft_tokens, self._clock)
            self._spent = self._step_s = 0.0
        return self._work_on(model, cache, done.tally, recorded=done.streams is not None)

    def count(self, model: Model, cache: KVCache, tally: Tally) -> float:
        return self._work_on(model, cache, tally, recorded=False)

    def _work_on(self, model: Model, cache: KVCache, tally: Tally, *, recorded: bool) -> float:
        """Work on the window for what the budget allows, at most a round."""
        seconds = tally.draft_s + tally.verify_s
        self._rounds += 1
        self._budget.round(seconds, recorded=recorded)
        # A sequence that has ended took the keys and values of its tokens with it.
        if self._work and not all(token.pages for token in self._tokens):
            self._work = None
        spent = 0.0
        while self._work and spent < seconds and self._budget.seconds > 0 and self._budget.seconds >= self._step_s:
            start = self._clock()
            with model.mark("search", len(tally.sequences), len(self._tokens)):
                choice = self._step(self._work)
            self._step_s = self._clock() - start
            self._budget.spend(self._step_s)
            self._spent += self._step_s
            spent += self._step_s
            if choice:
                self._adopt(choice, max(sequence.generated for sequence in tally.sequences))
        return spent

    def _due(self) -> bool:
        """Whether a round has to be recorded: not before those of the last window are paid for."""
        if self._work or not self._options.search_budget or self._budget.seconds < 0:
            return False
        return self._choice is None or self._rounds >= self._options.interval

    def _gathered(self, done: Round) -> bool:
        """Take in a round's tokens; True once they are enough."""
        kept = [[token for token in tokens if token.pages] for tokens in self._window]
        fresh = accepted_tokens(done)
        ages = max(map(len, fresh))
        by_age = [tokens[-age] for age in range(ages, 0, -1) for tokens in fresh if age <= len(tokens)]
        self._window = [*kept, by_age][-self._options.window_rounds :]
        enough = sum(map(len, self._window)) >= MAX_TOKENS
        return enough or len(self._window) == self._options.window_rounds

    def _step(self, work: Generator[None, None, Choice]) -> Choice | None:
        try:
            next(work)
        except StopIteration as end:
            self._work = None
            return end.value
        except CapacityError:
            self._work = None
        return None

    def _adopt(self, choice: Choice, tokens: int) -> None:
        self._choice, self._rounds = choice, 0
        self._programmes += 1
        self.events.append(
            {
                "kind": "programme",
                "iteration": self._programmes,
                "skip_attention": list(choice.plan.skipped_attention),
                "skip_mlp": list(choice.plan.skipped_mlp),
                "score": choice.speedup,
                "tokens": tokens,
                "seconds": self._spent,
                "alpha": choice.alpha,
                "num_draft_tokens": choice.num_draft_tokens,
                "weights": list(choice.weights),
            }
        )


def newest(window: list[list[Token]]) -> list[Token]:
    """The last tokens of a window, oldest first."""
    return [token for tokens in window for token in tokens][-MAX_TOKENS:]


def choose_set(
    model: Model, cache: KVCache, tokens: list[Token], most: int, clock: Callable[[], float]
) -> Generator[None, None, Choice]:
    """The set, of every weight up to half the model's, and the number of draft tokens that promise the most speed.

    Yields after every piece of work.

    Raises:
        CapacityError: no page was free.
    """
    costs = yield from measure(model, cache, tokens[-1], clock)
    layers, weights = model.config.num_layers, costs.weights
    programme = Programme(sublayers(layers, weights), layers * sum(weights) // 2, tokens, FLOOR)
    while not programme.finished:
        programme.advance(model, cache)
        yield
    target = model.predict(programme.streams[-1]).token
    best = Choice(model.full, 0, 1.0, 1.0, weights)
    part = max(1, MAX_ROWS // len(tokens))
    for at in range(0, len(programme.states), part):
        hidden = programme.hidden[at : at + part]
        tile = model.ops.tile_of(hidden.shape[0] * len(tokens))
        predicted = model.predict(hidden.flatten(0, 1), tile=tile).token.view(-1, len(tokens))
        agreed = ints((predicted == target).sum(dim=1))
        for state, count in zip(programme.states[at : at + part], agreed, strict=True):
            plan = model.full.skipping(state.skipped)
            alpha = count / len(tokens)
            length, speedup = best_length(alpha, costs.of(plan), costs.of(model.full), most)
            if speedup > best.speedup:
                best = Choice(plan, length, speedup, alpha, weights)
        yield
    return best


def measure(model: Model, cache: KVCache, token: Token, clock: Callable[[], float]) -> Generator[None, None, Costs]:
    """The costs at `token`; yields after every timing."""
    layers = range(0, model.config.num_layers, TIMED_EVERY)
    owner = torch.zeros(1, dtype=torch.int64, device=model.device)
    position = owner + token.position
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    for _ in range(TIMINGS):
        with lay_states(model, cache, [token.pages], owner, position) as laid:
            x = functional.pad(token.streams[:1], (0, 0, 0, len(laid.rows) - 1))
            for kind in (0, 1):
                float(x[0, 0])  # The device has caught up when a value is read.
                start = clock()
                for layer in layers:
                    model.step(laid, cache, 2 * layer + kind, x)
                float(x[0, 0])
                times[kind].append((clock() - start) / len(layers))
            start = clock()
            int(model.predict(x[:1]).token[0])
            times[2].append(clock() - start)
        yield
    return Costs(*map(median, times))


def sublayers(num_layers: int, weights: tuple[int, int]) -> list[Unit]:
    """Sub-layers by their weight, those of the first and the last layer fixed."""
    return [Unit((i,), weights[i % 2], i // 2 in (0, num_layers - 1)) for i in range(2 * num_layers)]


def best_length(alpha: float, draft_s: float, verify_s: float, most: int) -> tuple[int, float]:
    """How many tokens to draft, at most `most`, and the speed-up over plain decoding; 0 where drafting slows it down.

    (1 + α + … + α^k) tokens are expected of k draft steps and a verification.
    """
    expected, best = 1.0, (0, 1.0)
    # Otherwise a set that skips nothing, whose promise is exactly 1, would be chosen where that is rounded up.
    for length in range(1, most + 1 if draft_s < verify_s else 1):
        expected += alpha**length
        speedup = expected * verify_s / (length * draft_s + verify_s)
        if speedup > best[1]:
            best = length, speedup
    return best
