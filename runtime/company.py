"""Requests that run their rounds together: one pass over the weights serves all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from .cache import KVCache
from .decode import decode
from .graphs import Graphs, Rounds
from .methods.base import Method
from .methods.policy import Policy
from .model import Model
from .request import Piece
from .sequence import Sequence
from .speculate import speculate

if TYPE_CHECKING:
    from .run import Run

# A method, and what sequences ask of a round that chooses alike for all of them.
Alike: TypeAlias = tuple[Method, tuple[bool, bool, int | None]]
# Sequences of a round, and the rounds that others run for a request before its reader has come.
MAX_BATCH, MAX_LEAD = 16, 4
FAILED = "request: a round that it shared with another request has failed: {}"


class Company:
    """The requests of one method, alike in what they ask of its rounds: the round of one takes the others along.

    A token does not depend on who is in its round. Whoever was taken along finds what came of it when his turn comes,
    and runs none. Everything here is called within a turn.
    """

    def __init__(self, model: Model, cache: KVCache, graphs: Graphs | None, method: Method) -> None:
        self._model, self._cache, self._method = model, cache, method
        self._rounds = None if graphs is None else Rounds(graphs, model, cache, method)
        self._members: list[Run] = []

    def join(self, run: Run) -> None:
        self._members.append(run)

    def round(self, leader: Run) -> None:
        """A round for the sequences of the leader and of those who can be taken along; each is given its tokens."""
        party = self._party(leader)
        running = [sequence for run in party for sequence in run.running]
        before = [len(sequence.tokens) for sequence in running]
        try:
            pieces = self._advance(running)
        except BaseException as error:
            changed = {id(s) for s, length in zip(running, before, strict=True) if len(s.tokens) != length}
            self._break(leader, changed, error)
            raise
        self._deliver(pieces)

    def leave(self, run: Run) -> None:
        """End a request's part, once more if that was interrupted; what the device has for others is theirs."""
        if run not in self._members:
            return
        if self._rounds is not None:
            if self._members == [run]:
                self._rounds.close()
            elif self._rounds.serves(run.running):
                for sequence in run.running:
                    sequence.finish_reason = sequence.finish_reason or "abort"
                try:
                    self._deliver(self._rounds.drain(), but=run)
                except BaseException as error:
                    self._break(run, set(), error)
                    raise
        self._members.remove(run)

    def _party(self, leader: Run) -> list[Run]:
        """The leader and others, in the order in which they came, as many as a round has room for."""
        party, room = {id(leader)}, MAX_BATCH - len(leader.running)
        for run in self._members:
            fits = run is not leader and run.rides and len(run.running) <= room
            if fits and self._method.admits(leader.running) and self._method.admits(run.running):
                party.add(id(run))
                room -= len(run.running)
        return [run for run in self._members if id(run) in party]

    def _advance(self, running: list[Sequence]) -> dict[int, list[Piece]]:
        """The tokens of each sequence, by its id, that has got some."""
        pieces = None if self._rounds is None else self._rounds.advance(running)
        if pieces is not None:
            return pieces
        with self._model.mark("round", len(running), len(running)):
            if isinstance(self._method, Policy):
                found = decode(self._model, self._cache, running, self._method)
            else:
                found = speculate(self._model, self._cache, running, self._method)
        return {id(sequence): new for sequence, new in zip(running, found, strict=True)}

    def _deliver(self, pieces: dict[int, list[Piece]], *, but: Run | None = None) -> None:
        for run in [run for run in self._members if run is not but]:
            own = [(sequence, pieces[id(sequence)]) for sequence in run.running if id(sequence) in pieces]
            if own:
                run.receive(own)

    def _break(self, leader: Run, changed: set[int], error: BaseException) -> None:
        """What the device had is lost, and so are those it ran for and those that have got half of a round."""
        served = list(self._members) if self._rounds is not None else []
        if self._rounds is not None:
            self._rounds.close()
        for run in [run for run in self._members if run is not leader]:
            if run in served or any(id(sequence) in changed for sequence in run.running):
                run.fail(FAILED.format(str(error) or type(error).__name__))
