"""Plain decoding: the reference of every lossless method."""

from __future__ import annotations

from dataclasses import dataclass

from ..recipe import Recipe
from ..sequence import Sequence
from .base import Method


@dataclass(frozen=True)
class Options:
    """Plain decoding has no options."""


class Autoregressive(Method):
    """One token per round, no draft."""

    name = "autoregressive"
    options = Options

    def recipe(self, sequences: list[Sequence]) -> Recipe | None:
        return Recipe(self._full, self._full)
