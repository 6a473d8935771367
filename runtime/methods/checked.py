"""Options of methods: what a value may be stands at its field."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar, TypeAlias, get_type_hints

from ..errors import RequestError


@dataclass(frozen=True)
class Within:
    """From `low` to `high`, both included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low} to {self.high}"


class OneOf(tuple[str, ...]):
    """One of these."""

    def __str__(self) -> str:
        return " or ".join(self)


DraftTokens: TypeAlias = Annotated[int, Within(1, 64)]
Vocabulary: TypeAlias = Annotated[int, Within(0, 2**31)]
Share: TypeAlias = Annotated[float, Within(0, 1)]
DraftWeights: TypeAlias = Annotated[str, OneOf(("own", "int8"))]
Acceptance: TypeAlias = Annotated[str, OneOf(("coupled", "rejection"))]


class Checked:
    """The base of a frozen dataclass of options: `class Options(Checked, method="name")`.

    Raises:
        RequestError: a value is not what the annotation of its field says.
    """

    method: ClassVar[str]

    def __init_subclass__(cls, method: str) -> None:
        cls.method = method

    def __post_init__(self) -> None:
        for option, allowed in bounds(type(self)):
            self.expect(option, allowed)

    def expect(self, option: str, allowed: Within | OneOf) -> None:
        """Refuse another value of `option` than None and those `allowed`, with a RequestError."""
        value = getattr(self, option)
        if value is not None and value not in allowed:
            raise RequestError(f"method {self.method}: option {option} expects {allowed}, got {value!r}")


@cache
def bounds(options: type) -> list[tuple[str, Within | OneOf]]:
    """What the annotations of the fields allow: every request builds its options, and to read annotations is slow."""
    kinds = get_type_hints(options, include_extras=True)
    return [(option, allowed) for option, kind in kinds.items() for allowed in getattr(kind, "__metadata__", ())]
