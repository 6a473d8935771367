"""The application: addresses, and the way from a body to an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from time import perf_counter, time
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..engine import Engine
from ..errors import RequestError, SkipjackError
from ..prompts import Prompt
from ..request import Chunk, SamplingParams
from ..stream import AsyncStream
from .answers import END, Answer, ChatAnswer, event, told
from .bodies import Body, ChatBody, CompletionBody
from .door import Door
from .exposition import Record
from .faults import broken, described, fault, http_fault, invalid, said_of, skipjack_fault, status_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CLIENT_GONE = 499

_T = TypeVar("_T")


@dataclass(frozen=True)
class Service:
    """An engine and what clients may ask of it.

    `name` is the model's for clients. `methods` are those they may choose from, as the engine takes them, the first
    where they choose none. A conversation is answered with `chat_tokens` at most unless it says how many. Of `most`
    requests that are under way the next is refused; `key` is what clients must show, None for nothing.
    """

    engine: Engine
    name: str
    methods: Sequence[str]
    chat_tokens: int = 1024
    most: int = 64
    key: str | None = None

    def app(self) -> FastAPI:
        """The application, for any ASGI server."""
        record, started = Record(self.engine), int(time())
        app = FastAPI(title="Skipjack", version=version("skipjack"))
        app.add_middleware(Door, served=(COMPLETIONS, CHAT), most=self.most, key=self.key, record=record)
        for kind, handler in (
            (SkipjackError, skipjack_fault),
            (RequestValidationError, invalid),
            (HTTPException, http_fault),
            (Exception, broken),
        ):
            app.add_exception_handler(kind, handler)

        @app.post(COMPLETIONS)
        async def completions(body: CompletionBody, request: Request) -> Response:
            """Continue texts or token ids."""
            return await _Exchange(self, record, request, body).answer(Answer, body.prompts(), body.params())

        @app.post(CHAT)
        async def chat(body: ChatBody, request: Request) -> Response:
            """Answer a conversation."""
            params = body.params(self.chat_tokens)
            return await _Exchange(self, record, request, body).answer(ChatAnswer, body.prompts(), params)

        @app.get("/v1/models")
        async def models() -> dict[str, Any]:
            """The model, and the methods that `method` may name."""
            return {"object": "list", "data": [self._model(started)]}

        @app.get("/v1/models/{name:path}")
        async def model(name: str) -> Response:
            """The model, if that is its name."""
            return JSONResponse(self._model(started)) if name == self.name else self.no_model(name)

        @app.get("/health")
        async def health() -> Response:
            """200 while requests are served; 503 once the engine is closed, 500 if it has lost pages of its cache."""
            metrics = self.engine.metrics()
            if metrics.pages_leaked:
                return fault(500, f"{metrics.pages_leaked} pages of the KV cache are lost")
            return JSONResponse({"status": "ok"})

        @app.get("/metrics")
        async def metrics() -> Response:
            """What Prometheus reads."""
            return Response(record.text(), media_type=CONTENT_TYPE_LATEST)

        return app

    @cached_property
    def fingerprint(self) -> str:
        """What a seed's tokens depend on besides the request."""
        return f"skipjack-{version('skipjack')}-{self.engine.backend.split()[0]}-{self.engine.numerics}"

    def method(self, asked: str | None) -> str:
        """The method to use.

        Raises:
            RequestError: it is none of those served.
        """
        if asked is None:
            return self.methods[0]
        if asked not in self.methods:
            raise RequestError(f"method: expected one of {', '.join(self.methods)}, got {asked!r}")
        return asked

    def _model(self, started: int) -> dict[str, Any]:
        own = {"methods": list(self.methods), "max_model_len": self.engine.config.max_context}
        return {"id": self.name, "object": "model", "created": started, "owned_by": "skipjack"} | own

    def no_model(self, asked: str) -> Response:
        """What is said of a model that is not served."""
        return fault(404, f"model: expected {self.name}, got {asked!r}", param="model", code="model_not_found")


class _Exchange:
    """One request of a client and its answer."""

    def __init__(self, service: Service, record: Record, request: Request, body: Body) -> None:
        self._service, self._record, self._request, self._body = service, record, request, body
        self._start = perf_counter()

    async def answer(self, kind: type[Answer], prompts: list[Prompt], params: SamplingParams) -> Response:
        """The response: what goes wrong before the first token is one too."""
        service, body = self._service, self._body
        if body.model not in (None, service.name):
            return service.no_model(str(body.model))
        engine = service.engine
        answer = kind(service.name, service.fingerprint, engine.tokenizer, params.n, bool(body.return_token_ids))
        stream = engine.astream(prompts, params, method=service.method(body.method))
        try:
            if not body.stream:
                await self._unless_gone(self._exhaust(stream))
                # With log-probabilities it may be megabytes.
                return await asyncio.to_thread(lambda: JSONResponse(answer.whole(stream.outputs)))
            first = await self._unless_gone(self._first(stream))
        except _Gone:
            return Response(status_code=CLIENT_GONE)
        parts = self._parts(answer, stream, first, len(prompts) * params.n)
        return StreamingResponse(parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def _first(self, stream: AsyncStream) -> Chunk:
        first = await anext(stream)
        self._record.began(perf_counter() - self._start)
        return first

    async def _exhaust(self, stream: AsyncStream) -> None:
        async with stream:
            await self._first(stream)
            async for _ in stream:
                pass

    async def _parts(self, answer: Answer, stream: AsyncStream, first: Chunk, choices: int) -> AsyncIterator[bytes]:
        """The events of a stream; an error that comes too late for a status is the last of them."""
        async with stream:
            try:
                for part in answer.opening():
                    yield event(part)
                async for chunk in _with_first(first, stream):
                    choices -= chunk.finish_reason is not None
                    if (part := answer.part(chunk)) is not None:
                        yield event(part if choices else part | {"skipjack": told(stream.outputs)})
                if self._body.with_usage:
                    yield event(answer.cost(stream.outputs))
                yield END
            except Exception as error:
                yield event({"error": described(status_of(error), said_of(error))})
                if not isinstance(error, SkipjackError):
                    raise

    async def _unless_gone(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What work gives, unless the client leaves before.

        Raises:
            _Gone: it has left; the work has ended too.
        """
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self._left())
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise _Gone
            return working.result()
        finally:
            for task in (working, leaving):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(working, leaving, return_exceptions=True)

    async def _left(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


class _Gone(Exception):
    """The client has left."""


async def _with_first(first: Chunk, stream: AsyncStream) -> AsyncIterator[Chunk]:
    yield first
    async for chunk in stream:
        yield chunk
