"""A round captured as a CUDA graph, and the ring in which its reports come to the host."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ..kernels.values import Logprobs
from .batch import Batch
from .cache import KVCache
from .methods.base import Method
from .model import Model
from .recipe import Recipe
from .reshaping import reshaping
from .round import State, device_round, device_steps
from .sequence import Sequence

Key = tuple[Recipe, int, int]
# Rounds enqueued beyond the one whose tokens the host is reading.
AHEAD = 2
# Captures under way, and those that could not begin, or could not end by what another thread did: PyTorch's allocator
# (before 2.12) goes on asking them.
_OPEN: list[torch.cuda.CUDAGraph] = []
# PyTorch allows a process one capture at a time, whatever engines there are in it. The handler of a signal that comes
# to one in the middle of another must not wait for itself.
_CAPTURING = RLock()


class RoundGraph:
    """One recipe for up to a number of sequences and pages a sequence, with the state it works on.

    On a GPU it is captured once and replayed; elsewhere the same function is called. To make one compiles the kernels
    and may take seconds, on any thread; to capture it takes the host's part of a round.
    """

    def __init__(self, model: Model, cache: KVCache, recipe: Recipe, sequences: int, pages: int) -> None:
        self.recipe, self.sequences, self.pages = recipe, sequences, pages
        self._model, self._cache = model, cache
        self.state = State.empty(model, recipe, sequences, pages, AHEAD + 1)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.captured, self.waiting_since = False, 0
        pinned = model.device.type == "cuda"
        if pinned:
            self._compile()
        self._reports = self.state.report.view(AHEAD + 1, -1, *self.state.report.shape[1:])
        self._logprobs = [
            [torch.zeros_like(part, device="cpu", pin_memory=pinned) for part in self.state.logprobs or ()]
            for _ in range(AHEAD + 1)
        ]
        self._events = [_begin_and_end() for _ in self._logprobs] if pinned else None
        self._written = self._read = 0
        # Seconds of the round whose report was read last, where the device tells.
        self.took = 0.0

    @property
    def key(self) -> Key:
        return self.recipe, self.sequences, self.pages

    @property
    def pending(self) -> int:
        """Rounds whose report has not been read."""
        return self._written - self._read

    def capture(self, pool: Any) -> None:
        """Record the round, on a GPU; nothing of it runs, and rounds under way on other graphs go on.

        Graphs of one `pool` share the memory of what lives within a round: they run one after the other.

        `torch.cuda.graph` would wait for those first, and empty the allocator's cache.
        """
        if self._model.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with _CAPTURING, torch.cuda.stream(_capture_stream(self._model.device)), _uncollected():
                _OPEN.append(graph)
                try:
                    # Other threads of the host process may go on using the GPU. A signal that comes while a capture
                    # begins is handled as soon as it has.
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    self._run()
                finally:
                    if torch.cuda.is_current_stream_capturing():
                        graph.capture_end()
                        _OPEN.remove(graph)
            self._graph = graph
        self.captured = True

    def load(self, sequences: list[Sequence], method: Method) -> None:
        """Start from where these sequences stand; every report has been read."""
        idle = self.sequences - len(sequences)
        batch = Batch.of(sequences, self._model.ops.decode_tile, self._model.device)
        last, length, *_, commits = self.state.progress
        for target, source in zip(
            (last, length, self.state.prompt), (batch.last, batch.length, batch.prompt), strict=True
        ):
            target[: len(sequences)] = source
        # The slot that the report of the next round is read from.
        commits.fill_(self._written * self._reports.shape[1])
        for row, sequence in enumerate(sequences):
            if (memory := method.memory(sequence)) is not None:
                self.state.memory[row] = memory
            if self.state.text is not None:
                self.state.text[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens, dtype=torch.int32)
        self.state.allow(torch.cat([batch.room + 1, torch.zeros(idle, dtype=torch.int64, device=batch.device)]))
        self.state.block_table[: len(sequences), : batch.block_table.shape[1]] = batch.block_table
        if self.recipe.sampled:
            for target, source in zip(self.state.sampling, batch.sampling(), strict=True):
                target[: len(sequences)] = source
        if self.state.reshaping is not None:
            given = reshaping(sequences, self._model.config.vocab_size, self._model.device)
            for target, source in zip(self.state.reshaping, given, strict=True):
                target[: len(sequences)] = source

    def unload(self, sequences: list[Sequence], method: Method) -> None:
        """Leave with the sequences it was loaded with what it remembers of them; every report has been read."""
        for row, sequence in enumerate(sequences):
            if (memory := method.memory(sequence)) is not None:
                memory.copy_(self.state.memory[row])

    def enqueue(self) -> None:
        """One round more; its report is on the host as soon as it is there."""
        place = self._written % len(self._reports)
        if self._events is not None:
            self._events[place][0].record()
        with self._model.mark("round", self.sequences, self.sequences):
            if self._graph is None:
                self._run()
            else:
                self._graph.replay()
        for target, source in zip(self._logprobs[place], self.state.logprobs or (), strict=True):
            target.copy_(source, non_blocking=True)
        if self._events is not None:
            self._events[place][1].record()
        self._written += 1

    def report(self) -> tuple[Tensor, Logprobs | None]:
        """The oldest report that has not been read, int64 [steps, S, …], and its logprobs; waits for its round."""
        place = self._read % len(self._reports)
        if self._events is not None:
            begin, end = self._events[place]
            end.synchronize()
            self.took = begin.elapsed_time(end) / 1e3
        self._read += 1
        logprobs = [part.clone() for part in self._logprobs[place]]
        return self._reports[place].clone(), Logprobs(*logprobs) if logprobs else None

    def forget(self) -> None:
        """Read no report of what is under way."""
        self._read = self._written

    def stop(self) -> None:
        """No sequence has tokens left, until others are loaded."""
        self.state.allow(torch.zeros_like(self.state.progress.left))
        if self._events is not None:
            self._events[(self._written - 1) % len(self._events)][1].record()

    def __del__(self) -> None:
        """The device writes reports into memory of the host, which must not be another's before it has."""
        with suppress(Exception):  # One that was never whole, or whose device is gone.
            self.settle()

    def settle(self) -> None:
        """Wait until nothing of it is under way, read or not."""
        if self._events is not None:
            # Also where no round was counted: one may have been interrupted before it was, and `stop` came after it.
            self._events[(self._written - 1) % len(self._events)][1].synchronize()

    def _run(self) -> None:
        recipe = self.recipe
        if recipe.steps is None:
            device_round(self._model, self._cache, self.state, recipe)
        else:
            device_steps(self._model, self._cache, self.state, recipe.steps, recipe.sampled)

    def _compile(self) -> None:
        # No sequence is alive yet: the round that compiles the kernels touches no page that anybody has.
        side = _side_stream(self._model.device)
        side.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(side):
            self._run()
            self.state.progress.commits.zero_()
        side.synchronize()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream graphs are compiled on: one, for the allocator keeps for each what was once allocated there."""
    return torch.cuda.Stream(device)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream graphs are captured on: one, or they could not share memory."""
    return torch.cuda.Stream(device)


@contextmanager
def _uncollected() -> Generator[None]:
    """No garbage is collected: a graph that is found there waits for its device, which nobody may during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _begin_and_end() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
