"""Rounds captured as CUDA graphs, and several of them under way before the host has read the first."""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter
from weakref import WeakSet

import torch
from torch import Tensor

from ..kernels.compilation import Watch
from ..kernels.host import ints
from ..kernels.values import Logprobs
from .batch import Tally
from .cache import KVCache
from .decode import count
from .depths import Depths
from .methods.base import Method
from .model import Model
from .plan import LayerPlan
from .recipe import Recipe, Steps
from .request import MOST_SEQUENCES, Piece
from .round_graph import AHEAD, Key, RoundGraph
from .sampling import note
from .sequence import Sequence, firsts
from .speculate import commit

SIZES = tuple(1 << power for power in range(MOST_SEQUENCES.bit_length()))
# Graphs kept beside those that were prepared: every skip set that a search settles on has some of its own.
SPARE = 64


class Graphs:
    """The round graphs of an engine. A company of requests takes one for itself and gives it back.

    What was prepared stays; of the others at most SPARE wait to be taken, those that were used last.
    """

    def __init__(self, model: Model, cache: KVCache, watch: Watch | None = None) -> None:
        self._model, self._cache, self._watch = model, cache, watch or Watch(enabled=False)
        self._pool: object | None = None
        self._sharing: WeakSet[RoundGraph] = WeakSet()
        self._idle: dict[Key, list[RoundGraph]] = {}
        self._prepared: set[Key] = set()
        self._order = itertools.count()
        self.depths = Depths()
        self._coming: dict[Key, Future[RoundGraph]] = {}
        self._builder: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "skipjack-graphs")
        self.captured = 0
        # Those that have been captured and are still there, in use or kept for later.
        self.held: WeakSet[RoundGraph] = WeakSet()

    def take(self, recipe: Recipe, sequences: list[Sequence]) -> RoundGraph:
        """A graph for these sequences: of the next larger number of them, and of pages, a power of two."""
        return self._take(self.key(recipe, sequences))

    def prepare(self, recipe: Recipe, sequences: int, pages: int) -> None:
        """Have a graph for that recipe, number of sequences, one of SIZES, and number of pages, a power of two."""
        graph = self._take((recipe, sequences, pages))
        self._prepared.add(graph.key)
        graph.enqueue()
        graph.report()
        self.give(graph)

    def give(self, graph: RoundGraph) -> None:
        """Keep a graph for later. Nothing runs in it until then: its pages will be others'."""
        graph.stop()
        self._keep(graph)

    def has(self, recipe: Recipe, sequences: list[Sequence]) -> bool:
        """Whether `take` would find a graph whose kernels are compiled."""
        return bool(self._idle.get(self.key(recipe, sequences)))

    def expect(self, recipe: Recipe, sequences: list[Sequence]) -> bool:
        """Whether `take` need not compile anything; until then another thread does, for a later call to find it done.

        What went wrong on that thread is raised here.
        """
        key = self.key(recipe, sequences)
        if self.has(recipe, sequences) or self._builder is None:
            return True
        if key not in self._coming:
            self._coming[key] = self._builder.submit(self._build, key)
        for one in [one for one, graph in self._coming.items() if graph.done()]:
            if one == key or not self._coming[one].exception():
                self._keep(self._coming.pop(one).result())
        return self.has(recipe, sequences)

    def close(self) -> None:
        """Wait for what is being built; what went wrong with a graph nobody asked for is raised here."""
        if self._builder is not None:
            self._builder.shutdown(cancel_futures=True)
        self._builder, coming, self._coming = None, self._coming, {}
        for graph in coming.values():
            if not graph.cancelled():
                graph.result()

    @staticmethod
    def key(recipe: Recipe, sequences: list[Sequence]) -> Key:
        """What `take` looks for."""
        return (
            recipe,
            graph_size(len(sequences)),
            1 << (max(len(sequence.pages) for sequence in sequences) - 1).bit_length(),
        )

    def _take(self, key: Key) -> RoundGraph:
        idle = self._idle.get(key)
        graph = idle.pop() if idle else self._build(key)
        if not graph.captured:
            self._capture(graph)
            self.captured += 1
            self.held.add(graph)
        return graph

    def _capture(self, graph: RoundGraph) -> None:
        """Capture a graph that shares memory with the others.

        PyTorch captures into no pool that no graph has any more, nor into one that a capture has failed in.
        """
        if not self._sharing and self._model.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graph.capture(self._pool)
        except BaseException:
            self._sharing.clear()
            raise
        self._sharing.add(graph)

    def _keep(self, graph: RoundGraph) -> None:
        """Add a graph to those that wait, and let go of the one that has waited longest if they are too many."""
        graph.waiting_since = next(self._order)
        self._idle.setdefault(graph.key, []).append(graph)
        spare = [graphs for key, graphs in self._idle.items() if graphs and key not in self._prepared]
        if sum(map(len, spare)) > SPARE:
            oldest = min(spare, key=lambda graphs: graphs[0].waiting_since)
            oldest.pop(0)
        self._idle = {key: graphs for key, graphs in self._idle.items() if graphs}

    def _build(self, key: Key) -> RoundGraph:
        with self._watch, torch.inference_mode():
            return RoundGraph(self._model, self._cache, *key)


class Rounds:
    """The rounds of a company of requests on the device, read `AHEAD` rounds late.

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
        self._limit: int | None = None
        self._remembered: Tensor | None = None
        self._served: Recipe | None = None
        # What the method gave for the graph that serves.
        self._given: Recipe | None = None
        self._changed = False
        # When the host began to wait, and what the method has learnt for since the round before: seconds.
        self._since = self._learnt = 0.0

    @property
    def served(self) -> set[int]:
        """The ids of the sequences whose rounds are under way."""
        return set(map(id, self._members))

    def serves(self, sequences: list[Sequence]) -> bool:
        """Whether rounds of any of these are under way."""
        return not self.served.isdisjoint(map(id, sequences))

    def advance(self, running: list[Sequence]) -> dict[int, list[Piece]] | None:
        """What the oldest round under way adds to each sequence, by its id; all of them where their set has changed.

        None where this round needs the host, and none is under way: it is `speculate`'s.
        """
        given = self._method.recipe(running)
        recipe = None if given is None else self._at_hand(given, running)
        if self._graph is not None and (recipe != self._graph.recipe or self._members != running):
            late = self.drain()
            if any(late.values()):
                return late
        if recipe is None:
            return None
        self._since = perf_counter()
        if self._graph is None:
            self._graph, self._members = self._graphs.take(recipe, running), list(running)
            self._mask = self._threshold = self._limit = self._remembered = None
            self._served, self._changed = recipe, self._served not in (None, recipe)
            self._given = given
            self._graph.load(running, self._method)
        while self._graph.pending <= AHEAD:
            self._steer(self._graph)
            self._graph.enqueue()
            self._plans.append(self._method.plan if self._graph.recipe.masked else self._graph.recipe.plan)
        return self._read(self._graph)

    def close(self) -> None:
        """Give the graph back; what is under way is not read."""
        # An interrupt may drop a graph, but must not have it given back twice: it would serve two requests.
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.forget()
            self._graphs.give(graph)
        self._members = []
        self._plans.clear()

    def _at_hand(self, given: Recipe, running: list[Sequence]) -> Recipe:
        """The method's recipe as it is to be served, or while its graph is still to be built another that does as well.

        That is the masked one, which serves every skip set, the one that is serving, or the one with all draft steps.
        """
        recipe = self._graphs.depths.serve(self._method, given).choosing(running, self._model.config.vocab_size)
        graph = self._graph
        here = graph.recipe if graph and graph.key == self._graphs.key(graph.recipe, running) else None
        if here == recipe:
            return recipe
        if here and here.steps and recipe.steps and not here.steps.serves(recipe.steps):
            return recipe
        others = recipe.any_set, here, replace(recipe, num_draft_tokens=given.num_draft_tokens)
        ready = (one for one in others if one and one != recipe and (one == here or self._graphs.has(one, running)))
        other = next(ready, None)
        if other is None or other.sampled != recipe.sampled:
            return recipe
        return recipe if self._graphs.expect(recipe, running) else other

    def _steer(self, graph: RoundGraph) -> None:
        """Tell the device what the method has changed since the last round."""
        draft = self._method.plan
        if graph.recipe.masked and draft != self._mask:
            _tell(graph.state.mask, torch.tensor(draft.mask))
            self._mask = draft
        if graph.recipe.confident and self._method.threshold != self._threshold:
            graph.state.threshold.fill_(self._method.threshold)
            self._threshold = self._method.threshold
        if graph.recipe.limited and self._method.limit != self._limit:
            graph.state.limit.fill_(self._method.limit)
            self._limit = self._method.limit
        held, known = graph.state.remembered, self._method.remembered
        if held is not None and known is not None and known is not self._remembered:
            _tell(held, known)
            self._remembered = known

    def drain(self) -> dict[int, list[Piece]]:
        """Read every round under way and give the graph back."""
        pieces: dict[int, list[Piece]] = {id(sequence): [] for sequence in self._members}
        while self._graph is not None and self._graph.pending:
            for key, new in self._read(self._graph).items():
                pieces[key] += new
        if self._graph is not None:
            self._graph.unload(self._members, self._method)
        self.close()
        return pieces

    def _read(self, graph: RoundGraph) -> dict[int, list[Piece]]:
        """Commit the oldest round under way; a sequence that has ended gets nothing of it."""
        (report, logprobs), plan = graph.report(), self._plans.popleft()
        now = perf_counter()
        # The device goes on while the caller has its tokens and while the method learns: then the host waits less than
        # the round takes, and learning takes no time but what is longer.
        waited, self._since = now - self._since, now
        seconds = max(waited, graph.took)
        learnt = max(0.0, waited + self._learnt - seconds)
        running = [(row, sequence) for row, sequence in enumerate(self._members) if sequence.finish_reason is None]
        for _, sequence in running:
            sequence.enter(self._method.phase())
        if graph.recipe.steps is None:
            pieces, self._learnt = self._speculated(running, report, graph.recipe, plan, seconds)
        else:
            pieces, self._learnt = self._decoded(running, report, graph.recipe.steps), 0.0
        if all(sequence.finish_reason is not None for _, sequence in running):
            # Nothing comes after it that it could be hidden by.
            learnt, self._learnt = learnt + self._learnt, 0.0
        for row, sequence in running:
            if logprobs is not None:
                note(sequence, pieces[id(sequence)], Logprobs(*(part[row] for part in logprobs)))
        for sequence in firsts(sequence for _, sequence in running):
            sequence.counters.search_s += learnt
            sequence.counters.decode_s += seconds + learnt
        self._since += self._learnt
        return {id(sequence): pieces.get(id(sequence), []) for sequence in self._members}

    def _speculated(
        self, running: list[tuple[int, Sequence]], report: Tensor, recipe: Recipe, plan: LayerPlan, seconds: float
    ) -> tuple[dict[int, list[Piece]], float]:
        """What `device_round` gave the sequences still `running`, by their rows, and the seconds the method took."""
        pieces: dict[int, list[Piece]] = {}
        told: list[tuple[Sequence, int, int, int, int]] = []
        for row, sequence in running:
            accepted, drafted, depth, token, *draft = ints(report[0, row])
            pieces[id(sequence)] = commit(sequence, [*draft[:accepted], token], drafted, depth)
            told.append((sequence, drafted, depth, accepted, max(1, len(pieces[id(sequence)]))))
            counters = sequence.counters
            counters.rounds += 1
            counters.graph_rounds += 1
            counters.executed_skips += plan.skipped * depth + self._method.target.skipped
        if not told:
            return pieces, 0.0
        members, drafts, depths, accepts, emits = (list(column) for column in zip(*told, strict=True))
        if self._given is not None:
            self._graphs.depths.count(self._method, self._given, recipe.num_draft_tokens, max(depths), max(accepts))
        tally = Tally(members, drafts, depths, accepts, emits, 0.0, seconds, recipe, self._changed)
        self._changed = False
        return pieces, self._method.count(self._model, self._cache, tally)

    def _decoded(self, running: list[tuple[int, Sequence]], report: Tensor, steps: Steps) -> dict[int, list[Piece]]:
        """What `device_steps` gave them, step by step: a sequence takes no more once it has ended."""
        pieces: dict[int, list[Piece]] = {id(sequence): [] for _, sequence in running}
        for number in range(steps.count):
            told = [
                (sequence, ints(report[number, row])) for row, sequence in running if sequence.finish_reason is None
            ]
            most = max((ran for _, (_, ran, _, _) in told), default=0) / 2
            for sequence, (_, ran, _, token) in told:
                new = sequence.extend([token], 0)
                if new:
                    count(sequence, self._model.config, ran / 2, most if steps.whole else None)
                    sequence.counters.graph_rounds += 1
                pieces[id(sequence)] += new
        return pieces


def _tell(held: Tensor, values: Tensor) -> None:
    """Write values of the host for the rounds enqueued from here on.

    From pinned memory, or the host would wait for the rounds under way.
    """
    held.copy_(values.pin_memory() if held.is_cuda else values, non_blocking=True)


def graph_size(sequences: int) -> int:
    """The number of sequences of the graph that serves so many."""
    return next(size for size in SIZES if size >= sequences)
