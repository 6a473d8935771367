"""Requests at the same time: their rounds are one, their tokens those they have alone, and one's end is no other's."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from skipjack import AbortedError, Engine, RequestError, SamplingParams
from skipjack.runtime.company import MAX_LEAD, Company
from skipjack.runtime.graphs import Graphs, Rounds
from skipjack.runtime.methods.base import Method
from skipjack.runtime.round_graph import RoundGraph
from skipjack.runtime.run import Run

PROMPTS = [[5, 9, 11, 300], [7], list(range(20, 50)), [400, 3, 3, 17, 250, 8]]
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)
# The first token, those that one who is not read is taken along for, and one more round.
SHORT = SamplingParams(max_tokens=MAX_LEAD + 2, ignore_eos=True)
METHODS = [
    "autoregressive",
    "swift:skip_attention=2+3,num_draft_tokens=4,threshold=0.1",
    "swift:skip_attention=2+3,tree=true,num_draft_tokens=4",
    "lookup:choose=likeliest",
    "layerskip:exit_layer=5",
    "kangaroo:adapter=untrained,exit_layer=5,threshold=0.1",
    "auto:search_budget=0",
    "unified:speedup=2",
    "skipdecode:length=9",
    "calm:threshold=0.9,least=2",
    "adaskip:n=5,online=3",
]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of every round of a company."""
    seen, advance = list[int](), Company._advance

    def noted(company: Company, running: list[Any]) -> Any:
        seen.append(len(running))
        return advance(company, running)

    monkeypatch.setattr(Company, "_advance", noted)
    return seen


def in_turn(streams: list[Any]) -> list[list[int]]:
    """The tokens of streams that are read one after the other, a chunk each."""
    found: list[list[int]] = [[] for _ in streams]
    while any(chunks := [next(stream, None) for stream in streams]):
        for tokens, chunk in zip(found, chunks, strict=True):
            tokens.extend(chunk.token_ids if chunk else [])
    return found


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_each_request_alone(
    engine: Engine, rounds: list[int], method: str, fields: dict[str, Any]
) -> None:
    params = [SamplingParams(max_tokens=12 + 4 * i, ignore_eos=True, **fields) for i in range(len(PROMPTS))]
    alone = [engine.generate(*each, method=method).token_ids for each in zip(PROMPTS, params, strict=True)]
    rounds.clear()
    streams = [engine.stream(*each, method=method) for each in zip(PROMPTS, params, strict=True)]
    assert in_turn(streams) == alone
    assert max(rounds) == len(PROMPTS)
    assert [list(stream.outputs[0].token_ids) for stream in streams] == alone
    assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages


def test_threads_share_passes(engine: Engine, rounds: list[int]) -> None:
    alone = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
    passes = len(rounds)
    rounds.clear()
    found: dict[int, Any] = {}
    begun = threading.Barrier(len(PROMPTS))

    def serve(i: int) -> None:
        begun.wait()
        found[i] = engine.generate(PROMPTS[i], PARAMS).token_ids

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(len(PROMPTS))] == alone
    assert len(rounds) < passes / 2


def test_those_who_choose_in_other_ways_do_not_share(engine: Engine, rounds: list[int]) -> None:
    asked = [{}, {"temperature": 0.7, "seed": 2}, {"logprobs": 2}, {"presence_penalty": 0.5}]
    params = [SamplingParams(max_tokens=9, ignore_eos=True, **fields) for fields in asked]
    alone = [engine.generate(PROMPTS[0], each).token_ids for each in params]
    rounds.clear()
    assert in_turn([engine.stream(PROMPTS[0], each) for each in params]) == alone
    assert {*rounds} == {1}


def test_fast_numerics_share_nothing(engine_of: Callable[..., Engine], rounds: list[int]) -> None:
    """A token may depend there on who is in its round."""
    with engine_of(False, numerics="fast") as engine:
        alone = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
        assert in_turn([engine.stream(prompt, PARAMS) for prompt in PROMPTS]) == alone
    assert {*rounds} == {1}


def test_a_request_that_nobody_reads_is_taken_along_a_little(engine: Engine) -> None:
    expected = engine.generate(PROMPTS[1], PARAMS).token_ids
    unread = engine.stream(PROMPTS[1], PARAMS)
    next(unread)
    first = len(unread.outputs[0].token_ids)
    engine.generate(PROMPTS[0], PARAMS)
    ahead = len(unread.outputs[0].token_ids) - first
    # What the device has under way when it is left behind comes too.
    assert MAX_LEAD <= ahead < MAX_LEAD + 4
    assert unread.outputs[0].token_ids == expected[: first + ahead]
    assert [*expected[:1], *(token for chunk in unread for token in chunk.token_ids)] == expected


@pytest.mark.parametrize("graphs", [False, True], ids=["host", "device"])
def test_a_round_has_room_for_so_many(engine_of: Callable[..., Engine], graphs: bool, rounds: list[int]) -> None:
    engine = engine_of(graphs, max_sequences=3)
    several = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=4, n=2)
    alone = [[choice.token_ids for choice in engine.generate(prompt, several).choices] for prompt in PROMPTS]
    rounds.clear()
    streams = [engine.stream(prompt, several) for prompt in PROMPTS]
    while chunks := [chunk for stream in streams if (chunk := next(stream, None))]:
        assert all(chunk.choice < 2 for chunk in chunks)
    assert [[choice.token_ids for choice in stream.outputs[0].choices] for stream in streams] == alone
    assert max(rounds) == 2, "two choices, and no room for two more"


@pytest.mark.parametrize("leaves", [0, 1])
def test_one_that_leaves_takes_nothing_from_the_others(engine: Engine, leaves: int) -> None:
    expected = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS[:2]]
    streams = [engine.stream(prompt, PARAMS) for prompt in PROMPTS[:2]]
    got: list[list[int]] = [[], []]
    for _ in range(6):
        for tokens, stream in zip(got, streams, strict=True):
            tokens.extend(next(stream).token_ids)
    streams[leaves].close()
    left = list(streams[leaves].outputs[0].token_ids)
    stays = 1 - leaves
    got[stays] += [token for chunk in streams[stays] for token in chunk.token_ids]
    assert got[stays] == expected[stays]
    assert streams[leaves].outputs[0].token_ids == left == expected[leaves][: len(left)]
    assert streams[leaves].outputs[0].finish_reason == "abort"
    assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages


def test_a_round_that_fails_before_anything_has_come_is_one_requests_failure(
    engine_of: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with engine_of(False) as engine:
        method = "swift:skip_attention=2,threshold=0"
        expected = engine.generate(PROMPTS[1], PARAMS, method=method).token_ids
        streams = [engine.stream(prompt, PARAMS, method=method) for prompt in PROMPTS[:2]]
        first = [next(stream) for stream in streams]
        own = engine._method(engine_spec(method))
        with monkeypatch.context() as patch:
            patch.setattr(own, "propose", failing)
            with pytest.raises(ZeroDivisionError):
                next(streams[0])
        rest = [token for chunk in streams[1] for token in chunk.token_ids]
        assert [*first[1].token_ids, *rest] == expected
        assert next(streams[0], None) is None
        assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages


def test_who_has_got_half_of_a_round_that_failed_is_told(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(False) as engine:
        method = "swift:skip_attention=2,threshold=0"
        streams = [engine.stream(prompt, PARAMS, method=method) for prompt in PROMPTS[:2]]
        for stream in streams:
            next(stream)
        monkeypatch.setattr(engine._method(engine_spec(method)), "observe", failing)
        with pytest.raises(ZeroDivisionError):
            next(streams[0])
        with pytest.raises(RequestError, match="a round that it shared with another request has failed: of the round"):
            next(streams[1])
        assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages


def test_a_round_of_the_device_that_fails_ends_all_it_ran_for(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(True) as engine:
        streams = [engine.stream(prompt, PARAMS) for prompt in PROMPTS[:2]]
        for _ in range(2):
            for stream in streams:
                next(stream)
        other = engine.stream(PROMPTS[2], SamplingParams(max_tokens=9, temperature=1.0, seed=1))
        next(other)
        with monkeypatch.context() as patch:
            patch.setattr("skipjack.runtime.round_graph.RoundGraph.enqueue", failing)
            with pytest.raises((ZeroDivisionError, RequestError)):
                list(streams[0])
        with pytest.raises((ZeroDivisionError, RequestError)):
            list(streams[1])
        assert sum(len(chunk.token_ids) for chunk in other) == 8
        assert engine.generate(PROMPTS[0], PARAMS).token_ids
        assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages


def test_a_closed_engine_ends_all_of_them(engine_of: Callable[..., Engine], engine: Engine) -> None:
    with engine_of(engine._open().graphs is not None) as own:
        streams = [own.stream(prompt, PARAMS) for prompt in PROMPTS]
        for stream in streams:
            next(stream)
            next(stream)
    for stream in streams:
        with pytest.raises(RequestError, match="closed"):
            list(stream)


def failing(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("of the round")


def engine_spec(method: str) -> Any:
    from skipjack.runtime.methods import registry

    return registry.parse(method)


def test_a_method_may_refuse_company(engine: Engine, rounds: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Method, "unites", lambda self, sequences: False)
    alone = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
    rounds.clear()
    assert in_turn([engine.stream(prompt, PARAMS) for prompt in PROMPTS]) == alone
    assert {*rounds} == {1}


def test_nobody_is_passed_over_where_not_all_have_room(engine: Engine) -> None:
    """On the device a round for others than before reads first what is under way for those."""
    several = SamplingParams(max_tokens=60, ignore_eos=True, n=16)
    streams = [engine.stream(prompt, several) for prompt in PROMPTS[:3]]
    for _ in range(16 + 9):
        assert all(isinstance(stream.advance(), list) for stream in streams)
    least, *_, most = sorted(len(stream.outputs[0].choices[0].token_ids) for stream in streams)
    assert most <= least + MAX_LEAD + 3
    assert least > 5
    for stream in streams:
        stream.close()


def test_those_whom_a_round_has_no_room_for_get_as_much_as_the_others(engine: Engine) -> None:
    streams = [engine.stream([5 + i], SamplingParams(max_tokens=99, ignore_eos=True)) for i in range(20)]
    for _ in range(12):
        for stream in streams:
            stream.advance()
    came = [len(stream.outputs[0].token_ids) for stream in streams]
    assert min(came) > 0.5 * max(came)
    for stream in streams:
        stream.close()


def test_who_is_interrupted_anywhere_in_a_shared_round_costs_nobody_a_token_unseen(
    engine: Engine, interrupted: Callable[..., Iterator[None]]
) -> None:
    """The other request has all of its tokens, or is told."""
    expected = engine.generate(PROMPTS[1], SHORT).token_ids
    other, got = engine.stream(PROMPTS[1], SHORT), list[int]()
    got.extend(next(other).token_ids)

    def work() -> None:
        engine.generate(PROMPTS[0], SHORT)

    for _ in interrupted(
        work,
        *(Company.round, Company.leave, Company._party, Company._advance, Company._deliver),
        *(Run.receive, Run._release_finished, Rounds.advance, Rounds.drain, Rounds.close, Rounds._read),
        *(Rounds._speculated, Graphs.give, RoundGraph.unload),
    ):
        try:
            got += [token for chunk in other for token in chunk.token_ids]
            assert got == expected
        except AbortedError:
            assert got == expected[: len(got)]
        assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages
        assert not engine._open().runs
        other, got = engine.stream(PROMPTS[1], SHORT), []
        got.extend(next(other).token_ids)
    other.close()
    gc.collect()
    assert not engine._open().companies


def test_a_graph_that_cannot_be_made_is_one_requests_failure(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is under way on the device by then."""
    with engine_of(True) as engine:
        expected = engine.generate(PROMPTS[1], PARAMS).token_ids
        streams = [engine.stream(prompt, PARAMS) for prompt in PROMPTS[:2]]
        got = list(next(streams[1]).token_ids)
        next(streams[0])
        with monkeypatch.context() as patch:
            patch.setattr(Graphs, "take", failing)
            with pytest.raises(ZeroDivisionError):
                next(streams[0])
        assert [*got, *(token for chunk in streams[1] for token in chunk.token_ids)] == expected


def test_who_has_all_of_a_round_is_not_ended_by_the_next(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One who joins has the rounds under way read for the others, who have them, and then no graph can be made."""
    with engine_of(True) as engine:
        expected = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS[:2]]
        streams = [engine.stream(prompt, PARAMS) for prompt in PROMPTS[:3]]
        got = [[token for _ in range(2) for token in next(stream).token_ids] for stream in streams[:2]]
        next(streams[2])
        with monkeypatch.context() as patch:
            patch.setattr(Graphs, "take", failing)
            with pytest.raises(ZeroDivisionError):
                next(streams[2])
        for tokens, stream in zip(got, streams, strict=False):
            tokens.extend(token for chunk in stream for token in chunk.token_ids)
        assert got == expected


def test_one_that_leaves_in_the_turn_of_a_stranger_cannot_fail_there(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the device has for those who shared its rounds is read in a turn of theirs."""
    with engine_of(True) as engine:
        streams = [engine.stream(prompt, PARAMS) for prompt in PROMPTS[:2]]
        for stream in (*streams, *streams):
            next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(RoundGraph, "report", failing)
            with engine._turn:
                streams[0].abandon()
            assert streams[0]._run.over
            with pytest.raises(ZeroDivisionError):
                list(streams[1])
        assert engine._loaded()[1].free_pages == engine._loaded()[1].total_pages


@pytest.mark.parametrize("graphs", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("phase", ["prompt", "absolute"])
def test_cycles_that_are_as_far_share_every_round(
    engine_of: Callable[..., Engine], graphs: bool, phase: str, rounds: list[int]
) -> None:
    with engine_of(graphs, "tiny-dmtd", method=f"dmtd:phase={phase}") as engine:
        alone = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]
        rounds.clear()
        assert in_turn([engine.stream(prompt, PARAMS) for prompt in PROMPTS]) == alone
    assert {*rounds} == {len(PROMPTS)}


def test_a_cycle_that_is_not_as_far_has_rounds_of_its_own(engine_of: Callable[..., Engine], rounds: list[int]) -> None:
    with engine_of(False, "tiny-dmtd", method="dmtd") as engine:
        alone = [engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS[:2]]
        first = engine.stream(PROMPTS[0], PARAMS)
        begun = [*next(first).token_ids, *next(first).token_ids]
        rounds.clear()
        rest, second = in_turn([first, engine.stream(PROMPTS[1], PARAMS)])
    assert [begun + rest, second] == alone
    assert {*rounds} == {1}


def test_to_close_an_engine_reads_nothing_that_the_device_has(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be what has failed."""
    engine = engine_of(True)
    streams = [engine.stream(prompt, PARAMS) for prompt in PROMPTS[:2]]
    for stream in (*streams, *streams):
        next(stream)
    monkeypatch.setattr(RoundGraph, "report", failing)
    engine.close()
    for stream in streams:
        with pytest.raises(AbortedError, match="closed"):
            list(stream)


def test_each_chooses_by_its_own_parameters(engine: Engine, rounds: list[int]) -> None:
    asked: list[dict[str, Any]] = [
        {"temperature": 0.6, "top_p": 0.9, "seed": 1, "logit_bias": {7: 3.0}},
        {"temperature": 1.5, "top_k": 20, "seed": 2**64 - 1, "min_tokens": 6, "stop_token_ids": list(range(3, 200))},
        {"temperature": 1.0, "min_p": 0.05, "seed": 3, "presence_penalty": 1.0, "n": 2},
        {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "logit_bias": {2: 4.0}},
    ]
    params = [SamplingParams(max_tokens=14, logprobs=2, **fields) for fields in asked]
    alone = [engine.generate(*each).choices for each in zip(PROMPTS, params, strict=True)]
    rounds.clear()
    streams = [engine.stream(*each) for each in zip(PROMPTS, params, strict=True)]
    in_turn(streams)
    assert max(rounds) > len(PROMPTS) - 1
    for stream, expected in zip(streams, alone, strict=True):
        for choice, own in zip(stream.outputs[0].choices, expected, strict=True):
            assert (choice.token_ids, choice.finish_reason) == (own.token_ids, own.finish_reason)
            assert [told.logprob for told in choice.logprobs or ()] == pytest.approx(
                [told.logprob for told in own.logprobs or ()], abs=1e-5
            )
        stats = stream.outputs[0].stats
        assert len(expected) + stats.accepted + stats.bonus == stats.completion_tokens
        assert stats.decode_s > 0
