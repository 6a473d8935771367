"""KnapSpec: the choice by brute force over every budget, its slices within their budget, and no token changed."""

from collections.abc import Callable, Generator
from itertools import product

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.kernels.ops import TORCH
from skipjack.runtime import speculate as rounds
from skipjack.runtime.cache import KVCache
from skipjack.runtime.decode import prefill
from skipjack.runtime.errors import RequestError
from skipjack.runtime.methods import registry
from skipjack.runtime.methods.knapspec import Choice, Costs, KnapSpec, Options, best_length, choose_set, sublayers
from skipjack.runtime.model import Model, Streams
from skipjack.runtime.programme import Programme, Token
from skipjack.runtime.rows import one_sequence
from skipjack.runtime.sequence import Sequence

PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50))]


class Ticks:
    """A clock that moves on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def window(model: Model, cache: KVCache) -> list[Token]:
    """The last eight tokens of a text whose pages the caller gives back."""
    pages, streams = cache.reserve(30), Streams()
    rows = one_sequence(list(range(40, 70)), 0, pages, TORCH.prefill_tile, model.device)
    model.forward(rows, cache, model.full, streams=streams)
    recorded = torch.stack(streams)
    return [Token(pages, position, recorded[:, position]) for position in range(22, 30)]


def result(work: Generator[None, None, Choice]) -> tuple[Choice, int]:
    """What the work comes to, and in how many pieces."""
    pieces = 0
    while True:
        try:
            next(work)
            pieces += 1
        except StopIteration as end:
            return end.value, pieces


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (5, 1)])
@torch.inference_mode()
def test_every_budget_has_a_set_of_just_that_weight(synthetic: Callable[..., Engine], weights: tuple[int, int]) -> None:
    model, cache = synthetic("tiny", torch.float32, 0.1)._loaded()
    tokens = window(model, cache)
    budget = 8 * sum(weights) // 2
    programme = Programme(sublayers(8, weights), budget, tokens, 0.5)
    while not programme.finished:
        programme.advance(model, cache)
        assert all(state.score >= 0.5 * len(tokens) - 1e-4 for state in programme.states)
    assert len(programme.states) > 4
    for state in programme.states:
        assert state.weight == sum(weights[i % 2] for i in state.skipped) <= budget
        assert not {0, 1, 14, 15} & set(state.skipped)
    cache.release(tokens[0].pages)


@torch.inference_mode()
def test_the_choice_is_the_best_of_all_budgets_and_lengths(synthetic: Callable[..., Engine]) -> None:
    model, cache = synthetic("tiny", torch.float32, 0.1)._loaded()
    tokens = window(model, cache)
    before = cache.keys[:, tokens[0].pages].clone()
    choice, pieces = result(choose_set(model, cache, tokens, 5, Ticks()))
    assert pieces >= 16, "a sub-layer at a time"
    assert choice.weights == (1, 1)
    programme = Programme(sublayers(8, (1, 1)), 8, tokens, 0.5)
    while not programme.finished:
        programme.advance(model, cache)
    # Ticks: half a second per sub-layer of the two layers timed, one for the head.
    best = (1.0, (), 0)
    target = model.logits(torch.stack([token.streams[-1] for token in tokens])).argmax(dim=1)
    for state, hidden in zip(programme.states, programme.hidden, strict=True):
        alpha = float((model.logits(hidden).argmax(dim=1) == target).double().mean())
        draft_s = (16 - len(state.skipped)) / 2 + 1
        for k in range(1, 6):
            expected = k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
            best = max(best, (expected / (k * draft_s + 9) * 9, state.skipped, k), key=lambda entry: round(entry[0], 9))
    assert choice.speedup == pytest.approx(best[0])
    assert choice.speedup > 1
    assert choice.num_draft_tokens == best[2]
    assert set(choice.plan.sublayers) == set(range(16)) - set(best[1])
    assert torch.equal(cache.keys[:, tokens[0].pages], before), "the sequence's own cache stays as it is"
    cache.release(tokens[0].pages)
    assert cache.free_pages == cache.total_pages


def test_weights_are_the_rounded_ratio_of_the_costs() -> None:
    assert Costs(1.0, 2.6, 0.0).weights == (1, 3)
    assert Costs(0.9, 0.3, 0.0).weights == (3, 1)
    assert Costs(1.0, 1.4, 0.0).weights == (1, 1)
    assert Costs(1.0, 40.0, 0.0).weights == (1, 5)
    assert Costs(0.0, 0.0, 0.0).weights == (1, 1)


def test_the_length_maximises_the_expected_speed() -> None:
    for alpha, ratio in product((0.0, 0.3, 0.7, 0.95, 1.0), (0.1, 0.5, 1.0)):
        speeds = [sum(alpha**i for i in range(k + 1)) / (k * ratio + 1) for k in range(8)]
        length, speedup = best_length(alpha, ratio, 1.0, 7)
        assert speedup == pytest.approx(max(speeds))
        assert speeds[length] == pytest.approx(max(speeds))
    assert best_length(0.0, 0.1, 1.0, 7) == (0, 1.0)


@pytest.mark.parametrize("seconds", [0.1 * i for i in range(1, 40)])
def test_drafting_with_the_whole_model_never_pays(seconds: float) -> None:
    """k + 1 tokens for the time of k + 1 passes: what sums round to must not decide."""
    assert best_length(1.0, seconds, seconds, 64) == (0, 1.0)


@pytest.mark.parametrize(
    ("num_draft_tokens", "temperature", "dtype"),
    [(1, 0.0, torch.float32), (3, 1.0, torch.bfloat16), (8, 0.0, torch.bfloat16), (8, 1.0, torch.float32)],
)
def test_tokens_are_those_of_plain_decoding(
    synthetic: Callable[..., Engine], num_draft_tokens: int, temperature: float, dtype: torch.dtype
) -> None:
    engine = synthetic("tiny", dtype, 0.1)
    cache = engine._loaded()[1]
    params = SamplingParams(max_tokens=30, temperature=temperature, seed=3, ignore_eos=True)
    method = f"knapspec:num_draft_tokens={num_draft_tokens},threshold=0.1,search_budget=1,window_rounds=2,interval=3"
    together = engine.generate(PROMPTS, params, method=method)
    for prompt, output in zip(PROMPTS, together, strict=True):
        assert output.token_ids == engine.generate(prompt, params).token_ids
        assert output.stats.lossless
    assert cache.free_pages == cache.total_pages


def test_rejection_sampling_accepts_by_its_own_rule(synthetic: Callable[..., Engine]) -> None:
    engine, method = synthetic("tiny", torch.float32, 0.1), "knapspec:acceptance=rejection,search_budget=1"
    greedy = SamplingParams(max_tokens=60, ignore_eos=True)
    assert engine.generate(PROMPTS[0], greedy, method=method).token_ids == engine.generate(PROMPTS[0], greedy).token_ids
    sampled = engine.generate(PROMPTS[0], SamplingParams(max_tokens=20, seed=1, ignore_eos=True), method=method)
    assert len(sampled.token_ids) == 20


def decode(engine: Engine, method: KnapSpec, max_tokens: int) -> Sequence:
    model, cache = engine._loaded()
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    sequence = Sequence(0, 0, [5, 6, 7], params, 0, frozenset(), model.config.max_context, None)
    with torch.inference_mode():
        sequence.pages = cache.reserve(sequence.max_length)
        prefill(model, cache, sequence, method)
        while sequence.finish_reason is None:
            before = sequence.counters.search_s
            rounds.speculate(model, cache, [sequence], method)
            assert sequence.counters.search_s - before <= 8, "no round waits long for the search"
        cache.release(sequence.pages)
    assert cache.free_pages == cache.total_pages
    return sequence


def test_the_search_keeps_its_share_of_the_time(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Ticks()
    monkeypatch.setattr(rounds, "perf_counter", clock)
    engine = synthetic("tiny", torch.float32, 0.1)
    method = KnapSpec(Options(search_budget=0.5, interval=5), 8, clock)
    counters = decode(engine, method, 120).counters
    assert method.events
    # A piece of work whose time is not known yet may overdraw: a timing takes seven ticks.
    assert 0 < counters.search_s <= 0.5 * (counters.draft_s + counters.verify_s) + 7
    assert counters.drafted > 0
    for event in method.events:
        assert event["kind"] == "programme"
        assert event["seconds"] > 16
        assert event["weights"] == [1, 1]
        assert 1 <= event["num_draft_tokens"] <= 7
        assert event["score"] > 1
        assert not {0, 7} & {*event["skip_attention"], *event["skip_mlp"]}
    quiet = KnapSpec(Options(search_budget=0.0), 8, clock)
    assert decode(engine, quiet, 30).counters.search_s == 0
    assert not quiet.events


def test_work_on_a_sequence_that_has_ended_is_abandoned(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Ticks()
    monkeypatch.setattr(rounds, "perf_counter", clock)
    engine = synthetic("tiny", torch.float32, 0.1)
    method = KnapSpec(Options(search_budget=0.5), 8, clock)
    expected = decode(engine, KnapSpec(Options(search_budget=0.0), 8, clock), 90).tokens
    decode(engine, method, 12)
    assert method.phase() == "accumulation"
    assert decode(engine, method, 90).tokens == expected
    assert method.phase() == "acceleration"


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RequestError, match="window_rounds"):
        registry.parse("knapspec:window_rounds=0")
    with pytest.raises(RequestError, match="acceptance"):
        registry.parse("knapspec:acceptance=maybe")
