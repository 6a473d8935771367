"""What `auto` decides for rounds the device runs alone: on a virtual clock, and with the tokens of plain decoding."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.loaders.synthetic import synthetic_weights
from skipjack.runtime import graphs, round_graph
from skipjack.runtime.batch import Tally
from skipjack.runtime.cache import KVCache
from skipjack.runtime.costs import Ledger
from skipjack.runtime.methods import auto
from skipjack.runtime.methods.stretches import BETTER, LONGEST_WAIT, STRETCH, TIMED, TRIAL, WAIT, Stretches, Way
from skipjack.runtime.model import Model
from skipjack.runtime.recipe import Recipe
from skipjack.runtime.round import State, device_round
from skipjack.runtime.round_graph import AHEAD
from skipjack.runtime.sequence import Sequence

LIMIT, CHANGE = 0.015, 0.3
PLAIN, LOOKUP, SKIP = Way("plain"), Way("lookup", 7, 1.15, 1.6), Way("skip set", 3, 2.8, 2.95)


LIGHT = Way("light", 7, 5.0, 6.5, trusted=True)


class Device:
    """Rounds under way, reports that come late, and a moment without work at every change, as the decider sees them.

    `costs` are the seconds of a round by the name of its way.
    """

    def __init__(self, costs: dict[str, float], limit: float = LIMIT, more: tuple[Way, ...] = ()) -> None:
        self.costs, self.ledger = costs, Ledger(limit)
        self.decider = Stretches([PLAIN, LOOKUP, SKIP, *more], self.ledger)
        self.decoding = self.lost = 0.0
        self.names: list[str] = []
        self._way: Way | None = None
        self._pending: deque[Way] = deque()

    def rounds(self, count: int, tokens: Callable[[str], float], size: int = 1, noise: Iterator[float] | None = None):
        """So many reports of a request; `tokens` gives those of a round of that way."""
        noise = itertools.repeat(1.0) if noise is None else noise
        read = 0
        while read < count:
            way, pause = self.decider.choose(size), 0.0
            if way is not self._way:
                changed = self._way is not None
                while self._pending:
                    self._report(self._pending.popleft(), tokens, size, next(noise), 0.0)
                    read += 1
                pause, self._way = CHANGE if changed else 0.0, way
            self._pending.extend([way] * (AHEAD + 1 - len(self._pending)))
            self._report(self._pending.popleft(), tokens, size, next(noise), pause)
            read += 1

    def _report(self, way: Way, tokens: Callable[[str], float], size: int, noise: float, pause: float) -> None:
        seconds, got, plain = self.costs[way.name], tokens(way.name), self.costs["plain"]
        timed = self.decider.timed(size)
        cost = self.decider.observe(way, size, got, seconds * noise + pause, changed=pause > 0)
        if timed:
            believed = self.decider.seconds(PLAIN, size)
            self.ledger.book(cost, cost if way is PLAIN else believed * got)
        self.decoding += seconds + pause
        self.lost += seconds + pause - plain * got
        self.names.append(way.name)


def constant(**tokens: float) -> Callable[[str], float]:
    return lambda name: tokens.get(name.split()[0], 1.0)


def test_what_is_fastest_is_found_and_stays() -> None:
    device = Device({"plain": 1.0, "lookup": 1.1, "skip set": 2.5})
    device.rounds(1500, constant(lookup=1.5, skip=2.6))
    assert set(device.names[: TIMED + 1]) == {"plain"}
    assert device.names[300:].count("lookup") > 0.85 * 1200
    assert device.lost < -0.3 * device.decoding
    other = Device({"plain": 1.0, "lookup": 1.1, "skip set": 1.5})
    other.rounds(1500, constant(lookup=1.2, skip=2.6))
    assert other.names[600:].count("skip set") > 0.85 * 900


def test_a_losing_way_is_left_and_tried_again_with_growing_waits() -> None:
    device = Device({"plain": 1.0, "lookup": 1.1, "skip set": 2.5})
    device.rounds(6000, constant(lookup=1.0, skip=1.0))
    runs = [(name, len(list(run))) for name, run in itertools.groupby(device.names)]
    for name in ("lookup", "skip set"):
        tried = [length for other, length in runs if other == name]
        assert len(tried) > 2
        assert all(length <= TRIAL + AHEAD + 1 for length in tried)
    waits = [record.wait for record in device.decider._records.values()]
    assert waits[0] == WAIT, "plain decoding was the best all along"
    assert WAIT < waits[1] <= LONGEST_WAIT
    first, last = (Counter(device.names[part]) for part in (slice(0, 3000), slice(3000, 6000)))
    assert last["lookup"] <= first["lookup"]
    device.rounds(3000, constant(lookup=2.0))
    assert device.names[-1] == "lookup", "the text has changed"


def test_a_trusted_way_is_gone_as_soon_as_plain_rounds_are_timed_and_left_where_it_fails() -> None:
    device = Device({"plain": 1.0, "lookup": 1.1, "skip set": 2.5, "light": 5.0}, more=(LIGHT,))
    device.rounds(200, lambda name: {"light": 6.5}.get(name, 1.0))
    assert set(device.names[: TIMED + 1]) == {"plain"}
    assert device.names[TIMED + AHEAD + 1] == "light"
    assert device.names.count("light") > 0.65 * 200, "but for tries of the others, which are covered now"
    wrong = Device({"plain": 1.0, "lookup": 1.1, "skip set": 2.5, "light": 5.0}, more=(LIGHT,))
    wrong.rounds(2000, constant())
    runs = [len(list(run)) for name, run in itertools.groupby(wrong.names) if name == "light"]
    assert runs, "it was expected to pay"
    assert runs[0] <= TRIAL + AHEAD + 1, "it was left as soon as a way may be"
    assert len(runs) < 8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("switch", [40, 700])
@pytest.mark.parametrize("cost", [1.05, 1.3, 1.6])
def test_the_promise_holds_where_drafts_turn_bad(seed: int, switch: int, cost: float) -> None:
    """Drafts are accepted for `switch` rounds and never for as many; single rounds take up to three times as long.

    What is lost beyond the promise are the first rounds of ways, and the first changes, that cost more than believed.
    """
    random = np.random.default_rng(seed)
    device = Device({"plain": 1.0, "lookup": cost, "skip set": 2 * cost})
    step = itertools.count()

    def tokens(name: str) -> float:
        good = next(step) // switch % 2 == 1
        return 1.0 if name == "plain" or not good else float(random.integers(1, 5))

    noise = iter(lambda: float(random.choice([1.0, 1.0, 1.0, 1.0, 0.99, 1.02, 3.0])), None)
    unbelieved = max(0.0, cost - LOOKUP.seconds) + max(0.0, 2 * cost - SKIP.seconds)
    surprise = (2 + AHEAD) * unbelieved + 3 * CHANGE
    for _ in range(60):
        device.rounds(50, tokens, noise=noise)
        assert device.lost <= LIMIT * device.decoding + surprise
    assert device.lost < -0.05 * device.decoding or cost > 1.5, "and more is won than lost"


def test_a_change_pays_for_itself_before_it_is_made() -> None:
    """A way that is better by less than a change costs in a stretch is not changed to."""
    device = Device({"plain": 1.0, "lookup": 1.0, "skip set": 2.5}, limit=1.0)
    device.rounds(400, constant(lookup=(BETTER + 1) / 2, skip=1.0))
    decider = device.decider
    assert decider._change.value == pytest.approx(CHANGE, abs=0.05)
    for way, promised in ((decider.way, BETTER), (LOOKUP if decider.way is PLAIN else PLAIN, 1.0)):
        pause = 0.0 if way is decider.way else decider._change.value / STRETCH
        expected = promised * decider.tokens(way) / (decider.seconds(way, 1) + pause)
        assert decider._promise(way, 1) == pytest.approx(expected)


def test_each_number_of_sequences_has_its_own_times() -> None:
    device = Device({"plain": 1.0, "lookup": 1.5, "skip set": 2.5})
    device.rounds(600, constant(lookup=2.0))
    assert device.decider.seconds(LOOKUP, 1) == pytest.approx(1.5)
    device.costs |= {"plain": 3.0, "lookup": 3.6}
    before = len(device.names)
    device.rounds(TIMED, constant(lookup=2.0), size=4)
    assert device.decider.choose(4) is PLAIN
    device.rounds(2, constant(lookup=2.0), size=4)
    assert "plain" in device.names[before:]
    assert device.decider.seconds(LOOKUP, 4) == pytest.approx(4.5), "the ratio known, until it is timed"
    device.rounds(100, constant(lookup=2.0), size=4)
    assert device.decider.seconds(LOOKUP, 4) == pytest.approx(3.6)
    assert device.decider.seconds(PLAIN, 1) == pytest.approx(1.0)


def test_reports_are_told_apart_by_the_round_they_are_of() -> None:
    """Late reports of rounds under way when another was chosen teach nothing about that one."""
    made = auto.Auto(auto.Options(search_budget=0.0), 8)
    sequence = Sequence(0, 0, [5], SamplingParams(max_tokens=10**6), 0, frozenset(), 10**7, None)
    plain, lookup, skip = made.recipes([sequence])
    assert (plain.num_draft_tokens, lookup.num_draft_tokens, skip.num_draft_tokens) == (0, 7, 3)
    assert lookup.ngrams is not None
    assert skip.plan == made._swift.plan
    for _ in range(10):
        assert made.recipe([sequence]) == plain
        assert made.plan == made._swift.plan, "whose mask a skip set's graph gets that goes on"
        made.count(None, None, Tally([sequence], [0], [0], [0], [1], 0.0, 1.0, plain))
    assert made._stretches.tokens(made._stretches.ways[1]) == auto.LOOKED_UP
    made.count(None, None, Tally([sequence], [7], [7], [7], [8], 0.0, 1.0, lookup))
    assert made._stretches.tokens(made._stretches.ways[1]) > 4
    assert made._stretches.tokens(made._stretches.ways[0]) == 1.0


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Rounds of the device on a clock that goes by their recipe; what they were."""
    now, ran = [0.0], list[str]()

    def timed(model: Model, cache: KVCache, state: State, recipe: Recipe) -> None:
        way = auto._name(recipe)
        now[0] += {"plain": 1.0, "lookup": 1.1, "skip set": 2.0}[way]
        ran.append(way)
        device_round(model, cache, state, recipe)

    monkeypatch.setattr(round_graph, "device_round", timed)
    monkeypatch.setattr(graphs, "perf_counter", lambda: now[0])
    return ran


@pytest.mark.parametrize(
    ("options", "temperature"),
    [("search_budget=0", 0.0), ("search_budget=0", 0.5), ("search_budget=0.2,skip_ratio=0.3", 0.0)],
)
def test_the_tokens_are_those_of_plain_decoding(
    synthetic: Callable[..., Engine], clocked: list[str], options: str, temperature: float
) -> None:
    host = synthetic("tiny", torch.float32, 0.1, vocab=24)
    weights = synthetic_weights(host.config, 0, torch.float32, 0.1)
    params = SamplingParams(max_tokens=240, temperature=temperature, seed=5, ignore_eos=True)
    prompts = [[3, 4, 5, 6] * 5, [7]]
    with Engine(host.config, weights, graphs=True) as engine:
        for given in (prompts[:1], prompts):
            expected = [output.token_ids for output in host.generate(given, params)]
            outputs = engine.generate(given, params, method=f"auto:max_loss=0.1,{options}")
            assert [output.token_ids for output in outputs] == expected
            assert all(output.stats.graph_rounds == output.stats.rounds for output in outputs)
        assert {"plain", "lookup", "skip set"} <= set(clocked)
        events = [event for event in outputs[0].stats.events if event["kind"] == "decision"]
    assert sum(sum(event["rounds"].values()) for event in events) > 100
    for event in events:
        assert sum(event["why"].values()) == sum(event["rounds"].values())
        assert min(event[f"{name}_tokens_per_s"] for name in ("predicted", "measured", "plain")) > 0
        assert set(event["tokens_per_round"]) == {"plain", "lookup", "skip set"}


def test_penalties_keep_no_round_from_the_device(synthetic: Callable[..., Engine], clocked: list[str]) -> None:
    host = synthetic("tiny", torch.float32, 0.1, vocab=24)
    weights = synthetic_weights(host.config, 0, torch.float32, 0.1)
    with Engine(host.config, weights, graphs=True, method="auto:search_budget=0") as engine:
        for changed in ({}, {"repetition_penalty": 1.2}, {}):
            params = SamplingParams(max_tokens=24, ignore_eos=True, **changed)
            output = engine.generate([3, 4, 5, 6] * 5, params)
            assert output.token_ids == host.generate([3, 4, 5, 6] * 5, params).token_ids
            assert output.stats.graph_rounds == output.stats.rounds > 0


def test_rounds_go_on_while_the_graph_of_another_way_is_built(
    synthetic: Callable[..., Engine], clocked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = synthetic("tiny", torch.float32, 0.1, vocab=24)
    weights = synthetic_weights(host.config, 0, torch.float32, 0.1)
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    asked = list[str]()

    def never(self: graphs.Graphs, recipe: Recipe, sequences: list[Sequence]) -> bool:
        asked.append(auto._name(recipe))
        return False

    monkeypatch.setattr(graphs.Graphs, "expect", never)
    with Engine(host.config, weights, graphs=True) as engine:
        output = engine.generate([3, 4, 5, 6] * 5, params, method="auto:search_budget=0,max_loss=0.1")
    assert output.token_ids == host.generate([3, 4, 5, 6] * 5, params).token_ids
    assert "lookup" in asked
    assert set(clocked) == {"plain"}
