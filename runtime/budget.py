"""The share of decoding time that learning may take."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

# The rounds whose time says what a round usually takes.
USUAL = 9


@dataclass
class Budget:
    """Seconds earned by decoding, at `share` of its time, and spent on searching."""

    share: float
    seconds: float = 0.0
    _usual: deque[float] = field(default_factory=lambda: deque[float](maxlen=USUAL))

    @property
    def compares(self) -> bool:
        """Whether it is known what a round takes that is not recorded."""
        return bool(self._usual)

    def round(self, seconds: float, *, recorded: bool) -> float:
        """Credit for a round of decoding; returns what of it was spent.

        One whose streams were `recorded` is steered by the host even where the device runs the others alone: what it
        took longer than they do is the price of what is learnt from it.
        """
        self.earn(seconds)
        if not recorded:
            self._usual.append(seconds)
            return 0.0
        longer = max(0.0, seconds - median(self._usual)) if self.compares else 0.0
        self.spend(longer)
        return longer

    def earn(self, decoding: float) -> None:
        """Credit for `decoding` seconds."""
        self.seconds += self.share * decoding

    def spend(self, seconds: float) -> None:
        """What a step really took; the next one waits until it is earned back."""
        self.seconds -= seconds
