"""What an engine keeps from request to request is bounded."""

import gc
from collections.abc import Callable

import pytest
import torch

from skipjack import Engine, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime.methods import registry
from skipjack.runtime.recent import Recent

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


class Value:
    pass


def test_what_was_not_used_for_longest_is_forgotten() -> None:
    kept = Recent[str, Value](3, "own")
    for name in ("own", "a", "b"):
        kept[name] = Value()
    assert "a" in kept
    kept["c"] = Value()
    assert ["own" in kept, "a" in kept, "b" in kept, "c" in kept] == [True, True, False, True]
    assert len(kept) == 3


def test_what_somebody_holds_is_found_again() -> None:
    kept = Recent[int, Value](2, -1)
    kept[0] = held = Value()
    for key in range(1, 9):
        kept[key] = Value()
    gc.collect()
    assert len(kept) == 2
    assert 0 in kept
    assert kept[0] is held
    assert 3 not in kept
    assert kept.pop(0) is held
    assert 0 not in kept
    kept.clear()
    assert 8 not in kept


def test_a_client_cannot_make_an_engine_keep_ever_more_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipjack.runtime.roster.MAX_METHODS", 4)
    config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
    with Engine(config, synthetic_weights(config, 0, torch.float32), method="swift:skip_mlp=3") as engine:
        own = engine._method(engine._default)
        running = registry.parse("swift:skip_mlp=4")
        stream = engine.stream([5, 6, 7], PARAMS, method="swift:skip_mlp=4")
        next(stream)
        used = engine._method(running)
        for i in range(9):
            engine.generate([5, 6], SamplingParams(max_tokens=1), method=f"lookup:num_draft_tokens={i + 1}")
        assert len(engine._methods().ready) == 4
        assert engine._method(running) is used
        assert engine._method(engine._default) is own
        assert len(list(stream)) > 0


@pytest.mark.parametrize(
    "method",
    [
        "auto",
        "swift:search_budget=0.9,window=8,max_score=1.0",
        "clasp:interval=1,search_budget=1.0",
        "conflayers:window=8,interval=1,search_budget=1.0",
        "del:search_budget=1.0",
    ],
)
def test_events_are_told_once_to_the_request_they_came_about_in(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Two requests take turns: every event is in one of their outputs, and the method keeps none."""
    engine = synthetic("tiny", torch.float32, 0.1)
    made = engine._method(registry.parse(method))
    seen: list[int] = []
    tell = type(made).tell

    def counted(self: object) -> list[object]:
        told = tell(made)
        seen.extend(map(id, told))
        kept.extend(told)
        return told

    kept: list[object] = []
    monkeypatch.setattr(type(made), "tell", counted)
    one, other = (
        engine.stream(prompt, SamplingParams(max_tokens=40, ignore_eos=True), method=method)
        for prompt in ([5, 6, 7], [9] * 8)
    )
    for _ in zip(one, other, strict=False):
        pass
    for stream in (one, other):
        for _ in stream:
            pass
    told = [event for stream in (one, other) for event in stream.outputs[0].stats.events]
    assert sorted(map(id, told)) == sorted(seen)
    assert told
    assert made.events == []


def test_the_newest_events_of_a_request_are_kept(
    synthetic: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipjack.runtime.run.MAX_EVENTS", 3)
    method = "swift:search_budget=0.9,window=8,max_score=1.0,seed=77"
    stats = synthetic("tiny").generate([5, 6, 7], SamplingParams(max_tokens=120, ignore_eos=True), method=method).stats
    iterations = [event["iteration"] for event in stats.events]
    assert len(iterations) == 3
    assert iterations[0] > 1
