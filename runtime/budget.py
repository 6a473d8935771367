"""The share of decoding time that learning may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Budget:
    """Seconds earned by decoding, at `share` of its time, and spent on searching."""

    share: float
    seconds: float = 0.0

    def earn(self, decoding: float) -> None:
        """Credit for `decoding` seconds."""
        self.seconds += self.share * decoding

    def spend(self, seconds: float) -> None:
        """What a step really took; the next one waits until it is earned back."""
        self.seconds -= seconds
