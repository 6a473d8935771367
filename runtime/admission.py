"""Who gets the next pages of the cache: first come, first served, and nobody holds a thread while waiting."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TypeVar

from .cache import KVCache, expect_room
from .errors import BusyError, CapacityError

ADMISSION_WAIT_S = 30.0
Result = TypeVar("Result")


class Ticket:
    """A place in the line for pages of `tokens` slots; to cancel it is to leave the line.

    They come into `pages`, which its owner gives back in any case.
    """

    def __init__(self, tokens: int, pages: list[int], admission: Admission) -> None:
        self.tokens, self.pages, self.done = tokens, pages, False
        self._admission, self._since = admission, monotonic()
        # What wakes those who wait. A list of our own, for a Future swallows what a signal's handler raises.
        self._waiting = deque[Callable[[], None]]()

    @property
    def patience(self) -> float:
        """Seconds it still makes sense to wait: `ADMISSION_WAIT_S` after anything of any request last moved."""
        return 0.0 if self.done else max(self._since, self._admission.moved) + ADMISSION_WAIT_S - monotonic()

    def grant(self) -> None:
        """Let whoever waits go on; again, where that was interrupted."""
        self.done = True
        for wake in list(self._waiting):
            wake()

    def cancel(self) -> None:
        """Leave the line; whoever waits goes on without pages."""
        self.grant()

    def wait(self) -> None:
        """Return when it is granted or cancelled, or when there is no more sense in waiting."""
        woken = SimpleQueue[None]()
        self._waiting.append(partial(woken.put, None))
        while (left := self.patience) > 0:
            with suppress(Empty):
                woken.get(timeout=left)

    async def awaited(self) -> None:
        """As `wait`, for an event loop."""
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        # A loop that is closed must not leave its tasks, and through them their requests, to be kept by this.
        self._waiting.append(partial(_wake, loop, weakref.ref(woken)))
        while not woken.done() and (left := self.patience) > 0:
            await asyncio.wait([woken], timeout=left)


class Admission:
    """The pages of a cache and the line of those who wait for some. Everything here is called within a turn."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._line = deque[Ticket]()
        self.moved = monotonic()

    def move(self) -> None:
        """Somebody has got on: those who wait may go on waiting."""
        self.moved = monotonic()

    def expect_room(self, tokens: int) -> None:
        """Refuse, with a CapacityError, more slots than there are."""
        expect_room(tokens, self.cache.total_pages, self.cache.page_size)

    def take(self, tokens: int, pages: list[int]) -> bool:
        """Reserve `pages` for `tokens` slots; False where too few are free or others were first."""
        self.serve()
        if self._line or self.cache.pages_for(tokens) > self.cache.free_pages:
            return False
        self.cache.reserve(tokens, pages)
        return True

    def ask(self, ticket: Ticket) -> None:
        """Give a ticket a place at the end of the line."""
        self._line.append(ticket)
        self.serve()

    def redeem(self, ticket: Ticket) -> None:
        """Have the pages of a ticket that has been waited for, or if it was not granted some that are free now.

        Raises:
            BusyError: there are not enough.
        """
        ticket.cancel()
        if ticket.pages:
            return
        try:
            self.cache.reserve(ticket.tokens, ticket.pages)
        except CapacityError as problem:
            raise BusyError(
                f"{problem}; for {ADMISSION_WAIT_S:.0f} s none of the requests that hold the others has got on, "
                "so nobody reads their streams"
            ) from None

    def withdraw(self, ticket: Ticket) -> None:
        """Leave the line, and give back what the ticket was granted."""
        ticket.cancel()
        self.release(ticket.pages)

    def release(self, pages: list[int]) -> None:
        """Give pages back to whoever waits for them."""
        self.cache.release(pages)
        self.serve()

    def serve(self) -> None:
        """Grant what can be granted, from the front of the line."""
        while self._line:
            ticket = self._line[0]
            # One that is done, or has its pages, was left here by an interrupt.
            if not ticket.done and not ticket.pages:
                if self.cache.pages_for(ticket.tokens) > self.cache.free_pages:
                    return
                self.cache.reserve(ticket.tokens, ticket.pages)
            ticket.grant()
            self._line.popleft()


def _wake(loop: asyncio.AbstractEventLoop, waiting: weakref.ref[asyncio.Future[None]]) -> None:
    def wake() -> None:
        if (woken := waiting()) is not None and not woken.done():
            woken.set_result(None)

    with suppress(RuntimeError):  # The loop is closed.
        loop.call_soon_threadsafe(wake)


def patiently(step: Callable[[], Result | Ticket]) -> Result:
    """What `step` comes to, called again after each ticket it says to wait for."""
    while isinstance(found := step(), Ticket):
        found.wait()
    return found


async def eventually(
    step: Callable[[], Result | Ticket], work: Callable[[Callable[[], Result | Ticket]], Awaitable[Result | Ticket]]
) -> Result:
    """As `patiently`, for an event loop: `work` calls a step on a thread, and none waits for a ticket."""
    while isinstance(found := await work(step), Ticket):
        await found.awaited()
    return found
