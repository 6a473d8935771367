"""What a request passes before it is read: who may come in, how many at once, and how much each may bring."""

from __future__ import annotations

import secrets
from collections.abc import Collection, MutableMapping
from time import perf_counter
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .exposition import Record
from .faults import RETRY_AFTER, fault

MAX_BODY_BYTES = 4 * 2**20


class Door:
    """Refuses what should not reach the application, and counts what does (ASGI middleware).

    Addresses below /v1/ need the key if there is one; of requests to `served` ones at most `most` are under way, others
    get 429. A body is read here, for then its size is known wherever it comes from.
    """

    def __init__(self, app: ASGIApp, *, served: Collection[str], most: int, key: str | None, record: Record) -> None:
        self._app, self._served, self._most = app, frozenset(served), most
        self._key = None if key is None else key.encode()
        self._record = record
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, path = perf_counter(), _path(scope)
        status = 499

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._pass(scope, receive, noting)
        except Exception:
            status = 500
            raise
        finally:
            if path in self._served:
                self._record.answered(path, status, perf_counter() - start)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _path(scope)
        if path.startswith("/v1/") and not self._known(scope):
            refusal = fault(401, "Authorization: expected Bearer and the key of this server", code="invalid_api_key")
            await refusal(scope, receive, send)
            return
        if path not in self._served:
            await self._app(scope, receive, send)
            return
        if self.under_way >= self._most:
            message = f"{self.under_way} requests are under way, as many as this server takes: try again"
            await fault(429, message, code="rate_limit_exceeded", headers=RETRY_AFTER)(scope, receive, send)
            return
        self.under_way += 1
        try:
            body = await _body(receive)
            if body is None:
                await fault(413, f"body: expected at most {MAX_BODY_BYTES} bytes")(scope, receive, send)
            else:
                await self._app(_as_json(scope), _Replay(body, receive), send)
        except ClientDisconnect:
            pass
        finally:
            self.under_way -= 1

    def _known(self, scope: Scope) -> bool:
        if self._key is None:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return secrets.compare_digest(given, b"Bearer " + self._key)


def _path(scope: Scope) -> str:
    """The address as the application knows it, wherever it is mounted."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def _as_json(scope: Scope) -> Scope:
    """A request whose body is JSON whatever it says: curl calls every one a form."""
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


async def _body(receive: Receive) -> bytearray | None:
    """A request's body; None where it is too long.

    Raises:
        ClientDisconnect: the client has left before its end.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


class _Replay:
    """What is received after a body has been read: the body, then what comes next."""

    def __init__(self, body: bytearray, receive: Receive) -> None:
        self._body: bytearray | None = body
        self._receive = receive

    async def __call__(self) -> MutableMapping[str, Any]:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": bytes(body), "more_body": False}
