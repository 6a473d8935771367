"""JSON files of a model folder, read with limits: size, encoding, duplicate keys, depth."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Final, NoReturn, cast

from .errors import SkipjackError

MAX_PARTS: Final = 2_000_000
GIT_LFS_POINTER: Final = b"version https://git-lfs"


class _DuplicateKeyError(ValueError):
    pass


def as_object(value: object) -> dict[str, object] | None:
    """The value if it is a JSON object."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else None


def as_list(value: object) -> list[object] | None:
    """The value if it is a JSON list."""
    return cast("list[object]", value) if isinstance(value, list) else None


def shown(value: object, limit: int = 80) -> str:
    """`repr` of a value found in a file, on one line and short enough for an error message."""
    entries = as_object(value) or as_list(value) or ()
    if len(entries) > 64:
        return f"a {type(value).__name__} of {len(entries)} entries"
    try:
        text = _repr_start(value, limit)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _repr_start(value: object, limit: int) -> str:
    if isinstance(value, (str, bytes)):
        return repr(value[: limit + 1])
    return repr(value)


def present(path: Path, error: type[SkipjackError]) -> bool:
    """Whether there is a file, or what else; a link that leads nowhere is not taken for nothing.

    Raises:
        error: it is such a link.
    """
    if os.path.islink(path) and not os.path.exists(path):
        raise error(f"{path}: expected a file, found a link that leads nowhere")
    return os.path.exists(path)


def refuse_pointer(path: Path, start: bytes, error: type[SkipjackError]) -> None:
    """Raise `error` for a file whose first bytes are those of what Git leaves of one it did not fetch."""
    if start.startswith(GIT_LFS_POINTER):
        raise error(f"{path}: expected the content of a file, found a Git LFS pointer to one: run `git lfs pull`")


def read_bytes(path: Path, limit: int, error: type[SkipjackError]) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises:
        error: no such file, not a regular file, a pointer of Git LFS, larger than `limit`, or unreadable.
    """
    try:
        # O_NONBLOCK: opening a FIFO must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise error(f"{path}: expected a regular file, found another kind")
            if status.st_size > limit:
                raise error(f"{path}: expected at most {limit} bytes, found {status.st_size}")
            content = file.read(limit + 1)
    except FileNotFoundError:
        present(path, error)
        raise error(f"{path}: expected a file, found none") from None
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read: {_one_line(problem)}") from None
    if len(content) > limit:
        raise error(f"{path}: expected at most {limit} bytes, found more")
    refuse_pointer(path, content, error)
    return content


def parse_object(content: bytes, source: str, error: type[SkipjackError]) -> dict[str, object]:
    """A JSON object from UTF-8 bytes; `source` names the file in errors.

    Raises:
        error: not UTF-8, not JSON, not an object, a key twice, NaN or Infinity, too many parts, or nested too deeply.
    """

    # Every value of a list or object takes one of these bytes: a bound on memory before anything is built.
    parts = sum(content.count(byte) for byte in b"[{,")
    if parts > MAX_PARTS:
        raise error(f"{source}: expected at most {MAX_PARTS} lists, objects and commas, found {parts}")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise _DuplicateKeyError(f"{source}: expected each key once, found {shown(key)} twice")
                seen.add(key)
        return fields

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        parsed: object = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as problem:
        raise error(f"{source}: expected UTF-8, found byte 0x{content[problem.start]:02x} at {problem.start}") from None
    except _DuplicateKeyError as problem:
        raise error(str(problem)) from None
    except ValueError as problem:
        raise error(f"{source}: expected JSON, found: {_one_line(problem)}") from None
    except RecursionError:
        raise error(f"{source}: expected JSON of moderate depth, found too many nested brackets") from None
    if not isinstance(parsed, dict):
        raise error(f"{source}: expected a JSON object, found a {type(parsed).__name__}")
    return cast("dict[str, object]", parsed)


def read_object(path: Path, limit: int, error: type[SkipjackError]) -> dict[str, object]:
    """The JSON object in a file of at most `limit` bytes. Raises `error` as `read_bytes` and `parse_object` do."""
    return parse_object(read_bytes(path, limit, error), str(path), error)


def _one_line(problem: Exception) -> str:
    reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return " ".join(reason.split())[:160]
