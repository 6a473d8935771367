"""Whose turn it is: one thread at a time works with a model and its cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from threading import Lock, get_ident
from typing import TypeVar

import torch

from ..kernels.cpu.openmp import disband

Result = TypeVar("Result")


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
        # The threads whose gates these are, from before they stand in the line until after.
        self._inside = dict[Lock, int]()
        self._late = deque[Callable[[], None]]()
        self._gate: Lock | None = None
        self._holder = self._depth = 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._computes, self._resting = device.type == "cpu", False
        self._ordered = _ordered(None)

    @property
    def held(self) -> bool:
        """Whether this thread has the turn."""
        return self._holder == get_ident()

    @property
    def taken(self) -> bool:
        """Whether any thread has the turn."""
        return bool(self._line)

    def __enter__(self) -> Turns:
        if self.held:
            self._depth += 1
            return self
        gate = Lock()
        gate.acquire()
        try:
            self._inside[gate] = get_ident()
            self._line.append(gate)
            if self._line[0] is not gate:
                gate.acquire()
            self._begin(gate)
            return self
        except BaseException:
            # The handler of a signal may raise at any line: nobody else would leave.
            self._leave(gate)
            self._catch_up()
            raise

    def __exit__(self, *_: object) -> None:
        if self._depth > 1:
            self._depth -= 1
            return
        gate = self._gate
        try:
            self._finish(gate)
            self._catch_up()
        except BaseException:
            self._leave(gate)
            self._catch_up()
            raise

    def take(self, work: Callable[[], Result]) -> Result:
        """What `work` comes to in a turn, which is left even if the handler of a signal raises at the end of it."""
        before = self._depth if self.held else 0
        try:
            with self:
                return work()
        finally:
            if self.held and self._depth > before:
                self._depth = before + 1
                self.__exit__()

    def after(self, work: Callable[[], None]) -> None:
        """Do `work` in a turn without waiting for one: now if nobody has it, else at the end of the one under way.

        An interrupt in the middle of it may have it done twice.
        """
        try:
            self._late.append(work)
            self._catch_up()
        except BaseException:
            self._catch_up()
            raise

    def rest(self) -> None:
        """This turn is the last of what its thread computes for: a request, or what goes before requests."""
        self._resting = True

    def settle(self) -> None:
        """Wait until nothing that was queued in turns is under way.

        A caller's stream waits for it anyhow, but memory goes back to the stream that it was allocated on, which may be
        another's.
        """
        if self._stream is not None:
            self._stream.synchronize()

    def alone(self, work: Callable[[], None]) -> None:
        """Do `work` in a turn of its own; in a thread that has one, or has a place in the line, at its end.

        Such a thread comes here from the handler of a signal, or from a finaliser of the garbage collector.
        """
        if get_ident() in self._inside.values():
            self.after(work)
            return
        self.take(work)

    def _begin(self, gate: Lock) -> None:
        self._gate, self._ordered = gate, _ordered(self._stream)
        next(self._ordered)
        self._depth, self._holder = 1, get_ident()

    def _finish(self, gate: Lock | None) -> None:
        self._depth = 1
        try:
            self._work_off()
            if self._computes and (self._resting or len(self._line) > 1):
                # Else the threads of whoever is next would share the processors with those of this one.
                disband()
                self._resting = False
        finally:
            self._leave(gate)

    def _leave(self, gate: Lock | None) -> None:
        """Give the turn back, or the place in the line; to do so again, after an interrupt, changes nothing more."""
        try:
            if self._gate is gate:
                self._ordered.close()
        finally:
            if self._gate is gate:
                self._depth, self._holder, self._gate = 0, 0, None
            if gate in self._line:
                self._line.remove(gate)
            # Nobody waits, or the first has been woken already.
            with suppress(IndexError, RuntimeError):
                self._line[0].release()
            if gate is not None:
                self._inside.pop(gate, None)

    def _work_off(self) -> None:
        """Do what was left for the end of a turn."""
        while self._late:
            work = self._late[0]
            try:
                work()
            except BaseException:
                # Somebody else's, whom an interrupt of this thread must not cost anything.
                work()
                raise
            finally:
                self._late.remove(work)

    def _catch_up(self) -> None:
        while self._late:
            gate = Lock()
            gate.acquire()
            try:
                self._inside[gate] = get_ident()
                self._line.append(gate)
                if first := self._line[0] is gate:
                    self._begin(gate)
                    self._finish(gate)
                else:
                    self._leave(gate)
            except BaseException:
                self._leave(gate)
                raise
            if not first and self._line:
                return  # Whoever is in the line does it.


def _ordered(stream: torch.cuda.Stream | None) -> Generator[None]:
    """What is queued from the first step of this to its end runs on `stream`.

    That is between what the caller's stream has at the first and what it is given after the end.
    """
    if stream is None:
        yield
        return
    caller = torch.cuda.current_stream(stream.device)
    stream.wait_stream(caller)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        caller.wait_stream(stream)
