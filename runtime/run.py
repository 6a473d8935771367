"""A request under way: its prompts are read and its rounds run, one turn at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch

from ..kernels.compilation import Watch
from .admission import Admission, Ticket
from .company import MAX_LEAD, Alike, Company
from .decode import reading
from .errors import AbortedError, out_of_range
from .graphs import Graphs
from .methods.base import Method
from .metrics import Ledger
from .model import Model
from .prefill import prefill_chunk, recall, remember
from .request import Chunk, Piece, SamplingParams
from .roster import Roster
from .sequence import Sequence
from .stepwise import Stepwise
from .turns import Turns

MAX_EVENTS = 4096


@dataclass(frozen=True, eq=False)
class Shared:
    """What the requests of an engine share.

    At most `max_sequences` run together. `companies` are of those that may run rounds together, by method and by what
    they ask of it; None where none may.
    """

    model: Model
    admission: Admission
    turns: Turns
    watch: Watch
    graphs: Graphs | None
    roster: Roster
    ledger: Ledger
    companies: WeakValueDictionary[Alike, Company] | None
    max_sequences: int

    @property
    def runs(self) -> frozenset[Run]:
        """Those under way."""
        return self.ledger.runs

    def company(self, method: Method, params: SamplingParams) -> Company:
        """Whom a request runs its rounds with."""
        alike = method, (params.greedy, params.reshapes_logits, params.logprobs)
        found = None if self.companies is None else self.companies.get(alike)
        if found is None:
            found = Company(self.model, self.admission.cache, self.graphs, method, self.max_sequences)
            if self.companies is not None:
                self.companies[alike] = found
        return found


class Run:
    """The sequences of one request, as many of them running at a time as run together at most.

    Any thread may take the next step, and any thread may end it: both happen in turns. `events` are what the method
    told of its rounds; the oldest are forgotten where there are too many.
    """

    method: Method

    def __init__(self, shared: Shared, sequences: list[Sequence], enter: Stepwise[Method]) -> None:
        """`enter` makes the method ready, a turn a step."""
        self.sequences = sequences
        self.events = deque[Mapping[str, Any]](maxlen=MAX_EVENTS)
        self._turns = shared.turns
        self._shared: Shared | None = shared
        self._enter: Stepwise[Method] | None = enter
        self._waiting, self._running = deque(sequences), list[Sequence]()
        self._reading: Iterator[list[Piece] | None] | None = None
        self._company: Company | None = None
        # What rounds gave that was not asked for yet, and of how many of them.
        self._unread, self.lead = list[Chunk](), 0
        self._ticket: Ticket | None = None
        self._failure: str | None = None
        self.stopped = self._failed = False
        # Where a sequence was lost: in its prompt, or after it.
        self._lost: str | None = None
        # Whether its reader waits for the next chunk.
        self.asked = False

    @property
    def over(self) -> bool:
        """Whether everything has been given back."""
        return self._shared is None

    @property
    def running(self) -> list[Sequence]:
        """The sequences whose prompts are read, or being read; they have not ended."""
        return self._running

    @property
    def _complete(self) -> bool:
        return not (self._waiting or self._running) and self._lost is None

    @property
    def queued(self) -> int:
        """How many sequences have not begun."""
        return len(self._waiting)

    @property
    def waits(self) -> bool:
        """Whether it waits for pages; to be asked by any thread."""
        return (ticket := self._ticket) is not None and not ticket.done

    @property
    def granted(self) -> int:
        """Pages that it has for a sequence that has not begun."""
        return 0 if self._ticket is None else len(self._ticket.pages)

    @property
    def rides(self) -> bool:
        """Whether the round of another request may take its sequences along."""
        waits = self.stopped or self._lost is not None or self._reading is not None
        return not waits and bool(self._running) and self.lead < MAX_LEAD

    def receive(self, told: list[tuple[Sequence, list[Piece]]]) -> None:
        """Keep what a round gave for whoever reads it, within a turn."""
        self._unread += _chunks(told)
        self.lead += 1
        if (shared := self._shared) is not None:
            self._release_finished(shared)

    def admit(self, rows: int) -> Sequence | None:
        """The sequence that is next, if a pass over so many rows can read its whole prompt and it need not wait."""
        shared = self._shared
        if shared is None or self.stopped or self._reading is not None or self._ticket is not None or not self._waiting:
            return None
        if not self._is_whole(shared, self._waiting[0], rows) or not self._admits(shared):
            return None
        return self._begin(shared)

    def retreat(self) -> None:
        """Have sequences wait again that were to be read with others, where that was interrupted."""
        shared = self._shared
        if shared is None or self._reading is not None or self._ticket is not None:
            return
        unread = [sequence for sequence in self.sequences if not sequence.generated and sequence.finish_reason is None]
        self._running = [sequence for sequence in self._running if sequence.generated]
        self._waiting = deque(unread)
        shared.ledger.end(unread)
        for sequence in unread:
            shared.admission.release(sequence.pages)

    def prepare(self) -> bool:
        """A turn of making the method ready; whether it is, or nothing is left to be done."""
        return self._turns.take(self._prepare)

    def _prepare(self) -> bool:
        shared = self._open()
        if shared is None or self._enter is None:
            return True
        shared.ledger.enter(self)
        try:
            shared.admission.move()
            try:
                next(self._enter)
                return False
            except StopIteration as end:
                self.method, self._enter = end.value, None
            self._company = shared.company(self.method, self.sequences[0].params)
            self._company.join(self)
        except BaseException as error:
            self._failed = isinstance(error, Exception)
            self._end()
            raise
        return True

    def advance(self) -> list[Chunk] | Ticket | None:
        """What one turn adds: the next part of a prompt, or a round; None at the end.

        Or the ticket to wait for before this is called again, where nothing can run without more pages.
        """
        self.ask()
        return self._turns.take(self._advance)

    def ask(self) -> None:
        """Its reader waits: until his turn comes, another may read its prompts with his own."""
        self.asked = True

    def _advance(self) -> list[Chunk] | Ticket | None:
        self.asked = False
        shared = self._open()
        if shared is None:
            return None
        if self._unread:
            shared.admission.move()
            return self._taken()
        if self._is_patient():
            return self._ticket
        try:
            with shared.watch, torch.inference_mode():
                if self._lost is not None:
                    raise out_of_range(self._lost, shared.model.dtype)
                done = self._step(shared)
                self.events += self.method.tell()
        except BaseException as error:
            self._failed = isinstance(error, Exception)
            self._end()
            raise
        if not isinstance(done, Ticket):
            shared.admission.move()
        if self.stopped or self._complete:
            self._end()
        return done

    def stop(self) -> None:
        """End with the step under way, if there is one; to be closed in any case."""
        self.stopped = True
        if (ticket := self._ticket) is not None:
            ticket.cancel()

    def close(self) -> None:
        """End now, with the turn under way and not behind all who wait for theirs; everything is given back."""
        self.abandon()
        if not self.over:
            self._turns.alone(self._end)

    def abandon(self) -> None:
        """As `close`, without waiting for the turn under way."""
        if not self.over:
            self.stop()
            self._turns.after(self._end)

    def doom(self, message: str) -> None:
        """Within a turn: whoever asks for more gets an AbortedError; to be failed in any case."""
        self._failure, self.stopped = message, True

    def fail(self, message: str) -> None:
        """End within a turn: whoever asks for more gets an AbortedError."""
        self.doom(message)
        self._failed = True
        self._end()

    def _open(self) -> Shared | None:
        if self._failure is not None:
            raise AbortedError(self._failure)
        return None if self.stopped else self._shared

    def _is_patient(self) -> bool:
        """Whether to go on waiting: the turn that was waited for may have moved something."""
        return self._ticket is not None and self._ticket.patience > 0

    def _end(self) -> None:
        shared = self._shared
        if shared is None:
            return
        shared.turns.rest()
        with torch.inference_mode():
            if self._company is not None:
                self._company.leave(self)
            if self._enter is None:
                self.events += self.method.tell()
            if self._ticket is not None:
                shared.admission.withdraw(self._ticket)
            for sequence in self.sequences:
                shared.admission.release(sequence.pages)
        whole = all(sequence.finish_reason not in (None, "abort") for sequence in self.sequences)
        shared.ledger.leave(self, "finished" if whole else "failed" if self._failed else "aborted")
        # Whoever was interrupted before this comes again, from the beginning.
        self._shared = None
        self._enter = self._company = self._reading = self._ticket = None
        self._waiting.clear()
        self._running.clear()

    def _step(self, shared: Shared) -> list[Chunk] | Ticket:
        if self._reading is None:
            if self._admits(shared):
                sequence = self._begin(shared)
                rows = prefill_chunk(shared.model.device, shared=self._has_company(shared))
                assert self._company is not None
                if self._is_whole(shared, sequence, rows) and self._company.read(self, sequence, rows):
                    return self._taken()
                cache, sibling = shared.admission.cache, self._sibling(sequence)
                self._reading = reading(shared.model, cache, sequence, self.method, sibling)
            elif not self._running:
                return self._queue(shared, self._waiting[0].max_length, self._waiting[0].pages)
        if self._reading is None:
            return self._round()
        self._running[-1].shares = self._has_company(shared)
        pieces = next(self._reading)
        if pieces is None:
            return []
        self._reading = None
        remember(shared.model, shared.admission.cache, self._running[-1], self.method)
        chunks = _chunks([(self._running[-1], pieces)])
        self._release_finished(shared)
        return chunks

    def _admits(self, shared: Shared) -> bool:
        """Whether the next sequence has all the pages it may need, and need not wait."""
        if self._ticket is not None:
            shared.admission.redeem(self._ticket)
            self._ticket = None
            return True
        if self._waiting and len(self._running) < shared.max_sequences and self.method.admits(self._running):
            return shared.admission.take(self._waiting[0].max_length, self._waiting[0].pages)
        return False

    def _begin(self, shared: Shared) -> Sequence:
        sequence = self._waiting.popleft()
        shared.ledger.begin(sequence)
        self._running.append(sequence)
        if self._sibling(sequence) is None:
            recall(shared.model, shared.admission.cache, sequence, self.method)
        return sequence

    def _sibling(self, sequence: Sequence) -> Sequence | None:
        """A sequence of the same prompt that has read it and still has its pages."""
        return next((other for other in self._running[:-1] if other.index == sequence.index), None)

    def _is_whole(self, shared: Shared, sequence: Sequence, rows: int) -> bool:
        """Whether a pass over so many rows, of other prompts too, can read all of this one."""
        length, plain = len(sequence.prompt), self.method.plain_prompts and sequence.params.n == 1
        return plain and length <= rows and not shared.model.stretched(length)

    def _has_company(self, shared: Shared) -> bool:
        """Whether others wait for their next token while this one's prompt is read."""
        return any(run.rides for run in shared.runs if run is not self)

    def _queue(self, shared: Shared, tokens: int, pages: list[int]) -> Ticket:
        # Ours before it stands in the line: an interrupt in between must not leave one there that nobody withdraws.
        self._ticket = ticket = Ticket(tokens, pages, shared.admission)
        shared.admission.ask(ticket)
        return ticket

    def _round(self) -> list[Chunk]:
        assert self._company is not None
        self._company.round(self)
        return self._taken()

    def _taken(self) -> list[Chunk]:
        chunks, self._unread, self.lead = self._unread, [], 0
        if self._complete:
            self._end()
        return chunks

    def _release_finished(self, shared: Shared) -> None:
        finished = [sequence for sequence in self._running if sequence.finish_reason]
        if not finished:
            return
        for sequence in finished:
            shared.admission.release(sequence.pages)
            if sequence.lost:
                self._lost = self._lost or ("request" if sequence.generated else "prompt")
        shared.ledger.end(finished)
        self._running = [sequence for sequence in self._running if not sequence.finish_reason]


def _chunks(told: list[tuple[Sequence, list[Piece]]]) -> list[Chunk]:
    """What a round gave; of one that is lost its last tokens, for the error comes after them."""
    return [_chunk(sequence, pieces) for sequence, pieces in told if pieces or not sequence.lost]


def _chunk(sequence: Sequence, pieces: list[Piece]) -> Chunk:
    """The newest pieces of a sequence."""
    ended = None if sequence.lost else sequence.finish_reason
    newest = None if sequence.params.logprobs is None else tuple(sequence.logprobs[-len(pieces) :] if pieces else ())
    return Chunk(sequence.index, sequence.choice, tuple(pieces), ended, newest)
