"""The method that chooses: plain decoding, lookup or a skip set, whichever is fastest here and now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Annotated, Any

from torch import Tensor

from ...kernels.host import ints
from ..batch import Batch, Draft, Round, Tally
from ..cache import KVCache
from ..calibration import Encode
from ..costs import Clock, Costs, Ledger, calibrate, expected_tokens
from ..graphs import graph_size
from ..model import Model
from ..ngrams import MOST, Guess, Memory, likeliest
from ..plan import LayerPlan
from ..quantised import quantised
from ..recipe import Ngrams, Recipe
from ..sequence import Sequence
from ..stepwise import Stepwise
from . import swift
from .account import Account
from .base import Method, no_draft, sampled
from .checked import Acceptance, Checked, DraftTokens, DraftWeights, Share, Within
from .drafting import Drafting, grow, sift
from .lookup import lay_out, remember, text_of
from .rates import Choice, Rate
from .stretches import LONGEST_WAIT, WAIT, Stretches, Way

PLAIN, LOOKUP, SKIP, CASCADE = "plain", "lookup", "skip set", "cascade"
# Until the device has told: what verifying a draft costs in rounds of plain decoding, and the tokens a lookup gives.
VERIFY, LOOKED_UP, RATE = 1.1, 1.6, 0.8
# And of drafts in eight bits: what a pass costs, in passes of 16, and how often a token is accepted.
LIGHT, LIGHT_RATE = 0.6, 0.95
# The probability below which a draft ends, of the model's own weights and of eight bits.
THRESHOLD, LIGHT_THRESHOLD = 0.6, 0.0
# What a stake counts for a round later, as long as nothing is looked for.
FADING = 0.98


@dataclass(frozen=True)
class Options(Checked, method="auto"):
    """Drafts of at most `num_draft_tokens`, by lookup or by the best skip set known: that of the file `set`, or one
    searched for within `search_budget` of the decoding time.

    Lookup drafts what followed most matches of up to `max_ngram` tokens, also in the newest `remember` tokens of
    earlier answers of this engine. With `draft_weights` int8 drafts are by matrices in eight bits, of all sub-layers or
    those of `set`; none is searched for, and the worst that may come of them is taken to be what is expected. A draft
    ends with the first token less probable than `threshold`: without one, 0.6, or 0 in eight bits. `max_loss` is the
    share of the decoding time that may be lost against plain decoding beyond what was won.
    """

    num_draft_tokens: DraftTokens = 7
    max_ngram: Annotated[int, Within(1, 16)] = 4
    remember: Annotated[int, Within(0, 10**6)] = 16384
    set: str = ""
    draft_weights: DraftWeights = "own"
    threshold: Share | None = None
    skip_ratio: Share = 0.45
    search_budget: Share = 0.005
    max_loss: Share = 0.015
    acceptance: Acceptance = "coupled"


class Auto(Method):
    """Every round goes to what is predicted to be fastest, as far as the ledger covers its worst outcome.

    A round that the host steers goes by the cost model and the guess at hand; rounds that the device runs alone are
    decided on by the stretch, from the reports that come late.
    """

    name = "auto"
    options = Options

    def __init__(self, options: Options, num_layers: int, clock: Clock = perf_counter) -> None:
        super().__init__(options, num_layers)
        self._options, self._clock = options, clock
        self.rejection = options.acceptance == "rejection"
        self._ledger = Ledger(options.max_loss)
        # A search that took what may be lost would leave nothing to try a lookup with.
        self.quantised = options.draft_weights == "int8"
        ratio, budget = (0.0, 0.0) if self.quantised else (options.skip_ratio, options.search_budget)
        self._swift = swift.Swift(
            swift.Options(set=options.set, skip_ratio=ratio, search_budget=budget, draft_weights=options.draft_weights),
            num_layers,
            lambda seconds: self._ledger.affords(seconds + self._stake),
        )
        self._stretches = Stretches(self._ways(num_layers), self._ledger)
        # The way of the rounds the device runs alone; None while the host steers.
        self._way: Way | None = None
        self._lookups = {n: Rate(0.2 + 0.6 * n / options.max_ngram) for n in range(1, options.max_ngram + 1)}
        self._threshold = LIGHT_THRESHOLD if self.quantised else THRESHOLD
        if options.threshold is not None:
            self._threshold = options.threshold
        self._skips, self._sifted = Rate(self._rate), Rate(self._rate)
        # Draft tokens that sifting leaves of a guess.
        self._left = 2.0
        # How much longer than calibrated the passes of each way take, besides what slows plain decoding too.
        self._slowness = {LOOKUP: 1.0, SKIP: 1.0, CASCADE: 1.0}
        self._costs: Costs | None = None
        self._guesses: list[Guess] = []
        # What looking for guesses may lose: the time it takes, and what the lookup that was found last risked.
        self._stake = self._risked = 0.0
        self._looks = True
        # Seconds that choosing takes, by whether guesses are looked for.
        self._choosing: dict[bool, float] = {}
        self._memory = Memory(options.remember)
        self._choice = Choice(PLAIN, 0, 1.0, 1.0, 0.0)
        self._why = ""
        self._passed_over = set[Rate]()
        self._best: tuple[Costs, LayerPlan, tuple[int, int, float], int] | None = None
        self._account = Account()

    @property
    def plan(self) -> LayerPlan:
        return self._swift.plan if self._way or self._choice.name in (SKIP, CASCADE) else self._full

    @property
    def widest(self) -> int:
        return self._options.num_draft_tokens

    def phase(self) -> str:
        return (self._way or self._choice).name

    def prepare(self, model: Model, encode: Encode | None) -> Stepwise[None]:
        """Time the passes of this machine."""
        yield from self._swift.prepare(model, encode)
        self._costs = yield from calibrate(model, self._clock)
        if self.quantised:
            light = yield from calibrate(quantised(model), self._clock)
            self._costs = replace(self._costs, drafter=light)

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        """The draft of the fastest choice the ledger covers."""
        self._way = None
        costs = self._costs
        assert costs is not None
        k, ngram = self._options.num_draft_tokens, self._options.max_ngram
        looks = self._looks = self._ledger.affords(self._stake)
        with model.mark("draft", len(batch), 0, 0):
            self._guesses = [
                likeliest(text_of(s), ngram, max(0, min(k, s.room)), self._memory.text) if looks else Guess(0, [], [])
                for s in batch.sequences
            ]
        self._choose(self.choices(costs, len(batch), max(s.room for s in batch.sequences)))
        if self._choice.name in (LOOKUP, CASCADE):
            guess = lay_out(batch, [guess.first(self._choice.drafted) for guess in self._guesses])
            if self._choice.name == LOOKUP:
                return guess
            return sift(model, cache, batch, self._swift.plan, guess, quantised=self.quantised)
        if self._choice.name == SKIP:
            how = Drafting(self._choice.drafted, self._threshold, self.rejection, quantised=self.quantised)
            return grow(model, cache, batch, self._swift.plan, how)[0]
        return no_draft(batch)

    def rehearse(self, model: Model, cache: KVCache) -> None:
        self._swift.rehearse(model, cache)

    def recipe(self, sequences: list[Sequence]) -> Recipe:
        """That of the way the stretch goes."""
        self._way = self._stretches.choose(graph_size(len(sequences)))
        return self._recipe(self._way, sequences)

    def recipes(self, sequences: list[Sequence]) -> list[Recipe]:
        return [self._recipe(way, sequences) for way in self._stretches.ways]

    @property
    def remembered(self) -> Tensor | None:
        return self._memory.tokens if self._options.remember else None

    @property
    def threshold(self) -> float:
        return self._threshold

    @property
    def _rate(self) -> float:
        """How often a token of the skip set is taken to be accepted until it is known."""
        return LIGHT_RATE if self.quantised else RATE

    def _ways(self, num_layers: int) -> list[Way]:
        """Those of the device: a lookup, and drafts by the skip set of half its length, each of which costs a pass."""
        longest, share = self._options.num_draft_tokens, len(self._swift.plan.sublayers) / (2 * num_layers)
        share *= LIGHT if self.quantised else 1.0
        k = longest if self.quantised else max(1, longest // 2)
        tokens = expected_tokens(self._rate, k)
        skipping = Way(SKIP, k, VERIFY + k * share, tokens, trusted=self.quantised)
        ways = [Way(PLAIN), Way(LOOKUP, longest, VERIFY, LOOKED_UP)]
        return [*ways, skipping] if self._swift.drafts else ways

    def _recipe(self, way: Way, sequences: list[Sequence]) -> Recipe:
        plain = Recipe(self._full, self._full, way.drafted, rejection=self.rejection and sampled(sequences))
        if way.name == PLAIN:
            return replace(plain, rejection=False)
        if way.name == LOOKUP:
            return replace(plain, ngrams=Ngrams(self._options.max_ngram, MOST, self._options.remember))
        searching = self._swift.phase() == "accumulation"
        plan = self._full if searching else self._swift.plan
        confident = self.threshold > 0
        return replace(plain, plan=plan, masked=searching, confident=confident, quantised=self.quantised)

    def count(self, model: Model, cache: KVCache, tally: Tally) -> float:
        """Book a round the device ran alone, learn from it, and let the search for a better set have its share."""
        start, stretches = self._clock(), self._stretches
        remember(self._memory, tally)
        name = _name(tally.recipe)
        way = next(way for way in stretches.ways if way.name == name)
        members, size = len(tally.sequences), graph_size(len(tally.sequences))
        emitted, plain = sum(tally.emitted), stretches.ways[0]
        timed, expected = stretches.timed(size), members * stretches.tokens(way)
        cost = stretches.observe(way, size, emitted / members, tally.verify_s, changed=tally.changed)
        predicted, known = (stretches.seconds(each, size) if timed else cost for each in (way, plain))
        if timed:
            self._ledger.book(cost, cost if way is plain else known * emitted / members)
        why = stretches.why if way is stretches.way else "under way before another was chosen"
        self._account.add(name, why, (predicted, expected), known, members)
        self._account.measure(tally.verify_s, emitted)
        if self._account.due(tally.sequences):
            tokens = {way.name: stretches.tokens(way) for way in stretches.ways}
            self._report(tally.sequences, tokens_per_round=tokens)
        none = [0] * members
        drafted = tally if name == SKIP else tally._replace(drafted=none, depth=none, accepted=none)
        if self._search(lambda: self._swift.count(model, cache, drafted)):
            stretches.forget(SKIP)
        return self._clock() - start

    def _search(self, step: Callable[[], float]) -> bool:
        """A step of the search for a better skip set; whether it found one."""
        before = self._swift.plan
        searched = step()
        if searched:
            self._ledger.book(searched, 0.0)
        self.events += self._swift.tell()
        return self._swift.plan != before

    def choices(self, costs: Costs, sequences: int, room: int) -> list[Choice]:
        """Plain decoding, and the best draft length of every other way there is this round."""
        plain = costs.verify(sequences)
        found, longest = [Choice(PLAIN, 0, plain, sequences, 0.0)], min(self._options.num_draft_tokens, room)
        rates = tuple(self._lookups[guess.match] for guess in self._guesses if guess.tokens)
        lookups, cascades, skips = list[Choice](), list[Choice](), self._swift.drafts
        for k in range(1, longest + 1) if rates else ():
            lengths = [min(k, len(guess.tokens)) for guess in self._guesses]
            expected = [expected_tokens(rate.value, n) for rate, n in zip(rates, filter(None, lengths), strict=True)]
            seconds = self._slowness[LOOKUP] * costs.verify(sequences + sum(lengths))
            tokens = sum(expected) + sequences - len(rates)
            lookups.append(Choice(LOOKUP, k, seconds, tokens, seconds - plain, rates))
            # Sifting chooses with the full model's noise, which a draft for rejection sampling must not share.
            if skips and not self.rejection:
                left = sum(min(self._left, n + 1) for n in lengths if n)
                seconds = costs.draft(self._swift.plan, sequences + sum(lengths))
                seconds = self._slowness[CASCADE] * (seconds + costs.verify(sequences + round(left)))
                tokens = sum(expected_tokens(self._sifted.value, self._left) for n in lengths if n)
                tokens += sequences - len(rates)
                cascades.append(Choice(CASCADE, k, seconds, tokens, seconds - plain, (self._sifted,)))
        if lookups:
            found.append(max(lookups, key=lambda choice: choice.tokens_per_s))
        if longest > 0 and skips:
            k, passes = self._skipping(costs, sequences, longest)
            seconds, tokens = self._slowness[SKIP] * passes, sequences * expected_tokens(self._skips.value, k)
            loss = seconds - plain * (tokens / sequences if self.quantised else 1.0)
            found.append(Choice(SKIP, k, seconds, tokens, loss, (self._skips,)))
        if cascades:
            found.append(max(cascades, key=lambda choice: choice.tokens_per_s))
        return found

    def _skipping(self, costs: Costs, sequences: int, longest: int) -> tuple[int, float]:
        """The best length of the skip set's drafts, at most `longest`, and the seconds of its passes.

        It is looked for again where what it follows from has changed: what choosing costs is taken from the ledger.
        """

        def passes(k: int) -> float:
            return k * costs.draft(self._swift.plan, sequences) + costs.verify(sequences * (k + 1))

        plan, rest = self._swift.plan, (sequences, longest, self._skips.value)
        best = self._best
        if best is None or best[0] is not costs or best[1] is not plan or best[2] != rest:
            chosen = max(range(1, longest + 1), key=lambda k: expected_tokens(self._skips.value, k) / passes(k))
            self._best = best = costs, plan, rest, chosen
        return best[3], passes(best[3])

    def observe(self, model: Model, cache: KVCache, done: Round) -> float:
        """Book the round, learn the rates, and let the search for a better set have its share."""
        start, costs, choice = self._clock(), self._costs, self._choice
        assert costs is not None
        sequences = len(done.batch)
        drafted, accepted = ints(done.draft.length), ints(done.verdict.accepted)
        seconds = done.draft_s + done.verify_s
        if choice.name == PLAIN:
            costs.observe(sequences, done.verify_s)
        elif choice.name == LOOKUP:
            for guess, tried, taken in zip(self._guesses, drafted, accepted, strict=True):
                if tried:
                    self._lookups[guess.match].observe(tried, taken)
        else:
            rate = self._skips if choice.name == SKIP else self._sifted
            for tried, taken in zip(drafted, accepted, strict=True):
                rate.observe(tried, taken)
            if choice.name == CASCADE:
                self._left += 0.1 * (sum(drafted) / sequences - self._left)
        for rate in self._passed_over:
            rate.idle += 1
        # After the pace of this round is known: to learn it is no loss.
        plain = costs.verify(sequences)
        chosen, overhead = self._cost(costs, done, drafted)
        if any(guess.tokens for guess in self._guesses) and choice.name in (PLAIN, LOOKUP):
            self._stake = overhead + max(0.0, self._risked)
        elif not self._looks:
            # The longer ago, the less it says.
            self._stake *= FADING
        self._ledger.book(chosen + overhead, plain * sum(done.emitted) / sequences)
        self._tell(seconds, plain, done)
        remember(self._memory, done.tally)
        undrafted = done._replace(draft=no_draft(done.batch), depth=[0] * sequences)
        own = done if choice.name in (SKIP, CASCADE) else undrafted
        if self._search(lambda: self._swift.observe(model, cache, own)):
            self._skips, self._sifted = Rate(self._rate), Rate(self._rate)
        return self._clock() - start

    def _cost(self, costs: Costs, done: Round, drafted: list[int]) -> tuple[float, float]:
        """What a round cost by the model, which learns from it, and what choosing cost by the clock.

        A busy machine slows single rounds and that is no loss of theirs; what slows all rounds of a way is.
        """
        name, sequences = self._choice.name, len(done.batch)
        calibrated = costs.verify(sequences + sum(drafted))
        overhead = self._overhead(done.draft_s) if name in (PLAIN, LOOKUP) else 0.0
        if name == PLAIN:
            return calibrated, overhead
        if name == SKIP:
            calibrated += max(drafted) * costs.draft(self._swift.plan, sequences)
        if name == CASCADE:
            guessed = sum(min(self._choice.drafted, len(guess.tokens)) for guess in self._guesses)
            calibrated += costs.draft(self._swift.plan, sequences + guessed)
        slowness = self._slowness[name]
        now = (done.verify_s if name == LOOKUP else done.draft_s + done.verify_s) / calibrated
        self._slowness[name] += 0.1 * (min(max(now, 0.5 * slowness), 2 * slowness) - slowness)
        return self._slowness[name] * calibrated, overhead

    def _overhead(self, seconds: float) -> float:
        """What choosing takes, learnt from a round in which it took so many seconds."""
        usual = self._choosing.get(self._looks, seconds)
        self._choosing[self._looks] = usual + 0.1 * (min(max(seconds, 0.5 * usual), 2 * usual) - usual)
        return self._choosing[self._looks]

    def _choose(self, choices: list[Choice]) -> None:
        plain = choices[0]
        self._risked = next((choice.loss for choice in choices if choice.name == LOOKUP), self._risked)
        covered = [choice for choice in choices if self._ledger.affords(choice.loss)]
        best = max(covered, key=lambda choice: choice.tokens_per_s)
        why = "predicted fastest"
        for rate in best.rates:
            rate.wait = WAIT
        again = next((choice for choice in covered if choice is not best and any(r.due for r in choice.rates)), None)
        if again is not None:
            best, why = again, "tried again"
            for rate in set(again.rates):
                rate.wait = min(2 * rate.wait, LONGEST_WAIT)
        fastest = max(choices, key=lambda choice: choice.tokens_per_s)
        if best is plain and fastest is not plain:
            why = f"{fastest.name} is predicted faster and its loss is not covered"
        self._choice, self._why = best, why
        self._passed_over = {rate for choice in choices for rate in choice.rates} - set(best.rates)

    def _tell(self, seconds: float, plain: float, done: Round) -> None:
        """Add the round to the account, and report when that is due."""
        choice, sequences = self._choice, done.batch.sequences
        self._account.add(choice.name, self._why, (choice.seconds, choice.tokens), plain, len(sequences))
        self._account.measure(seconds, sum(done.emitted))
        if self._account.due(sequences):
            rates = {SKIP: self._skips.value, CASCADE: self._sifted.value}
            rates |= {f"{LOOKUP} {n}": rate.value for n, rate in self._lookups.items()}
            self._report(sequences, acceptance_rate=rates)

    def _report(self, sequences: list[Sequence], **more: Any) -> None:
        self.events.append(self._account.report(sequences, **more, balance_s=self._ledger.balance))
        self._account = Account()


def _name(recipe: Recipe | None) -> str:
    if recipe is None or not recipe.num_draft_tokens:
        return PLAIN
    return SKIP if recipe.ngrams is None else LOOKUP
