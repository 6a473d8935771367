"""A request as its caller sees it while it runs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import Executor
from contextlib import suppress
from functools import partial
from itertools import groupby

from .admission import Result, Ticket, eventually, patiently
from .request import Chunk, Output
from .run import Run
from .summary import summarise


class Stream(Iterator[Chunk]):
    """The chunks of a request as they come. Closing it early, or dropping it, frees what the request holds.

    A `with` block closes it. Any thread may, also while another waits for its next chunk, which is then the last.
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

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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

    def ask(self) -> None:
        """Say that `advance` will be called, as soon as it is this stream's turn."""
        self._run.ask()

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


class AsyncStream(AsyncIterator[Chunk]):
    """A stream for an event loop. Leaving it early, cancelling its task or dropping it frees what the request holds.

    It is checked and made ready when it is entered, or when its first chunk is asked for; text is encoded in a thread
    of the loop's default executor. One that ends early does so with the turn under way, which nobody waits for.
    """

    def __init__(self, ask: Callable[[], Stream], turns: Executor | None) -> None:
        self._request = _Request(ask, turns)
        # Not a method's, for one that nobody has any more ends at once, not when garbage is collected.
        self._chunks = _chunks(self._request)

    async def __aenter__(self) -> AsyncStream:
        """Check the request and make its method ready; its prompts are read when chunks are asked for.

        Raises:
            SkipjackError: it can never be served, as `Engine.generate` says.
        """
        await self._request.begun()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """End the request now."""
        if self._request.stream is not None:
            self._request.stream.abandon()
        await self._chunks.aclose()

    @property
    def outputs(self) -> list[Output]:
        """One result per prompt, of what has been generated so far; none before the request has begun."""
        return [] if self._request.stream is None else self._request.stream.outputs


class _Request:
    """What is asked for, and the stream of it once it has begun."""

    def __init__(self, ask: Callable[[], Stream], turns: Executor | None) -> None:
        self._ask, self._turns = ask, turns
        self.stream: Stream | None = None

    async def begun(self) -> Stream:
        if self.stream is not None:
            return self.stream
        # Not where requests take their turns, which need not wait for a long text or many prompts.
        stream = await asyncio.get_running_loop().run_in_executor(None, self._ask)
        try:
            while not await self.turn(stream.prepare):
                pass
        except BaseException:
            stream.abandon()
            raise
        self.stream = stream
        return stream

    async def turn(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._turns, work)


async def _chunks(request: _Request) -> AsyncGenerator[Chunk]:
    stream = await request.begun()
    try:
        while True:
            stream.ask()
            if (chunks := await eventually(stream.advance, request.turn)) is None:
                return
            for chunk in chunks:
                yield chunk
    finally:
        stream.abandon()
