"""Which keys each row of a pass attends to, worked out once per pass and used by every layer."""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .host import ints
from .values import Slots, Tree

UNSEEN = -1e30


class Index(Protocol):
    """The rows of a pass and the pages they read, in the form that one backend's `attend` takes."""

    tile: int | None
    width: int | None


class Block(NamedTuple):
    """Keys of one block of positions: a page of the cache, or slots int64 [B, P] gathered for B branches of a tree.

    mask: float32 [1, kv_heads or 1, tile·group, page_size], added to the scores; the group's rows where it has no tile.
    """

    page: int | Slots
    mask: Tensor

    def read(self, cache: Tensor) -> Tensor:
        """The block's part of a cache [pages, kv_heads, P, D]: [1 or B, kv_heads, P, D]."""
        if isinstance(self.page, int):
            return cache[self.page][None]
        return cache[self.page.page, :, self.page.offset].transpose(1, 2).contiguous()


class Group(NamedTuple):
    """Consecutive rows of one sequence, at most a tile or a page: the first of them, their number, and what they see.

    In a tree the blocks after the first `shared` ones differ by branch, and row r of the group is read from branch
    `branch[r]`; rows of one path from the root lie in one branch.
    """

    start: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    blocks: list[Block]
    branch: list[int]


class AttentionIndex:
    """Rows grouped by sequence in tiles, the pages each group reads, and the masks over those pages.

    A pass's rows come sorted by sequence: `sequence` int64 [R] names the row of `block_table` [S, pages] a row belongs
    to (-1 for padding rows), `position` int64 [R] its place in that sequence; `page_size` slots per page. Rows that
    are nodes of a draft tree find their keys through `tree`. `width`: sequence s has the rows from s·width to
    (s + 1)·width, the real ones first; only kernels need to be told, as of `arrivals`, those of `Entry`.
    """

    def __init__(
        self,
        sequence: Tensor,
        position: Tensor,
        block_table: Tensor,
        *,
        page_size: int,
        tile: int | None,
        tree: Tree | None = None,
        width: int | None = None,
        arrivals: Tensor | None = None,
    ) -> None:
        self.tile = tile
        self.width = width
        self.sequence = sequence.contiguous()
        self.position = position.contiguous()
        self.block_table = block_table.contiguous()
        self.tree = None if tree is None else Tree(tree.length.contiguous(), tree.slot.contiguous())
        self._page_size = page_size
        self._visible: dict[int, Tensor] = {}
        self._seen: dict[tuple[int | None, bool], list[Group]] = {}

    @cached_property
    def _groups(self) -> list[tuple[int, list[int], list[int]]]:
        """First row, positions and pages of each group."""
        size, tree = self._page_size, self.tree
        return [
            (start, at, ints(self.block_table[row, : None if tree is not None else max(at) // size + 1]))
            for row, start, at in _groups(ints(self.sequence), ints(self.position), self.tile or size)
        ]

    def groups(self, window: int | None, slopes: Tensor | None, kv_heads: int, group: int) -> list[Group]:
        """Every group of rows, with its blocks from the first page any of its rows sees."""
        key = (window, slopes is not None)
        if key not in self._seen:
            self._seen[key] = [
                self._group(start, positions, pages, window, slopes, kv_heads, group)
                for start, positions, pages in self._groups
            ]
        return self._seen[key]

    def _group(
        self,
        start: int,
        positions: list[int],
        pages: list[int],
        window: int | None,
        slopes: Tensor | None,
        kv_heads: int,
        group: int,
    ) -> Group:
        def mask(block: int, at: list[int]) -> Tensor:
            return self._mask(block, at, window, slopes, kv_heads, group)

        count, end = len(positions), max(positions) // self._page_size + 1
        first = 0 if window is None else max(0, min(positions) - window + 1) // self._page_size
        if self.tree is None:
            return Group(start, count, [Block(pages[b], mask(b, positions)) for b in range(first, end)], [0] * count)
        leaves, branch = _branches(self._paths(start, positions))
        common = max(first, int(self.tree.length[start : start + count].min()) // self._page_size)
        blocks = [Block(pages[b], mask(b, positions)) for b in range(first, min(common, end))]
        blocks += [
            Block(self._path(b, start, leaves, positions, pages), mask(b, positions)) for b in range(common, end)
        ]
        return Group(start, count, blocks, branch)

    def _paths(self, start: int, positions: list[int]) -> list[list[int]]:
        """The slots of each row's path through the tree, its own last."""
        tree = self.tree
        assert tree is not None
        return [ints(tree.slot[row, : at - int(tree.length[row]) + 1]) for row, at in enumerate(positions, start)]

    def _path(self, block: int, start: int, leaves: list[int], positions: list[int], pages: list[int]) -> Slots:
        """Where the keys of a block lie on the path of each leaf; positions after its own repeat that."""
        tree, size, rows = self.tree, self._page_size, torch.tensor(leaves)
        assert tree is not None
        own = torch.tensor(positions)[rows, None]
        position = torch.minimum(torch.arange(block * size, (block + 1) * size)[None], own)
        depth = position - tree.length[start + rows, None]
        slot = torch.where(depth < 0, position, tree.slot[start + rows].gather(1, depth.clamp(min=0)))
        return Slots(torch.tensor(pages)[slot // size], slot % size)

    def _mask(
        self,
        block: int,
        positions: list[int],
        window: int | None,
        slopes: Tensor | None,
        kv_heads: int,
        group: int,
    ) -> Tensor:
        size, tile = self._page_size, self.tile or len(positions)
        oldest, newest = block * size, (block + 1) * size - 1
        in_window = window is None or oldest > max(positions) - window
        if slopes is None and newest <= min(positions) and in_window:
            return self._nothing_hidden(tile * group)
        row = torch.tensor(positions + positions[:1] * (tile - len(positions)))[:, None]
        distance = torch.arange(oldest, newest + 1) - row
        seen = distance <= 0 if window is None else (distance <= 0) & (distance > -window)
        mask = torch.zeros(tile, size).masked_fill_(~seen, UNSEEN)
        mask = mask[None, :, None, :].expand(1, tile, group, size)
        if slopes is not None:
            bias = slopes.view(kv_heads, 1, group, 1) * distance.float()[None, :, None, :]
            mask = mask + bias.masked_fill(~seen[None, :, None, :], 0)
        return mask.reshape(1, -1, tile * group, size)

    def _nothing_hidden(self, queries: int) -> Tensor:
        """The mask of a page that every row sees whole, shared: long prompts have many."""
        if queries not in self._visible:
            self._visible[queries] = torch.zeros(1, 1, queries, self._page_size)
        return self._visible[queries]


class RowGroups(NamedTuple):
    """Groups of rows on the device: first row and number of rows, int32 [bound]; unused ones have none."""

    first: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    bound: int


class TritonIndex:
    """The same description of a pass, left on the device, and the scratch memory its attention shares.

    Takes what AttentionIndex takes; pages are the blocks of the reduction, so `page_size` is a power of two up to 64.
    With a `width` the groups of rows need not be looked for.
    """

    def __init__(
        self,
        sequence: Tensor,
        position: Tensor,
        block_table: Tensor,
        *,
        page_size: int,
        tile: int | None,
        tree: Tree | None = None,
        width: int | None = None,
        arrivals: Tensor | None = None,
    ) -> None:
        self.tile = tile
        self.width = width
        self.arrivals = arrivals
        self.page_size = page_size
        self.sequence = sequence.contiguous()
        self.position = position.contiguous()
        self.block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
        self.tree = None if tree is None else Tree(tree.length.contiguous(), tree.slot.contiguous())
        self.row_groups: dict[int, RowGroups] = {}
        self._scratch: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def capacity(self) -> int:
        """Positions a sequence can have in the block table."""
        return self.block_table.shape[1] * self.page_size

    def scratch(self, tiles: int, splits: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """What programs hand over to the one that merges: sums, their maxima and totals, and how many arrived."""
        key = (tiles, splits, heads, head_dim)
        if key not in self._scratch:
            device, rows = self.sequence.device, self.sequence.shape[0]
            partial = torch.empty(splits, rows, heads, head_dim, dtype=torch.float32, device=device)
            state = torch.empty(splits, rows, heads, 2, dtype=torch.float32, device=device)
            counts = self.arrivals
            if counts is None or len(counts) < tiles:
                counts = torch.zeros(tiles, dtype=torch.int32, device=device)
            self._scratch[key] = partial, state, counts
        return self._scratch[key]


def _branches(paths: list[list[int]]) -> tuple[list[int], list[int]]:
    """The fewest rows whose paths hold those of all rows, and which of them holds each row's."""
    leaves, branch = list[int](), [-1] * len(paths)
    for leaf in sorted(range(len(paths)), key=lambda row: -len(paths[row])):
        if branch[leaf] < 0:
            for row, path in enumerate(paths):
                if branch[row] < 0 and path == paths[leaf][: len(path)]:
                    branch[row] = len(leaves)
            leaves.append(leaf)
    return leaves, branch


def _groups(sequence: list[int], position: list[int], tile: int) -> Iterator[tuple[int, int, list[int]]]:
    start = 0
    while start < len(sequence):
        end = start
        while end < len(sequence) and end - start < tile and sequence[end] == sequence[start]:
            end += 1
        if sequence[start] >= 0:
            yield sequence[start], start, position[start:end]
        start = end
