"""Consecutive rows of one sequence, grouped on the device: the host knows no more than how many there can be."""

import torch
import triton
import triton.language as tl

from . import launch
from .attention_index import RowGroups, TritonIndex
from .primitives import flags, wait_for_producers


def row_groups(index: TritonIndex, rows: int) -> RowGroups:
    """Groups of at most `rows` consecutive rows of one sequence, made once per index; the host knows only a bound."""
    if rows not in index.row_groups:
        count = index.sequence.shape[0]
        sequences = index.block_table.shape[0]
        bound = max(1, (count + min(sequences, count) * (rows - 1)) // rows)
        # Both start on 16 bytes whatever the bound, or the kernels that read them would be compiled twice.
        table = torch.zeros(2, -(-bound // 4) * 4, dtype=torch.int32, device=index.sequence.device)
        groups = RowGroups(table[0, :bound], table[1, :bound], bound)
        _row_groups_kernel[(sequences,)](
            index.sequence,
            groups.first,
            groups.count,
            count,
            GROUP_ROWS=rows,
            BLOCK=1024,
            **launch.options(4, 1),
        )
        index.row_groups[rows] = groups
    return index.row_groups[rows]


@triton.jit(do_not_specialize=["rows"])
def _row_groups_kernel(
    sequence_ptr,
    first_ptr,
    count_ptr,
    rows,
    GROUP_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """first row and row count of the groups of sequence pid, int32 [groups]; sequence int64 [rows], -1 for padding.

    The n-th sequence of the pass owns groups from (its first row + n·(GROUP_ROWS − 1)) // GROUP_ROWS on.
    """
    pid_sequence = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    wait_for_producers(PDL)
    first = rows
    count = 0
    earlier = 0
    for block in range(0, rows, BLOCK):
        offs_row = block + offs
        mask = offs_row < rows
        sequence = tl.load(sequence_ptr + offs_row, mask=mask, other=-1)
        before = tl.load(sequence_ptr + offs_row - 1, mask=mask & (offs_row > 0), other=-1)
        own = sequence == pid_sequence
        first = tl.minimum(first, tl.min(tl.where(own, offs_row, rows), axis=0))
        count += tl.sum(own.to(tl.int32), axis=0)
        begins = (sequence >= 0) & (sequence != before) & (offs_row < first)
        earlier += tl.sum(begins.to(tl.int32), axis=0)
    base = (first + earlier * (GROUP_ROWS - 1)) // GROUP_ROWS
    for block in range(0, count, BLOCK * GROUP_ROWS):
        offs_group = block // GROUP_ROWS + offs
        left = count - offs_group * GROUP_ROWS
        tl.store(first_ptr + base + offs_group, first + offs_group * GROUP_ROWS, mask=left > 0)
        tl.store(count_ptr + base + offs_group, tl.minimum(left, GROUP_ROWS), mask=left > 0)


@triton.jit
def rows_of_group(
    pid_group,
    first_ptr,
    count_ptr,
    sequence_ptr,
    position_ptr,
    active_ptr,
    offs_row,
    mask_m,
    width,
    window,
    GROUP_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A group's first row and row count; owner and position of its rows at offs_row [M], −1 where there are none.

    Then which there are, their last position, −1 without any, and the oldest that one of them sees. Groups are given
    by first and count, and waited for, or every sequence has `width` rows.
    """
    if first_ptr is None:
        parts = (width + GROUP_ROWS - 1) // GROUP_ROWS
        part = pid_group % parts * GROUP_ROWS
        first = (pid_group // parts).to(tl.int64) * width + part
        count = tl.minimum(width - part, GROUP_ROWS)
    else:
        wait_for_producers(PDL)
        first = tl.load(first_ptr + pid_group).to(tl.int64)
        count = tl.load(count_ptr + pid_group)
    mask_m = mask_m & (offs_row < count)
    owner = tl.load(sequence_ptr + first + offs_row, mask=mask_m, other=-1, cache_modifier=".cg")
    position = tl.load(position_ptr + first + offs_row, mask=mask_m, other=-1, cache_modifier=".cg")
    mask_m = mask_m & (owner >= 0)
    if active_ptr is not None:
        mask_m = mask_m & flags(active_ptr, first + offs_row, mask_m)
    position = tl.where(mask_m, position, -1).to(tl.int32)
    last = tl.max(position, axis=0)
    oldest = last * 0
    if window is not None:
        oldest = tl.maximum(tl.min(tl.where(mask_m, position, last), axis=0) - window + 1, 0)
    return first, count, owner, position, mask_m, last, oldest
