"""Methods whose set is replaced while the device drafts: tokens, counts and choices of the rounds of the host."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from skipjack import Engine, LayerPlan, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import graphs
from skipjack.runtime.budget import Budget
from skipjack.runtime.methods import dynamic_exit, knapspec, registry
from skipjack.runtime.methods.base import Method
from skipjack.runtime.methods.dynamic_exit import DynamicExit
from skipjack.runtime.methods.knapspec import KnapSpec
from skipjack.runtime.recipe import Recipe
from skipjack.runtime.request import Output
from skipjack.runtime.round_graph import AHEAD

pytestmark = pytest.mark.usefixtures("whole_drafts")

PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]
METHODS = {
    "clasp": "clasp:interval=4,threshold=0.05,num_draft_tokens=4",
    "clasp, any confidence": "clasp:interval=3,threshold=0,skip=3",
    "clasp, rejection": "clasp:interval=3,threshold=0.05,acceptance=rejection",
    "knapspec": "knapspec:interval=4,threshold=0.05,window_rounds=2",
    "knapspec, rejection": "knapspec:interval=4,threshold=0.05,window_rounds=2,acceptance=rejection",
    "conflayers": "conflayers:interval=6,window=8,threshold=0.05,num_draft_tokens=4",
    "conflayers, trees": "conflayers:interval=6,window=8,threshold=0.05,max_opt_iter=3,tree=true,max_nodes=12",
    "conflayers, rejection": "conflayers:interval=6,window=8,threshold=0.05,acceptance=rejection",
    "del": "del:num_draft_tokens=5",
    "del, rejection": "del:num_draft_tokens=5,acceptance=rejection",
}


Pair = Callable[[], tuple[Engine, Engine]]


class Ticks:
    """A clock that moves on whenever it is read, by so little that all work is done in a round."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-7
        return self.now


class Every:
    """Due in one of every so many rounds that were counted."""

    def __init__(self, method: DynamicExit, rounds: int) -> None:
        self._left = 0
        self._rounds = rounds
        counted = method._budget.round

        def count(seconds: float, *, recorded: bool) -> float:
            self._left = self._rounds if recorded else self._left - 1
            return counted(seconds, recorded=recorded)

        method._budget.round = count

    def __call__(self) -> bool:
        return self._left <= 0


def timed_alike(engine: Engine, method: str) -> Method:
    """The engine's instance of a method, for which every wish is paid and no time measured is a real one."""
    spec = registry.parse(method)
    own = engine._method(spec)
    if isinstance(own, KnapSpec):
        own = engine._methods().ready[spec] = KnapSpec(spec.options, engine.config.num_layers, Ticks())
    if isinstance(own, DynamicExit):
        own._due = Every(own, 3)
    own._budget.seconds = 1e9
    return own


def learnt(*outputs: Output) -> list[dict[str, Any]]:
    """What was told in the rounds of requests, one output of each."""
    events = [event for output in outputs for event in output.stats.events]
    return [{key: value for key, value in event.items() if key != "seconds"} for event in events]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Makes the same model with rounds the host steers and with rounds of the device."""
    made: list[Engine] = []

    def engines() -> tuple[Engine, Engine]:
        config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
        weights = synthetic_weights(config, 0, torch.float32, 0.1)
        host, device = (Engine(config, weights, graphs=alone) for alone in (False, True))
        made.extend((host, device))
        return host, device

    yield engines
    for engine in made:
        engine.close()


@pytest.mark.parametrize("temperature", [0.0, 0.2])
@pytest.mark.parametrize("name", METHODS)
def test_rounds_of_the_device_are_those_of_the_host(
    pair: Pair,
    told: Callable[[Output], Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    temperature: float,
) -> None:
    """Each read before the next, so that a set is chosen at the same token."""
    monkeypatch.setattr(graphs, "AHEAD", 0)
    host, device = pair()
    params = SamplingParams(max_tokens=36, temperature=temperature, seed=3, ignore_eos=True)
    found: list[Any] = []
    for engine in (host, device):
        timed_alike(engine, METHODS[name])
        outputs = [*engine.generate(PROMPTS, params, method=METHODS[name])]
        outputs += [engine.generate(prompt, params, method=METHODS[name]) for prompt in PROMPTS]
        found.append(([told(output) for output in outputs], learnt(outputs[0], *outputs[len(PROMPTS) :])))
        rounds, alone = (sum(getattr(output.stats, name) for output in outputs) for name in ("rounds", "graph_rounds"))
        assert (alone > 0) == (engine is device)
        # Those that are recorded are the host's; confidence takes a pass of its own.
        assert (alone == rounds) == (engine is device and name.startswith("conflayers"))
        assert sum(output.stats.drafted for output in outputs) > 0
    assert found[1] == found[0]
    chosen = [(event.get("skip_attention"), event.get("exit_layer")) for event in found[0][1]]
    assert len(chosen) > 1
    assert device._loaded()[1].free_pages == device._loaded()[1].total_pages


def test_a_set_is_replaced_as_many_rounds_late_as_are_read_late(pair: Pair, told: Callable[[Output], Any]) -> None:
    host, device = pair()
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    found: list[Any] = []
    for engine, interval in ((host, 3 + AHEAD), (device, 3)):
        method = f"clasp:interval={interval},num_draft_tokens=3,threshold=0"
        timed_alike(engine, method)
        output = engine.generate(PROMPTS[0], params, method=method)
        found.append((told(output), learnt(output)))
    assert found[1] == found[0]
    assert len(found[0][1]) > 3


@pytest.mark.parametrize("name", ["clasp", "knapspec", "del"])
def test_tokens_are_those_of_plain_decoding_with_times_as_they_come(pair: Pair, name: str) -> None:
    host, device = pair()
    params = SamplingParams(max_tokens=70, temperature=0.7, seed=5, ignore_eos=True)
    expected = [output.token_ids for output in host.generate(PROMPTS, params)]
    outputs = device.generate(PROMPTS, params, method=f"{METHODS[name]},search_budget=0.5")
    assert [output.token_ids for output in outputs] == expected
    assert all(output.stats.graph_rounds for output in outputs)


def test_one_graph_serves_every_set_with_drafts_of_some_length(pair: Pair) -> None:
    device = pair()[1]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    # One for each of the numbers of draft steps there are up to the option's, and one without where that may be 0.
    for name, most in (("clasp", 3), ("knapspec", 5), ("del", 5)):
        pool = device._open().graphs
        assert pool is not None
        before = pool.captured
        timed_alike(device, METHODS[name])
        assert len(learnt(device.generate(PROMPTS[0], params, method=METHODS[name]))) > 1
        assert 1 <= pool.captured - before <= most


def test_a_recorded_round_pays_for_what_it_takes_longer() -> None:
    budget = Budget(0.5)
    assert budget.round(8.0, recorded=True) == 0.0, "nothing is known of other rounds yet"
    assert budget.seconds == 4.0
    for seconds in (1.0, 2.0, 90.0):
        assert budget.round(seconds, recorded=False) == 0.0
    assert budget.seconds == 50.5
    assert budget.round(7.0, recorded=True) == 5.0
    assert budget.seconds == 49.0
    assert budget.round(1.0, recorded=True) == 0.0


def test_no_window_is_recorded_before_the_last_one_is_paid_for() -> None:
    full = LayerPlan.full(8)
    method = KnapSpec(knapspec.Options(), 8)
    assert method.recipe([]) is None
    method._budget.spend(1.0)
    assert method.recipe([]) == Recipe(full, full)
    method._budget.round(21.0, recorded=False)
    assert method.recipe([]) is None
    assert KnapSpec(knapspec.Options(search_budget=0.0), 8).recipe([]) == Recipe(full, full)


def test_exits_are_not_measured_twice_before_it_is_known_what_other_rounds_take() -> None:
    method = DynamicExit(dynamic_exit.Options(), 8)
    assert method.recipe([]) is None
    method._budget.round(1.0, recorded=True)
    method._learn(torch.ones(7, dtype=torch.bool), torch.ones(7))
    assert method.recipe([]) is not None
    method._budget.round(1.0, recorded=False)
    assert method.recipe([]) is None
