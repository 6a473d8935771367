"""Whose turn it is: one thread at a time works with a model and its cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from threading import Lock, get_ident

import torch

from ..kernels.openmp import disband


class Turns:
    """Turns with a model and its cache, one thread's at a time, first come first served.

    `with turns` waits for one; a thread that has it may enter again. On a GPU everything in a turn is queued on one
    stream, after what the caller's stream has so far and before what it will be given: pages that are given back while
    rounds are under way are taken anew behind them, whoever calls.
    """

    def __init__(self, device: torch.device) -> None:
        # The gates of the thread that has the turn and of those that wait. Its operations are atomic, and every change
        # wakes the first: nothing here waits for a lock that the garbage collector or a signal might find taken.
        self._line = deque[Lock]()
        self._late = deque[Callable[[], None]]()
        self._gate, self._holder, self._depth = Lock(), 0, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._computes, self._resting = device.type == "cpu", False
        self._ordered = _ordered(None)

    @property
    def held(self) -> bool:
        """Whether this thread has the turn."""
        return self._holder == get_ident()

    def __enter__(self) -> Turns:
        if not self.held:
            gate = Lock()
            gate.acquire()
            try:
                self._line.append(gate)
                if self._line[0] is not gate:
                    gate.acquire()
            except BaseException:
                self._leave(gate)
                raise
            self._begin(gate)
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._finish()
            self._catch_up()

    def after(self, work: Callable[[], None]) -> None:
        """Do `work` in a turn without waiting for one: now if nobody has it, else at the end of the one under way."""
        self._late.append(work)
        self._catch_up()

    def rest(self) -> None:
        """This turn is the last of what its thread computes for: a request, or what goes before requests."""
        self._resting = True

    def alone(self, work: Callable[[], None]) -> None:
        """Do `work` in a turn of its own; inside a turn, at its end."""
        if self.held:
            self.after(work)
            return
        with self:
            work()

    def _begin(self, gate: Lock) -> None:
        ordered = _ordered(self._stream)
        try:
            ordered.__enter__()
        except BaseException:
            self._leave(gate)
            raise
        self._ordered, self._gate, self._holder = ordered, gate, get_ident()

    def _finish(self) -> None:
        self._depth = 1
        try:
            while self._late:
                self._late.popleft()()
            if self._computes and (self._resting or len(self._line) > 1):
                # Else the threads of whoever is next would share the processors with those of this one.
                disband()
                self._resting = False
        finally:
            try:
                self._ordered.__exit__(None, None, None)
            finally:
                self._depth = self._holder = 0
                self._leave(self._gate)

    def _leave(self, gate: Lock) -> None:
        with suppress(ValueError):
            self._line.remove(gate)
        # Nobody waits, or the first has been woken already.
        with suppress(IndexError, RuntimeError):
            self._line[0].release()

    def _catch_up(self) -> None:
        while self._late:
            gate = Lock()
            gate.acquire()
            self._line.append(gate)
            if self._line[0] is gate:
                self._begin(gate)
                self._finish()
                continue
            self._leave(gate)
            if self._line:
                return  # Whoever is in the line does it.


@contextmanager
def _ordered(stream: torch.cuda.Stream | None) -> Generator[None]:
    """What is queued inside runs on `stream`, between what the caller's stream has now and what it is given later."""
    if stream is None:
        yield
        return
    caller = torch.cuda.current_stream(stream.device)
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        yield
    caller.wait_stream(stream)
