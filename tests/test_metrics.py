"""What an engine tells of itself: exactly what its outputs add up to, at any time, whoever has the turn."""

import dataclasses
import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from time import monotonic, perf_counter
from typing import Any

import pytest
import torch

from skipjack import AbortedError, BusyError, Engine, Metrics, Output, RequestError, SamplingParams, Stream
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.run import Run

SHORT = SamplingParams(max_tokens=3, ignore_eos=True)
LONG = SamplingParams(max_tokens=100, ignore_eos=True)
REPEATING = [5, 6, 7, 5, 6, 7, 5, 6]
LIMIT_S = 60
SAME = {
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "rounds": "rounds",
    "graph_rounds": "graph_rounds",
    "drafted": "drafted",
    "accepted": "accepted",
    "bonus": "bonus",
    "prefill_seconds": "prefill_s",
    "decode_seconds": "decode_s",
    "search_seconds": "search_s",
}


@pytest.fixture(scope="module")
def weights() -> Any:
    config = ModelConfig.parse(synthetic_config("tiny") | {"max_position_embeddings": 4096}, "test")
    return config, synthetic_weights(config, 0, torch.float32, 0.3)


@pytest.fixture
def engine(weights: Any) -> Iterator[Engine]:
    """An engine whose cache holds five pages."""
    with Engine(*weights, cache_tokens=256) as made:
        yield made


def everything(engine: Engine) -> SamplingParams:
    """A request that needs the whole cache."""
    cache = engine._loaded()[1]
    return SamplingParams(max_tokens=cache.total_pages * cache.page_size - 10, ignore_eos=True)


def ends(metrics: Metrics) -> tuple[int, int, int]:
    return metrics.requests_finished, metrics.requests_aborted, metrics.requests_failed


def idle(metrics: Metrics) -> bool:
    """Whether nothing is under way and every page is free."""
    under_way = metrics.requests_running, metrics.requests_waiting, metrics.sequences_running, metrics.sequences_waiting
    return under_way == (0, 0, 0, 0) and metrics.pages_free == metrics.pages and not metrics.pages_leaked


def expect_sums(metrics: Metrics, outputs: list[Output]) -> None:
    """The counters are those of outputs, all of which have a token."""
    for name, field in SAME.items():
        found = sum(getattr(output.stats, field) for output in outputs)
        assert getattr(metrics, name) == pytest.approx(found, rel=1e-9), name
    choices = [choice for output in outputs for choice in output.choices]
    assert metrics.completion_tokens == sum(len(choice.token_ids) for choice in choices)
    assert metrics.first_tokens == sum(bool(choice.token_ids) for choice in choices)
    assert metrics.first_tokens + metrics.accepted + metrics.bonus == metrics.completion_tokens


@pytest.mark.parametrize("graphs", [False, True], ids=["host", "device"])
def test_counters_are_the_sums_of_outputs(weights: Any, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(*weights, cache_tokens=2048, graphs=graphs) as engine:
        outputs = list[Output]()
        for method in ("autoregressive", "lookup", "static:skip=3"):
            outputs += engine.generate([REPEATING, [1, 2]], LONG, method=method)
            several = SamplingParams(max_tokens=9, ignore_eos=True, n=3, temperature=1.0, seed=1)
            outputs.append(engine.generate([3, 4], several, method=method))
        outputs.append(engine.generate([7], SamplingParams(max_tokens=1)))
        assert ends(engine.metrics()) == (7, 0, 0)
        expect_sums(engine.metrics(), outputs)

        for chunks in (1, 2, 5):
            with engine.stream([REPEATING, [9]], LONG, method="lookup") as stream:
                for _ in range(1 + chunks):  # Both prompts are read.
                    next(stream)
            outputs += stream.outputs
        expect_sums(engine.metrics(), outputs)

        read, step = len(outputs), Run._step

        def failing(run: Run, shared: Any) -> Any:
            if run.sequences[0].generated >= 4:
                raise torch.OutOfMemoryError
            return step(run, shared)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "_step", failing)
            stream = engine.stream([8], LONG)
            with pytest.raises(torch.OutOfMemoryError):
                list(stream)
        outputs += stream.outputs
        assert len(outputs) == read + 1
        metrics = engine.metrics()
        expect_sums(metrics, outputs)
        assert ends(metrics) == (7, 3, 1)
        assert idle(metrics)
        assert (metrics.graph_rounds > 0) == graphs
        assert (metrics.graphs_captured > 0) == (metrics.graphs_held > 0) == graphs
        assert metrics.accepted > 0
        assert metrics.compilations == 0


def test_requests_that_wait_for_pages_are_told_apart(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = list[Output]()
    with engine.stream([[1], [2], [3]], everything(engine)) as first:
        next(first)
        metrics = engine.metrics()
        assert (metrics.requests_running, metrics.requests_waiting) == (1, 0)
        assert (metrics.sequences_running, metrics.sequences_waiting) == (1, 2)
        assert metrics.pages_held == metrics.pages == 5
        assert metrics.pages_free == metrics.pages_leaked == 0
        waiting = threading.Thread(target=lambda: outputs.append(engine.generate([4, 5], SHORT)))
        waiting.start()
        until = monotonic() + LIMIT_S
        while not engine.metrics().requests_waiting and monotonic() < until:
            pass
        metrics = engine.metrics()
        assert (metrics.requests_running, metrics.requests_waiting) == (2, 1)
        assert (metrics.sequences_running, metrics.sequences_waiting) == (1, 3)
        first.close()
        waiting.join(LIMIT_S)
    with closing(engine.stream([1], everything(engine))) as holder:
        next(holder)
        monkeypatch.setattr("skipjack.runtime.admission.ADMISSION_WAIT_S", 0.0)
        with pytest.raises(BusyError):
            engine.generate([5, 6], SHORT)
    metrics = engine.metrics()
    assert ends(metrics) == (1, 2, 1)
    assert idle(metrics)
    # Of the first request two prompts were never read, nor was that of the last.
    expect_sums(metrics, [first.outputs[0], *outputs, *holder.outputs])


def test_no_page_is_leaked_by_requests_that_end_anywhere(engine: Engine) -> None:
    """200 requests by several threads, ended after as many steps as chance will have it, and one page leaked after."""
    draw, failed = random.Random(0), list[BaseException]()
    plans = [[(draw.randrange(40), draw.randrange(4), draw.random() < 0.3) for _ in range(50)] for _ in range(4)]

    def work(plan: list[tuple[int, int, bool]]) -> None:
        try:
            for size, chunks, dropped in plan:
                params = SamplingParams(max_tokens=1 + 16 * size, ignore_eos=True)
                stream: Stream | None = engine.stream([[1 + size], REPEATING], params, method="lookup")
                assert stream is not None
                for _, _chunk in zip(range(chunks), stream, strict=False):
                    pass
                if not dropped:
                    stream.close()
                stream = None
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    last, seen_running = engine.metrics(), False
    while any(thread.is_alive() for thread in threads):
        now = engine.metrics()
        assert all(now.counters[name] >= value for name, value in last.counters.items())
        assert now.first_tokens + now.accepted + now.bonus == now.completion_tokens
        assert now.pages_leaked == 0
        last, seen_running = now, seen_running or now.sequences_running > 0
    gc.collect()
    assert not failed
    metrics = engine.metrics()
    assert idle(metrics)
    assert sum(ends(metrics)) == 200
    assert metrics.requests_failed == 0
    assert seen_running

    page = engine._loaded()[1].reserve(1)
    engine.generate([1], SHORT)
    metrics = engine.metrics()
    assert (metrics.pages_leaked, metrics.pages_held, metrics.pages_free) == (1, 0, metrics.pages - 1)
    engine._loaded()[1].release(page)
    engine.generate([1], SHORT)
    assert idle(engine.metrics())


def test_reading_waits_for_no_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step is held up for as long as one likes, another thread reads what stands before it."""
    inside, go, step = threading.Event(), threading.Event(), Run._step

    def held(run: Run, shared: Any) -> Any:
        if run.sequences[0].generated == 5:
            inside.set()
            go.wait(LIMIT_S)
        return step(run, shared)

    monkeypatch.setattr(Run, "_step", held)
    outputs = list[Output]()
    thread = threading.Thread(target=lambda: outputs.append(engine.generate([1, 2], LONG)))
    thread.start()
    assert inside.wait(LIMIT_S)
    start = perf_counter()
    metrics = [engine.metrics() for _ in range(1000)][-1]
    assert engine._turn.taken
    assert perf_counter() - start < LIMIT_S / 2
    assert (metrics.completion_tokens, metrics.bonus, metrics.prompt_tokens) == (5, 4, 2)
    assert (metrics.requests_running, metrics.requests_finished) == (1, 0)
    go.set()
    thread.join(LIMIT_S)
    expect_sums(engine.metrics(), outputs)


def test_a_round_writes_nothing_that_it_did_not_write_before(engine: Engine) -> None:
    ledger = engine._open().ledger
    with engine.stream([REPEATING, [1]], LONG, method="lookup") as stream:
        next(stream), next(stream)
        before = ledger._now
        for _ in range(20):
            next(stream)
        assert ledger._now is before


def test_a_request_whose_shared_round_failed_has_failed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (engine.stream([number], LONG) for number in (1, 2))
    next(first), next(second)

    def broken(*_: Any, **__: Any) -> Any:
        first._run.sequences[0].tokens.append(0)
        second._run.sequences[0].tokens.append(0)
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr("skipjack.runtime.company.speculate", broken)
        with pytest.raises(torch.OutOfMemoryError):
            next(first)
    with pytest.raises(AbortedError):
        next(second)
    assert ends(engine.metrics()) == (0, 0, 2)
    assert idle(engine.metrics())


def test_a_request_that_is_interrupted_anywhere_is_counted_once(
    engine: Engine, interrupted: Callable[..., Iterator[None]]
) -> None:
    outputs = list[Output]()

    def work() -> None:
        with closing(engine.stream([1, 2, 3], SHORT)) as stream:
            try:
                for _ in stream:
                    pass
            finally:
                outputs.extend(stream.outputs)

    work()
    for _ in interrupted(work, Run._end, Run._release_finished, type(engine._open().ledger).leave):
        gc.collect()
        metrics, whole = engine.metrics(), sum(output.finish_reason == "length" for output in outputs)
        assert idle(metrics)
        assert ends(metrics) == (whole, len(outputs) - whole, 0)
        expect_sums(metrics, outputs)


def test_refused_requests_are_not_counted_and_scored_ones_are(engine: Engine) -> None:
    with pytest.raises(RequestError):
        engine.generate([10**6], SHORT)
    assert ends(engine.metrics()) == (0, 0, 0)
    engine.score([[1, 2], [3]], [[4, 5, 6], [7]])
    metrics = engine.metrics()
    assert ends(metrics) == (1, 0, 0)
    assert (metrics.completion_tokens, metrics.prompt_tokens) == (4, 3)


def test_counters_and_gauges_are_all_there_is(engine: Engine) -> None:
    metrics = engine.metrics()
    names = {field.name for field in dataclasses.fields(Metrics)} | {"pages_held"}
    assert names == set(metrics.counters) | set(metrics.gauges)
    assert not set(metrics.counters) & set(metrics.gauges)
    with pytest.raises(dataclasses.FrozenInstanceError):
        metrics.pages = 0  # type: ignore[misc]


def test_a_closed_engine_tells_nothing(weights: Any) -> None:
    engine = Engine(*weights, cache_tokens=256)
    engine.close()
    with pytest.raises(AbortedError, match="closed"):
        engine.metrics()
