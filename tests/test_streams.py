"""Requests that run at the same time: they wait in order, end when they are told to, and give everything back."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skipjack import BusyError, Chunk, Engine, LayerPlan, RequestError, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import prefill as prefill_module
from skipjack.runtime.admission import Admission, Ticket
from skipjack.runtime.cache import KVCache
from skipjack.runtime.request import Output
from skipjack.runtime.run import Run
from skipjack.runtime.stream import AsyncStream, Stream
from skipjack.runtime.turns import Turns

LIMIT_S = 60
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def weights() -> Any:
    config = ModelConfig.parse(synthetic_config("tiny") | {"max_position_embeddings": 4096}, "test")
    return config, synthetic_weights(config, 0, torch.float32, 0.3)


@pytest.fixture
def engine(weights: Any) -> Engine:
    """An engine whose cache holds five pages."""
    return Engine(*weights, cache_tokens=256)


def free(engine: Engine) -> bool:
    cache = engine._loaded()[1]
    return cache.free_pages == cache.total_pages


def everything(engine: Engine) -> SamplingParams:
    """A request that needs the whole cache."""
    cache = engine._loaded()[1]
    return SamplingParams(max_tokens=cache.total_pages * cache.page_size - 10, ignore_eos=True)


@contextmanager
def held(engine: Engine) -> Iterator[threading.Event]:
    """Another thread has the turn until the event is set, or the block ends."""
    taken, release = threading.Event(), threading.Event()

    def hold() -> None:
        with engine._turn:
            taken.set()
            release.wait(LIMIT_S)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait(LIMIT_S)
    try:
        yield release
    finally:
        release.set()
        thread.join(LIMIT_S)


class Reader(threading.Thread):
    """Reads a stream to its end; what it raised is in `error`."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self.stream, self.begun, self.error = stream, threading.Event(), None
        self.tokens = 0
        self.start()

    def run(self) -> None:
        self.begun.set()
        try:
            for chunk in self.stream:
                self.tokens += len(chunk.token_ids)
        except BaseException as error:
            self.error: BaseException | None = error


def ended(reader: threading.Thread) -> bool:
    reader.join(LIMIT_S)
    return not reader.is_alive()


def test_requests_that_wait_for_pages_hold_no_thread_and_come_in_order(engine: Engine) -> None:
    """Five wait where the loop has two workers; the one that has the pages goes on, and so does other work."""
    large = everything(engine)

    async def serve() -> list[int]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        order = list[int]()

        async def client(number: int) -> None:
            stream = engine.astream([number + 1], large)
            await stream.__anext__()
            order.append(number)
            await stream.aclose()

        first = engine.astream([1], large)
        await first.__anext__()
        clients = list[asyncio.Task[None]]()
        for number in range(5):  # Those made at once are checked by two threads at once: either may be first in line.
            clients.append(asyncio.create_task(client(number)))
            while len(engine._open().admission._line) <= number:
                await asyncio.sleep(0.001)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: 7), 10) == 7
        for _ in range(3):
            await asyncio.wait_for(first.__anext__(), 10)
        assert not order
        await first.aclose()
        await asyncio.wait_for(asyncio.gather(*clients), LIMIT_S)
        return order

    assert asyncio.run(serve()) == [0, 1, 2, 3, 4]
    assert free(engine)


def test_threads_that_wait_for_pages_come_in_order(engine: Engine) -> None:
    large, order = everything(engine), list[int]()
    first = engine.stream([1], large)
    next(first)

    def client(number: int) -> None:
        stream = engine.stream([number + 1], large)
        next(stream)
        order.append(number)
        stream.close()

    threads = list[threading.Thread]()
    for number in range(4):
        threads.append(threading.Thread(target=client, args=(number,), daemon=True))
        threads[-1].start()
        while len(engine._open().admission._line) <= number:
            next(first)
    first.close()
    assert all(map(ended, threads))
    assert order == [0, 1, 2, 3]


def test_a_request_goes_on_waiting_when_another_got_on_at_the_last_moment(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its patience ended inside a turn of the other, which was longer."""
    first, second = engine.stream([1], everything(engine)), engine.stream([2], SHORT)
    next(first)
    ticket: Any = second.advance()
    with monkeypatch.context() as patch:
        patch.setattr("skipjack.runtime.admission.ADMISSION_WAIT_S", -1e9)
        ticket.wait()
    next(first)
    assert second.advance() is ticket
    first.close()
    assert len(list(second)) == 3


def test_a_loops_request_goes_on_waiting_where_a_threads_would(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first = engine.stream([1], everything(engine))
    next(first)

    async def serve() -> list[int]:
        waiting = asyncio.create_task(engine.astream([1], SHORT).__anext__())
        while not engine._open().admission._line:
            await asyncio.sleep(0.01)
        # Its patience ends inside a turn of another's, which is longer.
        with held(engine), monkeypatch.context() as patch:
            patch.setattr("skipjack.runtime.admission.ADMISSION_WAIT_S", -1e9)
            (ticket,) = engine._open().admission._line
            ticket._waiting[0]()
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)
        assert not waiting.done()
        first.close()
        return list((await asyncio.wait_for(waiting, LIMIT_S)).token_ids)

    assert asyncio.run(serve()) == engine.generate([1], SHORT).token_ids[:1]


def test_a_loop_that_is_closed_while_a_request_waits_costs_no_pages(engine: Engine) -> None:
    first, loop = engine.stream([1], everything(engine)), asyncio.new_event_loop()
    next(first)

    async def wait() -> None:
        async for _ in engine.astream([5], SHORT):
            pass

    task = loop.create_task(wait())
    while not engine._open().admission._line:
        loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    del task, loop
    gc.collect()
    first.close()
    gc.collect()
    assert free(engine)
    assert not engine._open().runs


def test_a_request_cancelled_while_it_waits_leaves_the_line(engine: Engine) -> None:
    large = everything(engine)
    first = engine.stream([1], large)
    next(first)

    async def serve() -> None:
        waiting = asyncio.create_task(engine.astream([1], large).__anext__())
        after = asyncio.create_task(engine.astream([1], SHORT).__anext__())
        await asyncio.sleep(0.1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        first.close()
        assert (await asyncio.wait_for(after, LIMIT_S)).token_ids

    asyncio.run(serve())


@pytest.mark.parametrize(
    ("shape", "method", "parts"),
    [
        ("tiny", "unified:speedup=2", 3),
        ("tiny", "static:skip=3,kv=fill", 3),
        ("tiny-dmtd", "dmtd", 3),
        ("tiny-mindskip", "mindskip", 8),
        ("routed-tiny", "flexidepth", 3),
        ("routed-tiny", "flexidepth:kv=none", 3),
    ],
)
def test_a_lossy_method_reads_a_prompt_in_parts_between_which_others_go_on(
    shape: str, method: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_module, "PREFILL_CHUNK", 64)
    config = ModelConfig.parse(synthetic_config(shape), shape)
    with Engine(config, synthetic_weights(config, 0, torch.float32, 0.3), method=method) as engine:
        params = SamplingParams(max_tokens=9, ignore_eos=True)
        prompts = [[(7 * i + j) % 500 + 3 for i in range(150)] for j in range(2)]
        alone = [engine.generate(prompt, params).token_ids for prompt in prompts]
        streams, turns = [engine.stream(prompt, params) for prompt in prompts], 0
        while not all(stream.outputs[0].finish_reason == "length" for stream in streams):
            turns += not streams[0].outputs[0].token_ids
            for stream in streams:
                stream.advance()
        assert turns == parts
        assert [stream.outputs[0].token_ids for stream in streams] == alone


@pytest.mark.parametrize(("others", "parts"), [(True, [128, 128, 44]), (False, [300])])
def test_a_prompt_is_read_in_short_parts_while_others_wait_for_tokens(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, others: bool, parts: list[int]
) -> None:
    prompt = [(7 * i) % 250 + 3 for i in range(300)]
    expected = engine.generate(prompt, SHORT).token_ids
    other = engine.stream([4], SamplingParams(max_tokens=40, ignore_eos=True))
    if others:
        next(other)
    model, read = engine._loaded()[0], list[int]()
    forward = model.forward

    def noted(rows: Any, *args: Any, **options: Any) -> Any:
        read.append(len(rows))
        return forward(rows, *args, **options)

    monkeypatch.setattr(model, "forward", noted)
    stream, got = engine.stream(prompt, SHORT), list[Chunk]()
    while not got:
        got += stream.advance() or []
        if others:
            assert len(next(other).token_ids) == 1
    assert [rows for rows in read if rows > 2] == parts
    assert [token for chunk in [*got, *stream] for token in chunk.token_ids] == expected


def test_a_request_cancelled_twice_gives_its_pages_back(engine: Engine) -> None:
    """The second cancellation comes while the first is being dealt with, another thread having the turn."""

    async def consume(begun: asyncio.Event) -> None:
        async for _ in engine.astream([5, 6], SamplingParams(max_tokens=500, ignore_eos=True)):
            begun.set()

    async def serve() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(consume(begun))
        await begun.wait()
        with held(engine):
            await asyncio.sleep(0.05)
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0.02)
            await asyncio.wait([task], timeout=LIMIT_S)
        for _ in range(100):
            if free(engine):
                break
            await asyncio.sleep(0.1)
        assert free(engine), "the task is still there, and with it whatever it refers to"

    gc.disable()
    try:
        asyncio.run(serve())
    finally:
        gc.enable()


def test_the_first_token_of_a_prompt_does_not_wait_for_the_other_prompts(engine: Engine) -> None:
    """Beyond those that are read in the same pass."""
    prompts = [[5, 6], [7], [3] * 513, [8, 9]]
    stream = engine.stream(prompts, SHORT)
    next(stream)
    assert [len(output.token_ids) for output in stream.outputs] == [1, 1, 0, 0]
    list(stream)
    assert [o.token_ids for o in stream.outputs] == [engine.generate(prompt, SHORT).token_ids for prompt in prompts]


@pytest.mark.parametrize("prompts", [[[5] * 40, [7] * 40, [8, 9]], [list(range(3, 203))]], ids=["many", "long"])
def test_prompts_take_turns_with_other_requests(
    engine: Engine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests wait for the turn, the prompts first: after one pass of theirs it is the other's turn."""
    expected = [output.token_ids for output in engine.generate(prompts, SHORT)]
    monkeypatch.setattr(prefill_module, "PREFILL_CHUNK", 64)
    model, passes = engine._loaded()[0], list[str]()
    forward = model.forward

    def noted(*args: Any, **options: Any) -> Any:
        passes.append(threading.current_thread().name)
        return forward(*args, **options)

    monkeypatch.setattr(model, "forward", noted)
    got: dict[str, list[Output]] = {}
    streams = {"first": engine.stream(prompts, SHORT), "second": engine.stream([[4] * 30], SHORT)}

    def work(name: str) -> None:
        list(streams[name])
        got[name] = streams[name].outputs

    threads = [threading.Thread(target=work, args=(name,), name=name, daemon=True) for name in streams]
    with held(engine):
        for number, thread in enumerate(threads, 2):
            thread.start()
            while len(engine._turn._line) < number:
                pass
    assert all(map(ended, threads))
    assert passes[:2] == ["first", "second"]
    assert [output.token_ids for output in got["first"]] == expected


def test_a_stream_may_be_closed_while_another_thread_reads_it(engine: Engine) -> None:
    reader = Reader(engine.stream([5, 6], SamplingParams(max_tokens=1000, ignore_eos=True)))
    while not reader.tokens:
        pass
    with held(engine):
        closer = ThreadPoolExecutor(1).submit(reader.stream.close)
    closer.result(LIMIT_S)
    assert free(engine)
    assert ended(reader)
    assert reader.error is None
    output = reader.stream.outputs[0]
    assert output.finish_reason == "abort"
    assert 0 <= len(output.token_ids) - reader.tokens <= 1


def test_a_stream_that_waits_for_pages_may_be_closed_by_another_thread(engine: Engine) -> None:
    first = engine.stream([1], everything(engine))
    next(first)
    reader = Reader(engine.stream([5, 6], SHORT))
    while not engine._open().admission._line:
        pass
    reader.stream.close()
    assert ended(reader)
    assert reader.error is None
    assert next(first).token_ids
    first.close()
    assert free(engine)


def test_a_stream_that_is_closed_ends_with_the_turn_under_way(engine: Engine) -> None:
    """Not behind all who wait for theirs."""
    stream, seen = engine.stream([1], SHORT), list[bool]()
    next(stream)
    with held(engine):
        waits = threading.Thread(target=lambda: engine._turn.take(lambda: seen.append(free(engine))))
        waits.start()
        while len(engine._turn._line) < 2:
            pass
        closes = threading.Thread(target=stream.close)
        closes.start()
        while not (engine._turn._late or len(engine._turn._line) > 2):
            pass
        assert not free(engine)
    assert ended(waits)
    assert ended(closes)
    assert seen == [True]


def test_a_stream_dropped_inside_a_turn_is_ended_after_it(engine: Engine) -> None:
    stream = engine.stream([5, 6], everything(engine))
    next(stream)
    with engine._turn:
        del stream
        assert not free(engine)
    assert free(engine)


def test_a_stream_of_a_with_block_ends_with_it(engine: Engine) -> None:
    with engine.stream([1], everything(engine)) as stream:
        next(stream)
        assert not free(engine)
    assert free(engine)
    assert stream.outputs[0].finish_reason == "abort"
    with suppress(ConnectionResetError), engine.stream([1], everything(engine)) as stream:
        next(stream)
        raise ConnectionResetError
    assert free(engine)


def test_closing_the_engine_ends_its_streams(engine: Engine) -> None:
    cache = engine._loaded()[1]
    stream, other = (engine.stream([5, 6], SamplingParams(max_tokens=600, ignore_eos=True)) for _ in range(2))
    next(stream)
    waiting = Reader(engine.stream([5, 6], everything(engine)))
    while not engine._open().admission._line:
        pass
    gone = weakref.ref(engine._loaded()[0])
    engine.close()
    for one in (stream, other):
        with pytest.raises(RequestError, match="engine: it is closed"):
            next(one)
    assert stream.outputs[0].finish_reason == "abort"
    assert len(stream.outputs[0].token_ids) >= 1
    assert ended(waiting)
    assert isinstance(waiting.error, RequestError)
    assert cache.free_pages == cache.total_pages
    waiting.error = None
    gc.collect()
    assert gone() is None
    with pytest.raises(RequestError, match="engine: it is closed"), engine:
        pass
    engine.close()


@pytest.mark.parametrize("in_a_turn", [True, False])
def test_memory_is_given_back_when_nothing_works_with_it(
    weights: Any, in_a_turn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, kept = Engine(*weights, cache_tokens=256), list[bool]()
    cache = weakref.ref(engine._open().admission.cache)
    monkeypatch.setattr(Turns, "settle", lambda _: kept.append(cache() is not None))
    with engine._turn if in_a_turn else nullcontext():
        engine.close()
    gc.collect()
    assert kept == [True]
    assert cache() is None


def test_closing_the_engine_ends_the_requests_of_an_event_loop(engine: Engine) -> None:
    async def serve() -> None:
        stream = engine.astream([5, 6], SamplingParams(max_tokens=600, ignore_eos=True))
        await stream.__anext__()
        assert engine._pool is not None
        workers.extend(engine._pool._threads)
        assert workers
        engine.close()
        with pytest.raises(RequestError, match="engine: it is closed"):
            await stream.__anext__()
        with pytest.raises(RequestError, match="engine: it is closed"):
            await engine.astream([5, 6]).__anext__()

    workers = list[threading.Thread]()
    asyncio.run(serve())
    assert all(map(ended, workers))


def test_a_stream_that_has_ended_is_not_changed_by_closing_the_engine(engine: Engine) -> None:
    stream = engine.stream([5, 6], SHORT)
    list(stream)
    engine.close()
    assert list(stream) == []
    assert stream.outputs[0].finish_reason == "length"


def steps_of(stream: Stream) -> int:
    """Turns that making its method ready takes from here."""
    turns = 1
    while not stream.prepare():
        turns += 1
    return turns


def test_a_method_is_measured_a_pass_a_turn_and_others_take_theirs(engine: Engine) -> None:
    """The first request by `auto` times passes of the model; nobody waits for more than one of them."""
    model, _ = engine._loaded()
    passes, forward = list[int](), model.forward

    def counted(rows: Any, cache: Any, plan: LayerPlan, *rest: Any, **more: Any) -> Any:
        passes.append(plan.layers_kept)
        return forward(rows, cache, plan, *rest, **more)

    first, other = engine._asked([1], SHORT, "auto"), engine.stream([5, 6], SHORT)
    turns = 0
    while True:
        passes.clear()
        model.forward = counted
        try:
            ready = first.prepare()
        finally:
            del model.forward
        turns += 1
        assert sorted(passes)[:-1] == [1] * (len(passes) - 1), "one pass beside that of a single layer"
        if ready:
            break
        next(other, None)
    assert other.outputs[0].finish_reason == "length"
    assert turns > 20
    assert [token for chunk in first for token in chunk.token_ids] == engine.generate([1], SHORT).token_ids


def test_what_was_measured_for_a_request_that_gave_up_is_not_measured_again(engine: Engine) -> None:
    whole = steps_of(engine._asked([1], SHORT, "auto"))
    first, other = (engine._asked([1], SHORT, "auto:num_draft_tokens=3") for _ in range(2))
    for stream in (first, other, first):
        assert not stream.prepare()
    first.close()
    assert steps_of(other) == whole - 3
    assert steps_of(engine._asked([1], SHORT, "auto:num_draft_tokens=3")) == 1


def test_a_measurement_that_failed_is_begun_anew(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = steps_of(engine._asked([1], SHORT, "auto"))
    first, other = (engine._asked([1], SHORT, "auto:num_draft_tokens=3") for _ in range(2))
    assert not first.prepare()
    with monkeypatch.context() as patched:
        patched.setattr(engine._loaded()[0], "predict", raising(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            first.prepare()
    assert first.prepare(), "it has ended"
    assert list(first) == []
    assert steps_of(other) == whole
    assert [token for chunk in other for token in chunk.token_ids] == engine.generate([1], SHORT).token_ids


def raising(error: Exception) -> Callable[..., None]:
    def work(*_: object) -> None:
        raise error

    return work


def test_what_was_finished_is_kept_when_the_rest_never_gets_its_pages(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipjack.runtime.admission.ADMISSION_WAIT_S", 0.0)
    expected = engine.generate([7, 8], SHORT).token_ids
    cache = engine._loaded()[1]
    first = engine.stream([1], SamplingParams(max_tokens=4 * cache.page_size - 10, ignore_eos=True))
    next(first)
    stream = engine.stream([[7, 8], list(range(3, 303))], SHORT)
    with pytest.raises(BusyError, match=r"1 of 5 pages free.*nobody reads their streams"):
        list(stream)
    assert [output.finish_reason for output in stream.outputs] == ["length", "abort"]
    assert stream.outputs[0].token_ids == expected
    assert list(stream) == []
    first.close()
    assert free(engine)


def test_a_request_that_is_interrupted_anywhere_gives_everything_back(
    engine: Engine, interrupted: Callable[..., Iterator[None]]
) -> None:
    def work() -> None:
        engine.generate([[5, 6], [7]], SHORT)

    cache = engine._loaded()[1]
    for _ in interrupted(
        work, Run._step, Run._admits, Run._release_finished, Run._end, KVCache.reserve, KVCache.release
    ):
        assert free(engine)
        assert sorted(cache._free) == list(range(1, cache.total_pages + 1))
        assert not engine._open().runs
        assert not engine._turn._line


def test_a_request_that_is_interrupted_where_it_queues_leaves_the_line(
    engine: Engine, interrupted: Callable[..., Iterator[None]]
) -> None:
    with closing(engine.stream([1], everything(engine))) as holder:
        next(holder)

        def work() -> None:
            with closing(engine.stream([1], SHORT)) as stream:
                assert isinstance(stream.advance(), Ticket)

        for _ in interrupted(work, Run._queue, Run._end, Admission.ask, Admission.serve, Admission.withdraw):
            assert not engine._open().runs - {holder._run}
            assert not [ticket for ticket in engine._open().admission._line if not ticket.cancelled()]
    assert free(engine)


FORKED = """
import asyncio
import os
import signal
import sys
import threading

import torch

from skipjack import Engine, RequestError, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights

config = ModelConfig.parse(synthetic_config("tiny"), "tiny")
engine = Engine(config, synthetic_weights(config, 0, torch.float32, 0.3))
params = SamplingParams(max_tokens=4, ignore_eos=True)

async def read():
    return [token async for chunk in engine.astream([5, 6], params) for token in chunk.token_ids]

def report(end):
    try:
        print(asyncio.run(read()) == engine.generate([5, 6], params).token_ids, flush=True)
    except RequestError as error:
        print(str(error).replace(str(os.getppid()), "PARENT"), flush=True)
    end(0)

report(lambda _: None)  # The pool has its thread.
if not os.fork():
    report(os._exit)
os.wait()
stream = engine.stream([5, 6], params)
if not os.fork():
    report(os._exit)
os.wait()
stream.close()
begun, over = threading.Event(), threading.Event()
turn = threading.Thread(target=lambda: engine._turn.take(lambda: (begun.set(), over.wait())))
turn.start()
begun.wait()
if not os.fork():
    signal.alarm(20)
    report(lambda _: engine.close())
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]))
over.set()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_uses_a_copy_or_says_why_not(tmp_path: Path) -> None:
    """As servers do that load a model once and fork their workers."""
    command = [sys.executable, "-c", FORKED]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path)
    ours, theirs, *refused, closed = done.stdout.splitlines()
    assert (ours, theirs) == ("True", "True")
    assert len(refused) == 2
    assert all(told.startswith("engine: it was loaded in process PARENT and this is ") for told in refused)
    assert closed == "0", "it does not wait for a thread of its parent's"


def test_an_event_loop_gets_the_results_that_a_thread_gets(engine: Engine) -> None:
    params = SamplingParams(max_tokens=6, n=2, seed=7, temperature=0.9, logprobs=2, ignore_eos=True)

    async def serve() -> list[list[Any]]:
        stream, seen = engine.astream([[5, 6], [7]], params), list[list[Any]]()
        seen.append(list(stream.outputs))
        async for _ in stream:
            seen.append([len(output.token_ids) for output in stream.outputs])
        return [*seen, list(stream.outputs)]

    before, *growing, results = asyncio.run(serve())
    assert before == []
    assert growing == sorted(growing)
    assert growing[-1] == [6, 6]
    for mine, expected in zip(results, engine.generate([[5, 6], [7]], params), strict=True):
        assert replace(mine, stats=expected.stats) == expected
        assert (mine.stats.lossless, mine.choices[1].logprobs) == (True, expected.choices[1].logprobs)


@pytest.mark.parametrize(
    ("prompt", "method"), [([], None), ([9999], None), ("a text", None), ([5], "swift:set=nowhere.json"), ([5], "")]
)
def test_a_request_of_an_event_loop_is_refused_where_it_is_entered(
    engine: Engine, prompt: Any, method: str | None
) -> None:
    async def serve() -> None:
        async with engine.astream(prompt, SHORT, method=method):
            raise AssertionError("it has begun")

    with pytest.raises(RequestError):
        asyncio.run(serve())
    assert free(engine)
    assert not engine._open().runs


@pytest.mark.parametrize("chunks", [0, 2])
def test_a_request_of_an_event_loop_ends_where_it_is_left(engine: Engine, chunks: int) -> None:
    async def leave(stream: AsyncStream) -> None:
        async with stream:
            for _ in range(chunks):
                await anext(stream)
            raise LookupError

    async def serve() -> tuple[list[int], list[Any]]:
        stream = engine.astream([5, 6], everything(engine))
        with pytest.raises(LookupError):
            await leave(stream)
        rest = [chunk async for chunk in stream]
        # It ends with the turn it is in, after which another has the whole cache.
        async with engine.astream([5], everything(engine)) as other:
            await anext(other)
        return [len(output.token_ids) for output in stream.outputs], rest

    (tokens,), rest = asyncio.run(serve())
    assert (tokens >= chunks, rest) == (True, [])
    assert free(engine)


def test_a_request_of_an_event_loop_that_was_entered_and_dropped_holds_nothing(engine: Engine) -> None:
    async def serve() -> None:
        stream = await engine.astream([5, 6], SHORT).__aenter__()
        del stream

    asyncio.run(serve())
    assert free(engine)
    assert not engine._open().runs


def test_a_closed_engine_refuses_an_event_loop_at_once(weights: Any) -> None:
    engine = Engine(*weights, cache_tokens=256)
    engine.close()
    with pytest.raises(RequestError, match="closed"):
        engine.astream([5, 6])


def test_the_handler_of_the_documentation(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    sent = list[str]()

    async def send(text: str) -> None:
        sent.append(text)

    async def leave(text: str) -> None:
        raise ConnectionResetError

    def handle(ids: list[int], params: SamplingParams = SHORT, send: Any = send) -> tuple[int, Any]:
        return asyncio.run(names["handle"](engine, ids, params, send))

    status, output = handle([5, 6])
    assert (status, output) == (200, replace(engine.generate([5, 6], SHORT), stats=output.stats))
    assert len(sent) == 3
    assert handle([9999])[0] == 400
    with pytest.raises(ConnectionResetError):
        handle([5, 6], everything(engine), leave)
    with closing(engine.stream([1], everything(engine))) as first:
        next(first)
        monkeypatch.setattr("skipjack.runtime.admission.ADMISSION_WAIT_S", 0.0)
        assert handle([5, 6])[0] == 503
    assert handle([5, 6])[0] == 200
    assert free(engine)
    status, told = names["health"](engine)
    assert (status, told["requests_finished"], told["pages_leaked"]) == (200, 3, 0)
