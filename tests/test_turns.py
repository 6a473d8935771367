"""Turns go to whoever came first; a thread that is interrupted or dropped leaves no trace in the line."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from skipjack.kernels.cpu import openmp
from skipjack.runtime import admission as admission_module
from skipjack.runtime import turns as turns_module
from skipjack.runtime.admission import ADMISSION_WAIT_S, Admission, Ticket
from skipjack.runtime.cache import KVCache
from skipjack.runtime.turns import Turns

CPU = torch.device("cpu")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_turns_are_had_in_the_order_they_were_asked_for() -> None:
    turns, order = Turns(CPU), list[int]()

    def work(number: int) -> None:
        with turns:
            order.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    with turns:
        for waiting, thread in enumerate(threads, 2):
            thread.start()
            until(lambda waiting=waiting: len(turns._line) == waiting)
        with turns:
            order.append(-1)
    with turns:
        order.append(5)
    for thread in threads:
        thread.join(30)
    assert order == [-1, 0, 1, 2, 3, 4, 5]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT is a KeyboardInterrupt, whatever other tests or the runner have made of it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def test_a_thread_that_is_interrupted_while_it_waits_leaves_the_line(interruptible: None) -> None:
    turns, held, release = Turns(CPU), threading.Event(), threading.Event()

    def hold() -> None:
        with turns:
            held.set()
            until(lambda: len(turns._line) == 2)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            release.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    with pytest.raises(KeyboardInterrupt), turns:
        pass
    assert len(turns._line) == 1
    release.set()
    thread.join(30)
    with turns:
        assert turns.held
    assert not turns._line


def test_a_turn_that_is_interrupted_anywhere_is_the_next_ones(interrupted: Callable[..., Iterator[None]]) -> None:
    turns = Turns(CPU)

    def work() -> None:
        turns.take(lambda: turns.take(turns.rest))

    for _ in interrupted(work, Turns.__enter__, Turns.__exit__, Turns._begin, Turns._finish, turns_module._ordered):
        assert not turns._line
        assert not turns.held
        with turns:
            assert turns._depth == 1


@pytest.mark.parametrize("where", ["idle", "in a turn", "beside another's"])
def test_an_interrupt_while_work_is_left_locks_nobody_out(
    interrupted: Callable[..., Iterator[None]], where: str
) -> None:
    turns, done, go = Turns(CPU), list[int](), threading.Event()

    def leave() -> None:
        turns.after(lambda: done.append(1))

    def hold() -> None:
        with turns:
            go.wait(30)

    holder = threading.Thread(target=hold)
    if where == "beside another's":
        holder.start()
        until(lambda: turns.taken)
    work = partial(turns.take, leave) if where == "in a turn" else leave
    others = len(turns._line)
    for _ in interrupted(
        work, Turns.after, Turns.__exit__, Turns._catch_up, Turns._leave, Turns._finish, Turns._work_off
    ):
        assert len(turns._line) == len(turns._inside) == others
        assert others or not turns._late
    go.set()
    if others:
        holder.join(30)
    turns.take(leave)
    assert done
    assert not turns._late
    assert not turns._line
    assert not turns._inside


def test_work_that_may_not_wait_is_done_when_the_turn_under_way_ends() -> None:
    turns, done = Turns(CPU), list[str]()
    turns.after(lambda: done.append("free"))
    assert done == ["free"]
    with turns:
        thread = threading.Thread(target=turns.after, args=(lambda: done.append("other"),))
        thread.start()
        thread.join(30)
        turns.alone(lambda: done.append("own"))
        turns.after(lambda: done.append(f"held {turns.held}"))
        assert done == ["free"]
    assert done == ["free", "other", "own", "held True"]
    assert not turns.held
    assert not turns._line


def test_work_of_a_thread_that_is_coming_into_its_turn_is_left_to_the_end_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a finaliser or a signal's handler does there must not stand in the line behind its own thread."""
    turns, done = Turns(CPU), list[bool]()

    def with_work(patch: pytest.MonkeyPatch, own: Callable[..., None], before: bool) -> Callable[..., None]:
        def step(*given: Any) -> None:
            patch.undo()
            if not before:
                own(*given)
            for _ in range(2):
                turns.alone(lambda: done.append(turns.held))
            if before:
                own(*given)

        return step

    for name, before in (("_begin", True), ("_begin", False), ("_leave", True)):
        with monkeypatch.context() as patch:
            patch.setattr(turns, name, with_work(patch, getattr(turns, name), before))
            thread = threading.Thread(target=lambda: turns.take(lambda: None), daemon=True)
            thread.start()
            thread.join(30)
            assert not thread.is_alive(), name
    assert done == [True] * 6
    assert not turns._line
    assert not turns._inside


@pytest.mark.usefixtures("interruptible")
def test_a_signals_handler_may_leave_work_while_its_thread_waits_for_a_turn() -> None:
    turns, go, done = Turns(CPU), threading.Event(), list[str]()

    def hold() -> None:
        with turns:
            go.wait(30)

    def handler(*_: object) -> None:
        for name in ("one", "two"):
            turns.alone(lambda name=name: done.append(name))
        go.set()

    holder, usual = threading.Thread(target=hold), signal.signal(signal.SIGALRM, handler)
    holder.start()
    until(lambda: turns.taken)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        turns.take(lambda: done.append("own"))
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert sorted(done) == ["one", "own", "two"]


def test_an_interrupt_of_work_that_was_left_costs_nobody_anything() -> None:
    turns, done = Turns(CPU), list[str]()

    def work() -> None:
        done.append("begun")
        if len(done) == 1:
            raise TimeoutError("a deadline of this thread's")
        done.append("whole")

    def leave() -> None:
        turns.after(work)
        turns.after(lambda: done.append("next"))

    with pytest.raises(TimeoutError):
        turns.take(leave)
    turns.take(lambda: None)
    assert done == ["begun", "begun", "whole", "next"]


def test_work_that_fails_gives_the_turn_back() -> None:
    turns = Turns(CPU)
    with pytest.raises(ZeroDivisionError), turns:
        turns.after(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    with turns:
        assert turns.held


def test_a_turn_is_queued_between_what_its_caller_has_queued_and_what_comes_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = list[str]()

    class Stream:
        def __init__(self, device: torch.device, name: str = "own") -> None:
            self.device, self.name = device, name

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.name} waits for {other.name}")

        def synchronize(self) -> None:
            said.append(f"the host waits for {self.name}")

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        said.append(f"enter {stream.name}")
        try:
            yield
        finally:
            said.append(f"leave {stream.name}")

    caller = Stream(torch.device("cuda"), "caller")
    for name, fake in (("Stream", Stream), ("stream", entered), ("current_stream", lambda _: caller)):
        monkeypatch.setattr(torch.cuda, name, fake)
    turns = Turns(torch.device("cuda"))
    with turns, turns:
        said.append("work")
        turns.after(lambda: said.append("late work"))
    turns.settle()
    assert said == [
        "own waits for caller",
        "enter own",
        "work",
        "late work",
        "leave own",
        "caller waits for own",
        "the host waits for own",
    ]


@pytest.fixture
def admission() -> Admission:
    return Admission(KVCache(1, 1, 2, pages=4, page_size=8, dtype=torch.float32, device=CPU))


def asked(admission: Admission, tokens: int) -> Ticket:
    admission.ask(ticket := Ticket(tokens, [], admission))
    return ticket


def test_pages_go_to_whoever_asked_first_even_where_a_later_one_would_fit(admission: Admission) -> None:
    held: list[int] = []
    assert admission.take(24, held)
    large, small = asked(admission, 32), asked(admission, 8)
    assert not admission.take(8, []), "others were first"
    assert not large.done
    assert not small.done
    admission.release(held)
    assert large.done
    assert len(large.pages) == 4
    assert not small.done
    admission.withdraw(large)
    assert small.done
    assert len(small.pages) == 1
    admission.withdraw(small)
    assert admission.cache.free_pages == 4


def test_a_ticket_that_is_cancelled_makes_room_for_the_next(admission: Admission) -> None:
    assert admission.take(24, [])
    large, small = asked(admission, 32), asked(admission, 8)
    large.cancel()
    admission.release([])
    assert small.done
    admission.redeem(small)
    assert len(small.pages) == 1
    assert admission.cache.free_pages == 0


def test_the_exception_of_a_signal_ends_the_wait_for_pages(admission: Admission) -> None:
    """Whatever it is: a deadline is often a TimeoutError, which a wait that has an end raises too."""
    assert admission.take(32, [])
    ticket = asked(admission, 8)

    def late(*_: object) -> None:
        raise TimeoutError("too late")

    usual = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(TimeoutError, match="too late"):
            ticket.wait()
    finally:
        signal.signal(signal.SIGALRM, usual)


def test_a_wait_for_pages_ends_with_the_ticket(admission: Admission) -> None:
    held: list[int] = []
    assert admission.take(32, held)
    for end in (lambda ticket: ticket.cancel(), lambda _: admission.release(held)):
        ticket = asked(admission, 8)
        waiting = threading.Thread(target=ticket.wait)
        waiting.start()
        end(ticket)
        waiting.join(ADMISSION_WAIT_S / 2)
        assert not waiting.is_alive()


def test_an_interrupt_in_the_line_loses_neither_pages_nor_those_behind(
    admission: Admission, interrupted: Callable[..., Iterator[None]]
) -> None:
    mine: list[int] = []

    def work() -> None:
        admission.take(16, held)
        admission.ask(first)
        admission.release(held)
        admission.redeem(first)

    held: list[int] = []
    first = Ticket(32, mine, admission)
    for _ in interrupted(work, Admission.take, Admission.ask, Admission.redeem, Admission.serve, KVCache.reserve):
        behind = asked(admission, 8)
        admission.release(held)
        admission.withdraw(first)
        assert behind.done
        admission.withdraw(behind)
        assert admission.cache.free_pages == 4
        assert not admission._line
        first = Ticket(32, mine, admission)


def test_an_interrupt_at_a_grant_is_not_swallowed_and_the_one_granted_goes_on(admission: Admission) -> None:
    held: list[int] = []
    admission.take(32, held)
    ticket = asked(admission, 8)
    waiting = threading.Thread(target=ticket.wait)
    waiting.start()
    until(lambda: len(ticket._waiting) == 1)
    (wake,), struck = ticket._waiting, list[bool]()

    def interrupted() -> None:
        wake()
        if not struck:
            struck.append(True)
            raise TimeoutError("too late")

    ticket._waiting[0] = interrupted
    with pytest.raises(TimeoutError, match="too late"):
        admission.release(held)
    waiting.join(ADMISSION_WAIT_S / 2)
    assert not waiting.is_alive()
    admission.release([])
    assert not admission._line


def test_waiting_has_an_end_only_when_nothing_moves(admission: Admission, monkeypatch: pytest.MonkeyPatch) -> None:
    now = admission.moved
    monkeypatch.setattr(admission_module, "monotonic", lambda: now)
    admission.take(32, [])
    ticket: Any = asked(admission, 8)
    now += ADMISSION_WAIT_S - 1
    assert ticket.patience == pytest.approx(1)
    admission.moved = now
    assert ticket.patience == pytest.approx(ADMISSION_WAIT_S)
    now += ADMISSION_WAIT_S + 1e-6
    assert ticket.patience <= 0
    ticket.wait()


TEAMS = """
import os
from threading import Barrier, Thread

from skipjack import Engine, SamplingParams
from skipjack.loaders.config import ModelConfig
from skipjack.loaders.synthetic import synthetic_config, synthetic_weights
from skipjack.runtime import turns

import torch

def threads():
    return len(os.listdir("/proc/self/task"))

# PyTorch has some more for itself with this, for good.
torch.set_num_threads(5)
bare, most, honest = threads(), 0, turns.disband

def disband():
    global most
    most = max(most, threads())
    honest()

turns.disband = disband
config = ModelConfig.parse(synthetic_config("tiny-llama"), "tiny-llama")
engine = Engine(config, synthetic_weights(config, 0, torch.float32, 0.1))
told = [threads() - bare]
params = SamplingParams(max_tokens=4, ignore_eos=True)
engine.generate([5, 6, 7] * 40, params)
told += [most - bare, threads() - bare]
both = Barrier(2)

def generate():
    both.wait()
    engine.generate([5, 6, 7] * 40, params)
    both.wait()
    told.append(threads() - bare)
    both.wait()

others = [Thread(target=generate) for _ in range(2)]
[other.start() for other in others]
[other.join() for other in others]
print(*told)
"""


@pytest.mark.skipif("/libgomp" not in openmp._path(), reason="PyTorch has no OpenMP library of GNU's here")
def test_a_thread_lets_go_of_those_it_computes_with_when_its_request_has_ended() -> None:
    """Two teams would be more threads than processors, which then do not wait awake for each other."""
    command = [sys.executable, "-c", TEAMS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # With more, PyTorch has begun one of its own by then.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    loaded, working, ended, *while_others_are_there = map(int, done.stdout.split())
    assert (loaded, ended) == (0, 0)
    assert working >= 4
    assert while_others_are_there == [2, 2], "the two themselves"
