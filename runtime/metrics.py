"""What an engine tells of itself while it runs: read by any thread, which waits for nobody."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .cache import KVCache
from .graphs import Graphs
from .sequence import Sequence

if TYPE_CHECKING:
    from .run import Run

SUMMED = ("rounds", "graph_rounds", "drafted", "accepted", "bonus")
SECONDS = {"prefill_seconds": "prefill_s", "decode_seconds": "decode_s", "search_seconds": "search_s"}


@dataclass(frozen=True)
class Totals:
    """Everything so far: none of these ever falls. `first_tokens` + `accepted` + `bonus` = `completion_tokens`."""

    requests_finished: int = 0
    requests_aborted: int = 0
    requests_failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_tokens: int = 0
    completion_tokens: int = 0
    rounds: int = 0
    graph_rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    bonus: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    search_seconds: float = 0.0
    graphs_captured: int = 0


@dataclass(frozen=True)
class Metrics(Totals):
    """An engine at one moment: what it has done in all, and what is under way.

    The fields of `Totals` are counters. `prompt_tokens` are of prompts read to the end, each once whatever `n` is;
    times are sums of `Stats`, seconds, to which a round that prompts share counts for each of them. `pages_leaked` are
    held by nobody, as of the last request that ended, and always 0 unless something is wrong.
    """

    requests_running: int = 0
    requests_waiting: int = 0
    sequences_running: int = 0
    sequences_waiting: int = 0
    pages: int = 0
    pages_free: int = 0
    pages_leaked: int = 0
    graphs_held: int = 0
    compilations: int = 0

    @property
    def pages_held(self) -> int:
        """Pages that requests have."""
        return max(0, self.pages - self.pages_free - self.pages_leaked)

    @property
    def counters(self) -> dict[str, float]:
        """What never falls, by name."""
        return {field.name: getattr(self, field.name) for field in fields(Totals)}

    @property
    def gauges(self) -> dict[str, float]:
        """What rises and falls, by name."""
        names = [field.name for field in fields(self) if field.name not in self.counters]
        return {name: getattr(self, name) for name in (*names, "pages_held")}


class Standing(NamedTuple):
    """What has ended and what is under way: requests, and sequences that have begun and may have pages."""

    totals: Totals
    runs: frozenset[Run]
    running: tuple[Sequence, ...]
    leaked: int


class Ledger:
    """The requests of an engine, those under way and the sum of those that have ended.

    Everything is written within a turn and replaced as a whole, so that who reads needs none: a sequence is either
    among those running, whose own counters are read, or in the totals. To write the same again changes nothing.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._now = Standing(Totals(), frozenset(), (), 0)

    @property
    def runs(self) -> frozenset[Run]:
        """The requests under way."""
        return self._now.runs

    def enter(self, run: Run) -> None:
        """A request is under way."""
        self._now = self._now._replace(runs=self._now.runs | {run})

    def begin(self, sequence: Sequence) -> None:
        """A sequence has its pages, and its prompt will be read."""
        self._now = self._now._replace(running=(*self._now.running, sequence))

    def end(self, sequences: Iterable[Sequence]) -> None:
        """Those of `sequences` that had begun have ended, and nothing counts for them any more."""
        self._now = self._without(sequences)

    def leave(self, run: Run, end: Literal["finished", "aborted", "failed"]) -> None:
        """A request has ended, and has no pages."""
        if run not in self._now.runs:
            return
        totals, runs, running, _ = self._without(run.sequences)
        name = f"requests_{end}"
        totals, runs = replace(totals, **{name: getattr(totals, name) + 1}), runs - {run}
        owned = sum(len(sequence.pages) for sequence in running) + sum(other.granted for other in runs)
        leaked = self._cache.total_pages - self._cache.free_pages - owned
        self._now = Standing(totals, runs, running, leaked)

    def metrics(self, graphs: Graphs | None, compilations: int) -> Metrics:
        """How it stands, for any thread at any time."""
        now = self._now
        return Metrics(
            **vars(replace(_including(now.totals, now.running), graphs_captured=graphs.captured if graphs else 0)),
            requests_running=len(now.runs),
            requests_waiting=sum(run.waits for run in now.runs),
            sequences_running=len(now.running),
            sequences_waiting=sum(run.queued for run in now.runs),
            pages=self._cache.total_pages,
            pages_free=self._cache.free_pages,
            pages_leaked=now.leaked,
            graphs_held=len(graphs.held) if graphs else 0,
            compilations=compilations,
        )

    def _without(self, sequences: Iterable[Sequence]) -> Standing:
        now, gone = self._now, set(map(id, sequences))
        ended = [sequence for sequence in now.running if id(sequence) in gone]
        running = tuple(sequence for sequence in now.running if id(sequence) not in gone)
        return now._replace(totals=_including(now.totals, ended), running=running)


def _including(totals: Totals, sequences: Collection[Sequence]) -> Totals:
    """Totals with what sequences have come to so far."""
    begun = [sequence for sequence in sequences if sequence.generated]
    counters = [sequence.counters for sequence in sequences]
    added: dict[str, Any] = {name: sum(getattr(one, name) for one in counters) for name in SUMMED}
    added |= {name: sum(getattr(one, field) for one in counters) for name, field in SECONDS.items()}
    added["prompt_tokens"] = sum(len(sequence.prompt) for sequence in begun if sequence.choice == 0)
    added["cached_tokens"] = sum(sequence.known for sequence in begun if sequence.choice == 0)
    added["first_tokens"] = len(begun)
    # Of one that a round extends meanwhile: the tokens that are counted, so that the sum holds.
    added["completion_tokens"] = len(begun) + added["accepted"] + added["bonus"]
    return replace(totals, **{name: getattr(totals, name) + value for name, value in added.items()})
