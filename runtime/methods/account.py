"""What was decided over some rounds, and what came of it, for the reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..sequence import Sequence

# Rounds between two reports of what was decided.
REPORT = 32


@dataclass
class Account:
    """Rounds by their way and by why it was taken; seconds and tokens, predicted, of plain decoding, and measured."""

    rounds: Counter[str] = field(default_factory=Counter[str])
    reasons: Counter[str] = field(default_factory=Counter[str])
    plain_s: float = 0.0
    plain_tokens: int = 0
    predicted_s: float = 0.0
    predicted_tokens: float = 0.0
    seconds: float = 0.0
    tokens: int = 0

    def add(self, name: str, why: str, predicted: tuple[float, float], plain_s: float, sequences: int) -> None:
        """A round of `sequences`, of so many seconds and tokens as predicted; plain decoding's takes `plain_s`."""
        self.rounds[name] += 1
        self.reasons[f"{name}: {why}"] += 1
        self.predicted_s += predicted[0]
        self.predicted_tokens += predicted[1]
        self.plain_s += plain_s
        self.plain_tokens += sequences

    def measure(self, seconds: float, tokens: int) -> None:
        """What that round came to."""
        self.seconds += seconds
        self.tokens += tokens

    def due(self, sequences: list[Sequence]) -> bool:
        """Whether to report: after `REPORT` rounds or with the request."""
        return self.rounds.total() >= REPORT or all(sequence.finish_reason for sequence in sequences)

    def report(self, sequences: list[Sequence], **more: Any) -> Mapping[str, Any]:
        return {
            "kind": "decision",
            "tokens": max(sequence.generated for sequence in sequences),
            "rounds": dict(self.rounds),
            "why": dict(self.reasons),
            "predicted_tokens_per_s": self.predicted_tokens / self.predicted_s,
            "measured_tokens_per_s": self.tokens / self.seconds if self.seconds else 0.0,
            "plain_tokens_per_s": self.plain_tokens / self.plain_s,
            **more,
        }
