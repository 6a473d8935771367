"""Graphs of settled sets are built beside the rounds: no waiting, the same tokens, errors told, nothing left over."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.runtime import graphs, round_graph
from skipjack.runtime.recipe import Recipe
from skipjack.runtime.round import device_round
from skipjack.runtime.round_graph import RoundGraph

PROMPT = [5, 9, 11, 300]
# The search settles within the first 40 tokens.
METHOD = "swift:window=8,search_budget=1,max_opt_iter=2,restart_drop=0,num_draft_tokens=3,threshold=0"
PARAMS = SamplingParams(max_tokens=90, ignore_eos=True)
THREADS = "skipjack-graphs"


class Gate:
    """Holds back graphs of settled sets until it is opened; `error` is what building one then raises."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.error: Exception | None = None
        self.building: list[str] = []


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()

    class Slow(RoundGraph):
        def __init__(self, *given: Any) -> None:
            recipe: Recipe = given[2]
            if not recipe.masked:
                gate.building.append(threading.current_thread().name)
                assert gate.opened.wait(60)
                if gate.error:
                    raise gate.error
            super().__init__(*given)

    monkeypatch.setattr(graphs, "RoundGraph", Slow)
    yield gate
    gate.opened.set()


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes of the rounds that are run, in order."""
    run: list[Recipe] = []

    def note(*given: Any) -> None:
        run.append(given[3])
        device_round(*given)

    monkeypatch.setattr(round_graph, "device_round", note)
    return run


@pytest.fixture
def device(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(True)


def pool(engine: Engine) -> graphs.Graphs:
    assert engine._open().graphs is not None
    return engine._open().graphs


@pytest.fixture
def threads() -> Callable[[], list[str]]:
    """The building threads that were not there before the test."""
    before = set(threading.enumerate())
    return lambda: [t.name for t in threading.enumerate() if t not in before and t.name.startswith(THREADS)]


def test_rounds_go_on_while_a_graph_is_built(
    synthetic: Callable[..., Engine], device: Engine, gate: Gate, rounds: list[Recipe]
) -> None:
    expected = synthetic("tiny", torch.float32, 0.1).generate(PROMPT, PARAMS).token_ids
    with device:
        output = device.generate(PROMPT, PARAMS, method=METHOD)
        assert output.token_ids == expected
        assert [name for name, _ in output.stats.phases] == ["accumulation", "acceleration"]
        assert gate.building == [f"{THREADS}_0"], "it has been asked for once, and is not there at the end"
        assert all(recipe.masked for recipe in rounds)
        assert pool(device).captured == 1

        again = device.generate(PROMPT, PARAMS, method=METHOD)
        assert again.token_ids == expected
        assert all(recipe.masked for recipe in rounds), "the next request goes by the mask as well"

        gate.opened.set()
        (coming,) = pool(device)._coming.values()
        coming.result()
        rounds.clear()
        settled = device.generate(PROMPT, PARAMS, method=METHOD)
        assert settled.token_ids == expected
        assert not any(recipe.masked for recipe in rounds)
        assert settled.stats.drafted_per_position == again.stats.drafted_per_position
        assert settled.stats.accepted_per_position == again.stats.accepted_per_position
        assert settled.stats.executed_skips == again.stats.executed_skips
        assert pool(device).captured == 2
        assert len(gate.building) == 1


def test_a_graph_that_is_ready_takes_over_within_a_request(
    synthetic: Callable[..., Engine], device: Engine, gate: Gate, rounds: list[Recipe]
) -> None:
    expected = synthetic("tiny", torch.float32, 0.1).generate(PROMPT, PARAMS).token_ids
    with device:
        stream, tokens = device.stream(PROMPT, PARAMS, method=METHOD), list[int]()
        for chunk in stream:
            tokens += chunk.token_ids
            if gate.building and not gate.opened.is_set():
                gate.opened.set()
                (coming,) = pool(device)._coming.values()
                coming.result()
        assert tokens == expected
        masked = [recipe.masked for recipe in rounds]
        assert masked == sorted(masked, reverse=True)
        assert {True, False} == set(masked)
        assert stream.outputs[0].stats.graph_rounds == stream.outputs[0].stats.rounds


def test_what_goes_wrong_while_building_is_raised(device: Engine, gate: Gate) -> None:
    device.generate(PROMPT, PARAMS, method=METHOD)
    gate.error = ValueError("no room for a graph")
    gate.opened.set()
    (coming,) = pool(device)._coming.values()
    assert coming.exception() is gate.error
    with pytest.raises(ValueError, match="no room for a graph"):
        device.generate(PROMPT, PARAMS, method=METHOD)
    assert device._loaded()[1].free_pages == device._loaded()[1].total_pages
    gate.error = None
    assert len(device.generate(PROMPT, PARAMS, method=METHOD).token_ids) == 90
    device.close()


def test_closing_waits_for_what_is_being_built(device: Engine, gate: Gate, threads: Callable[[], list[str]]) -> None:
    device.generate(PROMPT, PARAMS, method=METHOD)
    assert threads() == [f"{THREADS}_0"]
    closing = threading.Thread(target=device.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    gate.opened.set()
    closing.join(60)
    assert not closing.is_alive()
    assert threads() == []


def test_closing_tells_what_nobody_asked_for(device: Engine, gate: Gate, threads: Callable[[], list[str]]) -> None:
    gate.error = ValueError("no room for a graph")
    device.generate(PROMPT, PARAMS, method=METHOD)
    gate.opened.set()
    with pytest.raises(ValueError, match="no room for a graph"):
        device.close()
    assert threads() == []
    device.close()


def test_an_engine_starts_no_thread_before_there_is_something_to_build(
    device: Engine, threads: Callable[[], list[str]]
) -> None:
    device.generate(PROMPT, SamplingParams(max_tokens=8, ignore_eos=True), method="swift:skip_attention=2")
    assert threads() == []
    device.close()
