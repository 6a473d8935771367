"""A request as its caller sees it while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import groupby

from .admission import Result, Ticket, patiently
from .request import Chunk, Output
from .run import Run
from .summary import summarise


class Stream(Iterator[Chunk]):
    """The chunks of a request as they come. Closing it early, or dropping it, frees what the request holds.

    It may be closed by any thread, also while another waits for its next chunk, which is then the last.
    """

    def __init__(self, run: Run, backend: str, numerics: str, seed: int) -> None:
        self._run, self._ready = run, deque[Chunk]()
        self._backend, self._numerics, self._seed = backend, numerics, seed

    def prepare(self) -> bool:
        """A turn of making the method ready; whether it is."""
        return self._run.prepare()

    def begun(self) -> Stream:
        """This stream, once its method is ready."""
        self._or_closed(self._prepared)
        return self

    def __next__(self) -> Chunk:
        if self._run.stopped:
            self._ready.clear()
        while True:
            with suppress(IndexError):
                return self._ready.popleft()
            chunks = self._or_closed(partial(patiently, self.advance))
            if chunks is None:
                raise StopIteration
            self._ready += chunks

    def advance(self) -> list[Chunk] | Ticket | None:
        """What one turn adds, None at the end; or the ticket to wait for before this is called again."""
        return self._run.advance()

    def __del__(self) -> None:
        self._run.abandon()

    def abandon(self) -> None:
        """End the request without waiting: with the turn under way, if there is one."""
        self._run.abandon()

    def close(self) -> None:
        """End the request now; its pages are free when this returns, or with the turn that the thread is in."""
        self._run.close()

    @property
    def outputs(self) -> list[Output]:
        """One result per prompt, of what has been generated so far."""
        run, events = self._run, list(self._run.events)
        prompts = groupby(run.sequences, key=lambda sequence: sequence.index)
        return [
            summarise(list(own), run.method, self._backend, self._numerics, self._seed, events) for _, own in prompts
        ]

    def _prepared(self) -> None:
        while not self.prepare():
            pass

    def _or_closed(self, work: Callable[[], Result]) -> Result:
        try:
            return work()
        except BaseException:
            self.close()
            raise
