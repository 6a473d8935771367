"""What the compile gate gives to ops: tensors of a model's sizes on the device "meta", with strides and no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.triton_ops import TRITON
from ..kernels.values import Grown, Matrix, Norm, Reshaping, Rope, Slots

CONTEXT, LONG_CONTEXT = 512, 32768
DRAFTED = 7
NODES = 32
EPS = 1e-5


class Shape(NamedTuple):
    """The sizes of a model that kernels see."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool = False
    layer_norm: bool = False


@dataclass(frozen=True)
class Inputs:
    """Those of a pass of `rows` rows."""

    shape: Shape
    rows: int
    dtype: torch.dtype

    def tensor(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(sizes, dtype=dtype or self.dtype, device="meta")

    def reshaping(self, count: int) -> Reshaping:
        dense, kinds = (count, self.shape.vocab), (torch.float32, torch.bool, torch.bool, torch.int32)
        bias, forbidden, prompt, times = (self.tensor(*dense, dtype=kind) for kind in kinds)
        repetition, presence, frequency = (self.tensor(count, dtype=torch.float32) for _ in range(3))
        return Reshaping(repetition, presence, frequency, bias, forbidden, self.ids(count), prompt, times)

    def norm(self, *layers: int) -> Norm:
        sizes = *layers, self.shape.hidden
        return Norm(self.tensor(*sizes), self.tensor(*sizes) if self.shape.layer_norm else None, EPS)

    def ids(self, *sizes: int) -> Tensor:
        return self.tensor(*sizes, dtype=torch.int64)

    def matrix(self, rows: int, columns: int) -> Matrix:
        return TRITON.prepare(self.tensor(rows, columns))

    def light(self, rows: int, columns: int) -> Matrix:
        return TRITON.quantise(self.matrix(rows, columns))

    def cache(self, *layers: int) -> Tensor:
        s = self.shape
        return self.tensor(*layers, 64, s.kv_heads, TRITON.page_size, s.head_dim)

    def cache_pair(self) -> tuple[Tensor, Tensor]:
        return self.cache(), self.cache()

    def grown(self, count: int) -> Grown:
        nodes, rows = self.ids(count, NODES), self.ids(count, NODES + 1)
        path, going = self.ids(count, NODES + 1, DRAFTED + 1), self.tensor(count, dtype=torch.bool)
        return Grown(nodes, nodes, rows, path, self.ids(count), self.ids(count), going)

    def slots(self) -> Slots:
        return Slots(self.ids(self.rows), self.ids(self.rows))

    def rope(self) -> Rope:
        shape = self.rows, 1, self.shape.head_dim
        return Rope(self.tensor(*shape, dtype=torch.float32), self.tensor(*shape, dtype=torch.float32))


def size(stored: Matrix | Tensor) -> int:
    """Bytes of a weight or of scores."""
    tensor = stored.data if isinstance(stored, Matrix) else stored
    return tensor.numel() * tensor.itemsize
