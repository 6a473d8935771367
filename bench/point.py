"""One op at one place, to be timed: its inputs, and plain PyTorch on the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.ops import Ops
from ..kernels.values import Norm, Rope, Slots
from ..loaders.config import ModelConfig

Outputs = tuple[Tensor, ...]


class Launch(NamedTuple):
    """The op, plain PyTorch on the same inputs, and the bytes no implementation can avoid; `syncs`: plain waits.

    `flops`: multiplications and additions of its matrix products, for the rows asked for; none where there are few.
    """

    op: Callable[[], Outputs]
    plain: Callable[[], Outputs]
    bytes: int
    flops: int = 0
    syncs: bool = False


@dataclass(frozen=True)
class Point:
    """Where an op is timed. A row is at position `context` or after it; `seed` makes the launches of a case differ."""

    ops: Ops
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    rows: int
    context: int
    seed: int = 0

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(hash((self.seed, shape)) & 0xFFFFFFFF)
        return torch.randn(shape, generator=generator, device=self.device).to(dtype or self.dtype)

    def weight(self, rows: int, columns: int) -> Tensor:
        return self.randn(rows, columns) / columns**0.5

    def norm(self, *shape: int) -> Norm:
        return Norm(1 + 0.1 * self.randn(*shape), None, self.config.norm_eps)

    def arange(self, count: int, start: int = 0) -> Tensor:
        return torch.arange(start, start + count, device=self.device)

    @property
    def tile(self) -> int | None:
        """The tile the engine takes for so many rows."""
        return next((tile for tile in self.ops.tiles if tile >= self.rows), self.ops.tiles[-1])

    @property
    def pages(self) -> int:
        return -(-(self.context + self.rows) // self.ops.page_size)

    @property
    def slots(self) -> Slots:
        at = self.arange(self.rows, self.context)
        return Slots(at // self.ops.page_size, at % self.ops.page_size)

    def caches(self, *layers: int) -> tuple[Tensor, Tensor]:
        shape = (*layers, self.pages, self.config.num_kv_heads, self.ops.page_size, self.config.head_dim)
        return self.randn(*shape), self.randn(*shape).flip(-1)

    def rope(self, positions: int | None = None) -> Rope:
        """Rotations of so many positions, or of a row each."""
        angle = self.randn(positions or self.rows, 1, self.config.head_dim // 2, dtype=torch.float32)
        return Rope(torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1))


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
