"""Work in steps, between which others may take their turns."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")
Stepwise: TypeAlias = Generator[None, None, Result]


def at_once(steps: Generator[object, None, Result]) -> Result:
    """What the steps come to, all of them now."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
