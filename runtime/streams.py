"""The CUDA streams of round graphs."""

from __future__ import annotations

from functools import cache

import torch


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream graphs are compiled on: one, for the allocator keeps for each what was once allocated there."""
    return torch.cuda.Stream(device)


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream graphs are captured on: one, or they could not share memory."""
    return torch.cuda.Stream(device)
