"""Requests that run their rounds together: one pass over the weights serves all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from .cache import KVCache
from .decode import decode, read_together
from .graphs import Graphs, Rounds
from .methods.base import Method
from .methods.policy import Policy
from .model import Model
from .prefill import remember
from .request import Piece
from .sequence import Sequence
from .speculate import speculate

if TYPE_CHECKING:
    from .run import Run

# A method, and what sequences ask of a round that chooses alike for all of them.
Alike: TypeAlias = tuple[Method, tuple[bool, bool, int | None]]
# Rounds that others run for a request before its reader has come.
MAX_LEAD = 4
FAILED = "request: a round that it shared with another request has failed: {}"


class Company:
    """The requests of one method, alike in what they ask of its rounds: the round of one takes the others along.

    A token does not depend on who is in its round. Whoever was taken along finds what came of it when his turn comes,
    and runs none. Everything here is called within a turn.
    """

    def __init__(self, model: Model, cache: KVCache, graphs: Graphs | None, method: Method, sequences: int) -> None:
        """`sequences` is how many run together at most."""
        self._model, self._cache, self._method, self._most = model, cache, method, sequences
        self._rounds = None if graphs is None else Rounds(graphs, model, cache, method)
        self._members: list[Run] = []

    def join(self, run: Run) -> None:
        self._members.append(run)

    def round(self, leader: Run) -> None:
        """A round for the sequences of the leader and of those who can be taken along; each is given its tokens.

        It may first have to read rounds that the device has under way for others.
        """
        while leader.running and not leader.lead:
            before = self._standing()
            try:
                self._deliver(self._advance(self._party(leader)))
            except BaseException as error:
                self._break(leader, before, error)
                raise

    def read(self, leader: Run, sequence: Sequence, rows: int) -> bool:
        """Read the leader's prompt and those of others who wait for it in one pass over at most so many rows.

        False where none can be read with it: nothing was read then.
        """
        begun = [(leader, sequence)]
        delivered: set[Run] = set()
        try:
            self._gather(begun, rows - len(sequence.prompt))
            if len(begun) == 1:
                return False
            found = read_together(self._model, self._cache, [one for _, one in begun], self._method)
            for _, one in begun:
                remember(self._model, self._cache, one, self._method)
            for run in dict.fromkeys(run for run, _ in begun):
                run.receive([(one, pieces) for (each, one), pieces in zip(begun, found, strict=True) if each is run])
                delivered.add(run)
            return True
        except BaseException as error:
            for run, one in begun:
                if run is not leader and run not in delivered and (one.generated or one.lost):
                    run.fail(_failed(error))
            for run in self._members:
                run.retreat()
            raise

    def leave(self, run: Run) -> None:
        """End a request's part, once more if that was interrupted; others read what the device has for them."""
        if run not in self._members:
            return
        for sequence in run.running:
            sequence.finish_reason = sequence.finish_reason or "abort"
        if self._rounds is not None and all(other is run or other.stopped for other in self._members):
            self._rounds.close()
        self._members.remove(run)

    def _gather(self, begun: list[tuple[Run, Sequence]], rows: int) -> None:
        """Add to those that begin whoever else has a prompt that the rows left are enough for, one of each in turn."""
        found = True
        while found and len(begun) < self._most:
            found = False
            for run in self._members:
                asks = run.asked or run is begun[0][0]
                if asks and len(begun) < self._most and (sequence := run.admit(rows)) is not None:
                    begun.append((run, sequence))
                    rows -= len(sequence.prompt)
                    found = True

    def _party(self, leader: Run) -> list[Sequence]:
        """The sequences, in the order of their requests, of the leader and of as many others as there is room for.

        Those whose rounds the device has under way come first if the leader is one of them, or it would have to begin
        anew; then those who have least that they have not read.
        """
        party, room = {leader}, self._most - len(leader.running)
        served = set[int]() if self._rounds is None else self._rounds.served
        goes_on = not served.isdisjoint(map(id, leader.running))
        for run in sorted(
            self._members, key=lambda run: (goes_on and served.isdisjoint(map(id, run.running)), run.lead)
        ):
            fits = run is not leader and run.rides and len(run.running) <= room
            if fits and self._method.unites([*leader.running, *run.running]):
                party.add(run)
                room -= len(run.running)
        return [sequence for run in self._members if run in party for sequence in run.running]

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

    def _deliver(self, pieces: dict[int, list[Piece]]) -> None:
        for run in list(self._members):
            own = [(sequence, pieces[id(sequence)]) for sequence in run.running if id(sequence) in pieces]
            if own:
                run.receive(own)

    def _standing(self) -> list[tuple[Run, Sequence, int]]:
        """The sequences of all members, and how many tokens each has."""
        return [(run, sequence, len(sequence.tokens)) for run in self._members for sequence in run.running]

    def _break(self, leader: Run, before: list[tuple[Run, Sequence, int]], error: BaseException) -> None:
        """What the device had is lost, and so are those it ran for and those that have got half of a round."""
        rounds = self._rounds
        lost = {
            run
            for run, sequence, tokens in before
            if len(sequence.tokens) != tokens or (rounds is not None and rounds.serves([sequence]))
        }
        if rounds is not None:
            rounds.close()
        for run in lost - {leader}:
            run.fail(_failed(error))


def _failed(error: BaseException) -> str:
    return FAILED.format(str(error) or type(error).__name__)
