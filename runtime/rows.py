"""The rows of a pass: one token's activations each, of any number of sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.values import Tree


@dataclass(frozen=True)
class Rows:
    """A ragged batch, sorted by sequence. R rows; S sequences.

    token, position and sequence are int64 [R]; `sequence` names a row of `block_table` int64 [S, pages], -1 marks a
    row that belongs to none and whose results nobody reads. A row's keys and values go to logical slot `slot` int64
    [R], its position without one; rows that are not consecutive tokens say in `tree` where the keys of their own path
    lie. RoPE sees `angle` int64 [R], the position without one: they differ where a cache leaves tokens out. `active`
    bool [2L, R] says which sub-layers run for each row, all of them without it: one that does not is the identity and
    writes no keys and values. `prompt` is the prompt's length where the rows are tokens of a prompt, which may rotate
    otherwise than generated ones.
    `tile` is the number of rows every product is padded to; with None none is, and rounding may follow their number.
    """

    token: Tensor
    position: Tensor
    sequence: Tensor
    block_table: Tensor
    tile: int | None
    slot: Tensor | None = None
    tree: Tree | None = None
    active: Tensor | None = None
    angle: Tensor | None = None
    prompt: int | None = None

    def __len__(self) -> int:
        return self.token.shape[0]

    def padded(self, count: int) -> Rows:
        """The same rows and as many of no sequence as make `count`."""
        missing = count - len(self)
        if not missing:
            return self
        return Rows(
            functional.pad(self.token, (0, missing)),
            functional.pad(self.position, (0, missing)),
            functional.pad(self.sequence, (0, missing), value=-1),
            self.block_table,
            self.tile,
            None if self.slot is None else functional.pad(self.slot, (0, missing)),
            None
            if self.tree is None
            else Tree(
                functional.pad(self.tree.length, (0, missing)), functional.pad(self.tree.slot, (0, 0, 0, missing))
            ),
            None if self.active is None else functional.pad(self.active, (0, missing)),
            None if self.angle is None else functional.pad(self.angle, (0, missing)),
            self.prompt,
        )

    def longest(self, page_size: int) -> int:
        """A position none of the rows lies beyond, known without reading one."""
        return self.block_table.shape[1] * page_size - 1

    def slots(self, page_size: int) -> tuple[Tensor, Tensor]:
        """Page and offset in it where each row's keys and values go; page 0 for rows of no sequence."""
        slot = self.position if self.slot is None else self.slot
        page = self.block_table[self.sequence.clamp(min=0), slot // page_size]
        return torch.where(self.sequence >= 0, page, 0), slot % page_size


class Lineage(NamedTuple):
    """Where the rows of a draft tree stand: depth int64 [S, K]; path int64 [S, K, D], the rows from row 0 down to each.

    Entries past a row's own depth repeat the row.
    """

    depth: Tensor
    path: Tensor

    @staticmethod
    def of(parent: Tensor) -> Lineage:
        """The lineage of a tree given by `Draft.parent`."""
        up = functional.pad(parent, (1, 0))
        row = torch.arange(up.shape[1], device=up.device).expand(up.shape)
        upwards = [row]
        while bool((upwards[-1] > 0).any()):
            upwards.append(up.gather(1, upwards[-1]))
        ancestors = torch.stack(upwards, dim=2)
        depth = (ancestors > 0).sum(dim=2)
        steps = torch.arange(len(upwards), device=up.device)
        return Lineage(depth, ancestors.gather(2, (depth[:, :, None] - steps).clamp(min=0)))


@dataclass(frozen=True)
class Chains:
    """Consecutive tokens of every sequence, as many rows of each: what one launch makes the rows of a pass of.

    token int64 [S, K], of which the first count int64 [S] are real, all without it, and none of a sequence that is not
    alive bool [S]; or token int64 [S, 1] and after it draft int64 [S, K − 1], of which the first count are real.
    Position `first` int64 [S] + `ahead` is that of a sequence's first. `gated`: rows that are not real run no
    sub-layer; with `mask` bool [2L], or [2L, S], the others run those it says. With `lineage` the tokens lie in
    consecutive slots and are nodes of a tree, whose root is at that position.
    """

    token: Tensor
    first: Tensor
    count: Tensor | None
    alive: Tensor | None
    block_table: Tensor
    tile: int | None
    ahead: int = 0
    gated: bool = False
    mask: Tensor | None = None
    lineage: Lineage | None = None
    draft: Tensor | None = None

    @property
    def width(self) -> int:
        """Rows of each sequence, real or not."""
        return self.token.shape[1] + (0 if self.draft is None else self.draft.shape[1])

    def __len__(self) -> int:
        return len(self.token) * self.width

    def active(self, real: Tensor) -> Tensor | None:
        """Which of 2L sub-layers run for each row, of which some are `real` bool [R]; None where all do."""
        if self.mask is None:
            return real[None] if self.gated else None
        if self.mask.dim() == 1:
            return self.mask[:, None] & real
        mask, padding = self.mask[:, :, None].expand(-1, -1, self.width).flatten(1), len(real) - len(self)
        return (functional.pad(mask, (0, padding)) if padding else mask) & real

    def spread(self) -> Rows:
        """Tokens that follow one another as rows that can be changed one by one."""
        token, count = self.token, self.count
        if self.draft is not None:
            token, count = torch.cat([token, self.draft], dim=1), count if count is None else count + token.shape[1]
        step = torch.arange(self.width, device=token.device)
        real = torch.ones_like(token, dtype=torch.bool) if count is None else step < count[:, None]
        if self.alive is not None:
            real &= self.alive[:, None]
        sequence = torch.where(real, torch.arange(len(token), device=token.device)[:, None], -1)
        position = torch.where(real, self.first[:, None] + self.ahead + step, 0)
        return Rows(token.flatten(), position.flatten(), sequence.flatten(), self.block_table, self.tile)


def one_sequence(
    tokens: list[int],
    start: int,
    pages: list[int],
    tile: int | None,
    device: torch.device,
    *,
    prompt: int | None = None,
) -> Rows:
    """Rows for consecutive `tokens` from position `start` of the sequence that lies in `pages`.

    `prompt` is the length of the prompt they belong to; None for generated tokens.
    """
    position = torch.arange(start, start + len(tokens), device=device)
    token, table = torch.tensor(tokens, device=device), torch.tensor([pages], device=device)
    return Rows(token, position, torch.zeros_like(position), table, tile, prompt=prompt)
