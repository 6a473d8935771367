"""Who gets the next pages of the cache: first come, first served, and nobody holds a thread while waiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future, TimeoutError
from contextlib import suppress
from time import monotonic
from typing import TypeVar

from .cache import KVCache

ADMISSION_WAIT_S = 30.0
Result = TypeVar("Result")


class Ticket(Future[list[int]]):
    """A place in the line for pages of `tokens` slots, which are its result; to cancel it is to leave the line."""

    def __init__(self, tokens: int, admission: Admission) -> None:
        super().__init__()
        self.tokens, self._admission, self._since = tokens, admission, monotonic()

    @property
    def patience(self) -> float:
        """Seconds it still makes sense to wait: `ADMISSION_WAIT_S` after anything of any request last moved."""
        return 0.0 if self.done() else max(self._since, self._admission.moved) + ADMISSION_WAIT_S - monotonic()

    def wait(self) -> None:
        """Return when it is granted or cancelled, or when there is no more sense in waiting."""
        while (left := self.patience) > 0:
            with suppress(TimeoutError, CancelledError):
                self.result(left)

    async def awaited(self) -> None:
        """As `wait`, for an event loop."""
        future = asyncio.wrap_future(self)
        try:
            while (left := self.patience) > 0:
                await asyncio.wait([future], timeout=left)
        finally:
            future.cancel()


class Admission:
    """The pages of a cache and the line of those who wait for some. Everything here is called within a turn."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._line = deque[Ticket]()
        self.moved = monotonic()

    def move(self) -> None:
        """Somebody has got on: those who wait may go on waiting."""
        self.moved = monotonic()

    def take(self, tokens: int) -> list[int] | None:
        """Pages for `tokens` slots; None where too few are free or others were first."""
        self.serve()
        if self._line or self.cache.pages_for(tokens) > self.cache.free_pages:
            return None
        return self.cache.reserve(tokens)

    def ask(self, tokens: int) -> Ticket:
        """A place at the end of the line."""
        self._line.append(ticket := Ticket(tokens, self))
        self.serve()
        return ticket

    def redeem(self, ticket: Ticket) -> list[int]:
        """The pages of a ticket that has been waited for, or if it was not granted those that are free now.

        Raises:
            CapacityError: there are not enough.
        """
        return self.cache.reserve(ticket.tokens) if ticket.cancel() else ticket.result()

    def withdraw(self, ticket: Ticket) -> None:
        """Leave the line, or give back what the ticket was granted."""
        self.release([] if ticket.cancel() else ticket.result())

    def release(self, pages: list[int]) -> None:
        """Give pages back to whoever waits for them."""
        self.cache.release(pages)
        self.serve()

    def serve(self) -> None:
        """Grant what can be granted, from the front of the line."""
        while self._line:
            ticket = self._line[0]
            if not ticket.cancelled() and self.cache.pages_for(ticket.tokens) > self.cache.free_pages:
                return
            if ticket.set_running_or_notify_cancel():
                ticket.set_result(self.cache.reserve(ticket.tokens))
            self._line.popleft()


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
