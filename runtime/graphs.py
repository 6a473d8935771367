"""Rounds captured as CUDA graphs, and several of them under way before the host has read the first."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..kernels.host import ints
from .batch import Batch, Recipe, Tally
from .cache import KVCache
from .costs import weight_pass
from .methods.base import Method, sampled
from .methods.policy import Policy
from .model import Model
from .plan import LayerPlan
from .request import Piece
from .round import State, device_round
from .sequence import Sequence
from .speculate import commit

# Rounds enqueued beyond the one whose tokens the host is reading.
AHEAD = 2
SEQUENCES = (1, 2, 4, 8, 16)


class RoundGraph:
    """One recipe for up to a number of sequences and pages a sequence, with the state it works on.

    On a GPU it is captured once and replayed; elsewhere the same function is called.
    """

    def __init__(
        self, model: Model, cache: KVCache, recipe: Recipe, sequences: int, pages: int, pool: Any = None
    ) -> None:
        self.recipe, self.sequences, self.pages = recipe, sequences, pages
        self._model, self._cache = model, cache
        sublayers = 2 * model.config.num_layers
        self.state = State.empty(sequences, pages, sublayers, recipe.num_draft_tokens, model.device)
        self._graph = self._capture(pool) if model.device.type == "cuda" else None
        pinned = model.device.type == "cuda"
        self._ring = [torch.zeros_like(self.state.report, device="cpu", pin_memory=pinned) for _ in range(AHEAD + 1)]
        self._events = [torch.cuda.Event() for _ in self._ring] if pinned else None
        self._written = self._read = 0

    @property
    def pending(self) -> int:
        """Rounds whose report has not been read."""
        return self._written - self._read

    def load(self, sequences: list[Sequence]) -> None:
        """Start from where these sequences stand; every report has been read."""
        idle = self.sequences - len(sequences)
        batch = Batch.of(sequences, self._model.ops.decode_tile, self._model.device)
        for target, source in zip(self.state[:2], (batch.last, batch.length), strict=True):
            target[: len(sequences)] = source
        self.state.left.copy_(torch.cat([batch.room + 1, torch.zeros(idle, dtype=torch.int64, device=batch.device)]))
        self.state.block_table[: len(sequences), : batch.block_table.shape[1]] = batch.block_table
        if self.recipe.sampled:
            for target, source in zip(self.state.sampling, batch.sampling(), strict=True):
                target[: len(sequences)] = source

    def enqueue(self) -> None:
        """One round more; its report goes to the host as soon as it is there."""
        with self._model.mark("round", self.sequences, self.sequences):
            if self._graph is None:
                device_round(self._model, self._cache, self.state, self.recipe)
            else:
                self._graph.replay()
        place = self._written % len(self._ring)
        self._ring[place].copy_(self.state.report, non_blocking=True)
        if self._events is not None:
            self._events[place].record()
        self._written += 1

    def report(self) -> Tensor:
        """The oldest report that has not been read, on the host; waits for its round."""
        place = self._read % len(self._ring)
        if self._events is not None:
            self._events[place].synchronize()
        self._read += 1
        return self._ring[place].clone()

    def forget(self) -> None:
        """Read no report of what is under way."""
        self._read = self._written

    def _capture(self, pool: Any) -> torch.cuda.CUDAGraph:
        # No sequence is alive yet: the rounds that compile the kernels and that are captured touch no page.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            device_round(self._model, self._cache, self.state, self.recipe)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the host process may go on using the GPU.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            device_round(self._model, self._cache, self.state, self.recipe)
        return graph


class Graphs:
    """The round graphs of an engine. A request takes one for itself and gives it back."""

    def __init__(self, model: Model, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._idle: dict[tuple[Recipe, int, int], list[RoundGraph]] = {}
        self.captured = 0
        # Graphs share the memory of what lives within a round: they run one after the other, on one stream.
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def take(self, recipe: Recipe, sequences: list[Sequence]) -> RoundGraph:
        """A graph for these sequences: of the next larger number of them, and of pages, a power of two."""
        count = next(size for size in SEQUENCES if size >= len(sequences))
        pages = 1 << (max(len(sequence.pages) for sequence in sequences) - 1).bit_length()
        return self._graph(recipe, count, pages)

    def prepare(self, recipe: Recipe, sequences: int, pages: int) -> None:
        """Have a graph for that recipe, number of sequences, one of SEQUENCES, and number of pages, a power of two."""
        graph = self._graph(recipe, sequences, pages)
        graph.enqueue()
        graph.report()
        self.give(graph)

    def give(self, graph: RoundGraph) -> None:
        self._idle[graph.recipe, graph.sequences, graph.pages].append(graph)

    def _graph(self, recipe: Recipe, sequences: int, pages: int) -> RoundGraph:
        idle = self._idle.setdefault((recipe, sequences, pages), [])
        if not idle:
            self.captured += 1
            idle.append(RoundGraph(self._model, self._cache, recipe, sequences, pages, self._pool))
        return idle.pop()


class Rounds:
    """The rounds of one request on the device, read `AHEAD` rounds late.

    Only the host knows stop strings and end-of-text tokens: rounds under way when a sequence ends are read and, for
    that sequence, thrown away. They stay within the pages it reserved.
    """

    def __init__(self, graphs: Graphs, model: Model, cache: KVCache, method: Method) -> None:
        self._graphs, self._model, self._cache, self._method = graphs, model, cache, method
        self._graph: RoundGraph | None = None
        self._members: list[Sequence] = []
        self._plans: deque[LayerPlan] = deque()
        self._mask: LayerPlan | None = None
        self._threshold: float | None = None
        self._since = 0.0

    def advance(self, running: list[Sequence]) -> list[list[Piece]] | None:
        """What the oldest round under way adds to each running sequence, or all of them where their set has changed.

        None where this round needs the host, and none is under way: it is `speculate`'s.
        """
        recipe = self._method.recipe(running) if all(_on_device(sequence) for sequence in running) else None
        if recipe is not None:
            recipe = replace(recipe, sampled=sampled(running))
        if self._graph is not None and (recipe != self._graph.recipe or self._members != running):
            late = self._drain()
            if any(late.values()):
                return [late.get(id(sequence), []) for sequence in running]
        if recipe is None:
            return None
        self._since = perf_counter()
        if self._graph is None:
            self._graph, self._members = self._graphs.take(recipe, running), list(running)
            self._mask = self._threshold = None
            self._graph.load(running)
        while self._graph.pending <= AHEAD:
            self._steer(self._graph)
            self._graph.enqueue()
            self._plans.append(self._method.plan)
        read = self._read(self._graph)
        return [read[id(sequence)] for sequence in running]

    def close(self) -> None:
        """Give the graph back; what is under way is not read."""
        if self._graph is not None:
            self._graph.forget()
            self._graphs.give(self._graph)
        self._graph, self._members = None, []
        self._plans.clear()

    def _steer(self, graph: RoundGraph) -> None:
        """Tell the device what the method has changed since the last round."""
        draft = self._method.plan
        if graph.recipe.masked and draft != self._mask:
            graph.state.mask.copy_(torch.tensor(draft.runs, device=self._model.device))
            self._mask = draft
        if graph.recipe.confident and self._method.threshold != self._threshold:
            graph.state.threshold.fill_(self._method.threshold)
            self._threshold = self._method.threshold

    def _drain(self) -> dict[int, list[Piece]]:
        """Read every round under way and give the graph back."""
        pieces: dict[int, list[Piece]] = {id(sequence): [] for sequence in self._members}
        while self._graph is not None and self._graph.pending:
            for key, new in self._read(self._graph).items():
                pieces[key] += new
        self.close()
        return pieces

    def _read(self, graph: RoundGraph) -> dict[int, list[Piece]]:
        """Commit the oldest round under way; a sequence that has ended gets nothing of it."""
        report, plan = graph.report(), self._plans.popleft()
        now = perf_counter()
        seconds, self._since = now - self._since, now
        layers = self._model.config.num_layers
        pieces: dict[int, list[Piece]] = {}
        told: list[tuple[Sequence, int, int, int]] = []
        for row, sequence in enumerate(self._members):
            accepted, drafted, token, ran, *draft = ints(report[row])
            if sequence.finish_reason is not None or accepted < 0:
                pieces[id(sequence)] = []
                continue
            sequence.enter(self._method.phase())
            pieces[id(sequence)] = commit(sequence, [*draft[:accepted], token], None, drafted, drafted)
            told.append((sequence, drafted, accepted, len(pieces[id(sequence)])))
            counters = sequence.counters
            counters.rounds += 1
            counters.graph_rounds += 1
            counters.executed_skips += plan.skipped * drafted + 2 * layers - ran
            if isinstance(self._method, Policy):
                sequence.layers_used.append(ran / 2)
                if self._model.config.routing is None:
                    counters.weight_passes += weight_pass(self._model.config, ran / 2)
        if told:
            members, drafts, accepts, emits = (list(column) for column in zip(*told, strict=True))
            tally = Tally(members, drafts, accepts, emits, 0.0, seconds)
            searched = self._method.count(self._model, self._cache, tally)
            for sequence in tally.sequences:
                sequence.counters.search_s += searched
                sequence.counters.decode_s += seconds + searched
            self._since += searched
        return pieces


def _on_device(sequence: Sequence) -> bool:
    """Whether its tokens are chosen by nothing that the host must see first."""
    return not sequence.params.reshapes_logits and sequence.params.logprobs is None
