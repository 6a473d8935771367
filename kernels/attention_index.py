"""Which keys each row of a pass attends to, worked out once per pass and used by every layer."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .host import ints

UNSEEN = -1e30


class AttentionIndex:
    """Rows grouped by sequence in tiles, the pages each group reads, and the masks over those pages.

    A pass's rows come sorted by sequence: `sequence` int64 [R] names the row of `block_table` [S, pages] a row belongs
    to (-1 for padding rows), `position` int64 [R] its place in that sequence; `page_size` slots per page.
    """

    def __init__(self, sequence: Tensor, position: Tensor, block_table: Tensor, *, page_size: int, tile: int) -> None:
        self.tile = tile
        self._page_size = page_size
        self._groups = [
            (start, positions, ints(block_table[row, : max(positions) // page_size + 1]))
            for row, start, positions in _groups(ints(sequence), ints(position), tile)
        ]
        self._visible: Tensor | None = None
        self._blocks: dict[tuple[int | None, bool], list[tuple[int, int, list[tuple[int, Tensor]]]]] = {}

    def blocks(
        self, window: int | None, slopes: Tensor | None, kv_heads: int, group: int
    ) -> Iterator[tuple[int, int, list[tuple[int, Tensor]]]]:
        """(first row, number of rows, [(page, mask)]) of every group, from the first page any of its rows sees.

        A mask is float32 [1, kv_heads or 1, tile·group, page_size], added to the scores.
        """
        key = (window, slopes is not None)
        if key not in self._blocks:
            self._blocks[key] = [
                (start, len(positions), self._group_blocks(positions, pages, window, slopes, kv_heads, group))
                for start, positions, pages in self._groups
            ]
        yield from self._blocks[key]

    def _group_blocks(
        self,
        positions: list[int],
        pages: list[int],
        window: int | None,
        slopes: Tensor | None,
        kv_heads: int,
        group: int,
    ) -> list[tuple[int, Tensor]]:
        size, tile = self._page_size, self.tile
        row = torch.tensor(positions + positions[:1] * (tile - len(positions)))[:, None]
        first = 0 if window is None else max(0, min(positions) - window + 1) // size
        blocks: list[tuple[int, Tensor]] = []
        for block in range(first, len(pages)):
            last_of_block, oldest = (block + 1) * size - 1, block * size
            in_window = window is None or oldest > max(positions) - window
            if slopes is None and last_of_block <= min(positions) and in_window:
                blocks.append((pages[block], self._nothing_hidden(group)))
                continue
            distance = torch.arange(block * size, (block + 1) * size) - row
            seen = distance <= 0 if window is None else (distance <= 0) & (distance > -window)
            mask = torch.zeros(tile, size).masked_fill_(~seen, UNSEEN)
            mask = mask[None, :, None, :].expand(1, tile, group, size)
            if slopes is not None:
                bias = slopes.view(kv_heads, 1, group, 1) * distance.float()[None, :, None, :]
                mask = mask + bias.masked_fill(~seen[None, :, None, :], 0)
            blocks.append((pages[block], mask.reshape(1, -1, tile * group, size)))
        return blocks

    def _nothing_hidden(self, group: int) -> Tensor:
        """The mask of a page that every row sees whole, shared: long prompts have many."""
        if self._visible is None:
            self._visible = torch.zeros(1, 1, self.tile * group, self._page_size)
        return self._visible


def _groups(sequence: list[int], position: list[int], tile: int) -> Iterator[tuple[int, int, list[int]]]:
    start = 0
    while start < len(sequence):
        end = start
        while end < len(sequence) and end - start < tile and sequence[end] == sequence[start]:
            end += 1
        if sequence[start] >= 0:
            yield sequence[start], start, position[start:end]
        start = end
