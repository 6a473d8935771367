"""Where the host's time goes in a pass: calls of every PyTorch operator, and their share of the operators' time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

PASSES = 5


@dataclass(frozen=True)
class Share:
    """An operator: calls a pass, also from inside other operators, and its share of the time, itself alone."""

    name: str
    calls: float
    share: float


def shares(function: Callable[[], object], passes: int = PASSES) -> list[Share]:
    """Every operator `function` calls on the host, the most expensive first, from `passes` calls after a warm-up."""
    with torch.inference_mode():
        function()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for _ in range(passes):
                function()
    found = cast("list[Any]", recorded.key_averages())
    total = sum(event.self_cpu_time_total for event in found)
    listed = [Share(event.key, event.count / passes, event.self_cpu_time_total / total) for event in found]
    return sorted(listed, key=lambda one: -one.share)
