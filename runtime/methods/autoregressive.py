"""Plain decoding: the reference of every lossless method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..batch import Batch, Draft
from ..cache import KVCache
from ..model import Model
from ..plan import LayerPlan
from ..sequence import Sequence
from .base import no_draft


@dataclass(frozen=True)
class Options:
    """Plain decoding has no options."""


class Autoregressive:
    """One token per round, no draft."""

    name: ClassVar[str] = "autoregressive"
    lossless: ClassVar[bool] = True

    def __init__(self, options: Options, num_layers: int) -> None:
        self._plan = LayerPlan.full(num_layers)

    @property
    def plan(self) -> LayerPlan:
        return self._plan

    def propose(self, model: Model, cache: KVCache, batch: Batch) -> Draft:
        return no_draft(batch)

    def observe(self, model: Model, cache: KVCache, sequences: list[Sequence], tokens: int, seconds: float) -> float:
        return 0.0

    def phase(self) -> str:
        return "decode"

    def events(self) -> list[Mapping[str, Any]]:
        return []
