"""Errors as clients see them: OpenAI's objects, with the statuses of HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ..errors import AbortedError, BusyError, CapacityError, CompilationError, SkipjackError

RETRY_AFTER = {"Retry-After": "1"}
MAX_MESSAGE = 1000
# Where the model lies on this machine is not for clients.
FOLDER = re.compile(r"^.*[/\\](?=\w+\.(?:json|jinja): )")


def fault(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] = {}
) -> JSONResponse:
    """A response that says what is wrong."""
    return JSONResponse({"error": described(status, message, param, code)}, status, headers)


def described(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": FOLDER.sub("", message)[:MAX_MESSAGE], "type": kind, "param": param, "code": code}


def status_of(error: Exception) -> int:
    """Whose fault it is, and whether a later try may succeed."""
    if isinstance(error, (BusyError, AbortedError)):
        return 503
    if isinstance(error, CapacityError):
        return 413
    return 400 if isinstance(error, SkipjackError) and not isinstance(error, CompilationError) else 500


def said_of(error: Exception) -> str:
    """What went wrong, in words."""
    return str(error) if isinstance(error, SkipjackError) else f"{type(error).__name__}: {error}"


async def skipjack_fault(request: Request, error: Exception) -> JSONResponse:
    """What the engine refuses."""
    status = status_of(error)
    field, colon, _ = str(error).partition(":")
    named = colon and status == 400 and re.fullmatch(r"[\w.\[\]]+", field)
    return fault(status, str(error), param=field if named else None, headers=RETRY_AFTER if status == 503 else {})


async def invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is not what it should be; of several mistakes the first."""
    assert isinstance(error, RequestValidationError)
    mistakes = error.errors()
    first = mistakes[0]
    if first["type"] == "json_invalid":
        return fault(400, f"body: expected JSON: {first['ctx']['error']}, at character {first['loc'][1]}")
    # Of a field that may be one thing or another, whichever came further.
    field = _path(first["loc"])
    first = max((one for one in mistakes if _path(one["loc"])[: len(field)] == field), key=lambda one: len(one["loc"]))
    place = _place(first["loc"])
    said = "is not known here" if first["type"] == "extra_forbidden" else _sentence(first["msg"])
    return fault(400, f"{place}: {said}", param=place)


async def http_fault(request: Request, error: Exception) -> JSONResponse:
    """An address or a way of asking that there is not."""
    assert isinstance(error, HTTPException)
    return fault(error.status_code, f"{request.method} {request.url.path}: {error.detail}", headers=error.headers or {})


async def broken(request: Request, error: Exception) -> JSONResponse:
    """What is nobody's fault but this program's or its machine's."""
    return fault(500, said_of(error))


def _place(location: Sequence[object]) -> str:
    """`messages[0].content` from the path to it, whose first part is "body"."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in _path(location)]
    return "".join(parts).removeprefix(".") or "body"


def _path(location: Sequence[object]) -> list[object]:
    """Fields and numbers without what kind of value was tried: "str", "list[str]"."""
    return [part for part in location[1:] if part != "str" and not (isinstance(part, str) and "[" in part)]


def _sentence(message: str) -> str:
    return message[:1].lower() + message[1:]
