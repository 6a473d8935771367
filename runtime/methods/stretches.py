"""Which way a device that runs rounds alone should decode the next stretch of them, from its late reports."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..costs import Ledger
from ..round_graph import AHEAD

# Rounds a way is given at least, those a change of ways has to pay for itself in, and how much better it must promise.
TRIAL, STRETCH, BETTER = 6, 64, 1.02
# Rounds another way waits until it is tried, at first and at most.
WAIT, LONGEST_WAIT = 32, 1024
# Rounds of plain decoding that are timed before anything else is tried, and rounds that are remembered.
TIMED, REMEMBERED = 8, 16
# The share of its rounds quicker than what a way is held to take: what a busy machine adds to some is nobody's cost.
QUICKER = 0.25
# Seconds of a round at least: to a host that is late, it was done before it looked.
LEAST = 1e-6


@dataclass(frozen=True)
class Way:
    """A kind of round, drafting `drafted` tokens, and what is believed of it before it has run.

    `seconds` of a round of plain decoding, `tokens` a round and sequence. The worst that may come of a `trusted` one is
    what is expected of it.
    """

    name: str
    drafted: int = 0
    seconds: float = 1.0
    tokens: float = 1.0
    trusted: bool = False


@dataclass
class Average:
    """Of all samples while they are few, then a moving one; `count` samples are behind `value`."""

    value: float
    count: int

    def observe(self, sample: float) -> None:
        self.count += 1
        self.value += (sample - self.value) / min(self.count, REMEMBERED)


@dataclass
class Newest:
    """The newest samples, of which the value is the one that this share of them is below."""

    share: float
    samples: deque[float] = field(default_factory=lambda: deque[float](maxlen=REMEMBERED))

    @property
    def value(self) -> float:
        return sorted(self.samples)[int(self.share * len(self.samples))] if self.samples else 0.0

    def observe(self, sample: float) -> None:
        self.samples.append(sample)


@dataclass(eq=False)
class Record:
    """What is known of a way: tokens a round and sequence, seconds a round by the number of sequences a graph is for.

    It is tried again once passed over in `wait` rounds: texts and contexts change. A try that changes nothing is waited
    for twice as long.
    """

    tokens: Average
    seconds: dict[int, Newest] = field(default_factory=dict[int, Newest])
    wait: int = WAIT
    idle: int = 0


class Stretches:
    """Decides between ways, the first of which is plain decoding, and learns from every round's report.

    A change of ways leaves the device without work for a moment, which the first report after it shows; the last ones
    before it come as fast as they are read. So a way that was entered stays for `TRIAL` rounds, and another has to
    promise more than the change costs. Nothing is entered, or gone on with, whose worst outcome the ledger does not
    cover: one token a sequence, if the way is not trusted, in all those rounds and in those under way before their
    reports can be read.
    """

    def __init__(self, ways: Sequence[Way], ledger: Ledger) -> None:
        self._plain, self._ledger = ways[0], ledger
        self._records = {way: Record(Average(way.tokens, 1)) for way in ways}
        self._change = Newest(0.5)
        self._rounds = 0
        self.way, self.why = self._plain, "predicted fastest"

    @property
    def ways(self) -> list[Way]:
        return list(self._records)

    def tokens(self, way: Way) -> float:
        """Tokens a round and sequence, as far as known."""
        return self._records[way].tokens.value

    def seconds(self, way: Way, size: int) -> float:
        """Those of a round for `size` sequences; not known, they follow from plain decoding's, which are."""
        record, plain = self._records[way].seconds, self._records[self._plain].seconds
        if size in record:
            return record[size].value
        ratios = [known.value / plain[other].value for other, known in record.items() if other in plain]
        return plain[size].value * (ratios[-1] if ratios else way.seconds)

    def forget(self, name: str) -> None:
        """The ways of this name are not what they were."""
        for way, record in self._records.items():
            if way.name == name:
                record.tokens, record.wait, record.idle = Average(way.tokens, 1), WAIT, 0

    def choose(self, size: int) -> Way:
        """The way of the next round, of up to `size` sequences."""
        timed = self._records[self._plain].seconds.get(size)
        if timed is None or len(timed.samples) < TIMED:
            self._enter(self._plain, "its rounds are timed")
        elif self._rounds >= TRIAL or not self._ledger.affords(self._loss(self.way, size)):
            self._decide(size)
        return self.way

    def observe(self, way: Way, size: int, tokens: float, seconds: float, *, changed: bool) -> float:
        """A round that went that way, with `tokens` a sequence; returns the seconds it is held to have cost.

        `changed`: it is the first after a change, which its seconds show.
        """
        record = self._records[way]
        known = record.seconds.get(size)
        if changed:
            if known:
                self._change.observe(min(max(seconds - known.value, 0.0), 2 * known.value))
        elif way is self.way:
            record.seconds.setdefault(size, Newest(QUICKER)).observe(max(seconds, LEAST))
        record.tokens.observe(tokens)
        self._rounds += way is self.way
        for other in self._records.values():
            other.idle = 0 if other is record else other.idle + 1
        cost = self.seconds(way, size) if self.timed(size) else seconds
        return cost + (self._change.value if changed else 0.0)

    def timed(self, size: int) -> bool:
        """Whether plain decoding has run with so many sequences."""
        return size in self._records[self._plain].seconds

    def _decide(self, size: int) -> None:
        covered = [way for way in self.ways if self._ledger.affords(self._loss(way, size))]
        best = max(covered, key=lambda way: self._promise(way, size))
        self._records[best].wait = WAIT
        again = next((way for way in covered if way not in (best, self.way) and self._due(way)), None)
        fastest = max(self.ways, key=lambda way: self._promise(way, size))
        if again is not None:
            record = self._records[again]
            record.wait = min(2 * record.wait, LONGEST_WAIT)
            # What it did long ago says less than what it does now.
            record.tokens.count = min(record.tokens.count, TIMED)
            self._enter(again, "tried again")
        elif best is self._plain and fastest is not best:
            self._enter(best, f"{fastest.name} is predicted faster and its loss is not covered")
        else:
            self._enter(best, "predicted fastest")

    def _enter(self, way: Way, why: str) -> None:
        if way is not self.way:
            self._rounds = 0
        self.way, self.why = way, why

    def _due(self, way: Way) -> bool:
        return self._records[way].idle >= self._records[way].wait

    def _loss(self, way: Way, size: int) -> float:
        """Seconds lost at worst before it can be left."""
        if way is self._plain:
            return 0.0
        rounds, changes = (1, 0) if way is self.way else (TRIAL, 2)
        least = self.tokens(way) if way.trusted else 1.0
        more = self.seconds(way, size) - least * self.seconds(self._plain, size)
        return (rounds + AHEAD) * more + changes * self._change.value

    def _promise(self, way: Way, size: int) -> float:
        """Tokens a second, those of another way over a stretch that pays for the change."""
        seconds = self.seconds(way, size)
        if way is self.way:
            return BETTER * self.tokens(way) / seconds
        return self.tokens(way) / (seconds + self._change.value / STRETCH)
