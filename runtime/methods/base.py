"""The protocol every method implements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from ..batch import Batch, Draft
from ..cache import KVCache
from ..model import Model
from ..plan import LayerPlan
from ..sequence import Sequence


class Method(Protocol):
    """A drafter under the shared round of `speculate`.

    One instance serves one engine and one set of options, over all requests: what it learns belongs to it and to nobody
    else. `plan` is what a draft step runs, for the statistics.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool]

    @property
    def plan(self) -> LayerPlan: ...

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        """Up to k draft tokens for every sequence; fewer, or none, is always allowed."""
        ...

    def observe(self, model: Model, cache: KVCache, sequences: list[Sequence], tokens: int, seconds: float) -> float:
        """Learn from a finished round that took `seconds` and gave `tokens` tokens; returns the seconds spent."""
        ...

    def phase(self) -> str:
        """What the method is doing, for the timeline of a run."""
        ...

    def events(self) -> list[Mapping[str, Any]]:
        """Everything worth telling about what was learnt so far, oldest first."""
        ...


def no_draft(batch: Batch) -> Draft:
    """A round without a draft is plain decoding."""
    tokens = torch.empty(len(batch), 0, dtype=torch.int64, device=batch.device)
    return Draft(tokens, torch.zeros(len(batch), dtype=torch.int64, device=batch.device))
