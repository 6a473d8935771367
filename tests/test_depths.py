"""The number of captured draft steps follows the drafts: up and down, not to and fro, and no text changes by it."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import depths, graphs, round_graph, speculate
from skipjack.runtime.batch import Tally
from skipjack.runtime.cache import KVCache
from skipjack.runtime.depths import KEPT, LONGEST_WAIT, WINDOW, Depth, Depths, cuts, lengths
from skipjack.runtime.methods import knapspec
from skipjack.runtime.methods.base import Method
from skipjack.runtime.methods.swift import Options, Swift
from skipjack.runtime.model import Model
from skipjack.runtime.plan import LayerPlan
from skipjack.runtime.recipe import Ngrams, Recipe, Steps
from skipjack.runtime.round import device_round
from skipjack.runtime.round_graph import RoundGraph
from skipjack.runtime.sequence import Sequence

FULL = LayerPlan.full(8)
EARLY = Recipe(FULL, FULL.without(attention=(2,)), 7, confident=True)
PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]


class Limited(Method):
    """A method that chooses the draft's length itself."""

    limit = 0


def method(limit: int = 0) -> Limited:
    made = Limited(None, 8)
    made.limit = limit
    return made


def served(
    depth: Depth, drafts: Callable[[], int], windows: int, agrees: Callable[[], bool] = lambda: True
) -> list[int]:
    """The steps after each of so many windows of rounds, whose drafts end of themselves after so many tokens.

    A draft that was cut short has all its tokens accepted where the text `agrees`, and one token less where not.
    """
    found = list[int]()
    for _ in range(windows):
        for _ in range(WINDOW):
            drafted = min(drafts(), depth.steps)
            depth.count(drafted, drafted if agrees() else drafted - 1)
        found.append(depth.steps)
    return found


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (EARLY, [1, 2, 4, 7]),
        (replace(EARLY, num_draft_tokens=8), [1, 2, 4, 8]),
        (replace(EARLY, num_draft_tokens=9), [1, 2, 4, 8, 9]),
        (replace(EARLY, num_draft_tokens=2), [1, 2]),
        (replace(EARLY, max_nodes=32), [1, 2, 4, 7]),
        (replace(EARLY, reuse=True), [1, 2, 4, 7]),
        (replace(EARLY, confident=False, limited=True), [1, 2, 4, 7]),
        (replace(EARLY, num_draft_tokens=1), [1]),
        (replace(EARLY, confident=False), [7]),
        (replace(EARLY, ngrams=Ngrams(3)), [7]),
        (replace(EARLY, steps=Steps()), [7]),
        (Recipe(FULL, FULL), [0]),
    ],
)
def test_steps_are_powers_of_two_where_drafts_end_early(recipe: Recipe, expected: list[int]) -> None:
    assert lengths(recipe) == expected
    assert cuts(recipe) == [replace(recipe, num_draft_tokens=steps) for steps in expected]
    known, own = Depths(), method(limit=64)
    for _ in range(2 * WINDOW):
        steps = known.serve(own, recipe).num_draft_tokens
        known.count(own, recipe, steps, min(1, steps), 0)
    assert known.serve(own, recipe) == replace(recipe, num_draft_tokens=expected[0])
    if len(expected) == 1:
        assert known.serve(own, recipe) is recipe


@pytest.mark.parametrize(("drafted", "expected"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 7), (7, 7)])
def test_steps_shrink_to_what_drafts_come_to(drafted: int, expected: int) -> None:
    assert served(Depth([1, 2, 4, 7]), lambda: drafted, 40, lambda: False) == [expected] * 40


@pytest.mark.parametrize(("deep", "expected"), [(WINDOW // 4 - 1, 1), (WINDOW // 4, 7)])
def test_a_quarter_of_the_rounds_is_not_cut_short(deep: int, expected: int) -> None:
    depth = Depth([1, 2, 4, 7])
    for drafted in [7] * deep + [1] * (WINDOW - deep - 1):
        depth.count(drafted, 0)
    assert depth.steps == 7, "the window is not over"
    depth.count(1, 0)
    assert depth.steps == expected


def test_steps_grow_back_when_drafts_get_better() -> None:
    depth = Depth([1, 2, 4, 7])
    assert served(depth, lambda: 1, 3, lambda: False) == [1, 1, 1]
    assert served(depth, lambda: 7, 5) == [2, 4, 7, 7, 7]
    assert served(depth, lambda: 2, 1) == [2]


@pytest.mark.parametrize(("accepted", "expected"), [(WINDOW // 2, 2), (WINDOW // 2 - 1, 1)])
def test_steps_grow_where_all_were_accepted_in_half_of_the_rounds(accepted: int, expected: int) -> None:
    depth = Depth([1, 2])
    served(depth, lambda: 1, 1, lambda: False)
    for i in range(WINDOW):
        depth.count(1, int(i < accepted))
    assert depth.steps == expected


def test_a_growth_that_was_a_mistake_waits_ever_longer_for_the_next() -> None:
    """Drafts of one token, accepted: with one step it cannot be seen that there would be no second."""
    found = served(Depth([1, 2, 4, 7]), lambda: 1, 40 * LONGEST_WAIT)
    grown = [window for window, steps in enumerate(found) if steps == 2]
    waits = [later - earlier - 1 for earlier, later in pairwise(grown)]
    assert waits[:6] == [2, 4, 8, 16, 32, 32]
    assert set(waits[5:]) == {LONGEST_WAIT}
    assert set(found) == {1, 2}


@pytest.mark.parametrize(("share", "mostly"), [(0.1, 1), (0.2, 1), (0.25, None), (0.3, None), (0.5, 4)])
def test_steps_do_not_go_to_and_fro(share: float, mostly: int | None) -> None:
    """Drafts of which so many go beyond the first token, one way or the other about a quarter of them."""
    draw, depth = random.Random(0), Depth([1, 2, 4, 7])
    found = served(depth, lambda: 3 if draw.random() < share else 1, 1000)
    changes = sum(a != b for a, b in pairwise(found))
    assert changes < 100
    assert mostly is None or found.count(mostly) > 900


def test_what_is_longer_for_good_may_be_tried_again_at_once() -> None:
    depth = Depth([1, 2])
    served(depth, lambda: 1, 100)
    assert depth.wait > 8
    served(depth, lambda: 2, 100)
    assert depth.steps == 2
    assert served(depth, lambda: 1, 1) == [1]
    assert served(depth, lambda: 2, 1) == [2]


def taught(known: Depths, own: Method, recipe: Recipe, drafted: int) -> int:
    """The steps after a window of rounds that drafted so many tokens and accepted none."""
    for _ in range(WINDOW):
        known.count(own, recipe, known.serve(own, recipe).num_draft_tokens, drafted, 0)
    return known.serve(own, recipe).num_draft_tokens


def test_what_is_known_is_a_methods_and_a_sets() -> None:
    known, own = Depths(), method()
    assert taught(known, own, EARLY, 2) == 2
    drawn = replace(EARLY, rejection=True)
    assert taught(known, own, drawn, 2) == drawn.num_draft_tokens, "its draws follow from the number of steps"
    assert known.serve(own, replace(EARLY, plan=FULL)) == replace(EARLY, plan=FULL)
    assert known.serve(method(), EARLY) == EARLY
    for skipped in range(KEPT):
        known.serve(own, replace(EARLY, vocabulary=skipped + 1))
    assert known.serve(own, EARLY) == EARLY, "forgotten: many others were used since"


def test_rounds_of_other_steps_teach_nothing() -> None:
    known, own = Depths(), method()
    for _ in range(3 * WINDOW):
        known.count(own, EARLY, 4, 1, 0)
    assert known.serve(own, EARLY) == EARLY


def test_a_length_the_method_chooses_is_the_most_and_learnt_about_anew() -> None:
    known, own, recipe = Depths(), method(3), replace(EARLY, limited=True)
    assert known.serve(own, recipe).num_draft_tokens == 4
    assert taught(known, own, recipe, 1) == 1
    for limit, expected in ((4, 1), (5, 7), (7, 7), (1, 1), (2, 2)):
        own.limit = limit
        assert known.serve(own, recipe).num_draft_tokens == expected
    # It gave up drafting while rounds were under way.
    own.limit = 0
    known.count(own, recipe, 2, 1, 0)


def test_a_method_may_give_up_drafting_while_rounds_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by one whenever it is asked, a choice takes several rounds of the device."""
    lengths_chosen, ticks = list[int](), itertools.count()

    def clock() -> float:
        return float(next(ticks))

    def choose(model: Model, *given: object) -> Iterator[None]:
        for _ in range(6):
            clock()
            yield
        lengths_chosen.append(3 if not lengths_chosen or lengths_chosen[-1] == 0 else 0)
        plan = model.full.without(attention=(2,)) if lengths_chosen[-1] else model.full
        return knapspec.Choice(plan, lengths_chosen[-1], 1.2, 0.9, (1, 1))

    monkeypatch.setattr(knapspec, "choose_set", choose)
    monkeypatch.setattr(knapspec.KnapSpec.__init__, "__defaults__", (clock,))
    for module in (speculate, graphs):
        monkeypatch.setattr(module, "perf_counter", clock)
    name = "knapspec:interval=4,threshold=0.05,window_rounds=2,search_budget=1"
    params = SamplingParams(max_tokens=220, ignore_eos=True)
    with engine(graphs=False) as host:
        expected = host.generate(PROMPTS[0], params).token_ids
    with engine(graphs=True) as device:
        assert device.generate(PROMPTS[0], params, method=name).token_ids == expected
    assert lengths_chosen[:4] == [3, 0, 3, 0]


def engine(*, graphs: bool, backend: str = "torch", shape: str = "tiny") -> Engine:
    fields = {} if shape == "tiny" else {"num_hidden_layers": 2}
    config = ModelConfig.parse(synthetic_config(shape) | fields, shape)
    return Engine(config, synthetic_weights(config, 0, torch.float32, 0.1), graphs=graphs, backend=backend)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes of the rounds that are run, in order."""
    run: list[Recipe] = []

    def note(*given: object) -> None:
        assert isinstance(given[3], Recipe)
        run.append(given[3])
        device_round(*given)

    monkeypatch.setattr(round_graph, "device_round", note)
    return run


# No token of a random model is that likely: every draft ends with its first.
UNSURE = {
    "chains": "swift:skip_attention=2+3,num_draft_tokens=5,threshold=1",
    "trees": "swift:skip_attention=2+3,num_draft_tokens=5,threshold=1,tree=true",
    "streams used again": "layerskip:exit_layer=5,num_draft_tokens=5,threshold=1",
    "an adapter": "kangaroo:adapter=untrained,exit_layer=5,num_draft_tokens=5,threshold=1",
    "a search": "swift:window=20,search_budget=1,max_opt_iter=2,restart_drop=0,num_draft_tokens=5,threshold=1",
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", UNSURE)
def test_drafts_that_end_at_once_get_one_step_and_the_text_stays(
    rounds: list[Recipe], name: str, temperature: float
) -> None:
    params = SamplingParams(max_tokens=150, seed=3, temperature=temperature, ignore_eos=True)
    with engine(graphs=True) as device, engine(graphs=False) as host:
        expected = [output.token_ids for output in host.generate(PROMPTS, params)]
        outputs = device.generate(PROMPTS, params, method=UNSURE[name])
        assert [output.token_ids for output in outputs] == expected
        assert all(output.stats.graph_rounds == output.stats.rounds for output in outputs)
        assert sum(output.stats.accepted for output in outputs)
        steps = [recipe.num_draft_tokens for recipe in rounds]
        assert steps[:WINDOW] == [5] * WINDOW
        assert {1, 5} <= set(steps) <= {1, 2, 5}
        rounds.clear()
        device.generate(PROMPTS[0], params, method=UNSURE[name])
        assert {recipe.num_draft_tokens for recipe in rounds[-WINDOW:]} <= {1, 2}, "what was learnt is kept"


def test_a_change_drains_what_is_under_way(rounds: list[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up and down at every window."""
    monkeypatch.setattr(depths, "WINDOW", 4)
    monkeypatch.setattr(depths, "LONGEST_WAIT", 1)
    params = SamplingParams(max_tokens=120, seed=3, temperature=0.5, ignore_eos=True)
    with engine(graphs=True) as device:
        texts = [output.token_ids for output in device.generate(PROMPTS, params, method=UNSURE["chains"])]
        cache = device._loaded()[1]
        assert cache.free_pages == cache.total_pages
    steps = [recipe.num_draft_tokens for recipe in rounds]
    assert sum(a != b for a, b in pairwise(steps)) > 9
    with engine(graphs=False) as host:
        assert texts == [output.token_ids for output in host.generate(PROMPTS, params)]


def test_a_seed_gives_the_same_draws_of_rejection_sampling_whatever_was_decoded_before(rounds: list[Recipe]) -> None:
    params = SamplingParams(max_tokens=2 * WINDOW, seed=3, temperature=0.5, ignore_eos=True)
    with engine(graphs=True) as device:
        texts = [
            device.generate(PROMPTS[0], params, method=f"{UNSURE['chains']},acceptance=rejection").token_ids
            for _ in range(2)
        ]
    assert texts[0] == texts[1]
    assert {recipe.num_draft_tokens for recipe in rounds} == {5}


def test_rounds_go_on_while_a_graph_of_fewer_steps_is_built(
    rounds: list[Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all steps."""
    opened, builders = threading.Event(), list[str]()

    class Slow(RoundGraph):
        def __init__(self, *given: Any) -> None:
            if given[2].num_draft_tokens < 5:
                builders.append(threading.current_thread().name)
                assert opened.wait(60)
            super().__init__(*given)

    monkeypatch.setattr(graphs, "RoundGraph", Slow)
    params = SamplingParams(max_tokens=150, seed=3, temperature=0.8, ignore_eos=True)
    with engine(graphs=True) as device:
        device.generate(PROMPTS[0], params, method=UNSURE["chains"])
        assert len(rounds) > 2 * WINDOW
        assert builders == ["skipjack-graphs_0"]
        assert {recipe.num_draft_tokens for recipe in rounds} == {5}
        opened.set()
        assert device._open().graphs is not None
        (coming,) = device._open().graphs._coming.values()
        coming.result()
        rounds.clear()
        device.generate(PROMPTS[0], params, method=UNSURE["chains"])
        assert {recipe.num_draft_tokens for recipe in rounds[:10]} == {1}


def test_another_number_of_steps_is_no_change_of_subject() -> None:
    """Most of long drafts and few first tokens are accepted: of fewer steps a smaller share is, of the same text."""

    def resumed(steps: int) -> list[str]:
        own = Swift(Options(set="", restart_drop=0.3, max_opt_iter=0), 8)
        sequence = Sequence(0, 0, [0], SamplingParams(), 0, frozenset(), 99, None)
        for recipe, drafted, accepted in [(EARLY, 7, 7)] * 30 + [(replace(EARLY, num_draft_tokens=steps), 2, 1)] * 30:
            tally = Tally([sequence], [drafted], [drafted], [accepted], [1], 0.0, 1.0, recipe)
            own.count(cast(Model, None), cast(KVCache, None), tally)
        return [event["kind"] for event in own.events]

    assert resumed(7) == ["restart"], "which is what it otherwise would be taken for"
    assert resumed(2) == []


def test_a_warm_up_makes_graphs_of_every_number_of_steps_ready(rounds: list[Recipe]) -> None:
    with engine(graphs=True) as device:
        warm = device.warm_up([UNSURE["chains"]], sequences=1, context=200)
        pool = device._open().graphs
        assert pool is not None
        assert {recipe.num_draft_tokens for recipe, *_ in pool._prepared} == {0, 1, 2, 4, 5}
        rounds.clear()
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_tokens=99, temperature=temperature, seed=1, ignore_eos=True)
            device.generate(PROMPTS[0], params, method=UNSURE["chains"])
        assert {1, 5} <= {recipe.num_draft_tokens for recipe in rounds}
        assert pool.captured == warm.graphs


def test_kernels_serve_every_number_of_steps(monkeypatch: pytest.MonkeyPatch, rounds: list[Recipe]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(depths, "WINDOW", 2)
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    for tree in ("false", "true"):
        own = f"swift:skip_mlp=1,num_draft_tokens=3,threshold=1,tree={tree},max_nodes=6"
        with (
            engine(graphs=True, backend="triton", shape="tiny-llama") as device,
            engine(graphs=False, shape="tiny-llama") as host,
        ):
            rounds.clear()
            assert (
                device.generate([5, 6, 7], params, method=own).token_ids == host.generate([5, 6, 7], params).token_ids
            )
            assert {1, 3} <= {recipe.num_draft_tokens for recipe in rounds}
