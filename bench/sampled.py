"""What it costs to choose tokens of a large vocabulary, by how their rows are warped.

`peaked` scores fall with the logarithm of their rank, as those of trained models do; `flat` ones are normal, so that
top-p leaves thousands of ids. The rows of a call have noise of their own, for what a draw costs depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.ops import select
from .step import Clock, Figure

VOCABULARY, DRY_VOCABULARY = 128256, 1200
ROWS = (1, 8)
CALLS, DRY_CALLS = 32, 1
DRAFTED = 7
CHOICES = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top-p 0.9": (0.8, 0, 0.9, 0.0),
    "top-k 50": (0.8, 50, 1.0, 0.0),
    "top-k 20, top-p 0.95": (0.6, 20, 0.95, 0.0),
    "min-p 0.05": (0.8, 0, 1.0, 0.05),
}


def figures(device: torch.device, dry: bool) -> Iterator[Figure]:
    """`sample` alone, scores in the cache as right after the head; and rejection of seven drafted tokens."""
    clock, size, calls = Clock(device, dry), DRY_VOCABULARY if dry else VOCABULARY, DRY_CALLS if dry else CALLS
    shape, dtype = f"{size} ids", torch.float32 if dry else torch.bfloat16
    for kind, make in (("peaked", _peaked), ("flat", _flat)):
        for rows in ROWS:
            scores = make(rows, size).to(device, dtype)
            for name, choice in CHOICES.items():
                times = clock.times(_draws(scores, choice, calls), calls)
                yield Figure(f"sample, {name}", shape, rows, *times, *_bytes(scores), None, kind)
        scores = make(2 * DRAFTED + 1, size).to(device, dtype)
        times = clock.times(_rejections(scores, calls), calls)
        yield Figure("rejection, top-p 0.9", shape, DRAFTED + 1, *times, *_bytes(scores), None, kind)


def _bytes(scores: Tensor) -> tuple[int, int]:
    total = scores.numel() * scores.element_size()
    return total, total


def _draws(scores: Tensor, choice: tuple[float, int, float, float], calls: int) -> Callable[[], None]:
    ops, rows = select("triton"), scores.shape[0]
    rule = [torch.full((rows,), given, device=scores.device) for given in choice]
    seed = torch.arange(rows, device=scores.device)
    positions = [seed + 1000 * call for call in range(calls)]

    def run() -> None:
        for position in positions:
            ops.sample(scores, *rule, seed, position)

    return run


def _rejections(scores: Tensor, calls: int) -> Callable[[], None]:
    """One sequence, whose drafter has nothing in common with the target: as a rule the first token is rejected."""
    ops, device = select("triton"), scores.device
    p, q = scores[None, : DRAFTED + 1], scores[None, DRAFTED + 1 :]
    count, one = torch.full((1,), DRAFTED, device=device), torch.ones(1, device=device)
    rule = (one, 0 * count, 0.9 * one, 0 * one)
    lengths = [count + 1000 * call for call in range(calls)]
    draft = q.argmax(dim=-1)

    def run() -> None:
        for length in lengths:
            ops.verify_rejection(p, draft, q, count, length, *rule, count)

    return run


def _peaked(rows: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(size, generator=generator) for _ in range(rows)])
    return -1.3 * torch.log(order + 1.0)


def _flat(rows: int, size: int) -> Tensor:
    return 2.5 * torch.randn(rows, size, generator=torch.Generator().manual_seed(2))
