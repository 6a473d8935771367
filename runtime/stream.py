"""A request while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from itertools import groupby
from typing import Any, TypeAlias

from .methods.base import Method
from .request import Chunk, Output
from .sequence import Sequence
from .summary import summarise

# What a method told of the rounds of a request; the oldest are forgotten where there are too many.
Events: TypeAlias = deque[Mapping[str, Any]]


class Stream(Iterator[Chunk]):
    """The chunks of a request as they come. Closing it early, or dropping it, frees what the request holds."""

    def __init__(
        self,
        chunks: Generator[Chunk, None, None],
        sequences: list[Sequence],
        method: Method,
        backend: str,
        numerics: str,
        seed: int,
        events: Events,
    ) -> None:
        self._chunks, self._sequences, self._method = chunks, sequences, method
        self._backend, self._numerics, self._seed = backend, numerics, seed
        self._events = events

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """End the request now; its pages are free when this returns."""
        self._chunks.close()

    @property
    def outputs(self) -> list[Output]:
        """One result per prompt, of what has been generated so far."""
        events = list(self._events)
        prompts = groupby(self._sequences, key=lambda sequence: sequence.index)
        return [
            summarise(list(own), self._method, self._backend, self._numerics, self._seed, events) for _, own in prompts
        ]
