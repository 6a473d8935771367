"""What a request is told that the end of a server cuts off."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .faults import RETRY_AFTER, fault


class Ending:
    """Answers 503 to requests that are cancelled before their answer has begun (ASGI middleware).

    Nothing but the end of the time that answers under way are given does that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if not begun:
                await fault(503, "this server has ended", headers=RETRY_AFTER)(scope, receive, send)
