"""SWIFT's search: matchness by the golden cases, and the rules of swapping and stopping."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.loaders.synthetic import synthetic_weights
from skipjack.runtime.batch import Tally
from skipjack.runtime.cache import KVCache
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.swift import NOTHING_TO_SKIP, Options, Swift
from skipjack.runtime.model import Model
from skipjack.runtime.plan import LayerPlan
from skipjack.runtime.rows import one_sequence
from skipjack.runtime.search import TRIAL, Drift, Incumbent, Search, initial_plan, matchness, plan_of
from skipjack.runtime.sequence import Sequence
from skipjack.runtime.skip_sets import SkipSet, config_hash


@pytest.mark.parametrize("case", ["swift-1", "swift-2"])
def test_matchness_of_the_golden_skip_sets(golden: Path, case: str) -> None:
    expected = json.loads((golden / case / "expected.json").read_text())["matchness"]
    engine = Engine.load(golden / case, dtype="float32")
    model, cache = engine._loaded()
    tokens = expected["prompt_ids"] + expected["continuation"]
    with torch.inference_mode():
        pages = cache.reserve(len(tokens))
        model.forward(
            one_sequence(expected["prompt_ids"], 0, pages, TORCH.prefill_tile, model.device), cache, model.full
        )
        before = cache.keys.clone()
        for entry in expected["sets"]:
            plan = model.full.without(entry["skip_attn"], entry["skip_mlp"])
            score = matchness(model, cache, pages, tokens, expected["gamma"], plan)
            assert score == entry["matchness"]
        assert torch.equal(cache.keys[:, pages], before[:, pages]), "scoring must not touch the sequence's own cache"
    assert cache.free_pages == cache.total_pages - len(pages)


def search(**fields: object) -> Search:
    defaults = {"ratio": 0.45, "max_score": 0.95, "patience": 300, "max_candidates": 1000, "seed": 0}
    return Search(num_layers=10, **(defaults | fields))


def test_candidates_are_uniform_sets_of_inner_sublayers() -> None:
    suggestions = [search(seed=seed).suggest().plan for seed in range(400)]
    counts = np.zeros(20)
    for plan in suggestions:
        assert len(plan.sublayers) == 20 - int(16 * 0.45)
        counts[[i for i in range(20) if i not in plan.sublayers]] += 1
    assert (counts[[0, 1, 18, 19]] == 0).all(), "the first and the last layer are never skipped"
    assert (abs(counts[2:18] / 400 - 7 / 16) < 0.12).all()


def test_first_set_skips_every_other_layer() -> None:
    assert initial_plan(8).skipped_attention == initial_plan(8).skipped_mlp == (1, 3, 5)
    assert initial_plan(9).skipped_mlp == (1, 3, 5, 7)


def test_skip_vector_order() -> None:
    plan = plan_of(6, [0, 3, 4, 7])
    assert plan.skipped_attention == (1, 4)
    assert plan.skipped_mlp == (1, 4)


def test_a_better_candidate_is_swapped_in_at_once() -> None:
    state = search()
    state.remeasure(0.5)
    worse, better = state.suggest(), state.suggest()
    state.record(worse, 0.5, tokens=32)
    assert state.incumbent.plan == initial_plan(10)
    state.record(better, 0.6, tokens=32)
    assert state.incumbent.plan == better.plan
    assert [event["swapped"] for event in state.events] == [False, True]


def test_a_lucky_candidate_gives_way_to_the_set_it_replaced() -> None:
    """The score it won by does not count, and patience goes on as if it had not won."""
    state = search()
    for _ in range(3):
        state.remeasure(0.5)
    state.record(state.suggest(), 0.4, tokens=32)
    state.record(state.suggest(), 0.8, tokens=32)
    assert state.trial is not None
    assert state.incumbent.plan != initial_plan(10)
    assert state.since_improvement == 0
    state.remeasure(0.6, 0.5, tokens=64)
    state.remeasure(0.4, 0.7, tokens=96)
    assert state.trial is None
    assert state.incumbent.plan == initial_plan(10)
    assert state.incumbent.score == pytest.approx((4 * 0.5 + 0.7) / 5)
    assert state.since_improvement == 2
    assert state.events[-1] == {"kind": "return", "iteration": 2, "tokens": 96}


@pytest.mark.parametrize(("stood", "trial"), [(1, 1), (3, 3), (50, TRIAL)])
def test_a_candidate_that_holds_its_own_stays(stood: int, trial: int) -> None:
    """On as many windows as the set before it stood for: little is known of a new one, and a first one may be bad."""
    state, candidate = search(), search().suggest()
    for _ in range(stood):
        state.remeasure(0.5)
    state.record(candidate, 0.8, tokens=32)
    for _ in range(trial):
        assert state.trial is not None
        state.remeasure(0.6, 0.5)
    assert state.trial is None
    assert (state.incumbent.plan, state.incumbent.score) == (candidate.plan, pytest.approx(0.6))
    state.remeasure(0.9)
    state.record(state.suggest(), 0.85, tokens=32)
    assert state.incumbent.plan == candidate.plan, "who wins has to be better on the same window too"


def test_an_interrupt_at_any_line_leaves_a_search_that_goes_on_and_ends(
    interrupted: Callable[..., Iterator[None]],
) -> None:
    search = Search(8, 0.45, 0.95, 300, 12, seed=0)

    def work() -> None:
        nonlocal search
        search = Search(8, 0.45, 0.95, 300, 12, seed=0, bayes_interval=2)
        search.remeasure(0.1)
        search.record(search.suggest(), 0.2, 10)
        search.remeasure(0.2, 0.1)
        search.resume(20)
        search.record(search.suggest(), 0.3, 30)

    for _ in interrupted(work, Search.remeasure, Search.record, Search.resume):
        for _ in range(200):
            if search.finished:
                break
            search.remeasure(0.5, 0.1)
            if search.trial is None:
                search.record(search.suggest(), 0.3, 40)
        assert search.finished


def test_old_windows_are_forgotten() -> None:
    state = search()
    for score in [0.9] * 20 + [0.2] * 20:
        state.remeasure(score)
    assert state.incumbent.score < 0.3


def test_a_search_among_noisy_scores_ends_by_patience_with_a_good_set() -> None:
    """Scores are shares of 32 tokens: 0.3 to 0.9 by the overlap with a hidden set, for most sets 0.5 to 0.65."""
    random, patient, quality = np.random.default_rng(0), 0, list[float]()

    def true(plan: LayerPlan) -> float:
        return 0.3 + 0.6 * len({*plan.skipped_attention} & {1, 2, 3, 4, 5, 6, 7}) / 7

    def score(plan: LayerPlan) -> float:
        return float(random.binomial(32, true(plan))) / 32

    for seed in range(8):
        state = search(bayes_interval=0, seed=seed, patience=150)
        while not state.finished:
            state.remeasure(score(state.incumbent.plan), score(state.trial.replaced.plan) if state.trial else -1.0)
            if state.trial is None and not state.finished:
                candidate = state.suggest()
                state.record(candidate, score(candidate.plan), tokens=32)
        patient += state.since_improvement >= 150
        quality.append(true(state.incumbent.plan))
    assert patient >= 6
    assert np.mean(quality) > 0.77


def test_the_search_ends_by_each_of_its_rules() -> None:
    state = search(patience=3)
    state.remeasure(0.5)
    for _ in range(3):
        assert not state.finished
        state.record(state.suggest(), 0.1, tokens=32)
    assert state.finished
    state = search(max_candidates=1)
    state.record(state.suggest(), 0.1, tokens=32)
    assert state.finished
    state = search()
    state.remeasure(0.5)
    state.record(state.suggest(), 0.96, tokens=32)
    assert not state.finished, "not by the score it won by"
    state.remeasure(0.96, 0.5)
    assert state.finished
    assert search(ratio=0.0).finished


def test_the_last_candidate_has_its_trial_too() -> None:
    state = search(max_candidates=1)
    state.remeasure(0.5)
    state.record(state.suggest(), 0.8, tokens=32)
    assert not state.finished
    state.remeasure(0.3, 0.6, tokens=64)
    assert state.incumbent.plan == initial_plan(10)
    assert state.finished


def test_no_budget_means_no_search(synthetic: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    stats = synthetic("tiny").generate([5, 6, 7], params, method="swift:search_budget=0").stats
    assert not stats.events
    assert stats.search_s == 0
    assert stats.phases == (("acceleration", 1),)


@pytest.mark.parametrize("graphs", [False, True])
def test_with_nothing_to_skip_nothing_is_drafted(
    synthetic: Callable[..., Engine], tmp_path: Path, graphs: bool
) -> None:
    """A share that rounds to no sub-layer, and a saved set that is empty, as KnapSpec's is where no draft pays."""
    plain, file = synthetic("tiny"), tmp_path / "set.json"
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with Engine(plain.config, synthetic_weights(plain.config, 0, torch.float32, 0.3), graphs=graphs) as engine:
        model = engine._loaded()[0]
        SkipSet(config_hash(model.config), model.fingerprint, "knapspec", 8, (), (), 1.0, None, 1).save(file)
        for option in ("skip_ratio=0.05", f"set={file}"):
            for tree in ("false", "true"):
                output = engine.generate([5, 6, 7], params, method=f"swift:{option},tree={tree},search_budget=0.5")
                assert output.token_ids == plain.generate([5, 6, 7], params).token_ids
                assert output.stats.drafted == 0
                assert output.stats.notes == (NOTHING_TO_SKIP,)
        assert not engine.generate([5, 6, 7], params, method="swift").stats.notes
        decisions = f"auto:set={file},max_loss=1,search_budget=0.5"
        output = engine.generate([5, 6, 7], SamplingParams(max_tokens=250, ignore_eos=True), method=decisions)
        rounds = [event["rounds"] for event in output.stats.events if event["kind"] == "decision"]
        assert {name for counts in rounds for name in counts} <= {"plain", "lookup"}


def test_skips_are_counted_with_the_set_that_drafted(synthetic: Callable[..., Engine]) -> None:
    """The first set skips 6 sub-layers of `tiny`, those of the search 4; a swap comes after its round's draft."""
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    method = "swift:search_budget=0.5,skip_ratio=0.34,window=16,max_opt_iter=1,max_score=1.0,first=random,seed={}"
    for seed in range(20):
        stream = synthetic("tiny").stream([5, 6, 7], params, method=method.format(seed))
        before = drafted = 0
        for _ in stream:
            stats = stream.outputs[0].stats
            if not stats.events:
                before = stats.drafted
            elif not drafted:
                drafted = stats.drafted
        stats = stream.outputs[0].stats
        if stats.events[0]["swapped"]:
            assert drafted > before
            assert stats.executed_skips == 6 * drafted + 4 * (stats.drafted - drafted)
            return
    pytest.fail("no seed swapped the first set")


def test_phases_and_events_of_a_run(synthetic: Callable[..., Engine]) -> None:
    engine = synthetic("tiny", torch.float32, 0.0)
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    method = "swift:search_budget=0.5,skip_ratio=0.3,window=16,max_score=0.9,seed=2,first=random"
    output = engine.generate([5, 6, 7], params, method=method)
    assert output.token_ids == engine.generate([5, 6, 7], params).token_ids
    stats = output.stats
    assert [name for name, _ in stats.phases] == ["accumulation", "acceleration"]
    start = stats.phases[1][1]
    assert 16 < start < 400
    assert max(event["tokens"] for event in stats.events) <= start
    scored = [event for event in stats.events if event["kind"] == "random"]
    assert scored[-1]["best"] > 0.9
    assert [event["iteration"] for event in scored] == list(range(1, len(scored) + 1))
    assert 0 < stats.search_s < stats.decode_s
    assert stats.layers_kept == 8 - int(12 * 0.3) / 2


def test_a_candidate_of_confidence_skips_what_says_least() -> None:
    """Layer i's attention is told i/100, its MLP i/100 + 0.005: of the inner ones, layers 1, 2, … are left out."""
    state = search(ratio=0.4)
    said = [layer / 100 + part for layer in range(10) for part in (0, 0.005)]
    said[0] = said[-1] = 0.0
    candidate = state.suggest(said)
    assert candidate.kind == "confidence"
    assert candidate.plan.skipped == state.size
    order = sorted(range(2, 18), key=lambda sublayer: said[sublayer])
    assert candidate.plan == LayerPlan.full(10).skipping(order[: state.size])
    assert state.begins
    state.record(candidate, 0.5, 8)
    assert not state.begins
    state.resume(9)
    assert state.begins, "another text, of which they may say something else"


@pytest.mark.parametrize("first", ["confidence", "random"])
def test_what_comes_first_may_be_chosen(synthetic: Callable[..., Engine], first: str) -> None:
    engine, params = synthetic("tiny", torch.float32, 0.1), SamplingParams(max_tokens=60, ignore_eos=True)
    method = f"swift:search_budget=0.9,window=8,first={first},bayes_interval=0"
    output = engine.generate([5, 6, 7], params, method=method)
    assert output.token_ids == engine.generate([5, 6, 7], params).token_ids
    kinds = [event["kind"] for event in output.stats.events]
    assert kinds[:2] == (["start", "confidence"] if first == "confidence" else ["random"] * 2)
    assert set(kinds[2:]) <= {"random", "return"}
    if first == "confidence":
        assert output.stats.events[0]["tokens"] < 8, "in the first round, before there is a window to score sets on"


@pytest.mark.parametrize("score_on", ["last", "first"])
def test_candidates_are_scored_on_the_window_asked_for(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, score_on: str
) -> None:
    seen: list[list[int]] = []

    def spy(model: object, cache: object, pages: object, tokens: list[int], window: int, plan: object) -> float:
        seen.append(tokens[-window - 1 :])
        return 0.5

    monkeypatch.setattr("skipjack.runtime.methods.swift.matchness", spy)
    method = f"swift:search_budget=0.9,window=8,score_on={score_on},max_opt_iter=30,seed=4"
    output = synthetic("tiny").generate([5, 6, 7], SamplingParams(max_tokens=200, ignore_eos=True), method=method)
    answer = output.token_ids
    windows = {tuple(answer[i : i + 9]) for i in range(len(answer) - 8)} if score_on == "last" else {tuple(answer[:9])}
    assert {tuple(window) for window in seen} <= windows
    assert len({tuple(window) for window in seen}) > 1 or score_on == "first"
    assert seen


class Clock:
    """A virtual clock that each look advances by `step` seconds."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_search_stays_within_its_share_of_time(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round takes 2 s and a candidate 1 s: 400 tokens leave a budget of 5 % for about 40 candidates."""
    monkeypatch.setattr("skipjack.runtime.speculate.perf_counter", Clock(1.0))
    monkeypatch.setattr("skipjack.runtime.methods.swift.perf_counter", Clock(1.0))
    engine = synthetic("tiny")
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    method = "swift:search_budget=0.05,window=8,max_score=1.0,seed=77,threshold=0.0"
    stats = engine.generate([5, 6, 7], params, method=method).stats
    budget = 0.05 * 2 * stats.rounds
    assert 0.5 * budget < stats.search_s <= budget + 4
    assert stats.events


def test_short_requests_save_up_no_long_step(synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests too short to be searched on leave the next long one a step of the usual length.

    A round takes 2 s and a candidate 1 s: the first step is earned with the time of two rounds, worth four candidates.
    """
    monkeypatch.setattr("skipjack.runtime.speculate.perf_counter", Clock(1.0))
    monkeypatch.setattr("skipjack.runtime.methods.swift.perf_counter", Clock(1.0))
    engine = synthetic("tiny")
    method = "swift:search_budget=0.05,window=8,max_score=1.0,seed=78,threshold=0.0"
    for _ in range(60):
        engine.generate([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True), method=method)
    stream = engine.stream([5, 6, 7], SamplingParams(max_tokens=40, ignore_eos=True), method=method)
    known = [len(stream.outputs[0].stats.events) for _ in stream]
    assert known[-1] > 0
    assert max(after - before for before, after in pairwise(known)) <= 4


def test_every_nth_candidate_is_bayesian_and_of_the_same_size() -> None:
    state = search(bayes_interval=5)
    for i in range(20):
        candidate = state.suggest()
        assert candidate.kind == ("bayesian" if i % 5 == 4 else "random")
        assert len(candidate.skipped) == 7
        state.record(candidate, len(set(candidate.skipped) & set(range(7))) / 10, tokens=32)
    assert [event["kind"] for event in state.events].count("bayesian") == 4
    assert all(search(bayes_interval=0).suggest().kind == "random" for _ in range(3))


def test_bayesian_candidates_beat_random_ones() -> None:
    """A score that counts the overlap with a hidden set: what was learnt is used, over five seeds."""
    means: dict[str, list[float]] = {"random": [], "bayesian": []}
    for seed in range(5):
        state, hidden = search(bayes_interval=4, seed=seed, max_score=1.0), set(range(0, 14, 2))
        for i in range(60):
            candidate = state.suggest()
            score = len(set(candidate.skipped) & hidden) / 7
            state.record(candidate, score, tokens=32)
            if i >= 20:
                means[candidate.kind].append(score)
    assert np.mean(means["bayesian"]) > np.mean(means["random"]) + 0.1


def test_a_found_set_rests_until_the_text_changes() -> None:
    plan = plan_of(10, [0, 1, 2])
    state = search(found=Incumbent(plan, 0.9))
    assert state.finished
    assert state.incumbent.plan == plan
    state.resume(tokens=200)
    assert not state.finished
    assert state.events[-1] == {"kind": "restart", "iteration": 0, "tokens": 200}
    state.record(state.suggest(), 0.1, tokens=232)
    assert state.incumbent.plan != plan, "the old score is not held against the new text"


def test_drift_is_a_fall_from_the_best() -> None:
    drift = Drift(0.3)
    assert not any(drift.observe(7, 6) for _ in range(30))
    assert not drift.observe(0, 0)
    falls = [drift.observe(7, 1) for _ in range(10)]
    assert not falls[0]
    assert falls[-1]
    assert not any(Drift(0.0).observe(7, taken) for taken in (7, 0, 0, 0))


@pytest.mark.parametrize("tree", ["false", "true"])
@pytest.mark.parametrize("graphs", [False, True])
def test_the_adaptive_threshold_follows_the_acceptance(
    synthetic: Callable[..., Engine], tree: str, graphs: bool
) -> None:
    """Siblings beside an accepted token are no misses: where a draft is right at every depth, the threshold falls."""
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    for late_scale, rises in ((1.0, True), (0.0, False)):
        plain = synthetic("tiny", torch.float32, late_scale)
        weights = synthetic_weights(plain.config, 0, torch.float32, late_scale)
        spec = f"swift:skip_attention=4+5+6,skip_mlp=4+5+6,adaptive=true,threshold=0.2,tree={tree}"
        with Engine(plain.config, weights, graphs=graphs) as engine:
            output = engine.generate([5, 6, 7], params, method=spec)
            assert output.token_ids == plain.generate([5, 6, 7], params).token_ids
            assert (output.stats.graph_rounds > 0) == graphs
            method = engine._method(registry.parse(spec))
        assert isinstance(method, Swift)
        assert (method._how.threshold > 0.2) == rises


def test_more_siblings_are_no_change_of_subject() -> None:
    swift = Swift(Options(tree=True, max_opt_iter=0), 8)
    sequence = Sequence(0, 0, [0], SamplingParams(), 0, frozenset(), 99, None)
    for nodes in [3] * 30 + [30] * 30:
        tally = Tally([sequence], [nodes], [3], [3], [4], 0.0, 1.0)
        swift.count(cast(Model, None), cast(KVCache, None), tally)
    assert not swift.events
