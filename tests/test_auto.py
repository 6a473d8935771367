"""The method that chooses: the same text, a ledger that holds on a virtual clock, and reports of what it did."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.kernels.values import Verdict
from skipjack.runtime import speculate
from skipjack.runtime.batch import Batch, Draft, Round
from skipjack.runtime.costs import Costs, Ledger, calibrate, expected_tokens
from skipjack.runtime.decode import prefill
from skipjack.runtime.methods import auto
from skipjack.runtime.methods.autoregressive import Autoregressive
from skipjack.runtime.methods.drafting import sift
from skipjack.runtime.ngrams import Guess
from skipjack.runtime.plan import LayerPlan
from skipjack.runtime.sequence import Sequence
from skipjack.runtime.stepwise import at_once

PROMPTS = [[5, 9, 200, 31], [7] * 3, list(range(20, 90))]
COSTS = Costs(sublayers=16, full=1.0, tiles=((8, 0.0),), per_tile=0.8, fixed=0.2)
NOTHING = Guess(0, [], [])


@pytest.mark.parametrize("method", ["auto", "auto:max_loss=1.0,search_budget=0.2,skip_ratio=0.3"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_tokens_are_those_of_plain_decoding(
    synthetic: Callable[..., Engine], method: str, temperature: float
) -> None:
    engine = synthetic("tiny", torch.float32, 0.1)
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=5, ignore_eos=True)
    plain = engine.generate(PROMPTS, params)
    outputs = engine.generate(PROMPTS, params, method=method)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]


def test_expected_tokens_is_the_sum_of_the_chances_to_get_so_far() -> None:
    for rate, k in ((0.0, 3), (0.3, 1), (0.8, 7), (1.0, 5)):
        assert expected_tokens(rate, k) == pytest.approx(sum(rate**i for i in range(k + 1)))


def test_costs_of_a_pass_are_read_off_a_clock_of_known_speed(synthetic: Callable[..., Engine]) -> None:
    """A clock that advances by 1 s a layer and tile, 0.1 s a row and 2 s for the head: `calibrate` must find them.

    Where nothing is padded there are parts of tiles, after the first.
    """
    engine = synthetic("tiny")
    model, _ = engine._loaded()
    now, forward, predict = [0.0], model.forward, model.predict
    padded, largest = model.ops.pads(model.dtype), model.tiles[-1]

    def count(rows: int) -> float:
        return -(-rows // largest) if padded else max(1.0, rows / largest)

    def timed(rows: object, kv: object, plan: LayerPlan) -> object:
        now[0] += plan.layers_kept * count(len(rows)) + 0.1 * len(rows)
        return forward(rows, kv, plan)

    def head(x: object) -> object:
        now[0] += 1.9
        return predict(x)

    model.forward, model.predict = timed, head
    try:
        with torch.inference_mode():
            costs = at_once(calibrate(model, lambda: now[0]))
    finally:
        del model.forward, model.predict
    assert (costs.full, costs.per_tile, costs.fixed, costs.per_row) == pytest.approx((10.0, 8.1, 2.0, 0.1))
    assert costs.tiles == tuple((size, pytest.approx(0.0)) for size in model.tiles)
    told = [1.9 + 8 * count(rows) + 0.1 * rows for rows in (1, 8, 16, 17, 32)]
    assert [costs.verify(rows) for rows in (1, 8, 16, 17, 32)] == pytest.approx(told)
    assert costs.draft(model.full.early_exit(2), 1) == pytest.approx(4.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("trap", [0.0, 0.3, 0.9])
def test_the_ledger_holds_on_a_virtual_clock(seed: int, trap: float) -> None:
    """Whatever is accepted, and however wrong the rates believed are, no more is lost than the limit allows."""
    random = np.random.default_rng(seed)
    ledger, decoding, lost = Ledger(0.015), 0.0, 0.0
    for step in range(4000):
        k = int(random.integers(1, 8))
        seconds = 0.6 * k + 1.0
        if ledger.affords(seconds - 1.0):
            honest = random.random() >= trap or step % 500 < 100
            tokens = 1 + (int(random.integers(0, k + 1)) if honest else 0)
            ledger.book(seconds, float(tokens))
            lost += seconds - tokens
        else:
            seconds = 1.0
            ledger.book(seconds, seconds)
        decoding += seconds
        assert lost <= 0.015 * decoding + 1e-9
    assert decoding == pytest.approx(ledger.decoding)


@pytest.fixture
def steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond between two looks at the clock, however busy the machine is."""
    looks = count()

    def clock() -> float:
        return next(looks) / 1000

    monkeypatch.setattr(speculate, "perf_counter", clock)
    monkeypatch.setattr(auto.Auto.__init__, "__defaults__", (clock,))


@pytest.mark.usefixtures("steady_clock")
@pytest.mark.parametrize(("max_loss", "searches"), [(0.0, False), (1.0, True)])
def test_a_search_takes_nothing_that_is_not_covered(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, max_loss: float, searches: bool
) -> None:
    taken = list[float]()
    monkeypatch.setattr(auto.swift.Swift, "_optimise", lambda self, *_: taken.append(self._budget.seconds) or True)
    engine = synthetic("tiny", torch.float32, 0.1)
    params = SamplingParams(max_tokens=90, ignore_eos=True)
    engine.generate([5, 9, 200, 31], params, method=f"auto:search_budget=0.5,max_loss={max_loss}")
    assert bool(taken) == searches


def test_one_pause_does_not_end_the_looking_for_guesses() -> None:
    """A collection of garbage in the middle of choosing says nothing of the next time."""
    made = method()
    assert made._overhead(1e-3) == pytest.approx(1e-3)
    assert made._overhead(0.2) == pytest.approx(1.1e-3)
    made._looks = False
    assert made._overhead(1e-4) == pytest.approx(1e-4), "it is another time where nothing is looked for"
    made._looks = True
    assert made._overhead(1e-5) == pytest.approx(1.045e-3)


def method(**options: float) -> auto.Auto:
    made = auto.Auto(auto.Options(**options), 8)
    made._guesses = [Guess(3, [4, 5, 6, 7], [0, 1, 2, 3])]
    return made


def test_the_fastest_covered_choice_is_taken() -> None:
    made = method()
    made._skips.value = 0.95
    choices = made.choices(COSTS, 1, 7)
    assert [choice.name for choice in choices] == ["plain", "lookup", "skip set", "cascade"]
    assert choices[1].seconds == COSTS.verify(5) == 1.0
    assert choices[1].tokens == pytest.approx(expected_tokens(0.2 + 0.6 * 3 / 4, 4))
    made._choose(choices)
    assert made._choice.name == "lookup", "its pass costs no more than plain decoding, and more is expected of it"
    made._guesses = [NOTHING]
    made._choose(made.choices(COSTS, 1, 7))
    assert made._choice.name == "plain", "nothing has been won yet that a skip set could lose"
    made._ledger.book(1.0, 20.0)
    made._choose(made.choices(COSTS, 1, 7))
    assert made._choice.name == "skip set"


class Run:
    """Rounds of one sequence with a method that was told `COSTS`, on a virtual clock that they advance."""

    def __init__(self, made: auto.Auto) -> None:
        self.made, self.decoding, self.lost = made, 0.0, 0.0
        made._costs = Costs(**vars(COSTS))
        made._clock = lambda: 0.0
        self.sequence = Sequence(0, 0, [5], SamplingParams(max_tokens=10**6), 0, frozenset(), 10**7, None)
        self.sequence.pages = [1]
        self.batch = Batch.of([self.sequence], 8, torch.device("cpu"))

    def round(self, guess: Guess, accepts: bool, at_most: int = 7, slower: float = 1.0) -> str:
        """One round; `slower` than calibrated are the passes that verify a draft."""
        made = self.made
        made._guesses = [guess]
        made._choose(made.choices(made._costs, 1, 7))
        k = made._choice.drafted
        taken = min(k, at_most) if accepts else 0
        one, tokens = torch.tensor([taken]), torch.zeros(1, k, dtype=torch.int64)
        verify_s = COSTS.verify(k + 1) * (slower if k else 1.0)
        drafting = {"skip set": made._choice.seconds - verify_s, "cascade": COSTS.draft(made._swift.plan, k + 1)}
        draft_s = drafting.get(made._choice.name, 0.0)
        verdict = Verdict(one, one, one, torch.zeros(1, k + 1, dtype=torch.int64))
        draft = Draft(tokens, torch.tensor([k]))
        made.observe(
            None, None, Round(self.batch, draft, tokens, tokens, verdict, [k], [taken + 1], draft_s, verify_s, None)
        )
        self.decoding += made._choice.seconds
        self.lost += made._choice.seconds - (taken + 1)
        return made._choice.name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("switch", [17, 400])
def test_the_promise_holds_where_drafts_turn_bad(monkeypatch: pytest.MonkeyPatch, seed: int, switch: int) -> None:
    """Drafts are accepted whole for `switch` rounds and then never for as many; a verified row costs 2 % of a token."""
    monkeypatch.setattr(COSTS, "per_row", 0.02)
    random = np.random.default_rng(seed)
    run = Run(method(search_budget=0.0))
    for step in range(1500):
        n = int(random.integers(0, 4))
        guess = Guess(n, [4] * 7, list(range(7))) if n else NOTHING
        run.round(guess, accepts=step // switch % 2 == 1)
        assert run.lost <= 0.015 * run.decoding + 1e-9
    assert run.lost < -0.2 * run.decoding, "and more is won than lost"


def test_a_losing_lookup_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COSTS, "per_row", 0.02)
    run, guess = Run(method(search_budget=0.0)), Guess(1, [4] * 7, list(range(7)))
    run.made._skips.wait = 10**9
    names = [run.round(guess, accepts=False) for _ in range(600)]
    assert names[0] == "plain", "nothing covers its loss yet"
    tried = [i for i, name in enumerate(names) if name == "lookup"]
    assert 0 < len(tried) < 40
    assert tried[-1] > 200
    names = [run.round(guess, accepts=True) for _ in range(1500)]
    assert names[-1] == "lookup"


def test_a_cost_that_calibration_missed_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of a lookup take 1.6 of what was calibrated, one draft token of them is accepted every other round."""
    run, guess = Run(method(search_budget=0.0)), Guess(3, [4] * 7, list(range(7)))
    run.made._skips.wait = 10**9
    names: list[str] = []
    for step in range(600):
        names.append(run.round(guess, accepts=step % 2 == 0, at_most=1, slower=1.6))
    assert names[:3] == ["lookup"] * 3
    assert names[-400:].count("lookup") < 40
    assert run.made._slowness["lookup"] > 1.4


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_cascade_changes_no_token(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    engine = synthetic("tiny", torch.float32, 0.1, vocab=24)
    prompts = [[3, 4, 5, 6] * 5, [7], [*range(3, 20), 3, 4]]
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=4, ignore_eos=True)
    plain = [engine.generate(prompt, params).token_ids for prompt in prompts]
    choose = auto.Auto._choose

    def cascade(made: auto.Auto, choices: list[auto.Choice]) -> None:
        choose(made, choices)
        made._choice = next((choice for choice in choices if choice.name == "cascade"), made._choice)

    monkeypatch.setattr(auto.Auto, "_choose", cascade)
    outputs = engine.generate(prompts, params, method="auto:search_budget=0.0,skip_ratio=0.2,max_loss=0.5")
    assert [output.token_ids for output in outputs] == plain
    rounds = [event["rounds"].get("cascade", 0) for event in outputs[0].stats.events if event["kind"] == "decision"]
    assert sum(rounds) > 5
    assert all(output.stats.accepted > 0 for output in outputs)


@torch.inference_mode()
def test_a_guess_is_sifted_by_what_the_plan_would_say(synthetic: Callable[..., Engine]) -> None:
    """By the whole model it keeps what plain decoding says, and has its next token instead of the first that is not."""
    engine = synthetic("tiny", torch.float32, 0.1)
    model, cache = engine._loaded()
    prompt, params = [5, 9, 200, 31], SamplingParams(max_tokens=8, ignore_eos=True)
    said = engine.generate(prompt, params).token_ids
    sequence = Sequence(0, 0, prompt, params, 0, frozenset(), 100, None)
    sequence.pages = cache.reserve(sequence.max_length)
    prefill(model, cache, sequence, Autoregressive(None, 8))
    batch = Batch.of([sequence], model.ops.decode_tile, model.device)
    for right in range(4):
        guess = torch.tensor([[*said[1 : 1 + right], *[said[1 + right] + 1] * (3 - right)]])
        sifted = sift(model, cache, batch, model.full, Draft(guess, torch.tensor([3])))
        assert sifted.tokens[0, : int(sifted.length)].tolist() == said[1 : 2 + right]
    cache.release(sequence.pages)


def test_what_choosing_costs_is_booked(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(method(search_budget=0.0))
    made, done = (
        run.made,
        Round(
            run.batch,
            Draft(torch.zeros(1, 0).long(), torch.tensor([0])),
            *[torch.zeros(1, 1).long()] * 2,
            Verdict(*[torch.tensor([0])] * 3, torch.zeros(1, 1).long()),
            [0],
            [1],
            0.1,
            1.0,
            None,
        ),
    )
    made.observe(None, None, done)
    assert (made._ledger.decoding, made._ledger.balance) == pytest.approx((1.1, -0.1))


def plain_round(run: Run, draft_s: float, verify_s: float) -> Round:
    one, tokens = torch.tensor([0]), torch.zeros(1, 1).long()
    draft, verdict = Draft(torch.zeros(1, 0).long(), one), Verdict(one, one, one, tokens)
    return Round(run.batch, draft, tokens, tokens, verdict, [0], [1], draft_s, verify_s, None)


def test_to_learn_that_a_context_is_long_is_no_loss() -> None:
    run = Run(method(search_budget=0.0))
    for _ in range(30):
        run.made.observe(None, None, plain_round(run, 0.0, 1.5))
    assert run.made._costs.pace > 1.4
    assert run.made._ledger.balance == pytest.approx(0.0)


def test_guesses_are_looked_for_when_that_and_the_lookup_are_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking costs more than the ledger allows a round: it is done now and then, and never for nothing."""
    run, looked = Run(method(search_budget=0.0)), list[int]()
    made, model = run.made, SimpleNamespace(mark=lambda *_: nullcontext())

    def found(*_: object) -> Guess:
        looked.append(rounds)
        return Guess(1, [4], [0])

    monkeypatch.setattr(auto, "likeliest", found)
    # Eight rows cost a tenth more than one, and a guess of one token is not believed in: it risks something.
    made._costs.per_row = 0.1
    rounds = 0
    while rounds < 200:
        rounds += 1
        before = len(looked)
        made.propose(model, None, run.batch)
        cost = 0.05 if len(looked) > before else 0.0
        if made._choice.name == "plain":
            made.observe(None, None, plain_round(run, cost, 1.0))
        else:
            assert made._ledger.affords(made._choice.loss)
            break
    assert made._choice.name == "lookup"
    assert len(looked) < rounds / 4, "most rounds cost what plain decoding does"


def test_no_room_is_plain_decoding() -> None:
    assert [choice.name for choice in method().choices(COSTS, 1, 0)] == ["plain"]


def test_a_longer_pass_is_charged_to_a_batch() -> None:
    """Four sequences of seven drafts are 32 rows, four tiles; one sequence's fit a tile."""
    made = method()
    made._guesses = [Guess(3, [4] * 7, list(range(7)))] * 4
    lookup = made.choices(COSTS, 4, 7)[1]
    assert lookup.seconds == COSTS.verify(4 + 4 * lookup.drafted)


def test_reports_say_what_was_predicted_and_what_came(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny", torch.float32, 0.1)
    stats = engine.generate([7] * 3, SamplingParams(max_tokens=80, ignore_eos=True), method="auto").stats
    decisions = [event for event in stats.events if event["kind"] == "decision"]
    assert sum(sum(event["rounds"].values()) for event in decisions) == stats.rounds
    for event in decisions:
        assert set(event["rounds"]) <= {"plain", "lookup", "skip set", "cascade"}
        assert sum(event["why"].values()) == sum(event["rounds"].values())
        assert min(event[f"{name}_tokens_per_s"] for name in ("predicted", "measured", "plain")) > 0
    assert decisions[-1]["tokens"] == 80


def test_every_request_is_told_its_own_decisions(synthetic: Callable[..., Engine]) -> None:
    """Also those after requests in which the search had something to tell."""
    engine, searched = synthetic("tiny", torch.float32, 0.1), 0
    for tokens in (90, 40, 70):
        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        stats = engine.generate([7] * 3, params, method="auto:search_budget=0.5,remember=0,max_loss=1").stats
        decisions = [event for event in stats.events if event["kind"] == "decision"]
        assert sum(sum(event["rounds"].values()) for event in decisions) == stats.rounds
        assert decisions[-1]["tokens"] == tokens
        searched += len(stats.events) - len(decisions)
    assert searched > 0
