"""The sequences that share a round, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .rows import Rows
from .sequence import Sequence


class Exit(NamedTuple):
    """The residual streams after the first `layer` layers of the rows drafted from, [S, k, H] (LayerSkip §4.3)."""

    layer: int
    hidden: Tensor


class Draft(NamedTuple):
    """Draft tokens int64 [S, k] and how many of them each sequence drafted, int64 [S].

    With `exit` given, the cache holds those rows' keys and values of the layers before it, and verification goes on
    from there.
    """

    tokens: Tensor
    length: Tensor
    exit: Exit | None = None


class Sampling(NamedTuple):
    """Sampling parameters of each row, [R]; float32 the first three, int64 the rest."""

    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    seed: Tensor


@dataclass(frozen=True)
class Batch:
    """S sequences at the start of a round; built anew for every round.

    `last` int64 [S] is each sequence's newest token, not yet in the cache; `length` int64 [S] the tokens before it,
    all cached; `room` int64 [S] the draft tokens that can still be of use.
    """

    sequences: list[Sequence]
    last: Tensor
    length: Tensor
    room: Tensor
    block_table: Tensor
    tile: int

    @staticmethod
    def of(sequences: list[Sequence], tile: int, device: torch.device) -> Batch:
        width = max(len(s.pages) for s in sequences)
        table = torch.tensor([s.pages + [0] * (width - len(s.pages)) for s in sequences], device=device)
        state = torch.tensor([(s.tokens[-1], s.cached, s.room) for s in sequences], device=device)
        last, length, room = (column.contiguous() for column in state.T)
        return Batch(sequences, last, length, room, table, tile)

    @property
    def device(self) -> torch.device:
        return self.last.device

    def sampling(self) -> Sampling:
        """One entry per sequence."""
        params, device = [s.params for s in self.sequences], self.device
        return Sampling(
            torch.tensor([float(p.temperature) for p in params], device=device),
            torch.tensor([float(p.top_p) for p in params], device=device),
            torch.tensor([float(p.min_p) for p in params], device=device),
            torch.tensor([p.top_k for p in params], device=device),
            torch.tensor([s.seed if s.seed < 2**63 else s.seed - 2**64 for s in self.sequences], device=device),
        )

    def __len__(self) -> int:
        return len(self.sequences)

    def rows(self, tokens: Tensor, first: Tensor, count: Tensor) -> Rows:
        """Rows for `tokens` int64 [S, K] from positions `first` [S], of which the first `count` [S] are real."""
        step = torch.arange(tokens.shape[1], device=self.device)
        real = step < count[:, None]
        sequence = torch.where(real, torch.arange(len(self), device=self.device)[:, None], -1)
        position = torch.where(real, first[:, None] + step, 0)
        return Rows(tokens.flatten(), position.flatten(), sequence.flatten(), self.block_table, self.tile)
