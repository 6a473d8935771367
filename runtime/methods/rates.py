"""How often a kind of draft is accepted, and what it promises for a round."""

from __future__ import annotations

from dataclasses import dataclass

from .stretches import WAIT


@dataclass(eq=False)
class Rate:
    """How often a kind of draft token is accepted, as a moving average, and when to try a losing kind again.

    A kind that was passed over in `wait` rounds is tried: the text may have changed. A try that changes nothing is
    waited for twice as long.
    """

    value: float
    wait: int = WAIT
    idle: int = 0

    @property
    def due(self) -> bool:
        return self.idle >= self.wait

    def observe(self, drafted: int, accepted: int) -> None:
        """Take in a round; tokens after the first rejected one say nothing."""
        tried = min(drafted, accepted + 1)
        if tried:
            self.value += (1 - 0.9**tried) * (accepted / tried - self.value)
        self.idle = 0


@dataclass(frozen=True)
class Choice:
    """A way to decode the next round, and what the cost model says of it: seconds, tokens, and what is at risk.

    `rates` are those the tokens were predicted by.
    """

    name: str
    drafted: int
    seconds: float
    tokens: float
    loss: float
    rates: tuple[Rate, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds
