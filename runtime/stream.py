"""A request while it runs."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import groupby

from .methods.base import Method
from .request import Chunk, Output
from .sequence import Sequence
from .summary import summarise


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
    ) -> None:
        self._chunks, self._sequences, self._method = chunks, sequences, method
        self._backend, self._numerics, self._seed = backend, numerics, seed
        self._known_events = len(method.events())

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """End the request now; its pages are free when this returns."""
        self._chunks.close()

    @property
    def outputs(self) -> list[Output]:
        """One result per prompt, of what has been generated so far."""
        events = self._method.events()[self._known_events :]
        prompts = groupby(self._sequences, key=lambda sequence: sequence.index)
        return [
            summarise(list(own), self._method, self._backend, self._numerics, self._seed, events) for _, own in prompts
        ]
