"""The parts of a round as named ranges, which profilers show above the kernels.

`prefill` and `round` lie side by side; `draft[i]`, `verify`, `commit` and `search` lie in a round. A name ends with the
sequences and the rows of its pass, padding aside: `verify S=2 R=16`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from .errors import RequestError

VARIABLE = "SKIPJACK_RANGES"
KINDS = ("off", "torch", "nvtx")
_NOTHING = nullcontext()


class Mark(Protocol):
    """A range around one part of a round; `step` numbers the passes of a draft."""

    def __call__(
        self, part: str, sequences: int, rows: int, step: int | None = None
    ) -> AbstractContextManager[object]: ...


def unmarked(part: str, sequences: int, rows: int, step: int | None = None) -> AbstractContextManager[object]:
    """No range."""
    return _NOTHING


def marks(kind: str | None = None) -> Mark:
    """What marks the ranges: "nvtx" for Nsight, "torch" for the torch profiler, "off" nothing.

    Without a kind, the environment variable SKIPJACK_RANGES says it, and without that they are off.

    Raises:
        RequestError: the kind is not one of these, or this torch has no NVTX.
    """
    chosen = kind or os.environ.get(VARIABLE) or "off"
    if chosen not in KINDS:
        raise RequestError(f"ranges: expected one of {', '.join(KINDS)}, got {chosen!r}")
    return {"off": lambda: unmarked, "torch": _torch, "nvtx": _nvtx}[chosen]()


def name_of(part: str, sequences: int, rows: int, step: int | None = None) -> str:
    """How a range is spelled."""
    return f"{part}{'' if step is None else f'[{step}]'} S={sequences} R={rows}"


def _torch() -> Mark:
    from torch.profiler import record_function

    def mark(part: str, sequences: int, rows: int, step: int | None = None) -> AbstractContextManager[object]:
        return record_function(name_of(part, sequences, rows, step))

    return mark


def _nvtx() -> Mark:
    from torch.cuda import nvtx

    try:
        nvtx.mark("skipjack")
    except RuntimeError as error:
        raise RequestError(f"ranges: expected off or torch where torch has no NVTX, got nvtx: {error}") from error

    def mark(part: str, sequences: int, rows: int, step: int | None = None) -> AbstractContextManager[object]:
        return nvtx.range(name_of(part, sequences, rows, step))

    return mark
