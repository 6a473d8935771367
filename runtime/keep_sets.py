"""The layers Unified Layer Skipping keeps, as a function of depth and speed-up alone (arXiv 2404.06954)."""

from __future__ import annotations

import math
from random import Random
from typing import Final

from .errors import RequestError

RULES: Final = ("auto", "paper", "general")
PATTERNS: Final = ("balanced", "top", "bottom", "random")


def keep_set(
    num_layers: int, speedup: float, *, rule: str = "auto", pattern: str = "balanced", seed: int = 0
) -> tuple[int, ...]:
    """The kept layers, about 1 in `speedup`, in order; never none.

    `rule` paper is the authors' own, general rounds even spacing, auto takes the first where it is defined. `pattern`
    says where the skipped layers lie, for the same number of kept ones: balanced spreads them evenly, top are the last
    layers, bottom the first, random any, drawn with `seed`.

    Raises:
        RequestError: an argument is not one of its choices, or the authors' rule is not defined here.
    """
    if not 1 <= speedup < math.inf:
        raise RequestError(f"speedup: expected a number of at least 1, got {speedup}")
    for name, value, choices in (("rule", rule, RULES), ("pattern", pattern, PATTERNS)):
        if value not in choices:
            raise RequestError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    defined = float(speedup).is_integer() and int(num_layers / speedup) >= 2
    if rule == "paper" and not defined:
        raise RequestError(
            f"rule: paper expects a whole speedup that keeps 2 layers or more, got {speedup:g} for {num_layers} layers"
        )
    balanced = _authors(num_layers, int(speedup)) if defined and rule != "general" else _even(num_layers, speedup)
    count = len(balanced)
    if pattern == "top":
        return tuple(range(count))
    if pattern == "bottom":
        return tuple(range(num_layers - count, num_layers))
    if pattern == "random":
        return tuple(sorted(Random(seed).sample(range(num_layers), count)))
    return balanced


def _authors(num_layers: int, speedup: int) -> tuple[int, ...]:
    """The first, the last, and multiples of the interval until L/r are kept."""
    count = num_layers // speedup
    interval = num_layers // (count - 1)
    inner = range(interval, num_layers - 1, interval)
    return (0, *inner[: count - 2], num_layers - 1)


def _even(num_layers: int, speedup: float) -> tuple[int, ...]:
    """max(2, round(L/r)) rounded evenly spaced layers."""
    if num_layers == 1:
        return (0,)
    count = min(num_layers, max(2, round(num_layers / speedup)))
    return tuple(round(i * (num_layers - 1) / (count - 1)) for i in range(count))
